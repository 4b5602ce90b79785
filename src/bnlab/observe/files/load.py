"""A checkpoint file and the model it belongs to: loaded as data, never as code, and written again."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bnlab.conventions import wrapper_prefix
from bnlab.errors import UsageError
from bnlab.observe.files.checkpoint import FileFormat, StoredFile, named_errors, read_stored
from bnlab.observe.files.containers import Container, containers, keys_of, kind_of, refusal_of_module, tensors_in
from bnlab.observe.files.tensors import StoredTensor, item_bytes
from bnlab.wording import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CheckpointFile", "load_into", "state_dict_file"]

_MOST_NAMED = 3
_SAFETENSORS = ".safetensors"


def load_into(model: nn.Module, path: Path) -> CheckpointFile:
    """Load a state dict into a model, strictly.

    Args:
        model: Changed only if everything fits.
        path: A file of torch.save or safetensors. The state dict may lie in containers of other things, under any key,
            and wrappers may have put a prefix before all its names (`wrapper_prefix`).

    Returns:
        The file, which can be written again with other numbers.

    Raises:
        UnreadableFile: If the file is not there or cannot be read.
        NotACheckpoint: If it holds no tensors.
        DamagedFile: If it is cut off or otherwise damaged.
        PickledModule: If it holds a pickled module and no state dict.
        UsageError: If no state dict in it fits the model.
    """
    wanted = model.state_dict()
    stored = read_stored(path)
    with named_errors(path):
        state = _best_state_dict(stored.tree, wanted)
        unfit = state.unfit(wanted)
        if unfit:
            raise UsageError(f"state dict must fit the model, got {listed(unfit, _MOST_NAMED)}.")
        values = {name: _as_tensor(tensor) for name, tensor in state.tensors.items()}
    model.load_state_dict(values, strict=False)
    return CheckpointFile(path, stored, state)


@dataclass(frozen=True)
class _StateDict:
    """A state dict within a file, by the names of a model.

    Attributes:
        container: As it lies in the file.
        prefix: What stands before each name there.
        tensors: Its tensors by their names in the model.
    """

    container: Container
    prefix: str
    tensors: Mapping[str, StoredTensor]

    def fitting(self, wanted: Mapping[str, Tensor]) -> int:
        """Return how many tensors have the name and shape of one in the model."""
        return sum(name in wanted and tensor.shape == wanted[name].shape for name, tensor in self.tensors.items())

    def unfit(self, wanted: Mapping[str, Tensor]) -> list[str]:
        """Describe what is missing here, too much, or of another kind; the counters of BN layers may be missing."""
        missing = [name for name in wanted if name not in self.tensors and not name.endswith("num_batches_tracked")]
        kinds = {name: kind_of(value) for name, value in self.container.children.items()}
        both = [(name, has, tuple(wanted[name].shape)) for name, has in self.tensors.items() if name in wanted]
        return [
            *(f"no {name}" for name in missing if self.prefix + name not in kinds),
            *(f"{name} stored as {kinds[self.prefix + name]}" for name in missing if self.prefix + name in kinds),
            *(f"an unexpected {name}" for name in self.tensors if name not in wanted),
            *(f"{name} of shape {has.shape} instead of {shape}" for name, has, shape in both if has.shape != shape),
            *(f"{name} of dtype {has.dtype}" for name, has, _ in both if item_bytes(has.dtype) is None),
        ]


def _best_state_dict(tree: object, wanted: Mapping[str, Tensor]) -> _StateDict:
    """Return the first of the state dicts in a file that fit a model best."""
    modules: list[str] = []
    states: list[_StateDict] = []
    for container in containers(tree):
        modules += [container.module] if container.module else []
        tensors = tensors_in(container.children)
        if tensors:
            prefix = wrapper_prefix(tensors.keys(), wanted.keys())
            bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            states.append(_StateDict(container, prefix, bare))
    if states:
        return max(states, key=lambda state: state.fitting(wanted))
    if modules:
        raise refusal_of_module(modules[0])
    raise UsageError("file must hold a state dict, got none.")


def _as_tensor(stored: StoredTensor) -> Tensor:
    """Read a tensor bit by bit; numpy lacks some dtypes, of which it has the bits."""
    tensor = torch.from_numpy(stored.bits())
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


class CheckpointFile:
    """A file that was loaded into a model."""

    def __init__(self, path: Path, stored: StoredFile, state: _StateDict) -> None:
        self._path = path
        self._stored = stored
        self._state = state

    def require_rewritable(self, suffix: str) -> None:
        """Refuse a file that cannot be written again whole, before any work is done.

        Args:
            suffix: Of the path it will be written to.

        Raises:
            UsageError: If it holds objects of foreign classes, and the new file would hold more than the state dict.
        """
        if suffix != _SAFETENSORS:
            _ = self._content

    def rewritten(self, changed: Mapping[str, Tensor], dropped: Collection[str], *, suffix: str) -> bytes:
        """Return the file with other numbers; every tensor that is not named is kept bit by bit.

        The format and nesting are those of the file. Under the suffix ".safetensors", which holds nothing but tensors,
        it is the state dict alone. Tensors are stored for the CPU.

        Args:
            changed: New values by the name in the model; each gets the dtype it has in the file.
            dropped: Names in the model of tensors to leave out.
            suffix: Of the path it will be written to.

        Raises:
            UsageError: If the file cannot be written again, see `require_rewritable`.
        """
        if suffix == _SAFETENSORS:
            state = self._tensors_of_file()
            self._change(state, changed, dropped)
            return state_dict_file(state, suffix, self._stored.metadata)
        content, mapping = self._content
        self._change(mapping, changed, dropped)
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=self._stored.format is not FileFormat.LEGACY)
        return buffer.getvalue()

    def _change(
        self, mapping: MutableMapping[str, Tensor], changed: Mapping[str, Tensor], dropped: Collection[str]
    ) -> None:
        for name in self._state.tensors:
            key = self._state.prefix + name
            if name in dropped:
                mapping.pop(key, None)
            elif name in changed:
                mapping[key] = changed[name].detach().cpu().to(mapping[key].dtype)

    def _tensors_of_file(self) -> dict[str, Tensor]:
        """Return the state dict by the names it has in the file."""
        with named_errors(self._path):
            return {self._state.prefix + name: _as_tensor(stored) for name, stored in self._state.tensors.items()}

    @cached_property
    def _content(self) -> tuple[object, MutableMapping[str, Tensor]]:
        """What torch.save is to write again, and the state dict within it.

        What the data reader keeps as an inert record cannot be written again, so torch loads the file here, as it does
        with weights_only=True. Its tensors share their storages as those of the file do.
        """
        if self._stored.format is FileFormat.SAFETENSORS:
            state = self._tensors_of_file()
            return state, state
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            return content, self._state_dict_within(content)
        except Exception as error:
            raise UsageError(
                f"{self._path}: file must hold tensors and plain data only to be written again, got what "
                f"torch.load(weights_only=True) refuses. Write its state dict alone: --output PATH{_SAFETENSORS}."
            ) from error

    def _state_dict_within(self, content: object) -> MutableMapping[str, Tensor]:
        """Return what lies where the data reader met the state dict; LookupError if it is not the same."""
        mapping: Any = content
        for key in keys_of(self._state.container.path):
            mapping = mapping[key]
        keys = {self._state.prefix + name for name in self._state.tensors}
        if not isinstance(mapping, MutableMapping) or not keys <= mapping.keys():
            raise LookupError("torch.load gives another state dict than the data reader")
        return mapping


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
