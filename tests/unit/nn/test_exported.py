import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabWarning
from bnlab.nn.exported import batch_norm_of_torch, exports_updates, is_exporting, trains_as_torch

BatchNorm2d = bnlab.nn.BatchNorm2d


def net(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def torchs(**options):
    """Return torch's layer and the layer of bnlab with the same options."""
    return nn.BatchNorm2d(4, **options), BatchNorm2d(4, **options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}], ids=str)
def test_the_graph_is_that_of_torchs_layer(options, training, strict, device):
    x = torch.randn(2, 3, 9, 9).to(device)
    nets = (net(norm).to(device).train(training) for norm in torchs(**options))
    theirs, own = (torch.export.export(model, (x,), strict=strict) for model in nets)
    assert operators(own) == operators(theirs)


@pytest.mark.parametrize("training", [True, False])
def test_an_activation_is_an_operator_of_its_own(training, device):
    layer, x = BatchNorm2d(3, activation="relu").to(device).train(training), torch.randn(2, 3, 5, 5).to(device)
    program = torch.export.export(layer, (x,))
    assert operators(program)[-2:] == ["aten.batch_norm.default", "aten.relu.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"statistics_dtype": None}, {"affine": False}, {"bias": False}, {"momentum": 0.5}, {"eps": 0.1}],
    ids=str,
)
def test_an_exported_step_is_the_step_of_the_layer(dtype, options, device):
    layer, x = BatchNorm2d(3, **options).to(device, dtype), (torch.randn(8, 3, 5, 5) * 3 + 1).to(device, dtype)
    assert trains_as_torch(layer, x, None)
    program = torch.export.export(copy.deepcopy(layer), (x,)).module()
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        assert_close(program(x), layer(x), **tolerance)
    buffers = dict(program.named_buffers())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(buffers[name], getattr(layer, name), **tolerance)


def test_a_batch_with_an_inf_spoils_an_exported_layer_as_it_spoils_torchs(device):
    x = torch.randn(4, 3, 5, 5).to(device)
    x[0, 0, 0, 0] = torch.inf
    layer = BatchNorm2d(3).to(device)
    program = torch.export.export(copy.deepcopy(layer), (x,)).module()
    program(x)
    layer(x)
    assert not dict(program.named_buffers())["running_mean"].isfinite().all()
    assert layer.running_mean.isfinite().all()


def test_what_torchs_operator_cannot_do(device):
    x = torch.randn(4, 3, 5, 5).to(device)
    assert not trains_as_torch(BatchNorm2d(3).to(device), x, torch.ones(4, 1, 5, 5, device=device))
    assert not trains_as_torch(BatchNorm2d(3, momentum=None).to(device), x, None)
    assert trains_as_torch(BatchNorm2d(3, momentum=None, track_running_stats=False).to(device), x, None)
    assert not trains_as_torch(BatchNorm2d(3, statistics_dtype=torch.float64).to(device), x, None)
    assert trains_as_torch(BatchNorm2d(3, statistics_dtype=torch.float64).to(device).double(), x.double(), None)

    class Own(BatchNorm2d):
        def _update(self, batch):
            pass

    assert not trains_as_torch(Own(3).to(device), x, None)


def test_eager_code_is_not_exported(device):
    assert not is_exporting(torch.randn(2).to(device))
    layer, x = BatchNorm2d(3).to(device), torch.randn(4, 3, 5, 5).to(device)
    expected = nn.BatchNorm2d(3).to(device)
    assert_close(batch_norm_of_torch(layer, x), expected(x))
    assert_close(layer.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    "layer",
    [
        bnlab.nn.BatchRenorm2d(3),
        bnlab.nn.FrozenBatchNorm2d(3, moves_statistics=True),
        BatchNorm2d(3, momentum=None),
        BatchNorm2d(3, statistics_dtype=torch.float64),
    ],
    ids=str,
)
def test_a_graph_that_no_tool_can_move_to_eval_mode_is_named(layer, device):
    layer, x = layer.to(device), torch.randn(4, 3, 5, 5).to(device)
    with pytest.warns(BnlabWarning, match=r"a train-mode export must hold .* Export the model in eval mode"):
        program = torch.export.export(copy.deepcopy(layer), (x,)).module()
    assert_close(program(x), layer(x))
    torch.export.export(layer.eval(), (x,))  # no warning
    assert not exports_updates(layer)


def test_ghost_batches_are_operators_of_torch(device):
    ghost, x = bnlab.nn.GhostBatchNorm2d(3, ghost_size=4).to(device), torch.randn(8, 3, 5, 5).to(device)
    program = torch.export.export(copy.deepcopy(ghost), (x,))
    assert operators(program).count("aten.batch_norm.default") == 2
    assert_close(program.module()(x), ghost(x))


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize(
    "norm", [BatchNorm2d(4), BatchNorm2d(4, affine=False), bnlab.nn.GhostBatchNorm2d(4, ghost_size=4)], ids=str
)
def test_torchaos_switch_to_eval_mode_reaches_the_layer(norm, device):
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    model, x = net(norm).to(device).train(), torch.randn(8, 3, 9, 9).to(device) * 2 + 1
    program = torch.export.export(model, (x,)).module()
    for _ in range(3):
        program(x)
    by_batch = program(x)
    pt2e.move_exported_model_to_eval(program)
    model.load_state_dict({name: value for name, value in program.state_dict().items() if name in model.state_dict()})
    expected = model.eval()(x)
    assert not torch.allclose(by_batch, expected, atol=1e-2)  # what a model that stays in train mode returns
    assert_close(program(x), expected)
    for name in ("running_mean", "running_var"):  # torchao lets the counter go on, in torch's layer too
        assert_close(program.state_dict()[f"1.{name}"], getattr(model[1], name), rtol=0, atol=0)


@pytest.mark.cpu_only("torchao's quantizer for XNNPACK makes operators of the CPU")
@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("qat", [True, False])
def test_torchao_quantizes_as_it_quantizes_torchs_layer(qat):
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    results = []
    theirs = net(nn.BatchNorm2d(4)).train(qat)
    own = net(BatchNorm2d(4)).train(qat)
    own.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 9, 9)
    for model in (theirs, own):
        program = torch.export.export(model, (x,)).module()
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=qat))
        prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(program, quantizer)
        fused = sum("aten.div" in str(node.target) for node in prepared.graph.nodes)
        prepared(x)
        if qat:
            move_exported_model_to_eval(prepared)
        quantized = convert_pt2e(prepared)
        assert not any("batch_norm" in str(node.target) for node in quantized.graph.nodes)
        results.append((fused > 0, quantized(x)))
    (fused, expected), (own_fused, values) = results
    assert fused == own_fused == qat
    assert_close(values, expected, rtol=0, atol=0.1)  # one quantization step where rounding differs


def run_onnx(path, *tensors):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    names = [value.name for value in model.graph.input]
    outputs = ReferenceEvaluator(model).run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    return torch.as_tensor(outputs[0])


class EveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.plain = bnlab.nn.BatchNorm1d(3, activation="relu")
        self.renorm = bnlab.nn.BatchRenorm1d(3, r_max=2.0, d_max=1.0)
        self.frozen = bnlab.nn.FrozenBatchNorm1d(3, moves_statistics=True)
        self.masked = bnlab.nn.BatchNorm1d(3, momentum=None)

    def forward(self, x, keep):
        return self.masked(self.frozen(self.renorm(self.plain(self.conv(x)))), mask=keep)


@pytest.mark.cpu_only("the reference evaluator of ONNX computes with numpy")
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_an_onnx_file_of_train_mode_computes_what_the_model_computes(tmp_path):
    pytest.importorskip("onnxscript")
    model, arguments = EveryKind(), (torch.randn(4, 3, 6) * 2 + 1, torch.rand(4, 6) > 0.4)
    expected = copy.deepcopy(model)(*arguments)
    assert not torch.allclose(copy.deepcopy(model).eval()(*arguments), expected, atol=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BnlabWarning)
        torch.onnx.export(model, arguments, tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert_close(run_onnx(tmp_path / "m.onnx", *arguments), expected.detach(), rtol=1e-4, atol=1e-5)
