"""Hand exercises out and mark what comes back, with nbgrader's own preprocessors.

A lesson is committed with its solutions. `student_edition` takes them out; `mark` runs a handed-in copy with the
lesson's own checks put back over whatever the student made of them, and counts the points of the checks that pass.
Marking runs the student's code on your machine: use an account or container you can spare.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import re
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from minivlp.notebooks import BUILD, files, links
from minivlp.notebooks.execute import LessonError, Progress, execute

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
META_KEYS = ("grade", "grade_id", "locked", "schema_version", "solution", "task")
MARK_TIMEOUT = 600  # seconds a single cell of a submission may take


@dataclass(frozen=True)
class Mark:
    """The result of one check of one submission; `error` is what went wrong, empty if it passed."""

    submission: str
    lesson: str
    check: str
    points: float
    possible: float
    error: str


def solution_metadata(grade_id: str) -> dict:
    """Cell metadata of an exercise that students fill in."""
    return {"nbgrader": _nbgrader(grade_id, grade=False, locked=False, solution=True)}


def check_metadata(grade_id: str, *, points: int) -> dict:
    """Cell metadata of the locked cell that checks an exercise and gives `points` when it raises nothing."""
    return {"nbgrader": {**_nbgrader(grade_id, grade=True, locked=True, solution=False), "points": points}}


def _nbgrader(grade_id: str, *, grade: bool, locked: bool, solution: bool) -> dict:
    flags = {"grade": grade, "locked": locked, "solution": solution, "task": False}
    return {"grade_id": grade_id, "schema_version": 3, **flags}


def _is(cell: NotebookNode, flag: str) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get(flag))


def _grade_id(cell: NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def student_edition(notebook: NotebookNode) -> NotebookNode:
    """A copy of a solved lesson for students: no solutions, no outputs from the first exercise on, no badges.

    Badges would lead to the solved lesson. Raises ModuleNotFoundError without nbgrader, and nbgrader's own errors when
    a solution stands in a cell that is not marked as one, is not closed, or when the metadata is invalid.
    """
    try:
        from nbgrader import preprocessors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Student editions need nbgrader: pip install -e '.[teachers]'.") from error

    notebook = files.normalise(copy.deepcopy(notebook))
    steps = ("LockCells", "ClearSolutions", "CheckCellMetadata", "ClearHiddenTests", "ClearMarkScheme")
    for step in (*steps, "ComputeChecksums", "CheckCellMetadata"):
        notebook, _ = getattr(preprocessors, step)().preprocess(notebook, {})

    reached = False
    for cell in notebook.cells:
        reached = reached or _is(cell, "solution")
        if reached and cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if _is(cell, "solution"):  # a folded solution is a courtesy to readers; students must see where to write
            cell.metadata.pop("jupyter", None)
            cell.metadata.pop("cellView", None)
    title = notebook.cells[0]
    title.source = "\n".join(line for line in title.source.split("\n") if not links.is_badge_line(line))
    title.source = re.sub(r"\n{3,}", "\n\n", title.source).rstrip()
    return notebook


def write_student_editions(paths: list[Path], *, target: Path = BUILD / "students") -> list[Path]:
    """Write the student editions of the lessons at `paths` into `target` and return their paths."""
    written = []
    for path in paths:
        files.write(student_edition(files.read(path)), target / path.name)
        written.append(target / path.name)
    return written


def restore_checks(submission: NotebookNode, lesson: NotebookNode) -> NotebookNode:
    """A copy of `submission` in which every locked cell is the lesson's own again.

    A check that was deleted comes back behind the exercise it follows in the lesson, or at the end when that is gone
    too; the setup cell is restored as well. What the student wrote elsewhere stays.
    """
    submission = copy.deepcopy(submission)
    originals = {_grade_id(cell): cell for cell in lesson.cells if _is(cell, "locked") or _is(cell, "grade")}
    kept, seen = [], set()
    for cell in submission.cells:
        tags = [tag for tag in files.tags(cell) if tag not in ("raises-exception", "skip-execution")]
        if "tags" in cell.metadata:
            cell.metadata["tags"] = tags
        name = _grade_id(cell)
        if name in originals:
            if name in seen:  # a second copy of a check would count twice
                continue
            cell = copy.deepcopy(originals[name])
            seen.add(name)
        kept.append(cell)
    submission.cells = kept

    before = ""
    for cell in lesson.cells:
        name = _grade_id(cell)
        if name in originals and name not in seen:
            places = [i for i, other in enumerate(submission.cells) if before and _grade_id(other) == before]
            submission.cells.insert(places[0] + 1 if places else len(submission.cells), copy.deepcopy(cell))
        before = name or before
    return submission


def mark(path: Path, lesson: Path, *, timeout: float = MARK_TIMEOUT) -> list[Mark]:
    """Run the submission at `path` with the lesson's checks; one Mark per check. The submission is not changed.

    Raises ValueError when the file is no notebook.
    """
    notebook = restore_checks(files.read(path), files.read(lesson))
    name = f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem
    code = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    # A kernel that dies ends the run; the checks that it did not reach give no points.
    with Progress(name, code) as progress, contextlib.suppress(LessonError):
        execute(notebook, name=name, folder=lesson.parent, progress=progress, timeout=timeout, keep_going=True)
    marks = []
    for cell in notebook.cells:
        if _is(cell, "grade"):
            possible = float(cell.metadata["nbgrader"]["points"])
            errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
            ran = cell.execution_count is not None
            error = errors[0].splitlines()[0].rstrip(": ") if errors else "" if ran else "The cell never ran."
            marks.append(Mark(name, lesson.stem, _grade_id(cell), 0.0 if error else possible, possible, error))
    return marks


def lesson_of(path: Path, lessons: list[Path]) -> Path:
    """The lesson that a handed-in file belongs to, by the name of the file (`01_vit.ipynb`, `ann_01_vit.ipynb`).

    Raises ValueError when no lesson's name is part of it.
    """
    for lesson in lessons:
        if lesson.stem in path.stem:
            return lesson
    known = ", ".join(lesson.stem for lesson in lessons)
    raise ValueError(f"{path} does not say which lesson it is: its name must contain one of {known}.")


def write_marks(marks: list[Mark], target: Path) -> None:
    """Store marks as CSV, one check per row."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["submission", "lesson", "check", "points", "possible", "error"])
        table.writerows([m.submission, m.lesson, m.check, m.points, m.possible, m.error] for m in marks)
