"""What is going on, on stderr and on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["advancing"]


@contextmanager
def advancing() -> Iterator[Callable[[str], None]]:
    """Yield what is to be called with a word for what is being done, after every batch."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} batches"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None)
            bar.advance(tasks[what])

        yield advance
