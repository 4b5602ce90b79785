"""A device for machines without a GPU: its tensors lie on the CPU and refuse to meet those of the CPU.

`pytest --device simulated` runs the tests with it. It catches what forgets the device: a tensor that is made on the
CPU beside one on the device, `.numpy()` without `.cpu()`, and random numbers that a test makes on the device, where a
GPU would draw others. It runs no kernel of a GPU, so that what it says about numbers is what the CPU says.

Tests fail on it, or end the process, that use torch's compilers, exporters, scripts, checkpointing or torch.func, which
do not know its tensors; `resize_`; `.data = ...` across devices; or `fold` and `fuse`, which do not take weights of a
subclass of Tensor for plain ones.
It is made with an experimental part of torch 2.13.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bnlab.kernels import request

_setup_privateuseone_for_python_backend("simulated")
DEVICE = torch.device("simulated:0")
TESTS = str(Path(__file__).parent)
aten = torch.ops.aten

MIXED = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default, aten._local_scalar_dense.default, aten._has_compatible_shallow_copy_type.default,
}  # fmt: skip
"""Operators that take tensors of two devices."""


class SimulatedTensor(torch.Tensor):
    """A tensor that says that it lies on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return _restored, (self.inner, self.requires_grad, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = _restored(self.inner.clone(), self.requires_grad, getattr(self, "_is_param", False))
        return memo[id(self)]

    def __repr__(self):
        return f"Simulated({self.inner!r})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.inner.tolist()


def _restored(inner, requires_grad, is_parameter):
    tensor = SimulatedTensor(inner, requires_grad)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor


def _run(func, args, kwargs):
    leaves, form = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    device = kwargs.get("device")
    is_on_device = bool(own) if device is None else torch.device(device).type == DEVICE.type
    if own:
        _refuse_mixed(func, tensors)
    if is_on_device:
        _refuse_random(func)
    plain = [leaf.inner if isinstance(leaf, SimulatedTensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(plain, form)
    if device is not None and is_on_device:
        kwargs["device"] = torch.device("cpu")
    wrappers = {id(tensor.inner): tensor for tensor in own}
    results = func(*args, **kwargs)

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        return SimulatedTensor(value) if is_on_device else value

    return tree_map(wrapped, results)


def _refuse_mixed(func, tensors):
    """Raise as a GPU does. A number of the CPU, a tensor without dimensions, may meet tensors of a device."""
    if func in MIXED:
        return
    others = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0]
    if others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got {DEVICE} and {others[0].device} for {func}"
        )


def _refuse_random(func):
    if torch.Tag.nondeterministic_seeded not in func.tags or "dropout" in str(func):
        return
    frame = sys._getframe(3)
    while "/torch/" in frame.f_code.co_filename:
        if "/torch/testing/" in frame.f_code.co_filename:  # as gradgradcheck: its own numbers, which any may be
            return
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(TESTS):
        raise RuntimeError(f"{func} makes random numbers on {DEVICE}: make them on the CPU and move them")


def _fallback(func, *args, **kwargs):
    return _run(func, args, kwargs)


# The operators that make a tensor get no tensor of this class.
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_fallback, "PrivateUse1")
# torch.tensor(..., device=...) copies below Python, where the fallback is not asked.
_ATEN = torch.library.Library("aten", "IMPL")
_ATEN.impl("copy_", lambda *args, **kwargs: _run(aten.copy_.default, args, kwargs), "PrivateUse1")

# What is assigned to `.data` does not reach the tensor on the CPU: a conversion must make new parameters.
torch.__future__.set_overwrite_module_params_on_conversion(True)
# bnlab takes the tensors for plain ones, not for those of a subclass.
request._TENSORS = (*request._TENSORS, SimulatedTensor)
