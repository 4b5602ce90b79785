"""Assigns the shown findings to their layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnlab.records import Finding, Level
from bnlab.report.phrases import LEVEL_WORDS

__all__ = ["LayerFindings", "by_layer"]


@dataclass(frozen=True)
class LayerFindings:
    """The findings of one layer, most consequential first."""

    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level | None:
        """The most severe level; None without a finding."""
        return min((finding.level for finding in self.findings), key=lambda level: level.rank, default=None)

    @property
    def severity(self) -> int:
        """A number that grows with the most severe level; 0 without a finding."""
        return 0 if self.level is None else len(Level) - self.level.rank

    @property
    def codes(self) -> list[str]:
        """The distinct codes."""
        return list(dict.fromkeys(finding.code for finding in self.findings))

    @property
    def codes_with_levels(self) -> str:
        """The codes with their levels, such as "BN401 warning, BN112 note"."""
        levels = {finding.code: finding.level for finding in reversed(self.findings)}
        return ", ".join(f"{code} {LEVEL_WORDS[levels[code]]}" for code in self.codes)

    def channels(self) -> set[int]:
        """Return the channels that the findings name."""
        return {channel for finding in self.findings for channel in finding.channels or ()}


def by_layer(findings: Iterable[Finding], names: Sequence[str]) -> list[LayerFindings]:
    """Return the findings of each layer, in the order of `names`."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.layer is not None:
            by_name.setdefault(finding.layer, []).append(finding)
    return [LayerFindings(tuple(by_name.get(name, ()))) for name in names]
