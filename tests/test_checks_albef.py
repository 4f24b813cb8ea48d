"""The checks of lesson 05 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

from collections.abc import Callable

import check_helpers as helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.checks import CheckFailed
from minivlp.checks import albef as checks
from minivlp.losses import distilled_contrastive_loss, hard_negatives
from minivlp.models.albef import PairQueue, follow

torch.set_num_threads(1)
torch.zeros((), requires_grad=True).backward(torch.ones(()))  # PyTorch loads a lot at the first such call: not timed

LESSON = "05_albef.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def ema_mean(teacher, student, momentum, *, rule=lambda t, s, m: m * t + (1 - m) * s, cut=torch.detach):
    """Right by default; the options make the wrong ones."""
    return {name: rule(weight, cut(student[name]), momentum) for name, weight in teacher.items()}


@torch.no_grad()
def ema_lerp(teacher, student, momentum):
    return {name: torch.lerp(teacher[name], student[name], 1 - momentum) for name in teacher}


def ema_loop(teacher, student, momentum):
    """Copies, which are then moved, as an optimizer would."""
    moved = {name: weight.clone() for name, weight in teacher.items()}
    for name, weight in moved.items():
        weight.data.mul_(momentum).add_(student[name].data, alpha=1 - momentum)
    return moved


def ema_package(teacher, student, momentum):
    """The lesson's own, which works in place, on copies."""
    modules = [nn.ParameterDict({name: weight.clone() for name, weight in x.items()}) for x in (teacher, student)]
    follow(*modules, momentum)
    return {name: modules[0][name].detach() for name in teacher}


def soft_mix(s, alpha, *, chances=lambda s: s.softmax(1), truth=lambda s: torch.eye(*s.shape),
             mix=lambda p, y, a: a * p + (1 - a) * y, cut=torch.detach):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    return mix(chances(cut(s)), truth(s), alpha)


@torch.no_grad()
def soft_diagonal(s, alpha):
    """No table for the truth: the diagonal of the teacher's part is raised."""
    target = alpha * F.softmax(s, dim=-1)
    target.fill_diagonal_(0)
    own = torch.arange(len(s))
    target[own, own] = alpha * s.softmax(1).diagonal() + 1 - alpha
    return target


def soft_one_hot(s, alpha):
    truth = F.one_hot(torch.arange(len(s)), s.shape[1])
    return torch.lerp(truth.float(), s.log_softmax(-1).exp().data, alpha)


def soft_by_hand(s, alpha):
    e = (s - s.max(dim=1, keepdim=True).values).exp()
    zeros = torch.zeros(len(s), s.shape[1] - len(s))
    return (alpha * e / e.sum(1, keepdim=True)).detach() + (1 - alpha) * torch.cat([torch.eye(len(s)), zeros], dim=1)


def even(Q, B):
    if Q % B:
        raise ValueError(f"a ring of {Q} cannot be filled by batches of {B}")


def push_slice(ring, start, rows, *, places=lambda ring, start, B: slice(start, start + B), new=torch.detach,
               then=lambda start, B, Q: (start + B) % Q, refuse=even):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    refuse(len(ring), len(rows))
    ring[places(ring, start, len(rows))] = new(rows)
    return then(start, len(rows), len(ring))


@torch.no_grad()
def push_copy(ring, start, rows):
    (Q, B), end = (len(ring), len(rows)), start + len(rows)
    if Q % B != 0:
        raise ValueError("uneven")
    ring[start:end].copy_(rows)
    return 0 if end == Q else end


def push_modulo(ring, start, rows):
    """Places that may run over the end, and a start that is a tensor."""
    even(len(ring), len(rows))
    places = (start + torch.arange(len(rows))) % len(ring)
    ring.index_copy_(0, places, rows.data)
    return (places[-1] + 1) % len(ring)


def push_loop(ring, start, rows):
    even(len(ring), len(rows))
    with torch.inference_mode():
        for row in rows:
            ring[start] = row
            start = (start + 1) % len(ring)
    return start


def push_package(ring, start, rows):
    """The lesson's own, around the check's ring."""
    queue = PairQueue(len(ring), ring.shape[1])
    queue.image.set_(ring)
    queue.next.fill_(start)
    queue.push(rows, rows, torch.zeros(len(rows), 1, dtype=torch.long), torch.zeros(len(rows), dtype=torch.long))
    return int(queue.next)


def draw_multinomial(similarity, same, generator, *, weigh=lambda s: s.softmax(1) + 1e-4, more=lambda w: w,
                     forbid=lambda w, same: w.masked_fill(same, 0)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    chances = more(forbid(weigh(similarity), same))
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def draw_masked_first(similarity, same, generator):
    """Without anything added: what is forbidden takes no part in the softmax."""
    chances = similarity.masked_fill(same, float("-inf")).softmax(dim=1)
    return chances.multinomial(1, generator=generator).flatten()


def draw_gumbel(similarity, same, generator):
    """The largest of similarity plus Gumbel noise is drawn as the softmax says."""
    noise = torch.rand(similarity.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return (similarity - (-noise.log()).log()).masked_fill(same, float("-inf")).argmax(dim=1)


def draw_loop(similarity, same, generator):
    rows = []
    for s, forbidden in zip(similarity, same, strict=True):
        allowed = (~forbidden).nonzero()[:, 0]
        rows.append(allowed[torch.multinomial(s[allowed].softmax(0), 1, generator=generator)])
    return torch.cat(rows)


def draw_package(similarity, same, generator):
    return hard_negatives(similarity, same, torch.rand(len(same), generator=generator))


def rerank_loop(similarity, k, match, *, choose=lambda s, k: s.topk(k, dim=1).indices, at=lambda columns: columns,
                value=lambda scores, near: scores, empty=lambda s: torch.full_like(s, -100.0)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    table = empty(similarity)
    for row, columns in enumerate(choose(similarity, k)):
        table[row, at(columns)] = value(match(row, columns), similarity[row, columns])
    return table


def rerank_scatter(similarity, k, match):
    best = similarity.topk(k, sorted=False).indices
    scores = torch.stack([match(row, columns) for row, columns in enumerate(best)])
    return torch.full(similarity.shape, -100.0).scatter(1, best, scores)


def rerank_one_by_one(similarity, k, match):
    """Pair after pair, and the row as a tensor."""
    table = -100 * torch.ones_like(similarity)
    for row in torch.arange(len(similarity)):
        for column in similarity[row].argsort(descending=True)[:k]:
            table[row, column] = match(row, column[None])[0]
    return table


def rerank_where(similarity, k, match):
    """In the order of the columns, from a mask."""
    limit = similarity.sort(dim=1, descending=True).values[:, k - 1 : k]
    rows = []
    for row, chosen in enumerate(similarity >= limit):
        columns = chosen.nonzero()[:, 0]
        rows.append(torch.full((len(chosen),), -100.0).index_put((columns,), match(row, columns.tolist())))
    return torch.stack(rows)


RIGHT = [
    ("ema_update", ema_mean),
    ("ema_update", ema_lerp),
    ("ema_update", ema_loop),
    ("ema_update", ema_package),
    ("soft_targets", soft_mix),
    ("soft_targets", soft_diagonal),
    ("soft_targets", soft_one_hot),
    ("soft_targets", soft_by_hand),
    ("ring_push", push_slice),
    ("ring_push", push_copy),
    ("ring_push", push_modulo),
    ("ring_push", push_loop),
    ("ring_push", push_package),
    ("draw_hard", draw_multinomial),
    ("draw_hard", draw_masked_first),
    ("draw_hard", draw_gumbel),
    ("draw_hard", draw_loop),
    ("draw_hard", draw_package),
    ("rerank_top", rerank_loop),
    ("rerank_top", rerank_scatter),
    ("rerank_top", rerank_one_by_one),
    ("rerank_top", rerank_where),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


def test_right_targets_give_the_losses_of_the_package():
    """Cross-entropy against what passes here is the lesson's loss."""
    logits, teacher = torch.randn(2, 4, 10)
    mine = F.cross_entropy(logits, soft_mix(teacher, 0.4))
    torch.testing.assert_close(mine, distilled_contrastive_loss(logits, teacher, 0.4))


# --------------------------------------------------------------------------------------------- seeded mistakes


def moves(rule: Callable) -> Callable:
    """Another new weight, of the teacher's, the student's and the momentum."""
    return lambda *args: ema_mean(*args, rule=rule)


def ema_by_order(teacher, student, momentum):
    pairs = zip(teacher.items(), student.values(), strict=False)
    return {name: momentum * t + (1 - momentum) * s.detach() for (name, t), s in pairs}


def ema_in_place(teacher, student, momentum):
    for name, weight in teacher.items():
        weight.lerp_(student[name].detach(), 1 - momentum)
    return teacher


def ema_new_entries(teacher, student, momentum):
    """The tensors stay, but the caller's dict has others."""
    for name in teacher:
        teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name].detach()
    return dict(teacher)


def ema_student_in_place(teacher, student, momentum):
    with torch.no_grad():
        return {name: student[name].mul_(1 - momentum) + momentum * weight for name, weight in teacher.items()}


def ema_switch_off(teacher, student, momentum):
    for weight in student.values():
        weight.requires_grad_(False)
    return ema_mean(teacher, student, momentum)


def ema_student_names(teacher, student, momentum):
    return {name: momentum * teacher.get(name, 0) + (1 - momentum) * w.detach() for name, w in student.items()}


def ema_missing(teacher, student, momentum):
    moved = ema_mean(teacher, student, momentum)
    return {name: moved[name] for name in list(moved)[:-1]}


def mixes(mix: Callable) -> Callable:
    """Another mixture of chances, truth and alpha."""
    return lambda *args: soft_mix(*args, mix=mix)


def soft(chances: Callable) -> Callable:
    """Other chances of the teacher's."""
    return lambda *args: soft_mix(*args, chances=chances)


def truly(labels: Callable) -> Callable:
    """Other true columns, of B and M."""
    return lambda *args: soft_mix(*args, truth=lambda s: F.one_hot(labels(*s.shape), s.shape[1]).float())


def targets(change: Callable) -> Callable:
    """`change` of the right targets (B, M)."""
    return lambda *args: change(soft_mix(*args))


def naive_softmax(s):
    return s.exp() / s.exp().sum(1, keepdim=True)


def soft_in_place(s, alpha):
    s.sub_(s.max())
    return soft_mix(s, alpha)


def pushes(**options) -> Callable:
    return lambda *args: push_slice(*args, **options)


def places(choose: Callable) -> Callable:
    """Other rows of the ring, of start, B and Q."""
    return pushes(places=lambda ring, start, B: choose(start, B, len(ring)))


def push_shift(ring, start, rows, *, front=False):
    """First in, first out: everything moves."""
    B = len(rows)
    even(len(ring), B)
    old = ring.clone()
    parts = [rows.detach(), old[:-B]] if front else [old[B:], rows.detach()]
    ring.copy_(torch.cat(parts))
    return (start + B) % len(ring)


def push_one(ring, start, rows):
    even(len(ring), len(rows))
    ring[start] = rows[0].detach()
    return (start + len(rows)) % len(ring)


def push_all_but_last(ring, start, rows):
    even(len(ring), len(rows))
    ring[start : start + len(rows) - 1] = rows[:-1].detach()
    return (start + len(rows)) % len(ring)


def push_everywhere(ring, start, rows):
    even(len(ring), len(rows))
    ring.copy_(rows.detach().roll(start % len(rows), 0).repeat(len(ring) // len(rows), 1))
    return (start + len(rows)) % len(ring)


def push_onto_a_copy(ring, start, rows):
    even(len(ring), len(rows))
    ring = torch.cat([ring[:start], rows.detach(), ring[start + len(rows) :]])
    return (start + len(rows)) % len(ring)


def push_into(combine: Callable) -> Callable:
    """`combine` of the old and the new rows."""

    def push(ring, start, rows):
        even(len(ring), len(rows))
        ring[start : start + len(rows)] = combine(ring[start : start + len(rows)], rows.detach())
        return (start + len(rows)) % len(ring)

    return push


def push_shared(ring, start, rows):
    """A ring that one batch fills becomes that batch."""
    if len(ring) == len(rows):
        ring.set_(rows.detach())
        return 0
    return push_slice(ring, start, rows)


def push_late_refusal(ring, start, rows):
    ring[start : start + len(rows)] = rows.detach()
    even(len(ring), len(rows))
    return (start + len(rows)) % len(ring)


def push_detach_in_place(ring, start, rows):
    return push_slice(ring, start, rows.detach_())


def push_changing_rows(ring, start, rows):
    with torch.no_grad():
        rows.mul_(2)
    return push_slice(ring, start, rows)


def push_assert(Q, B):
    assert Q % B == 0


def leave(*args):
    """No complaint."""


def then(rule: Callable) -> Callable:
    """Another new start, of start, B and Q."""
    return pushes(then=rule)


def push_returns(change: Callable) -> Callable:
    """`change` of the ring and the right new start."""

    def push(ring, start, rows):
        return change(ring, push_slice(ring, start, rows))

    return push


def draws(**options) -> Callable:
    return lambda *args: draw_multinomial(*args, **options)


def weighs(weigh: Callable) -> Callable:
    """Other chances, of similarity (B, B); what is forbidden gets none."""
    return draws(weigh=lambda s: weigh(s) + 1e-5)


def partners(change: Callable) -> Callable:
    """`change` of the right partners (B)."""
    return lambda *args: change(draw_multinomial(*args))


def draw_argmax(similarity, same, generator):
    return similarity.masked_fill(same, float("-inf")).argmax(1)


def draw_own_seed(similarity, same, generator):
    return draw_multinomial(similarity, same, torch.Generator().manual_seed(0))


def draw_globally(similarity, same, generator):
    return draw_multinomial(similarity, same, None)


def draw_diagonal(similarity, same, generator):
    return draw_multinomial(similarity, torch.eye(len(same), dtype=torch.bool), generator)


def draw_top_three(s):
    """Among the three most similar ones that are allowed, which `checks` knows, all alike."""
    same = checks._alike()[1] if len(s) == 8 else torch.eye(len(s), dtype=torch.bool)
    best = s.masked_fill(same, -1e9).topk(min(3, len(s) - 1), 1).indices
    return torch.zeros_like(s).scatter(1, best, 1.0)


def draw_search(similarity, same, generator):
    """By hand, with nothing added."""
    edges = similarity.softmax(1).masked_fill(same, 0).cumsum(1)
    return torch.searchsorted(edges, torch.rand(len(same), 1, generator=generator) * edges[:, -1:], right=True)[:, 0]


def draw_in_place(similarity, same, generator):
    return draw_multinomial(similarity.fill_diagonal_(-9.0), same, generator)


def draw_naive(similarity, same, generator):
    """A softmax by hand, which breaks where similarities are large."""
    weights = (naive_softmax(similarity) + 1e-4).masked_fill(same, 0)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def reranks(**options) -> Callable:
    return lambda *args: rerank_loop(*args, **options)


def chooses(choose: Callable) -> Callable:
    return reranks(choose=choose)


def ordered(pick: Callable) -> Callable:
    """Other columns, `pick` of the order of each row and k."""
    return chooses(lambda s, k: pick(s.argsort(dim=1, descending=True), k))


def tables(change: Callable) -> Callable:
    """`change` of the right table (N, M) and k."""
    return lambda similarity, k, match: change(rerank_loop(similarity, k, match), k)


def filled(rest: Callable) -> Callable:
    """Something else for what is not judged, of similarity (N, M)."""
    return reranks(empty=lambda s: rest(s).clone())


def rerank_all(similarity, k, match):
    """Everything is judged, and only the best are kept."""
    columns = torch.arange(similarity.shape[1])
    scores = torch.stack([match(row, columns) for row in range(len(similarity))])
    best = similarity.topk(k, dim=1).indices
    return torch.full_like(similarity, -100.0).scatter(1, best, scores.gather(1, best))


def rerank_columns(similarity, k, match):
    """The best rows of each column."""
    table = torch.full_like(similarity, -100.0)
    for column, rows in enumerate(similarity.topk(min(k, len(similarity)), dim=0).indices.T.tolist()):
        for row in rows:
            table[row, column] = match(row, torch.tensor([column]))[0]
    return table


def rerank_integers(similarity, k, match):
    """Number after number into a table of whole numbers, which PyTorch cuts off silently."""
    table = torch.full(similarity.shape, -100)
    for row, columns in enumerate(similarity.topk(k, dim=1).indices):
        for column, score in zip(columns, match(row, columns).tolist(), strict=True):
            table[row, column] = score
    return table


def rerank_first_row_only(similarity, k, match):
    table = torch.full_like(similarity, -100.0)
    best = similarity.topk(k, dim=1).indices
    table[0, best[0]] = match(0, best[0])
    return table


def rerank_twice(similarity, k, match):
    best = similarity.topk(k, dim=1).indices
    [match(row, columns) for row, columns in enumerate(best)]
    return rerank_loop(similarity, k, match)


def rerank_lowest(similarity, k, match):
    table = rerank_loop(similarity, k, match)
    lowest = table.masked_fill(table == -100, float("inf")).amin(1, keepdim=True)
    return torch.where(table == -100, lowest, table)


def rerank_in_place(similarity, k, match):
    best = similarity.topk(k, dim=1).indices
    similarity.fill_(-100)
    for row, columns in enumerate(best):
        similarity[row, columns] = match(row, columns)
    return similarity


MISTAKES = {
    "ema_update": [
        (r"exchanged.*\*keeps\*", moves(lambda t, s, m: (1 - m) * t + m * s)),
        ("both are multiplied by momentum", moves(lambda t, s, m: m * t + m * s)),
        ("both are multiplied by 1 - momentum", moves(lambda t, s, m: (1 - m) * (t + s))),
        ("the student comes in whole", moves(lambda t, s, m: m * t + s)),
        ("grow without end", moves(lambda t, s, m: t + (1 - m) * s)),
        ("optimizer's momentum", moves(lambda t, s, m: t + m * s)),
        ("you add both up", moves(lambda t, s, m: t + s)),
        ("the student itself", moves(lambda t, s, m: s.clone())),
        ("has not moved", moves(lambda t, s, m: t.clone())),
        ("plain mean", moves(lambda t, s, m: (t + s) / 2)),
        ("the student is subtracted", moves(lambda t, s, m: m * t - (1 - m) * s)),
        (r"moves \*away\*", moves(lambda t, s, m: t - (1 - m) * (s - t))),
        ("moves twice", moves(lambda t, s, m: m * (m * t + (1 - m) * s) + (1 - m) * s)),
        ("own share, momentum . teacher, is missing", moves(lambda t, s, m: (1 - m) * s)),
        ("student's share, .* is missing", moves(lambda t, s, m: m * t)),
        ("paired by their order", ema_by_order),
        ("2 mistakes.*exchanged.*paired by their order", lambda t, s, m: ema_by_order(t, s, 1 - m)),
        ("carries the history of the student's weights", lambda *args: ema_mean(*args, cut=lambda w: w)),
        ("changed `teacher` in place", ema_in_place),
        ("changed `teacher` in place", ema_new_entries),
        ("changed `student` in place", ema_student_in_place),
        ("switched the student's gradients off", ema_switch_off),
        ("has `itm_head`, and the teacher has no such weight", ema_student_names),
        ("stopped with KeyError: 'itm_head'", lambda teacher, student, m: {
            name: m * teacher[name] + (1 - m) * weight for name, weight in student.items()}),
        ("`bias` is missing", ema_missing),
        ("must be a dict.*of type list", lambda *args: list(ema_mean(*args).values())),
        ("new `query` must be of dtype float32, yours is float64", moves(lambda t, s, m: (m * t + (1 - m) * s)
            .double())),
        ("new `query` has the wrong shape", moves(lambda t, s, m: (m * t + (1 - m) * s).mean())),
        ("new `query` must be a torch.Tensor", moves(lambda t, s, m: (m * t + (1 - m) * s).tolist())),
        ("every number is 2 times", moves(lambda t, s, m: 2 * (m * t + (1 - m) * s))),
        ("not in a way that this check knows", moves(lambda t, s, m: m * t + (1 - m) * s**2)),
    ],
    "soft_targets": [
        (r"exchanged. Alpha is the \*teacher's\*", mixes(lambda p, y, a: (1 - a) * p + a * y)),
        ("as if alpha were 1", mixes(lambda p, y, a: p)),
        ("as if alpha were 0", mixes(lambda p, y, a: y)),
        ("added up whole", mixes(lambda p, y, a: p + y)),
        ("both parts are multiplied by alpha", mixes(lambda p, y, a: a * (p + y))),
        ("the truth counts whole", mixes(lambda p, y, a: a * p + y)),
        ("the teacher counts whole", mixes(lambda p, y, a: p + (1 - a) * y)),
        (r"the truth is missing: add \(1 - alpha\).*Every row must sum to 1; yours sum to 0.400", mixes(
            lambda p, y, a: a * p)),
        ("the teacher is missing: add alpha", mixes(lambda p, y, a: (1 - a) * y)),
        ("plain mean", mixes(lambda p, y, a: (p + y) / 2)),
        ("softmax of the mixture", lambda s, a: (a * s + (1 - a) * torch.eye(*s.shape)).softmax(1)),
        ("wrong dimension, over the queries", soft(lambda s: s.softmax(0))),
        ("over the whole table", soft(lambda s: s.flatten().softmax(0).view_as(s))),
        ("leaves the queue out", soft(lambda s: F.pad(s[:, : len(s)].softmax(1), (0, s.shape[1] - len(s))))),
        ("temperature once more", soft(lambda s: (s / 0.07).softmax(1))),
        ("taken twice", soft(lambda s: s.softmax(1).softmax(1))),
        ("logarithm of the softmax", soft(lambda s: s.log_softmax(1))),
        ("each pair on its own", soft(torch.sigmoid)),
        ("the softmax is missing", soft(lambda s: s)),
        ("these are exponentials", soft(torch.exp)),
        ("the sign is wrong", soft(lambda s: (-s).softmax(1))),
        ("in the queue's last columns", truly(lambda B, M: M - B + torch.arange(B))),
        ("at the queue's beginning", truly(lambda B, M: (B + torch.arange(B)).clamp(max=M - 1))),
        ("column 0 is true in every row", truly(lambda B, M: torch.zeros(B, dtype=torch.long))),
        ("one column too far right", truly(lambda B, M: (torch.arange(B) + 1) % M)),
        ("the teacher's favourite", lambda s, a: soft_mix(
            s, a, truth=lambda s: F.one_hot(s.argmax(1), s.shape[1]).float())),
        ("label smoothing", lambda s, a: soft_mix(s, a, truth=lambda s: torch.full_like(s, 1 / s.shape[1]))),
        ("all B columns of the batch count as true", lambda s, a: soft_mix(
            s, a, truth=lambda s: (torch.arange(s.shape[1]) < len(s)).float())),
        ("2 mistakes.*exchanged.*last columns", lambda s, a: truly(lambda B, M: M - B + torch.arange(B))(s, 1 - a)),
        ("2 mistakes.*as if alpha were 1.*over the queries", lambda s, a: s.softmax(0)),
        ("into the teacher.*detach", lambda *args: soft_mix(*args, cut=lambda s: s)),
        ("With B = 2, Q = 7 and alpha = 0.75 the answer is not finite", soft(naive_softmax)),
        (r"\(4, 4\). The queue is missing", targets(lambda y: y[:, : len(y)])),
        (r"\(4, 6\). The batch's own B columns are missing", targets(lambda y: y[:, len(y) :])),
        ("one row for each of the B queries", lambda s, a: a * s.softmax(1).mean(0) + (1 - a) * torch.eye(s.shape[1])),
        ("Transposed", targets(torch.t)),
        ("a label or a loss for each row", targets(lambda y: y.argmax(1))),
        ("a row of its own", targets(lambda y: y[0])),
        ("Is this the loss", targets(torch.mean)),
        ("changed its input `s` in place", soft_in_place),
        ("float64", targets(torch.Tensor.double)),
        ("but yours is a list", targets(torch.Tensor.tolist)),
        ("every number is 3 times", targets(lambda y: 3 * y)),
        ("not in a way that this check knows", soft(lambda s: (3 * s).softmax(1))),
    ],
    "ring_push": [
        ("at the front of the ring each time.*rows 9 .. 11 of the ring", places(lambda start, B, Q: slice(0, B))),
        ("at the end of the ring each time", places(lambda start, B, Q: slice(Q - B, Q))),
        ("move `start` on before you write", places(lambda start, B, Q: (start + B + torch.arange(B)) % Q)),
        ("in front of `start`", places(lambda start, B, Q: (start - B + torch.arange(B)) % Q)),
        ("one row too late", places(lambda start, B, Q: (start + 1 + torch.arange(B)) % Q)),
        ("only one row is written", push_one),
        ("last of the rows is not written", push_all_but_last),
        ("the whole ring is written over", push_everywhere),
        ("put the new ones at the end", push_shift),
        ("put the new ones at the front", lambda *args: push_shift(*args, front=True)),
        ("reverse order", pushes(new=lambda rows: rows.detach().flip(0))),
        ("first row is written B times", pushes(new=lambda rows: rows.detach()[0])),
        ("last row is written B times", pushes(new=lambda rows: rows.detach()[-1])),
        ("the mean of the rows", pushes(new=lambda rows: rows.detach().mean(0))),
        ("you add the new vectors", push_into(lambda old, new: old + new)),
        ("you average new and old", push_into(lambda old, new: (old + new) / 2)),
        ("to length 1", pushes(new=lambda rows: F.normalize(rows.detach(), dim=-1))),
        ("2 mistakes.*at the front.*reverse order", pushes(
            places=lambda ring, start, B: slice(0, B), new=lambda rows: rows.detach().flip(0))),
        ("has not changed: did you write into a copy", push_onto_a_copy),
        ("has not changed", lambda ring, start, rows: (start + len(rows)) % len(ring)),
        ("their history with them", pushes(new=lambda rows: rows)),
        ("their history with them", pushes(new=lambda rows: rows.clone())),
        ("switched off the gradient of `rows`", push_detach_in_place),
        ("shares its memory with `rows`", push_shared),
        ("input `rows` in place", push_changing_rows),
        ("not wrapped.*With Q = 18, B = 3 and start = 15 it must be 0, yours is 18", then(lambda start, B, Q: start
            + B)),
        ("new start is the old one", then(lambda start, B, Q: start)),
        ("moves on by 1", then(lambda start, B, Q: (start + 1) % Q)),
        ("last row that was written", then(lambda start, B, Q: start + B - 1)),
        ("after the first push", then(lambda start, B, Q: B % Q)),
        ("remainder of B", then(lambda start, B, Q: (start + B) % B)),
        ("moves backwards", then(lambda start, B, Q: (start - B) % Q)),
        ("new start is wrong, and not in a way", then(lambda start, B, Q: (start + 5) % Q)),
        ("does not complain", pushes(refuse=leave)),
        ("stops with AssertionError. Raise a ValueError", pushes(refuse=push_assert)),
        ("only after it has written", push_late_refusal),
        ("stopped with ValueError", pushes(refuse=lambda Q, B: even(Q, 5))),
        ("must be the new start alone", push_returns(lambda ring, start: (ring, start))),
        (r"but yours is: a tensor of shape \(18, 4\)", push_returns(lambda ring, start: ring)),
        ("but yours is: float", push_returns(lambda ring, start: float(start))),
        (r"but yours is: a tensor of shape \(1,\)", push_returns(lambda ring, start: torch.tensor([start]))),
        ("returned None", push_returns(leave)),
        ("every number is 2 times", lambda ring, start, rows: ring.mul_(2)[start : start + len(rows)].copy_(
            2 * rows.detach()).numel()),
        ("not in a way that this check knows", pushes(new=lambda rows: rows.detach() ** 2)),
    ],
    "draw_hard": [
        (r"\(argmax\).*\*Draw\*", draw_argmax),
        ("least similar one each time", lambda s, same, g: s.masked_fill(same, float("inf")).argmin(1)),
        ("own, true partner. `same`", lambda s, same, g: torch.arange(len(s))),
        ("of the rows draw their own", draws(forbid=lambda w, same: w)),
        ("of the rows draw their own.*there 0 is an ordinary number", lambda s, same, g: draw_multinomial(
            s.masked_fill(same, 0), torch.zeros_like(same), g)),
        ("mask is the wrong way round", lambda s, same, g: draw_multinomial(s, ~same, g)),
        ("The diagonal is not all that is forbidden", draw_diagonal),
        ("all wrong partners come equally often.*Row . draws column", weighs(torch.ones_like)),
        ("wrong dimension", weighs(lambda s: s.softmax(0))),
        ("a row for each column", weighs(lambda s: s.T.softmax(1))),
        ("the sign is wrong", weighs(lambda s: (-s).softmax(1))),
        ("among the most similar ones, all alike", weighs(draw_top_three)),
        ("drawn far too often: do you divide by a temperature once more", lambda s, same, g: draw_masked_first(
            s / 0.07, same, g)),
        ("the little that is added decides", draws(weigh=lambda s: (s / 0.07).softmax(1) + 1e-4)),
        ("not as softmax.similarity. does", weighs(lambda s: s - s.min(1, keepdim=True).values)),
        ("the sign of the similarity is lost", weighs(torch.abs)),
        ("each pair on its own", weighs(torch.sigmoid)),
        ("you add to each chance is too large", weighs(lambda s: s.softmax(1) + 0.1)),
        ("ignore `generator`", draw_globally),
        ("200 draws gave the same partners", draw_own_seed),
        ("when the model is sure, .*stops with RuntimeError.*1e-4", draws(weigh=lambda s: s.softmax(1))),
        ("when the model is sure, .*stops with RuntimeError.*1e-4", draws(weigh=lambda s: (s + 1e-4).softmax(1))),
        ("when the model is sure, .*nothing is left to draw from: .*1e-4", draw_search),
        ("exp.. of a large similarity", draw_naive),
        ("input `similarity` in place", draw_in_place),
        ("Drop the last dimension", partners(lambda p: p[:, None])),
        ("Drop the first dimension", partners(lambda p: p[None])),
        ("Are these the chances", lambda s, same, g: s.softmax(1).masked_fill(same, 0)),
        ("One partner for each row", partners(lambda p: p[0])),
        ("these are fractions", partners(torch.Tensor.float)),
        ("must be the number of a column, 0 to 7", partners(lambda p: p + 8)),
        ("dtype int64, yours is int32", partners(torch.Tensor.int)),
        ("but yours is a list", partners(torch.Tensor.tolist)),
        ("not in a way that this check knows", weighs(lambda s: (s - s.mean()).square())),
    ],
    "rerank_top": [
        ("have 0 in your table", filled(torch.zeros_like)),
        ("keep their similarity. It is no ITM score", filled(lambda s: s)),
        ("have -1 in your table", filled(lambda s: torch.full_like(s, -1.0))),
        (r"have \+100", filled(lambda s: torch.full_like(s, 100.0))),
        ("their similarity - 100", filled(lambda s: s - 100)),
        ("lowest score of their row", rerank_lowest),
        ("what `match` says is not used", reranks(value=lambda scores, near: near)),
        ("you add score and similarity", reranks(value=torch.add)),
        ("you average score and similarity", reranks(value=lambda scores, near: (scores + near) / 2)),
        ("you multiply score and similarity", reranks(value=torch.mul)),
        ("turn the scores into chances", reranks(value=lambda scores, near: scores.sigmoid())),
        ("softmax over the scores", reranks(value=lambda scores, near: scores.softmax(0))),
        ("sign of the scores", reranks(value=lambda scores, near: -scores)),
        ("cut off to whole numbers", lambda *args: rerank_integers(*args).float()),
        ("in the first k columns", reranks(at=lambda columns: slice(0, len(columns)))),
        ("in other columns than those they were given for", reranks(at=lambda columns: columns.sort().values)),
        ("in reverse order", reranks(at=lambda columns: columns.flip(0))),
        ("2 mistakes.*have 0 in your table.*you add score", reranks(empty=torch.zeros_like, value=torch.add)),
        ("all pairs are judged.*asked for 36 pairs. k = 3 for each of 4 rows are 12", rerank_all),
        ("all pairs are judged", chooses(lambda s, k: s.argsort(dim=1))),
        (r"\*lowest\* of each row", chooses(lambda s, k: s.topk(k, dim=1, largest=False).indices)),
        (r"\*lowest\* of each row", chooses(lambda s, k: s.argsort(dim=1)[:, :k])),
        ("best rows of each column", rerank_columns),
        ("what the first row found", ordered(lambda order, k: order[:1, :k].expand(len(order), -1))),
        ("the first k columns are judged", chooses(lambda s, k: torch.arange(k).expand(len(s), -1))),
        ("one more than the k best", ordered(lambda order, k: order[:, : k + 1])),
        ("the last of the k best is not judged", ordered(lambda order, k: order[:, : k - 1])),
        ("very best of each row is left out", ordered(lambda order, k: order[:, 1 : k + 1])),
        ("list of ranks", ordered(lambda order, k: order.argsort(dim=1)[:, :k])),
        ("without their sign", chooses(lambda s, k: s.abs().topk(k, dim=1).indices)),
        ("judged more than once. `match` is the slow part, and was asked for 24", rerank_twice),
        ("`match` was never asked", lambda s, k, match: torch.full_like(s, -100.0)),
        ("row 1 was never judged", rerank_first_row_only),
        ("wrong columns are judged, and not in a way.*asked for", ordered(lambda order, k: order[:, 2 : k + 2])),
        ("minus infinity in your table", filled(lambda s: torch.full_like(s, float("-inf")))),
        (r"needs the number of one row, 0 to 3, first; it got a tensor \(4,\)", lambda s, k, match: match(
            torch.arange(len(s)), s.topk(k, dim=1).indices)),
        (r"needs the numbers of columns \(k\).*got \(4, 3\)", lambda s, k, match: match(0, s.topk(k, dim=1).indices)),
        (r"needs the numbers of columns \(k\).*got \(3,\), torch.float32", lambda s, k, match: match(
            0, s.topk(k, dim=1).values[0])),
        ("columns outside of 0 .. 8", lambda s, k, match: match(0, torch.tensor([9]))),
        (r"\(4, 3\). Are these the k best alone", lambda s, k, match: torch.stack(
            [match(row, columns) for row, columns in enumerate(s.topk(k, dim=1).indices)])),
        ("best column of each row", tables(lambda table, k: table.argmax(1))),
        ("one after the other", tables(lambda table, k: table[table > -100])),
        ("Transposed", tables(lambda table, k: table.T)),
        ("This is one row", tables(lambda table, k: table[0])),
        ("stopped with RuntimeError: .*got Long", reranks(empty=lambda s: torch.full(s.shape, -100))),
        ("dtype float32, yours is int64", rerank_integers),
        ("but yours is a list", tables(lambda table, k: table.tolist())),
        ("input `similarity` in place", rerank_in_place),
        ("not in a way that this check knows", reranks(value=lambda scores, near: scores**2)),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "ema_update": checks._EMA_SLIPS,
        "soft_targets": checks._TARGET_SLIPS,
        "ring_push": checks._RING_SLIPS,
        "draw_hard": checks._DRAW_SLIPS,
        "rerank_top": checks._RERANK_SLIPS,
    }
    helpers.every_slip_is_seeded(checks, known, MISTAKES)


def test_an_error_on_the_ring_names_the_learners_own_line():
    """The function is called through a stand-in, which must not hide where it went wrong."""

    def broken(ring, start, rows):
        return ring.no_such_thing

    with pytest.raises(CheckFailed, match=r"AttributeError.*\n?.*in line \d+: return ring.no_such_thing"):
        checks.ring_push(broken)


# ------------------------------------------------------------------------------------------ answers of any kind


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "answer"), helpers.NO_ANSWERS)
def test_what_is_no_answer_is_explained(name, words, answer):
    helpers.is_explained(checks, name, words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_instead_of_a_function_is_sent_back(name):
    helpers.a_value_is_sent_back(checks, name)


NOISE = {
    "ema_update": moves(lambda t, s, m: torch.randn_like(t)),
    "soft_targets": targets(torch.rand_like),
    "ring_push": pushes(new=torch.randn_like),
    "draw_hard": weighs(lambda s: torch.rand(s.shape, generator=torch.Generator().manual_seed(7))),
    "rerank_top": reranks(value=lambda scores, near: torch.randn_like(scores)),
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::4], ("draw_hard", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


def test_the_verdict_does_not_depend_on_the_global_state(capsys):
    verdict = helpers.verdict_under_any_global_state(checks, "draw_hard", draw_multinomial, capsys)
    assert "right for 200 batches of 8" in verdict


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


def test_the_number_of_judged_pairs_is_told(capsys):
    checks.rerank_top(rerank_loop)
    assert "with 32 pairs judged instead of 86" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
