"""The benchmark of a GPU: it runs whole on the CPU, shows no times there, and survives what fails or takes too long."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import ahead, clock, command, headline, layers, record, run, stage, training
from torch import nn

import bnlab

ROOT = Path(__file__).parents[3]
SECONDS = clock.Times.of([1.0])


@pytest.fixture
def dry():
    """The stage of a dry run."""
    fresh = record.new_record({}, torch.device("cpu"), is_dry=True)
    return stage.stage_of(is_dry=True, repetitions=1, record=fresh)


@pytest.mark.slow
def test_a_dry_run_tries_everything_and_shows_no_times(tmp_path):
    output = tmp_path / "results" / "gpu.json"
    arguments = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry", "--output", output]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "gpu: dry run of 10 sections, 0 sides failed, no times"
    rows = [line for line in done.stdout.splitlines() if line.startswith("2,2,7,7")]
    assert len(rows) == 8
    assert all("dry / dry" in row and "." not in row for row in rows)
    document = json.loads(output.read_text(encoding="utf-8"))
    assert document["is_dry"]
    assert set(document["sections"]) == set(command.SECTIONS)
    assert document["failures"] == document["left_out"] == []
    assert {"torch", "triton", "cuda", "driver"} <= set(document["versions"])
    for name in layers.LAYERS:
        rows = document["sections"][name]
        assert {row["layout"] for row in rows} == {"contiguous", "channels_last"}
        for row in rows:
            assert {which: set(times) for which, times in row["times"].items()} == {
                which: set(layers.SIDES) for which in layers.PASSES
            }
            assert row["difference"] <= layers.DIFFERENCES[row["dtype"]]
    sides = [row["side"] for row in document["sections"]["training"]]
    assert sides == ["torch", "bnlab, fused", "bnlab", "torch, compiled"]
    errors = {row["ratio"]: row["errors"] for row in document["sections"]["accuracy"] if row["dtype"] == "float32"}
    assert errors[1e4]["bnlab"] <= 4 < errors[1e4]["torch"]


@pytest.mark.slow
def test_a_dry_run_interprets_the_kernels_of_a_layer(tmp_path):
    pytest.importorskip("triton")
    arguments = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry", "--interpret", "--only", "accuracy"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend=triton)" in done.stdout


def test_a_gpu_interprets_nothing(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.parsed(["--interpret"])
    assert exit_.value.code == 2
    assert "--interpret must come with --dry" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(bnlab_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bnlab_command("bench", "gpu") == (2, "", f"{command.NO_GPU}\n")
    assert "--dry" in command.NO_GPU
    assert "\n" not in command.NO_GPU


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--repetitions", "0"], ["--processes", "-1"], ["--only", "x"]]
)
def test_a_wrong_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.parsed(arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_sections_run_in_the_order_of_their_importance():
    assert command.parsed(["--only", "check", "--only", "training"]).sections == ("training", "check")
    assert set(run.MAKERS) == set(command.SECTIONS)


@pytest.mark.parametrize(
    ("residual", "in_one_launch", "counts"),
    [(False, True, [2, 5]), (False, False, [3, 8]), (True, True, [3, 7]), (True, False, [4, 10])],
)
def test_traffic(residual, in_one_launch, counts):
    assert [layers.traffic(which, residual, in_one_launch=in_one_launch) for which in layers.PASSES] == counts


def measure_one(name, dry):
    section = layers.section(name)
    dry.output.open(section.title, section.columns)
    section.cases(dry)[0].measure()


def layer_row(layout, eager, compiled, own, shape=(32, 64, 112, 112)):
    times = {"eager": eager, "compile": compiled, "bnlab": own}
    both = {side: clock.Times.of([seconds]) for side, seconds in times.items() if seconds is not None}
    size = 2 * math.prod(shape)
    return layers.LayerRow(False, "bfloat16", layout, shape, size, {layers.PASSES[1]: both}, 0.0)


def test_the_main_results_are_ratios_beside_their_bars(dry):
    dry.record.bandwidth = 1e12
    small = (32, 2048, 7, 7)
    for row in (
        layer_row("contiguous", 8e-3, 2e-3, 1e-3),
        layer_row("contiguous", 2e-3, 0.5e-3, 1e-3, small),
        layer_row("channels_last", 2e-3, 1.44e-3, 1e-3),
        layer_row("channels_last", 2e-3, None, 1e-3, small),
        layer_row("channels_last", 2e-3, 1e-3, None, small),
    ):
        dry.record.add("relu-bfloat16", row)
    for side, milliseconds, peak in (("torch", 20, 1000), ("bnlab, fused", 18, 990)):
        row = training.TrainingRow(side, clock.Times.of([milliseconds]), clock.Times.of([milliseconds / 2]), peak)
        dry.record.add("training", row)
    shown = {result.name: result for result in headline.results(dry.record)}
    contiguous = shown["BN + ReLU torch.compile / bnlab, contiguous"]
    assert contiguous.value == pytest.approx(1)
    assert (contiguous.rows, contiguous.is_met) == (2, False)
    channels_last = shown["BN + ReLU torch.compile / bnlab, channels_last"]
    assert channels_last.value == pytest.approx(1.44)
    assert (channels_last.rows, channels_last.is_met) == (1, True)
    assert shown["BN + ReLU eager / bnlab, contiguous"].value == pytest.approx(4)
    assert shown["smallest ratio to the better peer"].value == pytest.approx(0.5)
    (share,) = (result for name, result in shown.items() if name.startswith("smallest share"))
    size = 2 * 32 * 64 * 112 * 112
    assert share.value == pytest.approx(5 * size / 1e-3 / 1e12)
    assert share.rows == 2
    assert shown["ResNet-50 step, fused / torch"].value == pytest.approx(0.9)
    assert shown["ResNet-50 step, peak memory, fused / torch"].is_met is False
    assert shown["recalibrate / update_bn"].is_met is None


def test_the_last_line_names_what_was_not_measured():
    output = stage.Output(is_dry=False)
    shown = [headline.Result("a", 1.234, ">=", 1.2, is_main=True), headline.Result("b", None, "<=", 0.9, is_main=True)]
    line = headline.headline([*shown, headline.Result("c", 1.0, "<=", 1)], output)
    assert line == "a 1.23 (bar >= 1.2); b not measured (bar <= 0.9)"


def test_a_run_prints_figures_and_writes_them(monkeypatch, tmp_path, capsys):
    """The stage is that of a dry run, whose times are shown."""
    output = tmp_path / "new" / "gpu.json"
    options = command.parsed(["--only", "accuracy", "--only", "bandwidth", "--only", "calls", "--output", str(output)])

    def prepared(_):
        fresh = record.new_record({}, torch.device("cpu"), is_dry=False)
        own = stage.stage_of(is_dry=True, repetitions=2, record=fresh)
        return fresh, dataclasses.replace(own, is_dry=False, output=stage.Output(is_dry=False))

    watchdog = []
    monkeypatch.setattr(run, "_prepared", prepared)
    monkeypatch.setattr(run, "faulthandler", Recorded(watchdog))
    assert run.run(options, time.monotonic()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("gpu: BN + ReLU torch.compile / bnlab, contiguous not measured (bar >= 1.4); ")
    assert not [line for line in lines if "dry" in line]
    document = json.loads(output.read_text(encoding="utf-8"))
    (ratio,) = (row for row in document["headline"] if row["name"].startswith("wall time"))
    first, _ = document["sections"]["calls"]
    assert ratio["value"] == first["wall"]["bnlab"]["median"] / first["wall"]["torch"]["median"]
    assert watchdog == ["dump_traceback_later", "cancel_dump_traceback_later"]
    assert document["bandwidth"] == 2048 / document["sections"]["bandwidth"][0]["times"]["copy"]["median"]


def test_a_row_that_fails_is_a_line_and_not_the_end(dry, monkeypatch, capsys):
    done = []
    cases = [stage.Case("bad", lambda: 1 / 0), stage.Case("good", lambda: done.append("good"))]
    monkeypatch.setitem(run.MAKERS, "calls", lambda: stage.Section("title", (), lambda _: cases, 1.0))
    run.run_section("calls", dry, stage.Budget(math.inf, 0), lambda: done.append("saved"))
    assert done == ["saved", "good", "saved"]
    assert dry.record.failures == [
        {"row": "bad", "side": "the whole row", "reason": "ZeroDivisionError: division by zero"}
    ]
    assert "the whole row failed: ZeroDivisionError" in capsys.readouterr().out


def test_rows_that_the_time_does_not_suffice_for_are_listed(dry, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measure():
        now[0] += 10

    cases = [stage.Case(f"row {index}", measure) for index in range(4)]
    monkeypatch.setitem(run.MAKERS, "calls", lambda: stage.Section("title", (), lambda _: cases, 5.0))
    run.run_section("calls", dry, stage.Budget(30, 0), lambda: None)
    assert now[0] == 20
    assert dry.record.left_out == ["row 2", "row 3"]
    assert "2 of 4 rows" in capsys.readouterr().out


def test_a_side_that_fails_leaves_the_others_their_figures(dry, monkeypatch):
    monkeypatch.setattr(stage.Stage, "compiled", lambda *_: 1 / 0)
    measure_one("relu-float32", dry)
    (row,) = dry.record.rows("relu-float32")
    assert set(row.times[layers.PASSES[1]]) == {"eager", "bnlab"}
    assert row.ratio("compile") is None
    assert [failure["side"] for failure in dry.record.failures] == ["compile"]


@pytest.mark.parametrize("name", ["relu-float32", "residual-bfloat16"])
def test_a_layer_that_computes_something_else_is_a_failure(dry, monkeypatch, name):
    def without_activation(side, case, stage_):
        package = bnlab.nn if side == "bnlab" else nn
        layer = package.BatchNorm2d(case.shape[1])
        activation = None if side == "bnlab" else "relu"
        return layers.torch_forward(layer, activation=activation, in_place=False), list(layer.parameters())

    monkeypatch.setattr(layers, "forward_of", without_activation)
    measure_one(name, dry)
    (failure,) = dry.record.failures
    assert failure["side"] == "bnlab"
    assert "differ from those of torch eager" in failure["reason"]


def test_every_job_is_compiled_by_one_process_and_the_longest_alone(dry):
    jobs = [ahead.Job(60, str), *(ahead.Job(4, lambda index=index: index) for index in range(40))]
    shares = [list(ahead.share_of(jobs, index, 4)) for index in range(4)]
    assert sorted(id(job) for share in shares for job in share) == sorted(map(id, jobs))
    assert shares[0] == jobs[:1]
    names = [name for name in command.SECTIONS if name in layers.LAYERS]
    assert len(ahead.jobs_for(dry, command.SECTIONS)) == 2 + 4 * len(names)


def test_processes_that_compile_too_long_are_ended():
    commands = [[sys.executable, "-c", code] for code in ("", "raise SystemExit(2)", "import time; time.sleep(600)")]
    with ahead.Processes(commands) as processes:
        running = list(processes._running)
        assert [process.wait() for process in running[:2]] == [0, 2]
        assert "by 3 processes" in (about := processes.wait(0))
        assert "; 1 did not end and 1 failed: " in about
        assert processes.wait(0) == ""
    assert [process.poll() for process in running] == [0, 2, -9]


def test_a_record_is_json_without_nan(tmp_path, dry):
    dry.record.add("accuracy", layer_row("contiguous", math.nan, 1.0, 1.0))
    dry.record.write(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    (row,) = json.loads(text, parse_constant=pytest.fail)["sections"]["accuracy"]
    assert row["times"][layers.PASSES[1]]["eager"]["median"] == "nan"
    named = dataclasses.replace(dry.record, device={"name": "NVIDIA H100 80GB HBM3"}, date="2026-11-28T12:00:00+00:00")
    assert record.default_path(named) == ROOT / "benchmarks/results/gpu-nvidia-h100-80gb-hbm3-2026-11-28.json"


def test_times_keep_the_median_and_the_range():
    assert clock.Times.of([5.0, 1.0, 3.0]) == clock.Times(3.0, 1.0, 5.0, 3)


class Recorded:
    """Stands for torch's streams, events and graphs, and lists what is done with them."""

    def __init__(self, events):
        self.events = events

    def __getattr__(self, name):
        return lambda *_, **__: self.events.append(name)

    def __enter__(self):
        self.events.append("enter")

    def __exit__(self, *_):
        self.events.append("exit")

    def elapsed_time(self, _):
        return 2.0


def test_the_clock_of_a_gpu_replays_a_graph_behind_a_flushed_cache(monkeypatch):
    events = []
    replacements = {
        "Stream": lambda _: Recorded(events),
        "stream": lambda _: Recorded(events),
        "current_stream": lambda _: Recorded(events),
        "set_stream": lambda _: None,
        "CUDAGraph": lambda: Recorded(events),
        "graph": lambda _, stream: Recorded(events),
        "Event": lambda enable_timing: Recorded(events),
        "get_device_properties": lambda _: type("Properties", (), {"L2_cache_size": 1 << 10}),
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(clock, "_LEAST_SCRATCH", 16)
    gpu = clock.GpuClock(torch.device("cpu"))
    assert gpu._scratch.numel() == 4 << 10
    gpu._scratch.fill_(1)
    reading = gpu.device_time(lambda: events.append("step"))
    assert events[:-4] == [
        "wait_stream",
        "enter",
        "step",
        "step",
        "step",
        "exit",
        "wait_stream",
        "enter",
        "step",
        "exit",
    ]
    assert reading() == pytest.approx(2e-3)
    assert events[-4:] == ["record", "replay", "record", "synchronize"]
    assert not gpu._scratch.any()
