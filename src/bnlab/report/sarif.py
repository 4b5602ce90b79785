"""Writes diagnoses as SARIF 2.1.0 for code scanning: one run, in which a check is a rule and a finding is a result.

The log respects GitHub's limits ("SARIF support for code scanning" in the GitHub documentation). A notification reports
what was cut to meet them.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from bnlab.records import DiagnosisRecord, Finding, Level, Status, Target, to_json
from bnlab.report.phrases import remedy_phrase
from bnlab.report.rows import findings_at_least
from bnlab.report.shortening import beginning, end, plain

__all__ = ["RuleText", "Source", "render"]

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_ROOT = "%SRCROOT%"
_MAX_RESULTS = 25_000
_MAX_TEXT = 1_000
_MAX_NAME = 300
_MAX_CHANNELS = 100
_LEVELS = {Level.ERROR: "error", Level.WARNING: "warning", Level.INFO: "note"}
_GROUPS = {Level.ERROR: "correctness", Level.WARNING: "suspicious", Level.INFO: "note"}
_SEVERITIES = {Level.ERROR: "error", Level.WARNING: "warning", Level.INFO: "recommendation"}
_SEMANTIC_VERSION = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")

Json = dict[str, Any]
Located = tuple[Target, Finding]


@dataclass(frozen=True)
class RuleText:
    """The texts of a check that a viewer shows.

    Attributes:
        name: Name of the pattern, such as "NegativeRunningVariance".
        short: What the check looks for, one sentence.
        page: The documentation of the check, in Markdown.
        level: Level of the findings; None takes the level from the findings themselves.
    """

    name: str
    short: str
    page: str
    level: Level | None = None


@dataclass(frozen=True)
class Source:
    """The source of a target that is a model.

    Attributes:
        uri: Path of the file, relative to the root of the repository if the file is inside it.
        line: Line in the file, counted from 1.
    """

    uri: str
    line: int = 1


@dataclass(frozen=True)
class _Place:
    """The place of a target, and an identity that is stable over runs of the tool."""

    uri: str
    line: int
    identity: str


@dataclass(frozen=True)
class _Index:
    """The rules, places and artifacts that results refer to by index."""

    rules: Mapping[str, int]
    places: Mapping[Target, _Place]
    artifacts: Mapping[str, int]


def render(
    diagnoses: Sequence[DiagnosisRecord],
    *,
    rules: Mapping[str, RuleText] | None = None,
    sources: Mapping[str, Source] | None = None,
    level: Level = Level.INFO,
    failures: Sequence[str] = (),
) -> str:
    """Return one SARIF log of all diagnoses; the same input gives the same text.

    Args:
        diagnoses: The diagnoses.
        rules: The texts of the checks, by code; a check without text is described by its first finding.
        sources: The source of each model, by the name of the target; a checkpoint is a file itself.
        level: Findings below this level are left out.
        failures: One message for each target that could not be checked.
    """
    index = _index(diagnoses, sources or {})
    located = [(diagnosis.target, finding) for diagnosis in diagnoses for finding in diagnosis.findings]
    wanted = [(diagnosis.target, finding) for diagnosis in diagnoses for finding in findings_at_least(diagnosis, level)]
    kept = _most_severe(wanted)
    notifications = [
        *({"level": "error", "message": _message(failure)} for failure in failures),
        *_ended_early(diagnoses, index),
        *_crashed(diagnoses, index),
        *_skipped(diagnoses, index),
        *_left_out(located, wanted, kept, level),
    ]
    run = {
        "tool": {"driver": _driver(diagnoses, located, index, rules or {})},
        "invocations": [
            {
                "executionSuccessful": not any(item["level"] == "error" for item in notifications),
                "toolExecutionNotifications": notifications,
            }
        ],
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The root of the repository."}}},
        "artifacts": list(_artifacts(diagnoses, index)),
        "results": list(_results(kept, index)),
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False)


def _most_severe(wanted: Sequence[Located]) -> Sequence[Located]:
    """Return the most severe findings that fit in a run; all of them, in their order, if they fit."""
    if len(wanted) <= _MAX_RESULTS:
        return wanted
    return sorted(wanted, key=lambda located: located[1].level.rank)[:_MAX_RESULTS]


def _index(diagnoses: Iterable[DiagnosisRecord], sources: Mapping[str, Source]) -> _Index:
    rules: dict[str, int] = {}
    places: dict[Target, _Place] = {}
    artifacts: dict[str, int] = {}
    for diagnosis in diagnoses:
        place = places.setdefault(diagnosis.target, _place(diagnosis.target, sources))
        artifacts.setdefault(place.uri, len(artifacts))
        judged = [outcome.code for outcome in diagnosis.outcomes]
        for code in (*judged, *(finding.code for finding in diagnosis.findings)):
            rules.setdefault(code, len(rules))
    return _Index(rules, places, artifacts)


def _place(target: Target, sources: Mapping[str, Source]) -> _Place:
    """Return the place of a target. A model without a source gets its name as a path, because viewers require one."""
    source = sources.get(target.name)
    if source is not None:
        return _Place(_uri(source.uri), max(1, source.line), target.name)
    uri = _uri(target.name)
    return _Place(uri, 1, uri if target.kind == "checkpoint" else target.name)


def _uri(path: str) -> str:
    """Return a path as a percent-encoded URI, relative if the path is relative."""
    path = path.replace("\\", "/")
    encoded = quote(posixpath.normpath(path).encode("utf-8", "surrogatepass"), safe="/")
    if re.match(r"[A-Za-z]:/", path):
        return f"file:///{encoded.replace('%3A', ':', 1)}"
    return f"file:///{encoded.lstrip('/')}" if path.startswith("/") else encoded


def _driver(
    diagnoses: Sequence[DiagnosisRecord], located: Iterable[Located], index: _Index, rules: Mapping[str, RuleText]
) -> Json:
    driver: Json = {"name": "bnlab"}
    if diagnoses:
        driver["version"] = plain(diagnoses[0].bnlab)
        if _SEMANTIC_VERSION.fullmatch(diagnoses[0].bnlab):
            driver["semanticVersion"] = diagnoses[0].bnlab
    first = {finding.code: finding for _, finding in reversed(list(located))}
    return driver | {"rules": [_rule(code, rules.get(code), first.get(code)) for code in index.rules]}


def _rule(code: str, text: RuleText | None, finding: Finding | None) -> Json:
    """Return a check as a rule with the texts that viewers show: a short one, a long one, and help."""
    level = text.level if text is not None else None
    if level is None and finding is not None:
        level = finding.level
    why = finding.why if finding is not None else "The record does not hold the description of this check."
    short = text.short if text is not None else f"{why.rstrip('.')}."
    rule: Json = {"id": plain(code)}
    if text is not None:
        rule["name"] = text.name
    rule["shortDescription"] = _message(short)
    rule["fullDescription"] = _message(f"{short} {_why_it_matters(text.page)}" if text is not None else short)
    rule["help"] = {"text": plain(short)} if text is None else {"text": text.page, "markdown": text.page}
    tags = ["batch-normalization"]
    properties: Json = {"tags": tags}
    if level is not None:
        rule["defaultConfiguration"] = {"level": _LEVELS[level]}
        tags.append(_GROUPS[level])
        properties["problem.severity"] = _SEVERITIES[level]
    return rule | {"properties": properties}


def _why_it_matters(page: str) -> str:
    """Return the section "Why it matters" of a page on one line; "" if there is none."""
    section = re.search(r"^## Why it matters\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return " ".join(section[1].split()) if section else ""


def _artifacts(diagnoses: Iterable[DiagnosisRecord], index: _Index) -> Iterable[Json]:
    """Yield each file once, with the conclusions on its targets."""
    conclusions: dict[str, list[str]] = {}
    for diagnosis in diagnoses:
        conclusions.setdefault(index.places[diagnosis.target].uri, []).append(f"{diagnosis.conclusion}.")
    for uri in index.artifacts:
        location = _artifact_location(uri)
        yield {"location": location, "description": _message(" ".join(conclusions[uri])), "roles": ["analysisTarget"]}


def _artifact_location(uri: str) -> Json:
    return {"uri": uri} if uri.startswith("file:") else {"uri": uri, "uriBaseId": _ROOT}


def _physical(target: Target, index: _Index) -> Json:
    place = index.places[target]
    artifact = _artifact_location(place.uri) | {"index": index.artifacts[place.uri]}
    return {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": place.line}}}


def _results(located: Iterable[Located], index: _Index) -> Iterable[Json]:
    seen: Counter[str] = Counter()
    for target, finding in located:
        fingerprint = _fingerprint(index.places[target], finding)
        seen[fingerprint] += 1
        yield {
            "ruleId": plain(finding.code),
            "ruleIndex": index.rules[finding.code],
            "level": _LEVELS[finding.level],
            "message": _message(_sentence(finding)),
            "locations": [_physical(target, index) | _logical(finding)],
            # GitHub identifies an alert by this hash, and the results of a checkpoint all lie on line 1 of the file.
            "partialFingerprints": {"primaryLocationLineHash": f"{fingerprint}:{seen[fingerprint]}"},
            "properties": _properties(finding),
        }


def _fingerprint(place: _Place, finding: Finding) -> str:
    """Return a hash of the check, the layer and the target, which stays the same when the numbers change."""
    key = json.dumps([finding.code, finding.layer, place.identity])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _logical(finding: Finding) -> Json:
    if not finding.layer:
        return {}
    path = plain(_path(finding.layer, _MAX_TEXT))
    return {
        "logicalLocations": [{"name": path.rpartition(".")[2] or path, "fullyQualifiedName": path, "kind": "member"}]
    }


def _properties(finding: Finding) -> Json:
    properties: Json = {
        "measured": to_json(finding.measured),
        "threshold": to_json(finding.threshold),
        "remedies": list(finding.remedies),
    }
    if finding.channels is not None:
        properties |= {"channels": list(finding.channels[:_MAX_CHANNELS]), "channelCount": len(finding.channels)}
    return properties


def _sentence(finding: Finding) -> str:
    where = "the network" if finding.layer is None else finding.layer or "the module itself"
    by_hand = ["by hand"] if "manual" in finding.remedies else []
    remedies = [remedy_phrase(name) for name in finding.remedies if name != "manual"]
    remedy = f" Remedy: {' or '.join(remedies + by_hand)}." if finding.remedies else ""
    return f"{_path(where, _MAX_NAME)}: {finding.message}.{remedy}"


def _is_cut(finding: Finding) -> bool:
    return len(finding.layer or "") > _MAX_NAME or len(_sentence(finding)) > _MAX_TEXT


def _message(text: str) -> Json:
    """Return text as a message; link syntax in the text is disabled."""
    shown = plain(text[: _MAX_TEXT + 1]).replace("](", "] (")
    return {"text": shown if len(shown) <= _MAX_TEXT else beginning(shown, _MAX_TEXT - 1)}


def _path(name: str, limit: int) -> str:
    """Return a layer path of at most `limit` characters; a longer path loses its beginning."""
    return name if len(name) <= limit else end(name, limit - 1)


def _ended_early(diagnoses: Iterable[DiagnosisRecord], index: _Index) -> Iterable[Json]:
    """Yield each diagnosis that leaves something out: the run of a model failed, or a file holds half a layer."""
    for diagnosis in diagnoses:
        if diagnosis.failure is not None:
            yield {
                "level": "error",
                "message": _message(diagnosis.failure),
                "locations": [_physical(diagnosis.target, index)],
            }


def _crashed(diagnoses: Iterable[DiagnosisRecord], index: _Index) -> Iterable[Json]:
    for diagnosis in diagnoses:
        for outcome in diagnosis.outcomes:
            if outcome.status is Status.CRASHED:
                yield {
                    "level": "error",
                    "message": _message(f"{outcome.code} crashed: {outcome.reason or 'no reason given'}"),
                    "associatedRule": {"id": plain(outcome.code), "index": index.rules[outcome.code]},
                    "locations": [_physical(diagnosis.target, index)],
                }


def _skipped(diagnoses: Sequence[DiagnosisRecord], index: _Index) -> Iterable[Json]:
    """Yield each check and reason once, with the number of targets concerned."""
    counts = Counter(
        (outcome.code, outcome.reason or "no reason given")
        for diagnosis in diagnoses
        for outcome in diagnosis.outcomes
        if outcome.status is Status.SKIPPED
    )
    for (code, reason), count in counts.items():
        among = f" in {count} of {len(diagnoses)} targets" if len(diagnoses) > 1 else ""
        yield {
            "level": "note",
            "message": _message(f"{code} was skipped{among}: {reason}"),
            "associatedRule": {"id": plain(code), "index": index.rules[code]},
        }


def _left_out(
    located: Sequence[Located], wanted: Sequence[Located], kept: Sequence[Located], level: Level
) -> Iterable[Json]:
    if len(wanted) < len(located):
        yield {
            "level": "note",
            "message": _message(
                f"findings left out because they are below {level.value}: {len(located) - len(wanted)}"
            ),
        }
    if len(kept) < len(wanted):
        text = f"only the {len(kept)} most severe of {len(wanted)} findings are in this run: viewers accept no more"
        yield {"level": "warning", "message": _message(text)}
    cut = sum(_is_cut(finding) for _, finding in kept)
    if cut:
        yield {"level": "note", "message": _message(f"results whose text was cut: {cut}")}
