"""Runs experiments: every seed, then the verdicts, as one record that can be stored instead of computed again."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

import bnlab
from bnlab._version import __version__
from bnlab.errors import DamagedFile, UsageError
from bnlab.lab.experiment import Experiment, Observation
from bnlab.lab.verdict import judge
from bnlab.records import Column, ExperimentRecord, Figure
from bnlab.records.json_file import as_record, read_values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Run", "read_record", "saved"]

_CODE = ("functional", "kernels", "nn", "observe", "remedies", "lab")
"""The folders of the package whose code a result may depend on, except for other experiments."""

_PACKAGES = {"torch": "torch", "numpy": "numpy", "scikit-learn": "sklearn"}
"""The packages that a result may depend on, with their modules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A validated run of an experiment.

    Attributes:
        experiment: The experiment, which knows its folder with data sets.
        config: The settings.
        profile: "quick", "full", or "custom" if the caller changed a setting.
        seeds: The number of seeds, which count from 0; at least 3 for a verdict.
    """

    experiment: Experiment[Any]
    config: Any
    profile: str
    seeds: int

    @classmethod
    def of(
        cls,
        experiment: Experiment[Any],
        *,
        full: bool = False,
        seeds: int = 3,
        data_dir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Run:
        """Validate the arguments and return the run.

        Raises:
            UsageError: If a setting is unknown, there are too few seeds, or `data_dir` is not a folder.
        """
        config = experiment.full if full else experiment.quick
        known = [setting.name for setting in dataclasses.fields(config)]
        for name in settings or {}:
            if name not in known:
                raise UsageError(f"{experiment.name}: setting must be one of {', '.join(known)}, got {name!r}.")
        if seeds < 3:
            raise UsageError(f"{experiment.name}: seeds must be at least 3 for a verdict, got {seeds!r}.")
        if data_dir is not None and not Path(data_dir).is_dir():
            raise UsageError(f"{experiment.name}: data_dir must be a folder, got {os.fspath(data_dir)}.")
        profile = "custom" if settings else "full" if full else "quick"
        if data_dir is not None:
            experiment = copy.copy(experiment)
            experiment.data_dir = Path(data_dir)
        resolved = experiment.resolve(dataclasses.replace(config, **(settings or {})))
        return cls(experiment=experiment, config=resolved, profile=profile, seeds=seeds)

    @property
    def key(self) -> str:
        """Hash of the settings, the seeds and the code."""
        text = json.dumps([self.experiment.name, self.profile, _as_text(self.config), self.seeds], sort_keys=True)
        return hashlib.sha256((text + _code_of(self.experiment)).encode()).hexdigest()

    def path(self, folder: Path) -> Path:
        """Return the path of the record in a folder."""
        return folder / f"{self.experiment.name}-{self.profile}-{self.key[:12]}.json"

    def record(self, *, advance: Callable[[float], None] = lambda _: None) -> ExperimentRecord:
        """Run every seed and judge the claims. Calls `advance` with the finished share of the whole run."""
        start = time.monotonic()
        observations = [self._observe(seed, advance) for seed in range(self.seeds)]
        experiment = self.experiment
        claims = tuple(judge(claim, [seen.values[claim.key] for seen in observations]) for claim in experiment.claims)
        figure = experiment.figure()
        return ExperimentRecord(
            bnlab=__version__,
            name=experiment.name,
            title=experiment.title,
            source=experiment.source,
            profile=self.profile,
            config=_as_text(self.config),
            key=self.key,
            seeds=tuple(range(self.seeds)),
            claims=claims,
            table=_table([seen.table for seen in observations], figure),
            figure=figure,
            versions=_versions(),
            seconds=round(time.monotonic() - start, 1),
            notes=observations[0].notes,
        )

    def _observe(self, seed: int, advance: Callable[[float], None]) -> Observation:
        def tick(share: float) -> None:
            advance((seed + min(max(share, 0.0), 1.0)) / self.seeds)

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            observation = self.experiment.run(self.config, seed, tick)
        tick(1.0)
        return observation


def saved(folder: Path) -> list[ExperimentRecord]:
    """Return the records in a folder, sorted by file name. Other JSON files are ignored.

    Raises:
        UnreadableFile, DamagedFile: As `read_record` does.
    """
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if record is not None]


def read_record(path: Path) -> ExperimentRecord | None:
    """Return the record in a file, or None if the file holds something else.

    Raises:
        UnreadableFile: If the file cannot be read, or is not a regular file.
        DamagedFile: If the file holds a record that breaks its schema.
    """
    try:
        values = [*itertools.islice(read_values(path), 2)]
    except DamagedFile:
        return None
    data = values[0] if len(values) == 1 else None
    if not isinstance(data, Mapping) or data.get("schema") != ExperimentRecord.schema:
        return None
    return as_record(ExperimentRecord, data, path)


def _as_text(config: DataclassInstance) -> dict[str, str]:
    return {name: str(value) for name, value in dataclasses.asdict(config).items()}


def _code_of(experiment: Experiment[Any]) -> str:
    """Return a hash of the code that a result may depend on."""
    own = _file_of(type(experiment))
    digest = hashlib.sha256(_methods_of(type(experiment)) if own is None else b"")
    for path in _sources(experiment):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(experiment: Experiment[Any]) -> Iterator[Path]:
    """Yield the source files that a result may depend on: the experiment's own file, and no other experiment's."""
    root = Path(bnlab.__file__).parent
    own = _file_of(type(experiment))
    if own is not None:
        yield own
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*.py")):
            if path != own and path.parent != root / "lab" / "experiments":
                yield path


def _file_of(kind: type[Experiment[Any]]) -> Path | None:
    """Return the file that defines an experiment, or None at a prompt or in a notebook."""
    try:
        return Path(inspect.getfile(kind))
    except (OSError, TypeError):
        return None


def _methods_of(kind: type[Experiment[Any]]) -> bytes:
    methods = (value for value in vars(kind).values() if inspect.isfunction(value))
    return "".join(_shown_code(method.__code__) for method in methods).encode()


def _shown_code(code: CodeType) -> str:
    """Return the code of a function as text that is the same in every process."""
    constants = [_shown_code(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _table(tables: Sequence[Mapping[str, Sequence[float | str]]], figure: Figure) -> tuple[Column, ...]:
    """Return one table of all seeds: means of the drawn column, with "low" and "high"; others as in the first seed."""
    first = tables[0]
    drawn = (figure.value or figure.y).column
    columns = {name: _column(name, values) for name, values in first.items()}
    if all(isinstance(value, (int, float)) for value in first[drawn]):
        rows = list(zip(*(table[drawn] for table in tables), strict=True))
        numbers = [[float(value) for value in row] for row in rows]
        columns[drawn] = Column(drawn, numbers=tuple(math.fsum(row) / len(row) for row in numbers))
        columns["low"] = Column("low", numbers=tuple(map(min, numbers)))
        columns["high"] = Column("high", numbers=tuple(map(max, numbers)))
    return tuple(columns.values())


def _column(name: str, values: Sequence[float | str]) -> Column:
    if all(isinstance(value, (int, float)) for value in values):
        return Column(name, numbers=tuple(float(value) for value in values))
    return Column(name, labels=tuple(str(value) for value in values))


def _versions() -> dict[str, str]:
    installed = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module) is not None]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in installed}}
