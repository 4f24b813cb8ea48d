"""Choosing what a picture shows: `sample(index)` is a pure function from a place in the book to a `Scene`.

Only `random.Random(text).random()` is used: it is the one draw that Python promises to repeat in later versions, so a
scene is the same on every platform. Coordinates are whole tenths of a canvas unit, so that they survive json exactly.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from minivlp.data.picturebook.world import (
    CANVAS,
    COLOURS,
    KINDS,
    PLACES,
    SIZES,
    TIERS,
    Scene,
    Thing,
)

T = TypeVar("T")

# "crayon" and "chalk" are test scenes drawn in another style, "flipped" has things where they seldom are otherwise.
SPLITS = ("train", "val", "test", "heldout_colour", "heldout_count", "flipped", "crayon", "chalk")

# One colour per kind that is seen in the split "heldout_colour" alone. Every colour stays common on other kinds.
HELD_OUT_COLOUR = {
    "house": "blue",
    "tree": "pink",
    "car": "purple",
    "boat": "yellow",
    "cat": "green",
    "dog": "red",
    "fish": "black",
    "bird": "brown",
    "balloon": "white",
    "flower": "orange",
    "umbrella": "green",
    "ball": "purple",
}
# One number per kind that is seen in the split "heldout_count" alone.
HELD_OUT_COUNT = {kind: 2 + i % 3 for i, kind in enumerate(KINDS)}
COUNTS = (2, 3, 4)

# Where each kind is usually met. Every place is usual for four kinds, so that places stay balanced.
USUAL_PLACES = {
    "house": ("meadow", "city"),
    "tree": ("meadow", "snow"),
    "car": ("city", "desert"),
    "boat": ("sea", "beach"),
    "cat": ("city", "meadow"),
    "dog": ("snow", "desert"),
    "fish": ("sea", "beach"),
    "bird": ("sea", "snow"),
    "balloon": ("snow", "desert"),
    "flower": ("meadow", "desert"),
    "umbrella": ("beach", "city"),
    "ball": ("beach", "sea"),
}
USUAL_SHARE = 0.70  # of the pictures of one thing, those that show it in a usual place
FLIPPED_SHARE = 0.15  # the same share in the split "flipped"
SKY_SHARES = {"day": 0.60, "sunset": 0.20, "night": 0.20}
WEATHER_SHARES = {"clear": 0.55, "cloudy": 0.15, "rain": 0.15, "snowfall": 0.15}
EASY_WEATHER_SHARES = {"clear": 0.85, "cloudy": 0.05, "rain": 0.05, "snowfall": 0.05}
NORMAL_SHARES = {"one": 0.45, "two": 0.40, "group": 0.15}
SAME_COLOUR_SHARE = 0.15  # two things get one colour on purpose this often, and now and then by chance

# Sides in canvas units, (lowest, highest). A size word is a fact about the picture, so the ranges keep well apart.
EASY_SIDE = (36.0, 40.0)
ONE_SIDE = {"small": (23.0, 25.0), "big": (36.0, 38.0)}
TWO_SIDE = {"small": (19.0, 21.0), "big": (27.0, 28.0)}
GROUP_SIDE = {"small": (19.0, 21.0), "big": (26.5, 27.5)}
HARD_SIDE = {"small": (14.0, 16.0), "big": (21.0, 26.0)}
CROWDED_SIDE = {"small": (14.0, 15.5), "big": (20.0, 21.5)}  # four and five things: there is no room for bigger ones

# Centres that things are near, in canvas units, and how far they stray along each axis.
ONE_SLOTS = ((22, 35), (32, 35), (42, 35))
GROUP_SLOTS = {
    2: (((17, 36), (47, 36)),),
    3: (((32, 17), (17, 47), (47, 47)), ((17, 17), (47, 17), (32, 47))),
    4: (((17, 17), (47, 17), (17, 47), (47, 47)),),
}
STRAY = 1.6
GROUP_STRAY = 1.0
GAP = (1.0, 2.5)  # between the boxes of two things that are next to each other
APART = (34.5, 37.0)  # between the centres of two things that are far apart
MARGIN = 0.5  # between a box and the edge of the canvas
OVERLAP = 0.10  # of the smaller box, the most that two things of the hard tier may share

# A relation is a fact only where a look is enough to see it. Distances in canvas units.
SIDEWAYS_MARGIN = 10.0  # left, right, above, below: the centres are further apart than this along one axis...
SLANT_MARGIN = 0.8  # ...and along the other axis closer than this share of it
BIGGER_RATIO = 1.25  # of the sides
NEXT_TO_GAP = 5.0  # between the boxes, at most
NEXT_TO_REACH = 30.5  # between the centres along each axis, at most
FAR_REACH = 34.0  # between the centres along one axis, at least
SYMMETRIC = ("next to", "far from", "the same colour as")


def sample(index: int, *, split: str = "train", tier: str = "normal", seed: int = 0) -> Scene:
    """The facts of picture `index` of a book.

    `seed` chooses the book and `split` its chapter: no two chapters share a scene. `tier` is "easy" (one big thing in
    the middle), "normal" (one thing, two different ones, or two to four equal ones, all in a few slots) or "hard" (one
    to five things anywhere).

    Raises ValueError for an unknown split or tier, a negative index, and for "heldout_count" in the easy tier.
    """
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}: choose from {', '.join(SPLITS)}")
    if tier not in TIERS:
        raise ValueError(f"no tier is called {tier!r}: choose from {', '.join(TIERS)}")
    if index < 0:
        raise ValueError(f"index {index} is not a picture: count from 0")
    if split == "heldout_count" and tier == "easy":
        raise ValueError("an easy picture shows one thing, so no count can be withheld: choose tier normal or hard")
    rng = random.Random(f"{seed}/{split}/{tier}/{index}")
    things = {"easy": _easy, "normal": _normal, "hard": _hard}[tier](rng, split)
    things[0] = _of_split(things[0], split)
    return Scene(
        seed=seed,
        index=index,
        split=split,
        tier=tier,
        place=_place(things, rng, share=FLIPPED_SHARE if split == "flipped" else USUAL_SHARE),
        sky=_weighted(SKY_SHARES, rng),
        weather=_weighted(EASY_WEATHER_SHARES if tier == "easy" else WEATHER_SHARES, rng),
        things=tuple(things),
        style=split if split in ("crayon", "chalk") else "plain",
    )


# ---- tiers ----


def _easy(rng: random.Random, split: str) -> list[Thing]:
    kind = _pick(KINDS, rng)
    x, y = 32 + _within(-STRAY, STRAY, rng), 34 + _within(-STRAY, STRAY, rng)
    return [_thing(kind, _colour(kind, split, rng), "big", x, y, _within(*EASY_SIDE, rng))]


def _normal(rng: random.Random, split: str) -> list[Thing]:
    layout = "group" if split == "heldout_count" else _weighted(NORMAL_SHARES, rng)
    kind, size = _pick(KINDS, rng), _pick(SIZES, rng)
    colour = _colour(kind, split, rng)
    if layout == "two":
        return _pair(kind, colour, size, rng)
    if layout == "one":
        slots, side, stray = (_pick(ONE_SLOTS, rng),), _within(*ONE_SIDE[size], rng), STRAY
    else:
        slots, side, stray = (
            _pick(GROUP_SLOTS[_count(kind, split, rng)], rng),
            _within(*GROUP_SIDE[size], rng),
            GROUP_STRAY,
        )
    return [
        _thing(kind, colour, size, x + _within(-stray, stray, rng), y + _within(-stray, stray, rng), side)
        for x, y in slots
    ]


def _pair(kind: str, colour: str, size: str, rng: random.Random) -> list[Thing]:
    """The given thing and one of another kind, side by side or one above the other, close together or far apart."""
    other = _pick([k for k in KINDS if k != kind], rng)
    same = colour != HELD_OUT_COLOUR[other] and rng.random() < SAME_COLOUR_SHARE
    members = [
        (kind, colour, size),
        (other, colour if same else _colour(other, "train", rng), _pick(SIZES, rng)),
    ]
    sides = [_within(*TWO_SIDE[size], rng) for _, _, size in members]
    close = sum(sides) / 2 + _within(*GAP, rng)
    apart = _within(*APART, rng)
    sideways, near, first = rng.random() < 0.6, rng.random() < 0.5, int(rng.random() * 2)
    last = 1 - first
    # The pair is moved as a whole within the room that it leaves, so that its distance stays as chosen.
    ends = (sides[0] + sides[1]) / 2
    distance = close if near else min(apart, CANVAS - 2 * MARGIN - ends)
    room = CANVAS - 2 * MARGIN - ends - distance
    start = MARGIN + sides[first] / 2 + room / 2 + _within(-0.5, 0.5, rng) * min(room, 2 * STRAY)
    along = {first: start, last: start + distance}
    across = [(36 if sideways else 32) + _within(-STRAY, STRAY, rng) for _ in members]
    return [
        _thing(*member, *((along[i], across[i]) if sideways else (across[i], along[i])), sides[i])
        for i, member in enumerate(members)
    ]


def _hard(rng: random.Random, split: str) -> list[Thing]:
    number = 1 + int(rng.random() * 5)
    kinds = _shuffled(KINDS, rng)
    copies = 1
    if split == "heldout_count" or (number > 1 and rng.random() < 0.4):
        copies = _count(kinds[0], split, rng)
        number = max(number, copies)
    sides = HARD_SIDE if number < 4 else CROWDED_SIDE
    members: list[tuple[str, str, str, float]] = []
    for i, kind in enumerate(kinds[: number - copies + 1]):
        # A withheld combination is the subject of its picture; what stands around it is ordinary.
        size = _pick(SIZES, rng)
        member = (kind, _colour(kind, split if i == 0 else "train", rng), size, _within(*sides[size], rng))
        members += [member] * (copies if i == 0 else 1)
    centres = None
    while centres is None:
        centres = _scatter([member[3] for member in members], rng)
    return [_thing(*member[:3], x, y, member[3]) for member, (x, y) in zip(members, centres, strict=True)]


def _scatter(sides: Sequence[float], rng: random.Random) -> list[tuple[float, float]] | None:
    """Centres anywhere on the canvas with hardly any overlap, or None where no room was found in a few tries."""
    centres: list[tuple[float, float]] = []
    for i, side in enumerate(sides):
        low, high = side / 2 + 2 * MARGIN, CANVAS - side / 2 - 2 * MARGIN
        for _ in range(30):
            x, y = _within(low, high, rng), _within(low, high, rng)
            if all(_shared(x, y, side, *centres[j], sides[j]) <= OVERLAP for j in range(i)):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def _shared(x: float, y: float, side: float, other_x: float, other_y: float, other_side: float) -> float:
    """How much of the smaller of two square boxes lies in the other."""
    reach, smaller = (side + other_side) / 2, min(side, other_side)
    wide = min(reach - abs(x - other_x), smaller)
    high = min(reach - abs(y - other_y), smaller)
    return wide * high / smaller**2 if wide > 0 and high > 0 else 0.0


# ---- facts ----


def _thing(kind: str, colour: str, size: str, x: float, y: float, side: float) -> Thing:
    return Thing(kind, colour, size, round(x * 10) / 10, round(y * 10) / 10, round(side * 10) / 10)


def _of_split(thing: Thing, split: str) -> Thing:
    """The thing moved up or down by at most 0.4 units, so that its tenths of x and y add up to the split's number
    modulo 8. No eye or model sees it, and it makes sure that no scene is in two splits."""
    x, y = round(thing.x * 10), round(thing.y * 10) - 4
    y += (SPLITS.index(split) - x - y) % len(SPLITS)
    return Thing(thing.kind, thing.colour, thing.size, thing.x, y / 10, thing.side)


def _colour(kind: str, split: str, rng: random.Random) -> str:
    if split == "heldout_colour":
        return HELD_OUT_COLOUR[kind]
    return _pick([colour for colour in COLOURS if colour != HELD_OUT_COLOUR[kind]], rng)


def _count(kind: str, split: str, rng: random.Random) -> int:
    if split == "heldout_count":
        return HELD_OUT_COUNT[kind]
    return _pick([count for count in COUNTS if count != HELD_OUT_COUNT[kind]], rng)


def _place(things: Sequence[Thing], rng: random.Random, *, share: float) -> str:
    """A place where all kinds of the picture are usual together, as far as there is one. `share` is the chance of a
    usual place for a picture of one kind."""
    weights = dict.fromkeys(PLACES, 1.0)
    for kind in dict.fromkeys(thing.kind for thing in things):
        usual = USUAL_PLACES[kind]
        for place in PLACES:
            weights[place] *= share / len(usual) if place in usual else (1 - share) / (len(PLACES) - len(usual))
    return _weighted(weights, rng)


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """Every relation that is plain to see, as `(i, relation, j)`: thing i is `relation` thing j.

    A relation comes with its inverse, and never with one that contradicts it. Equal things (a count group) have none
    among themselves: "a red cat left of a red cat" tells no one which is meant.
    """
    things = scene.things
    found: list[tuple[int, str, int]] = []
    for i, a in enumerate(things):
        for j in range(i + 1, len(things)):
            b = things[j]
            if (a.kind, a.colour, a.size) == (b.kind, b.colour, b.size):
                continue
            for relation, inverse in _between(a, b):
                found += [(i, relation, j), (j, inverse, i)]
    return found


def _between(a: Thing, b: Thing) -> list[tuple[str, str]]:
    """The relations from a to b, each with its inverse from b to a."""
    dx, dy = b.x - a.x, b.y - a.y
    across, down = abs(dx), abs(dy)
    found = []
    if across > SIDEWAYS_MARGIN and down < SLANT_MARGIN * across:
        found.append(("left of", "right of") if dx > 0 else ("right of", "left of"))
    if down > SIDEWAYS_MARGIN and across < SLANT_MARGIN * down:
        found.append(("above", "below") if dy > 0 else ("below", "above"))
    reach = max(across, down)
    if reach >= FAR_REACH:
        found.append(("far from", "far from"))
    elif reach <= NEXT_TO_REACH and reach - (a.side + b.side) / 2 <= NEXT_TO_GAP:
        found.append(("next to", "next to"))
    if a.side > BIGGER_RATIO * b.side:
        found.append(("bigger than", "smaller than"))
    elif b.side > BIGGER_RATIO * a.side:
        found.append(("smaller than", "bigger than"))
    if a.colour == b.colour:
        found.append(("the same colour as", "the same colour as"))
    return found


def content_hash(scenes: Iterable[Scene]) -> str:
    """The sha256 of the scenes' facts, to compare books made on different machines."""
    digest = hashlib.sha256()
    for scene in scenes:
        digest.update(scene.to_json().encode() + b"\n")
    return digest.hexdigest()


# ---- draws ----


def _pick(options: Sequence[T], rng: random.Random) -> T:
    return options[int(rng.random() * len(options))]


def _within(low: float, high: float, rng: random.Random) -> float:
    return low + (high - low) * rng.random()


def _weighted(weights: Mapping[T, float], rng: random.Random) -> T:
    """A key, drawn with a chance in proportion to its weight."""
    left = rng.random() * sum(weights.values())
    for option, weight in weights.items():
        left -= weight
        if left < 0:
            return option
    return option


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items
