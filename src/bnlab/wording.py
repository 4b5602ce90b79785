"""How counts and lists are written in messages and reports."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["abridged", "and_more", "counted", "enumerated", "listed", "out_of"]


def counted(count: int, noun: str, plural: str | None = None, *, separator: str = "") -> str:
    """Return a count with its noun.

    Args:
        count: How many.
        noun: For one.
        plural: For any other number; the noun with an s if it is not given.
        separator: Between thousands.

    Example:
        >>> counted(1, "layer"), counted(0, "layer"), counted(2, "batch", "batches")
        ('1 layer', '0 layers', '2 batches')
        >>> counted(2048, "channel"), counted(2048, "channel", separator=",")
        ('2048 channels', '2,048 channels')
    """
    number = f"{count:,}".replace(",", separator)
    return f"{number} {noun if count == 1 else plural or f'{noun}s'}"


def out_of(count: int, total: int, noun: str, plural: str | None = None) -> str:
    """Return how many of all there are.

    Args:
        count: How many.
        total: Of how many.
        noun: For a total of one.
        plural: For any other total; the noun with an s if it is not given.

    Example:
        >>> out_of(3, 64, "channel"), out_of(1, 1, "batch", "batches")
        ('3 of 64 channels', '1 of 1 batch')
    """
    return f"{count} of {counted(total, noun, plural)}"


def and_more(rest: int) -> str:
    """Return what follows a list that leaves out so many; "" where that is none.

    Example:
        >>> and_more(2), and_more(0)
        (' and 2 more', '')
    """
    return f" and {rest} more" if rest > 0 else ""


def listed(names: Sequence[str], limit: int, *, separator: str = ", ") -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], 3), listed(["a", "b", "c", "d"], 2)
        ('a, b, c', 'a, b and 2 more')
    """
    return separator.join(names[:limit]) + and_more(len(names) - limit)


def enumerated(names: Sequence[str], limit: int) -> str:
    """Return the names as a sentence lists them, or the first ones and how many more there are.

    Example:
        >>> enumerated(["a"], 3), enumerated(["a", "b", "c"], 3), enumerated(["a", "b", "c", "d"], 2)
        ('a', 'a, b and c', 'a, b and 2 more')
    """
    if len(names) > limit or len(names) < 2:
        return listed(names, limit)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def abridged(names: Sequence[str], limit: int) -> str:
    """Return the first names, and dots where there are more.

    Example:
        >>> abridged(["a", "b"], 2), abridged(["a", "b", "c"], 2)
        ('a, b', 'a, b, ...')
    """
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])
