"""The GPU kernels compile for an NVIDIA GPU (sm_90) without one, and need what the plan counts on.

Compiling takes about a second a kernel, so that one process compiles the kernels of a few shapes for all tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

ONE_LAUNCH = (32, 64, 56, 56)
TWO_LAUNCHES = (32, 64, 112, 112)
CASES = [
    (ONE_LAUNCH, "bfloat16", False, True),
    (ONE_LAUNCH, "float32", False, True),
    (ONE_LAUNCH, "bfloat16", False, False),
    (TWO_LAUNCHES, "bfloat16", True, True),
    (TWO_LAUNCHES, "float32", True, True),
]

one_launch = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="Triton before 3.7 takes more than 128 registers, or spills, and the forward pass two launches",
)

PROGRAM = """
import json, sys
import torch
from bnlab.kernels.backends.triton import launching
from tools.gpu_kernels import recorded, resources_of, step

rows = []
for shape, dtype, channels_last, added in json.loads(sys.argv[1]):
    with recorded() as launches:
        compiled, trials = launching.compiled, []

        def tried(kernel, arguments, *, cooperative=False):
            needs = resources_of(kernel, arguments)
            trials.append((kernel.__name__, needs.registers, needs.stack))
            return compiled(kernel, arguments, cooperative=cooperative)

        launching.compiled = tried
        step(tuple(shape), getattr(torch, dtype), channels_last=channels_last, added=added)
    rows.append(([(launch.kernel, launch.programs, *launch.resources) for launch in launches], trials))
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The launches of each case as (kernel, programs, registers, stack, shared, widest load), and its trials."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, sys.path)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(CASES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_kernel_keeps_registers_in_memory(compiled, case):
    launches, _ = compiled[case]
    assert launches
    assert [kernel for kernel, _, _, stack, _, _ in launches if stack] == []


@one_launch
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_contiguous_batch_takes_one_launch_forward_and_one_backward(compiled, case):
    launches, _ = compiled[case]
    assert [kernel for kernel, *_ in launches] == ["train_kernel", "backward_kernel"]
    for kernel, programs, registers, *_ in launches:
        assert registers <= 128, kernel
        assert programs <= 4 * 132  # all are resident on an H100: four programs of 128 threads on a multiprocessor


@one_launch
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_trial_that_the_plan_trusts_is_the_kernel_that_runs(compiled, case):
    launches, trials = compiled[case]
    assert trials == [[kernel, registers, stack] for kernel, _, registers, stack, _, _ in launches]


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_a_channels_last_batch_that_does_not_fit_takes_several_launches(compiled, case):
    launches, trials = compiled[case]
    assert [kernel for kernel, *_ in launches] == [
        *("statistics_kernel", "merge_kernel", "normalise_kernel"),
        *("gradient_sums_kernel", "merge_sums_kernel", "gradient_kernel"),
    ]
    assert trials == []  # its teams exceed any number of registers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads_are_16_bytes_wide(compiled, case):
    launches, _ = compiled[case]
    assert {(kernel, width) for kernel, *_, width in launches if width != 16} == set()
