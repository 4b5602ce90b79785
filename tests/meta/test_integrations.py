import re
from pathlib import Path

from tools.build_integrations import ACTIONS, LIBRARIES, page

ROOT = Path(__file__).parents[2]


def pins(path):
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(encoding="utf-8"), re.M))


def record(**cells):
    model = {
        action: {"passed": True, "text": "2", "left": {}, "reason": "", **cells.get(action, {})} for action in ACTIONS
    }
    libraries = {name: {"lines": "bnlab.check(model)", "models": {"net": model}} for name in LIBRARIES}
    return {"versions": {"torch": "2.13.0", **dict.fromkeys(LIBRARIES, "1.0")}, "libraries": libraries}


def test_the_libraries_agree_with_the_other_pins():
    own, others = pins(ROOT / "tests" / "integration" / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert set(LIBRARIES) <= set(own)
    assert {name: own[name] for name in own if name in others} == {name: others[name] for name in own if name in others}


def test_every_library_has_a_test_file_and_a_section():
    text = page(record())
    for name, title in LIBRARIES.items():
        assert (ROOT / "tests" / "integration" / f"test_{name}.py").exists()
        assert f"\n## {title}\n" in text
    assert text.count("| net | 2 | 2 | 2 | 2 | 2 | 2 | 2 | 2 |") == len(LIBRARIES)
    assert "| 1 of 1 |" in text


def test_a_model_without_a_fused_layer_does_not_count():
    text = page(record(fuse={"text": "0 of 2", "left": {"nothing follows it": 2}}))
    assert "| 1 of 1 | 0 of 1 | 1 of 1 | 1 of 1 |" in text


def test_a_dash_and_a_layer_that_is_left_alone_have_their_reasons():
    text = page(
        record(
            fold={"text": "", "reason": "Fold first."},
            fuse={"left": {"nothing follows it": 1, "bn3 takes in the addition": 1}},
        )
    )
    assert "| net | 2 | 2 | 2 | 2 | 2 | 2 | – | 2 |" in text  # noqa: RUF001 - the dash of the page
    assert "- net, fold: Fold first." in text
    assert "- not fused: nothing follows it (1 in net)" in text
    assert "- not fused: another layer takes in the addition (1 in net)" in text
    assert "| 0 of 1 |" in text
