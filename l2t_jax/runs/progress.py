"""Progress of long work: a bar on a terminal, a line that changes in a notebook, plain lines elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0  # where standard error is no terminal
SECONDS_BETWEEN_CHANGES = 0.5  # of the line in a notebook


class RunProgress:
    """Rounds done over all runs of an experiment, with the time left at each method's own measured speed."""

    def __init__(self, rounds: dict[tuple[str, int], int], *, at_once: int = 1, quiet: bool = False) -> None:
        """Take the rounds of each (method, seed), in the order in which they will run, and how many run at once."""
        self._in_notebook = Console().is_jupyter
        # A notebook paints standard error as an error, and rich would show each line there as a block of its own.
        self.console = Console(stderr=not self._in_notebook, quiet=quiet, force_jupyter=False)
        self._cell: Any = None  # where the line in a notebook is
        self._done = dict.fromkeys(rounds, 0)
        self._rounds = rounds
        self._at_once = at_once
        self._seconds_per_round: dict[str, float] = {}
        self._compiled: set[str] = set()
        self._marks: dict[tuple[str, int], tuple[float, int]] = {}
        self._printed = time.monotonic()
        self._changed = -SECONDS_BETWEEN_CHANGES
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[note]}"))
        self._bar = (
            Progress(*columns, console=self.console, transient=True) if sys.stderr.isatty() and not quiet else None
        )
        self._task = self._bar.add_task("", total=sum(rounds.values()), note="compiling") if self._bar else None

    def __enter__(self) -> "RunProgress":
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def update(self, method: str, seed: int, done: int, error: float | None) -> None:
        """Note that a run has done so many rounds and its last validation error, None before there is one."""
        run, now = (method, seed), time.monotonic()
        if run in self._marks and done > self._marks[run][1]:
            then, before = self._marks[run]
            if method in self._compiled:
                self._seconds_per_round[method] = (now - then) / (done - before)
            self._compiled.add(method)  # a method's first rounds took as long as they did because it was compiled
        self._marks[run] = (now, done)
        self._done[run] = done
        shown = "compiling" if error is None else f"error {error:.3f}"  # short, so that 80 columns hold it all
        note = f"round {done}/{self._rounds[run]} {shown} {self._left()}"
        label = f"{method} seed {seed} ({list(self._done).index(run) + 1} of {len(self._done)})"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=sum(self._done.values()), description=label, note=note)
        elif self._in_notebook:
            if done == self._rounds[run] or now - self._changed >= SECONDS_BETWEEN_CHANGES:
                self._change(f"{label}: {note}")
                self._changed = now
        elif done == self._rounds[run] or now - self._printed >= SECONDS_BETWEEN_LINES:
            self.line(f"{label}: {note}")
            self._printed = now

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _change(self, text: str) -> None:
        """Write a notebook's line, over what it was: a carriage return would leave a line for each change."""
        if self.console.quiet:
            return
        from IPython.display import display  # there wherever this is a notebook

        line = {"text/plain": text}
        if self._cell is None:
            self._cell = display(line, raw=True, display_id=True)
        else:
            self._cell.update(line, raw=True)

    def end(self, method: str, seed: int) -> None:
        """Note that a run has ended, early or not."""
        self._done[(method, seed)] = self._rounds[(method, seed)]

    def _left(self) -> str:
        if not self._seconds_per_round:
            return ""
        slowest = max(self._seconds_per_round.values())  # of methods not met yet nothing is known: expect the worst
        left = sum(
            (self._rounds[run] - done) * self._seconds_per_round.get(run[0], slowest)
            for run, done in self._done.items()
        )
        left /= self._at_once
        return f"{int(left // 60)}:{int(left % 60):02d} left"


@contextlib.contextmanager
def logged(line: Callable[[str], None]) -> Iterator[None]:
    """Show what the library logs, each message once: the choice of a memory mode, images that are left out."""
    seen: set[str] = set()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message not in seen:
                seen.add(message)
                line(message)

    library, lines = logging.getLogger("l2t_jax"), Lines()
    before = library.level, library.propagate
    library.addHandler(lines)
    library.setLevel(logging.INFO)
    library.propagate = False  # the root logger's handlers would write into the progress bars
    try:
        yield
    finally:
        library.removeHandler(lines)
        library.setLevel(before[0])
        library.propagate = before[1]
