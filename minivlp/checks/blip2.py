"""Checks for the exercises of lesson 08 (`notebooks/08_blip2.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from minivlp.checks.core import Attempt, CheckFailed, Slip, check, variants
from minivlp.layers import MLP, Attention
from minivlp.losses import IGNORE

# --------------------------------------------------------------------------------------------------- 1 itc_logits

COMPARED = [(3, 4, 5, 6, 0.07), (4, 2, 3, 8, 0.5), (2, 6, 4, 5, 1.5)]  # pictures, queries, texts, numbers, temperature


@check
def itc_logits(attempt: Attempt) -> str:
    """Exercise 1: how alike a picture of many vectors and a text are (BLIP-2, 3.2)."""
    cases, answers = [], []
    for seed, (B, Q, N, E, temp) in enumerate(COMPARED):
        generator = torch.Generator().manual_seed(seed)
        sizes = 0.5 + 2 * torch.rand(B, Q, 1, generator=generator), 0.5 + 2 * torch.rand(N, 1, generator=generator)
        case = (sizes[0] * (torch.randn(B, Q, E, generator=generator) + 0.3),
                sizes[1] * (torch.randn(N, E, generator=generator) + 0.3), torch.tensor(temp))  # fmt: skip
        each = "That is a number for each query. Of the queries of a picture, the best counts: the maximum over Q."
        hints = {
            (N, B): "Transposed: a row for each picture, a column for each text.",
            (B, Q, N): each,
            (B, N, Q): each,
            (Q, B, N): each,
            (B, Q): "The maximum goes over the texts. Take it over the queries of a picture.",
            (Q, N): "The maximum goes over the pictures. Take it over the queries of each picture.",
            (B, N, 1): "Drop the dimension that the maximum leaves.",
            (B, 1, N): "Drop the dimension that the maximum leaves.",
            (B,): "Every picture is compared with every text.",
        }
        answers.append(attempt.tensor(attempt(*case), (B, N), symbols="(B, N)", shapes=hints))
        cases.append(case)

    def logits(**options: str) -> Tensor:
        return torch.cat([_itc_logits(*case, **options).flatten() for case in cases])

    attempt.compare(torch.cat([a.flatten() for a in answers]), logits(), variants(logits, _ITC_SLIPS))
    with torch.enable_grad():
        queries, texts, temp = cases[0]
        attempt.learnable(attempt(queries, texts, temp.clone().requires_grad_()), "temp")
        attempt.learnable(attempt(queries.clone().requires_grad_(), texts, temp), "query_vectors")
    return f"right for {len(COMPARED)} batches, {sum(len(a.flatten()) for a in answers)} pairs of picture and text"


def _itc_logits(
    queries: Tensor, texts: Tensor, temp: Tensor, *, pool: str = "max", length: str = "one", scale: str = "divide"
) -> Tensor:
    """The logits (B, N). The options make it wrong."""
    q = queries if length in ("none", "texts") else F.normalize(queries, dim=1 if length == "over queries" else -1)
    t = texts if length in ("none", "queries") else F.normalize(texts, dim=0 if length == "over texts" else -1)
    if pool in ("vector", "elements"):  # one vector for each picture first
        one = q.mean(1) if pool == "vector" else q.amax(1)
        cosine = F.normalize(one, dim=-1) @ t.T
    else:
        every = torch.einsum("bqe,ne->bqn", q, t)
        size = every.abs().argmax(1, keepdim=True)
        cosine = {
            "mean": lambda: every.mean(1),
            "sum": lambda: every.sum(1),
            "min": lambda: every.amin(1),
            "first": lambda: every[:, 0],
            "last": lambda: every[:, -1],
            "size": lambda: every.gather(1, size)[:, 0],
            "soft": lambda: (every.softmax(1) * every).sum(1),
        }.get(pool, lambda: every.amax(1))()
    return {"times": lambda: cosine * temp, "none": lambda: cosine, "exp": lambda: cosine * temp.exp(),
            "fixed": lambda: cosine / 0.07}.get(scale, lambda: cosine / temp)()  # fmt: skip


_ITC_SLIPS = [
    Slip("pool", "mean", "you take the mean over the queries. The best query counts: the maximum. With the mean, every "
         "query would have to be like every text."),
    Slip("pool", "sum", "you add up the queries. The best one counts: the maximum."),
    Slip("pool", "min", "the *worst* query counts. Take the maximum."),
    Slip("pool", "first", "only the first query is asked. All are compared with the text, and the best counts: the "
         "maximum over Q."),
    Slip("pool", "last", "only the last query is asked. All are compared with the text, and the best counts: the "
         "maximum over Q."),
    Slip("pool", "size", "you take the largest *size*, so that a cosine of -0.9 beats one of 0.8. The maximum of the "
         "cosines themselves counts."),
    Slip("pool", "soft", "you weight the queries by a softmax. Here the best alone counts: the maximum."),
    Slip("pool", "vector", "you make one vector of each picture, the mean of its queries, and compare that. First "
         "compare every query, then take the maximum of the cosines."),
    Slip("pool", "elements", "the maximum is taken of the *vectors*, number by number, which mixes the queries. First "
         "compare every query, then take the maximum of the cosines."),
    Slip("length", "none", "the vectors are not normalised, so these are no cosines, and a long vector wins by its "
         "length: F.normalize(..., dim=-1), both."),
    Slip("length", "queries", "the texts' vectors are not normalised: F.normalize(text_vectors, dim=-1)."),
    Slip("length", "texts", "the queries' vectors are not normalised: F.normalize(query_vectors, dim=-1). The longest "
         "query wins, not the most alike."),
    Slip("length", "over queries", "the queries' vectors are normalised over the wrong dimension. F.normalize takes "
         "dim=1 by default, and that is Q: dim=-1."),
    Slip("length", "over texts", "the texts' vectors are normalised over the wrong dimension: dim=-1, each vector by "
         "its own length."),
    Slip("scale", "times", "you multiply by the temperature. Divide: a small one makes differences large."),
    Slip("scale", "none", "`temp` is not used. Divide by it."),
    Slip("scale", "exp", "you multiply by exp(temp). CLIP keeps the logarithm of a factor; here it is a temperature: "
         "divide by it."),
    Slip("scale", "fixed", "you divide by 0.07 whatever is given. The temperature is learned: divide by `temp`."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------- 2 who_may_look

KINDS = ("ITC", "ITM", "ITG")
LOOKS = [([5, 3], 3), ([2, 4, 1], 2), ([3], 1)]  # real tokens of each text, queries


@check
def who_may_look(attempt: Attempt) -> str:
    """Exercise 2: three losses, three masks of one and the same self-attention (BLIP-2, Fig. 2)."""
    cases, answers = [], []
    for lengths, Q in LOOKS:
        L = max(lengths)
        there = torch.arange(L) < torch.tensor(lengths)[:, None]
        B, T = len(lengths), Q + L
        for kind in KINDS:
            hints = {
                (T, T): "Each text of the batch has a mask of its own, because each has its own padding.",
                (B, 1, T, T): "Without the heads' dimension: (B, T, T).",
                (B, 1, 1, T): "Spell it out: a row for each of the T askers, (B, T, T).",
                (B, 1, T): "Spell it out: a row for each of the T askers, (B, T, T).",
                (B, T): "A row for each of the T askers, a column for each of the T that are looked at.",
                (B, L, L): "The queries are missing. T = Q + L, queries first.",
                (B, L, T): "The queries' rows are missing: they look, too. T = Q + L, queries first.",
            }
            answer = attempt.tensor(attempt(kind, there, Q), (B, T, T), symbols="(B, T, T)", dtype=torch.bool,
                                    what=f"the mask of {kind}", shapes=hints)  # fmt: skip
            answers.append(answer)
            cases.append((kind, there, Q))

    def masks(**options: str) -> Tensor:
        return torch.cat([_may_look(*case, **options).flatten() for case in cases]).float()

    got = torch.cat([a.flatten() for a in answers]).float()
    attempt.compare(got, masks(), variants(masks, _LOOK_SLIPS), detail=_first_look(answers, cases))
    return f"right for {len(answers)} masks, of {sum(len(lengths) for lengths, _ in LOOKS)} texts"


def _may_look(
    kind: str, there: Tensor, Q: int, *, itc: str = "apart", itm: str = "all", itg: str = "causal",
    padding: str = "keys", way: str = "rows",
) -> Tensor:  # fmt: skip
    """The mask (B, T, T). The options make it wrong."""
    B, L = there.shape
    ask, key = torch.arange(Q + L)[:, None], torch.arange(Q + L)[None]
    query, word = ask < Q, ask >= Q  # who asks, (T, 1)
    seen = key < Q  # whether a query is looked at, (1, T)
    before = key <= ask
    apart = query == seen
    plan = {
        "apart": lambda: apart,
        "all": lambda: torch.ones(Q + L, Q + L, dtype=torch.bool),
        "causal words": lambda: apart & (query | before),
        "queries read": lambda: apart | query,
        "words look": lambda: apart | word,
        "words alone": lambda: word & ~seen,
        "queries alone": lambda: query & seen,
        "causal": lambda: (apart | word) & (query | before),
        "leak": lambda: query | before,  # queries see all words
        "both ways": lambda: apart | word,
        "all causal": lambda: before,
        "not itself": lambda: (apart | word) & (query | seen | (key < ask)),
        "backwards": lambda: (apart | word) & (query | seen | (key >= ask)),
    }[{"ITC": itc, "ITM": itm, "ITG": itg}[kind]]()
    real = torch.cat([torch.ones(B, Q, dtype=torch.bool), there], dim=1)
    if padding == "words first":
        real = torch.cat([there, torch.ones(B, Q, dtype=torch.bool)], dim=1)
    keys, askers = real[:, None], real[:, :, None]
    there_are = {
        "none": lambda: torch.ones_like(keys),
        "rows": lambda: askers,
        "both": lambda: keys & askers,
        "inverted": lambda: torch.cat([keys[..., :Q], ~keys[..., Q:]], dim=2),
        "first": lambda: keys[:1],
    }.get(padding, lambda: keys)()
    mask = (plan & there_are).expand(B, Q + L, Q + L)
    return mask.mT if way == "turned" else ~mask if way == "blocked" else mask


def _first_look(answers: Sequence[Tensor], cases: Sequence[tuple[str, Tensor, int]]) -> str:
    """The first look that is wrong, in words."""
    for got, (kind, there, Q) in zip(answers, cases, strict=True):
        wrong = got != _may_look(kind, there, Q)
        if wrong.any():
            b, ask, key = (int(i) for i in wrong.nonzero()[0])
            length = int(there[b].sum())

            def name(i: int, Q: int = Q, length: int = length) -> str:
                return f"query {i}" if i < Q else f"word {i - Q}" if i - Q < length else f"the padding at {i - Q}"

            may, should = ("may", "must not") if got[b, ask, key] else ("may not", "must")
            return (f"{kind}, text {b} with {length} words and {there.shape[1] - length} of padding, after {Q} "
                    f"queries: {name(ask)} {may} look at {name(key)}, and it {should}.")  # fmt: skip
    return ""


_LOOK_SLIPS = [
    Slip("itg", "leak", "ITG leaks: the queries see the words that are to be written, and every word sees the queries. "
         "So the answer is read off, not seen. In ITG queries look at queries alone."),
    Slip("itg", "both ways", "ITG is not causal: a word sees those that come after it, and that is what it should "
         "predict. torch.tril for words and words."),
    Slip("itg", "all", "ITG's mask lets everybody see everybody, which is ITM's. Queries must not see words, and words "
         "no later words."),
    Slip("itg", "all causal", "in ITG you made everything causal, the queries, too. They have no order: each query "
         "sees all queries."),
    Slip("itg", "not itself", "in ITG a word does not see itself. It may: it predicts the *next* one."),
    Slip("itg", "backwards", "ITG is causal the wrong way round: a word sees those that come after it. torch.tril, not "
         "torch.triu."),
    Slip("itg", "causal words", "in ITG the words do not see the queries, so they are written about nothing. Each word "
         "sees all queries."),
    Slip("itg", "apart", "ITG's mask is ITC's. A word sees all queries, and words up to itself."),
    Slip("itm", "queries read", "in ITM the words do not see the queries. There all see all."),
    Slip("itm", "words look", "in ITM the queries do not see the words, and it is the queries that are asked whether "
         "both match. There all see all."),
    Slip("itm", "causal", "ITM's mask is ITG's. In ITM all see all, both ways."),
    Slip("itm", "leak", "ITM is causal for words. There all see all, both ways."),
    Slip("itm", "apart", "ITM's mask is ITC's: queries and words do not see each other. In ITM all see all."),
    Slip("itc", "all", "ITC lets queries and words see each other. Then picture and text are no longer two that could "
         "be compared: in ITC queries see queries, and words words."),
    Slip("itc", "queries read", "in ITC the queries see the words. They see queries alone."),
    Slip("itc", "words look", "in ITC the words see the queries. They see words alone."),
    Slip("itc", "causal words", "in ITC the words are causal. There the text is read both ways: [CLS] comes first and "
         "must see all of it."),
    Slip("itc", "words alone", "in ITC the queries see nothing. They see queries."),
    Slip("itc", "queries alone", "in ITC the words see nothing. They see words."),
    Slip("padding", "none", "padding is forgotten: nobody may look at it, in any of the three. Set its *columns* to "
         "False."),
    Slip("padding", "rows", "you hide the *rows* of padding, who asks. Its columns must be False, so that nobody looks "
         "at it: text_mask[:, None, :]."),
    Slip("padding", "both", "the rows of padding are False, too. A row without any True makes softmax divide 0 by 0: "
         "hide columns alone."),
    Slip("padding", "inverted", "`text_mask` is used the wrong way round. It is True at real tokens."),
    Slip("padding", "first", "all texts are masked by the padding of the first one. Each has its own."),
    Slip("padding", "words first", "padding is masked at the wrong places: the words come after the queries, so "
         "`text_mask` starts at column Q."),
    Slip("way", "turned", "transposed: in row i stands what token i may look at."),
    Slip("way", "blocked", "the wrong way round: True means \"may look at\"."),
]  # fmt: skip

# --------------------------------------------------------------------------------------------------- 3 labels_for

SAID = [(4, 3, [9, 6, 4, 8], [2, 0, 1, 3]), (3, 1, [5, 7, 7], [0, 3, 4]), (2, 4, [6, 4], [3, 0])]
# texts, prefix P, tokens of each text, words of its prompt
PAD, SEP, DEC, FIRST_WORD = 0, 3, 6, 7


@check
def labels_for(attempt: Attempt) -> str:
    """Exercise 3: what a decoder-only mouth is asked for (BLIP-2, 3.3, Fig. 3)."""
    cases, answers = [], []
    for seed, (B, P, lengths, prompts) in enumerate(SAID):
        L = max(lengths)
        ids, mask = _said(lengths, L, torch.Generator().manual_seed(seed))
        hints = {
            (B, L): f"The prefix has places, too: {P} of them, and they come first.",
            (B, P + L - 1): "One place is missing. The last token has a place, too, but nothing follows it: IGNORE.",
            (B, L - 1): f"The prefix has {P} places, which come first, and the last token has one.",
            (P + L, B): "Transposed: a row for each text.",
        }
        answer = attempt(ids, mask, P, torch.tensor(prompts))
        if isinstance(answer, Tensor) and answer.dtype == torch.float32 and answer.shape == (B, P + L):
            attempt.fail("labels are numbers of tokens, and must be int64 like `ids`: torch.full_like(ids, ...) keeps "
                         "the dtype.")  # fmt: skip
        answers.append(attempt.tensor(answer, (B, P + L), symbols="(B, P+L)", dtype=torch.int64, shapes=hints))
        cases.append((ids, mask, P, prompts))

    def labels(**options: str) -> Tensor:
        return torch.cat([_labels(*case, **options).flatten() for case in cases]).float()

    expected = labels()
    attempt.compare(torch.cat([a.flatten() for a in answers]).float(), expected, variants(labels, _LABEL_SLIPS),
                    detail=_first_row(answers, cases))  # fmt: skip
    return f"right for {sum(B for B, *_ in SAID)} texts, {int((expected != IGNORE).sum())} tokens are asked for"


def _said(lengths: Sequence[int], L: int, generator: torch.Generator) -> tuple[LongTensor, Tensor]:
    """ids and mask (B, L): [DEC], words, no two of a text alike, [SEP] and [PAD]."""
    rows = []
    for length in lengths:
        words = (torch.randperm(30, generator=generator)[: length - 2] + FIRST_WORD).tolist()
        rows.append([DEC, *words, SEP] + [PAD] * (L - length))
    return torch.tensor(rows), torch.arange(L) < torch.tensor(lengths)[:, None]


def _labels(
    ids: LongTensor, mask: Tensor, P: int, prompts: Sequence[int], *, shift: str = "next", prefix: str = "ignored",
    prompt: str = "ignored", padding: str = "ignored", end: str = "asked", ignore: str = "-100",
) -> LongTensor:  # fmt: skip
    """The labels (B, P+L). The options make it wrong."""
    B, L = ids.shape
    nothing = {"0": 0, "-1": -1}.get(ignore, IGNORE)
    at = torch.arange(L) + {"none": 0, "back": -1, "twice": 2}.get(shift, 1)  # for which token each is asked
    there = (at >= 0) & (at < L)
    if shift == "roll":
        at, there = at % L, torch.ones(L, dtype=torch.bool)
    at = at.clamp(0, L - 1)
    asked = there.expand(B, L).clone()
    told, length = ids[:, at], mask.sum(1, keepdim=True)
    p = torch.tensor(prompts)[:, None]
    p = {"first": p[:1].expand(B, 1), "longest": p.amax().expand(B, 1), "one less": (p - 1).clamp(min=0)}.get(prompt, p)
    place = torch.arange(L)[None]
    if prompt == "readers":
        asked &= (place > p) | (place == 0)  # [DEC] is not part of the prompt
    elif prompt == "readers, all":
        asked &= place > p
    elif prompt == "only":
        asked &= at <= p
    elif prompt != "learned":
        asked &= (at > p) | ((at == 0) & (shift != "none"))  # [DEC] is asked for where the shift is wrong
    if padding == "readers":
        asked &= mask
    elif padding != "learned":
        asked &= mask[:, at]
    if end == "ignored":
        asked &= at != length - 1
    text = torch.where(asked, told, nothing)
    blank = torch.full((B, P), 0 if prefix == "zero" else nothing)
    if prefix == "asked":
        blank[:, -1] = ids[:, 0]
    elif prefix == "first word":  # the text's labels stand one place too early
        return torch.cat([blank[:, 1:], text, torch.full((B, 1), nothing)], dim=1)
    return torch.cat([text, blank] if prefix == "last" else [blank, text], dim=1)


def _first_row(answers: Sequence[Tensor], cases: Sequence[tuple[LongTensor, Tensor, int, Sequence[int]]]) -> str:
    """The first row that is wrong."""
    for got, (ids, mask, P, prompts) in zip(answers, cases, strict=True):
        right = _labels(ids, mask, P, prompts)
        wrong = (got != right).any(1)
        if wrong.any():
            b = int(wrong.int().argmax())
            return (f"prefix = {P}, text {ids[b].tolist()} with {int(mask[b].sum())} tokens, the first {DEC} for "
                    f"[DEC], and {prompts[b]} words of a prompt: expected {right[b].tolist()}, got "
                    f"{got[b].tolist()}.")  # fmt: skip
    return ""


_LABEL_SLIPS = [
    Slip("shift", "none", "nothing is shifted: each place is asked for the token that stands in it, which it has just "
         "read. (Some libraries shift inside of their loss; here you do it.) At place t the label is token t + 1."),
    Slip("shift", "back", "shifted the wrong way: each place is asked for the token *before* it. At place t the label "
         "is token t + 1."),
    Slip("shift", "twice", "shifted by two. At place t the label is token t + 1."),
    Slip("shift", "roll", "`roll` brings [DEC] round to the last place of a text without padding. Nothing follows the "
         "last token: IGNORE."),
    Slip("prefix", "asked", "the last place of the prefix is asked for [DEC]. No place of the prefix is asked for "
         "anything: [DEC] is given, not written."),
    Slip("prefix", "first word", "the labels stand one place too early: the prefix is asked for the first word. The "
         "word after [DEC] is predicted from the place of [DEC], which is place P."),
    Slip("prefix", "last", "the prefix's places stand behind the text. The mouth reads the prefix first."),
    Slip("prefix", "zero", "the prefix's places have the label 0, and that is [PAD], a token like others. What is not "
         "asked for has IGNORE, -100."),
    Slip("prompt", "learned", "the words of the prompt are asked for. They are given; only the answer is learned: "
         "IGNORE where the *label* is a word of the prompt."),
    Slip("prompt", "readers", "you leave out the places where a word of the prompt is *read*, one too late: its first "
         "word is asked for, and the first of the answer is not. IGNORE belongs where the *label* is a word of the "
         "prompt."),
    Slip("prompt", "readers, all", "the first word of each answer is not learned. It is predicted from the prompt's "
         "last word, or from [DEC]. IGNORE belongs where the *label* is a word of the prompt, not where the word that "
         "is read is one."),
    Slip("prompt", "one less", "the last word of each prompt is asked for. `prompt_lengths` does not count [DEC]: the "
         "prompt's words stand in ids[:, 1 : 1 + length]."),
    Slip("prompt", "first", "all prompts are as long as the first one's. Each text has its own length."),
    Slip("prompt", "longest", "all prompts are as long as the longest one. Each text has its own length."),
    Slip("prompt", "only", "only the prompt is learned. It is the other way round: the answer is."),
    Slip("padding", "learned", "padding is asked for. Where the label would be padding, it is IGNORE."),
    Slip("padding", "readers", "[SEP] is asked what follows it: padding. Where the *label* would be padding, it is "
         "IGNORE: mask[:, 1:], not mask[:, :-1]."),
    Slip("end", "ignored", "[SEP] is not learned. It is a token like the others, and a mouth that never learns it does "
         "not know when to stop."),
    Slip("ignore", "0", "what is not asked for has the label 0, and that is [PAD], a token like others. PyTorch leaves "
         "out the label -100."),
    Slip("ignore", "-1", "what is not asked for has the label -1. PyTorch leaves out the label -100."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ 4 qformer_layer

LAYERS = [(2, 3, 4, True, "ITG"), (3, 2, 3, True, "ITM"), (2, 4, 3, False, "ITG")]  # B, Q, L, cross-attention, mask
WIDTH, IMAGE_WIDTH, STATES = 8, 6, 5


class LayerParts(nn.Module):
    """What a layer of the Q-Former is made of. `attn`, `cross` and the MLPs give their answers alone, without the sum
    and the LayerNorm that follow; `cross` may be None."""

    def __init__(self, cross: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.attn = _Answer(Attention(WIDTH, 2), "attn")
        self.cross = _Answer(Attention(WIDTH, 2, context_width=IMAGE_WIDTH), "cross") if cross else None
        self.query_mlp, self.mlp = MLP(WIDTH, ratio=2), MLP(WIDTH, ratio=2)
        self.norm1, self.cross_norm, self.query_norm, self.norm2 = (nn.LayerNorm(WIDTH) for _ in range(4))
        for parameter in self.parameters():
            parameter.data = 0.6 * torch.randn(parameter.shape, generator=generator)
        self.requires_grad_(False)


class _Answer(nn.Module):
    """An attention that returns its answer alone, and says what is wrong with its arguments."""

    def __init__(self, attention: Attention, name: str) -> None:
        super().__init__()
        self.attention, self.name = attention, name

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        B, T, D = x.shape
        if D != WIDTH:
            raise RuntimeError(f"`{self.name}` was asked by vectors of {D} numbers, not of {WIDTH}: is it x first?")
        if self.name == "cross":
            return self.attention(x, other)[0]
        if other.dtype != torch.bool or other.shape != (B, T, T):
            raise RuntimeError(f"`attn` was given {T} tokens for {B} pairs, and a mask of shape {tuple(other.shape)}")
        return self.attention(x, mask=other[:, None])[0]


@check
def qformer_layer(attempt: Attempt) -> str:
    """Exercise 4: one layer of the Q-Former (BLIP-2, 3.1, Fig. 2)."""
    cases, answers = [], []
    for seed, (B, Q, L, cross, kind) in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        queries, words = (torch.randn(B, n, WIDTH, generator=generator) for n in (Q, L))
        image = torch.randn(B, STATES, IMAGE_WIDTH, generator=generator)
        mask = _may_look(kind, torch.arange(L) < torch.tensor([L, *[L - 1] * (B - 1)])[:, None], Q)
        case = (queries, words, image, mask, LayerParts(cross, generator))
        answer = _two(attempt, case, Q + L)
        for name, part, n, other in (("queries", answer[0], Q, L), ("words", answer[1], L, Q)):
            hints = {
                (B, other, WIDTH): "Queries and words have changed places: return queries, words.",
                (B, Q + L, WIDTH): "That is both in one row. Cut it: the first Q are the queries.",
            }
            answers.append(attempt.tensor(part, (B, n, WIDTH), what=f"the tensor of the {name}", shapes=hints))
        cases.append(case)

    def layers(**options: str) -> Tensor:
        return torch.cat([part.flatten() for case in cases for part in _layer(*case, **options)])

    attempt.compare(torch.cat([a.flatten() for a in answers]), layers(), variants(layers, _LAYER_SLIPS),
                    detail=_which_differ(answers, cases))  # fmt: skip
    return f"right for {len(LAYERS)} layers, one of them without cross-attention"


def _two(attempt: Attempt, case: tuple, T: int) -> Sequence[Any]:
    """The answer for one layer, if it is two things."""
    try:
        answer = attempt(*case)
    except CheckFailed as error:
        if isinstance(error.__cause__, (TypeError, AttributeError)) and case[4].cross is None and (
            "NoneType" in str(error.__cause__)
        ):  # fmt: skip
            attempt.fail("only every second layer has a cross-attention. In the others `parts.cross` is None: ask "
                         "nobody, and leave out `cross_norm`, too.")  # fmt: skip
        raise
    if isinstance(answer, Tensor) and answer.ndim == 3 and answer.shape[1] == T:
        attempt.fail("return two things, queries and words, each in a tensor of its own: x[:, :Q], x[:, Q:].")
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        attempt.fail("return two things, the queries and the words: return queries, words.")
    return answer


def _layer(
    queries: Tensor, words: Tensor, image: Tensor, mask: Tensor, parts: LayerParts, *, self_: str = "shared",
    cross: str = "queries", asks: str = "between", feed: str = "own", sums: str = "all", norms: str = "after",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """queries (B, Q, D) and words (B, L, D) after the layer. The options make it wrong."""
    Q = queries.shape[1]

    def add(name: str, x: Tensor, answer: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        if norms == "before":
            return x + answer(norm(x))
        if norms == "answer":
            return x + norm(answer(x))
        alone = sums in (name, "none") or (sums == "mlp" and name.endswith("mlp"))
        total = answer(x) if alone else x + answer(x)
        return total if norms in (f"no {name}", "none") else norm(total)

    def attend(x: Tensor) -> Tensor:
        if self_ == "apart":
            parts_of = [parts.attn(x[:, :Q], mask[:, :Q, :Q]), parts.attn(x[:, Q:], mask[:, Q:, Q:])]
            return torch.cat(parts_of, dim=1)
        return parts.attn(x, torch.ones_like(mask) if self_ == "no mask" else mask)

    def look(x: Tensor, asker: Tensor | None = None) -> Tensor:
        if parts.cross is None:
            return x
        norm = (lambda x: x) if norms == "no cross_norm" else parts.cross_norm
        return add("cross", x, lambda own: parts.cross(own if asker is None else asker, image), norm)

    def think(x: Tensor, mine: bool) -> Tensor:
        use = {"words": False, "queries": True, "swapped": not mine}.get(feed, mine)
        norm = {"norm2": False, "query_norm": True}.get(feed, use)
        name = "query mlp" if mine else "word mlp"
        return add(name, x, parts.query_mlp if use else parts.mlp, parts.query_norm if norm else parts.norm2)

    def finish(q: Tensor, w: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        if asks == "last":
            q, w = think(q, True), think(w, False)
        if asks != "first":
            asker = old if asks == "before" else None
            q = look(q, asker) if cross in ("queries", "all") else q
            w = look(w) if cross in ("words", "all") else w
        return (q, w) if asks == "last" else (think(q, True), think(w, False))

    x = torch.cat([look(queries) if asks == "first" else queries, words], dim=1)
    if self_ == "none":
        return finish(queries, words, queries)
    y = add("attn", x, attend, parts.norm1)
    q, w = finish(y[:, :Q], y[:, Q:], queries)
    if self_ == "after":  # the words read what the queries have become
        again = add("attn", torch.cat([q, words], dim=1), attend, parts.norm1)
        w = finish(again[:, :Q], again[:, Q:], queries)[1]
    return q, w


def _which_differ(answers: Sequence[Tensor], cases: Sequence[tuple]) -> str:
    """What is wrong in the first layer in which anything is."""
    for i, case in enumerate(cases):
        right = _layer(*case)
        wrong = [not torch.allclose(got, own, rtol=1e-4, atol=1e-5) for got, own in
                 zip(answers[2 * i : 2 * i + 2], right, strict=True)]  # fmt: skip
        if any(wrong):
            which = "both queries and words are" if all(wrong) else "only the queries are" if wrong[0] else (
                "only the words are")  # fmt: skip
            return f"In layer {i} ({'with' if case[4].cross else 'without'} cross-attention) {which} wrong."
    return ""


_LAYER_SLIPS = [
    Slip("self_", "apart", "self-attention runs twice, once for queries and once for words, so they never meet. One "
         "call for all T = Q + L together; `mask` says who looks at whom."),
    Slip("self_", "after", "the words look at the queries as they are *after* the layer. In one layer all look at what "
         "all were before it: one call of `attn` for both."),
    Slip("self_", "no mask", "`mask` is not used."),
    Slip("self_", "none", "self-attention is missing: it comes first, for queries and words together."),
    Slip("cross", "all", "the words ask the picture, too. Only queries may: what words learn of a picture, they learn "
         "from the queries."),
    Slip("cross", "words", "the *words* ask the picture. The queries do."),
    Slip("cross", "none", "nobody asks the picture. Between self-attention and MLP, the queries do, where `cross` is "
         "not None."),
    Slip("asks", "first", "cross-attention comes before self-attention. It stands between self-attention and MLP."),
    Slip("asks", "before", "the picture is asked by the queries as they were before self-attention. Ask with what came "
         "out of it."),
    Slip("asks", "last", "cross-attention comes after the MLP. It stands between self-attention and MLP."),
    Slip("feed", "words", "the words' MLP serves queries, too. Queries have their own, `query_mlp` and `query_norm`."),
    Slip("feed", "queries", "the queries' MLP serves words, too. Words have their own, `mlp` and `norm2`."),
    Slip("feed", "swapped", "the MLPs are exchanged: `query_mlp` is for queries, `mlp` for words."),
    Slip("feed", "norm2", "`norm2` serves queries, too. After `query_mlp` comes `query_norm`."),
    Slip("feed", "query_norm", "`query_norm` serves words, too. After `mlp` comes `norm2`."),
    Slip("sums", "attn", "the residual around self-attention is missing: norm1(x + answer)."),
    Slip("sums", "cross", "the residual around cross-attention is missing: cross_norm(queries + answer)."),
    Slip("sums", "query mlp", "the residual around the queries' MLP is missing: query_norm(queries + answer)."),
    Slip("sums", "word mlp", "the residual around the words' MLP is missing: norm2(words + answer)."),
    Slip("sums", "mlp", "the residuals around both MLPs are missing: norm(x + answer)."),
    Slip("sums", "none", "there are no residuals: each step is norm(x + answer), not norm(answer)."),
    Slip("norms", "no attn", "`norm1` is missing: norm1(x + answer)."),
    Slip("norms", "no cross_norm", "`cross_norm` is missing: cross_norm(queries + answer)."),
    Slip("norms", "no query mlp", "`query_norm` is missing: query_norm(queries + answer)."),
    Slip("norms", "no word mlp", "`norm2` is missing: norm2(words + answer)."),
    Slip("norms", "none", "there are no LayerNorms: each step is norm(x + answer)."),
    Slip("norms", "before", "the LayerNorms stand before each step, as in a ViT. Here, as in BERT, they come after the "
         "sum: norm(x + answer)."),
    Slip("norms", "answer", "only the answers are normalised: x + norm(answer). The LayerNorm comes after the sum: "
         "norm(x + answer)."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- 5 stage2_step

STEPS = [(3, 4, 0.5, True), (2, 5, 0.2, False)]  # texts, tokens, learning rate, whether all parts come in train mode
FROZEN, LEARNING = ("eye", "mouth"), ("ln_vision", "qformer", "language_proj")
SIZES = {"pixels": 5, "image": 6, "queries": 3, "width": 4, "mouth": 7, "vocabulary": 9}


class TwoEnds(nn.Module):
    """The five parts of stage 2, tiny, none of them frozen yet. What counts is noted whenever one is called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        s, generator = SIZES, torch.Generator().manual_seed(seed)
        self.eye = nn.Sequential(nn.Linear(s["pixels"], s["image"]), nn.Tanh(), nn.Dropout(0.5))
        self.ln_vision = nn.LayerNorm(s["image"])
        self.qformer = _Queries()
        self.language_proj = nn.Linear(s["width"], s["mouth"])
        self.mouth = _Mouth()
        self.calls: dict[str, _Call] = {}
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        for name in (*FROZEN, *LEARNING):
            self.get_submodule(name).register_forward_pre_hook(self._note(name))

    def _note(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            modes = {part.training for part in module.modules()}
            self.calls[name] = _Call(modes, torch.is_grad_enabled(), args[0].requires_grad)

        return hook


class _Call(NamedTuple):
    modes: set[bool]  # True: in train mode
    recorded: bool  # False: under torch.no_grad()
    asks: bool  # whether the input asks for a gradient


class _Queries(nn.Module):
    """image (B, S, D') -> (B, Q, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(SIZES["queries"], SIZES["width"]))
        self.kv = nn.Linear(SIZES["image"], SIZES["width"])

    def forward(self, image: Tensor) -> Tensor:
        kv = self.kv(image)
        return (self.query_tokens @ kv.mT).softmax(dim=-1) @ kv


class _Mouth(nn.Module):
    """prefix (B, P, D_LM) and ids (B, L) -> scores (B, L, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(SIZES["vocabulary"], SIZES["mouth"])
        self.dropout = nn.Dropout(0.5)
        self.lm_head = nn.Linear(SIZES["mouth"], SIZES["vocabulary"])

    def forward(self, prefix: Tensor, ids: LongTensor) -> Tensor:
        states = self.word(ids).cumsum(1) + prefix.sum(1, keepdim=True)
        return self.lm_head(self.dropout(torch.tanh(states)))


@check
def stage2_step(attempt: Attempt) -> str:
    """Exercise 5: a step of training between two frozen ends (BLIP-2, 3.3)."""
    cases, got = [], []
    for seed, (B, L, lr, train) in enumerate(STEPS):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(B, 4, SIZES["pixels"], generator=generator)
        ids, labels = (torch.randint(SIZES["vocabulary"], (B, L), generator=generator) for _ in range(2))
        labels[:, -1] = IGNORE
        labels[0, 0] = IGNORE
        model = TwoEnds(seed).train(train)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.enable_grad():
            answer = _stepped(attempt, model, images, ids, labels, lr)
        loss = _loss_and_optimizer(attempt, answer)
        _frozen_right(attempt, model, before)
        _optimizer(attempt, answer[1], model, lr)
        after = [p.detach().flatten() for name, p in model.named_parameters() if name.split(".")[0] in LEARNING]
        got.append(torch.cat([loss.reshape(1), *after]))
        cases.append((seed, images, ids, labels, lr))

    def steps(**options: str) -> Tensor:
        with torch.enable_grad():
            return torch.cat([_step(*case, **options) for case in cases])

    expected = steps()
    first = [(float(g[0]), float(_step_loss(case))) for g, case in zip(got, cases, strict=True)]
    said = ", ".join(f"{mine:.4f} (expected {right:.4f})" for mine, right in first)
    attempt.compare(torch.cat(got), expected, variants(steps, _STEP_SLIPS),
                    detail=f"Your losses of the {len(cases)} steps: {said}.")  # fmt: skip
    return f"right for {len(STEPS)} steps, {len(LEARNING)} parts learn and {len(FROZEN)} stay as they were"


def _stepped(attempt: Attempt, model: TwoEnds, *rest: Any) -> Any:
    """The answer; if no gradient arrives anywhere, the reason."""
    try:
        return attempt(model, *rest)
    except CheckFailed as error:
        if "does not require grad" in str(error.__cause__):
            _flows(attempt, model)
        raise


def _loss_and_optimizer(attempt: Attempt, answer: Any) -> Tensor:
    """The loss, if the answer is a loss and an optimizer."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        attempt.fail("return two things, the loss and the optimizer: return loss, optimizer.")
    if isinstance(answer[0], torch.optim.Optimizer):
        attempt.fail("loss and optimizer have changed places, or there is no loss: return two things, loss, optimizer.")
    places = "Take one mean over all places whose label is not -100: F.cross_entropy does it itself."
    loss = attempt.tensor(answer[0], (), symbols="()", what="the loss",
                          shapes={tuple(answer[0].shape): places} if isinstance(answer[0], Tensor) else {})  # fmt: skip
    if not isinstance(answer[1], torch.optim.Optimizer):
        attempt.fail(f"the second thing must be the optimizer, but yours is of type {type(answer[1]).__name__}.")
    return loss


def _flows(attempt: Attempt, model: TwoEnds) -> None:
    """Fail where the way back of the gradient is cut."""
    for name in LEARNING:
        if not all(p.requires_grad for p in model.get_submodule(name).parameters()):
            other = " It goes on learning in stage 2; only eye and mouth are frozen." if name == "qformer" else ""
            attempt.fail(f"`{name}` is frozen, too.{other or ' It learns.'}")
    calls = model.calls
    for name in ("mouth", *LEARNING):
        if name in calls and not calls[name].recorded:
            if name == "mouth":
                attempt.fail(
                    "torch.no_grad() around the mouth: nothing is recorded there, so no gradient comes back through "
                    "it, and neither `language_proj` nor `qformer` learns. Freeze its *weights* instead, "
                    "requires_grad_(False), and let the gradient pass."
                )
            attempt.fail(f"`{name}` is called under torch.no_grad(), so it never learns.")
    for name, before in (("mouth", "language_proj"), ("language_proj", "qformer"), ("qformer", "ln_vision")):
        if name in calls and not calls[name].asks:
            attempt.fail(f"what goes into `{name}` was detached, so no gradient comes back to `{before}`: no "
                         ".detach(), .data or torch.no_grad() between them.")  # fmt: skip


def _frozen_right(attempt: Attempt, model: TwoEnds, before: Mapping[str, Tensor]) -> None:
    """Fail unless all five parts were called, learn or are frozen as they should."""
    for name in ("eye", "ln_vision", "qformer", "language_proj", "mouth"):
        if name not in model.calls:
            attempt.fail(f"`{name}` is never called. The way is eye, ln_vision, qformer, language_proj, mouth.")
    now = dict(model.named_parameters())
    for name in FROZEN:
        moved = any(not torch.equal(now[key].detach(), old) for key, old in before.items() if key.startswith(name))
        if moved:
            attempt.fail(f"the {name} has been trained: its weights have moved. Freeze them, "
                         f"model.{name}.requires_grad_(False), and keep them out of the optimizer.")  # fmt: skip
        if True in model.calls[name].modes | {part.training for part in model.get_submodule(name).modules()}:
            attempt.fail(f"the {name} is in train mode, so its dropout draws, and what it says changes from call to "
                         f"call. Frozen means model.{name}.eval(), too, after any model.train().")  # fmt: skip
        if any(p.requires_grad for p in model.get_submodule(name).parameters()):
            attempt.fail(f"the weights of the {name} stay as they are, but still ask for gradients, which costs time "
                         f"and memory: model.{name}.requires_grad_(False).")  # fmt: skip
    _flows(attempt, model)
    for name in LEARNING:
        if False in model.calls[name].modes:
            attempt.fail(f"`{name}` is in eval mode, but it learns: model.train() first, then eye and mouth .eval().")


def _optimizer(attempt: Attempt, optimizer: torch.optim.Optimizer, model: TwoEnds, lr: float) -> None:
    """Fail unless the optimizer is plain SGD and holds just what learns."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    held = {names.get(id(p), "something else") for p in held}
    for name in FROZEN:
        if any(key.startswith(name) for key in held):
            attempt.fail(f"the optimizer holds weights of the {name}. They are frozen now, and would move as soon as "
                         f"they are not: give it only what learns, {', '.join(LEARNING)}.")  # fmt: skip
    for key, name in ((key, key.split(".")[0]) for key in names.values()):
        if name in LEARNING and key not in held:
            attempt.fail(f"`{key}` is not in the optimizer, so it never learns. {', '.join(LEARNING)} do, with all of "
                         "their parameters.")  # fmt: skip
    if held - set(names.values()):
        attempt.fail("the optimizer holds something that is no parameter of the model.")
    if not isinstance(optimizer, torch.optim.SGD):
        attempt.fail(f"use plain SGD, torch.optim.SGD(..., lr=lr), and not {type(optimizer).__name__}, so that the "
                     "step can be compared.")  # fmt: skip
    for group in optimizer.param_groups:
        if group["lr"] != lr or group["momentum"] or group["weight_decay"]:
            attempt.fail(f"the optimizer has the learning rate {group['lr']}, momentum {group['momentum']} and weight "
                         f"decay {group['weight_decay']}. Use lr = {lr}, and neither of the others.")  # fmt: skip


def _step_loss(case: tuple) -> Tensor:
    with torch.no_grad():
        return _loss_of(TwoEnds(case[0]).eval(), *case[1:4])


def _loss_of(
    model: TwoEnds, images: Tensor, ids: LongTensor, labels: LongTensor, *, labels_: str = "given", mean: str = "mean",
    norm: str = "there",
) -> Tensor:  # fmt: skip
    image = model.eye(images)
    scores = model.mouth(model.language_proj(model.qformer(model.ln_vision(image))), ids)
    if labels_ == "shifted":
        scores, labels = scores[:, :-1], labels[:, 1:]
    if labels_ == "ids":
        labels = ids
    loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / {"sum": 1, "places": labels.numel(), "texts": len(labels)}.get(mean, (labels != IGNORE).sum())


def _step(
    seed: int, images: Tensor, ids: LongTensor, labels: LongTensor, lr: float, *, labels_: str = "given",
    mean: str = "mean", move: str = "down", when: str = "before",
) -> Tensor:  # fmt: skip
    """The loss, and after the step all weights that learn, in one row. The options make it wrong."""
    model = TwoEnds(seed).eval()
    learn = [p for name in LEARNING for p in model.get_submodule(name).parameters()]
    loss = _loss_of(model, images, ids, labels, labels_=labels_, mean=mean)
    for _ in range({"none": 0, "twice": 2}.get(move, 1)):
        again = _loss_of(model, images, ids, labels, labels_=labels_, mean=mean)
        for p, grad in zip(learn, torch.autograd.grad(again, learn), strict=True):
            p.data -= (-lr if move == "up" else lr) * grad
    if when == "after":
        loss = _loss_of(model, images, ids, labels, labels_=labels_, mean=mean)
    rows = [p.detach().flatten() for name, p in model.named_parameters() if name.split(".")[0] in LEARNING]
    return torch.cat([loss.detach().reshape(1), *rows])


_STEP_SLIPS = [
    Slip("move", "none", "nothing has moved: loss.backward(), then optimizer.step()."),
    Slip("move", "up", "the weights go up the slope, to a larger loss. Minimise the loss itself."),
    Slip("move", "twice", "you take two steps. Take one."),
    Slip("when", "after", "the loss is that after the step. Return the one from which the step was made."),
    Slip("labels_", "shifted", "you shift once more. The labels are shifted already: the label at place t belongs to "
         "the scores at place t."),
    Slip("labels_", "ids", "you ask for `ids`, which the mouth has read. Compare the scores with `labels`."),
    Slip("mean", "sum", "the loss is a sum. Take the mean over all places whose label is not -100."),
    Slip("mean", "places", "you divide by the number of all places. Take the mean over those whose label is not -100."),
    Slip("mean", "texts", "you divide by the number of texts. Take the mean over all places whose label is not -100."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------- 6 nearest_words

VOCABULARY = ("a", "red", "blue", "house", "boat", "dog", "tree", "snow", "night", "left", "of", "two", "yes", "no")
ASKED = [(4, 6, 3), (3, 5, 1), (2, 8, 5)]  # vectors of the prefix, numbers in each, how many words


@check
def nearest_words(attempt: Attempt) -> str:
    """Exercise 6: what a soft prompt is nearest to."""
    cases, got = [], []
    for seed, (P, D, k) in enumerate(ASKED):
        generator = torch.Generator().manual_seed(seed)
        names = [VOCABULARY[i] for i in torch.randperm(len(VOCABULARY), generator=generator).tolist()]
        sizes = 0.2 + 2 * torch.rand(len(names), 1, generator=generator)
        case = (torch.randn(P, D, generator=generator), sizes * torch.randn(len(names), D, generator=generator), names)
        got.append(_named(attempt, attempt(*case, k), P, k, names))
        cases.append((*case[:2], k))

    def nearest(**options: str) -> Tensor:
        return torch.cat([_rows(_nearest(*case, **options)) for case in cases])

    answer = torch.cat([_rows(rows) for rows in got])
    attempt.compare(answer, nearest(), variants(nearest, _NEAREST_SLIPS), detail=_first_named(got, cases))
    return f"right for {sum(P for P, *_ in ASKED)} vectors of {len(ASKED)} prefixes"


def _named(attempt: Attempt, answer: Any, P: int, k: int, names: Sequence[str]) -> LongTensor:
    """The numbers (P, k) of the words in the answer, after all that can be said about its form."""
    if isinstance(answer, Tensor):
        attempt.fail("the answer must be a list of lists of words, but yours is a tensor. Look the numbers up in "
                     "`names`: names[i].")  # fmt: skip
    if not isinstance(answer, (list, tuple)):
        attempt.fail(f"the answer must be a list of lists of words, but yours is of type {type(answer).__name__}.")
    if len(answer) != P or not all(isinstance(row, (list, tuple)) for row in answer):
        kinds = ", ".join(sorted({type(row).__name__ for row in answer})) or "nothing"
        attempt.fail(f"the answer must be a list of {P} lists, one for each vector of the prefix; yours has "
                     f"{len(answer)} entries of type {kinds}.")  # fmt: skip
    for row in answer:
        if len(row) != k:
            attempt.fail(f"each of the lists must be of k = {k} words, and yours has {len(row)}.")
        for word in row:
            if not isinstance(word, str):
                attempt.fail(f"the lists must be of words, and yours holds {word!r:.40}. Look it up: names[i].")
            if word not in names:
                attempt.fail(f"{word!r} is none of `names`.")
        if len(set(row)) < len(row):
            attempt.fail(f"a word is there twice: {list(row)}. Each of the k is another.")
    return torch.tensor([[names.index(word) for word in row] for row in answer])


def _rows(numbers: LongTensor) -> Tensor:
    """As rows of 0 and 1, so that no answer is a multiple of another."""
    return F.one_hot(numbers, len(VOCABULARY)).float().flatten()


def _nearest(
    prefix: Tensor, table: Tensor, k: int, *, measure: str = "cosine", pick: str = "largest", order: str = "best",
    of: str = "each",
) -> LongTensor:  # fmt: skip
    """The numbers (P, k). The options make it wrong."""
    if of == "mean":
        prefix = prefix.mean(0).expand_as(prefix)
    if of == "first":
        prefix = prefix[:1].expand_as(prefix)
    near = {
        "dot": lambda: prefix @ table.T,
        "distance": lambda: -torch.cdist(prefix, table),
        "size": lambda: (F.normalize(prefix, dim=1) @ F.normalize(table, dim=1).T).abs(),
        "columns": lambda: F.normalize(prefix, dim=1) @ F.normalize(table, dim=0).T,
    }.get(measure, lambda: F.normalize(prefix, dim=1) @ F.normalize(table, dim=1).T)()
    found = near.topk(k, dim=1, largest=pick != "smallest").indices
    if pick == "after the first":
        found = near.topk(k + 1, dim=1).indices[:, 1:]
    return found.flip(1) if order == "worst" else found.sort(1).values if order == "table" else found


def _first_named(got: Sequence[LongTensor], cases: Sequence[tuple[Tensor, Tensor, int]]) -> str:
    for i, (mine, case) in enumerate(zip(got, cases, strict=True)):
        wrong = (mine != _nearest(*case)).any(1)
        if wrong.any():
            row = int(wrong.int().argmax())
            cosine = F.cosine_similarity(case[0][row], case[1], dim=1)
            numbers = [[f"{cosine[j]:.2f}" for j in table[row]] for table in (_nearest(*case), mine)]
            return (f"Prefix {i}, vector {row}: the cosines of the right words are {', '.join(numbers[0])}, of yours "
                    f"{', '.join(numbers[1])}.")  # fmt: skip
    return ""


_NEAREST_SLIPS = [
    Slip("measure", "dot", "you compare by the scalar product, and words with long vectors win. Normalise the table: "
         "the cosine counts."),
    Slip("measure", "distance", "you compare by distance, in which lengths count. Take the cosine: F.normalize both."),
    Slip("measure", "size", "you take the largest *size*: a word that points the opposite way is not near. The cosine "
         "itself counts."),
    Slip("measure", "columns", "the table is normalised over the wrong dimension. Each word's vector has length 1: "
         "dim=-1."),
    Slip("pick", "smallest", "these are the words *farthest* away. The largest cosine is the nearest."),
    Slip("pick", "after the first", "the nearest word is left out. No vector of a prefix is a word itself."),
    Slip("order", "worst", "the nearest word comes last. It comes first."),
    Slip("order", "table", "your k are in the order of the table. The nearest comes first."),
    Slip("of", "mean", "you compare the mean of the prefix. Each of its P vectors has words of its own."),
    Slip("of", "first", "all rows are those of the first vector. Each of the P has words of its own."),
]  # fmt: skip
