"""Shared by all tests of the notebook tools: a small clone of the course with one good lesson to spoil."""

from __future__ import annotations

import base64
import io
import shutil
import signal
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from minivlp.notebooks import ROOT, files, links, students

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs deaf to Ctrl-C, and programs inherit that; the tests of Ctrl-C need it heard.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LAYERS = '''"""Layers of a very small package."""

import math

# Half of a full turn, in radians.
HALF_TURN = math.pi


class Halve:
    """Halve a number."""

    def __call__(self, x: float) -> float:
        return x / 2


# Not a layer, but a layer needs it.
def double(x: float) -> float:
    """Twice x."""
    return 2 * x


def _private(x):
    return x
'''


def picture() -> str:
    """A PNG as a notebook stores it."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def printed(text: str) -> NotebookNode:
    return new_output("stream", name="stdout", text=text)


def good_lesson(where: links.Address) -> NotebookNode:
    """A lesson that no guard objects to, with outputs as if it had been executed."""
    definition = LAYERS[LAYERS.index("class Halve") : LAYERS.index("\n\n\n# Not")]
    exercise = "def third(x):\n    ### BEGIN SOLUTION\n    return x / 3\n    ### END SOLUTION"
    badges = links.badges(where, "01_tiny.ipynb")
    figure = new_output("display_data", data={"image/png": picture(), "text/plain": "<Figure>"})
    sums = "half of 3 is 1.5\n"
    cells = [
        new_markdown_cell(f"# 01 · Tiny: a lesson\n\n{badges}\n\nSee [halving](#Halving)."),
        new_code_cell(links.setup_source(where), metadata={"tags": ["setup"]}),
        new_markdown_cell("## Halving\n\nAs in [the package](../minivlp/layers.py)."),
        new_code_cell(definition, metadata={"tags": ["defines:minivlp.layers.Halve"]}),
        new_code_cell(
            "print(Halve()(3))", metadata={"tags": ["nbval-check-output"]}, outputs=[printed("1.5 at 10 pictures/s\n")]
        ),
        new_code_cell("show()", outputs=[figure]),
        new_markdown_cell("*Figure 1. A teal square of $4 \\times 4$ pixels.*\n\nMore text."),
        new_code_cell(f"print({sums!r}, end='')", metadata={"tags": ["headline"]}, outputs=[printed(sums)]),
        new_markdown_cell("## Exercise\n\nWrite `third`."),
        new_code_cell(exercise, metadata={**students.solution_metadata("tiny-1"), "jupyter": {"source_hidden": True}}),
        new_code_cell("assert third(9) == 3", metadata=students.check_metadata("tiny-1-check", points=2)),
    ]
    notebook = new_notebook(cells=cells)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
    return files.normalise(nbformat.from_dict(notebook))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder laid out like the repository: pyproject.toml, a package with two definitions, one good lesson."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, text in {"__init__": '"""Tiny."""\n', "layers": LAYERS}.items():
        path = tmp_path / "minivlp" / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    files.write(good_lesson(links.address(tmp_path)), tmp_path / "notebooks" / "01_tiny.ipynb")
    return tmp_path


@pytest.fixture
def lesson(clone: Path) -> NotebookNode:
    """The good lesson, to spoil."""
    return files.read(clone / "notebooks" / "01_tiny.ipynb")
