"""From a scene to a sentence, in two steps: what is said, and how.

A `Claim` is what a sentence says, as facts; `say` puts it into words, choosing among synonyms and sentence shapes.
Captions, web captions and probes are all made this way, so a wrong caption is a changed claim and never a piece of
text surgery.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from minivlp.data.picturebook.sample import relations
from minivlp.data.picturebook.world import Scene, Thing

T = TypeVar("T")
Facts = list[tuple[int, str, int]]  # relations: (i, relation, j)

NUMBERS = ("zero", "one", "two", "three", "four")

# Singular and plural of every name a kind goes by. The first is the usual one, and the one answers are given in.
KIND_WORDS = {
    "house": (("house", "houses"), ("home", "homes"), ("cottage", "cottages")),
    "tree": (("tree", "trees"),),
    "car": (("car", "cars"), ("automobile", "automobiles")),
    "boat": (("boat", "boats"), ("ship", "ships"), ("sailboat", "sailboats")),
    "cat": (("cat", "cats"), ("kitten", "kittens")),
    "dog": (("dog", "dogs"), ("puppy", "puppies"), ("pup", "pups")),
    "fish": (("fish", "fish"),),
    "bird": (("bird", "birds"),),
    "balloon": (("balloon", "balloons"),),
    "flower": (("flower", "flowers"), ("blossom", "blossoms"), ("bloom", "blooms")),
    "umbrella": (("umbrella", "umbrellas"), ("parasol", "parasols")),
    "ball": (("ball", "balls"),),
}
# Every other colour has one name.
COLOUR_WORDS = {"red": ("red", "crimson"), "yellow": ("yellow", "golden"), "purple": ("purple", "violet")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}

RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "beneath", "underneath", "lower than"),
    "next to": ("next to", "beside", "near", "close to"),
    "far from": ("far from", "far away from"),
    "bigger than": ("bigger than", "larger than"),
    "smaller than": ("smaller than",),
    "the same colour as": ("the same colour as",),
}
SAME_COLOUR = "the same colour as"
WHERE = ("left of", "right of", "above", "below", "next to", "far from")
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "next to": "next to",
    "far from": "far from",
    "bigger than": "smaller than",
    "smaller than": "bigger than",
    "the same colour as": "the same colour as",
}

PLACE_WORDS = {
    "meadow": ("in a meadow", "on the grass", "in a green field", "on grassy hills"),
    "beach": ("on the beach", "at the seaside", "on the shore", "on a sandy shore"),
    "sea": ("at sea", "on the water", "on the waves", "on the ocean"),
    "snow": ("in the snow", "on snowy ground", "in a winter landscape"),
    "desert": ("in the desert", "among the dunes"),
    "city": ("in the city", "in town", "on a city street", "in front of tall buildings"),
}
SKY_WORDS = {
    "day": ("by day", "in the daytime", "during the day"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "after dark"),
}
WEATHER_WORDS = {
    "clear": ("under a clear sky", "in clear weather", "in fine weather"),
    "cloudy": ("under a cloudy sky", "in cloudy weather", "under clouds"),
    "rain": ("in the rain", "in rainy weather", "while it rains"),
    "snowfall": ("in falling snow", "while it snows", "in a snow shower"),
}
# Sky and weather in one breath: "on a rainy night".
SKY_NOUNS = {"day": "day", "sunset": "evening", "night": "night"}
WEATHER_ADJECTIVES = {"clear": "clear", "cloudy": "cloudy", "rain": "rainy", "snowfall": "snowy"}

FRAMES = (
    "a picture of",
    "a drawing of",
    "an image of",
    "a painting of",
    "an illustration of",
    "a cartoon of",
    "a scene with",
    "this picture shows",
    "we see",
    "you can see",
    "look at",
    "{this}",
    "here {be}",
    "there {be}",
)
STYLE_FRAMES = {"crayon": ("a crayon drawing of", "a drawing in crayon of"), "chalk": ("a chalk drawing of",)}


@dataclass(frozen=True)
class Noun:
    """Exactly `number` things that share every fact that is not None."""

    number: int
    kind: str
    colour: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            thing.kind == self.kind
            and (self.colour is None or thing.colour == self.colour)
            and (self.size is None or thing.size == self.size)
        )


@dataclass(frozen=True)
class Claim:
    """What one sentence says about a picture. A relation is `(i, relation, j)` over the positions in `nouns`."""

    nouns: tuple[Noun, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    place: str | None = None
    sky: str | None = None
    weather: str | None = None
    style: str | None = None


def stream(scene: Scene, purpose: str) -> random.Random:
    """A random stream of its own for one scene and one purpose, so that adding a text never changes another."""
    return random.Random(f"{scene.seed}/{scene.split}/{scene.tier}/{scene.index}/{purpose}")


def pick(options: Sequence[T], rng: random.Random) -> T:
    """One of `options`. `random.random` is the only draw that Python promises to repeat in later versions."""
    return options[int(rng.random() * len(options))]


def usual(options: Sequence[T], rng: random.Random, *, share: float = 0.6) -> T:
    """The first option with probability `share`, else one of the rest."""
    if len(options) == 1 or rng.random() < share:
        return options[0]
    return options[1 + int(rng.random() * (len(options) - 1))]


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """A shuffled copy, by the same promised draw as `pick`."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


# ---------------------------------------------------------------------------------------------------------------
# Facts to words
# ---------------------------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """`"orange cat"` to `"an orange cat"`. No word of this world breaks the vowel rule."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_words(noun: Noun, rng: random.Random, *, plain: bool = False) -> str:
    """A noun phrase without its article or number: `"big red cat"`, `"fish"`. `plain` uses no synonyms."""
    forms = KIND_WORDS[noun.kind]
    words = (forms[0] if plain else usual(forms, rng, share=0.75))[noun.number != 1]
    if noun.colour is not None:
        names = COLOUR_WORDS.get(noun.colour)
        colour = noun.colour if names is None or plain else usual(names, rng, share=0.75)
        words = f"{colour} {words}"
    if noun.size is not None:
        size = noun.size if plain else usual(SIZE_WORDS[noun.size], rng, share=0.5)
        words = f"{size} {words}"
    return words


def noun_phrase(noun: Noun, rng: random.Random, *, plain: bool = False) -> str:
    """`"a big red cat"`, `"three fish"`."""
    words = noun_words(noun, rng, plain=plain)
    return with_article(words) if noun.number == 1 else f"{NUMBERS[noun.number]} {words}"


def in_a_row(phrases: Sequence[str]) -> str:
    """`["a", "b", "c"]` to `"a, b and c"`."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def circumstances(claim: Claim, rng: random.Random) -> list[str]:
    """Place, time of day and weather as phrases, in an order that varies. Briefly where much else is said."""
    brief = len(claim.nouns) > 3
    phrases = [] if claim.place is None else [usual(PLACE_WORDS[claim.place], rng, share=0.5)]
    if claim.sky is not None and claim.weather is not None and (brief or rng.random() < 0.3):
        air = [f"on a {WEATHER_ADJECTIVES[claim.weather]} {SKY_NOUNS[claim.sky]}"]
    else:
        air = [] if claim.sky is None else [usual(SKY_WORDS[claim.sky], rng, share=0.5)]
        air += [] if claim.weather is None else [usual(WEATHER_WORDS[claim.weather], rng, share=0.5)]
    return phrases + air if rng.random() < 0.8 else air + phrases


def say(claim: Claim, rng: random.Random, *, plain: bool = False) -> str:
    """Put a claim into words: lower case, no full stop. Nouns outside the relations come first, so that
    "two trees and a cat left of a ball" cannot be read as a cat left of several things. With `plain`, things and
    colours go by their usual names, and two claims of one shape come out as the same sentence from equal streams."""
    phrases = [noun_phrase(noun, rng, plain=plain) for noun in claim.nouns]
    order = list(range(len(phrases)))
    verb = None
    if claim.relations:
        i, relation, j = claim.relations[0]
        verb = "is" if claim.nouns[i].number == 1 else "are"
        use_verb = len(phrases) == 2 and claim.style not in STYLE_FRAMES and rng.random() < 0.2
        words = usual(RELATION_WORDS[relation], rng, share=0.6 if len(phrases) <= 3 else 1.0)
        joined = f"{phrases[i]}{' ' + verb if use_verb else ''} {words} {phrases[j]}"
        for _, more, _ in claim.relations[1:]:
            it = "it" if claim.nouns[j].number == 1 else "them"
            joined += f" and {usual(RELATION_WORDS[more], rng)} {it}"
        order = [k for k in order if k not in (i, j)]
        phrases = [phrases[k] for k in order] + [joined]
        order.append(i)
        verb = verb if use_verb else None
    text = in_a_row(phrases)
    if len(phrases) == 2 and not claim.relations and rng.random() < 0.15:
        text = f"{phrases[0]} {pick(('with', 'together with'), rng)} {phrases[1]}"
    listed = text
    if claim.style in STYLE_FRAMES:
        text = f"{pick(STYLE_FRAMES[claim.style], rng)} {text}"
    elif verb is None and len(claim.nouns) <= 3 and rng.random() < 0.4:
        be, this = ("is", "this is") if claim.nouns[order[0]].number == 1 else ("are", "these are")
        text = f"{pick(FRAMES, rng).format(be=be, this=this)} {text}"
    around = circumstances(claim, rng)
    if around and verb is None and text == listed and rng.random() < 0.12:
        return f"{' '.join(around)}, {text}"
    return " ".join([text, *around])


# ---------------------------------------------------------------------------------------------------------------
# Scenes to facts
# ---------------------------------------------------------------------------------------------------------------


def groups(scene: Scene, *, colour: bool, size: bool) -> list[tuple[Noun, list[int]]]:
    """The things of a scene gathered into nouns, each with its positions in `scene.things`."""
    members: dict[tuple, list[int]] = {}
    for i, thing in enumerate(scene.things):
        key = (thing.kind, thing.colour if colour else None, thing.size if size else None)
        members.setdefault(key, []).append(i)
    return [(Noun(len(which), *key), which) for key, which in members.items()]


def group_relations(members: Sequence[Sequence[int]], facts: Facts) -> Facts:
    """Relations between groups: those that hold from every thing of one to every thing of the other."""
    group = {i: a for a, which in enumerate(members) for i in which}
    holding: dict[tuple[int, str, int], int] = {}
    for i, relation, j in facts:
        between = (group[i], relation, group[j])
        holding[between] = holding.get(between, 0) + 1
    return [(a, r, b) for (a, r, b), n in holding.items() if a != b and n == len(members[a]) * len(members[b])]


def claim_of(scene: Scene, level: int, rng: random.Random, facts: Facts | None = None) -> Claim:
    """The claim behind caption `level` (0..4). `facts` is `relations(scene)`, passed on to save time."""
    gathered = shuffled(groups(scene, colour=level >= 1, size=level >= 2), rng)
    nouns = [noun for noun, _ in gathered]
    said: Facts = []
    if level >= 3 and len(nouns) >= 2:
        known = facts if facts is not None else relations(scene)
        possible = group_relations([which for _, which in gathered], known)
        # Where things are says more about a picture than which is bigger, so it is said more often.
        where = [relation for relation in possible if relation[1] in WHERE]
        if possible:
            said = [pick(where if where and rng.random() < 0.85 else possible, rng)]
        if said and level == 4 and len(nouns) == 2 and rng.random() < 0.5:
            i, relation, _ = said[0]
            more = [r for r in possible if r[0] == i and r[1] not in (relation, SAME_COLOUR)]
            said += [pick(more, rng)] if more else []
        if said and said[0][1] == SAME_COLOUR and level == 3:
            # "a red cat the same colour as a red ball" says it twice: leave the colour for the reader to find.
            nouns = [_without_colour(noun, scene) if k in said[0] else noun for k, noun in enumerate(nouns)]
    if level < 4:
        return Claim(tuple(nouns), tuple(said), place=scene.place if level == 3 and not said else None)
    style = scene.style if scene.style in STYLE_FRAMES else None
    return Claim(tuple(nouns), tuple(said), scene.place, scene.sky, scene.weather, style)


def _without_colour(noun: Noun, scene: Scene) -> Noun:
    """The noun without its colour, if it still counts right that way."""
    bare = replace(noun, colour=None)
    return bare if sum(map(bare.fits, scene.things)) == noun.number else noun
