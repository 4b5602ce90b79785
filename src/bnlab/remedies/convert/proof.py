"""Proves by runs that a layer computes what would replace it, where its source code cannot be read.

A run shows only what happens to its inputs. The proof therefore has two parts. Runs on inputs and parameters that are
far apart compare outputs, buffers and gradients in float64. During these runs, the layer may only do arithmetic, and a
function made of arithmetic that agrees with another one at random points agrees everywhere. An operator that selects
values, such as a clamp, a random number, a condition on a value or a size, or an attribute that is not one of BN, ends
the proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.remedies.convert.observed import LayerForward, Observation, Probe, observed
from bnlab.remedies.refusal import Refusal
from bnlab.remedies.source import STANDARD_ATTRIBUTES
from bnlab.remedies.witness import difference, largest

__all__ = ["agrees", "require_equal"]

_TOLERANCE = 1e-7
"""Largest difference allowed between float64 results, relative to the largest value, and to at least 1."""

_ROUNDING = 8
"""Largest difference allowed between results of other dtypes, in eps of the dtype, likewise."""

_READS_A_VALUE = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "unique", "_unique2")

_ARITHMETIC = frozenset({
    "add", "addcmul", "addcdiv", "clone", "contiguous", "copy", "cudnn_batch_norm", "div", "empty_like", "expand",
    "lerp", "mean", "mul", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "neg", "permute", "pow", "reciprocal", "reshape", "rsqrt", "rsub", "select", "sqrt", "square", "squeeze", "std",
    "std_mean", "sub", "sum", "_to_copy", "transpose", "_unsafe_view", "unsqueeze", "var", "var_mean", "view", "zero",
    "ones_like", "zeros_like", "_batch_norm_impl_index", "batch_norm", "_batch_norm_with_update",
})  # fmt: skip
"""Operators whose results are the same formula for every input."""


def agrees(layer: _BatchNorm, replacement: LayerForward, probe: Probe) -> bool:
    """Return whether a layer and its replacement give the same results, up to rounding."""
    try:
        own = observed(layer, type(layer).forward, probe)
    except Exception:
        return False
    return _difference(own, observed(layer, replacement, probe)) is None


def require_equal(layer: _BatchNorm, replacement: LayerForward, spatial: int) -> None:
    """Refuse a layer that differs from its replacement, or whose runs do not prove that it never differs.

    Args:
        layer: The layer. It does not change.
        replacement: A function that computes what would replace the layer, from a copy of it.
        spatial: The number of spatial dimensions of the input.

    Raises:
        Refusal: If a result differs; or if the layer reads or sets attributes that are not those of BN, uses random
            numbers, depends on a value or a size, or runs an operator that is not arithmetic.
    """
    for probe in _probes(layer, spatial):
        mode = "train mode" if probe.training else "eval mode"
        try:
            own = observed(layer, type(layer).forward, probe)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(
                f"a forward that raises {type(error).__name__} on a batch of shape {tuple(probe.x.shape)}"
            ) from error
        expected = observed(layer, replacement, probe)
        _require_arithmetic(layer, own, expected)
        difference = _difference(own, expected)
        if difference is not None:
            raise Refusal(f"a forward of its own, which gives other {difference} in {mode}")
        if not probe.has_grad:
            again = observed(layer, type(layer).forward, replace(probe, seed=1))
            if not torch.equal(own.output, again.output):
                raise Refusal("a forward that uses random numbers")


def _require_arithmetic(layer: _BatchNorm, own: Observation, expected: Observation) -> None:
    """Refuse a run that shows more than arithmetic on the input, the mode and the settings of BN."""
    helpers = {name for name in own.read if _is_own_method(type(layer), name)}
    allowed = {*STANDARD_ATTRIBUTES, *layer._modules, *helpers}  # noqa: SLF001
    if own.read - allowed:
        raise Refusal(f"a forward that reads self.{min(own.read - allowed)}")
    if own.written - {"num_batches_tracked"}:
        raise Refusal(f"a forward that sets self.{min(own.written - {'num_batches_tracked'})}")
    if Counter(own.random) - Counter(expected.random):
        raise Refusal("a forward that uses random numbers")
    if own.compared:
        raise Refusal("a forward that depends on the size of the batch")
    added = [name for name in own.operators if name not in expected.operators]
    counts, usual = Counter(own.operators), Counter(expected.operators)
    if any(counts[name] > usual[name] for name in _READS_A_VALUE):
        raise Refusal("a forward that depends on a value of the data")
    other = [name for name in added if name not in _ARITHMETIC]
    repeated = [name for name in counts if name not in _ARITHMETIC and counts[name] > usual[name]]
    if other or repeated:
        raise Refusal(f"a forward that runs {(other or repeated)[0]}, which is no arithmetic")


def _is_own_method(kind: type, name: str) -> bool:
    return callable(getattr(kind, name, None))


def _probes(layer: _BatchNorm, spatial: int) -> Iterator[Probe]:
    """Yield inputs and parameters that are far apart, in both modes, with and without gradients."""
    generator = torch.Generator().manual_seed(1)
    channels = layer.num_features

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = [(6, channels, *[3] * spatial), (2, channels, *[1] * spatial), (1, channels, *range(4, 4 + spatial))]
    shapes += [(96, channels, *[2] * spatial), *([(5, channels)] if spatial == 1 else [])]
    per_channel = (1, channels, *[1] * spatial)
    own: dict[str, Tensor] = {}
    scattered = {
        "weight": normal(channels),
        "bias": normal(channels),
        "running_mean": normal(channels),
        "running_var": normal(channels).square() + 0.1,
    }
    far = {
        "weight": 1e4 * normal(channels),
        "bias": 1e4 * normal(channels),
        "running_mean": 1e3 * normal(channels),
        "running_var": 1e-4 * normal(channels).square(),
    }
    for number, shape in enumerate(shapes):
        x = normal(*shape)
        yield Probe(x, training=True)
        yield Probe(x, training=False)
        mixed = x * (10.0 ** torch.arange(channels).remainder(5)).double().reshape(-1, *[1] * (len(shape) - 2))
        inputs = [x, mixed]
        if number == 0:
            constant = x.clone()
            constant[:, ::2] = normal(*per_channel)[:, ::2].expand_as(constant[:, ::2])
            inputs += [1e-6 * x, 1e6 * x, x + 1e3, -x.abs(), torch.zeros_like(x), constant]
        for parameters in (own, scattered, far) if number == 0 else (own, far):
            for batch in inputs:
                for training in (True, False):
                    yield Probe(batch, training, parameters, has_grad=True)
    x = normal(*shapes[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Probe(x.to(dtype), training=True)
        yield Probe(x.to(dtype), training=False)


def _difference(own: Observation, expected: Observation) -> str | None:
    """Return what differs between two runs beyond rounding; None if nothing does."""
    if not _close([own.output], [expected.output]):
        return "outputs"
    if own.state.keys() != expected.state.keys() or not _close([*own.state.values()], [*expected.state.values()]):
        return "buffers"
    return None if _close(own.gradients, expected.gradients) else "gradients"


def _close(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    """Return whether tensors agree up to rounding, each on the scale of its largest value, and of 1 at least."""
    if len(left) != len(right):
        return False
    return all(difference(a, b, max(1.0, largest(b))) <= _rounding(a) for a, b in zip(left, right, strict=True))


def _rounding(tensor: Tensor | None) -> float:
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return _TOLERANCE
    return _ROUNDING * torch.finfo(tensor.dtype).eps
