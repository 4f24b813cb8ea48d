"""Run lessons: as a reader would, with live progress (`run_lessons`), or in place (`execute_in_place`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import ipykernel.kernelspec
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from minivlp.notebooks import BUILD, files

HEADLINE = "headline"  # tag of the cell whose printed text sums a lesson up
CELL_TIMEOUT = 1800  # seconds; far above any cell of the course, so that a hang ends all the same


class LessonError(Exception):
    """A cell failed. The text names the lesson, the cell and the error, and says how to look at it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one lesson: `error` is empty when all went well."""

    name: str
    seconds: float
    headline: str = ""
    error: str = ""


class _ThisPython(KernelSpecManager):
    """Kernels run on the interpreter that runs this, whatever kernels the user has installed elsewhere."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **ipykernel.kernelspec.get_kernel_dict())


class Progress:
    """One line that tells where a lesson stands. On a terminal it is redrawn each second, else it is printed once per
    section, so that a log stays short."""

    def __init__(self, name: str, cells: int, *, stream: TextIO | None = None) -> None:
        self.name, self.cells = name, cells
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.cell, self.heading, self.tail = 0, "", ""
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True) if self.live else None

    def __enter__(self) -> Progress:
        if self._ticker:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._ticker:
            self._ticker.join()
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def at(self, cell: int, heading: str) -> None:
        """The code cell `cell` (counted from 1) under `heading` starts now."""
        new_section = heading != self.heading
        self.cell, self.heading, self.tail = cell, heading, ""
        if self.live:
            self._draw()
        elif new_section:
            print(self._line(), file=self.stream, flush=True)

    def says(self, text: str) -> None:
        """Remember the last line that the running cell printed."""
        last = [piece.strip() for piece in text.replace("\r", "\n").split("\n") if piece.strip()]
        if last:
            self.tail = last[-1]

    def _line(self) -> str:
        parts = [f"cell {self.cell}/{self.cells}", clock(self.seconds), self.heading, self.tail if self.live else ""]
        return f"{self.name}  " + " · ".join(part for part in parts if part)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[K" + self._line()[:width])
        self.stream.flush()

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            self._draw()


class _Client(NotebookClient):
    """nbclient, with the running cell's printed text passed on to the progress line."""

    progress: Progress | None = None

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        if self.progress is not None and msg["msg_type"] == "stream":
            self.progress.says(msg["content"]["text"])
        return super().process_message(msg, cell, cell_index)


def clock(seconds: float) -> str:
    """`7 s` or `2 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def execute(
    notebook: NotebookNode,
    *,
    name: str,
    folder: Path,
    progress: Progress | None = None,
    timeout: float | None = CELL_TIMEOUT,
    keep_going: bool = False,
) -> None:
    """Run all cells of `notebook` (in place) in a fresh kernel that works in `folder`.

    `keep_going` stores errors as outputs and goes on, as marking needs; otherwise the first error stops the run.
    Raises LessonError on a failing, hanging or crashing cell; KeyboardInterrupt passes after the kernel is shut down.
    """
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = _Client(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_ThisPython()),
        timeout=None if timeout is None else int(timeout),
        allow_errors=keep_going,
        interrupt_on_timeout=keep_going,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.progress = progress
    heading = ""
    # What the kernel process itself writes to the terminal (remarks on start-up and on being stopped) is no output of
    # the lesson and would tear the progress line; what cells write arrives as messages.
    with client.setup_kernel(cleanup_kc=True, stderr=subprocess.DEVNULL):
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "markdown":
                heading = _heading(cell.source) or heading
            if index not in code:
                continue
            number = code.index(index) + 1
            if progress is not None:
                progress.at(number, heading)
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                reason = f"{error.ename}: {error.evalue}"
            except CellTimeoutError:
                reason = f"it ran for more than {timeout} seconds"
            except DeadKernelError:
                reason = "the kernel died, most often because memory ran out"
            else:
                continue
            raise LessonError(_failure(name, number, len(code), heading, cell, reason))


def _heading(markdown: str) -> str:
    """The last heading in a markdown cell, without its marks; empty when there is none."""
    found = [line.lstrip("#").strip() for line in markdown.splitlines() if line.startswith("#")]
    return found[-1] if found else ""


def _failure(name: str, number: int, cells: int, heading: str, cell: NotebookNode, reason: str) -> str:
    head = cell.source.splitlines()[:6]
    more = ["..."] if len(cell.source.splitlines()) > len(head) else []
    where = f'{name}: cell {number} of {cells} failed, under "{heading}".'
    return "\n".join([where, *(f"    | {line}" for line in head + more), f"    {reason}"])


def headline(notebook: NotebookNode) -> str:
    """The text printed by the cell tagged `headline`, on one line; empty when there is none."""
    for cell in notebook.cells:
        if HEADLINE in files.tags(cell):
            text = "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")
            return " ".join(text.split())
    return ""


def run_lessons(paths: list[Path], *, target: Path = BUILD) -> list[Outcome]:
    """Run each lesson top to bottom and write the executed copies to `target`; the lessons themselves stay untouched.

    A failing lesson is reported, its copy is kept up to the failing cell, and the next lesson goes on.
    """
    outcomes = []
    for path in paths:
        notebook = files.read(path)
        error = ""
        with Progress(path.stem, _code_cells(notebook)) as progress:
            try:
                execute(notebook, name=path.stem, folder=path.parent, progress=progress)
            except LessonError as problem:
                error = str(problem)
            outcome = Outcome(path.stem, progress.seconds, headline(notebook), error)
        outcomes.append(outcome)
        files.write(files.normalise(notebook), target / path.name)
        _report(outcome, target / path.name)
    return outcomes


def _report(outcome: Outcome, copy: Path) -> None:
    if outcome.error:
        print(f"{outcome.error}\n{outcome.name}  FAILED after {clock(outcome.seconds)} · {_short(copy)}", flush=True)
    else:
        print(f"{outcome.name}  done in {clock(outcome.seconds)} · {outcome.headline or 'no headline'}", flush=True)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _code_cells(notebook: NotebookNode) -> int:
    return sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)


def execute_in_place(path: Path) -> bool:
    """Execute a lesson and store it with its new outputs in canonical form; say whether its bytes changed.

    Raises LessonError when a cell fails; then the file stays as it was.
    """
    before = path.read_bytes()
    notebook = files.normalise(files.read(path))
    with Progress(path.stem, _code_cells(notebook)) as progress:
        execute(notebook, name=path.stem, folder=path.parent, progress=progress)
    files.write(files.normalise(notebook), path)
    return path.read_bytes() != before
