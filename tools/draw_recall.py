"""Draw how often `bnlab bench hidden` infers eps, by how much eps matters.

    python tools/draw_recall.py benchmarks/results/hidden.json docs/images/hidden.svg

The JSON file is the one that `bnlab bench hidden --json` writes.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import altair as alt

EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, float("inf"))


def main(source: Path, target: Path) -> None:
    """Draw the share of networks in which eps is inferred, for each range of the change of the outputs."""
    rebuilt = json.loads(source.read_text(encoding="utf-8"))["rebuilt"]
    rows = []
    for low, high in pairwise(EDGES):
        chosen = [row for row in rebuilt if low <= row["change"] < high]
        if not chosen:
            continue
        named = [row for row in chosen if row["inferred"] is not None]
        near = [row for row in named if 0.5 <= row["inferred"] / row["true"] <= 2]
        label = f"{low:g} to {high:g}" if high < float("inf") else f"above {low:g}"
        rows += [
            {"change": label, "order": low, "share": len(near) / len(chosen), "what": "within a factor of 2"},
            {
                "change": label,
                "order": low,
                "share": (len(named) - len(near)) / len(chosen),
                "what": "another value",
            },
        ]
    chart = (
        alt.Chart({"values": rows}, title="Networks in which BN303 names the eps of the training")
        .mark_bar()
        .encode(
            x=alt.X(
                "change:N",
                sort=alt.EncodingSortField("order"),
                title="change of the outputs by the other eps, standard deviations",
                axis=alt.Axis(labelAngle=0),
            ),
            y=alt.Y("share:Q", title="share of networks", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["within a factor of 2", "another value"], range=["#2b6cb0", "#dd6b20"]),
            ),
        )
        .properties(width=520, height=220)
    )
    chart.save(str(target))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
