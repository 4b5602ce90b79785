"""Triton's interpreter without what takes most of its time: the work that it repeats, and its checks of int32."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _interpret_fast(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter))
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", _reduce_in_vectors)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    with np.errstate(all="ignore"):  # a GPU says nothing about inf and NaN
        yield


def _once_a_launch(interpreter):
    """Return a function that replaces the functions of `triton.language` once a launch, not in every call within it."""
    original, replaced = interpreter._patch_lang, set()
    modules = (interpreter.tl, interpreter.tl.core)

    def once(function):
        key = tuple(any(value is module for value in function.__globals__.values()) for module in modules)
        if key in replaced:
            return None  # only a launch restores, and it is never within another one
        scope = original(function)
        replaced.add(key)
        restore = scope.restore

        def restore_all():
            replaced.clear()
            restore()

        scope.restore = restore_all
        return scope

    return once


def _reduce_in_vectors(self, values):
    """Reduce along one axis, one vector after the other in the same order as Triton, which takes single values."""
    values, axis = self.unravel(values, self.axis)
    arrays = [np.moveaxis(value.handle.data, axis, 0) for value in values]

    def at(index):
        return tuple(self.to_tensor(array[index], value.dtype) for array, value in zip(arrays, values, strict=True))

    total = at(0)
    for index in range(1, len(arrays[0])):
        total = self.combine_fn.fn(*total, *at(index))
        total = total if isinstance(total, tuple) else (total,)
    results = [part.handle.data.reshape(array.shape[1:]) for part, array in zip(total, arrays, strict=True)]
    results = [np.expand_dims(result, axis) for result in results] if self.keep_dims else results
    return [self.to_tensor(result, value.dtype) for result, value in zip(results, values, strict=True)]


@pytest.fixture
def on(monkeypatch):
    """A function that lets the kernels believe in a machine, and returns the names of the kernels that run on it."""
    from bnlab.kernels.backends.triton import availability, launching, one_launch, two_launches
    from bnlab.kernels.backends.triton.plan import split

    def use(machine, *, merges: bool = False, in_two: bool = False) -> list[str]:
        names: list[str] = []
        launch = launching.launch

        def recording(kernel, programs, arguments, **options):
            names.append(kernel.fn.__name__)
            launch(kernel, programs, arguments, **options)

        if merges:  # as where a channel has more than 32 parts
            monkeypatch.setattr(two_launches, "split", lambda *arguments: replace(split(*arguments), merges=True))
        if in_two:
            monkeypatch.setattr(one_launch, "teams", lambda *arguments: "a test wants two launches")
        monkeypatch.setattr(one_launch, "_PLANS", {})
        monkeypatch.setattr(availability, "machine_of", lambda device: machine)
        monkeypatch.setattr(launching, "launch", recording)
        return names

    return use
