"""ultralytics: YOLO, with batches {"img": ..., "cls": ...}."""

from __future__ import annotations

import pytest

pytest.importorskip("ultralytics", reason="make test-integration installs ultralytics", exc_type=ImportError)
from tests.integration.case import Case, images
from tests.integration.cells import CELLS, judge, run_lines
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel


def network(name, kind):
    return Case(
        name,
        lambda: kind(f"{name}.yaml", verbose=False),
        lambda: [{"img": batch} for batch in images()],
        lambda batch: ((batch["img"],), {}),
    )


CASES = [
    network("yolov8n", DetectionModel),
    network("yolo11n", DetectionModel),
    network("yolov8n-seg", SegmentationModel),
    network("yolov8n-cls", ClassificationModel),
]


LINES = """
model = DetectionModel("yolov8n.yaml", verbose=False)  # or YOLO("yolov8n.pt").model
bnlab.recalibrate(model, loader)  # batches of the trainer: {"img": ..., "cls": ..., "bboxes": ...}
print(bnlab.fold(model, loader))
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("ultralytics", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines("ultralytics", LINES, record_property, loader=CASES[0].data, DetectionModel=DetectionModel)
    assert namespace["model"].model[0].bn.num_batches_tracked > 0
