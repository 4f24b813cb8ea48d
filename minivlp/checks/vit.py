"""Checks for the exercises of lesson 01 (`notebooks/01_vit.ipynb`, section 10).

Each computes the usual wrong answers beside the right one and names the one that equals the learner's. Reading this
file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

from functools import reduce
from itertools import chain
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks.core import Attempt, Slip, check, reseed, variants

# ---------------------------------------------------------------------------------------------- 1 sequence_length

PICTURES = [(224, 224, 16, True), (256, 256, 16, True), (64, 64, 16, True), (64, 96, 16, True), (96, 64, 8, True),
            (384, 384, 32, False), (64, 64, 16, False)]  # fmt: skip


@check
def sequence_length(attempt: Attempt) -> str:
    """Exercise 1: the number of tokens of a picture, as a whole number."""
    answers, calls = [], []
    for height, width, patch, class_token in PICTURES:
        options = {} if class_token else {"class_token": False}
        answer = attempt(height, width, patch, **options)
        call = f"sequence_length({height}, {width}, {patch}{'' if class_token else ', class_token=False'})"
        if isinstance(answer, bool) or not isinstance(answer, Real):
            attempt.fail(f"{call} must be a whole number (int), yours is of type {type(answer).__name__}.")
        answers.append(answer)
        calls.append(call)
    expected = _lengths()
    got = torch.tensor([float(answer) for answer in answers], dtype=torch.float64)
    first = next((i for i in range(len(calls)) if abs(got[i] - expected[i]) > 1e-6), 0)
    detail = f"{calls[first]} should be {int(expected[first])}, yours is {answers[first]}."
    if not got.isfinite().all():
        attempt.fail(f"the answer is not finite.\n{detail}")
    attempt.compare(got, expected, variants(_lengths, _LENGTH_SLIPS), atol=1e-6, rtol=0, detail=detail)
    if not all(isinstance(answer, Integral) for answer in answers):
        attempt.fail(
            "the values are right, but you return a float, and a number of tokens is a whole number (an int). "
            "Divide with // instead of /."
        )
    return f"right for {len(calls)} cases"


def _lengths(*, count: str = "patches", token: str = "if asked") -> Tensor:
    lengths = []
    for height, width, patch, asked in PICTURES:
        lengths.append(
            {
                "patches": (height * width) // (patch * patch),
                "pixels of a patch": patch**2,
                "values of a patch": 3 * patch**2,
                "height only": height // patch,
                "width only": width // patch,
                "height twice": (height // patch) ** 2,
                "width twice": (width // patch) ** 2,
                "area / P": height * width // patch,
                "area": height * width,
                "sum": height // patch + width // patch,
            }[count]
            + {"if asked": int(asked), "never": 0, "always": 1, "inverted": int(not asked), "twice": 2 * asked}[token]
        )
    return torch.tensor(lengths, dtype=torch.float64)


_LENGTH_SLIPS = [
    Slip("count", "pixels of a patch", "16x16 is the size of a patch in pixels, not the number of words. "
         "Count how many patches fit into the picture."),
    Slip("count", "values of a patch", "this is how many numbers one patch holds. Count the patches."),
    Slip("count", "height only", "this counts the patches along one side only (the height). The patches form a grid: "
         "multiply rows by columns."),
    Slip("count", "width only", "this counts the patches along one side only (the width). The patches form a grid: "
         "multiply rows by columns."),
    Slip("count", "height twice", "this takes every picture for a square: it uses the height twice and never the "
         "width."),
    Slip("count", "width twice", "this takes every picture for a square: it uses the width twice and never the "
         "height."),
    Slip("count", "area / P", "a patch covers P * P pixels, not P: divide the area by P squared."),
    Slip("count", "area", "this makes every pixel a token. A patch covers P * P pixels."),
    Slip("count", "sum", "this adds rows and columns. A grid has rows times columns places."),
    Slip("token", "never", "the class token is missing: it is one more token in front of the patches."),
    Slip("token", "always", "class_token=False is ignored: without a class token there is one token less."),
    Slip("token", "inverted", "the class token is added when it should not be, and left out when it should be there."),
    Slip("token", "twice", "the class token is counted twice."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- 2 mean_pool


@check
def mean_pool(attempt: Attempt) -> str:
    """Exercise 2: final LayerNorm, then the mean over the patches alone."""
    shapes = [(3, 6, 8), (2, 16, 12)]
    for seed, (B, N, D) in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        # Tokens of very different length: LayerNorm and mean then give different numbers in either order.
        x = torch.randn(B, 1 + N, D, generator=generator) * (1 + 4 * torch.rand(B, 1 + N, 1, generator=generator))
        norm = nn.LayerNorm(D, eps=1e-6)
        norm.weight.data = 1 + 0.5 * torch.randn(D, generator=generator)
        norm.bias.data = torch.randn(D, generator=generator)
        one_answer = "one vector of D numbers per picture is wanted"
        hints = {
            (B, N): f"You averaged over the D numbers of each token; {one_answer}.",
            (B, 1 + N): f"You averaged over the D numbers of each token; {one_answer}.",
            (N, D): f"You averaged over the pictures of the batch (dimension 0); {one_answer}.",
            (1 + N, D): f"You averaged over the pictures of the batch (dimension 0); {one_answer}.",
            (D,): f"You averaged over the pictures, too; {one_answer}.",
            (B,): f"You averaged over the D numbers, too; {one_answer}.",
            (): f"You averaged over everything; {one_answer}.",
            (B, 1, D): "The averaged dimension is still there (keepdim, or a slice such as x[:, :1]).",
            (B, N, D): "Nothing has been averaged yet.",
            (B, 1 + N, D): "Nothing has been averaged yet.",
        }
        answer = attempt.tensor(attempt(x, norm), (B, D), symbols="(B, D)", shapes=hints)

        def pooled(
            *, tokens: str = "patches", when: str = "first", how: str = "mean", x: Tensor = x, norm: nn.LayerNorm = norm
        ) -> Tensor:
            D = x.shape[-1]
            if when in ("first", "bare"):
                x = norm(x) if when == "first" else F.layer_norm(x, (D,), eps=1e-6)
            x = {"patches": x[:, 1:], "all": x, "class": x[:, :1], "not last": x[:, :-1]}[tokens]
            y = {"mean": x.mean(1), "sum": x.sum(1), "max": x.amax(1), "N + 1": x.sum(1) / (x.shape[1] + 1)}[how]
            return (norm(y) if when == "after" else y).detach()

        attempt.compare(answer, pooled(), variants(pooled, _POOL_SLIPS))
    return f"right for {len(shapes)} batches"


_POOL_SLIPS = [
    Slip("tokens", "all", "this equals the mean over all tokens: the class token is among them. Leave it out."),
    Slip("tokens", "class", "this is the class token itself, no mean at all. Average the patches, which follow it."),
    Slip("tokens", "not last", "you left out the last token, but the class token is the first one."),
    Slip("when", "after", "the order is wrong: you average first and apply `norm` to the mean. Tokens that happen to "
         "be long then weigh more. Normalise each token, then average."),
    Slip("when", "never", "`norm` was never applied: x comes out of the last block un-normalised."),
    Slip("when", "bare", "you normalise, but not with `norm`: its learned scale and shift are missing."),
    Slip("how", "sum", "this is the sum, not the mean: divide by the number of patches."),
    Slip("how", "max", "this is the largest value over the patches, not their mean."),
    Slip("how", "N + 1", "you divide by one too many: the class token is no longer in the sum, so divide by N."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------- 3 attention_rollout


@check
def attention_rollout(attempt: Attempt) -> str:
    """Exercise 3: attention through all layers, from the class token to the patches (Abnar & Zuidema 2020)."""
    settings = [(3, 2, 4, 7), (5, 1, 2, 10), (1, 3, 3, 5)]  # layers, pictures, heads, tokens
    for seed, (L, B, h, T) in enumerate(settings):
        generator = torch.Generator().manual_seed(seed)
        maps = [(2 * torch.randn(B, h, T, T, generator=generator)).softmax(-1) for _ in range(L)]
        hints = {
            (B, T): "The class token's weight on itself is among your numbers; return the patches' weights alone.",
            (B, T, T): "That is the whole table; return the class token's row, and of it the patches.",
            (B, T - 1, T - 1): "That is a table of patches by patches; return the class token's row.",
            (T, T): "The pictures of the batch are mixed up: keep the first dimension.",
            (B, h, T - 1): "The heads have not been averaged.",
            (B, h, T, T): "The heads have not been averaged, and the class token's row has not been taken.",
            (L, B, T - 1): "The layers have not been multiplied.",
            (B, 1, T - 1): "Take the class token's row with an index (0), not with a slice (:1).",
        }
        answer = attempt.tensor(attempt(list(maps)), (B, T - 1), symbols="(B, N)", shapes=hints)

        def rolled(
            *, heads: str = "mean", residual: float = 1.0, rows: str = "rows", path: str = "last @ ... @ first",
            read: str = "row", end: str = "as it is", maps: list[Tensor] = maps,
        ) -> Tensor:  # fmt: skip
            fused = [{"mean": a.mean(1), "sum": a.sum(1), "max": a.amax(1), "first": a[:, 0]}[heads] for a in maps]
            steps = [a + residual * torch.eye(a.shape[-1]) for a in fused]
            if rows != "never":
                steps = [a / a.sum(-1 if rows == "rows" else -2, keepdim=True) for a in steps]
            total = {
                "last @ ... @ first": lambda: reduce(lambda below, above: above @ below, steps),
                "first @ ... @ last": lambda: reduce(lambda below, above: below @ above, steps),
                "elementwise": lambda: reduce(torch.mul, steps),
                "mean": lambda: sum(steps) / len(steps),
                "last": lambda: steps[-1],
                "first": lambda: steps[0],
            }[path]()
            found = {"row": total[:, 0, 1:], "column": total[:, 1:, 0], "to others": total[:, 0, :-1],
                     "mean of patches": total[:, 1:, 1:].mean(1)}[read]  # fmt: skip
            return found / found.sum(-1, keepdim=True) if end == "sum to 1" else found

        attempt.compare(answer, rolled(), variants(rolled, _ROLLOUT_SLIPS), atol=1e-6)
    return f"right for stacks of {', '.join(str(L) for L, *_ in settings)} layers"


_ROLLOUT_SLIPS = [
    Slip("residual", 0.0, "the identity is missing: each block adds its input to its output, so half of a token's new "
         "state is its old one. Add the identity matrix to each layer's map."),
    Slip("rows", "never", "the rows are not normalised: with the identity added each row sums to 2, and the sums "
         "double with every layer. Divide each row by its sum before you multiply."),
    Slip("rows", "columns", "you normalise the columns. Each row (the last dimension) must sum to 1: it says how one "
         "token shares out its attention."),
    Slip("path", "first @ ... @ last", "the layers are multiplied in the wrong order. The last layer looks at what the "
         "layer below made: its matrix stands on the left."),
    Slip("path", "elementwise", "you multiply element by element (*). Paths through two layers add up over the token "
         "in the middle: that is the matrix product (@)."),
    Slip("path", "mean", "you average the layers. Rollout multiplies them."),
    Slip("path", "last", "this is the last layer alone. Multiply all layers."),
    Slip("path", "first", "this is the first layer alone. Multiply all layers."),
    Slip("heads", "sum", "you add the heads up. Take their mean, or attention outweighs the identity."),
    Slip("heads", "max", "you take the largest value over the heads. Take their mean."),
    Slip("heads", "first", "you look at one head only. Take the mean of all heads."),
    Slip("read", "column", "this is the class token's column: how much each patch looks at the class token. Its row "
         "says how much it looks at each patch."),
    Slip("read", "to others", "you dropped the last patch and kept the class token. The class token is the first."),
    Slip("read", "mean of patches", "you average the patches' rows. Only the class token goes to the classifier: take "
         "its row."),
    Slip("end", "sum to 1", "you divide by the sum at the end. Leave the weights as they are: what is missing to 1 is "
         "what the class token kept from itself."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- 4 sincos_2d


@check
def sincos_2d(attempt: Attempt) -> str:
    """Exercise 4: fixed sine-cosine positions of a grid, as in MAE's code."""
    settings = [(4, 16), (3, 8), (7, 32)]
    for grid, width in settings:
        hints = {
            (grid, width): "That is one side of the grid; every one of its grid * grid places needs a code.",
            (grid, grid, width): "Flatten rows and columns into one list of places, row by row.",
            (width, grid * grid): "Places and numbers are swapped: transpose.",
            (1, grid * grid, width): "No batch dimension is wanted.",
            (1 + grid * grid, width): "There is one row too many: no class token here.",
            (grid * grid, width // 2): "Half of the numbers are missing.",
            (grid * grid, 2 * width): "Each of the four parts has width / 4 numbers.",
        }
        answer = attempt.tensor(
            attempt(grid, width), (grid * grid, width), symbols="(grid * grid, width)", shapes=hints
        )

        def codes(
            *, place: str = "column, row", rates: str = "right", layout: str = "blocks", waves: str = "both",
            grid: int = grid, width: int = width,
        ) -> Tensor:  # fmt: skip
            places = torch.arange(grid * grid, dtype=torch.float64)
            row, column = (places / grid).floor(), places.remainder(grid)
            pair = {
                "column, row": (column, row),
                "row, column": (row, column),
                "raster": (places, places),
                "from 1": (column + 1, row + 1),
                "0 to 1": (column / grid, row / grid),
                "0 to 1 ends": (column / (grid - 1), row / (grid - 1)),
                "column": (column, column),
                "row": (row, row),
            }[place]
            i = torch.arange(width // 4, dtype=torch.float64)
            rate = {
                "right": 10_000 ** (-4 * i / width),
                "ends": 10_000 ** (-i / max(1, width // 4 - 1)),
                "half": 10_000 ** (-2 * i / width),
                "whole": 10_000 ** (-i / width),
                "eighth": 10_000 ** (-8 * i / width),
                "from 1": 10_000 ** (-4 * (i + 1) / width),
                "upwards": 10_000 ** (4 * i / width),
                "linear": i / 10_000,
                "linear down": 1 - 4 * i / width,
                "integers": i,
                "integers from 1": i + 1,
                "one over": 1 / (i + 1),
            }[rates]
            x, y = (position[:, None] * rate for position in pair)  # angles (places, width / 4)
            first, second = {"both": (torch.sin, torch.cos), "sine": (torch.sin, torch.sin),
                             "cosine": (torch.cos, torch.cos), "swapped": (torch.cos, torch.sin)}[waves]  # fmt: skip
            if layout == "interleaved":
                return torch.cat([torch.stack([first(a), second(a)], -1).flatten(1) for a in (x, y)], 1).float()
            if layout == "sines first":
                return torch.cat([first(x), first(y), second(x), second(y)], 1).float()
            return torch.cat([first(x), second(x), first(y), second(y)], 1).float()

        def in_one_row(grid: int = grid, width: int = width) -> Tensor:
            """The code of a sentence: one position 0 .. grid*grid-1 over the whole width."""
            i = torch.arange(width // 2)
            angle = torch.arange(grid * grid)[:, None] * 10_000 ** (-2 * i / width)
            return torch.cat([angle.sin(), angle.cos()], 1)

        known = chain([(_ONE_ROW, in_one_row())], variants(codes, _SINCOS_SLIPS))
        attempt.compare(answer, codes(), known, atol=1e-4)
    return f"right for grids of {', '.join(f'{grid}x{grid}' for grid, _ in settings)}"


_ONE_ROW = (
    "this numbers the places in one row, 0, 1, 2, ..., as one does for a sentence. A place in a picture has two "
    "coordinates: use its column and its row."
)
_SINCOS_SLIPS = [
    Slip("place", "row, column", "rows and columns are swapped. Place k stands in row k // grid and column k % grid, "
         "and the column comes first in the code."),
    Slip("place", "raster", _ONE_ROW),
    Slip("place", "column", "the row is missing: both halves hold the column, so places above each other get the same "
         "code."),
    Slip("place", "row", "the column is missing: both halves hold the row, so places beside each other get the same "
         "code."),
    Slip("place", "from 1", "rows and columns are counted from 0 here, yours from 1."),
    Slip("place", "0 to 1", "you scaled the coordinates to 0 .. 1. Use the whole numbers 0, 1, 2, ..."),
    Slip("place", "0 to 1 ends", "you scaled the coordinates to 0 .. 1. Use the whole numbers 0, 1, 2, ..."),
    Slip("rates", "linear", "the frequencies grow linearly. They must fall geometrically, each the one before times "
         "the same factor: 10000 is raised to a power."),
    Slip("rates", "linear down", "the frequencies fall linearly. They must fall geometrically, each the one before "
         "times the same factor: 10000 is raised to a power."),
    Slip("rates", "integers", "the frequencies grow linearly: 0, 1, 2, ... They must fall geometrically: 10000 is "
         "raised to a power."),
    Slip("rates", "integers from 1", "the frequencies grow linearly: 1, 2, 3, ... They must fall geometrically: 10000 "
         "is raised to a power."),
    Slip("rates", "one over", "the frequencies 1, 1/2, 1/3, ... are not geometric: 10000 is raised to a power."),
    Slip("rates", "upwards", "the frequencies rise instead of falling: the exponent has the wrong sign."),
    Slip("rates", "from 1", "i starts at 0, so that the first frequency is 1. Yours starts at 1."),
    Slip("rates", "half", "the exponent is i / (width / 2), as in the code of a sentence. Each coordinate has "
         "width / 4 frequencies: divide i by width / 4."),
    Slip("rates", "whole", "the exponent is i / width. Each coordinate has width / 4 frequencies: divide i by "
         "width / 4."),
    Slip("rates", "eighth", "the exponent is 2i / (width / 4). Your i already counts the frequencies one by one: leave "
         "out the factor 2."),
    Slip("rates", "ends", "you divide i by width / 4 - 1, so that the last frequency is exactly 1/10000. Some codes do "
         "so (big_vision's ViT); this exercise follows MAE: divide by width / 4."),
    Slip("layout", "interleaved", "sines and cosines alternate. Here they stand in blocks: all sines of a coordinate, "
         "then all its cosines."),
    Slip("layout", "sines first", "the blocks are in another order: both sines, then both cosines. Wanted: sine and "
         "cosine of the column, then sine and cosine of the row."),
    Slip("waves", "sine", "the cosines are missing: you use the sine twice."),
    Slip("waves", "cosine", "the sines are missing: you use the cosine twice."),
    Slip("waves", "swapped", "sine and cosine are swapped: the sine comes first."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------- 5 mask_patches


@check
def mask_patches(attempt: Attempt) -> str:
    """Exercise 5: corrupt half of the patches for masked patch prediction (ViT, appendix B.1.2).

    The answer is random, so it is judged by what it did with each of 12,800 patches.
    """
    B, N, D = 200, 64, 8
    source = torch.Generator().manual_seed(0)
    tokens = torch.randn(B, N, D, generator=source)
    tokens[..., 0] = torch.arange(B * N).view(B, N)  # the first number tells whose patch it is
    mask_token = torch.randn(D, generator=source)
    mask_token[0] = -1000.0

    def run(seed: int) -> tuple[Tensor, Tensor]:
        answer = attempt(tokens, mask_token, torch.Generator().manual_seed(seed))
        if not isinstance(answer, tuple) or len(answer) != 2:
            attempt.fail("return two things, `corrupted, chosen`.")
        corrupted, chosen = answer
        if getattr(corrupted, "dtype", None) == torch.bool and getattr(chosen, "dtype", None) == torch.float32:
            attempt.fail("the two answers are swapped: return `corrupted` first, then `chosen`.")
        corrupted = attempt.tensor(corrupted, (B, N, D), symbols="(B, N, D)", what="`corrupted`")
        hints = {
            (N,): "Every picture needs its own choice.",
            (B, N, 1): "Drop the last dimension.",
            (B, N // 2): "Not the numbers of the chosen patches are wanted, but a yes or no for each patch.",
        }
        chosen = attempt.tensor(chosen, (B, N), symbols="(B, N)", what="`chosen`", dtype=torch.bool, shapes=hints)
        return corrupted, chosen

    reseed(1)
    corrupted, chosen = run(seed=0)
    masked, kept, moved, owner = _roles(attempt, corrupted, tokens, mask_token)

    share = chosen.float().mean().item()
    if not chosen.any():
        attempt.fail("`chosen` is False everywhere: half of the patches must be chosen.")
    touched = ~kept
    if (touched & ~chosen).any():
        if kept[chosen].all() and touched[~chosen].float().mean() > 0.5:
            attempt.fail("`chosen` is the wrong way round: True must mark the patches to predict.")
        part = (touched & ~chosen).sum() / touched.sum()
        attempt.fail(
            f"{part:.0%} of the patches that you corrupted are not in `chosen`: the network would never be asked for "
            "them. Corrupt only chosen patches."
        )
    if chosen.all():
        attempt.fail("you choose every patch (100 %). Choose half: the rest is what the network predicts from.")
    if (chosen == chosen[0]).all():
        attempt.fail(
            "all pictures of the batch have the same patches chosen. Draw for each picture on its own: "
            "random numbers of shape (B, N), not (N,)."
        )
    roles = torch.where(masked, 0, torch.where(moved, 1, 2))
    _one_draw_for_each_patch(attempt, roles, chosen)
    _shares(attempt, share, *(int((role & chosen).sum()) / int(chosen.sum()) for role in (masked, moved, kept)))
    _donors(attempt, moved, owner, N)

    attempt.repeatable(run, drawn="the patches")

    with torch.enable_grad():
        mask_token.requires_grad_(True)
        output, _ = attempt(tokens, mask_token, torch.Generator().manual_seed(0))
        attempt.learnable(output, "mask_token")
    fates = {"masked": masked, "exchanged": moved, "kept": kept}
    parts = [f"{int((fate & chosen).sum()) / int(chosen.sum()):.0%} {name}" for name, fate in fates.items()]
    return f"right for {B * N:,} patches: {share:.0%} chosen, of these {', '.join(parts)}"


def _roles(
    attempt: Attempt, corrupted: Tensor, tokens: Tensor, mask_token: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What became of each patch, three (B, N) tables: masked, kept, exchanged; and the number of the patch that it is
    now. Sums such as x + m * (mask - x) round, hence the tolerance."""
    everyone = tokens.flatten(0, 1)
    masked = (corrupted - mask_token).abs().amax(-1) < 1e-2
    owner = corrupted[..., 0].round().long().clamp(0, len(everyone) - 1)
    a_patch = (corrupted - everyone[owner]).abs().amax(-1) < 1e-2
    own = torch.arange(len(everyone)).view(owner.shape)
    strange = ~masked & ~a_patch
    if strange.any():
        what = "zeros" if (corrupted[strange] == 0).all() else "neither a patch of the input nor `mask_token`"
        attempt.fail(
            f"{strange.float().mean():.0%} of the corrupted patches are {what}. A patch becomes `mask_token`, becomes "
            "another patch, or stays as it is."
        )
    return masked, a_patch & (owner == own), a_patch & (owner != own), owner


def _one_draw_for_each_patch(attempt: Attempt, roles: Tensor, chosen: Tensor) -> None:
    """Fail when mask, exchange or keep (`roles`, 0..2) is decided for whole pictures or places, not patch by patch."""
    counts = torch.stack([((roles == role) & chosen) for role in range(3)]).float()  # (3, B, N)

    def commonest(*group: int) -> float:
        """The part of the chosen patches that meet the commonest fate of their group."""
        return (counts.sum(group).amax(0).sum() / counts.sum()).item()

    if commonest(1, 2) > 0.9:
        return  # nearly one fate for all: the shares say it better
    if commonest(2) > 0.95:
        attempt.fail("within a picture all chosen patches meet the same fate. Draw it for each patch: shape (B, N).")
    if commonest(1) > 0.95:
        attempt.fail(
            "patches at the same place meet the same fate in all pictures. Draw it for each picture: shape (B, N)."
        )


def _shares(attempt: Attempt, share: float, masked: float, moved: float, kept: float) -> None:
    """Fail when the shares are off by more than luck explains (5 standard deviations are about 0.03)."""
    if abs(share - 0.45) < 0.02 and kept < 0.02:
        attempt.fail(
            "`chosen` leaves out the patches that are kept as they are. They must be predicted, too: otherwise the "
            "network could trust every patch that looks normal. Return the choice as it was made, before the fates."
        )
    if abs(share - 0.5) > 0.03:
        attempt.fail(f"you choose {share:.0%} of the patches. ViT chooses 50 % (the 15 % are BERT's, for words).")
    if masked > 0.98:
        attempt.fail(
            "every chosen patch (100 %) becomes `mask_token`. 10 % must become another patch and 10 % stay as they "
            "are. If you drew fates: they need random numbers of their own, not those of the choice."
        )
    if max(abs(masked - 0.8), abs(moved - 0.1), abs(kept - 0.1)) > 0.03:
        attempt.fail(
            f"of the chosen patches {masked:.0%} are masked, {moved:.0%} exchanged, {kept:.0%} kept. Wanted: 80 %, "
            "10 % and 10 %. Are the second and third drawn from the chosen patches, and independently of the choice?"
        )


def _donors(attempt: Attempt, moved: Tensor, owner: Tensor, N: int) -> None:
    """Fail when the patch that replaces another is not a random one of the same picture."""
    picture, place = torch.nonzero(moved, as_tuple=True)
    donor_picture, donor_place = owner[moved] // N, owner[moved] % N
    foreign = (donor_picture != picture).float().mean()
    if foreign > 0:
        if (donor_place == place).all():
            attempt.fail(
                "the other patch is taken at the same place from another picture. Take it from a random place of the "
                "same picture."
            )
        attempt.fail(f"{foreign:.0%} of the exchanged patches come from another picture. Stay in the same picture.")
    one_donor = all(len(donor_place[place == n].unique()) <= 1 for n in range(N))
    if one_donor or len(((donor_place - place) % N).unique()) == 1:
        attempt.fail(
            "a place gets its other patch from the same place in every picture. Draw a random place for each patch of "
            "each picture."
        )
    if all(len(donor_place[picture == b].unique()) <= 1 for b in picture.unique()):
        attempt.fail("all exchanged patches of a picture become the same patch. Draw one for each: shape (B, N).")
