"""The main results of a run, each beside its bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.layers import PASSES, LayerRow
from benchmarks.gpu.recalibrate import PEER
from benchmarks.gpu.record import Record
from benchmarks.gpu.table import Output
from benchmarks.gpu.training import FUSED, TORCH
from benchmarks.measuring.exact import LIMIT
from benchmarks.measuring.timing import geometric_mean

__all__ = ["Result", "headline", "results"]

_LARGE = 50e6
"""The bytes of an activation from which on a layer should run at the speed of a copy."""


@dataclass(frozen=True)
class Result:
    """A main result.

    Attributes:
        name: What was compared.
        value: The result; None if a part of it was not measured.
        rule: Whether the value must be at least or at most the bar.
        bar: The bar.
        rows: The number of rows that the result comes from.
        is_main: Whether it stands in the last line.
    """

    name: str
    value: float | None
    rule: Literal[">=", "<="]
    bar: float
    rows: int = 1
    is_main: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether the value meets the bar; None without a value."""
        if self.value is None:
            return None
        return self.value >= self.bar if self.rule == ">=" else self.value <= self.bar


def results(record: Record) -> list[Result]:
    """Return the main results of a record, in the order of the bars."""
    relu: list[LayerRow] = record.rows("relu-bfloat16")
    return [*_against_peers(relu), _share(relu, record.bandwidth), *_network(record), *_calls(record)]


def _against_peers(rows: Sequence[LayerRow]) -> Iterable[Result]:
    for side, bars in (("compile", (1.4, 1.2)), ("eager", (3.0, 2.0))):
        for layout, bar in zip(("contiguous", "channels_last"), bars, strict=True):
            ratios = [ratio for row in rows if row.layout == layout and (ratio := row.ratio(side)) is not None]
            name = f"BN + ReLU {'torch.compile' if side == 'compile' else 'eager'} / bnlab, {layout}"
            mean = geometric_mean(ratios) if ratios else None
            yield Result(name, mean, ">=", bar, len(ratios), is_main=side == "compile")
    pairs = [(row.ratio("compile"), row.ratio("eager")) for row in rows]
    better = [min(peer for peer in pair if peer is not None) for pair in pairs if pair != (None, None)]
    yield Result("smallest ratio to the better peer", min(better, default=None), ">=", 0.95, len(better), is_main=True)


def _share(rows: Sequence[LayerRow], bandwidth: float | None) -> Result:
    """Return the smallest share of the copy's bandwidth on large inputs.

    Contiguous layers count as one launch and channels_last as two. The table shows both counts.
    """
    shares = [
        share
        for row in rows
        if row.activation_bytes > _LARGE
        and (share := row.share_of_copy(bandwidth, PASSES[1], in_one_launch=row.layout == "contiguous")) is not None
    ]
    name = "smallest share of the copy's bandwidth, inputs over 50 MB, 5A contiguous, 8A channels_last"
    return Result(name, min(shares, default=None), ">=", 0.8, len(shares))


def _network(record: Record) -> Iterable[Result]:
    sides = {row.side: row for row in record.rows("training")}
    own, other = sides.get(FUSED), sides.get(TORCH)
    pairs = {
        "ResNet-50 step, fused / torch": (own and own.wall, other and other.wall),
        "ResNet-50 step on the device alone, fused / torch": (own and own.device, other and other.device),
    }
    for name, (mine, theirs) in pairs.items():
        ratio = mine.median / theirs.median if mine and theirs else None
        yield Result(name, ratio, "<=", 0.95, is_main=True)
    peaks = (own and own.peak_bytes, other and other.peak_bytes)
    memory = peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
    yield Result("ResNet-50 step, peak memory, fused / torch", memory, "<=", 0.95)
    seconds = {(row.dtype, row.side): row.seconds for row in record.rows("recalibrate")}
    ratios = [own / seconds[dtype, PEER] for (dtype, side), own in seconds.items() if side == "bnlab"]
    yield Result("recalibrate / update_bn", max(ratios, default=None), "<=", 0.9, len(ratios), is_main=True)


def _calls(record: Record) -> Iterable[Result]:
    calls = [row.ratio for row in record.rows("calls")][:1]
    yield Result("wall time of the first small tensor, bnlab / torch", calls[0] if calls else None, "<=", 1.3)
    errors = [row.errors["bnlab"] for row in record.rows("accuracy") if "bnlab" in row.errors]
    yield Result("largest error, eps", max(errors, default=None), "<=", LIMIT, len(errors))


def headline(shown: Sequence[Result], output: Output) -> str:
    """Return the last line."""
    parts = []
    for result in shown:
        if result.is_main:
            value = "not measured" if result.value is None else output.figure(result.value, 2)
            parts.append(f"{result.name} {value} (bar {result.rule} {result.bar:g})")
    return "; ".join(parts)
