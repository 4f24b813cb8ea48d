"""The checks of lesson 08 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

import re
from collections.abc import Callable

import check_helpers as helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.checks import CheckFailed
from minivlp.checks import blip2 as checks
from minivlp.layers import init_normal
from minivlp.losses import IGNORE, masked_lm_loss, next_words
from minivlp.models.blip2 import QFormerBlock, grounded_mask, joint_mask, query_similarities, separate_mask
from minivlp.models.lm import DecoderLM, LMConfig

torch.set_num_threads(1)
# PyTorch loads a lot at the first such calls: not timed.
torch.zeros((), requires_grad=True).backward(torch.ones(()))
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()

LESSON = "08_blip2.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def itc_matrix(queries, texts, temp, *, q=unit, t=unit, pool=lambda every: every.amax(1),
               scale=lambda cosine, temp: cosine / temp):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    return scale(pool(q(queries) @ t(texts).T), temp)


def itc_package(queries, texts, temp):
    return query_similarities(unit(queries), unit(texts)).max(dim=-1).values / temp


def itc_loop(queries, texts, temp):
    rows = [torch.stack([F.cosine_similarity(picture, text, dim=-1).max() for text in texts]) for picture in queries]
    return torch.stack(rows).div(temp)


def itc_late(queries, texts, temp):
    """Divided first, and by the lengths at the end."""
    raw = torch.einsum("bqe,ne->bnq", queries / temp, texts)
    return (raw / queries.norm(dim=-1)[:, None]).amax(-1) / texts.norm(dim=-1)


def look_blocks(kind, text_mask, queries):
    """The four blocks one by one."""
    B, L = text_mask.shape
    mask = torch.zeros(B, queries + L, queries + L, dtype=torch.bool)
    mask[:, :queries, :queries] = True
    mask[:, queries:, queries:] = text_mask[:, None]
    if kind == "ITM":
        mask[:, :queries, queries:] = text_mask[:, None]
    if kind != "ITC":
        mask[:, queries:, :queries] = True
    if kind == "ITG":
        mask[:, queries:, queries:] &= torch.ones(L, L, dtype=torch.bool).tril()
    return mask


def look_numbers(kind, text_mask, queries, *, plan=None, keys=lambda real, **_: real[:, None], turn=lambda mask: mask):
    """By comparison of places; right by default, the options make the wrong ones."""
    B, L = text_mask.shape
    T = queries + L
    i, j = torch.arange(T)[:, None], torch.arange(T)
    words_ask, words_seen = i >= queries, j >= queries
    right = {
        "ITC": words_ask == words_seen,
        "ITM": torch.ones(T, T, dtype=torch.bool),
        "ITG": torch.where(words_ask, j <= i, ~words_seen),
    }
    if plan is not None and plan[0] == kind:
        right[kind] = plan[1](i, j, queries)
    real = torch.cat([torch.ones(B, queries, dtype=torch.bool), text_mask], dim=1)
    return turn((right[kind] & keys(real, text_mask=text_mask, Q=queries)).expand(B, T, T))


def look_package(kind, text_mask, queries):
    B, L = text_mask.shape
    if kind == "ITC":
        return separate_mask(text_mask, queries)[:, 0]
    joint = joint_mask(text_mask, queries)[:, 0].expand(B, queries + L, -1)
    return joint if kind == "ITM" else joint & grounded_mask(L, queries)


def look_loop(kind, text_mask, queries):
    B, L = text_mask.shape
    mask = torch.zeros(B, queries + L, queries + L).bool()
    for b in range(B):
        for i in range(queries + L):
            for j in range(queries + L):
                if j < queries:
                    mask[b, i, j] = i < queries or kind != "ITC"
                elif text_mask[b, j - queries]:
                    mask[b, i, j] = kind == "ITM" or (i >= queries and (kind == "ITC" or j <= i))
    return mask


def labels_where(ids, mask, prefix, lengths, *, at=1, keep=lambda at, mask, p: (at > p) & mask[:, at],
                 nothing=IGNORE, blank=None, join=lambda blank, text: torch.cat([blank, text], 1)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    B, L = ids.shape
    told = torch.arange(L) + at
    inside = (told >= 0) & (told < L)
    told = told.clamp(0, L - 1)
    text = torch.where(keep(told, mask, lengths[:, None]) & inside, ids[:, told], nothing)
    return join(torch.full((B, prefix), nothing if blank is None else blank), text)


def labels_loop(ids, mask, prefix, lengths):
    labels = torch.full((len(ids), prefix + ids.shape[1]), IGNORE)
    for row, text, n, p in zip(labels, ids, mask.sum(1).tolist(), lengths.tolist(), strict=True):
        row[prefix + p : prefix + n - 1] = text[p + 1 : n]
    return labels


def labels_shift_late(ids, mask, prefix, lengths):
    """Whole rows, prefix first, hidden and then moved by one."""
    told = ids.masked_fill(~mask, IGNORE)
    told[torch.arange(ids.shape[1]) <= lengths[:, None]] = IGNORE
    told = F.pad(told, (prefix, 1), value=IGNORE)
    return told[:, 1:]


def labels_package(ids, mask, prefix, lengths):
    labels = next_words(ids, mask)
    labels[torch.arange(ids.shape[1]) < lengths[:, None]] = IGNORE
    return torch.cat([ids.new_full((len(ids), prefix), IGNORE), labels], dim=1)


def layer_together(queries, words, image, mask, parts, *, attend=lambda parts, x, mask, Q: parts.attn(x, mask),
                   q1=lambda parts, q, image: parts.cross_norm(q + parts.cross(q, image)),
                   w1=lambda parts, w, image: w,
                   q2=lambda parts, q: parts.query_norm(q + parts.query_mlp(q)),
                   w2=lambda parts, w: parts.norm2(w + parts.mlp(w)),
                   norm1=lambda parts, x, y: parts.norm1(x + y)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    Q = queries.shape[1]
    x = torch.cat([queries, words], dim=1)
    x = norm1(parts, x, attend(parts, x, mask, Q))
    q, w = x[:, :Q], x[:, Q:]
    if parts.cross is not None:
        q, w = q1(parts, q, image), w1(parts, w, image)
    return q2(parts, q), w2(parts, w)


def layer_in_place(queries, words, image, mask, parts):
    """One tensor that is written to."""
    Q = queries.shape[1]
    x = torch.cat([queries, words], dim=1)
    x = parts.norm1(parts.attn(x, mask) + x)
    if parts.cross:
        x[:, :Q] = parts.cross_norm(x[:, :Q] + parts.cross(x[:, :Q], image))
    new = x.clone()
    new[:, :Q] = parts.query_norm(x[:, :Q] + parts.query_mlp(x[:, :Q]))
    new[:, Q:] = parts.norm2(x[:, Q:] + parts.mlp(x[:, Q:]))
    return list(new.split([Q, words.shape[1]], dim=1))


def layer_everything(queries, words, image, mask, parts):
    """Both MLPs for all, then a choice."""
    T, Q = mask.shape[-1], queries.shape[1]
    is_query = (torch.arange(T) < Q)[:, None]
    x = torch.cat([queries, words], dim=1)
    x = parts.norm1(x + parts.attn(x, mask))
    if parts.cross:
        x = torch.where(is_query, parts.cross_norm(x + parts.cross(x, image)), x)
    x = torch.where(is_query, parts.query_norm(x + parts.query_mlp(x)), parts.norm2(x + parts.mlp(x)))
    return x[:, :Q], x[:, Q:]


def plain_loss(scores, labels):
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


LEARN = ("ln_vision", "qformer", "language_proj")


def freeze(model, names=("eye", "mouth"), mode=True):
    model.train()
    for name in names:
        part = model.get_submodule(name).requires_grad_(False)
        if mode:
            part.eval()


def learners(model, names=LEARN):
    return [p for name in names for p in model.get_submodule(name).parameters()]


def step_plain(model, images, ids, labels, lr, *, prepare=freeze, held=learners, make=torch.optim.SGD,
               see=lambda model, images: model.qformer(model.ln_vision(model.eye(images))),
               turn=lambda model, states: model.language_proj(states),
               say=lambda model, prefix, ids: model.mouth(prefix, ids),
               loss=plain_loss, learn=lambda loss, optimizer: (loss.backward(), optimizer.step())):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    prepare(model)
    optimizer = make(held(model), lr=lr)
    value = loss(say(model, turn(model, see(model, images)), ids), labels)
    learn(value, optimizer)
    return value, optimizer


def step_filter(model, images, ids, labels, lr):
    """Eye without gradients, all that asks for one into the optimizer, the loss by hand."""
    model.train()
    model.eye.eval(), model.mouth.eval()
    for p in [*model.eye.parameters(), *model.mouth.parameters()]:
        p.requires_grad = False
    optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr)
    with torch.no_grad():
        image = model.eye(images)
    log = model.mouth(model.language_proj(model.qformer(model.ln_vision(image))), ids).log_softmax(-1)
    asked = labels != IGNORE
    loss = -log[asked].gather(1, labels[asked][:, None]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), optimizer


def step_groups(model, images, ids, labels, lr):
    """Freeze all, thaw what learns, a group of parameters for each part."""
    model.requires_grad_(False).eval()
    parts = [model.ln_vision, model.qformer, model.language_proj]
    for part in parts:
        part.requires_grad_(True).train()
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=lr)
    scores = model.mouth(model.language_proj(model.qformer(model.ln_vision(model.eye(images).detach()))), ids)
    loss = F.cross_entropy(scores.transpose(1, 2), labels)
    loss.backward()
    optimizer.step()
    return [loss, optimizer]


def nearest_cosine(prefix, table, names, k, *, near=lambda prefix, table: unit(prefix) @ unit(table).T,
                   pick=lambda near, k: near.topk(k, dim=1).indices):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    return [[names[i] for i in row] for row in pick(near(prefix, table), k).tolist()]


def nearest_sort(prefix, table, names, k):
    order = F.cosine_similarity(prefix[:, None], table, dim=-1).argsort(dim=1, descending=True)
    return tuple(tuple(names[i] for i in row[:k]) for row in order)


def nearest_loop(prefix, table, names, k):
    found = []
    for v in prefix:
        scored = sorted((-float(v @ w / (v.norm() * w.norm())), name) for w, name in zip(table, names, strict=True))
        found.append([name for _, name in scored[:k]])
    return found


def nearest_distance(prefix, table, names, k):
    """Among vectors of length 1, the nearest is also the most alike."""
    return nearest_cosine(prefix, table, names, k, near=lambda p, t: -torch.cdist(unit(p), unit(t)))


RIGHT = [
    ("itc_logits", itc_matrix),
    ("itc_logits", itc_package),
    ("itc_logits", itc_loop),
    ("itc_logits", itc_late),
    ("who_may_look", look_blocks),
    ("who_may_look", look_numbers),
    ("who_may_look", look_package),
    ("who_may_look", look_loop),
    ("labels_for", labels_where),
    ("labels_for", labels_loop),
    ("labels_for", labels_shift_late),
    ("labels_for", labels_package),
    ("qformer_layer", layer_together),
    ("qformer_layer", layer_in_place),
    ("qformer_layer", layer_everything),
    ("stage2_step", step_plain),
    ("stage2_step", step_filter),
    ("stage2_step", step_groups),
    ("nearest_words", nearest_cosine),
    ("nearest_words", nearest_sort),
    ("nearest_words", nearest_loop),
    ("nearest_words", nearest_distance),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


@pytest.mark.parametrize("cross", [True, False])
def test_a_layer_of_the_exercise_is_a_block_of_the_package(cross):
    """The exercise's parts, made of a block's own, give what the block gives."""
    generator = torch.Generator().manual_seed(3)
    parts = checks.LayerParts(cross, generator)
    block = QFormerBlock(checks.WIDTH, 2, image_width=checks.IMAGE_WIDTH if cross else None, mlp_ratio=2)
    block.attn, block.norm1, block.norm2, block.mlp = parts.attn.attention, parts.norm1, parts.norm2, parts.mlp
    block.query_mlp, block.query_norm = parts.query_mlp, parts.query_norm
    if cross:
        block.cross.attn, block.cross.norm = parts.cross.attention, parts.cross_norm
    queries, words = (torch.randn(2, n, checks.WIDTH, generator=generator) for n in (3, 4))
    image = torch.randn(2, checks.STATES, checks.IMAGE_WIDTH, generator=generator)
    mask = look_package("ITG", torch.tensor([[True] * 4, [True] * 3 + [False]]), 3)
    x, _, _ = block(torch.cat([queries, words], 1), 3, image, mask=mask[:, None])
    torch.testing.assert_close(torch.cat(layer_together(queries, words, image, mask, parts), 1), x)


def test_labels_of_the_exercise_make_the_packages_loss():
    """The loss over prefix and text with these labels is that of the text alone, and prompts take their words out."""
    torch.manual_seed(0)
    mouth, generator = DecoderLM(LMConfig(40, max_text=20, width=16, depth=1, heads=2)), torch.Generator()
    init_normal(mouth, std=0.3)
    ids, mask = checks._said([8, 5], 8, generator.manual_seed(0))
    prefix = torch.randn(2, 3, 16, generator=generator)
    states = mouth(torch.cat([prefix, mouth.embed(ids)], dim=1))[0]
    free, prompted = (masked_lm_loss(mouth.lm_head, states, labels_loop(ids, mask, 3, torch.tensor(p)))
                      for p in ([0, 0], [2, 1]))  # fmt: skip
    torch.testing.assert_close(free, masked_lm_loss(mouth.lm_head, mouth.write(ids, prefix), next_words(ids, mask)))
    assert (free - prompted).abs().item() > 1e-3


# --------------------------------------------------------------------------------------------- seeded mistakes


def itc(**options) -> Callable:
    return lambda *args: itc_matrix(*args, **options)


def pools(pool: Callable) -> Callable:
    """Something else than the maximum of the cosines (B, Q, N)."""
    return itc(pool=pool)


def by_size(every: Tensor) -> Tensor:
    return every.gather(1, every.abs().argmax(1, keepdim=True))[:, 0]


def one_vector(make: Callable) -> Callable:
    """One vector of each picture first."""
    return lambda queries, texts, temp: unit(make(unit(queries))) @ unit(texts).T / temp


def itc_no_gradient(queries, texts, temp):
    return itc_matrix(queries, texts, temp.item())


def plan(kind: str, rule: Callable) -> Callable:
    """Another plan for one kind: who asks (T, 1), who is looked at (T), number of queries."""
    return lambda *args: look_numbers(*args, plan=(kind, rule))


def keyed(keys: Callable) -> Callable:
    """Padding done otherwise."""
    return lambda *args: look_numbers(*args, keys=keys)


def turned(turn: Callable) -> Callable:
    """`turn` of the right mask."""
    return lambda *args: look_numbers(*args, turn=turn)


def everybody(i, j, Q):
    return (i >= 0) & (j >= 0)


def apart(i, j, Q):
    return (i < Q) == (j < Q)


def queries_read(i, j, Q):
    return (i < Q) | (j >= Q)


def words_look(i, j, Q):
    return (i >= Q) | (j < Q)


def causal_apart(i, j, Q):
    return apart(i, j, Q) & ((i < Q) | (j <= i))


def itg(i, j, Q):
    return torch.where(i < Q, j < Q, j <= i)


def labels(**options) -> Callable:
    return lambda *args: labels_where(*args, **options)


def keeps(keep: Callable) -> Callable:
    """Other labels are kept, of: for which token each place is asked (L), the mask (B, L) and prompts (B, 1)."""
    return labels(keep=keep)


def with_dec(at, mask, p):
    """[DEC], too."""
    return ((at > p) | (at == 0)) & mask[:, at]


def lengths_are(change: Callable) -> Callable:
    """Other lengths of the prompts."""
    return lambda ids, mask, prefix, lengths: labels_where(ids, mask, prefix, change(lengths))


def labels_roll(ids, mask, prefix, lengths):
    told = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1), IGNORE)
    told[torch.arange(ids.shape[1]) < lengths[:, None]] = IGNORE
    return F.pad(told, (prefix, 0), value=IGNORE)


def labels_from_dec(ids, mask, prefix, lengths):
    """[DEC] is left in when all is moved by one."""
    told, place = ids.masked_fill(~mask, IGNORE), torch.arange(ids.shape[1])
    told[(place >= 1) & (place <= lengths[:, None])] = IGNORE
    return F.pad(told, (prefix, 1), value=IGNORE)[:, 1:]


def read_places(hidden: Callable) -> Callable:
    """Places are left out by what is read there: hidden(place, prompts)."""

    def wrong(ids, mask, prefix, lengths):
        told = next_words(ids, mask)
        told[hidden(torch.arange(ids.shape[1]), lengths[:, None])] = IGNORE
        return F.pad(told, (prefix, 0), value=IGNORE)

    return wrong


def text_labels(change: Callable) -> Callable:
    """`change` of the right labels."""
    return lambda *args: change(labels_where(*args))


def labels_in_place(ids, mask, prefix, lengths):
    ids[~mask] = IGNORE
    return labels_loop(ids, mask, prefix, lengths)


def layer(**options) -> Callable:
    return lambda *args: layer_together(*args, **options)


def attend_apart(parts, x, mask, Q):
    return torch.cat([parts.attn(x[:, :Q], mask[:, :Q, :Q]), parts.attn(x[:, Q:], mask[:, Q:, Q:])], dim=1)


def layer_after(queries, words, image, mask, parts):
    """First the queries, all the way, then the words."""
    q, _ = layer_together(queries, words, image, mask, parts)
    x = torch.cat([q, words], dim=1)
    w = parts.norm1(words + parts.attn(x, mask)[:, queries.shape[1] :])
    return q, parts.norm2(w + parts.mlp(w))


def layer_cross_first(queries, words, image, mask, parts):
    if parts.cross:
        queries = parts.cross_norm(queries + parts.cross(queries, image))
    return layer_together(queries, words, image, mask, parts, q1=lambda parts, q, image: q)


def layer_cross_old(queries, words, image, mask, parts):
    return layer_together(queries, words, image, mask, parts,
                          q1=lambda parts, q, image: parts.cross_norm(q + parts.cross(queries, image)))  # fmt: skip


def layer_cross_last(queries, words, image, mask, parts):
    q, w = layer_together(queries, words, image, mask, parts, q1=lambda parts, q, image: q)
    return (parts.cross_norm(q + parts.cross(q, image)) if parts.cross else q), w


def layer_no_attention(queries, words, image, mask, parts):
    return layer_together(queries, words, image, mask, parts, norm1=lambda parts, x, y: x)


def layer_always_crosses(queries, words, image, mask, parts):
    q, w = layer_no_attention(queries, words, image, mask, parts)
    return parts.cross(q, image), w


def layer_pre(queries, words, image, mask, parts):
    x = torch.cat([queries, words], dim=1)
    x = x + parts.attn(parts.norm1(x), mask)
    q, w = x[:, : queries.shape[1]], x[:, queries.shape[1] :]
    if parts.cross:
        q = q + parts.cross(parts.cross_norm(q), image)
    return q + parts.query_mlp(parts.query_norm(q)), w + parts.mlp(parts.norm2(w))


def swapped(answer: Callable) -> Callable:
    return lambda *args: answer(*args)[::-1]


def both(change: Callable) -> Callable:
    """`change` of both tensors of the right answer."""
    return lambda *args: tuple(change(part) for part in layer_together(*args))


def step(**options) -> Callable:
    return lambda *args: step_plain(*args, **options)


def without_recording(name: str) -> Callable:
    """torch.no_grad() around one part."""

    def see(model, images):
        with torch.set_grad_enabled(name != "ln_vision"):
            image = model.ln_vision(model.eye(images))
        with torch.set_grad_enabled(name != "qformer"):
            return model.qformer(image)

    def turn(model, states):
        with torch.set_grad_enabled(name != "language_proj"):
            return model.language_proj(states)

    def say(model, prefix, ids):
        with torch.set_grad_enabled(name != "mouth"):
            return model.mouth(prefix, ids)

    return step(see=see, turn=turn, say=say)


def step_mouth_unrecorded_but_asks(model, images, ids, labels, lr):
    """no_grad around the mouth, and a loss that is made to ask for a gradient."""
    return step_plain(model, images, ids, labels, lr, learn=lambda loss, optimizer: None, loss=lambda scores, labels: (
        plain_loss(scores.detach(), labels).requires_grad_()), say=no_grad_mouth)  # fmt: skip


def no_grad_mouth(model, prefix, ids):
    with torch.no_grad():
        return model.mouth(prefix, ids)


def freeze_late(model):
    """All train again, after eye and mouth were set to eval."""
    freeze(model)
    model.train()


def modes_only(model):
    model.train()
    model.eye.eval(), model.mouth.eval()


def train_only(model):
    model.train()


def eval_all(model):
    freeze(model)
    model.eval()


def twice(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.step()


def step_two(model, images, ids, labels, lr):
    loss, optimizer = step_plain(model, images, ids, labels, lr)
    optimizer.zero_grad()
    return loss, step_plain(model, images, ids, labels, lr)[1]


def step_then_loss(model, images, ids, labels, lr):
    _, optimizer = step_plain(model, images, ids, labels, lr)
    return step_plain(model, images, ids, labels, lr, learn=lambda loss, optimizer: None)[0], optimizer


def step_noise(*args):
    loss, optimizer = step_plain(*args)
    with torch.no_grad():
        for p in optimizer.param_groups[0]["params"]:
            p.normal_()
    return loss, optimizer


def step_result(change: Callable) -> Callable:
    """`change` of the right loss and optimizer."""
    return lambda *args: change(*step_plain(*args))


def near(measure: Callable) -> Callable:
    return lambda *args: nearest_cosine(*args, near=measure)


def picks(pick: Callable) -> Callable:
    return lambda *args: nearest_cosine(*args, pick=pick)


def found(change: Callable) -> Callable:
    """`change` of the right lists and of the names."""
    return lambda prefix, table, names, k: change(nearest_cosine(prefix, table, names, k), names)


MISTAKES = {
    "itc_logits": [
        ("the mean over the queries", pools(lambda every: every.mean(1))),
        ("you add up the queries", pools(lambda every: every.sum(1))),
        (r"the \*worst\* query counts", pools(lambda every: every.amin(1))),
        ("only the first query", pools(lambda every: every[:, 0])),
        ("only the last query", pools(lambda every: every[:, -1])),
        (r"the largest \*size\*", pools(by_size)),
        ("weight the queries by a softmax", pools(lambda every: (every.softmax(1) * every).sum(1))),
        ("one vector of each picture", one_vector(lambda q: q.mean(1))),
        (r"the maximum is taken of the \*vectors\*", one_vector(lambda q: q.amax(1))),
        ("the vectors are not normalised", itc(q=lambda x: x, t=lambda x: x)),
        ("the texts' vectors are not normalised", itc(t=lambda x: x)),
        ("the queries' vectors are not normalised", itc(q=lambda x: x)),
        ("the queries' vectors are normalised over the wrong dimension", itc(q=F.normalize)),
        ("the texts' vectors are normalised over the wrong", itc(t=lambda x: F.normalize(x, dim=0))),
        ("you multiply by the temperature", itc(scale=lambda cosine, temp: cosine * temp)),
        ("`temp` is not used", itc(scale=lambda cosine, temp: cosine)),
        (r"you multiply by exp\(temp\)", itc(scale=lambda cosine, temp: cosine * temp.exp())),
        ("0.07 whatever is given", itc(scale=lambda cosine, temp: cosine / 0.07)),
        ("2 mistakes.*the mean over the queries.*multiply by the temperature", itc(
            pool=lambda every: every.mean(1), scale=lambda cosine, temp: cosine * temp)),
        ("2 mistakes.*only the first query.*are not normalised", itc(
            pool=lambda every: every[:, 0], q=lambda x: x, t=lambda x: x)),
        (r"\(5, 3\). Transposed", lambda *args: itc_matrix(*args).T),
        ("That is a number for each query", pools(lambda every: every)),
        ("That is a number for each query", lambda q, t, temp: query_similarities(unit(q), unit(t)) / temp),
        (r"\(3, 4\). The maximum goes over the texts", pools(lambda every: every.amax(2))),
        (r"\(4, 5\). The maximum goes over the pictures", pools(lambda every: every.amax(0))),
        ("Drop the dimension", pools(lambda every: every.amax(1, keepdim=True))),
        ("Every picture is compared with every text", pools(lambda every: every.amax((1, 2)))),
        ("no gradient reaches `temp`", itc_no_gradient),
        ("no gradient reaches `query_vectors`", itc(q=lambda x: unit(x.detach()))),
        ("must be a torch.Tensor", itc(scale=lambda cosine, temp: (cosine / temp, None))),
        ("changed its input `queries` in place", lambda queries, texts, temp: itc_matrix(
            queries.div_(queries.norm(dim=-1, keepdim=True)), texts, temp)),
        ("every number is 2 times", lambda *args: 2 * itc_matrix(*args)),
        ("not in a way that this check knows", lambda *args: itc_matrix(*args).flip(0)),
    ],
    "who_may_look": [
        (r"ITG leaks.*ITG, text 0 with 5 words and 0 of padding, after 3 queries: query 0 may look at word 0, and it "
         "must not", plan("ITG", lambda i, j, Q: (i < Q) | (j <= i))),
        ("ITG is not causal", plan("ITG", words_look)),
        ("ITG's mask lets everybody see everybody", plan("ITG", everybody)),
        ("you made everything causal.*query 0 may not look at query 1, and it must", plan(
            "ITG", lambda i, j, Q: j <= i)),
        ("a word does not see itself", plan("ITG", lambda i, j, Q: itg(i, j, Q) & ((i != j) | (i < Q)))),
        ("causal the wrong way round", plan(
            "ITG", lambda i, j, Q: torch.where(i < Q, j < Q, (j < Q) | (j >= i)))),
        ("in ITG the words do not see the queries", plan("ITG", causal_apart)),
        ("ITG's mask is ITC's", plan("ITG", apart)),
        ("in ITM the words do not see the queries", plan("ITM", queries_read)),
        ("in ITM the queries do not see the words", plan("ITM", words_look)),
        ("ITM's mask is ITG's", plan("ITM", itg)),
        ("ITM is causal for words", plan("ITM", lambda i, j, Q: (i < Q) | (j <= i))),
        ("ITM's mask is ITC's", plan("ITM", apart)),
        ("ITC lets queries and words see each other", plan("ITC", everybody)),
        ("in ITC the queries see the words", plan("ITC", queries_read)),
        ("in ITC the words see the queries", plan("ITC", words_look)),
        ("in ITC the words are causal", plan("ITC", causal_apart)),
        ("in ITC the queries see nothing", plan("ITC", lambda i, j, Q: (i >= Q) & (j >= Q))),
        ("in ITC the words see nothing", plan("ITC", lambda i, j, Q: (i < Q) & (j < Q))),
        (r"padding is forgotten.*may look at the padding at 3", keyed(
            lambda real, **_: torch.ones_like(real)[:, None])),
        (r"you hide the \*rows\* of padding", keyed(lambda real, **_: real[:, :, None])),
        ("the rows of padding are False, too", keyed(lambda real, **_: real[:, None] & real[:, :, None])),
        ("`text_mask` is used the wrong way round", keyed(lambda real, text_mask, Q: torch.cat(
            [real[:, :Q], ~text_mask], 1)[:, None])),
        ("by the padding of the first one", keyed(lambda real, **_: real[:1, None])),
        ("masked at the wrong places", keyed(lambda real, text_mask, Q: torch.cat(
            [text_mask, real[:, :Q]], 1)[:, None])),
        ("transposed: in row i", turned(lambda mask: mask.transpose(1, 2))),
        ("the wrong way round: True means", turned(torch.logical_not)),
        ("2 mistakes.*ITG leaks.*padding is forgotten", lambda kind, there, Q: look_numbers(
            kind, torch.ones_like(there), Q, plan=("ITG", lambda i, j, Q: (i < Q) | (j <= i)))),
        ("2 mistakes.*ITG's mask lets.*ITC lets queries", lambda kind, there, Q: look_blocks("ITM", there, Q)),
        ("the mask of ITG has the wrong shape.*Each text of the batch has a mask of its own", lambda kind, there, Q: (
            look_blocks(kind, there, Q) if kind != "ITG" else grounded_mask(there.shape[1], Q))),
        ("Without the heads' dimension", turned(lambda mask: mask[:, None])),
        ("the mask of ITM .*Spell it out", lambda kind, there, Q: (
            joint_mask(there, Q) if kind == "ITM" else look_blocks(kind, there, Q))),
        ("Spell it out", lambda kind, there, Q: joint_mask(there, Q)[:, 0]),
        ("A row for each of the T askers", turned(lambda mask: mask[:, 0])),
        ("The queries are missing", turned(lambda mask: mask[:, 3:, 3:])),
        ("The queries' rows are missing", turned(lambda mask: mask[:, 3:])),
        ("must be of dtype bool, yours is float32", turned(Tensor.float)),
        ("must be of dtype bool, yours is int64", turned(Tensor.long)),
        ("must be a torch.Tensor, but yours is a tuple", turned(lambda mask: (mask, mask))),
        ("stopped with KeyError", lambda kind, there, Q: {"itc": there}[kind]),
        ("changed its input `there` in place", lambda kind, there, Q: look_blocks(kind, there.fill_(True), Q)),
        ("not in a way that this check knows", turned(lambda mask: mask.flip(1))),
    ],
    "labels_for": [
        (r"nothing is shifted.*prefix = 3, text \[6, .*the first 6 for \[DEC\], and 2 words of a prompt: expected "
         r"\[-100, ", labels(at=0)),
        ("shifted the wrong way", labels(at=-1, keep=with_dec)),
        ("shifted by two", labels(at=2)),
        (r"`roll` brings \[DEC\] round", labels_roll),
        (r"the prefix is asked for \[DEC\]", labels_from_dec),
        ("stand one place too early", lambda ids, mask, P, lengths: F.pad(
            labels_where(ids, mask, P, lengths)[:, 1:], (0, 1), value=IGNORE)),
        ("stand behind the text", labels(join=lambda blank, text: torch.cat([text, blank], 1))),
        (r"the prefix's places have the label 0", labels(blank=0)),
        ("the words of the prompt are asked for", keeps(lambda at, mask, p: mask[:, at])),
        (r"a word of the prompt is \*read\*, one too late", read_places(lambda at, p: (at > 0) & (at <= p))),
        ("the first word of each answer is not learned", read_places(lambda at, p: at <= p)),
        ("the last word of each prompt is asked for", keeps(lambda at, mask, p: (at >= p) & mask[:, at])),
        ("as long as the first one's", lengths_are(lambda p: p[:1].expand_as(p))),
        ("as long as the longest", lengths_are(lambda p: p.amax().expand_as(p))),
        ("only the prompt is learned", keeps(lambda at, mask, p: (at <= p) & mask[:, at])),
        ("padding is asked for", keeps(lambda at, mask, p: (at > p).expand_as(mask))),
        (r"\[SEP\] is asked what follows it", keeps(lambda at, mask, p: (at > p) & mask)),
        (r"\[SEP\] is not learned", keeps(lambda at, mask, p: (
            (at > p) & mask[:, at] & (at != mask.sum(1, keepdim=True) - 1)))),
        ("what is not asked for has the label 0", labels(nothing=0)),
        ("what is not asked for has the label -1", labels(nothing=-1)),
        ("2 mistakes.*nothing is shifted.*words of the prompt are asked for", labels(
            at=0, keep=lambda at, mask, p: mask[:, at])),
        ("2 mistakes.*words of the prompt are asked for.*padding is asked for", keeps(
            lambda at, mask, p: torch.ones_like(mask))),
        (r"\(4, 9\). The prefix has places, too: 3", labels(join=lambda blank, text: text)),
        ("One place is missing", text_labels(lambda right: right[:, :-1])),
        (r"\(4, 8\). The prefix has 3 places", labels(join=lambda blank, text: text[:, :-1])),
        ("Transposed", text_labels(torch.t)),
        ("labels are numbers of tokens, and must be int64", text_labels(Tensor.float)),
        ("dtype int64, yours is int32", text_labels(Tensor.int)),
        ("but yours is a list", text_labels(Tensor.tolist)),
        ("changed its input `ids` in place", labels_in_place),
        ("stopped with RuntimeError", lambda ids, mask, P, lengths: torch.cat([torch.full((1, P), IGNORE), ids], 1)),
        ("not in a way that this check knows", text_labels(lambda right: right.flip(1))),
    ],
    "qformer_layer": [
        ("self-attention runs twice", layer(attend=attend_apart)),
        (r"as they are \*after\* the layer.*In layer 0 \(with cross-attention\) only the words are wrong", layer_after),
        ("`mask` is not used", layer(attend=lambda parts, x, mask, Q: parts.attn(x, torch.ones_like(mask)))),
        ("self-attention is missing.*both queries and words are wrong", layer_no_attention),
        ("the words ask the picture, too.*only the words are wrong", layer(
            w1=lambda parts, w, image: parts.cross_norm(w + parts.cross(w, image)))),
        (r"the \*words\* ask the picture. The queries do", layer(
            q1=lambda parts, q, image: q, w1=lambda parts, w, image: parts.cross_norm(w + parts.cross(w, image)))),
        ("nobody asks the picture.*only the queries are wrong", layer(q1=lambda parts, q, image: q)),
        ("cross-attention comes before self-attention", layer_cross_first),
        ("by the queries as they were before self-attention", layer_cross_old),
        ("cross-attention comes after the MLP", layer_cross_last),
        (r"the words' MLP serves queries, too.*In layer 0", layer(q2=lambda parts, q: parts.norm2(q + parts.mlp(q)))),
        ("the queries' MLP serves words, too", layer(w2=lambda parts, w: parts.query_norm(w + parts.query_mlp(w)))),
        ("the MLPs are exchanged", layer(q2=lambda parts, q: parts.norm2(q + parts.mlp(q)),
                                         w2=lambda parts, w: parts.query_norm(w + parts.query_mlp(w)))),
        ("`norm2` serves queries, too", layer(q2=lambda parts, q: parts.norm2(q + parts.query_mlp(q)))),
        ("`query_norm` serves words, too", layer(w2=lambda parts, w: parts.query_norm(w + parts.mlp(w)))),
        ("the residual around self-attention is missing", layer(norm1=lambda parts, x, y: parts.norm1(y))),
        ("the residual around cross-attention is missing", layer(
            q1=lambda parts, q, image: parts.cross_norm(parts.cross(q, image)))),
        ("the residual around the queries' MLP", layer(q2=lambda parts, q: parts.query_norm(parts.query_mlp(q)))),
        ("the residual around the words' MLP", layer(w2=lambda parts, w: parts.norm2(parts.mlp(w)))),
        ("the residuals around both MLPs", layer(q2=lambda parts, q: parts.query_norm(parts.query_mlp(q)),
                                                 w2=lambda parts, w: parts.norm2(parts.mlp(w)))),
        ("there are no residuals", layer(norm1=lambda parts, x, y: parts.norm1(y),
                                         q1=lambda parts, q, image: parts.cross_norm(parts.cross(q, image)),
                                         q2=lambda parts, q: parts.query_norm(parts.query_mlp(q)),
                                         w2=lambda parts, w: parts.norm2(parts.mlp(w)))),
        ("`norm1` is missing", layer(norm1=lambda parts, x, y: x + y)),
        ("`cross_norm` is missing", layer(q1=lambda parts, q, image: q + parts.cross(q, image))),
        ("`query_norm` is missing", layer(q2=lambda parts, q: q + parts.query_mlp(q))),
        ("`norm2` is missing", layer(w2=lambda parts, w: w + parts.mlp(w))),
        ("there are no LayerNorms", layer(norm1=lambda parts, x, y: x + y,
                                          q1=lambda parts, q, image: q + parts.cross(q, image),
                                          q2=lambda parts, q: q + parts.query_mlp(q),
                                          w2=lambda parts, w: w + parts.mlp(w))),
        ("stand before each step, as in a ViT", layer_pre),
        ("only the answers are normalised", layer(
            norm1=lambda parts, x, y: x + parts.norm1(y),
            q1=lambda parts, q, image: q + parts.cross_norm(parts.cross(q, image)),
            q2=lambda parts, q: q + parts.query_norm(parts.query_mlp(q)),
            w2=lambda parts, w: w + parts.norm2(parts.mlp(w)))),
        ("2 mistakes.*words ask the picture, too.*the words' MLP serves queries", layer(
            w1=lambda parts, w, image: parts.cross_norm(w + parts.cross(w, image)),
            q2=lambda parts, q: parts.norm2(q + parts.mlp(q)))),
        ("2 mistakes.*self-attention runs twice.*`norm2` is missing", layer(
            attend=attend_apart, w2=lambda parts, w: w + parts.mlp(w))),
        ("only every second layer has a cross-attention", layer_always_crosses),
        (r"`attn` was given 3 tokens for 2 pairs, and a mask of shape \(2, 7, 7\)", layer(
            attend=lambda parts, x, mask, Q: parts.attn(x[:, :Q], mask))),
        ("`cross` was asked by vectors of 6 numbers, not of 8", layer(
            q1=lambda parts, q, image: parts.cross(image, q))),
        ("return two things, queries and words, each in a tensor of its own", lambda *args: torch.cat(
            layer_together(*args), 1)),
        ("return two things, the queries and the words", lambda *args: layer_together(*args)[0]),
        ("tensor of the queries has the wrong shape.*have changed places", swapped(layer_together)),
        ("tensor of the words .*That is both in one row", lambda queries, words, *rest: (
            layer_together(queries, words, *rest)[0], torch.cat([queries, words], 1))),
        ("stopped with AttributeError: .*self_attention", lambda q, w, image, mask, parts: parts.self_attention(q)),
        ("every number is 2 times", both(lambda part: 2 * part)),
        ("not in a way that this check knows.*In layer 0", both(torch.tanh)),
    ],
    "stage2_step": [
        (r"torch.no_grad\(\) around the mouth.*no gradient comes back", without_recording("mouth")),
        (r"torch.no_grad\(\) around the mouth", step_mouth_unrecorded_but_asks),
        ("`ln_vision` is called under torch.no_grad", without_recording("ln_vision")),
        ("`qformer` is called under torch.no_grad", without_recording("qformer")),
        ("`language_proj` is called under torch.no_grad", without_recording("language_proj")),
        ("what goes into `mouth` was detached.*back to `language_proj`", step(
            turn=lambda model, states: model.language_proj(states).detach())),
        ("what goes into `language_proj` was detached.*back to `qformer`", step(
            turn=lambda model, states: model.language_proj(states.detach()))),
        ("what goes into `qformer` was detached.*back to `ln_vision`", step(
            see=lambda model, images: model.qformer(model.ln_vision(model.eye(images)).detach()))),
        ("`qformer` is frozen, too. It goes on learning", step(
            prepare=lambda model: freeze(model, ("eye", "qformer", "mouth")))),
        ("`ln_vision` is frozen, too. It learns", step(
            prepare=lambda model: freeze(model, ("eye", "ln_vision", "mouth")))),
        ("`ln_vision` is frozen, too", step(prepare=lambda model: model.requires_grad_(False))),
        ("the mouth has been trained: its weights have moved", step(
            prepare=lambda model: freeze(model, ("eye",)), held=lambda model: model.parameters())),
        ("the eye has been trained", step(
            prepare=lambda model: freeze(model, ("mouth",)), held=lambda model: model.parameters())),
        ("the mouth is in train mode", step(prepare=lambda model: (
            freeze(model, mode=False), model.eye.eval()))),
        ("the eye is in train mode", step(prepare=lambda model: freeze(model, mode=False))),
        ("the eye is in train mode", step(prepare=freeze_late)),
        ("the eye is in train mode", step(prepare=train_only)),
        ("the mouth is in train mode", lambda model, *rest: (step_plain(model, *rest), model.mouth.train())[0]),
        ("the weights of the eye stay as they are, but still ask", step(prepare=modes_only)),
        ("the weights of the mouth stay as they are, but still ask", step(
            prepare=lambda model: (freeze(model, ("eye",)), model.mouth.eval()))),
        ("`ln_vision` is in eval mode, but it learns", step(prepare=eval_all)),
        ("the optimizer holds weights of the eye", step(held=lambda model: model.parameters())),
        ("the optimizer holds weights of the mouth", step(
            held=lambda model: learners(model, (*LEARN, "mouth")))),
        ("`ln_vision.weight` is not in the optimizer", step(
            held=lambda model: learners(model, ("qformer", "language_proj")))),
        ("`qformer.query_tokens` is not in the optimizer", step(
            held=lambda model: [*learners(model, ("ln_vision", "language_proj")), *model.qformer.kv.parameters()])),
        ("`language_proj.weight` is not in the optimizer", step(
            held=lambda model: learners(model, ("ln_vision", "qformer")))),
        ("no parameter of the model", step(held=lambda model: [*learners(model), torch.zeros(2, requires_grad=True)])),
        ("use plain SGD.* and not AdamW", step(make=torch.optim.AdamW)),
        ("learning rate 0.1,", step(make=lambda held, lr: torch.optim.SGD(held, lr=0.1))),
        ("momentum 0.9", step(make=lambda held, lr: torch.optim.SGD(held, lr=lr, momentum=0.9))),
        ("weight decay 0.05", step(make=lambda held, lr: torch.optim.SGD(held, lr=lr, weight_decay=0.05))),
        (r"nothing has moved.*Your losses of the 2 steps: \d", step(learn=lambda loss, optimizer: loss.backward())),
        ("nothing has moved", step(learn=lambda loss, optimizer: optimizer.step())),
        ("up the slope", step(learn=lambda loss, optimizer: ((-loss).backward(), optimizer.step()))),
        ("you take two steps", step_two),
        ("the loss is that after the step", step_then_loss),
        ("you shift once more", step(loss=lambda scores, labels: plain_loss(scores[:, :-1], labels[:, 1:]))),
        ("you ask for `ids`", lambda model, images, ids, labels, lr: step_plain(model, images, ids, ids, lr)),
        ("the loss is a sum", step(loss=lambda scores, labels: F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="sum"))),
        ("the number of all places", step(loss=lambda scores, labels: F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="none").mean())),
        ("the number of texts", step(loss=lambda scores, labels: F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="sum") / len(labels))),
        ("2 mistakes.*nothing has moved.*the loss is a sum", step(learn=lambda loss, optimizer: None,
            loss=lambda scores, labels: F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum"))),
        ("`eye` is never called", step(see=lambda model, images: model.qformer(model.ln_vision(
            torch.zeros(len(images), 4, checks.SIZES["image"]))))),
        ("`ln_vision` is never called", step(see=lambda model, images: model.qformer(model.eye(images)))),
        ("`mouth` is never called", step(say=lambda model, prefix, ids: model.mouth.lm_head(
            prefix.mean(1, keepdim=True).expand(-1, ids.shape[1], -1)))),
        ("return two things, the loss and the optimizer", step_result(lambda loss, optimizer: loss)),
        ("have changed places", step_result(lambda loss, optimizer: (optimizer, loss))),
        ("the second thing must be the optimizer, but yours is of type list", step_result(
            lambda loss, optimizer: (loss, optimizer.param_groups))),
        ("the loss must be a torch.Tensor, but yours is a float", step_result(
            lambda loss, optimizer: (loss.item(), optimizer))),
        (r"the loss has the wrong shape.*Take one mean over all places", step_result(
            lambda loss, optimizer: (loss.expand(3), optimizer))),
        ("stopped with RuntimeError: .*does not require grad", step(
            loss=lambda scores, labels: plain_loss(scores.detach(), labels))),
        ("stopped with ValueError|stopped with RuntimeError", step(loss=F.cross_entropy)),
        ("not in a way that this check knows.*Your losses of the 2 steps", step_noise),
    ],
    "nearest_words": [
        (r"you compare by the scalar product.*Prefix \d, vector \d: the cosines of the right words are 0.\d\d, ", near(
            lambda prefix, table: prefix @ table.T)),
        ("you compare by distance", near(lambda prefix, table: -torch.cdist(prefix, table))),
        (r"the largest \*size\*", near(lambda prefix, table: (unit(prefix) @ unit(table).T).abs())),
        ("normalised over the wrong dimension", near(lambda prefix, table: unit(prefix) @ F.normalize(
            table, dim=0).T)),
        (r"the words \*farthest\* away", picks(lambda near, k: near.topk(k, dim=1, largest=False).indices)),
        ("the nearest word is left out", picks(lambda near, k: near.topk(k + 1, dim=1).indices[:, 1:])),
        ("the nearest word comes last", picks(lambda near, k: near.argsort(1)[:, -k:])),
        ("in the order of the table", picks(lambda near, k: near.topk(k, dim=1).indices.sort(1).values)),
        ("the mean of the prefix", near(lambda prefix, table: unit(prefix.mean(0).expand_as(prefix)) @ unit(table).T)),
        ("those of the first vector", near(lambda prefix, table: unit(prefix[:1].expand_as(prefix)) @ unit(table).T)),
        ("2 mistakes.*by the scalar product.*nearest word comes last", lambda *args: nearest_cosine(
            *args, near=lambda prefix, table: prefix @ table.T, pick=lambda near, k: near.argsort(1)[:, -k:])),
        ("2 mistakes.*by distance.*farthest", lambda *args: nearest_cosine(
            *args, near=lambda prefix, table: torch.cdist(prefix, table),
            pick=lambda near, k: near.topk(k, dim=1).indices)),
        ("but yours is a tensor", lambda prefix, table, names, k: (unit(prefix) @ unit(table).T).topk(k).indices),
        ("the lists must be of words, and yours holds 1?[0-9]", found(
            lambda lists, names: [[names.index(word) for word in row] for row in lists])),
        (r"a list of 4 lists.*yours has 12 entries of type str", found(
            lambda lists, names: [word for row in lists for word in row])),
        ("a list of 4 lists.*yours has 4 entries of type str", found(
            lambda lists, names: [", ".join(row) for row in lists])),
        ("each of the lists must be of k = 3 words, and yours has 2", found(
            lambda lists, names: [row[:2] for row in lists])),
        ("each of the lists must be of k = 3 words, and yours has 14", lambda prefix, table, names, k: nearest_cosine(
            prefix, table, names, len(names))),
        ("'zebra' is none of `names`", found(lambda lists, names: [["zebra", *row[1:]] for row in lists])),
        ("a word is there twice", found(lambda lists, names: [[row[0], *row[:-1]] for row in lists])),
        ("of type dict", found(lambda lists, names: dict(enumerate(lists)))),
        ("changed its input `names` in place", lambda prefix, table, names, k: nearest_cosine(
            prefix, table, [names.pop(), *names], k)),
        ("stopped with RuntimeError", near(lambda prefix, table: prefix @ table)),
        ("not in a way that this check knows", found(lambda lists, names: lists[::-1])),
    ],
}  # fmt: skip
SEEDED = [(name, words, answer) for name in NAMES for words, answer in MISTAKES[name]]


@pytest.mark.parametrize(("name", "words", "answer"), SEEDED, ids=[f"{n}-{w[:30]}" for n, w, _ in SEEDED])
def test_a_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "itc_logits": checks._ITC_SLIPS,
        "who_may_look": checks._LOOK_SLIPS,
        "labels_for": checks._LABEL_SLIPS,
        "qformer_layer": checks._LAYER_SLIPS,
        "stage2_step": checks._STEP_SLIPS,
        "nearest_words": checks._NEAREST_SLIPS,
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
    "itc_logits": lambda *args: torch.randn_like(itc_matrix(*args)),
    "who_may_look": turned(lambda mask: torch.rand(mask.shape) < 0.5),
    "labels_for": text_labels(lambda right: torch.randint_like(right, 7, 40)),
    "qformer_layer": both(torch.randn_like),
    "stage2_step": step_noise,
    "nearest_words": lambda prefix, table, names, k: [
        [names[i] for i in torch.randperm(len(names))[:k]] for _ in prefix
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


ONE_EACH = [next(pair for pair in RIGHT if pair[0] == name) for name in NAMES]


@pytest.mark.parametrize(("name", "answer"), [*ONE_EACH, ("stage2_step", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


@pytest.mark.parametrize(("name", "answer"), ONE_EACH)
def test_the_verdict_does_not_depend_on_the_global_state(name, answer, capsys):
    helpers.verdict_under_any_global_state(checks, name, answer, capsys)


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


def test_a_verdict_says_how_much_was_compared(capsys):
    for name, answer, said in (("itc_logits", itc_matrix, "3 batches, 35 pairs of picture and text"),
                               ("who_may_look", look_blocks, "9 masks, of 6 texts"),
                               ("labels_for", labels_loop, "9 texts, 31 tokens are asked for"),
                               ("stage2_step", step_plain, "2 steps, 3 parts learn and 2 stay"),
                               ("nearest_words", nearest_cosine, "9 vectors of 3 prefixes")):  # fmt: skip
        getattr(checks, name)(answer)
        assert re.search(said, capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys, number=6)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
