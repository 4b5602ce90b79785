"""What each column of the table asserts. A function returns the text of the cell."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.integration.case import Batch, Case, Limit, batch_norm_layers, batch_statistics, cast, flat, tensors_in
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and how many layers an action leaves alone, by reason."""

    text: str
    left: Mapping[str, int] = field(default_factory=dict)


OWN = (bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d, bnlab.nn.BatchNorm3d)


def difference(left: Any, right: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest number of the second."""
    left, right = flat(left), flat(right)
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))


def state(model: nn.Module) -> dict[str, Any]:
    """Return what an undo restores: classes, keys and bits of the state, modes, and which parameters are trained."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "bits": {name: [part.clone() for part in parts(value)] for name, value in model.state_dict().items()},
    }


def parts(value: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of: a quantized one has several, and one on meta has none."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from parts(getattr(value, name))
    elif not value.is_meta:
        yield value


def assert_same(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Require that nothing of a state has changed, down to the bits."""
    after = state(model)
    for part in ("classes", "modes", "trained"):
        assert after[part] == before[part], part
    assert list(after["bits"]) == list(before["bits"])
    for name, value in after["bits"].items():
        for part, old in zip(value, before["bits"][name], strict=True):
            assert torch.allclose(part, old, rtol=0, atol=0, equal_nan=True), name


def gradients(case: Case, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of all parameters in train mode of the BN layers, for a fixed direction of the output."""
    model.zero_grad()
    with batch_statistics(model, momentum=0.0):
        outputs = [tensor for tensor in tensors_in(case.output(model, batch)) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(0)
    total = sum((output * torch.randn(output.shape, generator=generator).to(output)).mean() for output in outputs)
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(case: Case) -> Cell:
    """The diagnosis holds every BN layer, names the stale statistics, and leaves the model as it was."""
    model = case.stale
    before = state(model)
    diagnosis = case.diagnosis
    assert_same(model, before)
    assert diagnosis.summary.layers == len(batch_norm_layers(model))
    codes = {finding.code for finding in diagnosis.findings}
    assert codes & {"BN105", "BN401"}, diagnosis
    return Cell(f"{diagnosis.summary.layers}")


def recalibrate(case: Case) -> Cell:
    """The buffers hold the statistics of the whole data in float64, and the output is finite."""
    model, settled = case.model(), dict(case.settled.named_modules())
    receipt = bnlab.recalibrate(model, case.data, forward=case.forward)
    changed = {change.layer for change in receipt.changes.changes}
    assert changed == {
        name for name, module in settled.items() if isinstance(module, _BatchNorm) and module.num_batches_tracked
    }
    for name in changed:
        layer, expected = model.get_submodule(name), settled[name]
        scale = (expected.running_var + layer.eps).sqrt()
        assert ((layer.running_mean - expected.running_mean) / scale).abs().max() < 1e-2, name
        assert (layer.running_var / scale.square() - expected.running_var / scale.square()).abs().max() < 1e-2, name
    assert bool(flat([case.output(model, batch) for batch in case.data]).isfinite().all())
    return Cell(f"{len(changed)}")


def repair(case: Case) -> Cell:
    """A NaN in the statistics of one layer, as one bad batch leaves it, is repaired; undo restores every bit."""
    model = copy.deepcopy(case.settled)
    layer = batch_norm_layers(model)[len(batch_norm_layers(model)) // 2]
    layer.running_mean[0] = math.nan
    before = state(model)
    receipt = bnlab.repair(model, data=case.data, metric=case.closeness, forward=case.forward)
    assert receipt.changes.kept, receipt
    assert math.isfinite(case.closeness(model, case.data))
    assert [name for name in receipt.changes.recheck.resolved if name.startswith("BN101")], receipt
    assert receipt.changes.recheck.after.errors == 0, receipt
    receipt.undo()
    assert_same(model, before)
    return Cell("yes")


def freeze(case: Case) -> Cell:
    """In train mode the layers normalise with fixed statistics and get no gradient; unfreezing restores everything."""
    model, batch = case.model(), case.data[0]
    before = state(model)
    with torch.no_grad():
        expected = case.output(model, batch)
    bnlab.freeze(model)
    layers = batch_norm_layers(model)
    for layer in layers:
        layer.train()
    assert difference(case.output(model, batch), expected) < case.tolerance
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    for layer in layers:
        layer.eval()
    bnlab.unfreeze(model)
    assert_same(model, before)
    return Cell(f"{len(layers)}")


def convert(case: Case) -> Cell:
    """The outputs stay in both modes, and converting back restores classes, keys and bits."""
    model, batch = case.model(), case.data[0]
    before = state(model)
    with torch.no_grad():
        expected = case.output(model, batch)
        with batch_statistics(model, momentum=0.0):
            expected_in_training = case.output(model, batch)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    layers = [module for module in model.modules() if isinstance(module, OWN)]
    assert len(layers) == sum(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in before["classes"].values())
    with torch.no_grad():
        assert difference(case.output(model, batch), expected) < case.tolerance
        with batch_statistics(model, momentum=0.0):
            assert difference(case.output(model, batch), expected_in_training) < 10 * case.tolerance
    bnlab.convert(model, nn.BatchNorm2d)
    assert_same(model, before)
    return Cell(f"{len(layers)}")


def fuse(case: Case) -> Cell:
    """Outputs and gradients stay, in float64, where rounding hides nothing; undo restores everything."""
    model, batch = case.model().to(case.exact), cast(case.data[0], case.exact)
    before = state(model)
    with torch.no_grad():
        expected = case.output(model, batch)
    expected_gradients = gradients(case, copy.deepcopy(model), batch)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=batch, forward=case.forward)
    with torch.no_grad():
        assert difference(case.output(model, batch), expected) < case.tolerance
    own = gradients(case, model, batch)
    assert own.keys() == expected_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in own.items():
        assert float((gradient - expected_gradients[name]).abs().max()) < case.tolerance * scale, name
    receipt.undo()
    assert_same(model, before)
    fused = {change.layer for change in receipt.changes.changes if change.what in ("activation", "residual")}
    fused &= {name for name, kind in before["classes"].items() if issubclass(kind, _BatchNorm)}
    left = Counter(left.reason for left in receipt.changes.left_alone if left.layer not in fused)
    return Cell(f"{len(fused)} of {len(batch_norm_layers(model))}", left)


def fold(case: Case) -> Cell:
    """The folded copy gives the same output; the layers that stay have a reason."""
    model, batch = case.model(), case.data[0]
    before = state(model)
    receipt = bnlab.fold(model, batch, forward=case.forward)
    assert_same(model, before)
    with torch.no_grad():
        assert difference(case.output(receipt.model, batch), case.output(model, batch)) < case.tolerance
    total, rest = len(batch_norm_layers(model)), len(batch_norm_layers(receipt.model))
    reasons = {left.layer: left.reason for left in receipt.changes.left_alone}
    stay = [name for name, module in receipt.model.named_modules() if isinstance(module, _BatchNorm)]
    return Cell(f"{total - rest} of {total}", Counter(reasons[name] for name in stay))


def export(case: Case) -> Cell:
    """torch.export takes the model with bnlab's layers, and the program gives the same output."""
    model, batch = case.model(), case.data[0]
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    module, args, kwargs = case.exportable(model, batch)
    with torch.no_grad():
        expected = module(*args, **kwargs)
        program = torch.export.export(module, args, kwargs)
        assert difference(program.module()(*args, **kwargs), expected) < case.tolerance
    return Cell("yes")


CELLS: Mapping[str, Callable[[Case], Cell]] = {
    cell.__name__: cell for cell in (check, recalibrate, repair, freeze, convert, fuse, fold, export)
}
"""The columns of the table."""

Record = Callable[[str, object], None]


def judge(library: str, case: Case, action: str, record_property: Record) -> None:
    """Run one cell of the table, and record what the page says of it."""
    with recorded(library, case.name, action, record_property, case.limits.get(action)) as cell:
        cell.append(CELLS[action](case))


@contextmanager
def recorded(
    library: str, name: str, action: str, record_property: Record, limit: Limit | None = None
) -> Iterator[list[Cell]]:
    """Record the cell that the body appends, or why there is none; with a limit, the body must raise its message."""
    for key, value in (("library", library), ("case", name), ("action", action)):
        record_property(key, value)
    if limit is not None:
        record_property("reason", limit.reason)
        with pytest.raises(Exception, match=limit.message):
            yield []
        return
    cells: list[Cell] = []
    yield cells
    record_property("text", cells[0].text)
    record_property("left", dict(cells[0].left))


def run_lines(library: str, lines: str, record_property: Record, **names: object) -> dict[str, Any]:
    """Run the lines that the page shows for a library, and return the names that they define."""
    record_property("library", library)
    record_property("lines", lines.strip())
    namespace = {"bnlab": bnlab, "torch": torch, **names}
    exec(compile(lines.strip(), library, "exec"), namespace)
    return namespace
