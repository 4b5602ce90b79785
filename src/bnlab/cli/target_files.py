"""Finds the files below a folder and those that match a pattern.

Every folder is entered once, whatever links lead to it, so that folders that contain themselves have an end.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from bnlab.errors import BnlabError, UnreadableFile
from bnlab.wording import reason_of

__all__ = ["ANY_DEPTH", "Walk", "is_folder", "matching"]

ANY_DEPTH = "**"


@dataclass
class Walk:
    """A walk through folders.

    Attributes:
        follows_links: Whether to enter folders through symbolic links, after all other folders.
        errors: One error for each folder that cannot be read.
    """

    follows_links: bool
    errors: list[BnlabError] = field(default_factory=list)
    _entered: set[tuple[int, int]] = field(default_factory=set)

    def folders(self, start: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """Yield every folder from `start` on that was not entered before, and what it holds, sorted by name."""
        pending, links = [start], deque[str]()
        while pending or links:
            folder = pending.pop() if pending else links.popleft()
            if not self.enters(folder):
                continue
            entries = self.entries(folder)
            yield folder, entries
            inner = [entry for entry in entries if is_folder(entry, follow=False)]
            pending += [_joined(folder, entry.name) for entry in reversed(inner)]
            if self.follows_links:
                to_folders = (entry for entry in entries if entry.is_symlink() and is_folder(entry, follow=True))
                links += [_joined(folder, entry.name) for entry in to_folders]

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Return what a folder holds, sorted by name; nothing, and an error in `errors`, if it cannot be read."""
        try:
            with os.scandir(folder or os.curdir) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as err:
            self.errors.append(UnreadableFile(f"{folder}: folder must be readable, got: {reason_of(err)}."))
            return []

    def enters(self, folder: str) -> bool:
        """Return whether a path is that of a folder that was not entered before, and count it as entered."""
        try:
            status = os.stat(folder or os.curdir)  # noqa: PTH116 - pathlib raises the same errors
        except (OSError, ValueError):
            return False
        if not stat.S_ISDIR(status.st_mode):
            return False
        identity = (status.st_dev, status.st_ino)
        is_new = identity not in self._entered
        self._entered.add(identity)
        return is_new


def matching(pattern: str) -> tuple[list[str], list[BnlabError]]:
    """Return the paths that match a pattern, as `glob.glob` does, and the folders that cannot be read.

    `**` stands for any folders. Unlike `glob.glob`, it enters each folder once. Names that begin with a dot match only
    a pattern that begins with one.
    """
    root, *parts = _split(pattern)
    walks: list[Walk] = []
    paths: Iterable[str] = [root]
    for index, part in enumerate(parts):
        walk = Walk(follows_links=True)
        walks.append(walk)
        paths = _step(paths, part, walk, is_last=index == len(parts) - 1)
    unique = sorted(dict.fromkeys(path for path in paths if path))
    errors = {str(error): error for walk in walks for error in walk.errors}  # two steps may enter one folder
    return unique, list(errors.values())


def _split(pattern: str) -> list[str]:
    """Return the root of a pattern, which is "" for a relative one, and its parts."""
    anchor = PurePath(pattern).anchor
    return [anchor, *(part for part in re.split(r"[/\\]" if os.sep == "\\" else "/", pattern[len(anchor) :]) if part)]


def _step(paths: Iterable[str], part: str, walk: Walk, *, is_last: bool) -> Iterator[str]:
    """Yield the paths one part of a pattern further. Links come last, so that a folder goes by its own name."""
    for path in sorted(paths, key=os.path.islink):
        if part == ANY_DEPTH:
            yield from _below(path, walk, with_files=is_last)
        elif glob.has_magic(part):
            matches = _matcher(part)
            entries = walk.entries(path) if walk.enters(path) else []
            yield from (_joined(path, entry.name) for entry in entries if matches(entry.name))
        elif os.path.lexists(_joined(path, part)):
            yield _joined(path, part)


def _below(start: str, walk: Walk, *, with_files: bool) -> Iterator[str]:
    """Yield a folder and every folder below it, and the files in them if the pattern ends here."""
    for folder, entries in walk.folders(start):
        if _is_hidden(folder, start):
            continue
        yield folder
        if with_files:
            yield from (
                _joined(folder, entry.name)
                for entry in entries
                if not entry.name.startswith(".") and not is_folder(entry, follow=True)
            )


def _is_hidden(folder: str, start: str) -> bool:
    return any(part.startswith(".") for part in PurePath(folder[len(start) :]).parts if part not in ("/", "\\"))


def _matcher(part: str) -> Callable[[str], bool]:
    expression = re.compile(fnmatch.translate(os.path.normcase(part)))
    takes_hidden = part.startswith(".")
    return lambda name: (takes_hidden or not name.startswith(".")) and bool(expression.match(os.path.normcase(name)))


def _joined(folder: str, name: str) -> str:
    return os.path.join(folder, name)  # noqa: PTH118 - keeps the form in which the user writes the pattern


def is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    """Return whether an entry is a folder, or a link to one if links are followed. Links in a circle are none."""
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False
