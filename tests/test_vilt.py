"""ViLT: what goes in, who looks at whom, what padding and hidden patches do, and how it starts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import count_parameters, patchify
from minivlp.losses import masked_lm_loss
from minivlp.models.vilt import ViLT, ViLTConfig, answer_head, block_mask, padded_positions, start_from_vit
from minivlp.models.vit import ViT, ViTConfig, interpolate_positions

torch.set_num_threads(1)

SMALL = ViLTConfig(image_size=16, patch_size=4, vocab_size=30, max_text=8, width=16, depth=2, heads=2)
B, L, N = 3, 6, 16
S = 1 + N  # image tokens: the class token and the patches
T = L + S


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shaken(config: ViLTConfig = SMALL, std: float = 0.2) -> ViLT:
    """A model with noise on every parameter: in a fresh one all tokens and all types look nearly alike."""
    model = ViLT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model.eval()


def pictures(rows: int = 4, columns: int = 4) -> Tensor:
    """Random pictures of so many patches."""
    return torch.rand(B, 3, 4 * rows, 4 * columns) * 2 - 1


def texts() -> tuple[Tensor, Tensor]:
    """Ids and mask: three texts of 6, 4 and 3 tokens. Id 0 is padding."""
    mask = torch.arange(L) < torch.tensor([6, 4, 3])[:, None]
    return torch.randint(1, 30, (B, L)) * mask, mask


# --- sizes and shapes ------------------------------------------------------------------------------------------------


def test_published_size():
    """ViLT-B/32 has 87.4M parameters (paper, Table 6): the patches' layer and the blocks, without embedded words."""
    with torch.device("meta"):
        model = ViLT(ViLTConfig(384, 32, vocab_size=30522, max_text=40, width=768, depth=12, heads=12))
    patches, blocks = count_parameters(model.embed.image.patch_embed), count_parameters(model.encoder.blocks)
    assert (patches, blocks) == (2_360_064, 85_054_464)
    assert round((patches + blocks) / 1e6, 1) == 87.4
    assert model.embed.image.pos_embed.shape == (1, 145, 768) and model.embed.text.word.weight.shape == (30522, 768)


@pytest.mark.parametrize(("rows", "words", "patches"), [(None, L, S), (1, 1, 0), (L, L, 0), (L + 2, L, 2), (99, L, S)])
@torch.no_grad()
def test_shapes(rows, words, patches):
    ids, mask = texts()
    pooled, named = shaken()(pictures(), ids, mask, rows=rows)
    assert pooled.shape == (B, 16) and set(named) == {"text", "image"}
    assert named["text"].shape == (B, words, 16) and named["image"].shape == (B, patches, 16)


@pytest.mark.parametrize("rows", [None, 1])
@torch.no_grad()
def test_everything_by_name(rows):
    model, images, (ids, mask) = shaken(), pictures(), texts()
    pooled, named = model(images, ids, mask, rows=rows, everything=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    blocks = {f"block_{i}": (B, T, 16) for i in range(2)} | {f"attention_{i}": (B, 2, T, T) for i in range(2)}
    assert shapes == blocks | {"embedded": (B, T, 16), "text": (B, L, 16), "image": (B, S, 16)}
    close(named["embedded"], model.embed(images, ids))
    close(torch.cat([named["text"], named["image"]], dim=1), model.encoder.norm(named["block_1"]))
    close(pooled, model(images, ids, mask)[0])


@pytest.mark.parametrize("attend", ["all", "cross", "separate"])
@pytest.mark.parametrize("rows", [1, L])
@torch.no_grad()
def test_rows_give_the_same_numbers(attend, rows):
    model, images, (ids, mask) = shaken(replace(SMALL, attend=attend)), pictures(), texts()
    full, named = model(images, ids, mask)
    pooled, short = model(images, ids, mask, rows=rows)
    close(pooled, full)
    close(short["text"][:, :rows], named["text"][:, :rows])
    if attend == "all":  # and it is less work
        assert short["text"].shape[1] == rows and short["image"].shape[1] == 0


# --- embeddings ------------------------------------------------------------------------------------------------------


def embed_by_hand(model: ViLT, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text and image tokens without their types: LayerNorm on the text, none on the image."""
    words, norm, linear = model.embed.text, model.embed.text.norm, model.embed.image.patch_embed.proj
    x = words.word.weight[ids] + words.position.weight[: ids.shape[1]]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + model.config.text_eps).sqrt()
    patches = patchify(images, 4) @ linear.weight.T + linear.bias
    patches = torch.cat([model.embed.image.cls_token.expand(len(images), 1, -1), patches], dim=1)
    return x * norm.weight + norm.bias, patches + model.embed.image.pos_embed


@torch.no_grad()
def test_embedding_by_hand():
    model, images, (ids, _) = shaken(), pictures(), texts()
    text, image = embed_by_hand(model, images, ids)
    types = model.embed.types.weight
    got = model.embed(images, ids)
    close(got, torch.cat([text + types[0], image + types[1]], dim=1))
    # The type added before the text's LayerNorm, or a LayerNorm on the picture too, would be other numbers.
    plain = model.embed.text.word.weight[ids] + model.embed.text.position.weight[:L]
    assert (model.embed.text.norm(plain + types[0]) - got[:, :L]).abs().max() > 0.05
    assert (model.embed.text.norm(image) + types[1] - got[:, L:]).abs().max() > 0.05


@torch.no_grad()
def test_reading_and_looking_is_the_whole():
    """The two halves that VLMo asks for one at a time, side by side, are what the transformer sees."""
    model, (ids, _), (images, image_mask) = shaken(replace(SMALL, patch_colours=True)), texts(), padded_pictures()
    hidden = torch.arange(24) % 3 == 0
    for how in ({}, dict(hidden=hidden[:16]), dict(image_mask=image_mask, hidden=hidden), dict(kind=0)):
        shown = images if "image_mask" in how else images[..., :16]
        halves = [model.embed.read(ids), model.embed.look(shown, **how)]
        assert torch.equal(model.embed(shown, ids, **how), torch.cat(halves, dim=1))
    types = model.embed.types.weight
    close(model.embed.look(shown, kind=0) - types[0], model.embed.look(shown) - types[1])
    assert (types[0] - types[1]).abs().max() > 0.05


@torch.no_grad()
def test_types_off():
    model, images, (ids, _) = shaken(replace(SMALL, modality_types=0)), pictures(), texts()
    assert model.embed.types is None
    close(model.embed(images, ids), torch.cat(embed_by_hand(model, images, ids), dim=1))
    assert count_parameters(shaken()) - count_parameters(model) == 2 * SMALL.width
    assert ViLT(replace(SMALL, modality_types=3)).embed.types.weight.shape == (3, SMALL.width)  # NLVR2


@torch.no_grad()
def test_uint8_pictures_are_read_as_scaled_floats():
    model, (ids, _) = shaken(), texts()
    images = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    close(model(images, ids)[0], model(images / 127.5 - 1, ids)[0])


@torch.no_grad()
def test_hidden_patches_are_replaced_before_the_position_is_added():
    model, images, (ids, _) = shaken(replace(SMALL, patch_colours=True)), pictures(), texts()
    hidden = torch.zeros(B, N, dtype=torch.bool)
    close(model.embed(images, ids, hidden=hidden), model.embed(images, ids))
    hidden[0, 5] = hidden[2, 0] = True
    before, after = model.embed(images, ids), model.embed(images, ids, hidden=hidden)
    at = torch.cat([torch.zeros(B, L + 1, dtype=torch.bool), hidden], dim=1)  # places in the whole sequence
    close(after[~at], before[~at])
    positions = model.embed.image.pos_embed[0, [1 + 5, 1 + 0]]
    close(after[at], model.embed.mask_patch + positions + model.embed.types.weight[1])
    assert (after[at] - before[at]).abs().max() > 0.1
    changed = images.clone()
    changed[0, :, 4:8, 4:8] += 1  # patch 5 of the first picture
    close(model(changed, ids, hidden=hidden)[0], model(images, ids, hidden=hidden)[0])
    assert (model(changed, ids)[0] - model(images, ids)[0]).abs().max() > 1e-3
    assert model.mpp_head(model(images, ids)[1]["image"][:, 1:]).shape == (B, N, 3 * 256)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", ["all", "cross", "separate"])
@torch.no_grad()
def test_padding_of_a_text_is_not_read(attend):
    model, images, (ids, mask) = shaken(replace(SMALL, attend=attend)), pictures(), texts()

    def run(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        pooled, named = model(images, ids, mask)
        return [pooled, named["text"][tokens], named["image"]]

    tokens, padded, real = ids > 0, ids.clone(), ids.clone()
    padded[~mask] = 7
    real[2, 1] = 30 - real[2, 1] if real[2, 1] != 15 else 1
    before = run(ids, mask)
    for a, b in zip(run(padded, mask), before, strict=True):
        assert torch.equal(a, b)
    after = run(real, mask)
    assert (after[0] - before[0])[2].abs().max() > 1e-3 and (after[1] - before[1]).abs().max() > 1e-3
    assert ((after[2] - before[2])[2].abs().max() > 1e-3) == (attend != "separate")
    assert (run(padded, None)[0] - run(ids, None)[0]).abs().max() > 1e-3  # without the mask padding would be read


@torch.no_grad()
def test_a_padded_text_equals_the_text_alone():
    model, images, (ids, mask) = shaken(), pictures(), texts()
    pooled, named = model(images, ids, mask)
    alone, alone_named = model(images[2:], ids[2:, :3])
    close(pooled[2:], alone)
    close(named["text"][2:, :3], alone_named["text"])
    close(named["image"][2:], alone_named["image"])


SIZES = [(4, 6), (3, 2), (4, 4)]  # rows and columns of patches of three pictures in one batch of 4 x 6


def padded_pictures() -> tuple[Tensor, Tensor]:
    """Pictures (3, 3, 16, 24), zero outside their own rectangle, and the mask of filled patches (3, 4, 6)."""
    mask = torch.stack([(torch.arange(4) < r)[:, None] & (torch.arange(6) < c) for r, c in SIZES])
    return pictures(4, 6) * pixels(mask), mask


def pixels(mask: Tensor) -> Tensor:
    """A mask of patches (B, rows, columns) -> of pixels (B, 1, H, W)."""
    return mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]


@torch.no_grad()
def test_padding_of_a_picture_is_not_read():
    model, (ids, mask), (images, image_mask) = shaken(), texts(), padded_pictures()
    filled = torch.cat([torch.ones(B, 1, dtype=torch.bool), image_mask.flatten(1)], dim=1)  # the class token, patches

    def run(images: Tensor) -> list[Tensor]:
        pooled, named = model(images, ids, mask, image_mask=image_mask)
        return [pooled, named["text"], named["image"][filled]]

    before = run(images)
    for a, b in zip(run(torch.where(pixels(image_mask), images, 0.7)), before, strict=True):
        assert torch.equal(a, b)
    real = images.clone()
    real[1, :, 8:12, 4:8] += 1  # the last filled patch of the smallest picture: row 2, column 1
    assert (run(real)[0] - before[0])[1].abs().max() > 1e-3
    whole = torch.ones_like(image_mask)  # as if the grey border belonged to the picture
    assert (model(images, ids, mask, image_mask=whole)[0] - before[0])[1:].abs().amax(1).min() > 1e-3


@torch.no_grad()
def test_a_padded_picture_equals_the_picture_alone():
    model, (ids, mask), (images, image_mask) = shaken(), texts(), padded_pictures()
    pooled, named = model(images, ids, mask, image_mask=image_mask)
    for b, (r, c) in enumerate(SIZES):
        alone = images[b : b + 1, :, : 4 * r, : 4 * c]
        everywhere = torch.ones(1, r, c, dtype=torch.bool)
        p, alone_named = model(alone, ids[b : b + 1], mask[b : b + 1], image_mask=everywhere)
        close(pooled[b : b + 1], p)
        close(named["text"][b : b + 1], alone_named["text"])
        grid = named["image"][b, 1:].view(4, 6, 16)[:r, :c]
        close(torch.cat([named["image"][b, :1], grid.flatten(0, 1)]), alone_named["image"][0])
    # At the model's own size a mask of all True changes nothing.
    close(model(images[2:, :, :, :16], ids[2:], mask[2:])[0], pooled[2:])


def test_patches_of_padded_pictures_can_be_hidden():
    model, (ids, mask), (images, image_mask) = shaken(replace(SMALL, patch_colours=True)), texts(), padded_pictures()
    hidden = torch.zeros(B, 24, dtype=torch.bool)
    hidden[:, 1] = True
    pooled = model(images, ids, mask, image_mask=image_mask, hidden=hidden)[0]
    pooled.sum().backward()
    assert model.embed.mask_patch.grad.abs().max() > 1e-4
    changed = images.clone()
    changed[:, :, :4, 4:8] += 1  # patch 1 of every picture
    close(model(changed, ids, mask, image_mask=image_mask, hidden=hidden)[0], pooled)


@torch.no_grad()
def test_padded_positions_stretch_the_whole_table_to_each_picture():
    table, (_, mask) = torch.randn(1, 17, 5), padded_pictures()
    positions = padded_positions(table, mask)
    assert positions.shape == (3, 1 + 24, 5)
    close(positions[:, 0], table[0, :1].expand(3, -1))
    for b, (r, c) in enumerate(SIZES):
        grid = positions[b, 1:].view(4, 6, 5)
        close(grid[:r, :c].flatten(0, 1), interpolate_positions(table, (r, c))[0, 1:])
        close(grid[mask[b]], grid[:r, :c].flatten(0, 1))
        assert not grid[~mask[b]].any()
        if r > 1 and c > 1:  # the picture's corners get the table's corners, not those of a part of the table
            for row, column, place in ((0, 0, 1), (0, c - 1, 4), (r - 1, 0, 13), (r - 1, c - 1, 16)):
                close(grid[row, column], table[0, place])
    close(positions[2, 1:].view(4, 6, 5)[:, :4].flatten(0, 1), table[0, 1:])  # the table's own size: as it is


# --- who looks at whom -----------------------------------------------------------------------------------------------


def test_block_mask_by_hand():
    T_, F_ = True, False
    assert block_mask(2, 3).all() and block_mask(2, 3).shape == (5, 5)
    separate = [[T_, T_, F_, F_, F_]] * 2 + [[F_, F_, T_, T_, T_]] * 3
    assert block_mask(2, 3, "separate").tolist() == separate
    assert block_mask(2, 3, "cross").tolist() == [[not may for may in row] for row in separate]
    assert block_mask(2, 3, "cross").dtype == torch.bool


def one_layer(attend: str) -> ViLT:
    """The same weights whatever `attend` says."""
    torch.manual_seed(1)
    return shaken(replace(SMALL, depth=1, attend=attend), std=0.1)


@torch.no_grad()
def test_cross_is_cross_attention_in_both_directions():
    """One layer with the blocks text-text and image-image forbidden: the text asks, the picture answers, and back."""
    images, (ids, _) = pictures(), texts()
    model = one_layer("cross")
    x, block = model.embed(images, ids), model.encoder.blocks[0]
    asked = block.norm1(x)
    text, image = asked[:, :L], asked[:, L:]
    x = x + torch.cat([block.attn(text, context=image)[0], block.attn(image, context=text)[0]], dim=1)
    expected = model.encoder.norm(x + block.mlp(block.norm2(x)))
    named = model(images, ids)[1]
    close(named["text"], expected[:, :L], 1e-6)
    close(named["image"], expected[:, L:], 1e-6)


@torch.no_grad()
def test_separate_is_the_same_encoder_on_text_and_picture_apart():
    model, images, (ids, mask) = shaken(replace(SMALL, attend="separate")), pictures(), texts()
    pooled, named = model(images, ids, mask)
    x = model.embed(images, ids)
    text = model.encoder(x[:, :L], mask=mask[:, None, None])[0]
    image = model.encoder(x[:, L:])[0]
    close(named["text"], text, 1e-5)
    close(named["image"], image, 1e-5)
    close(pooled, torch.tanh(model.pooler(text[:, 0])) * torch.tanh(model.pooler(image[:, 0])))


@torch.no_grad()
def test_the_three_ways_give_three_answers():
    images, (ids, _) = pictures(), texts()
    states = [one_layer(attend)(images, ids)[1] for attend in ("all", "cross", "separate")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for name in ("text", "image"):
            assert (states[i][name] - states[j][name]).abs().max() > 1e-3


@pytest.mark.parametrize(("attend", "meet"), [("all", True), ("cross", True), ("separate", False)])
def test_gradients_between_the_modalities(attend, meet):
    model, images, (ids, mask) = shaken(replace(SMALL, attend=attend)), pictures().requires_grad_(), texts()
    pooled, named = model(images, ids, mask)
    words = model.embed.text.word.weight

    def gradient(output: Tensor, source: Tensor) -> float:
        return torch.autograd.grad((output * torch.randn_like(output)).sum(), source, retain_graph=True)[0].abs().max()

    assert gradient(named["image"], images) > 1e-3 and gradient(named["text"], words) > 1e-3
    for crossing in (gradient(named["text"], images), gradient(named["image"], words)):
        assert crossing > 1e-3 if meet else crossing == 0
    assert gradient(pooled, images) > 1e-4 and gradient(pooled, words) > 1e-4  # they meet in the product at the latest


@pytest.mark.parametrize("attend", ["all", "cross", "separate"])
@torch.no_grad()
def test_attention_weights_obey_every_mask(attend):
    model, (ids, mask), (images, image_mask) = shaken(replace(SMALL, attend=attend)), texts(), padded_pictures()
    named = model(images, ids, mask, image_mask=image_mask, everything=True)[1]
    seen = torch.cat([mask, torch.ones(B, 1, dtype=torch.bool), image_mask.flatten(1)], dim=1)  # (B, T)
    total = seen.shape[1]
    allowed = (seen[:, None, :] & block_mask(L, total - L, attend))[:, None].expand(B, 2, total, total)
    for i in range(2):
        weights = named[f"attention_{i}"]
        close(weights.sum(-1), torch.ones(B, 2, total))
        assert not weights[~allowed].any() and weights[allowed].min() > 0


# --- what is read ----------------------------------------------------------------------------------------------------


def test_pooled_is_the_texts_class_token_alone():
    model, images, (ids, mask) = shaken(), pictures(), texts()
    kept = []
    model.encoder.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    pooled, named = model(images, ids, mask)
    kept[0].retain_grad()
    close(pooled, torch.tanh(named["text"][:, 0] @ model.pooler.weight.T + model.pooler.bias))
    F.cross_entropy(model.itm_head(pooled), torch.tensor([0, 1, 1])).backward()
    gradient = kept[0].grad.abs().amax(-1)  # (B, T)
    assert (gradient[:, 0] > 1e-5).all() and not gradient[:, 1:].any()


def test_every_parameter_learns():
    config = replace(SMALL, patch_colours=True, answers=5)
    model, images, (ids, mask) = shaken(config), pictures(), texts()
    hidden = torch.arange(N) % 3 == 0
    pooled, named = model(images, ids, mask, hidden=hidden.expand(B, -1))
    outputs = [model.itm_head(pooled), model.answer_head(pooled), model.mlm_head(named["text"]),
               model.mpp_head(named["image"])]  # fmt: skip
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.kv.bias"):  # its key half cancels in the softmax
            assert parameter.grad.abs().max() > 1e-5, name
    assert model.embed.text.position.weight.grad[L:].abs().max() == 0  # no text was longer


def test_answer_head():
    assert ViLT(SMALL).answer_head is None
    head = answer_head(16, 5)
    assert [type(layer) for layer in head] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert head(torch.randn(3, 16)).shape == (3, 5) and head[0].out_features == 32


# --- starting values -------------------------------------------------------------------------------------------------


def test_first_losses_are_chance():
    """Nothing is known: matching costs ln 2, a hidden word ln V."""
    model = ViLT(ViLTConfig())
    ids, labels = torch.randint(7, 340, (8, 12)), torch.randint(7, 340, (8, 12))
    pooled, named = model(torch.rand(8, 3, 64, 64), ids)
    matching = F.cross_entropy(model.itm_head(pooled), torch.arange(8) % 2)
    assert matching.item() == pytest.approx(math.log(2), abs=0.05)
    assert masked_lm_loss(model.mlm_head, named["text"], labels).item() == pytest.approx(math.log(340), abs=0.1)


def test_initial_values():
    model = ViLT(ViLTConfig(patch_colours=True, answers=300))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            numbers = module.weight.numel()
            std = 0.02 * 6**0.5 if name in ("pooler", "itm_head") else 0.02  # 768 / 128 = 6
            assert module.weight.std().item() == pytest.approx(std, rel=0.03 if numbers > 10_000 else 0.2), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    for parameter in (model.embed.image.cls_token, model.embed.image.pos_embed):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.embed.mask_patch.any()


def test_the_decoder_is_not_tied_to_the_embedded_words():
    model = ViLT(SMALL)
    assert model.mlm_head.decoder.weight is not model.embed.text.word.weight
    assert model.mlm_head.decoder.weight.shape == model.embed.text.word.weight.shape


@torch.no_grad()
def test_dropout_and_eps_follow_the_config():
    model = ViLT(replace(SMALL, dropout=0.3, eps=0.5, text_eps=0.25, mlp_ratio=3))
    sites = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    blocks = [f"encoder.blocks.{i}.{part}.dropout" for i in range(2) for part in ("attn", "mlp")]
    assert sites == dict.fromkeys(["embed.text.dropout", "embed.image.dropout", *blocks], 0.3)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert eps.pop("embed.text.norm") == eps.pop("mlm_head.norm") == 0.25 and set(eps.values()) == {0.5}
    assert model.encoder.blocks[0].mlp.fc1.out_features == 48


# --- starting from a ViT ---------------------------------------------------------------------------------------------


def trained_vit(**options) -> ViT:
    """A ViT of the same shape, with noise for training."""
    vit = ViT(replace(SMALL.image_config(), num_classes=5, **options))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.eval()


@torch.no_grad()
def test_start_from_vit_takes_patches_positions_and_blocks():
    vit, model, images, (ids, _) = trained_vit(), ViLT(replace(SMALL, attend="separate")), pictures(), texts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert start_from_vit(model, vit) is model
    assert torch.equal(model.embed.image(images), vit.embed(images))
    for name, value in model.state_dict().items():
        assert name.startswith(("embed.image.", "encoder.")) != torch.equal(value, before[name]), name
    # Left alone, the picture's stream is the ViT itself, down to its last LayerNorm.
    model.embed.types = None
    close(model.eval()(images, ids)[1]["image"], vit(images, everything=True)[1]["tokens"])


@torch.no_grad()
def test_start_from_vit_copies_by_value():
    vit, model = trained_vit(), ViLT(SMALL)
    start_from_vit(model, vit)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in vit.parameters():
        parameter.add_(1)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (dict(width=32), "embed.image.cls_token"),
        (dict(patch_size=8), "embed.image.pos_embed"),
        (dict(image_size=32), "embed.image.pos_embed"),
        (dict(channels=1), "embed.image.patch_embed.proj.weight"),
        (dict(depth=1), "encoder.blocks.1"),
        (dict(depth=3), "encoder.blocks.2"),
        (dict(mlp_ratio=2), "encoder.blocks.0.mlp"),
        (dict(heads=4), "heads"),
        (dict(pool="mean"), "embed.image.cls_token"),
        (dict(position="2d"), "embed.image.pos"),
        (dict(position="none"), "embed.image.pos_embed"),
        (dict(norm="post"), "encoder.norm"),
    ],
)
def test_start_from_vit_refuses_what_does_not_fit(option, part):
    model = ViLT(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{part}.* of the ViT does not fit this ViLT: give both the same patches"):
        start_from_vit(model, trained_vit(**option))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # none taken


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="attend='both': choose one of 'all', 'cross', 'separate'"):
        ViLTConfig(attend="both")
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        replace(SMALL, image_size=18)
    with pytest.raises(ValueError, match="width 16 is not a multiple of 3 heads"):
        ViLT(replace(SMALL, heads=3))


def test_the_image_config_is_a_vits():
    config = replace(SMALL, mlp_ratio=3, dropout=0.1, eps=1e-3, channels=1).image_config()
    assert config == ViTConfig(16, 4, 1, 16, 2, 2, 3, dropout=0.1, eps=1e-3)
    assert (config.pool, config.position, config.norm) == ("cls", "1d", "pre")


def test_inputs_that_do_not_fit():
    model = ViLT(SMALL)
    with pytest.raises(ValueError, match=r"a text of 9 tokens does not fit 8 positions: cut it with encode_batch"):
        model(pictures(), torch.ones(B, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got \(3, 3, 16, 24\)"):
        model(pictures(4, 6), texts()[0])
