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
    "boat": "boat", "ship": "boat", "sailboat": "boat",
    "cat": "cat", "kitten": "cat",
    "dog": "dog", "puppy": "dog", "pup": "dog",
    "fish": "fish",
    "bird": "bird",
    "balloon": "balloon",
    "flower": "flower", "blossom": "flower", "bloom": "flower",
    "umbrella": "umbrella", "parasol": "umbrella",
    "ball": "ball",
}  # fmt: skip
PLURAL = {("puppies" if w == "puppy" else "fish" if w == "fish" else w + "s"): kind for w, kind in SINGULAR.items()}
COLOURS = {
    "red": "red", "crimson": "red", "orange": "orange", "yellow": "yellow", "golden": "yellow", "green": "green",
    "blue": "blue", "purple": "purple", "violet": "purple", "pink": "pink", "brown": "brown", "black": "black",
    "white": "white",
}  # fmt: skip
SIZES = {"small": "small", "little": "small", "tiny": "small", "big": "big", "large": "big"}
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}

RELATIONS = {
    "left of": "left", "to the left of": "left", "on the left of": "left",
    "right of": "right", "to the right of": "right", "on the right of": "right",
    "above": "above", "over": "above", "higher than": "above",
    "below": "below", "beneath": "below", "underneath": "below", "lower than": "below",
    "next to": "near", "beside": "near", "near": "near", "close to": "near",
    "far from": "far", "far away from": "far",
    "bigger than": "bigger", "larger than": "bigger",
    "smaller than": "smaller",
    "the same colour as": "same",
}  # fmt: skip

AROUND = {
    "in a meadow": ("place", "meadow"), "on the grass": ("place", "meadow"), "in a green field": ("place", "meadow"),
    "on grassy hills": ("place", "meadow"),
    "on the beach": ("place", "beach"), "at the seaside": ("place", "beach"), "on the shore": ("place", "beach"),
    "on a sandy shore": ("place", "beach"),
    "at sea": ("place", "sea"), "on the water": ("place", "sea"), "on the waves": ("place", "sea"),
    "on the ocean": ("place", "sea"),
    "in the snow": ("place", "snow"), "on snowy ground": ("place", "snow"),
    "in a winter landscape": ("place", "snow"),
    "in the desert": ("place", "desert"), "among the dunes": ("place", "desert"),
    "in the city": ("place", "city"), "in town": ("place", "city"), "on a city street": ("place", "city"),
    "in front of tall buildings": ("place", "city"),
    "by day": ("sky", "day"), "in the daytime": ("sky", "day"), "during the day": ("sky", "day"),
    "at sunset": ("sky", "sunset"), "at dusk": ("sky", "sunset"), "in the evening": ("sky", "sunset"),
    "at night": ("sky", "night"), "after dark": ("sky", "night"),
    "under a clear sky": ("weather", "clear"), "in clear weather": ("weather", "clear"),
    "in fine weather": ("weather", "clear"),
    "under a cloudy sky": ("weather", "cloudy"), "in cloudy weather": ("weather", "cloudy"),
    "under clouds": ("weather", "cloudy"),
    "in the rain": ("weather", "rain"), "in rainy weather": ("weather", "rain"), "while it rains": ("weather", "rain"),
    "in falling snow": ("weather", "snowfall"), "while it snows": ("weather", "snowfall"),
    "in a snow shower": ("weather", "snowfall"),
    "a crayon drawing of": ("style", "crayon"), "a drawing in crayon of": ("style", "crayon"),
    "a chalk drawing of": ("style", "chalk"),
}  # fmt: skip
for _adjective, _weather in {"clear": "clear", "cloudy": "cloudy", "rainy": "rain", "snowy": "snowfall"}.items():
    for _noun, _sky in {"day": "day", "evening": "sunset", "night": "night"}.items():
        AROUND[f"on a {_adjective} {_noun}"] = ("sky+weather", f"{_sky}+{_weather}")

# What may open a sentence, and whether it asks for a singular (True) or a plural (False) after it.
FRAMES = {
    "a picture of": None, "a drawing of": None, "an image of": None, "a painting of": None, "an illustration of": None,
    "a cartoon of": None, "a scene with": None, "this picture shows": None, "we see": None, "you can see": None,
    "look at": None,
    "this is": True, "here is": True, "there is": True, "these are": False, "here are": False, "there are": False,
}  # fmt: skip


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
            if thing.kind == self.kind and self.colour in (None, thing.colour) and self.size in (None, thing.size)
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
            at, singular = frame[1], FRAMES[frame[0]]
            noun = _noun(words, at) if at < len(words) else None
            if noun and singular not in (None, noun[0].number == 1):
                raise ValueError(f"{frame[0]!r} does not agree in {text!r}")
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
        joint = _longest(words, at, ("and", ",", "with", "together with"))
        if joint:
            joined, at = True, joint[1]
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
        "near": away <= 32,
        "far": away > 32,
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


# ---- questions ----


def _only(scene, words: str):
    """The one thing that "cat" or "red cat" means. Raises ValueError if there is not exactly one."""
    *colour, kind = words.split()
    found = [t for t in scene.things if t.kind == SINGULAR[kind] and (not colour or t.colour == COLOURS[colour[0]])]
    if len(found) != 1:
        raise ValueError(f"{words!r} means {len(found)} things")
    return found[0]


def _plural(scene, word: str) -> int:
    return sum(thing.kind == PLURAL[word] for thing in scene.things)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _there(scene, phrase: str) -> str:
    noun = _noun(phrase.split(), 0)[0]
    return _yes(bool(noun.matching(scene)))


def _what(scene, colour: str) -> str:
    (thing,) = [thing for thing in scene.things if thing.colour == colour]
    return thing.kind


def _colour(scene, word: str, number_is_one: bool) -> str:
    found = [t for t in scene.things if t.kind == (SINGULAR if number_is_one else PLURAL)[word]]
    (colour,) = {thing.colour for thing in found}
    if (len(found) == 1) != number_is_one:
        raise ValueError(f"{word!r} has the wrong number")
    return colour


def _side(scene, a: str, words: tuple[str, str], b: str) -> str:
    one, other = _only(scene, a), _only(scene, b)
    (answer,) = [word for word in words if related(one, word, other)]
    return answer


def _alone(scene) -> str:
    (thing,) = scene.things
    return thing.kind


_NUMBER_WORDS = ("zero", "one", "two", "three", "four")
_RULES = (
    (r"what is in the picture\?|what do you see\?|what is this\?|what object is shown\?", lambda s, m: _alone(s)),
    (r"what is the (\w+) thing\?", lambda s, m: _what(s, m[1])),
    (r"what colour (is|are) the (\w+)\?", lambda s, m: _colour(s, m[2], m[1] == "is")),
    (r"which colour (does|do) the (\w+) have\?", lambda s, m: _colour(s, m[2], m[1] == "does")),
    (r"is the (.+) (small or big|big or small)\?", lambda s, m: _only(s, m[1]).size),
    (r"(?:how big is|what size does) the (.+?)(?: have)?\?", lambda s, m: _only(s, m[1]).size),
    (r"how many (\w+) (?:are there|do you see)\?", lambda s, m: _NUMBER_WORDS[_plural(s, m[1])]),
    (r"can you count the (\w+)\?", lambda s, m: _NUMBER_WORDS[_plural(s, m[1])]),
    (r"where is this\?|what kind of place is this\?|where are we\?", lambda s, m: s.place),
    (r"what time of day is it\?|which part of the day is it\?|is it \w+, \w+ or \w+\?", lambda s, m: s.sky),
    (r"what is the weather like\?|how is the weather\?", lambda s, m: s.weather),
    (
        r"is the (.+) (?:left or right|right or left) of the (.+)\?",
        lambda s, m: _side(s, m[1], ("left", "right"), m[2]),
    ),
    (
        r"is the (.+) (?:above or below|below or above) the (.+)\?",
        lambda s, m: _side(s, m[1], ("above", "below"), m[2]),
    ),
    (
        r"is the (.+) (bigger|smaller) than the (.+)\?",
        lambda s, m: _yes(related(_only(s, m[1]), m[2], _only(s, m[3]))),
    ),
    (r"are there more (\w+) than (\w+)\?", lambda s, m: _yes(_plural(s, m[1]) > _plural(s, m[2]))),
    (r"(?:is there|can you see|do you see|does the picture show) (.+)\?", lambda s, m: _there(s, m[1])),
    (r"is it day\?|is it daytime\?", lambda s, m: _yes(s.sky == "day")),
    (r"is it sunset\?|is it evening\?", lambda s, m: _yes(s.sky == "sunset")),
    (r"is it night\?|is it dark outside\?", lambda s, m: _yes(s.sky == "night")),
    (r"is the sky clear\?|is the weather fine\?", lambda s, m: _yes(s.weather == "clear")),
    (r"is it raining\?|does it rain\?", lambda s, m: _yes(s.weather == "rain")),
    (r"is it snowing\?|is snow falling\?", lambda s, m: _yes(s.weather == "snowfall")),
    (r"is this (.+)\?", lambda s, m: _yes(AROUND[m[1]] == ("place", s.place))),
)


def answer(question: str, scene) -> str:
    """The answer, worked out from the scene. Raises ValueError for a question that has none, or more than one."""
    for pattern, rule in _RULES:
        match = re.fullmatch(pattern, question)
        if match:
            return rule(scene, match)
    raise ValueError(f"not understood: {question!r}")


# ---- statements about two pictures ----

_WHOLE = {
    "a meadow": ("place", "meadow"), "a beach": ("place", "beach"), "the sea": ("place", "sea"),
    "a snowy landscape": ("place", "snow"), "a desert": ("place", "desert"), "a city": ("place", "city"),
    "a daytime sky": ("sky", "day"), "an evening sky": ("sky", "sunset"), "a night sky": ("sky", "night"),
    "fine weather": ("weather", "clear"), "rain": ("weather", "rain"), "falling snow": ("weather", "snowfall"),
}  # fmt: skip
_NUMBER_OF_PICTURES = {
    "both pictures show ": 2, "each picture shows ": 2,
    "exactly one picture shows ": 1, "only one of the pictures shows ": 1,
    "neither picture shows ": 0, "none of the pictures shows ": 0,
}  # fmt: skip


def _shown(words: str, scene) -> bool:
    if words in _WHOLE:
        name, value = _WHOLE[words]
        return getattr(scene, name) == value
    exactly = words.startswith("exactly ")
    phrase = words.removeprefix("exactly ").split()
    noun, end = _noun(phrase, 0)
    if end != len(phrase):
        raise ValueError(f"not understood: {words!r}")
    found = len(noun.matching(scene))
    if not exactly and found > 1:
        raise ValueError(f"{words!r} may be said of {found} or not")
    return found == noun.number


def statement_is_true(text: str, left, right) -> bool:
    """Whether a statement holds of a left and a right picture. Raises ValueError where it is not understood."""
    if match := re.fullmatch(r"the (left|right) picture shows (.+)", text):
        return _shown(match[2], left if match[1] == "left" else right)
    if match := re.fullmatch(r"in the (left|right) picture we see (.+)", text):
        return _shown(match[2], left if match[1] == "left" else right)
    if match := re.fullmatch(r"the (left|right) picture has more (\w+) than the (left|right) one", text):
        if match[1] == match[3]:
            raise ValueError(f"a picture set against itself: {text!r}")
        more, fewer = (left, right) if match[1] == "left" else (right, left)
        return _plural(more, match[2]) > _plural(fewer, match[2])
    if match := re.fullmatch(r"there are more (\w+) in the (left|right) picture", text):
        more, fewer = (left, right) if match[2] == "left" else (right, left)
        return _plural(more, match[1]) > _plural(fewer, match[1])
    if match := re.fullmatch(r"both pictures show the same (place|time of day)", text):
        return (left.place == right.place) if match[1] == "place" else (left.sky == right.sky)
    if match := re.fullmatch(r"the pictures show a different (place|time of day)", text):
        return (left.place != right.place) if match[1] == "place" else (left.sky != right.sky)
    for opening, number in _NUMBER_OF_PICTURES.items():
        if text.startswith(opening):
            words = text.removeprefix(opening)
            return _shown(words, left) + _shown(words, right) == number
    raise ValueError(f"not understood: {text!r}")
