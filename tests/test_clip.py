"""CLIP: two towers that meet in one matrix, who reads what in each, how it starts, and the usual wrong versions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tower_helpers import ENDS, EOT, B, L, close, pictures, shake, texts

from minivlp.data.text import DEFAULT_VOCAB_SIZE, Tokenizer
from minivlp.evaluate import recall_at
from minivlp.layers import QuickGELU, count_parameters, patchify
from minivlp.losses import contrastive_loss
from minivlp.models.clip import (
    CLIP,
    MAX_LOGIT_SCALE,
    CLIPConfig,
    CLIPText,
    CLIPVision,
    causal_mask,
    clamp_logit_scale,
    init_clip,
    paper_config,
    start_from_vit,
)
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import fit, parameter_groups

torch.set_num_threads(1)

# No two sizes alike, so that none can stand in for another.
SMALL = CLIPConfig(
    image_size=16, patch_size=4, image_width=24, image_depth=2, image_heads=2, vocab_size=30, max_text=8,
    text_width=16, text_depth=3, text_heads=4, embed_dim=20, eot_id=3,
)  # fmt: skip
N = 16
T = 1 + N  # image tokens: the class token and the patches


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(config: CLIPConfig = SMALL, std: float = 0.2) -> CLIP:
    return shake(CLIP(config), std)


# --- sizes and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "image", "text", "tokens"),
    [
        ("B/32", 151_277_313, 87_849_216, 63_428_096, 50),
        ("B/16", 149_620_737, 86_192_640, 63_428_096, 197),
        ("L/14", 427_616_513, 303_966_208, 123_650_304, 257),
        ("L/14@336px", 427_944_193, 304_293_888, 123_650_304, 577),
    ],
)
def test_published_sizes(name, total, image, text, tokens):
    """The released models' parameters; each tower with its projection, and the temperature is the one left over."""
    with torch.device("meta"):
        model = CLIP(paper_config(name))
    assert count_parameters(model) == total
    assert count_parameters(model.vision) + count_parameters(model.image_projection) == image
    assert count_parameters(model.text) + count_parameters(model.text_projection) == text
    assert image + text + 1 == total
    assert model.vision.pos_embed.shape[1] == tokens and model.text.position.weight.shape[0] == 77
    c = model.config
    assert c.image_width // c.image_heads == c.text_width // c.text_heads == 64  # heads = W / 64 in either tower
    assert c.eot_id == c.vocab_size - 1 == 49_407 and c.eps == 1e-5
    towers = (model.vision, model.text)
    assert all(isinstance(block.mlp.act, QuickGELU) for tower in towers for block in tower.encoder.blocks)


@pytest.mark.parametrize("name", ["B/8", "L/16", "B/32@336px", "ViT-B/32", "RN50", "B", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"no CLIP is called '{name}': choose B/32, B/16, L/14 or L/14@336px"):
        paper_config(name)


def test_the_default_fits_the_courses_vocabulary():
    tokenizer, config = Tokenizer.default(), CLIPConfig()
    assert config.eot_id == tokenizer.sep_id and config.vocab_size == tokenizer.vocab_size == DEFAULT_VOCAB_SIZE
    assert tokenizer.encode("a red ball")[-1] == config.eot_id


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@torch.no_grad()
def test_shapes_and_names(tower):
    model, ids = shaken(replace(SMALL, image_tower=tower)), texts()
    logits, named = model(pictures(5), ids)  # as many pictures as you like
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    assert logits.shape == (5, B) and shapes == {"image": (5, 20), "text": (B, 20)}
    assert model.vision(pictures())[1] == model.text(ids)[1] == {}


@torch.no_grad()
def test_everything_by_name_is_the_same_vector():
    model, images, ids = shaken(), pictures(), texts()
    fast, (state, named) = model.vision(images)[0], model.vision(images, everything=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    blocks = {f"block_{i}": (B, T, 24) for i in range(2)} | {f"attention_{i}": (B, 2, T, T) for i in range(2)}
    assert shapes == blocks | {"embedded": (B, T, 24)}
    assert state.shape == (B, 24)
    close(fast, state)

    fast, (state, named) = model.text(ids)[0], model.text(ids, everything=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    blocks = {f"block_{i}": (B, L, 16) for i in range(3)} | {f"attention_{i}": (B, 4, L, L) for i in range(3)}
    assert shapes == blocks | {"text": (B, L, 16)}
    assert state.shape == (B, 16)
    close(fast, state)
    close(named["text"], model.text.encoder.norm(named["block_2"]))
    close(state, named["text"][torch.arange(B), ENDS])


def test_the_fast_path_has_the_same_gradients():
    model, images, ids = shaken(), pictures(), texts()
    for tower, inputs in ((model.vision, images), (model.text, ids)):
        weights, gradients = torch.randn_like(tower(inputs)[0]), []
        for everything in (False, True):
            tower.zero_grad()
            (tower(inputs, everything=everything)[0] * weights).sum().backward()
            gradients.append([p.grad.clone() for p in tower.parameters()])
        for fast, full in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, full, rtol=1e-4, atol=1e-5)


# --- the matrix ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vectors_have_length_one():
    model, images, ids = shaken(), pictures(), texts()
    raw = model.image_projection(model.vision(images)[0])
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.1  # it is not so by itself
    for vectors in (model.encode_image(images), model.encode_text(ids)):
        close(vectors.norm(dim=-1), torch.ones(B))
    close(model.encode_image(images), raw / raw.square().sum(-1, keepdim=True).sqrt())


@torch.no_grad()
def test_logits_are_exp_t_times_cosine_with_a_row_for_each_picture():
    model, images, ids = shaken(), pictures(), texts()
    model.logit_scale.fill_(1.7)
    logits, named = model(images, ids)
    states = model.image_projection(model.vision(images)[0]), model.text_projection(model.text(ids)[0])
    cosine = torch.stack([torch.stack([F.cosine_similarity(i, t, dim=0) for t in states[1]]) for i in states[0]])
    expected = math.exp(1.7) * cosine
    close(logits, expected)
    close(named["image"], model.encode_image(images))
    close(named["text"], model.encode_text(ids))
    # Rows and columns exchanged, divided by the scale, t itself as the factor, vectors of any length.
    raw = math.exp(1.7) * states[0] @ states[1].T
    for wrong in (expected.T, cosine / math.exp(1.7), 1.7 * cosine, raw):
        assert (logits - wrong).abs().max() > 0.1
    assert logits.abs().max() <= math.exp(1.7) + 1e-5
    # A larger t means larger logits.
    model.logit_scale.add_(math.log(2))
    close(model(images, ids)[0], 2 * logits)


def test_compare_by_hand():
    """Two pictures, three texts, t = ln 10: cosines of 1, 0.6, 0 and of 0.8, 0.96, 0.6, ten times."""
    model = CLIP(SMALL)
    model.logit_scale.data.fill_(math.log(10))
    image = torch.tensor([[1.0, 0.0], [0.8, 0.6]], requires_grad=True)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)
    logits = model.compare(image, text)
    close(logits, torch.tensor([[10.0, 6.0, 0.0], [8.0, 9.6, 6.0]]))
    close(model.compare(text, image), logits.T)  # a row for each of the first
    logits[1, 1].backward()
    close(model.logit_scale.grad, torch.tensor(9.6))  # d exp(t) c / dt = exp(t) c
    close(image.grad, torch.tensor([[0.0, 0.0], [6.0, 8.0]]))
    close(text.grad, torch.tensor([[0.0, 0.0], [8.0, 6.0], [0.0, 0.0]]))


@torch.no_grad()
def test_compare_is_what_the_model_does():
    model, images, ids = shaken(), pictures(5), texts()
    logits, named = model(images, ids)
    close(model.compare(model.encode_image(images), model.encode_text(ids)), logits, 0)
    calls = []
    model.compare = lambda image, text: calls.append((image, text)) or "the logits"  # one definition, for heirs too
    assert model(images, ids)[0] == "the logits" and len(calls) == 1
    for vectors, name in zip(calls[0], ("image", "text"), strict=True):
        assert torch.equal(vectors, named[name])


@torch.no_grad()
def test_logits_are_not_computed_in_half_precision():
    """Near 100 bfloat16 knows every half number only; the temperature would push pairs together that are not."""
    model = CLIP(SMALL)
    model.logit_scale.fill_(MAX_LOGIT_SCALE)
    image, text = (F.normalize(torch.randn(6, 20), dim=-1) for _ in range(2))
    image[0] = text[0]
    expected = model.compare(image, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.compare(image, text)
        halved = model.logit_scale.exp() * image @ text.T
    assert logits.dtype == torch.float32 and logits[0, 0].item() == pytest.approx(100, abs=1e-3)
    close(logits, expected, 0)
    assert (halved - expected).abs().max() > 0.05


@torch.no_grad()
def test_each_row_depends_on_its_picture_and_each_column_on_its_text():
    model, images, ids = shaken(), pictures(), texts()
    before = model(images, ids)[0]
    other_picture, other_text = images.clone(), ids.clone()
    other_picture[1] = -other_picture[1]
    other_text[2, 1] = 33 - other_text[2, 1]
    rows = (model(other_picture, ids)[0] - before).abs() > 1e-4
    columns = (model(images, other_text)[0] - before).abs() > 1e-4
    assert rows.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert columns.tolist() == [[False, False, True]] * 3


def test_the_towers_learn_through_the_matrix_alone():
    """With the other tower's vectors held fixed a tower gets the same gradient, and the other one gets none."""
    model, images, ids = shaken(), pictures(), texts()
    towers = {
        "image": [*model.vision.parameters(), *model.image_projection.parameters()],
        "text": [*model.text.parameters(), *model.text_projection.parameters()],
    }
    contrastive_loss(model(images, ids)[0]).backward()
    full = {name: [p.grad.clone() for p in parameters] for name, parameters in towers.items()}
    for held, other in (("text", "image"), ("image", "text")):
        model.zero_grad(set_to_none=True)
        vectors = {"image": model.encode_image(images), "text": model.encode_text(ids)}
        vectors[held] = vectors[held].detach()
        contrastive_loss(model.logit_scale.exp() * vectors["image"] @ vectors["text"].T).backward()
        assert all(p.grad is None for p in towers[held])
        for parameter, gradient in zip(towers[other], full[other], strict=True):
            close(parameter.grad, gradient)


def test_every_parameter_learns():
    for options in ({}, {"projection": "mlp", "gelu": "quick"}, {"image_tower": "resnet"}):
        model = shaken(replace(SMALL, **options), std=0.1)
        contrastive_loss(model(pictures(), texts())[0]).backward()
        for name, parameter in model.named_parameters():
            if not name.endswith("attn.kv.bias"):  # its key half cancels in the softmax
                assert parameter.grad.abs().max() > 1e-6, name
        assert not model.text.position.weight.grad[L:].any()  # no text was longer


# --- the text tower --------------------------------------------------------------------------------------------------


def test_causal_mask_by_hand():
    assert causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(3).dtype == torch.bool and causal_mask(1).tolist() == [[True]]


def states_by_hand(model: CLIP, ids: Tensor, mask: Tensor) -> Tensor:
    """Final states (B, L, D) of the text tower, its blocks spelled out."""
    tower = model.text
    x = tower.word.weight[ids] + tower.position.weight[: ids.shape[1]]
    for block in tower.encoder.blocks:
        x = x + block.attn(block.norm1(x), mask=mask)[0]
        x = x + block.mlp(block.norm2(x))
    return tower.encoder.norm(x)


@torch.no_grad()
def test_the_text_is_read_at_its_end_and_the_usual_mistakes_are_told_apart():
    model, ids = shaken(), texts()
    rows = torch.arange(B)
    causal, both_ways = causal_mask(L), torch.ones(L, L, dtype=torch.bool)
    states, bidirectional = states_by_hand(model, ids, causal), states_by_hand(model, ids, both_ways)
    expected = states[rows, ENDS]
    real = (torch.arange(L) <= ENDS[:, None])[..., None]
    wrong = {
        "mean over all": states.mean(1),
        "mean over the words": (states * real).sum(1) / real.sum(1),
        "last position": states[:, -1],
        "first position": states[:, 0],
        "one before the end": states[rows, ENDS - 1],
        "both ways": bidirectional[rows, ENDS],
        "the largest id": states[rows, ids.argmax(1)],
        "no last LayerNorm": model.text(ids, everything=True)[1]["block_2"][rows, ENDS],
    }
    for everything in (False, True):
        state = model.text(ids, everything=everything)[0]
        close(state, expected)
        for name, other in wrong.items():
            # The first text fills its row: for it the last position is the right one. The second and third are padded.
            assert (state - other)[1:].abs().amax(-1).min() > 0.05, name


@torch.no_grad()
def test_no_state_knows_what_comes_later():
    model, ids = shaken(), F.pad(texts(), (0, 1), value=EOT)  # an end that stays when an earlier one is changed
    before = model.text(ids, everything=True)[1]
    for place in range(L):
        changed = ids.clone()
        changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
        after = model.text(changed, everything=True)[1]
        for name in ("block_0", "block_1", "block_2", "text"):
            difference = (after[name] - before[name]).abs().amax(-1)  # (B, L)
            assert not difference[:, :place].any(), (name, place)  # earlier ones: not by a single bit
            assert (difference[:, place:] > 1e-4).all(), (name, place)  # itself and all later ones
    for i in range(3):
        weights = before[f"attention_{i}"]
        close(weights.sum(-1), torch.ones(B, 4, L + 1))
        assert not weights[..., ~causal_mask(L + 1)].any() and weights[..., causal_mask(L + 1)].min() > 0


@pytest.mark.parametrize("everything", [False, True])
@torch.no_grad()
def test_what_stands_behind_the_end_is_not_read(everything):
    model, ids = shaken(), texts()

    def run(ids: Tensor) -> Tensor:
        return model.text(ids, everything=everything)[0]

    before, behind = run(ids), torch.arange(L) > ENDS[:, None]
    for filling in (7, 29, EOT):  # words, larger ids than any, more ends: as transformers pads
        assert torch.equal(run(ids.masked_fill(behind, filling)), before)
    for back in (1, 2):  # the tokens before it are
        changed = ids.clone()
        changed[torch.arange(B), ENDS - back] = torch.where(ids[torch.arange(B), ENDS - back] == 9, 10, 9)
        assert (run(changed) - before).abs().amax(-1).min() > 1e-3
    longer = F.pad(ids, (0, 1), value=0)
    close(run(longer), before)
    for b, end in enumerate(ENDS):  # nor does the company matter
        close(run(ids[b : b + 1, : end + 1]), before[b : b + 1])


@torch.no_grad()
def test_order_matters():
    model, ids = shaken(), texts()
    swapped = ids.clone()
    swapped[0, 1], swapped[0, 2] = 11, 12
    ids[0, 1], ids[0, 2] = 12, 11
    assert (model.text(swapped)[0] - model.text(ids)[0])[0].abs().max() > 1e-3
    model.text.position.weight.zero_()  # even without positions: the mask says who comes first
    assert (model.text(swapped)[0] - model.text(ids)[0])[0].abs().max() > 1e-3


def test_texts_that_do_not_fit():
    model = CLIP(SMALL)
    fitting = torch.full((2, 8), EOT)
    assert model.text(fitting)[0].shape == (2, 16)
    with pytest.raises(ValueError, match="a text of 9 tokens does not fit 8 positions: cut it with encode_batch"):
        model.encode_text(torch.full((2, 9), EOT))
    fitting[1] = 5
    with pytest.raises(ValueError, match="a text has no end-of-text token 3: was it cut off"):
        model(pictures(), fitting)


# --- the image tower -------------------------------------------------------------------------------------------------


def embedded_by_hand(model: CLIP, images: Tensor) -> Tensor:
    """What `norm_pre` gets, (B, T, D): patches without a bias, the class token before them, positions on all."""
    tower = model.vision
    patches = patchify(images, 4) @ tower.patch_embed.proj.weight.T
    return torch.cat([tower.cls_token.expand(len(images), -1, -1), patches], dim=1) + tower.pos_embed


@torch.no_grad()
def test_image_tower_by_hand():
    model, images = shaken(), pictures()
    tower, norm = model.vision, model.vision.norm_pre
    raw = embedded_by_hand(model, images)
    x = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = x * norm.weight + norm.bias
    named = tower(images, everything=True)[1]
    close(named["embedded"], x)
    for block in tower.encoder.blocks:
        x = x + block.attn(block.norm1(x))[0]
        x = x + block.mlp(block.norm2(x))
    final = tower.encoder.norm(x)
    for everything in (False, True):
        state = tower(images, everything=everything)[0]
        close(state, final[:, 0])
        for wrong in (final.mean(1), final[:, 1], x[:, 0]):  # the mean, a patch, no last LayerNorm
            assert (state - wrong).abs().max() > 0.05


@torch.no_grad()
def test_norm_pre_stands_before_the_blocks():
    model, images = shaken(), pictures()
    tower, order = model.vision, []
    for name, module in tower.named_modules():
        if name in ("patch_embed", "norm_pre", "encoder.blocks.0", "encoder.blocks.1", "encoder.norm"):
            module.register_forward_hook(lambda _, __, ___, name=name: order.append(name))
    before = tower(images)[0]
    assert order == ["patch_embed", "norm_pre", "encoder.blocks.0", "encoder.blocks.1", "encoder.norm"]
    # Without it, with it between patches and positions, or at the end instead, the vector would be another.
    raw = embedded_by_hand(model, images)
    late = embedded_by_hand(model, images) - tower.pos_embed
    for x in (raw, tower.norm_pre(late) + tower.pos_embed):
        assert (tower.encoder(x)[0][:, 0] - before).abs().max() > 0.05
    assert (tower.norm_pre(tower.encoder(raw)[0])[:, 0] - before).abs().max() > 0.05
    # The blocks do not see how large the tokens are: that is what it is for.
    for parameter in (tower.patch_embed.proj.weight, tower.cls_token, tower.pos_embed):
        parameter.mul_(10)
    close(tower(images)[0], before, 1e-3)
    assert (tower.encoder(10 * raw)[0][:, 0] - tower.encoder(raw)[0][:, 0]).abs().max() > 0.05


def test_patches_and_projections_have_no_bias():
    model = CLIP(SMALL)
    assert model.vision.patch_embed.proj.bias is None
    assert model.image_projection.bias is model.text_projection.bias is None
    assert model.image_projection.weight.shape == (20, 24) and model.text_projection.weight.shape == (20, 16)
    without = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None}
    assert without == {"vision.patch_embed.proj", "image_projection", "text_projection"}


@torch.no_grad()
def test_uint8_pictures_are_read_as_scaled_floats():
    images = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    for tower in ("vit", "resnet"):
        model = shaken(replace(SMALL, image_tower=tower))
        close(model.encode_image(images), model.encode_image(images / 127.5 - 1))


@pytest.mark.parametrize("shape", [(B, 3, 16, 24), (B, 3, 8, 32), (B, 1, 16, 16), (3, 16, 16)])
def test_pictures_that_do_not_fit(shape):
    """8x32 pixels are as many patches as 16x16, but other places."""
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got .*: resize them or build the model"):
        CLIP(SMALL).encode_image(torch.zeros(shape))


# --- other towers and heads ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resnet_tower():
    model, images = shaken(replace(SMALL, image_tower="resnet")), pictures(size=32)
    state, named = model.vision(images, everything=True)
    width = model.vision.width
    assert set(named) == {"pooled", "map"}
    assert state.shape == (B, width) and named["map"].shape == (B, width, 2, 2)  # a stem of 4, two halvings
    close(state, named["map"].mean(dim=(2, 3)))
    close(state, model.vision(images)[0])
    assert model.image_projection.weight.shape == (20, width)
    assert not any("head" in name for name, _ in model.named_parameters())  # no classes are left
    close(model.encode_image(images).norm(dim=-1), torch.ones(B))


@torch.no_grad()
def test_mlp_projection():
    model, images, ids = shaken(replace(SMALL, projection="mlp")), pictures(), texts()
    for head, width in ((model.image_projection, 24), (model.text_projection, 16)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.GELU, nn.Linear]
        assert head[0].weight.shape == (width, width) and head[2].weight.shape == (20, width)
        assert head[0].bias is not None and head[2].bias is None
    assert [type(shaken().image_projection), type(shaken().text_projection)] == [nn.Linear, nn.Linear]
    state, head = model.text(ids)[0], model.text_projection
    expected = F.gelu(state @ head[0].weight.T + head[0].bias) @ head[2].weight.T
    close(model.encode_text(ids), F.normalize(expected, dim=-1))
    close(model(images, ids)[1]["image"].norm(dim=-1), torch.ones(B))


def test_gelu_eps_and_mlp_ratio_follow_the_config_in_both_towers():
    model = CLIP(replace(SMALL, gelu="quick", eps=0.5, mlp_ratio=3))
    blocks = [*model.vision.encoder.blocks, *model.text.encoder.blocks]
    assert {type(block.mlp.act) for block in blocks} == {QuickGELU}
    assert {type(block.mlp.act) for block in CLIP(SMALL).text.encoder.blocks} == {nn.GELU}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {0.5}
    assert [block.mlp.fc1.out_features for block in blocks] == [72] * 2 + [48] * 3
    assert [block.attn.heads for block in blocks] == [2] * 2 + [4] * 3


@torch.no_grad()
def test_the_two_gelus_are_not_the_same_model():
    exact = shaken()
    quick = CLIP(replace(SMALL, gelu="quick")).eval()
    quick.load_state_dict(exact.state_dict())
    images, ids = pictures(), texts()
    assert (exact(images, ids)[0] - quick(images, ids)[0]).abs().max() > 1e-3


# --- starting values -------------------------------------------------------------------------------------------------

# Widths and depths for which no two of the documented deviations are alike.
WIDE = CLIPConfig(image_width=96, image_depth=3, image_heads=4, text_width=128, text_depth=6, embed_dim=64)


def spread(weight: Tensor, std: float, name: str = "") -> None:
    """The deviation of independent numbers, within four times its own error."""
    assert weight.std().item() == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5), name
    assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5, name


def test_initial_values():
    model = CLIP(WIDE)
    spread(model.text.word.weight, 0.02)
    spread(model.text.position.weight, 0.01)
    spread(model.vision.cls_token, 96**-0.5)
    spread(model.vision.pos_embed, 96**-0.5)
    spread(model.image_projection.weight, 96**-0.5)
    spread(model.text_projection.weight, 128**-0.5)
    spread(model.vision.patch_embed.proj.weight, (3 * 768) ** -0.5)  # PyTorch's own: uniform, within 768^-0.5
    for tower, W, depth in ((model.vision, 96, 3), (model.text, 128, 6)):
        deep = W**-0.5 * (2 * depth) ** -0.5
        for i, block in enumerate(tower.encoder.blocks):
            for matrix in (block.attn.q.weight, *block.attn.kv.weight.chunk(2)):
                spread(matrix, W**-0.5, f"q, k or v {i}")
            spread(block.attn.proj.weight, deep, f"attn.proj {i}")
            spread(block.mlp.fc1.weight, (2 * W) ** -0.5, f"fc1 {i}")
            spread(block.mlp.fc2.weight, deep, f"fc2 {i}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name


def test_what_a_block_adds_shrinks_with_depth_and_what_it_asks_does_not():
    """transformers has the factor (2L)^-0.5 at q, k and v instead of the output: its model starts otherwise."""
    ours = {}
    for depth in (2, 8):
        attention = CLIP(replace(WIDE, text_depth=depth)).text.encoder.blocks[0].attn
        ours[depth] = [attention.q.weight.std(), attention.kv.weight.std(), attention.proj.weight.std()]
    q, kv, proj = ((shallow / deep).item() for shallow, deep in zip(ours[2], ours[8], strict=True))
    assert (q, kv) == pytest.approx((1, 1), rel=0.05) and proj == pytest.approx(2, rel=0.05)


def test_mlp_heads_start_by_width_too():
    model = CLIP(replace(WIDE, projection="mlp"))
    for head, width in ((model.image_projection, 96), (model.text_projection, 128)):
        spread(head[0].weight, width**-0.5)
        spread(head[2].weight, width**-0.5)


def test_a_lone_tower_can_start_the_same_way():
    """A model with another head around a tower gets the tower's values, and its head is left alone."""
    model = nn.ModuleDict({"vision": CLIPVision(WIDE), "text": CLIPText(WIDE), "head": nn.Linear(96, 10)})
    kept = model["head"].weight.clone()
    assert not model["vision"].pos_embed.any()
    init_clip(model)
    spread(model["vision"].pos_embed, 96**-0.5)
    spread(model["text"].position.weight, 0.01)
    spread(model["text"].encoder.blocks[0].attn.proj.weight, (128 * 12) ** -0.5)
    assert torch.equal(model["head"].weight, kept)


def test_first_loss_is_near_chance_and_no_nearer():
    """B = 64, ln B = 4.159. Cosines differ by s = 0.02 among the texts of a picture, 0.06 among the pictures of a
    text, and are multiplied by 14.3, so the scores are not quite equal: the loss lies above ln B by about
    14.3^2 (s_row^2 + s_column^2) / 4, between 0.09 and 0.35 in eight seeds. Less would mean that nothing is
    multiplied, more that the vectors have any length, that the start is 100, or that the directions are summed."""
    model = CLIP(CLIPConfig()).eval()
    images, ids = pictures(64, 64), torch.randint(7, 340, (64, 12))
    ids[torch.arange(64), 5 + torch.arange(64) % 7] = EOT
    with torch.no_grad():
        logits, named = model(images, ids)
        raw = model.image_projection(model.vision(images)[0]) @ model.text_projection(model.text(ids)[0]).T
    cosine = named["image"] @ named["text"].T
    low, high = math.log(64) + 0.04, math.log(64) + 0.6
    loss = contrastive_loss(logits).item()
    assert low < loss < high
    bend = (logits.var(dim=1).mean() + logits.var(dim=0).mean()).item() / 4
    assert loss == pytest.approx(math.log(64) + bend, abs=0.15)
    scale = 1 / 0.07
    for wrong in (cosine / scale, cosine, 100 * cosine, raw, scale * raw):
        assert not low < contrastive_loss(wrong).item() < high
    assert not low < 2 * loss < high


# --- the temperature -------------------------------------------------------------------------------------------------


def test_logit_scale_starts_at_one_over_007():
    scale = CLIP(SMALL).logit_scale
    assert scale.shape == () and scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert CLIP(replace(SMALL, logit_scale=0)).logit_scale.exp().item() == 1  # a whole number will do


@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (-0.5, 0.0), (2.0, 2.0), (4.6, 4.6), (0.0, 0.0)])
def test_clamp_logit_scale(before, after):
    model = CLIP(SMALL)
    parameter = model.logit_scale
    parameter.data.fill_(before)
    others = {name: value.clone() for name, value in model.state_dict().items() if name != "logit_scale"}
    assert clamp_logit_scale(model) is None
    assert model.logit_scale is parameter  # the optimiser's own
    assert parameter.item() == pytest.approx(after, abs=1e-6) and parameter.exp().item() < 100.001
    assert all(torch.equal(value, others[name]) for name, value in model.state_dict().items() if name != "logit_scale")
    assert math.exp(MAX_LOGIT_SCALE) == pytest.approx(100)


def test_the_clamp_is_no_part_of_the_graph():
    """It leaves gradients alone, and t can come back from the edge; clamped within the model it could not."""
    model = CLIP(SMALL)
    model.logit_scale.data.fill_(9.0)
    model.logit_scale.grad = torch.tensor(0.25)
    clamp_logit_scale(model)
    assert model.logit_scale.grad.item() == 0.25
    assert model.logit_scale.is_leaf and model.logit_scale.requires_grad
    model.zero_grad()
    contrastive_loss(model(pictures(), texts())[0]).backward()
    assert model.logit_scale.grad.abs() > 1e-3
    inside = torch.tensor(9.0, requires_grad=True)
    inside.clamp(0, MAX_LOGIT_SCALE).exp().backward()
    assert inside.grad == 0


@pytest.mark.parametrize(("direction", "edge"), [(-1, MAX_LOGIT_SCALE), (1, 0.0)])
def test_the_clamp_works_after_every_step_of_training(direction, edge):
    seen = {}
    for hooks in ([], [clamp_logit_scale]):
        values: list[float] = []
        fit(CLIP(SMALL), lambda step: [torch.zeros(1)], lambda m, _: direction * m.logit_scale, steps=4, lr=3.0,
            warmup=0, after_step=[*hooks, lambda m, step, to=values: to.append(m.logit_scale.item())],
            progress=None)  # fmt: skip
        seen[bool(hooks)] = values
    assert seen[True] == pytest.approx([edge] * 4, abs=1e-6)
    assert all(direction * (value - edge) < -0.1 for value in seen[False])


def test_the_temperature_does_not_decay():
    model = CLIP(SMALL)
    decayed, free = (group["params"] for group in parameter_groups(model, 0.2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed} >= {"image_projection.weight", "text_projection.weight"}
    assert all(p.ndim == 2 for p in decayed)
    assert {names[id(p)] for p in free} >= {
        "logit_scale", "text.word.weight", "text.position.weight", "vision.cls_token", "vision.pos_embed",
        "vision.norm_pre.weight",
    }  # fmt: skip
    assert [group["weight_decay"] for group in parameter_groups(model, 0.2)] == [0.2, 0.0]


def test_a_fixed_temperature_gets_no_gradient_but_still_counts():
    model, images, ids = shaken(replace(SMALL, learn_scale=False, logit_scale=1.5)), pictures(), texts()
    model.logit_scale.fill_(1.5)
    logits, named = model(images, ids)
    contrastive_loss(logits).backward()
    assert model.logit_scale.grad is None and not model.logit_scale.requires_grad
    assert all(p is not model.logit_scale for group in parameter_groups(model, 0.2) for p in group["params"])
    close(logits, math.exp(1.5) * named["image"] @ named["text"].T)
    assert "logit_scale" in model.state_dict()
    learnt = CLIP(SMALL)
    contrastive_loss(learnt(images, ids)[0]).backward()
    assert learnt.logit_scale.grad.abs() > 1e-5


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_eight_pairs_can_be_learnt_by_heart(tower):
    model = CLIP(replace(SMALL, image_tower=tower))
    images, ids = pictures(8), torch.randint(4, 30, (8, 6))
    ids[:, -1] = EOT

    def measure() -> tuple[float, float, float]:
        with torch.no_grad():
            logits, _ = model.eval()(images, ids)
        own = torch.arange(8)
        return contrastive_loss(logits).item(), recall_at(logits, own, 1), recall_at(logits.T, own, 1)

    loss, *recall = measure()
    assert loss > 1.5 and max(recall) < 0.6
    fit(model, lambda step: (images, ids), lambda m, images, ids: contrastive_loss(m(images, ids)[0]), steps=60,
        lr=3e-3, after_step=[clamp_logit_scale], progress=None)  # fmt: skip
    loss, *recall = measure()
    assert loss < 0.1 and recall == [1, 1]


# --- starting from a ViT ---------------------------------------------------------------------------------------------


def trained_vit(**options) -> ViT:
    """A ViT of the image tower's shape, with noise for training."""
    shape = dict(image_size=16, patch_size=4, width=24, depth=2, heads=2, num_classes=5)
    vit = ViT(ViTConfig(**shape | options))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.eval()


@torch.no_grad()
def test_start_from_vit_takes_patches_positions_and_blocks():
    vit, model, images = trained_vit(), CLIP(SMALL).eval(), pictures(8)
    vit.embed.pos_embed.mul_(10)  # tokens of a size far from 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from_vit(model, vit, images)
    raw = []
    model.vision.norm_pre.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    model.vision(images)
    embedded = vit.embed(images)
    close(raw[0], embedded)
    bias = vit.embed.patch_embed.proj.bias  # forgotten, or put on the class token as well, it would show
    assert (raw[0] - (embedded - bias)).abs().max() > 0.1 and bias.abs().max() > 0.1
    close(model.vision.pos_embed[:, :1], vit.embed.pos_embed[:, :1])

    gain = model.vision.norm_pre.weight
    close(gain, embedded.std(dim=-1, correction=0).mean().expand(24))
    assert gain[0] > 1.5 and not model.vision.norm_pre.bias.any()
    for name, value in vit.encoder.state_dict().items():
        assert torch.equal(model.vision.encoder.state_dict()[name], value), name
    kept = {"vision.norm_pre.bias"}
    for name, value in model.state_dict().items():
        taken = name.startswith("vision.") and name not in kept
        assert taken != torch.equal(value, before[name]), name


@torch.no_grad()
def test_start_from_vit_gives_the_blocks_tokens_of_the_size_they_know():
    """Tokens with mean 0 and one size pass `norm_pre` as they are, so the image tower is the ViT, but for its eps and
    the unbiased deviation; with a gain of 1 it would be far from it."""
    vit, images = trained_vit(), pictures()
    nn.init.zeros_(vit.embed.cls_token)
    nn.init.zeros_(vit.embed.patch_embed.proj.weight)
    nn.init.zeros_(vit.embed.patch_embed.proj.bias)
    vit.embed.pos_embed.copy_(0.3 * F.layer_norm(torch.randn(1, T, 24), (24,)))
    model = CLIP(SMALL).eval()
    start_from_vit(model, vit, images)
    expected = vit(images)[1]["pooled"]
    close(model.vision(images)[0], expected, 0.05)
    model.vision.norm_pre.weight.fill_(1)
    assert (model.vision(images)[0] - expected).abs().max() > 0.3


@torch.no_grad()
def test_start_from_vit_copies_by_value():
    vit, model = trained_vit(), CLIP(SMALL)
    start_from_vit(model, vit, pictures())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in vit.parameters():
        parameter.add_(1)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "option",
    [
        dict(width=32), dict(patch_size=8), dict(image_size=32), dict(channels=1), dict(depth=1), dict(depth=3),
        dict(mlp_ratio=2), dict(heads=4), dict(gelu="tanh"), dict(pool="mean"), dict(position="2d"),
        dict(position="none"), dict(norm="post"),
    ],
)  # fmt: skip
def test_start_from_vit_refuses_what_does_not_fit(option):
    model, (name, value) = CLIP(SMALL), *option.items()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the ViT has {name}={value!r} where this CLIP needs .*: build both alike"):
        start_from_vit(model, trained_vit(**option), pictures())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # none taken


def test_start_from_vit_copies_nothing_when_the_pictures_are_wrong():
    model = CLIP(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="expected pictures"):
        start_from_vit(model, trained_vit(), pictures(size=32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_start_from_vit_needs_a_vit_tower():
    with pytest.raises(ValueError, match=r"this image tower is no ViT .* build the CLIP with image_tower='vit'"):
        start_from_vit(CLIP(replace(SMALL, image_tower="resnet")), trained_vit(), pictures())


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        (dict(gelu="tanh"), "'exact', 'quick'"),
        (dict(image_tower="cnn"), "'vit', 'resnet'"),
        (dict(projection="none"), "'linear', 'mlp'"),
    ],
)
def test_configs_that_cannot_be(option, choices):
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"{name}='{value}': choose one of {choices}"):
        replace(SMALL, **option)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        replace(SMALL, image_size=18)
    with pytest.raises(ValueError, match="width 24 is not a multiple of 5 heads"):
        CLIP(replace(SMALL, image_heads=5))
    with pytest.raises(ValueError, match="width 16 is not a multiple of 3 heads"):
        CLIP(replace(SMALL, text_heads=3))


def test_grid():
    assert (SMALL.grid, CLIPConfig().grid, paper_config("L/14@336px").grid) == (4, 4, 24)
