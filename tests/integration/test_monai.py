"""MONAI: networks for volumes, with batches {"image": ..., "label": ...}."""

from __future__ import annotations

import pytest

monai = pytest.importorskip("monai", reason="make test-integration installs monai", exc_type=ImportError)
from monai.networks import nets  # noqa: E402
from tests.integration.case import SAMPLES, Case, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402

import bnlab  # noqa: E402


def network(name, build):
    return Case(
        name,
        build,
        lambda: [{"image": batch} for batch in images(SAMPLES, 1, 16, 16, 16)],
        lambda batch: ((batch["image"],), {}),
        label=lambda batch, output: {**batch, "label": output.argmax(1)},
    )


CASES = [
    network("UNet", lambda: nets.UNet(3, 1, 4, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch")),
    network("SegResNet", lambda: nets.SegResNet(3, 8, 1, 4, norm="batch")),
    network("BasicUNet", lambda: nets.BasicUNet(3, 1, 4, features=(4, 4, 8, 16, 32, 4), norm="batch")),
    network("VNet", lambda: nets.VNet(3, 1, 4)),
    network("DenseNet", lambda: nets.DenseNet(3, 1, 4, init_features=8, growth_rate=4, block_config=(2, 2, 2))),
]


LINES = """
model = monai.networks.nets.SegResNet(spatial_dims=3, in_channels=1, out_channels=4, norm="batch")
bnlab.recalibrate(model, loader)  # batches of a MONAI loader: {"image": ..., "label": ...}
bnlab.convert(model, bnlab.nn.BatchNorm3d, fuse=True, example=loader)
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("monai", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("monai", LINES, record_property, loader=CASES[0].data, monai=monai)
    assert any(isinstance(module, bnlab.nn.BatchNorm3d) for module in namespace["model"].modules())
