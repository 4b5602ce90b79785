"""timm: its own BN layer with an activation, and the networks built on it."""

from __future__ import annotations

import pytest

timm = pytest.importorskip("timm", reason="make test-integration installs timm", exc_type=ImportError)

from tests.integration.case import Case, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402

import bnlab  # noqa: E402

NAMES = (
    "resnet18",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "regnety_002",
    "ghostnet_050",
    "mnasnet_small",
    "repvgg_a0",
    "levit_128s",
    "dla46_c",
    "ese_vovnet19b_slim",
)


def case(name):
    return Case(
        name,
        lambda: timm.create_model(
            name, pretrained=False, num_classes=10, **({"img_size": 64} if "levit" in name else {})
        ),
        lambda: [(batch,) for batch in images()],
        label=lambda batch, output: (batch[0], output.argmax(1)),
    )


CASES = [case(name) for name in NAMES]


LINES = """
model = timm.create_model("efficientnet_b0", num_classes=10)
print(bnlab.check(model, data=loader).conclusion)
bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=loader)
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("timm", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("timm", LINES, record_property, loader=CASES[0].data, timm=timm)
    assert isinstance(namespace["model"].bn1, bnlab.nn.BatchNorm2d)
