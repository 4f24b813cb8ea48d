"""Notebooks as files: one canonical form, so that the same code gives the same bytes.

Two people who execute the same notebook on the same machine must get the same file, or every commit would carry noise.
What differs from run to run without a meaning is taken out here: execution times, the local Python version, front-end
metadata, how a stream was cut into messages, the states a progress bar went through, text inside a PNG.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import os
import struct
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

VARIES = "varies"  # tag of cells whose outputs may differ from run to run

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
KEPT_CELL_METADATA = ("tags", "nbgrader", "jupyter", "cellView", "deletable", "editable")
KEPT_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"sRGB", b"pHYs", b"IDAT", b"IEND")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tags(cell: NotebookNode) -> list[str]:
    """The cell's tags, empty when it has none."""
    return list(cell.metadata.get("tags", []))


def read(path: str | Path) -> NotebookNode:
    """Read a notebook as nbformat 4.5; a cell without an id gets one made from its text, not a random one.

    Raises ValueError when the file is no notebook.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["nbformat"] != 4:
            raise ValueError(f"nbformat is {data['nbformat']}, expected 4")
        data["nbformat_minor"] = max(5, data.get("nbformat_minor", 0))
        _add_ids(data["cells"])
        notebook = nbformat.reads(json.dumps(data), as_version=4)
        nbformat.validate(notebook)
        return notebook
    except (ValueError, KeyError, TypeError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable notebook ({reason}). Save it again from Jupyter.") from error


def _add_ids(cells: list[dict]) -> None:
    """Give each cell without an id, or with an earlier cell's id, one that depends on its text alone."""
    seen: set[str] = set()
    for cell in cells:
        name = cell.get("id")
        if not name or name in seen:
            text = cell.get("source", "")
            text = "".join(text) if isinstance(text, list) else text
            copies = 0
            while not name or name in seen:
                name = hashlib.sha256(f"{cell.get('cell_type')}\n{copies}\n{text}".encode()).hexdigest()[:8]
                copies += 1
        cell["id"] = name
        seen.add(name)


def write(notebook: NotebookNode, path: str | Path) -> None:
    """Validate `notebook` and put it at `path` in one step: a kill at any moment leaves the old file or the new one."""
    nbformat.validate(notebook)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(nbformat.writes(notebook, version=4).rstrip("\n") + "\n", encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def normalise(notebook: NotebookNode) -> NotebookNode:
    """The canonical copy of `notebook`: what belongs to the lesson stays, what belongs to the run goes."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: cell.metadata[k] for k in KEPT_CELL_METADATA if k in cell.metadata})
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        cell.source = "\n".join(line.rstrip() for line in cell.source.rstrip().split("\n"))
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            cell.outputs = _tidy_outputs(cell.outputs)
    return notebook


def _tidy_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    tidy: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}
    for output in copy.deepcopy(outputs):
        # A kernel sends stdout and stderr in pieces whose borders depend on timing, so join them until a picture or a
        # result, whose place among the text matters, comes between.
        if output.output_type == "stream":
            if output.name in streams:
                streams[output.name].text += output.text
                continue
            streams[output.name] = output
        else:
            streams = {}
            if "execution_count" in output:
                output.execution_count = None if output.output_type != "execute_result" else output.execution_count
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            png = output.get("data", {}).get("image/png")
            if png is not None:
                picture = strip_png(shrink_png(base64.b64decode(png)))
                output.data["image/png"] = base64.b64encode(picture).decode() + "\n"
        tidy.append(output)
    for output in tidy:
        if output.output_type == "stream":
            output.text = resolve_carriage_returns(output.text)
    return [output for output in tidy if output.output_type != "stream" or output.text.strip()]


def resolve_carriage_returns(text: str) -> str:
    """What a terminal would show in the end: on each line, text written after `\\r` lies over what stood there."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in line.replace("\x1b[K", "").replace("\x1b[2K", "").split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip() if "\r" in line else shown)
    return "\n".join(lines)


def strip_png(data: bytes) -> bytes:
    """The same picture without the chunks that name programs, versions and times. Other data comes back as it is."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length  # length, kind, content, checksum
        if data[position + 4 : position + 8] in KEPT_PNG_CHUNKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def shrink_png(data: bytes) -> bytes:
    """The same picture in 256 colours chosen for it: a third of the bytes, and no difference one can see in a figure.

    Pictures that already have a palette, that are partly transparent or that are no PNG come back as they are.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
            picture = picture.convert("RGB")
        if picture.mode != "RGB":
            return data
        small = io.BytesIO()
        picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def compare(first: NotebookNode, second: NotebookNode) -> list[str]:
    """Differences between two executed notebooks, one sentence each; outputs of cells tagged `varies` may differ."""
    if len(first.cells) != len(second.cells):
        return [f"One has {len(first.cells)} cells, the other {len(second.cells)}."]
    differences = []
    for index, (a, b) in enumerate(zip(first.cells, second.cells, strict=True)):
        parts = ["cell_type", "id", "source", "metadata"]
        if VARIES not in tags(a):
            parts += ["execution_count", "outputs"]
        differences += [f"Cell {index}: {part} differs." for part in parts if a.get(part) != b.get(part)]
    if first.metadata != second.metadata:
        differences.append("The notebooks' metadata differs.")
    return differences
