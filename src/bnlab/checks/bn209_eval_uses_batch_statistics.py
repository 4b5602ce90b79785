"""BN209: no running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.records import Finding, Quantity

__all__ = ["EvalUsesBatchStatistics"]


class EvalUsesBatchStatistics(ModelCheck[NoLimits]):
    """A layer without running statistics, whose eval output depends on the batch.

    ## What it does
    The check looks for layers that keep no `running_mean` and `running_var`.

    ## Why it matters
    Such a layer normalises with the batch in eval mode too. Predictions change with the other samples and with their
    number, a batch that is sorted by class gives wrong predictions, and a single value per channel raises an error even
    in eval mode. The layer cannot be folded, and exporters write it in training mode.

    ## Evidence
    The check looks at the buffers of the layer, or in an ONNX file at the graph: exporters write such a layer as a BN
    node whose statistics the graph computes from its input (`ReduceMean`), or a node in training mode without stored
    statistics. It accepts a layer with buffers and `track_running_stats=False`, which
    uses them in eval mode.

    ## Threshold
    A layer must have both buffers.

    ## Remedy
    `manual`: build the layer with `track_running_stats=True` and recalibrate. Leave the layer alone if batch statistics
    are intended, as in adaptation at test time.

    ## Sources
    PyTorch issue 156051 (https://github.com/pytorch/pytorch/issues/156051) on the error in eval mode, and issue 75252
    (https://github.com/pytorch/pytorch/issues/75252) on export; TENT (Wang et al. 2021, arXiv 2006.10726), which
    removes the buffers on purpose; Wu and Johnson 2021 (arXiv 2105.07576), table 5; docs/background.md, "Outputs that
    depend on the batch".
    """

    code, group, needs = "BN209", Group.SUSPICIOUS, Needs.MODEL
    remedies = ("manual",)
    why = "eval mode normalises with the batch: the output of a sample depends on the samples beside it"
    limits = NoLimits()
    judges_graphs = judges_modules = True

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer without running statistics."""
        for layer in evidence.layers:
            if layer.state is None and not layer.is_unreadable:
                yield self.finding(
                    layer,
                    "the layer keeps no running statistics and normalises with batch statistics, "
                    "must keep them for eval mode",
                    measured={"running statistics": Quantity(0, "buffers")},
                    threshold={"running statistics": Quantity(2, "buffers")},
                )

    CLEAN = (
        Case("running statistics", model),
        Case("kept but not updated", lambda: model(model_layer(updates=False))),
        Case("kept on the meta device", lambda: model(model_layer(state=None, updates=False, is_unreadable=True))),
    )
    BROKEN = (
        Case(
            "track_running_stats=False",
            lambda: model(model_layer("a", state=None, updates=False), model_layer("b")),
            layers=("a",),
            measured={"running statistics": 0},
        ),
    )
