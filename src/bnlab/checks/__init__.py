"""Checks, which judge evidence. Each check has a file of its own, and ``catalog`` lists them."""

from bnlab.checks.catalog import CHECKS, EVERY_CHECK, by_code, explain, select
from bnlab.checks.check import AnyCheck, Case, Check, GraphCheck, Group, ModelCheck, Needs, RunCheck
from bnlab.checks.run_catalog import RUN_CHECKS

__all__ = [
    "CHECKS",
    "EVERY_CHECK",
    "RUN_CHECKS",
    "AnyCheck",
    "Case",
    "Check",
    "GraphCheck",
    "Group",
    "ModelCheck",
    "Needs",
    "RunCheck",
    "by_code",
    "explain",
    "select",
]
