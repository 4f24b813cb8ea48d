"""VLMo: which expert computes which tokens, what all of them share, and one model in three uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tower_helpers import B, L, apart, close, differs, pictures, shake, texts, touched

from minivlp.data.text import DEFAULT_VOCAB_SIZE
from minivlp.layers import Attention, count_parameters, patchify
from minivlp.models.vit import ViT, ViTConfig
from minivlp.models.vlmo import (
    Expert,
    MoMEBlock,
    SeparateAttention,
    TwoPictures,
    VLMo,
    VLMoConfig,
    moves_in_stage_2,
    paper_config,
    routes,
    shares,
    start_from_vit,
)
from minivlp.train import load_weights, save_weights

torch.set_num_threads(1)

# Two blocks below and two with VL-FFN; no scale starts at 1.
SMALL = VLMoConfig(
    image_size=16, patch_size=4, vocab_size=30, max_text=9, width=16, depth=4, pair_depth=2, heads=4, mlp_ratio=3,
    layer_scale=0.7, codes=6,
)  # fmt: skip
D, S, T = SMALL.width, 17, L + 17  # a class token and 16 patches
LOW, TOP = range(2), range(2, 4)
BEFORE = {"text": [("text", L)], "image": [("image", S)], "pair": [("text", L), ("image", S)]}
PAIR = [("pair", T)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(config: VLMoConfig = SMALL, std: float = 0.2) -> VLMo:
    return shake(VLMo(config), std)


def read() -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts, two of them padded."""
    ids = texts()
    return ids, ids != 0


def who_changed(a: Tensor, b: Tensor) -> list[int]:
    """The places (B, T, D) at which something differs in any entry."""
    return ((a - b).abs().amax((0, 2)) > 1e-5).nonzero()[:, 0].tolist()


def experts_of(names: set[str]) -> list[str]:
    """Of parameters' names: "block name" of the experts among them."""
    found = {f"{part[1]} {part[3]}" for name in names if (part := name.split("."))[0] == "blocks" and "experts" in part}
    return sorted(found)


def uses(model: VLMo) -> dict[str, Callable[[], Tensor]]:
    """The three uses of one model, name -> final states (B, T, D)."""
    images, (ids, mask) = pictures(), read()

    def pair() -> Tensor:
        named = model(images, ids, mask)[1]
        return torch.cat([named["text"], named["image"]], dim=1)

    return {"image": lambda: model.image_states(images), "text": lambda: model.text_states(ids, mask), "pair": pair}


# --- sizes and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backbone", "published"), [("base", 151.8, 175), ("large", 529.8, 562)])
def test_published_sizes(name, backbone, published):
    """What the official transformer has: patches, class token, blocks without a bias of the keys, last LayerNorm. With
    the word table it is what the paper calls the size: 175M, and 562M for large. Heads come on top."""
    with torch.device("meta"):
        model = VLMo(paper_config(name))
    c = model.config
    trunk = sum(count_parameters(m) for m in (model.embed.image.patch_embed, model.blocks, model.norm)) + c.width
    trunk -= c.depth * c.width  # ours has a bias of the keys, which changes nothing
    assert round(trunk / 1e6, 1) == backbone
    assert (trunk + 30_522 * c.width) / 1e6 == pytest.approx(published, rel=0.002)  # and positions of another kind
    low, top = count_parameters(model.blocks[0]), count_parameters(model.blocks[-1])
    expert = 2 * c.width + 8 * c.width**2 + 5 * c.width
    assert top - low == expert == count_parameters(model.blocks[0].experts["text"])
    assert [len(block.experts) for block in model.blocks] == [2] * (c.depth - c.pair_depth) + [3] * c.pair_depth
    assert model.embed.image.pos_embed.shape == (1, 197, c.width) and c.width // c.heads == 64


def test_paper_config_says_what_the_paper_says():
    base, large = paper_config(), paper_config("large")
    assert (base.width, base.depth, base.pair_depth, base.heads) == (768, 12, 2, 12)
    assert (large.width, large.depth, large.pair_depth, large.heads) == (1024, 24, 3, 16)
    for c in (base, large):
        assert (c.image_size, c.patch_size, c.max_text, c.vocab_size, c.codes) == (224, 16, 40, 30_522, 8_192)
        assert c.layer_scale == 0.1
    with pytest.raises(ValueError, match=r"^no VLMo is called 'huge': choose one of 'base', 'large'$"):
        paper_config("huge")


def test_the_default_fits_the_courses_vocabulary():
    c = VLMoConfig()
    assert c.vocab_size == DEFAULT_VOCAB_SIZE and c.pad_id == 0
    assert c.image_config() == ViTConfig()  # so that lesson 01's ViT can be taken over
    assert SMALL.image_config() == ViTConfig(16, 4, 3, 16, 4, 4, 3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(image_size=18), "image_size 18 is not a multiple of patch_size 4"),
        (dict(heads=5), "width 16 is not a multiple of 5 heads"),
        (dict(pair_depth=4), "pair_depth=4: choose 0 to 3, fewer than the blocks"),
        (dict(pair_depth=-1), "pair_depth=-1: choose 0 to 3, fewer than the blocks"),
        (dict(experts="gated"), "experts='gated': choose one of 'modality', 'one'"),
        (dict(attention="none"), "attention='none': choose one of 'shared', 'separate'"),
    ],
)
def test_configs_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **option)


def test_inputs_that_do_not_fit():
    model = VLMo(SMALL)
    with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions"):
        model(pictures(), torch.ones(B, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got \(3, 3, 20, 20\)"):
        model(pictures(size=20), texts())


def test_options_arrive_everywhere():
    options = dict(dropout=0.3, eps=0.5, text_eps=0.25, temperature=0.2, answers=11, codes=9, modality_types=3)
    model = VLMo(replace(SMALL, **options))
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert eps.pop("embed.text.norm") == eps.pop("mlm_head.norm") == 0.25
    assert eps.pop("answer_head.1") == 1e-5  # torch's own
    assert set(eps.values()) == {0.5} and len(eps) == 4 + 2 * 2 + 2 * 3 + 1
    assert model.blocks[0].experts["text"].mlp.fc1.out_features == 3 * D
    assert model.mim_head.out_features == 9 and model.answer_head[-1].out_features == 11
    assert model.embed.types.weight.shape == (3, D)
    assert {m.heads for m in model.modules() if isinstance(m, Attention)} == {4}
    for scale in (model.logit_scale, model.logit_vl_scale):
        assert scale.exp().item() == pytest.approx(5)
    assert model.temp.item() == pytest.approx(0.2) and VLMo(SMALL).temp.item() == pytest.approx(0.07)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    assert model.temp.item() == pytest.approx(math.exp(-3))
    assert VLMo(SMALL).answer_head is None


@pytest.mark.parametrize("attention", ["shared", "separate"])
def test_dropout_is_at_work_in_training_alone(attention):
    model = shaken(replace(SMALL, dropout=0.3, attention=attention))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    run = uses(model)
    for name in run:
        close(run[name](), run[name](), 0)
    model.train()
    for name in run:
        assert apart(run[name](), run[name]()), name
    # In each block: of attention and MLP both.
    block, x = model.blocks[0], torch.randn(B, T, D)
    for part in (block.gamma_1, block.gamma_2):
        with torch.no_grad():
            kept = part.clone()
            part.zero_()
            assert apart(block(x, BEFORE["pair"])[0], block(x, BEFORE["pair"])[0])
            part.copy_(kept)


# --- routes ----------------------------------------------------------------------------------------------------------


def test_routes_by_hand():
    text, image = ("text", 7), ("image", 17)
    assert [list(r) for r in routes(SMALL, 7, 17)] == [[text, image]] * 2 + [[("pair", 24)]] * 2
    assert [list(r) for r in routes(SMALL, 7, 0)] == [[text]] * 4
    assert [list(r) for r in routes(SMALL, 0, 17)] == [[image]] * 4
    assert [list(r) for r in routes(SMALL, 7, 0, pair_experts=True)] == [[text]] * 2 + [[("pair", 7)]] * 2
    assert [list(r) for r in routes(SMALL, 0, 17, pair_experts=True)] == [[image]] * 2 + [[("pair", 17)]] * 2
    assert [list(r) for r in routes(SMALL, 0, 17, pair_experts=False)] == [[image]] * 4
    none = replace(SMALL, pair_depth=0)
    assert [list(r) for r in routes(none, 7, 17)] == [[text, image]] * 4
    three = replace(SMALL, pair_depth=3)
    assert [list(r) for r in routes(three, 7, 17)] == [[text, image]] + [[("pair", 24)]] * 3


def test_shares_cut_a_row_as_the_route_says():
    x = torch.arange(24.0).view(1, 24, 1).expand(2, 24, 3)
    cut = [(name, part[0, :, 0].tolist()) for name, part in shares(x, [("text", 7), ("image", 17)])]
    assert cut == [("text", [*range(7)]), ("image", [*range(7, 24)])]
    for rows, lengths in ((1, [1]), (7, [7]), (9, [7, 2])):  # a row may end early
        assert [part.shape[1] for _, part in shares(x[:, :rows], [("text", 7), ("image", 17)])] == lengths


@torch.no_grad()
def test_who_computes_what():
    """Every expert that runs, with the number of its tokens, in each of the three uses."""
    model, ran = shaken(), []
    for i, block in enumerate(model.blocks):
        for name, expert in block.experts.items():
            expert.register_forward_pre_hook(lambda _, x, key=(i, name): ran.append((*key, x[0].shape[1])))
    expected = {
        "image": [(i, "image", S) for i in range(4)],
        "text": [(i, "text", L) for i in range(4)],
        "pair": [(i, name, n) for i in LOW for name, n in BEFORE["pair"]] + [(i, "pair", T) for i in TOP],
    }
    for name, run in uses(model).items():
        ran.clear()
        run()
        assert ran == expected[name], name


@torch.no_grad()
def test_another_expert_changes_its_own_tokens_alone():
    """In each block, each expert, each route: who has other states after that very block."""
    model, x = shaken(), torch.randn(B, T, D)
    tokens = {"text": range(L), "image": range(L, T), "pair": range(T)}
    for i, block in enumerate(model.blocks):
        parts = {"text": x[:, :L], "image": x[:, L:], "pair": x}
        for use, route in BEFORE.items():
            route = PAIR if use == "pair" and i in TOP else route
            states = parts[use]
            before = block(states, route)[0]
            for name in block.experts:
                changed = deepcopy(block)
                shake(changed.experts[name])
                assert all(torch.equal(p, dict(changed.named_parameters())[n]) for n, p in block.named_parameters()
                           if f"experts.{name}." not in n)  # fmt: skip
                own = name in dict(route)
                expected = [*range(states.shape[1])] if own and use != "pair" else [*tokens[name]] if own else []
                assert who_changed(changed(states, route)[0], before) == expected, (i, use, name)


@torch.no_grad()
def test_another_expert_in_the_whole_model():
    """States before its block stay, those of its tokens change in it, and one block later everybody's."""
    images, (ids, _) = pictures(), texts_and_all()
    model = shaken()
    before = model(images, ids, everything=True)[1]
    tokens = {"text": [*range(L)], "image": [*range(L, T)], "pair": [*range(T)]}
    for i, block in enumerate(model.blocks):
        for name, expert in block.experts.items():
            kept = deepcopy(expert.state_dict())
            shake(expert)
            after = model(images, ids, everything=True)[1]
            expert.load_state_dict(kept)
            used = (name == "pair") == (i in TOP)
            for j in range(4):
                changed = who_changed(after[f"block_{j}"], before[f"block_{j}"])
                everyone = [*range(T)] if used else []
                assert changed == ([] if j < i else (tokens[name] if used else []) if j == i else everyone), (i, name)


def texts_and_all() -> tuple[Tensor, Tensor]:
    """Texts without padding."""
    ids = torch.randint(4, 30, (B, L))
    return ids, torch.ones_like(ids, dtype=torch.bool)


EXPERTS = {
    "image": [f"{i} image" for i in range(4)],
    "text": [f"{i} text" for i in range(4)],
    "pair": sorted([f"{i} {name}" for i in LOW for name in ("image", "text")] + [f"{i} pair" for i in TOP]),
}


def test_which_experts_learn_from_which_use():
    for use in EXPERTS:
        model = shaken()
        states = uses(model)[use]()
        (states * torch.randn_like(states)).sum().backward()
        names = touched(model)
        assert experts_of(names) == EXPERTS[use], use
        assert "embed.text.word.weight" in names or use == "image"
        assert "embed.image.cls_token" in names or use == "text"
        for i in range(4):  # what all of them share learns from each
            for part in ("norm1.weight", "attn.q.weight", "attn.kv.weight", "attn.proj.weight", "gamma_1", "gamma_2"):
                assert f"blocks.{i}.{part}" in names, (use, i, part)
        assert "norm.weight" in names


def test_which_experts_learn_from_which_itc():
    for side, other in (("image", "text"), ("text", "image")):
        for head in ("itc", "itc_vl"):
            model, (ids, mask) = shaken(), read()
            x = model.look(pictures()) if side == "image" else model.read(ids, mask)
            vector = model.towers(x, side, mask if side == "text" else None)[head]
            (vector * torch.randn_like(vector)).sum().backward()
            names = touched(model)
            top = side if head == "itc" else "pair"
            assert experts_of(names) == sorted([f"{i} {side}" for i in LOW] + [f"{i} {top}" for i in TOP])
            projections = {name for name in names if "_proj." in name}
            assert projections == {f"{head}_{side}_proj.weight"}
            assert not any(name.startswith(f"embed.{other}.") for name in names)


def test_attention_norm_and_scales_are_the_same_in_every_use():
    """One attention, one LayerNorm before it and two scales in a block; each use calls these very modules once."""
    model = shaken()
    for block in model.blocks:
        own = {name.partition(".")[0] for name, _ in block.named_parameters()}
        assert own == {"norm1", "attn", "experts", "gamma_1", "gamma_2"}
        assert [m for m in block.modules() if isinstance(m, Attention)] == [block.attn]
    sizes = {"image": S, "text": L, "pair": T}
    called = []
    for i, block in enumerate(model.blocks):
        for name in ("norm1", "attn"):
            module = getattr(block, name)
            module.register_forward_pre_hook(lambda _, x, key=(i, name): called.append((*key, x[0].shape[1])))
    for use, run in uses(model).items():
        called.clear()
        before = run()
        assert called == [(i, name, sizes[use]) for i in range(4) for name in ("norm1", "attn")], use
        for part in ("norm1.weight", "attn.kv.weight", "attn.proj.bias", "gamma_1", "gamma_2"):
            parameter = model.blocks[1].get_parameter(part)
            with torch.no_grad():
                kept = parameter.clone()
                parameter.add_(torch.randn_like(parameter))
                assert apart(run(), before, 1e-3), (use, part)
                parameter.copy_(kept)


def test_experts_have_their_own_layernorm():
    for block in VLMo(SMALL).blocks:
        norms = [expert.norm for expert in block.experts.values()]
        assert len({id(p) for norm in norms for p in norm.parameters()}) == 2 * len(norms)
        assert len({id(p) for e in block.experts.values() for p in e.parameters()}) == 6 * len(norms)
        assert block.norm1 not in norms


@torch.no_grad()
def test_words_and_patches_meet_in_the_first_block():
    """Attention is joint from the start: this is no late fusion."""
    model, images, (ids, mask) = shaken(), pictures(), texts_and_all()
    before = model(images, ids, mask, everything=True)[1]
    for changed in ((other_patch(images, 5), ids), (images, other_word(ids, 2))):
        after = model(*changed, mask, everything=True)[1]
        for i in range(4):
            assert who_changed(after[f"block_{i}"], before[f"block_{i}"]) == [*range(T)]
    weights = before["attention_0"]
    close(weights.sum(-1), torch.ones(B, 4, T))
    assert weights.min() > 0 and weights.shape == (B, 4, T, T)


def other_patch(images: Tensor, place: int) -> Tensor:
    """The pictures with other pixels in one patch of four rows and columns."""
    images, (row, column) = images.clone(), divmod(place, 4)
    images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].neg_()
    return images


def other_word(ids: Tensor, place: int) -> Tensor:
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


# --- a block, written a second time ----------------------------------------------------------------------------------


def by_hand(block: MoMEBlock, x: Tensor, route: list[tuple[str, int]], mask: Tensor | None = None) -> Tensor:
    """The paper's equations, token by token and head by head: x (B, T, D), mask (B, T)."""
    w = block.state_dict()
    eps, heads = block.norm1.eps, 4
    d = x.shape[2] // heads
    owner = [name for name, n in route for _ in range(n)]

    def norm(v: Tensor, name: str) -> Tensor:
        v = v - v.sum() / len(v)
        return v / ((v * v).sum() / len(v) + eps) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(v: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    out = torch.empty_like(x)
    for b in range(len(x)):
        seen = [norm(token, "norm1") for token in x[b]]
        asks, tells = [linear(v, "attn.q") for v in seen], [linear(v, "attn.kv") for v in seen]
        may = range(len(seen)) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for t, token in enumerate(x[b]):
            answers = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                key = [(asks[t][part] * tells[s][:D][part]).sum() / d**0.5 for s in may]
                chance = torch.exp(torch.stack(key))
                chance = chance / chance.sum()
                answers.append(sum(c * tells[s][D:][part] for c, s in zip(chance, may, strict=True)))
            hidden = token + w["gamma_1"] * linear(torch.cat(answers), "attn.proj")
            v = linear(norm(hidden, f"experts.{owner[t]}.norm"), f"experts.{owner[t]}.mlp.fc1")
            v = v * (1 + torch.erf(v / 2**0.5)) / 2
            out[b, t] = hidden + w["gamma_2"] * linear(v, f"experts.{owner[t]}.mlp.fc2")
    return out


@pytest.mark.parametrize("use", ["text", "image", "pair", "pair below"])
@torch.no_grad()
def test_a_block_by_hand(use):
    block = shake(MoMEBlock(SMALL, pair=True)).double()
    route = {"text": [("text", 4)], "image": [("image", 5)], "pair": [("pair", 9)]}.get(
        use, [("text", 4), ("image", 5)]
    )
    x = torch.randn(2, sum(n for _, n in route), D, dtype=torch.double)
    mask = torch.ones(2, x.shape[1], dtype=torch.bool)
    mask[1, 2:4] = False
    expected = by_hand(block, x, route, mask)
    close(block(x, route, mask=mask[:, None, None])[0], expected, 1e-10)
    close(block.float()(x.float(), route, mask=mask[:, None, None])[0], expected.float(), 1e-6 * expected.abs().max())
    block.double()
    close(block(x, route)[0], by_hand(block, x, route), 1e-10)
    wrong = {
        "padding is seen": by_hand(block, x, route),
        "the wrong expert": by_hand(block, x, [({"text": "image"}.get(name, "text"), n) for name, n in route], mask),
        "one expert for all": by_hand(block, x, [(route[0][0], x.shape[1])], mask) if len(route) > 1 else x,
        "picture first": by_hand(block, x, route[::-1], mask) if len(route) > 1 else x,
    }
    for name, other in wrong.items():
        assert any(differs(other, expected, 0.01)), name


@pytest.mark.parametrize("attention", ["shared", "separate"])
@torch.no_grad()
def test_rows_compute_the_first_tokens_alone(attention):
    block = shake(MoMEBlock(replace(SMALL, attention=attention), pair=False))
    x, route = torch.randn(B, T, D), BEFORE["pair"]
    entered = []
    for name, expert in block.experts.items():
        expert.register_forward_pre_hook(lambda _, x, name=name: entered.append((name, x[0].shape[1])))
    everyone = block(x, route)[0]
    for rows, expected in ((1, [("text", 1)]), (L, [("text", L)]), (L + 2, [("text", L), ("image", 2)])):
        entered.clear()
        some = block(x, route, rows=rows)[0]
        close(some, everyone[:, :rows])
        assert entered == expected
        assert apart(block(x[:, :rows], route)[0], some)  # they still see all the others


# --- layer scale -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layer_scale():
    for block in VLMo(replace(SMALL, layer_scale=0.1)).blocks:
        for scale in (block.gamma_1, block.gamma_2):
            assert scale.shape == (D,) and torch.equal(scale, torch.full((D,), 0.1)) and scale.requires_grad
    without = VLMo(replace(SMALL, layer_scale=0.0))
    assert not [name for name in without.state_dict() if "gamma" in name]
    assert all(block.gamma_1 is None and block.gamma_2 is None for block in without.blocks)
    assert count_parameters(VLMo(SMALL)) - count_parameters(without) == 4 * 2 * D
    ones = VLMo(replace(SMALL, layer_scale=1.0))  # none is the same as all ones
    shake(without)
    ones.load_state_dict(without.state_dict(), strict=False)
    images, (ids, mask) = pictures(), read()
    close(ones.eval()(images, ids, mask)[0], without(images, ids, mask)[0], 0)


@torch.no_grad()
def test_each_scale_weighs_its_own_half():
    block, x = shake(MoMEBlock(SMALL, pair=True)), torch.randn(B, T, D)
    route = BEFORE["pair"]
    block.gamma_1.zero_()
    mlp = torch.cat([block.experts[name](part) for name, part in shares(x, route)], dim=1)
    close(block(x, route)[0], x + block.gamma_2 * mlp)
    block.gamma_2.zero_()
    assert torch.equal(block(x, route)[0], x)  # nothing but the stream
    block.gamma_1.normal_()
    close(block(x, route)[0], x + block.gamma_1 * block.attn(block.norm1(x))[0])


# --- embeddings ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_types_are_added_to_words_and_pictures():
    model, images, (ids, mask) = shaken(replace(SMALL, modality_types=3)), pictures(), read()
    types = model.embed.types.weight
    close(model.read(ids, mask), model.embed.text(ids) + types[0])
    close(model.look(images), model.embed.image(images) + types[1])
    second = model.embed.look(images, kind=2)
    close(second, model.embed.image(images) + types[2])
    close(model(images, ids, mask, kind=2)[0], model.fuse(model.read(ids, mask), second, mask)[0])
    assert apart(model(images, ids, mask, kind=2)[0], model(images, ids, mask)[0])


@torch.no_grad()
def test_covered_patches_are_not_seen():
    """Stage 1: a covered patch is the learned vector, at its own place."""
    model, images = shaken(), pictures()
    hidden = torch.zeros(B, 16, dtype=torch.bool)
    hidden[0, 5], hidden[1, [0, 5, 7]], hidden[2, 5] = True, True, True
    states = model.image_states(images, hidden=hidden)
    close(model.image_states(other_patch(images, 5), hidden=hidden), states, 0)
    assert differs(model.image_states(other_patch(images, 7), hidden=hidden), states) == [True, False, True]
    assert apart(model.image_states(images), states)
    x = model.embed.look(images, hidden=hidden)
    place = model.embed.image.pos_embed[0, 1:] + model.embed.types.weight[1]
    close(x[:, 1:][hidden], (model.embed.mask_patch + place).expand(B, -1, -1)[hidden])
    close(x[:, 1:][~hidden], model.look(images)[:, 1:][~hidden])
    close(x[:, 0], model.look(images)[:, 0])
    close(model.image_states(images, hidden=torch.zeros_like(hidden)), model.image_states(images))
    model.embed.mask_patch.add_(torch.randn(D))
    assert apart(model.image_states(images, hidden=hidden), states)
    assert model.mim_head(states[:, 1:][hidden]).shape == (5, 6)


# --- pairs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shapes_and_names():
    model, images, (ids, mask) = shaken(replace(SMALL, answers=5)), pictures(), read()
    pooled, named = model(images, ids, mask)
    assert {name: tuple(t.shape) for name, t in named.items()} == {"text": (B, L, D), "image": (B, S, D)}
    assert pooled.shape == (B, D) and model.itm_head(pooled).shape == (B, 2)
    assert model.answer_head(pooled).shape == (B, 5)
    assert model.mlm_head(named["text"]).shape == (B, L, 30)
    assert model.image_states(images).shape == (B, S, D) and model.text_states(ids, mask).shape == (B, L, D)
    pooled, named = model(images, ids, mask, everything=True)
    blocks = {f"block_{i}": (B, T, D) for i in range(4)} | {f"attention_{i}": (B, 4, T, T) for i in range(4)}
    assert {name: tuple(t.shape) for name, t in named.items()} == blocks | {"text": (B, L, D), "image": (B, S, D)}
    close(model.norm(named["block_3"]), torch.cat([named["text"], named["image"]], dim=1))
    close(pooled, model(images, ids, mask)[0])


@torch.no_grad()
def test_words_come_first_and_the_first_is_pooled():
    model, images, (ids, mask) = shaken(), pictures(), read()
    pooled, named = model(images, ids, mask)
    close(pooled, torch.tanh(named["text"][:, 0] @ model.pooler.weight.T + model.pooler.bias))
    for other in (named["image"][:, 0], named["text"][:, 1], named["text"].mean(1)):
        assert apart(torch.tanh(model.pooler(other)), pooled)
    x = torch.cat([model.read(ids, mask), model.look(images)], dim=1)
    keys = F.pad(mask, (0, S), value=True)[:, None, None]
    for i, block in enumerate(model.blocks):
        x, _ = block(x, BEFORE["pair"] if i in LOW else PAIR, mask=keys)
    x = model.norm(x)
    close(named["text"], x[:, :L])
    close(named["image"], x[:, L:])
    # What each of the usual mistakes would give.
    other = torch.cat([model.look(images), model.read(ids, mask)], dim=1)
    wrong = {
        "picture first": (other, [*[[("image", S), ("text", L)]] * 2, PAIR, PAIR], T - L),
        "VL-FFN nowhere": (None, [BEFORE["pair"]] * 4, 0),
        "the split is at another place": (None, [*[[("text", 9), ("image", S - 2)]] * 2, PAIR, PAIR], 0),
        "three blocks": (None, [BEFORE["pair"], BEFORE["pair"], PAIR], 0),
    }
    for name, (start, along, place) in wrong.items():
        start = torch.cat([model.read(ids, mask), model.look(images)], dim=1) if start is None else start
        states = model.norm(model.run(start, along, mask=F.pad(mask, (0, S), value=True))[0])
        different = apart(torch.tanh(model.pooler(states[:, place])), pooled, 0.003)
        assert different != (name == "picture first"), name  # whose order alone is no matter, if all move with it
    assert apart(model(images, ids)[0][1:], pooled[1:])  # padding seen


@pytest.mark.parametrize("rows", [1, L])
@torch.no_grad()
def test_rows_give_the_same_numbers(rows):
    model, images, (ids, mask) = shaken(), pictures(), read()
    pooled, named = model(images, ids, mask)
    entered = []
    for block in model.blocks:
        for expert in block.experts.values():
            expert.register_forward_pre_hook(lambda _, x: entered.append(x[0].shape[1]))
    short, some = model(images, ids, mask, rows=rows)
    close(short, pooled)
    close(some["text"], named["text"][:, :rows])
    assert some["image"].shape[1] == 0 and entered == [L, S, L, S, T, rows]
    entered.clear()
    close(model.text_states(ids, mask, rows=rows), model.text_states(ids, mask)[:, :rows])
    close(model.image_states(images, rows=rows), model.image_states(images)[:, :rows])
    assert entered == [L, L, L, rows, L, L, L, L, S, S, S, rows, S, S, S, S]


@torch.no_grad()
def test_padding_never_matters():
    model, images, (ids, mask) = shaken(), pictures(), read()
    pooled, named = model(images, ids, mask)
    alone = model.text_states(ids, mask)
    longer, wide = F.pad(ids, (0, 2), value=11), F.pad(mask, (0, 2))  # up to max_text
    assert longer.shape[1] == SMALL.max_text
    for other, seen in ((torch.where(mask, ids, 11), mask), (longer, wide)):
        p, n = model(images, other, seen)
        close(p, pooled)
        close(n["text"][:, :L][mask], named["text"][mask])
        close(n["image"], named["image"])
        close(model.text_states(other, seen)[:, :L][mask], alone[mask])
    for b, n in enumerate(mask.sum(1)):  # nor does the company
        p, one = model(images[b : b + 1], ids[b : b + 1, :n])
        close(p[0], pooled[b])
        close(one["text"][0], named["text"][b, :n])
        close(one["image"][0], named["image"][b])
    seen = torch.ones_like(mask)
    assert differs(model(images, ids, seen)[0], pooled) == [False, True, True]
    assert differs(model.text_states(ids, seen)[:, :1], alone[:, :1]) == [False, True, True]


def shuffled(model: VLMo, images: Tensor, order: Tensor, *, positions: bool) -> tuple[VLMo, Tensor]:
    """The pictures with their patches in another order, and a model whose positions, if asked, moved along."""
    patches = patchify(images, 4)[:, order].view(B, 4, 4, 3, 4, 4)
    if positions:
        model = deepcopy(model)
        table = model.embed.image.pos_embed
        table.copy_(torch.cat([table[:, :1], table[:, 1:][:, order]], dim=1))
    return model, patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


@torch.no_grad()
def test_the_order_of_the_patches_is_nothing_but_their_positions():
    model, images, (ids, mask) = shaken(), pictures(), read()
    order = torch.randperm(16)
    close(patchify(shuffled(model, images, order, positions=False)[1], 4), patchify(images, 4)[:, order], 0)
    pooled, named = model(images, ids, mask)
    moved, others = shuffled(model, images, order, positions=True)
    p, n = moved(others, ids, mask)
    close(p, pooled)
    close(n["text"][mask], named["text"][mask])
    close(n["image"][:, 1:], named["image"][:, 1:][:, order])
    close(n["image"][:, 0], named["image"][:, 0])
    close(moved.image_states(others)[:, 1:], model.image_states(images)[:, 1:][:, order])
    same, others = shuffled(model, images, order, positions=False)
    assert apart(same(others, ids, mask)[0], pooled, 1e-3)
    assert apart(same.image_states(others)[:, :1], model.image_states(images)[:, :1])
    # Patches are told from words by their place: another order of both is not seen through.
    x = torch.cat([model.look(images), model.read(ids, mask)], dim=1)
    wrong = model.run(x, routes(SMALL, L, S), mask=F.pad(mask, (S, 0), value=True))[0]
    assert apart(torch.tanh(model.pooler(model.norm(wrong)[:, S])), pooled)


# --- the dual encoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_towers_by_hand():
    model, images, (ids, mask) = shaken(), pictures(), read()
    inputs = {"image": (model.look(images), None), "text": (model.read(ids, mask), mask)}
    for side, (x, seen) in inputs.items():
        got = model.towers(x, side, seen)
        assert got.keys() == {"itc", "itc_vl"}
        keys = None if seen is None else seen[:, None, None]
        for head, top in (("itc", side), ("itc_vl", "pair")):
            y = x
            for i, block in enumerate(model.blocks):
                y, _ = block(y, [(side if i in LOW else top, x.shape[1])], mask=keys)
            y = model.norm(y[:, 0]) @ model.get_parameter(f"{head}_{side}_proj.weight").T
            expected = y / y.square().sum(-1, keepdim=True).sqrt()
            close(got[head], expected)
            close(got[head].norm(dim=-1), torch.ones(B))
            assert got[head].dtype == torch.float32
        assert apart(got["itc"], got["itc_vl"])
        assert apart(model.towers(x.flip(0), side, None if seen is None else seen.flip(0))["itc"][[0, 2]],
                     got["itc"][[0, 2]])  # fmt: skip
    seen = model.towers(model.read(ids, mask), "text")  # padding and all
    right = model.towers(model.read(ids, mask), "text", mask)
    assert all(differs(seen[head], right[head], 0.01) == [False, True, True] for head in seen)


@pytest.mark.parametrize("pad_id", [0, 29])
@torch.no_grad()
def test_encoders_are_the_towers(pad_id):
    model, images, (ids, mask) = shaken(replace(SMALL, pad_id=pad_id)), pictures(), read()
    ids = ids.masked_fill(mask & (ids == 29), 28).masked_fill(~mask, pad_id)
    close(model.encode_image(images), model.towers(model.look(images), "image")["itc"])
    vectors = model.encode_text(ids)
    close(vectors, model.towers(model.read(ids, mask), "text", mask)["itc"])
    states = model.text_states(ids, mask)
    close(vectors, F.normalize(model.itc_text_proj(states[:, 0]), dim=-1))
    close(model.encode_text(F.pad(ids, (0, 2), value=pad_id)), vectors)
    assert differs(model.encode_text(ids.masked_fill(~mask, 11)), vectors, 0.01) == [False, True, True]
    for other in (states[:, 1], states.mean(1)):
        assert apart(F.normalize(model.itc_text_proj(other), dim=-1), vectors)
    # A vector of a text knows no picture: the fusion encoder's class token is another one.
    fused = model(images, ids, mask)[1]["text"][:, 0]
    assert apart(F.normalize(model.itc_text_proj(fused), dim=-1), vectors)


@torch.no_grad()
def test_the_towers_do_no_work_twice_and_none_in_vain():
    """The lower blocks once for both ITCs; the last block for the class token alone."""
    model, ran = shaken(), []
    for i, block in enumerate(model.blocks):
        for name, expert in block.experts.items():
            expert.register_forward_pre_hook(lambda _, x, key=(i, name): ran.append((*key, x[0].shape[1])))
    model.towers(model.look(pictures()), "image")
    assert ran == [(0, "image", S), (1, "image", S), (2, "image", S), (3, "image", 1), (2, "pair", S), (3, "pair", 1)]


@torch.no_grad()
def test_match_is_what_a_pair_says():
    model, images, (ids, mask) = shaken(), pictures(), read()
    image, text = model.look(images), model.read(ids, mask)
    scores = model.match(text, mask, image)
    close(scores, model.itm_head(model(images, ids, mask)[0]))
    wrong = model.match(text, mask, image.roll(1, 0))  # embedded once and combined at will
    close(wrong, model.itm_head(model(images.roll(1, 0), ids, mask)[0]))
    assert apart(wrong, scores)
    assert differs(model.match(text, torch.ones_like(mask), image), scores) == [False, True, True]
    other = text.clone()
    other[1] = text[0]
    assert differs(model.match(other, mask, image), scores) == [False, True, False]


# --- variants --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_vl_ffn():
    model, images, (ids, mask) = shaken(replace(SMALL, pair_depth=0)), pictures(), read()
    names = model.state_dict().keys()
    assert not [name for name in names if "pair" in name or "_vl" in name] and "logit_scale" in names
    assert count_parameters(VLMo(SMALL)) - count_parameters(model) == (
        2 * count_parameters(model.blocks[0].experts["text"]) + 2 * D * D + 1
    )
    vectors = model.towers(model.look(images), "image")
    assert vectors.keys() == {"itc"}
    close(vectors["itc"], model.encode_image(images))
    close(model.towers(model.read(ids, mask), "text", mask)["itc"], model.encode_text(ids))
    x = torch.cat([model.read(ids, mask), model.look(images)], dim=1)
    keys = F.pad(mask, (0, S), value=True)[:, None, None]
    for block in model.blocks:
        x = block(x, BEFORE["pair"], mask=keys)[0]
    pooled = torch.tanh(model.pooler(model.norm(x[:, 0])))
    close(model(images, ids, mask)[0], pooled)
    close(model(images, ids, mask, rows=1)[0], pooled)


@torch.no_grad()
def test_one_expert_for_everything_is_a_standard_transformer():
    model, several = shaken(replace(SMALL, experts="one")), VLMo(SMALL)
    for block, others in zip(model.blocks, several.blocks, strict=True):
        assert block.experts.keys() == others.experts.keys()
        assert len({id(expert) for expert in block.experts.values()}) == 1
        assert len({id(expert) for expert in others.experts.values()}) == len(others.experts)
    expert = count_parameters(model.blocks[0].experts["text"])
    assert count_parameters(several) - count_parameters(model) == (2 * 1 + 2 * 2) * expert
    x = torch.randn(B, T, D)
    for block in model.blocks:
        close(block(x, BEFORE["pair"])[0], block(x, [("image", T)])[0])
    # A change is everybody's.
    run = uses(model)
    before = {name: states() for name, states in run.items()}
    shake(model.blocks[3].experts["pair"])
    assert all(apart(run[name](), before[name]) for name in run)


def separated(model: VLMo) -> VLMo:
    """A model with an attention for each modality below the last blocks, at first the same as in `model`."""
    separate = VLMo(replace(model.config, attention="separate"))
    weights, low = {}, model.config.depth - model.config.pair_depth
    for name, value in model.state_dict().items():
        if ".attn." in name and int(name.split(".")[1]) < low:
            for side in ("text", "image"):
                weights[name.replace(".attn.", f".attn.of.{side}.")] = value.clone()
        else:
            weights[name] = value
    separate.load_state_dict(weights)
    return separate.eval()


@torch.no_grad()
def test_separate_attention_of_equal_parts_is_shared_attention():
    model = shaken()
    separate, images, (ids, mask) = separated(model), pictures(), read()
    assert [isinstance(block.attn, SeparateAttention) for block in separate.blocks] == [True, True, False, False]
    attention = count_parameters(model.blocks[0].attn)
    assert count_parameters(separate) - count_parameters(model) == 2 * attention
    for rows in (None, 1, L):
        (pooled, named), (p, n) = (m(images, ids, mask, rows=rows) for m in (model, separate))
        close(p, pooled)
        close(n["text"], named["text"])
        close(n["image"], named["image"])
    close(separate.encode_text(ids), model.encode_text(ids))
    close(separate.encode_image(images), model.encode_image(images))
    none = separated(shaken(replace(SMALL, pair_depth=0)).eval())  # rows= in a last block of that kind
    close(none(images, ids, mask, rows=1)[0], none(images, ids, mask)[0])


@torch.no_grad()
def test_each_modality_has_its_own_attention_if_asked():
    model = separated(shaken())
    run = uses(model)
    before = {name: states() for name, states in run.items()}
    for side, other in (("image", "text"), ("text", "image")):
        attn = model.blocks[0].attn.of[side]
        kept = deepcopy(attn.state_dict())
        shake(attn)
        assert torch.equal(run[other](), before[other])
        assert apart(run[side](), before[side]) and apart(run["pair"](), before["pair"])
        attn.load_state_dict(kept)
    # In a pair: own questions change the own states alone, own keys and values everybody's.
    block, x = model.blocks[0], torch.randn(B, T, D)
    states = block(x, BEFORE["pair"])[0]
    for side, own in (("text", [*range(L)]), ("image", [*range(L, T)])):
        for part, expected in (("q", own), ("proj", own), ("kv", [*range(T)])):
            changed = deepcopy(block)
            shake(getattr(changed.attn.of[side], part))
            assert who_changed(changed(x, BEFORE["pair"])[0], states) == expected, (side, part)


# --- stage 2 ---------------------------------------------------------------------------------------------------------

STAYS = {
    r"embed.mask_patch", "embed.image.cls_token", "embed.image.pos_embed", "embed.image.patch_embed.proj.weight",
    "embed.image.patch_embed.proj.bias", "pooler.weight", "pooler.bias", "logit_scale", "logit_vl_scale",
    "itc_image_proj.weight", "itc_text_proj.weight", "itc_vl_image_proj.weight", "itc_vl_text_proj.weight",
    "itm_head.weight", "itm_head.bias", "mim_head.weight", "mim_head.bias", "answer_head.0.weight",
    "answer_head.0.bias", "answer_head.1.weight", "answer_head.1.bias", "answer_head.3.weight", "answer_head.3.bias",
}  # fmt: skip
WHOLE = ("norm.weight", "norm.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
PROJECTIONS = ("q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias")


@pytest.mark.parametrize("attention", ["shared", "separate"])
def test_what_stage_2_leaves_as_it_was(attention):
    model = VLMo(replace(SMALL, answers=3, attention=attention))
    stays = {name for name, _ in model.named_parameters() if not moves_in_stage_2(name)}
    expected = set(STAYS)
    for i in range(4):
        attn = "attn.of.image" if attention == "separate" and i in LOW else "attn"
        expected |= {f"blocks.{i}.{name}" for name in ("gamma_1", "gamma_2", "norm1.weight", "norm1.bias")}
        expected |= {f"blocks.{i}.{attn}.{name}" for name in PROJECTIONS}
        experts = ("image",) if i in LOW else ("image", "pair")
        expected |= {f"blocks.{i}.experts.{expert}.{name}" for expert in experts for name in WHOLE}
    assert stays == expected
    moves = {name for name, _ in model.named_parameters()} - stays
    assert {"embed.text.word.weight", "embed.types.weight", "norm.weight", "mlm_head.decoder.bias",
            "blocks.3.experts.text.mlp.fc1.weight"} <= moves  # fmt: skip


def test_what_stage_2_trains_is_what_texts_can_teach():
    """No parameter that moves is out of a text's reach, but for the type of pictures, a row of the table of types."""
    model, (ids, mask) = shaken(), read()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(moves_in_stage_2(name))
    scores = model.mlm_head(model.text_states(ids, mask))[mask]
    (scores * torch.randn_like(scores)).sum().backward()
    assert touched(model) == {name for name, _ in model.named_parameters() if moves_in_stage_2(name)}
    assert not model.embed.types.weight.grad[1].any()


# --- starting values -------------------------------------------------------------------------------------------------


def test_initial_values():
    model = VLMo(VLMoConfig(answers=50))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02 * (6**0.5 if isinstance(module, nn.Linear) else 1)  # 768 / 128 = 6
            assert module.weight.std().item() == pytest.approx(std, rel=4.5 / (2 * module.weight.numel()) ** 0.5), name
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    for parameter in (model.embed.image.cls_token, model.embed.image.pos_embed, model.embed.mask_patch):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
    assert [name for name, _ in model.named_parameters() if "_proj" in name and name.endswith("bias")] == []
    assert model.mlm_head.decoder.weight is not model.embed.text.word.weight


def test_same_seed_same_model():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(VLMo(SMALL).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        constant = name.endswith("bias") or "norm" in name or "scale" in name or "gamma" in name
        assert torch.equal(value, models[2][name]) == constant, name


@pytest.mark.parametrize("option", [{}, dict(experts="one"), dict(attention="separate"), dict(pair_depth=0, answers=3)])
@torch.no_grad()
def test_weights_travel(option, tmp_path: Path):
    model, other = shaken(replace(SMALL, **option)), VLMo(replace(SMALL, **option)).eval()
    save_weights(model, tmp_path / "vlmo.safetensors")
    load_weights(other, tmp_path / "vlmo.safetensors")
    images, (ids, mask) = pictures(), read()
    close(other(images, ids, mask)[0], model(images, ids, mask)[0], 0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    if option == dict(experts="one"):
        assert all(len({id(e) for e in block.experts.values()}) == 1 for block in other.blocks)


# --- starting from a ViT ---------------------------------------------------------------------------------------------


def trained_vit(**options) -> ViT:
    return shake(ViT(replace(SMALL.image_config(), num_classes=5, **options)))


@pytest.mark.parametrize("option", [{}, dict(layer_scale=0.1), dict(layer_scale=0.0), dict(attention="separate"),
                                    dict(experts="one"), dict(pair_depth=0)])  # fmt: skip
@torch.no_grad()
def test_start_from_vit(option):
    model, vit, images = shaken(replace(SMALL, **option)), trained_vit(), pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from_vit(model, vit)
    for block in model.blocks:
        scales = [scale for scale in (block.gamma_1, block.gamma_2) if scale is not None]
        assert all((scale == 1).all() for scale in scales) and len(scales) == 2 * (option.get("layer_scale") != 0)
    types, model.embed.types = model.embed.types, None  # a ViT has none
    tokens = vit.encoder(vit.embed(images))[0]
    close(model.image_states(images), tokens, 0)
    model.embed.types = types
    assert apart(model.image_states(images), tokens)
    # Everything else is as before: texts, the other experts, all heads.
    taken = ("embed.image.", "norm.")
    inside = (".norm1.", ".attn.", "gamma", *([".experts."] if option == dict(experts="one") else [".experts.image."]))
    for name, value in model.state_dict().items():
        own = name.startswith(taken) or any(part in name for part in inside)
        own &= ".of.text." not in name
        assert torch.equal(value, before[name]) != own, name
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in vit.parameters():  # by value
        parameter.add_(1)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(image_size=32), "image_size=32 where this VLMo needs 16"),
        (dict(patch_size=8), "patch_size=8 where this VLMo needs 4"),
        (dict(channels=1), "channels=1 where this VLMo needs 3"),
        (dict(width=32), "width=32 where this VLMo needs 16"),
        (dict(depth=2), "depth=2 where this VLMo needs 4"),
        (dict(heads=2), "heads=2 where this VLMo needs 4"),
        (dict(mlp_ratio=4), "mlp_ratio=4 where this VLMo needs 3"),
        (dict(pool="mean"), "pool='mean' where this VLMo needs 'cls'"),
        (dict(position="none"), "position='none' where this VLMo needs '1d'"),
        (dict(norm="post"), "norm='post' where this VLMo needs 'pre'"),
        (dict(gelu="tanh"), "gelu='tanh' where this VLMo needs 'exact'"),
    ],
)
def test_start_from_vit_refuses_what_does_not_fit(option, message):
    model = VLMo(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^the ViT has {message}: build both alike$"):
        start_from_vit(model, trained_vit(**option))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # none taken


# --- two pictures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_pictures():
    vlmo = shaken()
    before = {name: value.clone() for name, value in vlmo.state_dict().items()}
    model = TwoPictures(vlmo).eval()
    left, right, (ids, mask) = pictures(), pictures(), read()
    types = model.vlmo.embed.types.weight
    assert types.shape == (3, D) and torch.equal(types[:2], vlmo.embed.types.weight) and torch.equal(types[2], types[1])
    assert model.config == model.vlmo.config == replace(SMALL, modality_types=3)
    scores = model(left, right, ids, mask)
    assert scores.shape == (B, 2)
    assert apart(model(right, left, ids, mask), scores, 1e-3)  # which is left is seen by the head
    pooled = [vlmo(images, ids, mask)[0] for images in (left, right)]
    close(model.head(torch.cat(pooled, dim=1)), scores)
    shake(types_of := model.vlmo.embed.types)
    first, second = (model.vlmo(images, ids, mask, kind=kind)[0] for images, kind in ((left, 1), (right, 2)))
    close(model(left, right, ids, mask), model.head(torch.cat([first, second], dim=1)))
    assert not torch.equal(types_of.weight[2], types_of.weight[1])
    # It is a copy: the model it came from stays as it is.
    shake(model)
    assert all(torch.equal(value, before[name]) for name, value in vlmo.state_dict().items())


def test_two_pictures_learn_one_model():
    model, (ids, mask) = TwoPictures(shaken()).eval(), read()
    shake(model)
    scores = model(pictures(), pictures(), ids, mask)
    (scores * torch.randn_like(scores)).sum().backward()
    assert count_parameters(model) == count_parameters(model.vlmo) + count_parameters(model.head)
    assert count_parameters(model.vlmo) == count_parameters(VLMo(SMALL)) + D  # one more type
    names = touched(model)
    assert {f"vlmo.blocks.{i}.attn.kv.weight" for i in range(4)} <= names
    assert (model.vlmo.embed.types.weight.grad.abs().amax(1) > 1e-7).all()
    assert len([m for m in model.modules() if isinstance(m, Expert)]) == 2 * 2 + 2 * 3
