"""Painting a scene with Pillow, on a canvas four times too large that is then averaged down: smooth edges for free.

A kind is a short list of shapes in a box from -1 to 1. All shapes are polygons, worked out once, so that painting a
thing is scaling a few arrays. Its outline and the light halo around it are the same shapes, grown: what is left
visible of them is a line around the whole figure, and black at night or white on snow still stand out.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise, repeat
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from minivlp.data.picturebook.world import CANVAS, COLOURS, Scene, Thing

T = TypeVar("T")
RGB = tuple[int, int, int]
Points = np.ndarray  # (n, 2), x to the right and y down

OVERSAMPLING = 4
POOL_PAYS_FROM = 1000  # pictures: below that, starting processes takes longer than it saves
MOST_WORKERS = 8

INK = (46, 40, 54)
HALO = (255, 252, 244)
CREAM = (255, 246, 220)
GLASS = (206, 232, 244)
WOOD = (150, 116, 86)
LEAF = (104, 158, 92)
BEAK = (238, 176, 78)
ROSE = (226, 128, 136)
PAPER = (252, 248, 238)
BOARD = (62, 86, 80)
CHALK = (244, 242, 232)


# ---- shapes in a box from -1 to 1 ----


@dataclass(frozen=True)
class Shape:
    """A filled polygon. `paint` is a colour, or what to do with the thing's own: "own", "deep" (darker), "pale"
    (lighter) or "line" (ink that shows on it). A `solid` shape is part of the silhouette and gets the outline."""

    points: Points
    paint: str | RGB = "own"
    solid: bool = True


def ellipse(x: float, y: float, rx: float, ry: float, *, turn: float = 0.0, corners: int = 28) -> Points:
    """An ellipse around (x, y), turned clockwise by `turn` degrees."""
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    flat = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1)
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return flat @ np.array([[c, s], [-s, c]]) + (x, y)


def rounded(corners: Sequence[tuple[float, float]], radius: float = 0.08) -> Points:
    """A polygon whose corners are cut by quadratic curves that begin `radius` away from them."""
    points = np.array(corners, float)
    steps = np.linspace(0, 1, 6)[:, None]
    arcs = []
    for before, corner, after in zip(np.roll(points, 1, 0), points, np.roll(points, -1, 0), strict=True):
        back, on = before - corner, after - corner
        start = corner + back * min(0.5, radius / np.linalg.norm(back))
        end = corner + on * min(0.5, radius / np.linalg.norm(on))
        arcs.append((1 - steps) ** 2 * start + 2 * steps * (1 - steps) * corner + steps**2 * end)
    return np.concatenate(arcs)


def rectangle(left: float, top: float, right: float, bottom: float, radius: float = 0.06) -> Points:
    return rounded([(left, top), (right, top), (right, bottom), (left, bottom)], radius)


def curve(corners: Sequence[tuple[float, float]], *, steps: int = 6) -> Points:
    """A closed smooth curve through the given points (a Catmull-Rom spline)."""
    p1 = np.array(corners, float)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    bend = 2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    return (bend / 2).transpose(1, 0, 2).reshape(-1, 2)


def _arc(start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A quadratic curve from start to end, drawn towards `bend`."""
    t = np.linspace(0, 1, 10)[:, None]
    path = (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(bend) + t**2 * np.array(end)
    return [tuple(point) for point in path]


def stroke(path: Sequence[tuple[float, float]], width: float, *, smooth: bool = True) -> Points:
    """A line of the given width along a path, as a polygon with round ends."""
    line = np.array(path, float)
    if smooth and len(line) > 2:
        # Reflected end points keep the open curve's ends where they are.
        closed = curve([2 * line[0] - line[1], *line, 2 * line[-1] - line[-2]])
        line = np.concatenate([closed[6 : 6 * len(path)], line[-1:]])
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) * width / 2
    cap = np.linspace(0, math.pi, 6)[1:-1, None]
    end = line[-1] + normal[-1] * np.cos(cap) + along[-1] * width / 2 * np.sin(cap)
    start = line[0] - normal[0] * np.cos(cap) - along[0] * width / 2 * np.sin(cap)
    return np.concatenate([line + normal, end, (line - normal)[::-1], start])


def grown(points: Points, by: float) -> Points:
    """The polygon with its edges moved outwards by `by`."""
    along = np.roll(points, -1, 0) - points
    length = np.linalg.norm(along, axis=1, keepdims=True)
    points, along = points[length[:, 0] > 1e-6], (along / np.maximum(length, 1e-9))[length[:, 0] > 1e-6]
    x, y = points[:, 0], points[:, 1]
    turn = np.sign(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))
    normal = np.stack([along[:, 1], -along[:, 0]], axis=1) * turn
    before = np.roll(normal, 1, 0)
    # The bisector of two normals, longer at a sharp corner but never a spike.
    spread = np.maximum(1 + np.sum(normal * before, axis=1, keepdims=True), 0.5)
    return points + by * (normal + before) / spread


def _eye(x: float, y: float, size: float = 0.09) -> list[Shape]:
    return [
        Shape(ellipse(x, y, size * 1.35, size * 1.5), HALO, False),
        Shape(ellipse(x + size * 0.15, y, size * 0.85, size), INK, False),
        Shape(ellipse(x + size * 0.4, y - size * 0.4, size * 0.35, size * 0.35), HALO, False),
    ]


def _house() -> list[Shape]:
    return [
        Shape(rectangle(0.36, -0.84, 0.64, -0.2), "deep"),
        Shape(rectangle(-0.74, -0.16, 0.74, 0.93), "own"),
        Shape(rounded([(-0.97, -0.02), (0, -0.95), (0.97, -0.02)], 0.1), "deep"),
        Shape(stroke([(-0.8, 0.0), (0.8, 0.0)], 0.07), "line", False),
        Shape(rectangle(-0.52, 0.18, -0.12, 0.56), "line", False),
        Shape(rectangle(-0.46, 0.24, -0.18, 0.50, 0.02), CREAM, False),
        Shape(rectangle(0.12, 0.24, 0.52, 0.93), "line", False),
        Shape(rectangle(0.18, 0.30, 0.46, 0.93, 0.1), WOOD, False),
        Shape(ellipse(0, -0.42, 0.15, 0.15), "line", False),
        Shape(ellipse(0, -0.42, 0.10, 0.10), CREAM, False),
    ]


def _tree() -> list[Shape]:
    crown = [(-0.52, 0.12, 0.42), (0.52, 0.12, 0.42), (-0.32, -0.38, 0.42), (0.34, -0.36, 0.42), (0, -0.5, 0.44)]
    return [
        Shape(rounded([(-0.15, 0.2), (0.15, 0.2), (0.26, 0.94), (-0.26, 0.94)], 0.08), WOOD),
        *(Shape(ellipse(x, y, r, r)) for x, y, r in crown),
        Shape(ellipse(0, 0.1, 0.5, 0.42)),
        Shape(ellipse(-0.28, -0.48, 0.22, 0.18), "pale", False),
        Shape(stroke([(0.2, -0.1), (0.38, 0.02), (0.58, -0.08)], 0.08), "deep", False),
        Shape(stroke([(-0.5, 0.2), (-0.3, 0.32), (-0.1, 0.22)], 0.08), "deep", False),
    ]


def _car() -> list[Shape]:
    wheels = [(-0.52, 0.56), (0.52, 0.56)]
    return [
        Shape(rounded([(-0.62, 0.1), (-0.46, -0.62), (0.3, -0.62), (0.62, 0.1)], 0.16)),
        Shape(rounded([(-0.96, -0.08), (0.74, -0.08), (0.96, 0.1), (0.96, 0.58), (-0.96, 0.58)], 0.16)),
        *(Shape(ellipse(x, y, 0.30, 0.30), INK) for x, y in wheels),
        *(Shape(ellipse(x, y, 0.15, 0.15), (214, 214, 220), False) for x, y in wheels),
        Shape(rounded([(-0.44, -0.06), (-0.35, -0.46), (-0.1, -0.46), (-0.1, -0.06)], 0.06), GLASS, False),
        Shape(rounded([(0.02, -0.06), (0.02, -0.46), (0.22, -0.46), (0.42, -0.06)], 0.06), GLASS, False),
        Shape(ellipse(0.86, 0.16, 0.09, 0.11), CREAM, False),
        Shape(stroke([(-0.04, 0.02), (-0.04, 0.5)], 0.05), "line", False),
        Shape(stroke([(-0.3, 0.14), (-0.16, 0.14)], 0.06), "line", False),
    ]


def _boat() -> list[Shape]:
    return [
        Shape(stroke([(-0.02, -0.9), (-0.02, 0.5)], 0.09), WOOD),
        Shape(rounded([(0.1, -0.9), (0.9, 0.2), (0.1, 0.2)], 0.08)),
        Shape(rounded([(-0.16, -0.6), (-0.16, 0.2), (-0.76, 0.2)], 0.08), "pale"),
        Shape(rounded([(-0.96, 0.38), (0.96, 0.38), (0.62, 0.92), (-0.6, 0.92)], 0.12)),
        Shape(rounded([(-0.8, 0.52), (0.8, 0.52), (0.75, 0.62), (-0.74, 0.62)], 0.02), CREAM, False),
    ]


def _cat() -> list[Shape]:
    return [
        Shape(stroke([(0.36, 0.8), (0.78, 0.76), (0.86, 0.4), (0.72, 0.16)], 0.2)),
        Shape(curve([(0, 0.05), (0.42, 0.4), (0.5, 0.84), (0, 0.93), (-0.5, 0.84), (-0.42, 0.4)])),
        Shape(rounded([(-0.62, -0.28), (-0.6, -0.95), (-0.06, -0.6)], 0.08)),
        Shape(rounded([(0.62, -0.28), (0.6, -0.95), (0.06, -0.6)], 0.08)),
        Shape(ellipse(0, -0.26, 0.66, 0.48)),
        Shape(rounded([(-0.5, -0.52), (-0.49, -0.76), (-0.3, -0.62)], 0.03), ROSE, False),
        Shape(rounded([(0.5, -0.52), (0.49, -0.76), (0.3, -0.62)], 0.03), ROSE, False),
        Shape(ellipse(0, 0.6, 0.22, 0.26), "pale", False),
        *_eye(-0.26, -0.28, 0.09),
        *_eye(0.26, -0.28, 0.09),
        Shape(rounded([(-0.08, -0.12), (0.08, -0.12), (0, -0.03)], 0.03), ROSE, False),
        *(Shape(stroke([(s * 0.3, -0.06 + d), (s * 0.6, -0.1 + 2 * d)], 0.04), "line", False)
          for s in (-1, 1) for d in (0, 0.06)),
        Shape(stroke([(0, 0.7), (0, 0.9)], 0.05), "line", False),
    ]  # fmt: skip


def _dog() -> list[Shape]:
    return [
        Shape(stroke([(-0.66, 0.06), (-0.86, -0.14), (-0.84, -0.44)], 0.17)),
        Shape(rectangle(-0.72, 0.3, -0.46, 0.93, 0.1)),
        Shape(rectangle(-0.36, 0.4, -0.12, 0.93, 0.1), "deep"),
        Shape(rectangle(0.18, 0.3, 0.44, 0.93, 0.1)),
        Shape(rectangle(-0.74, -0.1, 0.44, 0.54, 0.26)),
        Shape(rounded([(0.14, 0.3), (0.14, -0.4), (0.56, -0.4), (0.5, 0.3)], 0.1)),
        Shape(ellipse(0.4, -0.46, 0.42, 0.4)),
        Shape(rectangle(0.4, -0.5, 0.95, -0.1, 0.18)),
        Shape(ellipse(0.1, -0.4, 0.17, 0.4, turn=12), "deep"),
        Shape(ellipse(0.86, -0.44, 0.12, 0.1), INK, False),
        *_eye(0.5, -0.56, 0.085),
        Shape(stroke([(0.6, -0.22), (0.8, -0.2)], 0.05), "line", False),
        Shape(stroke([(0.16, 0.08), (0.36, 0.12), (0.52, 0.06)], 0.1), ROSE, False),
    ]


def _fish() -> list[Shape]:
    return [
        Shape(rounded([(-0.4, 0), (-0.96, -0.62), (-0.84, 0), (-0.96, 0.62)], 0.1), "deep"),
        Shape(rounded([(-0.3, -0.4), (-0.06, -0.86), (0.38, -0.4)], 0.1), "deep"),
        Shape(rounded([(-0.2, 0.4), (-0.1, 0.82), (0.24, 0.42)], 0.1), "deep"),
        Shape(curve([(-0.62, 0), (-0.3, -0.42), (0.2, -0.6), (0.7, -0.4), (0.95, 0.02), (0.7, 0.42), (0.2, 0.6),
                     (-0.3, 0.42)])),
        Shape(stroke([(0.32, -0.44), (0.2, 0), (0.32, 0.44)], 0.06), "line", False),
        *(Shape(stroke([(x, -0.16), (x - 0.09, 0), (x, 0.16)], 0.06), "line", False) for x in (0.0, -0.26)),
        *_eye(0.58, -0.14, 0.11),
        Shape(stroke([(0.66, 0.2), (0.78, 0.22), (0.86, 0.16)], 0.05), "line", False),
    ]  # fmt: skip


def _bird() -> list[Shape]:
    return [
        *(Shape(stroke([(x, 0.5), (x, 0.9), (x + 0.16, 0.9)], 0.08, smooth=False), BEAK) for x in (-0.12, 0.16)),
        Shape(rounded([(-0.3, 0.0), (-0.96, -0.2), (-0.86, 0.08), (-0.94, 0.3), (-0.3, 0.34)], 0.06), "deep"),
        Shape(rounded([(0.66, -0.52), (0.97, -0.36), (0.66, -0.2)], 0.05), BEAK),
        Shape(curve([(-0.6, 0.16), (-0.2, -0.12), (0.02, -0.5), (0.36, -0.78), (0.72, -0.6), (0.76, -0.2), (0.62, 0.3),
                     (0.2, 0.64), (-0.3, 0.56)])),
        Shape(curve([(-0.62, 0.06), (-0.1, -0.12), (0.28, 0.08), (0.1, 0.36), (-0.24, 0.38)]), "line", False),
        Shape(curve([(-0.54, 0.09), (-0.1, -0.05), (0.2, 0.1), (0.06, 0.3), (-0.22, 0.31)]), "deep", False),
        *_eye(0.46, -0.46, 0.1),
    ]  # fmt: skip


def _balloon() -> list[Shape]:
    string = [(0, 0.46), (0.12, 0.58), (-0.1, 0.74), (0.05, 0.9)]
    return [
        Shape(stroke(string, 0.17), HALO, False),
        Shape(stroke(string, 0.08), INK, False),
        Shape(rounded([(0, 0.2), (0.16, 0.42), (-0.16, 0.42)], 0.05), "deep"),
        Shape(curve([(0, -0.95), (0.5, -0.8), (0.7, -0.36), (0.46, 0.1), (0, 0.32), (-0.46, 0.1), (-0.7, -0.36),
                     (-0.5, -0.8)])),
        Shape(ellipse(-0.3, -0.5, 0.11, 0.24, turn=20), "pale", False),
        Shape(stroke([(0.5, -0.3), (0.4, -0.02), (0.2, 0.16)], 0.07), "deep", False),
    ]  # fmt: skip


def _flower() -> list[Shape]:
    petals = [(math.sin(a), -math.cos(a), math.degrees(a)) for a in np.arange(6) * math.pi / 3]
    return [
        Shape(stroke([(0, 0), (0.03, 0.5), (0, 0.94)], 0.13), LEAF),
        Shape(curve([(0.02, 0.84), (0.22, 0.54), (0.58, 0.52), (0.4, 0.82)]), LEAF),
        Shape(curve([(-0.02, 0.88), (-0.22, 0.62), (-0.58, 0.6), (-0.4, 0.88)]), LEAF),
        *(Shape(ellipse(0.39 * x, 0.39 * y - 0.28, 0.25, 0.32, turn=turn)) for x, y, turn in petals),
        *(Shape(stroke([(0.22 * x, 0.22 * y - 0.28), (0.44 * x, 0.44 * y - 0.28)], 0.05), "deep", False)
          for x, y, _ in petals),
        Shape(ellipse(0, -0.28, 0.24, 0.24), "line", False),
        Shape(ellipse(0, -0.28, 0.19, 0.19), CREAM, False),
    ]  # fmt: skip


def _umbrella() -> list[Shape]:
    dome = [(-0.95 * math.cos(a), 0.1 - 0.95 * math.sin(a)) for a in np.linspace(0, math.pi, 24)]
    tips = [(0.95, 0.1), (0.32, 0.1), (-0.32, 0.1), (-0.95, 0.1)]
    hem = [_arc(a, ((a[0] + b[0]) / 2, -0.1), b) for a, b in pairwise(tips)]
    left, right = _arc(tips[2], (-0.3, -0.55), (0, -0.85)), _arc((0, -0.85), (0.3, -0.55), tips[1])
    return [
        Shape(stroke([(0, -0.96), (0, -0.6)], 0.1), INK),
        Shape(stroke([(0, -0.2), (0, 0.5), (0.02, 0.78), (0.2, 0.88), (0.38, 0.7)], 0.11), WOOD),
        Shape(np.array(dome + [point for arc in hem for point in arc[1:]])),
        Shape(np.array([*left, *right, *hem[1]]), "pale", False),
        *(Shape(stroke(path, 0.05, smooth=False), "line", False) for path in (left, right)),
        *(Shape(stroke(path, 0.07, smooth=False), "line", False) for path in hem),
    ]


def _ball() -> list[Shape]:
    def rim(start: float, end: float) -> list[tuple[float, float]]:
        return [(0.93 * math.cos(a), 0.93 * math.sin(a)) for a in np.radians(np.linspace(start, end, 8))]

    ends = rim(228, 200), rim(76, 52)  # the band runs from the upper left to the lower right
    lower = _arc(ends[0][-1], (0.06, -0.1), ends[1][0])
    upper = _arc(ends[1][-1], (0.3, -0.26), ends[0][0])
    return [
        Shape(ellipse(0, 0, 0.93, 0.93, corners=40)),
        Shape(np.array([*ends[0], *lower, *ends[1], *upper]), CREAM, False),
        Shape(stroke(lower, 0.06, smooth=False), "line", False),
        Shape(stroke(upper, 0.06, smooth=False), "line", False),
        Shape(ellipse(0.42, -0.5, 0.2, 0.14, turn=35), "pale", False),
    ]


FIGURES: dict[str, list[Shape]] = {
    "house": _house(),
    "tree": _tree(),
    "car": _car(),
    "boat": _boat(),
    "cat": _cat(),
    "dog": _dog(),
    "fish": _fish(),
    "bird": _bird(),
    "balloon": _balloon(),
    "flower": _flower(),
    "umbrella": _umbrella(),
    "ball": _ball(),
}


@lru_cache(maxsize=512)
def _layers(kind: str, line: float) -> tuple[list[Points], list[Points]]:
    """The solid shapes of a kind grown to its halo and to its outline, for a line of the given width."""
    solid = [shape.points for shape in FIGURES[kind] if shape.solid]
    return [grown(points, 1.9 * line) for points in solid], [grown(points, line) for points in solid]


def mix(a: Sequence[int], b: Sequence[int], share: float) -> RGB:
    """The colour a with `share` of b in it."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


@cache
def _paints(colour: str) -> dict[str, RGB]:
    own = COLOURS[colour]
    black = colour == "black"
    return {
        "own": own,
        "deep": mix(own, (90, 90, 104), 0.3) if black else mix(own, (30, 20, 50), 0.2),
        "pale": mix(own, (255, 255, 255), 0.3) if black else mix(own, (255, 252, 240), 0.4),
        "line": (150, 148, 160) if black else INK,
    }


@dataclass(frozen=True)
class Hand:
    """How a style draws: `outline` and `halo` are fixed colours, or None for a dark shade of the thing's own colour;
    `wobble` is how far lines stray, as a share of half the box."""

    outline: RGB | None = INK
    halo: RGB = HALO
    inner: RGB | None = None  # the lines inside a thing: None for those that show on its colour
    wobble: float = 0.0


HANDS = {
    "plain": Hand(),
    "crayon": Hand(outline=None, halo=PAPER, wobble=0.05),
    "chalk": Hand(outline=CHALK, halo=BOARD, inner=CHALK, wobble=0.04),
}


def _paint_thing(
    canvas: ImageDraw.ImageDraw,
    thing: Thing,
    hand: Hand,
    scale: float,
    rng: random.Random,
    stencil: ImageDraw.ImageDraw | None,
) -> None:
    """One thing with its outline and halo. Its figure, outline included, goes onto the stencil too."""
    half = thing.side / 2
    # About 1.2 canvas units in print, a little less on small things; in steps, so that grown shapes are reused.
    line = round((0.55 + 0.018 * thing.side) / half, 2)
    halo, outline = _layers(thing.kind, line)
    paints = _paints(thing.colour)
    ink = hand.outline or mix(paints["own"], (40, 30, 50), 0.6)
    inner = hand.inner or (paints["line"] if hand.outline else ink)
    to, centre = half * scale, np.array([thing.x, thing.y]) * scale
    phase = np.array([rng.random(), rng.random()]) * 2 * math.pi if hand.wobble else None

    def corners(points: Points) -> list[float]:
        if phase is not None:  # one smooth warp for the whole figure, so that its parts stay together
            points = points + hand.wobble * np.sin(4.5 * points[:, ::-1] + phase)
        return (points * to + centre).ravel().tolist()

    for points in halo:
        canvas.polygon(corners(points), fill=hand.halo)
    for points in outline:
        canvas.polygon(corners(points), fill=ink)
        if stencil is not None:
            stencil.polygon(corners(points), fill=255)
    for shape in FIGURES[thing.kind]:
        paint = shape.paint
        colour = paint if not isinstance(paint, str) else inner if paint == "line" else paints[paint]
        canvas.polygon(corners(shape.points), fill=colour)


# ---- backgrounds: paler than the things, so that the things stand out ----

SKY_COLOURS: dict[tuple[str, bool], tuple[RGB, RGB]] = {  # (sky, overcast) -> colours at the top and at the horizon
    ("day", False): ((140, 200, 240), (218, 240, 250)),
    ("day", True): ((164, 180, 196), (212, 220, 226)),
    ("sunset", False): ((150, 122, 178), (255, 200, 150)),
    ("sunset", True): ((146, 124, 152), (232, 184, 164)),
    ("night", False): ((46, 54, 104), (98, 106, 162)),
    ("night", True): ((56, 60, 88), (92, 96, 128)),
}
DAYLIGHT = {"day": (255, 255, 255), "sunset": (255, 218, 200), "night": (140, 148, 196)}  # times the ground's colours
HORIZON = 38  # canvas units from the top


def _lit(colour: RGB, sky: str) -> RGB:
    return tuple(c * light // 255 for c, light in zip(colour, DAYLIGHT[sky], strict=True))  # type: ignore[return-value]


def _hill(x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
    return [tuple(point) for point in ellipse(x, y, rx, ry, corners=48)]


def _wave(y: float, height: float, length: float, start: float) -> list[tuple[float, float]]:
    """Everything below a wavy line."""
    xs = np.linspace(-1, CANVAS + 1, 60)
    line = [(x, y + height * math.sin(2 * math.pi * (x - start) / length)) for x in xs]
    return [*line, (CANVAS + 1, CANVAS + 1), (-1, CANVAS + 1)]


def _ground(place: str) -> list[tuple[list[tuple[float, float]], RGB]]:
    """The polygons of a place by daylight, from back to front, in canvas units."""
    h, c = HORIZON, CANVAS
    if place == "meadow":
        flowers = [(5, 50), (13, 60), (27, 47), (40, 61), (52, 49), (60, 58), (33, 56)]
        return [
            (_hill(12, h + 16, 34, 22), (186, 222, 160)),
            (_hill(52, h + 18, 32, 22), (174, 216, 150)),
            (_wave(h + 7, 1.2, 50, 5), (156, 206, 132)),
            *((_hill(x, y, 0.8, 0.8), (250, 244, 214)) for x, y in flowers),
        ]
    if place == "beach":
        return [
            (_wave(h - 3, 0, 9, 0), (134, 198, 224)),
            (_wave(h + 1.5, 0.5, 11, 2), (158, 214, 232)),
            (_wave(h + 7, 1.0, 40, 8), (252, 250, 240)),
            (_wave(h + 8.4, 1.0, 40, 8), (246, 226, 180)),
            (_wave(h + 18, 1.4, 60, 20), (240, 216, 166)),
        ]
    if place == "sea":
        return [
            (_wave(h - 10, 0.0, 9, 0), (138, 196, 226)),
            (_wave(h - 5, 0.8, 9, 1), (122, 186, 220)),
            (_wave(h + 2, 1.0, 11, 5), (106, 174, 212)),
            (_wave(h + 10, 1.2, 13, 3), (92, 160, 204)),
            (_wave(h + 19, 1.4, 16, 9), (80, 148, 194)),
        ]
    if place == "snow":
        firs = [(6, h + 3, 6), (13, h + 2, 4), (56, h + 2, 6), (49, h + 1, 4)]
        return [
            (_hill(10, h + 17, 34, 19), (226, 236, 246)),
            (_hill(54, h + 18, 34, 22), (216, 230, 244)),
            *(([(x - s / 2, y), (x, y - 1.8 * s), (x + s / 2, y)], (150, 186, 184)) for x, y, s in firs),
            (_wave(h + 6, 1.2, 54, 10), (242, 247, 252)),
            (_wave(h + 17, 1.2, 60, 40), (232, 240, 249)),
        ]
    if place == "desert":
        return [
            (_hill(50, h + 12, 30, 18), (240, 208, 158)),
            (_hill(8, h + 14, 34, 18), (232, 194, 142)),
            (_wave(h + 8, 2.0, 58, 12), (238, 200, 146)),
            (_wave(h + 18, 1.6, 48, 30), (228, 184, 128)),
        ]
    towers = [(0, 15, 9), (8, 22, 8), (15, 11, 9), (23, 25, 9), (31, 17, 8), (38, 24, 8), (45, 12, 9), (53, 20, 11)]
    skyline: list[tuple[list[tuple[float, float]], RGB]] = []
    for i, (x, top, wide) in enumerate(towers):
        wall = ((186, 188, 208), (200, 196, 212), (176, 184, 204))[i % 3]
        skyline.append(([(x, top), (x + wide, top), (x + wide, h + 8), (x, h + 8)], wall))
        for row in range(int((h - top) // 5)):
            for column in range(2):
                left, up = x + 1.6 + column * (wide - 1.6) / 2, top + 2 + row * 5
                skyline.append(([(left, up), (left + 2, up), (left + 2, up + 2.6), (left, up + 2.6)], (240, 232, 200)))
    street = [
        ([(0, h + 5), (c, h + 5), (c, c), (0, c)], (206, 204, 206)),
        ([(0, h + 9), (c, h + 9), (c, c), (0, c)], (176, 176, 184)),
        *(([(x, h + 17), (x + 8, h + 17), (x + 8, h + 18.4), (x, h + 18.4)], (236, 232, 220)) for x in (3, 19, 35, 51)),
    ]
    return skyline + street


@lru_cache(maxsize=64)
def _background(place: str, sky: str, overcast: bool, size: int) -> Image.Image:
    """Sky and ground without weather, on the large canvas."""
    pixels = size * OVERSAMPLING
    scale = pixels / CANVAS
    top, low = (np.array(colour, float) for colour in SKY_COLOURS[sky, overcast])
    share = np.clip(np.arange(pixels) / (HORIZON * scale), 0, 1)[:, None]
    rows = (top + (low - top) * share).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows[:, None], (pixels, pixels, 3))))
    canvas = ImageDraw.Draw(image)

    def disc(x: float, y: float, r: float, fill: RGB) -> None:
        canvas.ellipse([(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale], fill=fill)

    if not overcast:
        if sky == "day":
            disc(54, 9, 7.5, (252, 240, 196))
            disc(54, 9, 5.5, (255, 226, 130))
        elif sky == "sunset":
            disc(46, 30, 11, (255, 206, 150))
            disc(46, 30, 8, (255, 178, 116))
        else:
            disc(54, 9, 5.5, (250, 244, 212))
            disc(51.6, 7.6, 4.8, mix(SKY_COLOURS["night", False][0], SKY_COLOURS["night", False][1], 0.2))
            for x, y in ((5, 6), (12, 17), (20, 5), (28, 12), (37, 5), (43, 18), (59, 22), (4, 27), (33, 24), (49, 28)):
                disc(x, y, 0.75, (250, 246, 220))
    for points, colour in _ground(place):
        window = place == "city" and sky != "day" and colour == (240, 232, 200)
        fill = (255, 226, 140) if window and sky == "night" else _lit(colour, sky)
        canvas.polygon([(x * scale, y * scale) for x, y in points], fill=fill)
    return image


def _paint_weather(
    canvas: ImageDraw.ImageDraw, scene: Scene, scale: float, rng: random.Random, stencil: ImageDraw.ImageDraw | None
) -> None:
    """Clouds, rain or snow behind the things. Each picture has its own. Drops and flakes go onto the stencil too."""
    if scene.weather == "clear":
        return
    cloudy = scene.weather == "cloudy"
    shade = _lit(
        {"cloudy": (250, 250, 252), "rain": (138, 146, 164), "snowfall": (226, 230, 238)}[scene.weather], scene.sky
    )
    puffs = ((-6, 1.4, 5, 3), (6, 1.4, 5, 3), (-2, -1, 5, 4.2), (3, -0.4, 4.4, 3.6), (0, 2, 8, 2.8))
    for column in (8, 31, 54) if cloudy else (4, 24, 44, 62):
        x, y = column + 8 * rng.random() - 4, (7 if cloudy else 2) + 5 * rng.random()
        for dx, dy, rx, ry in puffs:
            corners = (x + dx - rx, y + dy - ry, x + dx + rx, y + dy + ry)
            canvas.ellipse([corner * scale for corner in corners], fill=shade)
    if cloudy:
        return
    chalk = scene.style == "chalk"
    drop = (
        (212, 226, 246)
        if chalk
        else {"day": (92, 122, 176), "sunset": (104, 104, 156), "night": (170, 184, 228)}[scene.sky]
    )
    flake = (226, 230, 246) if scene.sky == "night" else (255, 255, 255)
    for row in range(6 if scene.weather == "rain" else 7):
        for column in range(7):
            # One in each cell of a loose grid: even enough that no thing hides the weather.
            x, y = 9.6 * column + 8.5 * rng.random() - 1, 9 * row + 7 * rng.random()
            r = 0.8 + 0.5 * rng.random()
            for on, drop_fill, flake_fill in ((canvas, drop, flake), (stencil, 255, 255)):
                if on is None:
                    continue
                if scene.weather == "rain":
                    ends = (x, y + 8, x - 1.8, y + 13.4)
                    on.line([end * scale for end in ends], fill=drop_fill, width=round(0.8 * scale))
                else:
                    corners = (x - r, y + 2 - r, x + r, y + 2 + r)
                    on.ellipse([corner * scale for corner in corners], fill=flake_fill)


# ---- other styles: the same picture, rubbed onto paper or a board ----


@lru_cache(maxsize=16)
def _hatching(size: int, slope: float, gap: float, levels: tuple[int, int]) -> Image.Image:
    """A mask (L) of strokes that fall by `slope`, `gap` canvas units apart, with the grain of the paper. `levels` are
    how much shows between the strokes and under them, of 255."""
    pixels = size * OVERSAMPLING
    scale = pixels / CANVAS
    rng = np.random.default_rng(0)
    mask = Image.new("L", (pixels, pixels), levels[0])
    canvas = ImageDraw.Draw(mask)
    fall = CANVAS * slope
    for y in np.arange(-abs(fall), CANVAS + abs(fall), gap):
        start, end = y + rng.uniform(-0.35, 0.35, 2) * gap
        width = gap * rng.uniform(0.55, 0.85) * math.hypot(1, slope)
        ends = [-1, start * scale, (CANVAS + 1) * scale, (end + fall) * scale]
        canvas.line(ends, fill=levels[1], width=max(1, round(width * scale)))
    grain = rng.normal(0, 30, (size * 2, size * 2)).astype(np.float32)
    grain = np.asarray(Image.fromarray(grain).resize((pixels, pixels)))
    return Image.fromarray(np.clip(np.asarray(mask) + grain, 0, 255).astype(np.uint8))


def _rub(image: Image.Image, stencil: Image.Image, style: str, size: int) -> Image.Image:
    """The picture hatched onto its ground: densely where the stencil is set, loosely elsewhere."""
    chalk = style == "chalk"
    # Strokes across, so that they are not taken for rain; over the things they slant.
    loose = _hatching(size, 0.08, 3.4, (60, 175) if chalk else (90, 225))
    dense = _hatching(size, -0.9, 3.2, (120, 225) if chalk else (150, 245))
    ground = Image.new("RGB", image.size, BOARD if chalk else PAPER)
    return Image.composite(image, ground, Image.composite(dense, loose, stencil))


def draw(scene: Scene, *, size: int = 64) -> Image.Image:
    """Paint a scene as an RGB picture of `size` x `size` pixels. Raises ValueError for a size below 8."""
    if size < 8:
        raise ValueError(f"size={size} is too small to show anything: give 8 or more pixels")
    scale = size * OVERSAMPLING / CANVAS
    rng = random.Random(f"{scene.seed}/{scene.split}/{scene.tier}/{scene.index}/draw")
    image = _background(scene.place, scene.sky, scene.weather != "clear", size).copy()
    canvas = ImageDraw.Draw(image)
    plain = scene.style == "plain"
    mask = None if plain else Image.new("L", image.size, 0)
    stencil = None if plain else ImageDraw.Draw(mask)
    _paint_weather(canvas, scene, scale, rng, stencil)
    for thing in scene.things:
        _paint_thing(canvas, thing, HANDS[scene.style], scale, rng, stencil)
    if not plain:
        image = _rub(image, mask, scene.style, size)
    return image.reduce(OVERSAMPLING)


def _png(scene: Scene, size: int) -> bytes:
    file = io.BytesIO()
    draw(scene, size=size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def draw_many(
    scenes: Iterable[Scene], *, size: int = 64, workers: int | None = None, progress: bool = True
) -> list[bytes]:
    """Paint many scenes: a list of PNG files as bytes, in the order of the scenes.

    `workers` is the number of processes. Left out, it is the number of free cores where that pays: for a thousand
    scenes and more on Linux, where a process starts at once; elsewhere each would first import what this one has
    imported, which takes longer than it saves. If processes cannot be started, all is painted in this one.
    """
    scenes = list(scenes)
    if workers is None:
        pays = sys.platform == "linux" and len(scenes) >= POOL_PAYS_FROM
        workers = min(_cores(), MOST_WORKERS) if pays else 1
    if workers > 1 and not multiprocessing.current_process().daemon:  # a daemon may not start processes
        try:
            return _draw_in_pool(scenes, size, workers, progress)
        # A sandbox without semaphores or processes, or a script that spawns without a __main__ guard.
        except (OSError, ImportError, NotImplementedError, BrokenProcessPool):
            pass
    return [_png(scene, size) for scene in _bar(scenes, len(scenes), progress)]


def _draw_in_pool(scenes: Sequence[Scene], size: int, workers: int, progress: bool) -> list[bytes]:
    with warnings.catch_warnings():
        # Python warns of forking beside threads, as torch and notebooks have them. These workers use none of theirs.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        pool = ProcessPoolExecutor(workers, mp_context=context)
        try:
            chunk = max(1, min(100, len(scenes) // (4 * workers)))
            pictures = pool.map(_png, scenes, repeat(size), chunksize=chunk)
            return list(_bar(pictures, len(scenes), progress))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # an interrupted drawing does not go on unseen


def _bar(items: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    return tqdm(items, total=total, desc="drawing", unit=" pictures", leave=False, disable=not progress)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
