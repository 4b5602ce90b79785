import dataclasses

import pytest
from rich.cells import cell_len

from bnlab.checks._cases import healthy, network
from bnlab.diagnosis import Settings, _diagnose
from bnlab.observe.evidence import Evidence, NetworkState
from bnlab.records import Level, Target
from bnlab.report.text import _layer_name, plain, render, summary_line

UNIT = (healthy("a"), healthy("layer1.0.bn1", running_var=(-9.8e-4, 1, 1, 1)), healthy("b", weight=(1e-6, 1, 1, 1)))


def diagnose(*layers, networks=None, left_alone=(), **options):
    evidence = Evidence(networks or (network(*layers),), left_alone)
    return _diagnose(evidence, Target("checkpoint", "model.pt"), Settings.of(**options))


def test_the_conclusion_comes_first_then_findings_then_layers():
    lines = render(diagnose(*UNIT)).splitlines()
    assert lines[:2] == ["model.pt", "3 BN layers, 12 channels, float32"]
    text = "\n".join(lines)
    order = [
        "layer1.0.bn1: running_var is -0.00098",
        "ERROR BN102 in 1 layer",
        "NOTE BN108",
        "running_var  findings",
        "1 error,",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "1 of 4: 0" in text
    assert "running_var -0.00098" in text
    assert "remedy: recalibrate (buffers only); bnlab explain BN102" in text
    assert lines[-1] == "1 error, 0 warnings, 1 note; 12 of 34 checks passed"


def test_findings_below_the_level_are_counted_only():
    text = render(diagnose(*UNIT), level=Level.WARNING)
    assert "NOTE BN108" not in text
    assert "1 error, 0 warnings, 1 note (1 not shown: --level info)" in text


def many(count):
    name = "backbone.stage{}.block.{}.branch.conv_bn_relu.bn"
    layers = [healthy(name.format(i // 50, i), running_var=(-1 if i % 3 else 1, 1, 1, 1)) for i in range(count)]
    return [dataclasses.replace(layer, num_batches_tracked=1_700_000 + i) for i, layer in enumerate(layers)]


@pytest.mark.parametrize("width", [80, 60, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    for layers in (UNIT, many(40), (healthy("x" * 500),)):
        assert max(map(len, render(diagnose(*layers), width=width).splitlines())) <= width


def test_a_network_with_500_layers_stays_readable():
    text = render(diagnose(*many(500)))
    assert len(text.splitlines()) < 90
    assert "ERROR BN102 in 333 layers" in text
    assert "... and 323 more layers: --format json has them all" in text
    assert "... and 475 more layers: --format json has them all" in text
    assert "b.stage0.b.1.b.c.bn" in text
    assert text.count("BN102") == 27


def test_several_networks_are_told_apart():
    text = render(diagnose(networks=(NetworkState("model", UNIT[:1]), NetworkState("ema", UNIT[1:]))))
    assert "3 BN layers in 2 networks, 12 channels" in text


HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n\u202ereversed\u200b[bold]not markup[/bold]\x9b2J<b>"


def test_layer_names_cannot_reach_the_terminal_or_the_markup():
    layer = healthy(HOSTILE[:25], running_var=(-1, 1, 1, 1), num_batches_tracked=None)
    other = healthy("[bold]x[/bold]", running_var=(-1, 1, 1, 1))
    text = render(diagnose(layer, other, left_alone=((HOSTILE, HOSTILE),), ignore={"BN101": HOSTILE}))
    assert not set(text) & set("\x1b\x07\r\x9b\u202e\u200b")
    assert "[bold]x[/bold]" in text


def test_wide_characters_do_not_push_the_findings_out():
    text = render(diagnose(healthy("层" * 40, running_var=(-1, 1, 1, 1), weight=(1e-6, 0, 1, 1))))
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "BN102 BN108" in text


def test_every_finding_on_a_network_is_shown():
    networks = [
        NetworkState(name, (healthy(f"{name}.a.bn"), healthy(f"{name}.b.bn", num_batches_tracked=7)))
        for name in ("model", "ema")
    ]
    text = " ".join(render(diagnose(networks=tuple(networks))).split())
    assert "differs between layers of model: 1000 in 1 (a), 7 in 1 (b)" in text
    assert "differs between layers of ema: 1000 in 1 (a), 7 in 1 (b)" in text


def test_a_thousand_notes_are_not_printed():
    text = render(diagnose(healthy(), left_alone=tuple((str(i), "has no running_var") for i in range(1000))))
    assert len(text.splitlines()) < 35
    assert "more notes: --format json has them all" in text


def test_plain_keeps_ordinary_text():
    assert plain("layer1.0.bn é 批 <b> [x]") == "layer1.0.bn é 批 <b> [x]"
    assert plain("a\nb\tc\ud800") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"


def test_what_was_skipped_and_left_alone_is_said():
    text = render(diagnose(healthy(num_batches_tracked=None), left_alone=(("vq", "has no running_var"),)))
    assert "BN105, BN112 skipped: num_batches_tracked is absent in 1 of 1 layers" in text
    assert "left alone: vq has no running_var" in text


def test_values_that_are_not_finite():
    text = render(diagnose(healthy(running_var=(float("nan"),) * 4)))
    assert "not finite" in text
    assert "running_var nan" in text


def test_at_80_columns_nothing_but_names_is_shortened():
    rows = [line for line in render(diagnose(*many(20))).splitlines() if " 170" in line and "  4  " in line]
    assert len(rows) == 20
    assert rows[12].split() == ["b.stage0.b.12.b.c.bn", "4", "1700012", "1", "..", "1"]
    assert sum(row.endswith("-1 .. 1  BN102") for row in rows) == 13


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0.bn1", "layer1.0.bn1"),
        ("backbone.stage2.0.branch_main.1", "b.stage2.0.branch_main.1"),
        ("a.b." + "x" * 50, "\N{HORIZONTAL ELLIPSIS}" + "x" * 27),
        ("a1" * 30, "\N{HORIZONTAL ELLIPSIS}" + ("a1" * 30)[-27:]),
        ("", "(the module itself)"),
    ],
)
def test_names_that_are_too_long(name, expected):
    assert _layer_name(name).plain == expected


def test_one_line_among_many():
    assert summary_line(diagnose(*UNIT)).plain == "model.pt: 3 layers, 1 error, 0 warnings, 1 note (BN102)"
    assert summary_line(diagnose(healthy())).plain == "model.pt: 1 layer, 0 errors, 0 warnings, 0 notes"
