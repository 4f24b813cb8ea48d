"""What a committed lesson must satisfy. Each guard takes a notebook and returns problems, one sentence each.

`check(path)` runs them all. They read the file alone: nothing is executed.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from nbformat import NotebookNode

from minivlp.notebooks import ROOT, files, links, sync
from minivlp.notebooks.execute import HEADLINE
from minivlp.notebooks.students import BEGIN, END, META_KEYS

MAX_BYTES = 1_000_000
MAX_CELL_LINES = 45
MAX_OUTPUT_LINES = 60

CHECKED = "nbval-check-output"
NBVAL_TAGS = (CHECKED, "nbval-ignore-output", "nbval-skip", "nbval-raises-exception")
NBVAL_COMMENTS = ("NBVAL_CHECK_OUTPUT", "NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP", "NBVAL_RAISES_EXCEPTION")
FRONT_END_TAGS = ("hide-input", "hide-output", "hide-cell")
TAGS = (links.SETUP, HEADLINE, files.VARIES, *NBVAL_TAGS, *FRONT_END_TAGS)

CAPTION = re.compile(r"\*Figure (\d+)\. .+?[^*]\*(?=\s*(\n\s*\n|$))", re.DOTALL)
MACHINE = {
    "a path of the machine": re.compile(r"(?<![\w:/.<)\]}*-])(?:~|/[\w.~-]+)(?:/[\w.~+-]+)+|\b[A-Za-z]:\\\w"),
    "a kernel's temporary name": re.compile(r"ipykernel_\d+|ipython-input-"),
    "an address in memory": re.compile(r"\b0x[0-9a-fA-F]{6,}"),
    "a warning": re.compile(r"\b\w*Warning\b|^\s*warning:", re.MULTILINE | re.IGNORECASE),
    "a traceback": re.compile(r"Traceback \(most recent"),
}
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=[\"']([^\"']+)[\"']")


def _code(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return ((index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")


def _texts(cell: NotebookNode) -> Iterator[str]:
    """Everything a cell's outputs say in words."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for mime, data in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield data
        if output.output_type == "error":
            yield "\n".join(output.traceback)


def executed(notebook: NotebookNode) -> list[str]:
    """Every code cell has run once, in order, from a fresh kernel, without an error."""
    problems = []
    for number, (index, cell) in enumerate(_code(notebook), start=1):
        if not cell.source.strip():
            problems.append(f"Cell {index} is empty.")
        if cell.execution_count != number:
            problems.append(f"Cell {index} has execution count {cell.execution_count}, not {number}: `make notebooks`.")
        if any(output.output_type == "error" for output in cell.outputs):
            problems.append(f"Cell {index} stores an error.")
    return problems


def clean_outputs(notebook: NotebookNode) -> list[str]:
    """Outputs are text or PNG, few lines, and tell nothing about the machine they were made on."""
    problems = []
    if "widgets" in notebook.metadata:
        problems.append("The notebook stores the state of widgets.")
    for index, cell in _code(notebook):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                head = output.text.strip().split("\n")[0][:80]
                problems.append(f"Cell {index} wrote to stderr: {head!r}. Mend the cause, or print it.")
            for mime in output.get("data", {}):
                if not mime.startswith("text/") and mime != "image/png":
                    problems.append(f"Cell {index} stores {mime}; GitHub's readers see text and PNG alone.")
        text = "\n".join(_texts(cell))
        if re.search(r"<(svg|img|script|iframe)\b", text):
            problems.append(f"Cell {index} stores a picture or script inside HTML; show a PNG.")
        if "\r" in text:
            problems.append(f"Cell {index} stores the states of a progress bar.")
        for what, pattern in MACHINE.items():
            found = pattern.search(text)
            if found:
                problems.append(f"Cell {index}'s output mentions {what}: {found[0].strip()!r}.")
        streams = "\n".join(output.text for output in cell.outputs if output.output_type == "stream")
        if streams.count("\n") > MAX_OUTPUT_LINES:
            problems.append(f"Cell {index} prints {streams.count(chr(10))} lines; at most {MAX_OUTPUT_LINES} are read.")
    return problems


def figures(notebook: NotebookNode) -> list[str]:
    """Each figure is a readable PNG, alone in its cell, and the next cell begins with its caption, numbered from 1."""
    problems = []
    number = 0
    captions = {}
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and cell.source.startswith("*Figure"):
            match = CAPTION.match(cell.source)
            captions[index] = int(match[1]) if match else None
    shown = set()
    for index, cell in _code(notebook):
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if not pictures:
            continue
        number += 1
        shown.add(index + 1)
        if len(pictures) > 1:
            problems.append(f"Cell {index} shows {len(pictures)} figures; one per cell, so that each has its caption.")
        if not all(base64.b64decode(picture).startswith(files.PNG_SIGNATURE) for picture in pictures):
            problems.append(f"Cell {index}: its figure is not a PNG.")
        if captions.get(index + 1) != number:
            problems.append(f"Cell {index}: the next cell must begin with its caption, `*Figure {number}. ...*`.")
    problems += [f"Cell {index} is a caption without a figure above it." for index in captions if index not in shown]
    return problems


def layout(notebook: NotebookNode) -> list[str]:
    """No long cells, known tags, one headline that printed something."""
    problems = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_CELL_LINES:
            problems.append(f"Cell {index} has {len(cell.source.splitlines())} lines; at most {MAX_CELL_LINES}.")
        unknown = [tag for tag in files.tags(cell) if tag not in TAGS and not tag.startswith(sync.DEFINES)]
        problems += [f"Cell {index} has the unknown tag {tag!r}." for tag in unknown]
    headlines = [cell for _, cell in _code(notebook) if HEADLINE in files.tags(cell)]
    if len(headlines) != 1:
        problems.append(f"{len(headlines)} cells are tagged {HEADLINE!r}; there must be one.")
    elif not any(output.get("name") == "stdout" for output in headlines[0].outputs):
        problems.append("The headline cell printed nothing.")
    return problems


def setup(notebook: NotebookNode, where: links.Address) -> list[str]:
    """Cell 1, and no other, is the setup cell, byte for byte."""
    tagged = [index for index, cell in enumerate(notebook.cells) if links.SETUP in files.tags(cell)]
    if tagged != [1] or notebook.cells[1].cell_type != "code":
        return [f"The setup cell must be cell 1, tagged {links.SETUP!r}; tagged are {tagged}. Run `make links`."]
    if notebook.cells[1].source != links.setup_source(where):
        return ["The setup cell is not the one of the course. Run `make links`."]
    return []


def badges(notebook: NotebookNode, file: str, where: links.Address) -> list[str]:
    """Cell 0 is the title with this notebook's badges."""
    lines = notebook.cells[0].source.split("\n")
    if notebook.cells[0].cell_type != "markdown" or not lines[0].startswith(f"# {file[:2]} · "):
        return [f"Cell 0 must begin with the title, `# {file[:2]} · Name: ...`."]
    if [line for line in lines if links.is_badge_line(line)] != [links.badges(where, file)]:
        return ["The badges are missing or lead elsewhere. Run `make links`."]
    return []


def targets(notebook: NotebookNode, folder: Path) -> list[str]:
    """Relative links and pictures exist; anchors are headings of the same notebook."""
    anchors = set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^#+\s+(.+?)\s*$", cell.source, re.MULTILINE):
                anchors.add(heading.replace(" ", "-").lower())  # Jupyter's way
                anchors.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))  # GitHub's way
            anchors.update(name.lower() for name in re.findall(r"(?:id|name)=[\"']([^\"']+)[\"']", cell.source))
    problems = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        if cell.get("attachments"):
            problems.append(f"Cell {index} has a picture attached; make it in a code cell or store it as a file.")
        for pair in LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)):
            target = unquote(pair[0] or pair[1])
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            if place and not (folder / place).exists():
                problems.append(f"Cell {index} links to {target!r}, which is not there.")
            if not place and anchor.lower() not in anchors:
                problems.append(f"Cell {index} links to #{anchor}, which is no heading of this notebook.")
    return problems


def nbval_marks(notebook: NotebookNode) -> list[str]:
    """nbval overlooks a marker that it does not recognise and a checked cell that stores nothing: both must not be."""
    problems = []
    checked = 0
    for index, cell in _code(notebook):
        for line in cell.source.splitlines():
            if "NBVAL" in line and line.strip().lstrip("#").strip() not in NBVAL_COMMENTS:
                problems.append(f"Cell {index}: an nbval marker must stand alone on its line, not {line.strip()!r}.")
        comments = {line.strip().lstrip("#").strip() for line in cell.source.splitlines() if line.strip()[:1] == "#"}
        if CHECKED not in files.tags(cell) and "NBVAL_CHECK_OUTPUT" not in comments:
            continue
        checked += 1
        if files.VARIES in files.tags(cell):
            problems.append(f"Cell {index} is compared by nbval and yet tagged {files.VARIES!r}.")
        if not any(text.strip() for text in _texts(cell)):
            problems.append(f"Cell {index} is compared by nbval but stores no text, so anything would pass.")
    if not checked:
        problems.append(f"No cell is tagged {CHECKED!r}: nbval would compare nothing.")
    return problems


def exercises(notebook: NotebookNode) -> list[str]:
    """Exercises can be handed out and marked: markers in solution cells, a check with points after each, unique ids."""
    problems = []
    seen: set[str] = set()
    waiting = None  # the exercise that has no check yet
    for index, cell in enumerate(notebook.cells):
        meta = cell.metadata.get("nbgrader")
        lines = [line.strip() for line in cell.source.splitlines()]
        solved = lines.count(BEGIN) == lines.count(END) > 0
        if not meta:
            if BEGIN.strip("# ") in cell.source or END.strip("# ") in cell.source:
                problems.append(f"Cell {index} holds a solution but no nbgrader metadata.")
            continue
        name = meta.get("grade_id", "")
        missing = [key for key in META_KEYS if key not in meta]
        if missing or meta.get("schema_version") != 3:
            problems.append(f"Cell {index}: nbgrader metadata lacks {missing or 'schema_version 3'}.")
            continue
        if not name or name in seen:
            problems.append(f"Cell {index}: the grade_id {name!r} is empty or taken.")
        seen.add(name)
        if meta["solution"]:
            if waiting:
                problems.append(f"Exercise {waiting!r} has no check cell with points.")
            waiting = name
            if not solved:
                problems.append(f"Exercise {name!r} must enclose its solution in `{BEGIN}` and `{END}`.")
        elif meta["grade"]:
            if not meta.get("points"):
                problems.append(f"Check {name!r} gives no points.")
            if not meta["locked"]:
                problems.append(f"Check {name!r} is not locked.")
            if waiting is None and not seen - {name}:
                problems.append(f"Check {name!r} stands before any exercise.")
            waiting = None
    if waiting:
        problems.append(f"Exercise {waiting!r} has no check cell with points.")
    return problems


def canonical(notebook: NotebookNode) -> list[str]:
    """The file is in the form that `make notebooks` writes."""
    return [] if files.normalise(notebook) == notebook else ["Not in canonical form. Run `make notebooks`."]


def size(path: Path) -> list[str]:
    """GitHub shows a notebook of less than a megabyte; a larger one is only offered for download."""
    size = path.stat().st_size
    return [f"The file has {size:,} bytes; it must stay below {MAX_BYTES:,}."] if size >= MAX_BYTES else []


def check(path: Path, *, root: Path = ROOT) -> list[str]:
    """All problems of the lesson at `path`, which belongs to the clone at `root`."""
    notebook = files.read(path)
    if not notebook.cells:
        return ["The notebook is empty."]
    where = links.address(root)
    problems = size(path)
    for guard in (executed, clean_outputs, figures, layout, nbval_marks, exercises, canonical):
        problems += guard(notebook)
    problems += setup(notebook, where)
    problems += badges(notebook, path.name, where)
    problems += targets(notebook, path.parent)
    problems += sync.check(notebook, root=root)
    return problems
