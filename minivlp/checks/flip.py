"""Checks for the exercises of lesson 04 (`notebooks/04_flip.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks.core import Attempt, Slip, check, reseed, variants

# -------------------------------------------------------------------------------------------------- 1 keep_random

# Pictures, patches, ratio. Ratios are sums of powers of 1/2, so that N * (1 - ratio) is exact.
NOISES = [(4, 14, 0.75), (5, 9, 0.25), (3, 16, 0.5), (2, 7, 0.0)]


@check
def keep_random(attempt: Attempt) -> str:
    """Exercise 1: which patches each picture keeps (FLIP, section 3; MAE's sampling)."""
    for seed, (B, N, ratio) in enumerate(NOISES):
        noise = torch.randn(B, N, generator=torch.Generator().manual_seed(seed))
        K = math.floor(N * (1 - ratio))
        cut = "The first K columns of a sorted table are [:, :K]."
        hints = {
            (B, K + 1): "K is rounded down: a patch is kept whole or not at all.",
            (B, K - 1): "That is one too few.",
            (B, N - K): "That is how many are *removed*: `ratio` is the share of the patches that go.",
            (B, math.floor(N * ratio)): "That is how many are *removed*: `ratio` is the share of the patches that go.",
            (B, N): f"Is this a yes or no for each patch, or the order of all? Return the places of those that stay. "
            f"{cut}",
            (K, N): f"You cut, or sort, along the pictures (dimension 0). {cut}",
            (N, K): f"There must be a row for each of the {B} pictures.",
            (K, B): "Transposed: a row for each picture.",
            (K,): "Every picture needs its own choice: sort each row by itself, argsort(dim=1).",
            (B * K,): "The pictures have run together: a row of K places for each.",
            (B, K, 1): "Drop the last dimension.",
            (B * K, 2): "Are these pairs of picture and place? A row of K places for each picture is wanted.",
        }
        answer = _same_places(attempt, (noise, ratio), K, hints)

        def kept(
            *, order: str = "least", choice: str = "each", dim: int = 1, first: int = 0, noise: Tensor = noise,
            K: int = K,
        ) -> Tensor:  # fmt: skip
            B, N = noise.shape
            noise = {
                "each": noise,
                "first picture's": noise[:1].expand(B, -1),
                "last picture's": noise[-1:].expand(B, -1),
                "mean": noise.mean(0, keepdim=True).expand(B, -1),
                "batch": noise.flatten(),
                "batch, remainder": noise.flatten(),
            }[choice]
            if choice.startswith("batch"):
                places = noise.argsort()[: B * K].view(B, K)
                return places % N if choice.endswith("remainder") else places
            order = {
                "least": lambda: noise.argsort(dim),
                "most": lambda: noise.argsort(dim, descending=True),
                "least, absolute": lambda: noise.abs().argsort(dim),
                "ranks": lambda: noise.argsort(dim).argsort(dim),
                "unused": lambda: torch.arange(N).expand(B, -1),
                "unused, spread": lambda: (torch.arange(K) * N // K).expand(B, -1),
                "middle": lambda: noise.argsort(dim)[:, (N - K) // 2 :],
                "second": lambda: noise.argsort(dim)[:, min(1, N - K) :],
            }[order]()
            return order[:, :K] + first

        _compare_places(attempt, answer, kept(), variants(kept, _KEEP_SLIPS), N)
    return f"right for {len(NOISES)} batches"


def _same_places(attempt: Attempt, args: Sequence[Any], K: int, hints: dict[tuple[int, ...], str]) -> Tensor:
    """The answer to `args`, of which the first is noise (B, N), as whole numbers (B, K). Luck must have no part in it.

    Whether they are places at all is left to `_compare_places`, for they may tell what went wrong.
    """
    noise = args[0]
    answers = []
    for seed in (1, 2):
        reseed(seed)
        answer = attempt(*args)
        if isinstance(answer, (list, tuple)):
            attempt.fail(
                f"the answer must be a torch.Tensor (B, K), but yours is a {type(answer).__name__}. Each row has the "
                f"same number of places, K = {K} here, so that the batch stays a table."
            )
        shape = (len(noise), K)
        floating = isinstance(answer, Tensor) and answer.shape == shape and answer.is_floating_point()
        if floating and torch.isin(answer.detach().float(), noise).all():
            attempt.fail("these are the random numbers themselves. Return the *places* where they stand: argsort, or "
                         "the second thing (`indices`) that sort and topk return.")  # fmt: skip
        answers.append(attempt.tensor(answer, shape, symbols="(B, K)", dtype=torch.long, shapes=hints))
    if not torch.equal(*answers):
        attempt.fail("the same `noise` gave two different answers. Draw nothing yourself: all chance is in `noise`.")
    return answers[0]


def _compare_places(
    attempt: Attempt,
    answer: Tensor,
    expected: Tensor,
    mistakes: Iterable[tuple[str, Tensor]],
    N: int,
    words: Tensor | None = None,
) -> None:
    """Fail unless each row of `answer` (B, K) lists the same places among 0 .. N-1 as `expected`, in any order.

    Where `words` (B, N) is False, there is padding, and one padding is as good as another: it counts as place 2 N.
    """

    def sorted_places(places: Tensor) -> Tensor:
        if words is not None:
            inside = places.clamp(0, N - 1)
            places = torch.where((inside == places) & ~words.gather(1, inside), 2 * N, places)
        return places.sort(dim=1).values

    got, right = sorted_places(answer), sorted_places(expected)
    row = int((got != right).any(dim=1).int().argmax())
    yours, wanted = answer[row].sort().values.tolist(), [place for place in right[row].tolist() if place < N]
    filled = f" and {len(yours) - len(wanted)} of padding" if len(wanted) < len(yours) else ""
    detail = f"Row {row} should hold the places {wanted}{filled}, in any order; yours, sorted, are {yours}."
    if yours[0] < 0 or yours[-1] >= N:
        detail += f" Places run from 0 to {N - 1}."
    elif len(set(yours)) < len(yours):
        detail += " No place may come twice."
    known = ((message, sorted_places(wrong).float()) for message, wrong in mistakes)
    attempt.compare(got.float(), right.float(), known, detail=detail)


_KEEP_SLIPS = [
    Slip("order", "most", "you keep the patches with the *most* noise. Any rule would do for training, but the lesson, "
         "and this check, keep the least: sort upwards and take the first K."),
    Slip("order", "least, absolute", "you compare the noise without its sign. -2 is less than 1."),
    Slip("order", "ranks", "these are ranks: you sorted twice. `noise.argsort(dim=1)` lists places from the least "
         "noise to the most; sorted once more it tells for each place where it stands in that list."),
    Slip("order", "unused", "you keep the first K patches, the top of every picture. Let the noise decide."),
    Slip("order", "unused, spread", "you keep patches at even steps, the same in every picture. Let the noise decide."),
    Slip("order", "middle", "you keep those in the middle of the order. Take the first K."),
    Slip("order", "second", "you leave out the patch with the least noise, as if it were the class token. There is "
         "none among these: it is put in front later."),
    Slip("choice", "first picture's", "all pictures lose the same patches, those of the first picture. Sort each row "
         "by itself: argsort(dim=1)."),
    Slip("choice", "last picture's", "all pictures lose the same patches, those of the last picture. Sort each row by "
         "itself: argsort(dim=1)."),
    Slip("choice", "mean", "all pictures lose the same patches: you averaged the noise over the batch. Sort each row "
         "by itself: argsort(dim=1)."),
    Slip("choice", "batch", "you sort the noise of the whole batch at once. Sort each row by itself: argsort(dim=1)."),
    Slip("choice", "batch, remainder", "you sort the noise of the whole batch at once, so that a picture may get "
         "another one's places. Sort each row by itself: argsort(dim=1)."),
    Slip("dim", 0, "you sort along the wrong dimension: over the batch, each place by itself. Sort each row: "
         "argsort(dim=1)."),
    Slip("first", 1, "places are counted from 0, yours from 1. The class token is not among the patches yet."),
]  # fmt: skip

# --------------------------------------------------------------------------------------------------- 2 embed_kept


@check
def embed_kept(attempt: Attempt) -> str:
    """Exercise 2: the kept patches as tokens, each with the position of its place (FLIP, section 3)."""
    settings = [(3, 10, 4, 7, 6), (2, 12, 3, 5, 8), (2, 6, 6, 4, 3)]  # pictures, patches, kept, values, width
    for seed, (B, N, K, V, D) in enumerate(settings):
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randn(B, N, V, generator=generator)
        weight, bias, positions = (torch.randn(*shape, generator=generator) for shape in ((D, V), (D,), (N, D)))
        keep = torch.rand(B, N, generator=generator).argsort(dim=1)[:, :K]
        args = patches, weight, bias, positions, keep
        take = "Take K of the N patches of each picture: patches.take_along_dim(keep[..., None], dim=1)."
        hints = {
            (B, N, D): "All places are still there. Zeros, or a mask token, in the place of a patch save nothing: the "
            f"blocks would go on computing with N tokens. {take}",
            (B, N - K, D): "These are as many as are removed. `keep` lists the patches that stay.",
            (B, 1 + K, D): "There is one token too many: the class token comes later.",
            (B, N + K, D): "You put the kept tokens beside all others.",
            (B, K, V): "The patches are chosen, but not projected: V numbers each must become D, x @ weight.T + bias.",
            (B, K, 2 * D): "You joined positions and tokens. Add them.",
            (B, 2 * K, D): "You put the positions beside the tokens, as if they were tokens. Add them.",
            (B, B, K, D): f"patches[:, keep] takes everybody's places from every picture. {take}",
            (B, D): "Nothing is averaged here: a token for each kept patch.",
            (K, D): "Every picture has tokens of its own: keep the first dimension.",
            (B * K, D): "The pictures have run together: (B, K, D).",
            (K, B, D): "The batch comes first.",
            (B, D, K): "Transposed: a row of D numbers for each token.",
        }  # fmt: skip
        answer = attempt.tensor(attempt(*args), (B, K, D), symbols="(B, K, D)", shapes=hints)

        def embedded(
            *, both: str = "own", pick: str = "own", pos: str = "own", whose: str = "own", linear: str = "own",
            after: str = "nothing", args: tuple[Tensor, ...] = args,
        ) -> Tensor:  # fmt: skip
            patches, weight, bias, positions, keep = args
            (B, N, _), (K, D) = patches.shape, (keep.shape[1], len(bias))

            def places(which: str, keep: Tensor) -> Tensor:
                return {
                    "own": keep,
                    "first K": torch.arange(K).expand(B, -1),
                    "first picture's": keep[:1].expand(B, -1),
                    "sorted": keep.sort(dim=1).values,
                    "backwards": keep.flip(1),
                    "before": (keep - 1) % N,
                    "ranks": keep.argsort(dim=1),
                }[which]

            keep = places(both, keep)
            at = torch.zeros(B, 1, dtype=torch.long) if whose == "first picture's" else torch.arange(B)[:, None]
            x = patches[at, places(pick, keep)]
            x = x @ weight.T + {"own": 1, "never": 0, "twice": 2, "minus": -1}[linear] * bias
            if after == "relu":
                x = x.relu()
            y = positions[keep if pos in ("never", "twice", "times") else places(pos, keep)]
            x = x * y if pos == "times" else x + {"never": 0, "twice": 2}.get(pos, 1) * y
            if after == "norm":
                return F.layer_norm(x, (D,))
            return {"root": x / D**0.5, "unit": F.normalize(x, dim=-1)}.get(after, x)

        attempt.compare(answer, embedded(), variants(embedded, _EMBED_SLIPS))

    with torch.enable_grad():
        for place, name in enumerate(("weight", "bias", "positions"), start=1):
            asked = [x.clone().requires_grad_(i == place) if i < 4 else x for i, x in enumerate(args)]
            attempt.learnable(attempt(*asked), name)
    return f"right for {len(settings)} batches, and gradients flow"


_EMBED_SLIPS = [
    Slip("pos", "first K", "the kept patches get the positions of the first K places. So the tower would take the 57th "
         "patch for the second: each has the position of its place in the whole picture, positions[keep]."),
    Slip("pos", "never", "the positions are missing: what is left would be a bag of patches. Add positions[keep]."),
    Slip("pos", "first picture's", "all pictures get the positions that the first picture kept. Index with the whole "
         "table: positions[keep] is (B, K, D)."),
    Slip("pos", "sorted", "the positions are sorted and the patches are not, so they do not belong together. Use the "
         "same `keep` for both."),
    Slip("pos", "before", "every patch gets the position of the place before its own. There is no class token in "
         "`positions`: positions[keep]."),
    Slip("pos", "ranks", "you sort `keep` once more and use the ranks. The places are in `keep` itself: "
         "positions[keep]."),
    Slip("pos", "twice", "the positions are added twice."),
    Slip("pos", "times", "you multiply by the positions. Add them."),
    Slip("pick", "first K", "you take the first K patches, the top of every picture, with the positions of the others. "
         "Take those that `keep` lists."),
    Slip("pick", "first picture's", "you take the patches that the *first* picture keeps from all of them. Each "
         "picture has its own row of `keep`."),
    Slip("pick", "sorted", "the patches are sorted and the positions are not, so they do not belong together. Use the "
         "same `keep` for both."),
    Slip("pick", "before", "you take the patch before each of those that `keep` lists. Places count from 0."),
    Slip("both", "first K", "you keep the first K patches of every picture: `keep` is not used. It lists the places to "
         "take, and they differ from picture to picture."),
    Slip("both", "first picture's", "all pictures keep what the first picture keeps. Each has its own row of `keep`."),
    Slip("both", "sorted", "the tokens are right, but in another order (a mask, such as patches[mask], sorts them). "
         "Token k is the patch at place keep[:, k]."),
    Slip("both", "backwards", "the tokens are right, but in the opposite order. Token k is the patch at place "
         "keep[:, k]."),
    Slip("both", "ranks", "you sort `keep` once more and use the ranks. The places are in `keep` itself."),
    Slip("whose", "first picture's", "all patches come from the first picture. Take each picture's own: "
         "patches[torch.arange(B)[:, None], keep], or take_along_dim."),
    Slip("linear", "never", "the bias is missing: x @ weight.T + bias."),
    Slip("linear", "twice", "the bias is added twice."),
    Slip("linear", "minus", "the bias is subtracted."),
    Slip("after", "norm", "you normalise the tokens. CLIP has a LayerNorm before its blocks; FLIP has none."),
    Slip("after", "relu", "there is no activation after the projection."),
    Slip("after", "root", "you divide by the root of D. That belongs to attention."),
    Slip("after", "unit", "you bring the tokens to length 1. That belongs to the shared space, at the other end of the "
         "tower."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ 3 relative_time

# ratio, patches, values, width, depth, text_cost. First ViT-L/16 with its text tower, as in the paper's Table 1a; then
# narrow towers, where attention and the embedding count, and numbers of patches that do not come out even.
_L16_TEXT = 12 * (12 * 32 * 768**2 + 2 * 32**2 * 768)
TOWERS = [(0.5, 196, 768, 1024, 24, _L16_TEXT), (0.75, 196, 768, 1024, 24, _L16_TEXT),
          (0.5, 49, 3072, 64, 3, 3_000_000), (0.75, 50, 48, 32, 2, 300_000), (0.25, 64, 192, 128, 4, 2_000_000),
          (0.5, 256, 27, 16, 5, 0), (0.0, 64, 192, 128, 4, 2_000_000)]  # fmt: skip


@check
def relative_time(attempt: Attempt) -> str:
    """Exercise 3: what a step costs when part of the patches is left out, relative to whole pictures."""
    answers, calls = [], []
    for tower in TOWERS:
        call = f"relative_time({', '.join(map(str, tower))})"
        answer = attempt(*tower)
        if isinstance(answer, bool) or not isinstance(answer, Real):
            attempt.fail(f"{call} must be a number (float), yours is of type {type(answer).__name__}.")
        if not math.isfinite(answer):
            attempt.fail(f"{call} is not finite (a division by 0?).")
        answers.append(float(answer))
        calls.append(call)
    got, expected = torch.tensor(answers, dtype=torch.float64), _times()
    first = int(((got - expected).abs() > 1e-6 * expected).int().argmax())
    detail = f"{calls[first]} should be {expected[first]:.6f}, yours is {answers[first]:.6g}."
    attempt.compare(got, expected, variants(_times, _TIME_SLIPS), atol=0, rtol=1e-6, detail=detail)
    return f"right for {len(calls)} cases: ViT-L/16 without half of its patches takes {got[0]:.3f} of the time"


def _times(**slips: Any) -> Tensor:
    return torch.tensor([_time(*tower, **slips) for tower in TOWERS], dtype=torch.float64)


def _time(
    ratio: float, patches: int, values: int, width: int, depth: int, text_cost: float, *, kept: str = "floor",
    token: str = "never removed", linear: str = "12 D^2", attention: str = "T^2", blocks: str = "all",
    embed: str = "kept", text: str = "both", unit: int = 1, back: str = "relative",
) -> float:  # fmt: skip
    """The relative time with every way to go wrong."""

    def image_cost(ratio: float) -> float:
        exact = patches * (1 - ratio)
        K = {"floor": math.floor(exact), "exact": exact, "up": math.ceil(exact), "removed": patches - math.floor(exact),
             "all": patches}[kept]  # fmt: skip
        if kept == "removed" and not ratio:
            K = patches
        T, whole = K + 1, patches + 1
        if token == "removed":
            T = math.floor(whole * (1 - ratio))
        elif token == "never there":
            T, whole = K, patches
        elif token == "whole alone" and ratio:
            T = K
        elif token == "kept alone" and not ratio:
            T, whole = K, patches
        tokens = {"12 D^2": 12 * T * width**2, "8 D^2": 8 * T * width**2, "4 D^2": 4 * T * width**2,
                  "9 D^2": 9 * T * width**2, "12 D": 12 * T * width, "1 D^2": T * width**2, "none": 0,
                  "whole": 12 * whole * width**2}[linear]  # fmt: skip
        pairs = {"T^2": 2 * T**2 * width, "none": 0, "T": 2 * T * width, "half": T**2 * width, "no width": 2 * T**2,
                 "all keys": 2 * T * whole * width, "whole": 2 * whole**2 * width,
                 "D^2": 2 * T**2 * width**2}[attention]  # fmt: skip
        start = {"kept": K * values * width, "all": patches * values * width, "none": 0, "tokens": T * values * width,
                 "no width": K * values, "width twice": K * width * width,
                 "in each block": depth * K * values * width}[embed]  # fmt: skip
        tower = {"all": depth * (tokens + pairs), "one": tokens + pairs, "attention once": depth * tokens + pairs,
                 "linear once": tokens + depth * pairs}[blocks]  # fmt: skip
        return unit * (start + tower)

    whole, masked = image_cost(0.0), image_cost(ratio)
    more, less = {
        "both": (text_cost, text_cost),
        "masked": (text_cost, text_cost * (1 - ratio)),
        "never": (0, 0),
        "masked alone": (0, text_cost),
        "whole alone": (text_cost, 0),
        "twice": (2 * text_cost, 2 * text_cost),
        "times depth": (depth * text_cost, depth * text_cost),
    }[text]
    found = (masked + less) / (whole + more)
    rule = ((1 - ratio) * whole + less) / (whole + more)
    return {"relative": found, "speed-up": 1 / found, "saved": 1 - found, "per cent": 100 * found,
            "cost": masked + less, "rule of thumb": rule, "1 - r": 1 - ratio, "squared": (1 - ratio) ** 2,
            "K / N": math.floor(patches * (1 - ratio)) / patches}[back]  # fmt: skip


_TIME_SLIPS = [
    Slip("kept", "exact", "K is not rounded: no picture has 24.5 patches. Round N * (1 - ratio) down."),
    Slip("kept", "up", "K is rounded up. Round N * (1 - ratio) down."),
    Slip("kept", "removed", "you count the patches that are *removed*: K = floor(N * (1 - ratio)) stay."),
    Slip("kept", "all", "nothing is saved: the ratio is not used, or only K is missing from your cost."),
    Slip("token", "never there", "the class token is forgotten: T = 1 + K tokens go through the blocks."),
    Slip("token", "removed", "you take the ratio of all 1 + N tokens. The class token is never removed: T = 1 + K."),
    Slip("token", "whole alone", "the class token is counted for whole pictures, but not for those with patches left "
         "out: T = 1 + K there, too."),
    Slip("token", "kept alone", "the class token is counted for pictures with patches left out, but not for whole "
         "ones: T = 1 + N there."),
    Slip("linear", "8 D^2", "only the MLP's 8 T D^2 are there. Queries, keys, values and the output cost another "
         "4 T D^2."),
    Slip("linear", "4 D^2", "only attention's projections, 4 T D^2, are there. The MLP costs another 8 T D^2."),
    Slip("linear", "9 D^2", "this is 9 T D^2: did you count queries, keys and values as one matrix, or leave them out "
         "in part? With the output and the MLP it is 12 T D^2."),
    Slip("linear", "12 D", "the width is not squared in 12 T D^2."),
    Slip("linear", "1 D^2", "this is T D^2 for a block. There are twelve times as many: 12 T D^2."),
    Slip("linear", "none", "the linear part, 12 T D^2, is missing. It is the larger part by far."),
    Slip("linear", "whole", "the linear part is computed with all 1 + N tokens in both cases. What is removed does not "
         "go through the blocks: T = 1 + K."),
    Slip("attention", "none", "attention's square, 2 T^2 D, is forgotten. This is why a tower saves somewhat more than "
         "the ratio says."),
    Slip("attention", "T", "attention grows with T *squared*: every token looks at every other, 2 T^2 D."),
    Slip("attention", "half", "this is T^2 D. Attention multiplies twice: queries with keys, and weights with values."),
    Slip("attention", "no width", "D is missing in 2 T^2 D: each product of a query with a key sums over all numbers."),
    Slip("attention", "all keys", "the kept tokens still look at all 1 + N. What is removed is gone, on the side of "
         "the keys, too: T^2."),
    Slip("attention", "whole", "attention is computed with all 1 + N tokens in both cases. What is removed is gone: "
         "T = 1 + K."),
    Slip("attention", "D^2", "this is 2 T^2 D^2. Attention costs 2 T^2 D: D numbers for each pair of tokens."),
    Slip("blocks", "one", "this is one block. There are L of them: multiply by `depth`."),
    Slip("blocks", "attention once", "attention is counted once for the tower. Each of the L blocks has it: the depth "
         "multiplies the sum of both parts."),
    Slip("blocks", "linear once", "the linear part is counted once for the tower. Each of the L blocks has it: the "
         "depth multiplies the sum of both parts."),
    Slip("embed", "all", "all N patches are embedded, and some dropped after that. Only the kept ones need it: K V D."),
    Slip("embed", "none", "the patch embedding, K V D, is missing."),
    Slip("embed", "tokens", "the patch embedding counts the class token, too. It is no patch: K V D, not T V D."),
    Slip("embed", "no width", "D is missing in the patch embedding: K V D."),
    Slip("embed", "width twice", "the patch embedding turns V values into D numbers, so it costs K V D, not K D D."),
    Slip("embed", "in each block", "the patch embedding is counted in each block. It happens once, before them."),
    Slip("text", "masked", "the text's cost shrinks with the ratio in your model. Only pictures lose something here: "
         "the same `text_cost` on both sides."),
    Slip("text", "never", "the text tower is forgotten: it costs `text_cost` in both cases. This is what keeps 75 % "
         "from being four times as fast."),
    Slip("text", "masked alone", "the text's cost is missing for whole pictures: add it above and below the line."),
    Slip("text", "whole alone", "the text's cost is missing for pictures with patches left out: add it above and below "
         "the line."),
    Slip("text", "twice", "the text's cost is counted twice."),
    Slip("text", "times depth", "the text's cost is multiplied by the depth of the image tower. `text_cost` is the "
         "whole text tower."),
    Slip("unit", 2, "you count multiplication and addition as two. `text_cost` counts each pair as one, so both would "
         "not fit together: multiply-adds everywhere."),
    Slip("back", "speed-up", "this is how many times as *fast*. Wanted is the relative time, 1 / that."),
    Slip("back", "saved", "this is the share that is *saved*. Wanted is the share that is left, 1 - that."),
    Slip("back", "per cent", "this is in per cent. Return a share."),
    Slip("back", "cost", "this is the cost itself. Divide by the cost of whole pictures (ratio 0)."),
    Slip("back", "rule of thumb", "this is the rule of thumb, with an image tower whose cost is exactly 1 - ratio. "
         "Count tokens instead: T = 1 + K, and attention grows with T squared."),
    Slip("back", "1 - r", "this is 1 - ratio. The class token, attention and the text change that: count them."),
    Slip("back", "squared", "this is (1 - ratio) squared, as if all cost was attention and there was no text."),
    Slip("back", "K / N", "this is the share of the patches that stay. The class token, attention and the text change "
         "that: count them."),
]  # fmt: skip

# --------------------------------------------------------------------------------------------------- 4 keep_words

# Places for tokens, ratio, and how many of the places each text needs. Some texts have fewer words than are kept.
CAPTIONS = [(18, 0.625, (13, 8, 10, 4, 13)), (12, 0.5, (12, 7, 3, 9)), (15, 0.75, (6, 15, 1, 10, 8, 2))]


@check
def keep_words(attempt: Attempt) -> str:
    """Exercise 4: which tokens of a text stay, padding removed first (FLIP, Table 1c)."""
    for seed, (L, ratio, counts) in enumerate(CAPTIONS):
        # With this luck no two slips give the same tokens in the first batch.
        noise = torch.rand(len(counts), L, generator=torch.Generator().manual_seed(30 + seed))
        words = torch.arange(L) < torch.tensor(counts)[:, None]
        B, K = len(counts), math.floor(L * (1 - ratio))
        same = "Each text keeps K = floor(L * (1 - ratio)) tokens, where L counts all places, padding too."
        hints = {
            (B, K + 1): "That is one too many: K is rounded down, and the first token is one of the K.",
            (B, K - 1): "That is one too few: the first token is one of the K, beside K - 1 others.",
            (B, L - K): "That is how many are *removed*: `ratio` is the share of the tokens that go.",
            (B, math.floor(max(counts) * (1 - ratio))): f"Did you count the words of the longest text? {same}",
            (B, math.floor(min(counts) * (1 - ratio))): f"Did you count the words of the shortest text? {same}",
            (B, L): "Is this a yes or no for each token, or the order of all? Return the places of the K that stay.",
            (K, L): "You cut, or sort, along the texts (dimension 0). The first K columns are [:, :K].",
            (K, B): "Transposed: a row for each text.",
            (K,): "Every text needs its own choice: sort each row by itself, argsort(dim=1).",
            (B * K,): "The texts have run together: a row of K places for each.",
            (B, K, 1): "Drop the last dimension.",
        }
        answer = _same_places(attempt, (noise, words, ratio), K, hints)

        def kept(
            *, padding: str = "goes first", first: str = "stays", by: str = "least", choice: str = "each",
            start: int = 0, noise: Tensor = noise, words: Tensor = words, K: int = K,
        ) -> Tensor:  # fmt: skip
            B, L = noise.shape
            last = words.sum(1) - 1  # (B,)
            if choice == "first text's noise":
                noise = noise[:1].expand(B, -1)
            if choice == "first text's padding":
                words = words[:1].expand(B, -1)
            key = {"most": 1 - noise, "unused": (torch.arange(L) / L).expand(B, -1),
                   "unused, backwards": 1 - (torch.arange(L) / L).expand(B, -1)}.get(by, noise)  # fmt: skip
            key = key + {"goes first": 1, "as words": 0, "stays": -1, "half": 0.5}[padding] * (~words).float()
            if first != "as others":
                place = last[:, None] if first == "the last word" else torch.zeros(B, 1, dtype=torch.long)
                key = key.scatter(1, place, 9.0 if first == "goes" else -9.0)
            order = key.argsort(dim=1, descending=by == "descending")
            if by == "ranks":
                order = order.argsort(dim=1)
            if choice == "first text's places":
                order = order[:1].expand(B, -1)
            return order[:, :K] + start

        _compare_places(attempt, answer, kept(), variants(kept, _WORD_SLIPS), L, words)
        if (answer.sort(dim=1).values.diff(dim=1) == 0).any():
            attempt.fail("a place comes twice in a row. What fills up a short text must be padding, each place once.")
        if (answer[:, 0] != 0).any():
            row = int((answer[:, 0] != 0).int().argmax())
            attempt.fail(
                "the right tokens stay, but the first token must come first in each row: its state will speak for the "
                f"text, and the tower looks for it at place 0 of what is left. Row {row} begins with {answer[row, 0]}."
            )
    return f"right for {sum(len(counts) for _, _, counts in CAPTIONS)} texts"


_WORD_SLIPS = [
    Slip("padding", "as words", "padding is treated like words: this is the paper's \"random\" masking, and a short "
         "text loses words although it has padding to give. Add something to the noise at padding, so that it is "
         "sorted to the end."),
    Slip("padding", "stays", "you keep padding and remove words. `words` is False at padding: there the noise must "
         "become larger than at any word; noise * words makes it 0, the least of all."),
    Slip("padding", "half", "what you add at padding is too small: a word with much noise can still go before padding "
         "with little. The noise reaches up to 1, so add at least 1."),
    Slip("first", "as others", "the first token can be removed like any other. It will speak for the text: it must "
         "stay. Give it less noise than all others."),
    Slip("first", "goes", "the first token is always removed. It will speak for the text: give it less noise than all "
         "others, not more."),
    Slip("first", "the last word", "you protect the last word. CLIP reads a text at its end; FLIP's text tower looks "
         "in both directions, and is read at its first token."),
    Slip("by", "most", "of the words you keep those with the *most* noise. Keep those with the least."),
    Slip("by", "descending", "you sort downwards, so padding, which has the most, comes first, and the first token "
         "last. Sort upwards."),
    Slip("by", "unused", "you keep the first words of each text: that cuts off its end every time. Let the noise "
         "decide."),
    Slip("by", "unused, backwards", "you keep the last words of each text. Let the noise decide."),
    Slip("by", "ranks", "these are ranks: you sorted twice. `argsort(dim=1)` lists places from the least noise to the "
         "most; sorted once more it tells for each place where it stands in that list."),
    Slip("choice", "first text's noise", "all texts are sorted by the noise of the first one. Sort each row by its "
         "own."),
    Slip("choice", "first text's padding", "you use the padding of the first text for all. Each text has its own row "
         "of `words`."),
    Slip("choice", "first text's places", "all texts keep the places that the first one keeps. Sort each row by "
         "itself: argsort(dim=1)."),
    Slip("start", 1, "places are counted from 0, yours from 1."),
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------- 5 ensemble


@check
def ensemble(attempt: Attempt) -> str:
    """Exercise 5: the mean of complementary views, at test time (FLIP, Table 1d)."""
    settings = [(3, 4, 4), (4, 6, 3), (2, 4, 2), (2, 3, 1)]  # pictures, side of the grid, parts
    E = 5
    with torch.enable_grad():
        for seed, (B, side, parts) in enumerate(settings):
            eye, images, noise = _watched(seed, B, side, E)
            hints = {
                (parts, B, E): "That is a vector for each view. Take the mean over the views.",
                (B, parts, E): "That is a vector for each view. Take the mean over the views.",
                (B * parts, E): "That is a vector for each view. Take the mean over the views of each picture.",
                (B, parts * E): "You put the views' vectors side by side. Take their mean.",
                (parts, E): "You averaged over the pictures. Take the mean over the views.",
                (E,): "You averaged over the pictures, too. Each has a vector of its own.",
                (B,): "Is this a length? Every picture needs a vector.",
                (B, 1, E): "Drop the dimension of length 1.",
                (1, B, E): "Drop the dimension of length 1.",
                (B, B): "Are these similarities? Return the vectors.",
                (B, side * side // parts): "These are places. Show them to `encode`.",
            }
            raw = attempt(eye, images, noise, parts)
            answer = attempt.tensor(raw, (B, E), symbols="(B, E)", shapes=hints)
            _complementary(attempt, eye, noise, parts)
            views = noise.argsort(dim=1).chunk(parts, dim=1)
            with torch.no_grad():
                vectors = torch.stack([eye.look(images, keep) for keep in views])  # (parts, B, E)

            def joined(*, mean: str = "mean", end: str = "length", vectors: Tensor = vectors) -> Tensor:
                x = {
                    "mean": lambda v: v.mean(0),
                    "sum": lambda v: v.sum(0),
                    "median": lambda v: v.median(0).values,
                    "max": lambda v: v.amax(0),
                    "product": lambda v: v.prod(0),
                    "first": lambda v: v[0],
                    "last": lambda v: v[-1],
                    "all but first": lambda v: v[1:].sum(0) if len(v) > 1 else v[0],
                    "all but last": lambda v: v[:-1].sum(0) if len(v) > 1 else v[0],
                    "halving": lambda v: _fold(v, lambda a, b: (a + b) / 2),
                    "length each time": lambda v: _fold(v, lambda a, b: F.normalize(a + b, dim=-1)),
                    "pictures": lambda v: v.mean((0, 1)).expand_as(v[0]),
                }[mean](vectors)
                return {
                    "length": lambda: F.normalize(x, dim=-1),
                    "never": lambda: x,
                    "over the batch": lambda: F.normalize(x, dim=0),
                    "whole": lambda: x / x.norm(),
                    "squared": lambda: x / x.square().sum(-1, keepdim=True),
                    "absolute": lambda: F.normalize(x, p=1, dim=-1),
                    "largest": lambda: F.normalize(x, p=math.inf, dim=-1),
                    "softmax": lambda: x.softmax(-1),
                }[end]()

            lengths = answer.norm(dim=1)
            detail = ""
            if (lengths - 1).abs().max() > 1e-4:
                detail = f"Every row must have length 1; yours have {lengths.min():.3f} .. {lengths.max():.3f}."
            attempt.compare(answer, joined(), variants(joined, _ENSEMBLE_SLIPS), detail=detail)
            if raw.requires_grad:
                attempt.fail(
                    "the numbers are right, but the answer carries the history of all views with it, for a backward "
                    "pass that never comes, and that costs memory. Nothing is trained here: call `encode` inside "
                    "`with torch.no_grad():`."
                )
        _uneven(attempt, *_watched(0, 2, 4, E))
    return f"right with {', '.join(str(parts) for _, _, parts in settings)} views of a picture"


def _fold(vectors: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = join(total, vector)
    return total


def _watched(seed: int, B: int, side: int, E: int) -> tuple[_Eye, Tensor, Tensor]:
    """An image tower, pictures (B, 3, side, side) of which each pixel is a patch, and noise (B, side * side)."""
    reseed(seed)
    images = torch.randn(B, 3, side, side)
    return _Eye(images, E), images, torch.rand(B, side * side)


class _Eye(nn.Module):
    """Stands for `model.encode_image`, and remembers which patches of which picture it was shown."""

    def __init__(self, images: Tensor, E: int) -> None:
        super().__init__()
        self.images = images.clone()
        self.N = images[0, 0].numel()
        self.project = nn.Linear(images.shape[1], E)
        self.positions = torch.randn(self.N, E)
        self.seen: list[list[list[int]]] = [[] for _ in images]

    def look(self, images: Tensor, keep: Tensor) -> Tensor:
        """images (b, 3, side, side), keep (b, k) -> vectors of length 1, (b, E)."""
        x = self.project(images.flatten(2).transpose(1, 2)) + self.positions  # (b, N, E)
        return F.normalize(x.take_along_dim(keep[..., None], dim=1).mean(dim=1).pow(3), dim=-1)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """As `look`. Raises RuntimeError, as PyTorch would, for what cannot be looked at."""
        if not isinstance(images, Tensor) or images.shape[1:] != self.images.shape[1:]:
            raise RuntimeError("`encode` takes pictures (B, C, H, W) first, and then `keep` (B, k)")
        same = (images[:, None] == self.images).flatten(2).all(dim=2)  # (b, B)
        if not same.any(dim=1).all():
            raise RuntimeError("`encode` got pictures that are not those you were given. Leave them as they are, and "
                               "name the patches to look at in `keep`")  # fmt: skip
        if keep is None:
            keep = torch.arange(self.N).expand(len(images), -1)
        if not isinstance(keep, Tensor) or keep.dtype != torch.long or keep.ndim != 2 or len(keep) != len(images):
            got = f"{tuple(keep.shape)}, {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
            raise RuntimeError(f"`encode` needs `keep` (B, k), the places to look at, as whole numbers; it got {got}")
        rows = keep.tolist()
        if any(not 0 <= place < self.N for row in rows for place in row):
            raise RuntimeError(f"`encode` got places outside of 0 .. {self.N - 1} in `keep`")
        for picture, row in zip(same.int().argmax(dim=1).tolist(), rows, strict=True):
            self.seen[picture].append(row)
        return self.look(images, keep)


def _complementary(attempt: Attempt, eye: _Eye, noise: Tensor, parts: int) -> None:
    """Fail unless each picture was seen in `parts` views: pieces of the order of `noise`, every patch in one."""
    N = noise.shape[1]
    size = N // parts
    for picture, views in enumerate(eye.seen):
        if parts > 1 and any(len(view) == N for view in views):
            attempt.fail(
                f"`encode` got whole pictures, all {N} patches of them. Give it the views alone, {size} patches each."
            )
        if not views:
            attempt.fail(f"`encode` was never shown picture {picture}. Each picture is encoded in {parts} views.")
        if len(views) == 1 and parts > 1:
            attempt.fail(f"every picture is seen in one view only. Encode all {parts} pieces, and take the mean.")
        wrong = next((len(view) for view in views if len(view) != size), None)
        if wrong is not None:
            attempt.fail(
                f"a view has {wrong} of the {N} patches. With parts={parts} the order is cut into {parts} equal pieces "
                f"of N / parts = {size}."
            )
        if len(views) != parts:
            attempt.fail(f"picture {picture} is seen in {len(views)} views instead of parts={parts}. Encode each piece "
                         "once.")  # fmt: skip
        sets = [set(view) for view in views]
        if parts > 1 and all(s == sets[0] for s in sets):
            attempt.fail(f"all {parts} views of a picture are the same {size} patches, so their mean says nothing new. "
                         "Give each view its own piece of the order.")  # fmt: skip
        seen = set().union(*sets)
        if len(seen) < N:
            attempt.fail(
                f"the views overlap: of {N} patches of picture {picture} only {len(seen)} are seen, some of them "
                "several times. Cut *one* random order into pieces, so that every patch is in exactly one."
            )
    order = noise.argsort(dim=1)
    reading = torch.arange(N).expand_as(noise)
    mine = _pieces(eye.seen)
    if mine == _pieces(order.unflatten(1, (parts, size)).tolist()):
        return
    known = {
        "all pictures are cut like the first one: the views of picture 0 are used for all. Sort each row of `noise` "
        "by itself: argsort(dim=1), and give `encode` a row for each picture.": order[:1].expand_as(order),
        "the patches are cut in reading order, stripe by stripe, and `noise` is not used. Cut the order that it gives: "
        "noise.argsort(dim=1).": reading,
        "you take every n-th patch of the picture, and `noise` is not used. Cut the order that it gives: "
        "noise.argsort(dim=1).": reading.unflatten(1, (size, parts)).transpose(1, 2).flatten(1),
        "you take every n-th patch of the random order. These views are complementary, too, but wanted are pieces that "
        "lie together: order.chunk(parts, dim=1).": order.unflatten(1, (size, parts)).transpose(1, 2).flatten(1),
        "you cut the ranks, the order sorted once more. `noise.argsort(dim=1)` lists the places from the least noise "
        "to the most: cut this list.": order.argsort(dim=1),
    }
    for message, wrong in known.items():
        if mine == _pieces(wrong.unflatten(1, (parts, size)).tolist()):
            attempt.fail(message)
    attempt.fail(
        "the views are complementary, but they are not pieces of the order that `noise` gives. Draw nothing yourself: "
        "noise.argsort(dim=1) lists the places from the least noise to the most; cut this list."
    )


def _pieces(views: Sequence[Sequence[Sequence[int]]]) -> list[set[frozenset[int]]]:
    """For each picture its views, in no order, each as the set of its patches."""
    return [{frozenset(view) for view in picture} for picture in views]


def _uneven(attempt: Attempt, eye: _Eye, images: Tensor, noise: Tensor) -> None:
    """Fail unless a number of patches that cannot be cut evenly is refused with a ValueError."""
    N, parts = noise.shape[1], 3
    said = f"{N} patches cannot be cut into {parts} equal pieces, and your function"
    try:
        attempt.function(eye, images, noise, parts)
    except ValueError:
        return
    except Exception as error:
        attempt.fail(f"{said} stops with {type(error).__name__}. Raise a ValueError that says so: if N % parts: raise "
                     "ValueError(...)")  # fmt: skip
    sizes = sorted({len(view) for view in eye.seen[0]})
    attempt.fail(
        f"{said} does not complain: it looks at views of {' and '.join(map(str, sizes))} patches. Raise a ValueError: "
        "if N % parts: raise ValueError(...)"
    )


_ENSEMBLE_SLIPS = [
    Slip("mean", "sum", "you add the views up instead of averaging."),
    Slip("mean", "median", "you take the median over the views. Take the mean."),
    Slip("mean", "max", "you take the largest value over the views. Take the mean."),
    Slip("mean", "product", "you multiply the views. Take the mean."),
    Slip("mean", "first", "only the first view is in your answer. Take the mean over all."),
    Slip("mean", "last", "only the last view is in your answer (does each one overwrite the one before?). Take the "
         "mean over all."),
    Slip("mean", "all but first", "the first view is missing from your mean."),
    Slip("mean", "all but last", "the last view is missing from your mean."),
    Slip("mean", "halving", "you average as you go, (mean + view) / 2, and so the last view counts as much as all "
         "before it. Add all up, and divide once."),
    Slip("mean", "length each time", "you bring the vector to length 1 after each view, and so later views count for "
         "more. Add all up first."),
    Slip("mean", "pictures", "you averaged over the pictures, too, so all have the same vector."),
    Slip("end", "never", "the mean is not brought to length 1 again. A mean of different vectors of length 1 is "
         "shorter, and the scores with texts would shrink with it."),
    Slip("end", "over the batch", "you normalise along the wrong axis, over the batch. Each picture's vector gets "
         "length 1: dim=-1."),
    Slip("end", "whole", "you divide by one length for the whole table. Each picture's vector gets length 1: dim=-1."),
    Slip("end", "squared", "you divide by the squared length. Take its square root."),
    Slip("end", "absolute", "you divide by the sum of absolute values. The length is the square root of the sum of "
         "squares."),
    Slip("end", "largest", "you divide by the largest value. The length is the square root of the sum of squares."),
    Slip("end", "softmax", "you take a softmax over the numbers of a vector. Bring it to length 1."),
]  # fmt: skip
