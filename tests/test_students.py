"""Student editions hold no solutions and can be marked."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from minivlp.notebooks import files, links, students

pytest.importorskip("nbgrader")

EXERCISE, CHECK = 9, 10


def runnable(lesson: NotebookNode) -> NotebookNode:
    """The good lesson with cells that run in any kernel: the guards do not mind, the tests here execute it."""
    lesson.cells[1].source = "first = 1"
    lesson.cells[5].source = "shown = True"
    second = "def fourth(x):\n    ### BEGIN SOLUTION\n    return x / 4\n    ### END SOLUTION"
    check = "assert fourth(8) == 2, 'fourth(8) must be 2'"
    lesson.cells += [
        new_code_cell(second, metadata=students.solution_metadata("tiny-2")),
        new_code_cell(check, metadata=students.check_metadata("tiny-2-check", points=3)),
    ]
    return lesson


@pytest.fixture
def solved(clone: Path, lesson: NotebookNode) -> Path:
    path = clone / "notebooks" / "01_tiny.ipynb"
    files.write(runnable(lesson), path)
    return path


def test_an_edition_holds_no_solution_and_no_output_that_shows_one(solved: Path) -> None:
    (path,) = students.write_student_editions([solved], target=solved.parent / "students")
    text, notebook = path.read_text(encoding="utf-8"), files.read(path)
    for secret in ("x / 3", "x / 4", "SOLUTION", "colab.research", "mybinder"):
        assert secret not in text
    exercise = notebook.cells[EXERCISE]
    assert exercise.source == "def third(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert "jupyter" not in exercise.metadata  # unfolded, so that students see where to write
    assert all(not cell.outputs for cell in notebook.cells[EXERCISE:] if cell.cell_type == "code")
    assert notebook.cells[4].outputs  # the lesson before the exercises is still there to read
    assert notebook.cells[0].source == "# 01 · Tiny: a lesson\n\nSee [halving](#Halving)."
    assert notebook.cells[CHECK].metadata.editable is False
    assert "x / 3" in solved.read_text(encoding="utf-8")


def test_nbgrader_accepts_the_metadata(solved: Path) -> None:
    from nbgrader.nbgraderformat import MetadataValidator

    for notebook in (files.read(solved), students.student_edition(files.read(solved))):
        MetadataValidator().validate_nb(notebook)
        nbformat.validate(notebook)


def test_hidden_tests_are_taken_out_and_come_back_for_marking(solved: Path) -> None:
    lesson = files.read(solved)
    lesson.cells[CHECK].source += "\n### BEGIN HIDDEN TESTS\nassert third(3) == 1\n### END HIDDEN TESTS"
    edition = students.student_edition(lesson)
    assert "third(3)" not in edition.cells[CHECK].source
    assert "third(3)" in students.restore_checks(edition, lesson).cells[CHECK].source


@pytest.mark.parametrize(
    "spoil",
    [
        lambda nb: nb.cells[4].update(source="### BEGIN SOLUTION\n1\n### END SOLUTION"),
        lambda nb: nb.cells[EXERCISE].update(source="### BEGIN SOLUTION\n1"),
        lambda nb: nb.cells[CHECK].metadata.nbgrader.update(grade_id="tiny-1"),
        lambda nb: nb.cells[CHECK].metadata.nbgrader.pop("points"),
    ],
    ids=["outside an exercise", "not closed", "grade_id twice", "no points"],
)
def test_a_lesson_that_would_leak_or_not_be_markable_is_refused(
    spoil: Callable[[NotebookNode], object], solved: Path
) -> None:
    lesson = files.read(solved)
    spoil(lesson)
    with pytest.raises(Exception, match=r"olution|grade|validate"):
        students.student_edition(lesson)


def submit(notebook: NotebookNode, folder: Path) -> Path:
    path = folder / "ann" / "01_tiny.ipynb"
    files.write(notebook, path)
    return path


def points(marks: list[students.Mark]) -> dict[str, float]:
    return {mark.check: mark.points for mark in marks}


def test_the_solved_lesson_gets_all_points_and_the_empty_edition_none(solved: Path, tmp_path: Path) -> None:
    full = students.mark(solved, solved)
    assert points(full) == {"tiny-1-check": 2.0, "tiny-2-check": 3.0} and not any(mark.error for mark in full)
    empty = students.mark(submit(students.student_edition(files.read(solved)), tmp_path), solved)
    assert points(empty) == {"tiny-1-check": 0.0, "tiny-2-check": 0.0}
    assert all(mark.possible > 0 and "NotImplementedError" in mark.error for mark in empty)
    assert empty[0].submission == "ann/01_tiny" and empty[0].lesson == "01_tiny"


def test_one_right_one_wrong_and_tampered_checks(solved: Path, tmp_path: Path) -> None:
    handed_in = students.student_edition(files.read(solved))
    handed_in.cells[EXERCISE].source = "def third(x):\n    return x / 3.0"
    handed_in.cells[EXERCISE + 2].source = "def fourth(x):\n    return x"
    handed_in.cells[EXERCISE + 3].source = "assert True"  # the check made easy
    handed_in.cells[EXERCISE + 3].metadata["tags"] = ["raises-exception"]
    handed_in.cells.append({**handed_in.cells[CHECK], "id": "again"})  # a check that is passed, twice
    handed_in.cells.insert(2, new_code_cell("my_own = 'notes'"))
    path = submit(nbformat.from_dict(handed_in), tmp_path)
    before = path.read_bytes()
    marks = students.mark(path, solved)
    assert points(marks) == {"tiny-1-check": 2.0, "tiny-2-check": 0.0} and len(marks) == 2
    assert "fourth(8) must be 2" in marks[1].error
    assert path.read_bytes() == before

    students.write_marks(marks, tmp_path / "build" / "marks.csv")
    rows = list(csv.DictReader((tmp_path / "build" / "marks.csv").open(encoding="utf-8")))
    assert [(row["check"], row["points"], row["possible"]) for row in rows] == [
        ("tiny-1-check", "2.0", "2.0"),
        ("tiny-2-check", "0.0", "3.0"),
    ]


def test_deleted_checks_come_back_in_their_place(solved: Path) -> None:
    lesson = files.read(solved)
    handed_in = students.student_edition(lesson)
    for index in (CHECK + 2, CHECK):
        handed_in.cells.pop(index)
    restored = students.restore_checks(handed_in, lesson)
    assert [cell.source for cell in restored.cells][CHECK] == lesson.cells[CHECK].source
    handed_in.cells = handed_in.cells[:EXERCISE]
    ends = [cell.metadata.nbgrader.grade_id for cell in students.restore_checks(handed_in, lesson).cells[EXERCISE:]]
    assert ends == ["tiny-1-check", "tiny-2-check"]


def test_a_kernel_that_dies_leaves_the_rest_without_points(solved: Path, tmp_path: Path) -> None:
    handed_in = files.read(solved)
    handed_in.cells[EXERCISE + 2].source = "import os\nos._exit(1)"
    marks = students.mark(submit(handed_in, tmp_path), solved)
    assert points(marks) == {"tiny-1-check": 2.0, "tiny-2-check": 0.0}
    assert marks[1].error == "The cell never ran."


def test_a_cell_that_hangs_costs_its_own_points_only(solved: Path, tmp_path: Path) -> None:
    handed_in = files.read(solved)
    handed_in.cells[EXERCISE].source = "while True:\n    pass"
    marks = students.mark(submit(handed_in, tmp_path), solved, timeout=2)
    assert points(marks) == {"tiny-1-check": 0.0, "tiny-2-check": 3.0}


def test_the_lesson_is_found_by_the_files_name(tmp_path: Path) -> None:
    known = [Path("01_vit.ipynb"), Path("02_clip.ipynb")]
    assert students.lesson_of(Path("ben/ann_02_clip (1).ipynb"), known) == known[1]
    with pytest.raises(ValueError, match="must contain one of 01_vit, 02_clip"):
        students.lesson_of(Path("homework.ipynb"), known)


def test_the_good_lessons_badges_are_what_is_removed(solved: Path) -> None:
    assert any(links.is_badge_line(line) for line in files.read(solved).cells[0].source.split("\n"))
