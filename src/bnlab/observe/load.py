"""Loads the weights of a checkpoint file into a model: as data, never as code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import NotACheckpoint, PickledModule, UnreadableFile, UsageError
from bnlab.observe.checkpoint import read_checkpoint
from bnlab.observe.evidence import Hyperparameters

__all__ = ["load_into"]

_DEEPEST = 3
_MOST_NAMED = 3


def load_into(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, strictly.

    Args:
        model: Changed only if everything fits.
        path: A file of torch.save or safetensors. The state dict may lie in a dict of other things, under any key, and
            its names may begin with "module." as DataParallel writes them.

    Raises:
        UnreadableFile: If the file is not there or cannot be read.
        DamagedFile: If it is cut off or otherwise damaged.
        PickledModule: If it holds more than tensors and plain data.
        UsageError: If no state dict in it fits the model.
    """
    wanted = model.state_dict()
    best: tuple[int, dict[str, Tensor]] | None = None
    for found in _state_dicts(_content(path)):
        fitting = sum(name in wanted and found[name].shape == wanted[name].shape for name in found)
        if best is None or fitting > best[0]:
            best = fitting, found
    if best is None:
        raise UsageError(f"{path}: file must hold a state dict, got none.")
    state = best[1]
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
        more = f" and {len(odd) - _MOST_NAMED} more" if len(odd) > _MOST_NAMED else ""
        raise UsageError(f"{path}: state dict must fit the model, got {', '.join(odd[:_MOST_NAMED])}{more}.")
    model.load_state_dict(state, strict=False)


def _content(path: Path) -> Any:  # noqa: ANN401 - a checkpoint holds any data
    try:
        if path.suffix == ".safetensors":
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


def _state_dicts(content: object, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    if not isinstance(content, Mapping):
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield {name.removeprefix("module."): value for name, value in tensors.items()}
    for value in content.values() if depth < _DEEPEST else ():
        yield from _state_dicts(value, depth + 1)
