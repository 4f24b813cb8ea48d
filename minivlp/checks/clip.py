"""Checks for the exercises of lesson 03 (`notebooks/03_clip.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks.core import Attempt, Slip, check, reseed, variants
from minivlp.losses import contrastive_loss

# ----------------------------------------------------------------------------------------------------- 1 pool_end

# (eot_id, ids). In the first batch words are larger than the end, 0 is a word and padding, and the end comes again.
TEXTS = [
    (7, [[1, 4, 9, 0, 7, 7, 2, 0], [1, 0, 5, 7, 3, 9, 7, 0], [1, 8, 2, 0, 6, 7, 0, 0], [1, 7, 9, 4, 7, 2, 5, 3]]),
    (2, [[5, 9, 2, 2, 2], [4, 2, 2, 2, 2], [8, 3, 6, 1, 2]]),
]


@check
def pool_end(attempt: Attempt) -> str:
    """Exercise 1: the state of the first end-of-text token stands for the text (CLIP, 2.4)."""
    for seed, (eot_id, table) in enumerate(TEXTS):
        ids = torch.tensor(table)
        (B, L), D = ids.shape, 6
        states = torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))
        one = "Take one state of each text: states[torch.arange(B), position]."
        hints = {
            (B, B, D): "states[:, position] takes every position from every text. Pair them up: "
            "states[torch.arange(B), position].",
            (B, 1, D): "Drop the dimension of length 1.",
            (B, L, D): f"These are all states. {one}",
            (B, L): f"That is a number for each token. {one}",
            (B,): "Is this the position? Return the state that stands there.",
            (D,): "Every text needs its own state.",
            (int((ids == eot_id).sum()), D): "That is a state for each end-of-text token, and some texts hold several. "
            "Take the first one of each text.",
        }
        answer = attempt.tensor(attempt(states, ids, eot_id), (B, D), symbols="(B, D)", shapes=hints)

        def pooled(
            *, where: str = "first end", read: str = "one", whose: str = "own",
            states: Tensor = states, ids: Tensor = ids, eot_id: int = eot_id,
        ) -> Tensor:  # fmt: skip
            (B, L), ends = ids.shape, ids == eot_id
            first = ends.int().argmax(1)  # (B,)
            position = {
                "first end": first,
                "largest id": ids.argmax(1),
                "at least": (ids >= eot_id).int().argmax(1),
                "last end": L - 1 - ends.flip(1).int().argmax(1),
                "last": torch.full_like(first, L - 1),
                "start": torch.zeros_like(first),
                "before": first - 1,
                "after": (first + 1).clamp(max=L - 1),
                "not 0": (ids != 0).sum(1) - 1,
                "of the first text": first[:1].expand(B),
            }[where]
            if whose == "the first text's":
                states = states[:1].expand_as(states)
            if read == "one":
                return states[torch.arange(B), position]
            seen = torch.arange(L) < position[:, None] + (read != "mean of words")
            if read == "mean of all":
                return states.mean(1)
            if read == "max":
                return states.masked_fill(~seen[..., None], float("-inf")).amax(1)
            total = (states * seen[..., None]).sum(1)
            return total if read == "sum" else total / seen.sum(1, keepdim=True)

        attempt.compare(answer, pooled(), variants(pooled, _END_SLIPS))

    with torch.enable_grad():
        states.requires_grad_(True)
        attempt.learnable(attempt(states, ids, eot_id), "states")
    return f"right for {len(TEXTS)} batches"


_END_SLIPS = [
    Slip("where", "largest id", "you take the position of the largest id (argmax of ids). That works only where no "
         "word has a larger id than the end, as in OpenAI's vocabulary. Look for ids == eot_id."),
    Slip("where", "at least", "you stop at the first id that is at least eot_id, and words may have larger ids. Look "
         "for ids == eot_id."),
    Slip("where", "last end", "you take the last end-of-text token. Take the first: some codes pad with it."),
    Slip("where", "last", "you take the last position, which is padding in all but the longest texts. Look for the "
         "first end-of-text token of each text."),
    Slip("where", "start", "you take token 0. With the causal mask it has seen nothing but itself: only the "
         "end-of-text token has read the whole text."),
    Slip("where", "before", "this is the token before the end-of-text token. It has seen all words, too, but the "
         "one that is trained to stand for the text is end-of-text itself."),
    Slip("where", "after", "this is the token behind the end-of-text token: that is padding. Positions count from 0."),
    Slip("where", "not 0", "you count the ids that are not 0. Padding need not be 0, and 0 may be a word. Look for "
         "ids == eot_id."),
    Slip("where", "of the first text", "every text is read where the first one ends. Find the position for each text: "
         "argmax(dim=1)."),
    Slip("read", "mean of all", "this is the mean over all positions, padding included. CLIP reads one token."),
    Slip("read", "mean", "this is the mean over the text. CLIP reads one token, the first end-of-text."),
    Slip("read", "mean of words", "this is the mean over the tokens before the end. CLIP reads one token, the first "
         "end-of-text."),
    Slip("read", "max", "this is the largest value over the text. CLIP reads one token, the first end-of-text."),
    Slip("read", "sum", "this is the sum over the text. CLIP reads one token, the first end-of-text."),
    Slip("whose", "the first text's", "the positions are right, but all states come from the first text. Index both: "
         "states[torch.arange(B), position]."),
]  # fmt: skip

# ----------------------------------------------------------------------------------------------- 2 symmetric_loss

# Pairs, numbers of the shared space, t: as CLIP starts, smaller, and beyond ln 100 = 4.6.
BATCHES = [(4, 6, math.log(1 / 0.07)), (5, 3, 0.5), (6, 4, 5.0)]


@check
def symmetric_loss(attempt: Attempt) -> str:
    """Exercise 2: the symmetric contrastive loss with a learned temperature (CLIP, Fig. 3)."""
    inputs = [_vectors(seed, *batch) for seed, batch in enumerate(BATCHES)]
    answers = []
    for image, text, t in inputs:
        (B, E) = image.shape
        hints = {
            (1,): "A single number has no dimension.",
            (B,): "Take the mean over the batch.",
            (2,): "Take the mean of both directions.",
            (B, B): "This is a table of pairs. The loss is one number.",
            (E, E): "This is a table of the numbers of the shared space. The loss compares pairs, and is one number.",
        }
        answer = attempt(image, text, t)
        if isinstance(answer, Tensor) and answer.shape == () and not answer.isfinite():
            attempt.fail(
                f"the loss is {answer.item()} at logit_scale={t.item():.2f}: exp() of a large logit does not fit into "
                "float32. Do not compute the softmax by hand: F.cross_entropy or log_softmax subtract the largest "
                "logit first."
            )
        answers.append(attempt.tensor(answer, (), symbols="()", what="the loss", shapes=hints))
    got = torch.stack(answers)

    def losses(**slips: str) -> Tensor:
        return torch.stack([_symmetric_loss(*(x.double() for x in batch), **slips).float() for batch in inputs])

    expected = losses()
    first = int(((got - expected).abs() > 1e-4 * expected.abs() + 1e-5).int().argmax())
    B, E, t = BATCHES[first]
    detail = f"With {B} pairs, E = {E}, logit_scale = {t:.4f}: expected {expected[first]:.4f}, got {got[first]:.4f}."
    attempt.compare(got, expected, variants(losses, _LOSS_SLIPS), detail=detail)
    with torch.enable_grad():
        _loss_gradients(attempt, *inputs[0])
    return f"right for {len(BATCHES)} batches, and all gradients flow"


def _vectors(seed: int, B: int, E: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """image (B, E) and text (B, E) of different lengths, somewhat alike in a pair, and t."""
    generator = torch.Generator().manual_seed(seed)
    shared, image, text = torch.randn(3, B, E, generator=generator)
    lengths = 0.5 + 2 * torch.rand(2, B, 1, generator=generator)
    return lengths[0] * (shared + image), lengths[1] * (shared + text), torch.tensor(t)


def _symmetric_loss(
    image: Tensor, text: Tensor, t: Tensor, *, norm: str = "each", scale: str = "exp(t)", table: str = "pairs",
    ways: str = "both", softmax: str = "each row", reduce: str = "mean", targets: str = "own pair",
) -> Tensor:  # fmt: skip
    """The loss with every way to go wrong: image (B, E), text (B, E), t () -> ()."""
    if targets == "popular":
        norm, scale, targets = "never", "1", "own similarities, transposed"
    sides = []
    for name, x in (("image", image), ("text", text)):
        if norm in ("each", f"{name} only"):
            x = x / x.norm(dim=1, keepdim=True)
        elif norm == "squared":
            x = x / x.square().sum(1, keepdim=True)
        elif norm == "absolute":
            x = x / x.abs().sum(1, keepdim=True)
        elif norm in ("over the batch", "whole"):
            x = x / (x.norm(dim=0) if norm == "over the batch" else x.norm())
        sides.append(x)
    image, text = sides
    factor = {"exp(t)": t.exp(), "t": t, "1": 1.0, "1 / exp(t)": (-t).exp(), "1 / t": 1 / t,
              "at most 100": t.exp().clamp(max=100)}[scale]  # fmt: skip
    logits = factor * (image @ text.T if table == "pairs" else image.T @ text)
    n = len(logits)
    wanted = (torch.eye(n),) * 2
    if targets == "first":
        wanted = (F.one_hot(torch.zeros(n, dtype=torch.long), n),) * 2
    elif targets.startswith("own similarities") and table == "pairs":
        alike = (factor * (image @ image.T + text @ text.T) / 2).softmax(1)
        wanted = (alike, alike.T if targets.endswith("transposed") else alike)
    both = []
    for scores, target in zip((logits, logits.T), wanted, strict=True):
        if softmax == "sigmoid":
            each = F.binary_cross_entropy_with_logits(scores, target.to(scores), reduction="none").mean(1)
        else:
            log_p = {
                "each row": lambda x: x.log_softmax(1),
                "everything": lambda x: x.flatten().log_softmax(0).view_as(x),
                "twice": lambda x: x.softmax(1).log_softmax(1),
                "no log": lambda x: x.softmax(1),
                "none": lambda x: x,
            }[softmax](scores)
            each = -(target * log_p).sum(1)  # (n,)
        both.append(each.mean() * {"mean": 1, "sum": n, "B * B": 1 / n, "negative": -1}[reduce])
    to_text, to_image = both
    return {"both": (to_text + to_image) / 2, "to text": to_text, "to image": to_image, "sum": to_text + to_image}[ways]


def _loss_gradients(attempt: Attempt, *inputs: Tensor) -> None:
    """Fail unless the loss hands back the right gradient to each of image (B, E), text (B, E) and t."""
    names = ("image", "text", "logit_scale")
    for place, name in enumerate(names):
        asked = [x.clone().requires_grad_(i == place) for i, x in enumerate(inputs)]
        attempt.learnable(attempt(*asked), name)
        got, expected = (
            torch.autograd.grad(loss, asked[place], allow_unused=True)[0]
            for loss in (attempt(*asked), _symmetric_loss(*asked))
        )
        if got is None or not torch.allclose(got, expected, rtol=1e-3, atol=1e-5):
            attempt.fail(
                f"the loss is right, but its gradient to `{name}` is not: a part of the way from `{name}` to the loss "
                "is cut off. Leave out .detach(), .data, .item() and torch.no_grad()."
            )


_LOSS_SLIPS = [
    Slip("norm", "never", "the vectors are not normalised. Without that the logits are no cosines, and a picture could "
         "win by its length alone: divide each vector by its length first."),
    Slip("norm", "image only", "only the image vectors are normalised. Do the same with the text vectors."),
    Slip("norm", "text only", "only the text vectors are normalised. Do the same with the image vectors."),
    Slip("norm", "over the batch", "you normalise along the wrong axis, over the batch. Every vector, a row, gets "
         "length 1: dim=1 (or -1)."),
    Slip("norm", "whole", "you divide by one length for the whole table. Every vector, a row, gets length 1: dim=1."),
    Slip("norm", "squared", "you divide by the squared length. The length is the square root of the sum of squares."),
    Slip("norm", "absolute", "you divide by the sum of the absolute values. The length is the square root of the sum "
         "of squares."),
    Slip("scale", "t", "you multiply by t itself. `logit_scale` is a logarithm: multiply by exp(t)."),
    Slip("scale", "1", "`logit_scale` is not used (a temperature of 1): cosines lie between -1 and 1, and a softmax "
         "over these can hardly choose. Multiply them by exp(t)."),
    Slip("scale", "1 / exp(t)", "you divide by exp(t). CLIP's t is the logarithm of the scale, 1 / temperature: "
         "multiply."),
    Slip("scale", "1 / t", "you divide by t, as if it were a temperature. `logit_scale` is the logarithm of a factor: "
         "multiply by exp(t)."),
    Slip("scale", "at most 100", "the scale is clamped inside of the loss. There t would get no gradient beyond the "
         "limit and stay stuck: clamp the parameter after the update instead, and leave the loss as it is."),
    Slip("table", "numbers", "you compare the E numbers of the space with each other, a table (E, E). The logits are "
         "image @ text.T, a table (B, B)."),
    Slip("ways", "to text", "this is one direction only: pictures choose among the texts. Add the other, along the "
         "columns, and take the mean."),
    Slip("ways", "to image", "this is one direction only: texts choose among the pictures. Add the other, along the "
         "rows, and take the mean."),
    Slip("ways", "sum", "you add up both directions. Take their mean, so that an untrained model starts at ln B."),
    Slip("softmax", "everything", "your softmax runs over the whole table. Each picture chooses among the B texts of "
         "its row, each text among the B pictures of its column."),
    Slip("softmax", "twice", "the softmax is taken twice: F.cross_entropy has one inside. Hand it the logits."),
    Slip("softmax", "no log", "the logarithm is missing: this is the mean probability of the true pairs, negative. "
         "Cross-entropy is -log of it."),
    Slip("softmax", "none", "there is no softmax: this pulls true pairs together, but pushes nothing apart."),
    Slip("softmax", "sigmoid", "this judges each pair on its own (sigmoid), which is SigLIP's idea. CLIP's is a choice "
         "among B: softmax."),
    Slip("reduce", "sum", "you sum over the batch. Take the mean."),
    Slip("reduce", "B * B", "you divide by B * B, all cells of the table. There are B choices in a direction: the mean "
         "over these."),
    Slip("reduce", "negative", "the sign is wrong: cross-entropy is *minus* the logarithm."),
    Slip("targets", "first", "the labels say that everyone belongs to number 0. The true pairs stand on the diagonal: "
         "the labels are torch.arange(B)."),
    Slip("targets", "own similarities", "your targets are made from the similarities of the model's own vectors. In "
         "CLIP picture i belongs to text i: the labels are torch.arange(B)."),
    Slip("targets", "own similarities, transposed", "your targets are made from the similarities of the model's own "
         "vectors. In CLIP picture i belongs to text i: the labels are torch.arange(B)."),
    Slip("targets", "popular", "this is a loss met in popular code, and not CLIP's: soft targets made from the model's "
         "own similarities, vectors that are not normalised, a temperature of 1. Normalise, multiply by exp(t), and "
         "take torch.arange(B) for the labels."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------- 3 zero_shot_weights


@check
def zero_shot_weights(attempt: Attempt) -> str:
    """Exercise 3: many prompts for each class make one vector (CLIP, 3.1.4, and the official notebook)."""
    settings = [(3, 4, 6), (5, 2, 7)]  # classes, prompts, numbers of the shared space
    for seed, (K, P, E) in enumerate(settings):
        generator = torch.Generator().manual_seed(seed)
        # Prompts of a class lie near each other but have very different lengths.
        vectors = torch.randn(K, 1, E, generator=generator) + 0.7 * torch.randn(K, P, E, generator=generator)
        vectors = vectors * (0.3 + 4 * torch.rand(K, P, 1, generator=generator) ** 2)
        over = "Take the mean over the prompts, dim=1."
        hints = {
            (P, E): f"You have averaged over the classes. {over}",
            (K, P): f"You have averaged over the numbers of each vector. {over}",
            (K, P, E): f"The prompts of a class must become one vector. {over}",
            (K * P, E): f"That is a vector for each prompt. {over}",
            (E,): f"You have averaged over all classes. {over}",
            (E, K): "Transposed: a row for each class.",
            (K, 1, E): "Drop the dimension of length 1.",
            (K,): "Is this a length? Every class needs a vector.",
            (K, K): "Are these similarities? Return the vectors.",
        }
        answer = attempt.tensor(attempt(vectors), (K, E), symbols="(K, E)", shapes=hints)

        def weights(
            *, first: str = "each", pool: str = "mean", second: str = "each", after: str = "nothing",
            layout: str = "by class", vectors: Tensor = vectors,
        ) -> Tensor:  # fmt: skip
            K, P, E = vectors.shape
            x = vectors if layout == "by class" else vectors.reshape(P, K, E).transpose(0, 1)
            x = x / _length(x, first, {"over the prompts": 1, "over the classes": 0, "by class": (1, 2)})
            x = {"mean": x.mean(1), "sum": x.sum(1), "median": x.median(1).values, "max": x.amax(1), "first": x[:, 0],
                 "last": x[:, -1], "root": x.sum(1) / P**0.5}[pool]  # fmt: skip
            x = x / _length(x, second, {"over the classes": 0})
            return {"nothing": x, "100": 100 * x, "softmax": x.softmax(1), "minus the mean": x - x.mean(0)}[after]

        lengths = answer.norm(dim=1)
        detail = ""
        if (lengths - 1).abs().max() > 1e-4:
            detail = f"Every row must have length 1; yours have {lengths.min():.3f} .. {lengths.max():.3f}."
        attempt.compare(answer, weights(), variants(weights, _WEIGHT_SLIPS), atol=1e-6, detail=detail)
    return f"right for {' and '.join(f'{K} classes with {P} prompts' for K, P, _ in settings)}"


def _length(x: Tensor, kind: str, dims: dict[str, int | tuple[int, ...]]) -> Tensor:
    """What x (..., E) is divided by: 1, its length along E, or one along other `dims`; shaped to broadcast."""
    if kind in dims:
        return x.square().sum(dims[kind], keepdim=True).sqrt()
    return {
        "each": x.norm(dim=-1, keepdim=True),
        "squared": x.square().sum(-1, keepdim=True),
        "absolute": x.abs().sum(-1, keepdim=True),
        "largest": x.abs().amax(-1, keepdim=True),
        "whole": x.norm(),
        "never": torch.tensor(1.0),
    }[kind]


_WEIGHT_SLIPS = [
    Slip("first", "never", "the prompts' vectors are not normalised before the mean, so that a long one outvotes the "
         "others. Give each length 1 first, then average."),
    Slip("first", "over the prompts", "before the mean you normalise along the wrong axis, over the prompts. Each "
         "vector gets length 1: dim=-1."),
    Slip("first", "over the classes", "before the mean you normalise along the wrong axis, over the classes. Each "
         "vector gets length 1: dim=-1."),
    Slip("first", "by class", "before the mean you divide by one length for each class. That leaves long vectors "
         "longer than short ones: each prompt's vector gets length 1."),
    Slip("first", "whole", "before the mean you divide by one length for the whole table. Each prompt's vector gets "
         "length 1: dim=-1."),
    Slip("first", "squared", "before the mean you divide by the squared length. Take its square root."),
    Slip("first", "absolute", "before the mean you divide by the sum of absolute values. The length is the square root "
         "of the sum of squares."),
    Slip("first", "largest", "before the mean you divide by the largest value. The length is the square root of the "
         "sum of squares."),
    Slip("pool", "median", "you take the median over the prompts. Take the mean."),
    Slip("pool", "max", "you take the largest value over the prompts. Take the mean."),
    Slip("pool", "first", "you use the first prompt alone. Take the mean over all prompts of a class."),
    Slip("pool", "last", "you use the last prompt alone. Take the mean over all prompts of a class."),
    Slip("pool", "sum", "you add the prompts up instead of averaging."),
    Slip("second", "never", "the mean is not normalised again. A mean of vectors of length 1 is shorter than 1, and "
         "shorter where the prompts disagree, so the logits of such a class would be scaled down."),
    Slip("second", "over the classes", "after the mean you normalise along the wrong axis, over the classes. Each "
         "class's vector gets length 1: dim=-1."),
    Slip("second", "whole", "after the mean you divide by one length for the whole table. Each class's vector gets "
         "length 1: dim=-1."),
    Slip("second", "squared", "after the mean you divide by the squared length. Take its square root."),
    Slip("second", "absolute", "after the mean you divide by the sum of absolute values. The length is the square root "
         "of the sum of squares."),
    Slip("after", "100", "you multiply by 100. That is the scale of the logits; the weights have length 1."),
    Slip("after", "softmax", "you take a softmax over the numbers of a vector. It belongs to the logits, which come "
         "later; the weights are vectors of length 1."),
    Slip("after", "minus the mean", "you subtract the mean of all classes. CLIP does not centre its vectors."),
    Slip("layout", "by prompt", "you mix up the classes: `reshape` deals the rows out anew, it does not swap "
         "dimensions. vectors[k] are the prompts of class k already."),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- 4 recall_at_k


@check
def recall_at_k(attempt: Attempt) -> str:
    """Exercise 4: R@k in both directions, several texts for a picture, ties counted against the model."""
    cases = []
    for seed, counts in enumerate(([2] * 30, [1, 2, 3, 4, 5] * 6, [1] * 25)):
        generator = torch.Generator().manual_seed(seed)
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        owner = owner[torch.randperm(len(owner), generator=generator)]
        own = owner == torch.arange(len(counts))[:, None]
        # Whole numbers, so that many scores are equal.
        scores = torch.randint(12, own.shape, generator=generator) + own * torch.randint(
            9, own.shape, generator=generator
        )
        cases += [(scores.float(), owner, k) for k in (1, 3, 5)]

    got = torch.tensor([_two_shares(attempt, *case) for case in cases])
    known: dict[tuple, list[tuple[float, float]]] = {}  # so that what is returned can vary without counting again

    def recalls(*, back: str = "right", **slips: str) -> Tensor:
        key = tuple(slips.items())
        if key not in known:
            known[key] = [_recalls(*case, **slips) for case in cases]
        shapes = [scores.shape for scores, _, _ in cases]
        return torch.tensor([_returned(back, *two, *shape) for two, shape in zip(known[key], shapes, strict=True)])

    expected = recalls()
    first = int(((got - expected).abs().amax(1) > 1e-5).int().argmax())
    (scores, _, k), (right, yours) = cases[first], (expected[first], got[first])
    detail = (
        f"{len(scores)} pictures, {scores.shape[1]} texts, k={k}: expected {right[0]:.4f} (image to text) and "
        f"{right[1]:.4f} (text to image), got {yours[0]:.4f} and {yours[1]:.4f}."
    )
    if (got < 0).any() or (got > 1).any():
        detail += " A share must be between 0 and 1."
    attempt.compare(got, expected, variants(recalls, _RECALL_SLIPS), detail=detail)
    return f"right for {len(cases)} cases"


def _two_shares(attempt: Attempt, scores: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """One answer as two numbers."""
    answer = attempt(scores, owner, k)
    if isinstance(answer, Tensor) and answer.shape == (2,):
        answer = tuple(answer)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        attempt.fail("return two things, the recall from image to text and the recall from text to image.")
    shares = []
    for value in answer:
        if isinstance(value, Tensor) and value.numel() > 1:
            attempt.fail(f"the recall must be one number, yours has the shape {tuple(value.shape)}: take the mean over "
                         "all who search.")  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            attempt.fail(f"the recall must be a number, yours is of type {type(value).__name__}.")
        shares.append(float(value))
        if not math.isfinite(shares[-1]):
            attempt.fail("the recall is not finite (0 divided by 0?).")
    return shares[0], shares[1]


def _recalls(
    scores: Tensor, owner: Tensor, k: int, *, ties: str = "against", found: str = "any", limit: str = "k",
    owners: str = "given", axis: str = "right", order: str = "highest",
) -> tuple[float, float]:  # fmt: skip
    """R@k image to text and text to image, with every way to go wrong."""
    N, M = scores.shape
    if owners == "in order":
        owner = (torch.arange(M) // max(1, M // N)).clamp(max=N - 1)
    elif owners == "in turn":
        owner = torch.arange(M) % N
    if order == "lowest":
        scores = -scores
    k = {"k": k, "one more": k + 1, "one less": k - 1, "1": 1}[limit]
    own, texts = owner == torch.arange(N)[:, None], torch.arange(M)  # (N, M), (M,)
    ahead = torch.gt if ties == "for" else torch.ge

    # For each text: how many are ahead of it when its picture searches, and of its picture when it searches.
    mine = scores[owner, texts]
    siblings = owner[:, None] == owner
    itself = torch.eye(M, dtype=torch.bool) if "siblings too" in found else siblings
    in_row = (ahead(scores[owner], mine[:, None]) & ~itself).sum(1)  # (M,)
    in_column = (ahead(scores, mine) & ~own).sum(0)  # (M,)
    hit_text, hit_picture = in_row < k, in_column < k
    if axis == "swapped":
        hit_text, hit_picture = hit_picture, hit_text
    if ties == "by place":
        best = ((dim, scores.topk(min(k, scores.shape[dim]), dim=dim).indices) for dim in (1, 0))
        hit_text, hit_picture = (torch.zeros_like(own).scatter_(dim, at, True)[owner, texts] for dim, at in best)
    hits, rows = own & hit_text, torch.arange(N)  # (N, M), (N,)
    average = (scores * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)
    to_text = {
        "any": lambda: hits.any(1),
        "any, siblings too": lambda: hits.any(1),
        "all": lambda: (hits | ~own).all(1),
        "all, siblings too": lambda: (hits | ~own).all(1),
        "share": lambda: hits.sum(1) / own.sum(1).clamp(min=1),
        "precision": lambda: hits.sum(1) / max(k, 1),
        "each": lambda: hit_text,
        "each, siblings too": lambda: hit_text,
        "first": lambda: hits[rows, own.int().argmax(1)],
        "last": lambda: hits[rows, M - 1 - own.flip(1).int().argmax(1)],
        "average": lambda: (ahead(scores, average) & ~own).sum(1) < k,
    }[found]()
    return to_text.float().mean().item(), hit_picture.float().mean().item()


def _returned(back: str, to_text: float, to_image: float, N: int, M: int) -> tuple[float, float]:
    """What comes back, right or wrong, of the two recalls over N pictures and M texts."""
    return {
        "right": (to_text, to_image),
        "swapped": (to_image, to_text),
        "text twice": (to_text, to_text),
        "image twice": (to_image, to_image),
        "mean": ((to_text + to_image) / 2,) * 2,
        "percent": (100 * to_text, 100 * to_image),
        "counts": (N * to_text, M * to_image),
        "misses": (1 - to_text, 1 - to_image),
        "over pictures": (to_text, M * to_image / N),
    }[back]


_RECALL_SLIPS = [
    Slip("ties", "for", "you count only those that score higher than the right one (>). Equal scores must count "
         "against the model, or one that gives everything the same score would be perfect: >=."),
    Slip("ties", "by place", "where scores are equal, topk or argsort decides by the place in the table. Equal scores "
         "must count against the model: count how many score >= the right one."),
    Slip("found", "all", "from image to text you ask for all texts of a picture. One of them is enough."),
    Slip("found", "all, siblings too", "from image to text you ask for all texts of a picture, which cannot be where "
         "it has more than k. One of them is enough."),
    Slip("found", "share", "from image to text this is the share of a picture's texts that are found. In retrieval "
         "papers a picture counts 1 as soon as one of its texts is found, and 0 otherwise."),
    Slip("found", "precision", "from image to text this is precision: how many of the k are right, divided by k. A "
         "picture counts 1 as soon as one of its texts is found, and 0 otherwise."),
    Slip("found", "each", "from image to text you average over the texts. The pictures search here: one hit or "
         "miss for each picture, however many texts it has."),
    Slip("found", "each, siblings too", "from image to text every text is asked for on its own, and the other "
         "texts of its picture count as wrong. They are right, too: one hit or miss for each picture, by its best "
         "text."),
    Slip("found", "first", "from image to text you look at the first text of each picture alone. Take its best one."),
    Slip("found", "last", "from image to text you look at the last text of each picture alone (did a later one "
         "overwrite the others?). Take its best one."),
    Slip("found", "average", "from image to text you compare with the mean score of a picture's texts. Compare with "
         "the best one."),
    Slip("found", "any, siblings too", "from image to text other texts of the same picture count as wrong where they "
         "score as high as its best one. Count texts of other pictures alone."),
    Slip("limit", "one more", "you count the best k + 1: found means that *fewer* than k others are ahead (< k)."),
    Slip("limit", "one less", "you count the best k - 1. Does the right one count as ahead of itself?"),
    Slip("limit", "1", "`k` is not used: this is R@1 for every k."),
    Slip("owners", "in order", "you assume that the texts stand in the order of the pictures, equally many for each. "
         "`owner[j]` says whose text j is."),
    Slip("owners", "in turn", "you assume that text j belongs to picture j (or j % N). `owner[j]` says whose it is."),
    Slip("axis", "swapped", "you rank along the wrong axis: a picture searches among the texts of its row, a text "
         "among the pictures of its column."),
    Slip("order", "lowest", "you prefer the lowest scores. The highest are the best."),
    Slip("back", "swapped", "the two numbers are swapped: image to text comes first."),
    Slip("back", "text twice", "both numbers are the recall from image to text."),
    Slip("back", "image twice", "both numbers are the recall from text to image."),
    Slip("back", "mean", "you return the mean of both directions. Return both, image to text "
         "first."),
    Slip("back", "percent", "these are per cent. Return shares between 0 and 1."),
    Slip("back", "counts", "you count the hits. Divide by the number of those who search."),
    Slip("back", "misses", "this is the share of misses."),
    Slip("back", "over pictures", "from text to image you divide by the number of pictures. The texts search there: "
         "divide by their number."),
]  # fmt: skip

# --------------------------------------------------------------------------------------------------- 5 grad_cache


@check
def grad_cache(attempt: Attempt) -> str:
    """Exercise 5: the exact gradients of a large batch, a chunk at a time (Gao et al. 2021, arXiv:2101.06983)."""
    # Pairs, rows that fit, and whether gradients are there already. The last chunk may be smaller, or the only one.
    settings = [(10, 4, False), (6, 2, True), (3, 8, False)]
    with torch.enable_grad():
        for seed, (N, chunk, begun) in enumerate(settings):
            reseed(seed)
            towers = _Tower(nn.Linear(12, 8), 5), _Tower(nn.EmbeddingBag(20, 8), 5)
            loss = _Loss()
            parts = (*towers, loss)
            inputs = torch.randn(N, 3, 2, 2), torch.randint(20, (N, 6))
            before = [
                [torch.randn_like(p) if begun else torch.zeros_like(p) for p in part.parameters()] for part in parts
            ]
            values = [[p.detach().clone() for p in part.parameters()] for part in parts]
            if begun:
                for part, old in zip(parts, before, strict=True):
                    for parameter, gradient in zip(part.parameters(), old, strict=True):
                        parameter.grad = gradient.clone()
            for tower in towers:
                tower.chunk = chunk
            answer = attempt(*towers, loss, *inputs, chunk)
            for tower in towers:
                tower.chunk = None  # from now on the check itself calls it
            hints = {(N, N): "These are the logits. Return the loss.", (1,): "A single number has no dimension."}
            value = attempt.tensor(answer, (), symbols="()", what="the loss", shapes=hints)
            _polite(attempt, parts, values, N, chunk)
            got = [
                torch.cat([((torch.zeros_like(p) if p.grad is None else p.grad) - old).flatten()
                           for p, old in zip(part.parameters(), olds, strict=True)])
                for part, olds in zip(parts, before, strict=True)
            ]  # fmt: skip
            if all(p.grad is None for part in parts for p in part.parameters()):
                attempt.fail(
                    "no parameter has a gradient in `.grad`. Call `backward`, so that an optimiser could make its step."
                )

            def gradients(*, parts: tuple = parts, inputs: tuple = inputs, chunk: int = chunk, before: list = before,
                          **slips: str) -> Tensor:  # fmt: skip
                lost = slips.pop("old", "kept") == "lost"
                new = torch.cat(_gradients(parts, inputs, chunk, **slips))
                return new - torch.cat([p.flatten() for olds in before for p in olds]) if lost else new

            attempt.compare(torch.cat(got), gradients(), variants(gradients, _CACHE_SLIPS), atol=1e-6, rtol=1e-3)
            with torch.no_grad():
                _loss_of_the_batch(attempt, value, parts, inputs, chunk)
    return f"right for {', '.join(f'{N} pairs by {chunk}' for N, chunk, _ in settings)}"


class _Tower(nn.Module):
    """A small encoder (N, ...) -> (N, 5) that notes how it is called while `chunk` is set."""

    def __init__(self, first: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(8, width)
        self.chunk: int | None = None
        self.largest, self.waiting, self.most_waiting = 0, 0, 0  # rows in one call; calls whose backward is to come

    def forward(self, rows: Tensor) -> Tensor:
        vectors = self.last(torch.tanh(self.first(rows.flatten(1))))
        if self.chunk is not None:
            self.largest = max(self.largest, len(rows))
            if vectors.requires_grad:
                self.waiting += 1
                self.most_waiting = max(self.most_waiting, self.waiting)
                vectors.register_hook(self._done)
        return vectors

    def _done(self, gradient: Tensor) -> None:
        self.waiting -= 1


class _Loss(nn.Module):
    """The contrastive loss of vectors (N, E) and (N, E), with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return contrastive_loss(self.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)


def _polite(attempt: Attempt, parts: tuple[nn.Module, ...], values: list[list[Tensor]], N: int, chunk: int) -> None:
    """Fail when the towers were asked for too much at once, or when a parameter is not what it was."""
    largest, waiting = (max(getattr(tower, name) for tower in parts[:2]) for name in ("largest", "most_waiting"))
    if largest > chunk:
        attempt.fail(
            f"a tower got {largest} rows at once, although no more than chunk={chunk} fit. Cut all {N} rows into "
            "pieces: rows.split(chunk)."
        )
    if waiting > 1:
        attempt.fail(
            f"{waiting} chunks wait for their backward pass at the same time, and all they have computed stays in "
            "memory: nothing is saved. Run the first pass inside `torch.no_grad()`, and in the second call backward "
            "for a chunk before you begin the next."
        )
    now = [p for part in parts for p in part.parameters()]
    if not all(map(torch.equal, now, [old for part in values for old in part])):
        attempt.fail("you changed the parameters. Leave the gradients in `.grad`; the update is the optimiser's.")


def _gradients(
    parts: tuple[nn.Module, ...], inputs: tuple[Tensor, Tensor], chunk: int, *, negatives: str = "all",
    image: str = "own", text: str = "own", scale: str = "once", rows: str = "all", factor: str = "1",
) -> list[Tensor]:  # fmt: skip
    """The gradients of image tower, text tower and loss, one vector each, with every way to go wrong."""
    image_tower, text_tower, loss = parts
    images, ids = inputs
    count = -(-len(images) // chunk)
    if rows == "full chunks alone" and len(images) >= chunk:
        whole = len(images) // chunk * chunk
        images, ids = images[:whole], ids[:whole]
    pieces = list(zip(images.split(chunk), ids.split(chunk), strict=True))
    if negatives == "all":
        vectors = [tower(x) for tower, x in ((image_tower, images), (text_tower, ids))]
        value = loss(*vectors)
    else:
        vectors = [torch.cat(side) for side in zip(*((image_tower(x), text_tower(y)) for x, y in pieces), strict=True)]
        losses = [loss(x, y) for x, y in zip(*(side.split(chunk) for side in vectors), strict=True)]
        value = sum(losses) / (len(losses) if negatives == "of the chunk" else 1)
    at_image, at_text, at_scale = torch.autograd.grad(value, [*vectors, loss.logit_scale], retain_graph=True)
    found = []
    for tower, side, gradient, kind in zip(
        (image_tower, text_tower), vectors, (at_image, at_text), (image, text), strict=True
    ):
        gradient = {"own": gradient, "never": torch.zeros_like(gradient),
                    "first": gradient[:chunk].repeat(count, 1)[: len(side)], "vectors": side.detach(),
                    "twice": 2 * gradient}[kind]  # fmt: skip
        if rows == "last without" and len(side) % chunk:
            gradient = gradient.clone()
            gradient[len(side) // chunk * chunk :] = 0
        if rows == "first alone":
            gradient = gradient.clone()
            gradient[chunk:] = 0
        found += [torch.autograd.grad(side, list(tower.parameters()), gradient, retain_graph=True)]
    times = {"once": 1, "never": 0, "each chunk": count, "mean": 1 / count}[scale]
    found.append([times * at_scale])
    times = {"1": 1, "1 / chunks": 1 / count, "chunks": count, "-1": -1}[factor]
    return [torch.cat([times * g.flatten() for g in side]) for side in found]


def _loss_of_the_batch(
    attempt: Attempt, value: Tensor, parts: tuple[nn.Module, ...], inputs: tuple[Tensor, Tensor], chunk: int
) -> None:
    """Fail unless `value` is the loss of all pairs together, where the gradients are right already."""
    image_tower, text_tower, loss = parts
    image, text = image_tower(inputs[0]), text_tower(inputs[1])
    expected = loss(image, text)
    if torch.allclose(value, expected, rtol=1e-4, atol=1e-5):
        return
    own = torch.stack([loss(x, y) for x, y in zip(image.split(chunk), text.split(chunk), strict=True)])
    wrong = {
        "it is the mean of the chunks' own losses": own.mean(),
        "it is the sum of the chunks' own losses": own.sum(),
        "it is the loss of the last chunk": own[-1],
        "it is the loss of the first chunk": own[0],
        "it counts that loss once for each chunk": expected * len(own),
        "it is divided by the number of chunks": expected / len(own),
    }
    which = next((words for words, x in wrong.items() if torch.allclose(value, x, rtol=1e-4, atol=1e-5)), None)
    attempt.fail(
        "the gradients are right, but the loss that you return is not"
        f"{': ' + which if which else ''}. Return the loss of all pairs together, {expected:.4f} here and not "
        f"{value:.4f}."
    )


_CACHE_SLIPS = [
    Slip("negatives", "of the chunk", "every chunk has a loss of its own, so a picture meets only the texts of its "
         "chunk. This is gradient accumulation: it does not replace a large batch here, for it has fewer negatives. "
         "Compute one loss over the vectors of all pairs."),
    Slip("negatives", "of the chunk, summed", "every chunk has a loss of its own, so a picture meets only the texts of "
         "its chunk, and the losses are added up. Compute one loss over the vectors of all pairs."),
    Slip("image", "never", "no gradient reaches the image tower. Its vectors were computed without a graph: run its "
         "chunks again, and hand them their part of the cached gradients."),
    Slip("text", "never", "no gradient reaches the text tower. Its vectors were computed without a graph: run its "
         "chunks again, and hand them their part of the cached gradients."),
    Slip("image", "first", "every chunk of pictures gets the gradients of the first chunk. Split the cached gradients "
         "like the rows."),
    Slip("text", "first", "every chunk of texts gets the gradients of the first chunk. Split the cached gradients like "
         "the rows."),
    Slip("image", "vectors", "you hand the image tower its vectors where their gradients belong: `vectors.grad`."),
    Slip("text", "vectors", "you hand the text tower its vectors where their gradients belong: `vectors.grad`."),
    Slip("image", "twice", "the image tower gets its gradient twice."),
    Slip("text", "twice", "the text tower gets its gradient twice."),
    Slip("scale", "never", "no gradient reaches the parameters of the loss, its temperature. The backward pass from "
         "the loss to the vectors must reach them, too: use `loss.backward()`, and call it where gradients are on."),
    Slip("scale", "each chunk", "the loss's own parameter, its temperature, gets its gradient once for each chunk. One "
         "backward pass of the loss is enough."),
    Slip("scale", "mean", "the gradient of the loss's own parameter, its temperature, is divided by the number of "
         "chunks. There is one loss: take it as it is."),
    Slip("rows", "full chunks alone", "the last chunk is left out where it is smaller. `rows.split(chunk)` gives it, "
         "too."),
    Slip("rows", "last without", "the last chunk is smaller and gets no gradient. `rows.split(chunk)` gives it, too."),
    Slip("rows", "first alone", "only the first chunk gets a gradient. Run all of them again."),
    Slip("factor", "1 / chunks", "all gradients are divided by the number of chunks. That belongs to gradient "
         "accumulation; here is one loss, and its gradient is a sum over the chunks."),
    Slip("factor", "chunks", "all gradients are counted once for each chunk. Call `loss.backward()` once, and hand "
         "each chunk its own part alone."),
    Slip("factor", "-1", "the sign of all gradients is wrong."),
    Slip("old", "lost", "the gradients that were in `.grad` before are lost. Add to them, as `backward` does, and do "
         "not set them to zero."),
]  # fmt: skip
