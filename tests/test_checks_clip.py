"""The checks of lesson 03 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

import math
from collections.abc import Callable

import check_helpers as helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minivlp.checks import CheckFailed
from minivlp.checks import clip as checks

torch.set_num_threads(1)
torch.zeros((), requires_grad=True).backward(torch.ones(()))  # PyTorch loads a lot at the first such call: not timed

LESSON = "03_clip.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def end_argmax(states, ids, eot_id):
    return states[torch.arange(len(ids)), (ids == eot_id).int().argmax(dim=1)]


def end_loop(states, ids, eot_id):
    return torch.stack([row[numbers.index(eot_id)] for row, numbers in zip(states, ids.tolist(), strict=True)])


def end_weights(states, ids, eot_id):
    """A one where end-of-text stands for the first time, and zeros elsewhere."""
    ends = (ids == eot_id).long()
    return torch.einsum("bl,bld->bd", (ends * (ends.cumsum(1) == 1)).float(), states)


def end_gather(states, ids, eot_id):
    L, D = states.shape[1:]
    places = torch.where(ids == eot_id, torch.arange(L), L).amin(1)
    return states.gather(1, places[:, None, None].expand(-1, 1, D)).squeeze(1)


def unit(x, dim=-1):
    return x / x.norm(dim=dim, keepdim=True)


def loss_entropies(image, text, logit_scale, *, norm=(unit, unit), factor=torch.exp, labels=torch.arange,
                   entropy=F.cross_entropy, ways=lambda a, b: (a + b) / 2):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    logits = factor(logit_scale) * norm[0](image) @ norm[1](text).T
    own = labels(len(logits))
    return ways(entropy(logits, own), entropy(logits.T, own))


def loss_texts_on_rows(image, text, logit_scale):
    logits = F.normalize(text) @ F.normalize(image).T * logit_scale.exp()
    return -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2


def loss_cosine_similarity(image, text, logit_scale):
    table = logit_scale.exp() * F.cosine_similarity(image[:, None], text[None], dim=-1)
    return (table.logsumexp(0) + table.logsumexp(1) - 2 * table.diagonal()).sum() / (2 * len(image))


def loss_soft_labels(image, text, logit_scale):
    table = math.e**logit_scale * (unit(image)[:, None] * unit(text)).sum(-1)
    one = torch.eye(len(table))
    return torch.stack([F.cross_entropy(table, one), F.cross_entropy(table.T, one)]).mean()


def weights_normalise(vectors, *, first=unit, pool=lambda x: x.mean(1), second=unit):
    """Right by default; the options make the wrong ones."""
    return second(pool(first(vectors)))


def weights_loop(vectors):
    rows = []
    for prompts in vectors:
        mean = sum(p / p.norm() for p in prompts) / len(prompts)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def weights_sum(vectors):
    """The mean need not be divided by the number: the second normalisation takes that out."""
    return F.normalize(F.normalize(vectors, dim=2).sum(1), dim=1)


def recall_counts(scores, owner, k, *, ahead=torch.ge, pick=None, fewer=lambda n, k: n < k, back=lambda a, b: (a, b)):
    """Right by default; the options make the wrong ones."""
    N, M = scores.shape
    own = owner == torch.arange(N)[:, None]
    best = scores.masked_fill(~own, float("-inf")).amax(1) if pick is None else pick(scores, own)
    rivals = (ahead(scores, best[:, None]) & ~own).sum(1)
    others = (ahead(scores, scores[owner, torch.arange(M)]) & ~own).sum(0)
    return back(fewer(rivals, k).float().mean().item(), fewer(others, k).float().mean().item())


def recall_loop(scores, owner, k):
    scores, owner = scores.tolist(), owner.tolist()
    found = 0
    for row in range(len(scores)):
        best = max(s for s, o in zip(scores[row], owner, strict=True) if o == row)
        found += sum(s >= best for s, o in zip(scores[row], owner, strict=True) if o != row) < k
    back = 0
    for j, o in enumerate(owner):
        back += sum(scores[i][j] >= scores[o][j] for i in range(len(scores)) if i != o) < k
    return found / len(scores), back / len(owner)


def recall_sorted(scores, owner, k):
    """Takes a little from the right ones, so that a plain sort puts them behind their equals."""
    N = len(scores)
    own = F.one_hot(owner, N).T.bool()
    order = (scores - 0.5 * own).argsort(dim=1, descending=True)[:, :k]
    to_text = torch.stack([own[i, order[i]].any() for i in range(N)]).float().mean()
    best = (scores - 0.5 * own).topk(min(k, N), dim=0).indices
    return torch.stack([to_text, (best == owner).any(0).float().mean()])


def cache_backward(image_tower, text_tower, loss, images, ids, chunk, *, second=True, times=1.0, back=lambda v: v):
    """Right by default; the options make the wrong ones."""
    towers = ((image_tower, images), (text_tower, ids))
    with torch.no_grad():
        cached = [torch.cat([tower(part) for part in rows.split(chunk)]) for tower, rows in towers]
    for vectors in cached:
        vectors.requires_grad_()
    value = loss(*cached)
    value.backward()
    for (tower, rows), vectors in zip(towers, cached, strict=True):
        for part, gradient in zip(rows.split(chunk), vectors.grad.split(chunk), strict=True):
            if second:
                tower(part).backward(times * gradient)
    return back(value.detach())


def cache_product(image_tower, text_tower, loss, images, ids, chunk):
    """The gradient of a product with constants is these constants; both towers side by side."""
    starts = range(0, len(images), chunk)
    with torch.no_grad():
        image = torch.cat([image_tower(images[i : i + chunk]) for i in starts])
        text = torch.cat([text_tower(ids[i : i + chunk]) for i in starts])
    image, text = image.requires_grad_(), text.requires_grad_()
    value = loss(image, text)
    value.backward()
    for i in starts:
        part = slice(i, i + chunk)
        to_image, to_text = image_tower(images[part]) * image.grad[part], text_tower(ids[part]) * text.grad[part]
        (to_image.sum() + to_text.sum()).backward()
    return value


def cache_exchange(image_tower, text_tower, loss, images, ids, chunk, *, scale_once=True, sides=(True, True)):
    """The whole loss for each chunk, whose vectors alone have a graph. Its parameter must then learn only once."""
    with torch.no_grad():
        image = [image_tower(part) for part in images.split(chunk)]
        text = [text_tower(part) for part in ids.split(chunk)]
    for i, (pictures, texts) in enumerate(zip(images.split(chunk), ids.split(chunk), strict=True)):
        live = [image_tower(pictures)] if sides[0] else [image[i]], [text_tower(texts)] if sides[1] else [text[i]]
        for parameter in loss.parameters():
            parameter.requires_grad_(i == 0 or not scale_once)
        value = loss(torch.cat(image[:i] + live[0] + image[i + 1 :]), torch.cat(text[:i] + live[1] + text[i + 1 :]))
        value.backward()
    for parameter in loss.parameters():
        parameter.requires_grad_(True)
    return value.detach()


def cache_grad(image_tower, text_tower, loss, images, ids, chunk):
    """With torch.autograd.grad instead of backward."""
    towers = ((image_tower, images), (text_tower, ids))
    with torch.no_grad():
        cached = [torch.cat([tower(part) for part in rows.split(chunk)]) for tower, rows in towers]
    cached = [vectors.requires_grad_() for vectors in cached]
    value = loss(*cached)
    inputs = [*cached, *loss.parameters()]
    at_image, at_text, *others = torch.autograd.grad(value, inputs)
    found = list(zip(loss.parameters(), others, strict=True))
    for (tower, rows), gradients in zip(towers, (at_image, at_text), strict=True):
        for part, gradient in zip(rows.split(chunk), gradients.split(chunk), strict=True):
            parameters = list(tower.parameters())
            found += zip(parameters, torch.autograd.grad(tower(part), parameters, gradient), strict=True)
    for parameter, gradient in found:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return value.detach()


def cache_checkpoint(image_tower, text_tower, loss, images, ids, chunk):
    """PyTorch's own way to compute again what was not kept."""
    start = torch.zeros(1, requires_grad=True)  # the reentrant kind wants an input that asks for a gradient

    def run(tower, rows):
        part = lambda x, start: tower(x)  # noqa: E731
        return torch.cat([checkpoint(part, x, start, use_reentrant=True) for x in rows.split(chunk)])

    value = loss(run(image_tower, images), run(text_tower, ids))
    value.backward()
    return value.detach()


RIGHT = [
    ("pool_end", end_argmax),
    ("pool_end", end_loop),
    ("pool_end", end_weights),
    ("pool_end", end_gather),
    ("symmetric_loss", loss_entropies),
    ("symmetric_loss", loss_texts_on_rows),
    ("symmetric_loss", loss_cosine_similarity),
    ("symmetric_loss", loss_soft_labels),
    ("zero_shot_weights", weights_normalise),
    ("zero_shot_weights", weights_loop),
    ("zero_shot_weights", weights_sum),
    ("recall_at_k", recall_counts),
    ("recall_at_k", recall_loop),
    ("recall_at_k", recall_sorted),
    ("grad_cache", cache_backward),
    ("grad_cache", cache_product),
    ("grad_cache", cache_exchange),
    ("grad_cache", cache_grad),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


def test_pytorchs_own_checkpoints_pass(capsys):
    """Apart from the others, for the first use of them loads a large part of PyTorch."""
    checks.grad_cache(cache_checkpoint)
    assert capsys.readouterr().out.startswith("✓ grad_cache: right")


# --------------------------------------------------------------------------------------------- seeded mistakes


def end_at(position: Callable) -> Callable:
    """`position` of ids (B, L) and eot_id says where each text is read."""
    return lambda states, ids, eot_id: states[torch.arange(len(ids)), position(ids, eot_id)]


def first_end(ids, eot_id):
    return (ids == eot_id).int().argmax(1)


def up_to_end(reduce: Callable, *, more: int = 1) -> Callable:
    """`reduce` of the states (n, D) of each text up to its end, or up to the token before."""

    def answer(states, ids, eot_id):
        return torch.stack([
            reduce(x[: i + more]) for x, i in zip(states, first_end(ids, eot_id).tolist(), strict=True)
        ])  # fmt: skip

    return answer


def losses(**options) -> Callable:
    return lambda image, text, logit_scale: loss_entropies(image, text, logit_scale, **options)


def same(x):
    return x


def entropy_of(table: Callable) -> Callable:
    """Instead of the cross-entropy: `table` of the logits (B, B) -> (B, B), of which the diagonal's mean is taken."""
    return lambda logits, own: -table(logits).diag().mean()


def soft_targets(image, text, logit_scale, *, norm=unit, scale=True, transpose=False):
    """As in a popular tutorial, with what it leaves out put back on request."""
    image, text, factor = norm(image), norm(text), logit_scale.exp() if scale else 1.0
    logits = factor * image @ text.T
    targets = (factor * (image @ image.T + text @ text.T) / 2).softmax(-1)
    other = targets.T if transpose else targets
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, other)) / 2


def loss_by_hand(image, text, logit_scale):
    """Right on paper."""
    p = (logit_scale.exp() * unit(image) @ unit(text).T).exp()
    return -((p / p.sum(0)).log().diag() + (p / p.sum(1, keepdim=True)).log().diag()).mean() / 2


def loss_in_place(image, text, logit_scale):
    image /= image.norm(dim=1, keepdim=True)
    return loss_entropies(image, text, logit_scale)


def loss_cut(*, image=same, text=same, scale=same) -> Callable:
    return lambda i, t, s: loss_entropies(image(i), text(t), scale(s))


def half_cut(x):
    """Length 1, where the length is taken for a constant."""
    return x / x.norm(dim=1, keepdim=True).detach()


def weights(**options) -> Callable:
    return lambda vectors: weights_normalise(vectors, **options)


def whole(x):
    return x / x.norm()


def by_class(x):
    """The second normalisation takes this length out again, so nothing is left of it: no normalisation."""
    return x / x.norm(dim=(1, 2), keepdim=True)


def recalls(**options) -> Callable:
    return lambda scores, owner, k: recall_counts(scores, owner, k, **options)


def recall_to_text(share: Callable, *, ahead: Callable = torch.ge) -> Callable:
    """`share` of own (N, M), of rank (N, M), how many others' texts are ahead of each, and of k."""

    def answer(scores, owner, k):
        own = owner == torch.arange(len(scores))[:, None]
        rank = ((ahead(scores[:, None], scores[:, :, None])) & ~own[:, None]).sum(2)
        return float(share(own, rank, k)), recall_counts(scores, owner, k)[1]

    return answer


def hits_of_first(own, rank, k):
    return (rank[torch.arange(len(own)), own.int().argmax(1)] < k).float().mean()


def hits_of_last(own, rank, k):
    return (rank[torch.arange(len(own)), own.shape[1] - 1 - own.flip(1).int().argmax(1)] < k).float().mean()


def recall_siblings_are_wrong(find: Callable) -> Callable:
    """`find` of own (N, M) and of rank (N, M) among all other texts, the picture's own included, and of k."""

    def answer(scores, owner, k):
        own = owner == torch.arange(len(scores))[:, None]
        rank = (scores[:, None] >= scores[:, :, None]).sum(2) - 1
        return float(find(own, rank, k)), recall_counts(scores, owner, k)[1]

    return answer


def recall_topk(scores, owner, k):
    own = owner == torch.arange(len(scores))[:, None]
    to_text = own.gather(1, scores.topk(k, dim=1).indices).any(1).float().mean()
    return to_text.item(), own.gather(0, scores.topk(k, dim=0).indices).any(0).sum().item() / len(owner)


def recall_owner(guess: Callable) -> Callable:
    return lambda scores, owner, k: recall_counts(scores, guess(*scores.shape), k)


def recall_other_axis(scores, owner, k):
    """Texts rank in their picture's row, and pictures by the columns of their texts."""
    siblings = owner[:, None] == owner
    mine = scores[owner, torch.arange(len(owner))]
    row = ((scores[owner] >= mine[:, None]) & ~siblings).sum(1)
    column = (scores >= mine).sum(0) - 1
    found = [bool((column[owner == i] < k).any()) for i in range(len(scores))]
    return sum(found) / len(found), (row < k).float().mean().item()


def back(change: Callable) -> Callable:
    """`change` of the two right numbers and of N and M."""
    return lambda scores, owner, k: change(*recall_counts(scores, owner, k), *scores.shape)


def cached(**options) -> Callable:
    return lambda *args: cache_backward(*args, **options)


def cache_accumulate(image_tower, text_tower, loss, images, ids, chunk, *, mean=True):
    pieces = list(zip(images.split(chunk), ids.split(chunk), strict=True))
    total = 0.0
    for pictures, texts in pieces:
        value = loss(image_tower(pictures), text_tower(texts)) / (len(pieces) if mean else 1)
        value.backward()
        total += value.detach()
    return total


def cache_at_once(image_tower, text_tower, loss, images, ids, chunk):
    value = loss(image_tower(images), text_tower(ids))
    value.backward()
    return value.detach()


def cache_all_chunks_alive(image_tower, text_tower, loss, images, ids, chunk):
    vectors = [torch.cat([tower(x) for x in rows.split(chunk)])
               for tower, rows in ((image_tower, images), (text_tower, ids))]  # fmt: skip
    value = loss(*vectors)
    value.backward()
    return value.detach()


def cache_whole_second_pass(image_tower, text_tower, loss, images, ids, chunk):
    """The first pass saves, and the second one spends it again."""
    with torch.no_grad():
        image, text = (torch.cat([tower(x) for x in rows.split(chunk)])
                       for tower, rows in ((image_tower, images), (text_tower, ids)))  # fmt: skip
    image, text = image.requires_grad_(), text.requires_grad_()
    value = loss(image, text)
    value.backward()
    image_tower(images).backward(image.grad)
    text_tower(ids).backward(text.grad)
    return value.detach()


def cache_pieces(image_tower, text_tower, loss, images, ids, chunk, *, first=None, hand=None, once=True,
                 learn_scale=True):  # fmt: skip
    """`first` changes the rows that take part; `hand` of side, vectors, gradient and slice says what a chunk gets."""
    rows = [first(x, chunk) for x in (images, ids)] if first else [images, ids]
    towers = (image_tower, text_tower)
    with torch.no_grad():
        vectors = [torch.cat([tower(x) for x in side.split(chunk)]) for tower, side in zip(towers, rows, strict=True)]
    vectors = [v.requires_grad_() for v in vectors]
    value = loss(*vectors)
    at_vectors = torch.autograd.grad(value, [*vectors, *loss.parameters()])
    for parameter, gradient in zip(loss.parameters(), at_vectors[2:], strict=True):
        if learn_scale:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    for side, (tower, v, g) in enumerate(zip(towers, vectors, at_vectors[:2], strict=True)):
        for start in range(0, len(v), chunk):
            part = slice(start, start + chunk)
            given = hand(side, v.detach(), g, part) if hand else g[part]
            if given is not None:
                tower(rows[side][part]).backward(given)
    return value.detach()


def pieces(**options) -> Callable:
    return lambda *args: cache_pieces(*args, **options)


def to_side(which: int, give: Callable) -> Callable:
    """`give` of vectors, gradient and slice for that side alone; the other side is right."""
    return lambda side, v, g, part: give(v, g, part) if side == which else g[part]


def full_chunks(x, chunk):
    return x[: len(x) // chunk * chunk] if len(x) >= chunk else x


def scaled_gradients(factor: Callable) -> Callable:
    """All gradients times `factor` of the number of chunks."""

    def answer(image_tower, text_tower, loss, images, ids, chunk):
        parts = [p for part in (image_tower, text_tower, loss) for p in part.parameters()]
        before = [0 if p.grad is None else p.grad.clone() for p in parts]
        value = cache_backward(image_tower, text_tower, loss, images, ids, chunk)
        for p, old in zip(parts, before, strict=True):
            p.grad = old + factor(-(-len(images) // chunk)) * (p.grad - old)
        return value

    return answer


def scale_gradient(factor: Callable) -> Callable:
    """The temperature's gradient times `factor` of the number of chunks."""

    def answer(image_tower, text_tower, loss, images, ids, chunk):
        (t,) = loss.parameters()
        before = 0 if t.grad is None else t.grad.clone()
        value = cache_backward(image_tower, text_tower, loss, images, ids, chunk)
        t.grad = before + factor(-(-len(images) // chunk)) * (t.grad - before)
        return value

    return answer


def cache_zero_grad(image_tower, text_tower, loss, *rest):
    for part in (image_tower, text_tower, loss):
        part.zero_grad()
    return cache_backward(image_tower, text_tower, loss, *rest)


def cache_and_step(image_tower, text_tower, loss, *rest):
    value = cache_backward(image_tower, text_tower, loss, *rest)
    torch.optim.SGD(image_tower.parameters(), lr=0.1).step()
    return value


def cache_value(change: Callable) -> Callable:
    """Right gradients; the number that comes back is `change` of the chunks' own losses and the right one."""

    def answer(image_tower, text_tower, loss, images, ids, chunk):
        value = cache_backward(image_tower, text_tower, loss, images, ids, chunk)
        with torch.no_grad():
            own = torch.stack([
                loss(image_tower(x), text_tower(y)) for x, y in zip(images.split(chunk), ids.split(chunk), strict=True)
            ])  # fmt: skip
        return change(own, value)

    return answer


def cache_logits(image_tower, text_tower, loss, images, ids, chunk):
    value = cache_backward(image_tower, text_tower, loss, images, ids, chunk)
    return value.expand(len(images), len(images))


MISTAKES = {
    "pool_end": [
        ("position of the largest id", end_at(lambda ids, eot: ids.argmax(1))),
        ("stop at the first id that is at least eot_id", end_at(lambda ids, eot: (ids >= eot).int().argmax(1))),
        ("you take the last end-of-text", end_at(
            lambda ids, eot: ids.shape[1] - 1 - (ids == eot).flip(1).int().argmax(1))),
        ("you take the last position", end_at(lambda ids, eot: torch.full((len(ids),), -1))),
        ("you take token 0", lambda states, ids, eot_id: states[:, 0]),
        ("the token before the end-of-text", end_at(lambda ids, eot: first_end(ids, eot) - 1)),
        ("the token behind the end-of-text", end_at(lambda ids, eot: first_end(ids, eot) + 1)),
        ("count the ids that are not 0", end_at(lambda ids, eot: (ids != 0).sum(1) - 1)),
        ("where the first one ends", lambda states, ids, eot_id: states[:, first_end(ids, eot_id)[0]]),
        ("mean over all positions", lambda states, ids, eot_id: states.mean(1)),
        ("mean over the text", up_to_end(lambda x: x.mean(0))),
        ("mean over the tokens before the end", up_to_end(lambda x: x.mean(0), more=0)),
        ("largest value over the text", up_to_end(lambda x: x.amax(0))),
        ("sum over the text", up_to_end(lambda x: x.sum(0))),
        ("all states come from the first text", lambda states, ids, eot_id: states[0, first_end(ids, eot_id)]),
        ("2 mistakes.*largest id.*come from the first text", lambda states, ids, eot_id: states[0, ids.argmax(1)]),
        ("takes every position from every text", lambda states, ids, eot_id: states[:, first_end(ids, eot_id)]),
        ("Drop the dimension", lambda states, ids, eot_id: end_argmax(states, ids, eot_id)[:, None]),
        ("These are all states", lambda states, ids, eot_id: states * (ids == eot_id)[..., None]),
        ("a number for each token", lambda states, ids, eot_id: states.mean(2)),
        ("Is this the position", lambda states, ids, eot_id: first_end(ids, eot_id)),
        ("Every text needs its own", lambda states, ids, eot_id: end_argmax(states, ids, eot_id)[0]),
        (r"\(7, 6\). That is a state for each end-of-text", lambda states, ids, eot_id: states[ids == eot_id]),
        ("no gradient reaches `states`", lambda states, ids, eot_id: end_argmax(states.detach(), ids, eot_id)),
        ("input `ids` in place", lambda states, ids, eot_id: end_argmax(states, ids.sub_(eot_id), 0)),
        ("float64", lambda states, ids, eot_id: end_argmax(states, ids, eot_id).double()),
        ("but yours is a list", lambda states, ids, eot_id: end_argmax(states, ids, eot_id).tolist()),
        ("not in a way that this check knows", lambda states, ids, eot_id: end_argmax(states, ids, eot_id) ** 2),
        ("every number is 2 times", lambda states, ids, eot_id: 2 * end_argmax(states, ids, eot_id)),
    ],
    "symmetric_loss": [
        ("vectors are not normalised", losses(norm=(same, same))),
        ("only the image vectors", losses(norm=(unit, same))),
        ("only the text vectors", losses(norm=(same, unit))),
        ("wrong axis, over the batch", losses(norm=(lambda x: F.normalize(x, dim=0),) * 2)),
        ("one length for the whole table", losses(norm=(whole, whole))),
        ("squared length", losses(norm=(lambda x: x / x.square().sum(1, keepdim=True),) * 2)),
        ("sum of the absolute values", losses(norm=(lambda x: F.normalize(x, p=1),) * 2)),
        ("multiply by t itself", losses(factor=same)),
        ("`logit_scale` is not used", losses(factor=torch.ones_like)),
        (r"you divide by exp\(t\)", losses(factor=lambda t: 1 / t.exp())),
        ("you divide by t, as if", losses(factor=lambda t: 1 / t)),
        ("clamped inside of the loss", losses(factor=lambda t: t.exp().clamp(max=100))),
        ("clamped inside of the loss", losses(factor=lambda t: t.clamp(0, math.log(100)).exp())),
        (r"a table \(E, E\)", lambda image, text, t: loss_entropies(unit(image).T, unit(text).T, t, norm=(same, same))),
        ("one direction only: pictures choose", losses(ways=lambda a, b: a)),
        ("one direction only: texts choose", losses(ways=lambda a, b: b)),
        ("add up both directions", losses(ways=lambda a, b: a + b)),
        ("runs over the whole table", losses(entropy=entropy_of(lambda x: x.flatten().log_softmax(0).view_as(x)))),
        ("softmax is taken twice", losses(entropy=lambda x, own: F.cross_entropy(x.softmax(1), own))),
        ("logarithm is missing", losses(entropy=entropy_of(lambda x: x.softmax(1)))),
        ("logarithm is missing", losses(entropy=lambda x, own: F.nll_loss(x.softmax(1), own))),
        ("there is no softmax", losses(entropy=lambda x, own: F.nll_loss(x, own))),
        ("SigLIP", losses(entropy=lambda x, own: F.binary_cross_entropy_with_logits(x, torch.eye(len(x))))),
        ("sum over the batch", losses(entropy=lambda x, own: F.cross_entropy(x, own, reduction="sum"))),
        (r"divide by B \* B", losses(entropy=lambda x, own: -(x.log_softmax(1) * torch.eye(len(x))).mean())),
        ("the sign is wrong", losses(entropy=entropy_of(lambda x: -x.log_softmax(1)))),
        ("everyone belongs to number 0", losses(labels=lambda n: torch.zeros(n, dtype=torch.long))),
        ("similarities of the model's own", soft_targets),
        ("similarities of the model's own", lambda *args: soft_targets(*args, transpose=True)),
        ("loss met in popular code", lambda *args: soft_targets(*args, norm=same, scale=False, transpose=True)),
        ("2 mistakes.*not normalised.*multiply by t itself", losses(norm=(same, same), factor=same)),
        (r"2 mistakes.*divide by exp\(t\).*pictures choose", losses(factor=lambda t: (-t).exp(), ways=lambda a, b: a)),
        ("2 mistakes.*not normalised.*own vectors", lambda *args: soft_targets(*args, norm=same)),
        ("mean over the batch", losses(entropy=lambda x, own: F.cross_entropy(x, own, reduction="none"))),
        ("mean of both directions", losses(ways=lambda a, b: torch.stack([a, b]))),
        ("table of pairs", losses(ways=lambda a, b: a, entropy=lambda x, own: x)),
        ("numbers of the shared space", lambda image, text, t: unit(image).T @ unit(text)),
        ("single number has no dimension", lambda *args: loss_entropies(*args)[None]),
        (r"does not fit into float32.*F.cross_entropy", loss_by_hand),
        ("no gradient reaches `logit_scale`", loss_cut(scale=torch.detach)),
        ("Tensor, but yours is a float", lambda *args: loss_entropies(*args).item()),
        ("no gradient reaches `text`", loss_cut(text=torch.detach)),
        ("no gradient reaches `image`", loss_cut(image=lambda x: x.data)),
        ("gradient to `image` is not.*cut off", losses(norm=(half_cut, unit))),
        ("gradient to `text` is not.*cut off", losses(norm=(unit, half_cut))),
        ("input `image` in place", loss_in_place),
        ("float64", lambda *args: loss_entropies(*args).double()),
        ("With 4 pairs, E = 6, logit_scale = 2.6593: expected", losses(norm=(lambda x: unit(x - x.mean(0)),) * 2)),
    ],
    "zero_shot_weights": [
        ("not normalised before the mean", weights(first=same)),
        ("before the mean.*wrong axis, over the prompts", weights(first=lambda x: unit(x, 1))),
        ("before the mean.*wrong axis, over the classes", weights(first=lambda x: unit(x, 0))),
        ("not normalised before the mean", weights(first=by_class)),
        ("before the mean.*by the squared length", weights(first=lambda x: x / x.square().sum(-1, keepdim=True))),
        ("before the mean.*sum of absolute values", weights(first=lambda x: F.normalize(x, p=1, dim=-1))),
        ("before the mean.*largest value", weights(first=lambda x: F.normalize(x, p=math.inf, dim=-1))),
        ("median over the prompts", weights(pool=lambda x: x.median(1).values)),
        ("largest value over the prompts", weights(pool=lambda x: x.amax(1))),
        ("first prompt alone", weights(pool=lambda x: x[:, 0])),
        ("last prompt alone", weights(pool=lambda x: x[:, -1])),
        ("mean is not normalised again", weights(second=same)),
        ("after the mean.*wrong axis, over the classes", weights(second=lambda x: unit(x, 0))),
        ("after the mean.*one length for the whole table", weights(second=whole)),
        ("after the mean.*squared length", weights(second=lambda x: x / x.square().sum(-1, keepdim=True))),
        ("after the mean.*sum of absolute values", weights(second=lambda x: F.normalize(x, p=1, dim=-1))),
        ("2 mistakes.*add the prompts up.*not normalised again", weights(pool=lambda x: x.sum(1), second=same)),
        ("2 mistakes.*before the mean.*not normalised again", weights(first=same, second=same)),
        ("2 mistakes.*over the prompts.*median", weights(
            first=lambda x: unit(x, 1), pool=lambda x: x.median(1).values)),
        ("2 mistakes.*one length for each class.*not normalised again", weights(first=by_class, second=same)),
        ("2 mistakes.*whole table.*not normalised again", weights(first=whole, second=same)),
        ("multiply by 100", lambda vectors: 100 * weights_sum(vectors)),
        ("softmax over the numbers of a vector", lambda vectors: weights_sum(vectors).softmax(1)),
        ("subtract the mean of all classes", lambda vectors: weights_sum(vectors) - weights_sum(vectors).mean(0)),
        ("mix up the classes", lambda vectors: unit(
            unit(vectors).reshape(vectors.shape[1], vectors.shape[0], -1).mean(0))),
        ("averaged over the classes", weights(pool=lambda x: x.mean(0))),
        ("averaged over the numbers of each vector", weights(pool=lambda x: x.mean(2))),
        ("must become one vector", weights(pool=same)),
        ("a vector for each prompt", weights(pool=lambda x: x.flatten(0, 1))),
        ("averaged over all classes", weights(pool=lambda x: x.mean((0, 1)))),
        ("Transposed", lambda vectors: weights_sum(vectors).T),
        ("Drop the dimension", lambda vectors: unit(unit(vectors).mean(1, keepdim=True))),
        ("Is this a length", lambda vectors: weights_sum(vectors).norm(dim=1)),
        ("Are these similarities", lambda vectors: weights_sum(vectors) @ weights_sum(vectors).T),
        ("input `vectors` in place", lambda vectors: weights_sum(vectors.div_(vectors.norm(dim=-1, keepdim=True)))),
        ("float64", lambda vectors: weights_sum(vectors).double()),
        ("but yours is a numpy|a ndarray", lambda vectors: weights_sum(vectors).numpy()),
        ("must have length 1; yours have", lambda vectors: weights_sum(vectors) ** 3),
        ("every number is 3 times", lambda vectors: 3 * weights_sum(vectors)),
        ("not in a way that this check knows", weights(first=lambda x: unit(x**3))),
    ],
    "recall_at_k": [
        ("only those that score higher", recalls(ahead=torch.gt)),
        ("topk or argsort decides by the place", recall_topk),
        ("ask for all texts of a picture. One of them is enough", recall_to_text(
            lambda own, rank, k: ((rank < k) | ~own).all(1).float().mean())),
        ("cannot be where it has more than k", recall_siblings_are_wrong(
            lambda own, rank, k: ((rank < k) | ~own).all(1).float().mean())),
        ("the share of a picture's texts that are found", recall_to_text(
            lambda own, rank, k: (((rank < k) & own).sum(1) / own.sum(1)).mean())),
        ("this is precision", recall_to_text(lambda own, rank, k: (((rank < k) & own).sum(1) / k).mean())),
        ("you average over the texts", recall_to_text(lambda own, rank, k: (rank[own] < k).float().mean())),
        ("every text is asked for on its own", recall_siblings_are_wrong(
            lambda own, rank, k: (rank[own] < k).float().mean())),
        ("the first text of each picture alone", recall_to_text(hits_of_first)),
        ("the last text of each picture alone", recall_to_text(hits_of_last)),
        ("the mean score of a picture's texts", recalls(pick=lambda scores, own: (scores * own).sum(1) / own.sum(1))),
        ("other texts of the same picture count as wrong where", recall_siblings_are_wrong(
            lambda own, rank, k: ((rank < k) & own).any(1).float().mean())),
        (r"best k \+ 1", recalls(fewer=lambda n, k: n <= k)),
        ("best k - 1", recalls(fewer=lambda n, k: n + 1 < k)),
        ("`k` is not used", recalls(fewer=lambda n, k: n < 1)),
        ("texts stand in the order of the pictures", recall_owner(
            lambda N, M: (torch.arange(M) // (M // N)).clamp(max=N - 1))),
        ("text j belongs to picture j", recall_owner(lambda N, M: torch.arange(M) % N)),
        ("rank along the wrong axis", recall_other_axis),
        ("prefer the lowest", lambda scores, owner, k: recall_counts(-scores, owner, k)),
        ("two numbers are swapped", recalls(back=lambda a, b: (b, a))),
        ("both numbers are the recall from image to text", recalls(back=lambda a, b: (a, a))),
        ("both numbers are the recall from text to image", recalls(back=lambda a, b: (b, b))),
        ("mean of both directions", recalls(back=lambda a, b: ((a + b) / 2,) * 2)),
        ("these are per cent", recalls(back=lambda a, b: (100 * a, 100 * b))),
        ("you count the hits", back(lambda a, b, N, M: (round(a * N), round(b * M)))),
        ("share of misses", recalls(back=lambda a, b: (1 - a, 1 - b))),
        ("divide by the number of pictures", back(lambda a, b, N, M: (a, b * M / N))),
        ("2 mistakes.*score higher.*swapped", recalls(ahead=torch.gt, back=lambda a, b: (b, a))),
        ("2 mistakes.*share of a picture's texts.*score higher|2 mistakes.*score higher.*share of a picture's texts",
         lambda scores, owner, k: (
             recall_to_text(lambda own, rank, k: (((rank < k) & own).sum(1) / own.sum(1)).mean(), ahead=torch.gt)(
                 scores, owner, k)[0], recall_counts(scores, owner, k, ahead=torch.gt)[1])),
        ("return two things", recalls(back=lambda a, b: (a + b) / 2)),
        ("return two things", recalls(back=lambda a, b: {"image to text": a, "text to image": b})),
        (r"one number, yours has the shape \(30,\)", lambda scores, owner, k: (scores.amax(1), 0.5)),
        ("must be a number, yours is of type str", recalls(back=lambda a, b: (f"{a:.0%}", f"{b:.0%}"))),
        ("must be a number, yours is of type NoneType", recalls(back=lambda a, b: (a, None))),
        ("not finite", recalls(back=lambda a, b: (a, math.nan))),
        ("input `scores` in place", lambda scores, owner, k: recall_counts(scores.neg_(), owner, k)),
        (r"30 pictures, 60 texts, k=1: expected.*got.*between 0 and 1", recalls(back=lambda a, b: (a - 1, b + 1))),
        (r"30 pictures, 60 texts, k=1: expected", recalls(back=lambda a, b: (a**2, b**2))),
    ],
    "grad_cache": [
        ("This is gradient accumulation", cache_accumulate),
        ("losses are added up", lambda *args: cache_accumulate(*args, mean=False)),
        ("no gradient reaches the image tower", pieces(hand=to_side(0, lambda v, g, part: None))),
        ("no gradient reaches the text tower", pieces(hand=to_side(1, lambda v, g, part: None))),
        ("2 mistakes.*image tower.*text tower", cached(second=False)),
        ("2 mistakes.*text tower.*once for each chunk",
         lambda *args: cache_exchange(*args, scale_once=False, sides=(True, False))),
        ("every chunk of pictures gets the gradients of the first",
         pieces(hand=to_side(0, lambda v, g, part: g[: len(v[part])]))),
        ("every chunk of texts gets the gradients of the first",
         pieces(hand=to_side(1, lambda v, g, part: g[: len(v[part])]))),
        ("hand the image tower its vectors", pieces(hand=to_side(0, lambda v, g, part: v[part]))),
        ("hand the text tower its vectors", pieces(hand=to_side(1, lambda v, g, part: v[part]))),
        ("image tower gets its gradient twice", pieces(hand=to_side(0, lambda v, g, part: 2 * g[part]))),
        ("text tower gets its gradient twice", pieces(hand=to_side(1, lambda v, g, part: 2 * g[part]))),
        ("no gradient reaches the parameters of the loss", pieces(learn_scale=False)),
        ("temperature, gets its gradient once for each chunk", lambda *args: cache_exchange(*args, scale_once=False)),
        ("temperature, is divided by the number of chunks", scale_gradient(lambda n: 1 / n)),
        ("last chunk is left out", pieces(first=full_chunks)),
        ("last chunk is smaller and gets no gradient", pieces(
            hand=lambda side, v, g, part: g[part] if part.stop <= len(v) or part.start == 0 else None)),
        ("only the first chunk gets", pieces(hand=lambda side, v, g, part: g[part] if part.start == 0 else None)),
        ("divided by the number of chunks. That belongs", scaled_gradients(lambda n: 1 / n)),
        ("counted once for each chunk", scaled_gradients(lambda n: n)),
        ("sign of all gradients", scaled_gradients(lambda n: -1)),
        ("gradients that were in `.grad` before are lost", cache_zero_grad),
        ("got 10 rows at once, although no more than chunk=4", cache_at_once),
        ("got 10 rows at once", cache_whole_second_pass),
        ("3 chunks wait for their backward pass", cache_all_chunks_alive),
        ("you changed the parameters", cache_and_step),
        ("no parameter has a gradient", torch.no_grad()(
            lambda image_tower, text_tower, loss, images, ids, chunk: loss(
                torch.cat([image_tower(x) for x in images.split(chunk)]),
                torch.cat([text_tower(x) for x in ids.split(chunk)])))),
        ("is not: it is the mean of the chunks' own losses", cache_value(lambda own, value: own.mean())),
        ("is not: it is the sum of the chunks' own losses", cache_value(lambda own, value: own.sum())),
        ("is not: it is the loss of the last chunk", cache_value(lambda own, value: own[-1])),
        ("is not: it is the loss of the first chunk", cache_value(lambda own, value: own[0])),
        ("is not: it counts that loss once for each", cache_value(lambda own, value: len(own) * value)),
        ("is not: it is divided by", cache_value(lambda own, value: value / len(own))),
        ("is not. Return the loss of all pairs together", cache_value(lambda own, value: value + 1)),
        ("These are the logits", cache_logits),
        ("single number has no dimension", cached(back=lambda value: value[None])),
        ("Tensor, but yours is a float", cached(back=float)),
        ("float64", cached(back=lambda value: value.double())),
        ("not in a way that this check knows", cached(times=-0.3)),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "pool_end": checks._END_SLIPS,
        "symmetric_loss": checks._LOSS_SLIPS,
        "zero_shot_weights": checks._WEIGHT_SLIPS,
        "recall_at_k": checks._RECALL_SLIPS,
        "grad_cache": checks._CACHE_SLIPS,
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


def noisy_gradients(image_tower, text_tower, loss, images, ids, chunk):
    for part in (image_tower, text_tower, loss):
        for parameter in part.parameters():
            parameter.grad = torch.randn_like(parameter)
    return torch.rand(())


NOISE = {
    "pool_end": lambda states, ids, eot_id: torch.randn(len(ids), states.shape[-1]),
    "symmetric_loss": lambda image, text, logit_scale: torch.rand(()),
    "zero_shot_weights": lambda vectors: unit(torch.randn(vectors.shape[0], vectors.shape[2])),
    "recall_at_k": lambda scores, owner, k: (float(np.random.rand()), float(np.random.rand())),
    "grad_cache": noisy_gradients,
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::3], ("grad_cache", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


def test_the_verdict_does_not_depend_on_the_global_state(capsys):
    verdict = helpers.verdict_under_any_global_state(checks, "grad_cache", cache_backward, capsys)
    assert "10 pairs by 4, 6 pairs by 2, 3 pairs by 8" in verdict


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
