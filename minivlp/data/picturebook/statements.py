"""True or false statements about two pictures side by side, in the manner of NLVR2 (Suhr et al., 2019).

Each text comes twice: once with a pair of pictures of which it is true, and once with another ordered pair of which it
is false. A reader of the text alone is right half of the time, exactly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minivlp.data.picturebook.claims import KIND_WORDS, Noun, noun_phrase, pick, shuffled
from minivlp.data.picturebook.world import Scene

PLACE_NOUNS = {
    "meadow": "a meadow",
    "beach": "a beach",
    "sea": "the sea",
    "snow": "a snowy landscape",
    "desert": "a desert",
    "city": "a city",
}
SKY_NOUNS = {"day": "a daytime sky", "sunset": "an evening sky", "night": "a night sky"}
WEATHER_NOUNS = {"clear": "fine weather", "rain": "rain", "snowfall": "falling snow"}
WHOLE = {"place": PLACE_NOUNS, "sky": SKY_NOUNS, "weather": WEATHER_NOUNS}
FORMS = {
    "side": ("the {side} picture shows {}", "in the {side} picture we see {}"),
    "both": ("both pictures show {}", "each picture shows {}"),
    "one": ("exactly one picture shows {}", "only one of the pictures shows {}"),
    "neither": ("neither picture shows {}", "none of the pictures shows {}"),
}
SAME = {"place": "place", "sky": "time of day"}

Sight = Noun | tuple[str, str]  # a noun, or for example ("place", "beach")


@dataclass(frozen=True)
class Statement:
    """A statement about two pictures. `left` and `right` are positions in the list of scenes."""

    text: str
    left: int
    right: int
    truth: bool


def shows(scene: Scene, sight: Sight) -> bool | None:
    """Whether a scene shows something; None where two readers might differ ("a cat" of two cats)."""
    if isinstance(sight, Noun):
        number = sum(map(sight.fits, scene.things))
        return True if number == sight.number else False if number == 0 or sight.number > 1 else None
    name, value = sight
    shown = getattr(scene, name)
    # It is cloudy where it rains or snows, too, so that the weather is told apart by what falls.
    return None if name == "weather" and shown == "cloudy" and value == "clear" else shown == value


def sights(scene: Scene) -> Iterator[Sight]:
    """Everything a statement may say that one scene shows."""
    for kind in dict.fromkeys(thing.kind for thing in scene.things):
        alike = [thing for thing in scene.things if thing.kind == kind]
        yield Noun(len(alike), kind)
        if len({thing.colour for thing in alike}) == 1:
            yield Noun(len(alike), kind, alike[0].colour)
    for name, words in WHOLE.items():
        if getattr(scene, name) in words:
            yield (name, getattr(scene, name))


def statements(scenes: Sequence[Scene], *, seed: int = 0) -> list[Statement]:
    """Two statements for each scene (fewer where no second pair is found): the same text, once true, once false.

    Raises ValueError for fewer than two scenes.
    """
    if len(scenes) < 2:
        raise ValueError(f"statements compare two pictures: give at least 2 scenes, got {len(scenes)}")
    rng = random.Random(f"statements/{seed}/{len(scenes)}")
    having: dict[Sight, list[int]] = {}
    for i, scene in enumerate(scenes):
        for sight in sights(scene):
            having.setdefault(sight, []).append(i)
    made: list[Statement] = []
    for i in range(len(scenes)):
        for _ in range(20):
            found = _one_text(i, scenes, having, rng)
            if found is not None and found[1] != found[2]:
                text, true_pair, false_pair = found
                pair = (Statement(text, *true_pair, True), Statement(text, *false_pair, False))
                made += shuffled(pair, rng)
                break
    return made


def _one_text(
    i: int, scenes: Sequence[Scene], having: dict[Sight, list[int]], rng: random.Random
) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    """A text about scene `i`, a pair it is true of and a pair it is false of. None if this draw finds no pair."""

    def anyone() -> int:
        return int(rng.random() * len(scenes))

    form = pick(("side", "side", "both", "both", "one", "neither", "more", "same"), rng)
    if form == "same":
        name = pick(tuple(SAME), rng)
        same = [j for j in (anyone() for _ in range(30)) if getattr(scenes[j], name) == getattr(scenes[i], name)]
        same = [j for j in same if j != i]
        differ = [j for j in (anyone() for _ in range(30)) if getattr(scenes[j], name) != getattr(scenes[i], name)]
        if not same or not differ:
            return None
        pairs = [_either_way(i, same[0], rng), _either_way(i, differ[0], rng)]
        if rng.random() < 0.5:
            return f"both pictures show the same {SAME[name]}", pairs[0], pairs[1]
        return f"the pictures show a different {SAME[name]}", pairs[1], pairs[0]

    if form == "more":
        j, kind = anyone(), pick(scenes[i].things, rng).kind
        here, there = (sum(thing.kind == kind for thing in scenes[k].things) for k in (i, j))
        if here <= there:
            return None
        side, true_pair = ("left", (i, j)) if rng.random() < 0.5 else ("right", (j, i))
        plural = KIND_WORDS[kind][0][1]
        other = "right" if side == "left" else "left"
        forms = (
            f"there are more {plural} in the {side} picture",
            f"the {side} picture has more {plural} than the {other} one",
        )
        return pick(forms, rng), true_pair, true_pair[::-1]

    sight = pick(tuple(sights(scenes[i])), rng)
    words = _words(sight, rng)
    others_with = [j for j in (pick(having[sight], rng) for _ in range(10)) if j != i]
    without = [j for j in (anyone() for _ in range(30)) if shows(scenes[j], sight) is False]
    if len(without) < 2 or without[0] == without[1]:
        return None
    if form == "side":
        side, true_pair = ("left", (i, without[0])) if rng.random() < 0.5 else ("right", (without[0], i))
        return pick(FORMS["side"], rng).format(words, side=side), true_pair, true_pair[::-1]
    if form == "neither":
        return (
            pick(FORMS["neither"], rng).format(words),
            _either_way(without[0], without[1], rng),
            _either_way(i, without[int(rng.random() * 2)], rng),
        )
    if not others_with:
        return None
    both, only_one = _either_way(i, others_with[0], rng), _either_way(i, without[0], rng)
    if form == "both":
        return pick(FORMS["both"], rng).format(words), both, only_one
    return pick(FORMS["one"], rng).format(words), only_one, both


def _either_way(a: int, b: int, rng: random.Random) -> tuple[int, int]:
    return (a, b) if rng.random() < 0.5 else (b, a)


def _words(sight: Sight, rng: random.Random) -> str:
    if not isinstance(sight, Noun):
        return WHOLE[sight[0]][sight[1]]
    phrase = noun_phrase(sight, rng)
    return phrase if sight.number == 1 else f"exactly {phrase}"
