"""An independent reader of picture-book captions: words in, facts out, and truth worked out from coordinates.

It shares no code and no word list with the package's describer, on purpose: it is the second opinion that the texts
are tested against. Every word of a caption must be understood; anything left over is an error, so that a sentence
can never pass because part of it was skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product

SINGULAR = {
    "house": "house", "home": "house", "cottage": "house",
    "tree": "tree",
    "car": "car", "automobile": "car",
    "boat": "boat", "ship": "boat",
    "cat": "cat", "kitten": "cat",
    "dog": "dog", "puppy": "dog",
    "fish": "fish",
    "bird": "bird",
    "balloon": "balloon",
    "flower": "flower", "blossom": "flower",
    "umbrella": "umbrella", "parasol": "umbrella",
    "ball": "ball",
}  # fmt: skip
PLURAL = {("puppies" if w == "puppy" else "fish" if w == "fish" else w + "s"): kind for w, kind in SINGULAR.items()}
COLOURS = {w: w for w in "red orange yellow green blue purple pink brown black white".split()} | {"violet": "purple"}
SIZES = {"small": "small", "little": "small", "tiny": "small", "big": "big", "large": "big"}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}

RELATIONS = {
    "left of": "left", "to the left of": "left", "on the left of": "left",
    "right of": "right", "to the right of": "right", "on the right of": "right",
    "above": "above", "over": "above",
    "below": "below", "underneath": "below",
    "next to": "near", "beside": "near", "close to": "near",
    "far from": "far", "far away from": "far",
    "bigger than": "bigger", "larger than": "bigger",
    "smaller than": "smaller",
    "the same colour as": "same",
}  # fmt: skip

AROUND = {
    "in a meadow": ("place", "meadow"), "on the grass": ("place", "meadow"), "in a green field": ("place", "meadow"),
    "on the beach": ("place", "beach"), "at the beach": ("place", "beach"), "at the seaside": ("place", "beach"),
    "at sea": ("place", "sea"), "on the water": ("place", "sea"), "on the waves": ("place", "sea"),
    "in the snow": ("place", "snow"), "on snowy ground": ("place", "snow"),
    "in a snowy landscape": ("place", "snow"),
    "in the desert": ("place", "desert"), "among the dunes": ("place", "desert"),
    "in the city": ("place", "city"), "in town": ("place", "city"),
    "by day": ("sky", "day"), "in daylight": ("sky", "day"), "during the day": ("sky", "day"),
    "at sunset": ("sky", "sunset"), "at dusk": ("sky", "sunset"), "in the evening": ("sky", "sunset"),
    "at night": ("sky", "night"), "after dark": ("sky", "night"),
    "under a clear sky": ("weather", "clear"), "in clear weather": ("weather", "clear"),
    "in fine weather": ("weather", "clear"),
    "under a cloudy sky": ("weather", "cloudy"), "in cloudy weather": ("weather", "cloudy"),
    "under clouds": ("weather", "cloudy"),
    "in the rain": ("weather", "rain"), "in rainy weather": ("weather", "rain"), "while it rains": ("weather", "rain"),
    "in falling snow": ("weather", "snowfall"), "while it snows": ("weather", "snowfall"),
    "while snow falls": ("weather", "snowfall"),
    "a crayon drawing of": ("style", "crayon"), "a drawing in crayon of": ("style", "crayon"),
    "a chalk drawing of": ("style", "chalk"),
}  # fmt: skip
for _adjective, _weather in {"clear": "clear", "cloudy": "cloudy", "rainy": "rain", "snowy": "snowfall"}.items():
    for _noun, _sky in {"day": "day", "evening": "sunset", "night": "night"}.items():
        AROUND[f"on a {_adjective} {_noun}"] = ("sky+weather", f"{_sky}+{_weather}")

FRAMES = ("a picture of", "a drawing of", "an image of", "this picture shows", "this is", "here is", "here are",
          "there is", "there are")  # fmt: skip


@dataclass
class Phrase:
    """One noun phrase: `number` things of a kind, with the colour and size it names."""

    number: int
    kind: str
    colour: str | None = None
    size: str | None = None

    def matching(self, scene) -> list[int]:
        return [
            i
            for i, thing in enumerate(scene.things)
            if thing.kind == self.kind
            and self.colour in (None, thing.colour)
            and self.size in (None, thing.size)
        ]


@dataclass
class Facts:
    nouns: list[Phrase] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    place: str | None = None
    sky: str | None = None
    weather: str | None = None
    style: str | None = None


def _longest(words: list[str], at: int, table) -> tuple[object, int] | None:
    for length in range(min(6, len(words) - at), 0, -1):
        text = " ".join(words[at : at + length])
        if text in table:
            return text, at + length
    return None


def _noun(words: list[str], at: int) -> tuple[Phrase, int] | None:
    if words[at] not in NUMBERS:
        return None
    number, article, at = NUMBERS[words[at]], words[at], at + 1
    first, size, colour = at, None, None
    if at < len(words) and words[at] in SIZES:
        size, at = SIZES[words[at]], at + 1
    if at < len(words) and words[at] in COLOURS:
        colour, at = COLOURS[words[at]], at + 1
    table = SINGULAR if number == 1 else PLURAL
    if at >= len(words) or words[at] not in table:
        return None
    if article in ("a", "an") and (article == "an") != (words[first][0] in "aeiou"):
        raise ValueError(f"wrong article before {words[first]!r}")
    return Phrase(number, table[words[at]], colour, size), at + 1


def parse(text: str) -> Facts:
    """The facts a caption states. Raises ValueError where a word, an article or a plural is not understood."""
    words = re.findall(r"[a-z]+|,", text)
    if " ".join(words).replace(" ,", ",") != text:
        raise ValueError(f"unexpected characters in {text!r}")
    facts, at, pending, joined, previous = Facts(), 0, None, True, None
    while at < len(words):
        around = _longest(words, at, AROUND)
        if around and pending is None:
            name, value = AROUND[around[0]]
            for key, part in zip(name.split("+"), value.split("+"), strict=True):
                if getattr(facts, key) is not None:
                    raise ValueError(f"{key} said twice in {text!r}")
                setattr(facts, key, part)
            at, previous = around[1], "around"
            continue
        frame = _longest(words, at, FRAMES)
        if frame and not facts.nouns:
            at = frame[1]
            continue
        noun = _noun(words, at)
        if noun:
            if facts.nouns and not joined and pending is None:
                raise ValueError(f"two nouns with nothing between them in {text!r}")
            facts.nouns.append(noun[0])
            if pending is not None:
                facts.relations.append((len(facts.nouns) - 2, pending, len(facts.nouns) - 1))
            at, pending, joined, previous = noun[1], None, False, "noun"
            continue
        if words[at] in ("is", "are") and previous == "noun":
            if (words[at] == "is") != (facts.nouns[-1].number == 1):
                raise ValueError(f"{words[at]!r} does not agree in {text!r}")
            if not _longest(words, at + 1, RELATIONS):
                raise ValueError(f"nothing said after {words[at]!r} in {text!r}")
            at += 1
            continue
        if words[at] in ("and", ","):
            joined, at = True, at + 1
            continue
        relation = _longest(words, at, RELATIONS)
        if relation and facts.nouns:
            at = relation[1]
            if at < len(words) and words[at] in ("it", "them") and joined and facts.relations:
                i, _, j = facts.relations[-1]
                if (words[at] == "it") != (facts.nouns[j].number == 1):
                    raise ValueError(f"{words[at]!r} does not agree in {text!r}")
                facts.relations.append((i, RELATIONS[relation[0]], j))
                at, joined, previous = at + 1, False, "noun"
            else:
                pending = RELATIONS[relation[0]]
            continue
        raise ValueError(f"not understood: {' '.join(words[at:])!r} in {text!r}")
    if pending is not None or joined or not facts.nouns:
        raise ValueError(f"an unfinished sentence: {text!r}")
    return facts


def related(a, relation: str, b) -> bool:
    """Whether a relation holds between two things, from their coordinates. The thresholds are looser than the
    describer's margins and tighter than no margin at all: what it says must be plain to see."""
    away = max(abs(a.x - b.x), abs(a.y - b.y))
    return {
        "left": b.x - a.x >= 6,
        "right": a.x - b.x >= 6,
        "above": b.y - a.y >= 6,
        "below": a.y - b.y >= 6,
        "near": away <= 31,
        "far": away > 31,
        "bigger": a.side >= 1.1 * b.side,
        "smaller": b.side >= 1.1 * a.side,
        "same": a.colour == b.colour,
    }[relation]


def facts_hold(facts: Facts, scene) -> bool:
    """Whether a picture shows what the facts say. Numbers are exact: "a cat" is false of two cats."""
    for key in ("place", "sky", "weather", "style"):
        if getattr(facts, key) not in (None, getattr(scene, key)):
            return False
    found = [noun.matching(scene) for noun in facts.nouns]
    if any(len(which) != noun.number for which, noun in zip(found, facts.nouns, strict=True)):
        return False
    return all(
        related(scene.things[a], relation, scene.things[b])
        for i, relation, j in facts.relations
        for a, b in product(found[i], found[j])
    )


def is_true(caption: str, scene) -> bool:
    """Whether a caption is true of a scene. Raises ValueError for a caption that is not understood."""
    return facts_hold(parse(caption), scene)
