"""BN, its activation and a residual as one operator under a compiler, against the same layer in eager mode."""

import copy

import pytest
import torch
from tests import oracle
from tests.grids import grid
from torch.testing import assert_close

import bnlab
from bnlab.kernels import native
from bnlab.kernels.compiled.activated_train import _room, batch_norm_activated_train

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")

SHAPES = [(2, 1), (6, 5), (300, 1), (3, 1, 70), (2, 40, 3, 3), (3, 20, 10, 10), (2, 3, 33, 31), (1, 300, 2, 2)]


def layer_for(shape):
    kind = bnlab.nn.BatchNorm1d if len(shape) < 4 else bnlab.nn.BatchNorm2d
    return kind(shape[1], activation="relu")


def arguments(shape, layout, *, added, dtype=torch.float32):
    x, residual, grad = (oracle.LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(3))
    return x.requires_grad_(), residual.requires_grad_() if added else None, grad


def operators_of(function, *inputs):
    """Return the operators that a compiler sees for a function and its gradient."""
    seen = []

    def note(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(note(graph, inputs)))
    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*inputs).sum().backward()
    return seen


@pytest.mark.parametrize(("number", "slope"), [(1, 0.0), (2, 0.01)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, added, number, slope):
    torch.manual_seed(0)
    x, residual, _ = arguments((3, 20, 5, 5), layout, added=added)
    weight, bias = (torch.randn(20).requires_grad_() for _ in range(2))
    torch.library.opcheck(
        torch.ops.bnlab.batch_norm_activated_train.default, (x, residual, weight, bias, 1e-5, number, slope)
    )


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_there_is_room_for_the_bits_of_every_shape(layout):
    sizes = (1, 2, 3, 31, 33, 255, 257, 300)
    for channels in sizes:
        for samples, side in ((2, 1), (9, 1), (300, 1), (1, 2), (3, 3), (1, 7), (2, 7), (1, 8), (1, 10), (2, 17)):
            x = oracle.LAYOUTS[layout](torch.zeros(samples, channels, side, side))
            arguments = (x, x, None, None, None, None, None, None, 0.0, 1e-5, 1, 0.0, False, True)
            bits = torch.ops.bnlab_native.train(*arguments)[2]
            assert 0 < bits.numel() <= _room(x, added=True), (samples, channels, side)


@pytest.mark.parametrize(
    ("shape", "added", "dtype"), grid(SHAPES, [False, True, True, False], [torch.float32, torch.bfloat16])
)
def test_a_compiled_layer_gives_the_bits_of_the_layer(shape, added, dtype):
    torch._dynamo.reset()
    eager = layer_for(shape)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, residual, grad = arguments(shape, "contiguous", added=added, dtype=dtype)
    tensors_of_both = []
    for layer, call in ((eager, eager), (compiled, function)):
        wanted = [x, *([residual] if added else []), layer.weight, layer.bias]
        y = call(x, residual)
        tensors_of_both.append([y, *torch.autograd.grad(y, wanted, grad), *layer.buffers()])
    for eager_tensor, compiled_tensor in zip(*tensors_of_both, strict=True):
        assert_close(compiled_tensor, eager_tensor, rtol=1e-6, atol=1e-6)


def test_the_compiler_sees_one_operator_each_way():
    layer = layer_for((4, 3, 6, 6))
    seen = operators_of(layer, *arguments((4, 3, 6, 6), "contiguous", added=True)[:2])
    assert sum("batch_norm_activated_train.default" in name for name in seen) == 1
    assert sum("batch_norm_activated_train_backward" in name for name in seen) == 1
    assert not any("relu" in name or "aten.le." in name or "threshold" in name for name in seen), seen


def test_a_residual_that_is_broadcast_is_left_to_the_compiler():
    layer, x, residual = layer_for((4, 3, 6)), torch.randn(4, 3, 6), torch.randn(1, 3, 1)
    torch._dynamo.reset()
    expected = copy.deepcopy(layer)(x, residual)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, residual), expected)


def test_an_exporter_sees_operators_that_every_consumer_knows():
    layer = layer_for((4, 3, 6, 6))
    program = torch.export.export(layer, (torch.randn(4, 3, 6, 6),))
    assert any("relu" in str(node.target) for node in program.graph.nodes)


def test_a_second_derivative():
    x, weight = torch.randn(6, 3, 4).requires_grad_(), torch.randn(3).requires_grad_()
    y = batch_norm_activated_train(x, None, weight, None, 1e-5, "relu")[0]
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    mean, var = wide.mean((0, 2), keepdim=True), wide.var((0, 2), keepdim=True, unbiased=False)
    expected = ((wide - mean) / (var + 1e-5).sqrt() * wide_weight[:, None]).relu()
    gradients_of_both = []
    for output, inputs in ((y, (x, weight)), (expected, (wide, wide_weight))):
        (first,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
        gradients_of_both.append(torch.autograd.grad(first.square().sum(), inputs))
    for gradient, expected_gradient in zip(*gradients_of_both, strict=True):
        assert_close(gradient, expected_gradient.float(), rtol=1e-3, atol=1e-3)


def test_any_number_of_samples_is_one_graph():
    torch._dynamo.reset()
    layer = layer_for((2, 3, 4, 4))
    function = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in range(2, 12):
        x = torch.randn(size, 3, 4, 4)
        assert_close(function(x, x), copy.deepcopy(layer)(x, x))
    assert layer.num_batches_tracked == 10


def test_an_empty_batch_is_empty_and_does_not_count():
    torch._dynamo.reset()
    eager = layer_for((0, 3, 4, 4))
    compiled = copy.deepcopy(eager)
    x = torch.randn(0, 3, 4, 4)
    y = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x, x)
    assert y.shape == eager(x, x).shape == (0, 3, 4, 4)
    for eager_buffer, compiled_buffer in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert_close(compiled_buffer, eager_buffer)
