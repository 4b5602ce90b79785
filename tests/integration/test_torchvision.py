"""torchvision: its networks for classification, segmentation, video and detection."""

from __future__ import annotations

import functools

import pytest
import torch

torchvision = pytest.importorskip(
    "torchvision", reason="make test-integration installs torchvision", exc_type=ImportError
)
from tests.integration.case import SAMPLES, Case, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402
from torchvision import models  # noqa: E402


def classifier(name, build=None, shape=(), **settings):
    return Case(
        name,
        build or (lambda: models.get_model(name, weights=None, num_classes=10, **settings)),
        lambda: [(batch,) for batch in images(*shape)],
        label=lambda batch, output: (batch[0], output.argmax(1)),
    )


def segmenter(name):
    return Case(
        name,
        lambda: models.get_model(name, weights=None, weights_backbone=None, num_classes=4),
        lambda: [(batch,) for batch in images()],
        label=lambda batch, output: (batch[0], output["out"].argmax(1)),
    )


def detect(model, batch):
    """Run a detector without its last step, for which torchvision needs compiled operators."""
    images, _ = model.transform(batch[0])
    return model.head(list(model.backbone(images.tensors).values()))


def detector(name):
    return Case(
        name,
        lambda: models.get_model(name, weights=None, weights_backbone=None, num_classes=4),
        lambda: [(list(batch), [{} for _ in batch]) for batch in images()],
        forward=detect,
        program=lambda model, batch: (model.backbone, (torch.stack(batch[0]),), {}),
    )


CASES = [
    classifier("resnet18"),
    classifier("mobilenet_v3_small"),
    classifier("shufflenet_v2_x0_5"),
    classifier("googlenet", init_weights=True, aux_logits=False),
    classifier(
        "densenet", functools.partial(models.DenseNet, growth_rate=8, block_config=(2, 2, 2, 2), num_classes=10)
    ),
    classifier("r3d_18", shape=(SAMPLES, 3, 4, 32, 32)),
    segmenter("lraspp_mobilenet_v3_large"),
    detector("ssdlite320_mobilenet_v3_large"),
]


LINES = """
model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
head = lambda model, batch: model.head(list(model.backbone(torch.stack(batch[0])).values()))
bnlab.recalibrate(model, loader, forward=head)  # batches of a detector: ([image, ...], [target, ...])
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("torchvision", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("torchvision", LINES, record_property, loader=CASES[-1].data, torchvision=torchvision)
    assert namespace["model"].backbone.features[0][0][1].num_batches_tracked > 0
