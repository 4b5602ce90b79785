"""The fields of a request for a batch."""

import pytest
import torch
from tests import oracle

from bnlab.kernels import Request
from bnlab.kernels.request import context_of


def of_layer(x, residual=None, mask=None):
    return Request.of_layer(x, residual, mask, x.size(1), "batch", "relu", "fit", False)


@pytest.mark.parametrize(("shape", "count"), [((0, 3), 0), ((1, 3), 1), ((2, 3), 2), ((9, 3, 4), 2), ((4, 0), 0)])
def test_the_count_is_0_1_or_2(shape, count):
    assert Request.of(torch.zeros(shape), None).count == of_layer(torch.zeros(shape)).count == count


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    x = oracle.LAYOUTS[layout](torch.randn(2, 3, 4, 5))
    expected = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert of_layer(x).is_dense == expected


def test_residuals():
    x = torch.randn(2, 3, 4, 5)
    assert of_layer(x).residual == "none"
    assert of_layer(x, x.clone()).residual == "fits"
    for other in (x[:1], x.double(), x.contiguous(memory_format=torch.channels_last), x.to("meta")):
        assert of_layer(x, other).residual == "differs"


def test_the_fields_of_an_operator_are_those_of_a_layer_that_wants_no_more():
    x, mask = torch.randn(2, 3).bfloat16(), torch.ones(2, 1)
    request = of_layer(x, mask=mask)
    assert request._replace(by_layer=False, activation=None) == Request.of(x, mask)
    assert (request.device, request.dtype, request.masked) == ("cpu", "bfloat16", True)
    assert of_layer(torch.zeros(2, 3, device="meta")).device == "meta"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own use of torch.jit
def test_who_sees_the_operations():
    x = torch.randn(3, 2)
    seen = [context_of(x), context_of(torch.nn.Parameter(x)), context_of(x.as_subclass(torch.Tensor))]
    assert seen == ["eager", "eager", "eager"]

    class Named(torch.Tensor):
        pass

    assert context_of(x.as_subclass(Named)) == "subclass"
    contexts = []

    def note(x):
        contexts.append(context_of(x))
        return x * 2

    torch.func.grad(lambda x: note(x).sum())(x)
    torch.func.jvp(note, (x,), (x,))
    torch.compile(note, backend="eager")(x)
    torch.compile(torch.vmap(note), backend="eager")(x)
    assert contexts == ["transform", "transform", "compiler", "transform"]
    torch._dynamo.reset()
    contexts.clear()

    class Model(torch.nn.Module):
        def forward(self, x):
            return note(x)

    torch.export.export(Model(), (x,))
    assert contexts
    assert set(contexts) == {"exporter"}
