"""Runs the checks on the evidence, and states the conclusion in one sentence."""

from bnlab.diagnosis.check import Diagnosis, check, check_with
from bnlab.diagnosis.settings import Settings

__all__ = ["Diagnosis", "Settings", "check", "check_with"]
