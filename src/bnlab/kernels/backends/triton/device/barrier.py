"""Waiting for the other programs of a launch, which must all be resident: only a cooperative launch may wait."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["is_last", "leave", "wait_for_team"]


@triton.jit
def wait_for_team(arrivals, size, meeting):
    """Wait until all programs of a team have arrived `meeting` + 1 times. What they stored is then visible.

    Args:
        arrivals: Counter of the team, 0 before the launch.
        size: Programs in the team.
        meeting: How often the team has met before.
    """
    tl.debug_barrier()  # the stores of all threads come before the arrival
    goal = (meeting + 1) * size
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
    while arrived < goal:
        arrived = tl.atomic_add(arrivals, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def leave(arrivals, departures, size):
    """Leave the team for good. The last program sets both counters back to 0 for the next launch."""
    if tl.atomic_add(departures, 1, sem="acq_rel") == size - 1:
        tl.atomic_xchg(arrivals, 0, sem="relaxed")
        tl.atomic_xchg(departures, 0, sem="release")


@triton.jit
def is_last(counter, number):
    """Whether this is the last of `number` arrivals. It sees what the others stored, and sets the counter back to 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == number - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="release")
    tl.debug_barrier()
    return last
