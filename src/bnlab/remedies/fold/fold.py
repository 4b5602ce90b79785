"""fold: folds BN into the convolutions and linear layers around it, and checks that the output stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlab._version import __version__
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.discover import any_batch_norm, similar_layers
from bnlab.observe.passes.calling import Batch, Forward, require_forward
from bnlab.observe.passes.example import example_of
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.observe.passes.tensors import copy_of_batch
from bnlab.observe.programs.opened import require_modules
from bnlab.observe.wrappers import is_compiled, unwrapped
from bnlab.records import Change, Changes, LeftAlone, Measurement, Safety
from bnlab.remedies._fold_affine import ScaleAndShift
from bnlab.remedies.convert.families import class_name
from bnlab.remedies.fold.apply import copied, fold_group, replace_in_place
from bnlab.remedies.fold.plan import FoldPlan, plan_of
from bnlab.remedies.fold.proof import Pair, errors_of_models, errors_of_pairs, seeded, tolerance_of
from bnlab.remedies.receipt import Receipt

__all__ = ["fold"]

_UNIT = "of the largest output"
_LARGEST_ERROR = "largest error"
_ONE_PATH = "planned from one run: other paths through forward are checked only if the random inputs take them"


@one_at_a_time("fold")
def fold(
    model: nn.Module, example: Batch, *, forward: Forward | None = None, tolerance: float | None = None
) -> Receipt:
    """Return a copy of a model for eval mode with its BN folded into the layers around it, and measure the error.

    Each BN layer is folded into the convolution or linear layer that feeds it. If that is impossible, it is folded into
    the convolution or linear layer that it feeds, unless that layer pads with zeros. Otherwise it becomes a separate
    scale and shift. A run in eval mode shows which layers feed which. Every BN layer leaves a module under its name: an
    Identity, or the activation that the layer applied.

    Then `fold` compares every folded pair with the original on the input that the pair gets in the model, and compares
    the whole model on the example and on random inputs like it. A run shows one path through a forward. Other paths are
    not checked.

    Args:
        model: Any module, in any mode. The call does not change a single bit of it. What DataParallel,
            DistributedDataParallel or torch.compile wrap is folded without the wrapper.
        example: A batch for eval mode: a tensor, a tuple or list (input first), a dict, or another form in
            docs/batches.md. A loader, or other data as for `bnlab.check`, stands for its first batch.
        forward: forward(model, batch) -> output, for a model that cannot be called on a batch directly.
        tolerance: The largest error allowed, relative to the largest output. If None, it is 1e-9 in float64, 1e-4 in
            float32, 1e-2 in float16, and 5e-2 in bfloat16. A pair with a larger error is not folded.

    Returns:
        The receipt. Its `model` is the folded copy in eval mode, and its `undo()` returns the original. It lists every
        layer that was left alone or could only become a scale and shift, with the reason.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If the model cannot be run or copied, if a part of it is compiled, scripted or lazy, if it returns
            no tensor, or if the error of the whole folded model exceeds the tolerance.

    Source:
        Jacob et al. 2018 (arXiv:1712.05877), section 3.2, for BN after a convolution.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> receipt = bnlab.fold(model, torch.randn(2, 3, 8, 8))
        >>> print(receipt.model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> receipt.changes.measurements[0].value < 1e-6
        True
    """
    whole, model = model, unwrapped(model)
    layers = _layers(model)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise UsageError(f"fold: tolerance must be above 0 and finite, got {tolerance!r}.")
    original = Subject(model, require_forward("fold", forward))
    (batch,) = batches_of([example_of(example)], model)
    with seeded(original), usage_error_unless("forward must run on the example"):
        graph = execute(model, copy_of_batch(batch), layers.values(), forward=original.forward)
    plan = plan_of(model, graph, layers)
    with usage_error_unless("copy.deepcopy must accept it"):
        folded = copied(model).eval()
        undo = _install(plan, folded)
    measured = _prove_pairs(original, folded, batch, plan, undo, tolerance)
    changes = _changes(plan, layers)
    for path in plan.foldings:
        replace_in_place(folded.get_submodule(path), _replacement(plan, path))
    on_example, on_others = errors_of_models(original, folded, batch, tolerance)
    measured.append(Measurement(None, f"{_LARGEST_ERROR} on the example", on_example, _UNIT))
    if on_others:
        measured.append(Measurement(None, f"{_LARGEST_ERROR} on {len(on_others)} random inputs", max(on_others), _UNIT))
    record = Changes(
        bnlab=__version__,
        action="fold",
        safety=Safety.EXACT,
        changes=tuple(changes),
        left_alone=tuple(_left_alone(plan, layers)),
        notes=(_ONE_PATH,) if changes else (),
        measurements=tuple(measured),
    )
    receipt = Receipt(folded, record, lambda: setattr(receipt, "model", whole))
    return receipt


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BN layers by path, and raise if the model cannot be folded at all."""
    require_modules(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: it must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f" at {name}" if name else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"fold: the model must not be scripted, got a {type(module).__name__}{where}. Fold it first."
            )
        if is_compiled(module):
            raise UsageError(f"fold: the model must not be compiled yet, got a compiled module{where}. Fold it first.")
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise UsageError("fold: the model must know its shapes, got a lazy layer. Run one batch first.")
    if any(tensor.is_meta for tensor in tensors):
        raise UsageError("fold: the model must have values, got tensors on the meta device. Load a state dict.")
    batch_norms = any_batch_norm(model)
    if not batch_norms:
        raise NoBatchNorm(f"model: it must contain a BN layer, got {similar_layers(model)}.")
    return {
        path: layer for path, layer in batch_norms.items() if not any(_is_inside(path, other) for other in batch_norms)
    }


def _is_inside(path: str, other: str) -> bool:
    return path != other and path.startswith(f"{other}." if other else "")


def _install(plan: FoldPlan, folded: nn.Module) -> dict[str, Callable[[], None]]:
    """Put folded weights into the copy, drop groups that cannot have them, and return an undo function per group."""
    undo: dict[str, Callable[[], None]] = {}
    for host, group in list(plan.groups.items()):
        take_back = fold_group(folded, group, plan.foldings)
        if take_back is None:
            dtype = str(next(folded.get_submodule(host).parameters()).dtype).removeprefix("torch.")
            _drop(plan, host, f"when it is folded, the weight of {host} is not finite in {dtype}")
        else:
            undo[host] = take_back
    return undo


def _drop(plan: FoldPlan, host: str, reason: str) -> None:
    for path in plan.groups.pop(host).layers:
        plan.left_alone[path] = reason
        del plan.foldings[path]


def _prove_pairs(
    original: Subject,
    folded: nn.Module,
    batch: Batch,
    plan: FoldPlan,
    undo: Mapping[str, Callable[[], None]],
    tolerance: float | None,
) -> list[Measurement]:
    """Compare every group and every scale and shift with the original, and drop those whose error is too large."""
    pairs: dict[str, Pair] = {}
    for host, group in plan.groups.items():
        steps: list[nn.Module | None] = [folded.get_submodule(host), plan.foldings[group.layers[-1]].activation]
        pairs[host] = (group.path[0], group.path[-1], _chain(steps))
    for path in plan.affine:
        pairs[path] = (path, path, _chain([_replacement(plan, path)]))
    errors = errors_of_pairs(original, batch, pairs)
    measured = []
    for name, error in errors.items():
        members = plan.groups[name].path if name in plan.groups else [name]
        label = " + ".join(members)
        dtypes = [plan.dtypes[path] for path in members if path in plan.dtypes]
        dtypes += [p.dtype for p in folded.get_submodule(name).parameters(recurse=False) if name in plan.groups]
        allowed = tolerance_of(dtypes) if tolerance is None else tolerance
        if error <= allowed:
            measured.append(Measurement(label, _LARGEST_ERROR, error, _UNIT))
            continue
        reason = f"when it is folded, {label} differs by {error:.1e} of the largest output, above {allowed:.0e}"
        if name in plan.groups:
            undo[name]()
            _drop(plan, name, reason)
        else:
            del plan.affine[name], plan.foldings[name]
            plan.left_alone[name] = reason
    return measured


def _chain(steps: list[nn.Module | None]) -> Callable[[Tensor], Tensor]:
    modules = [step for step in steps if step is not None]
    return lambda x: reduce(lambda value, step: step(value), modules, x)


def _replacement(plan: FoldPlan, path: str) -> nn.Module | None:
    """Return the module that replaces a layer, or None for an Identity."""
    folding = plan.foldings[path]
    if path not in plan.affine:
        return folding.activation
    affine = ScaleAndShift(folding.scale, folding.shift, plan.dtypes[path])
    return affine if folding.activation is None else nn.Sequential(affine, folding.activation)


def _changes(plan: FoldPlan, layers: Mapping[str, nn.Module]) -> list[Change]:
    hosts = {path: group.host for group in plan.groups.values() for path in group.layers}
    changes = []
    for path, layer in layers.items():
        if path in plan.foldings:
            after = f"folded into {hosts[path]}" if path in hosts else "scale and shift"
            changes.append(Change(path, "batch norm", class_name(type(layer)), after))
    return changes


def _left_alone(plan: FoldPlan, layers: Mapping[str, nn.Module]) -> list[LeftAlone]:
    return [
        LeftAlone(path, plan.left_alone[path] if path in plan.left_alone else f"not folded: {plan.affine[path]}")
        for path in layers
        if path in plan.left_alone or path in plan.affine
    ]
