"""Runs ONNX models in onnxruntime, on one thread and without the optimisations that would fold BN themselves."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.remedies.fold_onnx.run import ReferenceRuntime, Runtime, Values, evaluation_errors

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OnnxRuntime", "runtimes"]

_SILENT = 4
_OPTIONS = {"session.disable_prepacking": "1"}


def runtimes() -> list[Runtime]:
    """Return the runtimes on this machine, the fastest first."""
    try:
        import onnxruntime
    except ImportError:
        return [ReferenceRuntime()]
    return [OnnxRuntime(onnxruntime), ReferenceRuntime()]


class OnnxRuntime:
    """The CPU operators of onnxruntime, as :class:`~bnlab.remedies.fold_onnx.run.Runtime`.

    Without its arena, onnxruntime frees a tensor after its last use.
    """

    seconds = 20.0

    def __init__(self, package: ModuleType) -> None:
        self._package = package
        self.name = f"onnxruntime {package.__version__}"

    def run(
        self, model: ModelProto, feed: Mapping[str, NDArray[Any]], wanted: Collection[str], seconds: float
    ) -> Values:
        """Run a model, as :class:`~bnlab.remedies.fold_onnx.run.Runtime` describes."""
        with evaluation_errors(), self._texts():
            with _more_outputs(model, wanted) as names:
                session = self._package.InferenceSession(
                    model.SerializeToString(),
                    self._session_options(),
                    providers=["CPUExecutionProvider"],
                    enable_fallback=0,  # it would print the error, and try the same again
                )
            options = self._package.RunOptions()
            options.log_severity_level = _SILENT
            with _limit(options, seconds):
                results = session.run(names, dict(feed), options)
        values = {name: value for name, value in zip(names, results, strict=True) if isinstance(value, np.ndarray)}
        return {**values, **{name: value for name, value in feed.items() if name in wanted}}

    @contextmanager
    def _texts(self) -> Iterator[None]:
        """Give one message to errors whose text is not UTF-8, because it quotes such a name of the model.

        Bindings set the text with PyErr_SetString. It drops a text that is not UTF-8 in Python 3.10 and in the first
        releases of 3.11, and raises a UnicodeDecodeError in the place of the error in later ones.
        """
        try:
            yield
        except Exception as err:
            if isinstance(err, UnicodeDecodeError) or not (err.args or isinstance(err, MemoryError)):
                raise ValueError(f"{self.name} states a reason that is not UTF-8") from err
            raise

    def _session_options(self) -> object:
        options: Any = self._package.SessionOptions()
        options.graph_optimization_level = self._package.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.log_severity_level = _SILENT
        for key, value in _OPTIONS.items():
            options.add_session_config_entry(key, value)
        return options


@contextmanager
def _more_outputs(model: ModelProto, wanted: Collection[str]) -> Iterator[list[str]]:
    """Add tensors to the outputs of a model for a while, and return the names of all outputs."""
    own = [output.name for output in model.graph.output]
    inner = {name for node in model.graph.node for name in node.output if name}
    new = inner.difference(own)
    added = [name for name in wanted if name in new]
    for name in added:
        model.graph.output.add(name=name)
    try:
        yield own + added
    finally:
        del model.graph.output[len(own) :]


@contextmanager
def _limit(options: object, seconds: float) -> Iterator[None]:
    """End a run after some time."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
