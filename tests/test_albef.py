"""ALBEF: who sees whom, three questions and where their gradients go, and the teacher that follows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tower_helpers
from torch import Tensor, nn
from tower_helpers import close

from minivlp.data.text import DEFAULT_VOCAB_SIZE
from minivlp.layers import MLP, Encoder, count_parameters
from minivlp.losses import IGNORE, distilled_contrastive_loss, distilled_lm_loss, hard_negatives
from minivlp.models.albef import (
    ALBEF,
    TEMPERATURES,
    ALBEFConfig,
    FusionBlock,
    MomentumALBEF,
    PairQueue,
    TextEncoder,
    belong,
    clamp_temperature,
    follow,
    paper_config,
    start_from_vit,
    teacher_of,
)
from minivlp.models.dual_stream import CoAttentionLayer, CrossAttention
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import fit, load_weights, parameter_groups, save_weights

torch.set_num_threads(1)

# No two sizes alike, so that none can stand in for another.
SMALL = ALBEFConfig(
    image_size=16, patch_size=4, image_width=24, image_depth=2, image_heads=2, vocab_size=30, max_text=9,
    text_width=16, text_depth=2, fusion_depth=3, text_heads=4, embed_dim=20,
)  # fmt: skip
B, L, S, D, HEADS = 3, 7, 17, SMALL.text_width, SMALL.text_heads  # a class token and 16 patches
LENGTHS = torch.tensor([7, 4, 3])
MASK = torch.arange(L) < LENGTHS[:, None]
CLS, SEP, HIDDEN = 2, 3, 1  # ids of the small vocabulary; words from 4 up, 0 is padding


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def apart(a: Tensor, b: Tensor, least: float = 0.01) -> bool:
    return (a - b).abs().max().item() > least


def shake(module: nn.Module, std: float = 0.2) -> nn.Module:
    return tower_helpers.shake(module, std, but="temp")  # which must stay positive


def shaken(config: ALBEFConfig = SMALL, std: float = 0.2) -> ALBEF:
    return shake(ALBEF(config), std)


def pictures(count: int = B) -> Tensor:
    return torch.rand(count, 3, SMALL.image_size, SMALL.image_size) * 2 - 1


def texts() -> Tensor:
    """Ids of three texts of 7, 4 and 3 tokens."""
    ids = torch.randint(4, 30, (B, L)).masked_fill(~MASK, 0)
    ids[:, 0], ids[torch.arange(B), LENGTHS - 1] = CLS, SEP
    return ids


def other_word(ids: Tensor, place: int) -> Tensor:
    """The texts with another word at one place."""
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


def differs(a: Tensor, b: Tensor, least: float = 1e-4) -> list[bool]:
    """Which entries of a batch differ."""
    return ((a - b).abs().flatten(1).amax(1) > least).tolist()


def touched(model: nn.Module) -> set[str]:
    """The names of the parameters that got a gradient, tied ones once."""
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-8}


# --- sizes and configs -----------------------------------------------------------------------------------------------


def test_published_sizes():
    """ViT-B/16 has 85.8M parameters; BERT-base with cross-attention in its upper half and its MLM head 123.7M."""
    with torch.device("meta"):
        model = ALBEF(paper_config())
    assert count_parameters(model.vision) == 85_844_736  # of which 257 positions: at 224 pixels there would be 197
    bert = count_parameters(nn.ModuleList([model.text, model.mlm_head]))  # the tied table once
    assert bert == 123_696_186 and round(bert / 1e6, 1) == 123.7
    assert count_parameters(model.text) == 123_073_536
    cross = sum(count_parameters(block.cross) for block in model.text.fusion_blocks)
    assert cross == 6 * (4 * (768 * 768 + 768) + 2 * 768) == 14_183_424
    heads = (768 + 1) * 256 * 2 + (768 + 1) * 2 + 1  # two projections, matching, the temperature
    assert count_parameters(model) == 85_844_736 + bert + heads == 209_936_189
    assert len(model.text.text_blocks) == len(model.text.fusion_blocks) == 6
    assert model.vision.embed.pos_embed.shape == (1, 257, 768)
    with torch.device("meta"):  # the teacher has all but the matching head
        assert count_parameters(teacher_of(model)) == count_parameters(model) - (768 + 1) * 2


def test_the_default_fits_the_courses_vocabulary():
    c = ALBEFConfig()
    assert c.vocab_size == DEFAULT_VOCAB_SIZE and c.temperature == 0.07 and c.pad_id == 0
    assert c.image_config() == ViTConfig()  # so that lesson 01's ViT can be taken over


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(image_size=18), "image_size 18 is not a multiple of patch_size 4"),
        (dict(image_heads=5), "image_width 24 is not a multiple of image_heads 5"),
        (dict(text_heads=3), "text_width 16 is not a multiple of text_heads 3"),
        (dict(fusion_depth=0), "fusion_depth=0: choose at least 1, or no word ever sees the picture"),
        (dict(temperature=0.0), "temperature=0.0: choose a positive one, similarities are divided by it"),
        (dict(temperature=-0.07), "temperature=-0.07: choose a positive one, similarities are divided by it"),
        (dict(temperature=float("nan")), "temperature=nan: choose a positive one, similarities are divided by it"),
    ],
)
def test_configs_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **option)


def test_the_smallest_that_can_be():
    model = ALBEF(replace(SMALL, text_depth=0, fusion_depth=1, temperature=1))
    assert model.temp.item() == 1 and model.temp.dtype == torch.float32
    assert model(pictures(), texts(), MASK)["match"].shape == (B, 2)


def test_options_arrive_everywhere():
    model = ALBEF(replace(SMALL, mlp_ratio=3, dropout=0.3, image_eps=0.5, text_eps=0.25, temperature=0.2))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    eps = {part: {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}
           for part, module in model.named_children()}  # fmt: skip
    assert eps["vision"] == {0.5} and eps["text"] == eps["mlm_head"] == {0.25}
    assert {m.fc1.out_features / m.fc1.in_features for m in model.modules() if isinstance(m, MLP)} == {3}
    assert [m.heads for m in model.vision.modules() if hasattr(m, "heads")] == [2] * 2
    assert [m.heads for m in model.text.modules() if hasattr(m, "heads")] == [4] * (2 + 3 * 2)
    assert model.temp.item() == pytest.approx(0.2)


# --- a block in which words ask the picture --------------------------------------------------------------------------


def fusion() -> tuple[FusionBlock, Tensor, Tensor]:
    """A block, words (B, L, D) and a picture's states (B, S, D') of another width."""
    return shake(FusionBlock(D, HEADS, context_width=24)), torch.randn(B, L, D), torch.randn(B, S, 24)


KEYS = MASK[:, None, None, :]


@torch.no_grad()
def test_words_look_at_words_then_at_the_picture_then_each_works_alone():
    block, x, image = fusion()
    n1, n2, n3, mlp = block.norm1, block.cross.norm, block.norm2, block.mlp

    def look(x: Tensor) -> Tensor:
        return block.attn(x, mask=KEYS)[0]

    def ask(x: Tensor) -> Tensor:
        return block.cross.attn(x, image)[0]

    a = n1(x + look(x))
    b = n2(a + ask(a))
    expected = n3(b + mlp(b))
    got, nothing = block(x, image, mask=MASK[:, None, None])
    close(got, expected)
    assert nothing is None
    first = n2(x + ask(x))
    late = n1(first + look(first))
    early = n3(a + mlp(a))
    pre = x + block.attn(n1(x), mask=KEYS)[0]
    pre = pre + ask(n2(pre))
    both = n2(n1(x + look(x) + ask(x)))
    wrong = {
        "the picture first": n3(late + mlp(late)),
        "the MLP before the picture": n2(early + ask(early)),
        "pre-norm": pre + mlp(n3(pre)),
        "words and picture at once": n3(both + mlp(both)),
        "nothing kept when asking": n3(n2(ask(a)) + mlp(n2(ask(a)))),
        "no LayerNorm after asking": n3(a + ask(a) + mlp(a + ask(a))),
        "asked with the old words": n3(n2(a + ask(x)) + mlp(n2(a + ask(x)))),
        "the picture is not asked": early,
        "words are not asked": n3(first + mlp(first)),
        "no class token": block(x, image[:, 1:], mask=KEYS)[0],
        "padding is seen": block(x, image)[0],
    }
    for name, other in wrong.items():
        assert apart(other[1], got[1], 0.05), name
    shared = CrossAttention(D, HEADS)  # with the text's width for keys and values the picture would not fit
    assert block.cross.attn.kv.weight.shape == (2 * D, 24) and shared.attn.kv.weight.shape == (2 * D, D)


@torch.no_grad()
def test_rows_compute_the_first_words_alone():
    block, x, image = fusion()
    everyone, weights = block(x, image, mask=KEYS, need_weights=True)
    for rows in (1, 3):
        entered = []
        hook = block.mlp.register_forward_pre_hook(lambda _, inputs, seen=entered: seen.append(inputs[0].shape[1]))
        some, looked = block(x, image, mask=KEYS, rows=rows, need_weights=True)
        hook.remove()
        close(some, everyone[:, :rows])
        close(looked, weights[:, :, :rows])
        assert entered == [rows]  # no more work than that
        alone = block(x[:, :rows], image, mask=KEYS[..., :rows])[0]
        assert apart(alone, some)  # they still see all other words


@torch.no_grad()
def test_the_weights_say_where_each_word_looks_in_the_picture():
    block, x, image = fusion()
    plain = block(x, image, mask=KEYS)[0]
    got, weights = block(x, image, mask=KEYS, need_weights=True)
    close(got, plain)
    assert weights.shape == (B, HEADS, L, S) and weights.min() > 0  # every patch, by every word, padded ones too
    close(weights.sum(-1), torch.ones(B, HEADS, L))
    attn = block.cross.attn
    asking = block.norm1(x + block.attn(x, mask=KEYS)[0])
    q = attn.q(asking).view(B, L, HEADS, D // HEADS)
    k = (image @ attn.kv.weight[:D].T + attn.kv.bias[:D]).view(B, S, HEADS, D // HEADS)
    scores = torch.einsum("blhd,bshd->bhls", q, k) / (D // HEADS) ** 0.5
    close(weights, scores.softmax(-1))
    assert apart(weights, scores.softmax(-2))  # patches that choose among the words: the other direction
    assert apart(weights, torch.full_like(weights, 1 / S))


@torch.no_grad()
def test_a_block_reads_its_own_words_and_its_own_picture():
    block, x, image = fusion()
    run = partial(block, mask=KEYS)
    before = run(x, image)[0]
    for b in range(B):
        close(block(x[b : b + 1, : LENGTHS[b]], image[b : b + 1])[0][0], before[b, : LENGTHS[b]])
    for place in range(S):  # the class token and every patch
        changed = image.clone()
        changed[1, place] += torch.randn(24)
        assert differs(run(x, changed)[0], before) == [False, True, False], place
    for place, seen in ((2, True), (4, False)):  # a word, and padding, of the second text
        changed = x.clone()
        changed[1, place] += torch.randn(D)
        after = run(changed, image)[0]
        assert ((after - before)[1, : LENGTHS[1]].abs().amax(-1) > 1e-4).all() == seen
        assert torch.equal(after[1, : LENGTHS[1]], before[1, : LENGTHS[1]]) != seen


def test_gradients_reach_the_words_the_picture_and_every_parameter():
    block, x, image = fusion()
    x.requires_grad_()
    image.requires_grad_()
    got = block(x, image, mask=KEYS)[0]
    (got[:, 0] * torch.randn(B, D)).sum().backward()  # of the class token alone
    assert image.grad.abs().amax(-1).min() > 0  # all of the picture taught by it
    assert torch.equal(x.grad.abs().amax(-1) > 0, MASK)
    for name, parameter in block.named_parameters():
        if not name.endswith("kv.bias"):  # its key half cancels in the softmax
            assert parameter.grad.abs().max() > 1e-4, name


# --- the text encoder ------------------------------------------------------------------------------------------------


def text_encoder() -> tuple[TextEncoder, Tensor, Tensor]:
    """An encoder, ids (B, L) and a picture's states (B, S, D')."""
    return shake(TextEncoder(SMALL)), texts(), torch.randn(B, S, 24)


@torch.no_grad()
def test_reading_is_berts_lower_half():
    text, ids, _ = text_encoder()
    bert = Encoder(D, 2, HEADS, eps=SMALL.text_eps, norm="post").eval()
    bert.blocks.load_state_dict(text.text_blocks.state_dict())
    states = text.read(ids, MASK)
    close(states, bert(text.embed(ids), mask=KEYS)[0])
    pre = Encoder(D, 2, HEADS, eps=SMALL.text_eps).eval()
    pre.blocks.load_state_dict(text.text_blocks.state_dict())
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    wrong = {
        "padding is seen": bert(text.embed(ids))[0],
        "pre-norm": pre(text.embed(ids), mask=KEYS)[0],
        "from left to right": bert(text.embed(ids), mask=KEYS & causal)[0],
        "one block": text.text_blocks[0](text.embed(ids), mask=KEYS)[0],
    }
    for name, other in wrong.items():
        assert apart(other[1:, :3], states[1:, :3], 0.05), name
    assert list(inspect.signature(text.read).parameters) == ["ids", "mask"]  # there is no way in for a picture
    assert not any(isinstance(m, CrossAttention) for m in text.text_blocks.modules())


@pytest.mark.parametrize("rows", [None, 1])
@torch.no_grad()
def test_padding_changes_nothing(rows):
    text, ids, image = text_encoder()
    modes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "read": lambda ids, mask: text.read(ids, mask)[:, :rows],
        "both": lambda ids, mask: text(ids, mask, image[: len(ids)], rows=rows)[0],
    }
    for name, run in modes.items():
        before, real = run(ids, MASK), MASK[:, :rows]
        after = run(torch.where(MASK, ids, 11), MASK)
        assert torch.equal(after[real], before[real]), name
        longer = run(F.pad(ids, (0, 2), value=11), F.pad(MASK, (0, 2)))[:, :L]
        close(longer[real], before[real])
        seen = run(torch.where(MASK, ids, 11), torch.ones_like(MASK))
        assert differs(seen[:, :1], before[:, :1]) == [False, True, True], name  # words at those places do count
        for place in (1, LENGTHS.min() - 1):
            assert all(differs(run(other_word(ids, place), MASK)[:, :1], before[:, :1])), name
    for b, length in enumerate(LENGTHS):  # nor does the company
        alone = text(ids[b : b + 1, :length], MASK[b : b + 1, :length], image[b : b + 1], rows=rows)[0]
        close(alone[0], text(ids, MASK, image, rows=rows)[0][b, :length])


@torch.no_grad()
def test_reading_and_fusing_is_the_whole_to_the_last_bit():
    text, ids, image = text_encoder()
    states = text.read(ids, MASK)
    for how in ({}, dict(rows=1), dict(everything=True), dict(rows=2, everything=True)):
        whole, halves = text(ids, MASK, image, **how), text.fuse(states, MASK, image, **how)
        assert torch.equal(whole[0], halves[0]) and whole[1].keys() == halves[1].keys()
        assert all(torch.equal(whole[1][name], halves[1][name]) for name in whole[1])
    whole = text(ids, MASK, image)[0]
    wrong = {
        "nothing read": text.fuse(text.embed(ids), MASK, image)[0],
        "read twice": text.fuse(text.read(ids, MASK).flip(1), MASK, image)[0],
        "other words": text(other_word(ids, 1), MASK, image)[0],
        "other pictures": text(ids, MASK, image.flip(0))[0],
        "not fused": states,
    }
    for name, other in wrong.items():
        assert apart(other[:, 0], whole[:, 0], 0.05), name


@torch.no_grad()
def test_rows_and_everything_give_the_same_numbers():
    text, ids, image = text_encoder()
    everyone, nothing = text(ids, MASK, image)
    assert everyone.shape == (B, L, D) and nothing == {}
    entered = []
    for block in text.fusion_blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[1]))
    close(text(ids, MASK, image, rows=1)[0], everyone[:, :1])
    assert entered == [L, L, 1]  # in the last block alone
    states, named = text(ids, MASK, image, everything=True)
    close(states, everyone)
    assert {name: tuple(w.shape) for name, w in named.items()} == {f"cross_{i}": (B, HEADS, L, S) for i in range(3)}
    x = text.read(ids, MASK)
    for i, block in enumerate(text.fusion_blocks):
        x, weights = block(x, image, mask=KEYS, need_weights=True)
        close(named[f"cross_{i}"], weights)
    close(x, states)


def what_blocks_see(text: TextEncoder, ids: Tensor, image: Tensor) -> list[Tensor]:
    """The picture's states as each cross-attention is given them."""
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
             for m in text.modules() if isinstance(m, CrossAttention)]  # fmt: skip
    text(ids, MASK, image)
    for hook in hooks:
        hook.remove()
    return seen


class BothWays(TextEncoder):
    """A wrong version: pictures read words too, as in ViLBERT."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config)
        self.fusion_blocks = nn.ModuleList(CoAttentionLayer(D, 24, 4) for _ in range(3))

    def fuse(self, states: Tensor, mask: Tensor, image: Tensor, **_: object) -> tuple[Tensor, dict[str, Tensor]]:
        for block in self.fusion_blocks:
            states, image, _ = block(states, image, text_mask=mask)
        return states, {}


@torch.no_grad()
def test_the_picture_answers_and_hears_nothing():
    text, ids, image = text_encoder()
    kept = image.clone()
    seen = what_blocks_see(text, ids, image)
    assert len(seen) == 3 and all(states is image for states in seen)  # the last block sees what the first one saw
    assert torch.equal(image, kept)
    wrong = shake(BothWays(SMALL))
    theirs = [states for states in what_blocks_see(wrong, ids, image) if states.shape == image.shape]
    others = [states for states in what_blocks_see(wrong, other_word(ids, 1), image) if states.shape == image.shape]
    assert len(theirs) == 3 and apart(theirs[-1], image) and apart(theirs[-1], others[-1])


def test_every_block_of_the_upper_half_asks_and_none_of_the_lower():
    text, ids, image = text_encoder()
    asking = [name for name, m in text.named_modules() if isinstance(m, CrossAttention)]
    assert asking == [f"fusion_blocks.{i}.cross" for i in range(3)]
    image.requires_grad_()
    before = text(ids, MASK, image)[0]
    weight = torch.randn(B, D)
    whole = torch.autograd.grad((before[:, 0] * weight).sum(), image)[0]
    for block in text.fusion_blocks:
        dark = block.cross.register_forward_pre_hook(lambda _, inputs: (inputs[0], 0 * inputs[1].detach()))
        without = text(ids, MASK, image)[0]
        assert all(differs(without[:, 0], before[:, 0], 0.01))
        part = torch.autograd.grad((without[:, 0] * weight).sum(), image)[0]
        assert part.abs().max() > 1e-4 and apart(part, whole, 1e-4)  # the others still see it
        dark.remove()
    close(text(ids, MASK, image)[0], before, 0)


# --- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shapes_and_names():
    model, images, ids = shaken(), pictures(), texts()
    out = model(images, ids, MASK)
    shapes = {name: tuple(tensor.shape) for name, tensor in out.items()}
    assert shapes == {"image": (B, S, 24), "text": (B, L, D), "image vector": (B, 20), "text vector": (B, 20),
                      "match": (B, 2)}  # fmt: skip
    close(out["image"], model.vision(images), 0)
    close(out["text"], model.text.read(ids, MASK), 0)
    close(out["image vector"], model.image_vector(out["image"]), 0)
    close(out["text vector"], model.text_vector(out["text"]), 0)
    close(out["match"], model.match(out["text"], MASK, out["image"]), 0)
    close(out["match"], model.itm_head(model.text(ids, MASK, out["image"])[0][:, 0]))
    assert model.mlm_head(model.text(ids, MASK, out["image"])[0]).shape == (B, L, 30)


@torch.no_grad()
def test_each_output_depends_on_what_it_should():
    """A new picture and a new text for the second pair: the vectors each know one of them, the match both."""
    model, images, ids = shaken(), pictures(), texts()
    before = model(images, ids, MASK)
    other = images.clone()
    other[1] = pictures(1)[0]
    words = ids.clone()
    words[1] = other_word(ids, 1)[1]
    new_picture, new_text = model(other, ids, MASK), model(images, words, MASK)
    second = [False, True, False]
    for name in ("image", "image vector", "match"):
        assert differs(new_picture[name], before[name]) == second, name
    for name in ("text", "text vector", "match"):
        assert differs(new_text[name], before[name]) == second, name
    for name in ("text", "text vector"):
        assert torch.equal(new_picture[name], before[name])
    for name in ("image", "image vector"):
        assert torch.equal(new_text[name], before[name])


@torch.no_grad()
def test_vectors_are_those_of_the_class_tokens_and_have_length_one():
    model, images, ids = shaken(), pictures(), texts()
    out = model(images, ids, MASK)
    for kind, project in (("image", model.vision_proj), ("text", model.text_proj)):
        states, vector = out[kind], out[f"{kind} vector"]
        raw = states[:, 0] @ project.weight.T + project.bias
        close(vector, raw / raw.square().sum(-1, keepdim=True).sqrt())
        close(vector.norm(dim=-1), torch.ones(B))
        wrong = {
            "not of length 1": raw,
            "no bias": F.normalize(states[:, 0] @ project.weight.T, dim=-1),
            "last token": F.normalize(project(states[:, -1]), dim=-1),
            "mean": F.normalize(project(states.mean(1)), dim=-1),
            "length 1 over the batch": F.normalize(raw, dim=0),
            "through a tanh": F.normalize(torch.tanh(raw), dim=-1),
        }
        for name, other in wrong.items():
            assert apart(other, vector, 0.02), (kind, name)
    fused = F.normalize(model.text_proj(model.text(ids, MASK, out["image"])[0][:, 0]), dim=-1)
    assert apart(fused, out["text vector"], 0.05)  # made before the words see any picture


@pytest.mark.parametrize("pad_id", [0, 29])
@torch.no_grad()
def test_encoding_alone_is_the_same_and_hides_padding(pad_id):
    model, images, ids = shaken(replace(SMALL, pad_id=pad_id)), pictures(), texts()
    ids = ids.masked_fill(~MASK, pad_id)
    out, ran = model(images, ids, MASK), []
    for block in model.text.fusion_blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(True))
    close(model.encode_image(images), out["image vector"], 0)
    vectors = model.encode_text(ids)
    close(vectors, out["text vector"], 0)
    close(model.encode_text(F.pad(ids, (0, 2), value=pad_id)), vectors)
    for b, length in enumerate(LENGTHS):
        close(model.encode_text(ids[b : b + 1, :length])[0], vectors[b])
    assert not ran  # no pictures are needed for words
    seen = model.text_vector(model.text.read(ids, torch.ones_like(MASK)))
    assert differs(vectors, seen, 0.01) == [False, True, True]
    other = model.encode_text(ids.masked_fill(~MASK, 29 - pad_id))  # the other model's padding is a word here
    assert differs(vectors, other, 0.01) == [False, True, True]


@torch.no_grad()
def test_the_match_is_read_at_the_class_token():
    model, images, ids = shaken(), pictures(), texts()
    image, text = model.vision(images), model.text.read(ids, MASK)
    fused, _ = model.text.fuse(text, MASK, image)
    scores = model.match(text, MASK, image)
    close(scores, model.itm_head(fused[:, 0]))
    for other in (fused[:, 1], fused[torch.arange(B), LENGTHS - 1], fused.mean(1), text[:, 0]):
        assert apart(model.itm_head(other), scores, 0.02)
    wrong_pairs = model.match(text, MASK, image.roll(1, 0))  # states are encoded once and combined at will
    for b in range(B):
        pair = model(images[b - 1 : b or None], ids[b : b + 1], MASK[b : b + 1])["match"]
        close(pair[0], wrong_pairs[b])
    assert all(differs(wrong_pairs, scores))


@pytest.mark.parametrize("output", ["image", "text", "image vector", "text vector", "match"])
def test_gradients_of_each_output(output):
    """Through the whole model: the match teaches both encoders, each vector its own."""
    model = shaken()
    out = model(pictures(), texts(), MASK)[output]
    (out * torch.randn_like(out)).sum().backward()
    parts = {"image": ["vision"], "text": ["text.embed", "text.text_blocks"]}
    parts |= {"image vector": [*parts["image"], "vision_proj"], "text vector": [*parts["text"], "text_proj"],
              "match": [*parts["image"], *parts["text"], "text.fusion_blocks", "itm_head"]}  # fmt: skip
    expected = tuple(f"{part}." for part in parts[output])
    assert touched(model) == {name for name, _ in model.named_parameters() if name.startswith(expected)}


def tied(model: ALBEF) -> bool:
    return model.mlm_head.decoder.weight is model.text.embed.word.weight


def test_one_table_for_reading_and_for_guessing(tmp_path: Path):
    model = shaken()
    twin, table = deepcopy(model), model.text.embed.word.weight
    assert tied(model) and tied(twin) and twin.text.embed.word.weight is not table
    assert sum(p is table for p in model.parameters()) == 1
    assert count_parameters(model) == sum(v.numel() for v in model.state_dict().values()) - table.numel()
    with torch.no_grad():
        table[5] += 1
        states = torch.randn(2, D)
        head = model.mlm_head
        guess = head.norm(F.gelu(head.dense(states))) @ table.T + head.decoder.bias
    close(head(states), guess)

    other = ALBEF(SMALL)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    save_weights(model, tmp_path / "albef.safetensors")
    filed = ALBEF(SMALL)
    load_weights(filed, tmp_path / "albef.safetensors")
    images, ids = pictures(), texts()
    for again in (other.eval(), filed.eval()):
        assert tied(again)
        for name, value in model(images, ids, MASK).items():
            close(again(images, ids, MASK)[name], value, 0)
        assert not again.load_state_dict(model.state_dict(), strict=True).missing_keys
    # Equal numbers are not one table: after a step they would no longer be equal.
    loose = deepcopy(model)
    loose.mlm_head.decoder.weight = nn.Parameter(loose.text.embed.word.weight.detach().clone())
    assert not tied(loose) and torch.equal(loose.mlm_head.decoder.weight, loose.text.embed.word.weight)
    for one in (model, loose):
        image, words = one.vision(images), one.text.read(ids, MASK)
        F.cross_entropy(one.mlm_head(one.text.fuse(words, MASK, image)[0][MASK]), ids[MASK]).backward()
        torch.optim.SGD(one.parameters(), lr=1.0).step()
        assert torch.equal(one.mlm_head.decoder.weight, one.text.embed.word.weight) == (one is model)


# Width of the text -> deviation of the matrices: BERT's at its own width, twice that at a quarter of it.
@pytest.mark.parametrize(("width", "deviation"), [(768, 0.02), (192, 0.04), (128, 0.0489898)])
def test_initial_values(width, deviation):
    """Matrices N(0, 0.02) at the paper's width, and wider in a narrower model. Tables, class token and positions always
    N(0, 0.02), biases 0, LayerNorms the identity."""
    c = ALBEFConfig(image_width=96, image_depth=2, text_width=width, text_depth=1, fusion_depth=2, embed_dim=60)
    model = ALBEF(c)

    def spread(weight: Tensor, name: str, deviation: float = 0.02) -> None:
        """The deviation of independent numbers, within four and a half times its own error."""
        assert weight.std().item() == pytest.approx(deviation, rel=4.5 / (2 * weight.numel()) ** 0.5), name
        assert abs(weight.mean().item()) < 4.5 * deviation / weight.numel() ** 0.5, name

    matrices, table = 0, model.text.embed.word.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            tied = module.weight is table  # the decoder's matrix is the table, and starts as one
            spread(module.weight, name, 0.02 if tied else deviation)
            assert not module.bias.any(), name
            matrices += 1
        if isinstance(module, nn.Embedding):
            spread(module.weight, name)
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    vision = model.vision.embed
    spread(vision.pos_embed, "positions")
    assert vision.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
    block, cross = 5, 3  # q, kv, proj, fc1, fc2; q, kv, proj
    assert matrices == 1 + 2 * block + 1 * block + 2 * (block + cross) + 2 + 1 + 2
    assert model.temp.item() == pytest.approx(0.07)


def test_same_seed_same_model():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(ALBEF(SMALL).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        constant = name == "temp" or name.endswith("bias") or "norm" in name
        assert torch.equal(value, models[2][name]) == constant, name


@torch.no_grad()
def test_dropout_is_at_work_in_training_alone():
    model, images, ids = shaken(replace(SMALL, dropout=0.3)), pictures(), texts()
    one, two = model(images, ids, MASK), model(images, ids, MASK)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = model.train()(images, ids, MASK), model(images, ids, MASK)
    assert all(apart(one[name], two[name]) for name in one)


# --- the temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [(-3.0, 0.001), (0.0, 0.001), (0.0009, 0.001), (0.07, 0.07), (0.5, 0.5), (0.6, 0.5), (9, 0.5)]
)
def test_clamp_temperature(before, after):
    model = ALBEF(SMALL)
    others = {name: p.clone() for name, p in model.named_parameters() if name != "temp"}
    parameter, images = model.temp, pictures()
    with torch.no_grad():
        parameter.fill_(before)
    clamp_temperature(model)
    assert model.temp is parameter and parameter.item() == pytest.approx(after) and parameter.requires_grad
    assert parameter.grad_fn is None and TEMPERATURES == (0.001, 0.5)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name != "temp")
    (model.image_vector(model.vision(images)).sum() / model.temp).backward()  # it goes on learning
    assert parameter.grad.isfinite()
    clamp_temperature(model, 7)  # called with the step it is a hook of `fit`
    assert parameter.item() == pytest.approx(after)


@pytest.mark.parametrize(("direction", "edge"), [(1, 0.001), (-1, 0.5)])
def test_the_clamp_works_after_every_step_of_training(direction, edge):
    model, seen = ALBEF(SMALL), []

    def run(*hooks: Callable) -> None:
        fit(model, lambda step: (torch.zeros(1),), lambda model, _: direction * model.temp, steps=8, lr=0.5,
            warmup=0, after_step=[*hooks, lambda model, _: seen.append(model.temp.item())], progress=None)  # fmt: skip

    run(clamp_temperature)
    assert seen == [pytest.approx(edge)] * 8
    run()
    assert not TEMPERATURES[0] <= seen[-1] <= TEMPERATURES[1]  # without it


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_is_a_copy_without_the_matching_head():
    student = shaken()
    student(pictures(), texts(), MASK)["match"].sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    teacher = teacher_of(student)
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    assert own.keys() - theirs.keys() == {"itm_head.weight", "itm_head.bias"} and not theirs.keys() - own.keys()
    assert not hasattr(teacher, "itm_head") and hasattr(teacher, "mlm_head") and hasattr(teacher, "vision_proj")
    for name, weight in theirs.items():
        assert torch.equal(weight, own[name]) and not weight.requires_grad and weight.grad is None, name
        assert weight.data_ptr() != own[name].data_ptr(), name
    assert tied(teacher) and teacher.config == student.config
    # And the student is as it was.
    assert hasattr(student, "itm_head") and all(p.requires_grad for p in student.parameters())
    assert all(p.grad is gradients[name] for name, p in student.named_parameters())
    images, ids = pictures(), texts()
    states = teacher.text.read(ids, MASK)
    close(teacher.image_vector(teacher.vision(images)), student.image_vector(student.vision(images)), 0)
    with pytest.raises(AttributeError, match="itm_head"):
        teacher.match(states, MASK, teacher.vision(images))


def test_teacher_and_student_go_their_own_ways():
    student = shaken()
    teacher = teacher_of(student)
    for changed, other in ((student, teacher), (teacher, student)):
        before = {name: p.clone() for name, p in other.named_parameters()}
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter += 1
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
        assert tied(changed) and tied(other)
    wrong = copy(student)  # a shallow one: another name for the same weights
    with torch.no_grad():
        student.temp += 1
    assert wrong.temp.item() == student.temp.item() != teacher.temp.item()


MOMENTA = [0.0, 0.3, 0.995, 1.0]


def two_models() -> tuple[ALBEF, ALBEF]:
    """A student, and a teacher that is far from it in every number."""
    student = shaken()
    teacher = teacher_of(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += torch.randn_like(parameter)
    return student, teacher


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_teacher_follows_by_the_formula(momentum):
    student, teacher = two_models()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    own = {name: p.detach().clone() for name, p in student.named_parameters()}
    objects = {name: id(p) for name, p in teacher.named_parameters()}
    follow(teacher, student, momentum)
    assert len(before) == len(own) - 2 and "temp" in before
    for name, weight in teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * own[name]
        close(weight, expected, 1e-6)
        assert not weight.requires_grad and weight.grad_fn is None and id(weight) == objects[name], name
        if momentum == 0.3:
            for wrong in (0.7 * before[name] + 0.3 * own[name], before[name] + 0.7 * own[name], own[name]):
                assert apart(weight, wrong), name
        if momentum in (0, 1):
            assert torch.equal(weight, before[name] if momentum else own[name]), name
    for name, weight in student.named_parameters():  # never the other way round
        assert torch.equal(weight, own[name]) and weight.requires_grad and weight.grad is None, name
    assert tied(teacher) and tied(student)


def test_following_again_and_again_comes_near():
    """After n steps momentum ** n of the distance is left, of the tied table as well (once a step, not twice)."""
    student, teacher = two_models()
    pairs = [(dict(teacher.named_parameters())[name], p) for name, p in student.named_parameters()
             if not name.startswith("itm_head")]  # fmt: skip
    distances = [(ours - theirs).detach().clone() for ours, theirs in pairs]
    for _ in range(10):
        follow(teacher, student, 0.9)
    for (ours, theirs), distance in zip(pairs, distances, strict=True):
        close((ours - theirs).detach(), 0.9**10 * distance, 1e-5)
    assert 0.9**20 < 0.5 * 0.9**10


def test_parameters_are_all_that_follows():
    """An ALBEF has no buffer that would be left behind. In a model with some, they stay as they are."""
    assert not dict(ALBEF(SMALL).named_buffers())
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3).requires_grad_(False)
    student.train()(torch.randn(8, 3) + 5)
    with torch.no_grad():
        student.weight.fill_(3)
    before = {name: b.clone() for name, b in teacher.named_buffers()}
    kept = {name: b.clone() for name, b in student.named_buffers()}
    follow(teacher, student, 0.5)
    assert (teacher.weight == 2).all()
    assert all(torch.equal(b, before[name]) for name, b in teacher.named_buffers())
    assert all(torch.equal(b, kept[name]) for name, b in student.named_buffers())


# --- the queue -------------------------------------------------------------------------------------------------------


def marked(*numbers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image vectors full of these numbers, text vectors of their negatives, what the pictures show, the numbers and
    100 more, and what the captions say, the numbers."""
    says = torch.tensor(numbers)
    image = says[:, None].float().expand(-1, 4)
    return image, -image, torch.stack([says, says + 100], dim=1), says


def a_queue(size: int = 6) -> PairQueue:
    return PairQueue(size, 4, captions=2)


def held(queue: PairQueue) -> list[int]:
    """What the queue holds, by number, on which all four rings must agree. 0 for a random one."""
    numbers = []
    for image, text, shows, says in zip(queue.image, queue.text, queue.shows, queue.says, strict=True):
        if says >= 0:
            assert (image == says).all() and (text == -says).all() and shows.tolist() == [says, says + 100]
        else:
            assert shows.tolist() == [-1, -1]
        numbers.append(max(0, says.item()))
    return numbers


def test_a_queue_starts_with_random_vectors_of_length_one_that_belong_to_nobody():
    queue = PairQueue(256, 20, captions=3)
    assert queue.image.shape == queue.text.shape == (256, 20)
    assert queue.shows.shape == (256, 3) and queue.says.shape == (256,) and PairQueue(5, 20).shows.shape == (5, 1)
    assert (queue.shows == -1).all() and (queue.says == -2).all() and queue.next.item() == 0
    assert queue.shows.dtype == queue.says.dtype == torch.long
    assert not belong(queue.shows, queue.says).any()  # not even to each other
    for ring in (queue.image, queue.text):
        close(ring.norm(dim=1), torch.ones(256))
        assert ring.mean(0).abs().max() < 5 * (20 * 256) ** -0.5  # in all directions
    assert apart(queue.image, queue.text, 0.1)
    torch.manual_seed(0)
    assert torch.equal(PairQueue(256, 20).image, queue.image)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_queue_of_none_keeps_nothing(count):
    queue, before = PairQueue(0, 4, captions=2), torch.zeros(())
    batch = marked(*range(1, count + 1))
    for _ in range(2):
        queue.push(*batch)
        assert queue.image.shape == queue.text.shape == (0, 4) and queue.says.shape == (0,)
        assert queue.shows.shape == (0, 2) and torch.equal(queue.next, before.long())
    # What is done with it works as with any other: the keys are the batch's own.
    _, text, shows, says = batch
    assert torch.equal(torch.cat([text, queue.text]), text)
    assert torch.equal(belong(shows, torch.cat([says, queue.says])), belong(shows, says))
    assert belong(queue.shows, says).shape == (0, count)


def test_the_queue_is_a_ring():
    queue = a_queue()
    assert held(queue) == [0] * 6
    for batch, expected, place in (
        ((1, 2), [1, 2, 0, 0, 0, 0], 2),
        ((3, 4), [1, 2, 3, 4, 0, 0], 4),
        ((5, 6), [1, 2, 3, 4, 5, 6], 0),
        ((7, 8), [7, 8, 3, 4, 5, 6], 2),  # the oldest go first
        ((9, 1), [7, 8, 9, 1, 5, 6], 4),
    ):
        queue.push(*marked(*batch))
        assert held(queue) == expected and queue.next.item() == place
    queue = a_queue(3)
    for batch in ((1, 2, 3), (4, 5, 6)):  # as many as there is room for
        queue.push(*marked(*batch))
        assert held(queue) == list(batch) and queue.next.item() == 0


@pytest.mark.parametrize(("size", "count"), [(6, 4), (6, 5), (6, 12), (3, 2)])
def test_a_queue_that_batches_do_not_fill(size, count):
    queue = a_queue(size)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    message = f"^a queue of {size} pairs cannot be filled by batches of {count}: choose a multiple of {count}$"
    with pytest.raises(ValueError, match=message):
        queue.push(*marked(*range(1, count + 1)))
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_the_queue_keeps_values_and_no_gradient():
    queue = a_queue()
    image, text, shows, says = marked(1, 2)
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    queue.push(image * 1, text * 1, shows, says)
    assert not any(buffer.requires_grad or buffer.grad_fn for buffer in queue.buffers())
    assert not list(queue.parameters()) and {name for name, _ in queue.named_buffers()} == {
        "image", "text", "shows", "says", "next"
    }  # fmt: skip
    with torch.no_grad():
        image += 5
        text -= 5
        shows += 5
        says += 5
    assert held(queue) == [1, 2, 0, 0, 0, 0]  # copies, not the batch's own tensors
    queue.push(image.bfloat16(), text.bfloat16(), shows, says)
    assert queue.image.dtype == torch.float32 and held(queue) == [1, 2, 6, 7, 0, 0]


def test_a_queue_can_be_kept_and_taken_up_again():
    queue = a_queue()
    for batch in ((1, 2), (3, 4), (5, 6), (7, 8)):
        queue.push(*marked(*batch))
    again = a_queue()
    again.load_state_dict({name: value.clone() for name, value in queue.state_dict().items()})
    for one in (queue, again):
        one.push(*marked(9, 1))
        assert held(one) == [7, 8, 9, 1, 5, 6]


def test_keys_joined_to_the_batchs_stay_what_they_were_until_backward():
    """Joining copies; a queue that is used as it is would be written over while its values are still needed."""
    queue, query = a_queue(), torch.randn(2, 4, requires_grad=True)
    own = marked(1, 2)[0]
    loss = (query @ torch.cat([own, queue.text]).T).square().sum()
    queue.push(*marked(3, 4))
    loss.backward()
    assert query.grad.abs().min() > 0
    loss = (query @ queue.text.T).square().sum()
    queue.push(*marked(5, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- who belongs together --------------------------------------------------------------------------------------------


def test_belong_by_hand():
    """Picture 0 has the captions 3 and 7, picture 1 has 5 and 8; the texts say 7, 5, 3, 9 and 8."""
    shows, says = torch.tensor([[3, 7], [5, 8]]), torch.tensor([7, 5, 3, 9, 8])
    belongs = belong(shows, says)
    assert belongs.dtype == torch.bool and belongs.tolist() == [[True, False, True, False, False],
                                                                [False, True, False, False, True]]  # fmt: skip
    assert belong(shows.flip(1), says).equal(belongs)  # in whatever order the captions stand
    assert belong(shows[:, :1], says).nonzero().tolist() == [[0, 2], [1, 1]]


def test_belong_when_captions_say_the_same():
    """Pictures 0 and 1 share what their second captions say, 4: both texts belong to both."""
    shows = torch.tensor([[1, 4], [2, 4], [3, 5]])
    assert belong(shows, shows[:, 1]).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert belong(shows, shows[:, 0]).equal(torch.eye(3, dtype=torch.bool))  # their first captions differ


def test_belong_looks_into_the_queue():
    """A vector of the queue may be another caption of the same picture; the random ones belong to nobody."""
    queue = a_queue()
    shows, says = torch.tensor([[1, 101], [2, 102]]), torch.tensor([1, 2])
    queue.push(*marked(1, 3)[:2], torch.tensor([[1, 101], [3, 103]]), torch.tensor([101, 3]))
    to_text = belong(shows, torch.cat([says, queue.says]))
    assert to_text.tolist() == [[True, False, True, *[False] * 5], [False, True, *[False] * 6]]
    to_image = belong(torch.cat([shows, queue.shows]), says).T
    assert to_image.tolist() == to_text.tolist()
    assert belong(queue.shows, queue.says).sum() == 2


# --- what is trained -------------------------------------------------------------------------------------------------


def momentum_model(config: ALBEFConfig = SMALL, *, std: float = 0.1) -> MomentumALBEF:
    """A student and a teacher that has drifted from it."""
    model = MomentumALBEF(shaken(config, std), queue_size=2 * B)
    shake(model.teacher, 0.05)
    return model


def test_only_the_student_is_trainable():
    student = ALBEF(SMALL)
    model = MomentumALBEF(student, queue_size=12, momentum=0.9)
    assert model.student is student and model.momentum == 0.9 and model.queue.image.shape == (12, 20)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"student.{name}" for name, _ in student.named_parameters()}
    groups = parameter_groups(model, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in student.parameters()}
    decayed = {id(p) for p in groups[0]["params"]}
    assert id(student.text.embed.word.weight) in decayed  # as the decoder's matrix, which it is too
    assert id(student.temp) not in decayed and id(student.vision.embed.pos_embed) not in decayed
    assert hasattr(model.student, "itm_head") and not hasattr(model.teacher, "itm_head")
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "teacher", "queue"}
    default = MomentumALBEF(student)
    assert default.queue.shows.shape == (1024, 1) and default.momentum == 0.995
    assert MomentumALBEF(student, queue_size=12, captions=3).queue.shows.shape == (12, 3)


def hide_words(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The texts with [MASK] at one word each, and the labels."""
    hidden, labels = ids.clone(), torch.full_like(ids, IGNORE)
    hidden[:, 1], labels[:, 1] = HIDDEN, ids[:, 1]
    return hidden, labels


def three_losses(
    model: MomentumALBEF, images: Tensor, ids: Tensor, noise: Tensor, *, alpha: float = 0.4
) -> dict[str, Tensor]:
    """ITC, ITM and MLM from the parts of the package (paper, 3.2 and 3.3). The batch is always the same pairs, so that
    the queue is full of their own earlier vectors, which are positives, too."""
    student, teacher, queue = model.student, model.teacher, model.queue
    mask, own = ids != 0, torch.arange(len(ids))
    hidden, labels = hide_words(ids)
    follow(teacher, student, model.momentum)
    image, text = student.vision(images), student.text.read(ids, mask)
    vectors = {"image": student.image_vector(image), "text": student.text_vector(text)}
    with torch.no_grad():
        their_image = teacher.vision(images)
        theirs = {"image": teacher.image_vector(their_image), "text": teacher.text_vector(teacher.text.read(ids, mask))}
        fused, _ = teacher.text(hidden, mask, their_image)
        opinion = teacher.mlm_head(fused[labels != IGNORE])
    positives = belong(own[:, None], torch.cat([own, queue.says]))
    itc, similarity = 0.0, {}
    for ours, others in (("image", "text"), ("text", "image")):
        keys = torch.cat([theirs[others], getattr(queue, others)]).T
        logits, teachers = vectors[ours] @ keys / student.temp, theirs[ours] @ keys / student.temp
        itc = itc + distilled_contrastive_loss(logits, teachers, alpha, positives) / 2
        similarity[ours] = logits[:, : len(ids)]
    queue.push(theirs["image"], theirs["text"], own[:, None], own)
    forbidden = torch.eye(len(ids), dtype=torch.bool)
    wrong_text = hard_negatives(similarity["image"], forbidden, noise[0])
    wrong_image = hard_negatives(similarity["text"], forbidden, noise[1])
    scores = student.match(
        text[torch.cat([own, own, wrong_text])], mask[torch.cat([own, own, wrong_text])],
        image[torch.cat([own, wrong_image, own])],
    )  # fmt: skip
    itm = F.cross_entropy(scores, (torch.arange(len(scores)) < len(ids)).long())
    fused, _ = student.text(hidden, mask, image)
    mlm = distilled_lm_loss(student.mlm_head, fused, labels, opinion, alpha)
    return {"itc": itc, "itm": itm, "mlm": mlm}


READS = ["vision.", "text.embed.", "text.text_blocks."]
REACHED = {
    "itc": [*READS, "vision_proj.", "text_proj.", "temp."],
    "itm": [*READS, "text.fusion_blocks.", "itm_head."],
    "mlm": [*READS, "text.fusion_blocks.", "mlm_head."],
}


@pytest.mark.parametrize("loss", REACHED)
def test_each_loss_reaches_its_own_parts_of_the_student_and_no_others(loss):
    model = momentum_model()
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    three_losses(model, pictures(), texts(), torch.rand(2, B))[loss].backward()
    expected = {f"student.{name}" for name in before if f"{name}.".startswith(tuple(REACHED[loss]))}
    assert touched(model) == expected
    assert len(before) > len(expected) > 30
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.student.named_parameters())


def test_the_three_losses_together_reach_all_of_the_student_and_nothing_of_the_teacher():
    model = momentum_model()
    sum(three_losses(model, pictures(), texts(), torch.rand(2, B)).values()).backward()
    assert touched(model) == {f"student.{name}" for name, _ in model.student.named_parameters()}
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any(b.requires_grad for b in model.queue.buffers())
    # Texts have at most 7 tokens: of the table's positions only these are learnt, of the words all, by the guessing.
    embed = model.student.text.embed
    assert (embed.position.weight.grad.abs().amax(1) > 0).tolist() == [True] * L + [False] * 2
    assert embed.word.weight.grad.abs().amax(1).min() > 0


def test_a_plain_copy_would_learn_from_the_contrast():
    """The loss stops the gradient at the teacher's similarities, but its vectors are also the student's keys."""
    student, images, ids = shaken(), pictures(), texts()
    for teacher, learns in ((teacher_of(student), False), (deepcopy(student), True)):
        query = student.image_vector(student.vision(images))
        key = teacher.text_vector(teacher.text.read(ids, MASK))
        logits = query @ key.T / student.temp
        distilled_contrastive_loss(logits, logits.detach(), 0.4).backward()
        assert any(p.grad is not None for p in teacher.parameters()) == learns


def test_the_picture_is_taught_through_the_words():
    """ITM and MLM train the image encoder through the fusion blocks alone: all tokens of it, not just the first."""
    model, images, ids = shaken(), pictures(), texts()
    for kind in ("match", "guess", "contrast"):
        states = model.vision(images).detach().requires_grad_()
        text = model.text.read(ids, MASK)
        if kind == "match":
            out = model.match(text, MASK, states)
        elif kind == "guess":
            out = model.mlm_head(model.text.fuse(text, MASK, states)[0])
        else:
            out = model.image_vector(states)
        (out * torch.randn_like(out)).sum().backward()
        reached = states.grad.abs().amax(-1) > 0
        assert reached[:, 0].all() and reached[:, 1:].all() == (kind != "contrast") == reached[:, 1:].any(), kind


def test_bfloat16_autocast_is_finite_and_close():
    images, ids, noise = pictures(), texts(), torch.rand(2, B)
    losses, outputs, vectors = [], [], []
    model = momentum_model()
    for enabled in (False, True):
        one = deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs.append(one.student(images, ids, MASK))
            losses.append(three_losses(one, images, ids, noise))
        sum(losses[-1].values()).backward()
        assert all(p.grad.isfinite().all() for p in one.student.parameters())
        vectors.append(one.queue.image[:B])
    for name in ("image vector", "text vector"):
        assert outputs[1][name].dtype == torch.float32
        close(outputs[1][name].norm(dim=-1), torch.ones(B))
        assert 1e-5 < (outputs[1][name] - outputs[0][name]).abs().max() < 0.03  # half precision was at work
    assert outputs[1]["match"].dtype == torch.bfloat16
    for name, loss in losses[1].items():
        assert loss.dtype == torch.float32 and loss.isfinite() and (loss - losses[0][name]).abs() < 0.2, name
    close(vectors[1].norm(dim=-1), torch.ones(B))
    close(vectors[1], vectors[0], 0.03)


def test_a_run_leaves_a_student_that_learnt_and_a_teacher_behind_it(tmp_path: Path):
    """Three pairs by heart; and a run that was broken off goes on bit for bit, teacher and queue included."""
    images, ids = pictures(), texts()
    noise = torch.rand(120, 2, B)

    def batches(step: int, *, stop: int = -1) -> tuple[Tensor, ...]:
        if step == stop:
            raise KeyboardInterrupt
        return images, ids, noise[step]

    def run(model: MomentumALBEF, steps: int = 120, **options: object) -> dict[str, list[float]]:
        options = {"batches": batches} | options
        return fit(model, loss_fn=three_losses, steps=steps, lr=5e-3, progress=None, **options,
                   after_step=[lambda model, step: clamp_temperature(model.student, step)]).losses  # fmt: skip

    torch.manual_seed(1)
    start = MomentumALBEF(ALBEF(SMALL), queue_size=2 * B, momentum=0.9)
    whole, broken = deepcopy(start), deepcopy(start)
    losses = run(whole)
    assert losses["itm"][0] > 0.6 and losses["mlm"][0] > 3  # near the chances ln 2 and ln 30
    assert max(losses["itm"][-5:]) < 0.58 and max(losses["mlm"][-5:]) < 0.8  # 0.64: one in three, whatever is asked
    with torch.no_grad():
        out = whole.student(images, ids, MASK)
    assert (out["image vector"] @ out["text vector"].T).argmax(1).tolist() == [0, 1, 2]
    begin, student, teacher = (dict(m.named_parameters()) for m in (start.student, whole.student, whole.teacher))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum((a[name] - b[name]).square().sum().item() for name in teacher) ** 0.5

    assert 0 < distance(teacher, student) < distance(begin, student)
    assert distance(begin, teacher) < distance(begin, student)
    assert whole.queue.says.tolist() == [0, 1, 2] * 2 and tied(whole.student) and tied(whole.teacher)

    path = tmp_path / "run.safetensors"
    options = {"checkpoint": path, "checkpoint_every": 50}
    run(broken, **options, batches=partial(batches, stop=70))
    again = MomentumALBEF(ALBEF(SMALL), queue_size=2 * B, momentum=0.9)
    assert run(again, **options) == losses
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


# --- a trained ViT for the image encoder -----------------------------------------------------------------------------


def vit(**options: object) -> ViT:
    return shake(ViT(replace(SMALL.image_config(), **options)))


@torch.no_grad()
def test_start_from_vit_copies_the_image_encoder():
    model, source, images = shaken(), vit(), pictures()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert apart(model.vision(images), source(images, everything=True)[1]["tokens"])
    start_from_vit(model, source)
    close(model.vision(images), source(images, everything=True)[1]["tokens"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("vision."), name
        assert parameter.requires_grad, name
    source.head.weight.add_(1)
    close(model.vision(images), source(images, everything=True)[1]["tokens"])
    for parameter in source.parameters():  # values, not the tensors themselves
        parameter.add_(1)
    assert apart(model.vision(images), source(images, everything=True)[1]["tokens"])
    start_from_vit(model, vit(num_classes=5, head_hidden=8, dropout=0.2))  # what is not taken over may differ


@pytest.mark.parametrize(
    "option",
    [dict(image_size=20), dict(patch_size=8), dict(channels=1), dict(width=16), dict(depth=3), dict(heads=4),
     dict(mlp_ratio=2), dict(pool="mean"), dict(position="none"), dict(position="2d"), dict(norm="post"),
     dict(gelu="tanh")],
)  # fmt: skip
def test_start_from_vit_refuses_what_does_not_fit(option):
    """Some of these would fit by shape, and give other numbers."""
    model = shaken()
    before = {name: p.clone() for name, p in model.named_parameters()}
    (name, value), *_ = option.items()
    ours = getattr(SMALL.image_config(), name)
    message = f"^the ViT has {name}={value!r} where this ALBEF needs {ours!r}: build both alike$"
    with pytest.raises(ValueError, match=message):
        start_from_vit(model, vit(**option))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # nothing half done


def test_pictures_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\)"):
        ALBEF(SMALL).vision(torch.zeros(2, 3, 20, 20))


@torch.no_grad()
def test_uint8_pictures_are_read_as_scaled_floats():
    model, images = shaken(), torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    close(model.vision(images), model.vision(images / 127.5 - 1))
    assert apart(model.vision(images), model.vision(images.float()))
