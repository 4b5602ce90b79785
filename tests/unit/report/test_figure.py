import dataclasses

import pytest
from tests.unit.lab.halving import Halving

import bnlab
from bnlab.errors import MissingPackage
from bnlab.records import Axis, ExperimentRecord, Mark
from bnlab.report import figure


def test_pictures_are_drawn_from_the_record_alone():
    result = bnlab.lab.run(Halving())
    record = ExperimentRecord.from_json(result.to_json())
    assert figure.svg(record).startswith("<svg")
    assert "half" in figure.svg(record)
    assert figure.png(record)[:4] == b"\x89PNG"
    page = figure.html(record)
    assert "</html>" in page
    assert 'src="http' not in page
    assert "<svg" in result._repr_html_()


@pytest.mark.parametrize("mark", list(Mark))
@pytest.mark.parametrize("panel", [None, "kind"])
def test_every_kind_of_picture(mark, panel):
    result = bnlab.lab.run(Halving())
    drawn = dataclasses.replace(result.figure, mark=mark, panel=panel, low=None, high=None)
    drawn = dataclasses.replace(drawn, value=Axis("ratio", "ratio"), rules=()) if mark is Mark.CELL else drawn
    assert figure.svg(dataclasses.replace(result, figure=drawn)).startswith("<svg")


def test_drawing_without_the_packages_is_one_line(monkeypatch):
    monkeypatch.setattr(figure, "can_draw", lambda: False)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[report\]'"):
        figure.svg(bnlab.lab.run(Halving()))
