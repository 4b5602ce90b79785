"""Checks, which judge evidence. Each check has a file of its own, and ``catalog`` lists them."""

from bnlab.checks.catalog import CHECKS, by_code, explain, select
from bnlab.checks.check import AnyCheck, Case, Check, GraphCheck, Group, ModelCheck, Needs

__all__ = [
    "CHECKS",
    "AnyCheck",
    "Case",
    "Check",
    "GraphCheck",
    "Group",
    "ModelCheck",
    "Needs",
    "by_code",
    "explain",
    "select",
]
