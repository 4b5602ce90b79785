"""How a model is called on batches of every form."""

import collections
import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from bnlab.errors import BatchMisfit, UsageError
from bnlab.observe.passes.calling import (
    Arguments,
    arguments_of,
    inputs_taken,
    is_list_of_images,
    is_opaque,
    require_forward,
    run_batch,
)

X, Y, MASK = torch.ones(8, 3), torch.zeros(8), torch.ones(8, 1)
IMAGE, OTHER = torch.rand(3, 6, 5), torch.rand(3, 4, 7)


def model_with(forward):
    """Return a module whose forward is a function with self."""
    return type("Model", (nn.Module,), {"forward": forward})()


ONE = model_with(lambda self, x: ("x", x))
TWO = model_with(lambda self, x, mask: ("x, mask", x, mask))
OPTIONAL = model_with(lambda self, x, mask=None: ("x, mask?", x, mask))
FACE = model_with(lambda self, pixel_values=None, labels=None: ("keywords", pixel_values, labels))
ANY = model_with(lambda self, **inputs: inputs)
ONLY_KEYWORDS = model_with(lambda self, *, one, two: (one, two))


class Pair(NamedTuple):
    data: torch.Tensor
    target: torch.Tensor


class Encoding(collections.UserDict):
    """What a tokenizer of transformers returns: a UserDict with `to`."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """A graph, which is no tensor and no container."""

    def __init__(self):
        self.x, self.edge_index, self.batch = X, torch.zeros(2, 4, dtype=torch.int64), None

    def to(self, device):
        return self


GRAPH, ENCODING = Graph(), Encoding({"pixel_values": X, "attention_mask": MASK})


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (ONE, X, (X,)),
        (ONE, (X, Y), (X,)),
        (ONE, [X, Y], (X,)),
        (ONE, (X,), (X,)),
        (ONE, Pair(X, Y), (X,)),
        (TWO, (X, MASK), (X, MASK)),
        (TWO, [X, MASK, Y], (X, MASK)),
        (TWO, ((X, MASK), Y), (X, MASK)),
        (TWO, [[X, MASK], Y], (X, MASK)),
        (OPTIONAL, (X, Y), (X,)),
        (ONE, ((X, ["a"] * 8), Y), (X,)),
        (ONE, ((X, {"name": ["a"] * 8}), Y), (X,)),
        (ONE, GRAPH, (GRAPH,)),
        (ONE, (GRAPH, Y), (GRAPH,)),
        (ONE, "text", ("text",)),
        (ONE, 7, (7,)),
        (ONE, {"image": X, "name": ["a"] * 8}, (X,)),
        (ONE, {"img": X, "labels": Y}, (X,)),
        (ONE, ({"pixel_values": X}, Y), (X,)),
        (model_with(lambda self, x, **others: x), {"inputs": X, "labels": Y}, (X,)),
        (model_with(lambda self, batch: batch), {"image": X, "labels": Y}, ({"image": X, "labels": Y},)),
    ],
)
def test_positional_arguments(model, batch, expected):
    arguments = arguments_of(model, batch)
    assert arguments.keywords == {}
    assert len(arguments.positional) == len(expected)
    for left, right in zip(arguments.positional, expected, strict=True):
        assert left is right or left == right


@pytest.mark.parametrize(
    ("model", "batch", "names"),
    [
        (ONE, {"x": X, "y": Y}, {"x"}),
        (ONE, {"x": X, "image": Y}, {"x"}),
        (TWO, {"mask": MASK, "x": X, "id": 3}, {"x", "mask"}),
        (OPTIONAL, {"x": X, "mask": MASK, "y": Y}, {"x", "mask"}),
        (OPTIONAL, {"x": X, "y": Y}, {"x"}),
        (FACE, {"pixel_values": X, "labels": Y, "id": 3}, {"pixel_values", "labels"}),
        (FACE, ENCODING, {"pixel_values"}),
        (ANY, {"a": X, "b": Y}, {"a", "b"}),
        (ONLY_KEYWORDS, {"one": X, "two": Y, "three": Y}, {"one", "two"}),
        (ONE, ({"x": X, "z": X}, Y), {"x"}),
        (model_with(lambda self, x, edge_index, batch=None: x), GRAPH, {"x", "edge_index"}),
        (model_with(lambda self, x, edge_index, batch=None: x), (GRAPH, Y), {"x", "edge_index"}),
    ],
)
def test_keyword_arguments(model, batch, names):
    arguments = arguments_of(model, batch)
    assert arguments.positional == ()
    assert arguments.keywords.keys() == names
    run_batch(model, batch)


def test_one_image_key_stands_for_the_missing_argument_beside_keywords():
    arguments = arguments_of(TWO, {"image": X, "mask": MASK, "id": Y})
    assert arguments.positional[0] is X
    assert arguments.keywords.keys() == {"mask"}
    assert arguments_of(FACE, {"image": X, "labels": Y}).positional[0] is X


@pytest.mark.parametrize(
    ("model", "batch", "shown", "pass_"),
    [
        (ONE, {"a": X, "b": Y}, '{"a": float32 (8, 3), "b": float32 (8,)}', 'model(batch["a"])'),
        (ONE, {"image": X, "input": X}, '{"image": float32 (8, 3), "input": float32 (8, 3)}', 'model(batch["image"])'),
        (ONE, ({"a": X}, Y), '({"a": float32 (8, 3)}, float32 (8,))', 'model(batch[0]["a"])'),
        (TWO, X, "float32 (8, 3)", "model(batch, ...)"),
        (TWO, (X,), "(float32 (8, 3),)", "model(batch[0], ...)"),
        (TWO, {"image": X, "m": MASK}, '"m": float32 (8, 1)', 'model(batch["image"], batch["m"])'),
        (ONLY_KEYWORDS, (X, Y), "(float32 (8, 3), float32 (8,))", "model(one=batch[0], two=batch[1])"),
        (TWO, GRAPH, "Graph", "model(batch.x, batch.edge_index)"),
    ],
)
def test_a_batch_that_does_not_fit_is_shown_with_the_forward_to_pass(model, batch, shown, pass_):
    with pytest.raises(UsageError) as caught:
        run_batch(model, batch)
    text = str(caught.value)
    assert text.startswith("Model: a batch must fit forward(")
    assert shown in text
    assert text.endswith(f"Pass forward=lambda model, batch: {pass_}.")
    assert "\n" not in text


def test_the_signature_is_shown_without_annotations():
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, *, scale: float = 1.0) -> torch.Tensor:
        return x

    with pytest.raises(UsageError, match=r"must fit forward\(x, mask, \*, scale=1\.0\), got float32"):
        run_batch(model_with(forward), X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Conv1d(8, 2, 3, bias=False), nn.LSTM(3, 2)])
def test_a_batch_of_another_dtype_is_shown_with_the_forward_to_pass(model, dtype):
    with pytest.raises(UsageError) as caught:
        run_batch(model, (X.to(dtype), Y))
    got = f"({str(dtype).removeprefix('torch.')} (8, 3), float32 (8,))"
    assert str(caught.value) == (
        f"{type(model).__name__}: a batch must have the dtype of the model, float32, got {got}. "
        "Pass forward=lambda model, batch: model(batch[0].to(torch.float32))."
    )
    assert isinstance(caught.value.__cause__, (RuntimeError, ValueError))


def test_other_errors_of_a_model_with_another_dtype_pass_through():
    with pytest.raises(ValueError, match="expected 4D input"):
        run_batch(nn.BatchNorm2d(3), X.double())
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        run_batch(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double()), X)


def test_errors_inside_a_model_that_was_called_rightly_pass_through():
    def broken(self, x, mask):
        raise TypeError("forward() missing 1 required positional argument: 'z'")

    with pytest.raises(TypeError, match="'z'"):
        run_batch(model_with(broken), (X, MASK))


class TestNestedPairs:
    """A nested pair of tensors is one argument, or its first tensor alone."""

    def test_a_model_may_unpack_the_pair(self):
        model = model_with(lambda self, pair: pair[0] + pair[1])
        assert torch.equal(run_batch(model, ((X, MASK), Y)), X + MASK)

    @pytest.mark.parametrize(
        "first",
        [lambda x: nn.functional.linear(x, torch.ones(2, 3)), lambda x: x.float().sum(1), torch.relu],
    )
    def test_a_model_of_one_tensor_gets_the_first(self, first):
        model = model_with(lambda self, x: first(x))
        for batch in (((X, MASK), Y), [[X, MASK], Y]):
            assert torch.equal(run_batch(model, batch), first(X))

    def test_other_errors_do_not_lead_to_a_second_call(self):
        calls = []

        def forward(self, pair):
            calls.append(pair)
            raise TypeError("something else")

        with pytest.raises(TypeError, match="something else"):
            run_batch(model_with(forward), ((X, MASK), Y))
        assert len(calls) == 1


class TestListsOfImages:
    """Lists of images, as detectors take them."""

    detector = model_with(lambda self, images, targets=None: images)
    strict_detector = model_with(lambda self, images, targets: (images, targets))

    def test_a_list_of_images_is_one_argument(self):
        for images in ([IMAGE, OTHER], [IMAGE], [IMAGE] * 5):
            assert arguments_of(self.detector, images) == Arguments((images,), taken=len(images))

    def test_annotations_say_so_too(self):
        def forward(self, x: list[torch.Tensor]):
            return x

        assert run_batch(model_with(forward), [IMAGE]) == [IMAGE]

    def test_a_model_of_images_gets_the_list(self):
        model = nn.Sequential(nn.Conv2d(3, 2, 1))
        images = [IMAGE, OTHER]
        assert arguments_of(model, images).positional == (images,)

    def test_a_model_of_signals_gets_the_first_of_two_tensors(self):
        """A batch of three signals has the shape of an image."""
        model = nn.Sequential(nn.Conv1d(6, 2, 1))
        assert arguments_of(model, [IMAGE, IMAGE]).positional[0] is IMAGE

    def test_targets_stay_beside_images(self):
        targets = [{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(1, 4)}]
        for images in ([IMAGE, OTHER], (IMAGE, OTHER)):
            assert arguments_of(self.detector, (images, targets)).positional == (images,)
            assert arguments_of(self.strict_detector, (images, targets)).positional == (images, targets)

    def test_other_lists_are_no_images(self):
        assert is_list_of_images([IMAGE, OTHER])
        assert is_list_of_images((IMAGE, OTHER))
        batch = torch.rand(8, 3, 5)
        for other in (
            [IMAGE],
            [X, X],
            [batch, batch],
            [IMAGE, Y],
            [IMAGE, torch.rand(1, 2, 2)],
            IMAGE,
            Pair(IMAGE, IMAGE),
        ):
            assert not is_list_of_images(other)
        assert not is_list_of_images([torch.ones(1, 2, 2, dtype=torch.int64)] * 2)


def test_how_many_elements_are_input():
    assert inputs_taken(ONE, (X, Y)) == 1
    assert inputs_taken(TWO, (X, MASK, Y)) == 2
    assert inputs_taken(TWO, ((X, MASK), Y)) == 1
    assert inputs_taken(ONE, X) == 1
    assert inputs_taken(TWO, X) == 0
    assert inputs_taken(TWO, (X, MASK, Y), lambda model, batch: model(*batch[:2])) == 0


def test_objects_that_move_themselves_are_opaque():
    assert is_opaque(GRAPH)
    assert is_opaque(pack_sequence([X]))
    for other in (X, (X,), [X], {"x": X}, ENCODING, "text", 3, None, nn.Linear(1, 1), Graph, Pair(X, Y)):
        assert not is_opaque(other)


def test_a_packed_sequence_is_one_argument():
    packed = pack_sequence([torch.ones(4, 3), torch.ones(2, 3)])
    assert arguments_of(ONE, packed).positional == (packed,)
    assert arguments_of(ONE, (packed, Y)).positional == (packed,)


def test_a_dataclass_is_one_argument_or_gives_what_forward_requires():
    @dataclasses.dataclass
    class Sample:
        x: torch.Tensor
        mask: torch.Tensor

    sample = Sample(X, MASK)
    assert arguments_of(ONE, sample).positional == (sample,)
    assert arguments_of(TWO, sample).keywords == {"x": X, "mask": MASK}


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda model: model_with_hook(model),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_do_not_hide_what_forward_requires(wrap):
    class Two(nn.Module):
        def forward(self, x, mask):
            return x + mask

    wrapped = wrap(Two())
    assert [tuple(part.shape) for part in arguments_of(wrapped, (X, MASK, Y)).positional] == [(8, 3), (8, 1)]
    assert arguments_of(wrapped, {"x": X, "mask": MASK, "id": Y}).keywords.keys() == {"x", "mask"}


def model_with_hook(model):
    """Replace the forward of a model as accelerate does."""
    old = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda *a, **k: old(*a, **k)), old)
    return model


def test_a_forward_without_a_signature_gets_one_argument():
    model = nn.Module()
    model.forward = torch.relu
    assert torch.equal(run_batch(model, (X, Y)), X)
    assert arguments_of(model, {"input": X, 3: Y}).keywords.keys() == {"input"}


def test_forward_must_be_callable():
    assert require_forward("check", None) is run_batch
    assert require_forward("check", print) is print
    with pytest.raises(UsageError, match="check: forward must be callable, got str"):
        require_forward("check", "model")


@dataclasses.dataclass
class Named:
    image: torch.Tensor
    label: torch.Tensor


class Multiplies(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Flattens(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Unpacks(nn.Module):
    def forward(self, batch):
        first, second = batch
        return first + second


@pytest.mark.parametrize(
    ("model", "batch", "forward"),
    [
        (Multiplies(3, 2), Named(X, Y), "model(batch.image)"),
        (Flattens(), Named(X, Y), "model(batch.image)"),
        (Multiplies(3, 2), (X.numpy(), 0), "model(torch.as_tensor(batch[0]))"),
        (Unpacks(), (X, X), "model(batch)"),
    ],
)
def test_a_forward_that_cannot_use_what_it_gets_shows_how_to_pass_it(model, batch, forward):
    with pytest.raises(BatchMisfit) as caught:
        run_batch(model, batch)
    assert str(caught.value).endswith(f"Pass forward=lambda model, batch: {forward}.")
    assert str(caught.value.__cause__)[:40] in str(caught.value)


@pytest.mark.parametrize(
    ("fails", "batch", "error"),
    [
        (lambda x: x.missing, (X, Y), AttributeError),
        (lambda x: x.missing, Named(X, Y), AttributeError),
        (lambda x: x + "text", (X, Y), TypeError),
        (lambda x: {}["key"], {"x": X}, KeyError),
    ],
)
def test_what_a_forward_gets_wrong_by_itself_stays_its_own_error(fails, batch, error):
    class Fails(nn.Module):
        def forward(self, x):
            return fails(x)

    with pytest.raises(error):
        run_batch(Fails(), batch)
