"""Questions about one picture, asked so that the words alone do not give the answer away.

What is asked has one answer only: "what colour is the cat?" needs exactly one cat. Every "yes" question has a "no"
question of the same form beside it, and what the "no" question asks for is taken from another scene of the same
split, so that no thing is more often asked for in vain than with success. Answers that the world favours (one thing
is more common than four) are asked for less often, so that each type's answers come out nearly even.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from minivlp.data.picturebook.claims import (
    KIND_WORDS,
    NUMBERS,
    PLACE_WORDS,
    Noun,
    noun_words,
    pick,
    shuffled,
    stream,
    with_article,
)
from minivlp.data.picturebook.sample import (
    EASY_WEATHER_SHARES,
    HELD_OUT_COLOUR,
    SKY_SHARES,
    SPLITS,
    WEATHER_SHARES,
    relations,
    sample,
)
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, SIZES, SKIES, WEATHERS, Scene

QUESTION_TYPES = ("kind", "colour", "size", "count", "place", "sky", "weather", "relation", "exists", "compare")
SIDES = ("left", "right", "above", "below")
ANSWERS = ("yes", "no", *KINDS, *COLOURS, *SIZES, *NUMBERS, *PLACES, *SKIES, *WEATHERS, *SIDES)

# What share of the "how many" questions ask for something that is not there, and how many of the others are kept, by
# tier and answer: chosen so that zero, one, two, three and four come out about equally often.
ASK_FOR_NONE = {"easy": 0.5, "normal": 0.05, "hard": 0.07}
KEEP_COUNT = {"easy": {}, "normal": {"one": 0.06}, "hard": {"one": 0.09, "three": 0.65, "four": 0.65}}

SIGHTS = ("is there {}?", "can you see {}?", "do you see {}?", "does the picture show {}?")
PLACE_QUESTIONS = {place: tuple(f"is this {words}?" for words in PLACE_WORDS[place]) for place in PLACES}
SKY_QUESTIONS = {
    "day": ("is it day?", "is it daytime?"),
    "sunset": ("is it sunset?", "is it evening?"),
    "night": ("is it night?", "is it dark outside?"),
}
WEATHER_QUESTIONS = {
    "clear": ("is the sky clear?", "is the weather fine?"),
    "rain": ("is it raining?", "does it rain?"),
    "snowfall": ("is it snowing?", "is snow falling?"),
}


@dataclass(frozen=True)
class Question:
    """A question about one picture. `answer` is one of `ANSWERS`, `type` one of `QUESTION_TYPES`."""

    question: str
    answer: str
    type: str


def others(scene: Scene, *, tries: int = 20) -> Iterator[Scene]:
    """Other scenes of the same split and tier, always the same ones for the same scene."""
    split = scene.split if scene.split in SPLITS else "train"
    for step in range(1, tries + 1):
        yield sample(scene.index + 1_000_003 * step, split=split, tier=scene.tier, seed=scene.seed)


def names(scene: Scene) -> list[str | None]:
    """What to call each thing so that only it is meant: "cat", or "red cat" beside a blue one, or None."""
    called = []
    for thing in scene.things:
        alike = [other for other in scene.things if other.kind == thing.kind]
        if len(alike) == 1:
            called.append(thing.kind)
        elif sum(other.colour == thing.colour for other in alike) == 1:
            called.append(f"{thing.colour} {thing.kind}")
        else:
            called.append(None)
    return called


def questions(scene: Scene) -> list[Question]:
    """Questions on one scene, at most two of a type, the same ones at every call."""
    rng = stream(scene, "questions")
    return [
        *_about_things(scene, rng),
        *_about_the_whole(scene, rng),
        *_about_two(scene, rng),
        *_exists(scene, rng),
    ]


def _kept(shares: Mapping[str, float], answer: str, rng: random.Random) -> bool:
    """Whether to ask for this answer, so that all answers are asked for as often as the rarest is shown."""
    return rng.random() < min(shares.values()) / shares[answer]


def _weather_shares(scene: Scene) -> Mapping[str, float]:
    return EASY_WEATHER_SHARES if scene.tier == "easy" else WEATHER_SHARES


def _about_things(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Kind, colour, size and count of one thing drawn at random."""
    things, called = scene.things, names(scene)
    i = int(rng.random() * len(things))
    thing = things[i]
    alike = [other for other in things if other.kind == thing.kind]

    if len(things) == 1 and rng.random() < 0.5:
        yield Question(
            pick(("what is in the picture?", "what do you see?", "what is this?", "what object is shown?"), rng),
            thing.kind,
            "kind",
        )
    elif sum(other.colour == thing.colour for other in things) == 1:
        yield Question(f"what is the {thing.colour} thing?", thing.kind, "kind")

    if len({other.colour for other in alike}) == 1:
        verb = "is" if len(alike) == 1 else "are"
        plural = KIND_WORDS[thing.kind][0][len(alike) != 1]
        have = "does" if len(alike) == 1 else "do"
        forms = (f"what colour {verb} the {plural}?", f"which colour {have} the {plural} have?")
        yield Question(pick(forms, rng), thing.colour, "colour")

    if called[i] is not None and scene.tier != "easy":  # where everything is big there is nothing to ask
        first, second = shuffled(SIZES, rng)
        name = called[i]
        forms = (f"is the {name} {first} or {second}?", f"how big is the {name}?", f"what size does the {name} have?")
        yield Question(pick(forms, rng), thing.size, "size")

    kind, number = thing.kind, len(alike)
    if rng.random() < ASK_FOR_NONE[scene.tier]:
        shown = {other.kind for other in things}
        absent = (other.kind for scene_ in others(scene) for other in scene_.things if other.kind not in shown)
        kind = next(absent, kind)
        number = number if kind == thing.kind else 0
    form = pick(("how many {} are there?", "how many {} do you see?", "can you count the {}?"), rng)
    if rng.random() < KEEP_COUNT[scene.tier].get(NUMBERS[number], 1.0):
        yield Question(form.format(KIND_WORDS[kind][0][1]), NUMBERS[number], "count")


def _about_the_whole(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Place, time of day and weather."""
    yield Question(pick(("where is this?", "what kind of place is this?", "where are we?"), rng), scene.place, "place")
    first, second, third = shuffled(SKIES, rng)
    forms = ("what time of day is it?", "which part of the day is it?", f"is it {first}, {second} or {third}?")
    if _kept(SKY_SHARES, scene.sky, rng):
        yield Question(pick(forms, rng), scene.sky, "sky")
    if _kept(_weather_shares(scene), scene.weather, rng):
        yield Question(pick(("what is the weather like?", "how is the weather?"), rng), scene.weather, "weather")


def _about_two(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Where one thing is from another, and which is bigger or more numerous. Each is asked both ways round."""
    called = names(scene)
    facts = [(i, r, j) for i, r, j in relations(scene) if called[i] and called[j]] if len(called) > 1 else []

    where = [(i, relation, j) for i, relation, j in facts if relation in ("left of", "above")]
    if where:
        i, relation, j = pick(where, rng)
        words = shuffled(("left", "right") if relation == "left of" else ("above", "below"), rng)
        of = " of" if relation == "left of" else ""
        form = f"is the {{}} {words[0]} or {words[1]}{of} the {{}}?"
        answers = ("left", "right") if relation == "left of" else ("above", "below")
        pair = (
            Question(form.format(called[i], called[j]), answers[0], "relation"),
            Question(form.format(called[j], called[i]), answers[1], "relation"),
        )
        yield from shuffled(pair, rng)

    comparisons = [
        (f"is the {called[i]} {{}} than the {called[j]}?", f"is the {called[j]} {{}} than the {called[i]}?")
        for i, relation, j in facts
        if relation == "bigger than"
    ]
    if comparisons:
        bigger, smaller = pick(comparisons, rng)
        yes, no, word = (bigger, smaller, "bigger") if rng.random() < 0.5 else (smaller, bigger, "smaller")
    else:
        number = {kind: sum(thing.kind == kind for thing in scene.things) for kind in KINDS}
        uneven = [(a, b) for a in KINDS for b in KINDS if number[a] > number[b] > 0]
        if not uneven:
            return
        more, fewer = (KIND_WORDS[kind][0][1] for kind in pick(uneven, rng))
        yes, no, word = f"are there {{}} {more} than {fewer}?", f"are there {{}} {fewer} than {more}?", "more"
    yield from shuffled((Question(yes.format(word), "yes", "compare"), Question(no.format(word), "no", "compare")), rng)


def _exists(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """One question whose answer is yes and one whose answer is no, of the same form."""
    form = pick(("kind", "colour", "place", "sky", "weather"), rng)
    shown = getattr(scene, form, "")
    # It is cloudy where it rains or snows, too, so nobody is asked about clouds.
    if (form == "sky" and not _kept(SKY_SHARES, shown, rng)) or (
        form == "weather" and (shown == "cloudy" or not _kept(_weather_shares(scene), shown, rng))
    ):
        form = "kind"
    if form in ("kind", "colour"):
        nouns = [noun for noun in (_noun(scene, form, rng), _missing_noun(scene, form, rng)) if noun]
        asked = [pick(SIGHTS, rng).format(with_article(noun_words(noun, rng))) for noun in nouns]
    else:
        phrases = {"place": PLACE_QUESTIONS, "sky": SKY_QUESTIONS, "weather": WEATHER_QUESTIONS}[form]
        missing = pick([value for value in phrases if value != shown], rng)
        asked = [pick(phrases[value], rng) for value in (shown, missing)]
    if len(asked) == 2:
        pair = [Question(question, answer, "exists") for question, answer in zip(asked, ("yes", "no"), strict=True)]
        yield from shuffled(pair, rng)


def _noun(scene: Scene, form: str, rng: random.Random) -> Noun:
    thing = pick(scene.things, rng)
    return Noun(1, thing.kind, thing.colour if form == "colour" else None)


def _missing_noun(scene: Scene, form: str, rng: random.Random) -> Noun | None:
    """Something that another scene has and this one has not. Half of the coloured ones are near misses."""
    near = form == "colour" and rng.random() < 0.5
    for other in others(scene):
        noun = _noun(other, form, rng)
        if near:
            mine = _noun(scene, form, rng)
            noun = Noun(1, mine.kind, noun.colour) if rng.random() < 0.5 else Noun(1, noun.kind, mine.colour)
            if HELD_OUT_COLOUR.get(noun.kind) == noun.colour:
                continue  # a withheld combination must not be named either
        if not any(map(noun.fits, scene.things)):
            return noun
    return None
