"""Records outputs, gradients and buffers of a model on an example, to compare them before and after a change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnlab.observe.passes.calling import Batch, Forward, run_batch
from bnlab.observe.passes.subject import Subject
from bnlab.observe.passes.tensors import copy_of_object, map_tensors, tensors_in

__all__ = ["behaviour_of", "difference", "differences", "fixed_weights", "largest"]

Behaviour = dict[str, list[Tensor | None]]


def behaviour_of(model: nn.Module, example: Batch, forward: Forward = run_batch) -> Behaviour:
    """Run a model on a batch in both modes and return every output, gradient and buffer. The model does not change.

    The gradients are those of a fixed linear combination of all outputs, for every parameter and floating-point input.
    """
    behaviour: Behaviour = {}
    subject = Subject(model, forward)
    for training in (True, False):
        with subject.untouched(), torch.enable_grad():
            leaves: list[Tensor] = []
            outputs = [
                tensor
                for tensor in tensors_in(forward(model.train(training), _copied(example, leaves)))
                if tensor.is_floating_point()
            ]
            loss = sum(((fixed_weights(y) * y).sum() for y in outputs if y.requires_grad), torch.zeros(()))
            wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
            grads: Sequence[Tensor | None] = ()
            if loss.requires_grad and wanted:
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            mode = "train mode" if training else "eval mode"
            behaviour[f"output in {mode}"] = [output.detach().clone() for output in outputs]
            behaviour[f"gradients in {mode}"] = [None if grad is None else grad.clone() for grad in grads]
            behaviour[f"buffers in {mode}"] = [buffer.detach().clone() for buffer in model.buffers()]
    return behaviour


def _copied(batch: Batch, leaves: list[Tensor]) -> Batch:
    """Copy a batch. Floating-point tensors become differentiable, and the model may change them in place."""

    def copy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaf = tensor.detach().clone().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()

    return map_tensors(batch, copy, copy_of_object)


def fixed_weights(output: Tensor) -> Tensor:
    """Return fixed weights for the outputs, which no symmetry of the model cancels."""
    steps = torch.arange(output.numel(), dtype=torch.float64).cos()
    return steps.reshape(output.shape).to(output)


def differences(before: Behaviour, after: Behaviour) -> dict[str, float]:
    """Return the largest difference of each kind, relative to the largest value. It is 0 for identical bits.

    Outputs and buffers are compared with the largest value of their own tensor. Gradients are compared with the largest
    gradient of the whole model. A bias before BN, for example, has a gradient of 0, and what autograd returns for it is
    rounding.
    """
    result = {}
    for what, tensors in before.items():
        shared = max(map(largest, tensors), default=0.0) if what.startswith("gradients") else None
        pairs = zip(tensors, after[what], strict=True)
        result[what] = max((difference(left, right, shared) for left, right in pairs), default=0.0)
    return result


def largest(tensor: Tensor | None) -> float:
    """Return the largest finite absolute value of a tensor; 0 where there is none."""
    if tensor is None or tensor.numel() == 0:
        return 0.0
    return float(tensor.to(torch.float64).abs().nan_to_num(posinf=0, neginf=0).amax())


def difference(left: Tensor | None, right: Tensor | None, scale: float | None) -> float:
    """Return the largest difference between two tensors, relative to a scale or to the largest value of the first."""
    if left is None or right is None:
        return 0.0 if left is right else float("inf")
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if torch.equal(left, right):
        return 0.0
    wide = left.to(torch.float64), right.to(torch.float64)
    same = (wide[0] == wide[1]) | (wide[0].isnan() & wide[1].isnan())
    gap = torch.where(same, 0, (wide[0] - wide[1]).abs()).nan_to_num(nan=float("inf"))
    return float(gap.amax() / max(largest(left) if scale is None else scale, 1e-300))
