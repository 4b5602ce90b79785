"""The public functions of `bnlab.lab`: list, run and records."""

from __future__ import annotations

import builtins
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.atomic_file import write_whole
from bnlab.errors import UnwritableFile, UsageError
from bnlab.lab.catalog import EXPERIMENTS, by_name
from bnlab.lab.experiment import Experiment
from bnlab.lab.runner import Run, read_record, saved
from bnlab.records import ExperimentRecord
from bnlab.wording import reason_of

__all__ = ["Result", "list", "records", "run"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(ExperimentRecord):
    """The result of `bnlab.lab.run`: a record that prints as a report and draws itself in a notebook."""

    def __repr__(self) -> str:
        """Return one line."""
        verdicts = ", ".join(f"{claim.key} {claim.verdict.value}" for claim in self.claims)
        return f"<Result of {self.name!r}: {verdicts}>"

    def __str__(self) -> str:
        """Return the claims, the verdicts and the decisive numbers as text."""
        from bnlab.report.text.experiment import render

        return render(self)

    def _repr_html_(self) -> str:
        """Return a compact view for a notebook: the claims with their verdicts, and the figure."""
        from bnlab.report.html import experiments

        return experiments.compact(self)


def list() -> builtins.list[str]:
    """Return the names of all experiments.

    Example:
        >>> import bnlab
        >>> "train-eval" in bnlab.lab.list()
        True
    """
    return [experiment.name for experiment in EXPERIMENTS]


def run(
    experiment: str | Experiment[Any],
    *,
    full: bool = False,
    seeds: int = 3,
    data_dir: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    again: bool = False,
    advance: Callable[[float], None] = lambda _: None,
    **settings: object,
) -> Result:
    """Run an experiment with several seeds and judge its claims.

    On one machine the same settings and seeds give the same numbers.

    Args:
        experiment: The name of an experiment, or an experiment of your own.
        full: Whether to use settings of the size of the source instead of the quick ones.
        seeds: The number of seeds, which count from 0; at least 3.
        data_dir: The folder with data sets, instead of `$BNLAB_DATA`.
        folder: The folder in which records are stored as JSON. If it has a record of these settings, seeds and code,
            `run` returns that record at once. With None, no record is stored.
        again: Whether to run the experiment although its record is stored.
        advance: A function that is called with the finished share, 0 to 1.
        settings: Settings that replace those of the profile.

    Returns:
        The record, which draws itself in a notebook.

    Raises:
        UsageError: If there is no such experiment or setting, or there are fewer than 3 seeds.
        UnwritableFile: If the record cannot be written.

    Example:
        >>> import bnlab
        >>> result = bnlab.lab.run("train-eval", batches=(2, 8), updates=(1, 1000))
        >>> [(claim.key, claim.verdict.value) for claim in result.claims]
        [('differs', 'supported'), ('bessel', 'supported'), ('momentum', 'refuted')]
    """
    chosen = experiment if isinstance(experiment, Experiment) else by_name(experiment)
    planned = Run.of(chosen, full=full, seeds=seeds, data_dir=data_dir, settings=settings)
    path = None if folder is None else planned.path(_existing(Path(folder)))
    if path is not None and path.exists() and not again:
        kept = read_record(path)
        if kept is not None and kept.key == planned.key:
            return _result(kept)
    record = planned.record(advance=advance)
    if path is not None:
        write_whole(f"{record.dumps(indent=1)}\n".encode(), path)
    return _result(record)


def records(folder: str | os.PathLike[str]) -> builtins.list[ExperimentRecord]:
    """Return the records that are stored in a folder.

    Raises:
        UsageError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"records: folder must exist, got {os.fspath(folder)}.")
    return saved(Path(folder))


def _result(record: ExperimentRecord) -> Result:
    return Result(**{field.name: getattr(record, field.name) for field in dataclasses.fields(record)})


def _existing(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableFile(f"{folder}: folder must be writable, got: {reason_of(error)}.") from None
    return folder
