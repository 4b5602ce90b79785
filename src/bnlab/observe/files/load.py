"""A checkpoint file and the model it belongs to: loaded as data, never as code, and written again."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import NotACheckpoint, PickledModule, UnreadableFile, UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.files.torch_file import is_legacy
from bnlab.wording import listed

__all__ = ["CheckpointFile", "load_into", "state_dict_file"]

_DEEPEST = 3
_MOST_NAMED = 3
_HEAD_BYTES = 64
_SAFETENSORS = ".safetensors"


def load_into(model: nn.Module, path: Path) -> CheckpointFile:
    """Load a state dict into a model, strictly.

    Args:
        model: Changed only if everything fits.
        path: A file of torch.save or safetensors. The state dict may lie in a dict of other things, under any key, and
            its names may begin with "module." as DataParallel writes them.

    Returns:
        The file, which can be written again with other numbers.

    Raises:
        UnreadableFile: If the file is not there or cannot be read.
        DamagedFile: If it is cut off or otherwise damaged.
        PickledModule: If it holds more than tensors and plain data.
        UsageError: If no state dict in it fits the model.
    """
    wanted = model.state_dict()
    content = _content(path)
    best: tuple[int, _StateDict] | None = None
    for found in _state_dicts(content):
        fitting = sum(name in wanted and found.tensor(name).shape == wanted[name].shape for name in found.names)
        if best is None or fitting > best[0]:
            best = fitting, found
    if best is None:
        raise UsageError(f"{path}: file must hold a state dict, got none.")
    state = {name: best[1].tensor(name) for name in best[1].names}
    odd = [
        *(f"no {name}" for name in wanted if name not in state and not name.endswith("num_batches_tracked")),
        *(f"an unexpected {name}" for name in state if name not in wanted),
        *(
            f"{name} of shape {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ),
    ]
    if odd:
        raise UsageError(f"{path}: state dict must fit the model, got {listed(odd, _MOST_NAMED)}.")
    model.load_state_dict(state, strict=False)
    return CheckpointFile(path, content, best[1])


@dataclass(frozen=True)
class _StateDict:
    """A state dict within a file.

    Attributes:
        mapping: As it is in the file.
        names: Its tensors: the name in the model to the name in the file.
    """

    mapping: Any
    names: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name in the model."""
        found: Tensor = self.mapping[self.names[name]]
        return found


class CheckpointFile:
    """A file that was loaded into a model."""

    def __init__(self, path: Path, content: Any, state: _StateDict) -> None:  # noqa: ANN401 - a file holds any data
        self._path = path
        self._content = content
        self._state = state

    def rewritten(self, changed: Mapping[str, Tensor], dropped: Collection[str], *, suffix: str) -> bytes:
        """Return the file with other numbers; every tensor that is not named is kept bit by bit.

        The format and nesting are those of the file. Under the suffix ".safetensors", which holds nothing but tensors,
        it is the state dict alone. Tensors are stored for the CPU.

        Args:
            changed: New values by the name in the model; each gets the dtype it has in the file.
            dropped: Names in the model of tensors to leave out.
            suffix: Of the path it will be written to.
        """
        mapping = self._state.mapping
        names = {name: key for name, key in self._state.names.items() if name in changed or name in dropped}
        new = {key: changed[name].detach().cpu() for name, key in names.items() if name in changed}
        new = {key: value.to(mapping[key].dtype) for key, value in new.items()}
        gone = {key for name, key in names.items() if name in dropped}
        if suffix == _SAFETENSORS:
            kept = {key: value for key, value in mapping.items() if isinstance(value, Tensor) and key not in gone}
            state = {str(key): value for key, value in (kept | new).items()}
            return state_dict_file(state, suffix, _metadata(self._path))
        is_zip = self._path.suffix == _SAFETENSORS or not is_legacy(self._path.read_bytes()[:_HEAD_BYTES])
        mapping.update(new)
        for key in gone:
            del mapping[key]
        buffer = io.BytesIO()
        torch.save(self._content, buffer, _use_new_zipfile_serialization=is_zip)
        return buffer.getvalue()


def state_dict_file(state: Mapping[str, Tensor], suffix: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a state dict as a file: safetensors under that suffix, else one of torch.save.

    Args:
        state: Tensors by name; safetensors get them contiguous and for the CPU.
        suffix: Of the path it will be written to.
        metadata: What safetensors carry beside the tensors.
    """
    if suffix == _SAFETENSORS:
        from safetensors.torch import save

        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        data: bytes = save(plain, None if metadata is None else dict(metadata))
        return data
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _metadata(path: Path) -> dict[str, str] | None:
    if path.suffix != _SAFETENSORS:
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, str] | None = file.metadata()
    return found


def _content(path: Path) -> Any:  # noqa: ANN401 - a checkpoint holds any data
    try:
        if path.suffix == _SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UnreadableFile(
            f"{path}: file must be readable, got: {(error.strerror or str(error)).lower()}."
        ) from error
    except Exception as error:
        with suppress(PickledModule, NotACheckpoint):
            read_checkpoint(path, Hyperparameters())  # says of a damaged file what is wrong with it
        raise PickledModule(
            f"{path}: file must hold tensors and plain data only to be loaded into a model, got what "
            f"torch.load(weights_only=True) refuses. Save model.state_dict()."
        ) from error


def _state_dicts(content: object, depth: int = 0) -> Iterator[_StateDict]:
    if not isinstance(content, Mapping):
        return
    names = {str(name).removeprefix("module."): name for name, value in content.items() if isinstance(value, Tensor)}
    if names:
        yield _StateDict(content, names)
    for value in content.values() if depth < _DEEPEST else ():
        yield from _state_dicts(value, depth + 1)
