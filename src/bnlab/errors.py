"""Every error a user of bnlab can meet.

Each derives from :class:`BnlabError` and from the builtin it is a case of, so both ``except BnlabError`` and the
usual ``except ValueError`` work. Messages read ``<subject>: <argument> must be <rule>, got <value>.`` and go on,
where there is a way out, with a sentence that starts with a verb.
"""

from __future__ import annotations

__all__ = [
    "BnlabError",
    "BnlabWarning",
    "DamagedFile",
    "DtypeError",
    "MissingPackage",
    "NoBatchNorm",
    "NotACheckpoint",
    "PickledModule",
    "UnreadableFile",
    "UnwritableFile",
    "UsageError",
]


class BnlabError(Exception):
    """Anything bnlab refuses to do, with a message meant for the user."""


class UsageError(BnlabError, ValueError):
    """An argument is outside what the function or command accepts."""


class UnreadableFile(BnlabError, RuntimeError):
    """The operating system does not hand the file over: it is missing, a folder, or not permitted."""


class UnwritableFile(BnlabError, OSError):
    """A file or folder cannot be written: it is not permitted, there is no such place, or the disk is full."""


class NotACheckpoint(BnlabError, ValueError):
    """The file is whole, but of a kind that holds no checkpoint."""


class DamagedFile(BnlabError, ValueError):
    """The file began as a checkpoint and breaks its own format: truncated, overwritten or corrupt."""


class PickledModule(BnlabError, TypeError):
    """The file holds a pickled module, which could be read only by running code from the file."""


class NoBatchNorm(BnlabError, ValueError):
    """The target was read and holds no batch normalization."""


class MissingPackage(BnlabError, RuntimeError):
    """An optional package is needed for this target and is not installed."""


class DtypeError(BnlabError, TypeError):
    """A tensor has a dtype that the function does not take."""


class BnlabWarning(UserWarning):
    """Something the user can act on."""
