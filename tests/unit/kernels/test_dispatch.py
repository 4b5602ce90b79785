"""The printed backend against the operators that a profiler sees, and the reasons against other backends."""

import itertools

import pytest
import torch
from tests import oracle

import bnlab
from bnlab.functional.activations import ACTIVATIONS
from bnlab.kernels import BACKENDS, Request, choose, native

here = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operators_of(call):
    """Return the names of the operators that run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    return {event.name for event in profile.events()}


def seen(names):
    """Return the backend and the way that ran, from the names of the operators alone."""
    by_kernel = bool(names & {"bnlab_native::train", "bnlab_native::apply"})
    if "bnlab::batch_norm_activated_train" in names:
        return "native", "compiler operator"
    if "bnlab::batch_norm_train" in names:
        backend = "native" if by_kernel else "aten" if "aten::batch_norm_update_stats" in names else "reference"
        return backend, "operator"
    if by_kernel:
        return "native", "eager kernel"
    assert "aten::addcmul" in names, sorted(names)
    return "torch", "formulas"


def decided(layer, x, residual=None, mask=None):
    return choose(layer._request(x, residual, mask))


def printed(layer):
    return repr(layer).rpartition("backend=")[2].removesuffix(")").split(" ")[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_what_is_printed_is_what_runs(layout, dtype, training):
    for activation in (None, *ACTIVATIONS):
        layer = bnlab.nn.BatchNorm2d(4, activation=activation, dtype=dtype).train(training)
        x = oracle.LAYOUTS[layout](torch.randn(3, 4, 5, 6)).to(dtype)
        choice = decided(layer, x)
        assert (choice.name, choice.way) == seen(operators_of(lambda: layer(x))), (activation, str(choice))  # noqa: B023
        if x.is_contiguous():
            assert printed(layer) == choice.name


@here
def test_an_activation_that_no_kernel_knows_runs_on_torch():
    layer, x = bnlab.nn.BatchNorm2d(4, activation="gelu").eval(), torch.randn(2, 4, 5, 5)
    assert "aten::addcmul" in operators_of(lambda: layer(x))
    assert "backend=torch (eager kernel: it does not support gelu)" in repr(layer)
    assert "backend=native (eager kernel: it does not support gelu)" in repr(layer.train())
    assert "backend=native)" in repr(bnlab.nn.BatchNorm2d(4).eval())


KINDS = {
    "plain": lambda: bnlab.nn.BatchNorm2d(4),
    "half statistics": lambda: bnlab.nn.BatchNorm2d(4, statistics_dtype=None).bfloat16(),
    "no statistics": lambda: bnlab.nn.BatchNorm2d(4, track_running_stats=False),
    "ghost": lambda: bnlab.nn.GhostBatchNorm2d(4, ghost_size=2),
    "frozen": lambda: bnlab.nn.FrozenBatchNorm2d(4),
    "moving": lambda: bnlab.nn.FrozenBatchNorm2d(4, moves_statistics=True),
    "renorm": lambda: bnlab.nn.BatchRenorm2d(4),
    "no affine": lambda: bnlab.nn.BatchNorm2d(4, affine=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_prints_what_runs_it(kind, training):
    layer = KINDS[kind]().train(training)
    dtype = torch.float32 if layer.weight is None else layer.weight.dtype
    x = torch.randn(4, 4, 5, 6).to(dtype)
    choice = decided(layer, x)
    names = operators_of(lambda: layer(x))
    if kind == "moving" and training:  # the operator computes statistics for the buffers, not for the output
        names -= {"bnlab::batch_norm_train", "bnlab_native::train"}
    assert (choice.name, choice.way) == seen(names), str(choice)
    assert printed(layer) == choice.name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("added", "masked"), [*itertools.product(["none", "fits", "row", "wide"], [False, True])])
def test_residuals_and_masks(added, masked, training):
    layer, x = bnlab.nn.BatchNorm2d(4, activation="relu").train(training), torch.randn(3, 4, 5, 6)
    residual = {"none": None, "fits": x.clone(), "row": x[:1], "wide": x.double()}[added]
    mask = torch.ones(3, 5, 6) if masked else None
    choice = decided(layer, x, residual, mask)
    assert (choice.name, choice.way) == seen(operators_of(lambda: layer(x, residual, mask=mask))), str(choice)


@here
@pytest.mark.parametrize("shape", [(1, 4), (0, 4)])
def test_batches_without_two_values_in_eval_mode(shape):
    layer, x = bnlab.nn.BatchNorm1d(4).eval(), torch.randn(shape)
    choice = decided(layer, x)
    assert (choice.name, choice.way) == seen(operators_of(lambda: layer(x)))
    assert str(choice) == "torch (eager kernel: it needs more than one value per channel)"


@here
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict, None),
        (lambda: {"activation": "gelu"}, "it does not support gelu"),
        (lambda: {"is_dense": False}, "it reads contiguous and channels_last input only"),
        (lambda: {"masked": True}, "it does not support masks"),
        (lambda: {"count": 1}, "it needs more than one value per channel"),
        (lambda: {"residual": "differs"}, "the residual has another shape, dtype or layout"),
        (lambda: {"buffers": "narrow"}, "the running statistics are kept in half precision"),
        (lambda: {"buffers": "withheld"}, "the running statistics are withheld"),
        (lambda: {"is_special": True}, "the layer normalises or updates in its own way"),
        (lambda: {"context": "subclass"}, "a subclass of Tensor needs torch's own operators"),
        (lambda: {"context": "tracer"}, "torch.jit traces torch's own operators"),
        (lambda: {"context": "exporter"}, "an exporter needs operators that every consumer knows"),
    ],
)
def test_the_eager_kernel_is_passed_over_with_a_reason(change, reason):
    request = Request("cpu", "float32", masked=False, count=2, by_layer=True)._replace(**change())
    choice = choose(request)
    if reason is None:
        assert (choice.way, choice.passed_over, str(choice)) == ("eager kernel", (), "native")
    else:
        assert choice.passed_over[0] == ("eager kernel", reason)
        assert str(choice) == f"native (eager kernel: {reason})"
        assert choice.way == "operator"


@here
def test_a_compiler_gets_one_operator_where_an_activation_follows():
    request = Request("cpu", "float32", False, 2, by_layer=True, context="compiler")
    assert choose(request._replace(activation="relu")).way == "compiler operator"
    assert str(choose(request)) == "native (compiler operator: no activation follows)"
    assert str(choose(request._replace(activation="gelu"))) == "native (compiler operator: it does not support gelu)"
    evaluating = choose(request._replace(statistics="running"))
    assert str(evaluating) == "torch (compiler operator: it supports batch statistics only)"


@here
def test_a_transform_gets_formulas():
    ways = []
    torch.func.vmap(lambda x: ways.append(choose(Request.of(x, None)).way) or x)(torch.randn(2, 4, 3))
    assert ways == ["formulas"]
    choice = choose(Request("cpu", "float32", False, 2, context="transform"))
    reason = "torch.func and forward mode need formulas"
    assert str(choice) == f"reference (native: {reason}; aten: {reason})"


def test_the_choice_says_why():
    x = torch.randn(4, 3, 5, 5)
    first = native.unavailable()
    assert str(choose(Request.of(x, None))) == ("native" if first is None else f"aten (native: {first})")
    masked, wide = choose(Request.of(x, torch.ones(4, 1, 1, 1))), choose(Request.of(x.double(), None))
    if first is not None:
        assert masked.passed_over == (("native", first), ("aten", "it does not support masks"))
    reasons = "native: it does not support float64; aten: it keeps statistics of float64 in float64"
    assert str(wide) == f"reference ({reasons})"
    assert choose(Request("cuda", "float32", masked=False, count=9)).name == "aten"
    mps = choose(Request("mps", "float32", masked=False, count=9))
    assert [name for name, _ in mps.passed_over] == ["triton", "aten"]
    assert "mps" in mps.passed_over[1][1]


def test_every_backend_is_a_name_and_the_last_takes_everything():
    assert [*BACKENDS] == ["native", "triton", "aten", "reference"]
    assert BACKENDS["reference"].refuse(Request("cuda", "float64", masked=True, count=0)) is None
