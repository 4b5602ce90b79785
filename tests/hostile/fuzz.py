"""`python -m tests.hostile.fuzz` damages honest files of every format and reads them: `make fuzz` reads 100,000.

A case is a sample and a seed. It ends in evidence, or in one BnlabError with one line that begins with the path. It
imports, calls and opens nothing that the file names, within two seconds and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tests.hostile.corpus import Sample, write_corpus
from tests.hostile.guard import Misdeed, TooSlow, guarded
from tests.hostile.mutations import mutated
from tests.samples import small_network
from torch import nn

from bnlab.errors import BnlabError

__all__ = ["REGRESSIONS", "End", "keep", "read", "read_kept", "run_case"]

SECONDS, MEGABYTES = 2.0, 300.0
REGRESSIONS = Path(__file__).with_name("regressions")
"""Damaged files that a reader once failed on, as :func:`keep` writes them."""


@dataclass(frozen=True)
class End:
    """How a case ended.

    Attributes:
        name: "read", the class of the error that refused the file, "crash", "misdeed" or "over budget".
        detail: What went wrong; empty where nothing did.
    """

    name: str
    detail: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether the reader broke a rule."""
        return self.name in ("crash", "misdeed", "over budget")


def run_case(sample: Sample, seed: int, folder: Path) -> End:
    """Damage a copy of a sample in `folder`, which is emptied, and read it."""
    warm_up(sample)
    damage(sample, seed, folder)
    return read(folder, sample.target)


@cache
def warm_up(sample: Sample) -> None:
    """Read an honest file and a wrong one, so that what the readers import themselves is there."""
    import rich.console  # noqa: F401 - draws a diagnosis

    with suppress(BnlabError), _silent():
        _use(sample.folder / sample.target if sample.target != "." else sample.folder)


def damage(sample: Sample, seed: int, folder: Path) -> None:
    """Write a damaged copy of a sample into an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sample.folder, folder)
    random = Random(f"{sample.name} {seed}")
    damaged = random.choice(sample.files).relative_to(sample.folder)
    (folder / damaged).write_bytes(mutated((folder / damaged).read_bytes(), random))


def keep(sample: Sample, seed: int, folder: Path) -> None:
    """Write a damaged copy of a sample into a folder of such files, as a folder of its own."""
    kept = folder / f"{sample.name.replace(' ', '_').replace(',', '')}-{seed}"
    damage(sample, seed, kept / "files")
    (kept / "target").write_text(sample.target)


def read_kept(kept: Path, folder: Path) -> End:
    """Read what :func:`keep` wrote, from a copy in `folder`, which is emptied."""
    target = (kept / "target").read_text()
    warm_up(Sample(kept.name, kept / "files", target))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept / "files", folder)
    return read(folder, target)


def read(folder: Path, target: str) -> End:
    """Read a file, or a folder, and load it into a model where that is possible; say how that ended."""
    path = folder / target if target != "." else folder
    end = _end_of(_use, path, folder)
    loaded = _end_of(_load, path, folder) if path.suffix in _LOADABLE and not end.is_failure else end
    return loaded if loaded.is_failure else end


_LOADABLE = (".pt", ".pth", ".bin", ".safetensors")


def _end_of(action: Callable[[Path], object], path: Path, folder: Path) -> End:
    try:
        with guarded(folder, SECONDS, MEGABYTES), _silent():
            action(path)
    except BnlabError as err:
        message = str(err)
        if "\n" in message or "\r" in message:
            return End("crash", f"several lines: {message[:300]!r}")
        if not message.startswith(str(folder)):
            return End("crash", f"the message does not begin with the path: {message[:300]}")
        return End(type(err).__name__)
    except Misdeed as misdeed:
        return End("misdeed", str(misdeed))
    except TooSlow as slow:
        return End("over budget", str(slow))
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        return End("crash", f"{type(err).__name__}: {str(err)[:200]} ({Path(where.filename).name}:{where.lineno})")
    return End("read")


def _load(path: Path) -> None:
    """Do what `bnlab check --model` does with a file."""
    from bnlab.observe.files.load import load_into

    load_into(_network(), path)


@cache
def _network() -> nn.Module:
    return small_network()


def _use(path: Path) -> None:
    """Do what `bnlab check` and `bnlab report` do with a file."""
    import bnlab

    if path.name == "record.json":
        from bnlab.cli.report import _text
        from bnlab.cli.saved_records import read_saved

        _text(read_saved(path))
        return
    diagnosis = bnlab.check(os.fspath(path))
    crashed = [outcome for outcome in diagnosis.outcomes if outcome.status == "crashed"]
    if crashed:
        raise RuntimeError(f"check crashed: {crashed[0].code}: {crashed[0].reason}")
    json.loads(diagnosis.dumps(), parse_constant=_refuse_constant)
    str(diagnosis)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} in JSON")


@contextmanager
def _silent() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def main() -> None:
    """Run the cases on several processes, and print how they end by format."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="formats whose name contains this text")
    parser.add_argument("--save", type=Path, default=REGRESSIONS, help="folder for the files that a reader fails on")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        samples = [sample for sample in write_corpus(Path(name, "corpus")) if options.only in sample.name]
        seeds = range(options.first, options.first + -(-options.cases // len(samples)))
        ends = Counter[tuple[str, str]]()
        failures = Counter[str]()
        for sample, seed, end in _all(samples, seeds, options.jobs):
            ends[sample.name, end.name] += 1
            if end.is_failure:
                _report(sample, seed, end, failures, options.save)
    print(_table(ends))
    total, bad = sum(ends.values()), sum(n for (_, name), n in ends.items() if End(name).is_failure)
    print(f"fuzz: {bad} of {total} damaged files end badly, in {time.monotonic() - start:.0f} s")
    raise SystemExit(bad > 0)


def _report(sample: Sample, seed: int, end: End, failures: Counter[str], folder: Path) -> None:
    """Print the first failures of a kind, and keep the file of the very first."""
    kind = f"{end.name} {end.detail.rpartition('(')[2]}" if end.name == "crash" else f"{sample.name} {end.name}"
    failures[kind] += 1
    if failures[kind] > 3:
        return
    print(f"{sample.name}, seed {seed}: {end.name}: {end.detail}", flush=True)
    if failures[kind] == 1:
        keep(sample, seed, folder)


_CHUNK = 250


def _all(samples: list[Sample], seeds: range, jobs: int) -> Iterator[tuple[Sample, int, End]]:
    chunks = [(sample, part) for part in _parts(seeds) for sample in samples]
    while chunks:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            pending = {pool.submit(_run_chunk, sample, part): (sample, part) for sample, part in chunks}
            try:
                for done in as_completed(pending):
                    sample, part = pending[done]
                    yield from ((sample, seed, end) for seed, end in zip(part, done.result(), strict=True))
                    chunks.remove((sample, part))
            except BrokenProcessPool:  # the next pool runs the chunk again, in smaller parts
                yield from _broken(chunks)


def _broken(chunks: list[tuple[Sample, range]]) -> Iterator[tuple[Sample, int, End]]:
    """Split the chunks that may have killed a process, until one seed is alone."""
    for sample, part in list(chunks[:4]):
        chunks.remove((sample, part))
        if len(part) == 1:
            yield sample, part[0], End("crash", "the process died (0)")
        else:
            middle = len(part) // 2
            chunks[:0] = [(sample, part[:middle]), (sample, part[middle:])]


def _parts(seeds: range) -> Iterable[range]:
    return [seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)]


def _run_chunk(sample: Sample, seeds: range) -> list[End]:
    return [run_case(sample, seed, _own_folder() / "case") for seed in seeds]


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bnlab-fuzz-"))


def _table(ends: Counter[tuple[str, str]]) -> str:
    columns = sorted({end for _, end in ends}, key=lambda name: (End(name).is_failure, name != "read", name))
    rows = [
        f"| {name} | " + " | ".join(str(ends[name, column] or "") for column in columns) + " |"
        for name in dict.fromkeys(name for name, _ in ends)
    ]
    totals = [str(sum(n for (_, end), n in ends.items() if end == column)) for column in columns]
    return "\n".join(
        [
            f"| format | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
            *rows,
            f"| all | {' | '.join(totals)} |",
        ]
    )


if __name__ == "__main__":
    main()
