"""Records for the tests of pages (healthy and hostile, small and large), and a parser for the pages."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

from bnlab.records import (
    Cause,
    Change,
    Changes,
    DiagnosisRecord,
    Finding,
    GapChange,
    LayerHistory,
    LayerRecord,
    LeftAlone,
    Level,
    Measurement,
    MetricChange,
    Numbers,
    Outcome,
    Quantity,
    Range,
    Recheck,
    Safety,
    Status,
    Summary,
    Target,
)

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "bell\x07 escape\x1b[31m line\nbreak \u202e turned \u2028",
    "' onfocus='alert(1)",
)


def harmless(text: str) -> str:
    """Return a harmless text as long as an attack, so that the page has the same layout."""
    return "x" * len(text)


_VOID = frozenset({"meta", "input", "br"})


class Page(HTMLParser):
    """A page as a browser would see it: its elements, whether they are balanced, and the text that it shows."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.unbalanced: list[str] = []
        self.data: dict | None = None
        self._open: list[str] = []
        self._texts: list[str] = []
        self._is_data = False
        self.feed(source)
        self.close()
        self.unbalanced += self._open

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._is_data = tag == "script" and ("type", "application/json") in attrs
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self._is_data:
            self.data = json.loads(data)
            self._is_data = False
        elif self._open and self._open[-1] not in ("script", "style"):
            self._texts.append(data)


def gap(staleness: float = 0.25, **others: float) -> dict[str, float]:
    parts = {"staleness": staleness, **{name.replace("_", " "): value for name, value in others.items()}}
    return {**parts, "total": sum(parts.values())}


def channels(count: int, *, observed: str | None = "train_data") -> dict[str, tuple[float, ...]]:
    wave = tuple(round(math.sin(i), 6) for i in range(count))
    spread = tuple(1.0 + 0.1 * i / count for i in range(count))
    values = {"running_mean": wave, "running_var": spread, "weight": wave, "bias": wave}
    if observed is not None:
        values |= {
            "gap": tuple(float(i) for i in range(count)),
            f"{observed}_mean": wave,
            f"{observed}_mean_error": (0.0123456,) * count,
            f"{observed}_var": spread,
            f"{observed}_var_error": (0.0123456,) * count,
        }
    return values


def layer(name: str = "layer1.0.bn1", count: int = 4, **changes: object) -> LayerRecord:
    values = {
        "name": name,
        "network": "",
        "channels": count,
        "dtype": "float32",
        "affine": True,
        "num_batches_tracked": 391,
        "momentum": 0.1,
        "eps": 1e-5,
        "assumed": (),
        "running_mean": Range(-0.5, 0.0, 0.25),
        "running_var": Range(0.125, 1.0, 4.0),
        "gain": Range(0.5, 1.0, 2.0),
        "calls": 1,
        "inputs": ("conv1",),
    }
    return LayerRecord(**{**values, **changes})


def finding(layer_: str | None = "layer1.0.bn1", code: str = "BN401", **changes: object) -> Finding:
    values = {
        "code": code,
        "level": Level.WARNING,
        "layer": layer_,
        "channels": None,
        "message": "running statistics are up to 2 standard deviations off, must be <= 0.35",
        "why": "eval mode normalises with statistics that the training data does not have",
        "measured": {"effect": Quantity(2.0, "std")},
        "threshold": {"effect": Quantity(0.35, "std")},
        "remedies": ("recalibrate",),
    }
    return Finding(**{**values, **changes})


def event(layer_: str | None, code: str, step: float, **changes: object) -> Finding:
    """Return an event of a training run."""
    quantities = {"measured": {"step": Quantity(step, "optimizer steps")}, "threshold": {}, "remedies": ("manual",)}
    return finding(layer_, code, **{**quantities, **changes})


def history(layer_: str, **changes: object) -> LayerHistory:
    """Return the statistics of a layer over the steps of a training run."""
    steps = changes.get("steps", (0, 10, 20))
    count = len(steps)
    values = {
        "steps": steps,
        "running_mean": tuple(0.5 * i for i in range(count)),
        "running_var": tuple(1.0 + i for i in range(count)),
        "lag": (0.25,) * count,
    }
    return LayerHistory(layer=layer_, **{**values, **changes})


def diagnosis(layers=None, findings=(), **changes: object) -> DiagnosisRecord:
    layers = (layer(), layer("layer1.0.bn2")) if layers is None else tuple(layers)
    counts = {level: sum(one.level is level for one in findings) for level in Level}
    values = {
        "bnlab": "0.1.0",
        "target": Target("checkpoint", "runs/my model.pt"),
        "layers": layers,
        "outcomes": (
            Outcome("BN101", Status.PASSED),
            Outcome("BN401", Status.FINDINGS),
            Outcome("BN301", Status.SKIPPED, "no data given"),
        ),
        "findings": tuple(findings),
        "conclusion": "layer1.0.bn1 has stale statistics",
        "summary": Summary(
            len(layers),
            sum(one.channels for one in layers),
            counts[Level.ERROR],
            counts[Level.WARNING],
            counts[Level.INFO],
        ),
    }
    return DiagnosisRecord(**{**values, **changes})


def complete() -> DiagnosisRecord:
    """Return a diagnosis in which no field is empty."""
    layers = [
        layer(name, gap=gap(0.3 / (i + 1), sampling_noise=0.01, heterogeneity=-0.001), per_channel=channels(4))
        for i, name in enumerate(("stem.bn", "layer1.0.bn1", "layer1.0.bn2", "head.bn"))
    ]
    findings = (
        finding("layer1.0.bn1", "BN102", level=Level.ERROR, channels=(1, 3)),
        finding("layer1.0.bn1"),
        finding("head.bn"),
        finding(None, "BN112", level=Level.INFO, measured={}, threshold={}, remedies=("manual",)),
    )
    return diagnosis(
        layers,
        findings,
        causes=(Cause("staleness", 0.97, ("stem.bn",)), Cause("sampling noise", 0.04, ()), Cause("bessel", -0.01, ())),
        numbers=Numbers(0.98, 0.97, 0.11, 0.96),
        notes=("the momentum is assumed",),
    )


def hostile(text: str) -> DiagnosisRecord:
    """Return a diagnosis in which every text is an attack."""
    named = layer(
        text, dtype=text, network=text, inputs=(text,), gap={text: 0.5, "total": 0.5}, per_channel=channels(4)
    )
    attack = finding(
        text,
        text,
        message=text,
        why=text,
        measured={text: Quantity(1.0, text)},
        threshold={text: Quantity(1.0, text)},
        remedies=(text, "recalibrate", "drop-bias", "freeze"),
    )
    return diagnosis(
        [named, layer(f"{text}.second", gap=gap())],
        [attack],
        bnlab=text,
        target=Target("checkpoint", text),
        outcomes=(Outcome(text, Status.CRASHED, text), Outcome(text, Status.SKIPPED, text)),
        conclusion=text,
        causes=(Cause(text, 1.0, (text,)),),
        notes=(text,),
    )


def large(count: int, width: int) -> DiagnosisRecord:
    """Return the diagnosis of a large network in which half of the layers have findings."""
    layers = [
        layer(
            f"stages.{i // 100}.blocks.{i % 100}.norm",
            width,
            gap=gap(0.1 + i % 7, sampling_noise=0.01),
            per_channel=channels(width),
        )
        for i in range(count)
    ]
    findings = [
        finding(one.name, code, channels=tuple(range(0, width, 3)))
        for code in ("BN301", "BN401")
        for one in layers[::2]
    ]
    return diagnosis(layers, findings)


def receipt(**changes: object) -> Changes:
    values = {
        "bnlab": "0.1.0",
        "action": "repair",
        "safety": Safety.STATISTICS,
        "changes": (Change("layer1.0.bn1", "running statistics", "mean 0", "mean 1"),),
        "left_alone": (LeftAlone("head.bn", "BN107: to be mended by hand"),),
        "metric": MetricChange(0.2806, 0.9889),
        "notes": ("from 11 batches",),
        "measurements": (
            Measurement(None, "largest error", 1e-6, "std"),
            Measurement("stem.bn", "moved by", 0.5, "std"),
        ),
        "recheck": recheck(),
        "target": Target("checkpoint", "runs/my model.pt"),
    }
    return Changes(**{**values, **changes})


def recheck(**changes: object) -> Recheck:
    values = {
        "before": Summary(2, 8, 1, 3, 0),
        "after": Summary(2, 8, 0, 0, 1),
        "resolved": ("BN401 stem.bn", "BN401 layer1.0.bn1"),
        "remaining": ("BN108 head.bn",),
        "appeared": ("BN112 the network",),
        "conclusion_before": "statistics are stale",
        "conclusion_after": "no errors and no warnings",
        "numbers_before": Numbers(0.98, 0.97, 0.2806, 0.9889),
        "numbers_after": Numbers(0.98, 0.97, 0.9889, 0.9889),
        "gaps": (GapChange("stem.bn", gap(0.64), gap(0.0, sampling_noise=0.01)), GapChange("head.bn", gap(0.09), None)),
    }
    return Recheck(**{**values, **changes})
