"""The tools that keep the lessons true: run, re-execute, synchronise, link, guard, hand out and mark.

`python -m minivlp.notebooks COMMAND` is what the Makefile calls. One module per concern:

    files     read and write a notebook in one canonical form; compare two of them
    execute   run lessons with live progress; re-execute them in place
    sync      copy definitions from the package into the cells that show them; find drift
    links     badges and setup cells from the one address in pyproject.toml
    guards    everything a committed notebook must satisfy, as functions that return problems
    students  editions without solutions, and marking

Conventions of a lesson, `notebooks/NN_name.ipynb`:

- Cell 0 is markdown: the title `# NN · Name: ...`, then the line of badges (written by `links`).
- Cell 1 is the setup cell, tagged `setup`, byte-identical in every lesson (written by `links`).
- Tags: `setup`; `defines:minivlp.module.Name` for the home of a definition (the cell holds the tagged definitions and
  nothing else, written by `sync`); `headline` for the one cell whose printed line sums the lesson up; `varies` for
  outputs that may change from run to run, such as seconds; nbval's tags, of which `nbval-check-output` marks the
  outputs to compare; and the front ends' `hide-input`, `hide-output`, `hide-cell`. Any other tag is a mistake.
- A figure is a PNG, one per cell, and the next cell is markdown that begins with its caption,
  `*Figure 1. What is seen.*`, numbered through the lesson.
- An exercise is a code cell with nbgrader's solution metadata and `### BEGIN SOLUTION` / `### END SOLUTION` around what
  students must write, followed by a locked check cell that has points and raises when the answer is wrong.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # of the clone
LESSONS = ROOT / "notebooks"
BUILD = ROOT / "build"


def lessons(names: list[str] | None = None, *, folder: Path = LESSONS) -> list[Path]:
    """The lessons' files in order: all of `folder`, or those named by number (`01`), stem (`01_vit`) or path.

    Raises FileNotFoundError when a name fits no lesson, or when there is none at all.
    """
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not names:
        if not every:
            raise FileNotFoundError(f"There is no lesson (NN_name.ipynb) in {folder}.")
        return every
    chosen = []
    for name in names:
        path = Path(name)
        found = [path] if path.is_file() else [p for p in every if name in (p.stem, p.name, p.stem.split("_")[0])]
        if not found:
            known = ", ".join(p.stem for p in every) or "none"
            raise FileNotFoundError(f"No lesson is called {name!r}. There are: {known}.")
        chosen += found
    return chosen
