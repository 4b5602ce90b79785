"""The documentation of a check, from its own file."""

from __future__ import annotations

from bnlab import checks

__all__ = ["explain"]


def explain(code: str) -> str:
    """Return what a check looks for, why it matters, and what helps, as Markdown.

    Args:
        code: Code of a check, such as "BN102".

    Raises:
        UsageError: If there is no such check.

    Example:
        >>> import bnlab
        >>> bnlab.explain("BN102").splitlines()[0]
        '# BN102 NegativeRunningVariance'
    """
    return checks.by_code(code).page
