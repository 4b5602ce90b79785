"""torchao: quantized weights beside BN, and quantization-aware training of an exported graph."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

torchao = pytest.importorskip("torchao", reason="make test-integration installs torchao", exc_type=ImportError)
from tests.integration.case import Case, Limit, images  # noqa: E402
from tests.integration.cells import CELLS, Cell, difference, judge, recorded, run_lines  # noqa: E402
from tests.integration.networks import network  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: E402
from torchao.quantization.pt2e import move_exported_model_to_eval  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402

import bnlab  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch uses what it deprecates when this is imported
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

pytestmark = pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized:UserWarning:torchao")


def quantizer():
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))


def graph(*, own):
    """Return the graph of a network in quantization-aware training, after a few steps; with layers of bnlab or not."""
    torch.manual_seed(0)
    model = network().train()
    if own:
        bnlab.convert(model, bnlab.nn.BatchNorm2d)
    prepared = prepare_qat_pt2e(torch.export.export(model, (images()[0],)).module(), quantizer())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for batch in images():
        optimizer.zero_grad()
        prepared(batch).square().mean().backward()
        optimizer.step()
    return prepared


def deployed(prepared):
    """Return the quantized graph in eval mode."""
    move_exported_model_to_eval(prepared)
    return convert_pt2e(prepared)


def quantized():
    model = network()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def case(name, build, **settings):
    return Case(
        name,
        build,
        lambda: [(batch,) for batch in images()],
        label=lambda batch, output: (batch[0], output.argmax(1)),
        **settings,
    )


CASES = [case("quantize_, int8 weights", quantized)]


GRAPH = "graph of prepare_qat_pt2e"
NO_LAYERS = Limit("A graph has operators and no layers: change the model before you export it.", "must be modules")


def check_graph():
    prepared = graph(own=False)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    diagnosis = bnlab.check(prepared, data=[(batch,) for batch in images()])
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert {"BN105", "BN401"} & {finding.code for finding in diagnosis.findings}
    return Cell(f"{diagnosis.summary.layers}")


def recalibrate_graph():
    prepared = graph(own=False)
    values = torch.cat([first_input(prepared, batch) for batch in images()]).double()
    bnlab.recalibrate(prepared, [(batch,) for batch in images()])
    state = {name: value.double() for name, value in prepared.state_dict().items() if "running" in name}
    std = values.std((0, 2, 3))
    # the fake quantization of the weights follows the running statistics, which changes the input a little
    assert ((state["1.running_mean"] - values.mean((0, 2, 3))) / std).abs().max() < 0.15
    assert (state["1.running_var"].sqrt() / std - 1).abs().max() < 0.15
    return Cell(f"{len(state) // 2}")


class FirstInput(torch.fx.Interpreter):
    """Runs a graph and keeps the input of the first BN operator."""

    value = None

    def call_function(self, target, args, kwargs):
        if target is torch.ops.aten.batch_norm.default and self.value is None:
            self.value = args[0]
        return super().call_function(target, args, kwargs)


def first_input(prepared, batch):
    reader = FirstInput(prepared)
    with torch.no_grad():
        reader.run(batch)
    return reader.value


def repair_graph():
    prepared = graph(own=False)
    prepared.state_dict()["4.bn1.running_mean"][0] = math.nan
    receipt = bnlab.repair(prepared, data=[(batch,) for batch in images()])
    assert "BN101 4.bn1" in receipt.changes.recheck.resolved, receipt
    assert bool(prepared.state_dict()["4.bn1.running_mean"].isfinite().all())
    return Cell("yes")


def export_graph():
    """The quantized graph of bnlab's layers gives the output of torch's, and no sample depends on its batch."""
    batch = images()[0]
    own, torchs = deployed(graph(own=True)), deployed(graph(own=False))
    with torch.no_grad():
        assert difference(own(batch), torchs(batch)) < 0.05
        assert torch.equal(own(torch.cat([batch[:2], 3 * batch[2:]]))[:2], own(batch)[:2])
    return Cell("yes")


ON_GRAPHS = {
    "check": check_graph,
    "recalibrate": recalibrate_graph,
    "repair": repair_graph,
    "export": export_graph,
    "freeze": lambda: bnlab.freeze(graph(own=False)),
    "convert": lambda: bnlab.convert(graph(own=False), bnlab.nn.BatchNorm2d),
    "fuse": lambda: bnlab.convert(graph(own=False), bnlab.nn.BatchNorm2d, fuse=True, example=images()[0]),
    "fold": lambda: bnlab.fold(graph(own=False), images()[0]),
}


@pytest.mark.parametrize("action", CELLS)
def test_graph(action, record_property):
    limit = NO_LAYERS if action in ("freeze", "convert", "fuse", "fold") else None
    with recorded("torchao", GRAPH, action, record_property, limit) as cell:
        cell.append(ON_GRAPHS[action]())


LINES = """
bnlab.convert(model, bnlab.nn.BatchNorm2d)
graph = prepare_qat_pt2e(torch.export.export(model, (images,)).module(), quantizer)
bnlab.recalibrate(graph, loader)  # before convert_pt2e folds BN away
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("torchao", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines(
        "torchao",
        LINES,
        record_property,
        loader=CASES[0].data,
        model=network().train(),
        images=images()[0],
        prepare_qat_pt2e=prepare_qat_pt2e,
        quantizer=quantizer(),
    )
    assert namespace["graph"] is not None
