"""Probes: two pictures that differ in one fact, each with a caption that is true of it alone.

As in Winoground (Thrush et al., 2022), a model passes a probe if it prefers each caption with its own picture. The
two swap probes use the same words in another order, so that a bag of words scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from minivlp.data.picturebook.claims import Claim, Noun, claim_of, pick, say, shuffled, stream
from minivlp.data.picturebook.sample import HELD_OUT_COLOUR, HELD_OUT_COUNT, relations, sample
from minivlp.data.picturebook.world import CANVAS, KINDS, Scene

SIDES = ("left of", "right of", "above", "below")
PROBES = ("attribute_swap", "order_swap", "replaced", "count")

_FIRST = 1_000_000_000  # beyond every index that a split is read at
_TRIES = 1_000


@dataclass(frozen=True)
class Probe:
    """Two scenes and two captions: `caption_a` is true of `scene_a` only, `caption_b` of `scene_b` only."""

    kind: str
    scene_a: Scene
    scene_b: Scene
    caption_a: str
    caption_b: str


def probe(index: int, kind: str, *, seed: int = 0) -> Probe:
    """Probe number `index` of one of the four `PROBES`, built from a normal-tier scene of the test split.

    Raises ValueError for an unknown kind.
    """
    if kind not in PROBES:
        raise ValueError(f"unknown probe {kind!r}: choose one of {', '.join(PROBES)}")
    first = _FIRST + index * _TRIES
    for base in (sample(i, split="test", tier="normal", seed=seed) for i in range(first, first + _TRIES)):
        base = replace(base, split=kind, index=index)
        made = _MAKERS[kind](base)
        if made is not None:
            scene_b, claim_a, claim_b = made
            # Two equal streams: both captions make the same choices among synonyms and sentence shapes.
            said_a, said_b = (say(claim, stream(base, "probe"), plain=True) for claim in (claim_a, claim_b))
            return Probe(kind, base, scene_b, said_a, said_b)
    raise RuntimeError(f"no scene for a {kind} probe among {_TRIES}: has the sampler changed?")


Made = tuple[Scene, Claim, Claim]


def _attribute_swap(base: Scene) -> Made | None:
    """A red cat and a blue ball; a blue cat and a red ball."""
    if len(base.things) != 2:
        return None
    one, two = base.things
    if one.kind == two.kind or one.colour == two.colour or _withheld(one.kind, two.colour, two.kind, one.colour):
        return None
    changed = replace(base, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))
    nouns = [Noun(1, thing.kind, thing.colour) for thing in base.things]
    said = _where(base)
    claim = _with_surroundings(Claim(tuple(nouns), said), base)
    swapped = (replace(nouns[0], colour=two.colour), replace(nouns[1], colour=one.colour))
    return changed, claim, replace(claim, nouns=swapped)


def _order_swap(base: Scene) -> Made | None:
    """A cat left of a ball; a ball left of a cat."""
    if len(base.things) != 2 or base.things[0].kind == base.things[1].kind:
        return None
    one, two = base.things
    changed = replace(base, things=(replace(one, x=two.x, y=two.y), replace(two, x=one.x, y=one.y)))
    if any(min(thing.box) < 0 or max(thing.box) > CANVAS for thing in changed.things):
        return None  # a big thing does not fit where a small one stood
    said = _where(base, always=True)
    # The same relation must hold the other way round, by the same margins, in the changed picture.
    if not said or (said[0][2], said[0][1], said[0][0]) not in relations(changed):
        return None
    coloured = stream(base, "detail").random() < 0.5
    nouns = tuple(Noun(1, thing.kind, thing.colour if coloured else None) for thing in base.things)
    claim = _with_surroundings(Claim(nouns, said), base)
    return changed, claim, replace(claim, nouns=nouns[::-1])


def _replaced(base: Scene) -> Made | None:
    """A red cat on the beach; a red dog on the beach."""
    rng = stream(base, "detail")
    claim = claim_of(base, 1 + int(rng.random() * 4), rng)
    shown = {thing.kind for thing in base.things}
    k = int(rng.random() * len(claim.nouns))
    noun = claim.nouns[k]
    if noun.colour is None or sum(thing.kind == noun.kind for thing in base.things) != noun.number:
        return None
    for kind in shuffled([kind for kind in KINDS if kind not in shown], rng):
        if not _withheld(kind, noun.colour) and HELD_OUT_COUNT.get(kind) != noun.number:
            things = tuple(replace(t, kind=kind) if t.kind == noun.kind else t for t in base.things)
            nouns = (*claim.nouns[:k], replace(noun, kind=kind), *claim.nouns[k + 1 :])
            return replace(base, things=things), claim, replace(claim, nouns=nouns)
    return None


def _count(base: Scene) -> Made | None:
    """Three fish; two fish. One of the three is taken away, the others stay where they are."""
    kinds = {thing.kind for thing in base.things}
    if len(base.things) != 3 or len(kinds) != 1 or HELD_OUT_COUNT.get(base.things[0].kind) in (2, 3):
        return None
    rng = stream(base, "detail")
    claim = claim_of(base, 1 + int(rng.random() * 4), rng)
    if len(claim.nouns) != 1:
        return None
    gone = int(rng.random() * 3)
    fewer = replace(base, things=tuple(thing for i, thing in enumerate(base.things) if i != gone))
    return fewer, claim, replace(claim, nouns=(replace(claim.nouns[0], number=2),))


_MAKERS: dict[str, Callable[[Scene], Made | None]] = {
    "attribute_swap": _attribute_swap,
    "order_swap": _order_swap,
    "replaced": _replaced,
    "count": _count,
}


def _withheld(*kinds_and_colours: str) -> bool:
    """Whether any of the (kind, colour, kind, colour, ...) given is a combination withheld from training."""
    pairs = zip(kinds_and_colours[::2], kinds_and_colours[1::2], strict=True)
    return any(HELD_OUT_COLOUR.get(kind) == colour for kind, colour in pairs)


def _where(scene: Scene, *, always: bool = False) -> tuple[tuple[int, str, int], ...]:
    """A relation from the first thing to the second that turns round when they change places, half of the time."""
    rng = stream(scene, "where")
    possible = [fact for fact in relations(scene) if fact[0] == 0 and fact[1] in SIDES]
    return (pick(possible, rng),) if possible and (always or rng.random() < 0.5) else ()


def _with_surroundings(claim: Claim, scene: Scene) -> Claim:
    """The claim with place, or place, time of day and weather, or neither: probes come in all lengths."""
    detail = int(stream(scene, "surroundings").random() * 3)
    if detail == 0:
        return claim
    sky, weather = (scene.sky, scene.weather) if detail == 2 else (None, None)
    return replace(claim, place=scene.place, sky=sky, weather=weather)
