"""BLIP-2: what eye and mouth keep, who sees whom under the three masks, and what queries and words share."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tower_helpers
from torch import Tensor, nn
from tower_helpers import Anew, B, L, apart, close, differs, digest, pictures, spoken, texts, touched

from minivlp.data.text import DEFAULT_VOCAB_SIZE, SPECIAL_TOKENS
from minivlp.generate import beam_search, greedy
from minivlp.layers import MLP, Block, count_parameters
from minivlp.losses import next_words
from minivlp.models.albef import FusionBlock, ImageEncoder
from minivlp.models.blip import led_by
from minivlp.models.blip2 import (
    BLIP2,
    BLIP2Speaker,
    DualBLIP2,
    Eye,
    QFormer,
    QFormerBlock,
    QFormerConfig,
    grounded_mask,
    joint_mask,
    paper_config,
    query_similarities,
    separate_mask,
)
from minivlp.models.clip import CLIP, CLIPConfig, CLIPVision
from minivlp.models.lm import DecoderLM, EncoderDecoderLM, LMConfig
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import fit, load_weights, parameter_groups, save_weights

torch.set_num_threads(1)

# No two sizes alike, so that none can stand in for another. Blocks 0 and 2 see the picture.
SMALL = QFormerConfig(
    image_width=24, queries=5, vocab_size=30, max_text=9, width=16, depth=3, heads=4, mlp_ratio=3, embed_dim=20
)
Q, D, S, HEADS, DEPTH = SMALL.queries, SMALL.width, 17, SMALL.heads, SMALL.depth  # a class token and 16 patches
CLS, END, DEC = 2, SMALL.sep_id, SMALL.dec_id
TOWER = ViTConfig(image_size=16, patch_size=4, width=24, depth=3, heads=2, num_classes=5)
MOUTH = LMConfig(vocab_size=30, max_text=14, width=12, depth=2, heads=2, mlp_ratio=2)
D_LM = MOUTH.width
MOUTHS = [DecoderLM, EncoderDecoderLM]

# What belongs to what in a block: written down once more by hand.
LINEAR, ATTENTION = ("weight", "bias"), ("q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias")
SHARED = {f"attn.{name}" for name in ATTENTION} | {f"norm1.{name}" for name in LINEAR}
WORDS = {f"mlp.{fc}.{name}" for fc in ("fc1", "fc2") for name in LINEAR} | {f"norm2.{name}" for name in LINEAR}
QUERIES = {f"query_{name}" for name in WORDS if name.startswith("mlp")} | {f"query_norm.{name}" for name in LINEAR}
CROSS = {f"cross.attn.{name}" for name in ATTENTION} | {f"cross.norm.{name}" for name in LINEAR}
TABLES = {"qformer.embed.word.weight", "qformer.embed.position.weight"}
ENTRY = {"qformer.embed.norm.weight", "qformer.embed.norm.bias"}  # of queries and words
VISION = {"ln_vision.weight", "ln_vision.bias"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shake(module: nn.Module, std: float = 0.2) -> nn.Module:
    return tower_helpers.shake(module, std, but="temp")  # which must stay positive


def tower(**options: object) -> ViT:
    return shake(ViT(replace(TOWER, **options)))


def shaken(config: QFormerConfig = SMALL, **options: object) -> BLIP2:
    return shake(BLIP2(replace(config, **options), Eye(tower())))


def speaking(kind: type[nn.Module], **options: object) -> BLIP2Speaker:
    """Stage 2 after a stage 1, `options` are the mouth's."""
    return shake(BLIP2Speaker(shaken(), kind(replace(MOUTH, **options))))


def read() -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts, two of them padded."""
    ids = texts()
    return ids, ids != 0


def full() -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts without padding."""
    ids = torch.randint(7, 30, (B, L))
    return ids, torch.ones(B, L, dtype=torch.bool)


def other_word(ids: Tensor, place: int) -> Tensor:
    """The texts with another word at one place."""
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


def states(count: int = B) -> Tensor:
    """What a picture may say, (B, S, D')."""
    return torch.randn(count, S, SMALL.image_width)


def in_blocks(names: set[str], blocks: range | tuple[int, ...] = range(DEPTH)) -> set[str]:
    return {f"qformer.blocks.{i}.{name}" for i in blocks for name in names}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The names of the parameters that are not what they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def one_pass(model: BLIP2, ids: Tensor, mask: Tensor | None, image: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and words in one sequence, whatever the mask: their states (B, Q, D) and (B, L, D)."""
    x = torch.cat([model.qformer.queries(len(ids)), model.qformer.embed(ids)], dim=1)
    return model.qformer(x, Q, image, mask=mask)[0].split([Q, ids.shape[1]], dim=1)


def uses(model: BLIP2) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The four uses of the one transformer: (ids, mask, a picture's states) -> numbers, one row each text."""
    return {
        "see": lambda ids, mask, image: model.see(image)[0],
        "read": lambda ids, mask, image: model.encode_text(ids),
        "match": lambda ids, mask, image: model.match(model.read(ids), mask, image),
        "write": lambda ids, mask, image: model.write(ids, model.see(image)[1]),
    }


# --- sizes and configs -----------------------------------------------------------------------------------------------


def test_published_sizes():
    """Millions of parameters: the paper's 188 in stage 1, and 104 to 108 trainable ones in stage 2."""
    attention, mlp, norm = 4 * (768 * 768 + 768), 2 * 4 * 768 * 768 + 5 * 768, 2 * 768
    tables, tokens, projection = (30_523 + 512) * 768, 32 * 768, 768 * 2560 + 2560
    for image_width, sizes in ((1408, (185.7, 161.8, 105.1, 107.1)), (1024, (182.1, 158.3, 101.6, 103.6))):
        cross = 2 * (768 * 768 + 768) + 2 * (image_width * 768 + 768) + norm
        with torch.device("meta"):
            first = BLIP2(paper_config(image_width=image_width), Eye(ViT(TOWER)))
            mouth = DecoderLM(LMConfig(vocab_size=8, max_text=8, width=2560, depth=0, heads=32))  # OPT-2.7B's width
            second = BLIP2Speaker(first, mouth)
        whole = 12 * (attention + norm + 2 * (mlp + norm)) + 6 * cross + norm + tables
        alone = whole - tables - 12 * (mlp + norm)
        assert count_parameters(first.qformer) == whole + tokens and count_parameters(second.qformer) == alone + tokens
        trainable = sum(p.numel() for p in second.parameters() if p.requires_grad)
        assert trainable == alone + tokens + projection + 2 * image_width
        # Without the query tokens, another 0.02 million.
        assert tuple(round(n / 1e6, 1) for n in (whole, whole - tables, alone, alone + projection)) == sizes
        assert round(trainable / 1e6) == {1408: 107, 1024: 104}[image_width]  # as published
    heads = sum(count_parameters(part) for part in (first.vision_proj, first.text_proj, first.itm_head))
    assert heads == 2 * (768 * 256 + 256) + 2 * 768 + 2
    transform = 768 * 768 + 768 + norm + 30_523  # its table is the words'
    assert count_parameters(first) == whole + tokens + heads + transform + 2 * 1024 + 1 + count_parameters(first.eye)


def test_the_default_fits_the_courses_vocabulary_and_the_papers_is_berts():
    c, special = QFormerConfig(), dict(zip(SPECIAL_TOKENS, range(7), strict=True))
    assert c.vocab_size == DEFAULT_VOCAB_SIZE
    assert (c.pad_id, c.sep_id, c.dec_id) == tuple(special[t] for t in ("[PAD]", "[SEP]", "[DEC]"))
    assert c.image_width == CLIPConfig().image_width == ViTConfig().width
    paper = paper_config()
    assert (paper.image_width, paper.queries, paper.width, paper.depth, paper.heads) == (1408, 32, 768, 12, 12)
    assert (paper.vocab_size, paper.max_text, paper.pad_id, paper.sep_id, paper.dec_id) == (30_523, 512, 0, 102, 30_522)
    assert (paper.cross_every, paper.mlp_ratio, paper.embed_dim, paper.dropout) == (2, 4, 256, 0.1)
    assert (paper.eps, paper.temperature, paper_config(image_width=1024).image_width) == (1e-12, 0.07, 1024)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(heads=3), "width 16 is not a multiple of 3 heads"),
        (dict(queries=0), "choose at least 1 for queries and cross_every, or nothing ever sees the picture"),
        (dict(cross_every=0), "choose at least 1 for queries and cross_every, or nothing ever sees the picture"),
        (dict(temperature=0.0), "temperature=0.0: choose a positive one, similarities are divided by it"),
        (dict(temperature=-1.0), "temperature=-1.0: choose a positive one, similarities are divided by it"),
        (dict(temperature=float("nan")), "temperature=nan: choose a positive one, similarities are divided by it"),
    ],
)
def test_configs_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **option)


def test_options_arrive_everywhere():
    options = dict(mlp_ratio=5, dropout=0.3, image_eps=0.5, eps=0.25, temperature=0.2)
    model = BLIP2(replace(SMALL, **options), Eye(tower()))
    trained = nn.ModuleDict({name: module for name, module in model.named_children() if name != "eye"})
    assert {m.p for m in trained.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert model.ln_vision.eps == 0.5 and model.lm_head.norm.eps == 0.25
    assert {m.eps for m in model.qformer.modules() if isinstance(m, nn.LayerNorm)} == {0.25}
    mlps = [m.fc1.out_features / m.fc1.in_features for m in model.qformer.modules() if isinstance(m, MLP)]
    assert mlps == [5] * 2 * DEPTH  # one for words and one for queries in every block
    assert [m.heads for m in model.qformer.modules() if hasattr(m, "heads")] == [4] * (DEPTH + 2)
    assert model.temp.item() == pytest.approx(0.2) and model.temp.requires_grad
    assert model.vision_proj.weight.shape == model.text_proj.weight.shape == (20, D)
    assert model.itm_head.weight.shape == (2, D) and model.qformer.query_tokens.shape == (1, Q, D)


@pytest.mark.parametrize(("every", "depth", "expected"), [(1, 3, [0, 1, 2]), (2, 5, [0, 2, 4]), (3, 5, [0, 3])])
def test_which_blocks_see_the_picture(every, depth, expected):
    model = QFormer(replace(SMALL, cross_every=every, depth=depth))
    assert [i for i, block in enumerate(model.blocks) if block.cross is not None] == expected
    parts = SHARED | WORDS | QUERIES
    for i, block in enumerate(model.blocks):
        assert {name for name, _ in block.named_parameters()} == (parts | CROSS if i in expected else parts)


def test_there_is_neither_a_teacher_nor_a_queue():
    """BLIP's momentum model and queues are gone; what is left is all that learns."""
    model = BLIP2(SMALL, Eye(tower()))
    assert not dict(model.named_buffers())
    assert {name for name, _ in model.named_children()} == {
        "ln_vision", "qformer", "vision_proj", "text_proj", "itm_head", "lm_head", "eye",
    }  # fmt: skip
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"eye"}
    assert model.lm_head.decoder.weight is model.qformer.embed.word.weight
    assert model.lm_head.decoder.bias.shape == (SMALL.vocab_size,)


@torch.no_grad()
def test_without_an_eye_states_can_be_given():
    model, blind, (ids, mask), image = shaken(), shake(BLIP2(SMALL, None)), read(), states()
    blind.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("eye")})
    for name, run in uses(model).items():
        assert torch.equal(uses(blind)[name](ids, mask, image), run(ids, mask, image)), name
    dual = DualBLIP2(SMALL, None)
    assert {name for name, _ in dual.named_children()} == {"ln_vision", "qformer", "vision_proj", "text_proj"}
    assert isinstance(model, DualBLIP2)


def test_texts_that_are_too_long():
    model, long = BLIP2(SMALL, Eye(tower())), torch.ones(B, 10, dtype=torch.long)
    past = model.see(states())[1]
    for run in (model.encode_text, model.read, lambda ids: model.write(ids, past), lambda ids: model.write(ids, None)):
        with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions"):
            run(long)
        run(long[:, :9])  # queries take no position


# --- one block -------------------------------------------------------------------------------------------------------


def a_block() -> QFormerBlock:
    return shake(QFormerBlock(D, HEADS, image_width=24))


@torch.no_grad()
def test_a_block_is_berts_for_words_and_with_eyes_for_queries():
    block, x, image = a_block(), torch.randn(B, L, D), states()
    keys = (texts() != 0)[:, None, None, :]
    weights = block.state_dict()
    bert = Block(D, HEADS, eps=1e-12, norm="post")
    bert.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("cross", "query"))})
    words, kept, nothing = block(x, 0, image, mask=keys)
    close(words, bert(x, mask=keys)[0])
    close(block(x, 0, mask=keys)[0], words, 0)  # a picture that nobody asks
    assert nothing is None
    for ours, theirs in zip(kept, block.attn.keys_values(x), strict=True):
        close(ours, theirs, 0)
    seeing = FusionBlock(D, HEADS, context_width=24)
    theirs = {k: v for k, v in weights.items() if not k.startswith(("mlp", "norm2", "query"))}
    theirs |= {k.replace("query_mlp", "mlp").replace("query_norm", "norm2"): v for k, v in weights.items()
               if k.startswith("query")}  # fmt: skip
    seeing.load_state_dict(theirs)
    queries, _, looks = block(x, L, image, mask=keys, need_weights=True)
    expected, expected_looks = seeing(x, image, mask=keys, need_weights=True)
    close(queries, expected)
    close(looks, expected_looks)
    assert looks.shape == (B, HEADS, L, S) and apart(queries, words)
    blind = shake(QFormerBlock(D, HEADS, image_width=None))
    assert blind.cross is None
    y = blind.norm1(x + blind.attn(x)[0])
    close(blind(x, L, image)[0], blind.query_norm(y + blind.query_mlp(y)))


@torch.no_grad()
def test_a_block_of_both_by_hand():
    """Attention over all of them, and from there on each kind for itself."""
    block, image = a_block(), states()
    x, mask = torch.randn(B, Q + L, D), torch.rand(B, 1, Q + L, Q + L) < 0.7
    mask |= torch.eye(Q + L, dtype=torch.bool)
    got, kept, looks = block(x, Q, image, mask=mask, need_weights=True)
    q, k, v = block.attn.split(block.attn.q(x)), *block.attn.keys_values(x)
    scores = (q @ k.transpose(-2, -1) / (D // HEADS) ** 0.5).masked_fill(~mask, float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = block.norm1(x + block.attn.proj(y))
    asked, looks_ = block.cross(y[:, :Q], image, need_weights=True)
    close(got[:, :Q], block.query_norm(asked + block.query_mlp(asked)))
    close(got[:, Q:], block.norm2(y[:, Q:] + block.mlp(y[:, Q:])))
    close(looks, looks_)
    close(looks.sum(-1), torch.ones(B, HEADS, Q))
    close(kept[0], k)
    close(kept[1], v)


@torch.no_grad()
def test_a_block_goes_on_where_it_stopped():
    block, x, image = a_block(), torch.randn(B, Q + L, D), states()
    mask = grounded_mask(L, Q)
    whole, (keys, values), _ = block(x, Q, image, mask=mask)
    first, past, _ = block(x[:, :Q], Q, image)
    rest, (k, v), looks = block(x[:, Q:], 0, mask=mask[Q:], past=past)
    close(torch.cat([first, rest], dim=1), whole)
    close(k, keys)
    close(v, values)
    assert looks is None and apart(block(x[:, Q:], 0, mask=mask[Q:, Q:])[0], rest)


@torch.no_grad()
def test_rows_give_the_same_numbers_for_less_work():
    block, image = a_block(), states()
    x, mask = torch.randn(B, Q + L, D), joint_mask(texts() != 0, Q)
    whole, kept, looks = block(x, Q, image, mask=mask, need_weights=True)
    for rows in (Q, Q + 2):
        some, now, looks_ = block(x, Q, image, mask=mask, rows=rows, need_weights=True)
        close(some, whole[:, :rows])
        close(looks_, looks)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(now, kept, strict=True))  # of all that was read
    model, (ids, padded) = shaken(), read()
    words, entered = model.qformer.embed(ids), {"mlp": [], "query_mlp": []}
    for block in model.qformer.blocks:
        for name, rows in entered.items():
            getattr(block, name).register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].shape[1]))
    x = torch.cat([model.qformer.queries(B), words], dim=1)
    close(model.qformer(x, Q, image, mask=joint_mask(padded, Q), rows=Q)[0],
          one_pass(model, ids, joint_mask(padded, Q), image)[0])  # fmt: skip
    assert entered == {"mlp": [L, L, L, L, L], "query_mlp": [Q] * 6}  # no words in the last block, then all
    for rows in entered.values():
        rows.clear()
    model.match(words, padded, image)
    assert entered == {"mlp": [L, L], "query_mlp": [Q, Q, Q]}
    entered["mlp"].clear()
    model.encode_text(ids)
    assert entered["mlp"] == [L, L, 1]


# --- masks -----------------------------------------------------------------------------------------------------------


def drawn(mask: Tensor) -> list[str]:
    """A mask (T, S) as rows of x, may look, and a dot."""
    return ["".join("x" if may else "." for may in row) for row in mask.tolist()]


def test_the_masks_by_hand():
    """Two queries and three words, of which the second text lacks the last."""
    text = torch.tensor([[True, True, True], [True, True, False]])
    separate = separate_mask(text, 2)
    assert separate.shape == (2, 1, 5, 5) and separate.dtype == torch.bool
    assert drawn(separate[0, 0]) == ["xx...", "xx...", "..xxx", "..xxx", "..xxx"]
    assert drawn(separate[1, 0]) == ["xx...", "xx...", "..xx.", "..xx.", "..xx."]
    joint = joint_mask(text, 2)
    assert joint.shape == (2, 1, 1, 5) and joint.dtype == torch.bool
    assert [drawn(joint[b, 0]) for b in range(2)] == [["xxxxx"], ["xxxx."]]
    grounded = grounded_mask(3, 2)
    assert grounded.dtype == torch.bool
    assert drawn(grounded) == ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert text.tolist() == [[True, True, True], [True, True, False]]
    assert all(mask.device.type == "meta" for mask in (grounded_mask(3, 2, device="meta"),
                                                       separate_mask(text.to("meta"), 2),
                                                       joint_mask(text.to("meta"), 2)))  # fmt: skip


@torch.no_grad()
def test_two_passes_are_itcs_mask():
    model, (ids, mask), image = shaken(), read(), states()
    queries, words = one_pass(model, ids, separate_mask(mask, Q), image)
    close(model.see(image)[0], queries)
    close(model.encode_text(ids), F.normalize(model.text_proj(words[:, 0]), dim=-1))
    # What is the point of the mask: each of the others gives other queries and other words.
    for other in (joint_mask(mask, Q), None):
        wrong = one_pass(model, ids, other, image)
        assert apart(wrong[0], queries) and apart(wrong[1][:, :1], words[:, :1])


@torch.no_grad()
def test_queries_and_words_never_meet_in_itc():
    model, (ids, mask), image = shaken(), full(), states()
    separate = separate_mask(mask, Q)
    before = one_pass(model, ids, separate, image)
    for t in range(L):
        queries, words = one_pass(model, other_word(ids, t), separate, image)
        assert torch.equal(queries, before[0])
        assert all(apart(words[:, s], before[1][:, s], 1e-3) for s in range(L)), t  # both ways
        if t:
            assert apart(model.encode_text(other_word(ids, t)), model.encode_text(ids), 1e-3)
    queries, words = one_pass(model, ids, separate, states())
    assert torch.equal(words, before[1]) and apart(queries, before[0])


@torch.no_grad()
def test_cached_queries_are_itgs_mask():
    model, (ids, _), image = shaken(), read(), states()
    written = led_by(ids, DEC)
    queries, words = one_pass(model, written, grounded_mask(L, Q), image)
    seen, past = model.see(image)
    close(seen, queries)
    close(model.write(ids, past), words)
    assert len(past) == DEPTH and all(k.shape == v.shape == (B, HEADS, Q, D // HEADS) for k, v in past)
    # Common mistakes: a mask that lets queries read the answer, or none for the words, or none of the queries seen.
    leaks = grounded_mask(L, Q)
    leaks[:Q] = True
    assert apart(one_pass(model, written, leaks, image)[0], queries)
    both_ways = grounded_mask(L, Q)
    both_ways[Q:] = True
    assert apart(one_pass(model, written, both_ways, image)[1], words)
    assert apart(model.write(ids, None), words)
    alone = grounded_mask(L, Q)
    alone[Q:, :Q] = False
    close(model.write(ids, None), one_pass(model, written, alone, image)[1])


@torch.no_grad()
def test_itg_never_shows_a_word_to_queries_or_to_earlier_words():
    model, (ids, _), image = shaken(), full(), states()
    past = model.see(image)[1]
    before, written = one_pass(model, ids, grounded_mask(L, Q), image), model.write(ids, past)
    for t in range(1, L):
        changed = other_word(ids, t)
        queries, words = one_pass(model, changed, grounded_mask(L, Q), image)
        assert torch.equal(queries, before[0])
        close(words[:, :t], before[1][:, :t], 1e-6)
        after = model.write(changed, past)
        close(after[:, :t], written[:, :t], 1e-6)
        assert all(apart(after[:, s], written[:, s], 1e-3) for s in range(t, L)), t
    # Each word sees each query, in every block.
    for i in range(DEPTH):
        for q in range(Q):
            other = [(k.clone(), v.clone()) for k, v in past]
            other[i][1][:, :, q] += 3.0
            after = model.write(ids, other)
            assert all(apart(after[:, s], written[:, s], 1e-3) for s in range(L)), (i, q)


@torch.no_grad()
def test_itm_shows_all_to_all():
    model, (ids, mask), image = shaken(), full(), states()
    queries, words = one_pass(model, ids, joint_mask(mask, Q), image)
    for t in range(L):
        changed = other_word(ids, t)
        after = one_pass(model, changed, joint_mask(mask, Q), image)
        assert all(apart(after[0][:, q], queries[:, q], 1e-3) for q in range(Q)), t
        assert all(apart(after[1][:, s], words[:, s], 1e-3) for s in range(L)), t
        assert apart(model.match(model.read(changed), mask, image), model.match(model.read(ids), mask, image), 1e-3)
    for place in range(S):
        other = image.clone()
        other[1, place] += torch.randn(24)
        after = one_pass(model, ids, joint_mask(mask, Q), other)
        assert all(differs(after[0][:, q], queries[:, q]) == [False, True, False] for q in range(Q)), place
        assert all(differs(after[1][:, s], words[:, s]) == [False, True, False] for s in range(L)), place


@torch.no_grad()
def test_padding_changes_nothing():
    model, (ids, mask), image = shaken(), read(), states()
    filled = torch.where(mask, ids, 11)
    for name in ("match", "write"):
        run = uses(model)[name]
        before = run(ids, mask, image)
        real = mask if name == "write" else torch.ones(before.shape, dtype=torch.bool)
        close(run(filled, mask, image)[real], before[real], 1e-6)
        longer = run(F.pad(ids, (0, 2), value=11), F.pad(mask, (0, 2)), image)
        close(longer[:, : real.shape[1]][real], before[real])
        for b, length in enumerate(mask.sum(1)):  # nor does the company
            alone = run(ids[b : b + 1, :length], mask[b : b + 1, :length], image[b : b + 1])
            close(alone[0], before[b, :length] if name == "write" else before[b])
        seen = run(filled, torch.ones_like(mask), image)  # words at those places would count, but to a writer
        assert differs(seen[:, :1], before[:, :1]) == [False, name == "match", name == "match"], name
    vectors = model.encode_text(ids)  # looks for pad_id
    close(model.encode_text(F.pad(ids, (0, 2))), vectors)
    for b, length in enumerate(mask.sum(1)):
        close(model.encode_text(ids[b : b + 1, :length])[0], vectors[b])
    assert differs(model.encode_text(filled), vectors) == [False, True, True]
    # In one pass with queries, too: neither kind of mask lets anyone see padding.
    for which in (separate_mask, joint_mask):
        one, two = (one_pass(model, some, which(mask, Q), image) for some in (ids, filled))
        close(one[0], two[0], 1e-6)
        close(one[1][mask], two[1][mask], 1e-6)


@torch.no_grad()
def test_padding_may_have_another_id():
    model, (ids, _) = shaken(pad_id=29), read()
    ids = ids.clamp(max=28)
    close(model.encode_text(ids.masked_fill(ids == 0, 29))[2], model.encode_text(ids[2:, :3])[0])


# --- who sees the picture, and what is shared ------------------------------------------------------------------------


@torch.no_grad()
def test_words_see_the_picture_only_through_the_queries():
    model, (ids, mask) = shaken(), read()
    image, other = states(), states()
    asked = []
    for block in model.qformer.blocks:
        if block.cross:
            block.cross.register_forward_pre_hook(lambda _, inputs: asked.append(tuple(inputs[0].shape)))
    joint = joint_mask(mask, Q)
    one, two = one_pass(model, ids, joint, image), one_pass(model, ids, joint, other)
    assert apart(one[0], two[0]) and apart(one[1], two[1]) and asked == [(B, Q, D)] * 4  # two blocks, two passes
    asked.clear()
    model.encode_text(ids)
    model.write(ids, None)
    assert asked == []  # nobody asks for words
    # Behind the first block no word knows of the picture, for queries had nothing to tell before it; then all do.
    for depth, knows in ((1, False), (2, True)):
        model.qformer.blocks = model.qformer.blocks[:depth] if depth == 1 else deepcopy(shaken().qformer.blocks[:2])
        one, two = one_pass(model, ids, joint, image), one_pass(model, ids, joint, other)
        assert apart(one[0], two[0]) and differs(one[1], two[1]) == [knows] * B
        # And where words may not look at queries, not even then.
        one, two = (one_pass(model, ids, separate_mask(mask, Q), some) for some in (image, other))
        assert apart(one[0], two[0]) and torch.equal(one[1], two[1])


@torch.no_grad()
def test_everything_says_where_the_queries_look():
    model, image = shaken(), states()
    plain, _, nothing = model.qformer(model.qformer.queries(B), Q, image)
    same, past, named = model.qformer(model.qformer.queries(B), Q, image, everything=True)
    assert nothing == {} and list(named) == ["cross_0", "cross_2"]
    close(same, plain)
    x = model.qformer.queries(B)
    for i, block in enumerate(model.qformer.blocks):
        for ours, theirs in zip(past[i], block.attn.keys_values(x), strict=True):
            close(ours, theirs)
        x, _, weights = block(x, Q, image, need_weights=bool(block.cross))
        if i != 1:
            assert named[f"cross_{i}"].shape == (B, HEADS, Q, S)
            close(named[f"cross_{i}"], weights)
            close(weights.sum(-1), torch.ones(B, HEADS, Q))
    x = torch.cat([model.qformer.queries(B), torch.randn(B, L, D)], dim=1)
    assert model.qformer(x, Q, image, everything=True)[2]["cross_0"].shape == (B, HEADS, Q, S)  # words do not look


@torch.no_grad()
def test_another_part_changes_who_uses_it():
    """Each part of each block, changed: which uses give other numbers? The self-attention is everyone's, the MLPs are
    not, and what the last block makes of queries that are not read, or of words, is lost."""
    (ids, mask), image = read(), states()
    both, kept = {"attn", "norm1"}, deepcopy(shaken())

    def changed(part: Callable[[BLIP2], nn.Module | nn.Parameter]) -> dict[str, bool]:
        model = deepcopy(kept)
        runs = uses(model)
        before = {name: run(ids, mask, image) for name, run in runs.items()}
        found = part(model)
        if isinstance(found, nn.Module):
            shake(found)
        else:
            found.add_(0.5 * torch.randn_like(found))
        return {name: apart(run(ids, mask, image), before[name], 1e-3) for name, run in runs.items()}

    for i in range(DEPTH):
        last = i == DEPTH - 1
        for name in ("attn", "norm1", "mlp", "norm2", "query_mlp", "query_norm", "cross"):
            if name == "cross" and i == 1:
                continue
            words, queries = name in both | {"mlp", "norm2"}, name in both | {"query_mlp", "query_norm", "cross"}
            assert changed(lambda model, i=i, name=name: getattr(model.qformer.blocks[i], name)) == {
                "see": queries, "read": words, "match": queries or not last, "write": words or not last,
            }, (i, name)  # fmt: skip
    for name, (see, reads) in {"word": (False, True), "position": (False, True), "norm": (True, True)}.items():
        assert changed(lambda model, name=name: getattr(model.qformer.embed, name)) == {
            "see": see, "read": reads, "match": True, "write": True,
        }, name  # fmt: skip
    assert changed(lambda model: model.qformer.query_tokens) == {
        "see": True, "read": False, "match": True, "write": True,
    }  # fmt: skip


@pytest.fixture
def gradients() -> dict[str, set[str]]:
    """What each task teaches: its name -> the names of the parameters that get a gradient."""
    model, images, (ids, mask) = shaken(), pictures(), read()
    got = {}
    for name, run in {
        "image": lambda: model.encode_image(images),
        "text": lambda: model.encode_text(ids),
        "match": lambda: model.match(model.read(ids), mask, model.look(images)),
        "write": lambda: model.lm_head(model.write(ids, model.see(model.look(images))[1])),
    }.items():
        model.zero_grad(set_to_none=True)
        numbers = run()
        (numbers * torch.randn_like(numbers)).sum().backward()
        got[name] = touched(model)
        assert got[name] == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad is None for p in model.eye.parameters())
    got["all"] = {name for name, _ in model.named_parameters()}
    return got


def test_what_each_task_teaches(gradients):
    before, eyes = range(DEPTH - 1), in_blocks(CROSS, (0, 2))
    seeing = VISION | ENTRY | {"qformer.query_tokens"}
    head = {name: {f"{name}.{n}" for n in LINEAR} for name in ("text_proj", "vision_proj", "itm_head")}
    assert gradients["text"] == TABLES | ENTRY | in_blocks(SHARED | WORDS) | head["text_proj"]
    queries = seeing | eyes | in_blocks(SHARED | QUERIES)
    assert gradients["image"] == queries | head["vision_proj"]
    # What the last block makes of words is read by no query, and what it makes of queries by no word.
    assert gradients["match"] == queries | TABLES | in_blocks(WORDS, before) | head["itm_head"]
    writes = {name for name in gradients["all"] if name.startswith("lm_head.")}
    assert gradients["write"] == seeing | TABLES | writes | in_blocks(SHARED | WORDS) | in_blocks(
        QUERIES, before
    ) | in_blocks(CROSS, (0,))
    learn = {name for name in gradients["all"] if not name.startswith("eye.")} - {"temp"}
    assert set().union(*(gradients[task] for task in ("image", "text", "match", "write"))) == learn


# --- the heads -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_pass_is_its_parts():
    model, images, (ids, mask) = shaken(), pictures(), read()
    named = model(images, ids, mask)
    shapes = {"image": (B, S, 24), "queries": (B, Q, D), "query vectors": (B, Q, 20), "text vector": (B, 20),
              "match": (B, 2), "next": (B, L, 30)}  # fmt: skip
    assert {name: tuple(t.shape) for name, t in named.items()} == shapes
    image = model.ln_vision(model.eye(images))
    close(named["image"], image, 0)
    close(model.look(images), image, 0)
    states_, past = model.see(image)
    close(named["queries"], states_)
    close(named["query vectors"], F.normalize(model.vision_proj(states_), dim=-1))
    close(named["query vectors"], model.encode_image(images))
    close(named["query vectors"].norm(dim=-1), torch.ones(B, Q))
    close(named["text vector"], model.encode_text(ids))
    close(named["text vector"].norm(dim=-1), torch.ones(B))
    close(named["match"], model.match(model.read(ids), mask, image))
    close(named["next"], model.lm_head(model.write(ids, past)))
    # Whose picture and whose words: one of each exchanged in the batch.
    other = images.clone()
    other[1] = images[0]
    after = model(other, ids, mask)
    assert all(differs(after[name], named[name]) == [False, name != "text vector", False] for name in named)
    after = model(images, torch.where(torch.arange(B)[:, None] == 2, other_word(ids, 1), ids), mask)
    words = ("text vector", "match", "next")
    assert all(differs(after[name], named[name]) == [False, False, name in words] for name in named)


@torch.no_grad()
def test_every_part_of_the_picture_reaches_the_queries_through_a_layer_norm():
    model, images = shaken(), pictures()
    close(model.look(images), F.layer_norm(model.eye(images), (24,), *model.ln_vision.parameters(), eps=1e-6))
    assert apart(model.look(images), model.eye(images))
    image = states()
    before = model.see(image)[0]
    for place in range(S):
        other = image.clone()
        other[1, place] += torch.randn(24)
        after = model.see(other)[0]
        assert all(differs(after[:, q], before[:, q]) == [False, True, False] for q in range(Q)), place


def test_query_similarities_by_hand():
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], [[-1.0, 0.0], [0.0, -1.0], [0.8, -0.6]]])
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-0.6, -0.8]])
    got = query_similarities(queries, words)
    close(got, torch.tensor([
        [[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1], [-0.6, -0.8, -1]],
        [[-1, 0, 0.8], [0, -1, -0.6], [-0.6, -0.8, 0], [0.6, 0.8, 0]],
    ]))  # (M, N, Q)  # fmt: skip
    close(got.max(-1).values, torch.tensor([[1, 1, 1, -0.6], [0.8, 0, 0, 0.8]]))


def test_only_the_query_that_wins_learns_from_a_pair():
    """The largest of the cosines counts: a mean would teach all queries the same."""
    model, (ids, _) = shaken(), read()
    with torch.no_grad():
        seen, text = model.see(states())[0], model.encode_text(ids)
    seen.requires_grad_()
    similarity = query_similarities(model.query_vectors(seen), text)
    assert similarity.shape == (B, B, Q)
    best, winner = similarity.max(dim=-1)
    for i in range(B):
        for t in range(B):
            by_hand = [F.cosine_similarity(model.vision_proj(seen[i, q]), text[t], dim=0) for q in range(Q)]
            close(similarity[i, t], torch.stack(by_hand))
            (got,) = torch.autograd.grad(best[i, t], seen, retain_graph=True)
            learns = got.abs().amax(-1) > 1e-6
            assert learns.nonzero().tolist() == [[i, winner[i, t].item()]]
    (got,) = torch.autograd.grad(similarity.mean(-1)[0, 0], seen)
    assert (got.abs().amax(-1) > 1e-6).sum() == Q
    assert len(set(winner.flatten().tolist())) > 1  # not one query for all


@torch.no_grad()
def test_matching_is_the_mean_of_what_the_queries_say():
    model, (ids, mask), image = shaken(), read(), states()
    asked = []
    model.itm_head.register_forward_hook(lambda _, inputs, scores: asked.append((inputs[0], scores)))
    got = model.match(model.read(ids), mask, image)
    ((given, scores),) = asked
    queries, words = one_pass(model, ids, joint_mask(mask, Q), image)
    close(given, queries)
    assert scores.shape == (B, Q, 2)
    close(got, torch.stack([scores[:, q] for q in range(Q)]).sum(0) / 5)
    weight, bias = model.itm_head.parameters()
    close(got, sum(queries[:, q] @ weight.T + bias for q in range(Q)) / 5)
    for wrong in (model.itm_head(words[:, 0]), model.itm_head(queries[:, 0]), scores.amax(1)):  # common mistakes
        assert apart(got, wrong)


@torch.no_grad()
def test_equal_queries_would_stay_equal_and_ours_differ():
    model, images = BLIP2(SMALL, Eye(tower())), pictures()
    tokens = model.qformer.query_tokens
    assert tokens.requires_grad and tokens.abs().amax() > 0
    for one, two in combinations(range(Q), 2):
        assert (tokens[0, one] - tokens[0, two]).abs().max() > 0.005
    model = shake(model)
    close(model.qformer.queries(4), F.layer_norm(tokens, (D,), *model.qformer.embed.norm.parameters(), eps=1e-12)
          .expand(4, Q, D))  # fmt: skip
    before = model.see(model.look(images))[0]
    assert all(apart(before[:, one], before[:, two]) for one, two in combinations(range(Q), 2))
    # They have no positions: in another order they say the same, each its own.
    turn = torch.tensor([3, 0, 4, 1, 2])
    tokens.copy_(tokens[:, turn].clone())
    close(model.see(model.look(images))[0], before[:, turn])
    tokens.copy_(tokens[:, :1].expand(1, Q, D).clone())
    after = model.see(model.look(images))[0]
    close(after, after[:, :1].expand(B, Q, D))


@torch.no_grad()
def test_dropout_is_at_work_in_training_alone_and_never_in_the_eye():
    model = shake(BLIP2(replace(SMALL, dropout=0.3), Eye(tower(dropout=0.3))))
    images, (ids, mask) = pictures(), read()
    one, two = model(images, ids, mask), model(images, ids, mask)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = model.train()(images, ids, mask), model(images, ids, mask)
    assert all(apart(one[name], two[name]) for name in one if name != "image")
    assert torch.equal(one["image"], two["image"])


def test_dropout_hides_something_else_of_the_queries_for_each_picture():
    """As of the words (official code): the same for a whole batch would be much noisier."""
    model = shake(QFormer(replace(SMALL, dropout=0.5))).train()
    hidden = model.queries(B) == 0
    assert hidden.any() and not (hidden == hidden[:1]).all()
    assert (model.eval().queries(B) != 0).all()


# --- the eye ---------------------------------------------------------------------------------------------------------


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "CLIP's image tower": lambda: CLIPVision(CLIPConfig(16, 4, image_width=24, image_depth=3, image_heads=2)),
    "ViT": lambda: ViT(TOWER),
    "ViT with a hidden layer": lambda: ViT(replace(TOWER, head_hidden=6)),
    "ALBEF's image encoder": lambda: ImageEncoder(TOWER),
}


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_the_eye_shows_what_comes_before_the_last_blocks(kind, skip):
    whole, images = shake(TOWERS[kind]()), pictures()
    eye = Eye(whole, skip=skip)
    _, named = whole.encoder(whole.embed(images), everything=True)
    close(eye(images), named[f"block_{2 - skip}"])
    assert eye(images).shape == (B, S, 24)
    # Nothing is left of what follows, no LayerNorm and no head.
    weights = dict(whole.named_parameters())
    kept = {name for name in weights if not name.startswith(("encoder.norm", "head", "hidden"))}
    for block in range(3 - skip, 3):
        kept = {name for name in kept if not name.startswith(f"encoder.blocks.{block}.")}
    assert {name for name, _ in eye.named_parameters()} == {f"tower.{name}" for name in kept}
    # A copy: neither is the other's business.
    before = eye(images)
    assert len(whole.encoder.blocks) == 3 and all(p.requires_grad for p in whole.parameters())
    assert not {p.data_ptr() for p in eye.parameters()} & {p.data_ptr() for p in whole.parameters()}
    shake(whole)
    assert torch.equal(eye(images), before)


def test_by_default_the_last_block_alone_is_skipped():
    assert len(Eye(ViT(TOWER)).tower.encoder.blocks) == 2


@pytest.mark.parametrize("skip", [4, -1])
def test_an_eye_cannot_skip_more_blocks_than_there_are(skip):
    with pytest.raises(ValueError, match="skip"):
        Eye(ViT(TOWER), skip=skip)


@torch.no_grad()
def test_clips_tower_begins_with_what_embed_says():
    whole, images = shake(TOWERS["CLIP's image tower"]()), pictures()
    pooled, named = whole(images, everything=True)
    close(named["embedded"], whole.embed(images), 0)
    states_ = whole.encoder(whole.embed(images))[0]
    close(pooled, states_[:, 0])
    by_hand = torch.cat([whole.cls_token.expand(B, 1, 24), whole.patch_embed(images)], dim=1) + whole.pos_embed
    close(whole.embed(images), whole.norm_pre(by_hand))
    with pytest.raises(ValueError, match="expected pictures"):
        Eye(whole)(pictures(size=20))
    model = CLIP(CLIPConfig(16, 4, image_width=24, image_depth=3, image_heads=2, text_width=16, text_heads=2))
    assert Eye(model.vision)(images).shape == (B, S, 24)


@pytest.mark.parametrize("kind", TOWERS)
def test_the_eye_is_frozen_and_always_awake(kind):
    whole = TOWERS[kind]().train()
    eye = Eye(whole)
    assert whole.training  # the tower itself may go on learning
    model = BLIP2(SMALL, eye)
    for awake in (model.train(), model.train(False), model.train(True)):
        assert not any(m.training for m in awake.eye.modules())
    assert model.qformer.training and model.ln_vision.training
    assert model.eye.train() is model.eye and not model.eye.training
    assert not any(p.requires_grad for p in model.eye.parameters())
    images = pictures().requires_grad_()
    seen = model.eye(images)
    assert not seen.requires_grad and model.look(images).requires_grad  # the LayerNorm on its states learns
    model.look(images).sum().backward()
    assert images.grad is None and all(p.grad is None for p in model.eye.parameters())
    held = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert not held & {id(p) for p in model.eye.parameters()}


def all_three(model: BLIP2, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """A loss that everything takes part in."""
    assert model.training and not any(m.training for m in model.eye.modules())
    named = model(images, ids, mask)
    similarity = query_similarities(named["query vectors"], named["text vector"]).amax(-1) / model.temp
    return (F.cross_entropy(similarity, torch.arange(B)) + F.cross_entropy(named["match"], torch.ones(B).long())
            + F.cross_entropy(named["next"].flatten(0, 1), next_words(ids, mask).flatten()))  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
def test_a_training_step_leaves_the_eye_as_it_is(kind):
    eye = Eye(TOWERS[kind]())
    before = digest(eye)
    model = BLIP2(SMALL, eye)
    assert digest(model.eye) == before  # the starting values are for the others
    weights, batch = weights_of(model), (pictures(), *read())
    fit(model, lambda step: batch, all_three, steps=2, lr=1e-2, weight_decay=0.5, progress=None)
    assert digest(model.eye) == before
    expected = {name for name in weights if not name.startswith("eye.")}
    assert moved(weights, model) == expected and VISION | {"temp", "qformer.query_tokens"} <= expected


# --- writing token by token ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dec_takes_the_first_place():
    model, (ids, mask), image = shaken(), read(), states()
    past, seen = model.see(image)[1], []
    model.qformer.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for run in (lambda: model.write(ids, past), lambda: model.encode_text(ids), lambda: model.read(ids, mask)):
        run()
    assert [s[:, 0].tolist() for s in seen] == [[token] * B for token in (DEC, CLS, CLS)]
    assert all(torch.equal(s[:, 1:], ids[:, 1:]) and s.shape == ids.shape for s in seen)
    assert torch.equal(model.write(led_by(ids, 9), past), model.write(ids, past))


def test_the_texts_positions_start_at_0():
    """Queries take none, neither when writing at once nor token by token."""
    model, (ids, mask), image = shaken(), read(), states()
    table = model.qformer.embed.position.weight
    for run in (lambda: model.write(ids, model.see(image)[1]), lambda: model.match(model.read(ids), mask, image),
                lambda: spoken(model.speaker(image), ids)):  # fmt: skip
        numbers = run()
        (got,) = torch.autograd.grad((numbers * torch.randn_like(numbers)).sum(), table)
        assert (got.abs().amax(1) > 1e-7).tolist() == [True] * L + [False] * 2
    speaker, long = model.speaker(image), torch.full((B, 9), DEC)
    with torch.no_grad():
        spoken(speaker, long)
        with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions"):
            speaker(long[:, 0])


@torch.no_grad()
def test_a_speaker_says_what_writing_says():
    model, (ids, _), image = shaken(), read(), states()
    expected = model.lm_head(model.write(ids, model.see(image)[1]))
    rows, pictures_ = [], []
    model.qformer.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model.qformer.blocks[0].cross.register_forward_pre_hook(lambda _, inputs: pictures_.append(1))
    close(spoken(model.speaker(image), led_by(ids, DEC)), expected)
    assert rows == [1] * L and len(pictures_) == 1  # one row a token, and one look at the picture
    assert apart(expected, model.lm_head(model.write(ids, model.see(states())[1])))


@torch.no_grad()
def test_a_speaker_writes_several_texts_about_each_picture_and_goes_on_with_others():
    model, image = shaken(), states(2)
    ids, more = torch.randint(7, 30, (6, 3)), torch.randint(7, 30, (6, 2))
    ids[:, 0] = DEC
    speaker = model.speaker(image, copies=3)
    each = model.see(image.repeat_interleave(3, dim=0))[1]  # those of one picture next to each other
    close(spoken(speaker, ids), model.lm_head(model.write(ids, each)))
    rows = torch.tensor([2, 0, 0, 4, 4, 3])
    speaker.reorder(rows)
    expected = model.lm_head(model.write(torch.cat([ids[rows], more], dim=1), each))[:, 3:]
    close(spoken(speaker, more), expected)


def no_cache(model: BLIP2, image: Tensor) -> Anew:
    return Anew(lambda ids: model.lm_head(model.write(ids, model.see(image)[1])))


@torch.no_grad()
def test_generating_with_and_without_the_cache():
    model, image, first = shaken(), states(), torch.full((B,), DEC)
    how = {"end": END, "longest": 8}
    said = greedy(model.speaker(image), first, **how)
    assert torch.equal(said, greedy(no_cache(model, image), first, **how))
    assert torch.equal(said, beam_search(model.speaker(image), first, beams=1, **how))
    beams = beam_search(model.speaker(image, copies=3), first, beams=3, **how)
    assert torch.equal(beams, beam_search(no_cache(model, image.repeat_interleave(3, 0)), first, beams=3, **how))
    assert len({tuple(text) for text in said.tolist()}) > 1  # not the same about all pictures


# --- stage 2 ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_words():
    model, image = shaken(), states()
    alone = model.qformer.without_words()
    names, whole = dict(alone.named_parameters()), dict(model.qformer.named_parameters())
    lost = {"embed.word.weight", "embed.position.weight", *(f"blocks.{i}.{n}" for i in range(DEPTH) for n in WORDS)}
    assert names.keys() == whole.keys() - lost and lost <= whole.keys()
    expected = model.see(image)[0]
    assert torch.equal(alone(alone.queries(B), Q, image)[0], expected)
    # A copy, all of which learns, and neither knows of the other's fate.
    assert not {p.data_ptr() for p in names.values()} & {p.data_ptr() for p in whole.values()}
    assert all(p.requires_grad for p in names.values())
    shake(alone)
    assert torch.equal(model.see(image)[0], expected) and apart(alone(alone.queries(B), Q, image)[0], expected)
    assert model.encode_text(read()[0]).shape == (B, 20)  # nothing was taken away from the model itself


@pytest.mark.parametrize("kind", MOUTHS)
@torch.no_grad()
def test_the_prefix_is_what_the_queries_saw_through_one_linear_layer(kind):
    first = shaken()
    model, images = BLIP2Speaker(first, kind(MOUTH)).eval(), pictures()
    assert model.language_proj.weight.shape == (D_LM, D)
    shake(model.language_proj)
    image = model.look(images)
    close(image, first.look(images), 0)
    weight, bias = model.language_proj.parameters()
    prefix = model.prefix(image)
    close(prefix, first.see(image)[0] @ weight.T + bias)
    assert prefix.shape == (B, Q, D_LM)
    assert model.eye is first.eye and model.config is first.config
    before = weights_of(first)
    for part in (model.qformer, model.ln_vision, model.language_proj):  # what learns is stage 2's own
        shake(part)
    assert moved(before, first) == set() and apart(model.prefix(model.look(images)), prefix)


@pytest.mark.parametrize("kind", MOUTHS)
def test_the_mouth_is_frozen_and_the_gradient_flows_through_it(kind):
    model, images, (ids, mask) = speaking(kind), pictures(), read()
    assert model.mouth.config is not None and not any(p.requires_grad for p in model.mouth.parameters())
    ids = led_by(ids, DEC)
    more = {"prompt": texts()} if kind is EncoderDecoderLM else {}
    scores = model.mouth.lm_head(model.write(ids, model.look(images), **more))
    F.cross_entropy(scores.flatten(0, 1), next_words(ids, mask).flatten()).backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == VISION | ENTRY | {"qformer.query_tokens", "language_proj.weight", "language_proj.bias"} | (
        in_blocks(SHARED | QUERIES) | in_blocks(CROSS, (0, 2))
    )
    assert touched(model) == trainable
    assert all(p.grad is None for part in (model.eye, model.mouth) for p in part.parameters())


def test_the_mouth_that_is_given_is_the_one_that_speaks():
    mouth = DecoderLM(MOUTH).train()
    model = BLIP2Speaker(shaken(), mouth)
    assert model.mouth is mouth  # no copy is taken


@pytest.mark.parametrize("kind", MOUTHS)
def test_training_leaves_eye_and_mouth_as_they_are(kind):
    model, ids = BLIP2Speaker(BLIP2(SMALL, Eye(ViT(TOWER))), kind(replace(MOUTH, dropout=0.3))), led_by(texts(), DEC)
    before, weights, batch = [digest(model.eye), digest(model.mouth)], weights_of(model), (pictures(), ids, ids != 0)

    def loss(model: BLIP2Speaker, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        assert model.training and model.qformer.training and model.language_proj.training
        assert not any(m.training for part in (model.eye, model.mouth) for m in part.modules())
        scores = model.mouth.lm_head(model.write(ids, model.look(images)))
        return F.cross_entropy(scores.flatten(0, 1), next_words(ids, mask).flatten())

    fit(model, lambda step: batch, loss, steps=2, lr=1e-2, weight_decay=0.5, progress=None)
    assert [digest(model.eye), digest(model.mouth)] == before
    assert moved(weights, model) == {name for name in weights if name.split(".")[0] not in ("eye", "mouth")}
    held = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert not held & {id(p) for part in (model.eye, model.mouth) for p in part.parameters()}
    assert model.train() is model and model.training and not model.mouth.training
    with torch.no_grad():  # no dropout: a frozen mouth always says the same
        one, two = (model.write(ids, model.look(batch[0])) for _ in range(2))
    assert torch.equal(one, two)


@torch.no_grad()
def test_a_prefix_takes_the_place_of_words():
    """Given the vectors of words as a prefix, the mouth goes on as after those words; only the text's own states come
    back, so that no loss can be taken of what the picture says."""
    model, (ids, _), words = speaking(DecoderLM), full(), torch.randint(7, 30, (B, Q))
    ids = led_by(ids, DEC)
    mouth, image = model.mouth, states()
    whole = mouth(mouth.word(torch.cat([words, ids], dim=1)))[0]
    close(mouth.write(ids, mouth.word(words)), whole[:, Q:])
    prefix = model.prefix(image)
    expected = mouth(torch.cat([prefix, mouth.word(ids)], dim=1))[0]
    got = model.write(ids, image)
    assert got.shape == (B, L, D_LM)
    close(got, expected[:, Q:])
    assert apart(got, expected[:, :L])
    # The loss counts the words behind [DEC] and nothing else: by hand.
    labels = next_words(ids, torch.ones_like(ids, dtype=torch.bool))
    by_hand = -torch.stack([mouth.lm_head(expected[b, Q + t]).log_softmax(-1)[ids[b, t + 1]]
                            for b in range(B) for t in range(L - 1)]).mean()  # fmt: skip
    close(F.cross_entropy(mouth.lm_head(got).flatten(0, 1), labels.flatten()), by_hand)


@torch.no_grad()
def test_an_encoder_decoder_reads_picture_and_prompt():
    model, (ids, _), image = speaking(EncoderDecoderLM), full(), states()
    ids, prompt = led_by(ids, DEC), texts()
    got = model.write(ids, image, prompt=prompt, prompt_mask=prompt != 0)
    assert got.shape == (B, L, D_LM)
    close(got, model.mouth.write(ids, model.prefix(image), prompt=prompt))
    context, mask = model.mouth.read(model.prefix(image), prompt)
    close(got, model.mouth.text.decode(ids, context, context_mask=mask)[0])
    for other in (model.write(ids, image), model.write(ids, states(), prompt=prompt),
                  model.write(ids, image, prompt=other_word(prompt, 1))):  # fmt: skip
        assert apart(got, other)


@pytest.mark.parametrize("kind", MOUTHS)
@torch.no_grad()
def test_the_mouth_speaks_about_the_picture(kind):
    model, (ids, _), image = speaking(kind), full(), states()
    ids = led_by(ids, DEC)
    scores = model.mouth.lm_head(model.write(ids, image))
    close(spoken(model.speaker(image), ids), scores)
    for place in range(S):
        other = image.clone()
        other[1, place] += torch.randn(24)
        assert differs(model.write(ids, other), model.write(ids, image)) == [False, True, False]
    prompt, how, first = torch.randint(7, 30, (B, 3)), {"end": END, "longest": 4}, torch.full((B,), DEC)
    prompt[:, 0] = DEC
    for given in ({}, {"prompt": prompt}):
        start = prompt[:, -1] if given and kind is DecoderLM else first
        said = greedy(model.speaker(image, **given), start, **how)
        texts_ = torch.cat([prompt if given and kind is DecoderLM else first[:, None], said], dim=1)
        more = {} if kind is DecoderLM else given
        best = model.mouth.lm_head(model.write(texts_, image, **more)).argmax(-1)[:, -said.shape[1] - 1 : -1]
        written = (said == END).cumsum(1) - (said == END).long() == 0  # up to the first end
        assert torch.equal(said[written], best[written])
        assert torch.equal(said, beam_search(model.speaker(image, **given), start, beams=1, **how))
        assert beam_search(model.speaker(image, copies=3, **given), start, beams=3, **how).shape[0] == B


# --- starting values, saving -----------------------------------------------------------------------------------------


def test_initial_values():
    vit = tower()
    model = BLIP2(QFormerConfig(image_width=24, depth=2), Eye(vit))
    table = model.qformer.embed.word.weight
    for name, module in model.named_modules():
        if name.startswith("eye"):
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            wide = isinstance(module, nn.Linear) and module.weight is not table
            std = 0.02 * (6**0.5 if wide else 1)  # 768 / 128 = 6
            assert module.weight.std().item() == pytest.approx(std, rel=4.5 / (2 * module.weight.numel()) ** 0.5), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert model.qformer.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.temp.item() == pytest.approx(0.07)
    theirs = vit.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.eye.tower.state_dict().items())
    second = BLIP2Speaker(model, DecoderLM(replace(MOUTH, width=64, heads=4)))
    assert second.language_proj.weight.std().item() == pytest.approx(0.02 * 6**0.5, rel=0.05)
    assert not second.language_proj.bias.any()


def test_same_seed_same_model():
    vit, models = tower(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(BLIP2(SMALL, Eye(vit)).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        constant = name == "temp" or name.endswith("bias") or "norm" in name or name.startswith(("eye", "ln_"))
        assert torch.equal(value, models[2][name]) == constant, name


@pytest.mark.parametrize("kind", MOUTHS)
@torch.no_grad()
def test_weights_travel(kind, tmp_path: Path):
    model, other = shaken(), BLIP2(SMALL, Eye(ViT(TOWER))).eval()
    save_weights(model, tmp_path / "first.safetensors")
    load_weights(other, tmp_path / "first.safetensors")
    images, (ids, mask) = pictures(), read()
    expected, named = model(images, ids, mask), other(images, ids, mask)
    assert all(torch.equal(named[name], expected[name]) for name in expected)
    assert other.lm_head.decoder.weight is other.qformer.embed.word.weight
    assert not any(p.requires_grad for p in other.eye.parameters())
    model, other = speaking(kind), BLIP2Speaker(BLIP2(SMALL, Eye(ViT(TOWER))), kind(MOUTH)).eval()
    save_weights(model, tmp_path / "second.safetensors")
    load_weights(other, tmp_path / "second.safetensors")
    ids = led_by(ids, DEC)
    assert torch.equal(other.write(ids, other.look(images)), model.write(ids, model.look(images)))


@torch.no_grad()
def test_bfloat16_autocast_is_finite_and_close():
    model, images, (ids, mask) = shaken(), pictures(), read()
    expected = model(images, ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        named = model(images, ids, mask)
    for name in expected:
        assert named[name].isfinite().all() and (named[name] - expected[name]).abs().mean() < 0.1, name
    assert named["query vectors"].dtype == named["text vector"].dtype == torch.float32
