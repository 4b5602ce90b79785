from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.lab import datasets, metrics
from bnlab.lab.metrics import accuracy, loss

SCORES = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 2, 1, 0])


class Pair(NamedTuple):
    scores: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Record:
    hidden: torch.Tensor
    logits: torch.Tensor


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)


def oracle_loss(scores, labels):
    return float(scores.double().log_softmax(1)[torch.arange(len(labels)), labels].mean())


def test_names():
    assert metrics.NAMES == ("accuracy", "loss")
    assert (metrics.load("accuracy"), metrics.load("loss")) == (accuracy, loss)
    with pytest.raises(UsageError, match="metrics: name must be accuracy or loss, got 'f1'"):
        metrics.load("f1")


@pytest.mark.parametrize("cuts", [[5], [1, 4], [3, 2], [1, 1, 1, 1, 1], [4, 1], [2, 0, 3]])
def test_every_sample_counts_the_same_however_the_batches_are_cut(cuts):
    data = list(zip(SCORES.split(cuts), LABELS.split(cuts), strict=True))
    assert accuracy(nn.Identity(), data) == 0.6
    assert loss(nn.Identity(), data) == pytest.approx(oracle_loss(SCORES, LABELS), rel=1e-6)


def test_a_better_model_has_a_higher_value():
    data = [(SCORES[:3], LABELS[:3])]
    better, worse = Returning(lambda x: 2 * x), Returning(lambda x: -x)
    for metric in (accuracy, loss):
        assert metric(better, data) > metric(worse, data)
    assert loss(better, data) < 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, -x),
        lambda x: [x, -x],
        lambda x: Pair(x, -x),
        lambda x: ((x, -x), -x),
        lambda x: {"aux": -x, "logits": x},
        lambda x: {"aux": -x, "out": x},
        lambda x: {"scores": x, "aux": -x},
        lambda x: ({"out": x},),
        lambda x: Record(-x, x),
    ],
)
def test_every_form_of_output(wrap):
    assert accuracy(Returning(wrap), [(SCORES, LABELS)]) == 0.6


@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_dict_is_passed_as_keywords(key):
    class Model(nn.Module):
        def forward(self, x, **rest):
            assert set(rest) == {key}
            return {"loss": torch.zeros(()), "logits": x}

    assert accuracy(Model(), [{"x": SCORES, key: LABELS}]) == 0.6


def test_what_comes_behind_the_label_is_left_alone():
    assert accuracy(nn.Identity(), [(SCORES, LABELS, "path", {"weight": LABELS})]) == 0.6
    assert accuracy(nn.Identity(), [[SCORES, LABELS.to(torch.uint8)]]) == 0.6


def test_many_labels_a_sample():
    scores = torch.randn(3, 4, 5, 6)
    labels = torch.randint(4, (3, 5, 6))
    data = [(scores[:2], labels[:2]), (scores[2:], labels[2:])]
    assert accuracy(nn.Identity(), data) == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    expected = float(scores.double().log_softmax(1).gather(1, labels[:, None]).mean())
    assert loss(nn.Identity(), data) == pytest.approx(expected, rel=1e-6)


def test_a_score_that_is_nan_is_wrong():
    scores = SCORES.clone()
    scores[0, 0] = float("nan")  # argmax treats NaN as the largest value
    assert accuracy(nn.Identity(), [(scores, LABELS)]) == 0.4
    assert loss(nn.Identity(), [(scores, LABELS)]) != loss(nn.Identity(), [(scores, LABELS)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    data = [(SCORES.to(dtype), LABELS)]
    assert accuracy(nn.Identity(), data) == 0.6
    assert loss(nn.Identity(), data) == pytest.approx(oracle_loss(SCORES.to(dtype), LABELS), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_alone_and_no_gradient_is_kept(training):
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Model(3, 3).train(training)
    accuracy(model, [(SCORES, LABELS)])
    loss(model, [(SCORES, LABELS)])
    assert seen == [(training, False)] * 2
    assert model.training is training
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only")
def test_batches_are_moved_to_the_model():
    model = nn.Linear(3, 3)
    on_cpu = [metric(model, [(SCORES, LABELS)]) for metric in (accuracy, loss)]
    on_gpu = [metric(model.cuda(), [(SCORES, LABELS)]) for metric in (accuracy, loss)]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    to_host = nn.Sequential(model, Returning(lambda x: x.cpu()))  # the scores and the model are on different devices
    assert accuracy(to_host, [(SCORES, LABELS)]) == on_gpu[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([SCORES], "batches must be (input, label, ...) with a tensor of labels, got a tensor alone as batch 0."),
        ([(SCORES,)], "got a tuple of Tensor as batch 0."),
        ([(SCORES, LABELS), (SCORES, [0, 1])], "got a tuple of Tensor, list as batch 1."),
        ([(SCORES, torch.tensor(3))], "got a tuple of Tensor, Tensor as batch 0."),
        ([{"x": SCORES}], "got dict as batch 0."),
        ([()], "got a tuple of nothing as batch 0."),
        ([(SCORES, SCORES)], "labels must be integers, one class each, got torch.float32 in batch 0."),
        ([(SCORES, LABELS[:4])], "labels must have the shape (5,) for outputs of (5, 3), got (4,) in batch 0."),
        ([(SCORES, LABELS[:, None])], "labels must have the shape (5,) for outputs of (5, 3), got (5, 1) in batch 0."),
        ([(SCORES, LABELS + 1)], "labels must be from 0 to 2, got 3 in batch 0."),
        ([(SCORES, LABELS - 1)], "labels must be from 0 to 2, got -1 in batch 0."),
        ([(SCORES[:, 0], LABELS)], "of shape (N, C, ...) with at least 2 classes C, got torch.float32 of (5,)."),
        ([(SCORES[:, :1], LABELS)], "with at least 2 classes C, got torch.float32 of (5, 1)."),
        ([(LABELS[:, None].expand(5, 3), LABELS)], "must return floating scores"),
        ([("text", LABELS)], "model must return a tensor of scores, got str."),
        ([], "data must hold at least one labelled sample, got none."),
        ([(SCORES[:0], LABELS[:0])], "data must hold at least one labelled sample, got none."),
        (SCORES, "data: it must be an iterable of batches, got one tensor."),
        (iter([(SCORES, LABELS)]), "one-shot list_iterator"),
    ],
)
@pytest.mark.parametrize("metric", [accuracy, loss])
def test_data_that_does_not_fit(metric, data, message):
    with pytest.raises(UsageError) as error:
        metric(nn.Identity(), data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if not message.startswith(("data:", "one-shot")):
        assert str(error.value).startswith(f"{metric.__name__}: ")


@pytest.mark.parametrize("output", [(), {}, None, "scores"])
def test_an_output_without_scores(output):
    with pytest.raises(UsageError, match="model must return a tensor of scores, got "):
        accuracy(Returning(lambda _: output), [(SCORES, LABELS)])


@pytest.mark.trains
def test_a_trained_network(settled):
    data = datasets.load("digits")
    assert accuracy(settled.model, data) == pytest.approx(settled.accuracy_running, abs=1e-6)
    assert loss(settled.model, data) < 0
