"""Runs the checks on what was observed, and says in one sentence what they show."""

from bnlab.diagnosis.check import Diagnosis, check, check_with
from bnlab.diagnosis.settings import Settings

__all__ = ["Diagnosis", "Settings", "check", "check_with"]
