"""Drift between the lessons and the package is caught, and `sync` mends what can be mended."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from minivlp.notebooks import files, sync

HOME = 3  # the cell of the good lesson that is the home of Halve


def add(lesson: NotebookNode, source: str, *names: str) -> NotebookNode:
    tags = [sync.DEFINES + name for name in names]
    lesson.cells.append(new_code_cell(source, metadata={"tags": tags} if tags else {}))
    return lesson.cells[-1]


def test_definitions_come_with_decorators_docstrings_and_their_comments(clone: Path) -> None:
    (clone / "minivlp" / "more.py").write_text(
        "import functools\n# far away\n\n# Close by.\n# Two lines.\n@functools.cache\ndef one() -> int:\n"
        '    """One."""\n    return 1  # a remark\n\n\nLIMIT: int = 3\n'
    )
    found = sync.definitions(clone)
    assert sorted(found) == [
        "minivlp.layers.HALF_TURN",
        "minivlp.layers.Halve",
        "minivlp.layers.double",
        "minivlp.more.LIMIT",
        "minivlp.more.one",
    ]
    assert found["minivlp.more.one"].text == (
        '# Close by.\n# Two lines.\n@functools.cache\ndef one() -> int:\n    """One."""\n    return 1  # a remark'
    )
    assert found["minivlp.layers.HALF_TURN"].text.startswith("# Half of a full turn")


def test_the_package_itself_can_be_read() -> None:
    assert "minivlp.setup" in sync.definitions()


def test_a_good_lesson_agrees(clone: Path, lesson: NotebookNode) -> None:
    assert sync.check(lesson, root=clone) == []
    assert sync.sync(lesson, root=clone) == []


@pytest.mark.parametrize(
    ("old", "new"), [("x / 2", "x * 2"), ("Halve a number", "Half"), ("x: float", "x"), ("Halve:", "Halve(object):")]
)
def test_a_changed_body_is_caught_and_mended(old: str, new: str, clone: Path, lesson: NotebookNode) -> None:
    lesson.cells[HOME].source = lesson.cells[HOME].source.replace(old, new)
    (problem,) = sync.check(lesson, root=clone)
    assert "differs from minivlp.layers.Halve" in problem and "make sync" in problem
    assert sync.sync(lesson, root=clone) == ["minivlp.layers.Halve"]
    assert sync.check(lesson, root=clone) == []


def test_a_change_in_the_module_is_caught_and_mended(clone: Path, lesson: NotebookNode) -> None:
    module = clone / "minivlp" / "layers.py"
    module.write_text(module.read_text().replace("x / 2", "0.5 * x"))
    assert "differs from minivlp.layers.Halve" in sync.check(lesson, root=clone)[0]
    sync.sync(lesson, root=clone)
    assert "0.5 * x" in lesson.cells[HOME].source
    assert sync.check(lesson, root=clone) == []


def test_layout_and_comments_are_no_drift(clone: Path, lesson: NotebookNode) -> None:
    lesson.cells[HOME].source = "# The layer.\n" + lesson.cells[HOME].source.replace("x / 2", "(x  /  2)")
    assert sync.check(lesson, root=clone) == []


def test_code_beside_the_definition_is_drift(clone: Path, lesson: NotebookNode) -> None:
    lesson.cells[HOME].source += "\n\nprint(Halve()(3))"
    assert "differs from" in sync.check(lesson, root=clone)[0]
    sync.sync(lesson, root=clone)
    assert "print" not in lesson.cells[HOME].source


def test_one_cell_can_be_home_to_several(clone: Path, lesson: NotebookNode) -> None:
    cell = add(lesson, "", "minivlp.layers.HALF_TURN", "minivlp.layers.double")
    assert "differs from minivlp.layers.HALF_TURN, minivlp.layers.double" in sync.check(lesson, root=clone)[0]
    sync.sync(lesson, root=clone)
    assert sync.check(lesson, root=clone) == []
    assert cell.source.index("HALF_TURN") < cell.source.index("# Not a layer") < cell.source.index("def double")


def test_an_orphan_tag_is_caught_and_left_alone(clone: Path, lesson: NotebookNode) -> None:
    for name in ("minivlp.layers.Third", "minivlp.gone.Halve", "minivlp.layers._private", "minivlp.layers"):
        add(lesson, "class Third:\n    pass", name)
        (problem,) = sync.check(lesson, root=clone)
        assert f"{name} names nothing" in problem
        assert sync.sync(lesson, root=clone) == []
        assert lesson.cells.pop().source == "class Third:\n    pass"


def test_a_home_must_be_code(clone: Path, lesson: NotebookNode) -> None:
    lesson.cells.append(new_markdown_cell("text", metadata={"tags": ["defines:minivlp.layers.double"]}))
    assert "only a code cell" in sync.check(lesson, root=clone)[0]


@pytest.mark.parametrize(
    "source",
    [
        "class Halve:\n    pass",
        "def Halve(x):\n    return x / 2",
        "async def double(x):\n    return x",
        "%time\nif True:\n    def double(x):\n        return x",
        "try:\n    pass\nexcept ValueError:\n    double = lambda x: x",
        "HALF_TURN = 3.14",
        "HALF_TURN: float = 3.14",
        "for _ in range(2):\n    class Halve: pass",
    ],
)
def test_an_untagged_redefinition_is_caught(source: str, clone: Path, lesson: NotebookNode) -> None:
    add(lesson, source)
    (problem,) = sync.check(lesson, root=clone)
    assert "is defined again, but it belongs to minivlp.layers." in problem


@pytest.mark.parametrize(
    "source",
    [
        "from minivlp.layers import Halve, double",
        "double = Halve()(3)",  # a variable holds a result
        "class HalveByHand:\n    def double(self):\n        HALF_TURN = 1\n        return HALF_TURN",
        "def by_hand():\n    def double(x):\n        return x\n    return double",
        "!ls\n%matplotlib inline\nHalve?",
    ],
)
def test_uses_and_drafts_are_free(source: str, clone: Path, lesson: NotebookNode) -> None:
    add(lesson, source)
    assert sync.check(lesson, root=clone) == []


def test_a_second_home_is_caught(lesson: NotebookNode) -> None:
    assert sync.check_homes({"01": lesson}) == []
    (problem,) = sync.check_homes({"01": lesson, "02": lesson})
    assert problem.startswith("minivlp.layers.Halve has two homes: 01 cell 3 and 02 cell 3")


def test_invalid_python_is_named(clone: Path, lesson: NotebookNode) -> None:
    add(lesson, "def broken(:")
    with pytest.raises(ValueError, match=r"not valid Python.*def broken"):
        sync.check(lesson, root=clone)


def test_the_written_file_stays_canonical(clone: Path, lesson: NotebookNode) -> None:
    lesson.cells[HOME].source = "class Halve: pass"
    sync.sync(lesson, root=clone)
    assert files.normalise(lesson) == lesson
