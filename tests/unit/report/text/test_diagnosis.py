import dataclasses
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from tests.samples import save, state_dict
from tests.unit.report.text.diagnosis_samples import UNIT, diagnose, many

from bnlab.checks import CHECKS
from bnlab.checks.cases import healthy
from bnlab.observe.evidence import NetworkState
from bnlab.records import (
    Cause,
    DiagnosisRecord,
    Finding,
    LayerRecord,
    Level,
    Numbers,
    Outcome,
    Quantity,
    Range,
    Status,
    Summary,
    Target,
)
from bnlab.report.text.bars import Marks
from bnlab.report.text.diagnosis import render, summary_line


def test_the_conclusion_comes_first_then_problems_then_layers():
    lines = render(diagnose(*UNIT), width=100).splitlines()
    assert lines[:2] == ["model.pt", "3 BN layers, 12 channels, float32"]
    text = "\n".join(lines)
    order = [
        "layer1.0.bn1: running_var is -0.00098",
        "ERROR BN102 NegativeRunningVariance in 1 layer",
        "NOTE BN108",
        "running_var  findings",
        "1 error,",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "  layer1.0.bn1: running_var is -0.00098 in 1 of 4 channels, must be >= 0 (channel 0)\n" in text
    assert "remedy: recalibrate (buffers only); bnlab explain BN102" in text
    assert re.fullmatch(rf"1 error, 0 warnings, 1 note; \d+ of {len(CHECKS)} checks passed", lines[-1])


def test_problems_below_the_level_are_counted_only():
    text = render(diagnose(*UNIT), level=Level.WARNING)
    assert "NOTE BN108" not in text
    assert "1 error, 0 warnings, 1 note (1 not shown: --level info)" in text


@pytest.mark.parametrize("width", [80, 60, 120, 200])
def test_no_line_is_wider_than_the_terminal(width):
    for layers in (UNIT, many(40), (healthy("x" * 500),)):
        assert max(map(len, render(diagnose(*layers), width=width).splitlines())) <= width


def test_a_network_with_500_layers_stays_readable():
    text = render(diagnose(*many(500)))
    assert len(text.splitlines()) < 90
    assert "ERROR BN102 NegativeRunningVariance in 333 layers" in text
    assert "layers: b.stage0.b.1.b.c.bn, b.stage0.b.2.b.c.bn, b.stage0.b.4.b.c.bn" in text
    assert " and 327 more" in text
    assert "... and 475 more layers: --format json has them all" in text
    assert text.count("BN102") == 27
    assert "1 error in 333 layers, 0 warnings, 1 note" in text


def test_findings_on_the_causes_and_the_symptoms_of_one_mistake_are_drawn_once():
    text = render(with_data())
    assert "WARNING BN401 StaleStatistics in 3 layers, also BN301\n" in text
    assert text.count("WARNING") == 1
    assert "layers (effect, std): stem.bn 2.5, layer1.0.bn1 1.5, b.stage2.0.branch_main.1\n  0.5\n" in text


def test_layers_that_do_not_differ_in_the_quantity_have_no_numbers():
    assert "layers: a, b\n" in render(
        diagnose(healthy("a", running_var=(-1,) * 4), healthy("b", running_var=(-1,) * 4))
    )


def test_problems_that_there_is_no_room_for_are_counted():
    findings = tuple(dataclasses.replace(stale("stem.bn", 1.0), code=f"BN{700 + i}") for i in range(30))
    text = render(dataclasses.replace(with_data(), findings=findings))
    assert "... and 10 more problems: --format json has them all" in text
    assert "0 errors, 30 warnings, 0 notes" in text


def test_a_check_that_this_version_does_not_know_is_drawn_without_a_name():
    text = render(
        dataclasses.replace(with_data(), findings=(dataclasses.replace(stale("stem.bn", 1.0), code="BN999"),))
    )
    assert "WARNING BN999 in 1 layer\n" in text


def test_several_networks_are_counted():
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


def test_the_report_lists_skipped_checks_and_what_was_left_alone():
    text = render(diagnose(healthy(num_batches_tracked=None), left_alone=(("vq", "has no running_var"),)))
    assert "BN105, BN112 skipped: num_batches_tracked is absent in all layers" in text
    assert "left alone: vq has no running_var" in text


def test_values_that_are_not_finite():
    text = render(diagnose(healthy(running_var=(float("nan"),) * 4)))
    assert "not finite" in text
    assert "  bn: running_var is nan in 4 of 4 channels, must be finite\n" in text


def test_one_line_among_many():
    assert summary_line(diagnose(*UNIT)).plain == "model.pt: 3 layers, 1 error, 0 warnings, 1 note (BN102)"
    assert summary_line(with_data()).plain == (
        "nets:build: 5 layers, 1 error, 1 warning in 3 layers, 1 note (BN101, BN401)"
    )
    assert summary_line(diagnose(healthy())).plain == "model.pt: 1 layer, 0 errors, 0 warnings, 0 notes"
    assumed = dataclasses.replace(diagnose(healthy()), assumption="BN105 would fire at a momentum below 0.047")
    assert summary_line(assumed).plain.endswith("0 notes; BN105 would fire at a momentum below 0.047")


GOLDEN = Path(__file__).parents[3] / "golden"


GAPS = {
    "stem.bn": {"staleness": 0.62, "sampling noise": 0.001, "heterogeneity": -0.02, "total": 0.601},
    "layer1.0.bn1": {"staleness": 0.21, "total": 0.21},
    "backbone.stage2.0.branch_main.1": {"shift": 1.2e-3, "total": 1.2e-3},
    "encodeur.\N{LATIN SMALL LETTER E WITH ACUTE}.bn": {"bessel": 4e-8, "total": 4e-8},
    "head.\x1b[31mbn": None,
}


def layer(name, gap):
    var = Range(min=0.0, median=1.0, max=math.inf) if gap is None else Range(min=0.88, median=0.9, max=1.25)
    return LayerRecord(
        name=name, network="", channels=64, dtype="float32", affine=True, momentum=0.1, eps=1e-5, assumed=(), gap=gap,
        num_batches_tracked=None if gap is None else 391, running_mean=None, running_var=var, gain=None,
    )  # fmt: skip


def stale(name, value):
    return Finding(
        code="BN401", level=Level.WARNING, layer=name, channels=(0, 3, 17, 40, 41),
        message=f"running statistics are up to {value:.3g} standard deviations from those of the training data in 5 of "
        "64 channels, must be <= 0.35",
        why="eval mode normalises with statistics that the training data does not have",
        measured={"effect": Quantity(value, "std"), "channels": Quantity(5 / 64, "fraction")},
        threshold={"effect": Quantity(0.35, "std"), "channels": Quantity(0.05, "fraction")},
        remedies=("recalibrate",),
    )  # fmt: skip


def with_data():
    names = list(GAPS)
    odd = dataclasses.replace(stale(names[4], math.nan), code="BN101", level=Level.ERROR, remedies=("manual",))
    whole = dataclasses.replace(odd, layer=None, channels=None, code="BN112", level=Level.INFO)
    gaps = [dataclasses.replace(stale(name, 0.8), channels=None, code="BN301") for name in names[:2]]
    return DiagnosisRecord(
        bnlab="0.1.0",
        target=Target("model", "nets:build"),
        layers=tuple(layer(name, gap) for name, gap in GAPS.items()),
        outcomes=(
            Outcome("BN101", Status.FINDINGS),
            Outcome("BN102", Status.PASSED),
            Outcome("BN103", Status.CRASHED, "ValueError: \x07"),
            Outcome("BN504", Status.SKIPPED, "no loss given"),
        ),
        findings=(odd, *gaps, *(stale(name, 2.5 - index) for index, name in enumerate(names[:3])), whole),
        conclusion="accuracy is 0.28 with running statistics against 0.99 with batch statistics on the same data; "
        "103 % of the gap comes from stale statistics in stem.bn",
        causes=(
            Cause("staleness", 1.03, tuple(names[:3])),
            Cause("sampling noise", 0.01, (names[3],)),
            Cause("heterogeneity", -0.04, (names[0],)),
        ),
        numbers=Numbers(train_batch=None, eval_batch=0.99, eval_running=0.28, eval_recalibrated=0.99),
        summary=Summary(layers=5, channels=320, errors=1, warnings=5, infos=1),
        notes=("no train_data given",),
    )


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_diagnosis_with_data_looks_as_it_did(width, encoding):
    text = render(with_data(), width=width, encoding=encoding)
    golden = GOLDEN / f"diagnosis-{width}-{encoding}.txt"
    if os.environ.get("BNLAB_GOLDEN") == "write":
        golden.write_text(f"{text}\n", encoding=encoding)
    assert f"{text}\n" == golden.read_text(encoding=encoding)


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 140, 200, 500])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp437", "unknown-to-python"])
def test_every_line_fits_whatever_the_output_can_show(width, encoding):
    wanted = "ascii" if encoding.startswith("unknown") else encoding
    for diagnosis in (with_data(), diagnose(*many(40)), diagnose(healthy("层" * 40, running_var=(-1, 1, 1, 1)))):
        text = render(diagnosis, width=width, encoding=wanted)
        assert max(map(cell_len, text.splitlines())) <= width
        text.encode(wanted)
    assert Marks.of(encoding).full == ("█" if encoding == "utf-8" else "#")


def test_the_default_encoding_is_that_of_standard_output(monkeypatch):
    monkeypatch.setattr("sys.stdout", open(os.devnull, "w", encoding="ascii"))  # noqa: PTH123, SIM115
    drawn = render(with_data())
    sys.stdout.close()
    assert "####" in drawn
    monkeypatch.setattr("sys.stdout", None)
    assert "████" in render(with_data())


@pytest.fixture
def checkpoint(tmp_path):
    state = state_dict("é.bn1")
    state["é.bn1.running_var"][0] = -1
    return save(state, tmp_path / "model.pt")


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**kept, "TERM": "xterm-256color", **changes}


def piped(checkpoint, **changes):
    command = [sys.executable, "-m", "bnlab", "check", checkpoint.name]
    done = subprocess.run(command, cwd=checkpoint.parent, env=environment(**changes), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    return done.stdout


def on_terminal(checkpoint, *, columns, **changes):
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "bnlab", "check", checkpoint.name]
    with subprocess.Popen(
        command,
        cwd=checkpoint.parent,
        env=environment(**changes),
        stdin=process_side,
        stdout=process_side,
        stderr=process_side,
    ):
        os.close(process_side)
        shown = b""
        while chunk := _read(terminal):
            shown += chunk
    os.close(terminal)
    return shown.decode()


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux says that the other end is closed
        return b""


COLOR = "\x1b[1;31m"


def test_a_pipe_gets_80_columns_and_no_colour(checkpoint):
    out = piped(checkpoint, COLUMNS="80").decode()
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "é.bn1" in out


def test_a_pipe_that_cannot_show_it_gets_ascii(checkpoint):
    out = piped(checkpoint, COLUMNS="80", PYTHONIOENCODING="ascii")
    assert out.isascii()
    assert b"\\xe9.bn1" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_a_pipe_gets_colour_when_it_is_forced(checkpoint):
    assert COLOR in piped(checkpoint, FORCE_COLOR="1").decode()


@pytest.mark.slow
def test_a_terminal_gets_colour_and_its_width(checkpoint):
    out = on_terminal(checkpoint, columns=200)
    assert COLOR in out
    assert "running_var is -1 in 1 of 4 channels, must be >= 0" in out


def test_no_color_is_honoured_on_a_terminal(checkpoint):
    out = on_terminal(checkpoint, columns=80, NO_COLOR="1")
    assert "BN102" in out
    assert "[1;31m" not in out
    assert "\x1b[3" not in out
