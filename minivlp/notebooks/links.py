"""Badges and setup cells, all from the one address and git ref in pyproject.toml.

A teacher who forks the course changes `[project.urls] Repository` there and runs `make links`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode

from minivlp.notebooks import ROOT, files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETUP = "setup"  # tag of the setup cell
CLONE = "minivlp-lessons"  # no folder named `minivlp`: Python would take it for an empty package of that name
PAGES = ("README.md", "notebooks/README.md", "data/README.md")  # pages with links besides the lessons

# {repository} and {ref} are filled in; everything else is the same in every lesson and every fork.
SETUP_CELL = """\
# Where minivlp is installed, this picks the device and seeds. On Colab it first fetches and installs the course.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("minivlp") is None:
    root = Path("..").resolve()  # the clone that this notebook was opened from, or else a fresh one
    if not (root / "minivlp" / "__init__.py").exists():
        root = Path("{clone}").resolve()
        clone = f'test -d "{{root}}" || git clone -q --depth 1 --branch {ref} {repository} "{{root}}"'
        command = f'({{clone}}) && "{{sys.executable}}" -m pip install -q -e "{{root}}"'
        if (done := subprocess.run(command, shell=True, capture_output=True, text=True)).returncode:
            raise RuntimeError(f"Check git and the network, then run this cell again. {{done.stderr}}")
    sys.path.insert(0, str(root))
import minivlp

device = minivlp.setup(seed=0)"""

RAW = "https://raw.githubusercontent.com"
COLAB = re.compile(r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([\w.-]+)/")
BINDER = re.compile(r"https://mybinder\.org/v2/gh/([\w.-]+/[\w.-]+)/([\w.-]+)")
CLONED = re.compile(r"git clone .*?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[\s\"'`]|$)")


@dataclass(frozen=True)
class Address:
    """Where the course lives in public: `slug` is `owner/name` on GitHub, `ref` a branch or tag."""

    slug: str
    ref: str

    @property
    def repository(self) -> str:
        return f"https://github.com/{self.slug}"


def address(root: Path = ROOT) -> Address:
    """The address and git ref that pyproject.toml states.

    Raises ValueError when they are missing or unfit for badges (Colab and Binder read from GitHub).
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project.get("project", {}).get("urls", {}).get("Repository", "")
    ref = project.get("tool", {}).get("minivlp", {}).get("ref", "")
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
    if match is None:
        raise ValueError(f"[project.urls] Repository must be https://github.com/OWNER/NAME, but is {repository!r}.")
    if not re.fullmatch(r"[\w.-]+", ref):
        raise ValueError(f"[tool.minivlp] ref must name one branch or tag without slashes, but is {ref!r}.")
    return Address(match[1], ref)


def setup_source(where: Address) -> str:
    """The setup cell's source."""
    return SETUP_CELL.format(repository=where.repository, ref=where.ref, clone=CLONE)


def badges(where: Address, file: str) -> str:
    """The line of badges under the title of `notebooks/file`."""
    place = f"{where.slug}/blob/{where.ref}/notebooks/{file}"
    binder = f"https://mybinder.org/v2/gh/{where.slug}/{where.ref}?labpath={quote(f'notebooks/{file}', safe='')}"
    return " ".join(
        [
            "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{place})",
            f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})",
            f"[![View on GitHub](https://img.shields.io/badge/view%20on-GitHub-181717)](https://github.com/{place})",
        ]
    )


def is_badge_line(line: str) -> bool:
    return line.startswith("[![Open in Colab]")


def link_notebook(notebook: NotebookNode, file: str, where: Address) -> list[str]:
    """Write badges and the setup cell of one lesson (in place); return what changed, in words.

    A missing badge line goes below the title; a missing setup cell becomes cell 1.
    Raises ValueError when cell 0 is no title.
    """
    title = notebook.cells[0] if notebook.cells else None
    if title is None or title.cell_type != "markdown" or not title.source.startswith("# "):
        raise ValueError(f"{file}: cell 0 must be markdown that starts with the title, `# NN · Name: ...`.")
    changed = []
    lines = title.source.split("\n")
    rest = [line for line in lines[1:] if not is_badge_line(line)]
    while rest and not rest[0]:
        rest.pop(0)
    source = "\n".join([lines[0], "", badges(where, file), *([""] if rest else []), *rest])
    if source != title.source:
        title.source = source
        changed.append("badges")

    setups = [cell for cell in notebook.cells if SETUP in files.tags(cell)]
    if not setups:
        setups = [nbformat.v4.new_code_cell(id="setup", metadata={"tags": [SETUP]})]
        notebook.cells.insert(1, setups[0])
    if setups[0].source != setup_source(where):
        setups[0].source = setup_source(where)
        changed.append("setup cell")
    return changed


def known_slugs(texts: list[str]) -> set[str]:
    """The addresses that badges and setup cells among `texts` use now: after a fork, the old one."""
    return {match[1] for text in texts for pattern in (COLAB, BINDER, CLONED) for match in pattern.finditer(text)}


def link_text(text: str, where: Address, old: set[str]) -> str:
    """`text` with every link to the course, under any address in `old`, leading to `where`; other links stay."""
    text = COLAB.sub(lambda m: m[0].replace(f"/{m[1]}/blob/{m[2]}/", f"/{where.slug}/blob/{where.ref}/"), text)
    text = BINDER.sub(f"https://mybinder.org/v2/gh/{where.slug}/{where.ref}", text)
    for slug in sorted(old | {where.slug}):
        ours = rf"{re.escape(slug)}(?![\w-])"
        text = re.sub(rf"https://github\.com/{ours}", where.repository, text)
        text = re.sub(rf"https://raw\.githubusercontent\.com/{ours}/[\w.-]+", f"{RAW}/{where.slug}/{where.ref}", text)
    at_a_ref = rf"{re.escape(where.repository)}/(blob|tree|raw)/[\w.-]+"
    return re.sub(at_a_ref, rf"{where.repository}/\1/{where.ref}", text)


def link_all(root: Path = ROOT, *, dry: bool = False) -> list[str]:
    """Bring every lesson and page of the clone at `root` in line with pyproject.toml; return what changed, in words.

    With `dry` nothing is written: the returned sentences are what is out of line.
    """
    where = address(root)
    notebooks = {path: files.read(path) for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    pages = {root / page: (root / page).read_text(encoding="utf-8") for page in PAGES if (root / page).exists()}
    old = known_slugs([*pages.values(), *(cell.source for notebook in notebooks.values() for cell in notebook.cells)])

    changed = []
    for path, notebook in notebooks.items():
        what = link_notebook(notebook, path.name, where)
        for cell in notebook.cells:
            text = link_text(cell.source, where, old) if cell.cell_type == "markdown" else cell.source
            if text != cell.source:
                cell.source = text
                what.append("a link")
        if what:
            changed.append(f"{path.relative_to(root)}: {', '.join(what)}")
            if not dry:
                files.write(notebook, path)
    for path, text in pages.items():
        new = link_text(text, where, old)
        if new != text:
            changed.append(f"{path.relative_to(root)}: links")
            if not dry:
                path.write_text(new, encoding="utf-8", newline="\n")
    return changed
