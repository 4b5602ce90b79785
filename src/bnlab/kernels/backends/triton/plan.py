"""How a tensor is shared out: tiles, programs, and one launch or two.

The shape, the dtype and the machine alone decide, so that every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bnlab.kernels.backends.triton.geometry import COLUMNS, PLANES, SEGMENTS, Geometry, TileForm

__all__ = ["Machine", "Split", "Teams", "split", "teams", "teams_form"]

THREADS = 128
"""Threads of a program: four warps."""

_TILES_AT_ONCE = 4
"""Tiles in half precision that a program reads before it uses them, half as many in float32: this hides latency."""

_TILES_KEPT = 2
"""Tiles that a program of one launch keeps in registers, of all its tensors together.

With four, the compiler takes twice the registers and more, so that fewer values are on the chip.
"""

_PROGRAMS = 6
"""Programs for each multiprocessor in two launches."""

_MERGED_IN_PLACE = 32
"""Parts of a channel up to which every program merges all of them itself. More are merged by a launch of its own."""

_EXACT_COUNT = 1 << 22
"""Values of a channel in one part: float32 counts them exactly."""

_REGISTERS = 128
"""Registers of a thread up to which one launch is worth it: four programs then share a multiprocessor."""


@dataclass(frozen=True)
class Machine:
    """A GPU as far as the plan depends on it.

    Attributes:
        multiprocessors: Number of multiprocessors.
        registers: Registers of a multiprocessor.
        threads: Threads that a multiprocessor holds at most.
        cooperative: Whether programs of one launch may wait for each other.
        tile: Values of a tile: 16 for each thread. The interpreter takes its time for each value.
    """

    multiprocessors: int
    registers: int = 65536
    threads: int = 2048
    cooperative: bool = True
    tile: int = 2048

    def resident(self, registers_of_thread: int) -> int:
        """Return the number of programs that are resident together, by their registers and threads."""
        granted = -(-max(registers_of_thread, 1) // 8) * 8
        return self.multiprocessors * min(self.registers // (granted * THREADS), self.threads // THREADS)


@dataclass(frozen=True)
class Split:
    """How two launches share out the rows of each group.

    Attributes:
        form: The form of a tile.
        number: Programs of a group.
        chunk: Rows of a program.
        merges: Whether a launch between the two merges the parts.
    """

    form: TileForm
    number: int
    chunk: int
    merges: bool


@dataclass(frozen=True)
class Teams:
    """How one launch shares out the groups.

    Attributes:
        form: The form of a tile.
        number: Programs of a team.
        teams: Teams that are resident together.
    """

    form: TileForm
    number: int
    teams: int

    @property
    def is_alone(self) -> bool:
        """Whether a program is a team, so that nobody waits."""
        return self.number == 1


@lru_cache(maxsize=4096)
def split(geometry: Geometry, machine: Machine, tiles: int = _TILES_AT_ONCE) -> Split:
    """Return how two launches share out a tensor that has values.

    Args:
        geometry: How the kernels see the tensor.
        machine: The GPU.
        tiles: Tiles in half precision that a program reads before it uses them; half as many in float32.
    """
    tiles = max(1, tiles * 2 // max(2, geometry.element_size))
    # Each value of a tile of COLUMNS has sums of its own: in float32 the compiler spills them where a thread has 16.
    halves = geometry.layout == COLUMNS and geometry.element_size > 2
    values = machine.tile // 2 if halves else machine.tile
    form = _form(geometry, machine, tiles, machine.tile // 2, values)
    step = form.height * form.tiles
    steps = -(-geometry.rows // step)
    wanted = -(-_PROGRAMS * machine.multiprocessors // geometry.groups)
    in_row = {PLANES: 8, SEGMENTS: geometry.positions}.get(geometry.layout, 1)
    most_steps = max(1, _EXACT_COUNT // (step * in_row))
    chunk = min(-(-steps // min(wanted, steps)), most_steps)
    number = -(-steps // chunk)
    return Split(form, number, chunk * step, number > _MERGED_IN_PLACE)


def teams_form(geometry: Geometry, machine: Machine, tensors: int = 1) -> TileForm:
    """Return the form of the tiles that a program of one launch keeps of each of its tensors."""
    tiles = max(1, _TILES_KEPT // tensors)
    return _form(geometry, machine, tiles, machine.tile // 16, machine.tile * 2 // max(2, geometry.element_size))


@lru_cache(maxsize=4096)
def teams(geometry: Geometry, form: TileForm, machine: Machine, registers: int | None, spills: bool) -> Teams | str:
    """Return how one launch shares out a tensor, or the reason for two launches.

    Args:
        geometry: How the kernels see the tensor.
        form: The result of `teams_form`.
        machine: The GPU.
        registers: Registers of a thread of the compiled kernel; None if nothing was compiled.
        spills: Whether the compiled kernel keeps registers in memory.
    """
    number = -(-geometry.rows // (form.height * form.tiles))
    if spills or (registers is not None and registers > _REGISTERS):
        return "its registers do not suffice"
    if number == 1:
        return Teams(form, 1, geometry.groups)
    if registers is None or not machine.cooperative:
        return "programs cannot wait for each other"
    resident = machine.resident(registers)
    if number > resident:
        return f"a channel group needs {number} programs, and {resident} are resident"
    together = min(geometry.groups, resident // number)
    together = -(-geometry.groups // -(-geometry.groups // together))
    if 2 * together * number < min(resident, geometry.groups * number):
        return "half of the machine would wait"
    return Teams(form, number, together)


def _form(geometry: Geometry, machine: Machine, tiles: int, merged: int, values: int) -> TileForm:
    """Return the form with at most the given number of tiles: no more than the rows fill."""
    form = geometry.form(values, tiles, merged)
    while form.tiles > 1 and form.height * (form.tiles // 2) >= geometry.rows:
        form = form._replace(tiles=form.tiles // 2)
    return form._replace(hides=machine.cooperative)
