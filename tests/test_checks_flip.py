"""The checks of lesson 04 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

import math
from collections.abc import Callable

import check_helpers as helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlp.checks import CheckFailed
from minivlp.checks import flip as checks
from minivlp.models.flip import FLIP, FLIPConfig, random_masking, text_masking

torch.set_num_threads(1)
torch.zeros((), requires_grad=True).backward(torch.ones(()))  # PyTorch loads a lot at the first such call: not timed

LESSON = "04_flip.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def down(n, ratio):
    return int(n * (1 - ratio))


def keep_argsort(noise, ratio):
    return noise.argsort(dim=1)[:, : down(noise.shape[1], ratio)]


def keep_topk(noise, ratio):
    return noise.topk(down(noise.shape[1], ratio), dim=1, largest=False, sorted=False).indices


def keep_mask(noise, ratio):
    """In reading order: those below the first noise that is too much."""
    K = down(noise.shape[1], ratio)
    limit = noise.sort(dim=1).values[:, K - 1 : K]
    return (noise <= limit).nonzero()[:, 1].view(len(noise), K)


def keep_loop(noise, ratio):
    K = math.floor(noise.shape[1] * (1 - ratio))
    return torch.tensor([sorted(range(len(row)), key=row.__getitem__)[:K] for row in noise.tolist()])


def keep_package(noise, ratio):
    return random_masking(noise, ratio)[0]


def embed_take(patches, weight, bias, positions, keep, *, pick=lambda k: k, pos=lambda t, k: t[k]):
    """Right by default; the options make the wrong ones."""
    return F.linear(patches.take_along_dim(pick(keep)[..., None], dim=1), weight, bias) + pos(positions, keep)


def embed_all_first(patches, weight, bias, positions, keep):
    x = patches @ weight.T + bias + positions
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))


def embed_loop(patches, weight, bias, positions, keep):
    rows = zip(patches, keep.tolist(), strict=True)
    return torch.stack([torch.stack([weight @ p[k] + bias + positions[k] for k in places]) for p, places in rows])


def embed_one_hot(patches, weight, bias, positions, keep):
    chosen = F.one_hot(keep, patches.shape[1]).float()  # (B, K, N)
    return torch.einsum("bkn,bnv,dv->bkd", chosen, patches, weight) + bias + chosen @ positions


def embed_two_tables(patches, weight, bias, positions, keep):
    return patches[torch.arange(len(keep))[:, None], keep] @ weight.mT + (bias + positions)[keep]


def time_formula(
    ratio, patches, values, width, depth, text_cost, *, keep=down, tokens=lambda K, N, r: 1 + K,
    linear=lambda T, D, N: 12 * T * D**2, attention=lambda T, D, N: 2 * T**2 * D, blocks=lambda L, a, b: L * (a + b),
    embed=lambda K, N, V, D, L: K * V * D, text=lambda c, r, L: (c, c), back=lambda masked, whole: masked / whole,
):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    costs = []
    for r in (ratio, 0.0):
        K = keep(patches, r)
        T = tokens(K, patches, r)
        tower = blocks(depth, linear(T, width, patches), attention(T, width, patches))
        costs.append(embed(K, patches, values, width, depth) + tower)
    less, more = text(text_cost, ratio, depth)
    return back(costs[0] + less, costs[1] + more)


def time_parts(ratio, patches, values, width, depth, text_cost):
    """Part by part: what a block does, matrix by matrix."""
    total = {}
    for name, K in (("less", patches - math.ceil(patches * ratio)), ("all", patches)):
        T = K + 1
        block = 4 * (T * width * width) + 2 * (T * T * width) + 2 * (T * width * 4 * width)
        total[name] = sum([block] * depth, K * values * width) + text_cost
    return np.float64(total["less"]) / total["all"]


def words_bias(noise, words, ratio, *, rule=lambda noise, words: noise + (~words).float(), first=-1.0,
               cut=lambda key, K: key.argsort(dim=1)[:, :K]):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    key = rule(noise, words).clone()
    if first is not None:
        key[:, 0] = first
    return cut(key, down(noise.shape[1], ratio))


def words_fill(noise, words, ratio):
    return words_bias(noise, words, ratio, rule=lambda noise, words: noise.masked_fill(~words, math.inf))


def words_loop(noise, words, ratio):
    """The words in reading order, and the last of the padding."""
    K, rows = down(noise.shape[1], ratio), []
    for luck, real in zip(noise.tolist(), words.tolist(), strict=True):
        here = sorted((k for k in range(1, len(real)) if real[k]), key=luck.__getitem__)[: K - 1]
        padding = [k for k in range(len(real)) if not real[k]][::-1]
        rows.append([0, *sorted(here), *padding][:K])
    return torch.tensor(rows)


def words_apart(noise, words, ratio):
    """The first token is put in front of the others' choice."""
    K = down(noise.shape[1], ratio)
    rest = (noise + 5 * ~words)[:, 1:].argsort(dim=1)[:, : K - 1] + 1
    return torch.cat([torch.zeros(len(noise), 1, dtype=torch.long), rest], dim=1)


def words_two_sorts(noise, words, ratio):
    """A stable sort by noise, then one by padding."""
    order = noise.index_fill(1, torch.tensor([0]), -1).argsort(dim=1)
    padded = (~words).take_along_dim(order, dim=1).int()
    return order.take_along_dim(padded.argsort(dim=1, stable=True), dim=1)[:, : down(noise.shape[1], ratio)]


def words_package(noise, words, ratio):
    return text_masking(noise, words, ratio)


def unit(x):
    return F.normalize(x, dim=-1)


def even(N, parts):
    if N % parts:
        raise ValueError(f"{N} is no multiple of {parts}")


def views_chunk(encode, images, noise, parts, *, cut=lambda noise, parts: noise.argsort(1).chunk(parts, 1), refuse=even,
                join=lambda v: v.mean(0), end=unit, grad=torch.no_grad):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    refuse(noise.shape[1], parts)
    with grad():
        return end(join(torch.stack([encode(images, keep) for keep in cut(noise, parts)])))


def views_sum(encode, images, noise, parts):
    """The sum need not be divided by the number: the length takes that out."""
    N = noise.shape[1]
    if N % parts:
        raise ValueError("uneven")
    order, size, total = noise.argsort(dim=1), N // parts, 0
    for start in range(0, N, size):
        total = total + encode(images, order[:, start : start + size]).detach()
    return total / total.norm(dim=1, keepdim=True)


@torch.no_grad()
def views_at_once(encode, images, noise, parts):
    """All views in one batch."""
    (B, N), order = noise.shape, noise.argsort(dim=1)
    if N % parts:
        raise ValueError("uneven")
    vectors = encode(images.repeat_interleave(parts, dim=0), order.reshape(B * parts, -1))
    return unit(vectors.view(B, parts, -1).mean(1))


def views_one_by_one(encode, images, noise, parts):
    """Picture by picture, in inference mode, the last view first."""
    even(noise.shape[1], parts)
    rows = []
    with torch.inference_mode():
        for image, order in zip(images, noise.argsort(dim=1), strict=True):
            views = order.view(parts, -1).flip(0)
            rows.append(unit(sum(encode(image[None], keep[None])[0] for keep in views)))
    return torch.stack(rows)


RIGHT = [
    ("keep_random", keep_argsort),
    ("keep_random", keep_topk),
    ("keep_random", keep_mask),
    ("keep_random", keep_loop),
    ("keep_random", keep_package),
    ("embed_kept", embed_take),
    ("embed_kept", embed_all_first),
    ("embed_kept", embed_loop),
    ("embed_kept", embed_one_hot),
    ("embed_kept", embed_two_tables),
    ("relative_time", time_formula),
    ("relative_time", time_parts),
    ("keep_words", words_bias),
    ("keep_words", words_fill),
    ("keep_words", words_loop),
    ("keep_words", words_apart),
    ("keep_words", words_two_sorts),
    ("keep_words", words_package),
    ("ensemble", views_chunk),
    ("ensemble", views_sum),
    ("ensemble", views_at_once),
    ("ensemble", views_one_by_one),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


def test_a_right_ensemble_works_with_the_model_itself():
    """The check's `encode` stands for `encode_image`: what passes there must run here, and one view is the whole."""
    model = FLIP(FLIPConfig(16, 4, image_width=16, image_depth=1, image_heads=2)).eval()
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    one, two = (views_chunk(model.encode_image, images, noise, parts) for parts in (1, 2))
    with torch.no_grad():
        torch.testing.assert_close(one, model.encode_image(images), atol=1e-5, rtol=1e-4)
    assert (one - two).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------- seeded mistakes


def places(change: Callable) -> Callable:
    """`change` of noise (B, N) and K instead of the right places."""
    return lambda noise, ratio: change(noise, down(noise.shape[1], ratio))


def rounded(count: Callable) -> Callable:
    """Another K, `count` of N and the ratio."""
    return lambda noise, ratio: noise.argsort(1)[:, : count(noise.shape[1], ratio)]


def up(n, ratio):
    return math.ceil(n * (1 - ratio))


def whole_batch(noise, K):
    return noise.flatten().argsort()[: noise.shape[0] * K].view(-1, K)


def own_draw(noise, ratio):
    return torch.rand_like(noise).argsort(1)[:, : down(noise.shape[1], ratio)]


def keep_in_place(noise, ratio):
    noise += 1
    return keep_argsort(noise, ratio)


def embeds(**options) -> Callable:
    return lambda *args: embed_take(*args, **options)


def with_keep(change: Callable) -> Callable:
    """The right answer to another `keep`."""
    return lambda patches, weight, bias, positions, keep: embed_take(patches, weight, bias, positions, change(keep))


def tokens(change: Callable) -> Callable:
    """`change` of the right tokens (B, K, D)."""
    return lambda *args: change(embed_take(*args))


def biased(times: float) -> Callable:
    return lambda patches, weight, bias, positions, keep: embed_take(patches, weight, times * bias, positions, keep)


def first_rows(keep):
    return keep[:1].expand(len(keep), -1)


def first_columns(keep):
    return torch.arange(keep.shape[1]).expand(len(keep), -1)


def embed_zeros(patches, weight, bias, positions, keep):
    """As if a mask token stood there."""
    stays = torch.zeros(patches.shape[:2]).scatter(1, keep, 1.0)[..., None]
    return stays * (F.linear(patches, weight, bias) + positions)


def embed_other(patches, weight, bias, positions, keep):
    N = patches.shape[1]
    mask = torch.ones(len(keep), N, dtype=torch.bool).scatter(1, keep, False)
    others = mask.nonzero()[:, 1].view(len(keep), -1)
    return embed_take(patches, weight, bias, positions, others)


def embed_mask(patches, weight, bias, positions, keep):
    mask = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, keep, True)
    x = F.linear(patches, weight, bias) + positions
    return x[mask].view(*keep.shape, -1)


def cut_off(place: int, how: Callable = torch.detach) -> Callable:
    """The right answer, cut off from one of its arguments."""
    return lambda *args: embed_take(*(how(x) if i == place else x for i, x in enumerate(args)))


def embed_in_place(patches, weight, bias, positions, keep):
    positions += bias
    return patches[torch.arange(len(keep))[:, None], keep] @ weight.T + positions[keep]


def times(**options) -> Callable:
    return lambda *args: time_formula(*args, **options)


def rule_of_thumb(ratio, patches, values, width, depth, text_cost):
    def back(masked, whole):
        image = whole - text_cost
        return ((1 - ratio) * image + text_cost) / whole

    return time_formula(ratio, patches, values, width, depth, text_cost, back=back)


def keeps(**options) -> Callable:
    return lambda noise, words, ratio: words_bias(noise, words, ratio, **options)


def word_places(change: Callable) -> Callable:
    """`change` of the right places (B, K)."""
    return lambda *args: change(words_bias(*args))


def words_count(count: Callable) -> Callable:
    """Another K, `count` of words (B, L) and the ratio."""
    return lambda noise, words, ratio: words_bias(noise, words, ratio, cut=lambda key, K: key.argsort(1)[
        :, : count(words, ratio)])  # fmt: skip


def words_ragged(noise, words, ratio):
    order = words_bias(noise, words, 0.0)
    return [row[: down(int(n), ratio)] for row, n in zip(order, words.sum(1), strict=True)]


def words_last(noise, words, ratio):
    noise = noise + (~words).float()
    return noise.scatter(1, words.sum(1, keepdim=True) - 1, -1.0).argsort(1)[:, : down(noise.shape[1], ratio)]


def words_downwards(noise, words, ratio):
    """Adapted to a sort downwards in everything but the noise of the words."""
    return keeps(rule=lambda noise, words: noise - 2 * ~words, first=9.0, cut=lambda key, K: key.argsort(
        1, descending=True)[:, :K])(noise, words, ratio)  # fmt: skip


def words_fill_outside(noise, words, ratio):
    """A place that does not exist instead of padding."""
    kept = words_bias(noise, words, ratio)
    return torch.where(words.take_along_dim(kept, dim=1), kept, noise.shape[1])


def words_fill_twice(noise, words, ratio):
    kept = words_bias(noise, words, ratio)
    return torch.where(words.take_along_dim(kept, dim=1), kept, noise.shape[1] - 1)


def words_in_place(noise, words, ratio):
    noise[:, 0] = -1
    return words_bias(noise, words, ratio)


def views(**options) -> Callable:
    return lambda *args: views_chunk(*args, **options)


def view_cut(cut: Callable) -> Callable:
    """Other views: `cut` of the order (B, N) of each picture and of parts."""
    return views(cut=lambda noise, parts: cut(noise.argsort(1), parts))


def new_draws(noise, parts):
    """Every view from a new random order: they overlap by chance."""
    size = noise.shape[1] // parts
    return [torch.rand_like(noise).argsort(1)[:, :size] for _ in range(parts)]


def overlapping(order, parts):
    """Windows of the right size, each shifted by less than that."""
    size = order.shape[1] // parts
    return [order[:, i * (size - 1) : i * (size - 1) + size] for i in range(parts)] if parts > 1 else [order]


def strided(order, parts):
    return [order[:, i::parts] for i in range(parts)]


def in_reading_order(order):
    return torch.arange(order.shape[1]).expand_as(order)


def views_first_alone(encode, images, noise, parts):
    return encode(images, noise.argsort(1)[:, : noise.shape[1] // parts]).detach()


def views_and_whole(encode, images, noise, parts):
    vectors = [encode(images, keep) for keep in noise.argsort(1).chunk(parts, 1)]
    return unit(torch.stack([*vectors, encode(images)]).mean(0)).detach()


def views_of_first_picture_alone(encode, images, noise, parts):
    """Only the first picture is shown, as often as there are pictures."""
    return views_chunk(encode, images[:1].expand_as(images), noise, parts)


def views_of_zeroed_pictures(encode, images, noise, parts):
    """The pixels are removed, the patches stay."""
    order, rows = noise.argsort(1), []
    for keep in order.chunk(parts, 1):
        stays = torch.zeros(noise.shape).scatter(1, keep, 1.0).view(len(images), 1, *images.shape[2:])
        rows.append(encode(images * stays, order))
    return unit(torch.stack(rows).mean(0)).detach()


def views_one_too_many(encode, images, noise, parts):
    order = noise.argsort(1).chunk(parts, 1)
    return unit(torch.stack([encode(images, keep) for keep in (*order, order[0])]).mean(0)).detach()


def views_that_look_only(encode, images, noise, parts):
    """Nothing is encoded; what comes back has the right shape and length."""
    return unit(images.flatten(1)[:, :5])


def views_halving(encode, images, noise, parts, *, join=lambda a, b: (a + b) / 2):
    even(noise.shape[1], parts)
    first, *others = [encode(images, keep).detach() for keep in noise.argsort(1).chunk(parts, 1)]
    for vector in others:
        first = join(first, vector)
    return unit(first)


def views_view(encode, images, noise, parts):
    """`unflatten` complains about uneven parts by itself, and not in the way that was asked for."""
    pieces = noise.argsort(1).unflatten(1, (parts, -1)).unbind(1)
    return unit(torch.stack([encode(images, keep) for keep in pieces]).mean(0)).detach()


def leave(N, parts):
    """No complaint."""


MISTAKES = {
    "keep_random": [
        ("the \\*most\\* noise", places(lambda noise, K: noise.argsort(1, descending=True)[:, :K])),
        ("the \\*most\\* noise", places(lambda noise, K: noise.topk(K, dim=1).indices)),
        ("without its sign", places(lambda noise, K: noise.abs().argsort(1)[:, :K])),
        ("these are ranks", places(lambda noise, K: noise.argsort(1).argsort(1)[:, :K])),
        ("you keep the first K patches", places(lambda noise, K: torch.arange(K).expand(len(noise), -1))),
        ("at even steps", places(lambda noise, K: (torch.arange(K) * noise.shape[1] // K).expand(len(noise), -1))),
        ("in the middle of the order", places(
            lambda noise, K: noise.argsort(1)[:, (noise.shape[1] - K) // 2 :][:, :K])),
        ("as if it were the class token", places(
            lambda noise, K: noise.argsort(1)[:, 1 : K + 1] if noise.shape[1] > K else noise.argsort(1))),
        ("the same patches, those of the first picture", places(lambda noise, K: first_rows(noise.argsort(1)[:, :K]))),
        ("the same patches, those of the last picture", places(
            lambda noise, K: noise[-1].argsort()[:K].expand(len(noise), -1))),
        ("averaged the noise over the batch", places(
            lambda noise, K: noise.mean(0).argsort()[:K].repeat(len(noise), 1))),
        ("noise of the whole batch at once", places(whole_batch)),
        ("another one's places", places(lambda noise, K: whole_batch(noise, K) % noise.shape[1])),
        ("wrong dimension: over the batch", places(lambda noise, K: noise.argsort(0)[:, :K])),
        ("counted from 0, yours from 1", places(lambda noise, K: noise.argsort(1)[:, :K] + 1)),
        (r"2 mistakes.*most.*from 1", places(lambda noise, K: noise.argsort(1, descending=True)[:, :K] + 1)),
        (r"2 mistakes.*most.*those of the first picture", places(
            lambda noise, K: first_rows(noise.argsort(1, descending=True)[:, :K]))),
        (r"\(4, 4\). K is rounded down", rounded(up)),
        (r"\(4, 4\). K is rounded down", rounded(lambda n, r: round(n * (1 - r)))),
        (r"\(4, 4\). K is rounded down", rounded(lambda n, r: n - int(n * r))),
        (r"one too few", rounded(lambda n, r: down(n, r) - 1)),
        (r"\(4, 10\). That is how many are \*removed\*", rounded(lambda n, r: int(n * r))),
        (r"\(4, 11\). That is how many are \*removed\*", places(lambda noise, K: noise.argsort(1)[:, K:])),
        ("a yes or no for each patch", places(lambda noise, K: noise.argsort(1).argsort(1) < K)),
        ("or the order of all", rounded(lambda n, r: n)),
        ("along the pictures", places(lambda noise, K: noise.argsort(1)[:K])),
        ("along the pictures", places(lambda noise, K: noise.argsort(0)[:K])),
        ("a row for each of the 4 pictures", places(lambda noise, K: noise.T.argsort(1)[:, :K])),
        ("Transposed", places(lambda noise, K: noise.argsort(1)[:, :K].T)),
        ("Every picture needs its own", places(lambda noise, K: noise[0].argsort()[:K])),
        ("have run together", places(lambda noise, K: noise.argsort(1)[:, :K].flatten())),
        ("Drop the last dimension", places(lambda noise, K: noise.argsort(1)[:, :K, None])),
        ("pairs of picture and place", places(lambda noise, K: (noise.argsort(1).argsort(1) < K).nonzero())),
        ("random numbers themselves", places(lambda noise, K: noise.sort(1).values[:, :K])),
        ("random numbers themselves", places(lambda noise, K: noise.topk(K, 1).values)),
        ("but yours is a list.*same number of places, K = 3", places(
            lambda noise, K: noise.argsort(1)[:, :K].tolist())),
        ("gave two different answers", own_draw),
        ("dtype int64, yours is float32", places(lambda noise, K: noise.argsort(1)[:, :K].float())),
        ("dtype int64, yours is int32", places(lambda noise, K: noise.argsort(1)[:, :K].int())),
        ("input `noise` in place", keep_in_place),
        ("Row 0 should hold.*No place may come twice", places(lambda noise, K: noise.argsort(1)[:, :1].expand(-1, K))),
        ("Row 0 should hold.*Places run from 0 to 13", places(lambda noise, K: noise.argsort(1)[:, :K] - 7)),
        ("not in a way that this check knows", places(
            lambda noise, K: (noise - 0.5).abs().argsort(1)[:, :K])),
    ],
    "embed_kept": [
        ("positions of the first K places", embeds(pos=lambda t, k: t[: k.shape[1]])),
        ("positions are missing", embeds(pos=lambda t, k: 0)),
        ("positions that the first picture kept", embeds(pos=lambda t, k: t[k[0]])),
        ("positions are sorted and the patches are not", embeds(pos=lambda t, k: t[k.sort(1).values])),
        ("position of the place before its own", embeds(pos=lambda t, k: t[k - 1])),
        ("sort `keep` once more", embeds(pos=lambda t, k: t[k.argsort(1)])),
        ("positions are added twice", embeds(pos=lambda t, k: 2 * t[k])),
        ("multiply by the positions", lambda patches, weight, bias, positions, keep: embed_take(
            patches, weight, bias, positions, keep, pos=lambda t, k: 0) * positions[keep]),
        ("you take the first K patches", embeds(pick=first_columns)),
        (r"patches that the \*first\* picture keeps", embeds(pick=first_rows)),
        ("patches are sorted and the positions are not", embeds(pick=lambda k: k.sort(1).values)),
        ("patch before each of those", lambda *args: embed_take(*args, pick=lambda k: (k - 1) % args[0].shape[1])),
        ("`keep` is not used", with_keep(first_columns)),
        ("all pictures keep what the first picture keeps", with_keep(first_rows)),
        ("right, but in another order", with_keep(lambda k: k.sort(1).values)),
        ("right, but in another order", embed_mask),
        ("in the opposite order", tokens(lambda x: x.flip(1))),
        ("use the ranks. The places are in `keep` itself\\.", with_keep(lambda k: k.argsort(1))),
        ("all patches come from the first picture", lambda patches, *rest: embed_take(
            patches[:1].expand_as(patches), *rest)),
        ("all patches come from the first picture", lambda patches, weight, bias, positions, keep: F.linear(
            patches.flatten(0, 1)[keep], weight, bias) + positions[keep]),
        ("the bias is missing", biased(0)),
        ("the bias is added twice", biased(2)),
        ("the bias is subtracted", biased(-1)),
        ("you normalise the tokens", tokens(lambda x: F.layer_norm(x, x.shape[-1:]))),
        ("no activation", lambda patches, weight, bias, positions, keep: embed_take(
            patches, weight, bias, positions, keep, pos=lambda t, k: 0).relu() + positions[keep]),
        ("divide by the root of D", tokens(lambda x: x / x.shape[-1] ** 0.5)),
        ("bring the tokens to length 1", tokens(unit)),
        ("2 mistakes.*first K places.*bias is missing", lambda patches, weight, bias, positions, keep: embed_take(
            patches, weight, 0 * bias, positions, keep, pos=lambda t, k: t[: k.shape[1]])),
        ("2 mistakes.*positions are missing.*first picture", lambda patches, *rest: embed_take(
            patches[:1].expand_as(patches), *rest, pos=lambda t, k: 0)),
        (r"\(3, 10, 6\). All places are still there. Zeros", embed_zeros),
        ("All places are still there", lambda patches, weight, bias, positions, keep: F.linear(
            patches, weight, bias) + positions),
        ("as many as are removed", embed_other),
        ("one token too many", tokens(lambda x: torch.cat([torch.zeros_like(x[:, :1]), x], 1))),
        ("beside all others", lambda *args: torch.cat([embed_take(*args), F.linear(*args[:3])], 1)),
        ("not projected", lambda patches, weight, bias, positions, keep: patches.take_along_dim(keep[..., None], 1)),
        ("joined positions and tokens", lambda patches, weight, bias, positions, keep: torch.cat([
            embed_take(patches, weight, bias, positions, keep, pos=lambda t, k: 0), positions[keep]], -1)),
        ("positions beside the tokens", lambda patches, weight, bias, positions, keep: torch.cat([
            embed_take(patches, weight, bias, positions, keep, pos=lambda t, k: 0), positions[keep]], 1)),
        ("everybody's places from every picture", lambda patches, weight, bias, positions, keep: F.linear(
            patches[:, keep], weight, bias) + positions[keep]),
        ("Nothing is averaged", tokens(lambda x: x.mean(1))),
        ("tokens of its own", tokens(lambda x: x[0])),
        ("run together", tokens(lambda x: x.flatten(0, 1))),
        ("batch comes first", tokens(lambda x: x.transpose(0, 1))),
        ("Transposed", tokens(lambda x: x.mT)),
        ("stopped with RuntimeError.*in line", lambda patches, weight, bias, positions, keep: patches @ weight),
        ("no gradient reaches `weight`", cut_off(1)),
        ("no gradient reaches `bias`", cut_off(2, lambda x: x.data)),
        ("no gradient reaches `positions`", cut_off(3)),
        ("no gradient reaches `weight`", torch.no_grad()(embed_take)),
        ("input `positions` in place", embed_in_place),
        ("float64", tokens(lambda x: x.double())),
        ("but yours is a list", tokens(lambda x: x.tolist())),
        ("every number is 3 times", tokens(lambda x: 3 * x)),
        ("not in a way that this check knows", tokens(lambda x: x**2)),
    ],
    "relative_time": [
        ("K is not rounded", times(keep=lambda n, r: n * (1 - r))),
        ("K is rounded up", times(keep=up)),
        ("K is rounded up", times(keep=lambda n, r: n - int(n * r))),
        (r"patches that are \*removed\*", times(keep=lambda n, r: n - down(n, r) if r else n)),
        ("nothing is saved", times(keep=lambda n, r: n)),
        ("nothing is saved", lambda *args: 1.0),
        ("class token is forgotten", times(tokens=lambda K, N, r: K)),
        ("never removed: T = 1", times(tokens=lambda K, N, r: int((1 + N) * (1 - r)))),
        ("counted for whole pictures, but not", times(tokens=lambda K, N, r: K if r else 1 + N)),
        ("patches left out, but not for whole", times(tokens=lambda K, N, r: 1 + K if r else N)),
        (r"only the MLP's 8 T D\^2", times(linear=lambda T, D, N: 8 * T * D**2)),
        (r"only attention's projections", times(linear=lambda T, D, N: 4 * T * D**2)),
        (r"this is 9 T D\^2", times(linear=lambda T, D, N: 9 * T * D**2)),
        ("width is not squared", times(linear=lambda T, D, N: 12 * T * D)),
        ("twelve times as many", times(linear=lambda T, D, N: T * D**2)),
        (r"linear part, 12 T D\^2, is missing", times(linear=lambda T, D, N: 0)),
        (r"all 1 \+ N tokens in both cases. What is removed does not", times(
            linear=lambda T, D, N: 12 * (1 + N) * D**2)),
        (r"attention's square, 2 T\^2 D, is forgotten", times(attention=lambda T, D, N: 0)),
        (r"grows with T \*squared\*", times(attention=lambda T, D, N: 2 * T * D)),
        ("Attention multiplies twice", times(attention=lambda T, D, N: T**2 * D)),
        ("D is missing in 2 T", times(attention=lambda T, D, N: 2 * T**2)),
        (r"still look at all 1 \+ N", times(attention=lambda T, D, N: 2 * T * (1 + N) * D)),
        ("attention is computed with all", times(attention=lambda T, D, N: 2 * (1 + N) ** 2 * D)),
        (r"this is 2 T\^2 D\^2", times(attention=lambda T, D, N: 2 * T**2 * D**2)),
        ("this is one block", times(blocks=lambda L, a, b: a + b)),
        ("attention is counted once", times(blocks=lambda L, a, b: L * a + b)),
        ("linear part is counted once", times(blocks=lambda L, a, b: a + L * b)),
        ("all N patches are embedded", times(embed=lambda K, N, V, D, L: N * V * D)),
        ("patch embedding, K V D, is missing", times(embed=lambda K, N, V, D, L: 0)),
        ("counts the class token, too", times(embed=lambda K, N, V, D, L: (K + 1) * V * D)),
        ("D is missing in the patch embedding", times(embed=lambda K, N, V, D, L: K * V)),
        ("not K D D", times(embed=lambda K, N, V, D, L: K * D * D)),
        ("counted in each block", times(embed=lambda K, N, V, D, L: L * K * V * D)),
        ("text's cost shrinks with the ratio", times(text=lambda c, r, L: (c * (1 - r), c))),
        ("text tower is forgotten", times(text=lambda c, r, L: (0, 0))),
        ("missing for whole pictures", times(text=lambda c, r, L: (c, 0))),
        ("missing for pictures with patches left out", times(text=lambda c, r, L: (0, c))),
        ("text's cost is counted twice", times(text=lambda c, r, L: (2 * c, 2 * c))),
        ("depth of the image tower", times(text=lambda c, r, L: (L * c, L * c))),
        ("multiplication and addition as two", times(
            linear=lambda T, D, N: 24 * T * D**2, attention=lambda T, D, N: 4 * T**2 * D,
            embed=lambda K, N, V, D, L: 2 * K * V * D)),
        (r"times as \*fast\*", times(back=lambda masked, whole: whole / masked)),
        (r"share that is \*saved\*", times(back=lambda masked, whole: 1 - masked / whole)),
        ("per cent", times(back=lambda masked, whole: 100 * masked / whole)),
        ("this is the cost itself", times(back=lambda masked, whole: masked)),
        ("rule of thumb", rule_of_thumb),
        ("this is 1 - ratio", lambda ratio, *rest: 1 - ratio),
        ("all cost was attention", lambda ratio, *rest: (1 - ratio) ** 2),
        ("share of the patches that stay", lambda ratio, patches, *rest: down(patches, ratio) / patches),
        ("2 mistakes.*class token is forgotten.*attention's square", times(
            tokens=lambda K, N, r: K, attention=lambda T, D, N: 0)),
        (r"2 mistakes.*text tower is forgotten.*times as \*fast\*", times(
            text=lambda c, r, L: (0, 0), back=lambda masked, whole: whole / masked)),
        (r"2 mistakes.*attention's square.*text's cost shrinks", times(
            attention=lambda T, D, N: 0, text=lambda c, r, L: (c * (1 - r), c))),
        ("of type str", lambda *args: "0.5"),
        ("of type Tensor", lambda *args: torch.tensor(time_formula(*args))),
        ("of type tuple", times(back=lambda masked, whole: (masked, whole))),
        ("not finite", lambda *args: math.nan),
        (r"relative_time\(0.5, 196, 768, 1024, 24, 2736783360\) should be 0.516291, yours is 0.3", lambda *args: 0.3),
        ("not in a way that this check knows", times(back=lambda masked, whole: (masked / whole) ** 0.5)),
    ],
    "keep_words": [
        ("padding is treated like words", keeps(rule=lambda noise, words: noise)),
        ("you keep padding and remove words", keeps(rule=lambda noise, words: noise + words.float())),
        ("at padding is too small", keeps(rule=lambda noise, words: noise + 0.5 * ~words)),
        ("first token can be removed", keeps(first=None)),
        ("first token is always removed", keeps(first=9.0)),
        ("you protect the last word", words_last),
        (r"of the words you keep those with the \*most\*", keeps(
            rule=lambda noise, words: 1 - noise + (~words).float())),
        (r"of the words you keep those with the \*most\*", words_downwards),
        ("you sort downwards", keeps(cut=lambda key, K: key.argsort(1, descending=True)[:, :K])),
        ("you sort downwards", keeps(cut=lambda key, K: key.topk(K, dim=1).indices)),
        ("you keep the first words", lambda noise, words, ratio: torch.arange(
            down(noise.shape[1], ratio)).expand(len(noise), -1)),
        ("you keep the last words", keeps(rule=lambda noise, words: 1 - torch.arange(
            noise.shape[1]) / noise.shape[1] + (~words).float())),
        ("you keep padding and remove words.*noise . words makes it 0", keeps(rule=lambda noise, words: noise * words)),
        ("these are ranks", keeps(cut=lambda key, K: key.argsort(1).argsort(1)[:, :K])),
        ("noise of the first one", lambda noise, words, ratio: words_bias(noise[:1].expand_as(noise), words, ratio)),
        ("padding of the first text for all", lambda noise, words, ratio: words_bias(
            noise, words[:1].expand_as(words), ratio)),
        ("places that the first one keeps", word_places(first_rows)),
        ("counted from 0, yours from 1", word_places(lambda kept: kept + 1)),
        ("2 mistakes.*treated like words.*first token can be removed", keeps(
            rule=lambda noise, words: noise, first=None)),
        ("2 mistakes.*first token is always removed.*noise of the first one", keeps(
            rule=lambda noise, words: noise[0] + (~words).float(), first=9.0)),
        (r"2 mistakes.*treated like words.*\*most\*", keeps(rule=lambda noise, words: 1 - noise)),
        ("2 mistakes.*treated like words.*sort downwards", keeps(
            rule=lambda noise, words: noise, cut=lambda key, K: key.argsort(1, descending=True)[:, :K])),
        ("must come first in each row", word_places(lambda kept: kept.sort(1, descending=True).values)),
        ("must come first in each row.*Row 0 begins with", word_places(lambda kept: kept.roll(-1, 1))),
        (r"\(5, 7\). That is one too many", words_count(lambda words, r: up(words.shape[1], r))),
        ("one too many: .*first token is one of the K", word_places(
            lambda kept: torch.cat([torch.zeros_like(kept[:, :1]), kept], 1))),
        ("one too few", word_places(lambda kept: kept[:, 1:])),
        (r"how many are \*removed\*", words_count(lambda words, r: words.shape[1] - down(words.shape[1], r))),
        ("words of the longest text", words_count(lambda words, r: down(int(words.sum(1).max()), r))),
        ("words of the shortest text", words_count(lambda words, r: down(int(words.sum(1).min()), r))),
        ("but yours is a list.*the same number of places", words_ragged),
        ("a yes or no for each token", lambda noise, words, ratio: torch.zeros_like(words).scatter(
            1, words_bias(noise, words, ratio), True)),
        ("or the order of all", words_count(lambda words, r: words.shape[1])),
        ("along the texts", keeps(cut=lambda key, K: key.repeat(2, 1).argsort(1)[:K])),
        ("Transposed", word_places(lambda kept: kept.T)),
        ("Every text needs its own", word_places(lambda kept: kept[0])),
        ("have run together", word_places(torch.flatten)),
        ("Drop the last dimension", word_places(lambda kept: kept[..., None])),
        ("random numbers themselves", lambda noise, words, ratio: noise.sort(1).values[
            :, : down(noise.shape[1], ratio)]),
        ("gave two different answers", lambda noise, words, ratio: words_bias(torch.rand_like(noise), words, ratio)),
        ("dtype int64, yours is float32", word_places(torch.Tensor.float)),
        ("input `noise` in place", words_in_place),
        ("Row 3 should hold the places .* and 2 of padding.*Places run from 0 to 17", words_fill_outside),
        ("a place comes twice in a row", words_fill_twice),
        ("No place may come twice", word_places(lambda kept: kept.clamp(max=3))),
        ("not in a way that this check knows", keeps(rule=lambda noise, words: (noise - 0.5).abs() + ~words)),
    ],
    "ensemble": [
        ("the views overlap: of 16 patches", views(cut=new_draws)),
        ("the views overlap: of 16 patches of picture 0 only 13", view_cut(overlapping)),
        ("all 4 views of a picture are the same 4", view_cut(lambda order, parts: order.chunk(parts, 1)[:1] * parts)),
        ("views of picture 0 are used for all", view_cut(lambda order, parts: first_rows(order).chunk(parts, 1))),
        ("reading order, stripe by stripe", view_cut(lambda order, parts: in_reading_order(order).chunk(parts, 1))),
        ("every n-th patch of the picture", view_cut(lambda order, parts: strided(in_reading_order(order), parts))),
        ("every n-th patch of the random order", view_cut(strided)),
        ("you cut the ranks", view_cut(lambda order, parts: order.argsort(1).chunk(parts, 1))),
        ("not pieces of the order that `noise` gives", views(
            cut=lambda noise, parts: torch.rand_like(noise).argsort(1).chunk(parts, 1))),
        ("seen in one view only", views_first_alone),
        ("whole pictures, all 16 patches", lambda encode, images, *rest: encode(images).detach()),
        ("whole pictures, all 16 patches", lambda encode, images, noise, parts: encode(
            images, noise.argsort(1)).detach()),
        ("whole pictures", views_and_whole),
        ("picture 0 is seen in 12 views", views_of_first_picture_alone),
        ("never shown picture 1", lambda encode, images, noise, parts: views_chunk(
            encode, images[:1], noise[:1], parts).expand(len(images), -1)),
        ("seen in 5 views instead of parts=4", views_one_too_many),
        ("a view has 8 of the 16", view_cut(lambda order, parts: order.chunk(2, 1))),
        ("a view has 8 of the 16 .*N / parts = 4", view_cut(lambda order, parts: (order[:, :8], order[:, 8:]))),
        ("a view has 12 of the 16", view_cut(lambda order, parts: [
            torch.cat([c for j, c in enumerate(order.chunk(parts, 1)) if j != i], 1) for i in range(parts)])),
        ("was never shown picture 0", views_that_look_only),
        ("stopped with RuntimeError.*not those you were given", views_of_zeroed_pictures),
        (r"stopped with RuntimeError.*needs `keep` \(B, k\).*got \(4,\)", view_cut(
            lambda order, parts: order[0].chunk(parts))),
        ("needs `keep`.*torch.bool", view_cut(lambda order, parts: (order < 4, order >= 4))),
        ("needs `keep`.*got list", view_cut(lambda order, parts: order.tolist())),
        ("places outside of 0 .. 15", view_cut(lambda order, parts: (order + 1).chunk(parts, 1))),
        (r"takes pictures \(B, C, H, W\) first", lambda encode, images, noise, parts: encode(
            noise.argsort(1), images)),
        ("you take the median", views(join=lambda v: v.median(0).values)),
        ("largest value over the views", views(join=lambda v: v.amax(0))),
        ("you multiply the views", views(join=lambda v: v.prod(0))),
        ("only the first view is in", views(join=lambda v: v[0])),
        ("only the last view is in", views(join=lambda v: v[-1])),
        ("the first view is missing", views(join=lambda v: v[1:].mean(0) if len(v) > 1 else v[0])),
        ("the last view is missing", views(join=lambda v: v[:-1].mean(0) if len(v) > 1 else v[0])),
        ("you average as you go", views_halving),
        ("length 1 after each view", lambda *args: views_halving(*args, join=lambda a, b: unit(a + b))),
        ("averaged over the pictures, too, so all", views(join=lambda v: v.mean((0, 1)).expand_as(v[0]))),
        ("not brought to length 1 again", views(end=lambda x: x)),
        ("wrong axis, over the batch", views(end=lambda x: F.normalize(x, dim=0))),
        ("wrong axis, over the batch", views(end=lambda x: x / x.norm(dim=0))),
        ("one length for the whole table", views(end=lambda x: x / x.norm())),
        ("squared length", views(end=lambda x: x / x.square().sum(-1, keepdim=True))),
        ("sum of absolute values", views(end=lambda x: F.normalize(x, p=1, dim=-1))),
        ("divide by the largest value", views(end=lambda x: F.normalize(x, p=math.inf, dim=-1))),
        ("softmax over the numbers", views(end=lambda x: x.softmax(-1))),
        ("2 mistakes.*add the views up.*not brought to length 1", views(join=lambda v: v.sum(0), end=lambda x: x)),
        ("2 mistakes.*largest value over.*not brought to length 1", views(join=lambda v: v.amax(0), end=lambda x: x)),
        ("a vector for each view. Take the mean over the views", views(join=lambda v: v)),
        ("a vector for each view. Take the mean over the views", views(join=lambda v: v.transpose(0, 1))),
        ("the views of each picture", views(join=lambda v: v.flatten(0, 1))),
        ("side by side", views(join=lambda v: torch.cat([*v], 1))),
        ("averaged over the pictures. Take", views(join=lambda v: v.mean(1))),
        ("averaged over the pictures, too. Each", views(join=lambda v: v.mean((0, 1)))),
        ("Is this a length", views(end=lambda x: x.norm(dim=-1))),
        ("Drop the dimension", views(end=lambda x: x[:, None])),
        ("Are these similarities", views(end=lambda x: x @ x.T)),
        ("These are places", lambda encode, images, noise, parts: noise.argsort(1).chunk(parts, 1)[0]),
        ("history of all views", views(grad=torch.enable_grad)),
        ("does not complain: it looks at views of 4 and 6 patches", views(refuse=leave)),
        ("does not complain: it looks at views of 5 patches", views(refuse=leave, cut=lambda noise, parts: [
            noise.argsort(1)[:, i * (noise.shape[1] // parts) : (i + 1) * (noise.shape[1] // parts)]
            for i in range(parts)])),
        ("stops with RuntimeError. Raise a ValueError", views_view),
        ("stopped with ValueError", views(refuse=lambda N, parts: even(N, 5))),
        ("input `noise` in place", lambda encode, images, noise, parts: views_chunk(
            encode, images, noise.neg_(), parts)),
        ("float64", views(end=lambda x: unit(x).double())),
        ("but yours is a list", views(end=lambda x: unit(x).tolist())),
        ("must have length 1; yours have", views(end=lambda x: unit(x) ** 3)),
        ("every number is 2 times", views(end=lambda x: 2 * unit(x))),
        ("not in a way that this check knows", views(join=lambda v: (v**3).mean(0))),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "keep_random": checks._KEEP_SLIPS,
        "embed_kept": checks._EMBED_SLIPS,
        "relative_time": checks._TIME_SLIPS,
        "keep_words": checks._WORD_SLIPS,
        "ensemble": checks._ENSEMBLE_SLIPS,
    }
    helpers.every_slip_is_seeded(checks, known, MISTAKES)


def test_an_error_that_is_no_value_error_is_not_taken_for_the_refusal():
    """The tower of the check never raises ValueError, so this must be the learner's own."""
    eye, images, _ = checks._watched(0, 2, 4, 5)
    for wrong in (torch.zeros(2, 4), torch.full((2, 4), 16), torch.zeros(3, 4, dtype=torch.long), [0, 1]):
        with pytest.raises(RuntimeError, match="`encode`"):
            eye(images, wrong)
    for wrong in (images + 1, images[:, :1], images[0]):
        with pytest.raises(RuntimeError, match="`encode`"):
            eye(wrong)


# ------------------------------------------------------------------------------------------ answers of any kind


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "answer"), helpers.NO_ANSWERS)
def test_what_is_no_answer_is_explained(name, words, answer):
    helpers.is_explained(checks, name, words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_instead_of_a_function_is_sent_back(name):
    helpers.a_value_is_sent_back(checks, name)


def same_noise(noise, K):
    """Distinct places, but not those that `noise` says, and the same at each call."""
    shape, generator = noise.shape, torch.Generator().manual_seed(7)
    return torch.rand(shape, generator=generator).argsort(1)[:, :K]


NOISE = {
    "keep_random": lambda noise, ratio: same_noise(noise, down(noise.shape[1], ratio)),
    "embed_kept": lambda patches, weight, bias, positions, keep: torch.randn(*keep.shape, len(bias)),
    "relative_time": lambda *args: float(np.random.rand()),
    "keep_words": lambda noise, words, ratio: same_noise(noise, down(noise.shape[1], ratio)),
    "ensemble": views(join=lambda v: torch.randn_like(v[0])),
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::4], ("ensemble", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


def test_the_verdict_does_not_depend_on_the_global_state(capsys):
    verdict = helpers.verdict_under_any_global_state(checks, "ensemble", views_chunk, capsys)
    assert "right with 4, 3, 2, 1 views of a picture" in verdict


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


def test_the_papers_own_ratios_come_out(capsys):
    """Table 1a gives 0.52 and 0.28 for the compute of ViT-L/16 without 50 % and 75 % of its patches."""
    assert [round(float(x), 2) for x in checks._times()[:2]] == [0.52, 0.28]
    checks.relative_time(time_formula)
    assert "takes 0.516 of the time" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
