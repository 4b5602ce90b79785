"""The results of bnlab as frozen dataclasses that can be written as JSON and read back.

Records need only the standard library, so a saved JSON file can be read and drawn without torch. Three of them are
documents with the schemas ``bnlab.diagnosis/1``, ``bnlab.receipt/1`` and ``bnlab.experiment/1``
(:func:`json_schema`): :class:`DiagnosisRecord`, :class:`Changes` and :class:`ExperimentRecord`.
"""

from bnlab.records.diagnosis import (
    Advice,
    Cause,
    DiagnosisRecord,
    Finding,
    LayerHistory,
    LayerRecord,
    Level,
    Numbers,
    Outcome,
    Quantity,
    Range,
    StatisticsVerdict,
    Status,
    Summary,
    Target,
)
from bnlab.records.document import from_json, json_schema, to_json
from bnlab.records.experiment import (
    Axis,
    ClaimRecord,
    Column,
    Estimate,
    ExperimentRecord,
    Figure,
    Mark,
    Rule,
    Verdict,
)
from bnlab.records.receipt import (
    REMEDIES,
    Change,
    Changes,
    GapChange,
    LeftAlone,
    Measurement,
    MetricChange,
    Recheck,
    Safety,
)

__all__ = [
    "REMEDIES",
    "Advice",
    "Axis",
    "Cause",
    "Change",
    "Changes",
    "ClaimRecord",
    "Column",
    "DiagnosisRecord",
    "Estimate",
    "ExperimentRecord",
    "Figure",
    "Finding",
    "GapChange",
    "LayerHistory",
    "LayerRecord",
    "LeftAlone",
    "Level",
    "Mark",
    "Measurement",
    "MetricChange",
    "Numbers",
    "Outcome",
    "Quantity",
    "Range",
    "Recheck",
    "Rule",
    "Safety",
    "StatisticsVerdict",
    "Status",
    "Summary",
    "Target",
    "Verdict",
    "from_json",
    "json_schema",
    "to_json",
]
