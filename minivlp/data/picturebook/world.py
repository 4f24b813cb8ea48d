"""The words of the picture book's world, and the two records everything else is made from.

A `Scene` is the whole truth about one picture. `sample` makes it from `(seed, index)`, `draw` paints it and
`describe` says it, so that every caption, answer and box can be checked against the same facts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

KINDS = ("house", "tree", "car", "boat", "cat", "dog", "fish", "bird", "balloon", "flower", "umbrella", "ball")

# RGB, 0..255. Chosen to stay apart from each other and, with their outlines, from every background.
COLOURS = {
    "red": (217, 54, 54),
    "orange": (244, 140, 40),
    "yellow": (250, 212, 60),
    "green": (58, 158, 80),
    "blue": (52, 106, 214),
    "purple": (134, 72, 182),
    "pink": (246, 146, 190),
    "brown": (134, 88, 52),
    "black": (44, 44, 52),
    "white": (248, 248, 246),
}

SIZES = ("small", "big")
PLACES = ("meadow", "beach", "sea", "snow", "desert", "city")
SKIES = ("day", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snowfall")
STYLES = ("plain", "crayon", "chalk")
TIERS = ("easy", "normal", "hard")

RELATIONS = (
    "left of",
    "right of",
    "above",
    "below",
    "next to",
    "far from",
    "bigger than",
    "smaller than",
    "the same colour as",
)

CANVAS = 64  # the unit of every coordinate below: a picture is CANVAS x CANVAS units at any pixel size


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `x`, `y` are its centre and `side` the side of its square box, in canvas units."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    side: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """`(left, top, right, bottom)` in canvas units."""
        half = self.side / 2
        return (self.x - half, self.y - half, self.x + half, self.y + half)


@dataclass(frozen=True)
class Scene:
    """Every fact of one picture. `things` are in drawing order, the first is the furthest back."""

    seed: int
    index: int
    split: str
    tier: str
    place: str
    sky: str
    weather: str
    things: tuple[Thing, ...]
    style: str = "plain"

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        facts = json.loads(text)
        facts["things"] = tuple(Thing(**thing) for thing in facts["things"])
        return cls(**facts)
