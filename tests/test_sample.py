"""The picture book's facts: the same everywhere, held out where promised, and plain to see."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import pytest

from minivlp.data.picturebook import sample as module
from minivlp.data.picturebook.sample import (
    HELD_OUT_COLOUR,
    HELD_OUT_COUNT,
    SPLITS,
    SYMMETRIC,
    USUAL_PLACES,
    content_hash,
    relations,
    sample,
)
from minivlp.data.picturebook.world import CANVAS, COLOURS, KINDS, PLACES, RELATIONS, SIZES, TIERS, Scene, Thing

ORDINARY = [split for split in SPLITS if not split.startswith("heldout")]
INVERSE = {
    "left of": "right of",
    "above": "below",
    "bigger than": "smaller than",
    "next to": "next to",
    "far from": "far from",
    "the same colour as": "the same colour as",
}
INVERSE |= {b: a for a, b in INVERSE.items()}
OPPOSED = [("left of", "right of"), ("above", "below"), ("bigger than", "smaller than"), ("next to", "far from"),
           ("left of", "above"), ("left of", "below"), ("right of", "above"), ("right of", "below")]  # fmt: skip

# Scenes 0..199 of the training split. They change only when the world is changed on purpose, never with a platform.
BOOK = {
    "easy": "b883d3fd494907146cd78229c5684936f35c0686da3e7975e80601298d2e268d",
    "normal": "bb966fad0c680b501118b27713b72fd0b66b3033109c1474dc41dd2af24e33d6",
    "hard": "22808758e594e99902ee6ae3c869bc1dca5af4f3fbe0c900edbeff2c042b2f44",
}


def book(split: str, tier: str, count: int) -> list[Scene]:
    return [sample(index, split=split, tier=tier) for index in range(count)]


def content(scene: Scene) -> tuple:
    """What a picture shows, without where in the book it is or how it is drawn."""
    return scene.place, scene.sky, scene.weather, scene.things


def pair(a: Thing, b: Thing) -> set[tuple[int, str, int]]:
    return set(relations(Scene(0, 0, "train", "hard", "sea", "day", "clear", (a, b))))


# ---- the same everywhere ----


@pytest.mark.parametrize("tier", TIERS)
def test_the_book_is_the_same_on_every_platform(tier):
    assert content_hash(book("train", tier, 200)) == BOOK[tier]


def test_a_scene_depends_on_its_place_in_the_book_and_on_nothing_else():
    backwards = [sample(index, tier="hard") for index in reversed(range(20))]
    assert backwards[::-1] == book("train", "hard", 20)
    assert sample(3, seed=1).things != sample(3, seed=0).things


@pytest.mark.parametrize("tier", TIERS)
def test_json_keeps_every_fact(tier):
    for scene in book("test", tier, 50):
        assert Scene.from_json(scene.to_json()) == scene


def test_the_hash_sees_every_fact_and_the_order():
    scenes = book("train", "normal", 3)
    moved = replace(scenes[1].things[0], x=scenes[1].things[0].x + 0.1)
    changed = [scenes[0], replace(scenes[1], things=(moved, *scenes[1].things[1:])), scenes[2]]
    assert len({content_hash(scenes), content_hash(changed), content_hash(scenes[::-1])}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "choose from train, val, test"),
        ({"tier": "harder"}, "choose from easy, normal, hard"),
        ({"index": -1}, "count from 0"),
        ({"split": "heldout_count", "tier": "easy"}, "choose tier normal or hard"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"index": 0, **options})


# ---- splits ----


@pytest.mark.parametrize("tier", TIERS)
def test_no_scene_is_in_two_splits(tier):
    train = set(map(content, book("train", tier, 2000)))
    for split in ("val", "test", "flipped", "crayon", "chalk"):
        assert train.isdisjoint(map(content, book(split, tier, 1000)))


@pytest.mark.parametrize("split", SPLITS)
def test_the_tenths_of_the_first_thing_tell_the_splits_apart(split):
    # This is what makes the test above true of every index and not only of those it tries.
    for tier in TIERS[1:]:
        for scene in book(split, tier, 100):
            first = scene.things[0]
            assert (round(10 * first.x) + round(10 * first.y)) % len(SPLITS) == SPLITS.index(split)


@pytest.mark.parametrize("split", ORDINARY)
@pytest.mark.parametrize("tier", TIERS)
def test_withheld_colours_and_counts_are_never_seen_elsewhere(split, tier):
    for scene in book(split, tier, 1500):
        assert all(thing.colour != HELD_OUT_COLOUR[thing.kind] for thing in scene.things)
        counts = Counter(thing.kind for thing in scene.things)
        assert all(counts[kind] != HELD_OUT_COUNT[kind] for kind in counts)


@pytest.mark.parametrize("tier", TIERS)
def test_a_picture_of_heldout_colour_shows_a_withheld_colour(tier):
    scenes = book("heldout_colour", tier, 500)
    for scene in scenes:
        assert any(thing.colour == HELD_OUT_COLOUR[thing.kind] for thing in scene.things)
        counts = Counter(thing.kind for thing in scene.things)
        assert all(counts[kind] != HELD_OUT_COUNT[kind] for kind in counts)
    assert {scene.things[0].kind for scene in scenes} == set(KINDS)


@pytest.mark.parametrize("tier", ["normal", "hard"])
def test_a_picture_of_heldout_count_shows_a_withheld_count(tier):
    scenes = book("heldout_count", tier, 500)
    for scene in scenes:
        counts = Counter(thing.kind for thing in scene.things)
        assert any(counts[kind] == HELD_OUT_COUNT[kind] for kind in counts)
        assert all(thing.colour != HELD_OUT_COLOUR[thing.kind] for thing in scene.things)
    assert {scene.things[0].kind for scene in scenes} == set(KINDS)


def test_one_colour_and_one_count_are_withheld_for_every_kind():
    assert set(HELD_OUT_COLOUR) == set(HELD_OUT_COUNT) == set(KINDS)
    assert set(HELD_OUT_COLOUR.values()) <= set(COLOURS)
    assert set(HELD_OUT_COUNT.values()) == {2, 3, 4}
    # A colour or count that many kinds withhold would be rare, and then a model could not know it from the others.
    assert max(Counter(HELD_OUT_COLOUR.values()).values()) <= 2
    assert max(Counter(HELD_OUT_COUNT.values()).values()) == 4


def test_flipped_puts_things_where_they_seldom_are():
    def usual(split: str, tier: str) -> float:
        scenes = book(split, tier, 2000)
        return sum(scene.place in USUAL_PLACES[scene.things[0].kind] for scene in scenes) / len(scenes)

    assert usual("train", "easy") == pytest.approx(0.70, abs=0.04)
    assert usual("test", "easy") == pytest.approx(0.70, abs=0.04)
    assert usual("flipped", "easy") == pytest.approx(0.15, abs=0.04)
    for tier in ("normal", "hard"):
        assert usual("train", tier) > 0.55 > 0.30 > usual("flipped", tier)


def test_only_the_style_splits_are_drawn_in_another_style():
    for split in SPLITS:
        expected = split if split in ("crayon", "chalk") else "plain"
        assert {scene.style for scene in book(split, "normal", 20)} == {expected}


# ---- priors ----


def test_kinds_colours_and_places_are_balanced():
    scenes = book("train", "easy", 6000)
    kinds = Counter(scene.things[0].kind for scene in scenes)
    places = Counter(scene.place for scene in scenes)
    for kind in KINDS:
        assert kinds[kind] == pytest.approx(6000 / len(KINDS), rel=0.2)
        colours = Counter(scene.things[0].colour for scene in scenes if scene.things[0].kind == kind)
        assert len(colours) == len(COLOURS) - 1
        assert max(colours.values()) < 2 * min(colours.values())
    for place in PLACES:
        assert places[place] == pytest.approx(1000, rel=0.15)


def test_sky_weather_and_layouts_have_their_shares():
    scenes = book("train", "normal", 4000)
    share = {key: n / 4000 for key, n in Counter(scene.sky for scene in scenes).items()}
    assert share == pytest.approx({"day": 0.6, "sunset": 0.2, "night": 0.2}, abs=0.03)
    share = {key: n / 4000 for key, n in Counter(scene.weather for scene in scenes).items()}
    assert share == pytest.approx({"clear": 0.55, "cloudy": 0.15, "rain": 0.15, "snowfall": 0.15}, abs=0.03)
    layouts = Counter(
        "one" if len(scene.things) == 1 else "two" if len({t.kind for t in scene.things}) == 2 else "group"
        for scene in scenes
    )
    assert {key: n / 4000 for key, n in layouts.items()} == pytest.approx(
        {"one": 0.45, "two": 0.40, "group": 0.15}, abs=0.03
    )
    number = Counter(len(scene.things) for scene in book("train", "hard", 2000))
    assert set(number) == {1, 2, 3, 4, 5}
    assert min(number.values()) > 200


# ---- where things are ----


@pytest.mark.parametrize(
    ("split", "tier"), [both for both in product(SPLITS, TIERS) if both != ("heldout_count", "easy")]
)
def test_things_lie_inside_the_canvas_and_hardly_overlap(split, tier):
    for scene in book(split, tier, 400):
        for thing in scene.things:
            assert min(thing.box) >= 0
            assert max(thing.box) <= CANVAS
        for a, b in combinations(scene.things, 2):
            wide = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
            high = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
            assert max(0, wide) * max(0, high) <= 0.15 * min(a.side, b.side) ** 2


def test_an_easy_picture_is_one_big_thing_near_the_middle():
    for scene in book("train", "easy", 500):
        (thing,) = scene.things
        assert thing.size == "big"
        assert 36 <= thing.side <= 40
        assert abs(thing.x - 32) <= 2
        assert abs(thing.y - 34) <= 2


def test_big_and_small_cannot_be_taken_for_each_other():
    for tier in ("normal", "hard"):
        scenes = book("train", tier, 2000)
        for number in range(1, 6):
            sides: dict[str, list[float]] = {size: [] for size in SIZES}
            for scene in scenes:
                if len(scene.things) == number:
                    for thing in scene.things:
                        sides[thing.size].append(thing.side)
            if sides["big"]:
                assert min(sides["big"]) > module.BIGGER_RATIO * max(sides["small"])


def test_things_of_one_kind_are_equal_in_a_picture():
    for tier in ("normal", "hard"):
        for scene in book("train", tier, 1000):
            looks = {(t.kind, t.colour, t.size, t.side) for t in scene.things}
            assert len(looks) == len({t.kind for t in scene.things})


# ---- relations ----


@pytest.mark.parametrize("tier", ["normal", "hard"])
def test_relations_have_margins_inverses_and_no_contradictions(tier):
    seen = set()
    for scene in book("train", tier, 1000):
        facts = relations(scene)
        assert len(facts) == len(set(facts))
        known = set(facts)
        for i, relation, j in facts:
            a, b = scene.things[i], scene.things[j]
            seen.add(relation)
            assert (j, INVERSE[relation], i) in known
            assert (a.kind, a.colour, a.size) != (b.kind, b.colour, b.size)
            away = max(abs(a.x - b.x), abs(a.y - b.y))
            assert {
                "left of": b.x - a.x > 10 and abs(b.y - a.y) < b.x - a.x,
                "right of": a.x - b.x > 10 and abs(b.y - a.y) < a.x - b.x,
                "above": b.y - a.y > 10 and abs(b.x - a.x) < b.y - a.y,
                "below": a.y - b.y > 10 and abs(b.x - a.x) < a.y - b.y,
                "next to": away < 31,
                "far from": away >= 34,
                "bigger than": a.side > 1.25 * b.side,
                "smaller than": b.side > 1.25 * a.side,
                "the same colour as": a.colour == b.colour,
            }[relation]
        for i, j in {(i, j) for i, _, j in facts}:
            for one, other in OPPOSED:
                assert not {(i, one, j), (i, other, j)} <= known
    assert seen == set(RELATIONS)


def test_a_big_thing_is_always_bigger_than_a_small_one():
    for scene in book("train", "hard", 500):
        facts = set(relations(scene))
        for i, j in combinations(range(len(scene.things)), 2):
            a, b = scene.things[i], scene.things[j]
            if a.size != b.size:
                assert (i, "bigger than" if a.size == "big" else "smaller than", j) in facts


def test_relations_of_two_things_by_hand():
    cat = Thing("cat", "red", "small", 14.0, 30.0, 20.0)
    ball = Thing("ball", "red", "big", 40.0, 33.0, 28.0)
    assert pair(cat, ball) == {
        (0, "left of", 1), (1, "right of", 0),
        (0, "next to", 1), (1, "next to", 0),
        (0, "smaller than", 1), (1, "bigger than", 0),
        (0, "the same colour as", 1), (1, "the same colour as", 0),
    }  # fmt: skip
    top, foot = replace(cat, y=11.0, x=32.0), replace(cat, kind="dog", colour="blue", y=52.0, x=32.0)
    assert pair(top, foot) == {(0, "above", 1), (1, "below", 0), (0, "far from", 1), (1, "far from", 0)}


def test_what_is_not_plain_to_see_is_no_relation():
    cat = Thing("cat", "red", "small", 20.0, 20.0, 15.0)
    slanting = Thing("dog", "blue", "small", 45.0, 45.0, 16.0)
    assert pair(cat, slanting) == set()  # neither beside nor below, neither near nor far, of about one size
    assert pair(cat, replace(cat, x=48.0)) == set()  # equal things: nothing tells them apart


def test_symmetric_relations_are_their_own_inverse():
    assert {relation for relation in RELATIONS if INVERSE[relation] == relation} == set(SYMMETRIC)
