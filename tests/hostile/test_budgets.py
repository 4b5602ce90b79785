"""Every hostile file ends within 5 seconds and 300 MB of an honest one, with exit code 2 and one line."""

import importlib.util
import os
import re
import sys

import pytest
from tests.hostile.files import CASES
from tests.hostile.measure import Meter

pytestmark = [
    pytest.mark.hostile,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher measures as Linux does"),
]


VARIANTS = (", legacy", ", without torch", ", with a model")
"""Ends of the names of files that are another one in another container. `make fuzz` runs them, too."""

QUICK = {
    "pickle: BINUNICODE8 of 2**62 bytes",
    "pickle: 2**100 paths through 100 dicts to a layer",
    "pickle: 1M nested tuples",
    "npz: pickled objects",
    "npz: a header of 4 GB",
    "h5: a group in itself, by hard and soft links",
    "msgpack: an array of 2**62 values",
    "distributed: 20k tensors of 20k dimensions in .metadata",
    "safetensors: a header of 2**63 bytes",
    "safetensors: 600k empty tensors",
    "json index: shards outside the folder",
    "json record: 1M nested lists in a saved diagnosis",
    "onnx: external data outside the folder",
    "onnx: 2**60 paths through 60 Add nodes",
    "zip: an archive in an archive in an archive",
    "zip: data.pkl of 300 MB claims to unpack to 1 kB",
    "place: /dev/zero",
    "place: a pipe without a suffix in a folder",
}
"""One way of each kind to cost much, in every format. `make test-slow` runs the others."""

TESTED = {
    f"{case.kind}: {case.name}": case
    for case in CASES
    if "BNLAB_EVERY_FILE" in os.environ or not case.name.endswith(VARIANTS)
}


def test_the_quick_files_exist():
    assert TESTED.keys() >= QUICK


@pytest.fixture(scope="session")
def meter(tmp_path_factory):
    """What counts is the time of the processor: only a command that waits for something is killed by the clock."""
    with Meter(tmp_path_factory.mktemp("honest"), limit=120.0) as meter:
        yield meter


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in TESTED.items()],
)
def test_hostile_file(case, meter, tmp_path):
    if case.needs is not None and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"nobody reads the format without {case.needs}")
    complaints = {cost.command: cost.complaint(busy=True, tolerance=3) for cost in meter.costs(case, tmp_path)}
    assert {command: complaint for command, complaint in complaints.items() if complaint} == {}


def test_a_command_that_takes_long_is_noticed(meter, tmp_path):
    from tests.hostile.case import CODE, Case
    from tests.hostile.zips import MEMBERS, written

    def build(folder):
        (folder / "code.py").write_text(f"import time\ntime.sleep(60)\n{CODE}")
        return written(folder, MEMBERS)

    meter.limit, before = 4.0, meter.limit
    try:
        (cost,) = meter.costs(Case("sleeps", "test", build, ("check {} --model {dir}/code.py:build",)), tmp_path)
    finally:
        meter.limit = before
    assert cost.complaint().startswith("hangs")


@pytest.mark.parametrize(("code", "complaint"), [(2, r"takes \d{3} MB"), (7, "exit code 2, not 7")])
def test_a_command_that_takes_memory_or_ends_wrongly_is_noticed(meter, tmp_path, code, complaint):
    from tests.hostile.case import Case
    from tests.hostile.zips import MEMBERS, written

    def build(folder):
        (folder / "code.py").write_text(
            "values = bytearray(b'x') * 500_000_000\n\n\ndef build():\n    raise SystemExit(7)\n"
        )
        return written(folder, MEMBERS)

    (cost,) = meter.costs(
        Case("eats", "test", build, ("check {} --model {dir}/code.py:build",), codes=(code,)), tmp_path
    )
    assert re.fullmatch(complaint, cost.complaint())
