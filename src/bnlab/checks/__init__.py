"""Judgements on evidence: one check a file, listed in ``_catalog``."""

from bnlab.checks._catalog import CHECKS, by_code, explain, select
from bnlab.checks._check import Case, Check, Group, Needs

__all__ = ["CHECKS", "Case", "Check", "Group", "Needs", "by_code", "explain", "select"]
