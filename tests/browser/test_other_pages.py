import pytest
from tests.unit.report.html_samples import HOSTILE, receipt, recheck

import bnlab
from bnlab.report.html import experiments
from bnlab.report.html import receipt as receipt_page


def test_a_receipt(browser, tmp_path):
    path = tmp_path / "receipt.html"
    path.write_text(receipt_page.render(receipt(recheck=recheck(conclusion_after=HOSTILE[0]))), encoding="utf-8")
    browser.open(path)
    assert HOSTILE[0] in browser.one("body").text
    assert browser.all("img") == []
    assert browser.all("svg.network")
    assert (browser.problems(), browser.requests()) == ([], [])


@pytest.mark.parametrize("interactive", [False, True])
def test_an_experiment(browser, tmp_path, interactive):
    path = tmp_path / "lab.html"
    record = bnlab.lab.run("train-eval", batches=(2, 8), updates=(1, 1000))
    path.write_text(experiments.render([record], interactive=interactive), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    browser.open(path)
    assert browser.all("figure svg, figure canvas")
    assert (browser.problems(), browser.requests()) == ([], [])
    assert browser.first_paint() < 2000
