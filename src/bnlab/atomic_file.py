"""Writes files completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from bnlab.errors import BnlabWarning, UnwritableFile
from bnlab.partial_file import partial_path, remove_stale, writing
from bnlab.wording import counted, reason_of

__all__ = ["require_writable", "write_whole"]

_PERMISSIONS = 0o777
"""The mode bits that a new content keeps. The system clears the others (set-user-ID) on every write, too."""

_ABOUT_THE_OLD_CONTENT = ("security.capability", "security.ima", "security.evm")
"""Extended attributes that vouch for a content."""

_ACCESS_LIST = "system.posix_acl_access"


def require_writable(path: Path, *, option: str | None = None) -> None:
    """Refuse a path that `write_whole` would refuse, as far as this shows before anything is written.

    A file is read-only if its owner may not write to it (mode bit S_IWUSR), whoever runs this: root may write to every
    file, but whoever cleared the bit meant it. It is also read-only if this process may not write to it, although a
    rename needs no such permission.

    Args:
        path: The path of the file; it need not exist.
        option: As for `write_whole`.

    Raises:
        UnwritableFile: If the path is a folder or a read-only file, its folder is missing, its name is impossible, or
            symbolic links form a circle.
    """
    with _errors_name(path, option):
        status = _status(path)
        if status is None:
            _require_folder(_real(path).parent)
        elif stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif stat.S_ISREG(status.st_mode) and not _is_stream(status):
            _require_permission(path, status.st_mode)


def write_whole(data: bytes, path: Path, *, option: str | None = None) -> None:
    """Write a file through a temporary file beside it, so that nobody sees a partial file.

    An existing file is replaced. The new one has its permissions, owner, group, access list and other extended
    attributes; a warning names what the system does not let this process keep, and says so if the old file has other
    names (hard links), which keep the old content. A symbolic link stays a link. The data is on the disk when this
    returns.

    A pipe or device is written to directly, and so is the file that stdout or stderr goes to. Temporary files that a
    dead process left in the folder are removed.

    Args:
        data: The content of the file.
        path: The path of the file.
        option: The command-line option that names the path, if any; an error begins with it.

    Raises:
        UnwritableFile: If the file cannot be written, or is read-only (`require_writable`). An existing file is then
            unchanged.
    """
    require_writable(path, option=option)
    with _errors_name(path, option):
        status, notes = _status(path), []
        if status is not None and _is_stream(status):
            _write_to_stream(data, status)
        elif status is not None and not stat.S_ISREG(status.st_mode):
            path.write_bytes(data)
        else:
            notes = _replace(_real(path), data, status)
    for note in notes:
        warnings.warn(f"{path}: {note}.", BnlabWarning, stacklevel=2)


class _ReadOnly(OSError):
    """A file that must not be replaced; the text is the value and the way out."""


@contextlib.contextmanager
def _errors_name(path: Path, option: str | None) -> Iterator[None]:
    """Turn errors of the system into one that names the path."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        own = isinstance(error, _ReadOnly)
        reason = str(error) if own else reason_of(error)
        if option is None:
            raise UnwritableFile(f"{path}: file must be writable, got: {reason}.") from None
        raise UnwritableFile(f"{option}: path must be writable, got {path}: {reason}.") from None


def _status(path: Path) -> os.stat_result | None:
    """Return the status of the file behind a path; None if there is none."""
    try:
        return os.stat(path)  # noqa: PTH116 - pathlib takes fewer names
    except FileNotFoundError:
        return None


def _real(path: Path) -> Path:
    """Return where a path leads to; the file need not exist."""
    return Path(os.path.realpath(path))


def _require_folder(folder: Path) -> None:
    if not stat.S_ISDIR(folder.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _require_permission(path: Path, mode: int) -> None:
    if not mode & stat.S_IWUSR:
        raise _ReadOnly(f"read-only file. Choose another path, or make it writable: chmod u+w {path}")
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _stream_of(status: os.stat_result) -> int | None:
    """Return the descriptor of stdout or stderr if it goes to this regular file; else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(status.st_mode) and os.path.samestat(os.fstat(descriptor), status):
                return descriptor
    return None


def _is_stream(status: os.stat_result) -> bool:
    return _stream_of(status) is not None


def _write_to_stream(data: bytes, status: os.stat_result) -> None:
    """Write to the file that stdout or stderr goes to, after what was printed. Replacing it would lose the rest."""
    descriptor = _stream_of(status)
    assert descriptor is not None
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)


def _replace(target: Path, data: bytes, old: os.stat_result | None) -> list[str]:
    """Write a regular file, and return what the user should know."""
    remove_stale(target.parent)
    partial = partial_path(target)
    notes: list[str] = []
    # A new file gets the permissions that the folder and the umask give it. One that replaces another is private until
    # it has the permissions of the other.
    with writing(partial, 0o600 if old else 0o666) as file:
        file.write(data)
        file.flush()
        if old is not None:
            notes = _keep_attributes(file.fileno(), target, old)
        _sync(file.fileno())
        if os.name == "nt":
            file.close()  # Windows renames no open file
        partial.replace(target)
    _sync_folder(target.parent)
    if old is not None and old.st_nlink > 1:
        others = counted(old.st_nlink - 1, "other name")
        notes.append(f"the hard link is cut: the old content stays under {others} of the old file")
    return notes


def _keep_attributes(descriptor: int, target: Path, old: os.stat_result) -> list[str]:
    """Give a file the owner, group, extended attributes and permissions of the file that it replaces."""
    if os.name != "posix":
        return []
    notes, mode = [], stat.S_IMODE(old.st_mode) & _PERMISSIONS
    if not _keep_owner(descriptor, old):
        notes.append(f"the owner of the old file cannot be kept (user {old.st_uid}, group {old.st_gid})")
    if os.fstat(descriptor).st_gid != old.st_gid:
        mode = mode & ~0o070 | (mode & 0o007) << 3  # another group gets no more than everybody
    elif not _keep_extended(descriptor, target):
        notes.append("not all extended attributes of the old file can be kept")
    os.fchmod(descriptor, mode)
    return notes


def _keep_owner(descriptor: int, old: os.stat_result) -> bool:
    """Set owner and group as far as the system lets this process, and return whether both are kept."""
    new = os.fstat(descriptor)
    for user, group in ((old.st_uid, old.st_gid), (-1, old.st_gid)):
        if (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid):
            break
        with contextlib.suppress(OSError):
            os.fchown(descriptor, user, group)
            new = os.fstat(descriptor)
    return (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid)


def _keep_extended(descriptor: int, target: Path) -> bool:
    """Copy the extended attributes, of which an access list is one, and return whether all are kept."""
    if not hasattr(os, "listxattr"):
        return True
    try:
        names = [name for name in os.listxattr(target) if name not in _ABOUT_THE_OLD_CONTENT]
        if _ACCESS_LIST not in names and _ACCESS_LIST in os.listxattr(descriptor):
            os.removexattr(descriptor, _ACCESS_LIST)  # from the default list of the folder
    except OSError:
        return True  # a file system without them
    kept = [_keep_one_extended(descriptor, target, name) for name in names]  # every one, also behind one that fails
    return all(kept)


def _keep_one_extended(descriptor: int, target: Path, name: str) -> bool:
    try:
        value = os.getxattr(target, name)
        if name in os.listxattr(descriptor) and os.getxattr(descriptor, name) == value:
            return True  # as a label of the system, which no process may set
        os.setxattr(descriptor, name, value)
    except OSError:
        return False
    return True


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise


def _sync_folder(folder: Path) -> None:
    """Put the new name of a file on the disk, where the system lets this process."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
