"""Each guard must catch what it is for: a good lesson is spoilt in one way at a time."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from minivlp.notebooks import files, guards

Spoil = Callable[[NotebookNode], object]
SETUP, HOME, CHECKED, FIGURE, CAPTION, HEADLINE, EXERCISE, CHECK = 1, 3, 4, 5, 6, 7, 9, 10


def says(text: str, name: str = "stdout") -> Spoil:
    return lambda nb: nb.cells[CHECKED].outputs.append(new_output("stream", name=name, text=text))


def shows(**data: str) -> Spoil:
    bundle = {name.replace("__", "/").replace("_", "-"): value for name, value in data.items()}
    return lambda nb: nb.cells[CHECKED].outputs.append(new_output("display_data", data=bundle))


def source(index: int, text: str) -> Spoil:
    return lambda nb: nb.cells[index].update(source=text)


def more(index: int, text: str) -> Spoil:
    return lambda nb: nb.cells[index].update(source=nb.cells[index].source + text)


def tag(index: int, *names: str) -> Spoil:
    return lambda nb: nb.cells[index].metadata.update(tags=list(names))


def meta(index: int, **values: object) -> Spoil:
    return lambda nb: nb.cells[index].metadata.nbgrader.update(values)


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["Traceback (most recent call last)"])
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0 no png").decode()

BAD: dict[str, tuple[Spoil, str]] = {
    "executed twice": (lambda nb: nb.cells[CHECKED].update(execution_count=7), "execution count 7, not 3"),
    "never executed": (lambda nb: nb.cells[HOME].update(execution_count=None), "execution count None"),
    "empty cell": (source(CHECKED, "  \n"), "is empty"),
    "stored error": (lambda nb: nb.cells[CHECKED].outputs.append(ERROR), "stores an error"),
    "widget state": (lambda nb: nb.metadata.update(widgets={"state": {}}), "state of widgets"),
    "widget output": (shows(**{"application__vnd.jupyter.widget-view+json": "{}"}), "stores application/vnd.jupyter"),
    "svg": (shows(**{"image__svg+xml": "<svg/>"}), "stores image/svg+xml"),
    "jpeg": (shows(image__jpeg=JPEG), "stores image/jpeg"),
    "svg in html": (shows(text__html="<div><svg></svg></div>"), "inside HTML"),
    "stderr": (says("loading\n", "stderr"), "wrote to stderr: 'loading'"),
    "unix path": (says("saved to /home/ann/minivlp/x.pt\n"), "a path of the machine: '/home/ann/minivlp/x.pt'"),
    "home path": (says("cache: ~/.cache/minivlp\n"), "a path of the machine"),
    "windows path": (says("saved to C:\\Users\\ann\n"), "a path of the machine"),
    "path in html": (shows(text__html="<td>/usr/lib/python3</td>"), "a path of the machine"),
    "warning": (says("UserWarning: lbfgs failed\n"), "mentions a warning"),
    "memory address": (says("<object at 0x7f3a5c0b1d60>\n"), "an address in memory"),
    "kernel name": (says("in ipykernel_1234\n"), "temporary name"),
    "progress states": (says("10%\r20%\n"), "states of a progress bar"),
    "log": (says("step\n" * 61), "at most 60 are read"),
    "no caption": (source(CAPTION, "A teal square."), "must begin with its caption, `*Figure 1. ...*`"),
    "caption number": (source(CAPTION, "*Figure 2. A square.*"), "must begin with its caption"),
    "caption not italic": (source(CAPTION, "*Figure 1. A square. And so on."), "must begin with its caption"),
    "caption alone": (lambda nb: nb.cells[FIGURE].update(outputs=[]), "a caption without a figure"),
    "caption below code": (
        lambda nb: nb.cells.insert(CAPTION, new_code_cell("1", execution_count=5)),
        "must begin with its caption",
    ),
    "two figures": (lambda nb: nb.cells[FIGURE].outputs.append(nb.cells[FIGURE].outputs[0]), "shows 2 figures"),
    "no png": (lambda nb: nb.cells[FIGURE].outputs[0].data.update({"image/png": JPEG}), "not a PNG"),
    "long cell": (more(CHECKED, "\nx = 1" * 45), "has 46 lines"),
    "misspelt tag": (tag(CHECKED, "nbval-check-outputs"), "unknown tag 'nbval-check-outputs'"),
    "no headline": (tag(HEADLINE, "varies"), "0 cells are tagged 'headline'"),
    "silent headline": (lambda nb: nb.cells[HEADLINE].update(outputs=[]), "headline cell printed nothing"),
    "setup changed": (more(SETUP, "\n"), "setup cell is not the one"),
    "setup missing": (lambda nb: nb.cells.pop(SETUP), "setup cell must be cell 1"),
    "setup twice": (lambda nb: nb.cells.append(nb.cells[SETUP].copy()), "setup cell must be cell 1"),
    "title": (source(0, "Tiny: a lesson"), "must begin with the title"),
    "badges missing": (source(0, "# 01 · Tiny"), "badges are missing"),
    "badges elsewhere": (
        lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("minivlp/minivlp", "ann/minivlp")),
        "badges are missing or lead elsewhere",
    ),
    "dead link": (more(2, " [data](../data/none.md)"), "links to '../data/none.md', which is not there"),
    "dead picture": (more(2, " ![map](map.png)"), "links to 'map.png'"),
    "dead html picture": (more(2, ' <img src="map.png">'), "links to 'map.png'"),
    "dead anchor": (more(2, " [up](#Nowhere)"), "links to #Nowhere"),
    "nbval marker with words": (more(CHECKED, "\n# NBVAL_CHECK_OUTPUT please"), "must stand alone on its line"),
    "nbval marker behind code": (more(CHECKED, "  # NBVAL_CHECK_OUTPUT"), "must stand alone on its line"),
    "checked without output": (lambda nb: nb.cells[CHECKED].update(outputs=[]), "stores no text"),
    "checked by comment without output": (more(HOME, "\n# NBVAL_CHECK_OUTPUT"), "stores no text"),
    "checked and varying": (tag(CHECKED, "nbval-check-output", "varies"), "compared by nbval and yet tagged"),
    "nothing checked": (tag(CHECKED, "varies"), "nbval would compare nothing"),
    "solution without metadata": (lambda nb: nb.cells[EXERCISE].metadata.pop("nbgrader"), "no nbgrader metadata"),
    "metadata incomplete": (lambda nb: nb.cells[EXERCISE].metadata.nbgrader.pop("task"), "lacks ['task']"),
    "metadata old": (meta(EXERCISE, schema_version=2), "lacks schema_version 3"),
    "grade_id twice": (meta(CHECK, grade_id="tiny-1"), "'tiny-1' is empty or taken"),
    "no points": (meta(CHECK, points=0), "gives no points"),
    "check not locked": (meta(CHECK, locked=False), "is not locked"),
    "exercise without check": (lambda nb: nb.cells.pop(CHECK), "has no check cell"),
    "check without exercise": (lambda nb: nb.cells.pop(EXERCISE), "stands before any exercise"),
    "solution without markers": (source(EXERCISE, "def third(x):\n    return x / 3"), "must enclose its solution"),
    "solution not closed": (source(EXERCISE, "### BEGIN SOLUTION\nx = 3"), "must enclose its solution"),
    "not canonical": (lambda nb: nb.cells[2].metadata.update(scrolled=True), "canonical form"),
    "drifted home": (source(HOME, "class Halve:\n    pass"), "differs from minivlp.layers.Halve"),
    "redefinition in an exercise": (more(EXERCISE, "\ndef double(x):\n    return x + x"), "double is defined again"),
    "large": (more(2, "x" * 1_000_001), "must stay below 1,000,000"),
}


def test_the_good_lesson_is_good(clone: Path) -> None:
    assert guards.check(clone / "notebooks" / "01_tiny.ipynb", root=clone) == []


@pytest.mark.parametrize("name", BAD)
def test_a_spoilt_lesson_is_caught(name: str, clone: Path, lesson: NotebookNode) -> None:
    spoil, sentence = BAD[name]
    spoil(lesson)
    path = clone / "notebooks" / "01_tiny.ipynb"
    path.write_text(json.dumps(lesson), encoding="utf-8")
    problems = guards.check(path, root=clone)
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize(
    "text",
    [
        "1,200 pictures/s, loss 2.48/2.49, see https://arxiv.org/abs/2010.11929",
        "image and/or text, a / b, shape (4, 16, 128) -> (4, 17, 128)",
        "<td>1</td></tr><br/>",
        "10/12 right, 3*4/2, 2 ** 3 / 4",
    ],
)
def test_ordinary_text_is_no_machine_path(text: str, lesson: NotebookNode) -> None:
    says(text + "\n")(lesson)
    assert guards.clean_outputs(lesson) == []


def test_links_that_exist_pass(clone: Path, lesson: NotebookNode) -> None:
    text = "[a](../minivlp/layers.py#L3) [b](https://arxiv.org/abs/2010.11929) [c](#Halving) `[d](none.md)` ![e](e.png)"
    (clone / "notebooks" / "e.png").write_bytes(b"")
    lesson.cells.append(new_markdown_cell(text))
    assert guards.targets(lesson, clone / "notebooks") == []


def test_a_file_that_is_no_notebook(tmp_path: Path) -> None:
    path = tmp_path / "01_bad.ipynb"
    for text in ("", "{}", "[]", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [{}]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="not a readable notebook"):
            files.read(path)
