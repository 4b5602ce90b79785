from rich.cells import cell_len
from rich.console import Console

from bnlab.records import (
    Change,
    Changes,
    GapChange,
    LeftAlone,
    Measurement,
    MetricChange,
    Recheck,
    Safety,
    Summary,
)
from bnlab.report.text.receipt import render_changes, renderable

HOSTILE = "\x1b[31mred\x07\n\u202e[bold]é[/bold]"


def summary(warnings):
    return Summary(layers=3, channels=80, errors=0, warnings=warnings, infos=0)


def repaired(name="bn2", **changes):
    gaps = (
        GapChange("bn1", {"staleness": 0.61, "total": 0.6163}, {"total": 0.0002}),
        GapChange("bn2", {"total": 0.36}, {"staleness": 0.0, "total": 0.0031}),
        GapChange("bn3", None, {"total": 9.0}),
    )
    values = {
        "bnlab": "0.1.0",
        "action": "repair",
        "safety": Safety.STATISTICS,
        "changes": (
            Change("bn1", "running statistics", "mean -0.04..0.03, var 0.87..0.88", "mean -0.32..0.27, var 0.01..0.08"),
            Change(name, "momentum", "0.9", "0.1"),
            Change("bn3", "momentum", "0.9", "0.1"),
        ),
        "left_alone": (LeftAlone("bn9", "never ran"),),
        "metric": MetricChange(0.2806, 0.9889),
        "recheck": Recheck(
            before=summary(9), after=summary(0), resolved=(), remaining=(), appeared=("BN107 bn1",), gaps=gaps
        ),
        "measurements": (
            Measurement("bn1", "moved by", 0.785, "std"),
            Measurement("bn3", "moved by", 0.455, "std"),
            Measurement(None, "largest error", 1e-6, "1"),
        ),
        "notes": ("from 11 batches, 1,348 samples",),
    }
    return Changes(**(values | changes))


def test_one_kind_of_change_a_line():
    assert render_changes(repaired()).splitlines() == [
        "repair: 3 layers changed, buffers only",
        "  running statistics: mean -0.04..0.03, var 0.87..0.88 -> mean -0.32..0.27, var 0.01..0.08 (bn1)",
        "  momentum: 0.9 -> 0.1 (bn2, bn3)",
        "  left alone: never ran (bn9)",
        "  metric: 0.2806 -> 0.9889, kept",
        "  findings: 0 errors and 9 warnings -> 0 and 0; new: BN107 bn1",
        "  gap between the modes: up to 0.79 std (bn1) -> up to 0.056 std (bn2)",
        "  moved by: at most 0.79 std (bn1)",
        "  largest error: 1e-06 1",
        "  from 11 batches, 1,348 samples",
    ]


def test_a_plan_and_a_repair_that_was_taken_back():
    assert render_changes(repaired(planned=True)).startswith(
        "repair: 3 layers to change, buffers only; nothing has been"
    )
    taken_back = render_changes(repaired(kept=False))
    assert "3 layers changed and taken back: the model is as it was" in taken_back
    assert "metric: 0.2806 -> 0.9889, taken back" in taken_back


def test_lines_wrap_at_the_width():
    for width in (40, 80, 200):
        lines = render_changes(repaired("层" * 90), width=width).splitlines()
        assert max(map(cell_len, lines)) <= width
    assert len(render_changes(repaired(), width=200).splitlines()) == 10


def test_many_changes_are_counted():
    changes = tuple(Change(f"bn{i}", f"what{i % 20}", "a", "b") for i in range(400))
    text = render_changes(repaired(changes=changes))
    assert "what0: a -> b (bn0, bn20, bn40, bn60, bn80, bn100, bn120, bn140 and 12 more)" in text
    assert "... and 4 more; the JSON form lists all of them" in text


def test_a_receipt_cannot_reach_the_terminal_or_the_markup(capsys):
    changes = repaired(HOSTILE, action=HOSTILE, notes=(HOSTILE,), measurements=(Measurement("a", HOSTILE, 1, HOSTILE),))
    for text in (render_changes(changes), render_changes(changes, width=80)):
        assert not set(text) & set("\x1b\x07\u202e")
        assert "[bold]é[/bold]" in text
    assert render_changes(changes, encoding="ascii").isascii()
    assert "?[31mred???[bold]\\xe9[/bold]" in render_changes(changes, width=80, encoding="ascii")
    Console(width=80, highlight=False).print(renderable(changes))
    assert capsys.readouterr().out.startswith("\N{REPLACEMENT CHARACTER}[31mred")
