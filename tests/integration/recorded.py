"""Reads back what a run has written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="make test-integration installs tensorboard", exc_type=ImportError)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each scalar in the TensorBoard files below a folder."""
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for read in _read(folder)
        for tag in read.Tags()["scalars"]
    }


def texts(folder: Path) -> dict[str, list[str]]:
    """Return the texts in the TensorBoard files below a folder, by tag."""
    return {
        tag.removesuffix("/text_summary"): [event.tensor_proto.string_val[0].decode() for event in read.Tensors(tag)]
        for read in _read(folder)
        for tag in read.Tags()["tensors"]
    }


def _read(folder: Path) -> list[EventAccumulator]:
    folders = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    return [EventAccumulator(str(one)).Reload() for one in sorted(folders)]
