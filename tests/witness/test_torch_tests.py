"""PyTorch's own module and operator tests, run against the layers and functions of bnlab."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabError

common_modules = pytest.importorskip("torch.testing._internal.common_modules")
common_methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")

BNLAB_CLASSES = {
    nn.BatchNorm1d: bnlab.nn.BatchNorm1d,
    nn.BatchNorm2d: bnlab.nn.BatchNorm2d,
    nn.BatchNorm3d: bnlab.nn.BatchNorm3d,
}
MODULES = [info for info in common_modules.module_db if info.module_cls in BNLAB_CLASSES]
OPERATORS = [info for info in common_methods.op_db if info.name == "nn.functional.batch_norm"]

NOT_APPLICABLE = {
    "ErrorModuleInput": "torch's classes and texts of errors: those of bnlab are BnlabErrors with the layer path",
    "jit.script": "a layer that names itself in errors is not scriptable; torch.compile and torch.export are tested",
    "inputs of shape (0,)": "they have no channels: refused, where torch returns them as they are",
    "num_batches_tracked of an empty batch": "torch counts it, we do not: no statistics were taken",
    "cuda, mps": "no such device here",
}
"""Parts of PyTorch's tests that do not apply, with the reason."""


def module_inputs():
    for info in MODULES:
        for training in (True, False):
            for dtype in (torch.float32, torch.float64):
                inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
                for index, case in enumerate(inputs):
                    label = f"{info.name}-{index}-{dtype}-{'train' if training else 'eval'}"
                    # Gradients of finite differences take most of the time.
                    marks = pytest.mark.slow if dtype == torch.float64 and index % 3 else ()
                    yield pytest.param(info.module_cls, case, dtype, training, id=label, marks=marks)


@pytest.mark.parametrize(("kind", "case", "dtype", "training"), list(module_inputs()))
def test_module_inputs(kind, case, dtype, training):
    constructor, call = case.constructor_input, case.forward_input
    torch_layer = kind(*constructor.args, **constructor.kwargs).to(dtype).train(training)
    bnlab_layer = BNLAB_CLASSES[kind](*constructor.args, **constructor.kwargs).to(dtype).train(training)
    bnlab_layer.load_state_dict(torch_layer.state_dict())
    left, right = ([part.detach().clone().requires_grad_() for part in call.args] for _ in range(2))
    y, z = bnlab_layer(*left, **call.kwargs), torch_layer(*right, **call.kwargs)
    assert_close(y, z)
    grad = torch.randn_like(y)
    for mine, witness in zip(
        torch.autograd.grad(y, [*left, *bnlab_layer.parameters()], grad),
        torch.autograd.grad(z, [*right, *torch_layer.parameters()], grad),
        strict=True,
    ):
        assert_close(mine, witness, rtol=1e-4, atol=1e-5)
    if not left[0].numel():
        assert bnlab_layer.num_batches_tracked == 0, NOT_APPLICABLE["num_batches_tracked of an empty batch"]
        torch_layer.num_batches_tracked.zero_()
    assert_close(bnlab_layer.state_dict(), torch_layer.state_dict())
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: without_running_statistics(bnlab_layer)(x), left[0])


def without_running_statistics(layer):
    """Return the layer without running statistics that would move between the evaluations of gradcheck."""
    layer.track_running_stats = False
    return layer


def operator_inputs():
    for info in OPERATORS:
        for index, sample in enumerate(info.sample_inputs("cpu", torch.float64, requires_grad=True)):
            yield pytest.param(sample, id=str(index))


@pytest.mark.parametrize("sample", list(operator_inputs()))
def test_operator_inputs(sample):
    def call(function):
        arguments = [part.detach().clone() if isinstance(part, torch.Tensor) else part for part in sample.args]
        x = sample.input.detach().clone().requires_grad_()
        y = function(x, *arguments, **sample.kwargs)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        return y, dx, arguments[:2]

    if sample.input.dim() < 2:
        with pytest.raises(BnlabError, match="input must have the shape"):
            call(bnlab.functional.batch_norm)
        return
    assert_close(call(bnlab.functional.batch_norm), call(torch.nn.functional.batch_norm))


def test_signature_and_defaults_are_torchs():
    bnlab_signature, torch_signature = (
        inspect.signature(f) for f in (bnlab.functional.batch_norm, torch.nn.functional.batch_norm)
    )
    positional = [p for p in bnlab_signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in torch_signature.parameters.values()
    ]


def test_there_was_something_to_run():
    assert {info.module_cls for info in MODULES} == set(BNLAB_CLASSES)
    assert len(list(module_inputs())) >= 30
    assert len(list(operator_inputs())) >= 5


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_what_torch_refuses_we_refuse(info):
    if info.module_error_inputs_func is None:
        pytest.skip(NOT_APPLICABLE["ErrorModuleInput"] + "; and there are none")
    for case in info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True):
        parts = case.module_error_input
        constructor, call = parts.constructor_input, parts.forward_input
        with pytest.raises(BnlabError):
            BNLAB_CLASSES[info.module_cls](*constructor.args, **constructor.kwargs)(*call.args)
