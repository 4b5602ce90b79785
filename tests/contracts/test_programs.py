"""What check, recalibrate, repair and the others do with exported programs and quantised models."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from tests.programs import Net, batches, program_of, trained
from torch import nn
from torch.ao import quantization

import bnlab
from bnlab.errors import BnlabError, NoBatchNorm, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

DATA = [(x, torch.arange(len(x)) % 5) for x in batches()]
"""Batches on the CPU, where loaders make them."""
ACTIONS = {
    "fold": lambda model: bnlab.fold(model, batches(1)[0]),
    "freeze": bnlab.freeze,
    "unfreeze": bnlab.unfreeze,
    "convert": lambda model: bnlab.convert(model, bnlab.nn.BatchNorm2d),
}


def statistics_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_code(diagnosis):
    return {(finding.code, finding.layer): finding.message for finding in diagnosis.findings}


@pytest.mark.parametrize(("training", "decomposed"), [(True, True), (False, False)])
def test_the_findings_on_a_program_are_those_on_its_model(training, decomposed, device):
    model = trained(device).train(training)
    program = program_of(copy.deepcopy(model), dynamic=not training)
    program = program.run_decompositions() if decomposed else program
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    expected = bnlab.check(model, data=DATA, train_data=DATA, metric="accuracy")
    shown = bnlab.check(program, data=DATA, train_data=DATA, metric="accuracy")
    wanted = by_code(expected)
    if decomposed:  # a linear layer is spelled out, so that not every bias is seen
        wanted = {key: message for key, message in wanted.items() if key[0] != "BN201"}
    assert by_code(shown) == wanted
    assert {code for code, _ in wanted} >= {"BN105", "BN301", "BN401"}
    assert shown.numbers == expected.numbers
    assert [layer.name for layer in shown.layers] == ["bn1", "block.0"]
    assert [replace(layer, inputs=()) for layer in shown.layers] == [
        replace(layer, inputs=()) for layer in expected.layers
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


def test_what_a_program_cannot_show_is_skipped_with_the_reason(device):
    outcomes = {o.code: o for o in bnlab.check(program_of(trained(device).eval()), data=DATA).outcomes}
    for code, reason in (
        ("BN212", r"eval\(\) does not reach"),
        ("BN302", "8 samples only"),
        ("BN205", "lack the dropout"),
    ):
        assert outcomes[code].status.value == "skipped"
        assert re.search(reason, outcomes[code].reason)


def test_a_wrong_answer_would_be_caught(device):
    model = trained(device)
    program = program_of(copy.deepcopy(model))
    program.state_dict["bn1.running_var"].mul_(9)
    shown = bnlab.check(program, data=DATA, train_data=DATA)
    assert by_code(shown) != by_code(bnlab.check(model, data=DATA, train_data=DATA))


def test_recalibrating_a_program_gives_the_statistics_of_its_model(device):
    model = trained(device).eval()
    program = program_of(copy.deepcopy(model))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    bnlab.recalibrate(model, batches())
    receipt = bnlab.recalibrate(program, [*batches(), batches(1, samples=3)[0]])
    assert receipt.model is program
    assert "1 batch of another size left out" in receipt.changes.notes
    for name, tensor in model.state_dict().items():
        assert torch.equal(program.state_dict[name], tensor), name
    x = batches(1, device=device)[0]
    torch.testing.assert_close(program.module()(x), model(x))
    receipt.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


def test_repair_changes_the_buffers_of_a_program_and_nothing_else(device):
    torch.manual_seed(0)
    model = Net().to(device)  # never updated
    model.bn1.momentum = 0.9
    program = program_of(model)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    receipt = bnlab.repair(program, data=DATA, force=True, safety="behaviour", level="info")
    assert receipt.model is program
    changed = {name for name, tensor in program.state_dict.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "running" in name or "num_batches" in name}
    reasons = [left.reason for left in receipt.changes.left_alone]
    for name in ("drop-bias", "set-momentum"):
        assert any(f"{name} cannot change the operators of a graph" in reason for reason in reasons)
    receipt.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", ["program", "module", "unflattened"])
def test_what_changes_layers_refuses_a_program_in_one_line(action, kind, device):
    program = program_of(Net().to(device))
    target = {"program": program, "module": program.module(), "unflattened": None}[kind]
    target = torch.export.unflatten(program) if target is None else target
    with pytest.raises(UsageError) as error:
        ACTIONS[action](target)
    assert "\n" not in str(error.value)
    assert "Change the model before" in str(error.value) or "Pass the ExportedProgram" in str(error.value)


def test_a_graph_without_batch_norm_is_no_clean_model(device):
    program = program_of(nn.Conv2d(3, 4, 3).to(device))
    for target in (program, program.module()):
        with pytest.raises(NoBatchNorm, match=r"got none. It was folded away, it is spelled out in other operators"):
            bnlab.check(target)


def test_data_of_another_size_are_refused(device):
    with pytest.raises(UsageError, match="data: every batch must have 8 samples"):
        bnlab.check(program_of(trained(device)), data=batches(samples=4))


on_the_cpu = pytest.mark.cpu_only("the quantised operators of torch run on the CPU")


class Quantisable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.dequant(self.relu(self.bn(self.conv(self.quant(x))))).mean((2, 3)))


def eager(*, aware):
    model = Quantisable()
    settings = quantization.get_default_qat_qconfig if aware else quantization.get_default_qconfig
    model.qconfig, model.fc.qconfig = settings("x86"), None
    if aware:
        quantization.fuse_modules_qat(model, [["conv", "bn", "relu"]], inplace=True)
        return quantization.prepare_qat(model, inplace=True)
    for x in batches():
        model(x)
    quantization.prepare(model.eval(), inplace=True)
    for x in batches():
        model(x)
    return quantization.convert(model, inplace=True)


@on_the_cpu
def test_the_layer_inside_a_fused_module_of_quantisation_aware_training():
    torch.manual_seed(0)
    model = eager(aware=True)
    plain = Quantisable()
    plain.conv.load_state_dict({name: getattr(model.conv, name) for name in ("weight", "bias")})
    before = statistics_of(model)
    shown = bnlab.check(model, data=DATA, train_data=DATA, metric="accuracy")
    assert shown.failure is None
    assert {finding.layer for finding in shown.findings if finding.code in ("BN104", "BN401")} == {"conv.bn"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    receipt = bnlab.recalibrate(model, batches())
    bnlab.recalibrate(plain, batches())
    # The convolution computes with weights of 8 bits, which costs about one step of the 127 in each direction.
    torch.testing.assert_close(model.conv.bn.running_mean, plain.bn.running_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(model.conv.bn.running_var, plain.bn.running_var, rtol=0.05, atol=0)
    receipt.undo()
    assert torch.equal(model.conv.bn.running_mean, before["conv.bn.running_mean"])
    assert bnlab.fold(model, batches(1)[0]).changes.left_alone[0].layer == "conv.bn"


@on_the_cpu
def test_a_quantised_layer_is_frozen_and_its_numbers_are_checked():
    model = eager(aware=False)
    shown = bnlab.check(model, data=DATA, train_data=DATA)
    assert shown.failure is None
    assert [layer.name for layer in shown.layers] == ["bn"]
    assert any("quantised layers normalise with their running statistics in every" in note for note in shown.notes)
    model.bn.running_var[0] = -1
    assert "BN102" in [finding.code for finding in bnlab.check(model).findings]
    for action in ("freeze", "convert"):
        with pytest.raises(UsageError, match=r"torch.ao.nn.quantized"):
            ACTIONS[action](model)
    with pytest.raises(UsageError, match="must not be frozen"):
        bnlab.recalibrate(model, batches())


@on_the_cpu
def test_graphs_of_torchao():
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    graph = prepare_qat_pt2e(program_of(trained()).module(), quantizer)
    before = statistics_of(graph)
    shown = bnlab.check(graph, data=DATA, train_data=DATA, metric="accuracy")
    assert shown.failure is None
    assert [layer.name for layer in shown.layers] == ["bn1", "block.0"]
    assert {finding.layer for finding in shown.findings if finding.code == "BN401"} == {"block.0"}
    after = statistics_of(graph)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    for x in batches():
        graph(x)
    pt2e.move_exported_model_to_eval(graph)
    assert not any("train mode" in note for note in bnlab.check(graph).notes)
    receipt = bnlab.recalibrate(graph, batches())
    assert receipt.model is graph
    with pytest.raises(NoBatchNorm, match="bn1 has running statistics that the graph does not use, as after folding"):
        bnlab.check(convert_pt2e(graph), data=DATA)


def test_instance_normalisation_with_running_statistics_is_named_for_what_it_is(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True, affine=True)).to(device)
    for target in (model, program_of(model), program_of(model).module()):
        with pytest.raises(
            NoBatchNorm, match="1 is instance normalization: train mode normalises each sample by itself"
        ):
            bnlab.check(target)
        for action in (*ACTIONS.values(), lambda model: bnlab.recalibrate(model, batches())):
            with pytest.raises(BnlabError) as error:
                action(target)
            assert "instance normalization" in str(error.value) or "Change the model before" in str(error.value)
    mixed = nn.Sequential(*model, nn.BatchNorm2d(4)).to(device)
    shown = bnlab.check(mixed, data=batches())
    assert [layer.name for layer in shown.layers] == ["2"]
    assert any(note.startswith("left alone: 1 is instance normalization: train mode") for note in shown.notes)
    before = statistics_of(mixed)
    bnlab.recalibrate(mixed, batches())
    changed = {name for name, tensor in mixed.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
