"""Checks for the exercises of lesson 07 (`notebooks/07_blip.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks.core import Attempt, Slip, check, variants
from minivlp.models.blip import MEDBlock

# ---------------------------------------------------------------------------------------------------- 1 bootstrap

TEXTS = ("a red boat on a lake", "a dog in the snow", "two cats", "a blue house", "a sheep by a tree", "photo 0417",
         "best holiday ever", "a girl with a kite")  # fmt: skip
COLLECTIONS = 3
Pair = tuple[str, str]  # picture, text


@check
def bootstrap(attempt: Attempt) -> str:
    """Exercise 1: the data set that CapFilt makes (BLIP, 3.3)."""
    cases = [_collection(seed) for seed in range(COLLECTIONS)]
    got = torch.cat([_chosen(attempt, lists, right) for lists, right in cases])

    def kept(**options: str) -> Tensor:
        return torch.cat([_kept(lists, right, **options) for lists, right in cases])

    expected = kept()
    if not torch.equal(got, expected):
        attempt.compare(got, expected, variants(kept, _KEPT_SLIPS), detail=_wrongly_kept(got, expected, cases))
    return f"right for {COLLECTIONS} collections, {int(expected.sum())} of {len(expected)} pairs are kept"


def _collection(seed: int) -> tuple[tuple[list[Pair], ...], set[Pair]]:
    """Three lists of pairs, written by hand, of the web, and by the captioner about the web's pictures, one or two
    texts a picture each; and the pairs that match. No pair is there twice, many a text is."""
    generator = torch.Generator().manual_seed(seed)

    def pairs(picture: str, texts: Sequence[int]) -> list[Pair]:
        return [(picture, TEXTS[i]) for i in texts]

    human, web, written = [], [], []
    for page in range(10):
        order = torch.randperm(len(TEXTS), generator=generator).tolist()
        first, second = torch.randint(1, 3, (2,), generator=generator).tolist()
        if page < 3:
            human += pairs(f"page {page}", order[:2])
        else:
            web += pairs(f"page {page}", order[:first])
            written += pairs(f"page {page}", order[first : first + second])
    everything = human + web + written
    flags = (torch.rand(len(everything), generator=generator) < 0.6).tolist()
    return (human, web, written), {pair for pair, flag in zip(everything, flags, strict=True) if flag}


def _chosen(attempt: Attempt, lists: tuple[list[Pair], ...], right: set[Pair]) -> Tensor:
    """The answer for one collection as a row of 1 (kept) and 0, after all that can be said about its form."""
    everything = list(itertools.chain(*lists))

    def matches(picture: str, text: str) -> bool:
        if text in {picture for picture, _ in everything}:
            raise RuntimeError("`matches` takes the picture first, then the text")
        if (picture, text) not in everything:
            raise RuntimeError(f"`matches` was asked for {picture!r} with {text!r}, which stand in no pair together")
        return (picture, text) in right

    answer = attempt(*(list(pairs) for pairs in lists), matches)
    if isinstance(answer, Mapping):
        attempt.fail("the answer must be a list of pairs. A dict has room for one text of each picture only.")
    if isinstance(answer, (str, Tensor)) or not isinstance(answer, Collection):
        attempt.fail(f"the answer must be a list of pairs (picture, text), but yours is of type "
                     f"{type(answer).__name__}.")  # fmt: skip
    mine = []
    for item in answer:
        if isinstance(item, list) and (not item or isinstance(item[0], tuple)):
            attempt.fail("the answer must be one list of pairs, and yours holds lists of pairs. Put them together: +.")
        if not isinstance(item, (tuple, list)) or [type(part) for part in item] != [str, str]:
            attempt.fail(f"the answer must be a list of pairs (picture, text), and yours holds {item!r:.60}.")
        pair = tuple(item)
        if pair not in everything:
            turned = pair[::-1] in everything
            attempt.fail(f"{pair} is none of the pairs that you were given"
                         + (": picture and text have changed places." if turned else "."))  # fmt: skip
        if pair in mine:
            attempt.fail(f"{pair} is in your list twice. Each pair that stays is there once.")
        mine.append(pair)
    return torch.tensor([pair in mine for pair in everything]).float()


def _kept(
    lists: tuple[list[Pair], ...], right: set[Pair], *, hand: str = "all", raw: str = "nothing", left: str = "nothing",
    sign: str = "matches", unit: str = "text",
) -> Tensor:  # fmt: skip
    """Which pairs are kept, in the order of the three lists. The options make it wrong."""
    human, web, written = lists
    everything, judged = human + web + written, web + written
    fits = {pair: (pair in right) == (sign == "matches") for pair in everything}
    of = {picture: [pair for pair in judged if pair[0] == picture] for picture, _ in judged}

    def good(pair: Pair) -> bool:
        """Whether a pair from outside is kept, by the whole picture or by itself."""
        own = of[pair[0]]
        there = [other for other in own if other in web]
        match unit:
            case "picture, all":
                return all(fits[other] for other in own)
            case "picture, any":
                return any(fits[other] for other in own)
            case "web decides":
                return fits[pair] and all(fits[other] for other in there)
            case "everywhere":  # by the text alone
                return all(fits[other] for other in judged if other[1] == pair[1])
            case "stand-in":
                return fits[pair] and (pair in web or not any(fits[other] for other in there))
            case "instead":
                return fits[pair] and (pair in written or not any(fits[other] for other in own if other in written))
        return fits[pair]

    keep = {pair: hand == "all" or (hand == "filtered" and fits[pair]) for pair in human}
    for name, pairs in (("web", web), ("written", written)):
        keep |= {pair: left not in (name, "both") and (raw in (name, "both") or good(pair)) for pair in pairs}
    if unit in ("first", "last", "first, human too", "last, human too"):
        only = {}
        for pair in everything if "human" in unit else judged:
            if keep[pair] and ("last" in unit or pair[0] not in only):
                only[pair[0]] = pair
        keep = {pair: flag and (pair in only.values() or (pair in human and "human" not in unit))
                for pair, flag in keep.items()}  # fmt: skip
    return torch.tensor([keep[pair] for pair in everything]).float()


def _wrongly_kept(got: Tensor, expected: Tensor, cases: Sequence[tuple]) -> str:
    """The first pairs that are missing or too many, in words."""
    named = [(pair, name) for lists, _ in cases
             for name, pairs in zip(("human", "web", "written"), lists, strict=True) for pair in pairs]  # fmt: skip
    wrong = []
    for said, flag in (("Missing", 0), ("Too many", 1)):
        found = [which for which, mine, right in zip(named, got, expected, strict=True) if mine == flag != right]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            wrong.append(f"{said}: {found[0][0]} of `{found[0][1]}`{more}.")
    return " ".join(wrong)


_KEPT_SLIPS = [
    Slip("hand", "filtered", "the human texts are filtered, too. They are trusted: all of them stay."),
    Slip("hand", "none", "the human pairs are missing. D' holds all of them."),
    Slip("raw", "both", "nothing is filtered. Of `web` and of `written`, only the pairs that match stay."),
    Slip("raw", "web", "the web's texts are not filtered. Only those that match stay."),
    Slip("raw", "written", "the texts that the captioner has written are not filtered. It makes mistakes, too: only "
         "those that match stay."),
    Slip("left", "web", "the web's own texts are missing. The captioner's join them; they do not take their place."),
    Slip("left", "written", "the texts that the captioner has written are missing."),
    Slip("left", "both", "only the human pairs are there. What matches of `web` and `written` joins them."),
    Slip("sign", "inverted", "the filter is the wrong way round: a pair stays if `matches` says True."),
    Slip("unit", "picture, all", "a picture is dropped as soon as one of its texts fails. The filter judges *pairs*: "
         "another text of the same picture may be right, and that is what the captioner is for."),
    Slip("unit", "picture, any", "all texts of a picture stay as soon as one of them matches. The filter judges "
         "*pairs*: each text by itself."),
    Slip("unit", "web decides", "what was written about a picture is dropped if the web's text fails. Just there a new "
         "text is needed: judge each pair by itself."),
    Slip("unit", "everywhere", "a text that fails for one picture is dropped everywhere. It may be right for another "
         "picture: judge each *pair*."),
    Slip("unit", "stand-in", "a written text stays only where the web's fails. Both stay if both match: a picture may "
         "have several texts."),
    Slip("unit", "instead", "a web text is dropped where a written one matches. Both stay if both match: a picture "
         "may have several texts."),
    Slip("unit", "first", "only one text of each picture from the web is kept, the first that matches. A picture may "
         "have several: all that match stay."),
    Slip("unit", "last", "only one text of each picture from the web is kept, the last that matches. A picture may "
         "have several: all that match stay."),
    Slip("unit", "first, human too", "only one text of each picture is kept, the first, even of those written by hand. "
         "A picture may have several."),
    Slip("unit", "last, human too", "only one text of each picture is kept, the last, even of those written by hand. "
         "Did you use a dict with the pictures as keys? A picture may have several texts."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- 2 share_parts

STACKS = [3, 2]  # blocks of the decoder, and as many of the encoder
# What became of a parameter: it is still its own, or equals the other side's, or lies in the same memory, or is
# something else, or, from SHARED on, is the very parameter of the other side's block 0, 1, ...
OWN, COPY, MEMORY, ELSE, SHARED = range(5)


@check
def share_parts(attempt: Attempt) -> str:
    """Exercise 2: one set of weights for two stacks of blocks, but for self-attention (BLIP, 3.2)."""
    got, cases = [], []
    for seed, depth in enumerate(STACKS):
        generator = torch.Generator().manual_seed(seed)
        sides = [_blocks(depth, generator) for _ in range(2)]
        before = [[_parameters(block) for block in blocks] for blocks in sides]
        values = [[{name: p.detach().clone() for name, p in block.items()} for block in side] for side in before]
        memory = [[{name: p.data for name, p in block.items()} for block in side] for side in before]
        with torch.enable_grad():
            _returned(attempt, attempt(*sides), *sides)
        for side, blocks, said in ((0, sides[0], "decoder"), (1, sides[1], "encoder")):
            if len(blocks) != depth:
                attempt.fail(f"the {said} had {depth} blocks, and now it has {len(blocks)}. Change what the blocks "
                             "are made of, not how many there are.")  # fmt: skip
            for i, block in enumerate(blocks):
                now = _parameters(block) if block is not None else {}
                for name in before[side][i]:
                    if name not in now:
                        attempt.fail(f"`{name}` is gone from block {i} of the {said}.")
                    got.append(_fate(now[name], i, name, side, before, values, memory))
        cases.append((depth, list(before[0][0])))

    def states(**options: str) -> Tensor:
        return torch.cat([_fates(*case, **options) for case in cases])

    codes, expected = torch.tensor(got), states()
    if not torch.equal(codes, expected):
        # as rows of 0 and 1, so that no answer is a multiple of another
        known = ((message, _as_rows(wrong)) for message, wrong in variants(states, _SHARE_SLIPS))
        attempt.compare(_as_rows(codes), _as_rows(expected), known, detail=_first_fate(codes, expected, cases))
    return f"right for {len(STACKS)} decoders, {int((expected >= SHARED).sum())} parameters are shared"


def _blocks(depth: int, generator: torch.Generator) -> nn.ModuleList:
    """Small blocks, no two parameters of which are alike."""
    blocks = nn.ModuleList(MEDBlock(4, 2, context_width=6, mlp_ratio=2) for _ in range(depth))
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return blocks


def _parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    return dict(block.named_parameters(remove_duplicate=False))


def _returned(attempt: Attempt, answer: Any, decoder: nn.ModuleList, encoder: nn.ModuleList) -> None:
    """Fail unless the answer is the decoder's blocks."""
    blocks = list(answer) if isinstance(answer, (nn.ModuleList, list, tuple)) else [answer]
    if len(blocks) == len(decoder) and all(map(operator.is_, blocks, decoder)):
        return
    if len(blocks) == len(encoder) and all(map(operator.is_, blocks, encoder)):
        attempt.fail("you return the encoder's blocks. Change the decoder's and return them: return decoder.")
    if blocks and isinstance(blocks[0], nn.Module):
        attempt.fail("you return other blocks than those you were given. Change the decoder's own blocks, and return "
                     "them all: return decoder.")  # fmt: skip
    attempt.fail(f"the answer must be `decoder`, its blocks changed, but yours is of type {type(answer).__name__}.")


def _fate(now: Tensor, i: int, name: str, side: int, before: Sequence, values: Sequence, memory: Sequence) -> int:
    """What became of a parameter of block i. What was there before, by side, block and name: the parameters, their
    values, and where these lay."""
    other = 1 - side
    for j, block in enumerate(before[other]):
        if now is block[name]:
            return SHARED + j
    if now.data_ptr() == memory[other][i][name].data_ptr():
        return MEMORY
    if torch.equal(now, values[side][i][name]):
        return OWN
    return COPY if torch.equal(now, values[other][i][name]) else ELSE


def _as_rows(codes: Tensor) -> Tensor:
    return F.one_hot(codes, SHARED + max(STACKS)).float()


def _fates(
    depth: int, names: Sequence[str], *, self_: str = "own", cross: str = "shared", feed: str = "shared",
    norm2: str = "shared", how: str = "module", which: str = "same", way: str = "decoder",
) -> Tensor:  # fmt: skip
    """What became of all parameters, first the decoder's, then the encoder's. The options make it wrong."""
    attn = {"attn.q.", "attn.kv.", "attn.proj."}
    more = {"shared": attn | {"norm1."}, "attn": attn, "norm1": {"norm1."}, "output": {"attn.proj.", "norm1."},
            "proj": {"attn.proj."}}.get(self_, set())  # fmt: skip
    less = {"own": {"cross.attn.", "cross.norm."}, "norm own": {"cross.norm."}, "attn own": {"cross.attn."}}.get(
        cross, set()
    )
    both = ({"cross.attn.", "cross.norm.", "mlp.", "norm2."} | more) - less
    both -= ({"mlp."} if feed == "own" else set()) | ({"norm2."} if norm2 == "own" else set())
    if how == "nothing":
        both = set()

    def moved(i: int, name: str) -> int:
        shared = name.startswith(tuple(both)) and not (how == "weights" and name.endswith("bias"))
        if not shared or (which == "first alone" and i) or (which == "last alone" and i < depth - 1):
            return OWN
        j = {"first": 0, "last": depth - 1, "reversed": depth - 1 - i}.get(which, i)
        return {"copy": COPY, "memory": MEMORY}.get(how, SHARED + j)

    changed = [moved(i, name) for i in range(depth) for name in names]
    same = [OWN] * len(changed)
    return torch.tensor(same + changed if way == "encoder" else changed + same)


def _first_fate(codes: Tensor, expected: Tensor, cases: Sequence[tuple[int, list[str]]]) -> str:
    """The first parameter that is not what it should be, in words."""
    places = [(side, i, name) for depth, names in cases for side in ("decoder", "encoder")
              for i in range(depth) for name in names]  # fmt: skip
    first = int((codes != expected).nonzero()[0])
    (side, i, name), code = places[first], int(codes[first])
    other = "encoder" if side == "decoder" else "decoder"
    words = {OWN: "still its own", COPY: f"a copy of the {other}'s", ELSE: "neither of both",
             MEMORY: f"another parameter in the memory of the {other}'s"}  # fmt: skip
    state = words.get(code, f"that of block {code - SHARED} of the {other}")
    if side == "encoder":
        should = "be its own"
    else:
        should = "be its own" if expected[first] == OWN else f"be that of block {i} of the encoder"
    return f"`{name}` of block {i} of the {side} is {state}; it should {should}."


_SHARE_SLIPS = [
    Slip("how", "nothing", "nothing is shared: the decoder's blocks are as they were. Put the encoder's modules in "
         "their place: block.mlp = other.mlp."),
    Slip("how", "copy", "you have copied the values. They are equal now, but the next step of training would move "
         "them apart. Both must use the very same modules: block.mlp = other.mlp, without a copy."),
    Slip("how", "memory", "the parameters lie in the same memory, but they are two: each has a gradient of its own, "
         "and the optimizer moves both. Put the modules themselves in place, not their `.data`."),
    Slip("how", "weights", "only the weights are shared, not the biases. Take whole modules: block.mlp = other.mlp."),
    Slip("self_", "shared", "self-attention is shared, too, and its LayerNorm. A decoder that reads from left to right "
         "keeps its own."),
    Slip("self_", "attn", "self-attention, `attn`, is shared, too. The decoder keeps its own."),
    Slip("self_", "norm1", "`norm1` is shared. It is the LayerNorm of self-attention, and the decoder keeps both."),
    Slip("self_", "output", "the output layer of self-attention, `attn.proj`, and its LayerNorm, `norm1`, are shared. "
         "Self-attention is all of it, not only queries, keys and values."),
    Slip("self_", "proj", "the output layer of self-attention, `attn.proj`, is shared. Self-attention is all of it, "
         "not only queries, keys and values."),
    Slip("cross", "own", "cross-attention, `cross`, is forgotten: the decoder uses the encoder's."),
    Slip("cross", "norm own", "of cross-attention, its LayerNorm, `cross.norm`, is forgotten. Share all of `cross`."),
    Slip("cross", "attn own", "of cross-attention, only the LayerNorm is shared. Share all of `cross`."),
    Slip("feed", "own", "the feed-forward part, `mlp`, is forgotten: the decoder uses the encoder's."),
    Slip("norm2", "own", "`norm2` is forgotten. It is the LayerNorm of the feed-forward part, and is shared with it."),
    Slip("which", "first", "all blocks of the decoder share with the first of the encoder. Each shares with the one "
         "of its own place."),
    Slip("which", "last", "all blocks of the decoder share with the last of the encoder. Each shares with the one of "
         "its own place."),
    Slip("which", "reversed", "the blocks are paired in reverse order. Each shares with the one of its own place."),
    Slip("which", "first alone", "only the first block shares. All blocks do: does your loop end too early, by a "
         "`return` inside of it?"),
    Slip("which", "last alone", "only the last block shares. All blocks do."),
    Slip("way", "encoder", "the wrong way round: you change the encoder. It stays as it is (the momentum model is a "
         "copy of it): the *decoder* takes the encoder's parts."),
]  # fmt: skip

# ----------------------------------------------------------------------------------------------- 3 next_word_loss

WRITTEN = [(3, 6, 12, 0.1), (2, 5, 14, 0.0), (4, 7, 10, 0.3)]  # texts, tokens, words of the vocabulary, smoothing
PAD, SEP, DEC, FIRST_WORD = 0, 3, 6, 7


@check
def next_word_loss(attempt: Attempt) -> str:
    """Exercise 3: what a decoder is trained by (BLIP, 3.2; official code)."""
    cases, answers = [], []
    for seed, (B, L, V, smoothing) in enumerate(WRITTEN):
        generator = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(B, L, V, generator=generator)
        ids, mask = _texts(B, L, V, generator)
        mean = "Take one mean over all tokens that are asked for."
        hints = {
            (B, L): f"That is a loss for each token. {mean}",
            (B, L - 1): f"That is a loss for each token. {mean}",
            (B * (L - 1),): f"That is a loss for each token. {mean}",
            (int(mask[:, 1:].sum()),): f"That is a loss for each token. {mean}",
            (B,): f"That is a loss for each text. {mean}",
            (1,): "Return a single number, of no dimension.",
        }
        answers.append(attempt.tensor(attempt(scores, ids, mask, smoothing), (), symbols="()", shapes=hints))
        cases.append((scores, ids, mask, smoothing))

    def losses(**options: str) -> Tensor:
        return torch.stack([_next_word_loss(*case, **options) for case in cases])

    got, expected = torch.stack(answers), losses()
    wrong = int((~torch.isclose(got, expected, rtol=1e-4, atol=1e-5)).int().argmax())
    B, L, _, smoothing = WRITTEN[wrong]
    detail = (f"For {B} texts of at most {L} tokens and smoothing = {smoothing}: expected {expected[wrong]:.4f}, got "
              f"{got[wrong]:.4f}.")  # fmt: skip
    attempt.compare(got, expected, variants(losses, _LOSS_SLIPS), detail=detail)
    with torch.enable_grad():
        attempt.learnable(attempt(scores.clone().requires_grad_(), ids, mask, smoothing), "scores")
    return f"right for {len(WRITTEN)} batches, with and without smoothing"


def _texts(B: int, L: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L): [DEC], words, [SEP] and [PAD], the first text without padding, the others of several
    lengths."""
    lengths = torch.randint(3, L, (B, 1), generator=generator)
    lengths[0] = L
    places = torch.arange(L)
    ids = torch.randint(FIRST_WORD, V, (B, L), generator=generator)
    ids = torch.where(places == lengths - 1, SEP, ids).masked_fill(places >= lengths, PAD)
    ids[:, 0] = DEC
    return ids, places < lengths


def _next_word_loss(
    scores: Tensor, ids: Tensor, mask: Tensor, smoothing: float, *, shift: str = "next", asked: str = "tokens",
    smooth: str = "even", mean: str = "all", chance: str = "log softmax",
) -> Tensor:  # fmt: skip
    """The loss, (). The options make it wrong."""
    B, L, V = scores.shape
    move = {"none": 0, "back": -1, "twice": 2}.get(shift, 1)
    reads = torch.arange(L) if "roll" in shift else torch.arange(max(0, -move), L - max(0, move))  # who is asked
    tells = (reads + move) % L  # for which token
    right = ids[:, tells]  # (B, M)
    log = {
        "log softmax": lambda: scores.log_softmax(-1),
        "raw": lambda: scores,
        "twice": lambda: scores.softmax(-1).log_softmax(-1),
        "no log": lambda: scores.softmax(-1),
    }[chance]()
    log = log[:, reads]  # (B, M, V)
    own, every = -log.gather(2, right[..., None])[..., 0], -log.mean(-1)  # (B, M)
    s = 0.1 if smooth == "fixed" else smoothing
    loss = {
        "none": lambda: own,
        "others": lambda: (1 - s) * own + s * (V * every - own) / (V - 1),
        "added": lambda: own + s * every,
        "scaled": lambda: (1 - s) * own,
        "exchanged": lambda: s * own + (1 - s) * every,
    }.get(smooth, lambda: (1 - s) * own + s * every)()
    end = mask.sum(1, keepdim=True) - 1  # (B, 1)
    keep = {
        "all": torch.ones_like(right, dtype=torch.bool),
        "readers": mask[:, reads],
        "padding": ~mask[:, tells],
        "no end": mask[:, tells] & (tells != end),
        "no first word": mask[:, tells] & (tells != 1),
    }.get(asked, mask[:, tells])
    keep = (keep & mask[:, reads] if shift == "roll, if full" else keep).float()
    total, count = (loss * keep).sum(), keep.sum().clamp(min=1)
    if mean == "texts":
        return ((loss * keep).sum(1) / keep.sum(1).clamp(min=1)).mean()
    return total / {"sum": 1, "batch": B, "places": right.numel(), "length": B * L, "tokens": mask.sum(),
                    "minus": -count}.get(mean, count)  # fmt: skip


_LOSS_SLIPS = [
    Slip("shift", "none", "nothing is shifted: at each token you ask for the token itself, which the decoder has just "
         "read, [DEC] included. The scores at token t are about token t + 1: scores[:, :-1] against ids[:, 1:]."),
    Slip("shift", "back", "shifted the wrong way: you ask for the token *before*. The scores at token t are about "
         "token t + 1: scores[:, :-1] against ids[:, 1:]."),
    Slip("shift", "twice", "shifted by two. The scores at token t are about token t + 1."),
    Slip("shift", "roll", "the first token is asked for: `roll` brings [DEC] round to the last place. Nothing follows "
         "the last token: cut, do not roll."),
    Slip("shift", "roll, if full", "where a text has no padding, its first token is asked for: `roll` brings [DEC] "
         "round to the last place. Nothing follows the last token: cut, do not roll."),
    Slip("asked", "all", "padding is counted. Leave out the places where the token that is asked for is padding: "
         "mask[:, 1:]."),
    Slip("asked", "readers", "[SEP] is asked what follows it: padding. The mask belongs to the tokens that are asked "
         "*for*: mask[:, 1:], not mask[:, :-1]."),
    Slip("asked", "padding", "the mask is the wrong way round: only padding is learned. It is True at real tokens."),
    Slip("asked", "no end", "[SEP] is not learned. It is a token like the others, and a decoder that never learns it "
         "does not know when to stop."),
    Slip("asked", "no first word", "the first word is not learned. [DEC] is read, and the scores at its place are "
         "about the first word."),
    Slip("smooth", "none", "`smoothing` is not used: F.cross_entropy(..., label_smoothing=smoothing)."),
    Slip("smooth", "fixed", "smoothing is 0.1 whatever is asked for. Use the argument."),
    Slip("smooth", "others", "the share `smoothing` is spread over the V - 1 wrong words. Here, as in PyTorch, it is "
         "spread over all V, the right one among them."),
    Slip("smooth", "added", "smoothing is added, and the right word keeps all of its share. It gives some away: "
         "1 - smoothing is left."),
    Slip("smooth", "scaled", "the right word's share is made smaller, but nobody gets what it gives away. The share "
         "`smoothing` is spread evenly over all V words."),
    Slip("smooth", "exchanged", "the shares are exchanged: the right word has 1 - smoothing, and `smoothing` is "
         "spread."),
    Slip("mean", "texts", "you average each text first, and then the texts. All tokens of the batch count alike: a "
         "longer text counts more."),
    Slip("mean", "sum", "this is the sum. Divide by the number of tokens that are asked for."),
    Slip("mean", "batch", "you divide by the number of texts. Divide by the number of tokens that are asked for."),
    Slip("mean", "places", "you divide by the number of all places, padding included. The sum is right: divide by the "
         "number of tokens that are asked for, mask[:, 1:].sum()."),
    Slip("mean", "length", "you divide by B * L. The sum is right: divide by the number of tokens that are asked for, "
         "mask[:, 1:].sum()."),
    Slip("mean", "tokens", "you divide by the number of all tokens, [DEC] included, which nobody is asked for. Divide "
         "by mask[:, 1:].sum()."),
    Slip("mean", "minus", "the sign is wrong: the loss is *minus* the log of the chance."),
    Slip("chance", "raw", "the scores are not turned into log-chances: .log_softmax(dim=-1), or F.cross_entropy, which "
         "does it itself."),
    Slip("chance", "twice", "softmax is taken twice. F.cross_entropy wants the raw scores."),
    Slip("chance", "no log", "the logarithm is missing: .log_softmax(dim=-1), not .softmax."),
]  # fmt: skip

# ----------------------------------------------------------------------------------------------- 4 nucleus_chances

DRAWS = [(4, 8, 0.9), (5, 6, 0.5), (3, 10, 0.7), (2, 5, 0.1)]  # rows, words of the vocabulary, p


@check
def nucleus_chances(attempt: Attempt) -> str:
    """Exercise 4: what nucleus sampling draws from (Holtzman et al. 2020; BLIP, Table 2)."""
    cases, answers = [], []
    for seed, (B, V, p) in enumerate(DRAWS):
        scores = _clear(B, V, p, seed)
        hints = {
            (V,): "That is one row. Each row of the batch has a set of its own.",
            (B,): "Is that one token of each row? Return the chances of all V.",
            (B, 1): "Is that one token of each row? Return the chances of all V.",
            (V, B): "Transposed: a row for each text.",
            (B * V,): "Keep the rows apart.",
        }
        raw = attempt(scores, p)
        if isinstance(raw, Tensor) and raw.shape == (B, V) and raw.is_floating_point():
            _no_numbers(attempt, raw, scores, p)
        answers.append(attempt.tensor(raw, (B, V), symbols="(B, V)", shapes=hints))
        cases.append((scores, p))

    def chances(**options: str) -> Tensor:
        return torch.cat([_nucleus_chances(*case, **options).flatten() for case in cases])

    got = torch.cat([answer.flatten() for answer in answers])
    attempt.compare(got, chances(), variants(chances, _NUCLEUS_SLIPS), detail=_wrong_set(answers, cases))
    return f"right for {sum(B for B, _, _ in DRAWS)} rows, with p from {min(p for *_, p in DRAWS)} to 0.9"


def _clear(B: int, V: int, p: float, seed: int) -> Tensor:
    """scores (B, V), flat rows and steep ones, in which no sum of chances comes near p or 1 - p, so that rounding
    decides nothing. Of some rows one token is the whole set, of others it is not (if p is not very small)."""
    generator = torch.Generator().manual_seed(seed)
    many = torch.randn(4000, V, generator=generator) * (0.5 + 3 * torch.rand(4000, 1, generator=generator))
    chance = many.softmax(-1)
    sums = chance.sort(-1, descending=True).values.cumsum(-1)
    near = [
        (table - limit).abs().amin(-1) < 0.02 for table in (sums, chance, chance.cumsum(-1)) for limit in (p, 1 - p)
    ]
    clear = ~torch.stack(near).any(0)
    if p <= 1 / V:
        return many[clear][:B]
    alone = sums[:, 0] > p
    return torch.cat([many[clear & ~alone][: B - B // 2], many[clear & alone][: B // 2]])


def _no_numbers(attempt: Attempt, raw: Tensor, scores: Tensor, p: float) -> None:
    """Fail, with the probable reason, where the answer holds NaN or infinity."""
    if (raw == float("-inf")).any():
        attempt.fail("there is minus infinity in your answer. Are these scores, or logs of chances? Return the "
                     "chances: .softmax(dim=-1).")  # fmt: skip
    empty = raw.isnan().any(dim=1)
    alone = scores.softmax(-1).amax(-1) > p
    if empty.any() and not (empty & ~alone).any():
        row = int(empty.int().argmax())
        attempt.fail(
            f"row {row} is NaN (0/0): none of its tokens is left. The most likely one alone has a chance of "
            f"{scores[row].softmax(-1).max():.2f}, with p = {p}. The token with which the sum *reaches* p belongs to "
            "the set, so there is always at least one."
        )


def _nucleus_chances(
    scores: Tensor, p: float, *, chance: str = "softmax", keep: str = "reach", rows: str = "each",
    order: str = "undone", share: str = "all",
) -> Tensor:  # fmt: skip
    """The chances (B, V). The options make it wrong."""
    B, V = scores.shape
    chances = scores.softmax(0 if chance == "batch" else -1)
    ordered, places = chances.sort(-1, descending=keep != "least")
    sums = ordered.cumsum(-1)
    first = torch.arange(V) == 0
    limit = 1 - p if keep == "rest" else p
    inside = {
        "crossing": lambda: sums <= p,
        "crossing, one": lambda: (sums <= p) | first,
        "one more": lambda: ((sums - ordered).roll(1, -1) < p) | first,
        "threshold": lambda: ordered >= p,
        "threshold, one": lambda: (ordered >= p) | first,
        "relative": lambda: ordered >= p * ordered[:, :1],
        "count": lambda: (torch.arange(V) < round(p * V)).expand(B, V),
        "one": lambda: first.expand(B, V),
        "everything": lambda: torch.ones_like(sums, dtype=torch.bool),
    }.get(keep, lambda: sums - ordered < limit)()
    if rows == "first count":
        inside = inside[:1].expand(B, V)
    elif rows == "first order":
        places = places[:1].expand(B, V)
        inside = inside[:1].expand(B, V)
        ordered = chances.gather(1, places)
    elif rows == "mean":  # one set, by the mean chances of the batch
        mean, places = chances.mean(0).sort(descending=True)
        places, inside = places.expand(B, V), (mean.cumsum(-1) - mean < limit).expand(B, V)
        ordered = chances.gather(1, places)
    if keep == "unsorted":
        sums = chances.cumsum(-1)
        inside, ordered, places = sums - chances < p, chances, torch.arange(V).expand(B, V)
    kept = ordered * inside
    total = kept.sum(-1, keepdim=True)
    kept = {
        "not": lambda: kept,
        "softmax": lambda: kept.masked_fill(~inside, float("-inf")).softmax(-1).nan_to_num(),
        "softmax of all": lambda: kept.softmax(-1),
        "scores 0": lambda: (scores.gather(1, places) * inside).softmax(-1),
        "even": lambda: inside / inside.sum(-1, keepdim=True).clamp(min=1),
        "p": lambda: kept / p,
        "batch": lambda: kept / kept.sum(),
    }.get(share, lambda: kept / total.clamp(min=1e-9))()
    if order == "sorted":
        return kept
    if order == "gather":
        return kept.gather(1, places)
    return torch.zeros_like(scores).scatter(1, places, kept)


def _wrong_set(answers: Sequence[Tensor], cases: Sequence[tuple[Tensor, float]]) -> str:
    """The first row that is wrong, in words."""
    for got, (scores, p) in zip(answers, cases, strict=True):
        right = _nucleus_chances(scores, p)
        wrong = (~torch.isclose(got, right, rtol=1e-4, atol=1e-5)).any(1)
        if wrong.any():
            row = int(wrong.int().argmax())
            sets = [(table[row] != 0).nonzero()[:, 0].tolist() for table in (right, got)]
            said = f"the set is {sets[0]}" + ("" if sets[0] == sets[1] else f"; yours is {sets[1]}")
            chances = ", ".join(f"{c:.2f}" for c in scores[row].softmax(-1).tolist())
            return f"With p = {p}, row {row} has the chances {chances}: {said}. Yours sum to {got[row].sum():.3f}."
    return ""


_NUCLEUS_SLIPS = [
    Slip("keep", "crossing", "the token with which the sum reaches p is left out, and some rows have none left. It "
         "belongs to the set: without it, the sum is less than p."),
    Slip("keep", "crossing, one", "the token with which the sum reaches p is left out. It belongs to the set: without "
         "it, the sum is less than p."),
    Slip("keep", "one more", "one token too many: the set ends with the token that reaches p."),
    Slip("keep", "threshold", "you keep the tokens whose *own* chance is at least p, and some rows have none left. Add "
         "the chances up, from the most likely token on, until their sum reaches p."),
    Slip("keep", "threshold, one", "you keep the tokens whose *own* chance is at least p. Add the chances up, from the "
         "most likely token on, until their sum reaches p."),
    Slip("keep", "relative", "you compare each chance with p times the largest (min-p sampling). Add the chances up, "
         "from the most likely token on, until their sum reaches p."),
    Slip("keep", "count", "you keep the share p of the *tokens*. It is the share of the chance that counts."),
    Slip("keep", "one", "only the most likely token is left (greedy). Add the chances up until their sum reaches p."),
    Slip("keep", "everything", "no token is left out."),
    Slip("keep", "rest", "your set reaches 1 - p. It must reach p."),
    Slip("keep", "least", "you add up from the *least* likely token on: sort(descending=True)."),
    Slip("keep", "unsorted", "you add the chances up in the order of the vocabulary. Sort them first, the most likely "
         "one in front."),
    Slip("rows", "first order", "all rows have the set of the first one. Each row has its own."),
    Slip("rows", "first count", "all rows keep as many tokens as the first one does. Each row has its own set."),
    Slip("rows", "mean", "all rows have the same set. Each row has its own."),
    Slip("order", "sorted", "your chances are in the order of the sort. Each belongs to its own token: bring them back "
         "with scatter(1, order, ...)."),
    Slip("order", "gather", "the order is not undone but applied again: gather reads from the places, scatter writes "
         "to them."),
    Slip("share", "not", "the rows do not sum to 1: divide what is left by its sum."),
    Slip("share", "p", "you divide by p. What is left sums to p or more: divide by its own sum."),
    Slip("share", "batch", "you divide by the sum over the whole batch. Each row sums to 1: sum(dim=-1, "
         "keepdim=True)."),
    Slip("share", "softmax", "you take a softmax of *chances*, which makes them almost alike. Divide what is left by "
         "its sum, or take the softmax of the scores, with minus infinity outside the set."),
    Slip("share", "softmax of all", "you take a softmax of *chances*, and the tokens outside the set come back. Divide "
         "what is left by its sum."),
    Slip("share", "scores 0", "the scores outside the set are 0, which is an ordinary score: exp(0) = 1. Use minus "
         "infinity, or set chances to 0."),
    Slip("share", "even", "all tokens of the set have the same chance. They keep their proportions."),
    Slip("chance", "batch", "the softmax runs over the batch. It runs over the V tokens of each row: dim=-1."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------ 5 beam_step

BEAMS = [(2, 3, 7), (3, 2, 5), (1, 4, 4)]  # texts, open beginnings of each, words of the vocabulary
CLOSED = -1e9  # of a beginning that is none


@check
def beam_step(attempt: Attempt) -> str:
    """Exercise 5: one step of beam search (BLIP writes captions with 3 beams)."""
    cases, answers = [], []
    for seed, (B, k, V) in enumerate(BEAMS):
        generator = torch.Generator().manual_seed(seed)
        for first in (True, False):
            total = -3 * torch.rand(B, k, generator=generator)
            if first:
                total = torch.tensor([0.0] + [CLOSED] * (k - 1)).repeat(B, 1)
            # steep rows and flat ones: raw scores say little of how likely a token is
            scores = 2 * torch.randn(B, k, V, generator=generator) + 3 * torch.randn(B, k, 1, generator=generator)
            answers.append(_three(attempt, attempt(total, scores, k), B, k, V))
            cases.append((total, scores, k))

    def steps(**options: str) -> Tensor:
        return torch.cat([_flat(_beam_step(*case, **options)) for case in cases])

    got = torch.cat([_flat(answer) for answer in answers])
    attempt.compare(got, steps(), variants(steps, _BEAM_SLIPS), detail=_wrong_beam(answers, cases))
    texts = sum(B for B, _, _ in BEAMS)
    return f"right for {2 * texts} steps, the first of {texts} texts and a later one"


def _three(attempt: Attempt, answer: Any, B: int, k: int, V: int) -> list[Tensor]:
    """total, source and token (B, k), after all that can be said about their form."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        kind = f"{len(answer)} of them" if isinstance(answer, (tuple, list)) else f"of type {type(answer).__name__}"
        attempt.fail(f"the answer must be three tensors, total, source and token, but yours is {kind}.")
    all_ = "All k * V continuations of a text compete: flatten(1).topk(k, dim=1)."
    hints = {
        (B, k, V): f"These are all continuations. Return the k best. {all_}",
        (B, k, k): f"That is k for each beginning. {all_}",
        (B, k, 1): "Drop the last dimension.",
        (B, k * V): f"These are all continuations. Return the k best. {all_}",
        (B, 2 * k): "That is twice as many. (The lesson's search takes 2 k, since some may end; here k.)",
        (B, V): f"That is one for each token of the vocabulary. {all_}",
        (B,): "That is the best alone. Return the k best of each text.",
        (k,): "That is for one text. Each text of the batch has its own k best.",
        (B * k,): "Keep the texts apart: .view(B, k).",
        (k, B): "Transposed: a row for each text.",
    }
    three = []
    for name, part, dtype in zip(
        ("total", "source", "token"), answer, (torch.float32, *[torch.int64] * 2), strict=True
    ):
        if dtype == torch.int64 and isinstance(part, Tensor) and part.is_floating_point() and part.shape == (B, k):
            attempt.fail(f"`{name}` holds fractions. It is a number that counts, int64: // divides without a "
                         "remainder, % gives the remainder.")  # fmt: skip
        three.append(attempt.tensor(part, (B, k), symbols="(B, k)", what=f"`{name}`", dtype=dtype, shapes=hints))
    return three


def _flat(three: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.float().flatten() for part in three])


def _beam_step(
    total: Tensor, scores: Tensor, k: int, *, norm: str = "words", adds: str = "both", choose: str = "all",
    order: str = "best first", number: str = "right",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """total, source and token (B, k). The options make it wrong."""
    B, _, V = scores.shape
    log = {
        "words": lambda: scores.log_softmax(-1),
        "raw": lambda: scores,
        "softmax": lambda: scores.softmax(-1),
        "beginnings": lambda: scores.log_softmax(1),
        "all": lambda: scores.flatten(1).log_softmax(-1).view_as(scores),
    }[norm]()
    whole = total[:, :, None] + log  # (B, k, V)
    ranked = log if adds in ("new", "late") else whole
    worst = order == "worst first"
    if choose in ("own", "own, sorted"):
        best, token = ranked.max(-1)  # (B, k)
        source = torch.arange(k).expand(B, k)
        if choose == "own, sorted":
            best, place = best.sort(dim=1, descending=True)
            source, token = place, token.gather(1, place)
        where = source * V + token
    elif choose == "batch":
        where = ranked.flatten().topk(B * k).indices.view(B, k) % (k * V)
    elif choose == "first":
        where = ranked[:, 0].topk(min(k, V), dim=1).indices
    else:
        where = ranked.flatten(1).topk(k, dim=1, largest=choose != "lowest").indices
    if choose == "batch":  # their totals, wherever they come from
        top = ranked.flatten().topk(B * k).values.view(B, k)
    else:
        top = (log if adds in ("new", "old lost") else whole).flatten(1).gather(1, where)
    if worst:
        where, top = where.flip(1), top.flip(1)
    elif order == "by beginning":
        where, place = where.sort(dim=1)
        top = top.gather(1, place)
    source, token = {
        "swapped": lambda: (where % V, where // V),
        "k": lambda: (where // k, where % k),
        "batch": lambda: (where // V + k * torch.arange(B)[:, None], where % V),
        "no remainder": lambda: (where // V, where),
        "rank": lambda: (torch.arange(k).expand(B, k), where % V),
    }.get(number, lambda: (where // V, where % V))()
    return top, source, token


def _wrong_beam(answers: Sequence[Sequence[Tensor]], cases: Sequence[tuple[Tensor, Tensor, int]]) -> str:
    """The first place that is wrong, in words."""
    for got, (total, scores, k) in zip(answers, cases, strict=True):
        right = _beam_step(total, scores, k)
        same = [torch.isclose(a.float(), b.float(), rtol=1e-4, atol=1e-5) for a, b in zip(got, right, strict=True)]
        wrong = (~(same[0] & same[1] & same[2])).nonzero()
        if len(wrong):
            b, j = wrong[0].tolist()
            said = [f"total {t[b, j]:.3f}, source {s[b, j]}, token {w[b, j]}" for t, s, w in (right, got)]
            first = "the first step" if (total == CLOSED).any() else "a later step"
            return (f"With k = {k} and {scores.shape[2]} words, in {first}, place {j} of text {b} is {said[0]}. "
                    f"Yours is {said[1]}.")  # fmt: skip
    return ""


_BEAM_SLIPS = [
    Slip("norm", "raw", "the raw scores are added up. They say how likely a token is only compared with the others of "
         "its row: scores.log_softmax(dim=-1)."),
    Slip("norm", "softmax", "chances are added to log-chances. Chances multiply, so their *logs* add up: "
         "scores.log_softmax(dim=-1)."),
    Slip("norm", "beginnings", "log_softmax runs over the beginnings. It runs over the V tokens: dim=-1."),
    Slip("norm", "all", "log_softmax runs over all k * V continuations. The scores are normalised for each beginning: "
         "its V chances sum to 1."),
    Slip("adds", "new", "`total` is not added: a likely token after an unlikely beginning would win."),
    Slip("adds", "late", "you choose by the new token alone and add `total` afterwards. Add it first, then choose."),
    Slip("adds", "old lost", "the choice is right, but the new total lacks the old one. The next step needs the "
         "log-probability of the whole beginning."),
    Slip("choose", "own", "each beginning goes on with its own best token. All k * V continuations of a text compete: "
         "a good beginning may have several of the k best, and a bad one none."),
    Slip("choose", "own, sorted", "each beginning goes on with its own best token, sorted. All k * V continuations of "
         "a text compete: a good beginning may have several of the k best, and a bad one none."),
    Slip("choose", "batch", "the continuations of all texts of the batch compete with each other. Each text has its "
         "own k best: flatten(1), not flatten()."),
    Slip("choose", "first", "only the first beginning goes on. All k do; in the first step their totals see to it."),
    Slip("choose", "lowest", "you take the k *least* likely ones."),
    Slip("order", "worst first", "your k are sorted the wrong way: the best comes first."),
    Slip("order", "by beginning", "your k are sorted by their places. The best comes first."),
    Slip("number", "swapped", "source and token are exchanged. Each beginning has V entries in the list: where // V is "
         "the beginning, where % V the token."),
    Slip("number", "k", "you divide by k. Each beginning has V entries in the list: where // V is the beginning, "
         "where % V the token."),
    Slip("number", "batch", "`source` counts through the whole batch. Count the beginnings of each text from 0."),
    Slip("number", "no remainder", "`token` is the place in the list of all k * V. Its number in the vocabulary is the "
         "remainder: where % V."),
    Slip("number", "rank", "`source` is the rank, 0 to k - 1. It says which old beginning each one goes on from: "
         "where // V."),
]  # fmt: skip
