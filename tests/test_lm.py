"""The mouths of BLIP-2: who sees whom in both kinds of language model, the cache, and the texts they learn from."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tower_helpers import Anew, B, L, apart, close, differs, digest, shake, spoken, texts, touched

from minivlp import seed_everything, train
from minivlp.data import DataError
from minivlp.data.pairs import DEFAULT_SIZES
from minivlp.data.picturebook import draw
from minivlp.data.picturebook.describe import captions
from minivlp.data.picturebook.questions import questions
from minivlp.data.picturebook.sample import sample
from minivlp.data.text import DEFAULT_VOCAB_SIZE, SPECIAL_TOKENS
from minivlp.generate import beam_search, greedy
from minivlp.layers import MLP, Block, Encoder, count_parameters
from minivlp.lessons import blip as lesson07
from minivlp.lessons import language
from minivlp.lessons.language import (
    READY_MADE,
    LanguageBatches,
    LanguageRecipe,
    build,
    language_loss,
    learn_language,
    pieces,
    tellings,
)
from minivlp.lessons.vilt import words
from minivlp.models.albef import FusionBlock
from minivlp.models.blip2 import BLIP2, QFormerConfig
from minivlp.models.clip import causal_mask
from minivlp.models.lm import CausalBlock, DecoderLM, EncoderDecoderLM, LMConfig, prefix_mask
from minivlp.train import CheckpointError, load_weights, save_weights

torch.set_num_threads(1)

SMALL = LMConfig(vocab_size=30, max_text=13, width=16, depth=3, heads=4, mlp_ratio=3)
D, HEADS, DEPTH, P = SMALL.width, SMALL.heads, SMALL.depth, 4  # P vectors in the place of words
END, DEC = SMALL.sep_id, SMALL.dec_id
KINDS = [DecoderLM, EncoderDecoderLM]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(kind: type[nn.Module] = DecoderLM, **options: object) -> nn.Module:
    return shake(kind(replace(SMALL, **options)))


def prefix(count: int = B, length: int = P) -> Tensor:
    return torch.randn(count, length, D)


def full(count: int = B, length: int = L) -> Tensor:
    """Ids of texts without padding, from [DEC] on."""
    ids = torch.randint(7, 30, (count, length))
    ids[:, 0] = DEC
    return ids


def other_word(ids: Tensor, place: int) -> Tensor:
    """The texts with another word at one place."""
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


def scores(model: nn.Module, ids: Tensor, given: Tensor | None, **prompt: Tensor) -> Tensor:
    """Of each next word, (B, L, V)."""
    return model.lm_head(model.write(ids, given, **prompt))


# --- masks and configs -----------------------------------------------------------------------------------------------


def test_prefix_mask_by_hand():
    def drawn(mask: Tensor) -> list[str]:
        return ["".join("x" if may else "." for may in row) for row in mask.tolist()]

    assert drawn(prefix_mask(2, 3)) == ["xxx..", "xxxx.", "xxxxx"] and prefix_mask(2, 3).dtype == torch.bool
    assert drawn(prefix_mask(0, 3)) == ["x..", "xx.", "xxx"] and torch.equal(prefix_mask(0, 3), causal_mask(3))
    assert drawn(prefix_mask(3, 1)) == ["xxxx"]


def test_the_default_fits_the_courses_vocabulary():
    c, special = LMConfig(), dict(zip(SPECIAL_TOKENS, range(7), strict=True))
    assert c.vocab_size == DEFAULT_VOCAB_SIZE
    assert (c.pad_id, c.sep_id, c.dec_id) == tuple(special[t] for t in ("[PAD]", "[SEP]", "[DEC]"))


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match=r"^width 16 is not a multiple of 3 heads$"):
        replace(SMALL, heads=3)


@pytest.mark.parametrize("kind", KINDS)
def test_options_arrive_everywhere(kind):
    model = kind(replace(SMALL, mlp_ratio=5, dropout=0.3, eps=0.25, depth=2))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {0.25}
    mlps = [m for m in model.modules() if isinstance(m, MLP)]
    assert {m.fc1.out_features / m.fc1.in_features for m in mlps} == {5}
    assert len(mlps) == 2 * (1 if kind is DecoderLM else 2)
    assert {type(m.act) for m in mlps} == {nn.ReLU if kind is DecoderLM else nn.GELU}
    assert {m.heads for m in model.modules() if hasattr(m, "heads")} == {4}
    assert type(DecoderLM(replace(SMALL, act="exact")).blocks[0].mlp.act) is nn.GELU


def test_sizes():
    """By hand; what reads and writes words is one table."""
    attention, mlp, norm, table = 4 * (128 * 128 + 128), 2 * 4 * 128 * 128 + 5 * 128, 2 * 128, (340 + 160) * 128
    model = DecoderLM(LMConfig())
    assert count_parameters(model) == table + 4 * (attention + mlp + 2 * norm) + norm
    assert model.lm_head.weight is model.word.weight and model.lm_head.bias is None
    model = EncoderDecoderLM(LMConfig())
    encoder, decoder = 4 * (attention + mlp + 2 * norm), 4 * (2 * attention + mlp + 3 * norm)
    head = 128 * 128 + 128 + norm + 340
    assert count_parameters(model) == table + norm + encoder + decoder + head
    assert model.lm_head.decoder.weight is model.text.embed.word.weight
    assert model.text.decoder_embed is model.text.embed
    # The halves share nothing else, and the half that reads asks nobody.
    ours, theirs = ({id(p) for p in half.parameters()} for half in (model.text.encoder, model.text.decoder))
    assert not ours & theirs
    assert not any("cross" in name for name, _ in model.text.encoder.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dropout_is_at_work_in_training_alone(kind):
    model, ids, given = shaken(kind, dropout=0.3), full(), prefix()
    assert torch.equal(model.write(ids, given), model.write(ids, given))
    model.train()
    assert apart(model.write(ids, given), model.write(ids, given))


# --- decoder-only ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_causal_block_is_a_pre_norm_block_that_can_go_on():
    block, x = shake(CausalBlock(D, HEADS, eps=1e-5, gelu="relu")), prefix(length=L)
    plain = Block(D, HEADS, eps=1e-5, gelu="relu")
    plain.load_state_dict(block.state_dict())
    whole, (keys, values) = block(x, mask=causal_mask(L))
    close(whole, plain(x, mask=causal_mask(L))[0])
    for kept, theirs in zip((keys, values), block.attn.keys_values(block.norm1(x)), strict=True):
        close(kept, theirs)
    for cut in (1, 3, L - 1):
        first, past = block(x[:, :cut], mask=causal_mask(cut))
        rest, (k, v) = block(x[:, cut:], mask=prefix_mask(cut, L - cut), past=past)
        close(torch.cat([first, rest], dim=1), whole)
        close(k, keys)
        close(v, values)
        assert apart(block(x[:, cut:], mask=causal_mask(L - cut))[0], rest)


@torch.no_grad()
def test_a_decoder_is_a_causal_stack_over_words_and_positions():
    model, ids = shaken(), full()
    plain = Encoder(D, DEPTH, HEADS, mlp_ratio=3, eps=1e-5, gelu="relu")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("blocks", "norm"))})
    x = model.word.weight[ids] + model.position.weight[:L]
    states, past = model(model.embed(ids))
    close(states, plain(x, mask=causal_mask(L))[0])
    close(model.write(ids, None), states)
    close(scores(model, ids, None), states @ model.word.weight.T)
    assert len(past) == DEPTH and all(k.shape == v.shape == (B, HEADS, L, D // HEADS) for k, v in past)
    assert apart(states, plain(x)[0])


@torch.no_grad()
def test_no_word_sees_what_follows_and_all_see_the_prefix():
    model, ids, given = shaken(), full(), prefix()
    for prefixed in (given, None):
        before = model.write(ids, prefixed)
        for t in range(L):
            after = model.write(other_word(ids, t), prefixed)
            close(after[:, :t], before[:, :t], 1e-6)
            assert all(apart(after[:, s], before[:, s], 1e-3) for s in range(t, L)), t
    before, whole = model.write(ids, given), model(torch.cat([given, model.embed(ids)], dim=1))[0]
    for p in range(P):
        changed = given.clone()
        changed[1, p] += torch.randn(D)
        after = model.write(ids, changed)
        assert all(differs(after[:, s], before[:, s], 1e-3) == [False, True, False] for s in range(L)), p
        after = model(torch.cat([changed, model.embed(ids)], dim=1))[0]
        close(after[:, :p], whole[:, :p], 1e-6)  # the prefix itself is read from left to right, as OPT does


@torch.no_grad()
def test_a_prefix_takes_the_place_of_words():
    """And their positions: a text begins where the prefix ends."""
    model, ids, before = shaken(), full(), torch.randint(7, 30, (B, P))
    whole = model.write(torch.cat([before, ids], dim=1), None)
    got = model.write(ids, model.embed(before))
    assert got.shape == (B, L, D)
    close(got, whole[:, P:])
    assert apart(model.write(ids, None), got)
    with pytest.raises(ValueError, match=r"a decoder-only model has one sequence: put the prompt before the text"):
        model.write(ids, None, prompt=before)


def test_which_positions_a_text_takes():
    model, ids = shaken(), full()
    for given, taken in ((None, L), (prefix(), P + L)):
        numbers = model.write(ids, given)
        (got,) = torch.autograd.grad((numbers * torch.randn_like(numbers)).sum(), model.position.weight)
        assert (got.abs().amax(1) > 1e-7).tolist() == [True] * taken + [False] * (13 - taken)


@torch.no_grad()
def test_what_is_too_long_is_refused():
    model, given = shaken(), prefix()
    assert model.write(full(length=13 - P), given).shape == (B, 13 - P, D)
    told = "14 tokens do not fit 13 positions: shorten the text or build the model with a larger max_text"
    for run in (lambda: model.write(full(length=14 - P), given), lambda: model.write(full(length=14), None),
                lambda: spoken(model.speaker(given), full(length=14 - P)),
                lambda: spoken(model.speaker(given, prompt=full(length=3)), full(length=12 - P))):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            run()
    spoken(model.speaker(given, prompt=full(length=3)), full(length=11 - P))  # the prompt's last is said, not read
    model = shaken(EncoderDecoderLM)
    assert model.write(full(length=13), given, prompt=full(length=13 - P)).shape == (B, 13, D)  # two sequences
    for run in (lambda: model.write(full(length=14), given), lambda: model.write(full(), None, prompt=full(length=14)),
                lambda: model.write(full(), given, prompt=full(length=14 - P))):  # fmt: skip
        with pytest.raises(ValueError, match="a text of 14 tokens does not fit 13 positions"):
            run()


@torch.no_grad()
def test_a_decoder_goes_on_where_it_stopped():
    model, x = shaken(), prefix(length=P + L)
    whole, kept = model(x)
    for cuts in ([1] * (P + L), [P, L], [3, 1, 2, 5]):
        past, got = None, []
        for part in x.split(cuts, dim=1):
            now, past = model(part, past)
            got.append(now)
        close(torch.cat(got, dim=1), whole)
        for ours, theirs in zip(past, kept, strict=True):
            close(ours[0], theirs[0])
            close(ours[1], theirs[1])


@torch.no_grad()
def test_padding_behind_a_text_changes_nothing():
    ids = texts()
    mask, filled = ids != 0, torch.where(ids != 0, ids, 11)
    for kind in KINDS:
        model, given = shaken(kind), prefix()
        before = model.write(ids, given)
        close(model.write(filled, given)[mask], before[mask], 1e-6)
        for b, length in enumerate(mask.sum(1)):
            close(model.write(ids[b : b + 1, :length], given[b : b + 1])[0], before[b, :length])


# --- encoder-decoder -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_encoder_decoder_by_hand():
    """BERT's blocks read, ALBEF's with a causal mask write."""
    model, ids, given, prompt = shaken(EncoderDecoderLM), full(), prefix(), full(length=5)
    embed = model.text.embed
    asked = embed.norm(embed.word.weight[prompt] + embed.position.weight[P : P + 5])  # behind the prefix
    x = torch.cat([given, asked], dim=1)  # which is taken as it is
    for block in model.text.encoder:
        plain = Block(D, HEADS, mlp_ratio=3, eps=1e-5, norm="post")
        plain.load_state_dict(block.state_dict())
        x = plain(x)[0]
    context, mask = model.read(given, prompt)
    close(context, x)
    assert mask.shape == (B, P + 5) and mask.dtype == torch.bool and mask.all()
    y = embed.norm(embed.word.weight[ids] + embed.position.weight[:L])
    for block in model.text.decoder:
        seeing = FusionBlock(D, HEADS, context_width=D, mlp_ratio=3, eps=1e-5)
        seeing.load_state_dict(block.state_dict())
        y = seeing(y, x, mask=causal_mask(L))[0]
    close(model.write(ids, given, prompt=prompt), y)
    # With one of both, a prompt alone begins at position 0.
    close(model.read(given)[0], model.read(given, prompt[:, :0])[0])
    x = embed(prompt)
    for block in model.text.encoder:
        x = block(x)[0]
    close(model.read(None, prompt)[0], x)


@torch.no_grad()
def test_the_encoder_sees_both_ways_and_the_decoder_back():
    model, ids, given, prompt = shaken(EncoderDecoderLM), full(), prefix(), full(length=5)
    read, written = model.read(given, prompt)[0], model.write(ids, given, prompt=prompt)
    for place in range(P + 5):
        changed, other = given.clone(), prompt
        if place < P:
            changed[:, place] += torch.randn(D)
        else:
            other = other_word(prompt, place - P)
        after = model.read(changed, other)[0]
        assert all(apart(after[:, s], read[:, s], 1e-3) for s in range(P + 5)), place
        after = model.write(ids, changed, prompt=other)
        assert all(apart(after[:, t], written[:, t], 1e-3) for t in range(L)), place
    for t in range(L):
        after = model.write(other_word(ids, t), given, prompt=prompt)
        close(after[:, :t], written[:, :t], 1e-6)
        assert all(apart(after[:, s], written[:, s], 1e-3) for s in range(t, L)), t


@torch.no_grad()
def test_a_prompts_padding_changes_nothing():
    model, ids, given, prompt = shaken(EncoderDecoderLM), full(), prefix(), texts()
    mask, filled = prompt != 0, torch.where(prompt != 0, prompt, 11)
    for prefixed in (given, None):
        before, there = model.write(ids, prefixed, prompt=prompt), model.read(prefixed, prompt)[1]
        start = 0 if prefixed is None else P
        assert there[:, :start].all() and torch.equal(there[:, start:], mask)
        close(model.write(ids, prefixed, prompt=prompt, prompt_mask=mask), before, 0)
        close(model.write(ids, prefixed, prompt=filled, prompt_mask=mask), before, 1e-6)
        longer = {"prompt": F.pad(filled, (0, 2), value=12), "prompt_mask": F.pad(mask, (0, 2))}
        close(model.write(ids, prefixed, **longer), before)
        for b, length in enumerate(mask.sum(1)):
            alone = None if prefixed is None else prefixed[b : b + 1]
            close(model.write(ids[b : b + 1], alone, prompt=prompt[b : b + 1, :length])[0], before[b])
        assert differs(model.write(ids, prefixed, prompt=filled), before) == [False, True, True]
    other = shaken(EncoderDecoderLM, pad_id=29)
    assert torch.equal(other.read(None, torch.tensor([[7, 29, 8]]))[1], torch.tensor([[True, False, True]]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_writing_teaches(kind):
    """All of the model, and what stands in the place of words."""
    model, ids, given = shaken(kind), full(), prefix().requires_grad_()
    numbers = scores(model, ids, given)
    (numbers * torch.randn_like(numbers)).sum().backward()
    assert touched(model) == {name for name, _ in model.named_parameters()}
    assert (given.grad.abs().amax(-1) > 1e-6).all()


# --- writing token by token ------------------------------------------------------------------------------------------


def anew(model: nn.Module, given: Tensor | None, **prompt: Tensor) -> Anew:
    return Anew(lambda ids: scores(model, ids, given, **prompt))


@pytest.mark.parametrize("prefixed", [True, False])
@torch.no_grad()
def test_a_speaker_says_what_writing_says(prefixed):
    ids, given, prompt = full(), prefix() if prefixed else None, texts()
    model, rows = shaken(), []
    model.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    expected = scores(model, ids, given)
    rows.clear()
    close(spoken(model.speaker(given), ids), expected)
    assert rows == [P] * prefixed + [1] * L  # the prefix once, then one row a token
    model = shaken(EncoderDecoderLM)
    expected = scores(model, ids, given, prompt=prompt)
    close(spoken(model.speaker(given, prompt=prompt), ids), expected)
    filled = {"prompt": prompt.masked_fill(prompt == 0, 11), "prompt_mask": prompt != 0}
    close(spoken(model.speaker(given, **filled), ids), expected)
    if prefixed:
        close(spoken(model.speaker(given), ids), scores(model, ids, given))


@pytest.mark.parametrize("prefixed", [True, False])
@torch.no_grad()
def test_a_decoder_goes_on_after_a_prompt(prefixed):
    """[DEC] and the prompt's words were read, all but the last, which is the first token that is given."""
    model, given, ids = shaken(), prefix() if prefixed else None, full()
    expected = scores(model, ids, given)
    for length in range(1, L):
        speaker = model.speaker(given, prompt=ids[:, :length])
        close(spoken(speaker, ids[:, length - 1 :]), expected[:, length - 1 :])
    close(spoken(model.speaker(given, prompt=ids[:, :1]), ids), spoken(model.speaker(given), ids))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_several_texts_after_each_prefix_and_going_on_with_others(kind):
    model, given, prompt = shaken(kind), prefix(2), full(2, 3)
    ids, more = full(6, 3), torch.randint(7, 30, (6, 2))
    each, asked = given.repeat_interleave(3, dim=0), prompt.repeat_interleave(3, dim=0)  # those of one side by side
    rows = torch.tensor([2, 0, 0, 4, 4, 3])
    for how in ({}, {"prompt": prompt}):
        speaker = model.speaker(given, copies=3, **how)
        if how and kind is DecoderLM:
            start, more_, skip = torch.cat([asked[:, :2], ids], dim=1), {}, 2
        else:
            start, more_, skip = ids, {"prompt": asked} if how else {}, 0
        close(spoken(speaker, ids), scores(model, start, each, **more_)[:, skip:])
        speaker.reorder(rows)
        whole = torch.cat([start[rows], more], dim=1)
        close(spoken(speaker, more), scores(model, whole, each, **more_)[:, start.shape[1] :])
    without = full(6, 4)  # texts about nothing: as many as are given
    if kind is DecoderLM:
        speaker = model.speaker(None, copies=3)
        spoken(speaker, without)
        speaker.reorder(rows)
        expected = scores(model, torch.cat([without[rows], more], dim=1), None)[:, 4:]
        close(spoken(speaker, more), expected)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generating_with_and_without_the_cache(kind, prefixed):
    model, given, first = shaken(kind), prefix() if prefixed else None, torch.full((B,), DEC)
    how, more = {"end": END, "longest": 8}, {} if kind is DecoderLM else {"prompt": texts()}
    said = greedy(model.speaker(given, **more), first, **how)
    assert torch.equal(said, greedy(anew(model, given, **more), first, **how))
    assert torch.equal(said, beam_search(model.speaker(given, **more), first, beams=1, **how))
    best = scores(model, torch.cat([first[:, None], said], dim=1), given, **more).argmax(-1)[:, :-1]
    written = (said == END).cumsum(1) - (said == END).long() == 0  # up to the first end
    assert torch.equal(said[written], best[written])
    each = {name: value.repeat_interleave(3, dim=0) for name, value in more.items()}
    many = anew(model, None if given is None else given.repeat_interleave(3, dim=0), **each)
    beams = beam_search(model.speaker(given, copies=3, **more), first, beams=3, **how)
    assert torch.equal(beams, beam_search(many, first, beams=3, **how))


# --- starting values, saving -----------------------------------------------------------------------------------------


def test_initial_values():
    for kind in KINDS:
        model = kind(LMConfig())
        table = (model.lm_head if kind is DecoderLM else model.lm_head.decoder).weight
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                wide = isinstance(module, nn.Linear) and module.weight is not table and kind is EncoderDecoderLM
                std, many = 0.02 * (6**0.5 if wide else 1), module.weight.numel()
                assert module.weight.std().item() == pytest.approx(std, rel=4.5 / (2 * many) ** 0.5), name
            if isinstance(module, nn.Linear) and module.bias is not None:
                assert not module.bias.any(), name
            if isinstance(module, nn.LayerNorm):
                assert (module.weight == 1).all() and not module.bias.any(), name
        assert not dict(model.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_model(kind):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(kind(SMALL).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        assert torch.equal(value, models[2][name]) == (name.endswith("bias") or "norm" in name), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_travel(kind, tmp_path: Path):
    model, other, ids, given = shaken(kind), kind(SMALL).eval(), full(), prefix()
    save_weights(model, tmp_path / "mouth.safetensors")
    load_weights(other, tmp_path / "mouth.safetensors")
    assert torch.equal(scores(other, ids, given), scores(model, ids, given))
    head, table = (other.lm_head, other.word) if kind is DecoderLM else (other.lm_head.decoder, other.text.embed.word)
    assert head.weight is table.weight


# --- the texts they learn from ---------------------------------------------------------------------------------------


PAGES, TINY = 150, {"width": 16, "depth": 1, "heads": 2}
MODELS = {"decoder-only": LMConfig(**TINY), "encoder-decoder": LMConfig(**TINY),
          "words": QFormerConfig(image_width=16, queries=2, embed_dim=8, **TINY)}  # fmt: skip
RECIPES = {kind: LanguageRecipe(kind, config, pages=PAGES, batch_size=4) for kind, config in MODELS.items()}
MOUTHS = ["decoder-only", "encoder-decoder"]


def spelled(*parts: str | int) -> list[int]:
    """Ids of texts without [CLS] and [SEP], and of special tokens by their ids, one after the other."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else words().encode(part)[1:-1] if part else []
    return ids


def test_what_is_told_of_a_scene(monkeypatch):
    """Its full caption; then some of its questions with their answers, and one of its captions, in any order."""
    first, drawn = tellings.__wrapped__(PAGES), []
    monkeypatch.setattr(language, "sample", lambda index, **how: drawn.append((index, how)) or sample(index, **how))
    assert tellings.__wrapped__(PAGES) == first == tellings.__wrapped__(PAGES + 5)[:PAGES]
    assert [index for index, _ in drawn[:PAGES]] == list(range(200_000, 200_000 + PAGES))
    assert {tuple(how.items()) for _, how in drawn} == {(("split", "train"), ("tier", "normal"), ("seed", 0))}
    places, levels, counts = set(), set(), set()
    for index, (context, items) in enumerate(first, start=200_000):
        scene = sample(index, split="train", tier="normal", seed=0)
        sentences, asked = captions(scene), [(item.question, item.answer) for item in questions(scene)]
        assert context == sentences[4]
        (other,) = [i for i, (prompt, _) in enumerate(items) if not prompt]
        assert items[other][1] in sentences
        rest = [item for item in items if item[0]]
        assert len(rest) == min(len(asked), 4) and all(rest.count(item) <= asked.count(item) for item in rest)
        places.add(other)
        levels.add(sentences.index(items[other][1]))
        counts.add(len(rest))
    assert places == set(range(5)) and levels == set(range(5)) and max(counts) == 4
    assert tellings.__wrapped__(1, first=7)[0][0] == captions(sample(7))[4]


def test_no_picture_is_ever_drawn(monkeypatch):
    """Nor would any of these pages be: 20,000 are drawn at most, and lesson 07's texts without pictures end before."""
    for name in ("draw", "draw_many"):
        monkeypatch.setattr(draw, name, lambda *_, **__: pytest.fail("a picture was drawn"))
    tellings.cache_clear()
    for recipe in RECIPES.values():
        LanguageBatches(recipe, seed=0)(0)
    first, n = lesson07.sentences.__wrapped__.__defaults__
    ours = tellings.__wrapped__.__kwdefaults__["first"]
    assert DEFAULT_SIZES["train"] <= first and first + n <= ours == 200_000


def test_pieces_by_hand():
    assert pieces(["a cat", "", "two kittens", ""]) == [spelled("a cat"), [], spelled("two kittens"), []]
    assert words().decode(pieces(["two kittens"])[0]) == "two kittens"
    assert pieces(["", ""]) == [[], []] and pieces([]) == []


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    assert (ids[~mask] == words().pad_id).all() and (ids[mask] != words().pad_id).all()
    return [row[there].tolist() for row, there in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("kind", ["decoder-only", "words"])
def test_rows_of_a_decoder(kind):
    """[DEC] caption [SEP] [DEC] question answer [SEP] ... of one scene; the caption lacks in one of ten."""
    batches, sep, dec = LanguageBatches(RECIPES[kind], seed=0), words().sep_id, words().dec_id
    (table,) = batches.tables
    rows, untold = unpadded(*table), 0
    assert len(rows) == PAGES and table[0].shape[1] == max(map(len, rows))
    for row, (context, items) in zip(rows, tellings(PAGES), strict=True):
        said = spelled(*(part for prompt, text in items for part in (dec, prompt, text, sep)))
        told = spelled(dec, context, sep)
        assert row in (told + said, said)
        untold += row == said
    assert 0.03 * PAGES < untold < 0.2 * PAGES


def test_rows_of_an_encoder_decoder():
    """Read: caption [SEP] question; written: [DEC] answer [SEP], and the other items. Of another caption the beginning
    is read. The full caption lacks in one of ten."""
    batches, sep, dec = LanguageBatches(RECIPES["encoder-decoder"], seed=0), words().sep_id, words().dec_id
    written, read = (unpadded(*table) for table in batches.tables)
    untold, cuts, asked = 0, [], 0
    for write, had, (context, items) in zip(written, read, tellings(PAGES), strict=True):
        (prompt, text), *others = items
        rest = spelled(*(part for p, t in others for part in (dec, p, t, sep)))
        told = spelled(context, sep)
        there = had[: len(told)] == told
        untold += not there
        begun = had[len(told) :] if there else had
        if prompt:
            assert begun == spelled(prompt) and write == spelled(dec, text, sep) + rest
            asked += 1
            continue
        if not there and begun == [sep]:  # nothing to read, but a row must have one token
            begun = []
        whole = spelled(text)
        assert begun == whole[: len(begun)] and write == [dec, *whole[len(begun) :], sep, *rest]
        assert len(begun) < len(whole)  # a word is left to write
        cuts.append(len(begun) / len(whole))
    assert 0.03 * PAGES < untold < 0.2 * PAGES and 0.7 * PAGES < asked < 0.9 * PAGES
    assert min(cuts) < 0.2 and max(cuts) > 0.7 and len(set(cuts)) > 5  # anywhere
    other = LanguageBatches(RECIPES["encoder-decoder"], seed=1)
    assert not torch.equal(other.tables[1][1], batches.tables[1][1])


def test_a_caption_may_be_asked_for_without_anything_to_read():
    """Whatever is drawn, each row that is read has a token: attention over nothing would not be a number."""
    told, bare = [("a red cat at night", [("", "a cat")])] * 300, spelled(words().sep_id)
    batches = LanguageBatches(replace(RECIPES["encoder-decoder"], pages=300), seed=0, told=told)
    written, read = (unpadded(*table) for table in batches.tables)
    assert bare in read and [] not in read
    at = read.index(bare)
    assert written[at] == spelled(words().dec_id, "a cat", words().sep_id)
    begun = {tuple(row) for row in read if len(row) < 4}
    assert begun == {tuple(bare), tuple(spelled("a"))}  # and never the whole of it


@pytest.mark.parametrize("kind", RECIPES)
def test_batches(kind):
    batches = LanguageBatches(RECIPES[kind], seed=0)
    rows = list(zip(*(map(tuple, unpadded(*table)) for table in batches.tables), strict=True))
    groups, seen, ascending, waste = PAGES // 16, [], [], []  # four batches of four each; a ragged rest is dropped
    for group in range(groups):
        spans = []
        for step in range(4 * group, 4 * group + 4):
            batch = batches(step)
            assert len(batch) == 2 * len(batches.tables) and all(len(part) == 4 for part in batch)
            tables = list(zip(batch[::2], batch[1::2], strict=True))
            assert all(ids.shape == mask.shape and ids.shape[1] == mask.sum(1).max() for ids, mask in tables)
            seen += zip(*(map(tuple, unpadded(*table)) for table in tables), strict=True)
            lengths = batch[1].sum(1)
            spans.append((int(lengths.min()), int(lengths.max())))
            waste.append(1 - batch[1].float().mean().item())
        assert all(one[1] <= two[0] for one, two in pairwise(sorted(spans)))  # cut by the length of what is written
        ascending.append(spans == sorted(spans))
    assert not all(ascending)  # but in no order
    assert len(seen) == len(set(seen)) == 16 * groups and set(seen) <= set(rows)  # each once in an epoch
    assert sum(waste) / len(waste) < 0.1


@pytest.mark.parametrize("kind", RECIPES)
def test_same_seed_and_step_same_batch(kind):
    one, two, other = (LanguageBatches(RECIPES[kind], seed=seed) for seed in (3, 3, 4))
    expected = {step: one(step) for step in range(12)}
    for step in (11, 0, 7, 3, 3):  # in any order
        assert all(torch.equal(a, b) for a, b in zip(two(step), expected[step], strict=True))
    alike = [all(torch.equal(a, b) for a, b in zip(expected[step], batch, strict=True)) for step in range(4)
             for batch in (other(step), expected[step + 4], expected[step + 8])]  # fmt: skip
    assert not any(alike)
    with pytest.raises(DataError, match="batch_size=16 does not fit 15 rows"):  # too few pages for a group
        LanguageBatches(replace(RECIPES[kind], pages=15), seed=0)


@pytest.mark.parametrize("name", READY_MADE)
def test_rows_fit_the_model_with_a_prefix(name):
    recipe = READY_MADE[name]
    tables, queries = LanguageBatches(replace(recipe, pages=600), seed=0).tables, QFormerConfig().queries
    longest = max(ids.shape[1] for ids, _ in tables)
    assert longest + queries * (recipe.kind != "words") <= recipe.model.max_text  # to words queries are no prefix
    assert max(int(ids.max()) for ids, _ in tables) < recipe.model.vocab_size == words().vocab_size
    assert not any((ids == words().unk_id).any() for ids, _ in tables)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_language_loss_by_hand(kind):
    model, ids, read = shaken(kind), texts(), full(length=5)
    ids[:, 0] = DEC
    mask, there = ids != 0, torch.ones_like(read, dtype=torch.bool)
    there[1, 3:] = False
    how = {} if kind is DecoderLM else {"prompt": read, "prompt_mask": there}
    logs, asked = scores(model, ids, None, **how).log_softmax(-1), []
    for b in range(B):
        length = int(mask[b].sum())
        asked += [-logs[b, t, ids[b, t + 1]] for t in range(length - 1)]  # the [SEP] included, padding never
    assert len(asked) == 7 + 4 + 3 - 3
    given = (read, there) if how else ()
    loss = language_loss(model, ids, mask, *given)
    close(loss, torch.stack(asked).mean())
    close(language_loss(model, torch.where(mask, ids, 11), mask, *given), loss)
    if how:
        assert abs(language_loss(model, ids, mask, read, torch.ones_like(there)) - loss) > 1e-4
        close(language_loss(model, ids, mask, torch.where(there, read, 11), there), loss)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_first_loss_is_that_of_guessing(kind):
    model = build(RECIPES[kind])
    assert type(model) is {"decoder-only": DecoderLM, "encoder-decoder": EncoderDecoderLM, "words": BLIP2}[kind]
    with torch.no_grad():
        loss = language_loss(model, *LanguageBatches(RECIPES[kind], seed=0)(0))
    assert loss.item() == pytest.approx(math.log(words().vocab_size), abs=0.1)


@pytest.mark.parametrize("kind", RECIPES)
def test_learning(kind):
    recipe = replace(RECIPES[kind], steps=12)
    model, history = learn_language(recipe, seed=1, progress=None)
    assert model.config == recipe.model and history.steps == 12
    losses = history.losses["loss"]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3 and all(map(math.isfinite, losses))
    seed_everything(1)
    with torch.no_grad():  # model and batches are those of the seed
        first = language_loss(build(recipe), *LanguageBatches(recipe, seed=1)(0))
    assert losses[0] == pytest.approx(first.item(), abs=1e-5)
    again, other = (learn_language(recipe, seed=seed, progress=None)[0] for seed in (1, 2))
    assert digest(again) == digest(model) != digest(other)


def test_words_learn_without_queries_and_pictures():
    """A Q-Former's words alone, in BERT's place: there is no eye, and nothing that queries own learns anything."""
    recipe = RECIPES["words"]
    model, batch = build(recipe), LanguageBatches(recipe, seed=0)(0)
    assert model.eye is None
    language_loss(model, *batch).backward()
    learnt = touched(model)
    assert {name for name in learnt if not name.startswith("lm_head")} == {
        name for name, _ in model.qformer.named_parameters(prefix="qformer")
        if not any(part in name for part in ("query", "cross"))
    }  # fmt: skip
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnt)


def test_ready_made_parts_are_kept_and_found(tmp_path, monkeypatch):
    kept = {kind: replace(recipe, steps=2) for kind, recipe in RECIPES.items()}
    for module in (language, train):
        monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(language, "READY_MADE", kept)
    with pytest.raises(CheckpointError):
        language.ready_made("words")
    language.main()
    assert {path.stem for path in (tmp_path / "checkpoints").iterdir()} == set(kept)
    for kind, recipe in kept.items():
        model, expected = language.ready_made(kind), learn_language(recipe, seed=0, progress=None)[0]
        assert not model.training and type(model) is type(expected)
        for (name, ours), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(ours, theirs.half().float()), name
    assert READY_MADE["mouth_worse"] == replace(READY_MADE["mouth"], steps=500) != READY_MADE["mouth"]


# --- measuring -------------------------------------------------------------------------------------------------------


ASKED = ["what is the green thing?", "is this in the snow?", "how many cats are there?", "is this in the desert?"]
STORIES = ["a green tree in the snow", "a cat at night", "two small cats", "a red ball on the beach"]


def a_mouth(kind: str) -> nn.Module:
    return shake(build(RECIPES[kind]))


def test_prompts_by_hand():
    sep, dec = words().sep_id, words().dec_id
    pairs = list(zip(ASKED, STORIES, strict=True))
    decoder, encoder = (a_mouth(kind) for kind in ("decoder-only", "encoder-decoder"))
    assert language.prompts_of(decoder, ASKED) == [spelled(dec, q) for q in ASKED]
    assert language.prompts_of(decoder, ASKED, STORIES) == [spelled(dec, s, sep, dec, q) for q, s in pairs]
    assert language.prompts_of(encoder, ASKED) == [spelled(q) for q in ASKED]
    assert language.prompts_of(encoder, ASKED, STORIES) == [spelled(s, sep, q) for q, s in pairs]


def test_rows_of_one_length_together():
    groups = language.by_length([[5, 6], [7], [8, 9], [4, 4, 4], [3]])
    assert [(at, ids.tolist()) for at, ids in groups] == [([0, 2], [[5, 6], [8, 9]]), ([1, 4], [[7], [3]]),
                                                          ([3], [[4, 4, 4]])]  # fmt: skip


@pytest.mark.parametrize("kind", MOUTHS)
@torch.no_grad()
def test_answers_are_written_after_each_prompt(kind):
    """One by one, without cache and batch, they are the same."""
    model, given = a_mouth(kind).train(), torch.randn(4, P, 16)
    prompts, first = language.prompts_of(model, ASKED, STORIES), torch.tensor([words().dec_id])
    assert len({len(prompt) for prompt in prompts}) > 1
    for before in (None, given):
        found = language.answers_after(model, prompts, prefix=before, longest=5)
        assert model.training  # as it was
        for i, prompt in enumerate(prompts):
            start, ids = None if before is None else before[i : i + 1], torch.tensor([prompt])
            if kind == "decoder-only":
                decoder = Anew(lambda new, start=start, ids=ids: scores(model, torch.cat([ids[:, :-1], new], 1), start))
                said = greedy(decoder, ids[:, -1], end=words().sep_id, longest=5)
            else:
                said = greedy(anew(model, start, prompt=ids), first, end=words().sep_id, longest=5)
            assert found[i] == words().decode(said[0])
        assert len(set(found)) > 1


@pytest.mark.parametrize("kind", MOUTHS)
def test_what_share_is_answered(kind, monkeypatch):
    """Of the questions about new scenes; other captions are no questions."""
    model, held = a_mouth(kind), tellings.__wrapped__(7, first=900_000)
    asked = [(story, prompt, answer) for story, items in held for prompt, answer in items if prompt]
    given = []

    def knows(model: nn.Module, prompts: list[list[int]]) -> list[str]:
        given.append(prompts)
        return [answer if i % 3 else "a cat" for i, (_, _, answer) in enumerate(asked)]

    monkeypatch.setattr(language, "answers_after", knows)
    right = sum(bool(i % 3) for i in range(len(asked)))
    for told in (True, False):
        assert language.answered(model, n=7, told=told) == pytest.approx(right / len(asked))
        stories = [story for story, _, _ in asked] if told else None
        assert given.pop() == language.prompts_of(model, [prompt for _, prompt, _ in asked], stories)
    assert {"a cat"}.isdisjoint(answer for _, _, answer in asked)


@pytest.mark.parametrize("kind", MOUTHS)
def test_fluency_on_new_scenes(kind):
    recipe, model = RECIPES[kind], a_mouth(kind).train()
    batches = LanguageBatches(recipe, seed=0, told=tellings(32, first=900_000))
    with torch.no_grad():
        expected = [language_loss(model, *batches(step)).item() for step in range(8)]
    assert language.fluency(model, recipe, n=32) == pytest.approx(sum(expected) / 8) and model.training
