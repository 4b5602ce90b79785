"""segmentation-models-pytorch: decoders on encoders of torchvision and timm."""

from __future__ import annotations

import pytest

smp = pytest.importorskip(
    "segmentation_models_pytorch",
    reason="make test-integration installs segmentation-models-pytorch",
    exc_type=ImportError,
)

from tests.integration.case import Case, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402

import bnlab  # noqa: E402


def segmenter(name, encoder):
    return Case(
        f"{name} ({encoder})",
        lambda: getattr(smp, name)(encoder, encoder_weights=None, classes=4),
        lambda: [(batch,) for batch in images()],
        label=lambda batch, output: (batch[0], output.argmax(1)),
    )


CASES = [
    segmenter("Unet", "resnet18"),
    segmenter("FPN", "mobilenet_v2"),
    segmenter("DeepLabV3Plus", "resnet18"),
    segmenter("Linknet", "tu-mobilenetv3_small_050"),
]


LINES = """
model = smp.Unet("resnet18", encoder_weights=None, classes=4)
print(bnlab.check(model, data=loader, metric="miou").conclusion)  # batches: (images, masks)
bnlab.freeze(model, layers=["encoder.*"])
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("segmentation_models_pytorch", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("segmentation_models_pytorch", LINES, record_property, loader=CASES[0].data, smp=smp)
    assert isinstance(namespace["model"].encoder.bn1, bnlab.nn.FrozenBatchNorm2d)
