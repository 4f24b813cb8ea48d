"""Captions as the web would have them: most of them right, some of them wrong, some of them no caption at all.

The kind of noise is recorded with every text, so that a filter can be scored against the truth: something no real
web data set allows. Recorded kinds are honest: a caption called wrong is false of its picture in something that can
be counted or named, never by luck of an unclear relation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

from minivlp.data.picturebook.claims import NUMBERS, Claim, claim_of, pick, say, shuffled, stream
from minivlp.data.picturebook.sample import HELD_OUT_COLOUR, HELD_OUT_COUNT
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, SIZES, SKIES, WEATHERS, Scene

WEB_NOISE = {"clean": 0.55, "swapped": 0.15, "wrong_attribute": 0.10, "wrong_count": 0.05, "vague": 0.10, "junk": 0.05}

VAGUE = (
    "nice pic",
    "my holiday",
    "so cute",
    "love this",
    "best moment ever",
    "wow",
    "what a view",
    "one of my favourites",
    "good times",
    "from last summer",
    "made me smile",
    "just beautiful",
)
JUNK = (
    "img_{n}.jpg",
    "dsc{n}.png",
    "click here for free shipping",
    "{n} likes",
    "buy now and save {p} %",
    "copyright all rights reserved",
    "image not available",
    "page {p} of {n}",
    "subscribe to our newsletter",
    "untitled {p}",
)

VALUES = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "place": PLACES,
    "sky": SKIES,
    "weather": WEATHERS,
}


def contradicts(claim: Claim, scene: Scene) -> bool:
    """Whether a claim is plainly false of a scene: a named thing that is not there, another number than said, another
    place, time of day, weather or style. A noun in the singular is contradicted only by the absence of such a thing,
    and relations are left out, so that what is called false is false under every reading."""
    for name in ("place", "sky", "style"):
        if getattr(claim, name) not in (None, getattr(scene, name)):
            return True
    # There are clouds in the rain and in falling snow, too.
    if claim.weather not in (None, scene.weather) and "cloudy" not in (claim.weather, scene.weather):
        return True
    for noun in claim.nouns:
        shown = sum(map(noun.fits, scene.things))
        if shown == 0 or (noun.number > 1 and shown != noun.number):
            return True
    return False


def wrong_attributes(claim: Claim, scene: Scene, rng: random.Random) -> Iterator[Claim]:
    """The claim with one word made false, in random order: a kind, colour, size, place, time of day or weather."""
    changes: list[tuple[int | None, str]] = [
        (k, name)
        for k, noun in enumerate(claim.nouns)
        for name in ("kind", "colour", "size")
        if getattr(noun, name) is not None
    ]
    changes += [(None, name) for name in ("place", "sky", "weather") if getattr(claim, name) is not None]
    for k, name in shuffled(changes, rng):
        for value in shuffled(VALUES[name], rng):
            if k is None:
                changed = replace(claim, **{name: value})
            else:
                noun = replace(claim.nouns[k], **{name: value})
                # A withheld combination must not be named in the training texts either.
                if HELD_OUT_COLOUR.get(noun.kind) == noun.colour or HELD_OUT_COUNT.get(noun.kind) == noun.number:
                    continue
                changed = replace(claim, nouns=(*claim.nouns[:k], noun, *claim.nouns[k + 1 :]))
            if contradicts(changed, scene):
                yield changed


def wrong_counts(claim: Claim, scene: Scene, rng: random.Random) -> Iterator[Claim]:
    """The claim with one number made false, in random order. One less is never "a": that would be true of two."""
    for k in shuffled(range(len(claim.nouns)), rng):
        noun = claim.nouns[k]
        for number in shuffled(range(2, len(NUMBERS)), rng):
            if abs(number - noun.number) > 2 or HELD_OUT_COUNT.get(noun.kind) == number:
                continue
            changed = replace(claim, nouns=(*claim.nouns[:k], replace(noun, number=number), *claim.nouns[k + 1 :]))
            if contradicts(changed, scene):
                yield changed


def web_caption(scene: Scene, other: Scene, *, rates: Mapping[str, float] = WEB_NOISE) -> tuple[str, str]:
    """A caption as found on the web, and the kind of noise in it.

    `other` is the picture whose caption may be given to this one by mistake. `rates` maps each kind of `WEB_NOISE`
    to its share and must sum to 1. A swapped caption that happens to be true of this scene becomes a wrong attribute.
    """
    unknown = set(rates) - set(WEB_NOISE)
    if unknown or abs(sum(rates.values()) - 1) > 1e-6 or min(rates.values()) < 0:
        raise ValueError(f"rates need shares of {', '.join(WEB_NOISE)} that sum to 1, got {dict(rates)}")
    rng = stream(scene, "web")
    draw, kind = rng.random(), "clean"
    for name in WEB_NOISE:
        if draw < rates.get(name, 0.0):
            kind = name
            break
        draw -= rates.get(name, 0.0)
    if kind == "vague":
        return pick(VAGUE, rng), kind
    if kind == "junk":
        return pick(JUNK, rng).format(n=int(1000 + rng.random() * 9000), p=int(2 + rng.random() * 98)), kind
    if kind == "swapped":
        claim = claim_of(other, 4, rng)
        if contradicts(claim, scene):
            return say(claim, rng), kind
        kind = "wrong_attribute"
    claim = claim_of(scene, 1 + int(rng.random() * 4), rng)
    if kind != "clean":
        claim = next((wrong_attributes if kind == "wrong_attribute" else wrong_counts)(claim, scene, rng))
    return say(claim, rng), kind
