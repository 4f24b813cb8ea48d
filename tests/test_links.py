"""Badges and setup cells follow pyproject.toml, and the setup cell does what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minivlp.notebooks import files, guards, links

README = """# Course
[![Open in Colab](x.svg)](https://colab.research.google.com/github/minivlp/minivlp/blob/main/notebooks/01_tiny.ipynb)
[binder](https://mybinder.org/v2/gh/minivlp/minivlp/main?labpath=notebooks%2F01_tiny.ipynb)
[file](https://github.com/minivlp/minivlp/blob/main/notebooks/01_tiny.ipynb)
![map](https://raw.githubusercontent.com/minivlp/minivlp/main/map.png)
[other](https://github.com/google-research/vision_transformer/blob/main/README.md)
[cousin](https://github.com/minivlp/minivlp-extras)

    git clone https://github.com/minivlp/minivlp.git
"""


def move(clone: Path, *, slug: str = "ann/course", ref: str = "v2") -> None:
    """Do what a teacher does with a fork: change the address in pyproject.toml."""
    path = clone / "pyproject.toml"
    text = path.read_text(encoding="utf-8").replace("https://github.com/minivlp/minivlp", f"https://github.com/{slug}")
    path.write_text(text.replace('ref = "main"', f'ref = "{ref}"'), encoding="utf-8")


def test_nothing_changes_without_a_reason(clone: Path) -> None:
    (clone / "README.md").write_text(README, encoding="utf-8")
    assert links.link_all(clone) == []


def test_a_fork_moves_everything_but_other_peoples_links(clone: Path) -> None:
    lesson = clone / "notebooks" / "01_tiny.ipynb"
    notebook = files.read(lesson)
    notebook.cells[2].source += " [see](https://github.com/minivlp/minivlp/tree/main/data)"
    files.write(notebook, lesson)
    (clone / "README.md").write_text(README, encoding="utf-8")
    move(clone)
    assert any("badges" in problem for problem in guards.check(lesson, root=clone))
    assert len(links.link_all(clone, dry=True)) == 2
    assert (clone / "README.md").read_text(encoding="utf-8") == README  # dry

    links.link_all(clone)
    readme, text = (clone / "README.md").read_text(encoding="utf-8"), lesson.read_text(encoding="utf-8")
    for page in (readme, text):
        assert "minivlp/minivlp/" not in page and "minivlp/minivlp." not in page
        assert "colab.research.google.com/github/ann/course/blob/v2/notebooks/01_tiny.ipynb" in page
        assert "mybinder.org/v2/gh/ann/course/v2?labpath=notebooks%2F01_tiny.ipynb" in page
    assert "git clone https://github.com/ann/course.git" in readme
    assert "github.com/google-research/vision_transformer/blob/main/README.md" in readme
    assert "github.com/minivlp/minivlp-extras" in readme
    assert "raw.githubusercontent.com/ann/course/v2/map.png" in readme
    assert "https://github.com/ann/course/tree/v2/data" in text
    assert "--branch v2 https://github.com/ann/course " in text
    assert links.link_all(clone) == []
    assert guards.check(lesson, root=clone) == []


def test_missing_badges_and_setup_cell_are_put_in(clone: Path) -> None:
    bare = new_notebook(cells=[new_markdown_cell("# 02 · Bare\nIntro."), new_code_cell("1")])
    where = links.address(clone)
    assert links.link_notebook(bare, "02_bare.ipynb", where) == ["badges", "setup cell"]
    assert bare.cells[0].source == f"# 02 · Bare\n\n{links.badges(where, '02_bare.ipynb')}\n\nIntro."
    assert guards.setup(bare, where) == [] and guards.badges(bare, "02_bare.ipynb", where) == []
    assert links.link_notebook(bare, "02_bare.ipynb", where) == []


def test_a_lesson_without_a_title_is_refused(clone: Path, lesson: NotebookNode) -> None:
    lesson.cells.pop(0)
    with pytest.raises(ValueError, match="cell 0 must be markdown"):
        links.link_notebook(lesson, "01_tiny.ipynb", links.address(clone))


@pytest.mark.parametrize("slug", ["", "ann", "ann/course/tree/main"])
def test_an_unfit_address_is_refused(slug: str, clone: Path) -> None:
    move(clone, slug=slug)
    with pytest.raises(ValueError, match=r"must be https://github\.com/OWNER/NAME"):
        links.address(clone)


def test_an_unfit_ref_is_refused(clone: Path) -> None:
    move(clone, ref="feature/x")
    with pytest.raises(ValueError, match="without slashes"):
        links.address(clone)


@pytest.mark.parametrize("ending", ["", "/", ".git"])
def test_addresses_may_end_as_github_shows_them(ending: str, clone: Path) -> None:
    move(clone, slug=f"ann/course{ending}")
    assert links.address(clone) == links.Address("ann/course", "v2")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


PROBE = "\nimport minivlp as _m; print('SETUP', device, _m.__file__)"
STUB = "def setup(seed=0):\n    return f'device of seed {seed}'\n"


def run_setup(cell: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a setup cell as a bare Python without any installed package; `pip` is a stub that notes its arguments."""
    (folder / "pip.py").write_text("import pathlib, sys\npathlib.Path('pip.log').write_text(' '.join(sys.argv[1:]))\n")
    arguments = [sys.executable, "-S", "-E", "-c", cell + PROBE]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=60)


def setup_cell(origin: Path, ref: str = "main") -> str:
    """The setup cell with a folder on this machine in the place of the public address."""
    cell = links.setup_source(links.Address("ann/course", ref))
    assert cell.count("https://github.com/ann/course") == 1
    return cell.replace("https://github.com/ann/course", origin.as_uri())


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository with a branch `main` and a tag `v2`, each with its own `setup`."""
    folder = tmp_path / "origin"
    (folder / "minivlp").mkdir(parents=True)
    (folder / "minivlp" / "__init__.py").write_text(STUB)
    git(folder, "init", "-q", "-b", "main")
    for name in ("v2", "v3"):
        (folder / "minivlp" / "__init__.py").write_text(STUB + f"VERSION = {name!r}\n")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)
    return folder


def test_setup_does_nothing_where_the_package_is_importable(tmp_path: Path) -> None:
    (tmp_path / "minivlp").mkdir()
    (tmp_path / "minivlp" / "__init__.py").write_text(STUB)
    done = run_setup(setup_cell(tmp_path / "nowhere"), tmp_path)
    assert "SETUP device of seed 0" in done.stdout, done.stderr
    assert not (tmp_path / "pip.log").exists() and not (tmp_path / links.CLONE).exists()


def test_setup_uses_the_clone_that_the_notebook_was_opened_from(tmp_path: Path, origin: Path) -> None:
    (origin / "notebooks").mkdir()
    done = run_setup(setup_cell(tmp_path / "nowhere"), origin / "notebooks")
    assert str(origin / "minivlp") in done.stdout, done.stderr
    assert not (origin / "notebooks" / "pip.log").exists()


def test_setup_clones_the_notebooks_own_ref_and_installs_from_it(tmp_path: Path, origin: Path) -> None:
    colab = tmp_path / "a b" / "content"  # a space, as in many a home folder
    colab.mkdir(parents=True)
    done = run_setup(setup_cell(origin, "v2"), colab)
    assert f"SETUP device of seed 0 {colab / links.CLONE / 'minivlp'}" in done.stdout, done.stderr
    assert "VERSION = 'v2'" in (colab / links.CLONE / "minivlp" / "__init__.py").read_text()
    assert re.search(r"install -q -e .*minivlp-lessons$", (colab / "pip.log").read_text())

    (colab / links.CLONE / "mine.txt").write_text("kept")  # a restarted runtime uses the clone again
    assert "SETUP" in run_setup(setup_cell(tmp_path / "nowhere"), colab).stdout
    assert (colab / links.CLONE / "mine.txt").exists()


def test_setup_says_what_to_do_when_the_clone_fails(tmp_path: Path) -> None:
    folder = tmp_path / "content"
    folder.mkdir()
    done = run_setup(setup_cell(tmp_path / "nowhere"), folder)
    assert done.returncode and "Check git and the network, then run this cell again." in done.stderr
    assert not (folder / links.CLONE).exists()
