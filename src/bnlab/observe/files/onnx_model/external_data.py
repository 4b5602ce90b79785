"""Locates values of tensors outside the parsed model: in a file beside it, or unparsed in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.errors import BnlabError, DamagedFile
from bnlab.observe.files.content import Content, Span, open_content

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["ModelFile"]


@dataclass(frozen=True)
class ModelFile:
    """The file of a model, with the folder in which its external data lies.

    Attributes:
        folder: The folder of the model.
        content: The file, for the tensors that `skim` left in it; None for a model that was parsed as a whole.
        name: The name of the file in the folder, which may be a symbolic link; None if it is not known.
    """

    folder: Path
    content: Content | None = None
    name: str | None = None

    @classmethod
    def at(cls, path: Path, content: Content | None = None) -> ModelFile:
        """Return the file at a path."""
        return cls(path.parent, content, path.name)

    def span(self, tensor: TensorProto, size: int) -> Span:
        """Return where the bytes of a tensor lie: as many as its dims need, whatever length the model states.

        Args:
            tensor: The tensor, which names a file and an offset in it. The location "" is the file of the model.
            size: How many bytes the tensor needs.

        Raises:
            DamagedFile: If the path leaves the folder, if it is not that of a regular file, if the tensor states
                another size than its dims need, or if the file ends too early.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        start, stated = _number(entries.get("offset", "0")), _number(entries.get("length", str(size)))
        if stated is not None and stated > size:
            raise _unreadable(tensor, location, f"a length of {stated} bytes for a tensor of {size} bytes")
        content = self._opened(location)
        if content is None or start is None or stated != size or start + size > content.size:
            raise _unreadable(tensor, location, "no such data")
        return content.span(start, size)

    def _opened(self, location: str) -> Content | None:
        """Open an external file; None if it is not a regular file in the folder of the model or below it.

        A symbolic link is followed where it leads beside the model itself, as in the cache of Hugging Face: both names
        in a snapshot are links into one folder of blobs. Any other link could lead to a file that is not of this model.
        """
        if not location:
            return self.content
        relative = Path(location)
        if "\0" in location or relative.is_absolute() or ".." in relative.parts:
            return None
        path = self.folder / relative
        try:
            if not path.parent.resolve().is_relative_to(self.folder.resolve()):
                return None
            if not path.is_symlink():
                return open_content(path)
            target = path.resolve(strict=True)
            return open_content(target) if target.parent == self._folder_of_the_model() else None
        except (OSError, RuntimeError, BnlabError):  # RuntimeError: a loop of symbolic links
            return None

    def _folder_of_the_model(self) -> Path | None:
        """Return the folder in which the model lies where its own name is a link; None if its name is not known."""
        return None if self.name is None else (self.folder / self.name).resolve(strict=True).parent


def _number(text: str) -> int | None:
    """Return a number of bytes; None for text that is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(1 << 63)) else None


def _unreadable(tensor: TensorProto, location: str, got: str) -> DamagedFile:
    return DamagedFile(
        f"external data of {tensor.name!r} must be readable beside the model, got {got} in {location or '?'!r}."
    )
