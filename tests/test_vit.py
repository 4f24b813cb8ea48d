"""The whole ViT: sizes of the paper, what each option changes, how it starts, other resolutions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from minivlp.layers import Attention, count_parameters
from minivlp.models.vit import ViT, ViTConfig, at_resolution, interpolate_positions, paper_config

SMALL = ViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, num_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shaken(config: ViTConfig = SMALL) -> ViT:
    """A model with noise on every parameter: the fresh one has a zero head and would give zeros for all pictures."""
    model = ViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pictures(config: ViTConfig = SMALL, count: int = 3) -> torch.Tensor:
    return torch.rand(count, config.channels, config.image_size, config.image_size) * 2 - 1


def permute_patches(images: torch.Tensor, patch: int, order: torch.Tensor) -> torch.Tensor:
    """Cut with unfold, put the patches down in another order with fold."""
    columns = F.unfold(images, patch, stride=patch)  # (B, C*P*P, N)
    return F.fold(columns[:, :, order], images.shape[-2:], patch, stride=patch)


# --- sizes -----------------------------------------------------------------------------------------------------------


def meta_count(config: ViTConfig) -> int:
    with torch.device("meta"):
        return count_parameters(ViT(config))


def test_vit_b16_has_the_published_parameters():
    assert meta_count(paper_config("B/16")) == 86_567_656


@pytest.mark.parametrize(("name", "millions"), [("B/16", 86), ("L/16", 307), ("H/14", 632)])
def test_paper_sizes(name, millions):
    """Table 1 says how many; the head of the pre-training data set, which it does not name, makes up to 1 %."""
    assert meta_count(paper_config(name)) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(("image", "patch", "words"), [(224, 16, 196), (224, 32, 49), (256, 16, 256), (64, 8, 64)])
def test_number_of_words(image, patch, words):
    """The title's 16x16 are pixels: at 224 pixels a picture is worth 196 words and the class token."""
    assert ViTConfig(image_size=image, patch_size=patch).tokens == words + 1
    assert ViTConfig(image_size=image, patch_size=patch, pool="mean").tokens == words


def test_smaller_patches_add_nothing_to_the_blocks():
    blocks = {P: count_parameters(ViT(replace(SMALL, patch_size=P)).encoder) for P in (2, 4, 8)}
    assert len(set(blocks.values())) == 1


@pytest.mark.parametrize("name", ["B", "X/16", "B/x", "B/", "b/16"])
def test_unknown_paper_size(name):
    with pytest.raises(ValueError, match="no ViT is called"):
        paper_config(name)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"pool": "max"}, "pool='max': choose one of 'cls', 'mean'"),
        ({"position": "3d"}, "position='3d': choose"),
        ({"norm": "both"}, "norm='both': choose"),
        ({"gelu": "relu"}, "gelu='relu': choose"),
        ({"patch_size": 5}, "image_size 16 is not a multiple of patch_size 5"),
    ],
)
def test_config_refuses(option, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **option)


@pytest.mark.parametrize("shape", [(1, 3, 16, 20), (1, 3, 20, 20), (1, 1, 16, 16), (3, 16, 16)])
def test_wrong_pictures(shape):
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got .*at_resolution"):
        ViT(SMALL)(torch.zeros(shape))


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_named_intermediates(pool):
    config = replace(SMALL, pool=pool)
    model, T = shaken(config), config.tokens
    logits, named = model(pictures(), everything=True)
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        "embedded": (3, T, 16), "tokens": (3, T, 16), "pooled": (3, 16),
        "block_0": (3, T, 16), "block_1": (3, T, 16),
        "attention_0": (3, 2, T, T), "attention_1": (3, 2, T, T),
    }  # fmt: skip
    assert logits.shape == (3, 5)
    assert set(model(pictures())[1]) == {"pooled"}
    assert (named["attention_0"] > 0).all()  # an encoder: every token sees every token
    close(named["attention_0"].sum(-1), torch.ones(3, 2, T))


@pytest.mark.parametrize("option", [{}, {"pool": "mean"}, {"norm": "post"}, {"position": "2d"}, {"head_hidden": 7}])
@torch.no_grad()
def test_the_short_way_gives_the_same_scores(option):
    model, images = shaken(replace(SMALL, **option)), pictures()
    close(model(images)[0], model(images, everything=True)[0], 1e-5)
    close(model(images)[1]["pooled"], model(images, everything=True)[1]["pooled"], 1e-5)
    assert model(images)[0].std(dim=0).min() > 1e-3  # pictures differ


@torch.no_grad()
def test_uint8_equals_scaled_floats():
    model, images = shaken(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    close(model(images)[0], model(images / 127.5 - 1)[0], 1e-5)
    assert (model(images)[0] - model(images / 255)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_class_token_is_pooled_after_the_last_norm():
    model = shaken()
    logits, named = model(pictures(), everything=True)
    last = model.encoder.norm(named["block_1"])
    close(named["tokens"], last)
    close(named["pooled"], last[:, 0])
    close(logits, F.linear(last[:, 0], model.head.weight, model.head.bias), 1e-5)


@torch.no_grad()
def test_mean_pooling_has_no_class_token():
    model = shaken(replace(SMALL, pool="mean"))
    assert not [name for name, _ in model.named_parameters() if "cls" in name]
    assert model.embed.pos_embed.shape == (1, 16, 16)  # 16 patches, and nothing else
    named = model(pictures(), everything=True)[1]
    close(named["pooled"], model.encoder.norm(named["block_1"]).mean(dim=1))


@torch.no_grad()
def test_class_token_comes_first_and_has_its_own_position():
    model = shaken()
    embedded = model(pictures(), everything=True)[1]["embedded"]
    close(embedded[:, 0], (model.embed.cls_token + model.embed.pos_embed[:, :1])[0].expand(3, -1))
    model.embed.cls_token += 1
    again = model(pictures(), everything=True)[1]["embedded"]
    close(again[:, 0], embedded[:, 0] + 1)


def test_class_token_learns():
    model = shaken()
    F.cross_entropy(model(pictures())[0], torch.tensor([0, 1, 2])).backward()
    assert model.embed.cls_token.grad.abs().min() > 0
    assert model.embed.pos_embed.grad.abs().amax(-1).min() > 0  # every position does
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.kv.bias"):  # its key half cancels in the softmax
            assert parameter.grad.abs().max() > 1e-6, name


def test_second_step_reaches_the_body():
    """A zero head passes no gradient back at first; after one step on the head it does."""
    model, images, labels = ViT(SMALL), pictures(), torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    F.cross_entropy(model(images)[0], labels).backward()
    assert model.embed.cls_token.grad.abs().max() == 0 and model.head.weight.grad.abs().max() > 1e-3
    optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(images)[0], labels).backward()
    assert model.embed.cls_token.grad.abs().max() > 1e-6


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "matters"), [("none", False), ("1d", True), ("2d", True)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_order_of_patches_matters_with_positions_alone(position, matters, pool):
    model, images = shaken(replace(SMALL, position=position, pool=pool)), pictures()
    mixed = permute_patches(images, SMALL.patch_size, torch.randperm(16))
    assert (mixed - images).abs().max() > 0.5
    change = (model(mixed)[0] - model(images)[0]).abs().max()
    assert change > 1e-2 if matters else change < 1e-5


@torch.no_grad()
def test_2d_positions_are_a_column_half_and_a_row_half():
    model = shaken(replace(SMALL, position="2d", pool="mean"))
    positions = model.embed(torch.zeros(1, 3, 16, 16))[0] - model.embed.patch_embed.proj.bias  # (16, D)
    grid = positions.view(4, 4, 16)  # row, column, D
    for row in range(4):
        for column in range(4):
            expected = torch.cat([model.embed.pos_x[0, column], model.embed.pos_y[0, row]])
            close(grid[row, column], expected)
    assert (grid[0, 1] - grid[1, 0]).abs().max() > 0.1
    with_cls = shaken(replace(SMALL, position="2d"))
    assert with_cls.embed(torch.zeros(1, 3, 16, 16)).shape == (1, 17, 16)


@torch.no_grad()
def test_1d_positions_are_added_in_reading_order():
    model = shaken(replace(SMALL, pool="mean"))
    plain = model.embed.patch_embed(pictures())
    torch.manual_seed(0)
    images = pictures()
    close(model.embed(images) - model.embed.patch_embed(images), model.embed.pos_embed.expand_as(plain), 1e-5)


# --- options ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pre_and_post_norm_differ():
    pre, post = shaken(), shaken(replace(SMALL, norm="post"))
    assert count_parameters(pre) - count_parameters(post) == 2 * SMALL.width  # the last LayerNorm
    shared = {k: v for k, v in pre.state_dict().items() if not k.startswith("encoder.norm")}
    post.load_state_dict(shared)
    images = pictures()
    assert (pre(images)[0] - post(images)[0]).abs().max() > 1e-2


@torch.no_grad()
def test_every_norm_and_gelu_follows_the_config():
    model = ViT(replace(SMALL, eps=0.5, gelu="tanh", mlp_ratio=3))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {0.5}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"tanh"}
    assert {block.mlp.fc1.out_features for block in model.encoder.blocks} == {48}


@torch.no_grad()
def test_pretraining_head_is_a_tanh_layer():
    model, images = shaken(replace(SMALL, head_hidden=7)), pictures()
    logits, named = model(images)
    layer = model.hidden[0]
    hidden = torch.tanh(F.linear(named["pooled"], layer.weight, layer.bias))
    close(logits, F.linear(hidden, model.head.weight, model.head.bias), 1e-5)
    assert model.head.in_features == 7


def test_dropout_sites():
    """One after the positions, and per block one after attention and one (applied twice) in the MLP: nowhere else."""
    model = ViT(replace(SMALL, dropout=0.3))
    sites = {name for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    blocks = {f"encoder.blocks.{i}.{part}.dropout" for i in range(2) for part in ("attn", "mlp")}
    assert sites == {"embed.dropout"} | blocks
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    images = pictures()
    zeros = (model.train().embed(images) == 0).float().mean()
    assert 0.2 < zeros < 0.4 and not (model.eval().embed(images) == 0).any()
    with torch.no_grad():
        assert not torch.equal(model.train()(images)[1]["pooled"], model(images)[1]["pooled"])
        assert torch.equal(model.eval()(images)[1]["pooled"], model(images)[1]["pooled"])


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{}, {"pool": "mean"}, {"norm": "post"}, {"head_hidden": 8}, {"num_classes": 12}])
def test_first_loss_is_ln_k(option):
    config = replace(SMALL, **option)
    logits, named = ViT(config)(pictures())
    assert not logits.any() and named["pooled"].std() > 0.1
    loss = F.cross_entropy(logits, torch.tensor([0, 4, 2]))
    assert loss.item() == pytest.approx(math.log(config.num_classes), abs=1e-6)


def test_initial_values():
    config = ViTConfig(width=128, depth=2, num_classes=10)
    model = ViT(config)
    assert not model.embed.cls_token.any() and not model.head.weight.any() and not model.head.bias.any()
    assert model.embed.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    patch = model.embed.patch_embed.proj
    assert patch.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05) and not patch.bias.any()
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
    for block in model.encoder.blocks:
        attn, mlp = block.attn, block.mlp
        matrices = [attn.q.weight, *attn.kv.weight.chunk(2), attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight]
        for matrix in matrices:
            bound = math.sqrt(6 / sum(matrix.shape))  # Xavier: uniform in +- bound
            assert 0.98 * bound < matrix.abs().max() <= bound
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        for linear in (attn.q, attn.kv, attn.proj, mlp.fc1, mlp.fc2):
            assert linear.bias.abs().max() < 1e-5


def test_keys_and_values_are_two_matrices_to_xavier():
    """They share one tensor; taken as one (D, 2D) matrix they would start smaller than the queries."""
    for attn in (m for m in ViT(ViTConfig()).modules() if isinstance(m, Attention)):
        keys, values = attn.kv.weight.chunk(2)
        for part in (keys, values):
            assert part.std().item() == pytest.approx(attn.q.weight.std().item(), rel=0.03)


def test_same_seed_same_model():
    models = []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        models.append(ViT(SMALL).state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not torch.equal(models[0]["embed.pos_embed"], models[2]["embed.pos_embed"])


# --- another resolution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("new_grid", [2, 4, 6, 7])
def test_interpolation_equals_the_official_zoom(prefix, new_grid):
    """google-research/vision_transformer resizes with scipy.ndimage.zoom(order=1)."""
    table = torch.randn(1, prefix + 16, 5)
    stretched = interpolate_positions(table, new_grid, prefix=prefix)
    assert stretched.shape == (1, prefix + new_grid**2, 5)
    assert torch.equal(stretched[:, :prefix], table[:, :prefix])
    grid = table[0, prefix:].numpy().reshape(4, 4, 5)
    official = ndimage.zoom(grid, (new_grid / 4, new_grid / 4, 1), order=1)
    np.testing.assert_allclose(stretched[0, prefix:].numpy(), official.reshape(-1, 5), atol=1e-5)


def test_interpolation_to_the_same_grid_changes_nothing():
    table = torch.randn(1, 17, 5)
    close(interpolate_positions(table, 4), table)


def test_interpolation_by_hand():
    """Corners stay, the middle is the mean: the numbers 0, 2 / 4, 6 at the corners of a 2x2 grid become a ramp."""
    table = torch.tensor([9.0, 0, 2, 4, 6]).view(1, 5, 1)
    expected = torch.tensor([9.0, 0, 1, 2, 2, 3, 4, 4, 5, 6]).view(1, 10, 1)
    close(interpolate_positions(table, 3), expected)


@pytest.mark.parametrize("size", [(2, 6), (6, 2), (3, 4), (4, 7), (1, 4)])
def test_interpolation_to_rows_and_columns(size):
    """A picture that is wider than high: rows first, in reading order, each side stretched by itself."""
    rows, columns = size
    table = torch.randn(1, 17, 5)
    stretched = interpolate_positions(table, size)
    assert stretched.shape == (1, 1 + rows * columns, 5) and torch.equal(stretched[:, :1], table[:, :1])
    grid = table[0, 1:].numpy().reshape(4, 4, 5)
    official = ndimage.zoom(grid, (rows / 4, columns / 4, 1), order=1)
    np.testing.assert_allclose(stretched[0, 1:].numpy(), official.reshape(-1, 5), atol=1e-5)
    turned = interpolate_positions(table, (columns, rows))[0, 1:].view(columns, rows, 5)
    assert (turned.reshape(-1, 5) - stretched[0, 1:]).abs().max() > 0.1  # not the same list
    flipped = torch.cat([table[:, :1], table[:, 1:].view(1, 4, 4, 5).transpose(1, 2).flatten(1, 2)], dim=1)
    mirrored = interpolate_positions(flipped, (columns, rows))[0, 1:].view(columns, rows, 5).transpose(0, 1)
    close(mirrored.reshape(-1, 5), stretched[0, 1:])  # mirrored at the diagonal, though, it is


def test_interpolation_to_rows_and_columns_by_hand():
    """0 1 / 2 3 at the corners of a 2x2 grid, stretched to two rows of three."""
    table = torch.tensor([9.0, 0, 1, 2, 3]).view(1, 5, 1)
    close(interpolate_positions(table, (2, 3)), torch.tensor([9, 0, 0.5, 1, 2, 2.5, 3]).view(1, 7, 1))
    close(interpolate_positions(table, (3, 2)), torch.tensor([9, 0, 1.0, 1, 2, 2, 3]).view(1, 7, 1))
    close(interpolate_positions(table, (3, 3)), interpolate_positions(table, 3))


def test_interpolation_of_no_square():
    with pytest.raises(ValueError, match="17 positions are no square grid: is prefix=0 right"):
        interpolate_positions(torch.randn(1, 17, 5), 8, prefix=0)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_at_resolution(pool):
    model = shaken(replace(SMALL, pool=pool))
    same, larger = at_resolution(model, 16), at_resolution(model, 24)
    images = pictures()
    close(same(images)[0], model(images)[0], 1e-5)
    assert larger.config == replace(model.config, image_size=24)
    assert larger(pictures(larger.config))[0].shape == (3, 5)
    stretched = interpolate_positions(model.embed.pos_embed, 6, prefix=1 if pool == "cls" else 0)
    assert torch.equal(larger.embed.pos_embed, stretched)
    if pool == "cls":
        assert torch.equal(larger.embed.pos_embed[:, 0], model.embed.pos_embed[:, 0])
        assert torch.equal(larger.embed.cls_token, model.embed.cls_token)
    others = {k: v for k, v in model.state_dict().items() if k != "embed.pos_embed"}
    assert all(torch.equal(larger.state_dict()[k], v) for k, v in others.items())
    larger.head.weight.zero_()
    assert model.head.weight.any()  # a copy: the original is left alone


def test_at_resolution_keeps_the_mode_and_knows_its_limits():
    assert at_resolution(ViT(SMALL).train(), 24).training
    assert not at_resolution(ViT(SMALL).eval(), 24).training
    assert at_resolution(ViT(replace(SMALL, position="none")), 24).config.image_size == 24
    with pytest.raises(ValueError, match="'1d' and 'none' only"):
        at_resolution(ViT(replace(SMALL, position="2d")), 24)
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        at_resolution(ViT(SMALL), 18)
