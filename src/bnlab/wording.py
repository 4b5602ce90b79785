"""Formats counts and lists for messages and reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "OTHER_DIRECTION",
    "OWN_FORMULA",
    "TRAINED_WITH",
    "abridged",
    "and_more",
    "counted",
    "did_you_mean",
    "enumerated",
    "error_line",
    "listed",
    "out_of",
    "reason_of",
]

OWN_FORMULA = "its class computes another formula than BN"
"""The reason to skip a layer whose statistics do not say what it computes."""

OTHER_DIRECTION = "the direction of the metric is the wrong one (lower_is_better)"
"""The other reading of a metric that speaks against recalibration."""

_MIN_BEGINNING = 3
"""Number of letters from which the beginning of a name stands for it in a suggestion."""

TRAINED_WITH = "its weights were trained with these statistics, as the loss shows"
"""The reason to skip a layer whose stored statistics belong to its weights."""


def counted(count: int, noun: str, plural: str | None = None, *, separator: str = "") -> str:
    """Return a count with its noun.

    Args:
        count: The count.
        noun: The singular noun.
        plural: The plural noun; None adds an s to the singular.
        separator: The separator between thousands.

    Example:
        >>> counted(1, "layer"), counted(0, "layer"), counted(2, "batch", "batches")
        ('1 layer', '0 layers', '2 batches')
        >>> counted(2048, "channel"), counted(2048, "channel", separator=",")
        ('2048 channels', '2,048 channels')
    """
    number = f"{count:,}".replace(",", separator)
    return f"{number} {noun if count == 1 else plural or f'{noun}s'}"


def out_of(count: int, total: int, noun: str, plural: str | None = None) -> str:
    """Return a count out of a total, with the noun of the total.

    Args:
        count: The count.
        total: The total.
        noun: The singular noun, used if the total is one.
        plural: The plural noun; None adds an s to the singular.

    Example:
        >>> out_of(3, 64, "channel"), out_of(1, 1, "batch", "batches")
        ('3 of 64 channels', '1 of 1 batch')
    """
    return f"{count} of {counted(total, noun, plural)}"


def and_more(rest: int) -> str:
    """Return the end of a list that leaves out `rest` items; "" if it leaves out none.

    Example:
        >>> and_more(2), and_more(0)
        (' and 2 more', '')
    """
    return f" and {rest} more" if rest > 0 else ""


def listed(names: Sequence[str], limit: int, *, separator: str = ", ") -> str:
    """Return the first `limit` names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], 3), listed(["a", "b", "c", "d"], 2)
        ('a, b, c', 'a, b and 2 more')
    """
    return separator.join(names[:limit]) + and_more(len(names) - limit)


def enumerated(names: Sequence[str], limit: int) -> str:
    """Return the names joined as in a sentence; beyond `limit`, the first ones and how many more there are.

    Example:
        >>> enumerated(["a"], 3), enumerated(["a", "b", "c"], 3), enumerated(["a", "b", "c", "d"], 2)
        ('a', 'a, b and c', 'a, b and 2 more')
    """
    if len(names) > limit or len(names) < 2:
        return listed(names, limit)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def abridged(names: Sequence[str], limit: int) -> str:
    """Return the first `limit` names, and dots if there are more.

    Example:
        >>> abridged(["a", "b"], 2), abridged(["a", "b", "c"], 2)
        ('a, b', 'a, b, ...')
    """
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])


def reason_of(error: OSError | ValueError) -> str:
    """Return why the system refused a file, as a part of a sentence.

    Example:
        >>> reason_of(FileNotFoundError(2, "No such file or directory", "a.pt")), reason_of(ValueError("Null byte"))
        ('no such file or directory', 'null byte')
    """
    return (getattr(error, "strerror", None) or str(error)).lower()


def error_line(error: BaseException, limit: int = 300) -> str:
    r"""Return the class of an error and the beginning of its text, in one line.

    Args:
        error: The error.
        limit: Number of characters of the text that are kept.

    Example:
        >>> error_line(ValueError("two\n  lines")), error_line(ValueError("a long text"), 6)
        ('ValueError: two lines', 'ValueError: a long')
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return a sentence, after a space, with the name that is most like a text or begins with it; "" without one.

    Example:
        >>> did_you_mean("acuracy", ["accuracy", "loss"]), did_you_mean("f1", ["accuracy", "loss"])
        (" Did you mean 'accuracy'?", '')
    """
    known, lower = list(names), text.lower()
    by_lower = {name.lower(): name for name in reversed(known)}
    close = difflib.get_close_matches(text, known, n=1)
    close = close or [by_lower[name] for name in difflib.get_close_matches(lower, by_lower, n=1)]
    close = close or [name for name in known if len(text) >= _MIN_BEGINNING and name.lower().startswith(lower)]
    return f" Did you mean {close[0]!r}?" if close else ""
