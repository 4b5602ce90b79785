"""BN301: train mode and eval mode compute different things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.checks.effects import why_skipped
from bnlab.observe.model_evidence import Gap, ModelEvidence, ModelLayer
from bnlab.observe.upstream import upstream_of
from bnlab.records import Finding, Numbers, Quantity

__all__ = ["TrainEvalGap"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN301."""

    excess: float = limit(
        0.35, unit="std", source="largest excess of a layer in the healthy networks that were measured: 0.25"
    )
    errors: float = limit(4.0, unit="standard errors", source="1 false alarm in 30,000 networks")
    loss: float = limit(0.01, unit="fraction of the metric", source="smaller losses have no consequence")


class TrainEvalGap(ModelCheck[Limits]):
    """A layer whose eval output differs from its train output by more than Bessel's correction and sampling explain.

    ## What it does
    The check replaces the statistics of a batch by the running statistics in several links. It adds up what each link
    changes in the normalised outputs of the layer: Bessel's correction, sampling noise, heterogeneous batches, shift,
    dropout, precision, staleness. The layers upstream use batch statistics, so each layer shows its own part only.

    ## Why it matters
    The network that is evaluated is not the network that was trained: it is good in `train()` and bad in `eval()`.

    ## Evidence
    The check uses sums over the batches of `data` and of `train_data`, and the metric with either statistics, if one is
    passed in. Without `train_data`, staleness and shift are one cause.

    ## Threshold
    The check subtracts what Bessel's correction and sampling noise explain. It reports a layer if the rest exceeds the
    limit. It reports the network if the metric with running statistics is worse than with batch statistics by more than
    the standard error allows.

    ## Remedy
    `recalibrate`, if the cause is staleness, precision or dropout.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 3; https://github.com/pytorch/pytorch/issues/4741,
    https://github.com/pytorch/pytorch/issues/5406 and https://github.com/pytorch/pytorch/issues/9015 on models that are
    good in train() and bad in eval(); docs/background.md, "Biased and unbiased variance".
    """

    code, group, needs = "BN301", Group.SUSPICIOUS, Needs.DATA
    remedies = ("recalibrate",)
    why = "eval mode normalises with statistics that are not those of the data: another network than was trained"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why a layer has no gap to measure."""
        unknown = "no running statistics, or not run" if layer.gap is None else None
        return why_skipped(layer) or unknown

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with a gap, or one for the network where only the metric shows it."""
        any_layer = False
        for layer in evidence.layers:
            gap = layer.gap
            if gap is not None and gap.excess > self.limits.excess:
                any_layer = True
                yield self.finding(
                    layer,
                    f"eval mode differs from train mode by {show(gap.square**0.5)} standard deviations, of which "
                    f"Bessel and sampling noise do not explain {show(gap.excess)} ({_largest(gap, layer)}), "
                    f"must be <= {show(self.limits.excess)}",
                    measured={
                        "excess": Quantity(gap.excess, "std"),
                        "gap": Quantity(gap.square**0.5, "std"),
                    },
                    threshold={"excess": Quantity(self.limits.excess, "std")},
                )
        if not any_layer:
            yield from self._by_metric(evidence)

    def _by_metric(self, evidence: ModelEvidence) -> Iterator[Finding]:
        numbers = evidence.numbers
        if numbers is None:
            return
        lost = numbers.eval_batch - numbers.eval_running
        error = evidence.metric_error or 0.0
        allowed = max(self.limits.errors * error, self.limits.loss * abs(numbers.eval_batch))
        if lost > allowed:
            yield self.finding(
                None,
                f"the metric is {show(numbers.eval_running)} with running statistics and {show(numbers.eval_batch)} "
                f"with batch statistics, must not be lower by more than {show(allowed)}",
                measured={"lost": Quantity(lost, "metric")},
                threshold={"lost": Quantity(allowed, "metric")},
            )

    CLEAN = (
        Case("healthy", model),
        Case("batches of 2 images", lambda: model(model_layer(data=observed(images=40, positions=1, batches=20)))),
        Case(
            "batch statistics are worse: the batch is small",
            lambda: model(numbers=Numbers(None, eval_batch=0.8, eval_running=0.9, eval_recalibrated=0.9)),
        ),
    )
    BROKEN = (
        Case(
            "stale statistics",
            lambda: model(model_layer("a"), model_layer("b", state=healthy("b", running_mean=(2.3, 1.3, 2.1, 3.2)))),
            layers=("b",),
        ),
        Case(
            "the metric alone shows it",
            lambda: model(
                numbers=Numbers(None, eval_batch=0.9, eval_running=0.5, eval_recalibrated=0.9), metric_error=0.01
            ),
            layers=(None,),
            measured={"lost": 0.4},
        ),
    )


def _largest(gap: Gap, layer: ModelLayer) -> str:
    """Return the two largest causes as text, such as "97 % staleness, 3 % shift"; what is upstream has its own name."""
    upstream, parts = upstream_of(layer), Counter[str]()
    for cause, part in gap.by_cause.items():
        if cause not in ("bessel", "sampling noise"):
            parts[upstream.name if upstream is not None and cause in upstream.causes else cause] += part  # type: ignore[assignment]
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{100 * part / gap.square:.0f} % {name}" for name, part in ordered if part > 0.005 * gap.square)
