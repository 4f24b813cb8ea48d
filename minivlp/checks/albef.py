"""Checks for the exercises of lesson 05 (`notebooks/05_albef.ipynb`, section 10).

As in the lessons before, each computes the usual wrong answers beside the right one and names the one that equals the
learner's. Reading this file before you have tried gives the answers away, though not in the words you would write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks.core import Attempt, CheckFailed, Slip, check, reseed, variants

# --------------------------------------------------------------------------------------------------- 1 ema_update

# The same weights in another order, so that pairs by order have the same shapes; and a head that the teacher lacks.
TEACHER = {"query": (3, 4), "key": (3, 4), "scale": (4,), "bias": (4,)}
STUDENT = {"key": (3, 4), "query": (3, 4), "bias": (4,), "scale": (4,), "itm_head": (2, 4)}
MOMENTA = (0.9, 0.995, 0.25)


@check
def ema_update(attempt: Attempt) -> str:
    """Exercise 1: the teacher moves a little towards the student (ALBEF, 3.2; MoCo)."""
    for seed, momentum in enumerate(MOMENTA):
        generator = torch.Generator().manual_seed(seed)
        teacher = {name: torch.randn(shape, generator=generator) for name, shape in TEACHER.items()}
        student = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in STUDENT.items()}
        before = [{name: weight.detach().clone() for name, weight in x.items()} for x in (teacher, student)]
        with torch.enable_grad():
            answer = attempt(teacher, student, momentum)
        if not isinstance(answer, Mapping):
            attempt.fail(
                "the answer must be a dict, the teacher's names with their new weights, but yours is of type "
                f"{type(answer).__name__}."
            )
        for name, now, old in zip(("teacher", "student"), (teacher, student), before, strict=True):
            if now.keys() != old.keys() or not all(torch.equal(now[key], old[key]) for key in old):
                attempt.fail(
                    f"your function changed `{name}` in place. The lesson's `follow` does that, once in each step, but "
                    "here both dicts must stay as they are: make new tensors and a new dict."
                )
        if not all(weight.requires_grad for weight in student.values()):
            attempt.fail(
                "you switched the student's gradients off, and it could not learn any more. Leave its weights as they "
                "are: .detach(), without the underscore, gives another tensor."
            )
        _names(attempt, answer)
        got = torch.cat([
            attempt.tensor(answer[name], shape, what=f"the new `{name}`").flatten() for name, shape in TEACHER.items()
        ])  # fmt: skip

        def moved(
            *, shares: str = "right", pair: str = "name", old: dict = before[0], new: dict = before[1],
            m: float = momentum,
        ) -> Tensor:  # fmt: skip
            keep, take = {
                "right": (m, 1 - m), "exchanged": (1 - m, m), "both m": (m, m), "both 1 - m": (1 - m, 1 - m),
                "student whole": (m, 1), "teacher whole": (1, 1 - m), "teacher whole, m": (1, m), "sum": (1, 1),
                "copied": (0, 1), "unchanged": (1, 0), "mean": (0.5, 0.5), "minus": (m, m - 1),
                "away": (2 - m, m - 1), "twice": (m * m, 1 - m * m), "student alone": (0, 1 - m), "shrunk": (m, 0),
            }[shares]  # fmt: skip
            names = dict(zip(old, new, strict=False)) if pair == "order" else {name: name for name in old}
            return torch.cat([(keep * old[name] + take * new[names[name]]).flatten() for name in old])

        attempt.compare(got, moved(), variants(moved, _EMA_SLIPS))
        if any(weight.requires_grad for weight in answer.values()):
            attempt.fail(
                "the numbers are right, but the new teacher carries the history of the student's weights with it. The "
                "teacher is never trained by a gradient, and the history would grow with every step: compute inside "
                "`with torch.no_grad():`, or use `.detach()`."
            )
    return f"right for {len(MOMENTA)} momenta, and no gradient flows"


def _names(attempt: Attempt, answer: Mapping) -> None:
    """Fail unless the answer has the teacher's names."""
    extra, missing = [name for name in answer if name not in TEACHER], [name for name in TEACHER if name not in answer]
    if extra:
        attempt.fail(f"the answer has `{extra[0]}`, and the teacher has no such weight: go through the teacher's "
                     "names, not the student's.")  # fmt: skip
    if missing:
        attempt.fail(f"`{missing[0]}` is missing. The answer has all the names that the teacher has.")


_EMA_SLIPS = [
    Slip("shares", "exchanged", "momentum and 1 - momentum are exchanged: your teacher is almost a copy of the "
         "student. It *keeps* the share `momentum` of its own: momentum * teacher + (1 - momentum) * student."),
    Slip("shares", "both m", "both are multiplied by momentum. The shares must sum to 1: the student's is "
         "1 - momentum."),
    Slip("shares", "both 1 - m", "both are multiplied by 1 - momentum. The teacher keeps the share `momentum`."),
    Slip("shares", "student whole", "the student comes in whole: multiply it by 1 - momentum."),
    Slip("shares", "teacher whole", "the teacher's own weights are not multiplied by momentum, so they would grow "
         "without end."),
    Slip("shares", "teacher whole, m", "you add momentum times the student to the whole teacher. That is an "
         "optimizer's momentum; here the new weight is a mean: momentum * teacher + (1 - momentum) * student."),
    Slip("shares", "sum", "you add both up. Weigh them: momentum and 1 - momentum."),
    Slip("shares", "copied", "this is the student itself. The teacher moves only a little towards it."),
    Slip("shares", "unchanged", "the teacher has not moved. Add the student's share, 1 - momentum."),
    Slip("shares", "mean", "this is the plain mean of both. `momentum` says how much of the teacher stays."),
    Slip("shares", "minus", "the student is subtracted. Add it."),
    Slip("shares", "away", "the teacher moves *away* from the student. The step is (1 - momentum) * (student - "
         "teacher), or the same with both signs changed."),
    Slip("shares", "twice", "the teacher moves twice. Once is enough."),
    Slip("shares", "student alone", "the teacher's own share, momentum * teacher, is missing."),
    Slip("shares", "shrunk", "the student's share, (1 - momentum) * student, is missing."),
    Slip("pair", "order", "the weights are paired by their order, and the two dicts list them differently. Pair them "
         "by name: student[name]."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------- 2 soft_targets

# Pairs, vectors in the queue, alpha, how far similarities spread. The last spread is that of a temperature of 0.001.
TARGETS = [(4, 6, 0.4, 1.0), (3, 0, 0.3, 2.0), (5, 5, 0.0, 1.0), (2, 7, 0.75, 400.0)]


@check
def soft_targets(attempt: Attempt) -> str:
    """Exercise 2: targets that mix the teacher's opinion with the truth (ALBEF, 3.3)."""
    for seed, (B, Q, alpha, spread) in enumerate(TARGETS):
        similarity = spread * torch.randn(B, B + Q, generator=torch.Generator().manual_seed(seed))
        M = B + Q
        hints = {
            (B, B): "The queue is missing: its Q columns have chances, too, from the teacher.",
            (B, Q): "The batch's own B columns are missing. They come first, and the true ones are among them.",
            (M, M): "There is one row for each of the B queries, and B + Q columns. The truth is a table of this "
            "shape, too: torch.eye(B, B + Q).",
            (M, B): "Transposed: a row for each query.",
            (B,): "Is this a label or a loss for each row? The target is a row of B + Q chances.",
            (M,): "Every query needs a row of its own.",
            (): "Is this the loss? Return the targets.",
        }
        call = f"With B = {B}, Q = {Q} and alpha = {alpha}"
        raw = attempt(similarity, alpha)
        if isinstance(raw, Tensor) and raw.shape == (B, M) and not raw.isfinite().all():
            attempt.fail(
                f"{call} the answer is not finite. At the lowest temperature similarities reach 1,000, and exp() of "
                "that does not fit into float32. Do not compute the softmax by hand: .softmax() subtracts the largest "
                "number first."
            )
        answer = attempt.tensor(raw, (B, M), symbols="(B, B + Q)", shapes=hints)

        def targets(
            *, weigh: str = "right", soft: str = "each row", truth: str = "diagonal", s: Tensor = similarity,
            a: float = alpha,
        ) -> Tensor:  # fmt: skip
            B, M = s.shape
            own = torch.arange(B)
            labels = {"end": M - B + own, "behind": (B + own).clamp(max=M - 1), "first": 0 * own,
                      "teacher's best": s.argmax(1), "next": (own + 1) % M}.get(truth, own)  # fmt: skip
            one_hot = F.one_hot(labels, M).float()
            if truth == "even":
                one_hot = torch.full_like(s, 1 / M)
            elif truth == "batch":
                one_hot = (torch.arange(M) < B).float().expand(B, M)
            chances = {
                "each row": lambda: s.softmax(1),
                "columns": lambda: s.softmax(0),
                "everything": lambda: s.flatten().softmax(0).view(B, M),
                "batch": lambda: F.pad(s[:, :B].softmax(1), (0, M - B)),
                "sharper": lambda: (s / 0.07).softmax(1),
                "twice": lambda: s.softmax(1).softmax(1),
                "log": lambda: s.log_softmax(1),
                "sigmoid": lambda: s.sigmoid(),
                "none": lambda: s,
                "exp": lambda: s.exp(),
                "minus": lambda: (-s).softmax(1),
            }[soft]()
            if weigh == "inside":
                return (a * s + (1 - a) * one_hot).softmax(1)
            share, rest = {"right": (a, 1 - a), "exchanged": (1 - a, a), "teacher alone": (1, 0), "truth alone": (0, 1),
                           "sum": (1, 1), "both alpha": (a, a), "truth whole": (a, 1), "teacher whole": (1, 1 - a),
                           "no truth": (a, 0), "no teacher": (0, 1 - a), "mean": (0.5, 0.5)}[weigh]  # fmt: skip
            return share * chances + rest * one_hot

        sums = answer.sum(1)
        detail = ""
        if (sums - 1).abs().max() > 1e-4:
            detail = f"Every row must sum to 1; yours sum to {sums.min():.3f} .. {sums.max():.3f}."
        attempt.compare(answer, targets(), variants(targets, _TARGET_SLIPS), detail=detail)

    with torch.enable_grad():
        if attempt(similarity.clone().requires_grad_(), alpha).requires_grad:
            attempt.fail(
                "the numbers are right, but a gradient could flow through them into the teacher. Targets are given, "
                "nobody learns by bending them: use `.detach()`, or compute inside `with torch.no_grad():`."
            )
    return f"right for {len(TARGETS)} batches, and no gradient flows"


_TARGET_SLIPS = [
    Slip("weigh", "exchanged", "alpha and 1 - alpha are exchanged. Alpha is the *teacher's* share."),
    Slip("weigh", "teacher alone", "the truth is missing: these are the teacher's chances alone, as if alpha were 1. A "
         "young teacher knows nothing: add 1 - alpha times the true partner."),
    Slip("weigh", "truth alone", "the teacher is missing: these are one-hot rows, as if alpha were 0."),
    Slip("weigh", "sum", "both parts are added up whole. Weigh them: alpha and 1 - alpha."),
    Slip("weigh", "both alpha", "both parts are multiplied by alpha. The truth's share is 1 - alpha."),
    Slip("weigh", "truth whole", "the truth counts whole. Its share is 1 - alpha."),
    Slip("weigh", "teacher whole", "the teacher counts whole. Its share is alpha."),
    Slip("weigh", "no truth", "the truth is missing: add (1 - alpha) where the true partner stands."),
    Slip("weigh", "no teacher", "the teacher is missing: add alpha times its softmax."),
    Slip("weigh", "mean", "this is the plain mean of both. Weigh them: alpha and 1 - alpha."),
    Slip("weigh", "inside", "you mix similarities with the truth, and take the softmax of the mixture. Take the "
         "softmax of the similarities first, then mix."),
    Slip("soft", "columns", "the softmax runs along the wrong dimension, over the queries. Each row is one query's "
         "choice among B + Q: softmax(dim=1)."),
    Slip("soft", "everything", "the softmax runs over the whole table. Each row is one query's choice: "
         "softmax(dim=1)."),
    Slip("soft", "batch", "the softmax leaves the queue out: its chances are 0 in your answer. The teacher chooses "
         "among all B + Q."),
    Slip("soft", "sharper", "you divide by a temperature once more. The similarities you get are divided already."),
    Slip("soft", "twice", "the softmax is taken twice."),
    Slip("soft", "log", "this is the logarithm of the softmax. Targets are chances."),
    Slip("soft", "sigmoid", "you judge each pair on its own (sigmoid). The teacher chooses one among B + Q: softmax."),
    Slip("soft", "none", "the softmax is missing: similarities are no chances."),
    Slip("soft", "exp", "these are exponentials. A softmax also divides them by their sum in each row."),
    Slip("soft", "minus", "the sign is wrong: in your softmax the least similar gets the largest chance."),
    Slip("truth", "end", "you put the true partners at the end, in the queue's last columns. The batch comes first: "
         "the partner of query i is column i."),
    Slip("truth", "behind", "you put the true partners behind the batch's columns, at the queue's beginning. The batch "
         "comes first: the partner of query i is column i."),
    Slip("truth", "first", "column 0 is true in every row. The partner of query i is column i."),
    Slip("truth", "next", "every true partner stands one column too far right. Columns count from 0."),
    Slip("truth", "teacher's best", "you take the teacher's favourite for the truth. The partner of query i is "
         "column i, whatever the teacher thinks."),
    Slip("truth", "even", "you spread the truth's share evenly over all columns (label smoothing). All of it belongs "
         "to column i."),
    Slip("truth", "batch", "all B columns of the batch count as true in your rows. The partner of query i is column i "
         "alone."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- 3 ring_push

RINGS = [(18, 3, 4, (9, 0, 15)), (8, 4, 2, (0, 4)), (5, 5, 3, (0,))]  # Q, B, E, where to start


class _OnRing:
    """The learner's function, which writes on the `ring` kept here: the one that the `Attempt` watches stays as it
    was. Everything else about it, its name, arguments and code, is the function's own."""

    def __init__(self, function: Callable[..., Any], ring: Tensor) -> None:
        functools.update_wrapper(self, function)
        self.function, self.ring, self.__code__ = function, ring.clone(), getattr(function, "__code__", None)

    def __call__(self, ring: Tensor, *rest: Any) -> Any:
        return self.function(self.ring, *rest)


@check
def ring_push(attempt: Attempt) -> str:
    """Exercise 3: new vectors over the oldest in a ring (ALBEF, 3.2; MoCo's queue)."""
    pushes = 0
    for seed, (Q, B, E, starts) in enumerate(RINGS):
        generator = torch.Generator().manual_seed(seed)
        ring = torch.randn(Q, E, generator=generator)
        for start in starts:
            rows = torch.randn(B, E, generator=generator).requires_grad_()
            on_ring = _OnRing(attempt.function, ring)
            with torch.enable_grad():
                answer = Attempt(attempt.name, on_ring)(ring, start, rows)
            new_start = _whole_number(attempt, answer)
            ring = _pushed(attempt, ring, on_ring.ring, start, rows)
            _next_start(attempt, new_start, start, Q, B)
            pushes += 1
    _uneven_ring(attempt)
    return f"right for {pushes} pushes, and without a history"


def _whole_number(attempt: Attempt, answer: Any) -> int:
    """The new start, whether it is an int or a tensor of one whole number."""
    if isinstance(answer, tuple):
        attempt.fail("the answer must be the new start alone: the ring is the caller's own and changed in place.")
    if isinstance(answer, Tensor) and answer.ndim == 0 and answer.dtype in (torch.int64, torch.int32):
        return int(answer)
    if isinstance(answer, bool) or not isinstance(answer, Integral):
        kind = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        attempt.fail(f"the answer must be the new start, a whole number (int), but yours is: {kind}.")
    return int(answer)


def _pushed(attempt: Attempt, before: Tensor, ring: Tensor, start: int, rows: Tensor) -> Tensor:
    """What the ring (Q, E) must hold now. Fails unless `ring` does, without a history, and as a copy."""
    (Q, E), B = before.shape, len(rows)
    new = rows.detach().clone()
    got = attempt.tensor(ring, (Q, E), symbols="(Q, E)", what="the ring, after your function,")

    def pushed(*, where: str = "start", what: str = "rows") -> Tensor:
        values = {
            "rows": lambda: new,
            "backwards": lambda: new.flip(0),
            "first": lambda: new[:1].expand_as(new),
            "last": lambda: new[-1:].expand_as(new),
            "mean": lambda: new.mean(0).expand_as(new),
            "added": lambda: before[start : start + B] + new,
            "half": lambda: (before[start : start + B] + new) / 2,
            "length": lambda: F.normalize(new, dim=-1),
        }[what]()
        if where == "shift, new last":
            return torch.cat([before[B:], values])
        if where == "shift, new first":
            return torch.cat([values, before[:-B] if B < Q else before[:0]])
        first, count = {"start": (start, B), "front": (0, B), "end": (Q - B, B), "after": (start + B, B),
                        "before": (start - B, B), "late": (start + 1, B), "one": (start, 1),
                        "all but last": (start, B - 1), "everywhere": (start, Q)}[where]  # fmt: skip
        places = (first + torch.arange(count)) % Q
        return before.index_copy(0, places, values[torch.arange(count) % B])

    first, last = start, start + B - 1
    detail = f"With Q = {Q}, B = {B} and start = {start}, rows {first} .. {last} of the ring are written, no other."
    if torch.equal(got, before):
        attempt.fail(
            "the ring that you were given has not changed: did you write into a copy (torch.cat, .clone()), or only "
            f"give the name `ring` to another tensor? Write into it: ring[...] = ...\n{detail}"
        )
    attempt.compare(got, pushed(), variants(pushed, _RING_SLIPS), atol=0, rtol=0, detail=detail)
    if not rows.requires_grad:
        attempt.fail(
            "you switched off the gradient of `rows` itself, and the caller may need it. `.detach()`, without the "
            "underscore, gives another tensor."
        )
    if ring.requires_grad:
        attempt.fail(
            "the right vectors are in the ring, and their history with them: every step would hold on to all the steps "
            "before, and a gradient could flow into what is only compared with. Write `rows.detach()`, or write inside "
            "`with torch.no_grad():`."
        )
    with torch.no_grad():
        rows.zero_()
    if not torch.equal(ring, pushed()):
        attempt.fail(
            "the ring shares its memory with `rows`: when the caller changed `rows` later, the ring changed, too. Copy "
            "the numbers into the ring: ring[start : start + B] = ..."
        )
    return pushed()


def _next_start(attempt: Attempt, got: int, start: int, Q: int, B: int) -> None:
    """Fail unless `got` is where the next push begins."""
    expected = (start + B) % Q
    if got == expected:
        return
    known = {
        start + B: f"the new start is not wrapped: at the end of the ring, {Q}, it begins again from 0. Use % Q.",
        start: "the new start is the old one, so the next push would write over these vectors. Move it on by B.",
        start + 1: "the start moves on by 1, and B vectors were written. Move it on by B.",
        start + B - 1: "this is the last row that was written. The next push begins one row after it.",
        B: "this is where the ring goes on after the first push: add B to `start`.",
        (start + B) % B: "you take the remainder of B. The ring has Q rows: % Q.",
        (start - B) % Q: "the start moves backwards. Add B.",
    }
    message = known.get(got, "the new start is wrong, and not in a way that this check knows.")
    attempt.fail(f"{message}\nWith Q = {Q}, B = {B} and start = {start} it must be {expected}, yours is {got}.")


def _uneven_ring(attempt: Attempt) -> None:
    """Fail unless a ring that batches cannot fill evenly is refused with a ValueError, before anything is written."""
    Q, B = 6, 4
    ring = torch.zeros(Q, 3)
    said = f"a ring of {Q} cannot be filled by batches of {B}, and your function"
    advice = "Raise a ValueError that says so, first of all: if Q % B: raise ValueError(...)"
    try:
        attempt.function(ring, 0, torch.ones(B, 3))
    except ValueError:
        if ring.any():
            attempt.fail(f"{said} says so, but only after it has written. {advice}")
        return
    except Exception as error:
        attempt.fail(f"{said} stops with {type(error).__name__}. {advice}")
    attempt.fail(f"{said} does not complain: sooner or later a push would reach over the end. {advice}")


_RING_SLIPS = [
    Slip("where", "front", "you write at the front of the ring each time. Write from `start` on."),
    Slip("where", "end", "you write at the end of the ring each time. Write from `start` on."),
    Slip("where", "after", "you move `start` on before you write. Write first: from the old `start` on."),
    Slip("where", "before", "you write in front of `start`. Write from `start` on."),
    Slip("where", "late", "you write one row too late. Rows count from 0."),
    Slip("where", "one", "only one row is written. There are B: ring[start : start + B]."),
    Slip("where", "all but last", "the last of the rows is not written: the end of a slice is not in it, so it is "
         "start + B."),
    Slip("where", "everywhere", "the whole ring is written over. Only B rows are new: ring[start : start + B]."),
    Slip("where", "shift, new last", "you shift all vectors and put the new ones at the end. That moves the whole "
         "ring at each step; write over the oldest instead, from `start` on, and leave the others where they are."),
    Slip("where", "shift, new first", "you shift all vectors and put the new ones at the front. That moves the whole "
         "ring at each step; write over the oldest instead, from `start` on, and leave the others where they are."),
    Slip("what", "backwards", "the new vectors are in reverse order. Row i of `rows` goes to place start + i."),
    Slip("what", "first", "the first row is written B times."),
    Slip("what", "last", "the last row is written B times."),
    Slip("what", "mean", "you write the mean of the rows. Every row gets a place of its own."),
    Slip("what", "added", "you add the new vectors to the old ones. Write over them."),
    Slip("what", "half", "you average new and old vectors. It is the teacher's *weights* that move slowly; in the ring "
         "the new vectors replace the old ones."),
    Slip("what", "length", "you bring the vectors to length 1. They are stored as they come."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- 4 draw_hard

DRAWS = 200  # batches
CLOSE = 0.1  # what `_apart` allows; right answers come to 0.05 by chance, known mistakes to 0.15 and more


@check
def draw_hard(attempt: Attempt) -> str:
    """Exercise 4: wrong partners drawn by similarity (ALBEF, 3.2). Random, so judged by hundreds of small batches."""
    similarity, same = _alike()
    B = len(similarity)
    generator = torch.Generator().manual_seed(0)
    reseed(1)
    draws = torch.stack([_drawn(attempt, similarity, same, generator) for _ in range(DRAWS)])  # (n, B)
    _wrong_ones(attempt, draws, same)
    _by_chance(attempt, draws, similarity, same)
    shares = F.one_hot(draws, B).float().mean(0)  # (B, B)

    def chances(*, weigh: str = "softmax") -> Tensor:
        s, forbidden = similarity, same
        weights = {
            "softmax": lambda: s.softmax(1),
            "even": lambda: torch.ones_like(s),
            "columns": lambda: s.softmax(0),
            "for each column": lambda: s.T.softmax(1),
            "minus": lambda: (-s).softmax(1),
            "three": lambda: (s >= s.masked_fill(forbidden, -1e9).topk(3, 1).values[:, -1:]).float(),
            "sharper": lambda: (s / 0.07).masked_fill(forbidden, float("-inf")).softmax(1),
            "sharper, then more": lambda: (s / 0.07).softmax(1) + 1e-4,
            "linear": lambda: s - s.min(1, keepdim=True).values,
            "magnitude": lambda: s.abs(),
            "sigmoid": lambda: s.sigmoid(),
            "large": lambda: s.softmax(1) + 0.1,
        }[weigh]().masked_fill(forbidden, 0)
        return weights / weights.sum(1, keepdim=True)

    expected = chances()
    if _apart(shares, expected) > CLOSE:
        row, column = divmod(int((shares - expected).abs().argmax()), B)
        nearest = min(variants(chances, _DRAW_SLIPS, at_once=1), key=lambda known: _apart(shares, known[1]))
        message = "the chances are wrong, and not in a way that this check knows."
        if _apart(shares, nearest[1]) <= CLOSE:
            message = nearest[0]
        attempt.fail(
            f"{message}\nRow {row} draws column {column} {shares[row, column]:.0%} of the time, and should "
            f"{expected[row, column]:.0%} of the time."
        )
    many = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(64, dtype=torch.bool)
    attempt.repeatable(
        lambda seed: (_drawn(attempt, many, eye, torch.Generator().manual_seed(seed)),), drawn="the partners"
    )
    _sure_model(attempt)
    return f"right for {DRAWS} batches of {B}, and for a model that is sure"


def _apart(shares: Tensor, chances: Tensor) -> float:
    """By how much the draws of a row differ from its chances, (B, B) each: 0 .. 1, the mean over the rows."""
    return float((shares - chances).abs().sum(1).mean() / 2)


def _alike() -> tuple[Tensor, Tensor]:
    """similarity (8, 8), over the temperature, and which captions say the same (8, 8): two pairs of them, and each
    with itself. The same ones are the most similar, and some columns are liked by all rows."""
    generator = torch.Generator().manual_seed(5)
    same = torch.eye(8, dtype=torch.bool)
    for i, j in ((1, 4), (2, 7)):
        same[i, j] = same[j, i] = True
    similarity = torch.randn(8, 8, generator=generator) + 1.5 * torch.randn(8, generator=generator)
    return similarity.masked_fill(same, 4.0) + 0.1 * torch.randn(8, 8, generator=generator), same


def _drawn(attempt: Attempt, similarity: Tensor, same: Tensor, generator: torch.Generator) -> Tensor:
    """One answer, (B), after everything that can be seen without statistics."""
    B = len(similarity)
    hints = {
        (B, 1): "Drop the last dimension: [:, 0].",
        (1, B): "Drop the first dimension.",
        (B, B): "Are these the chances? Draw one column for each row: torch.multinomial(chances, 1).",
        (): "One partner for each row is wanted.",
        (1,): "One partner for each row is wanted.",
    }
    raw = attempt(similarity, same, generator)
    if isinstance(raw, Tensor) and raw.shape == (B,) and raw.is_floating_point():
        attempt.fail("these are fractions. Return the numbers of the columns, whole numbers (int64).")
    answer = attempt.tensor(raw, (B,), symbols="(B,)", dtype=torch.long, shapes=hints)
    if ((answer < 0) | (answer >= B)).any():
        attempt.fail(f"a partner must be the number of a column, 0 to {B - 1}; yours reach from {answer.min()} to "
                     f"{answer.max()}.")  # fmt: skip
    return answer


def _wrong_ones(attempt: Attempt, draws: Tensor, same: Tensor, *, when: str = "") -> None:
    """Fail unless none of draws (n, B) is a partner that says the same, (B, B)."""
    B = len(same)
    own = draws == torch.arange(B)
    forbidden = same[torch.arange(B), draws]  # (n, B)
    if not forbidden.any():
        return
    zero = "`same` is True there: set these chances to 0 before you draw"
    if own.all():
        attempt.fail(f"{when}every row gets its own, true partner. {zero}.")
    if forbidden.all():
        attempt.fail(f"{when}nothing is drawn but what says the same: the mask is the wrong way round. {zero}.")
    if own.any():
        attempt.fail(
            f"{when}{own.float().mean():.0%} of the rows draw their own, true partner, and it would be called wrong. "
            f"{zero} (in the chances, not in the similarities: there 0 is an ordinary number)."
        )
    row = int(forbidden.any(0).int().argmax())
    attempt.fail(
        f"{when}row {row} draws a column that says the same as its own, and it would be called wrong. The diagonal is "
        f"not all that is forbidden. {zero}."
    )


def _by_chance(attempt: Attempt, draws: Tensor, similarity: Tensor, same: Tensor) -> None:
    """Fail if nothing is drawn at all."""
    if not (draws == draws[0]).all():
        return
    if torch.equal(draws[0], similarity.masked_fill(same, float("-inf")).argmax(1)):
        attempt.fail(
            "you take the most similar one each time (argmax). Among real captions that is often one that is right, "
            "too, in other words, and the others would never be seen. *Draw*: torch.multinomial(chances, 1)."
        )
    if torch.equal(draws[0], similarity.masked_fill(same, float("inf")).argmin(1)):
        attempt.fail("you take the least similar one each time, which is the easiest. *Draw*, with chances that grow "
                     "with the similarity.")  # fmt: skip
    attempt.fail(f"{len(draws)} draws gave the same partners. Draw them anew at each call, from `generator`, and do "
                 "not seed it.")  # fmt: skip


def _sure_model(attempt: Attempt) -> None:
    """Fail unless there is a wrong partner, too, where the softmax leaves it a chance of exactly 0."""
    generator = torch.Generator().manual_seed(0)
    for B in (2, 6):
        similarity = torch.randn(B, B, generator=generator) + 900 * torch.eye(B)
        same = torch.eye(B, dtype=torch.bool)
        if B > 2:
            similarity[0, 1] = similarity[0, 0]  # of these two it cannot tell which is right
        when = "when the model is sure, and its softmax gives all the chance to the true partner, "
        hint = "Add a little to every chance, after the softmax and before the forbidden ones become 0: + 1e-4."
        try:
            draws = torch.stack([_drawn(attempt, similarity, same, generator) for _ in range(20)])
            _wrong_ones(attempt, draws, same)
        except CheckFailed as failed:
            cause = failed.__cause__
            if cause is None:
                what = str(failed).removeprefix(f"{attempt.name}: ")
                attempt.fail(f"{when}nothing is left to draw from: {what} {hint}")
            if "inf" in str(cause) and "nan" in str(cause):
                hint = ("Here exp() of a large similarity, or 0 / 0, gives what is no chance: use .softmax(), which "
                        f"subtracts the largest number first. {hint}")  # fmt: skip
            attempt.fail(f"{when}your function stops with {type(cause).__name__}: {str(cause).splitlines()[0]} {hint}")


_DRAW_SLIPS = [
    Slip("weigh", "even", "all wrong partners come equally often. The more similar one is, the larger its chance: "
         "softmax(similarity)."),
    Slip("weigh", "columns", "the softmax runs along the wrong dimension. Each row draws among its columns: "
         "softmax(dim=1)."),
    Slip("weigh", "for each column", "you draw a row for each column. Each *row* draws among its columns."),
    Slip("weigh", "minus", "the sign is wrong: the least similar ones are drawn most often, and they are the easiest."),
    Slip("weigh", "three", "you draw among the most similar ones, all alike. Every wrong partner has a chance, as "
         "large as the softmax says."),
    Slip("weigh", "sharper", "the most similar one is drawn far too often: do you divide by a temperature once more? "
         "The similarities you get are divided already."),
    Slip("weigh", "sharper, then more", "hardly anything but the true partner has got a chance, so that the little "
         "that is added decides: do you divide by a temperature once more? The similarities you get are divided "
         "already."),
    Slip("weigh", "linear", "the chances grow with the similarity, but not as softmax(similarity) does."),
    Slip("weigh", "magnitude", "the sign of the similarity is lost. The chances are softmax(similarity)."),
    Slip("weigh", "sigmoid", "you judge each pair on its own (sigmoid). The chances are softmax(similarity)."),
    Slip("weigh", "large", "what you add to each chance is too large: it counts more than the similarity. 1e-4 is "
         "enough to keep the draw possible."),
]  # fmt: skip

# --------------------------------------------------------------------------------------------------- 5 rerank_top

SEARCHES = [(4, 9, 3), (5, 7, 1), (3, 5, 5)]  # rows that search, columns to be found, k


@check
def rerank_top(attempt: Attempt) -> str:
    """Exercise 5: search by vectors, then judge the best with the fusion half (ALBEF, 4.2)."""
    for seed, (N, M, k) in enumerate(SEARCHES):
        generator = torch.Generator().manual_seed(seed)
        similarity, truth = torch.randn(N, M, generator=generator), 4 * torch.randn(N, M, generator=generator)
        match = _Match(truth)
        raw = attempt(similarity, k, match)
        hints = {
            (N, k): f"Are these the k best alone? Put them in their places in a table (N, M), -100 elsewhere: "
            f"{M} columns.",
            (N,): "Is this the best column of each row? Return the whole table of scores.",
            (N * k,): "Are these the scores one after the other? Put them in their places in a table (N, M).",
            (M, N): "Transposed: a row for each that searches.",
            (M,): "This is one row. There are N.",
        }
        if isinstance(raw, Tensor) and raw.shape == (N, M) and (raw == float("-inf")).any():
            attempt.fail("those that are not re-ranked have minus infinity in your table. Give them -100, with which "
                         "one can go on computing.")  # fmt: skip
        answer = attempt.tensor(raw, (N, M), symbols="(N, M)", shapes=hints)
        best = similarity.topk(k, dim=1).indices  # (N, k)
        _judged(attempt, match.asked, similarity, k)

        def table(
            *, others: str = "-100", top: str = "score", place: str = "own", s: Tensor = similarity,
            truth: Tensor = truth, best: Tensor = best, k: int = k,
        ) -> Tensor:  # fmt: skip
            score, near = truth.gather(1, best), s.gather(1, best)  # (N, k)
            values = {
                "score": lambda: score,
                "similarity": lambda: near,
                "sum": lambda: score + near,
                "mean": lambda: (score + near) / 2,
                "product": lambda: score * near,
                "sigmoid": lambda: score.sigmoid(),
                "softmax": lambda: score.softmax(1),
                "minus": lambda: -score,
                "whole": lambda: score.trunc(),
            }[top]()
            rest = {"-100": torch.full_like(s, -100), "0": torch.zeros_like(s), "similarity": s,
                    "-1": torch.full_like(s, -1), "100": torch.full_like(s, 100),
                    "below": s - 100, "lowest": score.min(1, keepdim=True).values.expand_as(s)}[others]  # fmt: skip
            where = {"own": best, "front": torch.arange(k).expand_as(best), "sorted": best.sort(1).values,
                     "backwards": best.flip(1)}[place]  # fmt: skip
            return rest.scatter(1, where, values)

        attempt.compare(answer, table(), variants(table, _RERANK_SLIPS))
    pairs, whole = sum(N * k for N, _, k in SEARCHES), sum(N * M for N, M, _ in SEARCHES)
    return f"right for {len(SEARCHES)} searches, with {pairs} pairs judged instead of {whole}"


class _Match:
    """Stands for the fusion half: judges pairs as `truth` (N, M) says, and remembers which it was asked for."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.asked = truth, []

    def __call__(self, row: Any, columns: Any) -> Tensor:
        """row, columns (k) -> scores (k). Raises RuntimeError, as PyTorch would, for what cannot be judged."""
        N, M = self.truth.shape
        row = row.item() if isinstance(row, Tensor) and row.numel() == 1 else row
        if isinstance(row, bool) or not isinstance(row, Integral) or not 0 <= row < N:
            got = f"a tensor {tuple(row.shape)}" if isinstance(row, Tensor) else repr(row)
            raise RuntimeError(f"`match` needs the number of one row, 0 to {N - 1}, first; it got {got}")
        places = torch.as_tensor(columns)
        if places.ndim != 1 or places.dtype not in (torch.int64, torch.int32):
            got = f"{tuple(places.shape)}, {places.dtype}"
            raise RuntimeError(f"`match` needs the numbers of columns (k), whole numbers, second; it got {got}")
        if not ((places >= 0) & (places < M)).all():
            raise RuntimeError(f"`match` got columns outside of 0 .. {M - 1}")
        self.asked += [(int(row), column) for column in places.tolist()]
        return self.truth[row, places.long()]


def _judged(attempt: Attempt, asked: Sequence[tuple[int, int]], similarity: Tensor, k: int) -> None:
    """Fail unless just the k best of each row of similarity (N, M) were judged, each once."""
    (N, M), pairs = similarity.shape, set(asked)
    if not asked:
        attempt.fail("`match` was never asked. It judges the k best of each row: match(row, columns).")

    def among(columns: Tensor) -> set[tuple[int, int]]:
        return {(row, column) for row, some in enumerate(columns.tolist()) for column in some}

    order = similarity.argsort(dim=1, descending=True)
    right = among(order[:, :k])
    cost = f"`match` is the slow part, and was asked for {len(asked)} pairs. k = {k} for each of {N} rows are {N * k}."
    if pairs == right:
        if len(asked) > len(right):
            attempt.fail(f"some pairs are judged more than once. {cost}")
        return
    if len(pairs) == N * M:
        attempt.fail(f"all pairs are judged, and the vectors have saved nothing. {cost} Choose first: "
                     "similarity.topk(k, dim=1).indices.")  # fmt: skip
    missing = [row for row in range(N) if not any(first == row for first, _ in pairs)]
    columns = similarity.argsort(dim=0, descending=True)[:k].T  # (M, k): the best rows of each column
    known = {
        f"the k *lowest* of each row are judged. Take the most similar ones: topk(k, dim=1). {cost}": among(
            order[:, M - k :]
        ),
        "you choose along the wrong dimension: the best rows of each column. Each *row* searches among the columns: "
        "topk(k, dim=1).": {(row, column) for column, row in among(columns)},
        "all rows re-rank what the first row found. Each has its own k best.": among(order[:1, :k].expand(N, -1)),
        "the first k columns are judged, and the similarity is not used. Choose with it: topk(k, dim=1).": among(
            torch.arange(k).expand(N, -1)
        ),
        f"one more than the k best is judged in each row. {cost}": among(order[:, : k + 1]),
        f"the last of the k best is not judged. {cost}": among(order[:, : k - 1]),
        "the very best of each row is left out, as if it were the row itself. Pictures search among texts here: take "
        "the first k.": among(order[:, 1 : k + 1]),
        "you look for places in the list of ranks: you sorted twice. argsort once lists the columns from the lowest to "
        "the most similar.": among(order.argsort(dim=1)[:, :k]),
        "you compare the similarities without their sign. -2 is less than 1.": among(
            similarity.abs().argsort(dim=1, descending=True)[:, :k]
        ),
    }
    for message, wrong in known.items():
        if pairs == wrong:
            attempt.fail(message)
    if missing:
        attempt.fail(f"row {missing[0]} was never judged. Each of the {N} rows has its own k best. {cost}")
    row = next(row for row in range(N) if {c for r, c in pairs if r == row} != set(order[row, :k].tolist()))
    got = sorted({c for r, c in pairs if r == row})
    attempt.fail(
        f"the wrong columns are judged, and not in a way that this check knows. The {k} best of row {row} are "
        f"{sorted(order[row, :k].tolist())}; `match` was asked for {got}."
    )


_RERANK_SLIPS = [
    Slip("others", "0", "those that are not re-ranked have 0 in your table. Scores of a bad match are below 0, so it "
         "would lose against a column that was never looked at: give them -100."),
    Slip("others", "similarity", "those that are not re-ranked keep their similarity. It is no ITM score, and cannot "
         "be compared with one: give them -100."),
    Slip("others", "-1", "those that are not re-ranked have -1 in your table. Scores can be lower: give them -100."),
    Slip("others", "100", "those that are not re-ranked have +100, and so they win. Give them -100."),
    Slip("others", "below", "those that are not re-ranked have their similarity - 100. All of them get -100."),
    Slip("others", "lowest", "those that are not re-ranked have the lowest score of their row, and so tie with a "
         "column that was judged. Give them -100."),
    Slip("top", "similarity", "the k best keep their similarity, and what `match` says is not used."),
    Slip("top", "sum", "you add score and similarity. ALBEF ranks by the score alone."),
    Slip("top", "mean", "you average score and similarity. ALBEF ranks by the score alone."),
    Slip("top", "product", "you multiply score and similarity. ALBEF ranks by the score alone."),
    Slip("top", "sigmoid", "you turn the scores into chances (sigmoid). Write them as `match` gives them."),
    Slip("top", "softmax", "you take a softmax over the scores of a row. Write them as `match` gives them."),
    Slip("top", "minus", "the sign of the scores is turned round."),
    Slip("top", "whole", "the scores are cut off to whole numbers: torch.full with -100 makes a table of integers. "
         "Fill it with -100.0."),
    Slip("place", "front", "the scores stand in the first k columns. Each belongs to the column that was judged: "
         "scores[row, columns] = ..."),
    Slip("place", "sorted", "the scores are in other columns than those they were given for: some are sorted, and "
         "others are not. Use the same `columns` for `match` and for the table."),
    Slip("place", "backwards", "the scores are in reverse order. Use the same `columns` for `match` and for the "
         "table."),
]  # fmt: skip
