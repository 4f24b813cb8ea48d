"""Checks for the exercises of lesson 06 (`notebooks/06_vlmo.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.checks.core import Attempt, Slip, check, variants
from minivlp.models.vlmo import VLMo, VLMoConfig

# -------------------------------------------------------------------------------------------------------- 1 route

# Pairs, tokens, words among them, width. As many words as image tokens first: there it shows by the shape if the two
# sides are added, or joined along a wrong dimension.
ROWS = [(5, 8, 4, 3), (2, 7, 2, 5), (3, 6, 4, 4)]


@check
def route(attempt: Attempt) -> str:
    """Exercise 1: every token to the expert that its place and its block call for (VLMo, 3.1)."""
    cases, answers = [], []
    for seed, (B, T, L, D) in enumerate(ROWS):
        generator = torch.Generator().manual_seed(seed)
        experts = {name: _mlp(D, generator) for name in ("text", "image", "pair")}
        x = torch.randn(B, T, D, generator=generator)
        for last in (False, True):
            raw = attempt(x, L, dict(experts), last)
            answers.append(attempt.tensor(raw, (B, T, D), symbols="(B, T, D)", shapes=_row_hints(B, T, L, D)))
            cases.append((x, L, last, experts))

    def routed(*, adds: str = "nothing", **who: str) -> Tensor:
        rows = [_through(x, L, last, experts, **who) + (x if adds == "x" else 0) for x, L, last, experts in cases]
        return torch.cat([y.flatten() for y in rows])

    detail = _first_wrong(answers, [_through(*case) for case in cases], cases)
    got = torch.cat([answer.flatten() for answer in answers])
    attempt.compare(got, routed(), variants(routed, _ROUTE_SLIPS), detail=detail)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        for last in (False, True):
            attempt.learnable(attempt(x, L, experts, last), "x")
    return f"right for {len(ROWS)} batches, below the last F blocks and in them"


def _mlp(D: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Stands for an expert's MLP: a function of each token alone, (..., D) -> (..., D)."""
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((D, D), (D,)))
    return lambda tokens: torch.tanh(tokens @ weight + bias)


def _through(
    x: Tensor, L: int, last: bool, experts: Mapping[str, Callable[[Tensor], Tensor]], *, to: str = "own",
    when: str = "last", cut: str = "right", join: str = "rows",
) -> Tensor:  # fmt: skip
    """The tokens x (B, T, D), of which the first L are words, through their experts. The options make it wrong."""
    T = x.shape[1]
    first, second = {"swapped": ("image", "text"), "text": ("text", "text"), "image": ("image", "image"),
                     "pair": ("pair", "pair")}.get(to, ("text", "image"))  # fmt: skip
    if cut == "image first":
        first, second = second, first
    at = {"late": L + 1, "early": L - 1, "image first": T - L}.get(cut, L)

    def own(x: Tensor) -> Tensor:
        if cut == "batch":  # the first L pairs, not the first L tokens
            return torch.cat([experts[first](x[:L]), experts[second](x[L:])])
        if join in ("sum", "mean"):
            return (experts[first](x) + experts[second](x)) / (2 if join == "mean" else 1)
        sides = [experts[first](x[:, :at]), experts[second](x[:, at:])]
        return torch.cat(sides[::-1] if join == "turned" else sides, dim=1)

    pair = experts["pair"]
    if not {"never": False, "inverted": not last}.get(when, last):
        return own(x)
    if when == "after":
        return pair(own(x))
    if when == "added":
        return own(x) + pair(x)
    if when == "words":
        return torch.cat([pair(x[:, :L]), experts[second](x[:, L:])], dim=1)
    if when == "picture":
        return torch.cat([experts[first](x[:, :L]), pair(x[:, L:])], dim=1)
    return pair(x)


def _row_hints(B: int, T: int, L: int, D: int) -> dict[tuple[int, ...], str]:
    """What a wrong shape tells, for rows (B, T, D)."""
    return {
        (B, T - L, D): "One side is missing: the answer has all T tokens, in their order.",
        (B, L, D): "One side is missing, or you added both. Put them side by side: torch.cat along dimension 1.",
        (2 * B, L, D): "You joined the two sides along the batch. Put them side by side: dimension 1.",
        (B, L, 2 * D): "You joined the two sides along the numbers of a token. Put them side by side: dimension 1.",
        (2, B, L, D): "You stacked the two sides. Put them side by side: torch.cat along dimension 1.",
        (B, 2, L, D): "You stacked the two sides. Put them side by side: torch.cat along dimension 1.",
        (B, 2 * T, D): "Every token is there twice. It goes to one expert.",
        (B * T, D): "Keep the pairs of the batch apart.",
        (T, B, D): "The batch comes first.",
    }


def _first_wrong(answers: list[Tensor], expected: list[Tensor], cases: list[tuple]) -> str:
    """The first token that differs, in words. A case begins with x (B, T, D), text_length and last."""
    for got, right, (_, L, last, *_) in zip(answers, expected, cases, strict=True):
        wrong = ~torch.isclose(got, right, rtol=1e-4, atol=1e-5).all(dim=2)  # (B, T)
        if wrong.any():
            row, token = wrong.nonzero()[0].tolist()
            side = "a word" if token < L else "the picture's class token" if token == L else "a patch"
            return (f"With text_length = {L} of {got.shape[1]} tokens and last = {last}, token {token} of row {row} "
                    f"({side}) is the first that is wrong.")  # fmt: skip
    return ""


# Of a single route and of a whole block: which tokens go to which expert.
_WHO_SLIPS = [
    Slip("to", "swapped", 'the experts are swapped: words go to "text" (L-FFN), the picture\'s tokens to "image" '
         "(V-FFN)."),
    Slip("to", "pair", 'every token goes to "pair" in every block. VL-FFN is for the last F blocks alone: below, each '
         "modality has its own expert, in a pair, too, or they would never learn from pairs."),
    Slip("to", "text", 'below the last F blocks, all tokens go to "text". The picture\'s go to "image".'),
    Slip("to", "image", 'below the last F blocks, all tokens go to "image". Words go to "text".'),
    Slip("when", "never", '`last` is not used: in the last F blocks all tokens go to "pair".'),
    Slip("when", "inverted", '`last` is the wrong way round: "pair" is for the blocks where it is True.'),
    Slip("when", "after", 'in the last F blocks, the tokens go through their own expert, and then through "pair". '
         'There "pair" takes the place of the others.'),
    Slip("when", "added", 'in the last F blocks, "pair" is added to the tokens\' own expert. It takes the place of the '
         "others."),
    Slip("when", "words", 'in the last F blocks, only the words go to "pair". All tokens do.'),
    Slip("when", "picture", 'in the last F blocks, only the picture\'s tokens go to "pair". All tokens do.'),
    Slip("cut", "late", "the cut is one token too late: the picture's class token, [I_CLS], goes with the words. The "
         "words are x[:, :text_length], and everything from text_length on is the picture's."),
    Slip("cut", "early", "the cut is one token too early: the last of the words goes with the picture. The words are "
         "x[:, :text_length]."),
    Slip("cut", "image first", "you cut as if the picture stood first. The words do: x[:, :text_length]."),
    Slip("join", "turned", "the two sides are in the wrong order behind their experts: every token stays at its place, "
         "the words first."),
    Slip("join", "sum", "every token goes to both experts, and their answers are added. A word has one expert, a patch "
         "another: put the two sides side by side, torch.cat along dimension 1."),
    Slip("join", "mean", "every token goes to both experts, and their answers are averaged. A word has one expert, a "
         "patch another: put the two sides side by side, torch.cat along dimension 1."),
]  # fmt: skip
_ROUTE_SLIPS = [
    *_WHO_SLIPS,
    Slip("cut", "batch", "you cut the batch, not the row: the first pairs go to one expert, the others to the other. "
         "Tokens are dimension 1: x[:, :text_length]."),
    Slip("adds", "x", "you add x. That is the block's work: here the tokens only go through their experts."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- 2 nearest_code

PATCHES = [(2, 15, 4, 9), (3, 11, 6, 5), (1, 20, 3, 12)]  # pictures, patches, numbers of a patch, codes


@check
def nearest_code(attempt: Attempt) -> str:
    """Exercise 2: the number of the nearest centre (VLMo, 3.3; BEiT has a trained tokenizer)."""
    cases, answers = [], []
    for seed, (B, N, P, K) in enumerate(PATCHES):
        patches, centres = _far_from_even(B, N, P, K, seed)
        axis = "Each *patch* chooses among the centres: .argmin(dim=-1) of a table (B, N, K)."
        hints = {
            (B, N, K): "Are these the distances? Take the number of the nearest: .argmin(dim=-1).",
            (B, N, P): "Are these the centres themselves? Return their numbers.",
            (B, N, 1): "Drop the last dimension.",
            (B, K): f"The wrong axis: this is the nearest patch for each centre. {axis}",
            (N, K): f"The wrong axis: you choose among the pictures of the batch. {axis}",
            (B,): "That is one code for a picture. Each patch has its own.",
            (K,): "This is a number for each centre. Each patch has one.",
            (N,): "That is one row of codes for all pictures. Each picture has its own.",
            (B * N,): "Keep the pictures apart: .view(B, N).",
            (N, B): "Transposed: a row for each picture.",
            (): "This is one number. Give every patch one: argmin needs a `dim`.",
        }
        raw = attempt(patches, centres)
        if isinstance(raw, Tensor) and raw.shape == (B, N) and raw.is_floating_point():
            gaps = torch.cdist(patches, centres).min(dim=-1).values
            if any(torch.allclose(raw.float(), known, rtol=1e-3, atol=1e-3) for known in (gaps, gaps.square())):
                attempt.fail("these are the distances to the nearest centres. Return the centres' numbers: argmin, "
                             "not min.")  # fmt: skip
            attempt.fail("these are fractions. A code is the number of a centre, a whole number (int64), and the label "
                         "of a cross-entropy later.")  # fmt: skip
        answer = attempt.tensor(raw, (B, N), symbols="(B, N)", dtype=torch.long, shapes=hints)
        if torch.equal(answer, 1 + torch.cdist(patches, centres).argmin(-1)):
            attempt.fail("every number is one too large. Codes count from 0, like the rows of `centres`.")
        if ((answer < 0) | (answer >= K)).any():
            attempt.fail(f"a code must be the number of a centre, 0 to {K - 1}; yours reach from {answer.min()} to "
                         f"{answer.max()}.")  # fmt: skip
        answers.append(answer)
        cases.append((patches, centres))

    def codes(*, by: str = "distance", choose: str = "lowest", among: str = "each") -> Tensor:
        return torch.cat([_codes(*case, by, choose, among).flatten() for case in cases]).float()

    got = torch.cat([answer.flatten() for answer in answers]).float()
    if not torch.equal(got, codes()):
        attempt.compare(got, codes(), variants(codes, _CODE_SLIPS), atol=0, rtol=0, detail=_nearer(answers, cases))
    return f"right for {sum(B * N for B, N, _, _ in PATCHES)} patches and up to {max(K for *_, K in PATCHES)} codes"


def _far_from_even(B: int, N: int, P: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """patches (B, N, P) and centres (K, P), of very different lengths. No patch is almost as near to a second centre,
    so that rounding, which differs between right ways to compute, decides nothing."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, P, generator=generator) * (0.3 + 2 * torch.rand(K, 1, generator=generator))
    many = torch.randn(20 * B * N, P, generator=generator) * (0.3 + 2 * torch.rand(20 * B * N, 1, generator=generator))
    two = torch.cdist(many, centres).topk(2, largest=False).values
    return many[two[:, 1] - two[:, 0] > 0.05][: B * N].view(B, N, P), centres


def _codes(patches: Tensor, centres: Tensor, by: str, choose: str, among: str) -> Tensor:
    """Codes (B, N), right with "distance", "lowest" and "each"."""
    dot, size = patches @ centres.T, centres.square().sum(1)  # (B, N, K), (K)
    apart = patches[:, :, None] - centres  # (B, N, K, P)
    table = {
        "distance": lambda: apart.square().sum(-1),
        "dot": lambda: -dot,
        "cosine": lambda: -F.normalize(patches, dim=-1) @ F.normalize(centres, dim=-1).T,
        "half": lambda: size - dot,
        "plus": lambda: size + 2 * dot,
        "length": lambda: size.sqrt() - 2 * dot,
        "mean": lambda: size / centres.shape[1] - 2 * dot,
        "absolute": lambda: apart.abs().sum(-1),
        "largest": lambda: apart.abs().amax(-1),
        "signed": lambda: apart.sum(-1),
        "sums": lambda: apart.sum(-1).abs(),
        "size": lambda: size.expand_as(dot),
    }[by]()
    if among == "picture":
        table = table.sum(dim=1, keepdim=True).expand_as(table)
    elif among == "batch":
        table = table.sum(dim=0, keepdim=True).expand_as(table)
    elif among == "first":
        table = table[:1].expand_as(table)
    order = table.argsort(dim=-1)
    return {"lowest": order[..., 0], "highest": order[..., -1], "second": order[..., 1],
            "zero": table.abs().argmin(dim=-1)}[choose]  # fmt: skip


def _nearer(answers: list[Tensor], cases: list[tuple[Tensor, Tensor]]) -> str:
    """The first patch with a wrong code, in words."""
    for got, (patches, centres) in zip(answers, cases, strict=True):
        gaps = torch.cdist(patches, centres)  # (B, N, K)
        wrong = (got != gaps.argmin(-1)).nonzero()
        if len(wrong):
            b, n = wrong[0].tolist()
            own, best = int(got[b, n]), int(gaps[b, n].argmin())
            return (f"Patch {n} of picture {b}: your centre {own} is at a distance of {gaps[b, n, own]:.3f}, centre "
                    f"{best} at {gaps[b, n, best]:.3f}.")  # fmt: skip
    return ""


_CODE_SLIPS = [
    Slip("by", "dot", "you take the largest dot product. It likes long centres, however far away they are. If you "
         "multiplied out |p - c|^2 = |p|^2 - 2 p c + |c|^2: only |p|^2 is the same for all centres; you need |c|^2."),
    Slip("by", "cosine", "you take the largest cosine, or bring the centres to length 1, which comes to the same. It "
         "compares directions alone: a dark patch and a bright one of the same pattern would be the same. Take the "
         "distance to the centres as they are."),
    Slip("by", "half", "the factor 2 is missing: |p - c|^2 = |p|^2 - 2 p c + |c|^2."),
    Slip("by", "plus", "a sign is wrong: |p - c|^2 = |p|^2 - 2 p c + |c|^2."),
    Slip("by", "length", "you use the length |c| where its square belongs: |p - c|^2 = |p|^2 - 2 p c + |c|^2."),
    Slip("by", "mean", "you take a mean of squares for |c|^2, and a sum for the product. Use the sum for both: "
         "|p - c|^2 = |p|^2 - 2 p c + |c|^2."),
    Slip("by", "absolute", "you add up the absolute differences. The Euclidean distance adds up their squares."),
    Slip("by", "largest", "you compare the largest of the differences. The Euclidean distance adds up their squares."),
    Slip("by", "signed", "you add up the differences with their signs, and they cancel. Square each one first."),
    Slip("by", "sums", "you add up the differences with their signs, and they cancel. Square each one first, not the "
         "sum."),
    Slip("by", "size", "the patches play no part: every one gets the shortest centre. The middle term, -2 p c, is "
         "missing."),
    Slip("choose", "highest", "you take the *farthest* centre: argmin, not argmax."),
    Slip("choose", "second", "you take the second nearest centre. No patch is a centre itself here: take the first."),
    Slip("among", "picture", "all patches of a picture get the same code. Each one has its own."),
    Slip("among", "batch", "all pictures get the same codes: you add up the distances over the batch."),
    Slip("among", "first", "all pictures get the codes of the first one."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------- 3 trainable_in_stage_two

MODELS = [(3, 1), (12, 2), (2, 0)]  # depth, F


@check
def trainable_in_stage_two(attempt: Attempt) -> str:
    """Exercise 3: what texts alone may train (VLMo, 3.3; official code)."""
    cases = [_names(*model) for model in MODELS]
    got = torch.cat([_chosen(attempt, names) for names in cases])

    def picked(**rules: tuple[str, bool | str]) -> Tensor:
        return torch.cat([_picked(names, rules) for names in cases]).float()

    expected = picked()
    if not torch.equal(got, expected):
        wrong = []
        for said, flag in (("Missing", 0), ("Too many", 1)):
            names = [name for name, mine, right in zip(sum(cases, ()), got, expected, strict=True)
                     if mine == flag != right]  # fmt: skip
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                wrong.append(f"{said}: `{names[0]}`{more}.")
        attempt.compare(got, expected, variants(picked, _STAGE_SLIPS), detail=" ".join(wrong))
    return f"right for {len(MODELS)} models, {int(expected.sum())} of {len(expected)} names"


@functools.cache
def _names(depth: int, pair_depth: int) -> tuple[str, ...]:
    """The names of the parameters of a very small VLMo."""
    config = VLMoConfig(8, 4, 1, vocab_size=5, max_text=4, width=4, depth=depth, pair_depth=pair_depth, heads=1,
                        mlp_ratio=1, codes=3)  # fmt: skip
    return tuple(name for name, _ in VLMo(config).named_parameters())


def _chosen(attempt: Attempt, names: tuple[str, ...]) -> Tensor:
    """The answer for `names` as a row of 1 (to be trained) and 0, after all that can be said about its form."""
    answer = attempt(list(names))
    keep = "[name for name in names if ...] makes one."
    if isinstance(answer, (str, Tensor, Mapping)) or not isinstance(answer, Collection):
        attempt.fail(f"the answer must be a list (or a set) of names, but yours is of type {type(answer).__name__}. "
                     f"{keep}")  # fmt: skip
    for item in answer:
        if not isinstance(item, str):
            attempt.fail(f"the answer must be a list of names, and yours holds one of type {type(item).__name__}. "
                         f"{keep}")  # fmt: skip
        if item not in names:
            attempt.fail(f"`{item}` is none of the names that you were given. Return names from that list, in full.")
    if len(set(answer)) < len(answer):
        twice = next(name for name in names if list(answer).count(name) > 1)
        attempt.fail(f"`{twice}` is in your list twice. Ask all your questions about a name at once: if ... or ...")
    return torch.tensor([name in answer for name in names]).float()


# What stage 2 trains. A rule, (pattern, flag), says what a mistake makes of the names in which the pattern is found.
_TRAINED = r"^embed\.(text|types)\.|^mlm_head\.|^norm\.|\.experts\.text\."


def _picked(names: tuple[str, ...], rules: Mapping[str, tuple[str, bool | str]]) -> Tensor:
    """Which of the names are trained, as the rules have changed it."""
    moves = _found(names, _TRAINED)
    for pattern, flag in rules.values():
        found = _found(names, pattern)
        if flag in ("not", "only"):
            moves = ~moves if flag == "not" else found
        else:
            moves = moves | found if flag else moves & ~found
    return moves


@functools.cache
def _found(names: tuple[str, ...], pattern: str) -> Tensor:
    """In which names the pattern is found. TOP in it stands for the numbers of the last F blocks."""
    top = {name.split(".")[1] for name in names if ".experts.pair." in name}
    pattern = pattern.replace("TOP", "|".join(top) or "none")
    return torch.tensor([bool(re.search(pattern, name)) for name in names])


_STAGE_SLIPS = [
    Slip("whole", ("", True), "all parameters are trained. Texts know nothing of pictures: what stage 1 has learned, "
         "above all attention and V-FFN, must stay as it is."),
    Slip("whole", ("", False), "nothing is trained. At least L-FFN must be."),
    Slip("whole", ("", "not"), "the wrong way round: these are the frozen ones. Return those that are trained."),
    Slip("whole", ("text", "only"), 'these are the names with "text" in them. Stage 2 also trains the types, the MLM '
         "head and the last LayerNorm; and the projections of ITC, though they are about texts, too, are not in it."),
    Slip("attention", (r"\.attn\.", True), "attention is trained. Pictures need it as stage 1 has left it; texts learn "
         "to live with it: that is the point of stage 2."),
    Slip("attention", (r"\.attn\.|\.norm1\.", True), "attention is trained, and its LayerNorm. Pictures need both as "
         "stage 1 has left them."),
    Slip("attention", (r"\.attn\.|\.norm1\.|\.gamma_", True), "what the modalities share in a block is trained: "
         "attention, its LayerNorm and the layer scales. Pictures need all that as stage 1 has left it."),
    Slip("shared", (r"\.norm1\.", True), "`norm1` is trained. It stands before the attention, which pictures use, too: "
         "it stays as it is."),
    Slip("shared", (r"\.gamma_", True), "the layer scales, `gamma_1` and `gamma_2`, are trained. They are shared with "
         "pictures and stay as they are."),
    Slip("shared", (r"\.norm1\.|\.gamma_", True), "`norm1` and the layer scales are trained. They are shared with "
         "pictures and stay as they are."),
    Slip("experts", (r"\.experts\.image\.", True), "V-FFN is trained. No word passes through it, and it must stay as "
         "stage 1 has left it."),
    Slip("experts", (r"\.experts\.image\.mlp\.", True), "V-FFN's MLP is trained. No word passes through it."),
    Slip("experts", (r"\.experts\.image\.norm\.", True), "V-FFN's LayerNorm is trained. It belongs to V-FFN."),
    Slip("experts", (r"\.experts\.pair\.", True), "VL-FFN is trained. It sees pairs alone: texts never reach it."),
    Slip("experts", (r"\.experts\.pair\.mlp\.", True), "VL-FFN's MLP is trained. It sees pairs alone."),
    Slip("experts", (r"\.experts\.pair\.norm\.", True), "VL-FFN's LayerNorm is trained. It belongs to VL-FFN."),
    Slip("experts", (r"\.experts\.", True), "all three experts are trained. A text passes through L-FFN alone."),
    Slip("experts", (r"\.experts\.\w+\.norm\.", True), "the LayerNorms of all three experts are trained. Only L-FFN's "
         'own is: did you look for "norm." anywhere in a name? Names that *start* with it are the last LayerNorm\'s.'),
    Slip("experts", (r"\.norm1?\.", True), "the LayerNorms of the blocks are all trained. Only L-FFN's own is: did you "
         'look for "norm" anywhere in a name? Names that *start* with "norm." are the last LayerNorm\'s.'),
    Slip("L-FFN", (r"\.experts\.text\.", False), "L-FFN is missing. It is what stage 2 is for."),
    Slip("L-FFN", (r"\.experts\.text\.mlp\.", False), "L-FFN's MLP is missing. Its LayerNorm alone is not enough."),
    Slip("L-FFN", (r"\.experts\.text\.norm\.", False), "L-FFN's own LayerNorm is missing. It is a part of the expert "
         "and trained with its MLP."),
    Slip("L-FFN", (r"\.(TOP)\.experts\.text\.", False), "L-FFN of the last F blocks is missing. These blocks have "
         "all three experts, and a text alone takes L-FFN there, too."),
    Slip("L-FFN", (r"\.[1-9]\d*\.experts\.text\.", False), "only the first block's L-FFN is trained. Every block has "
         "one."),
    Slip("L-FFN", (r"\.\d\d+\.experts\.text\.", False), "L-FFN of the blocks from number 10 on is missing: a block's "
         "number may have two digits."),
    Slip("norm", (r"^norm\.", False), "the last LayerNorm, `norm`, is missing. The official code trains it, although "
         "pictures use it, too. Careful with patterns: its names *start* with \"norm.\"."),
    Slip("embed", (r"^embed\.(text|types)\.", False), "the embeddings are missing: the words' (`embed.text`) and the "
         "types' (`embed.types`)."),
    Slip("embed", (r"^embed\.text\.", False), "the embeddings of the words, `embed.text`, are missing."),
    Slip("embed", (r"^embed\.text\.(position|norm)", False), "of `embed.text` only the table of words is there. The "
         "positions and the LayerNorm belong to the embeddings of texts, too."),
    Slip("embed", (r"^embed\.text\.norm", False), "the LayerNorm of the words' embeddings, `embed.text.norm`, is "
         "missing."),
    Slip("embed", (r"^embed\.types\.", False), "the types, `embed.types`, are missing. The official code trains them "
         "with the words."),
    Slip("look", (r"^embed\.(image|mask_patch)", True), "the embeddings of pictures are trained, `embed.image` and "
         "`embed.mask_patch`. There is no picture in stage 2."),
    Slip("look", (r"^embed\.image", True), "the embeddings of pictures, `embed.image`, are trained. There is no "
         "picture in stage 2."),
    Slip("look", (r"^embed\.mask_patch", True), "`embed.mask_patch` is trained. It stands for covered patches, and "
         "there is no picture in stage 2."),
    Slip("mlm", (r"^mlm_head\.", False), "the MLM head is missing. It guesses the hidden words, from nothing at "
         "first."),
    Slip("mlm", (r"^mlm_head\.(dense|norm)", False), "of the MLM head only the output layer is there. Train all of "
         "it."),
    Slip("heads", (r"^itc_(vl_)?text_proj", True), "ITC's projections of texts are trained. They wait for pairs, as "
         "ITC does."),
    Slip("heads", (r"^(itm|mim)_head", True), "the heads of ITM and MIM are trained. The loss of stage 2, MLM, uses "
         "its own head alone."),
    Slip("heads", (r"^pooler", True), "the pooler is trained. MLM reads the states of the words, without it."),
    Slip("heads", (r"^(itc|itm|mim|pooler|logit)", True), "all heads are trained. The loss of stage 2, MLM, uses its "
         "own head alone."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ 4 allowed_partners

BATCHES = [(12, 3), (8, 2), (6, 1), (12, 4)]  # pairs, GPUs


@check
def allowed_partners(attempt: Attempt) -> str:
    """Exercise 4: which texts may be a picture's wrong partner, if a batch is spread over GPUs (VLMo, 3.2)."""
    cases, answers = [], []
    for seed, (B, gpus) in enumerate(BATCHES):
        same, per = _belonging(B, gpus, seed), B // gpus
        hints = {
            (per, per): "That is the table of one GPU. Return a table for all B pictures and B texts.",
            (gpus, per, per): "That is a table for each GPU. Put them into one, (B, B), with False everywhere else.",
            (B, per): "The texts of other GPUs have columns, too, with False.",
            (B,): "Each picture needs a row: one answer for each text.",
            (): "Return a table, a row for each picture and a column for each text.",
        }
        raw = attempt(same, gpus)
        answers.append(attempt.tensor(raw, (B, B), symbols="(B, B)", dtype=torch.bool, shapes=hints))
        cases.append((same, gpus))

    def allowed(**options: str) -> Tensor:
        return torch.cat([_allowed(*case, **options).flatten() for case in cases]).float()

    got = torch.cat([answer.flatten() for answer in answers]).float()
    if not torch.equal(got, allowed()):
        attempt.compare(got, allowed(), variants(allowed, _PARTNER_SLIPS), detail=_wrongly(answers, cases))
    return f"right for {len(BATCHES)} batches, on {min(g for _, g in BATCHES)} to {max(g for _, g in BATCHES)} GPUs"


def _belonging(B: int, gpus: int, seed: int) -> Tensor:
    """Which texts are right for which pictures, (B, B): the own one and some more, not the same both ways. Every row
    has a wrong text on its own GPU."""
    generator, per = torch.Generator().manual_seed(seed), B // gpus
    local = torch.arange(B) // per == torch.arange(B)[:, None] // per
    while True:
        same = (torch.rand(B, B, generator=generator) < 0.25) | torch.eye(B, dtype=torch.bool)
        if (local & ~same).any(dim=1).all():
            return same


def _allowed(
    same: Tensor, gpus: int, *, sign: str = "allowed", right: str = "same", held: str = "own", both: str = "and"
) -> Tensor:
    """Who may be drawn (B, B). The options make it wrong."""
    B, i = len(same), torch.arange(len(same))
    per, eye = B // gpus, torch.eye(B, dtype=torch.bool)
    gpu = {"interleaved": i % gpus, "count": i // gpus, "place": i % per}.get(held, i // per)
    local = gpu[:, None] == gpu
    if held == "all":
        local = torch.ones_like(local)
    elif held == "others":
        local = ~local
    elif held == "first":
        local = (gpu == 0).expand(B, B)
    wrong = {"same": ~same, "diagonal": ~eye, "ignored": torch.ones_like(same), "transposed": ~same.T, "only": same,
             "own allowed": ~same | eye}[right]  # fmt: skip
    table = wrong & local if both == "and" else wrong | local if both == "or" else wrong | ~local
    return ~table if sign == "forbidden" else table


def _wrongly(answers: list[Tensor], cases: list[tuple[Tensor, int]]) -> str:
    """The first place that is wrong, in words."""
    for got, (same, gpus) in zip(answers, cases, strict=True):
        wrong = (got != _allowed(same, gpus)).nonzero()
        if len(wrong):
            (row, column), per = wrong[0].tolist(), len(same) // gpus
            return (
                f"With B = {len(same)} and gpus = {gpus}, picture {row} is on GPU {row // per} and text {column} on "
                f"GPU {column // per}, and same[{row}, {column}] is {bool(same[row, column])}: yours says "
                f"{bool(got[row, column])}."
            )
    return ""


_PARTNER_SLIPS = [
    Slip("sign", "forbidden", "the wrong way round: you mark what is forbidden. True is for the texts that may be "
         "drawn."),
    Slip("right", "diagonal", "you forbid the diagonal alone. Other captions may be right for a picture, too, and "
         "would be called wrong: `same` says which."),
    Slip("right", "ignored", "`same` is not used, so that a picture's own text may be drawn as a wrong one."),
    Slip("right", "own allowed", "the diagonal is allowed: a picture's own text would be called wrong."),
    Slip("right", "transposed", "`same` is transposed. Its rows are pictures and its columns texts, like those of your "
         "answer."),
    Slip("right", "only", "only texts that are *right* are allowed. Wrong partners are wanted: ~same."),
    Slip("held", "all", "`gpus` is not used: every picture may draw from the whole batch. A picture sees the texts of "
         "its own GPU alone."),
    Slip("held", "interleaved", "you deal the rows out in turn, i % gpus. Each GPU holds a part of the batch in one "
         "piece: the first B / gpus rows are on the first."),
    Slip("held", "place", "you compare places within a GPU, i % (B / gpus): who holds row i is i // (B / gpus)."),
    Slip("held", "count", "you divide by the number of GPUs, i // gpus, so that each holds `gpus` rows. Each holds "
         "B / gpus of them: i // (B // gpus)."),
    Slip("held", "others", "only texts of *other* GPUs are allowed. A picture sees those of its own alone."),
    Slip("held", "first", "all pictures draw from the texts of the first GPU. Each draws from its own."),
    Slip("both", "or", "one of the two conditions is enough for you (or). A text must be wrong *and* on the same GPU: "
         "&."),
    Slip("both", "nand", "you forbid only what is right and on the same GPU. A text must be wrong *and* on the same "
         "GPU: ~same & ..."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- 5 multiway_block

BLOCKS = [(2, 6, 3, 6), (3, 7, 5, 4)]  # pairs, tokens, words among them, width; as many words as image tokens first


@check
def multiway_block(attempt: Attempt) -> str:
    """Exercise 5: one attention for all tokens, then each one's expert (VLMo, eq. 2-3)."""
    cases, answers = [], []
    for seed, (B, T, L, D) in enumerate(BLOCKS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(B, T, D, generator=generator) * (0.5 + 2 * torch.rand(B, T, 1, generator=generator))
        mask = torch.arange(T).expand(B, T) != L - 1
        mask = mask | (torch.arange(B)[:, None] == 0)  # the first text has no padding, the others end in one [PAD]
        parts = _parts(D, generator)
        hints = _row_hints(B, T, L, D) | {(B, D): "This is one token of each row. Return all T."}
        for last in (False, True):
            parts = SimpleNamespace(**vars(parts) | {"last": last})
            raw = attempt(x, mask, L, SimpleNamespace(**vars(parts) | {"experts": dict(parts.experts)}))
            answers.append(attempt.tensor(raw, (B, T, D), symbols="(B, T, D)", shapes=hints))
            cases.append((x, L, last, mask, parts))

    def blocks(**options: str) -> Tensor:
        return torch.cat([_block(*case, **options).flatten() for case in cases])

    detail = _first_wrong(answers, [_block(*case) for case in cases], cases)
    got = torch.cat([answer.flatten() for answer in answers])
    often = [slip for slip in _BLOCK_SLIPS if slip[:2] in _OFTEN]
    known = itertools.chain(variants(blocks, _BLOCK_SLIPS, at_once=1), variants(blocks, often))
    attempt.compare(got, blocks(), known, detail=detail)
    with torch.enable_grad():
        for name in ("x", "gamma_1", "gamma_2"):
            own = SimpleNamespace(**vars(parts))
            asks = x.clone().requires_grad_() if name == "x" else x
            if name != "x":
                setattr(own, name, getattr(parts, name).clone().requires_grad_())
            attempt.learnable(attempt(asks, mask, L, own), name if name == "x" else f"parts.{name}")
    return f"right for {len(cases)} blocks, {len(cases) // 2} of them among the last F"


def _parts(D: int, generator: torch.Generator) -> SimpleNamespace:
    """All that a block is made of, as functions of tokens (..., D); none of it is learned here."""

    def norm() -> Callable[[Tensor], Tensor]:
        weight, bias = 1 + 0.5 * torch.randn(D, generator=generator), torch.randn(D, generator=generator)
        return lambda tokens: F.layer_norm(tokens, (D,), weight, bias)

    q, k, v = torch.randn(3, D, D, generator=generator)

    def attn(x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D), mask (B, T) -> (B, T, D). Raises RuntimeError for a mask of another shape."""
        scores = x @ q @ (x @ k).transpose(-2, -1) / D
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise RuntimeError(f"`attn` got tokens {tuple(x.shape)} and a mask {tuple(mask.shape)}: hand it one of "
                                   f"shape {tuple(x.shape[:2])}, as you got it")  # fmt: skip
            scores = scores.masked_fill(~mask[:, None].bool(), -1e4)  # finite, where a wrong mask hides everything
        return scores.softmax(dim=-1) @ (x @ v)

    gamma_1, gamma_2 = 0.2 + torch.rand(2, D, generator=generator)
    experts = {name: (norm(), _mlp(D, generator)) for name in ("text", "image", "pair")}
    return SimpleNamespace(norm1=norm(), attn=attn, gamma_1=gamma_1, gamma_2=gamma_2, experts=experts)


def _block(
    x: Tensor, L: int, last: bool, mask: Tensor, parts: SimpleNamespace, *, norm: str = "before", scale: str = "right",
    place: str = "change", second: str = "own", reads: str = "h", keeps: str = "both", look: str = "all",
    hide: str = "mask", **who: str,
) -> Tensor:  # fmt: skip
    """The block's answer (B, T, D). The options make it wrong; those of `who` are about its experts, see `_through`."""
    one = torch.ones_like(parts.gamma_1)
    a, b = parts.gamma_1, parts.gamma_2
    a, b = {"none": (one, one), "no gamma_1": (one, b), "no gamma_2": (a, one), "exchanged": (b, a),
            "gamma_1 twice": (a, a), "gamma_2 twice": (b, b)}.get(scale, (a, b))  # fmt: skip

    def split(experts: Mapping[str, Callable], tokens: Tensor) -> Tensor:
        return _through(tokens, L, last, experts, **who)

    def join(stream: Tensor, change: Tensor, gamma: Tensor, number: str) -> Tensor:
        """The stream plus gamma times the change, or what the options make of it."""
        if keeps in (f"not {number}", "neither"):
            stream = torch.zeros_like(stream)
        if place in ("residual", f"residual {number}"):
            return gamma * stream + change
        if place in ("sum", f"sum {number}"):
            return gamma * (stream + change)
        return stream + change if place in ("inside", f"inside {number}") else stream + gamma * change

    def inside(tokens: Tensor, gamma: Tensor, number: str) -> Tensor:
        return gamma * tokens if place in ("inside", f"inside {number}") else tokens

    def attend(tokens: Tensor) -> Tensor:
        seen = {"nothing": None, "inverted": ~mask, "picture": mask.clone().index_fill_(1, torch.arange(L, x.shape[1]),
                False), "words": mask.clone().index_fill_(1, torch.arange(L), False)}.get(hide, mask)  # fmt: skip
        if look == "separate":
            sides = (tokens[:, :L], mask[:, :L]), (tokens[:, L:], mask[:, L:])
            return torch.cat([parts.attn(*side) for side in sides], dim=1)
        y = torch.zeros_like(tokens) if look == "nowhere" else parts.attn(tokens, seen)
        return y.masked_fill(~mask[..., None], 0) if hide == "output" else y

    norms = {name: own for name, (own, _) in parts.experts.items()}
    mlps = {name: mlp for name, (_, mlp) in parts.experts.items()}
    chosen = {
        "own": norms,
        "text": dict.fromkeys(norms, norms["text"]),
        "text below": norms | {"image": norms["text"]},
        "image": dict.fromkeys(norms, norms["image"]),
        "image below": norms | {"text": norms["image"]},
        "pair": dict.fromkeys(norms, norms["pair"]),
        "norm1": dict.fromkeys(norms, parts.norm1),
        "exchanged": norms | {"text": norms["image"], "image": norms["text"]},
        "own in the last": norms | {"pair": lambda tokens: _through(tokens, L, False, norms)},
    }[second]

    if norm == "post":  # as in BERT
        h = parts.norm1(join(x, attend(inside(x, a, "1")), a, "1"))
        return split(chosen, join(h, split(mlps, inside(h, b, "2")), b, "2"))
    if norm == "of the change":
        h = join(x, parts.norm1(attend(inside(x, a, "1"))), a, "1")
        return join(h, split(chosen, split(mlps, inside(h, b, "2"))), b, "2")
    first = x if norm in ("no norm1", "none") else parts.norm1(x)
    stream = parts.norm1(x) if norm in ("stream 1", "stream") else x
    y = attend(inside(first, a, "1"))
    h = join(stream, y, a, "1")
    whole = {}
    for name, mlp in mlps.items():
        own = chosen[name] if norm not in ("no norm2", "none") else lambda tokens: tokens
        whole[name] = lambda tokens, own=own, mlp=mlp: mlp(inside(own(tokens), b, "2"))
    change = split(whole, {"x": x, "y": y}.get(reads, h))
    stream = _through(h, L, last, chosen) if norm in ("stream 2", "stream") else h
    return join(x if keeps == "x" else stream, change, b, "2")


# Two mistakes at once are looked for among these alone: all pairs would take seconds.
_OFTEN = {
    ("norm", "post"), ("norm", "no norm1"), ("norm", "no norm2"), ("norm", "none"), ("scale", "none"),
    ("scale", "no gamma_1"), ("scale", "no gamma_2"), ("second", "text"), ("second", "text below"), ("reads", "x"),
    ("look", "separate"), ("hide", "nothing"), ("to", "swapped"), ("to", "pair"), ("when", "never"), ("cut", "late"),
}  # fmt: skip
_BLOCK_SLIPS = [
    Slip("norm", "post", "your LayerNorms come after the sums, as in BERT. VLMo is pre-norm: what attention and the "
         "MLP *read* is normalised, the stream itself never is."),
    Slip("norm", "of the change", "you normalise what attention and the MLP give. Normalise what they *read*."),
    Slip("norm", "no norm1", "`norm1` is missing: attention reads norm1(x)."),
    Slip("norm", "no norm2", "the experts' LayerNorms are missing: an MLP reads norm(h), with the norm of its own "
         "expert."),
    Slip("norm", "none", "all LayerNorms are missing: attention reads norm1(x), and an MLP norm(h)."),
    Slip("norm", "stream 1", "the stream is normalised, too: you add attention's answer to norm1(x). Add it to x "
         "itself."),
    Slip("norm", "stream 2", "the stream is normalised, too: you add the expert's answer to norm(h). Add it to h "
         "itself."),
    Slip("norm", "stream", "the stream itself is normalised, twice. Only what attention and the MLP read is: add to x "
         "and h as they are."),
    Slip("scale", "none", "the layer scales are forgotten: multiply attention's answer by `gamma_1`, the expert's by "
         "`gamma_2`."),
    Slip("scale", "no gamma_1", "`gamma_1` is forgotten: multiply attention's answer by it."),
    Slip("scale", "no gamma_2", "`gamma_2` is forgotten: multiply the expert's answer by it."),
    Slip("scale", "exchanged", "`gamma_1` and `gamma_2` are exchanged: the first is attention's, the second the "
         "expert's."),
    Slip("scale", "gamma_1 twice", "you use `gamma_1` twice. The expert's answer has `gamma_2`."),
    Slip("scale", "gamma_2 twice", "you use `gamma_2` twice. Attention's answer has `gamma_1`."),
    Slip("place", "residual", "the layer scales stand at the stream. They scale what is *added* to it: "
         "x + gamma * change."),
    Slip("place", "residual 1", "`gamma_1` stands at x. It scales attention's answer: x + gamma_1 * ..."),
    Slip("place", "residual 2", "`gamma_2` stands at h. It scales the expert's answer: h + gamma_2 * ..."),
    Slip("place", "sum", "the layer scales stand before the whole sums. They scale what is added alone: "
         "x + gamma * change."),
    Slip("place", "sum 1", "`gamma_1` stands before the whole sum. It scales attention's answer alone."),
    Slip("place", "sum 2", "`gamma_2` stands before the whole sum. It scales the expert's answer alone."),
    Slip("place", "inside", "the layer scales are applied to what attention and the MLP read. They scale the "
         "*answers*."),
    Slip("place", "inside 1", "`gamma_1` is applied to what attention reads. It scales its *answer*."),
    Slip("place", "inside 2", "`gamma_2` is applied to what the MLP reads. It scales its *answer*."),
    Slip("second", "text", 'all tokens go through one LayerNorm, that of "text". Each expert has its own, in front of '
         "its MLP."),
    Slip("second", "text below", 'the picture\'s tokens go through the LayerNorm of "text". Each expert has its own, '
         "in front of its MLP."),
    Slip("second", "image", 'all tokens go through one LayerNorm, that of "image". Each expert has its own, in front '
         "of its MLP."),
    Slip("second", "image below", 'the words go through the LayerNorm of "image". Each expert has its own, in front '
         "of its MLP."),
    Slip("second", "pair", 'all tokens go through one LayerNorm, that of "pair". Each expert has its own, in front of '
         "its MLP."),
    Slip("second", "norm1", "`norm1` is used twice. It is attention's; each expert has a LayerNorm of its own, in "
         "front of its MLP."),
    Slip("second", "exchanged", 'the LayerNorms of "text" and "image" are exchanged, but not their MLPs. An expert is '
         "both together."),
    Slip("second", "own in the last", 'in the last F blocks, the MLP is that of "pair", but the LayerNorms are those '
         'of "text" and "image". An expert is both together.'),
    Slip("reads", "x", "the MLP reads x. It comes second, and reads h, what attention has made of x."),
    Slip("reads", "y", "the MLP reads attention's answer alone. It reads h, the stream to which that was added."),
    Slip("keeps", "x", "the expert's answer is added to x, and what attention has added is lost. Add it to h."),
    Slip("keeps", "not 1", "the first sum is missing: h = x + gamma_1 * ..."),
    Slip("keeps", "not 2", "the second sum is missing: y = h + gamma_2 * ..."),
    Slip("keeps", "neither", "both sums are missing. Attention and the expert only *add* to the stream: "
         "h = x + gamma_1 * ..., y = h + gamma_2 * ..."),
    Slip("look", "separate", "words look at words alone, and patches at patches (late fusion). There is one attention "
         "for the whole row: that is where the two meet. Only the experts are separate."),
    Slip("look", "nowhere", "attention is missing: h = x + gamma_1 * attn(norm1(x), mask)."),
    Slip("hide", "nothing", "`mask` is not used, so that every token looks at the padding: attn(..., mask)."),
    Slip("hide", "inverted", "the mask is the wrong way round. True means \"may be looked at\": hand it on as it is."),
    Slip("hide", "output", "you set what attention tells the padding to 0. The mask is about who may be *looked at*: "
         "hand it on, attn(..., mask), and leave its answer."),
    Slip("hide", "picture", "the picture is masked: all tokens look at words alone. Hand the mask on as it is."),
    Slip("hide", "words", "the words are masked: all tokens look at the picture alone. Hand the mask on as it is."),
    *_WHO_SLIPS,
]  # fmt: skip
