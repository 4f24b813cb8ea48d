"""From a sentence back to its facts: `understand` undoes `claims.say`, so that what a model writes can be checked.

A model's sentence need not be a good one. Nothing raises here: what no rule can use is skipped and counted, and what
is left is compared with the scene, fact by fact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

from minivlp.data.picturebook.claims import (
    COLOUR_WORDS,
    FRAMES,
    KIND_WORDS,
    NUMBERS,
    PLACE_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    SKY_NOUNS,
    SKY_WORDS,
    STYLE_FRAMES,
    WEATHER_ADJECTIVES,
    WEATHER_WORDS,
    Claim,
    Noun,
)
from minivlp.data.picturebook.sample import relations
from minivlp.data.picturebook.web import contradicts
from minivlp.data.picturebook.world import COLOURS, Scene

FACTS = ("objects", "colours", "counts", "places", "skies", "weathers", "relations")

Rule = tuple[str, object]  # what a phrase is, and what it says


def _phrases() -> Iterator[tuple[str, Rule]]:
    """Every phrase of the captions with its rule: the tables of `claims`, turned round."""
    yield from {"a": ("number", 1), "an": ("number", 1)}.items()
    for number, word in enumerate(NUMBERS):
        yield word, ("number", number)
    for kind, forms in KIND_WORDS.items():
        yield from ((word, ("kind", kind)) for words in forms for word in words)
    for colour in COLOURS:
        yield from ((word, ("colour", colour)) for word in COLOUR_WORDS.get(colour, (colour,)))
    for rule, table in (("size", SIZE_WORDS), ("relation", RELATION_WORDS)):
        yield from ((phrase, (rule, name)) for name, phrases in table.items() for phrase in phrases)
    around = {"place": PLACE_WORDS, "sky": SKY_WORDS, "weather": WEATHER_WORDS, "style": STYLE_FRAMES}
    for field, table in around.items():
        yield from ((phrase, ("around", {field: name})) for name, phrases in table.items() for phrase in phrases)
    for (weather, adjective), (sky, noun) in product(WEATHER_ADJECTIVES.items(), SKY_NOUNS.items()):
        yield f"on a {adjective} {noun}", ("around", {"sky": sky, "weather": weather})
    for frame, (be, this) in product(FRAMES, (("is", "this is"), ("are", "these are"))):
        yield frame.format(be=be, this=this), ("frame", None)
    yield from ((joint, ("joint", None)) for joint in ("and", "with", "together with"))
    yield from ((word, ("be", None)) for word in ("is", "are"))
    yield from ((word, ("it", None)) for word in ("it", "them"))


def _longest_first() -> dict[str, list[tuple[list[str], Rule]]]:
    """The phrases as lists of words, found by their first word, the longest first."""
    table: dict[str, list[tuple[list[str], Rule]]] = {}
    for phrase, rule in dict(_phrases()).items():
        words = phrase.split()
        table.setdefault(words[0], []).append((words, rule))
    return {first: sorted(several, key=lambda entry: -len(entry[0])) for first, several in table.items()}


_TABLE = _longest_first()
_TOKENS = re.compile(r"[^\W_]+|\S")  # words, and every other mark by itself


def understand(text: str) -> Claim:
    """What a sentence says. A text that names nothing gives `Claim(nouns=())`.

    Only the number word counts, not the plural: "two cat" are two, and a noun without a number is read like one with
    an article. Where a sentence says two different things about the place, the time of day, the weather or the style,
    the first counts. "A cat left of a ball and above a tree" is read as a cat above a tree.
    """
    return _read(text)[0]


def unknown_words(text: str) -> int:
    """How many words of a text `understand` had no use for: strange ones and unfinished ones ("and a red")."""
    return _read(text)[1]


def _read(text: str) -> tuple[Claim, int]:
    words = _TOKENS.findall(text.lower())
    unknown = sum(map(str.isalnum, words))  # less those that are used
    nouns: list[Noun] = []
    related: list[tuple[int, str, int]] = []
    around: dict[str, str] = {}
    said: dict[str, object] = {}  # the number, size and colour of the noun to come
    waiting: tuple[int, str, int] | None = None  # the relation that waits for its second noun: (i, relation, words)
    joined, be = False, 0  # whether the last was an "and", and how many words "is" that may belong to a relation
    at = 0
    while at < len(words):
        rule, value, length = None, None, 1
        for phrase, (name, meaning) in _TABLE.get(words[at], ()):
            if words[at : at + len(phrase)] == phrase:
                rule, value, length = name, meaning, len(phrase)
                break
        at += length
        if rule is None and words[at - 1].isalnum():
            continue  # an unknown word: go on as if it were not there
        if rule == "number":
            said = {rule: value}
        elif rule in ("size", "colour"):
            said[rule] = value
        elif rule == "kind":
            number = said.get("number", 1)
            if number:  # "zero cats" name no thing
                nouns.append(Noun(number, value, said.get("colour"), said.get("size")))
                unknown -= 1 + len(said)
                if waiting:
                    related.append((waiting[0], waiting[1], len(nouns) - 1))
                    unknown -= waiting[2]
            said, waiting, joined = {}, None, False
        elif rule == "it":
            # "and above it": the same two nouns once more
            if waiting and related and waiting[0] == related[-1][0]:
                related.append((waiting[0], waiting[1], related[-1][2]))
                unknown -= waiting[2] + 1
            said, waiting, joined = {}, None, False
        else:
            said, waiting = {}, None
            if rule == "relation" and nouns:
                last = len(nouns) - 1
                i = related[-1][0] if joined and related and related[-1][2] == last else last
                waiting = (i, value, length + be)
            elif rule == "around":
                if all(around.get(field, name) == name for field, name in value.items()):
                    around |= value
                    unknown -= length
            elif rule in ("frame", "joint"):
                unknown -= length
            joined = joined or rule in ("joint", None)  # None: a comma or a full stop
        be = int(rule == "be")
    return Claim(tuple(nouns), tuple(related), **around), unknown


def fact_counts(claim: Claim, scene: Scene) -> dict[str, tuple[int, int, int, int]]:
    """For each kind of fact `(right, said, named, shown)`: `right` of the `said` facts are true of the scene, and
    `named` of the facts that the scene has to show are among them. A fact that is said twice counts once.

    Objects are kinds and colours are pairs of kind and colour. A count is right where as many things as said fit the
    noun ("a cat" is wrong of two), and named where a kind's numbers add up to what is shown. A relation is right where
    it holds between all things that the two nouns fit; it has no `shown`, for no caption could tell them all. The
    weather must be the scene's own, although `contradicts` lets "cloudy" pass in the rain.
    """
    kinds, shown_kinds = {noun.kind for noun in claim.nouns}, Counter(thing.kind for thing in scene.things)
    coloured = {(noun.kind, noun.colour) for noun in claim.nouns if noun.colour is not None}
    shown_coloured = {(thing.kind, thing.colour) for thing in scene.things}
    nouns, numbers = set(claim.nouns), Counter()
    for noun in nouns:
        numbers[noun.kind] += noun.number
    counts = {
        "objects": _overlap(kinds, set(shown_kinds)),
        "colours": _overlap(coloured, shown_coloured),
        "counts": (
            sum(noun.number == sum(map(noun.fits, scene.things)) for noun in nouns),
            len(nouns),
            sum(numbers[kind] == number for kind, number in shown_kinds.items()),
            len(shown_kinds),
        ),
    }
    for fact, field in (("places", "place"), ("skies", "sky"), ("weathers", "weather")):
        counts[fact] = _overlap({getattr(claim, field)} - {None}, {getattr(scene, field)})
    told = {(claim.nouns[i], relation, claim.nouns[j]) for i, relation, j in claim.relations}
    plain = set(relations(scene)) if told else set()
    right = 0
    for first, relation, second in told:
        of_first, of_second = ([k for k, t in enumerate(scene.things) if n.fits(t)] for n in (first, second))
        pairs = [(a, relation, b) for a, b in product(of_first, of_second) if a != b]
        right += bool(pairs) and plain.issuperset(pairs)
    counts["relations"] = (right, len(told), 0, 0)
    return counts


def _overlap(said: set, shown: set) -> tuple[int, int, int, int]:
    return len(said & shown), len(said), len(said & shown), len(shown)


def caption_facts(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """How true captions are of their scenes, and how much of them they tell; facts of all captions in one pot.

    "objects, precision" is the share of the named facts that are right, "objects, recall" the share of the shown facts
    that are named, and so on for `FACTS` (no recall for relations). "hallucinated" is the share of the named kinds that
    the picture does not show and "captions with a hallucination" the share of captions with such a kind: CHAIR_i and
    CHAIR_s (Rohrbach et al. 2018, arXiv:1809.02156). "false captions": `contradicts` says so. "says something": the
    share of texts with at least one noun. Shares of nothing are 0.0.
    """
    total = {fact: [0, 0, 0, 0] for fact in FACTS}
    tally = dict.fromkeys(("captions with a hallucination", "false captions", "says something"), 0)
    for text, scene in zip(texts, scenes, strict=True):
        claim = understand(text)
        counts = fact_counts(claim, scene)
        for fact, numbers in counts.items():
            total[fact] = [a + b for a, b in zip(total[fact], numbers, strict=True)]
        right, said, _, _ = counts["objects"]
        tally["captions with a hallucination"] += right < said
        tally["false captions"] += contradicts(claim, scene)
        tally["says something"] += bool(claim.nouns)
    found: dict[str, float] = {}
    for fact, (right, said, named, shown) in total.items():
        found[f"{fact}, precision"] = _share(right, said)
        if fact != "relations":
            found[f"{fact}, recall"] = _share(named, shown)
    right, said, _, _ = total["objects"]
    found["hallucinated"] = _share(said - right, said)
    return found | {name: _share(number, len(texts)) for name, number in tally.items()}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
