from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.lab import datasets
from bnlab.observe.metric import Score
from bnlab.observe.named_metrics import (
    NAMES,
    accuracy,
    cross_entropy,
    is_metric_name,
    miou,
    named_metric,
    score_of,
)

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
    return -float(scores.double().log_softmax(1)[torch.arange(len(labels)), labels].mean())


def oracle_miou(answers, labels, classes, ignored):
    """Count pixel by pixel, class by class."""
    shares = []
    for k in classes:
        pairs = [(a, t) for a, t in zip(answers.flatten().tolist(), labels.flatten().tolist(), strict=True)]
        pairs = [(a, t) for a, t in pairs if t not in ignored]
        both = sum(a == k and t == k for a, t in pairs)
        either = sum(k in (a, t) for a, t in pairs)
        shares += [both / either] if either else []
    return sum(shares) / len(shares)


@pytest.mark.parametrize("cuts", [[5], [1, 4], [3, 2], [1, 1, 1, 1, 1], [4, 1], [2, 0, 3]])
def test_every_sample_counts_the_same_however_the_batches_are_cut(cuts):
    data = list(zip(SCORES.split(cuts), LABELS.split(cuts), strict=True))
    assert accuracy(nn.Identity(), data) == 0.6
    assert cross_entropy(nn.Identity(), data) == pytest.approx(oracle_loss(SCORES, LABELS), rel=1e-6)


def test_a_better_model_has_a_higher_value():
    data = [(SCORES[:3], LABELS[:3])]
    better, worse = Returning(lambda x: 2 * x), Returning(lambda x: -x)
    assert accuracy(better, data) > accuracy(worse, data)
    assert miou(better, data) > miou(worse, data)
    assert 0 < cross_entropy(better, data) < cross_entropy(worse, data)


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


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "y"])
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
    expected = -float(scores.double().log_softmax(1).gather(1, labels[:, None]).mean())
    assert cross_entropy(nn.Identity(), data) == pytest.approx(expected, rel=1e-6)


def test_a_score_that_is_nan_is_wrong():
    scores = SCORES.clone()
    scores[0, 0] = float("nan")  # argmax treats NaN as the largest value
    assert accuracy(nn.Identity(), [(scores, LABELS)]) == 0.4
    assert cross_entropy(nn.Identity(), [(scores, LABELS)]) != cross_entropy(nn.Identity(), [(scores, LABELS)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    data = [(SCORES.to(dtype), LABELS)]
    assert accuracy(nn.Identity(), data) == 0.6
    assert cross_entropy(nn.Identity(), data) == pytest.approx(oracle_loss(SCORES.to(dtype), LABELS), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_alone_and_no_gradient_is_kept(training):
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Model(3, 3).train(training)
    for metric in (accuracy, cross_entropy, miou):
        metric(model, [(SCORES, LABELS)])
    assert seen == [(training, False)] * 3
    assert model.training is training
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only")
def test_batches_are_moved_to_the_model():
    model = nn.Linear(3, 3)
    on_cpu = [metric(model, [(SCORES, LABELS)]) for metric in (accuracy, cross_entropy)]
    on_gpu = [metric(model.cuda(), [(SCORES, LABELS)]) for metric in (accuracy, cross_entropy)]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    to_host = nn.Sequential(model, Returning(lambda x: x.cpu()))  # the scores and the model are on different devices
    assert accuracy(to_host, [(SCORES, LABELS)]) == on_gpu[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [SCORES],
            "or have one of the keys labels, label, targets, target, y, got a tensor alone as batch 0. Pass a function",
        ),
        ([(SCORES,)], "got a tuple of Tensor as batch 0."),
        ([(SCORES, LABELS), (SCORES, [0, 1])], "got a tuple of Tensor, list as batch 1."),
        ([(SCORES, torch.tensor(3))], "got a tuple of Tensor, Tensor as batch 0."),
        ([{"x": SCORES}], "got dict as batch 0."),
        ([()], "got a tuple of nothing as batch 0."),
        ([(SCORES, SCORES)], "labels must be integers, one class each, got torch.float32 in batch 0."),
        ([(SCORES, LABELS[:4])], "labels must have the shape (5,) for outputs of (5, 3), got (4,) in batch 0."),
        ([(SCORES, LABELS[:, None])], "labels must have the shape (5,) for outputs of (5, 3), got (5, 1) in batch 0."),
        ([(SCORES, LABELS + 1)], "labels must be from 0 to 2, got 3 in batch 0. Pass metric='NAME:3' if 3 means no "),
        ([(SCORES, LABELS - 1)], "labels must be from 0 to 2, got -1 in batch 0. Pass metric='NAME:-1' if -1 means"),
        ([(SCORES[:, 0], LABELS)], "of shape (N, K, ...) with at least 2 classes K, got torch.float32 of (5,)."),
        ([(SCORES[:, :1], LABELS)], "with at least 2 classes K, got torch.float32 of (5, 1)."),
        ([(LABELS[:, None].expand(5, 3), LABELS)], "must return floating scores"),
        ([("text", LABELS)], "model must return a tensor of scores, got str."),
        ([], "data must hold at least one labelled sample, got none."),
        ([(SCORES[:0], LABELS[:0])], "data must hold at least one labelled sample, got none."),
        (SCORES, "data: it must be an iterable of batches, got one tensor."),
        (iter([(SCORES, LABELS)]), "one-shot list_iterator"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_data_that_does_not_fit(name, data, message):
    with pytest.raises(UsageError) as error:
        named_metric(name)(nn.Identity(), data)
    assert message.replace("NAME", name) in str(error.value)
    assert "\n" not in str(error.value)
    if not message.startswith(("data:", "one-shot")):
        assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("output", [(), {}, None, "scores"])
def test_an_output_without_scores(output):
    with pytest.raises(UsageError, match="model must return a tensor of scores, got "):
        accuracy(Returning(lambda _: output), [(SCORES, LABELS)])


@pytest.mark.trains
def test_a_trained_network(settled):
    data = datasets.load("digits")
    assert accuracy(settled.model, data) == pytest.approx(settled.accuracy_running, abs=1e-6)
    assert 0 < cross_entropy(settled.model, data) < 0.5
    assert 0.8 < miou(settled.model, data) < settled.accuracy_running


SEGMENTED = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(1))
MASKS = torch.randint(5, (4, 6, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("cuts", [[4], [1, 3], [2, 0, 2]])
@pytest.mark.parametrize("void", [None, -100, 255])
def test_the_mean_intersection_over_union_of_a_data_set(cuts, void):
    scores, labels = SEGMENTED.clone(), MASKS.clone()
    scores[:, 4] = -9  # no answer is class 4
    labels[labels == 3] = 2  # no label is class 3
    if void is not None:
        labels[:, 0] = void
    expected = oracle_miou(scores.argmax(1), labels, range(5), {void})
    data = list(zip(scores.split(cuts), labels.split(cuts), strict=True))
    assert miou(nn.Identity(), data) == pytest.approx(expected, abs=1e-12)
    # the oracle catches a mean over batches, and one that counts the unlabelled pixels
    batches = [miou(nn.Identity(), [batch]) for batch in data if len(batch[1])]
    assert len(batches) == 1 or sum(batches) / len(batches) != pytest.approx(expected, abs=1e-6)
    assert void is None or oracle_miou(scores.argmax(1), labels, range(5), set()) != pytest.approx(expected, abs=1e-6)


def test_a_class_that_nothing_contains_has_no_weight():
    scores = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [-1.0, -1.0]]])
    assert miou(nn.Identity(), [(scores, torch.tensor([[0, 1]]))]) == 1.0


def test_a_position_with_a_nan_has_no_answer():
    scores = torch.tensor([[[5.0, 0.0, float("nan")], [0.0, 5.0, 0.0]]])
    assert miou(nn.Identity(), [(scores, torch.tensor([[0, 1, 1]]))]) == 0.75  # (1/1 + 1/2) / 2


def test_the_output_of_a_segmentation_network_of_torchvision():
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
    masks[:, :4] = 255
    with torch.no_grad():
        answers = model(images)["out"].argmax(1)
    assert miou(model, [(images, masks)]) == pytest.approx(oracle_miou(answers, masks, range(5), {255}))
    right = (answers == masks)[:, 4:].double().mean((1, 2)).mean()
    assert accuracy(model, [{"input": images, "target": masks}]) == pytest.approx(float(right))


def test_a_label_that_means_no_class_is_left_out():
    labels = torch.tensor([0, 1, -100, 1, 255])
    assert accuracy(nn.Identity(), [(SCORES, labels)]) == pytest.approx(2 / 3)
    kept = [0, 1, 3]
    assert cross_entropy(nn.Identity(), [(SCORES, labels)]) == pytest.approx(oracle_loss(SCORES[kept], labels[kept]))


def test_the_label_that_means_no_class_may_be_named():
    for ignored in (-1, 7, 0):
        labels = torch.tensor([1, 1, 2, ignored, ignored])
        assert accuracy(nn.Identity(), [(SCORES, labels)], ignore_index=ignored) == pytest.approx(2 / 3)
        assert named_metric(f"accuracy:{ignored}")(nn.Identity(), [(SCORES, labels)]) == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="labels must be from 0 to 2, got -100"):
        accuracy(nn.Identity(), [(SCORES, torch.tensor([0, 1, 2, -100, 1]))], ignore_index=-1)


def test_the_mean_leaves_out_the_class_that_means_no_class():
    expected = oracle_miou(SEGMENTED.argmax(1), MASKS, range(1, 5), {0})
    assert miou(nn.Identity(), [(SEGMENTED, MASKS)], ignore_index=0) == pytest.approx(expected, abs=1e-12)
    assert miou(nn.Identity(), [(SEGMENTED, MASKS)]) != pytest.approx(expected, abs=1e-6)


def test_255_is_a_class_where_there_are_more():
    scores = torch.eye(300)[[255, 255, 3]]
    assert accuracy(nn.Identity(), [(scores, torch.tensor([255, 255, 4]))]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_all_mean_no_class(name):
    with pytest.raises(UsageError, match=f"{name}: data must hold at least one labelled sample, got none."):
        named_metric(name)(nn.Identity(), [(SCORES, torch.full((5,), -100))])


def test_a_number_of_classes_that_changes():
    with pytest.raises(UsageError, match="miou: model must return the same number of classes, got 3 and 2"):
        miou(nn.Identity(), [(SCORES, LABELS), (SCORES[:, :2], LABELS.clamp(max=1))])


def test_names():
    assert NAMES == ("accuracy", "loss", "miou")
    assert [is_metric_name(text) for text in ("miou", "miou:255", "loss:-100")] == [True] * 3
    assert not any(map(is_metric_name, ("f1", "miou:", "miou:f", "miou:1.5", "", "a.b:c", "miou:255:1")))
    assert (named_metric("miou:-1").ignore_index, named_metric("loss").ignore_index) == (-1, None)


@pytest.mark.parametrize(("text", "hint"), [("acuracy", "accuracy"), ("mIoU:255", "miou"), ("Loss", "loss")])
def test_a_wrong_name_is_an_error_that_names_the_right_one(text, hint):
    with pytest.raises(UsageError) as error:
        named_metric(text)
    assert str(error.value) == (
        "metric: value must be a function of model and data, or one of accuracy, loss, miou, alone or with an ignored "
        f"label as in 'miou:255', got {text!r}. Did you mean {hint!r}?"
    )


def test_a_name_implies_the_direction():
    assert [score_of(name).lower_is_better for name in NAMES] == [False, True, False]
    assert score_of("loss", lower_is_better=True).lower_is_better
    assert [score_of(f"{name}:255").name for name in NAMES] == list(NAMES)
    for name in ("accuracy", "miou:0"):
        with pytest.raises(
            UsageError, match=r"lower_is_better must be False for (accuracy|miou), got True\. Leave out"
        ):
            score_of(name, lower_is_better=True)


def test_a_function_keeps_its_direction():
    def error(model, data):
        return 1.0

    assert score_of(error) == Score(error, lower_is_better=False, name="error")
    assert score_of(error, lower_is_better=True).lower_is_better
    error.higher_is_better = False  # as the metrics of torchmetrics have it
    assert score_of(error).lower_is_better


@pytest.mark.parametrize("metric", ["accuracy", "accuracy:-1", accuracy, partial(accuracy, ignore_index=9)])
def test_the_model_is_called_through_the_forward_of_the_caller(metric):
    class Twofold(nn.Module):
        def forward(self, x, scale):
            return scale * x

    score = score_of(metric, forward=lambda model, batch: model(batch[0], -1))
    assert score.on(Twofold(), [(SCORES, LABELS)]) == accuracy(Returning(lambda x: -x), [(SCORES, LABELS)])
