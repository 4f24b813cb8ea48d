"""Our FLIP beside other people's parts of it: the same numbers within 1e-5.

No library has the whole model. Its image tower is the encoder of MAE (transformers), its text tower a plain
bidirectional transformer (torch), and open_clip has a relative of the whole.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from parity_helpers import TOLERANCE, assert_close, assert_differ, random_pictures, randomise
from torch import nn

from minivlp import bench
from minivlp.layers import count_parameters, patchify
from minivlp.losses import contrastive_loss
from minivlp.models import vit
from minivlp.models.clip import causal_mask
from minivlp.models.flip import (
    FLIP,
    FLIPConfig,
    FLIPText,
    FLIPVision,
    paper_config,
    random_masking,
    sincos_positions,
    text_masking,
)

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SMALL = dict(
    image_size=32, patch_size=8, image_width=32, image_depth=3, image_heads=4, vocab_size=50, max_text=12,
    text_width=32, text_depth=3, text_heads=4, embed_dim=20,
)  # fmt: skip
RATIOS = (0.0, 0.5, 0.75)
BOTH = {  # options that both towers read
    "plain": {},
    "tanh GELU": dict(gelu="tanh"),
    "eps 0.1": dict(eps=0.1),  # absurd, so that an ignored eps cannot hide
    "narrow MLP": dict(mlp_ratio=2),
}
VISION = BOTH | {
    "one head": dict(image_heads=1),
    "eight heads": dict(image_heads=8),
    "one block": dict(image_depth=1),
    "another width": dict(image_width=48),
    "patch 4": dict(patch_size=4),
    "patch 16": dict(patch_size=16),
    "larger pictures": dict(image_size=48),
    "one channel": dict(channels=1),
    "five channels": dict(channels=5),
}
TEXT = BOTH | {
    "one head": dict(text_heads=1),
    "one block": dict(text_depth=1),
    "another width": dict(text_width=24),
    "the padding is id 49": dict(pad_id=49),
    "long texts": dict(max_text=32),
}


def config(**options):
    return FLIPConfig(**(SMALL | options))


def pictures(ours, *, seed=0):
    return random_pictures(ours.config.image_size, ours.config.channels, seed=seed)


def some_noise(ours, *, seed=0, count=3):
    return torch.rand(count, ours.config.grid**2, generator=torch.Generator().manual_seed(seed))


def tower(**options):
    """Our image tower with random weights."""
    return randomise(FLIPVision(config(**options)))


def pair_with_mae(name="plain", ratio=0.5):
    """transformers' encoder with random weights and our tower with the same. The positions are each one's own."""
    c = config(**VISION[name])
    theirs = bench.transformers_mae(c, ratio)
    table = theirs.embeddings.position_embeddings.clone()
    randomise(theirs)
    theirs.embeddings.position_embeddings.data.copy_(table)
    return theirs, bench.load_mae(FLIPVision(c), theirs).eval()


# --- the image tower -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_image_tower_equals_mae(name, ratio):
    theirs, ours = pair_with_mae(name, ratio)
    images, noise = pictures(ours), some_noise(ours)
    keep, removed, restore = random_masking(noise, ratio)
    assert keep.shape == (3, round(ours.config.grid**2 * (1 - ratio)))

    expected = theirs(images, noise=noise, output_hidden_states=True)
    assert torch.equal(removed, expected.mask.bool()) and torch.equal(restore, expected.ids_restore)
    states = expected.last_hidden_state  # after the LayerNorm, class token first
    pooled, named = ours(images, keep)
    assert_close(named["tokens"], states)
    assert_close(pooled, states.mean(dim=1))
    for pool, mean in (("patches", states[:, 1:].mean(dim=1)), ("cls", states[:, 0])):
        other = FLIPVision(config(**VISION[name], pool=pool)).eval()
        other.load_state_dict(ours.state_dict())
        assert_close(other(images, keep)[0], mean)
    _, named = ours(images, keep, everything=True)
    assert_close(named["embedded"], expected.hidden_states[0])
    for i in range(ours.config.image_depth):
        assert_close(named[f"block_{i}"], expected.hidden_states[i + 1])

    # Agreement would be worth nothing if the outputs did not depend on the pictures and on what is looked at.
    changed = pictures(ours, seed=1)
    assert_differ(theirs(changed, noise=noise).last_hidden_state, states)
    assert_close(ours(changed, keep)[1]["tokens"], theirs(changed, noise=noise).last_hidden_state)
    others = 1 - noise  # of few patches another draw may choose the same
    elsewhere = theirs(images, noise=others).last_hidden_state
    assert_close(ours(images, random_masking(others, ratio)[0])[1]["tokens"], elsewhere)
    if ratio:
        assert_differ(elsewhere.mean(dim=1), pooled)
    else:  # nothing is left out: only the order differs
        assert_differ(elsewhere, states)
        assert_close(ours(images)[0], pooled)
        assert_close(ours(images)[1]["tokens"][:, 1:], states[:, 1:].take_along_dim(restore[..., None], dim=1))


def test_gradients_equal_mae():
    theirs, ours = pair_with_mae()
    noise, target = some_noise(ours), torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
    keep, removed, _ = random_masking(noise, 0.5)
    images, same = pictures(ours).requires_grad_(), pictures(ours).requires_grad_()
    (ours(images, keep)[1]["tokens"] * target).mean().backward()
    (theirs(same, noise=noise).last_hidden_state * target).mean().backward()
    assert images.grad.abs().max() > 1e-4
    assert_close(images.grad, same.grad)
    # What is left out gets no gradient, and all that is kept gets one.
    seen = patchify(images.grad, ours.config.patch_size).abs().amax(dim=2) > 0
    assert torch.equal(seen, ~removed)
    gradients = FLIPVision(ours.config)  # a tower to hold their gradients under our names
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    bench.load_mae(gradients, theirs)
    for (name, parameter), expected in zip(ours.named_parameters(), gradients.parameters(), strict=True):
        assert parameter.grad.abs().max() > 1e-5, name
        assert_close(parameter.grad, expected)


@pytest.mark.parametrize(("grid", "width"), [(2, 4), (4, 32), (8, 128), (14, 768), (16, 1280)])
@torch.no_grad()
def test_positions_equal_mae(grid, width):
    c = FLIPConfig(image_size=8 * grid, image_width=width, image_depth=0, image_heads=1)
    table = bench.transformers_mae(c, 0.5).embeddings.position_embeddings[0]
    assert not table[0].any()  # the class token's
    torch.testing.assert_close(sincos_positions(grid, width), table[1:], rtol=0, atol=1e-6)
    rows_first = sincos_positions(grid, width).roll(width // 2, dims=1)
    mixed = sincos_positions(grid, width).view(grid, grid, width).transpose(0, 1).flatten(0, 1)
    assert torch.equal(rows_first, mixed) and (rows_first - table[1:]).abs().max() > 0.5
    assert len(table[1:].unique(dim=0)) == grid**2


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 0.98])
@pytest.mark.parametrize("N", [64, 196, 256])
def test_random_masking_equals_mae(N, ratio):
    theirs = bench.transformers_mae(config(), ratio).embeddings
    noise = torch.rand(5, N, generator=torch.Generator().manual_seed(N))
    keep, removed, restore = random_masking(noise, ratio)
    places = torch.arange(N, dtype=torch.float32).expand(5, N)[..., None]  # a sequence of which each token is its place
    kept, mask, ids_restore = theirs.random_masking(places, noise)
    assert torch.equal(keep, kept[..., 0].long())
    assert torch.equal(removed, mask.bool()) and torch.equal(restore, ids_restore)
    # The mask counts what is gone, and the way back is the way back.
    K = int(N * (1 - ratio))
    assert keep.shape == (5, K) and (mask.sum(1) == N - K).all()
    shuffle = restore.argsort(dim=1)
    assert torch.equal(shuffle[:, :K], keep)
    assert torch.equal(shuffle.take_along_dim(restore, dim=1), torch.arange(N).expand(5, N))
    assert not torch.equal(restore, shuffle)  # its own inverse by chance: then either would do
    filled = torch.cat([kept, torch.full((5, N - K, 1), -1.0)], dim=1).take_along_dim(restore[..., None], dim=1)
    assert torch.equal(filled, torch.where(removed[..., None], -1.0, places))
    # The noise matters, and each row chooses for itself.
    assert len({tuple(sorted(row)) for row in keep.tolist()}) == (5 if ratio else 1)
    assert not torch.equal(random_masking(1 - noise, ratio)[0], keep)


def test_random_masking_keeps_what_a_rounding_error_costs_mae():
    noise = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    kept, *_ = bench.transformers_mae(config(), 0.9).embeddings.random_masking(noise[..., None], noise)
    assert kept.shape[1] == 0  # 10 * (1 - 0.9) is 0.9999999999999998
    assert torch.equal(random_masking(noise, 0.9)[0][:, 0], noise.argmin(dim=1))


# Common mistakes, each made in our tower.
def other_gelu(ours):
    for block in ours.encoder.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def other_eps(ours):
    ours.encoder.norm.eps = 1e-2


def other_heads(ours):
    ours.encoder.blocks[1].attn.heads = 8


def keys_and_values(ours):
    kv = ours.encoder.blocks[0].attn.kv.weight
    kv.copy_(kv.roll(32, dims=0))


def norms(ours):
    block = ours.encoder.blocks[0]
    block.norm1, block.norm2 = block.norm2, block.norm1


def no_norm_after(ours):
    ours.encoder.norm = nn.Identity()


def a_norm_before(ours):
    replace_embed(ours, lambda x, images, keep: F.layer_norm(x, (32,)))


def rows_first(ours):
    ours.pos_embed.copy_(ours.pos_embed.roll(16, dims=1))


def patches_transposed(ours):
    weight = ours.patch_embed.proj.weight
    weight.copy_(weight.view(32, 3, 8, 8).transpose(2, 3).reshape(32, -1))


def no_patch_bias(ours):
    ours.patch_embed.proj.bias.zero_()


def positions_after_dropping(ours):
    def embed(x, images, keep):
        x[:, 1:] += ours.pos_embed[: keep.shape[1]] - ours.pos_embed[keep]
        return x

    replace_embed(ours, embed)


def a_position_for_the_class_token(ours):
    def embed(x, images, keep):
        x[:, 0] += ours.pos_embed[0]
        return x

    replace_embed(ours, embed)


def class_token_last(ours):
    replace_embed(ours, lambda x, images, keep: x.roll(-1, dims=1))


def replace_embed(ours, change):
    right = ours.embed
    ours.embed = MethodType(lambda self, images, keep=None: change(right(images, keep), images, keep), ours)


WRONG = (
    other_gelu, other_eps, other_heads, keys_and_values, norms, no_norm_after, a_norm_before, rows_first,
    patches_transposed, no_patch_bias, positions_after_dropping, a_position_for_the_class_token, class_token_last,
)  # fmt: skip


@pytest.mark.parametrize("spoil", WRONG)
@torch.no_grad()
def test_the_tolerance_would_notice(spoil):
    """The comparison rejects the mistakes it is there for: each breaks one thing of the loaded tower."""
    theirs, ours = pair_with_mae()
    images, noise = pictures(ours), some_noise(ours)
    keep, _, _ = random_masking(noise, 0.5)
    expected = theirs(images, noise=noise).last_hidden_state
    assert_close(ours(images, keep)[1]["tokens"], expected)
    spoil(ours)
    assert (ours(images, keep)[1]["tokens"] - expected).abs().max() > 10 * TOLERANCE


CHOICES = {
    "those with the most noise": lambda noise, K: noise.argsort(dim=1, descending=True)[:, :K],
    "one choice for all": lambda noise, K: noise[:1].argsort(dim=1)[:, :K].expand(len(noise), K),
    "the way back": lambda noise, K: noise.argsort(dim=1).argsort(dim=1)[:, :K],
    "the first": lambda noise, K: torch.arange(K).expand(len(noise), K),
}


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_the_tolerance_would_notice_another_choice(name):
    theirs, ours = pair_with_mae()
    images, noise = pictures(ours), some_noise(ours)
    expected = theirs(images, noise=noise).last_hidden_state.mean(dim=1)
    assert_close(ours(images, random_masking(noise, 0.5)[0])[0], expected)
    wrong = (ours(images, CHOICES[name](noise, 8))[0] - expected).abs().amax(dim=1) > 10 * TOLERANCE
    assert wrong.tolist() == [name != "one choice for all", True, True]  # the first row is right then


# --- removal is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["sincos", "learned"])
@pytest.mark.parametrize("pool", ["mean", "patches", "cls"])
@torch.no_grad()
def test_without_removal_it_is_the_vit_of_lesson_01(pool, position):
    """A ViT whose class token has no position, with the same patches, positions and blocks."""
    ours = tower(pool=pool, position=position)
    c, images = ours.config, pictures(ours)
    theirs = vit.ViT(vit.ViTConfig(
        c.image_size, c.patch_size, width=c.image_width, depth=c.image_depth, heads=c.image_heads, eps=c.eps,
    )).eval()  # fmt: skip
    theirs.embed.patch_embed.load_state_dict(ours.patch_embed.state_dict())
    theirs.embed.cls_token.copy_(ours.cls_token)
    theirs.embed.pos_embed.copy_(torch.cat([torch.zeros(1, c.image_width), ours.pos_embed])[None])
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    named = theirs(images, everything=True)[1]
    tokens = named["tokens"]
    expected = {"mean": tokens.mean(dim=1), "patches": tokens[:, 1:].mean(dim=1), "cls": tokens[:, 0]}
    feature, own = ours(images, everything=True)
    assert_close(feature, expected[pool])
    assert_close(ours(images)[0], expected[pool])
    assert_close(own["embedded"], named["embedded"])
    assert_close(own["tokens"], tokens)
    for other in expected.keys() - {pool}:
        assert_differ(expected[other], feature)
    # The picture matters, and where its parts stand.
    for changed in (pictures(ours, seed=1), images.roll(c.patch_size, dims=-1)):
        assert_differ(ours(changed)[0], feature)
    theirs.embed.pos_embed[:, 0] = theirs.embed.pos_embed[:, 1]  # a class token with a position is another model
    assert_differ(theirs.encoder(theirs.embed(images))[0].mean(dim=1), tokens.mean(dim=1))


@torch.no_grad()
def test_all_patches_in_another_order_give_the_same_feature():
    ours = tower()
    images, noise = pictures(ours), some_noise(ours)
    keep, _, restore = random_masking(noise, 0.0)
    feature, named = ours(images)
    shuffled, other = ours(images, keep)
    assert_close(shuffled, feature)
    assert_differ(other["tokens"][:, 1:], named["tokens"][:, 1:])
    assert_close(other["tokens"][:, 1:].take_along_dim(restore[..., None], dim=1), named["tokens"][:, 1:])
    # Not because order means nothing: patches that leave their positions behind make another picture.
    positions_after_dropping(ours)
    assert_differ(ours(images, keep)[0], feature)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@torch.no_grad()
def test_removing_patches_is_the_same_as_hiding_them_from_everybody(ratio):
    """Exact, not an approximation: the full sequence with their keys at -inf gives the kept tokens the same states."""
    ours = tower()
    images = pictures(ours)
    keep, removed, _ = random_masking(some_noise(ours), ratio)
    feature, named = ours(images, keep)
    full = ours.embed(images)
    seen = F.pad(~removed, (1, 0), value=True)  # (B, 1+N), the class token always
    places = F.pad(keep + 1, (1, 0))  # (B, 1+K)

    def states_of(x, mask):
        return ours.encoder(x, mask=mask)[0].take_along_dim(places[..., None], dim=1)

    assert_close(named["tokens"], states_of(full, seen[:, None, None, :]))
    assert_close(feature, bench.MaskedKeys.forward(ours, images, keep)[0])
    # What other methods do is something else: nothing hidden, black patches, a mask token (position alone), and hiding
    # in the first block only.
    black = patchify(images, 8).masked_fill(removed[..., None], 0.0)
    black = F.fold(black.transpose(1, 2), 32, kernel_size=8, stride=8)
    assert torch.equal(patchify(black, 8)[~removed], patchify(images, 8)[~removed])
    token = torch.where(F.pad(removed, (1, 0))[..., None], F.pad(ours.pos_embed, (0, 0, 1, 0)), full)
    for wrong in (states_of(full, None), states_of(ours.embed(black), None), states_of(token, None)):
        assert_differ(wrong, named["tokens"])
    x, _ = ours.encoder.blocks[0](full, mask=seen[:, None, None, :])
    for block in ours.encoder.blocks[1:]:
        x, _ = block(x)
    assert_differ(ours.encoder.norm(x).take_along_dim(places[..., None], dim=1), named["tokens"])


# --- the text tower --------------------------------------------------------------------------------------------------


def torch_text(ours):
    """torch's encoder with the blocks and the last LayerNorm of our text tower."""
    c = ours.config
    layer = nn.TransformerEncoderLayer(
        c.text_width, c.text_heads, c.mlp_ratio * c.text_width, dropout=0.0, layer_norm_eps=c.eps, batch_first=True,
        activation=lambda x: F.gelu(x, approximate={"exact": "none", "tanh": "tanh"}[c.gelu]), norm_first=True,
    )  # fmt: skip
    norm = nn.LayerNorm(c.text_width, eps=c.eps)
    theirs = nn.TransformerEncoder(layer, c.text_depth, norm=norm, enable_nested_tensor=False).eval()
    bench.copy_encoder(theirs, ours.encoder)
    return theirs


def text_pair(name="plain"):
    ours = randomise(FLIPText(config(**TEXT[name])))
    return torch_text(ours), ours


def texts(ours, *, seed=0, lengths=(9, 6, 3), total=9):
    """ids (B, L), filled up with padding."""
    words = torch.randint(6, 49, (len(lengths), total), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(total) < torch.tensor(lengths)[:, None], words, ours.config.pad_id)


def text_states(theirs, ours, ids):
    return theirs(ours.embed(ids), src_key_padding_mask=ids == ours.config.pad_id)


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_text_tower_equals_torch(name):
    theirs, ours = text_pair(name)
    ids = texts(ours)
    words = ids != ours.config.pad_id
    states = text_states(theirs, ours, ids)
    expected = states[:, 0]
    assert_close(ours(ids)[0], expected)
    pooled, named = ours(ids, everything=True)
    assert_close(pooled, expected)
    assert_close(named["text"][words], states[words])
    # Which words stand where matters, the last one too, although the first is read: nothing is causal.
    last = ids.scatter(1, words.sum(1, keepdim=True) - 1, 5)
    swapped = torch.cat([ids[:, :1], ids[:, 2:3], ids[:, 1:2], ids[:, 3:]], dim=1)
    for changed in (texts(ours, seed=1), last, swapped):
        other = text_states(theirs, ours, changed)[:, 0]
        assert_differ(other, expected)
        assert_close(ours(changed)[0], other)
    # Padding does not, neither more of it nor none.
    assert_close(ours(F.pad(ids, (0, 3), value=ours.config.pad_id))[0], expected)
    for b, length in enumerate(words.sum(1).tolist()):
        assert_close(ours(ids[b : b + 1, :length])[0], expected[b : b + 1])


@pytest.mark.parametrize("prioritised", [True, False])
@torch.no_grad()
def test_text_tower_with_words_removed_equals_torch(prioritised):
    theirs, ours = text_pair()
    ids = texts(ours)
    words = ids != ours.config.pad_id
    noise = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    keep = text_masking(noise, words, 0.5, prioritised=prioritised)
    assert keep.shape == (3, 4)

    def removed(keep):
        x = ours.embed(ids).take_along_dim(keep[..., None], dim=1)
        return theirs(x, src_key_padding_mask=~words.take_along_dim(keep, dim=1))[:, 0]

    expected = removed(keep)
    assert_close(ours(ids, keep)[0], expected)
    # The same as hiding the others from everybody, and not the same as reading on, or as other words, or as fewer
    # words without their places.
    hidden = ~torch.zeros_like(words).scatter(1, keep, True) | ~words
    assert_close(theirs(ours.embed(ids), src_key_padding_mask=hidden)[:, 0], expected)
    longest = slice(0, 1)  # of the shortest text all words may be kept
    assert_differ(ours(ids)[0][longest], expected[longest])
    other = text_masking(1 - noise, words, 0.5, prioritised=prioritised)
    assert_differ(removed(other)[longest], expected[longest])
    assert_close(ours(ids, other)[0], removed(other))
    assert_differ(ours(ids.take_along_dim(keep, dim=1))[0][longest], expected[longest])


@pytest.mark.parametrize("wrong", ["padding read", "causal", "last token", "mean", "no norm", "eps", "GELU"])
@torch.no_grad()
def test_the_tolerance_would_notice_another_text_tower(wrong):
    theirs, ours = text_pair()
    ids = texts(ours)
    words = ids != ours.config.pad_id
    expected = text_states(theirs, ours, ids)[:, 0]
    assert_close(ours(ids)[0], expected)
    mask = words[:, None, None, :]
    if wrong == "eps":
        ours.encoder.blocks[0].norm1.eps = 1e-2
    if wrong == "GELU":
        ours.encoder.blocks[0].mlp.act = nn.GELU(approximate="tanh")
    if wrong == "no norm":
        ours.encoder.norm = nn.Identity()
    if wrong == "causal":
        mask = mask & causal_mask(ids.shape[1])
    if wrong == "padding read":
        mask = None
    states, _ = ours.encoder(ours.embed(ids), mask=mask)
    pooled = {
        "last token": states[torch.arange(3), words.sum(1) - 1],
        "mean": (states * words[..., None]).sum(1) / words.sum(1, keepdim=True),
    }.get(wrong, states[:, 0])
    noticed = (pooled - expected).abs().amax(dim=1) > 5 * TOLERANCE
    assert noticed.tolist() == [wrong != "padding read", True, True]  # the first text fills its row


# --- the whole model -------------------------------------------------------------------------------------------------


def whole_pair(ratio=0.0, **options):
    """Our FLIP with random weights and open_clip's class with the same, which drops patches in training mode."""
    pytest.importorskip("open_clip")
    ours = randomise(FLIP(config(**(dict(max_text=9, pool="patches") | options))))
    ours.logit_scale.data.fill_(3.0)  # magnifies differences of the logits like a trained model
    return bench.open_clip_from(ours, ratio=ratio).train(), ours


def call(theirs, images, ids, *, seed=0):
    torch.manual_seed(seed)  # PatchDropout draws its own numbers
    image, text, scale = theirs(images, ids)
    return scale * image @ text.T, image, text


def drawn(ours, *, seed=0):
    """The noise that makes our choice the same as that of PatchDropout: it keeps the largest numbers, we the least."""
    return -torch.randn(3, ours.config.grid**2, generator=torch.Generator().manual_seed(seed))


FULL = (9, 9, 9)  # open_clip's tower knows no padding


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    "options",
    [{}, dict(pool="cls"), dict(gelu="tanh"), dict(eps=0.1), dict(position="learned"), dict(text_width=24),
     dict(image_heads=2, text_heads=1), dict(patch_size=4), dict(text_depth=1, image_depth=2), dict(embed_dim=40)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_whole_model_equals_open_clip(options, ratio):
    theirs, ours = whole_pair(ratio, **options)
    images, ids = pictures(ours), texts(ours, lengths=FULL)
    keep = random_masking(drawn(ours), ratio)[0] if ratio else None
    expected = call(theirs, images, ids)
    logits, named = ours(images, ids, keep=keep)
    for own, their in zip((logits, named["image"], named["text"]), expected, strict=True):
        assert_close(own, their)
    # In evaluation mode theirs sees whole pictures, as ours does when nobody says what to keep.
    whole = call(theirs.eval(), images, ids)
    assert_close(ours(images, ids)[0], whole[0])
    theirs.train()
    # Pictures, texts and the choice matter.
    changed, other = pictures(ours, seed=1), texts(ours, seed=1, lengths=FULL)
    assert_differ(call(theirs, changed, ids)[1], expected[1])
    assert_differ(call(theirs, images, other)[2], expected[2])
    assert_close(ours(changed, other, keep=keep)[0], call(theirs, changed, other)[0])
    if ratio:
        assert_differ(whole[1], expected[1])
        assert_differ(call(theirs, images, ids, seed=1)[1], expected[1])
        elsewhere = random_masking(drawn(ours, seed=1), ratio)[0]
        assert_close(ours(images, ids, keep=elsewhere)[0], call(theirs, images, ids, seed=1)[0])


@torch.no_grad()
def test_what_open_clip_does_otherwise():
    """It averages the patches without the class token, and its text tower reads padding."""
    theirs, ours = whole_pair()
    images, ids = pictures(ours), texts(ours)
    _, image, text = call(theirs, images, ids)
    short = torch.tensor([False, True, True])
    assert_close(ours.encode_text(ids)[~short], text[~short])
    assert_differ(ours.encode_text(ids)[short], text[short])
    with_class_token = FLIP(config(max_text=9)).eval()
    with_class_token.load_state_dict(ours.state_dict())
    assert_differ(with_class_token.encode_image(images), image)
    # With pool="mean" the average is left to the caller: of projected states, as the projection has no bias.
    states = bench.open_clip_from(with_class_token).encode_image(images)
    assert states.shape == (3, 17, 20)
    assert_close(with_class_token.encode_image(images), F.normalize(states.mean(dim=1), dim=-1))


def test_gradients_equal_open_clip():
    theirs, ours = whole_pair(0.5)
    images, ids = pictures(ours), texts(ours, lengths=FULL)
    expected = contrastive_loss(call(theirs, images, ids)[0])
    loss = contrastive_loss(ours(images, ids, keep=random_masking(drawn(ours), 0.5)[0])[0])
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    assert ours.logit_scale.grad.abs() > 1e-4
    for own, their in (
        (ours.logit_scale, theirs.logit_scale),
        (ours.vision.patch_embed.proj.weight, theirs.visual.conv1.weight),
        (ours.vision.patch_embed.proj.bias, theirs.visual.conv1.bias),
        (ours.vision.cls_token, theirs.visual.class_embedding),
        (ours.vision.encoder.norm.weight, theirs.visual.ln_post.weight),
        (ours.text.word.weight, theirs.token_embedding.weight),
        (ours.text.position.weight, theirs.positional_embedding),
        (ours.text.encoder.norm.weight, theirs.ln_final.weight),
    ):
        assert own.grad.abs().max() > 1e-4
        assert_close(own.grad, their.grad.view_as(own))
    for own, their in ((ours.image_projection, theirs.visual.proj), (ours.text_projection, theirs.text_projection)):
        assert_close(own.weight.grad, their.grad.T)
    assert theirs.visual.positional_embedding.grad is None and not ours.vision.pos_embed.requires_grad


# --- full size -------------------------------------------------------------------------------------------------------

# The paper's Table: millions of parameters of the image tower, of the text tower, and of both.
PUBLISHED = {"B/16": (86, 53, 141), "L/16": (303, 109, 414), "H/14": (631, 334, 967)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name):
    """The table of fixed positions counted as the paper does, although nothing of it is learned."""
    with torch.device("meta"):
        ours = FLIP(paper_config(name))
    vision = count_parameters(ours.vision) + ours.vision.pos_embed.numel()
    text = count_parameters(ours.text)
    *towers, total = PUBLISHED[name]
    assert [round(vision / 1e6), round(text / 1e6)] == towers
    assert abs((count_parameters(ours) + ours.vision.pos_embed.numel()) / 1e6 / total - 1) < 0.015
    assert count_parameters(ours) == sum(map(count_parameters, (
        ours.vision, ours.text, ours.image_projection, ours.text_projection))) + 1  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_image_tower_at_full_size_equals_mae(name):
    """Tensor by tensor; only transformers' table of positions has a row for the class token."""
    c = paper_config(name)
    with torch.device("meta"):
        theirs = bench.transformers_mae(c, 0.5)
        ours = bench.load_mae(FLIPVision(c), theirs)
    extra = theirs.embeddings.position_embeddings.numel()
    assert extra == ours.pos_embed.numel() + c.image_width
    assert count_parameters(theirs) == count_parameters(ours) + extra
