"""Every plot of the course, in one style. Plots take arrays (NumPy, torch, lists, pictures), never models.

Each function returns the `Figure` and shows nothing itself: as the last line of a notebook cell it appears once.
Colours are those of Okabe and Ito (2008), told apart by colour-blind readers too, and never carry a fact alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

WIDTH = 8.2  # inches; at 100 dots per inch, and with a notebook's margin around, the width of a notebook on GitHub
BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY, "#000000")
INK, QUIET, FAINT = "#222222", "#5F5F5F", "#D9D9D9"
RIGHT, WRONG = "#00805D", "#C04A00"  # darker green and vermillion, so that the white marks on them can be read
MARKS = {True: ("✓", RIGHT), False: ("✗", WRONG)}
SMALL, NORMAL = 9.0, 10.0  # points

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are the same on every machine
    "font.size": NORMAL,
    "text.color": INK,
    "figure.dpi": 100,
    "figure.figsize": (WIDTH, 3.6),
    "figure.facecolor": "white",  # opaque: a transparent figure cannot be read in a dark theme
    "figure.constrained_layout.use": True,
    "savefig.dpi": 100,
    "savefig.pad_inches": 0.05,  # the margin that notebooks put around a figure
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=CYCLE),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.cmap": "viridis",
}


RULER = RendererAgg(1, 1, 100)  # measures text before there is a figure


def use_style() -> None:
    """Make matplotlib draw in the course's style from here on."""
    plt.rcParams.update(STYLE)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the plots and the diagrams


def new_figure(width: float, height: float, *, layout: str = "constrained") -> Figure:
    """An empty white figure, in inches, that pyplot forgets at once: a notebook would otherwise show it twice."""
    fig = plt.figure(figsize=(width, height), layout=layout, facecolor="white")
    plt.close(fig)
    return fig


def inch_axes(fig: Figure) -> Axes:
    """Axes without frame over the whole figure, whose unit is the inch and whose origin is the lower left corner."""
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    width, height = fig.get_size_inches()
    ax.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    return ax


@lru_cache(maxsize=8192)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line of text of `size` points, as drawn at 100 dots per inch (letters snap to pixels)."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return 1.01 * RULER.get_text_width_height_descent(text, font, ismath=False)[0] / 100


def text_height(lines: int, size: float) -> float:
    """Height in inches of `lines` lines of text of `size` points."""
    return lines * size * 1.32 / 72


def wrap(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Break text into lines of at most `width` inches: at spaces, and inside a word only where it is too long alone."""
    lines = []
    for paragraph in str(text).split("\n"):
        line = ""
        for word in paragraph.split():
            trial = f"{line} {word}".strip()
            if text_width(trial, size, weight) <= width:
                line = trial
                continue
            if line:
                lines.append(line)
            while text_width(word, size, weight) > width and len(word) > 1:
                fits = max([1, *(n for n in range(1, len(word)) if text_width(word[:n], size, weight) <= width)])
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return "\n".join(lines)


def array(values: Any, name: str, *, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
    """NumPy view of a list, an array or a tensor on any device. Raises ValueError at a wrong number of dimensions."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values  # NumPy has no bfloat16
    result = np.asarray(values)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed and result.ndim not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {expected} dimensions, but its shape is {result.shape}")
    return result


def picture(image: Any, name: str = "image") -> np.ndarray:
    """One picture as (H, W, 3) uint8, from a PIL picture or from (3, H, W), uint8 or floats in [-1, 1]."""
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    pixels = array(image, name)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"{name} must be a PIL picture or of shape (3, H, W), but its shape is {pixels.shape}")
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating) or not np.abs(pixels).max() <= 1.001:
            raise ValueError(f"{name} must be uint8, or floats in [-1, 1] as the models take them, not {pixels.dtype} "
                             f"from {pixels.min():g} to {pixels.max():g}")  # fmt: skip
        pixels = np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


def _pictures(images: Any) -> list[np.ndarray]:
    if not isinstance(images, Sequence):
        images = array(images, "images", ndim=4)
    if not len(images):
        raise ValueError("there are no pictures to show: images is empty")
    return [picture(image, f"images[{i}]") for i, image in enumerate(images)]


def _same_length(values: Sequence | None, name: str, n: int, what: str) -> None:
    if values is not None and len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries for {n} {what}: give one each")


def _ink_on(colour: Any) -> str:
    """Black or white, whichever can be read on `colour`."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 else "white"


def _plain(value: float) -> str:
    """A number as a reader would write it: 16,000 and 0.0003."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture_grid(
    images: Any, captions: Sequence[str] | None = None, *, columns: int = 8, title: str | None = None,
    frames: Any = None, headings: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """Pictures in rows with their captions, wrapped, below.

    `images` are (N, 3, H, W), uint8 or floats in [-1, 1], or a list of PIL pictures. `frames` has one entry a picture:
    True (right: green and a tick), False (wrong: red and a cross), a colour, or None. `headings`, one a column, make a
    table: they stand above the columns, which then share the whole width, so that long captions stay short.
    """
    shown = _pictures(images)
    frames = array(frames, "frames").tolist() if hasattr(frames, "dtype") else frames
    _same_length(captions, "captions", len(shown), "pictures")
    _same_length(frames, "frames", len(shown), "pictures")
    columns = min(columns, len(shown))
    _same_length(headings, "headings", columns, "columns")
    gap, margin = 0.1, 0.06
    room = (WIDTH - 2 * margin + gap) / columns - gap  # inches for a picture and its caption
    side = _crisp(min(1.28 if headings else 1.92, room), shown[0].shape[1])
    room = min(room, 2.4) if headings else side
    cell = room + gap
    width = max(columns * cell - gap + 2 * margin, 2.4 if title else 0)
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    texts = [wrap(caption, room, SMALL) for caption in captions] if captions is not None else [""] * len(shown)
    heights = [round(side * max(shown[i].shape[0] / shown[i].shape[1] for i in row), 2) for row in rows]
    lines = [max(texts[i].count("\n") + 1 for i in row) for row in rows]
    below = [round(text_height(n, SMALL) + 0.1, 2) if captions is not None else gap for n in lines]
    heading = wrap(title, width - 2 * margin, 11, "bold") if title else ""
    top = round(text_height(heading.count("\n") + 1, 11) + 0.08, 2) if title else 0.0
    names = [wrap(name, room, SMALL, "bold") for name in headings or []]
    head = round(text_height(max(name.count("\n") + 1 for name in names), SMALL) + 0.06, 2) if names else 0.0

    fig = new_figure(width, sum(heights) + sum(below) + head + top + 2 * margin, layout="none")
    ax = inch_axes(fig)
    y = fig.get_figheight() - margin
    if title:
        ax.text(margin, y, heading, va="top", fontsize=11, weight="bold", parse_math=False)
        y -= top
    y -= head
    for k, name in enumerate(names):
        ax.text(margin + k * cell + room / 2, y + 0.08, name, ha="center", va="baseline", fontsize=SMALL, weight="bold",
                linespacing=1.1, parse_math=False)  # fmt: skip
    for row, height, foot in zip(rows, heights, below, strict=True):
        for k, i in enumerate(row):
            x, h = margin + k * cell + (room - side) / 2, side * shown[i].shape[0] / shown[i].shape[1]
            ax.imshow(shown[i], extent=(x, x + side, y - h, y), aspect="auto")
            if frames is not None and frames[i] is not None:
                _frame(ax, frames[i], x, y, side, h)
            ax.text(x + side / 2, y - height - 0.05, texts[i], ha="center", va="top", fontsize=SMALL, parse_math=False,
                    linespacing=1.1)  # fmt: skip
        y -= height + foot
    ax.set(xlim=(0, width), ylim=(0, fig.get_figheight()))
    return fig


def partner_pictures(
    images: Any, pages: Any, partners: Mapping[str, Any], captions: Sequence[str], *, page: str = "the page",
    title: str | None = None,
) -> Figure:  # fmt: skip
    """Whom each page was paired with: a row a page, first itself, then its partners, one column a way to draw them.

    `images` are N pictures, as for `picture_grid`, and `captions` their N captions, short ones. `pages` (R,) are
    indices into them, and `partners` maps the name of a way, such as "any" or "drawn by similarity", to indices (R,).
    `page` stands above the first column.
    """
    table = {page: pages, **partners}
    if len(table) != len(partners) + 1 or not partners:
        raise ValueError(f"partners needs one name at least, and none of them {page!r}, the name of the first column")
    columns = {name: array(rows, f"partners[{name!r}]" if k else "pages", ndim=1)
               for k, (name, rows) in enumerate(table.items())}  # fmt: skip
    _same_length(captions, "captions", len(images), "pictures")
    for name, rows in columns.items():
        _same_length(rows, f"partners[{name!r}]", len(columns[page]), "pages")
        if not np.issubdtype(rows.dtype, np.integer) or not len(rows) or rows.min() < 0 or rows.max() >= len(images):
            raise ValueError(f"{name!r} must be indices from 0 to {len(images) - 1}, of {len(images)} pictures")
    order = np.stack([*columns.values()], axis=1).ravel().tolist()  # row by row
    sheets = [picture(images[i], f"images[{i}]").transpose(2, 0, 1) for i in order]
    return picture_grid(sheets, [captions[i] for i in order], columns=len(columns), headings=[*columns], title=title)


TEXT_COLOURS = (BLUE, "#7B3F98", "#8A5A00", "#5A6E75")  # of letters: each can be read on white


def captioned_pictures(
    images: Any, rows: Sequence[Sequence[tuple[str, str, bool | None]]], *, columns: int = 2,
    marks: tuple[str, str] = ("kept", "dropped"), title: str | None = None,
) -> Figure:  # fmt: skip
    """Pictures with several texts beside each, and what was decided about every text.

    `images` are N pictures, as for `picture_grid`. `rows` has the texts of each: (label, text, verdict), where the
    label says whose text it is and has its own colour, and the verdict is True (a tick and the first of `marks`),
    False (a cross and the second), or None, without a mark. Long texts are wrapped.
    """
    shown = _pictures(images)
    _same_length(rows, "rows", len(shown), "pictures")
    if wrong := [i for i, row in enumerate(rows) if not row or any(len(entry) != 3 for entry in row)]:
        raise ValueError(f"rows[{wrong[0]}] must be one text or more, each as (label, text, verdict)")
    columns = min(columns, len(shown))
    gap, margin, between, after = 0.22, 0.06, 0.12, 0.09  # inches: between cells, picture and text, two texts
    cell = min((WIDTH - 2 * margin + gap) / columns - gap, 5.0)
    side = _crisp(min(1.28, 0.45 * cell), shown[0].shape[1])
    room = cell - side - between
    width = columns * (cell + gap) - gap + 2 * margin
    labels = list(dict.fromkeys(label for row in rows for label, _, _ in row))
    colours = {label: TEXT_COLOURS[i % len(TEXT_COLOURS)] for i, label in enumerate(labels)}
    signed = max(text_width(mark, SMALL) for mark in marks) + 0.3  # a mark and its square
    if signed > 0.7 * room:
        raise ValueError(f"there is no room for the marks {marks} in {columns} columns: choose shorter words, or fewer")
    heads = {label: wrap(label, room - signed, SMALL, "bold") for label in labels}
    texts = [[wrap(text, room, SMALL) for _, text, _ in row] for row in rows]
    above = {label: text_height(head.count("\n") + 1, SMALL) + 0.01 for label, head in heads.items()}
    below = [[text_height(text.count("\n") + 1, SMALL) for text in row] for row in texts]
    needs = [sum(above[label] + height + after for (label, _, _), height in zip(row, heights, strict=True)) - after
             for row, heights in zip(rows, below, strict=True)]  # fmt: skip
    lines = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [max(max(needs[i], side * shown[i].shape[0] / shown[i].shape[1]) for i in line) for line in lines]
    heading = wrap(title, width - 2 * margin, 11, "bold") if title else ""
    top = text_height(heading.count("\n") + 1, 11) + 0.08 if title else 0.0

    fig = new_figure(width, sum(heights) + (len(lines) - 1) * gap + top + 2 * margin, layout="none")
    ax = inch_axes(fig)
    y = fig.get_figheight() - margin
    ax.text(margin, y, heading, va="top", fontsize=11, weight="bold", parse_math=False)
    y -= top
    for line, height in zip(lines, heights, strict=True):
        for k, i in enumerate(line):
            x, h = margin + k * (cell + gap), side * shown[i].shape[0] / shown[i].shape[1]
            ax.imshow(shown[i], extent=(x, x + side, y - h, y), aspect="auto")
            x, at = x + side + between, y
            for (label, _, verdict), text, tall in zip(rows[i], texts[i], below[i], strict=True):
                style = {"color": colours[label], "fontsize": SMALL, "va": "top", "linespacing": 1.1,
                         "parse_math": False}  # fmt: skip
                ax.text(x, at, heads[label], weight="bold", **style)
                if verdict is not None:
                    mark, colour = MARKS[bool(verdict)]
                    word = marks[not verdict]
                    end = x + room - text_width(word, SMALL)
                    _mark(ax, mark, colour, end - 0.2, at, side=0.14, size=8)
                    ax.text(end, at, word, color=colour, va="top", fontsize=SMALL, parse_math=False)
                ax.text(x, at - above[label], text, **style)
                at -= above[label] + tall + after
        y -= height + gap
    ax.set(xlim=(0, width), ylim=(0, fig.get_figheight()))
    return fig


def _crisp(side: float, pixels: int) -> float:
    """`side` inches, or a little less if a picture of so many pixels then becomes an exact multiple of its size."""
    exact = int(100 * side / pixels) * pixels / 100
    return exact if exact > 0.85 * side else int(100 * side) / 100


def _frame(ax: Axes, frame: Any, x: float, top: float, width: float, height: float) -> None:
    mark, colour = MARKS[bool(frame)] if isinstance(frame, bool | np.bool_) else ("", frame)
    ax.add_patch(Rectangle((x, top - height), width, height, fill=False, edgecolor=colour, linewidth=2.5))
    if mark:
        _mark(ax, mark, colour, x, top)


def _mark(ax: Axes, mark: str, colour: str, x: float, top: float, *, side: float = 0.2, size: float = NORMAL) -> None:
    """A tick or a cross, white on a square of `side` inches, whose upper left corner is at (x, top)."""
    ax.add_patch(Rectangle((x, top - side), side, side, facecolor=colour, edgecolor=colour))
    ax.text(x + side / 2, top - side / 2, mark, color="white", ha="center", va="center", fontsize=size, weight="bold")


def ranked_pictures(
    queries: Sequence[str], images: Any, rankings: Any, *, truth: Sequence[int | Sequence[int]] | None = None,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """What a search found: one row a query, its sentence, wrapped, at the left and then the best pictures, best first.

    `images` are all pictures that were searched, as for `picture_grid`; `rankings` (Q, k) are indices into them, the
    first k for each of Q sentences. `truth` has one entry a query, the index of the picture that belongs to it, or the
    indices of all that do: they get a green frame and a tick, and a row without any says so.
    """
    order = array(rankings, "rankings", ndim=2)
    _same_length(order, "rankings", len(queries), "queries")
    _same_length(truth, "truth", len(queries), "queries")
    k = order.shape[1]
    if not order.size or k > 10:
        raise ValueError(f"rankings is of shape {order.shape}: give one query at least, and the best 1 to 10 of each")
    if not np.issubdtype(order.dtype, np.integer) or order.min() < 0 or order.max() >= len(images):
        raise ValueError(f"rankings must be indices from 0 to {len(images) - 1}, of {len(images)} pictures")
    shown = {i: picture(images[i], f"images[{i}]") for i in dict.fromkeys(order.flat)}
    wanted = [{*np.atleast_1d(array(t, "truth")).tolist()} for t in truth] if truth is not None else None
    gap, margin, least = 0.1, 0.06, 2.1  # inches; the sentences get `least` or what the pictures leave
    first = next(iter(shown.values()))
    side = _crisp(min(1.28, (WIDTH - 2 * margin - least) / k - gap), first.shape[1])
    beside = min(3.0, WIDTH - 2 * margin - k * (side + gap))
    width = beside + k * (side + gap) + 2 * margin
    texts = [wrap(query, beside - 0.15, SMALL) for query in queries]
    missed = [wanted is not None and not found & {*row.tolist()}
              for row, found in zip(order, wanted or [set()] * len(order), strict=True)]  # fmt: skip
    miss = wrap("✗ none of these belongs to it", beside - 0.15, 8)
    lines = [text_height(text.count("\n") + 1, SMALL) for text in texts]
    below = [(text_height(miss.count("\n") + 1, 8) + 0.03) * lost for lost in missed]
    heights = [max(side * max(shown[i].shape[0] / shown[i].shape[1] for i in row), text + note)
               for row, text, note in zip(order, lines, below, strict=True)]  # fmt: skip
    heading = wrap(title, width - 2 * margin, 11, "bold") if title else ""
    head = text_height(heading.count("\n") + 1, 11) + 0.08 if title else 0.0

    fig = new_figure(width, head + 0.22 + sum(heights) + len(heights) * gap + margin, layout="none")
    ax = inch_axes(fig)
    y = fig.get_figheight() - margin
    ax.text(margin, y, heading, va="top", fontsize=11, weight="bold", parse_math=False)
    y -= head
    for place in range(k):
        x = margin + beside + place * (side + gap) + side / 2
        ax.text(x, y - 0.14, f"{'best: ' if side > 0.6 and not place else ''}{place + 1}", ha="center", va="baseline",
                fontsize=SMALL, color=QUIET)  # fmt: skip
    y -= 0.2
    for q, (row, height) in enumerate(zip(order, heights, strict=True)):
        top = y - (height - lines[q] - below[q]) / 2  # the sentence stands in the middle of its row
        ax.text(margin, top, texts[q], va="top", fontsize=SMALL, linespacing=1.1, parse_math=False)
        if missed[q]:
            ax.text(margin, top - lines[q] - 0.03, miss, va="top", fontsize=8, color=WRONG, linespacing=1.1)
        for place, i in enumerate(row):
            x, h = margin + beside + place * (side + gap), side * shown[i].shape[0] / shown[i].shape[1]
            t = y - (height - h) / 2
            ax.imshow(shown[i], extent=(x, x + side, t - h, t), aspect="auto")
            if wanted is not None and int(i) in wanted[q]:
                _frame(ax, True, x, t, side, h)
        y -= height + gap
    ax.set(xlim=(0, width), ylim=(0, fig.get_figheight()))
    return fig


def patch_grid(image: Any, patch_size: int) -> Figure:
    """A picture, and its square patches pulled apart and numbered in reading order from 0.

    `image` is (3, H, W) or a PIL picture whose sides are multiples of `patch_size` pixels.
    """
    pixels, P = picture(image), patch_size
    H, W = pixels.shape[:2]
    if H % P or W % P:
        raise ValueError(f"a {H}x{W} picture cannot be cut into whole {P}x{P} patches: choose another patch_size")
    rows, columns = H // P, W // P
    side = (WIDTH - 1.0) / 2
    pitch = side / columns  # inches from patch to patch
    numbered = pitch >= 0.42  # else a number under each patch would touch its neighbours
    gap = 0.19 if numbered else 0.3 * pitch
    shown, left = pitch - gap, side + 0.9
    h = side * H / W

    fig = new_figure(WIDTH, h + 0.4, layout="none")
    ax = inch_axes(fig)
    top, x0 = h + 0.35, 0.05
    ax.imshow(pixels, extent=(x0, x0 + side, top - h, top), aspect="auto", interpolation="nearest")
    ax.vlines(x0 + np.arange(1, columns) * side / columns, top - h, top, color="white", linewidth=1.2)
    ax.hlines(top - np.arange(1, rows) * h / rows, x0, x0 + side, color="white", linewidth=1.2)
    ax.annotate("", (left - 0.35, top - h / 2), (x0 + side + 0.1, top - h / 2),
                arrowprops={"arrowstyle": "-|>", "color": QUIET, "linewidth": 1.5})  # fmt: skip
    for r in range(rows):
        for c in range(columns):
            x, y = left + c * pitch, top - r * pitch
            part = pixels[r * P : (r + 1) * P, c * P : (c + 1) * P]
            ax.imshow(part, extent=(x, x + shown, y - shown, y), aspect="auto", interpolation="nearest")
            ax.add_patch(Rectangle((x, y - shown), shown, shown, fill=False, edgecolor=QUIET, linewidth=0.6))
            if numbered:
                ax.text(x + shown / 2, y - shown - 0.02, str(r * columns + c), ha="center", va="top", fontsize=8)
        if not numbered and (pitch >= 0.15 or r % 2 == 0):  # the number of the first patch of the row
            ax.text(left - 0.05, top - r * pitch - shown / 2, str(r * columns), ha="right", va="center", fontsize=8)
    sentence = f"{H} × {W} pixels  =  {rows} × {columns} = {rows * columns} patches of {P} × {P}"
    ax.text(x0, 0.05, sentence, va="bottom", fontsize=NORMAL)
    ax.set(xlim=(0, WIDTH), ylim=(0, fig.get_figheight()))
    return fig


def masked_pictures(
    images: Any, keep: Any, patch_size: int, *, titles: Sequence[str] | None = None, columns: int = 8,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """Pictures as a model sees them that is given some of their patches only: the others are grey and striped.

    `images` as for `picture_grid`, with sides that are multiples of `patch_size` pixels. `keep` has the places of each
    picture's patches that stay, in reading order from 0 and in any order: (N, K), or a list of one (K,) each, in which
    None stands for a whole picture; None for all whole. `titles`, one a picture, stand below.
    """
    shown, P = _pictures(images), patch_size
    _same_length(keep, "keep", len(shown), "pictures")
    sheets = []
    for i, pixels in enumerate(shown):
        H, W = pixels.shape[:2]
        if H % P or W % P:
            raise ValueError(f"a {H}x{W} picture cannot be cut into whole {P}x{P} patches: choose another patch_size")
        if keep is not None and keep[i] is not None:
            places, n = array(keep[i], f"keep[{i}]", ndim=1), H // P * (W // P)
            if not np.issubdtype(places.dtype, np.integer) or not len(places) or places.min() < 0 or places.max() >= n:
                raise ValueError(f"keep[{i}] must be places from 0 to {n - 1}, at least one, of {n} patches")
            removed = np.ones(n, bool)
            removed[places] = False
            removed = removed.reshape(H // P, W // P).repeat(P, axis=0).repeat(P, axis=1)  # (H, W)
            wide = max(2, P // 4)  # pixels of a stripe: no picture has such a pattern, but many have grey areas
            y, x = np.indices((H, W))
            stripes = np.where((y + x) // wide % 2, 222, 192).astype(np.uint8)
            pixels = np.where(removed[..., None], stripes[..., None], pixels)
        sheets.append(pixels.transpose(2, 0, 1))
    return picture_grid(sheets, titles, columns=columns, title=title)


def filters(weights: Any, *, columns: int = 14, title: str | None = None) -> Figure:
    """What the patch projection looks for (ViT, Fig. 7 left): weights (n, 3, P, P), each stretched to its own range."""
    w = array(weights, "weights", ndim=4).astype(float)
    if w.shape[1] != 3:
        raise ValueError(f"weights must be of shape (n, 3, P, P), but the shape is {w.shape}")
    n, _, P, Q = w.shape
    low, high = (f(w, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    w = (w - low) / np.maximum(high - low, 1e-12)
    columns = min(columns, n)
    rows, gap = -(-n // columns), max(1, P // 8)
    sheet = np.ones((rows * (P + gap) - gap, columns * (Q + gap) - gap, 3))
    for i in range(n):
        y, x = i // columns * (P + gap), i % columns * (Q + gap)
        sheet[y : y + P, x : x + Q] = w[i].transpose(1, 2, 0)
    width = min(WIDTH, 1.1 * columns)
    fig = new_figure(width, width * sheet.shape[0] / sheet.shape[1] + (0.3 if title else 0))
    ax = fig.add_subplot()
    ax.imshow(sheet, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title or "")
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# Curves and bars


def curves(
    history: Mapping[str, Any], *, band: Any = None, x: Any = None, xlabel: str = "step", ylabel: str | None = None,
    hline: tuple[float, str] | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """Curves of this run, each (n,), over the band of recorded ones: shaded from minimum to maximum, median dashed.

    `x` are the curves' positions, one array for all or a dictionary with one each; without it they count from 1.
    `band` is (runs, n), or a pair of positions (m,) and values (runs, m) as `Recorded.curves` returns them, and belongs
    to the first curve; or a dictionary of these by curve name. `hline` is a level worth knowing and its name. Without
    `ylabel` a lone curve's own name stands at the axis, else "loss".
    """
    if not history:
        raise ValueError("there is nothing to draw: history is empty")
    bands = dict(band) if isinstance(band, Mapping) else {} if band is None else {next(iter(history)): band}
    if unknown := bands.keys() - history.keys():
        raise ValueError(f"the band {sorted(unknown)[0]!r} belongs to no curve: the curves are {', '.join(history)}")
    fig = new_figure(WIDTH, 3.6)
    ax = fig.add_subplot()
    for i, (name, values) in enumerate(history.items()):
        colour, ys = CYCLE[i % len(CYCLE)], array(values, f"history[{name!r}]", ndim=1)
        xs = x[name] if isinstance(x, Mapping) else x
        xs = np.arange(1, len(ys) + 1) if xs is None else array(xs, "x", ndim=1)
        _same_length(ys, f"history[{name!r}]", len(xs), "positions in x")
        if name in bands:
            pair = isinstance(bands[name], tuple)
            runs = array(bands[name][1] if pair else bands[name], f"the band of {name!r}", ndim=2)
            at = array(bands[name][0], f"the band's positions of {name!r}", ndim=1) if pair else xs
            _same_length(runs[0], f"the band of {name!r}", len(at), "positions")
            of = f" of {name}" if len(history) > 1 else ""
            ax.fill_between(at, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0,
                            label=f"{len(runs)} earlier runs{of}, lowest to highest")  # fmt: skip
            ax.plot(at, np.median(runs, axis=0), color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        ax.plot(xs, ys, color=colour, label=name, marker="o" if len(ys) <= 20 else None, markersize=4)
    alone = len(history) == 1 and not bands
    ax.set(xlabel=xlabel, ylabel=ylabel or (next(iter(history)) if alone else "loss"), title=title or "")
    ax.margins(x=0.02)
    if hline is not None:
        _level(ax, *hline)
    if not alone:
        handles, labels = ax.get_legend_handles_labels()
        if len(labels) <= 4:
            ax.legend()
        else:  # too many to find a free place between the curves
            fig.legend(handles, labels, loc="outside lower right", ncols=2)
    return fig


def _level(ax: Axes, value: float, label: str, *, vertical: bool = False) -> None:
    """A dashed line at `value` with its name at the end of it."""
    (ax.axvline if vertical else ax.axhline)(value, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1.5)
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    if vertical:
        ax.annotate(label, (value, 1), (0, 3), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                    ha="center", va="bottom", fontsize=SMALL, color=QUIET)  # fmt: skip
    else:
        ax.annotate(label, (1, value), (-4, 4), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                    ha="right", va="bottom", fontsize=SMALL, color=QUIET, bbox=white)  # fmt: skip


def curve_panels(
    panels: Mapping[str, Mapping[str, tuple[Any, Any]]], *, ylabel: str, xlabel: str = "step",
    dashed: Sequence[str] = (), hline: tuple[float, str] | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """The same curves under several conditions: panels side by side with one common axis, the mean over seeds as a line
    and from lowest to highest shaded.

    `panels` maps a panel's title to its curves, each a pair of positions (n,) and values (seeds, n), as
    `Recorded.curves` returns them, or (n,) for a single seed; a panel need not have all curves. Those named in `dashed`
    are dashed and have the colours of the others, in the same order: for instance two recipes, two quantities of each.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names or not all(panels.values()):
        raise ValueError("there is nothing to draw: give at least one panel, and each panel at least one curve")
    if unknown := [name for name in dashed if name not in names]:
        raise ValueError(f"dashed names {unknown[0]!r}, which is no curve: the curves are {', '.join(names)}")
    kinds = [[name for name in names if (name in dashed) == broken] for broken in (False, True)]
    looks = {name: (CYCLE[i % len(CYCLE)], (0, (4, 2)) if broken else "-", "os^Dv"[i % 5])
             for broken, kind in enumerate(kinds) for i, name in enumerate(kind)}  # fmt: skip
    heads = [wrap(name, (WIDTH - 0.8) / len(panels) - 0.3, 11, "bold") for name in panels]
    tall = text_height(max(head.count("\n") for head in heads), 11)
    fig = new_figure(WIDTH, 3.3 + tall + 0.2 * -(-len(names) // 2) + (0.25 if title else 0))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for ax, head, (panel, lines) in zip(axes, heads, panels.items(), strict=True):
        for name in (name for name in names if name in lines):
            what, (colour, style, mark) = f"panels[{panel!r}][{name!r}]", looks[name]
            xs = array(lines[name][0], f"the positions of {what}", ndim=1)
            runs = np.atleast_2d(array(lines[name][1], what, ndim=(1, 2)).astype(float))  # (seeds, n)
            _same_length(runs[0], what, len(xs), "positions")
            if len(runs) > 1:
                ax.fill_between(xs, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.18, linewidth=0)
            (line,) = ax.plot(xs, runs.mean(axis=0), color=colour, linestyle=style, markersize=4.5,
                              marker=mark if len(xs) <= 20 else None,
                              markerfacecolor="white" if name in dashed else colour)  # fmt: skip
            handles.setdefault(name, line)
        ax.set(xlabel=xlabel, title=head)
        ax.margins(x=0.04)
        if hline is not None:
            ax.axhline(hline[0], color=QUIET, linestyle=(0, (1, 1.5)), linewidth=1.4, zorder=1.5, label=hline[1])
    axes[0].set_ylabel(ylabel)
    if hline is not None:  # in the legend, for in each panel it could hide a curve
        handles[hline[1]] = axes[0].lines[-1]
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    fig.legend([*handles.values()], [*handles], loc="outside lower right", ncols=2, handlelength=3)
    return fig


def crossing(
    x: Any, series: Mapping[str, Any], *, xlabel: str, ylabel: str, logx: bool = True, title: str | None = None,
    hline: tuple[float, str] | None = None,
) -> Figure:  # fmt: skip
    """Where do the lines cross? The mean over seeds at each x, every seed as a dot, shaded from lowest to highest.

    `x` is (n,), each series (n, seeds) or, for a single seed, (n,).
    """
    xs = array(x, "x", ndim=1).astype(float)
    if logx and (xs <= 0).any():
        raise ValueError("a logarithmic axis needs x > 0: give logx=False")
    fig = new_figure(WIDTH, 3.8)
    ax = fig.add_subplot()
    for i, (name, values) in enumerate(series.items()):
        colour, runs = CYCLE[i % len(CYCLE)], array(values, f"series[{name!r}]", ndim=(1, 2)).astype(float)
        runs = runs.reshape(len(runs), -1)
        _same_length(runs, f"series[{name!r}]", len(xs), "values of x")
        ax.fill_between(xs, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.18, linewidth=0)
        if runs.shape[1] > 1:
            ax.plot(xs, runs, ".", color=colour, alpha=0.6, markersize=5)
        ax.plot(xs, runs.mean(axis=1), color=colour, marker="os^Dv"[i % 5], markersize=6, label=name)
    if logx:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(xs, [_plain(v) for v in xs])
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    if hline is not None:
        _level(ax, *hline)
    ax.legend()
    return fig


def cost_curve(
    ratios: Any, measured: Mapping[str, Any], model: Mapping[str, Any] | None = None, *, ylabel: str,
    xlabel: str = "share of the patches that is removed", title: str | None = None,
) -> Figure:  # fmt: skip
    """What hiding saves: measured cost against the removed share, and what a cost model says, with all numbers below.

    `ratios` (n,) are shares from 0 to 1, ascending. `measured` maps a name, such as "time" or "memory", to values (n,),
    or (n, runs), of which the means are joined and every run is a dot; `model` to values (n,), which are dashed and
    have the colour of the measured line of the same name, if there is one.
    """
    xs = array(ratios, "ratios", ndim=1).astype(float)
    if len(xs) < 2 or xs.min() < 0 or xs.max() > 1 or (np.diff(xs) <= 0).any():
        raise ValueError(f"ratios must be two or more ascending shares from 0 to 1, not {xs.tolist()}")
    if not measured:
        raise ValueError("there is nothing to draw: measured is empty")
    lines = []  # label, colour, values (n, runs), is it measured?
    for group, kind, dims in ((measured, "measured", (1, 2)), (model or {}, "model", (1,))):
        for name, values in group.items():
            runs = array(values, f"{kind}[{name!r}]", ndim=dims).astype(float)
            _same_length(runs, f"{kind}[{name!r}]", len(xs), "ratios")
            if not np.isfinite(runs).all():
                raise ValueError(f"{kind}[{name!r}] must be finite numbers: leave out the ratios that failed")
            alike = [*measured].index(name) if name in measured else len(lines)
            label = name if kind == "measured" else f"{name}, cost model" if name in measured else name
            lines.append((label, CYCLE[alike % len(CYCLE)], runs.reshape(len(xs), -1), kind == "measured"))

    # The table of numbers below the axis names the lines too, so that no legend can lie on a curve.
    names = [wrap(label, 1.75, SMALL) for label, *_ in lines]
    heights = [text_height(name.count("\n") + 1, SMALL) + 0.05 for name in names]
    sample, right = 0.42, 0.3  # inches: a piece of line beside each name, the margin
    left = max(0.7, 0.1 + sample + 0.3 + max(text_width(part, SMALL) for name in names for part in name.split("\n")))
    foot, high, head = 0.62 + sum(heights), 2.7, 0.35 if title else 0.12
    fig = new_figure(WIDTH, foot + high + head, layout="none")
    W, H = fig.get_size_inches()
    ax = fig.add_axes((left / W, foot / H, (W - left - right) / W, high / H))
    for i, (_, colour, runs, real) in enumerate(lines):
        mark = "os^Dv"[i % 5] if real else None
        if runs.shape[1] > 1:
            ax.plot(xs, runs, ".", color=colour, alpha=0.6, markersize=5)
        ax.plot(xs, runs.mean(axis=1), color=colour, marker=mark, markersize=6, linestyle="-" if real else (0, (4, 2)),
                zorder=3 if real else 2)  # fmt: skip
    ticks: list[float] = []
    for x in xs:  # rather leave numbers out than print one over another
        if not ticks or (x - ticks[-1]) / (xs[-1] - xs[0]) * 0.94 * (W - left - right) > 0.55:
            ticks.append(x)
    ax.set_xticks(ticks, [f"{_short(100 * x)} %" for x in ticks])
    ax.set(ylabel=ylabel, ylim=(0, 1.06 * max(runs.max() for _, _, runs, _ in lines)))
    ax.margins(x=0.03)
    ax.set_title(title or "")
    fig.text((left + W - right) / 2 / W, (foot - 0.28) / H, xlabel, ha="center", va="top")

    sheet = inch_axes(fig)
    low, top = ax.get_xlim()
    y = foot - 0.55
    for i, ((_, colour, runs, real), name, height) in enumerate(zip(lines, names, heights, strict=True)):
        middle = y - height / 2
        sheet.plot([0.1, 0.1 + sample], [middle] * 2, color=colour, linestyle="-" if real else (0, (4, 2)))
        if real:
            sheet.plot(0.1 + sample / 2, middle, "os^Dv"[i % 5], color=colour, markersize=6)
        sheet.text(0.2 + sample, middle, name, va="center", fontsize=SMALL, linespacing=1.1, parse_math=False)
        for x in ticks:
            at = left + (x - low) / (top - low) * (W - left - right)
            value = runs[list(xs).index(x)].mean()
            sheet.text(at, middle, f"{value:.2f}" if value < 10 else _short(value), ha="center", va="center",
                       fontsize=SMALL)  # fmt: skip
        y -= height
    return fig


def growth_slope(sizes: Any, seconds: Any) -> float:
    """How fast a cost grows: the slope of the straight line through its logarithms (least squares), so that `seconds`
    (n,) grow like `sizes` (n,) to this power. Raises ValueError at fewer than two different sizes, or values <= 0."""
    x, y = array(sizes, "sizes", ndim=1).astype(float), array(seconds, "seconds", ndim=1).astype(float)
    _same_length(y, "seconds", len(x), "sizes")
    if not all(np.isfinite(v).all() and (v > 0).all() for v in (x, y)):
        raise ValueError("a logarithm needs finite numbers > 0: leave out the sizes that failed")
    if len(set(x.tolist())) < 2:
        raise ValueError(f"a slope needs two different sizes or more, not {sorted(set(x.tolist()))}")
    x, y = np.log(x), np.log(y)
    return float((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) @ (x - x.mean())))


def growth(
    sizes: Mapping[str, Any], seconds: Mapping[str, Any], *, xlabel: str, ylabel: str, title: str | None = None
) -> Figure:
    """How costs grow with the size of a task, on logarithmic axes: measured points, and the straight line through each
    series with its name and `growth_slope` at its end. A slope of 1 is linear, of 2 quadratic.

    `sizes` and `seconds` map the same names to values (n,), all > 0. Series may have different sizes.
    """
    if not seconds:
        raise ValueError("there is nothing to draw: seconds is empty")
    if odd := sizes.keys() ^ seconds.keys():
        raise ValueError(f"{sorted(odd)[0]!r} is not in both sizes and seconds: name the same series in each")
    series = []  # label, points in log10 (2, n), the fitted line's two ends in log10 (2, 2)
    for name, costs in seconds.items():
        try:
            slope = growth_slope(sizes[name], costs)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        x, y = points = np.log10([array(v, name).astype(float) for v in (sizes[name], costs)])
        at = np.array([x.min(), x.max()])
        label = wrap(f"{name}: slope {slope:.1f}", 2.4, SMALL, "bold")
        series.append((label, points, np.stack([at, y.mean() + slope * (at - x.mean())])))

    # The axes end where the longest label does; labels that would lie on each other are pushed up, and the axes grow.
    left, right, foot, edge, high = 0.9, 0.15, 0.55, 0.15, 2.9  # inches
    low, bottom = (min(float(p[k].min()) for _, *lines in series for p in lines) for k in (0, 1))
    tall = max(float(p[1].max()) for _, *lines in series for p in lines) - bottom
    widths = [max(text_width(part, SMALL, "bold") for part in label.split("\n")) for label, *_ in series]
    wide = WIDTH - left - right - edge
    per_x = min((wide - 0.14 - w) / (line[0, 1] - low) for w, (*_, line) in zip(widths, series, strict=True))
    per_y = (high - 2 * edge) / max(tall, 0.5)  # inches a decade
    placed: list[tuple[float, float, float, float]] = []  # left, right, lower and upper end of each label, in inches
    shifts = {}
    for i in sorted(range(len(series)), key=lambda i: series[i][2][1, 1]):
        label, _, line = series[i]
        x, y = per_x * (line[0, 1] - low) + 0.1, per_y * (line[1, 1] - bottom)
        h, start = text_height(label.count("\n") + 1, SMALL) + 0.03, y
        for a, b, _, upper in sorted(placed, key=lambda box: box[2]):
            if a < x + widths[i] and x < b and y - h / 2 < upper:
                y = upper + h / 2
        placed.append((x, x + widths[i], y - h / 2, y + h / 2))
        shifts[i] = y - start
    high = max(high, 2 * edge + max(upper for *_, upper in placed))

    head = 0.35 if title else 0.12
    fig = new_figure(WIDTH, foot + high + head, layout="none")
    W, H = fig.get_size_inches()
    ax = fig.add_axes((left / W, foot / H, (W - left - right) / W, high / H))
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title or "",
           xlim=10 ** (low + np.array([-edge, wide]) / per_x),
           ylim=10 ** (bottom + np.array([-edge, high - edge]) / per_y))  # fmt: skip
    for i, (label, points, line) in enumerate(series):
        colour = CYCLE[i % len(CYCLE)]
        ax.plot(*10**line, color=colour, linewidth=1.5)
        ax.plot(*10**points, "os^Dv"[i % 5], color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6)
        ax.annotate(label, 10 ** line[:, 1], (7, 72 * shifts[i]), textcoords="offset points", va="center",
                    fontsize=SMALL, weight="bold", color=[0.7 * v for v in to_rgb(colour)], linespacing=1.1,
                    parse_math=False,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
    ax.set_xticks(*_log_ticks([v for _, points, _ in series for v in 10 ** points[0]], per_x))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if per_y > 1.2 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _plain(v)))
    ax.minorticks_off()
    return fig


def _log_ticks(values: Iterable[float], per_decade: float) -> tuple[list[float], list[str]]:
    """Ticks and their labels for a logarithmic axis of so many inches a decade: those of `values` that have room, for
    rather leave numbers out than print one over another."""
    ticks: list[float] = []
    labels: list[str] = []
    for x in sorted({float(f"{v:.10g}") for v in values}):  # powers of ten come out a little off
        room = 0.12 + sum(text_width(label, SMALL) for label in (_plain(x), *labels[-1:])) / 2
        if not ticks or per_decade * np.log10(x / ticks[-1]) > room:
            ticks.append(x)
            labels.append(_plain(x))
    return ticks, labels


# Marks that tell groups apart: the area of one of size 1, and how far it reaches from its middle.
SHAPES = {"o": (np.pi / 4, 0.5), "s": (1.0, 0.5), "^": (0.5, 0.5), "D": (1.0, 0.5**0.5), "v": (0.5, 0.5)}


def trade_off(
    points: Mapping[str, tuple[float, float]], *, groups: Mapping[str, str], xlabel: str, ylabel: str,
    sizes: Mapping[str, float] | None = None, size_label: str | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """What is paid for what is got: one mark a model with its name beside it, for instance accuracy over time.

    `points` maps a name to (x, y), with x > 0 on a logarithmic axis. `groups` maps names to groups, which have a colour
    and a shape each. `sizes` maps names to numbers > 0, such as parameters, that the areas of the marks are in
    proportion to, and `size_label` says what they are. Both may have more names than are drawn.
    """
    if not points:
        raise ValueError("there is nothing to draw: points is empty")
    if (sizes is None) != (size_label is None):
        raise ValueError("sizes and size_label belong together: give both or neither")
    numbers = dict.fromkeys(points, 1.0) if sizes is None else sizes
    for what, given in (("groups", groups), ("sizes", numbers)):
        if missing := [name for name in points if name not in given]:
            raise ValueError(f"{what} has no entry for {missing[0]!r}: give one for each name in points")
    places = np.empty((len(points), 2))
    for i, (name, xy) in enumerate(points.items()):
        place = array(xy, f"points[{name!r}]", ndim=1).astype(float)  # None becomes nan
        if place.shape != (2,) or not np.isfinite(place).all() or place[0] <= 0:
            raise ValueError(f"points[{name!r}] must be two finite numbers (x, y) with x > 0, not {xy}: leave out a "
                             "name without numbers")  # fmt: skip
        places[i] = place
    drawn = np.array([numbers[name] for name in points], dtype=float)
    if not (np.isfinite(drawn) & (drawn > 0)).all():
        raise ValueError("sizes must be finite numbers > 0, for the areas of the marks show them")

    kinds = list(dict.fromkeys(groups[name] for name in points))
    looks = {kind: (CYCLE[i % len(CYCLE)], [*SHAPES][i % len(SHAPES)]) for i, kind in enumerate(kinds)}
    unit, reach = np.array([SHAPES[looks[groups[name]][1]] for name in points]).T
    sides = np.sqrt((0.015 if sizes is None else 0.07) * drawn / drawn.max() / unit)  # inches; the largest: 0.07 sq in
    labels = [wrap(name, 1.8, SMALL, "bold") for name in points]
    boxes = [(max(text_width(line, SMALL, "bold") for line in label.split("\n")) + 0.04,
              text_height(label.count("\n") + 1, SMALL)) for label in labels]  # fmt: skip

    # In inches from the lower left corner of the axes, which grow until there is a place for every name.
    x, y = np.log10(places[:, 0]), places[:, 1]
    spans = max(np.ptp(x), 1.0), np.ptp(y) or abs(y[0]) or 1.0
    low = [(v.min() + v.max() - span) / 2 for v, span in zip((x, y), spans, strict=True)]
    levels = MaxNLocator(7, steps=(1, 2, 5, 10)).tick_values(low[1], low[1] + spans[1])
    scale = {v: f"{v + 0.0:,.10g}" for v in levels}  # 0.3 and not 0.30000000000000004, 0 and not -0
    first, last = np.floor(low[0]), np.floor(low[0] + spans[0] + 1e-9)  # decades
    left = 0.45 + max(text_width(text, SMALL) for text in scale.values())
    right, edge = max(0.3, text_width(_plain(10**last), SMALL) / 2), (reach * sides).max() + 0.12
    wide, high = WIDTH - left - right, 2.9
    while True:
        per_x, per_y = ((side - 2 * edge) / span for side, span in zip((wide, high), spans, strict=True))
        middles = np.stack([edge + per_x * (x - low[0]), edge + per_y * (y - low[1])], axis=1)
        if found := _beside(middles, reach * sides, boxes, (wide, high)):
            break
        high += 0.5

    keys = [wrap(kind, 3.0, SMALL) for kind in kinds]
    entry = max(text_width(line, SMALL) for key in keys for line in key.split("\n")) + 0.6
    columns = min(len(kinds), int((WIDTH - 0.2) / entry))
    rows = -(-len(kinds) // columns)
    legend = rows * (text_height(max(key.count("\n") + 1 for key in keys), SMALL) + 0.06) + 0.12
    note = ""
    if sizes is not None:
        ends = dict.fromkeys(_short(v) for v in (drawn.min(), drawn.max()))
        note = wrap(f"area of a mark: {size_label}, {' to '.join(ends)}", WIDTH - 0.2, SMALL)
    noted = text_height(note.count("\n") + 1, SMALL) + 0.08 if note else 0.0
    heading = wrap(title, wide, 11, "bold") if title else ""
    head = text_height(heading.count("\n") + 1, 11) + 0.15 if title else 0.12
    foot = 0.52 + noted + legend
    fig = new_figure(WIDTH, foot + high + head, layout="none")
    W, H = fig.get_size_inches()
    ax = fig.add_axes((left / W, foot / H, wide / W, high / H))
    bottom, top = low[1] + (np.array([0, high]) - edge) / per_y
    ax.set_title(heading, parse_math=False)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel, ylim=(bottom, top),
           xlim=10 ** (low[0] + (np.array([0, wide]) - edge) / per_x))  # fmt: skip
    ax.set_yticks([v for v in scale if bottom <= v <= top], [text for v, text in scale.items() if bottom <= v <= top])
    ticks = [k * 10**d for d in np.arange(first, last + 1) for k in ((1, 2, 5) if spans[0] < 2 else (1,))
             if -1e-9 < d + np.log10(k) - low[0] < spans[0] + 1e-9]  # fmt: skip
    ax.set_xticks(*_log_ticks(ticks, per_x))
    ax.minorticks_off()
    for i in np.argsort(-drawn, kind="stable"):  # small marks lie on large ones
        colour, mark = looks[groups[[*points][i]]]
        ax.scatter(*places[i], s=(72 * sides[i]) ** 2, color=colour, marker=mark, zorder=3,
                   edgecolor="white", linewidth=0.6)  # fmt: skip
    sheet, corner = inch_axes(fig), np.array([left, foot])
    for (box, tip), middle, radius, label, name in zip(found, middles, reach * sides, labels, points, strict=True):
        dark = [0.7 * v for v in to_rgb(looks[groups[name]][0])]
        if tip is not None:
            start = middle + (tip - middle) * radius / np.hypot(*(tip - middle))
            sheet.plot(*np.stack([corner + start, corner + tip], axis=1), color=dark, linewidth=0.8)
        sheet.text(*(corner + np.reshape(box, (2, 2)).mean(axis=0)), label, ha="center", va="center", fontsize=SMALL,
                   weight="bold", color=dark, linespacing=1.1, parse_math=False)  # fmt: skip
    sheet.text(0.1, legend + noted - 0.06, note, va="top", fontsize=SMALL, color=QUIET, linespacing=1.1,
               parse_math=False)  # fmt: skip
    handles = [Line2D([], [], color=colour, marker=mark, markersize=8, linestyle="none", label=key)
               for key, (colour, mark) in zip(keys, looks.values(), strict=True)]  # fmt: skip
    for text in fig.legend(handles=handles, loc="lower left", ncols=columns).get_texts():
        text.set_parse_math(False)
    return fig


Box = tuple[float, float, float, float]  # left, lower, right, upper
# Directions in which a label may stand from its mark, preferred ones first.
AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1),
          (0.5, 1), (0.5, -1), (-0.5, 1), (-0.5, -1), (1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5))  # fmt: skip


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(start: np.ndarray, end: np.ndarray, box: Box) -> bool:
    """Does the line between two points go through a box?"""
    first, last = 0.0, 1.0  # the part of the line that is within the box in x, then in y as well
    for a, b, low, high in zip(start, end, box[:2], box[2:], strict=True):
        if a == b and not low < a < high:
            return False
        if a != b:
            near, far = sorted(((low - a) / (b - a), (high - a) / (b - a)))
            first, last = max(first, near), min(last, far)
    return first < last


def _beside(
    middles: np.ndarray, radii: np.ndarray, labels: Sequence[tuple[float, float]], room: tuple[float, float]
) -> list[tuple[Box, np.ndarray | None]] | None:
    """A place for each label near its own mark, inside the room, where it touches no other label and no mark; and where
    a line from the mark should end, if the label could not stand close to it. Lines go through labels only where every
    other place is worse. None if there is not room for all.

    `middles` (n, 2) and `radii` (n,) are those of the marks, `labels` widths and heights, all in inches.
    """
    close, away = 0.03, 0.05  # a label without a line is nearer to its own mark than to any other
    marks = [(x - r - away, y - r - away, x + r + away, y + r + away)
             for (x, y), r in zip(middles, radii, strict=True)]  # fmt: skip
    found: list[tuple[Box, np.ndarray | None]] = []
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    for i, ((x, y), r, (w, h)) in enumerate(zip(middles, radii, labels, strict=True)):
        full = [*marks[:i], *marks[i + 1 :], *(box for box, _ in found)]
        best = None
        for gap, (dx, dy) in itertools.product(np.arange(close, max(room), 0.09), AROUND):
            left, low = x + dx * (r + gap + w / 2) - w / 2, y + dy * (r + gap + h / 2) - h / 2
            box = left, low, left + w, low + h
            outside = min(box) < 0.02 or box[2] > room[0] - 0.02 or box[3] > room[1] - 0.02
            if outside or any(_touch(box, other) for other in full):
                continue
            tip = np.clip((x, y), box[:2], box[2:]) if gap > close else None
            crossed = sum(_crosses(*line, box) for line in lines)
            crossed += sum(tip is not None and _crosses(middles[i], tip, other) for other, _ in found)
            if best is None or crossed < best[0]:
                best = crossed, (box, tip)
            if not crossed:
                break
        if best is None:
            return None
        found.append(best[1])
        if best[1][1] is not None:
            lines.append((middles[i], best[1][1]))
    return found


def _spread(n: int, reach: float) -> np.ndarray:
    """Where the dots of n seeds stand beside the middle of their bar."""
    return np.linspace(-reach, reach, n) if n > 1 else np.zeros(1)


def ablation_bars(
    groups: Mapping[str, Sequence[float]], *, ylabel: str, chance: float | None = None, title: str | None = None,
    paper: Mapping[str, float] | None = None, start: float = 0.0, digits: int = 3,
) -> Figure:  # fmt: skip
    """One bar a variant: the mean over seeds, its standard deviation as a whisker, every seed as a dot.

    `groups` maps a label to one value a seed. Long or many labels lie beside horizontal bars. `paper` gives published
    numbers by label (diamonds). An axis that does not `start` at 0 says so, for bars then exaggerate differences.
    """
    values = {label: array(v, f"groups[{label!r}]", ndim=1).astype(float) for label, v in groups.items()}
    if empty := [label for label, v in values.items() if not len(v)]:
        raise ValueError(f"groups[{empty[0]!r}] has no values: give at least one seed")
    if not values:
        raise ValueError("there is nothing to draw: groups is empty")
    paper = paper or {}
    if unknown := paper.keys() - values.keys():
        raise ValueError(f"the paper's {sorted(unknown)[0]!r} is not among the groups: {', '.join(values)}")
    n, slot = len(values), (WIDTH - 0.9) / len(values)
    wrapped = [wrap(label, slot - 0.15, SMALL) for label in values]
    broken = any(text_width(word, SMALL) > slot - 0.15 for label in values for word in label.split())
    flat = slot < 0.75 or broken or max(w.count("\n") for w in wrapped) > 1
    places = np.arange(n)
    means = np.array([v.mean() for v in values.values()])
    stds = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values.values()])

    fig = new_figure(WIDTH, 0.95 + 0.34 * n if flat else 3.8)
    ax = fig.add_subplot()
    # Bars are drawn from `start`, so that a shortened axis cuts nothing off.
    draw, length = (ax.barh, "width") if flat else (ax.bar, "height")
    error = {"xerr" if flat else "yerr": np.where(stds > 0, stds, np.nan)}
    draw(places, **{length: means - start, "left" if flat else "bottom": start, "height" if flat else "width": 0.62},
         color=SKY, alpha=0.75, **error, error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    for i, (label, v) in enumerate(values.items()):
        spread = i + _spread(len(v), 0.2)
        xy = (v, spread) if flat else (spread, v)
        ax.plot(*xy, "o", color=BLUE, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6,
                zorder=3, label="one seed (numbers: mean ± standard deviation)" if i == 0 else None)  # fmt: skip
        reach = max(means[i] + stds[i], v.max())
        if label in paper:
            reach = max(reach, paper[label])
            xy = (paper[label], i) if flat else (i, paper[label])
            ax.plot(*xy, "D", color="white", markeredgecolor=VERMILLION, markeredgewidth=1.6, markersize=7, zorder=4,
                    linestyle="none", label="the paper" if label == next(iter(paper)) else None)  # fmt: skip
        many = len(v) > 1
        number = f"{means[i]:.{digits}f}" + (f"{' ' if flat else chr(10)}± {stds[i]:.{digits}f}" if many else "")
        at, shift = ((reach, i), (7, 0)) if flat else ((i, reach), (0, 6))
        ax.annotate(number, at, shift, textcoords="offset points", fontsize=SMALL,
                    ha="left" if flat else "center", va="center" if flat else "bottom")  # fmt: skip
    top = max([*(means + stds), *(v.max() for v in values.values()), *paper.values()])
    named = ylabel if start == 0 else f"{ylabel}\n(the axis starts at {start:g})"
    if flat:
        ax.set_yticks(places, [wrap(label, 3.0, SMALL) for label in values])
        ax.set(xlim=(start, start + 1.28 * (top - start)), ylim=(n - 0.45, -0.55), xlabel=named.replace("\n", " "))
        ax.grid(False, axis="y")
    else:
        ax.set_xticks(places, wrapped)
        ax.set(ylim=(start, start + 1.2 * (top - start)), xlim=(-0.6, n - 0.4), ylabel=named)
        ax.grid(False, axis="x")
    ax.tick_params(axis="y" if flat else "x", length=0)
    if chance is not None and chance >= start:
        _level(ax, chance, f"chance {chance:.{digits}g}", vertical=flat)
    seeds = {len(v) for v in values.values()}
    handles, labels = ax.get_legend_handles_labels()
    if max(seeds) == 1:
        handles, labels = handles[1:], labels[1:]
    if handles:
        fig.legend(handles, labels, loc="outside lower right", ncols=2)
    ax.set_title(title or "", pad=18 if flat and chance is not None else 6)
    return fig


def grouped_bars(
    table: Mapping[str, Mapping[str, Sequence[float]]], *, ylabel: str, chance: float | None = None,
    title: str | None = None, digits: int = 3,
) -> Figure:  # fmt: skip
    """Bars in groups, one colour a series: the mean over seeds, its standard deviation as a whisker, every seed as a
    dot; the mean is printed where there is room.

    `table` maps a group (along the axis) to its series, such as {"nothing": {"R@1": [0.1, 0.2]}}: one value a seed. A
    group need not have all series. For a single series there is `ablation_bars`.
    """
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    if not names or not all(table.values()):
        raise ValueError("there is nothing to draw: give at least one group, and each group at least one series")
    values = {}
    for g, (group, row) in enumerate(table.items()):
        for name, seeds in row.items():
            values[g, name] = v = array(seeds, f"table[{group!r}][{name!r}]", ndim=1).astype(float)
            if not len(v) or not np.isfinite(v).all():
                raise ValueError(f"table[{group!r}][{name!r}] must be finite numbers, one a seed, at least one")
    slot, width = (WIDTH - 0.9) / len(table), 0.84 / len(names)
    heads = [wrap(group, slot - 0.12, SMALL) for group in table]
    keys = len(names) + 1 + (chance is not None)
    fig = new_figure(WIDTH, 3.3 + text_height(max(head.count("\n") for head in heads), SMALL) + 0.2 * -(-keys // 2))
    ax = fig.add_subplot()
    tops, lows, handles, several = [], [0.0], {}, None
    for i, name in enumerate(names):
        colour = CYCLE[i % len(CYCLE)]
        for g in range(len(table)):
            if (g, name) not in values:
                continue
            v, x = values[g, name], g + (i - (len(names) - 1) / 2) * width
            mean, std = v.mean(), v.std(ddof=1) if len(v) > 1 else 0.0
            bar = ax.bar(x, mean, 0.92 * width, color=colour, alpha=0.5, yerr=std or None,
                         error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3})  # fmt: skip
            handles.setdefault(wrap(name, 3.2, SMALL), bar)
            (dots,) = ax.plot(x + _spread(len(v), 0.3 * width), v, "o", color=colour, markersize=4.5, zorder=3,
                              markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
            several = several or (dots if len(v) > 1 else None)
            tops.append(max(mean + std, v.max(), 0.0))
            lows.append(min(mean - std, v.min()))
            number = f"{mean:.{digits}f}"
            if text_width(number, SMALL) + 0.05 < slot * width:
                ax.annotate(number, (x, tops[-1]), (0, 5), textcoords="offset points", ha="center", va="bottom",
                            fontsize=SMALL, zorder=4,
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    top, low = max(*tops, chance or 0.0), min(lows)
    if several:
        handles["one seed (whiskers: standard deviation)"] = several
    if chance is not None:  # in the legend, for at the line it could hide a bar's number
        handles[f"chance {chance:.{digits}g}"] = ax.axhline(chance, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2,
                                                            zorder=1.5)  # fmt: skip
    if low < 0:
        ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.set_xticks(range(len(table)), heads, parse_math=False)
    ax.set(xlim=(-0.55, len(table) - 0.45), ylim=(1.05 * low, top + 0.12 * (top - low)), ylabel=ylabel,
           title=title or "")  # fmt: skip
    ax.grid(False, axis="x")
    ax.tick_params(axis="x", length=0)
    fig.legend([*handles.values()], [*handles], loc="outside lower right", ncols=2)
    return fig


def histograms(
    groups: Mapping[str, Any], *, xlabel: str, bins: int = 40, title: str | None = None,
    vline: tuple[float, str] | None = None,
) -> Figure:  # fmt: skip
    """How the values of several groups are spread: histograms over each other, on the same bins.

    `groups` maps a name to its values (n,), with as many in each as you like: a bar is the share of its own group.
    `vline` is a value worth knowing and its name.
    """
    values = {name: array(v, f"groups[{name!r}]", ndim=1).astype(float) for name, v in groups.items()}
    if not values:
        raise ValueError("there is nothing to draw: groups is empty")
    for name, v in values.items():
        if not len(v) or not np.isfinite(v).all():
            raise ValueError(f"groups[{name!r}] must be finite numbers, at least one: leave out what is not")
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), bins=bins)
    fig = new_figure(WIDTH, 3.4)
    ax = fig.add_subplot()
    for i, (name, v) in enumerate(values.items()):
        colour, share = CYCLE[i % len(CYCLE)], np.full(len(v), 1 / len(v))
        label = f"{name}: mean {v.mean():.3g} (n = {len(v):,})"
        ax.hist(v, edges, weights=share, color=colour, alpha=0.3)
        ax.hist(v, edges, weights=share, color=colour, histtype="step", linewidth=1.8, label=label,
                linestyle=("-", (0, (4, 2)), (0, (1, 1)))[i % 3])  # fmt: skip
    ax.set(xlabel=xlabel, ylabel="share of the group")
    if vline is not None:
        _level(ax, *vline, vertical=True)
    ax.set_title(title or "", pad=18 if vline is not None else 6)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return fig


def stacked_times(rows: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str | None = None) -> Figure:
    """Where the time goes: one level bar a row, made of its parts, with the total at its end.

    `rows` maps a name to the values of its parts, such as {"linear patches": {"image embedding": 0.4, "blocks": 12.0}}.
    Rows may have different parts; the same part has the same colour everywhere, and parts follow each other in the
    order of their first mention.
    """
    if not rows or not all(rows.values()):
        raise ValueError("there is nothing to draw: give at least one row, and each row at least one part")
    for name, row in rows.items():
        if wrong := [part for part, v in row.items() if not (np.isfinite(v) and v >= 0)]:
            raise ValueError(f"rows[{name!r}][{wrong[0]!r}] is {row[wrong[0]]}: give a number of 0 or more")
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    labels = [wrap(name, 2.2, SMALL) for name in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    fig = new_figure(WIDTH, 1.0 + (0.3 if title else 0) + (0.2 + text_height(lines, SMALL)) * len(rows))
    ax = fig.add_subplot()
    longest = max(sum(row.values()) for row in rows.values()) or 1.0
    for p, part in enumerate(parts):
        colour = CYCLE[p % len(CYCLE)]
        starts = [sum(row.get(q, 0.0) for q in parts[:p]) for row in rows.values()]
        lengths = [row.get(part, 0.0) for row in rows.values()]
        ax.barh(range(len(rows)), lengths, left=starts, height=0.62, color=colour, edgecolor="white", linewidth=0.8,
                label=part)  # fmt: skip
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if text_width(_short(length), SMALL) + 0.1 < 4.2 * length / longest:  # the axis is a little longer
                ax.text(start + length / 2, i, _short(length), ha="center", va="center", fontsize=SMALL,
                        color=_ink_on(colour))  # fmt: skip
    for i, row in enumerate(rows.values()):
        ax.annotate(_short(sum(row.values())), (sum(row.values()), i), (5, 0), textcoords="offset points",
                    va="center", fontsize=SMALL, weight="bold")  # fmt: skip
    ax.set_yticks(range(len(rows)), labels, parse_math=False)
    ax.set(xlim=(0, 1.13 * longest), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, title=title or "")
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return fig


def _short(value: float) -> str:
    """Three digits that matter, never an exponent for large numbers: 0.412, 12.3, 948, 1,204."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def two_clouds(panels: Mapping[str, Mapping[str, Any]], *, lines: int = 0, title: str | None = None) -> Figure:
    """Where two kinds of vectors lie, in panels side by side, for instance before and after training.

    `panels` maps a panel's title to its clouds, name -> points (N, 2), projected by the caller: the same names in each,
    for instance "pictures" and "texts". All panels have one scale, so that distances can be compared. `lines` joins the
    first points of a panel's first two clouds, which must then be pairs, in the same order.
    """
    clouds = {head: {name: array(xy, f"panels[{head!r}][{name!r}]", ndim=2).astype(float) for name, xy in parts.items()}
              for head, parts in panels.items()}  # fmt: skip
    if not clouds or not all(clouds.values()):
        raise ValueError("there is nothing to draw: give at least one panel, and each panel at least one cloud")
    names = [*next(iter(clouds.values()))]
    for head, parts in clouds.items():
        if [*parts] != names:
            raise ValueError(f"panels[{head!r}] has the clouds {', '.join(parts)}: give {', '.join(names)} in each")
        for name, xy in parts.items():
            if xy.shape[1] != 2 or not len(xy) or not np.isfinite(xy).all():
                raise ValueError(f"panels[{head!r}][{name!r}] must be finite points of shape (N, 2), not {xy.shape}")
        if lines and (len(names) < 2 or len({*(len(parts[name]) for name in names[:2])}) > 1):
            raise ValueError(f"lines join pairs, but the first two clouds of panels[{head!r}] are not of one length")
    every = np.concatenate([xy for parts in clouds.values() for xy in parts.values()])
    low, high = every.min(axis=0), every.max(axis=0)
    reach = 0.54 * max((high - low).max(), 1e-12)
    side = min(3.8, (WIDTH - 0.3) / len(clouds) - 0.1)
    heads = [wrap(head, side - 0.1, 11, "bold") for head in clouds]
    above = text_height(max(head.count("\n") + 1 for head in heads), 11) + 0.12
    width = max(len(clouds) * (side + 0.1) + 0.1, 4.0)
    heading = wrap(title, width - 0.2, 11, "bold") if title else ""
    top = text_height(heading.count("\n") + 1, 11) + 0.1 if title else 0.0
    foot, height = 0.35, 0.35 + side + above + top
    fig = new_figure(width, height, layout="none")
    axes = [fig.add_axes(((0.1 + i * (side + 0.1)) / width, foot / height, side / width, side / height))
            for i in range(len(clouds))]  # fmt: skip
    for ax, head, parts in zip(axes, heads, clouds.values(), strict=True):
        for k, name in enumerate(names):
            ax.plot(*parts[name].T, "o^sDv"[k % 5], color=(BLUE, ORANGE, *CYCLE[4:])[k % 5], markersize=4.5, alpha=0.75,
                    markeredgecolor="white", markeredgewidth=0.4, label=name, zorder=2 + k)  # fmt: skip
        for a, b in zip(*(parts[name][:lines] for name in names[:2]), strict=True) if lines else ():
            ax.plot(*np.stack([a, b], axis=1), color=INK, linewidth=0.7, zorder=1.5)
        middle = (low + high) / 2
        ax.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach), title=head,
               aspect="equal", xticks=[], yticks=[])  # fmt: skip
        ax.spines[:].set_visible(True)  # the directions mean nothing by themselves: a plain frame, no numbers
    if lines:
        axes[0].plot([], [], color=INK, linewidth=0.7, label="a true pair")
    fig.text(0.1 / width, 1 - 0.06 / height, heading, va="top", fontsize=11, weight="bold", parse_math=False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower right", ncols=3)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# Matrices


def similarity_matrix(
    matrix: Any, row_labels: Sequence[str] | None = None, col_labels: Sequence[str] | None = None, *,
    title: str | None = None, digits: int = 2,
) -> Figure:  # fmt: skip
    """A matrix (R, C) as colours, with its numbers where they fit. Labels of any length are wrapped or turned."""
    m = array(matrix, "matrix", ndim=2).astype(float)
    return _matrix(m, row_labels, col_labels, _numbers(m, digits), title=title)


def picture_text_matrix(
    scores: Any, images: Any, texts: Sequence[str], *, title: str | None = None, numbers: bool = True, digits: int = 2,
    diagonal: bool = True, bar: str = "similarity",
) -> Figure:  # fmt: skip
    """How well pictures and texts fit: scores (R, C), a row for each picture and a column for each text.

    `images` are R pictures, as for `picture_grid`, shown beside their rows; `texts` C captions. An orange frame marks
    the diagonal, where picture i meets text i: the true pairs, if both are in the same order (else, for instance with
    class names, `diagonal=False`). `bar` says what the colours mean, for instance "cosine" or "probability".
    """
    m = array(scores, "scores", ndim=2).astype(float)
    shown = _pictures(images)
    _same_length(shown, "images", len(m), "rows of scores")
    _same_length(texts, "texts", m.shape[1], "columns of scores")
    cells = _numbers(m, digits) if numbers else [[""] * m.shape[1]] * len(m)
    return _matrix(m, None, texts, cells, title=title, axes=("pictures", "texts"), bar=bar, pictures=shown,
                   diagonal=diagonal)  # fmt: skip


def similarity_over_time(
    matrices: Any, titles: Sequence[str], *, title: str | None = None, axes: tuple[str, str] = ("pictures", "texts"),
    bar: str = "similarity",
) -> Figure:  # fmt: skip
    """Matrices (R, C) of the same pictures and texts side by side, for instance at the start, in the middle and at the
    end of a training run: each under its title, all in one scale of colours, without labels or numbers.

    `axes` names what stands in rows and in columns.
    """
    ms = [array(matrix, f"matrices[{i}]", ndim=2).astype(float) for i, matrix in enumerate(matrices)]
    if not ms:
        raise ValueError("there is nothing to draw: matrices is empty")
    _same_length(titles, "titles", len(ms), "matrices")
    R, C = ms[0].shape
    for i, m in enumerate(ms):
        if m.shape != (R, C):
            raise ValueError(f"matrices[{i}] has the shape {m.shape}, the first ({R}, {C}): give the same pairs")
    left, gap, right = 0.3, 0.25, 1.05
    wide = min(2.6, (WIDTH - left - right + gap) / len(ms) - gap)
    high = max(wide * R / C, text_width(bar, NORMAL), text_width(axes[0], NORMAL))  # the words beside it must fit
    names = [wrap(name, wide + gap - 0.1, NORMAL) for name in titles]
    above = text_height(max(name.count("\n") + 1 for name in names), NORMAL) + 0.06
    width = left + len(ms) * (wide + gap) - gap + right
    heading = wrap(title, width - 0.12, 11, "bold") if title else ""
    head = text_height(heading.count("\n") + 1, 11) + 0.1 if title else 0.05
    fig = new_figure(width, 0.28 + high + above + head, layout="none")
    low, top = min(np.nanmin(m) for m in ms), max(np.nanmax(m) for m in ms)
    for i, (m, name) in enumerate(zip(ms, names, strict=True)):
        ax, bar_ax = _map_axes(fig, left + i * (wide + gap), 0.28, wide, high)
        image = ax.imshow(m, cmap="Blues", vmin=low, vmax=top, aspect="auto", interpolation="nearest")
        ax.spines[:].set_visible(True)  # pale cells alone would not show where the matrix ends
        ax.set(xticks=[], yticks=[], xlabel=axes[1], ylabel=axes[0] if i == 0 else "")
        ax.text(0, 1 + 0.05 / high, name, transform=ax.transAxes, va="bottom", linespacing=1.15, parse_math=False)
        if i < len(ms) - 1:
            bar_ax.remove()
    fig.colorbar(image, cax=bar_ax, label=bar).outline.set_visible(False)
    fig.text(0.06 / width, 1 - 0.06 / fig.get_figheight(), heading, va="top", fontsize=11, weight="bold",
             parse_math=False)  # fmt: skip
    return fig


def confusion(counts: Any, names: Sequence[str], *, title: str | None = None) -> Figure:
    """Counts (K, K), row = the true class, column = the predicted one; colour = the share of the row."""
    c = array(counts, "counts", ndim=2)
    if c.shape != (len(names), len(names)):
        raise ValueError(f"counts must be of shape ({len(names)}, {len(names)}) for {len(names)} names, not {c.shape}")
    share = c / np.maximum(c.sum(axis=1, keepdims=True), 1)
    numbers = [[f"{v:,}" if v else "" for v in row] for row in c.tolist()]
    return _matrix(share, names, names, numbers, title=title, axes=("true", "predicted"), limits=(0, 1),
                   bar="share of the row")  # fmt: skip


def _numbers(m: np.ndarray, digits: int) -> list[list[str]]:
    """The numbers of a matrix as text, so many digits after the point and never a "-0.00"."""
    return [[f"{round(v, digits) + 0.0:.{digits}f}" for v in row] for row in m.tolist()]


def _shorten(label: str, lines: int) -> str:
    """A label on at most `lines` lines of at most 2.6 inches, with an ellipsis where it does not fit."""
    for width in (1.7, 2.6):
        broken = wrap(label, width, SMALL).split("\n")
        if len(broken) <= lines:
            return "\n".join(broken)
    return "\n".join(broken[:lines]).rstrip(" ,.") + "…"


def _map_axes(fig: Figure, left: float, bottom: float, width: float, height: float) -> tuple[Axes, Axes]:
    """Axes for a map and for its colour bar beside it, exactly as high, placed in inches."""
    w, h = fig.get_size_inches()
    ax = fig.add_axes((left / w, bottom / h, width / w, height / h))
    bar = fig.add_axes(((left + width + 0.12) / w, bottom / h, 0.13 / w, height / h))
    ax.tick_params(length=0)
    for axes in (ax, bar):
        axes.grid(False)
        axes.spines[:].set_visible(False)
    return ax, bar


def _matrix(
    m: np.ndarray, row_labels: Sequence[str] | None, col_labels: Sequence[str] | None, numbers: list[list[str]], *,
    title: str | None, axes: tuple[str, str] = ("", ""), limits: tuple[float, float] | None = None, bar: str = "",
    pictures: list[np.ndarray] | None = None, diagonal: bool = False,
) -> Figure:  # fmt: skip
    """A matrix (R, C) with labels, or `pictures` (H, W, 3) in place of the rows' labels, and its cells' numbers."""
    R, C = m.shape
    _same_length(row_labels, "row_labels", R, "rows")
    _same_length(col_labels, "col_labels", C, "columns")
    col_labels = None if col_labels is None else [str(label) for label in col_labels]
    rows = [] if row_labels is None else [wrap(label, 2.2, SMALL) for label in row_labels]
    beside = 0.1 + max([0.0, *(text_width(line, SMALL) for label in rows for line in label.split("\n"))])
    if pictures:
        thumb = max(0.1, min(0.69, 5.2 / R - 0.06))
        beside = thumb + 0.12
    name = 0.25 if axes[0] else 0.05  # inches for the name of an axis
    right = 0.75 + (0.2 if bar else 0)
    cell = min(0.75, (WIDTH - beside - name - right) / C)
    lines = max([1, *(label.count("\n") + 1 for label in rows)])
    high = max(min(cell, 5.2 / R), text_height(lines, SMALL) if R <= 24 else 0)  # cells may be wide, never unreadable
    cell = cell if cell > 0.4 else max(min(cell, high), 2.0 / C)  # square, where no numbers need the width
    words = [word for label in col_labels or [] for word in label.split()]
    columns = [wrap(label, cell - 0.06, SMALL) for label in col_labels or []]
    stacked = max([1, *(label.count("\n") + 1 for label in columns)])
    turned = stacked > 5 or any(text_width(word, SMALL) > cell - 0.06 for word in words)
    above = text_height(stacked, SMALL) if stacked > 1 else 0.15
    if turned:
        fit = max(1, int(cell / text_height(1, SMALL)))  # lines of a turned label
        columns = [_shorten(label, fit) for label in col_labels or []]
        above = max([0.15, *(text_width(line, SMALL) for label in columns for line in label.split("\n"))])
    above = above + 0.08 if columns else 0.0

    width = max(beside + name + C * cell + right, 4.0)
    heading = wrap(title, width - 0.12, 11, "bold") if title else ""
    head = text_height(heading.count("\n") + 1, 11) + 0.1 if title else 0.05
    fig = new_figure(width, 0.1 + R * high + above + name + head, layout="none")
    ax, bar_ax = _map_axes(fig, name + beside, 0.1, C * cell, R * high)
    low, top = limits or (float(np.nanmin(m)), float(np.nanmax(m)))
    image = ax.imshow(m, cmap="Blues", vmin=low, vmax=top, aspect="auto")
    size = next((s for s in (SMALL, 8.0) if max(text_width(v, s) for row in numbers for v in row) < cell - 0.04), None)
    if size and high > 0.16:
        for r in range(R):
            for c in range(C):
                ink = _ink_on(image.to_rgba(m[r, c]))
                ax.text(c, r, numbers[r][c], ha="center", va="center", fontsize=size, color=ink)
    step_r, step_c = (1 + int(0.13 / high), 1 + int(0.13 / cell))  # rather leave labels out than print one over another
    ax.set_yticks(range(R)[::step_r] if rows else [], rows[::step_r], parse_math=False)
    ax.set_xticks(range(C)[::step_c] if columns else [], columns[::step_c], parse_math=False)
    ax.tick_params(axis="x", labelrotation=90 if turned else 0)
    ax.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False)
    if cell > 0.1 and high > 0.1:
        ax.vlines(np.arange(C + 1) - 0.5, -0.5, R - 0.5, color="white", linewidth=1)
        ax.hlines(np.arange(R + 1) - 0.5, -0.5, C - 0.5, color="white", linewidth=1)
    for i in range(min(R, C) if diagonal else 0):
        ax.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.4, zorder=3,
                               clip_on=False))  # fmt: skip
    for r, pixels in enumerate(pictures or []):
        h, w = pixels.shape[:2]
        side = min(thumb, high - 0.04) / max(h, w)  # inches a pixel
        x, dx, dy = -0.5 - (0.06 + thumb / 2) / cell, w * side / cell / 2, h * side / high / 2
        ax.imshow(pixels, extent=(x - dx, x + dx, r + dy, r - dy), aspect="auto", clip_on=False)
    ax.set(xlim=(-0.5, C - 0.5), ylim=(R - 0.5, -0.5))
    fig.colorbar(image, cax=bar_ax, label=bar).outline.set_visible(False)
    inches = fig.get_figheight()
    if axes[0]:
        fig.text(0.06 / width, (0.1 + R * high / 2) / inches, axes[0], rotation=90, va="center")
        fig.text((name + beside + C * cell / 2) / width, (0.1 + R * high + above + 0.03) / inches, axes[1], ha="center")
    fig.text(0.06 / width, 1 - 0.06 / inches, heading, va="top", fontsize=11, weight="bold", parse_math=False)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# What a model looks at


def attention_overlay(
    image: Any, maps: Any, *, titles: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """A picture and where attention goes in it: one overlay for each of `maps` (n, gh, gw), or a grid of overlays for
    (layers, heads, gh, gw).

    Each map is stretched to its own maximum, which is printed above it. `titles` name the maps, or the layers of
    a grid.
    """
    m = array(maps, "maps", ndim=(3, 4)).astype(float)
    grid = m.ndim == 4
    _same_length(titles, "titles", len(m), "maps")
    titles = titles or [f"{'layer' if grid else 'map'} {i + 1}" for i in range(len(m))]
    names = [f"{name}, head {h + 1}" for name in titles for h in range(m.shape[1])] if grid else titles
    names = [f"{name}\nmax {peak:.2f}" for name, peak in zip(names, m.max(axis=(-2, -1)).flat, strict=True)]
    patches = m.shape[-2] * m.shape[-1]
    note = ("The darker, the more attention, up to each map's own maximum. No preference at all would be "
            f"1/{patches} = {1 / patches:.3g} everywhere.")  # fmt: skip
    return _overlays(picture(image), m, names, note, title=title)


def transport_plan(
    image: Any, plan: Any, words: Sequence[str], *, boxes: Sequence[Sequence[float] | None] | None = None,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """Where each word is carried in one picture (ViLT, Fig. 4): plan (m, gh, gw), the mass of m words on each patch.

    `boxes` has one entry a word: where the named thing really is, as (left, top, right, bottom) in pixels of the
    picture, or None.
    """
    pixels, m = picture(image), array(plan, "plan", ndim=3).astype(float)
    if not len(m):
        raise ValueError("there is nothing to draw: plan has no words")
    _same_length(words, "words", len(m), "maps of the plan")
    framed = _boxes(boxes, len(m), "words")
    note = ("The darker, the more of the word lies there, up to each word's own maximum. Spread evenly it would be "
            f"{m.mean():.2g} everywhere.") + framed  # fmt: skip
    names = [f"{word}\nmax {peak:.3f}" for word, peak in zip(words, m.max(axis=(1, 2)), strict=True)]
    return _overlays(pixels, m, names, note, boxes=boxes, title=title)


def word_maps_on_pictures(
    images: Any, maps: Any, titles: Sequence[Any], *, boxes: Sequence[Sequence[float] | None] | None = None,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """Where one word of each picture's caption looks: every picture, and beside it the map or maps of its word.

    `images` are n pictures, as for `picture_grid`; maps (n, gh, gw) are not negative, or (n, k, gh, gw) for k maps of
    each, such as two models' or two blocks'. `titles` has one entry a picture: the words above its map, or k of them.
    `boxes` as in `transport_plan`, one entry a picture.
    """
    shown, m = _pictures(images), array(maps, "maps", ndim=(3, 4)).astype(float)
    _same_length(m, "maps", len(shown), "pictures")
    _same_length(titles, "titles", len(shown), "pictures")
    m = m[:, None] if m.ndim == 3 else m
    k = m.shape[1]
    if not np.isfinite(m).all() or m.min() < 0:
        raise ValueError(f"maps must be numbers of 0 or more, but the lowest is {m.min():g}: clamp them first")
    rows = [[one] if isinstance(one, str) else [*one] for one in titles]
    for i, row in enumerate(rows):
        _same_length(row, f"titles[{i}]", k, "maps of a picture")
    note = "The darker, the more, up to each map's own maximum." + _boxes(boxes, len(shown), "pictures")
    repeated = None if boxes is None else [box for box in boxes for _ in range(k)]
    return _overlays(shown, m, [name for row in rows for name in row], note, boxes=repeated, title=title)


def _boxes(boxes: Sequence[Sequence[float] | None] | None, n: int, what: str) -> str:
    """Check the frames of things, one for each of `n`. Returns the sentence about them, empty without any."""
    _same_length(boxes, "boxes", n, what)
    for i, box in enumerate(boxes or []):
        if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"boxes[{i}] is {tuple(box)}: give (left, top, right, bottom) in pixels")
    return " Blue frame: where the thing is." if any(box is not None for box in boxes or []) else ""


def _overlays(
    pixels: np.ndarray | list[np.ndarray], m: np.ndarray, names: Sequence[str], note: str, *, title: str | None,
    boxes: Sequence[Sequence[float] | None] | None = None,
) -> Figure:  # fmt: skip
    """Maps over a picture (H, W, 3), (n, gh, gw) or (layers, heads, gh, gw), or over a picture of its own for each row
    of (n, k, gh, gw), each map under its name; see above."""
    own = pixels if isinstance(pixels, list) else None
    grid = m.ndim == 4
    flat = m.reshape(-1, *m.shape[-2:])
    per_row = m.shape[1] if grid else -(-len(m) // -(-len(m) // 5))  # rows of equal length, of five at most
    if per_row > 12:
        raise ValueError(f"{per_row} heads side by side are too many to see anything: show 12 at most")
    groups = min(len(own), max(1, 6 // (per_row + 1))) if own else 1  # so many pictures with their maps in a row
    rows, columns = -(-len(flat) // (per_row * groups)), groups * (per_row + 1)  # a picture stands left of its maps
    cell = min(1.75, WIDTH / columns)
    side = cell - 0.12
    texts = [wrap(name, side, 8) for name in names]
    label = text_height(max(t.count("\n") + 1 for t in texts), 8) + 0.06
    height = side * max(p.shape[0] / p.shape[1] for p in own or [pixels])
    width = columns * cell
    heading = wrap(title, width - 0.12, 11, "bold") if title else ""
    head = text_height(heading.count("\n"), 11) + 0.3 if title else 0.05
    note = wrap(note, width - 0.12, 8)
    foot = text_height(note.count("\n") + 1, 8) + 0.08

    fig = new_figure(width, rows * (height + label + 0.06) + head + foot, layout="none")
    ax = inch_axes(fig)
    ax.text(0.06, fig.get_figheight() - 0.06, heading, va="top", fontsize=11, weight="bold", parse_math=False)
    ax.text(0.06, 0.05, note, va="bottom", fontsize=8, color=QUIET)
    heat = np.empty((*m.shape[-2:], 4))
    heat[..., :3] = to_rgb(WRONG)
    for k in range(len(flat)):
        row, c = divmod(k, per_row)
        seen = own[row] if own else pixels
        pale = np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2) / 255 * 0.5 + 0.5
        r, group = divmod(row, groups)
        left = 0.06 + group * (per_row + 1) * cell
        top = fig.get_figheight() - head - r * (height + label + 0.06) - label
        low = top - side * seen.shape[0] / seen.shape[1]
        place = (left + (c + 1) * cell, left + (c + 1) * cell + side, low, top)
        heat[..., 3] = 0.75 * np.clip(flat[k] / max(flat[k].max(), 1e-12), 0, 1)
        ax.imshow(pale, extent=place, aspect="auto")
        ax.imshow(heat.copy(), extent=place, aspect="auto", interpolation="nearest")
        if boxes is not None and boxes[k] is not None:
            x0, y0, x1, y1 = (float(v) * side / seen.shape[1] for v in boxes[k])
            for thick, colour in ((4, "white"), (1.8, BLUE)):  # seen on light and on dark
                ax.add_patch(Rectangle((place[0] + x0, top - y1), x1 - x0, y1 - y0, fill=False, edgecolor=colour,
                                       linewidth=thick))  # fmt: skip
        ax.text(place[0] + side / 2, top + 0.03, texts[k], ha="center", va="bottom", fontsize=8, linespacing=1.1,
                parse_math=False)  # fmt: skip
        if c == 0 and (row == 0 or grid):
            ax.imshow(seen, extent=(left, left + side, low, top), aspect="auto")
            ax.text(left + side / 2, top + 0.03, "picture", ha="center", va="bottom", fontsize=8)
    ax.set(xlim=(0, width), ylim=(0, fig.get_figheight()))
    return fig


def position_similarity(pos: Any, grid: int | tuple[int, int], *, title: str | None = None) -> Figure:
    """How alike learned positions are (ViT, Fig. 7 centre): the map at (row, column) shows the cosine similarity of
    that patch's position with the position of every patch.

    `pos` is (N, D) without the class token's row; `grid` is the number of patches a side, or (rows, columns).
    """
    p = array(pos, "pos", ndim=2).astype(float)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if len(p) != rows * columns:
        hint = ": leave out the class token's row" if len(p) == rows * columns + 1 else ""
        raise ValueError(f"pos has {len(p)} rows for {rows} x {columns} patches{hint}")
    p = p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12)
    similarity = (p @ p.T).reshape(rows, columns, rows, columns)
    gap = 1  # cells of white between two maps
    sheet = np.full((rows * (rows + gap) - gap, columns * (columns + gap) - gap), np.nan)
    for r in range(rows):
        for c in range(columns):
            y, x = r * (rows + gap), c * (columns + gap)
            sheet[y : y + rows, x : x + columns] = similarity[r, c]
    width, height = 4.6, 4.6 * sheet.shape[0] / sheet.shape[1]
    fig = new_figure(width + 1.6, height + 0.6 + (0.3 if title else 0), layout="none")
    ax, bar_ax = _map_axes(fig, 0.55, 0.5, width, height)
    image = ax.imshow(sheet, interpolation="nearest", vmax=1, aspect="auto")
    ax.set_xticks(np.arange(columns) * (columns + gap) + (columns - 1) / 2, range(1, columns + 1))
    ax.set_yticks(np.arange(rows) * (rows + gap) + (rows - 1) / 2, range(1, rows + 1))
    ax.set(xlabel="column of the patch", ylabel="row of the patch", title=title or "")
    fig.colorbar(image, cax=bar_ax, label="cosine similarity").outline.set_visible(False)
    return fig


def attention_distance(
    distances: Any, max_distance: float, *, hline: tuple[float, str] | None = None, title: str | None = None
) -> Figure:
    """How far each head looks (ViT, Fig. 7 right): distances (layers, heads) in pixels, one dot a head.

    `max_distance` is the largest distance there is between two patches; `hline` may name, for instance, the distance of
    a head that looks everywhere equally.
    """
    d = array(distances, "distances", ndim=2).astype(float)
    layers, heads = d.shape
    fig = new_figure(WIDTH * 0.75, 3.6)
    ax = fig.add_subplot()
    shift = np.linspace(-0.12, 0.12, heads) if heads > 1 else np.zeros(1)
    few = heads <= 6
    for h in range(heads):
        name = f"head {h + 1}" if few else "one head" if h == 0 else None
        ax.plot(np.arange(1, layers + 1) + shift[h], d[:, h], "o", color=CYCLE[h] if few else BLUE, label=name,
                markersize=6, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    ax.plot(np.arange(1, layers + 1), d.mean(axis=1), color=QUIET, linewidth=1.2, zorder=1, label="mean of the heads")
    ax.set(xlabel="layer", ylabel="mean attention distance (pixels)", title=title or "", ylim=(0, 1.04 * max_distance),
           xlim=(0.5, layers + 0.5))  # fmt: skip
    ax.set_xticks(range(1, layers + 1))
    if hline is not None:
        name = wrap(hline[1], 1.6, SMALL)  # in the legend, for on the line it would hide dots
        ax.axhline(hline[0], color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1, label=name)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig


def block_attention(mass: Any, *, even: float | None = None, title: str | None = None) -> Figure:
    """Who looks at whom in a single stream: mass (layers, 4), the shares of attention from text to text, text to image,
    image to text and image to image, so that the first two add up to 1, and the last two.

    `even` is the share of text among all tokens, which a token without any preference would give to the text.
    """
    m = array(mass, "mass", ndim=2).astype(float)
    if m.shape[1] != 4:
        raise ValueError(f"mass must be of shape (layers, 4), but its shape is {m.shape}")
    sums = m.reshape(-1, 2, 2).sum(axis=2)  # (layers, 2)
    if len(off := np.argwhere(~(np.abs(sums - 1) < 0.01))):
        layer, who = off[0]
        raise ValueError(f"what {('text', 'image')[who]} tokens look at in layer {layer + 1} adds up to "
                         f"{sums[layer, who]:.3g}, not 1: average over heads and over these tokens' rows")  # fmt: skip
    fig = new_figure(WIDTH, 3.3 + (0.25 if title else 0))
    layers = np.arange(1, len(m) + 1)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, who, shares in zip(axes, ("text", "image"), (m[:, :2], m[:, 2:]), strict=True):
        for name, colour, start, height in (
            ("at text", ORANGE, 0 * shares[:, 0], shares[:, 0]), ("at image", BLUE, shares[:, 0], shares[:, 1]),
        ):  # fmt: skip
            ax.bar(layers, height, bottom=start, width=0.7, color=colour, label=name)
            for x, low, h in zip(layers, start, height, strict=True):
                if h > 0.07 and len(layers) <= 6:
                    ax.text(x, low + h / 2, f"{h:.2f}", ha="center", va="center", fontsize=SMALL, color=_ink_on(colour),
                            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1}, zorder=4)  # fmt: skip
        if even is not None:
            ax.axhline(even, color=INK, linestyle=(0, (5, 3)), linewidth=1.4, label="at text, without any preference")
        ax.set(xlabel="layer", title=f"{who} tokens look …", ylim=(0, 1))
        ax.set_xticks(layers)
        ax.grid(False, axis="x")
    axes[0].set_ylabel("share of attention")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return fig
