"""From sentences back to facts: against the claims they were made of, against the tests' own reader, and by hand."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import caption_parser as reader
import pytest

from minivlp.data.picturebook import claims
from minivlp.data.picturebook.claims import Claim, Noun, claim_of, say
from minivlp.data.picturebook.describe import captions, web_caption
from minivlp.data.picturebook.sample import SPLITS, relations, sample
from minivlp.data.picturebook.understand import FACTS, caption_facts, fact_counts, understand, unknown_words
from minivlp.data.picturebook.web import contradicts, wrong_attributes, wrong_counts
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, RELATIONS, SIZES, SKIES, WEATHERS, Scene, Thing

SHORT = dict(
    zip(RELATIONS, ("left", "right", "above", "below", "near", "far", "bigger", "smaller", "same"), strict=True)
)
CAT, BALL = Thing("cat", "red", "big", 16, 36, 28), Thing("ball", "blue", "small", 52, 36, 20)


def scene_of(*things: Thing) -> Scene:
    return Scene(0, 0, "test", "normal", place="beach", sky="night", weather="rain", things=things)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    chapters = [(s, t) for s, t in product(SPLITS, ("easy", "normal", "hard")) if (s, t) != ("heldout_count", "easy")]
    return [sample(i, split=split, tier=tier, seed=5) for split, tier in chapters for i in range(90)]


@pytest.fixture(scope="module")
def told(scenes) -> list[tuple[str, Scene]]:
    return [(caption, scene) for scene in scenes for caption in captions(scene)]


@pytest.fixture(scope="module")
def found(scenes) -> list[tuple[str, str, Scene]]:
    """Web captions with their kind of noise."""
    return [(*web_caption(scene, scenes[k - 1]), scene) for k, scene in enumerate(scenes)]


def without_order(claim: Claim) -> tuple:
    """What a claim says, whichever noun comes first."""
    said = Counter((claim.nouns[i], relation, claim.nouns[j]) for i, relation, j in claim.relations)
    return Counter(claim.nouns), said, replace(claim, nouns=(), relations=())


# ---- what a sentence says ----


def test_what_was_said_is_understood(scenes):
    rng = random.Random(0)
    for scene in scenes:
        known = relations(scene)
        for level in range(5):
            claim = claim_of(scene, level, rng, known)
            for said in (claim, *(next(wrong(claim, scene, rng), claim) for wrong in (wrong_attributes, wrong_counts))):
                text = say(said, rng, plain=rng.random() < 0.3)
                assert without_order(understand(text)) == without_order(said), text
                assert unknown_words(text) == 0, text


def test_every_name_is_known_by_its_canonical_one():
    for kind, forms in claims.KIND_WORDS.items():
        for one, more in forms:
            assert understand(f"a {one} and three {more}").nouns == (Noun(1, kind), Noun(3, kind))
    for colour in COLOURS:
        for word in claims.COLOUR_WORDS.get(colour, (colour,)):
            assert understand(f"a {word} cat").nouns == (Noun(1, "cat", colour),)
    for size, words in claims.SIZE_WORDS.items():
        assert all(understand(f"two {word} cats").nouns == (Noun(2, "cat", None, size),) for word in words)
    for relation, phrases in claims.RELATION_WORDS.items():
        for phrase in phrases:
            text = f"two cats are {phrase} a tree and {phrase} it"
            assert understand(text).relations == ((0, relation, 1), (0, relation, 1)) and not unknown_words(text)
    tables = {"place": claims.PLACE_WORDS, "sky": claims.SKY_WORDS, "weather": claims.WEATHER_WORDS}
    for name, table in tables.items():
        for value, phrases in table.items():
            assert all(understand(phrase) == Claim((), **{name: value}) for phrase in phrases)
    for frame in claims.FRAMES:
        text = frame.format(be="is", this="this is") + " a cat"
        assert understand(text) == Claim((Noun(1, "cat"),)) and not unknown_words(text)
    for style, phrases in claims.STYLE_FRAMES.items():
        assert all(understand(f"{phrase} a cat") == Claim((Noun(1, "cat"),), style=style) for phrase in phrases)


def test_the_tests_own_reader_agrees(told, found):
    texts = [text for text, _ in told] + [text for text, noise, _ in found if noise not in ("vague", "junk")]
    said = Counter()
    for text in texts:
        claim, facts = understand(text), reader.parse(text)
        assert [(n.number, n.kind, n.colour, n.size) for n in claim.nouns] == [
            (n.number, n.kind, n.colour, n.size) for n in facts.nouns
        ], text
        assert [(i, SHORT[relation], j) for i, relation, j in claim.relations] == facts.relations, text
        for name in ("place", "sky", "weather", "style"):
            assert getattr(claim, name) == getattr(facts, name), text
        said.update(relation for _, relation, _ in claim.relations)
    assert set(said) == set(RELATIONS)  # nothing was left untried


def a(kind: str) -> Noun:
    return Noun(1, kind)


@pytest.mark.parametrize(
    "text, claim, unknown",
    [
        ("", Claim(()), 0),
        ("a", Claim(()), 1),
        ("a big red", Claim(()), 3),
        ("a red cat left of a", Claim((Noun(1, "cat", "red"),)), 3),
        ("a cat is left of", Claim((a("cat"),)), 3),
        ("a cat and above it", Claim((a("cat"),)), 2),
        ("above a cat", Claim((a("cat"),)), 1),
        ("a cat left of and a dog", Claim((a("cat"), a("dog"))), 2),
        ("a cat left of a ball, a dog", Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1),)), 0),
        ("a cat in", Claim((a("cat"),)), 1),
        ("a cat in the", Claim((a("cat"),)), 2),
        ("two happy red cats", Claim((Noun(2, "cat", "red"),)), 1),
        ("a photo of two cats", Claim((Noun(2, "cat"),)), 3),
        ("a red photo, a cat", Claim((a("cat"),)), 3),
        ("a red photo and cat", Claim((a("cat"),)), 3),
        ("a red photo, cat", Claim((a("cat"),)), 3),
        ("a red photo a cat", Claim((a("cat"),)), 3),
        ("a red big cat", Claim((Noun(1, "cat", "red", "big"),)), 0),
        ("a red blue cat", Claim((Noun(1, "cat", "blue"),)), 1),
        ("two cat", Claim((Noun(2, "cat"),)), 0),
        ("cats", Claim((a("cat"),)), 0),
        ("one cat and zero dogs", Claim((a("cat"),)), 2),
        ("a cat at night by day", Claim((a("cat"),), sky="night"), 2),
        ("a cat at night after dark", Claim((a("cat"),), sky="night"), 0),
        ("a cat by day on a rainy night", Claim((a("cat"),), sky="day"), 4),
        ("There is a CAT, in the snow.", Claim((a("cat"),), place="snow"), 0),
        ("a cat in the snow left of a ball", Claim((a("cat"), a("ball")), ((0, "left of", 1),), "snow"), 0),
        ("a cat left of in the snow a ball", Claim((a("cat"), a("ball")), (), "snow"), 2),
        ("a cat left of a ball above a dog",
         Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1), (1, "above", 2))), 0),
        ("a cat left of a ball and above a dog",
         Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1), (0, "above", 2))), 0),
        ("a cat left of a ball, above a dog",
         Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1), (0, "above", 2))), 0),
        ("a cat left of a ball and a dog above a car",
         Claim((a("cat"), a("ball"), a("dog"), a("car")), ((0, "left of", 1), (2, "above", 3))), 0),
        ("a cat and a dog left of a ball above a car",
         Claim((a("cat"), a("dog"), a("ball"), a("car")), ((1, "left of", 2), (2, "above", 3))), 0),
        ("a cat left of a ball and a dog and above a car",
         Claim((a("cat"), a("ball"), a("dog"), a("car")), ((0, "left of", 1), (2, "above", 3))), 0),
        ("a cat left of a ball and above it near a dog",
         Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1), (0, "above", 1), (1, "next to", 2))), 0),
        ("a cat left of a ball and above it a dog",
         Claim((a("cat"), a("ball"), a("dog")), ((0, "left of", 1), (0, "above", 1))), 0),
        ("a cat is in the snow left of a ball",
         Claim((a("cat"), a("ball")), ((0, "left of", 1),), "snow"), 1),
        ("a cat left of a ball above it", Claim((a("cat"), a("ball")), ((0, "left of", 1),)), 2),
        ("a category of cardboard", Claim(()), 4),
        ("img_cat_1.jpg", Claim((a("cat"),)), 3),
    ],
)  # fmt: skip
def test_sentences_that_nobody_should_write(text, claim, unknown):
    assert understand(text) == claim
    assert unknown_words(text) == unknown


def test_half_sentences_and_nonsense_never_raise(told):
    rng = random.Random(1)
    strange = ("it", "is", ",", ".", "[UNK]", "##s", "é", "３", "_")
    words = [*sorted({word for text, _ in told for word in text.split()}), *strange]
    for text, scene in told[::25]:
        whole, pieces = understand(text), text.split()
        for end in range(len(pieces)):
            half = " ".join(pieces[:end])
            assert whole.nouns[: len(understand(half).nouns)] == understand(half).nouns
            assert unknown_words(half) <= 6  # of the phrase that was cut, and of the relation before it
        mixed = [
            " ".join(rng.sample(pieces, len(pieces))),
            " ".join(rng.choices(words, k=30)),
            text[:: rng.choice((-1, 2))],
        ]
        for nonsense in (*mixed, "".join(map(chr, rng.choices(range(0xD7FF), k=40)))):
            claim = understand(nonsense)
            assert 0 <= unknown_words(nonsense) <= len(nonsense)
            assert {i for i, _, j in claim.relations for i in (i, j)} <= set(range(len(claim.nouns)))
            for right, said, named, shown in fact_counts(claim, scene).values():
                assert 0 <= right <= said and 0 <= named <= shown


# ---- captions against scenes ----


def all_right(text: str, scene: Scene) -> bool:
    return all(right == said for right, said, _, _ in fact_counts(understand(text), scene).values())


def test_captions_are_right_in_every_fact(told, scenes):
    for text, scene in told:
        assert all_right(text, scene) and not contradicts(understand(text), scene), text
    scores = caption_facts([text for text, _ in told], [scene for _, scene in told])
    assert all(scores[f"{fact}, precision"] == 1.0 for fact in FACTS)
    assert scores["objects, recall"] == scores["counts, recall"] == scores["says something"] == 1.0  # every level
    full = caption_facts([captions(scene)[4] for scene in scenes], scenes)
    assert all(share == 1.0 for name, share in full.items() if "recall" in name or "precision" in name)
    assert full["hallucinated"] == full["captions with a hallucination"] == full["false captions"] == 0.0


def test_web_captions_are_what_they_were_recorded_as(found):
    seen = Counter()
    for text, noise, scene in found:
        claim = understand(text)
        if noise in ("vague", "junk"):
            assert claim == Claim(()) and unknown_words(text) > 0, text
        else:
            assert unknown_words(text) == 0
            assert contradicts(claim, scene) == (noise != "clean"), (text, noise)
            assert noise != "clean" or all_right(text, scene), text
        seen[noise] += 1
    assert len(seen) == 6 and min(seen.values()) > 50


def next_of(values, value):
    return values[(values.index(value) + 1) % len(values)]


def test_one_changed_fact_is_one_wrong_fact(scenes):
    """Of a full caption's claim, change one fact: that fact turns wrong, and no fact that does not hang on it."""
    for scene in scenes:
        claim = understand(captions(scene)[4])
        before = fact_counts(claim, scene)

        def wrong(changed: Claim, scene: Scene = scene) -> set[str]:
            return {fact for fact, (right, said, _, _) in fact_counts(changed, scene).items() if right < said}

        for fact, name, values in (
            ("places", "place", PLACES),
            ("skies", "sky", SKIES),
            ("weathers", "weather", WEATHERS),
        ):
            changed = replace(claim, **{name: next_of(values, getattr(claim, name))})
            assert wrong(changed) == {fact}
            assert fact_counts(changed, scene)[fact] == (0, 1, 0, 1)
            assert fact_counts(replace(claim, **{name: None}), scene) == before | {fact: (0, 0, 0, 1)}
        first, rest = claim.nouns[0], claim.nouns[1:]
        related = {"relations"} if any(0 in (i, j) for i, _, j in claim.relations) else set()
        absent = next(kind for kind in KINDS if kind not in {thing.kind for thing in scene.things})
        unused = next(c for c in COLOURS if c not in {thing.colour for thing in scene.things})
        for noun, expected in (
            (replace(first, kind=absent), {"objects", "colours", "counts"} | related),
            (replace(first, colour=unused), {"colours", "counts"} | related),
            (replace(first, size=next_of(SIZES, first.size)), {"counts"} | related),
            (replace(first, number=first.number + 1), {"counts"}),
        ):
            if not any(map(noun.fits, scene.things)) or noun.number != first.number:
                assert wrong(replace(claim, nouns=(noun, *rest))) == expected
        for i, relation, j in claim.relations:
            turned = replace(claim, relations=((i, claims.INVERSE[relation], j),))
            assert wrong(turned) == (set() if claims.INVERSE[relation] == relation else {"relations"})


# ---- by hand ----


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "a red cat and two green balls at the seaside by day",
            {"objects": (2, 2, 2, 2), "colours": (1, 2, 1, 2), "counts": (1, 2, 1, 2), "places": (1, 1, 1, 1),
             "skies": (0, 1, 0, 1), "weathers": (0, 0, 0, 1), "relations": (0, 0, 0, 0)},
        ),
        (
            "a dog, a kitten bigger than a ball and below it in cloudy weather",
            {"objects": (2, 3, 2, 2), "colours": (0, 0, 0, 2), "counts": (2, 3, 2, 2), "places": (0, 0, 0, 1),
             "skies": (0, 0, 0, 1), "weathers": (0, 1, 0, 1), "relations": (1, 2, 0, 0)},
        ),
        (
            "a red cat and a red cat and a crimson kitten",  # said once
            {"objects": (1, 1, 1, 2), "colours": (1, 1, 1, 2), "counts": (1, 1, 1, 2), "places": (0, 0, 0, 1),
             "skies": (0, 0, 0, 1), "weathers": (0, 0, 0, 1), "relations": (0, 0, 0, 0)},
        ),
        (
            "wow",
            {"objects": (0, 0, 0, 2), "colours": (0, 0, 0, 2), "counts": (0, 0, 0, 2), "places": (0, 0, 0, 1),
             "skies": (0, 0, 0, 1), "weathers": (0, 0, 0, 1), "relations": (0, 0, 0, 0)},
        ),
    ],
)  # fmt: skip
def test_fact_counts_by_hand(text, expected):
    counts = fact_counts(understand(text), scene_of(CAT, BALL))
    assert counts == expected
    assert tuple(counts) == FACTS


def test_numbers_by_hand():
    three = scene_of(replace(CAT, x=10), replace(CAT, x=54), replace(CAT, x=32, colour="blue"))
    for text, (right, said, named) in {
        "three cats": (1, 1, 1),
        "a cat": (0, 1, 0),  # one of three is not all of them
        "two cats": (0, 1, 0),
        "two red cats and a blue cat": (2, 2, 1),  # and they add up
        "two red cats": (1, 1, 0),  # right, and not all of the cats
        "two red cats and three blue cats": (1, 2, 0),
    }.items():
        assert fact_counts(understand(text), three)["counts"] == (right, said, named, 1), text
    assert fact_counts(understand("three red cats"), three)["colours"] == (1, 1, 1, 2)


def test_relations_must_hold_between_all_that_is_meant():
    def right(text: str, *things: Thing) -> bool:
        number, said, named, shown = fact_counts(understand(text), scene_of(*things))["relations"]
        assert (said, named, shown) == (1, 0, 0)
        return bool(number)

    low, high, aside = replace(CAT, y=46), replace(CAT, y=18), replace(CAT, x=52, y=10, side=14)
    assert right("two cats left of a ball", low, high, BALL)
    assert not right("two cats left of a ball", low, aside, BALL)
    assert not right("a ball left of two cats", low, high, BALL)
    assert right("a ball right of two cats", low, high, BALL)
    assert not right("a cat left of a dog", CAT, BALL)  # nothing holds of a thing that is not there
    assert not right("a dog left of a ball", CAT, BALL)
    assert not right("a cat left of a cat", CAT, BALL)  # nor between a thing and itself
    assert right("a cat left of a blue cat", CAT, replace(CAT, x=52, colour="blue"))  # and none is asked of it
    assert not right("a cat left of a blue cat", CAT, replace(CAT, x=52, colour="blue"), replace(CAT, x=60))
    assert right("a red cat left of a blue cat", CAT, replace(CAT, x=52, colour="blue"))


def test_caption_facts_by_hand():
    texts = [
        "a red cat and two green balls at the seaside by day",
        "a dog, a kitten bigger than a ball and below it in cloudy weather",
        "a cat and a ball under a cloudy sky",  # it rains: not false, and not right
        "wow",
    ]
    scores = caption_facts(texts, [scene_of(CAT, BALL)] * 4)
    expected = {
        "objects, precision": 6 / 7, "objects, recall": 6 / 8,
        "colours, precision": 1 / 2, "colours, recall": 1 / 8,
        "counts, precision": 5 / 7, "counts, recall": 5 / 8,
        "places, precision": 1.0, "places, recall": 1 / 4,
        "skies, precision": 0.0, "skies, recall": 0.0,
        "weathers, precision": 0.0, "weathers, recall": 0.0,
        "relations, precision": 1 / 2,
        "hallucinated": 1 / 7, "captions with a hallucination": 1 / 4,
        "false captions": 2 / 4, "says something": 3 / 4,
    }  # fmt: skip
    assert scores == pytest.approx(expected)
    assert list(scores) == list(expected)


def test_shares_of_nothing_are_zero():
    for texts in ([], ["wow"]):
        scores = caption_facts(texts, [scene_of(CAT)] * len(texts))
        assert set(scores.values()) == {0.0}
    with pytest.raises(ValueError):
        caption_facts(["a cat"], [])


def test_a_caption_with_two_hallucinations_is_one_caption():
    scores = caption_facts(["a cat, a dog and a bird", "a cat"], [scene_of(CAT)] * 2)
    assert scores["hallucinated"] == 2 / 4 and scores["captions with a hallucination"] == 1 / 2
