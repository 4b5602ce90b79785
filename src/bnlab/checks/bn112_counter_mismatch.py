"""BN112: layers of one network that counted different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from bnlab.checks.cases import healthy, network, of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.records import Finding, Quantity
from bnlab.wording import abridged

__all__ = ["CounterMismatch"]

_MAX_GROUPS = 4
_MAX_PARTS = 3


class CounterMismatch(Check[NoLimits]):
    """Layers of one network that counted different numbers of batches.

    ## What it does
    The check compares `num_batches_tracked` between the layers of a network and reports which layers have which count.

    ## Why it matters
    The counts show the history of the network: a pretrained body under new heads, a part that was frozen for a while, a
    layer that is called twice per step or skipped in some steps. Different counts are not an error. A group of layers
    that lags far behind is worth a look.

    ## Evidence
    The check reads `num_batches_tracked` of the layers that have it. It compares the counters of one network in a file,
    never those of two networks.

    ## Threshold
    All counts must be equal.

    ## Remedy
    `manual`: check that the history is the one you expect.

    ## Sources
    Face-Detector-1MB counts 190,840 batches in its pretrained body and 100,750 in its heads. Yolo-FastestV2 also has
    two counts. Both networks are listed in docs/background.md, "Real networks that the thresholds were checked on".
    """

    code, group, needs = "BN112", Group.NOTE, Needs.STATE
    remedies = ("manual",)
    why = (
        "parts of the network saw different numbers of batches: pretrained, frozen for a while, or called twice a step"
    )
    limits = NoLimits()

    def lacks(self, layer: LayerState) -> str | None:
        """Return the reason why there is nothing to compare."""
        return "num_batches_tracked is absent" if layer.num_batches_tracked is None else None

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding for a network whose counters differ."""
        groups: dict[int, list[str]] = {}
        for layer in evidence.layers:
            if layer.num_batches_tracked is not None:
                groups.setdefault(layer.num_batches_tracked, []).append(layer.name)
        if len(groups) < 2:
            return
        largest_first = sorted(groups.items(), key=lambda item: len(item[1]), reverse=True)
        shared = _shared_depth([layer.name for layer in evidence.layers])
        groups_listed = [
            f"{count} in {len(names)} ({_parts(names, shared)})" for count, names in largest_first[:_MAX_GROUPS]
        ]
        of_network = f" of {evidence.name}" if evidence.name else ""
        more = [f"{len(groups) - _MAX_GROUPS} more values"] if len(groups) > _MAX_GROUPS else []
        yield self.finding(
            None,
            f"num_batches_tracked differs between layers{of_network}: {', '.join(groups_listed + more)}",
            measured={
                "smallest num_batches_tracked": Quantity(min(groups), "batches"),
                "largest num_batches_tracked": Quantity(max(groups), "batches"),
            },
            threshold={"difference": Quantity(0, "batches")},
        )

    CLEAN = (
        Case("one layer", of),
        Case("equal", lambda: network(healthy("a"), healthy("b"))),
        Case("absent", lambda: network(healthy("a", num_batches_tracked=None), healthy("b"))),
    )
    BROKEN = (
        Case(
            "new heads",
            lambda: network(
                healthy("body.1.bn", num_batches_tracked=190840),
                healthy("body.2.bn", num_batches_tracked=190840),
                healthy("head.bn", num_batches_tracked=100750),
            ),
            layers=(None,),
            measured={"smallest num_batches_tracked": 100750, "largest num_batches_tracked": 190840},
        ),
        Case(
            "one of several networks in a file",
            lambda: NetworkState("ema", (healthy("ema.a.bn"), healthy("ema.b.bn", num_batches_tracked=3))),
            layers=(None,),
        ),
    )


def _shared_depth(names: list[str]) -> int:
    """Return how many leading parts all paths have in common."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _parts(names: list[str], shared: int) -> str:
    """Name a group of layers by the first part of their paths that is not common to all."""
    parts = list(dict.fromkeys(name.split(".")[shared] for name in names))
    return abridged(parts, _MAX_PARTS)
