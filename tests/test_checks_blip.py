"""The checks of lesson 07 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import check_helpers as helpers
import pytest
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from minivlp.checks import CheckFailed
from minivlp.checks import blip as checks
from minivlp.generate import beam_search, greedy, keep_nucleus
from minivlp.losses import masked_lm_loss, next_words
from minivlp.models.blip import MED, MED_PARTS, BLIPConfig, MEDBlock

torch.set_num_threads(1)
torch.zeros((), requires_grad=True).backward(torch.ones(()))  # PyTorch loads a lot at the first such call: not timed

LESSON = "07_blip.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def data_sum(human, web, written, matches, *, hand=lambda pairs, ok: pairs, web_=lambda pairs, ok: filter(ok, pairs),
             written_=lambda pairs, ok: filter(ok, pairs)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    ok = lambda pair: matches(*pair)  # noqa: E731
    return [*hand(human, ok), *web_(web, ok), *written_(written, ok)]


def data_loop(human, web, written, matches):
    kept = []
    for number, pairs in enumerate((written, web, human)):
        for picture, text in pairs:
            if number == 2 or matches(picture=picture, text=text):
                kept.append([picture, text])
    return kept


def data_set(human, web, written, matches):
    return set(human) | {pair for pair in {*web, *written} if matches(*pair)}


def data_removed(human, web, written, matches):
    """Take out what fails."""
    kept = [*human, *web, *written]
    for pair in web + written:
        if not matches(*pair):
            kept.remove(pair)
    return tuple(kept)


def sharing(decoder, encoder, *, names=("cross", "mlp", "norm2"), take=lambda module: module,
            of=lambda i, encoder: encoder[i]):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    for i, block in enumerate(decoder):
        for name in names:
            setattr(block, name, take(getattr(of(i, encoder), name)))
    return decoder


def sharing_children(decoder, encoder):
    """All modules but two, whatever they are called."""
    for own, other in zip(decoder, encoder, strict=True):
        for name, module in other.named_children():
            if name not in ("attn", "norm1"):
                own.add_module(name, module)
    return list(decoder)


def sharing_parameters(decoder, encoder):
    """The parameters one by one, as the official code does it."""
    for own, other in zip(decoder, encoder, strict=True):
        for name, parameter in other.named_parameters():
            if not name.startswith(("attn.", "norm1.")):
                module, _, last = name.rpartition(".")
                setattr(own.get_submodule(module), last, parameter)
    return decoder


def sharing_dict(decoder, encoder):
    for own, other in zip(decoder, encoder, strict=True):
        kept = MED_PARTS["self-attention"]
        own._modules |= {name: other._modules[name] for name in other._modules if name not in kept}
    return decoder


def loss_index(scores, ids, mask, smoothing):
    asked = mask[:, 1:]
    return F.cross_entropy(scores[:, :-1][asked], ids[:, 1:][asked], label_smoothing=smoothing)


def loss_ignore(scores, ids, mask, smoothing):
    """Padding as -100, and the classes in dimension 1."""
    labels = ids.masked_fill(~mask, -100)
    return F.cross_entropy(scores[:, :-1].transpose(1, 2), labels[:, 1:], label_smoothing=smoothing)


def loss_formula(scores, ids, mask, smoothing, *, read=slice(None, -1), told=slice(1, None), keep=None,
                 log=lambda scores: scores.log_softmax(-1), mix=lambda own, every, s, V: (1 - s) * own + s * every,
                 mean=lambda loss, keep, mask: (loss * keep).sum() / keep.sum()):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    table = -log(scores)[:, read]
    own, every = table.gather(-1, ids[:, told, None]).squeeze(-1), table.mean(-1)
    keep = mask[:, told] if keep is None else keep(mask, ids)
    return mean(mix(own, every, smoothing, scores.shape[-1]), keep.float(), mask)


def loss_loop(scores, ids, mask, smoothing):
    """Token after token, against the whole distribution that is wanted."""
    losses = []
    for row, text, length in zip(scores, ids, mask.sum(1), strict=True):
        for t in range(length - 1):
            target = torch.full_like(row[t], smoothing / len(row[t]))
            target[text[t + 1]] += 1 - smoothing
            losses.append(-(target * row[t].log_softmax(0)).sum())
    return sum(losses) / len(losses)


def loss_package(scores, ids, mask, smoothing):
    return masked_lm_loss(nn.Identity(), scores, next_words(ids, mask), smoothing=smoothing)


def nucleus_before(scores, p, *, chances=lambda scores: scores.softmax(-1), inside=lambda c, p: c.cumsum(-1) - c < p,
                   share=lambda kept, inside: kept / kept.sum(-1, keepdim=True), descending=True,
                   undo=lambda kept, order: torch.zeros_like(kept).scatter(1, order, kept)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    ordered, order = chances(scores).sort(dim=-1, descending=descending)
    kept = inside(ordered, p)
    return undo(share(ordered * kept, kept), order)


def nucleus_shifted(scores, p):
    """What comes behind the token that reaches p gets minus infinity, as in many libraries."""
    ordered, order = scores.sort(dim=-1, descending=True)
    out = ordered.softmax(-1).cumsum(-1) > p
    out[:, 1:] = out[:, :-1].clone()
    out[:, 0] = False
    return scores.masked_fill(out.scatter(1, order, out), float("-inf")).softmax(-1)


def nucleus_loop(scores, p):
    chances = torch.zeros_like(scores)
    for own, row in zip(chances, scores.softmax(-1), strict=True):
        total = 0.0
        for token in row.argsort(descending=True).tolist():
            own[token] = row[token]
            total += row[token].item()
            if total >= p:
                break
        own /= total
    return chances


def nucleus_limit(scores, p):
    """By the chance of the least likely token that is in."""
    chances = scores.softmax(-1)
    ordered = chances.sort(dim=-1, descending=True).values
    last = (ordered.cumsum(-1) < p).sum(-1, keepdim=True)
    return F.normalize(chances * (chances >= ordered.gather(1, last)), p=1, dim=-1)


def nucleus_ascending(scores, p):
    """From below: what is dropped sums to at most 1 - p."""
    ordered, order = scores.softmax(-1).sort(-1)
    ordered = ordered.masked_fill(ordered.cumsum(-1) <= 1 - p, 0)
    return (ordered / ordered.sum(-1, keepdim=True)).gather(1, order.argsort(-1))


def nucleus_package(scores, p):
    return keep_nucleus(scores, p).softmax(-1)


def beams_flat(total, scores, k, *, log=lambda scores: scores.log_softmax(-1), rank=lambda total, log: total + log,
               pick=lambda ranked, k: ranked.flatten(1).topk(k, dim=1).indices, value=lambda total, log: total + log,
               name=lambda where, k, V: (where // V, where % V)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    log = log(scores)
    where = pick(rank(total[..., None], log), k)
    return value(total[..., None], log).flatten(1).gather(1, where), *name(where, k, scores.shape[-1])


def beams_sort(total, scores, k):
    ranked = (scores - scores.logsumexp(-1, keepdim=True) + total.unsqueeze(2)).reshape(len(total), -1)
    values, order = ranked.sort(dim=1, descending=True)
    source = order.div(scores.shape[2], rounding_mode="floor")
    return [values[:, :k], source[:, :k], (order - source * scores.shape[2])[:, :k]]


def beams_two_steps(total, scores, k):
    """The k best of each beginning, then the k best of these."""
    values, token = scores.log_softmax(-1).topk(k, dim=-1)  # (B, k, k)
    values, place = (values + total[:, :, None]).flatten(1).topk(k)
    return values, place // k, token.flatten(1).gather(1, place)


def beams_loop(total, scores, k):
    values = torch.empty_like(total)
    names = torch.empty(2, *total.shape, dtype=torch.long)
    for b in range(len(total)):
        found = []
        for i in range(k):
            log = F.log_softmax(scores[b, i], dim=0)
            found += [(float(total[b, i] + log[v]), i, v) for v in range(len(log))]
        for j, (value, i, v) in enumerate(sorted(found, reverse=True)[:k]):
            values[b, j], names[0, b, j], names[1, b, j] = value, i, v
    return values, *names


def beams_unravel(total, scores, k):
    top, where = (total[:, :, None] + scores.log_softmax(-1)).flatten(1).topk(k)
    return top, *torch.unravel_index(where, scores.shape[1:])


RIGHT = [
    ("bootstrap", data_sum),
    ("bootstrap", data_loop),
    ("bootstrap", data_set),
    ("bootstrap", data_removed),
    ("share_parts", sharing),
    ("share_parts", sharing_children),
    ("share_parts", sharing_parameters),
    ("share_parts", sharing_dict),
    ("next_word_loss", loss_index),
    ("next_word_loss", loss_ignore),
    ("next_word_loss", loss_formula),
    ("next_word_loss", loss_loop),
    ("next_word_loss", loss_package),
    ("nucleus_chances", nucleus_before),
    ("nucleus_chances", nucleus_shifted),
    ("nucleus_chances", nucleus_loop),
    ("nucleus_chances", nucleus_limit),
    ("nucleus_chances", nucleus_ascending),
    ("nucleus_chances", nucleus_package),
    ("beam_step", beams_flat),
    ("beam_step", beams_sort),
    ("beam_step", beams_two_steps),
    ("beam_step", beams_loop),
    ("beam_step", beams_unravel),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


def test_the_package_shares_as_the_check_wants_it():
    """Its MED, as it is built, is what a right answer makes of two stacks."""
    med = MED(BLIPConfig(16, 8, image_width=6, image_heads=2, text_width=4, text_heads=2, text_depth=3))
    names = {"cross", "mlp", "norm2"}
    for own, other in zip(med.decoder, med.encoder, strict=True):
        assert isinstance(own, MEDBlock)
        shared = {name for name, module in own.named_children() if module is other.get_submodule(name)}
        assert shared == names and {name for name, _ in own.named_children()} == names | {"attn", "norm1"}
    checks.share_parts(lambda decoder, encoder: sharing(decoder, encoder, names=names))


class Table:
    """A decoder that is a table: scores of the next token after each, (V, V)."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __call__(self, tokens: LongTensor) -> Tensor:
        return self.scores[tokens]

    def reorder(self, rows: LongTensor) -> None:
        pass


@pytest.mark.parametrize("k", [1, 3])
def test_steps_of_the_exercise_make_the_packages_search(k):
    """Where no token ends a text, step after step gives what `beam_search` finds, and with one beam `greedy`."""
    V, longest = 6, 5
    decoder, first = Table(2 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))), torch.arange(4)
    total = torch.tensor([0.0] + [-1e9] * (k - 1)).repeat(4, 1)
    texts, token = torch.empty(4, k, 0, dtype=torch.long), first[:, None].expand(4, k)
    for _ in range(longest):
        total, source, token = beams_flat(total, decoder(token), k)
        texts = torch.cat([texts.gather(1, source[..., None].expand(texts.shape)), token[..., None]], dim=2)
    found = beam_search(decoder, first, end=-1, longest=longest, beams=k)
    assert torch.equal(texts[:, 0], found)
    assert torch.equal(found, greedy(decoder, first, end=-1, longest=longest)) == (k == 1)


# --------------------------------------------------------------------------------------------- seeded mistakes


def everything(pairs, ok):
    return pairs


def nothing(pairs, ok):
    return []


def data(**options) -> Callable:
    return lambda *args: data_sum(*args, **options)


def outside(choose: Callable) -> Callable:
    """The human pairs, and those outside that are chosen, of web and written pairs and of which match."""

    def made(human, web, written, matches):
        fits = {pair: matches(*pair) for pair in web + written}
        return human + choose(web, written, fits)

    return made


def of_picture(pair, pairs) -> list:
    return [other for other in pairs if other[0] == pair[0]]


def whole_pictures(rule: Callable) -> Callable:
    """All texts of a picture or none, by `rule` (all, any) of which match."""
    return outside(lambda web, written, fits: [
        pair for pair in web + written if rule(fits[other] for other in of_picture(pair, web + written))
    ])  # fmt: skip


def by_the_web(web, written, fits) -> list:
    bad = {picture for picture, text in web if not fits[picture, text]}
    return [pair for pair in web + written if fits[pair] and pair[0] not in bad]


def by_text(web, written, fits) -> list:
    bad = {text for picture, text in web + written if not fits[picture, text]}
    return [(picture, text) for picture, text in web + written if text not in bad]


def stand_ins(first, second, fits) -> list:
    """The second list's texts, where no text of the first one matches."""
    kept = [pair for pair in first if fits[pair]]
    return kept + [pair for pair in second if fits[pair] and not of_picture(pair, kept)]


def one_each(pairs, fits=None, *, last=False) -> list:
    """One text of each picture, the first or the last."""
    kept = {}
    for picture, text in pairs:
        if (fits is None or fits[picture, text]) and (last or picture not in kept):
            kept[picture] = text
    return list(kept.items())


def data_changed(human, web, written, matches):
    human += [pair for pair in web + written if matches(*pair)]
    return human


def bags(change: Callable) -> Callable:
    """`change` of the right list."""
    return lambda *args: change(data_sum(*args))


def shares(**options) -> Callable:
    return lambda *args: sharing(*args, **options)


SHARED = ("cross", "mlp", "norm2")


def without(name: str) -> Callable:
    return shares(names=tuple(other for other in SHARED if other != name))


def by_name(*wanted: str, unwanted: tuple[str, ...] = ()) -> Callable:
    """The parameters with one of these beginnings are shared, but none that ends in an unwanted way."""

    def share(decoder, encoder):
        for own, other in zip(decoder, encoder, strict=True):
            for name, parameter in other.named_parameters():
                if name.startswith(wanted) and not name.endswith(unwanted):
                    module, _, last = name.rpartition(".")
                    setattr(own.get_submodule(module), last, parameter)
        return decoder

    return share


ALL = ("cross.", "mlp.", "norm2.")  # as beginnings of names


def share_loaded(decoder, encoder):
    """The same values."""
    for own, other in zip(decoder, encoder, strict=True):
        state = {name: value for name, value in other.state_dict().items() if name.startswith(ALL)}
        own.load_state_dict(state, strict=False)
    return decoder


def share_data(decoder, encoder):
    """The same memory."""
    for own, other in zip(decoder, encoder, strict=True):
        theirs = dict(other.named_parameters())
        for name, parameter in own.named_parameters():
            if name.startswith(ALL):
                parameter.data = theirs[name].data
    return decoder


def share_blocks(decoder, encoder):
    """Whole blocks."""
    for i, block in enumerate(encoder):
        decoder[i] = block
    return decoder


def share_others_way(decoder, encoder):
    sharing(encoder, decoder)
    return decoder


def share_early(decoder, encoder):
    """Return inside of the loop."""
    for own, other in zip(decoder, encoder, strict=True):
        own.cross, own.mlp, own.norm2 = other.cross, other.mlp, other.norm2
        return decoder


def share_late(decoder, encoder):
    """Behind the loop."""
    for own, other in zip(decoder, encoder, strict=True):  # noqa: B007
        pass
    own.cross, own.mlp, own.norm2 = other.cross, other.mlp, other.norm2
    return decoder


def share_anew(decoder, encoder):
    """New blocks around the right modules."""
    blocks = copy.deepcopy(encoder)
    for block, own, other in zip(blocks, decoder, encoder, strict=True):
        block.attn, block.norm1 = own.attn, own.norm1
        block.cross, block.mlp, block.norm2 = other.cross, other.mlp, other.norm2
    return blocks


def share_forgets_a_block(decoder, encoder):
    del decoder[0]
    return decoder


def share_removes(decoder, encoder):
    for block in decoder:
        del block.norm1
    return sharing(decoder, encoder)


def share_moves(decoder, encoder):
    """A block is taken out of the encoder."""
    decoder[1], encoder[1] = encoder[1], None
    return decoder


def share_noise(decoder, encoder):
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def losses(**options) -> Callable:
    return lambda *args: loss_formula(*args, **options)


def shift(read: int, told: int) -> Callable:
    """Places from `read` on are asked for those from `told` on."""

    def cut(start, other):
        return slice(start, start - other if start < other else None)

    return losses(read=cut(read, told), told=cut(told, read))


def loss_roll(scores, ids, mask, smoothing, *, inside=False):
    asked = mask.roll(-1, dims=1) & (mask | (not inside))
    return F.cross_entropy(scores[asked], ids.roll(-1, dims=1)[asked], label_smoothing=smoothing)


def keeps(keep: Callable) -> Callable:
    """Other places count, of the mask and ids (B, L)."""
    return losses(keep=keep)


def mixes(mix: Callable) -> Callable:
    """Another mixture, of the loss of the right word, the mean loss of all words, smoothing and V."""
    return losses(mix=mix)


def averages(mean: Callable) -> Callable:
    """Another mean, of the losses and what counts of them (B, L-1), and the mask (B, L)."""
    return losses(mean=mean)


def one_loss(change: Callable) -> Callable:
    """`change` of the right loss."""
    return lambda *args: change(loss_index(*args))


def loss_in_place(scores, ids, mask, smoothing):
    ids[~mask] = -100
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=smoothing)


def drawn(**options) -> Callable:
    return lambda *args: nucleus_before(*args, **options)


def insides(inside: Callable) -> Callable:
    """Another set, of the chances in their order and p; rows that have no token stay 0."""
    return drawn(inside=inside, share=lambda kept, _: kept / kept.sum(-1, keepdim=True).clamp(min=1e-9))


def first_too(inside: Callable) -> Callable:
    """The most likely token is always in."""
    return insides(lambda c, p: inside(c, p) | (torch.arange(c.shape[1]) == 0))


def divides(share: Callable) -> Callable:
    """Another way to renormalise, of what is kept and where that is."""
    return drawn(share=share)


def rows_alike(chances: Tensor, p: float, own: Tensor) -> Tensor:
    """The set of `own` (V) for all rows of chances (B, V)."""
    ordered, order = own.sort(descending=True)
    inside = torch.zeros_like(own).scatter(0, order, (ordered.cumsum(0) - ordered < p).float())
    return chances * inside / (chances * inside).sum(-1, keepdim=True)


def nucleus_first_row(scores, p):
    return rows_alike(scores.softmax(-1), p, scores.softmax(-1)[0])


def nucleus_mean(scores, p):
    return rows_alike(scores.softmax(-1), p, scores.softmax(-1).mean(0))


def nucleus_unsorted(scores, p):
    chances = scores.softmax(-1)
    kept = chances * (chances.cumsum(-1) - chances < p)
    return kept / kept.sum(-1, keepdim=True)


def nucleus_zeros(scores, p):
    """Scores of 0 where minus infinity belongs."""
    return (scores * (nucleus_before(scores, p) > 0)).softmax(-1)


def chances(change: Callable) -> Callable:
    """`change` of the right chances (B, V)."""
    return lambda *args: change(nucleus_before(*args))


def beams(**options) -> Callable:
    return lambda *args: beams_flat(*args, **options)


def named(name: Callable) -> Callable:
    """Other names of the places in the long row, of these, k and V."""
    return beams(name=name)


def three(change: Callable) -> Callable:
    """`change` of the right total, source and token."""
    return lambda *args: change(*beams_flat(*args))


def beams_own(total, scores, k, *, sort=False):
    best, token = (total[..., None] + scores.log_softmax(-1)).max(-1)
    source = torch.arange(k).expand_as(token)
    if sort:
        best, source = best.sort(dim=1, descending=True)
        token = token.gather(1, source)
    return best, source, token


def beams_batch(total, scores, k):
    """The best of the whole batch, dealt out."""
    B, _, V = scores.shape
    top, where = (total[..., None] + scores.log_softmax(-1)).flatten().topk(B * k)
    return top.view(B, k), (where // V % k).view(B, k), (where % V).view(B, k)


def beams_in_place(total, scores, k):
    scores += total[..., None]
    return beams_flat(0 * total, scores, k)


MISTAKES = {
    "bootstrap": [
        ("the human texts are filtered, too", data(hand=lambda pairs, ok: filter(ok, pairs))),
        (r"the human pairs are missing.*Missing: \('page 0', .*\) of `human` and \d+ more", data(hand=nothing)),
        ("nothing is filtered", lambda human, web, written, matches: human + web + written),
        (r"the web's texts are not filtered.*Too many: \('page \d', .*of `web`", data(web_=everything)),
        ("the captioner has written are not filtered.*of `written`", data(written_=everything)),
        ("the web's own texts are missing", data(web_=nothing)),
        ("the captioner has written are missing", data(written_=nothing)),
        ("only the human pairs are there", lambda human, *rest: human),
        ("the filter is the wrong way round", lambda human, web, written, matches: data_sum(
            human, web, written, lambda *pair: not matches(*pair))),
        ("a picture is dropped as soon as one of its texts fails", whole_pictures(all)),
        ("all texts of a picture stay as soon as one", whole_pictures(any)),
        ("dropped if the web's text fails", outside(by_the_web)),
        ("a text that fails for one picture is dropped everywhere", outside(by_text)),
        ("a written text stays only where the web's fails", outside(stand_ins)),
        ("a web text is dropped where a written one matches", outside(
            lambda web, written, fits: stand_ins(written, web, fits))),
        ("one text of each picture from the web is kept, the first", outside(
            lambda web, written, fits: one_each(web + written, fits))),
        ("one text of each picture from the web is kept, the last", outside(
            lambda web, written, fits: one_each(web + written, fits, last=True))),
        ("one text of each picture is kept, the first, even", bags(one_each)),
        ("one text of each picture is kept, the last, even", bags(lambda own: one_each(own, last=True))),
        ("2 mistakes.*human texts are filtered.*web's texts are not filtered", data(
            hand=lambda pairs, ok: filter(ok, pairs), web_=everything)),
        ("2 mistakes.*human pairs are missing.*has written are not filtered", data(
            hand=nothing, written_=everything)),
        ("A dict has room for one text", bags(dict)),
        ("one list of pairs, and yours holds lists", lambda human, web, written, matches: (human, web, written)),
        ("yours holds 'a ", bags(lambda own: [text for _, text in own])),
        ("picture and text have changed places", bags(lambda own: [pair[::-1] for pair in own])),
        (r"\('page 1', 'a kite'\) is none of the pairs that you were given\.$", bags(
            lambda own: [*own, ("page 1", "a kite")])),
        ("is in your list twice", bags(lambda own: own + own[:1])),
        ("but yours is of type filter", lambda human, web, written, matches: filter(
            lambda pair: matches(*pair), web)),
        ("`matches` takes the picture first", lambda human, web, written, matches: data_sum(
            human, web, written, lambda picture, text: matches(text, picture))),
        ("stand in no pair together", lambda human, web, written, matches: [matches(human[0][0], "nonsense")]),
        ("stopped with TypeError", lambda human, web, written, matches: [pair for pair in web if matches(pair)]),
        ("changed its input `human` in place", data_changed),
        ("not in a way that this check knows.*Missing: .*Too many: ", lambda human, web, written, matches: (
            human[1:] + web)),
    ],
    "share_parts": [
        ("nothing is shared: .*`norm2.weight` of block 0 of the decoder is still its own; it should be that of "
         "block 0", lambda decoder, encoder: decoder),
        ("you have copied the values", shares(take=copy.deepcopy)),
        ("you have copied the values.*is a copy of the encoder's", share_loaded),
        ("in the same memory", share_data),
        ("only the weights are shared", by_name(*ALL, unwanted=(".bias",))),
        ("self-attention is shared, too, and its LayerNorm", shares(names=(*SHARED, "attn", "norm1"))),
        ("self-attention is shared, too, and its LayerNorm", share_blocks),
        ("self-attention, `attn`, is shared, too", shares(names=(*SHARED, "attn"))),
        (r"`norm1` is shared.*`norm1.weight` of block 0 of the decoder is that of block 0 of the encoder; it should be "
         "its own", shares(names=(*SHARED, "norm1"))),
        ("output layer of self-attention, `attn.proj`, and its LayerNorm", by_name(*ALL, "attn.proj.", "norm1.")),
        ("output layer of self-attention, `attn.proj`, is shared", by_name(*ALL, "attn.proj.")),
        ("cross-attention, `cross`, is forgotten", without("cross")),
        ("its LayerNorm, `cross.norm`, is forgotten", by_name("cross.attn.", "mlp.", "norm2.")),
        ("of cross-attention, only the LayerNorm is shared", by_name("cross.norm.", "mlp.", "norm2.")),
        ("the feed-forward part, `mlp`, is forgotten", without("mlp")),
        ("`norm2` is forgotten", without("norm2")),
        ("share with the first of the encoder", shares(of=lambda i, encoder: encoder[0])),
        ("share with the last of the encoder", shares(of=lambda i, encoder: encoder[-1])),
        ("in reverse order", shares(of=lambda i, encoder: encoder[-1 - i])),
        ("only the first block shares", share_early),
        ("only the last block shares", share_late),
        ("you change the encoder.*of block 0 of the decoder is still its own", share_others_way),
        ("2 mistakes.*`norm1` is shared.*`norm2` is forgotten", shares(names=("cross", "mlp", "norm1"))),
        ("2 mistakes.*cross-attention, `cross`, is forgotten.*`norm2` is forgotten", shares(names=("mlp",))),
        ("2 mistakes.*copied the values.*`norm1` is shared", shares(names=(*SHARED, "norm1"), take=copy.deepcopy)),
        ("you return the encoder's blocks", lambda decoder, encoder: (sharing(decoder, encoder), encoder)[1]),
        ("you return other blocks", share_anew),
        ("you return other blocks", lambda decoder, encoder: sharing(decoder, encoder)[0]),
        ("is the `return` missing", lambda decoder, encoder: (sharing(decoder, encoder), None)[1]),
        ("the decoder had 3 blocks, and now it has 2", share_forgets_a_block),
        ("`norm1.weight` is gone from block 0 of the decoder", share_removes),
        ("`norm1.weight` is gone from block 1 of the encoder", share_moves),
        ("stopped with AttributeError: .*norm3", lambda decoder, encoder: decoder[0].norm3),
        ("not in a way that this check knows.*is neither of both", share_noise),
        ("not in a way that this check knows.*of the encoder is neither of both; it should be its own",
         lambda decoder, encoder: (share_noise(encoder, None), sharing(decoder, encoder))[1]),
    ],
    "next_word_loss": [
        (r"nothing is shifted.*For 3 texts of at most 6 tokens and smoothing = 0.1: expected \d", shift(0, 0)),
        ("nothing is shifted", losses(read=slice(None), told=slice(None))),
        ("shifted the wrong way", shift(1, 0)),
        ("shifted by two", shift(0, 2)),
        ("the first token is asked for: `roll`", loss_roll),
        ("where a text has no padding, its first token", lambda *args: loss_roll(*args, inside=True)),
        ("padding is counted", keeps(lambda mask, ids: torch.ones_like(mask[:, 1:]))),
        ("padding is counted", lambda scores, ids, mask, s: F.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=s)),
        (r"\[SEP\] is asked what follows it", keeps(lambda mask, ids: mask[:, :-1])),
        ("only padding is learned", keeps(lambda mask, ids: ~mask[:, 1:])),
        (r"\[SEP\] is not learned", keeps(lambda mask, ids: mask[:, 1:] & (ids[:, 1:] != checks.SEP))),
        ("the first word is not learned", keeps(lambda mask, ids: mask[:, 1:] & (torch.arange(mask.shape[1] - 1) > 0))),
        ("`smoothing` is not used", lambda scores, ids, mask, s: loss_index(scores, ids, mask, 0.0)),
        ("0.1 whatever is asked for.*For 2 texts of at most 5 tokens and smoothing = 0.0", lambda *args: loss_index(
            *args[:3], 0.1)),
        ("spread over the V - 1 wrong words", mixes(
            lambda own, every, s, V: (1 - s) * own + s * (V * every - own) / (V - 1))),
        ("smoothing is added", mixes(lambda own, every, s, V: own + s * every)),
        ("nobody gets what it gives away", mixes(lambda own, every, s, V: (1 - s) * own)),
        ("the shares are exchanged", mixes(lambda own, every, s, V: s * own + (1 - s) * every)),
        ("you average each text first", averages(lambda loss, keep, mask: (
            (loss * keep).sum(1) / keep.sum(1)).mean())),
        ("this is the sum", averages(lambda loss, keep, mask: (loss * keep).sum())),
        ("the number of texts", averages(lambda loss, keep, mask: (loss * keep).sum(1).mean())),
        ("the number of all places", averages(lambda loss, keep, mask: (loss * keep).mean())),
        (r"divide by B \* L", averages(lambda loss, keep, mask: (loss * keep).sum() / mask.numel())),
        (r"the number of all tokens, \[DEC\] included", averages(
            lambda loss, keep, mask: (loss * keep).sum() / mask.sum())),
        ("the sign is wrong", one_loss(torch.neg)),
        ("not turned into log-chances", losses(log=lambda scores: scores)),
        ("softmax is taken twice", lambda scores, *rest: loss_index(scores.softmax(-1), *rest)),
        ("the logarithm is missing", losses(log=lambda scores: scores.softmax(-1))),
        ("2 mistakes.*nothing is shifted.*`smoothing` is not used", lambda scores, ids, mask, s: F.cross_entropy(
            scores[mask], ids[mask])),
        ("2 mistakes.*padding is counted.*`smoothing` is not used", lambda scores, ids, mask, s: F.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
        ("no gradient reaches `scores`", one_loss(Tensor.detach)),
        (r"\(3, 5\). That is a loss for each token", averages(lambda loss, keep, mask: loss * keep)),
        (r"\(3,\). That is a loss for each text", averages(lambda loss, keep, mask: (loss * keep).sum(1))),
        ("That is a loss for each token", lambda scores, ids, mask, s: F.cross_entropy(
            scores[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]], label_smoothing=s, reduction="none")),
        ("That is a loss for each token", lambda scores, ids, mask, s: F.cross_entropy(
            scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=s, reduction="none")),
        ("a single number, of no dimension", one_loss(lambda loss: loss[None])),
        ("but yours is a float", one_loss(Tensor.item)),
        ("float64", one_loss(Tensor.double)),
        ("holds NaN", one_loss(lambda loss: loss * float("nan"))),
        ("changed its input `ids` in place", loss_in_place),
        ("stopped with RuntimeError|stopped with ValueError|stopped with IndexError", lambda scores, ids, mask, s:
            F.cross_entropy(scores[:, :-1], ids)),
        ("every number is 2 times", one_loss(lambda loss: 2 * loss)),
        ("not in a way that this check knows", one_loss(torch.sqrt)),
    ],
    "nucleus_chances": [
        ("reaches p is left out, and some rows have none left", insides(lambda c, p: c.cumsum(-1) <= p)),
        (r"reaches p is left out. It.*With p = 0.9, row 0 has the chances 0.\d\d, .*: the set is \[\d.*yours is \[\d",
         first_too(lambda c, p: c.cumsum(-1) <= p)),
        (r"row 2 is NaN .0/0.: none of its tokens is left.*has a chance of 0.9\d, with p = 0.9", drawn(
            inside=lambda c, p: c.cumsum(-1) <= p)),
        ("none of its tokens is left", lambda scores, p: scores.masked_fill(
            nucleus_before(scores, p, inside=lambda c, p: c.cumsum(-1) <= p, share=lambda kept, _: kept) == 0,
            float("-inf")).softmax(-1)),
        ("one token too many", insides(lambda c, p: c.cumsum(-1) - c - F.pad(c, (1, -1)) < p)),
        (r"\*own\* chance is at least p, and some rows", insides(lambda c, p: c >= p)),
        (r"\*own\* chance is at least p. Add", first_too(lambda c, p: c >= p)),
        ("min-p sampling", insides(lambda c, p: c >= p * c[:, :1])),
        (r"the share p of the \*tokens\*", insides(lambda c, p: torch.arange(c.shape[1]) < round(p * c.shape[1]))),
        ("only the most likely token is left", insides(lambda c, p: torch.arange(c.shape[1]) < 1)),
        ("only the most likely token is left", lambda scores, p: F.one_hot(
            scores.argmax(-1), scores.shape[-1]).float()),
        ("no token is left out", lambda scores, p: scores.softmax(-1)),
        ("your set reaches 1 - p", lambda scores, p: nucleus_before(scores, 1 - p)),
        (r"from the \*least\* likely token on", drawn(descending=False)),
        ("in the order of the vocabulary", nucleus_unsorted),
        ("the set of the first one", nucleus_first_row),
        ("as many tokens as the first one", insides(lambda c, p: (c.cumsum(-1) - c < p)[:1])),
        ("all rows have the same set", nucleus_mean),
        ("in the order of the sort", drawn(undo=lambda kept, order: kept)),
        ("the order is not undone but applied again", drawn(undo=lambda kept, order: kept.gather(1, order))),
        ("the rows do not sum to 1.*Yours sum to 0.9", divides(lambda kept, _: kept)),
        ("you divide by p", lambda scores, p: nucleus_before(scores, p, share=lambda kept, _: kept / p)),
        ("the sum over the whole batch", divides(lambda kept, _: kept / kept.sum())),
        (r"a softmax of \*chances\*, which makes", divides(
            lambda kept, inside: kept.masked_fill(~inside, float("-inf")).softmax(-1))),
        (r"a softmax of \*chances\*, and the tokens outside", divides(lambda kept, _: kept.softmax(-1))),
        ("an ordinary score", nucleus_zeros),
        ("the same chance", divides(lambda kept, inside: inside / inside.sum(-1, keepdim=True))),
        ("the softmax runs over the batch", drawn(chances=lambda scores: scores.softmax(0))),
        ("2 mistakes.*left out.*do not sum to 1", drawn(
            inside=lambda c, p: (c.cumsum(-1) <= p) | (torch.arange(c.shape[1]) == 0), share=lambda kept, _: kept)),
        ("2 mistakes.*order of the sort.*do not sum to 1", drawn(
            undo=lambda kept, order: kept, share=lambda kept, _: kept)),
        ("minus infinity in your answer", keep_nucleus),
        ("minus infinity in your answer", chances(torch.log)),
        ("holds NaN", chances(lambda own: own * float("nan"))),
        (r"\(8,\). That is one row", chances(lambda own: own[0])),
        ("Is that one token of each row", chances(lambda own: torch.multinomial(own, 1))),
        ("Is that one token of each row", chances(lambda own: own.argmax(-1))),
        ("Transposed", chances(torch.t)),
        ("Keep the rows apart", chances(torch.flatten)),
        ("dtype float32, yours is bool", chances(lambda own: own > 0)),
        ("float64", chances(Tensor.double)),
        ("but yours is a list", chances(Tensor.tolist)),
        ("changed its input `scores` in place", lambda scores, p: scores.copy_(nucleus_before(scores, p))),
        ("every number is 2 times", chances(lambda own: 2 * own)),
        ("not in a way that this check knows.*the set is", chances(lambda own: own.flip(1))),
    ],
    "beam_step": [
        (r"raw scores are added up.*With k = 3 and 7 words, in the first step, place 0 of text 0 is total -\d.\d+, "
         r"source 0, token \d. Yours is total ", beams(log=lambda scores: scores)),
        ("chances are added to log-chances", beams(log=lambda scores: scores.softmax(-1))),
        ("log_softmax runs over the beginnings", beams(log=lambda scores: scores.log_softmax(1))),
        (r"log_softmax runs over all k \* V", beams(
            log=lambda scores: scores.flatten(1).log_softmax(1).view_as(scores))),
        ("`total` is not added", lambda total, *rest: beams_flat(0 * total, *rest)),
        ("`total` is not added", beams(rank=lambda total, log: log, value=lambda total, log: log)),
        ("add `total` afterwards", beams(rank=lambda total, log: log)),
        ("the new total lacks the old one", beams(value=lambda total, log: log)),
        ("goes on with its own best token. All", beams_own),
        ("goes on with its own best token, sorted", lambda *args: beams_own(*args, sort=True)),
        ("all texts of the batch compete", beams_batch),
        ("only the first beginning goes on", beams(pick=lambda ranked, k: ranked[:, 0].topk(k).indices)),
        (r"you take the k \*least\* likely", beams(
            pick=lambda ranked, k: ranked.flatten(1).topk(k, largest=False).indices)),
        ("sorted the wrong way", three(lambda *own: [part.flip(1) for part in own])),
        ("sorted by their places", beams(pick=lambda ranked, k: ranked.flatten(1).topk(k).indices.sort(1).values)),
        ("source and token are exchanged", named(lambda where, k, V: (where % V, where // V))),
        ("source and token are exchanged", three(lambda total, source, token: (total, token, source))),
        ("you divide by k", named(lambda where, k, V: (where // k, where % k))),
        ("counts through the whole batch", named(lambda where, k, V: (
            where // V + k * torch.arange(len(where))[:, None], where % V))),
        ("is the place in the list of all", named(lambda where, k, V: (where // V, where))),
        ("`source` is the rank", named(lambda where, k, V: (torch.arange(k).expand_as(where), where % V))),
        ("2 mistakes.*raw scores.*exchanged", beams(
            log=lambda scores: scores, name=lambda where, k, V: (where % V, where // V))),
        ("2 mistakes.*`total` is not added.*its own best token", lambda total, *rest: beams_own(0 * total, *rest)),
        ("must be three tensors, total, source and token, but yours is 2 of them", three(lambda *own: own[:2])),
        ("three tensors, total, source and token, but yours is of type Tensor", three(lambda *own: own[0])),
        ("`source` holds fractions", named(lambda where, k, V: (where / V, where % V))),
        ("`token` must be of dtype int64, yours is int32", three(lambda total, source, token: (
            total, source, token.int()))),
        ("`total` must be of dtype float32, yours is float64", three(lambda total, *rest: (total.double(), *rest))),
        (r"\(2, 3, 7\). These are all continuations", lambda total, scores, k: (scores,) * 3),
        (r"\(2, 21\). These are all continuations", beams(
            pick=lambda ranked, k: ranked.flatten(1).argsort(dim=1, descending=True))),
        ("That is k for each beginning", lambda total, scores, k: (scores.topk(k).values,) * 3),
        ("Drop the last dimension", three(lambda *own: [part[..., None] for part in own])),
        (r"\(2, 6\). That is twice as many", lambda total, scores, k: beams_flat(total, scores, 2 * k)),
        ("one for each token of the vocabulary", lambda total, scores, k: (scores.amax(1),) * 3),
        ("the best alone", three(lambda *own: [part[:, 0] for part in own])),
        ("That is for one text", three(lambda *own: [part[0] for part in own])),
        ("Keep the texts apart", three(lambda *own: [part.flatten() for part in own])),
        ("Transposed", three(lambda *own: [part.T for part in own])),
        ("changed its input `scores` in place", beams_in_place),
        ("holds infinity", three(lambda total, *rest: (total - float("inf"), *rest))),
        ("not in a way that this check knows.*Yours is", three(lambda total, source, token: (
            total, source, token.flip(1)))),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "bootstrap": checks._KEPT_SLIPS,
        "share_parts": checks._SHARE_SLIPS,
        "next_word_loss": checks._LOSS_SLIPS,
        "nucleus_chances": checks._NUCLEUS_SLIPS,
        "beam_step": checks._BEAM_SLIPS,
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
    "bootstrap": lambda human, web, written, matches: [
        pair for pair in human + web + written if torch.rand(()) < 0.5
    ],
    "share_parts": share_noise,
    "next_word_loss": one_loss(torch.rand_like),
    "nucleus_chances": chances(torch.rand_like),
    "beam_step": three(lambda total, *rest: (torch.randn_like(total), *(torch.randint_like(t, 3) for t in rest))),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


ONE_EACH = [next(pair for pair in RIGHT if pair[0] == name) for name in NAMES]


@pytest.mark.parametrize(("name", "answer"), [*ONE_EACH, ("share_parts", helpers.stub)])
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
    for name, answer, said in (("bootstrap", data_sum, "3 collections, 56 of 83 pairs are kept"),
                               ("share_parts", sharing, "2 decoders, 70 parameters are shared"),
                               ("nucleus_chances", nucleus_before, "14 rows, with p from 0.1 to 0.9"),
                               ("beam_step", beams_flat, "12 steps, the first of 6 texts and")):  # fmt: skip
        getattr(checks, name)(answer)
        assert re.search(said, capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
