"""All errors that bnlab raises for its users.

Each class derives from :class:`BnlabError` and from a matching built-in exception, so both ``except BnlabError`` and
the usual ``except ValueError`` work. Messages read ``<subject>: <argument> must be <rule>, got <value>.`` If there is a
way to fix the problem, a sentence that starts with a verb follows.
"""

from __future__ import annotations

__all__ = [
    "BatchMisfit",
    "BnlabError",
    "BnlabWarning",
    "DamagedFile",
    "DtypeError",
    "IncompleteFile",
    "MissingPackage",
    "NoBatchNorm",
    "NotACheckpoint",
    "PickledModule",
    "TooMuchWork",
    "UnreadableFile",
    "UnwritableFile",
    "UsageError",
]


class BnlabError(Exception):
    """Base class of all errors of bnlab; the message is meant for the user."""


class UsageError(BnlabError, ValueError):
    """An argument is outside what the function or command accepts."""


class BatchMisfit(UsageError):
    """A batch has another structure than the forward of the model requires."""


class UnreadableFile(BnlabError, RuntimeError):
    """The operating system cannot read the file: it is missing, it is a folder, or access is denied."""


class UnwritableFile(BnlabError, OSError):
    """A file or folder cannot be written: access is denied, the parent folder is missing, or the disk is full."""


class NotACheckpoint(BnlabError, ValueError):
    """The file is intact, but its format cannot hold a checkpoint."""


class DamagedFile(BnlabError, ValueError):
    """The file starts like a checkpoint but breaks its own format: it is truncated, overwritten or corrupt."""


class PickledModule(BnlabError, TypeError):
    """The file holds a pickled module, which can be read only by running code from the file."""


class TooMuchWork(BnlabError, ValueError):
    """Reading the file would take more time or memory than that of any honest checkpoint does."""


class NoBatchNorm(BnlabError, ValueError):
    """The target can be read but holds no batch normalization."""


class IncompleteFile(BnlabError, ValueError):
    """The file holds a part of a BN layer or of a network; the rest lies in other files, or is missing."""


class MissingPackage(BnlabError, RuntimeError):
    """This target needs an optional package that is not installed."""


class DtypeError(BnlabError, TypeError):
    """A tensor has a dtype that the function does not accept."""


class BnlabWarning(UserWarning):
    """A warning that the user can act on."""
