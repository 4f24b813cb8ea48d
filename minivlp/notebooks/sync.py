"""One definition per idea: the module is the source, and a lesson shows it in a cell tagged `defines:module.Name`.

`sync` writes the module's text into those cells. `check` compares by syntax tree, so that a reformatted cell is no
alarm but a changed body is, and finds tags that name nothing and definitions that bear a package name without a tag.
Modules are read, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from minivlp.notebooks import ROOT, files

DEFINES = "defines:"
TOOLS = ("minivlp.notebooks", "minivlp.checks")  # no ideas of the course: their names are free in lessons


@dataclass(frozen=True)
class Definition:
    """A top-level class, function or constant of a module: its dotted name, its text and its syntax."""

    name: str
    text: str
    syntax: str


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    """The line (from 0) where a definition starts for a reader: decorators and comments directly above belong to it."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return first


def definitions(root: Path = ROOT, package: str = "minivlp") -> dict[str, Definition]:
    """All public top-level definitions of the package under `root`, by dotted name (`minivlp.layers.Attention`)."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module.startswith(TOOLS) or parts[-1] == "__main__":
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            for name in _bound_names(node):
                if not name.startswith("_"):
                    source = "\n".join(lines[_first_line(node, lines) : node.end_lineno])
                    found[f"{module}.{name}"] = Definition(f"{module}.{name}", source, ast.dump(node))
    return found


def homes(cell: NotebookNode) -> list[str]:
    """The dotted names whose home this cell is."""
    return [tag.removeprefix(DEFINES) for tag in files.tags(cell) if tag.startswith(DEFINES)]


def sync(notebook: NotebookNode, *, root: Path = ROOT) -> list[str]:
    """Rewrite the tagged cells of `notebook` (in place) from the modules; return the names whose cell changed."""
    known = definitions(root)
    changed = []
    for cell in notebook.cells:
        names = homes(cell)
        if cell.cell_type == "code" and names and all(name in known for name in names):
            text = "\n\n\n".join(known[name].text for name in names)
            if cell.source != text:
                cell.source = text
                changed += names
    return changed


def check(notebook: NotebookNode, *, root: Path = ROOT) -> list[str]:
    """Where the lesson and the package disagree, one sentence each; none when they agree."""
    known = definitions(root)
    by_name: dict[str, list[str]] = {}
    for dotted in known:
        by_name.setdefault(dotted.rpartition(".")[2], []).append(dotted)

    problems = []
    for index, cell in enumerate(notebook.cells):
        names = homes(cell)
        orphans = [name for name in names if name not in known]
        problems += [f"Cell {index}: the tag {DEFINES}{name} names nothing in the package." for name in orphans]
        if names and cell.cell_type != "code":
            problems.append(f"Cell {index}: only a code cell can be the home of {names[0]}.")
        if cell.cell_type != "code" or orphans:
            continue
        tree = parse(cell.source)
        if names:
            if [ast.dump(node) for node in tree.body] != [known[name].syntax for name in names]:
                problems.append(f"Cell {index}: differs from {', '.join(names)} in the package. Run `make sync`.")
            continue
        for name in _redefined(tree, by_name):
            problems.append(
                f"Cell {index}: {name} is defined again, but it belongs to {' and '.join(by_name[name])}. "
                f"Import it, tag its home cell {DEFINES}{by_name[name][0]}, or give the draft another name."
            )
    return problems


def check_homes(notebooks: dict[str, NotebookNode]) -> list[str]:
    """Names that have more than one home over all lessons."""
    seen: dict[str, str] = {}
    problems = []
    for file, notebook in notebooks.items():
        for index, cell in enumerate(notebook.cells):
            for name in homes(cell):
                here = f"{file} cell {index}"
                if name in seen:
                    problems.append(f"{name} has two homes: {seen[name]} and {here}. Import it in the later one.")
                seen.setdefault(name, here)
    return problems


def parse(source: str) -> ast.Module:
    """A cell's syntax tree; lines for IPython alone (`%magic`, `!shell`, `name?`) are left out."""
    lines = source.splitlines()
    plain = ["" if line.lstrip().startswith(("%", "!", "?")) or line.rstrip().endswith("?") else line for line in lines]
    try:
        return ast.parse("\n".join(plain))
    except SyntaxError as error:
        raise ValueError(f"A code cell is not valid Python: {error.msg} in {source.splitlines()[0]!r}.") from error


def _redefined(tree: ast.Module, names: Iterable[str]) -> list[str]:
    """Names that a cell defines at its top level: classes, functions, lambdas, and constants in capitals.

    A plain variable may share its name with a function (`loss = ...`): it holds a result, not a second definition.
    """
    found = []
    for node in _top_level(tree.body):
        for name in _bound_names(node):
            is_definition = isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            is_lambda = isinstance(getattr(node, "value", None), ast.Lambda)
            if name in names and (is_definition or is_lambda or name.isupper()):
                found.append(name)
    return found


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run in the notebook's own namespace, also inside if, for, while, with and try."""
    for node in body:
        yield node
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)
