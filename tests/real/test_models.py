"""Real networks on real data."""

import pytest
import torch
from tests.real.models import BurnMnist, ResNet20

import bnlab
from bnlab.lab import datasets
from bnlab.lab.metrics import accuracy
from bnlab.observe.files.load import load_into
from bnlab.observe.passes.population import impose_batch_statistics

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def cifar():
    pytest.importorskip("PIL.Image")
    whole = datasets.load("cifar10")
    return torch.cat([x for x, _ in whole]), torch.cat([label for _, label in whole])


IMAGES = 2000
"""The README of the data measures all 10,000 test images: a share of these differs from it by 1 % at most."""


def batches(images, labels, size, count, prepare=lambda x: (x - MEAN) / STD):
    return [
        (prepare(images[at : at + size]), labels[at : at + size])
        for at in range(0, min(len(images), size * count), size)
        if len(images[at : at + size]) > 1
    ]


def resnet20(data):
    model = ResNet20()
    load_into(model, data / "nets/akamaster_cifar10/resnet20-12fca82f.th")
    return model.eval()


def errors_and_warnings(diagnosis):
    return [(f.code, f.layer) for f in diagnosis.findings if f.level != "info"]


@pytest.mark.parametrize(("size", "expected"), [(2, 0.53), (8, 0.72), (32, 0.77), (200, 0.7865)])
def test_resnet20_with_batch_statistics(data, cifar, size, expected):
    """The numbers of the README of the data, within .01; the spread at batch 8 is .71 to .73."""
    model = resnet20(data)
    with impose_batch_statistics(model):
        measured = accuracy(model, batches(*cifar, size, IMAGES // size))
    assert measured == pytest.approx(expected, abs=0.011 if size != 8 else 0.02)


def test_resnet20_is_healthy_on_its_own_data_and_shifted_on_jpegs(data, cifar):
    model = resnet20(data)
    own = [((x - MEAN) / STD, label) for x, label in datasets.load("cifar10:train")[:2]]
    healthy = bnlab.check(model, data=own, metric=accuracy)
    assert errors_and_warnings(healthy) == []
    assert healthy.numbers.eval_running == pytest.approx(0.998, abs=0.005)
    jpegs = bnlab.check(model, data=batches(*cifar, 200, 3), train_data=own, metric=accuracy)
    assert not [code for code, _ in errors_and_warnings(jpegs) if code not in ("BN301", "BN402")]
    assert jpegs.numbers.eval_running == pytest.approx(0.81, abs=0.02)


def test_a_class_sorted_loader_is_reported(data, cifar):
    images, labels = cifar
    order = labels.argsort(stable=True)
    ordered = batches(images[order][::10], labels[order][::10], 50, 20)
    diagnosis = bnlab.check(resnet20(data), data=ordered)
    assert "BN403" in [code for code, _ in errors_and_warnings(diagnosis)]
    assert diagnosis.causes == ()


@pytest.mark.parametrize("file", ["mnist.pt", "mnist.safetensors"])
def test_the_wrong_preprocessing_of_burn_mnist_is_a_shift(data, file):
    model = BurnMnist()
    load_into(model, data / "nets/burn_mnist" / file)
    wrong = datasets.load("mnist")[:10]
    right = [((x - 0.1307) / 0.3081, label) for x, label in wrong]
    healthy = bnlab.check(model, data=right, train_data=right, metric=accuracy)
    assert {code for code, _ in errors_and_warnings(healthy)} <= {"BN107", "BN111"}
    assert healthy.numbers.eval_running == pytest.approx(0.99, abs=0.01)
    diagnosis = bnlab.check(model, data=wrong, train_data=right, metric=accuracy)
    assert diagnosis.causes[0].cause == "shift"
    assert "BN402" in [code for code, _ in errors_and_warnings(diagnosis)]
    assert diagnosis.summary.errors == 0
