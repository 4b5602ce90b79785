"""convert: converts between the BN layers of torch and bnlab, and from these to GroupNorm and InstanceNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab._version import __version__
from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.passes.calling import Batch, Forward, require_forward
from bnlab.observe.passes.example import example_of
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.offloaded import has_hooks_of_accelerate
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.observe.passes.subject import untouched, usage_error_unless
from bnlab.observe.wrappers import unwrapped
from bnlab.records import Changes, Safety
from bnlab.remedies.convert.families import family_of
from bnlab.remedies.convert.fuse import fuse_followers
from bnlab.remedies.convert.plan import plan_all, plan_conversion
from bnlab.remedies.convert.target import ConversionTarget
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.undo import UndoStack

__all__ = ["convert"]


@one_at_a_time("convert")
def convert(
    model: nn.Module,
    to: Callable[..., nn.Module],
    *,
    layers: Iterable[str] | None = None,
    fuse: bool = False,
    example: Batch = None,
    forward: Forward | None = None,
) -> Receipt:
    """Convert the BN layers of a model to another class in place, and keep everything else.

    Each layer keeps its weights, buffers, eps, momentum, dtype, device, mode, requires_grad, hooks, and name, and stays
    the same object. There are two exceptions: GroupNorm and InstanceNorm drop the running statistics, and a frozen
    layer requires no gradient until it is converted again.

    Args:
        model: Any module with BN layers: those of torch.nn, SyncBatchNorm included, and of bnlab.nn.
        to: A BN layer class of bnlab.nn or torch.nn, torch.nn.GroupNorm or InstanceNorm, or a `functools.partial` of
            one of these with other arguments. BatchNorm2d stands for 1d and 3d too: each layer keeps its rank.
        layers: Paths, or patterns such as "layer4.*"; every BN layer if None.
        fuse: Whether each layer of bnlab also takes in the activation or residual addition that follows it when the
            model runs `example`. A module whose forward must be rewritten for this gets a subclass of its class.
        example: A batch to run the model on, or data of which the first batch is used, as for `bnlab.check`. Fusing
            needs it, and so does a SyncBatchNorm if `to` has no rank.
        forward: forward(model, batch) -> output, for a model that cannot be called on a batch directly.

    Returns:
        The receipt. Its `undo()` converts every layer back and keeps what training has changed since.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is invalid; if a layer does more than BN and one of the activations that bnlab knows,
            because conversion would lose the rest; or if fusing changes the output or the gradients. The model does not
            change then.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=torch.randn(2, 3, 8, 8))
        >>> print(receipt)
        convert: 2 layers changed, output kept
          class: torch.nn.BatchNorm2d -> bnlab.nn.BatchNorm2d (1)
          class: torch.nn.ReLU -> torch.nn.Identity (2)
          activation: None -> relu (1)
        >>> type(receipt.undo()[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    target = ConversionTarget.of(to)
    selected = batch_norm_layers(model, layers)
    whole, model = model, unwrapped(model)
    if example is not None and any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError("convert: the model must know its shapes, got a lazy layer. Run one batch first.")
    is_offloaded = has_hooks_of_accelerate(model)  # its tensors have values while they are used
    if example is not None and not is_offloaded and any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise UsageError("convert: the model must have values, got tensors on the meta device. Load a state dict.")
    if fuse and (example is None or not target.family.is_bnlab_class):
        got = "no example" if example is None else f"{to!r}"
        raise UsageError(f"convert: fuse must come with an example and a layer class of bnlab.nn, got {got}.")
    calling = require_forward("convert", forward)
    if example is not None:
        (example,) = batches_of([example_of(example)], model)
    ranks = {} if example is None else _executed_ranks(model, selected, example, calling)
    steps = plan_all(selected, lambda path, layer: plan_conversion(path, layer, target, ranks.get(path))).values()
    changes = [change for step in steps for change in step.changes()]
    left_alone = []
    undo = UndoStack()
    with all_or_nothing(model):
        for step in steps:
            undo.push(step.layer, step.apply())
        if fuse:
            fused = fuse_followers(model, example, selected, undo, calling)
            changes += fused.changes
            left_alone += fused.left_alone
        undo.seal()
    record = Changes(
        bnlab=__version__,
        action="convert",
        safety=Safety.EXACT if all(step.keeps_output for step in steps) else Safety.BEHAVIOUR,
        changes=tuple(changes),
        left_alone=tuple(left_alone),
    )
    return Receipt(whole, record, undo.take_back)


def _executed_ranks(
    model: nn.Module, layers: Mapping[str, _BatchNorm], example: Batch, forward: Forward
) -> dict[str, int]:
    """Return the number of spatial dimensions of the input of each layer, if some class has no rank.

    An input of shape (N, C) counts as one dimension.
    """
    families = {path: family_of(type(layer)) for path, layer in layers.items()}
    if all(family is None or family[0].has_ranks for family in families.values()):
        return {}
    with untouched(model), torch.no_grad(), usage_error_unless("forward must run on the example"):
        graph = execute(model.eval(), example, forward=forward)
    calls = {path: graph.of_layer(path) for path in layers}
    return {path: max(1, len(ran[0].inputs[0].shape) - 2) for path, ran in calls.items() if ran}
