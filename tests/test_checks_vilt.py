"""The checks of lesson 02 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

from collections.abc import Callable

import check_helpers as helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlp.checks import CheckFailed
from minivlp.checks import vilt as checks

torch.set_num_threads(1)

LESSON = "02_vilt.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def join_cat(text, image, types):
    return torch.cat([text + types[0], image + types[1]], dim=1)


def join_by_lookup(text, image, types):
    side = torch.tensor([0] * text.shape[1] + [1] * image.shape[1])
    return torch.cat([text, image], 1) + types[side]


def join_into_empty(text, image, types):
    L = text.shape[1]
    x = text.new_empty(len(text), L + image.shape[1], text.shape[2])
    x[:, :L], x[:, L:] = text, image
    x[:, :L] += types[0]
    x[:, L:] += types[1]
    return x


def words_gather(groups, share, generator):
    chance = torch.rand(groups.shape, generator=generator).gather(1, groups.clamp(min=0))
    return (chance < share) & (groups >= 0)


def words_loop(groups, share, generator):
    chosen = torch.zeros_like(groups, dtype=torch.bool)
    for row, numbers in zip(chosen, groups, strict=True):
        lucky = torch.rand(int(numbers.max()) + 1, generator=generator) < share
        row |= torch.isin(numbers, lucky.nonzero()[:, 0])
    return chosen


def words_one_more_column(groups, share, generator):
    """The last column stands for -1, by Python's way of counting from the end."""
    B, W = len(groups), int(groups.max()) + 1
    lucky = torch.bernoulli(torch.full((B, W + 1), share), generator=generator).bool()
    lucky[:, -1] = False
    return lucky[torch.arange(B)[:, None], groups]


def pairs_steps(n, generator, *, kept=None, label=None, draw=None):
    """Right by default; `kept` (n), bool, says who keeps its picture, `draw` what the others get."""
    own = torch.arange(n)
    if kept is None:
        kept = torch.zeros(n, dtype=torch.bool)
        kept[torch.randperm(n, generator=generator)[: n // 2]] = True
    other = (own + torch.randint(1, n, (n,), generator=generator)) % n if draw is None else draw(n, kept, generator)
    partner = torch.where(kept, own, other)
    return partner, (kept if label is None else label(partner)).long()


def pairs_loop(n, generator):
    """Draws again and again until it is another's picture."""
    partner, match = list(range(n)), [1] * n
    for i in torch.rand(n, generator=generator).argsort().tolist()[n // 2 :]:
        match[i] = 0
        while partner[i] == i:
            partner[i] = int(torch.randint(n, (1,), generator=generator))
    return torch.tensor(partner), torch.tensor(match)


def pairs_multinomial(n, generator):
    match = (torch.rand(n, generator=generator).argsort().argsort() >= n // 2).long()
    partner = torch.multinomial(1 - torch.eye(n), 1, generator=generator)[:, 0]
    return partner * (1 - match) + torch.arange(n) * match, match


def pairs_skip_own(n, generator):
    """Numbers of the n - 1 others: all from the own number on move up by one."""

    def draw(n, kept, generator):
        other = torch.randint(n - 1, (n,), generator=generator)
        return other + (other >= torch.arange(n))

    return pairs_steps(n, generator, draw=draw)


def mass_indexed(maps, text_mask):
    L = text_mask.shape[1]
    rows = maps.mean(1)
    asking = rows[:, :L][text_mask], rows[:, L:].flatten(0, 1)
    return torch.tensor([[part.sum(1).mean() for part in (a[:, :L], a[:, L:])] for a in asking])


def mass_weighted(maps, text_mask):
    """By two tables of zeros and ones: who asks, and who is looked at. Padding gets nothing, so it may be counted."""
    (B, L), (h, T) = text_mask.shape, maps.shape[1:3]
    looked_at = torch.zeros(T, 2)
    looked_at[:L, 0] = looked_at[L:, 1] = 1
    asks = looked_at.expand(B, T, 2).clone()
    asks[:, :L, 0] = text_mask.float()
    asks = asks / asks.sum((0, 1))
    return torch.einsum("bqk,bhqs,sl->kl", asks, maps, looked_at) / h


def sinkhorn_scaling(
    cost, epsilon, iterations, *, a=None, b=None, kernel=None, order="uv", plan=lambda u, K, v: u[:, None] * K * v
):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    m, n = cost.shape
    a, b = 1 / m if a is None else a(m, n), 1 / n if b is None else b(m, n)
    K = (-cost / epsilon).exp() if kernel is None else kernel(cost, epsilon).exp()
    u, v = torch.ones(m), torch.ones(n)
    for _ in range(iterations):
        before = u
        for which in order.replace("+", ""):
            if which == "u":
                u = a / (K @ v)
            else:
                v = b / (K.T @ (before if "+" in order else u))
    return plan(u, K, v)


def sinkhorn_logs(cost, epsilon, iterations):
    """With logarithms, as one does for a small epsilon."""
    m, n = cost.shape
    f, g = torch.zeros(m), torch.zeros(n)
    scores = -cost / epsilon
    for _ in range(iterations):
        f = -np.log(m) - (scores + g).logsumexp(1)
        g = -np.log(n) - (scores + f[:, None]).logsumexp(0)
    return (scores + f[:, None] + g).exp()


def sinkhorn_on_the_plan(cost, epsilon, iterations):
    """Rescales the plan itself, rows and then columns."""
    P = torch.softmax((-cost / epsilon).flatten(), 0).view(cost.shape)
    for _ in range(iterations):
        P = P / P.sum(1, keepdim=True) / P.shape[0]
        P = P / P.sum(0) / P.shape[1]
    return P


RIGHT = [
    ("join", join_cat),
    ("join", join_by_lookup),
    ("join", join_into_empty),
    ("choose_words", words_gather),
    ("choose_words", words_loop),
    ("choose_words", words_one_more_column),
    ("matching_pairs", pairs_steps),
    ("matching_pairs", pairs_loop),
    ("matching_pairs", pairs_multinomial),
    ("matching_pairs", pairs_skip_own),
    ("attention_mass", mass_indexed),
    ("attention_mass", mass_weighted),
    ("sinkhorn", sinkhorn_scaling),
    ("sinkhorn", sinkhorn_logs),
    ("sinkhorn", sinkhorn_on_the_plan),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


@pytest.mark.parametrize("stream", range(12))
@pytest.mark.parametrize(("name", "answer"), [("choose_words", words_gather), ("matching_pairs", pairs_steps)])
def test_bad_luck_fails_no_right_answer(name, answer, stream):
    """Each stream takes other random numbers, as other ways to write the same would."""

    def other_numbers(*args):
        torch.rand(stream, generator=args[-1])
        return answer(*args)

    getattr(checks, name)(other_numbers)


# --------------------------------------------------------------------------------------------- seeded mistakes


def joins(left: Callable, right: Callable, *, dim: int = 1) -> Callable:
    """`left` of text and types, and `right` of image and types, one behind the other."""
    return lambda text, image, types: torch.cat([left(text, types), right(image, types)], dim)


def plus(row: int) -> Callable:
    return lambda x, types: x + types[row]


def normal(x):
    return F.layer_norm(x, x.shape[-1:])


def join_types_by_pair(text, image, types):
    return torch.cat([text, image], 1) + types[torch.arange(len(text)) % 2][:, None]


def words_by(take: Callable) -> Callable:
    """`take` of a random number for each token and, a number for each word, those of its word: (B, L) -> bool."""

    def answer(groups, share, generator):
        own = torch.rand(groups.shape, generator=generator)
        return take(groups, share, own, own.gather(1, groups.clamp(min=0))) & (groups >= 0)

    return answer


def words_then(change: Callable) -> Callable:
    """A right choice, changed at the end by what `change` makes of groups and chosen."""
    return lambda groups, share, generator: change(groups, words_gather(groups, share, generator))


def starts(groups):
    return (groups >= 0) & (groups != groups.roll(1, 1))


def several(groups):
    """True at the tokens of words of several pieces."""
    return ((groups[:, :, None] == groups[:, None]).sum(2) > 1) & (groups >= 0)


def words_pieces_vote(vote: Callable) -> Callable:
    """Draws for each token; `vote` of (B, L, L), which pieces of the same word are drawn, decides."""

    def answer(groups, share, generator):
        drawn = torch.rand(groups.shape, generator=generator) < share
        same = groups[:, :, None] == groups[:, None]
        return vote(same, drawn[:, None]) & (groups >= 0)

    return answer


def words_drawn(lucky: Callable) -> Callable:
    """`lucky` of (B, L) random numbers, share and the number of words of each text (B, 1): which numbers are chosen."""

    def answer(groups, share, generator):
        words = groups.amax(1, keepdim=True) + 1
        chosen = lucky(torch.rand(groups.shape, generator=generator), share, words)
        return chosen.gather(1, groups.clamp(min=0)) & (groups >= 0)

    return answer


def exists(chance, words):
    return torch.arange(chance.shape[1]) < words


def rank(chance, words):
    return chance.masked_fill(~exists(chance, words), 2).argsort(1).argsort(1)


def at_least_one(chance, share, words):
    return (chance < share) | ((rank(chance, words) == 0) & exists(chance, words))


def words_from_numpy(groups, share, generator):
    return words_gather(groups, share, torch.Generator().manual_seed(int(np.random.randint(1000))))


def pairs(*, kept: Callable | None = None, draw: Callable | None = None, label: Callable | None = None) -> Callable:
    """`kept` of n and the generator; `draw` of n, kept and the generator; `label` of partner and the generator."""

    def answer(n, generator):
        labels = None if label is None else (lambda partner: label(partner, generator))
        return pairs_steps(n, generator, kept=kept and kept(n, generator), draw=draw, label=labels)

    return answer


def pairs_then(change: Callable) -> Callable:
    return lambda n, generator: change(*pairs_steps(n, generator))


def number_kept(count: Callable) -> Callable:
    return lambda n, generator: torch.randperm(n, generator=generator) < count(n)


def window(n, generator):
    """A half without gaps, beginning anywhere."""
    return (torch.arange(n) - torch.randint(n, (1,), generator=generator)) % n < n // 2


def any_picture(n, kept, generator):
    return torch.randint(n, (n,), generator=generator)


def own_goes_on(n, kept, generator):
    """Who draws its own takes the next."""
    drawn = any_picture(n, kept, generator)
    return torch.where(drawn == torch.arange(n), (drawn + 1) % n, drawn)


def own_becomes_the_first(n, kept, generator):
    """Who draws its own takes picture 0, and pair 0 draws rightly."""
    drawn = any_picture(n, kept, generator)
    drawn = torch.where(drawn == torch.arange(n), 0, drawn)
    drawn[0] = torch.randint(1, n, (1,), generator=generator)
    return drawn


def within(which: Callable) -> Callable:
    """The pictures of the half `which(kept)`, each once: turned round by one place, so that none gets its own."""

    def draw(n, kept, generator):
        other = torch.arange(n)
        lenders = which(kept).nonzero()[:, 0]
        other[~kept] = lenders[torch.randperm(len(lenders), generator=generator)].sort().values.roll(1)
        return other

    return draw


def derangement(n, kept, generator):
    """A permutation of all pictures without a fixed point."""
    while True:
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


def one_for_all(n, kept, generator):
    """A picture of the matching half, the same for all."""
    return kept.nonzero()[int(torch.randint(n // 2, (1,), generator=generator))].expand(n)


def mass_of(
    *, heads="mean", askers=None, average=None, gather="sum", first=True, read=lambda table: table, swap=False
):  # fmt: skip
    """Right by default; the options make the wrong ones. `askers` of text_mask and T: who asks, (B, T)."""

    def answer(maps, text_mask):
        (B, L), T = text_mask.shape, maps.shape[-1]
        A = {"mean": maps.mean(1), "sum": maps.sum(1), "max": maps.amax(1), "one": maps[:, 0]}[heads]
        A = A.mT if swap else A
        text, image = (slice(0, L), slice(L, T)) if first else (slice(T - L, T), slice(0, T - L))
        asks = torch.ones(B, T, dtype=torch.bool)
        asks[:, text] = text_mask
        asks = asks if askers is None else askers(text_mask, T)
        rows = []
        for kind in (text, image):
            shares = torch.stack([getattr(A[:, kind, part], gather)(-1) for part in (text, image)], -1)  # (B, ., 2)
            rows.append((average or (lambda s, real: s[real].mean(0)))(shares, asks[:, kind]))
        return read(torch.stack(rows))

    return answer


def class_tokens_ask(text_mask, T):
    asks = torch.zeros(len(text_mask), T, dtype=torch.bool)
    asks[:, 0] = asks[:, text_mask.shape[1]] = True
    return asks


def all_ask(text_mask, T):
    return torch.ones(len(text_mask), T, dtype=torch.bool)


def per_picture(shares, real):
    return torch.stack([s[r].mean(0) for s, r in zip(shares, real, strict=True)]).mean(0)


def sinkhorns(**options) -> Callable:
    return lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon, iterations, **options)


def one(m, n):
    return 1.0


MISTAKES = {
    "join": [
        ("types are swapped", joins(plus(1), plus(0))),
        ("types are missing", lambda text, image, types: torch.cat([text, image], 1) + 0 * types[0]),
        ("image tokens bear no type", joins(plus(0), lambda x, types: x)),
        ("text tokens bear no type", joins(lambda x, types: x, plus(1))),
        ("same type, row 0", joins(plus(0), plus(0))),
        ("same type, row 1", joins(plus(1), plus(1))),
        ("gets both types", joins(lambda x, types: x + types.sum(0), lambda x, types: x + types.sum(0))),
        ("dealt out to the pairs", join_types_by_pair),
        ("you multiply by the types", joins(lambda x, types: x * types[0], lambda x, types: x * types[1])),
        ("the image stands first", lambda text, image, types: torch.cat([image + types[1], text + types[0]], 1)),
        ("2 mistakes.*swapped.*image stands first",
         lambda text, image, types: torch.cat([image + types[0], text + types[1]], 1)),
        ("normalise the joined tokens", lambda text, image, types: normal(join_cat(text, image, types))),
        ("normalise the text a second time", joins(lambda x, types: normal(x) + types[0], plus(1))),
        ("LayerNorm comes after its type", joins(lambda x, types: normal(x + types[0]), plus(1))),
        ("normalise the image tokens", joins(plus(0), lambda x, types: normal(x) + types[1])),
        ("along the numbers of a token", joins(plus(0), plus(1), dim=2)),
        ("along the batch", joins(plus(0), plus(1), dim=0)),
        ("stacked them", lambda text, image, types: torch.stack([text + types[0], image + types[1]])),
        ("You added them", lambda text, image, types: text + image + types.sum(0)),
        ("no tokens of their own", lambda text, image, types: torch.cat(
            [types[:1].expand(len(text), 1, -1), text, types[1:].expand(len(text), 1, -1), image], 1)),
        ("The batch comes first", lambda text, image, types: join_cat(text, image, types).transpose(0, 1)),
        ("no gradient reaches `types`", lambda text, image, types: join_cat(text, image, types.detach())),
        ("input `text` in place", lambda text, image, types: torch.cat([text.add_(types[0]), image + types[1]], 1)),
        ("float64", lambda text, image, types: join_cat(text, image, types).double()),
        ("2 times as large", lambda text, image, types: 2 * join_cat(text, image, types)),
        ("not in a way that this check knows", joins(plus(0), lambda x, types: x - types[1])),
    ],
    "choose_words": [
        ("nothing is chosen", words_then(lambda groups, chosen: chosen & False)),
        ("every token is chosen", words_then(lambda groups, chosen: chosen | True)),
        ("wrong way round", words_then(lambda groups, chosen: ~chosen)),
        (r"special tokens and padding \(-1", lambda groups, share, generator:
            torch.rand(groups.shape, generator=generator).gather(1, groups.clamp(min=0)) < share),
        ("only the first piece", words_then(lambda groups, chosen: chosen & starts(groups))),
        ("first piece of a word is never", words_then(
            lambda groups, chosen: chosen & ~(starts(groups) & several(groups)))),
        ("are chosen in part", words_by(lambda groups, share, own, word: own < share)),
        ("same words .by number. are chosen in every text",
         words_drawn(lambda chance, share, words: (chance < share)[:1].expand_as(chance))),
        ("either all words are chosen or none",
         words_drawn(lambda chance, share, words: (chance < share)[:, :1].expand_as(chance))),
        ("exactly one chosen word", words_drawn(lambda chance, share, words: rank(chance, words) == 0)),
        ("ask for groups >= 0, not groups > 0", words_then(lambda groups, chosen: chosen & (groups > 0))),
        (r"the last word of a text is never.*range\(largest \+ 1\)",
         words_then(lambda groups, chosen: chosen & (groups < groups.amax(1, keepdim=True)))),
        (r"words with the largest number in the batch \(8\)",
         words_then(lambda groups, chosen: chosen & (groups < groups.max()))),
        ("words of several pieces are never", words_then(lambda groups, chosen: chosen & ~several(groups))),
        ("words of a single piece are never", words_then(lambda groups, chosen: chosen & several(groups))),
        ("when one of its pieces are drawn", words_pieces_vote(lambda same, drawn: (same & drawn).any(2))),
        ("when all of its pieces are drawn", words_pieces_vote(lambda same, drawn: (~same | drawn).all(2))),
        ("nearly the same part", words_drawn(
            lambda chance, share, words: rank(chance, words) < (share * words).round().clamp(min=1))),
        ("not chosen independently", words_drawn(
            lambda chance, share, words: (chance < share)[:, torch.arange(chance.shape[1]) // 3])),
        ("probability 1 - share", words_by(lambda groups, share, own, word: word > share)),
        ("`share` is ignored", words_by(lambda groups, share, own, word: word < 0.15)),
        ("every text has a chosen word, even", words_drawn(at_least_one)),
        ("Each word is chosen with probability share", words_by(lambda groups, share, own, word: word < share**2)),
        ("ignore `generator`", lambda groups, share, generator: words_gather(groups, share, None)),
        ("ignore `generator`", words_from_numpy),
        ("different seeds gave the same choice", lambda groups, share, generator:
            words_gather(groups, share, torch.Generator().manual_seed(3))),
        ("dtype bool, yours is int64", words_then(lambda groups, chosen: chosen.long())),
        ("dtype bool, yours is float32", words_then(lambda groups, chosen: chosen.float())),
        ("That is one answer for each word", words_then(lambda groups, chosen: chosen[:, :9])),
        ("Every text needs its own", words_then(lambda groups, chosen: chosen[0])),
        ("one answer for a whole text", words_then(lambda groups, chosen: chosen.any(1, keepdim=True))),
        ("Drop the last dimension", words_then(lambda groups, chosen: chosen[..., None])),
        ("input `groups` in place", lambda groups, share, generator:
            words_gather(groups, share, generator) & (groups.clamp_(min=0) >= 0)),
    ],
    "matching_pairs": [
        ("every pair keeps its own picture", pairs(draw=lambda n, kept, generator: torch.arange(n))),
        ("labels are inverted", pairs_then(lambda partner, match: (partner, 1 - match))),
        ("with match 1 have got another's", pairs(
            label=lambda partner, generator: torch.randperm(len(partner), generator=generator) % 2)),
        ("with match 0 have drawn their own picture", pairs(draw=any_picture)),
        ("at least half of the pairs match, often more", pairs(
            draw=any_picture, label=lambda partner, generator: partner == torch.arange(len(partner)))),
        (r"from \d to 6 of 6: you toss a coin", pairs(
            kept=lambda n, generator: torch.rand(n, generator=generator) < 0.5)),
        ("2 of 6 pairs match on average. Wanted is half of them, 3", pairs(kept=number_kept(lambda n: n // 3))),
        ("always the first half", pairs(kept=lambda n, generator: torch.arange(n) < n // 2)),
        ("always the same half", pairs(kept=lambda n, generator: torch.arange(n) % 2 == 0)),
        ("of the 20 that are possible at n = 6 yours had 6", pairs(kept=window)),
        ("picture 1 further on, each time", pairs(draw=lambda n, kept, generator: torch.arange(n).roll(-1))),
        ("same number of steps further on. Draw for each", pairs(draw=lambda n, kept, generator:
            (torch.arange(n) + torch.randint(1, n, (1,), generator=generator)) % n)),
        ("all false pairs of a batch get the same", pairs(draw=one_for_all)),
        ("from the false half alone", pairs(draw=within(lambda kept: ~kept))),
        ("from the matching half alone", pairs(draw=within(lambda kept: kept))),
        ("this is a permutation", pairs(draw=derangement)),
        (r"nobody ever gets the picture 5 further on \(of 6\)", pairs(draw=lambda n, kept, generator:
            (torch.arange(n) + torch.randint(1, max(2, n - 1), (n,), generator=generator)) % n)),
        ("picture 1 further on is drawn 3.% of the time", pairs(draw=own_goes_on)),
        (r"pair \d draws picture 0 3.% of the time", pairs(draw=own_becomes_the_first)),
        ("ignore `generator`", lambda n, generator: pairs_steps(n, None)),
        ("ignore `generator`", pairs(draw=lambda n, kept, generator:
            (torch.arange(n) + torch.from_numpy(np.random.randint(1, n, n))) % n)),
        ("return two things", pairs_then(lambda partner, match: partner)),
        ("return two things", pairs_then(lambda partner, match: torch.stack([partner, match]))),
        ("are swapped", pairs_then(lambda partner, match: (match, partner))),
        ("nothing but 1 .own picture. and 0", pairs_then(lambda partner, match: (partner, 2 * match - 1))),
        ("Yours reach from [1-6] to 6 at n = 6",
         pairs_then(lambda partner, match: (partner + 1, match))),
        ("`match` must be of dtype int64, yours is bool", pairs_then(lambda partner, match: (partner, match.bool()))),
        ("`match` must be of dtype int64, yours is float32",
         pairs_then(lambda partner, match: (partner, match.float()))),
        ("Those that keep their picture stay", pairs_then(lambda partner, match: (partner[match == 0], match))),
        ("Not a table", pairs_then(lambda partner, match: (F.one_hot(partner, len(partner)), match))),
        ("Drop the last dimension", pairs_then(lambda partner, match: (partner[:, None], match))),
    ],
    "attention_mass": [
        ("the padded tokens ask, too", mass_of(askers=all_ask)),
        ("still divide by their number", mass_of(
            average=lambda shares, real: (shares * real[..., None]).flatten(0, 1).mean(0))),
        ("only the two class tokens ask", mass_of(askers=class_tokens_ask)),
        ("average within each text first", mass_of(average=per_picture)),
        ("sum over the asking tokens", mass_of(average=lambda shares, real: shares[real].sum(0))),
        ("divide by the number of pairs", mass_of(average=lambda shares, real: shares[real].sum(0) / len(real))),
        ("average over the tokens that are looked at", mass_of(gather="mean")),
        ("add the heads up", mass_of(heads="sum")),
        ("largest value over the heads", mass_of(heads="max")),
        ("one head only", mass_of(heads="one")),
        ("last L tokens for text", mass_of(first=False)),
        ("read the columns", mass_of(swap=True)),
        ("transposed", mass_of(read=lambda table: table.T)),
        ("the rows are swapped", mass_of(read=lambda table: table.flip(0))),
        ("the columns are swapped", mass_of(read=lambda table: table.flip(1))),
        ("2 mistakes.*padded tokens ask.*add the heads up", mass_of(askers=all_ask, heads="sum")),
        ("2 mistakes.*average within each text first.*columns are swapped",
         mass_of(average=per_picture, read=lambda table: table.flip(1))),
        ("Average over the batch, too", lambda maps, text_mask: torch.stack(
            [mass_indexed(maps[i : i + 1], text_mask[i : i + 1]) for i in range(len(maps))])),
        ("Average over the heads, too", lambda maps, text_mask: torch.stack(
            [mass_indexed(head[:, None], text_mask) for head in maps.unbind(1)])),
        ("Average over batch and heads, too", lambda maps, text_mask: torch.zeros(*maps.shape[:2], 2, 2)),
        ("Arrange the four numbers in two rows", mass_of(read=torch.flatten)),
        ("times two kinds of answers", mass_of(read=lambda table: table[0])),
        ("That is the whole table", lambda maps, text_mask: maps.mean((0, 1))),
        ("input `maps` in place", lambda maps, text_mask: mass_indexed(maps.mul_(text_mask.any()), text_mask)
            + 0 * maps.fill_(1).sum()),
        ("torch.Tensor, but yours is a list", mass_of(read=lambda table: table.tolist())),
        ("each row must sum to 1", mass_of(read=lambda table: table**2)),
        ("not in a way that this check knows", mass_of(read=lambda table: table.mean(0, keepdim=True).repeat(2, 1))),
    ],
    "sinkhorn": [
        ("You use 1 for both", sinkhorns(a=one, b=one)),
        ("m and n are swapped", sinkhorns(a=lambda m, n: 1 / n, b=lambda m, n: 1 / m)),
        (r"use 1/\(m n\) for both", sinkhorns(a=lambda m, n: 1 / (m * n), b=lambda m, n: 1 / (m * n))),
        ("sign in the kernel", sinkhorns(kernel=lambda cost, epsilon: cost / epsilon)),
        ("multiply by epsilon", sinkhorns(kernel=lambda cost, epsilon: -cost * epsilon)),
        ("epsilon is not used", sinkhorns(kernel=lambda cost, epsilon: -cost)),
        ("once only", lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon, 1)),
        ("one round too many", lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon, iterations + 1)),
        ("one round too few", lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon, iterations - 1)),
        ("update v first", sinkhorns(order="vu")),
        ("v with the u of the round before", sinkhorns(order="u+v")),
        ("v is never updated", sinkhorns(order="u")),
        ("u is never updated", sinkhorns(order="v")),
        (r"diag\(u\) is missing", sinkhorns(plan=lambda u, K, v: K * v)),
        (r"diag\(v\) is missing", sinkhorns(plan=lambda u, K, v: u[:, None] * K)),
        ("K is missing", sinkhorns(plan=lambda u, K, v: u[:, None] * v)),
        (r"this is cost \* plan", lambda cost, epsilon, iterations: cost * sinkhorn_scaling(cost, epsilon, iterations)),
        ("this is the kernel K itself", lambda cost, epsilon, iterations: (-cost / epsilon).exp()),
        ("2 mistakes.*1 for both.*sign in the kernel", sinkhorns(a=one, b=one, kernel=lambda cost, e: cost / e)),
        ("2 mistakes.*epsilon is not used.*update v first", sinkhorns(kernel=lambda cost, e: -cost, order="vu")),
        ("The plan is transposed", sinkhorns(plan=lambda u, K, v: (u[:, None] * K * v).T)),
        ("Is this the distance", lambda cost, epsilon, iterations:
            (cost * sinkhorn_scaling(cost, epsilon, iterations)).sum()),
        ("Is this u", sinkhorns(plan=lambda u, K, v: u)),
        ("Is this v", sinkhorns(plan=lambda u, K, v: v)),
        ("Is this v", sinkhorns(plan=lambda u, K, v: v[:, None])),
        (r"diag\(u\) is \(m, m\)", sinkhorns(plan=lambda u, K, v: u.diag())),
        (r"diag\(v\) is \(n, n\)", sinkhorns(plan=lambda u, K, v: v.diag())),
        ("No batch dimension", sinkhorns(plan=lambda u, K, v: (u[:, None] * K * v)[None])),
        ("input `cost` in place", lambda cost, epsilon, iterations: sinkhorn_logs(cost.mul_(2), epsilon, iterations)),
        ("float64", lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon, iterations).double()),
        ("holds NaN", lambda cost, epsilon, iterations: sinkhorn_scaling(cost, epsilon / 1000, iterations)),
        ("Every column must sum to 1/n = 0.2000", lambda cost, epsilon, iterations: torch.softmax(-cost, 1) ** 2),
        ("not in a way that this check knows", sinkhorns(kernel=lambda cost, epsilon: -(cost**2) / epsilon)),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "join": checks._JOIN_SLIPS,
        "attention_mass": checks._MASS_SLIPS,
        "sinkhorn": checks._SINKHORN_SLIPS,
    }
    helpers.every_slip_is_seeded(checks, known, MISTAKES)


# ------------------------------------------------------------------------------------------ answers of any kind


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "answer"), helpers.NO_ANSWERS)
def test_what_is_no_answer_is_explained(name, words, answer):
    helpers.is_explained(checks, name, words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_instead_of_a_function_is_sent_back(name):
    helpers.a_value_is_sent_back(checks, name)


NOISE = {
    "join": lambda text, image, types: torch.randn(len(text), text.shape[1] + image.shape[1], text.shape[2]),
    "choose_words": lambda groups, share, generator: torch.rand(groups.shape) < share,
    "matching_pairs": lambda n, generator: (torch.randint(n, (n,)), torch.randint(2, (n,))),
    "attention_mass": lambda maps, text_mask: torch.rand(2, 1) * torch.tensor([1.0, -1]) + torch.tensor([0.0, 1]),
    "sinkhorn": lambda cost, epsilon, iterations: torch.rand(cost.shape) / cost.numel(),
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match=r"not in a way that this check knows|special tokens|match 1 have got"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::3], ("choose_words", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("choose_words", words_gather, "40% chosen at share=0.4, 14% at share=0.15"),
        ("matching_pairs", pairs_steps, "1,000 batches of 6 pairs: half of them keep their picture"),
    ],
)
def test_the_verdict_does_not_depend_on_the_global_state(name, answer, words, capsys):
    assert words in helpers.verdict_under_any_global_state(checks, name, answer, capsys)


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
