import pytest
from tests.unit.report.html_samples import HOSTILE, diagnosis, event, history, hostile, large

import bnlab
from bnlab.lab import datasets, metrics
from bnlab.report.html import diagnosis as page


@pytest.fixture(scope="module")
def demo(tmp_path_factory, stuck):
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    diagnosis = bnlab.check(
        stuck.model,
        data=datasets.load("digits:test"),
        train_data=datasets.load("digits:train"),
        metric=metrics.accuracy,
        per_channel=True,
    )
    path.write_text(page.render(diagnosis), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.html"
    path.write_text(page.render(large(1000, 100)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("real") / "resnet56.html"
    diagnosis = bnlab.check(data / "nets/akamaster_cifar10/resnet56-4bfd9763.th", per_channel=True)
    path.write_text(page.render(diagnosis), encoding="utf-8")
    return path


@pytest.fixture(params=["demo", "real", "thousand"])
def any_page(request):
    return request.getfixturevalue(request.param)


def test_it_opens_quietly_and_at_once(browser, any_page):
    assert any_page.stat().st_size < 2_000_000
    browser.open(any_page)
    assert browser.one("h1").text
    assert browser.problems() == []
    assert browser.requests() == []
    assert browser.first_paint() < 2000


def test_sorting_by_the_mouse_and_by_the_keyboard(browser, any_page):
    browser.open(any_page)
    button = browser.one("#layers-table thead th:nth-child(2) button")
    column = "#layers-table tbody tr td:nth-of-type(1)"

    def values():
        read = "c => Number(c.dataset.value ?? c.textContent.replace(/,/g, ''))"
        return browser.run(f"return [...document.querySelectorAll(arguments[0])].map({read})", column)

    button.click()
    browser.wait(lambda: values() == sorted(values()))
    button.send_keys("\ue007")
    browser.wait(lambda: values() == sorted(values(), reverse=True))
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    assert browser.problems() == []


def test_filtering(browser, any_page):
    browser.open(any_page)
    name = browser.all("#layers-table tbody tr th")[-1].text
    field = browser.one("input[data-filter-for='layers-table']")
    count = "return [...document.querySelectorAll('#layers-table tbody tr')].filter(r => !r.hidden).length"
    field.send_keys(name)
    assert 1 <= browser.run(count) <= len(browser.all("#layers-table tbody tr"))
    field.send_keys(" no-such-layer")
    assert browser.run(count) == 0
    assert browser.problems() == []


def test_the_findings_of_a_problem_unfold(browser, demo):
    browser.open(demo)
    assert len(browser.all("article.finding")) == 1
    rows = browser.all("article.finding tbody tr")
    assert len(rows) > 3
    assert not rows[0].is_displayed()
    browser.one("article.finding summary").click()
    browser.wait(lambda: rows[0].is_displayed())
    link = browser.one("article.finding .worst a")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", link)
    name = link.text
    link.click()
    browser.wait(lambda: browser.one("#layer-heading").text == name)
    assert browser.problems() == []


def test_a_layer_opens_from_the_network_the_table_and_the_address(browser, any_page):
    browser.open(any_page)
    assert not browser.one("#layer").is_displayed()
    column = browser.all("a.column")[-1]
    browser.run("arguments[0].focus()", column)
    column.send_keys("\ue007")
    browser.wait(lambda: browser.one("#layer").is_displayed() and browser.all("#layer-body svg"))
    first = browser.one("#layer-heading").text
    link = browser.one("#layers-table tbody th a, #layers-table tbody th button")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    browser.wait(lambda: browser.one("#layer-heading").text != first)
    browser.open(any_page, "#layer=1")
    browser.wait(lambda: browser.one("#layer").is_displayed())
    browser.one("#layer-close").click()
    browser.wait(lambda: not browser.one("#layer").is_displayed())
    assert browser.problems() == []


def test_arrow_keys_walk_along_the_network(browser, any_page):
    browser.open(any_page)
    browser.run("arguments[0].focus()", browser.one("a.column"))
    browser.driver.switch_to.active_element.send_keys("\ue014")
    place = "return [...document.querySelectorAll('a.column')].indexOf(document.activeElement)"
    browser.wait(lambda: browser.run(place) == 1 and browser.one("#tooltip").is_displayed())


def test_the_theme_switches_and_stays(browser, any_page):
    browser.open(any_page)
    colour = "return getComputedStyle(document.body).color"
    before = browser.run(colour)
    browser.one("#theme").click()
    after = browser.run(colour)
    assert after != before
    browser.open(any_page)
    assert browser.run(colour) == after
    browser.one("#theme").click()
    assert browser.run(colour) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(browser, tmp_path, name):
    path = tmp_path / "hostile.html"
    path.write_text(page.render(hostile(name)), encoding="utf-8")
    browser.open(path, "#layer=0")
    browser.run(
        "for (const link of document.querySelectorAll('a.column')) link.dispatchEvent(new Event('pointerenter'))"
    )
    assert browser.all("img, [onload], [onerror], [onfocus]") == []
    assert browser.problems() == []
    assert browser.requests() == []
    if name.isprintable():
        browser.wait(lambda: name in browser.one("#layer-heading").text)


@pytest.mark.parametrize("width", [360, 1280])
def test_no_text_of_a_chart_of_the_history_is_cut_or_covered(browser, tmp_path, width):
    path = tmp_path / "history.html"
    steps = tuple(range(1_000_000, 1_006_000, 100))
    codes = {"BN603": 1_000_000, "BN605": 1_002_400, "BN606": 1_002_450, "BN608": 1_005_990}
    findings = [event("layer1.0.bn1", code, step) for code, step in codes.items()]
    record = diagnosis(findings=findings, history=(history("layer1.0.bn1", steps=steps),))
    path.write_text(page.render(record), encoding="utf-8")
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(path)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert len(browser.all("#history svg")) == 3
        boxes = """return [...document.querySelectorAll("#history svg")].map((svg) => {
          const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
          return [box(svg), ...[...svg.querySelectorAll("text")].map(box)];
        });"""
        for frame, *texts in browser.run(boxes):
            assert len(texts) > 10
            for left, top, right, bottom in texts:
                assert frame[0] - 0.5 <= left < right <= frame[2] + 0.5
                assert frame[1] - 0.5 <= top < bottom <= frame[3] + 0.5
            for place, one in enumerate(texts):
                for other in texts[:place]:
                    across = min(one[2], other[2]) - max(one[0], other[0])
                    down = min(one[3], other[3]) - max(one[1], other[1])
                    assert across <= 0 or down <= 2.5  # boxes of lines of text overlap a little, their letters do not
        assert browser.problems() == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
