"""What the checks found in each layer, as far as it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnlab.records import Finding, Level
from bnlab.report.phrases import LEVEL_WORDS

__all__ = ["Marked", "by_layer"]


@dataclass(frozen=True)
class Marked:
    """The findings of one layer, most consequential first."""

    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level | None:
        """The most severe level; None without a finding."""
        return min((finding.level for finding in self.findings), key=lambda level: level.rank, default=None)

    @property
    def severity(self) -> int:
        """Larger the more severe; 0 without a finding."""
        return 0 if self.level is None else len(Level) - self.level.rank

    @property
    def codes(self) -> list[str]:
        """The codes, each once."""
        return list(dict.fromkeys(finding.code for finding in self.findings))

    @property
    def codes_with_levels(self) -> str:
        """The codes with their levels, as "BN401 warning, BN112 note"."""
        levels = {finding.code: finding.level for finding in reversed(self.findings)}
        return ", ".join(f"{code} {LEVEL_WORDS[levels[code]]}" for code in self.codes)

    def channels(self) -> set[int]:
        """Return the channels that are named."""
        return {channel for finding in self.findings for channel in finding.channels or ()}


def by_layer(findings: Iterable[Finding], names: Sequence[str]) -> list[Marked]:
    """Return the findings of each of the layers, in their order."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.layer is not None:
            found.setdefault(finding.layer, []).append(finding)
    return [Marked(tuple(found.get(name, ()))) for name in names]
