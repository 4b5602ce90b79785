import copy
import pickle

import pytest
import torch
from tests import oracle
from tests.grids import grid
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnlab
from bnlab.kernels import batch_norm_train, native

BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pytest.mark.parametrize(
    ("layout", "shape", "dtype"),
    grid(
        oracle.LAYOUTS,
        [(4, 3, 5, 6), (2, 3, 2, 3, 4), (6, 3), (4, 3, 5)],
        [torch.float32, torch.bfloat16, torch.float64],
    ),
)
def test_opcheck(layout, shape, dtype):
    x = oracle.LAYOUTS[layout](torch.randn(shape)).to(dtype).requires_grad_()
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.3
    for arguments in ((x, weight, bias, None, 1e-5), (x, None, None, mask, 1e-5)):
        torch.library.opcheck(torch.ops.bnlab.batch_norm_train.default, arguments)
    _, mean, var = batch_norm_train(x.detach(), weight, bias, None, 1e-5)
    backward = (torch.randn(shape).to(dtype), x.detach(), weight.detach(), None, mean, var, 1e-5)
    torch.library.opcheck(torch.ops.bnlab.batch_norm_train_backward.default, backward)


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_and_gradgradcheck(shape, masked):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64).requires_grad_().unbind()
    mask = torch.rand(shape[0], 1, *shape[2:], dtype=torch.float64) + 0.2 if masked else None

    def function(x, weight, bias):
        return batch_norm_train(x, weight, bias, mask, 1e-5)[0]

    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_gradient_penalty_in_float32():
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(BatchNorm2d(3)(x).cos().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(
        bnlab.functional.batch_norm(wide, None, None, training=True).cos().sum(), wide, create_graph=True
    )
    (expected,) = torch.autograd.grad(dx.square().sum(), wide)
    assert_close(second, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "momentum"),
    grid([{}, {"activation": "relu"}, {"nonfinite": "propagate"}, {"track_running_stats": False}], [0.1, None]),
)
def test_compile_full_graph(momentum, options):
    torch._dynamo.reset()
    eager = BatchNorm2d(4, momentum=momentum, **options)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = torch.randn(8, 4, 5, 5)
        if step == 3:
            x[0, 0, 0, 0] = float("inf")
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = eager(left), function(right)
        assert_close(y, z, equal_nan=True)
        y.square().sum().backward()
        z.square().sum().backward()
        assert_close(left.grad, right.grad, equal_nan=True)
    for (name, buffer), other in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        assert_close(buffer, other, equal_nan=True, msg=name)
    eager.eval()
    compiled.eval()
    x = torch.randn(8, 4, 5, 5)
    assert_close(eager(x), function(x), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "options"),
    grid([torch.bfloat16, torch.float16, torch.float32, torch.float64], [{}, {"statistics_dtype": torch.float64}]),
)
def test_eval_in_every_dtype_compiled_and_exported(dtype, options):
    torch._dynamo.reset()
    layer = BatchNorm2d(3, **options).to(dtype).eval()
    layer.running_mean.normal_()
    x = torch.randn(2, 3, 5, 5).to(dtype)
    expected = layer(x)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert_close(torch.export.export(layer, (x,)).module()(x), expected, rtol=1e-2, atol=1e-2)


def test_one_graph_for_every_batch_size():
    torch._dynamo.reset()
    layer = BatchNorm2d(3)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in range(2, 14):
        function(torch.randn(size, 3, 4, 4))
    assert layer.num_batches_tracked == 12
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(BatchNorm2d(3), (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: batch},))
    assert program.module()(torch.randn(7, 3, 5, 5)).shape == (7, 3, 5, 5)


def test_a_refusal_under_compile_is_the_same_error():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="input must have 3 channels"):
        torch.compile(BatchNorm2d(3), backend="aot_eager")(torch.randn(2, 4, 5, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own use of torch.jit
def test_forward_mode_and_transforms_in_train_mode():
    layer = BatchNorm1d(2, track_running_stats=False).double()
    x, v = torch.randn(2, 6, 2, dtype=torch.float64).unbind()
    jacobian = torch.autograd.functional.jacobian(layer, x)
    assert_close(torch.func.jvp(layer, (x,), (v,))[1], torch.einsum("abcd,cd->ab", jacobian, v))
    assert_close(torch.func.jacfwd(layer)(x), jacobian)
    assert_close(torch.func.jacrev(layer)(x), jacobian)
    loss = torch.func.grad(lambda x: layer(x).cos().sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).cos().sum().backward()
    assert_close(loss, leaf.grad)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_compile_with_a_mask_and_a_residual():
    torch._dynamo.reset()
    layer = BatchNorm1d(3, activation="relu")
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual, mask = torch.randn(4, 3, 6), torch.randn(4, 3, 6), torch.rand(4, 6) > 0.5
    expected = copy.deepcopy(layer)(x, residual, mask=mask)
    assert_close(function(x, residual, mask=mask), expected)


def test_export_holds_torchs_own_operator():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4)), torch.randn(2, 3, 5, 5)
    program = torch.export.export(model.eval(), (x,))
    assert any("aten.batch_norm" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), model(x))
    program = torch.export.export(model.train(), (x,))
    assert not any("bnlab" in str(node.target) for node in program.graph.nodes)


def test_per_sample_gradients_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 4), BatchNorm1d(4)).eval()
    model[1].running_mean.normal_()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x = torch.randn(5, 6)

    def loss(parameters, sample):
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        alone = torch.autograd.grad(model(sample[None]).square().sum(), list(parameters.values()))
        assert_close([gradient[index] for gradient in together.values()], list(alone))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_follows_the_input(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4)).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32


def test_copies_and_pickles():
    layer = BatchNorm2d(3, momentum=None, activation="relu", nonfinite="propagate")
    layer(torch.randn(4, 3, 5, 5))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(4, 3, 5, 5)
        assert_close(other.state_dict(), layer.state_dict())
        assert repr(other) == repr(layer)
        assert torch.equal(copy.deepcopy(layer)(x), other(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(use_reentrant):
    plain, recomputed = BatchNorm2d(3), BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(left).square().sum().backward()
        checkpoint(recomputed, right, use_reentrant=use_reentrant).square().sum().backward()
        assert_close(left.grad, right.grad)
    assert recomputed.num_batches_tracked == 3
    assert_close(recomputed.state_dict(), plain.state_dict())


def saved_bytes(function, *arguments):
    """Return the bytes of the tensors that are kept for the backward pass, without the arguments themselves."""
    known = {argument.data_ptr() for argument in arguments}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(*arguments)
    return sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in known)


def test_eval_mode_with_a_frozen_affine_saves_nothing_of_the_size_of_the_input():
    layer = BatchNorm2d(4).eval().requires_grad_(False)
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    assert saved_bytes(layer, x) <= 8 * 4 * 2
    if native.unavailable() is None:
        assert saved_bytes(layer.requires_grad_(True), x) < 1000
    assert saved_bytes(nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ReLU()), x) >= x.nbytes


def test_train_mode_saves_the_input_and_statistics_only():
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    assert saved_bytes(BatchNorm2d(4), x) < 1000


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_export_of_eval_mode_is_a_batch_normalization_node(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(BatchNorm2d(3), nn.ReLU()).eval()  # after a convolution, the exporter would fold the layer
    torch.onnx.export(model, (torch.randn(2, 3, 5, 5),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert "BatchNormalization" in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
