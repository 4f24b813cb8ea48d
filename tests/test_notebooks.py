"""Every committed lesson satisfies every guard, and the lessons agree with the package and with each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from minivlp.notebooks import LESSONS, ROOT, files, guards, links, sync

PATHS = sorted(LESSONS.glob("*.ipynb"))


def test_there_are_lessons() -> None:
    # A parametrised test over an empty folder passes without having looked at anything.
    assert PATHS, f"no notebook in {LESSONS}"


def test_names_follow_the_convention() -> None:
    assert [path.name for path in PATHS] == [path.name for path in sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_guards(path: Path) -> None:
    assert guards.check(path) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_lessons_do_not_import_transformers(path: Path) -> None:
    for cell in files.read(path).cells:
        if cell.cell_type == "code":
            nodes = list(ast.walk(sync.parse(cell.source)))
            names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            assert not [name for name in names if name.split(".")[0] == "transformers"]


def test_each_definition_has_one_home() -> None:
    assert sync.check_homes({path.stem: files.read(path) for path in PATHS}) == []


def test_setup_cells_are_identical() -> None:
    assert len({files.read(path).cells[1].source for path in PATHS}) == 1


def test_badges_and_links_lead_to_the_address_in_pyproject() -> None:
    assert links.link_all(ROOT, dry=True) == []
