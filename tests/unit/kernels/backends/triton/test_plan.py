"""How a tensor is shared out among programs, in one launch or two."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnlab.kernels.backends.triton.geometry import COLUMNS, SEGMENTS, geometry_of
from bnlab.kernels.backends.triton.plan import Machine, Teams, split, teams, teams_form

H100 = Machine(132)
INTERPRETER = Machine(1, cooperative=False, tile=128)

SHAPES = st.one_of(
    st.tuples(st.integers(1, 100_000), st.integers(1, 5000)),
    st.tuples(st.integers(1, 512), st.integers(1, 2048), st.integers(1, 300), st.integers(1, 300)),
)
MACHINES = st.builds(
    Machine,
    st.integers(1, 200),
    registers=st.sampled_from([32768, 65536, 131072]),
    threads=st.sampled_from([1024, 1536, 2048]),
    cooperative=st.booleans(),
    tile=st.sampled_from([128, 2048]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def seen(shape, dtype=torch.float32, channels_last=False, tile=2048):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return geometry_of(x.to(memory_format=torch.channels_last) if channels_last else x, tile)


def geometries(shape, dtype, channels_last, machine):
    return seen(shape, dtype, channels_last and len(shape) == 4, machine.tile)


@given(SHAPES, DTYPES, st.booleans(), MACHINES, st.sampled_from([2, 4]))
def test_the_programs_of_two_launches_share_all_rows(shape, dtype, channels_last, machine, tiles):
    geometry = geometries(shape, dtype, channels_last, machine)
    plan = split(geometry, machine, tiles)
    assert (plan.number - 1) * plan.chunk < geometry.rows <= plan.number * plan.chunk
    assert plan.chunk % (plan.form.height * plan.form.tiles) == 0
    assert plan.form.tiles <= tiles
    assert plan.merges == (plan.number > 32)


@given(SHAPES, DTYPES, st.booleans(), MACHINES)
def test_a_part_counts_its_values_exactly_in_float32(shape, dtype, channels_last, machine):
    geometry = geometries(shape, dtype, channels_last, machine)
    plan = split(geometry, machine)
    of_a_channel = {COLUMNS: 1, SEGMENTS: geometry.positions}.get(geometry.layout, 8)
    assert plan.chunk * of_a_channel <= 2**22


@given(SHAPES, DTYPES, st.booleans(), MACHINES)
def test_two_launches_take_about_six_programs_a_multiprocessor(shape, dtype, channels_last, machine):
    geometry = geometries(shape, dtype, channels_last, machine)
    plan = split(geometry, machine)
    programs, wanted = plan.number * geometry.groups, 6 * machine.multiprocessors
    values = plan.chunk * {COLUMNS: 1, SEGMENTS: geometry.positions}.get(geometry.layout, 8)
    longest = 2 * values > 2**22  # parts that are as long as float32 counts
    assert longest or programs < wanted + geometry.groups
    if plan.number > 1 and plan.chunk > plan.form.height * plan.form.tiles:
        assert 2 * programs >= wanted


def test_a_channel_of_many_values_is_cut_so_that_float32_counts_a_part():
    geometry = seen((2**24, 8), torch.bfloat16)
    plan = split(geometry, Machine(1))
    assert plan.chunk <= 2**22
    assert plan.number == 6
    assert split(seen((2**28, 8), torch.bfloat16), Machine(1)).number == 64


@given(SHAPES, DTYPES, st.booleans(), MACHINES, st.sampled_from([1, 2]), st.integers(24, 128))
def test_all_teams_are_resident_and_cover_all_groups(shape, dtype, channels_last, machine, tensors, registers):
    geometry = geometries(shape, dtype, channels_last, machine)
    form = teams_form(geometry, machine, tensors)
    plan = teams(geometry, form, machine, registers, False)
    if not isinstance(plan, Teams):
        return
    rows = form.height * form.tiles
    assert (plan.number - 1) * rows < geometry.rows <= plan.number * rows
    assert 1 <= plan.teams <= geometry.groups
    assert sorted(g for t in range(plan.teams) for g in range(t, geometry.groups, plan.teams)) == [
        *range(geometry.groups)
    ]
    if plan.is_alone:
        assert plan.teams == geometry.groups
    else:
        granted = math.ceil(registers / 8) * 8 * 128
        per_multiprocessor = min(machine.registers // granted, machine.threads // 128)
        assert plan.number * plan.teams <= machine.multiprocessors * per_multiprocessor
        assert machine.cooperative


@given(SHAPES, DTYPES, st.booleans(), MACHINES, st.sampled_from([1, 2]))
def test_a_program_of_one_launch_keeps_no_more_tiles_than_its_rows_fill(shape, dtype, channels_last, machine, tensors):
    geometry = geometries(shape, dtype, channels_last, machine)
    form = teams_form(geometry, machine, tensors)
    assert 1 <= form.tiles * tensors <= 2
    assert form.tiles == 1 or form.height * (form.tiles // 2) < geometry.rows
    assert form.values * dtype.itemsize <= max(machine.tile * 2, form.width * dtype.itemsize)
    assert form.hides == machine.cooperative


@pytest.mark.parametrize("machine", [H100, INTERPRETER])
def test_a_program_alone_needs_nobody(machine):
    geometry = seen((16, 5), tile=machine.tile)
    form = teams_form(geometry, machine)
    assert teams(geometry, form, machine, None, False) == Teams(form, 1, 1)


RESNET = seen((32, 64, 56, 56), torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "channels_last", "machine", "registers", "spills", "reason"),
    [
        ((32, 64, 56, 56), False, H100, 129, False, "its registers do not suffice"),
        ((32, 64, 56, 56), False, H100, 64, True, "its registers do not suffice"),
        ((32, 64, 56, 56), False, H100, None, False, "programs cannot wait for each other"),
        ((32, 64, 56, 56), False, Machine(132, cooperative=False), 64, False, "programs cannot wait for each other"),
        ((32, 64, 56, 56), False, Machine(2), 64, False, "a channel group needs 25 programs, and 16 are resident"),
        ((32, 64, 112, 112), True, H100, 128, False, "a channel group needs 6272 programs, and 528 are resident"),
        ((12, 128, 150, 150), False, H100, 128, False, None),
    ],
)
def test_two_launches_have_a_reason(shape, channels_last, machine, registers, spills, reason):
    geometry = seen(shape, torch.bfloat16, channels_last)
    plan = teams(geometry, teams_form(geometry, machine), machine, registers, spills)
    assert (None if isinstance(plan, Teams) else plan) == reason


def test_one_launch_is_refused_where_half_of_the_machine_would_wait():
    geometry = seen((128, 64, 70, 70), torch.bfloat16)
    form = teams_form(geometry, H100)
    number = math.ceil(geometry.rows / (form.height * form.tiles))
    resident = 2 * number - 1
    machine = Machine(resident, registers=128 * 128)
    assert teams(geometry, form, machine, 128, False) == Teams(form, number, 1)
    fewer = Machine(2 * number - 1 + number // 2, registers=128 * 128)
    assert isinstance(teams(geometry, form, fewer, 128, False), Teams)


def test_an_alone_program_that_spills_takes_two_launches():
    geometry = seen((16, 5))
    assert isinstance(teams(geometry, teams_form(geometry, H100), H100, 32, True), str)


def test_teams_share_the_groups_evenly():
    """Of 64 groups and room for 21 teams, 16 teams that all meet four times finish as early as 21."""
    form = teams_form(RESNET, H100)
    plan = teams(RESNET, form, H100, 128, False)
    assert (plan.number, plan.teams) == (25, 16)


@pytest.mark.parametrize(
    ("registers", "programs"), [(128, 4), (121, 4), (120, 4), (96, 5), (64, 8), (32, 16), (1, 16), (255, 2)]
)
def test_registers_are_granted_in_eights(registers, programs):
    assert H100.resident(registers) == 132 * programs


def test_the_plan_depends_on_shape_dtype_and_machine_alone():
    assert split(seen((8, 64, 30, 30)), Machine(132)) == split(seen((8, 64, 30, 30)), Machine(132))
    assert split.__wrapped__(RESNET, H100) == split(RESNET, H100)
