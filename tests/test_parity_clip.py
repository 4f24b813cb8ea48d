"""Our CLIP beside transformers' CLIPModel, weight for weight: the same numbers within 1e-5."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from parity_helpers import (
    TOLERANCE,
    assert_close,
    assert_differ,
    edit,
    edit_config,
    message,
    random_pictures,
    randomise,
    saved,
)
from PIL import Image

from minivlp.layers import count_parameters
from minivlp.losses import contrastive_loss
from minivlp.models import clip
from minivlp.pretrained import (
    CLIP_MEAN,
    CLIP_STD,
    CheckpointError,
    clip_from_hf,
    clip_tokenizer,
    from_hf,
    preprocess,
    preprocess_clip,
)

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

WORDS, L = 50, 9
END = WORDS - 1
DEPTH = 3

TOWER = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=DEPTH, num_attention_heads=4)
TEXT = TOWER | dict(vocab_size=WORDS, max_position_embeddings=12, eos_token_id=END, bos_token_id=0, pad_token_id=1)
VISION = TOWER | dict(image_size=32, patch_size=8)
# name -> options of both towers, of the text tower, of the image tower, of the whole
VARIANTS = {
    "quick GELU": ({}, {}, {}, {}),
    "exact GELU": (dict(hidden_act="gelu"), {}, {}, {}),
    "old name of GELU": (dict(hidden_act="gelu_python"), {}, {}, {}),
    "eps 0.1": (dict(layer_norm_eps=0.1), {}, {}, {}),  # absurd, so that an ignored eps cannot hide
    "one head": (dict(num_attention_heads=1), {}, {}, {}),
    "narrow MLP": (dict(intermediate_size=64), {}, {}, {}),
    "one block": (dict(num_hidden_layers=1), {}, {}, {}),
    "another text width": ({}, dict(hidden_size=24, intermediate_size=96), {}, {}),
    "another image width": ({}, {}, dict(hidden_size=48, intermediate_size=192, num_attention_heads=6), {}),
    "another text depth": ({}, dict(num_hidden_layers=1), {}, {}),
    "other heads": ({}, dict(num_attention_heads=2), {}, {}),
    "patch 4": ({}, {}, dict(patch_size=4), {}),
    "patch 16": ({}, {}, dict(patch_size=16), {}),
    "one channel": ({}, {}, dict(num_channels=1), {}),
    "long texts": ({}, dict(max_position_embeddings=77), {}, {}),
    "small shared space": ({}, {}, {}, dict(projection_dim=10)),
    "large shared space": ({}, {}, {}, dict(projection_dim=64)),
    "the end is id 5": ({}, dict(eos_token_id=5), {}, {}),
    "the end is id 0": ({}, dict(eos_token_id=0), {}, {}),
    "the end is the largest id": ({}, dict(eos_token_id=2), {}, {}),  # so said by old files
}


def reference(name="quick GELU", *, attention=None):
    """The official class with random weights; exp(t) = 20 magnifies differences of the logits like a trained CLIP."""
    both, text, vision, options = VARIANTS[name]
    config = transformers.CLIPConfig(
        text_config=TEXT | both | text, vision_config=VISION | both | vision, **(dict(projection_dim=32) | options),
        attn_implementation=attention,
    )  # fmt: skip
    model = randomise(transformers.CLIPModel(config))
    model.logit_scale.data.fill_(3.0)
    return model


def end_of(theirs):
    end = theirs.config.text_config.eos_token_id
    return WORDS - 1 if end == 2 else end


def pictures(theirs, *, seed=0):
    config = theirs.config.vision_config
    return random_pictures(config.image_size, config.num_channels, seed=seed)


def texts(end=END, *, seed=0, lengths=(L, 6, 3), padding=None):
    """ids (B, L) that close with `end` and are filled up with `padding`, by default further ends; and the mask."""
    ids = torch.randint(6, WORDS - 1, (len(lengths), L), generator=torch.Generator().manual_seed(seed))
    position, last = torch.arange(L), torch.tensor(lengths)[:, None] - 1
    ids = torch.where(position > last, end if padding is None else padding, ids)
    return torch.where(position == last, end, ids), position <= last


def call(theirs, images, ids, mask=None):
    return theirs(input_ids=ids, pixel_values=images, attention_mask=None if mask is None else mask.long())


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_transformers(name, tmp_path):
    theirs = reference(name)
    ours = saved(theirs, tmp_path)
    end = end_of(theirs)
    assert (ours.config.eot_id, ours.fresh, ours.labels, ours.training) == (end, (), (), False)
    images, (ids, _) = pictures(theirs), texts(end)

    expected = call(theirs, images, ids)
    logits, named = ours(images, ids)
    assert_close(logits, expected.logits_per_image)
    assert_close(named["image"], expected.image_embeds)
    assert_close(named["text"], expected.text_embeds)
    # The towers, once with only the pooled token in the last block, once with all of them.
    for states, tower, inputs, body in (
        (theirs.vision_model(images, output_hidden_states=True), ours.vision, images, "embedded"),
        (theirs.text_model(ids, output_hidden_states=True), ours.text, ids, "text"),
    ):
        pooled, named = tower(inputs, everything=True)
        assert_close(pooled, states.pooler_output)
        assert_close(tower(inputs)[0], states.pooler_output)
        depth = len(tower.encoder.blocks)
        for i in range(depth):
            assert_close(named[f"block_{i}"], states.hidden_states[i + 1])
        assert f"block_{depth}" not in named
        # transformers' last image states lack the last LayerNorm
        assert_close(named[body], states.hidden_states[0] if body == "embedded" else states.last_hidden_state)

    # Agreement would be worth nothing if the outputs did not depend on all that goes in.
    P = theirs.config.vision_config.patch_size
    for changed in (pictures(theirs, seed=1), images.roll(P, dims=-1)):
        other = call(theirs, changed, ids)
        assert_differ(other.image_embeds, expected.image_embeds)
        assert_differ(other.logits_per_image, expected.logits_per_image)
        assert_close(other.text_embeds, expected.text_embeds)
        assert_close(ours(changed, ids)[0], other.logits_per_image)
    swapped = torch.cat([ids[:, 1:2], ids[:, :1], ids[:, 2:]], dim=1)  # the first two words; the end stays
    for changed in (texts(end, seed=1)[0], swapped, texts(end, lengths=(5, 4, 2))[0]):
        other = call(theirs, images, changed)
        assert_differ(other.text_embeds, expected.text_embeds)
        assert_differ(other.logits_per_text, expected.logits_per_text)
        assert_close(ours(images, changed)[0], other.logits_per_image)


@pytest.mark.parametrize("name", ["quick GELU", "another text width", "the end is id 5"])
@torch.no_grad()
def test_attention_equals_transformers(name, tmp_path):
    theirs = reference(name, attention="eager")  # sdpa never stores its weights
    ours = saved(theirs, tmp_path)
    images, (ids, _) = pictures(theirs), texts(end_of(theirs))
    for model, tower, inputs in ((theirs.vision_model, ours.vision, images), (theirs.text_model, ours.text, ids)):
        expected, named = model(inputs, output_attentions=True).attentions, tower(inputs, everything=True)[1]
        assert len(expected) == DEPTH
        for i in range(DEPTH):
            assert_close(named[f"attention_{i}"], expected[i])
            assert expected[i].std() > 0.01  # not the same for everybody
    assert not expected[0].triu(1).any()


@pytest.mark.parametrize("name", ["quick GELU", "the end is id 5", "the end is the largest id"])
@torch.no_grad()
def test_padding_changes_nothing(name, tmp_path):
    """With a padding mask or without, whatever stands behind the end, and alone as in a batch."""
    theirs = reference(name)
    ours, end, images = saved(theirs, tmp_path), end_of(theirs), pictures(theirs)
    ids, mask = texts(end)
    expected = call(theirs, images, ids).logits_per_image
    for padding in (end, 1, 3):
        filled, _ = texts(end, padding=padding)
        assert (filled == ids).all() == (padding == end) and torch.equal(filled[mask], ids[mask])
        assert_close(call(theirs, images, filled, mask).logits_per_image, expected)
        assert_close(call(theirs, images, filled).logits_per_image, expected)
        assert_close(ours(images, filled)[0], expected)
    states = theirs.text_model(ids, attention_mask=mask.long()).last_hidden_state
    assert_close(ours.text(ids, everything=True)[1]["text"][mask], states[mask])
    for b, length in enumerate(mask.sum(1).tolist()):
        alone = ids[b : b + 1, :length]
        assert_close(ours(images, alone)[0], expected[:, b : b + 1])
        assert_close(call(theirs, images, alone).logits_per_image, expected[:, b : b + 1])


def test_gradients_equal_transformers(tmp_path):
    theirs = reference()
    ours = saved(theirs, tmp_path)
    images, (ids, _) = pictures(theirs), texts()
    expected = theirs(input_ids=ids, pixel_values=images, return_loss=True).loss
    loss = contrastive_loss(ours(images, ids)[0])
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    embeddings = theirs.vision_model.embeddings
    kernel = embeddings.patch_embedding.weight.grad
    assert kernel.abs().max() > 1e-3 and ours.logit_scale.grad.abs() > 1e-3
    assert_close(ours.logit_scale.grad, theirs.logit_scale.grad)
    assert_close(ours.vision.patch_embed.proj.weight.grad, kernel.flatten(1))
    assert_close(ours.vision.cls_token.grad.flatten(), embeddings.class_embedding.grad)
    assert_close(ours.vision.pos_embed.grad[0], embeddings.position_embedding.weight.grad)
    assert_close(ours.vision.norm_pre.weight.grad, theirs.vision_model.pre_layrnorm.weight.grad)
    assert_close(ours.text.word.weight.grad, theirs.text_model.embeddings.token_embedding.weight.grad)
    assert_close(ours.text.position.weight.grad, theirs.text_model.embeddings.position_embedding.weight.grad)
    assert_close(ours.text.encoder.norm.weight.grad, theirs.text_model.final_layer_norm.weight.grad)
    assert_close(ours.image_projection.weight.grad, theirs.visual_projection.weight.grad)
    assert_close(ours.text_projection.weight.grad, theirs.text_projection.weight.grad)


# Common mistakes, each made in the loaded model.
def exact_gelu(ours):
    for tower in (ours.vision, ours.text):
        for block in tower.encoder.blocks:
            block.mlp.act = torch.nn.GELU()


def other_eps(ours):
    ours.vision.norm_pre.eps = 1e-3


def other_heads(ours):
    ours.text.encoder.blocks[1].attn.heads = 8


def keys_and_values(ours):
    kv = ours.vision.encoder.blocks[0].attn.kv.weight
    kv.copy_(kv.roll(32, dims=0))


def norms(ours):
    block = ours.text.encoder.blocks[0]
    block.norm1, block.norm2 = block.norm2, block.norm1


def no_norm_before(ours):
    ours.vision.norm_pre = torch.nn.Identity()


def no_norm_after(ours):
    ours.vision.encoder.norm = torch.nn.Identity()


def transposed_image_projection(ours):
    ours.image_projection.weight.data = ours.image_projection.weight.T


def transposed_text_projection(ours):
    ours.text_projection.weight.data = ours.text_projection.weight.T


def towers_exchanged(ours):
    ours.vision.encoder, ours.text.encoder = ours.text.encoder, ours.vision.encoder


def positions_reversed(ours):
    ours.vision.pos_embed[:, 1:] = ours.vision.pos_embed[:, 1:].flip(1)


def patches_transposed(ours):
    weight = ours.vision.patch_embed.proj.weight
    weight.copy_(weight.view(32, 3, 8, 8).transpose(2, 3).reshape(32, -1))


def divided_by_the_scale(ours):
    ours.logit_scale.neg_()


WRONG = (
    exact_gelu, other_eps, other_heads, keys_and_values, norms, no_norm_before, no_norm_after,
    transposed_image_projection, transposed_text_projection, towers_exchanged, positions_reversed, patches_transposed,
    divided_by_the_scale,
)  # fmt: skip


@pytest.mark.parametrize("spoil", WRONG)
@torch.no_grad()
def test_the_tolerance_would_notice(spoil, tmp_path):
    """The comparison rejects the mistakes it is there for: each breaks one thing of the loaded model."""
    theirs = reference()
    ours = saved(theirs, tmp_path)
    images, (ids, _) = pictures(theirs), texts()
    expected = call(theirs, images, ids).logits_per_image
    assert_close(ours(images, ids)[0], expected)
    spoil(ours)
    assert (ours(images, ids)[0] - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("pool", ["last position", "first position", "mean", "largest id"])
@torch.no_grad()
def test_the_tolerance_would_notice_another_pooling(pool, tmp_path):
    theirs = reference("the end is id 5")
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts(5)
    expected = call(theirs, images, ids).text_embeds
    states = ours.text(ids, everything=True)[1]["text"]
    pooled = {
        "last position": states[:, -1],
        "first position": states[:, 0],
        "mean": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        "largest id": states[torch.arange(3), ids.argmax(dim=1)],
    }[pool]
    wrong = (F.normalize(ours.text_projection(pooled), dim=-1) - expected).abs().amax(dim=1)
    assert (wrong[1:] > 10 * TOLERANCE).all()
    assert (wrong[0] > 10 * TOLERANCE) == (pool != "last position")  # the first text fills its row: a mistake can hide


@torch.no_grad()
def test_the_tolerance_would_notice_a_missing_causal_mask(tmp_path, monkeypatch):
    theirs = reference()
    ours = saved(theirs, tmp_path)
    images, (ids, _) = pictures(theirs), texts()
    expected = call(theirs, images, ids)
    monkeypatch.setattr(clip, "causal_mask", lambda length, *, device=None: torch.ones(length, length).bool())
    assert_differ(ours(images, ids)[1]["text"], expected.text_embeds)
    assert_close(ours(images, ids)[1]["image"], expected.image_embeds)


# --- what is read ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_tensor_has_a_place_of_its_own(tmp_path):
    theirs = reference("another text width")
    ours = saved(theirs, tmp_path)
    assert count_parameters(ours) == count_parameters(theirs)
    assert ours.logit_scale.item() == 3.0 and ours.logit_scale.requires_grad
    block, official = ours.text.encoder.blocks[2], theirs.text_model.encoder.layers[2]
    keys, values = block.attn.kv.weight.chunk(2)
    for own, their in (
        (block.attn.q.weight, official.self_attn.q_proj.weight),
        (keys, official.self_attn.k_proj.weight),
        (values, official.self_attn.v_proj.weight),
        (block.attn.proj.bias, official.self_attn.out_proj.bias),
        (block.norm2.weight, official.layer_norm2.weight),
        (block.mlp.fc2.weight, official.mlp.fc2.weight),
        (ours.vision.pos_embed[0], theirs.vision_model.embeddings.position_embedding.weight),
    ):
        assert torch.equal(own, their)


@torch.no_grad()
def test_positions_that_older_versions_save(tmp_path):
    theirs = reference()
    edit(theirs, tmp_path, {
        "text_model.embeddings.position_ids": torch.arange(12)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    })  # fmt: skip
    images, (ids, _) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids)[0], call(theirs, images, ids).logits_per_image)


@torch.no_grad()
def test_a_part_of_the_config_said_twice(tmp_path):
    """The files of L/14 have it so; transformers then takes `..._config_dict` and its own defaults."""
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, "text_config", num_attention_heads=2, vocab_size=60)
    edit_config(tmp_path, "vision_config", num_attention_heads=2)
    assert "text.word.weight has shape" in message(tmp_path)
    edit_config(tmp_path, text_config_dict=config["text_config"], vision_config_dict=config["vision_config"])
    images, (ids, _) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids)[0], call(theirs, images, ids).logits_per_image)
    assert transformers.CLIPConfig.from_pretrained(tmp_path).text_config.num_attention_heads == 4


@torch.no_grad()
def test_sides_as_pairs(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, "vision_config", image_size=[32, 32], patch_size=[8, 8])
    images, (ids, _) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids)[0], call(theirs, images, ids).logits_per_image)


@torch.no_grad()
def test_half_precision_becomes_float32(tmp_path):
    theirs = reference().half()
    ours, theirs = saved(theirs, tmp_path), theirs.float()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    images, (ids, _) = pictures(theirs), texts()
    assert_close(ours(images, ids)[0], call(theirs, images, ids).logits_per_image)


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_scale": None}, "lacks logit_scale"),
        ({"visual_projection.weight": None}, "lacks image_projection.weight"),
        ({"text_projection.weight": torch.zeros(32, 9)}, "text_projection.weight has shape (32, 9)"),
        ({"visual_projection.bias": torch.zeros(32)}, "no place for"),
        ({"vision_model.pre_layrnorm.weight": None}, "lacks vision.norm_pre.weight"),
        ({"vision_model.embeddings.class_embedding": None}, "lacks vision.cls_token"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(1, 32)}, "vision.cls_token has shape"),
        ({"vision_model.embeddings.position_embedding.weight": torch.zeros(16, 32)}, "has shape (1, 16, 32)"),
        ({"vision_model.embeddings.patch_embedding.weight": torch.zeros(32)}, "proj.weight has shape (32,)"),
        ({"vision_model.embeddings.patch_embedding.bias": torch.zeros(32)}, "no place for"),
        ({"text_model.encoder.layers.3.layer_norm1.bias": torch.zeros(32)}, "no place for"),
        ({"text_model.encoder.layers.0.self_attn.k_proj.weight": torch.zeros(32, 9)}, "fit together"),
        ({"text_model.encoder.layers.0.self_attn.k_proj.bias": None}, "lacks text.encoder.blocks.0.attn.kv.bias"),
    ],
)
def test_tensors_that_do_not_fit(changes, words, tmp_path):
    edit(reference(), tmp_path, changes)
    assert words in message(tmp_path)


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        ("text_config", {"intermediate_size": 64}, "intermediate_size / hidden_size is 2 in its text tower and 4"),
        ("text_config", {"intermediate_size": 33}, "no whole multiple"),
        ("vision_config", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-05 in its text tower and 1e-06"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act is quick in its text tower and exact"),
        ("vision_config", {"hidden_act": "gelu_new"}, "'gelu_new'"),
        ("text_config", {"hidden_act": "relu"}, "'relu'"),
        ("text_config", {"eos_token_id": WORDS}, "eos_token_id 50 is no id of its 50 tokens"),
        ("text_config", {"eos_token_id": None}, "eos_token_id=None"),
        ("text_config", {"eos_token_id": -1}, "eos_token_id=-1"),
        ("text_config", {"eos_token_id": [END]}, "eos_token_id=[49]"),
        ("text_config", {"vocab_size": 51}, "text.word.weight has shape"),
        ("text_config", {"vocab_size": "many"}, "whole number"),
        ("text_config", {"max_position_embeddings": 77}, "text.position.weight has shape"),
        ("text_config", {"num_attention_heads": 5}, "impossible model"),
        ("vision_config", {"image_size": 33}, "impossible model"),
        ("vision_config", {"image_size": [32, 64]}, "only square"),
        ("vision_config", {"image_size": 64}, "vision.pos_embed has shape"),
        ("vision_config", {"layer_norm_eps": None}, "a number >= 0"),
        ("", {"projection_dim": 0}, "whole number"),
        ("", {"projection_dim": 31}, "has shape"),
        ("", {"vision_config": [1]}, "vision_config in config.json is no JSON object"),
        ("", {"text_config_dict": "tiny"}, "text_config_dict in config.json is no JSON object"),
    ],
)
def test_config_we_cannot_build(part, config, words, tmp_path):
    reference().save_pretrained(tmp_path)
    edit_config(tmp_path, *filter(None, [part]), **config)
    assert words in message(tmp_path)


def test_nothing_to_classify_with(tmp_path):
    reference().save_pretrained(tmp_path)
    assert "leave num_classes out" in message(tmp_path, num_classes=3)


def test_a_checkpoint_of_one_tower(tmp_path):
    theirs = reference()
    edit(theirs, tmp_path, {name: None for name in theirs.state_dict() if name.startswith("text")})
    assert "it lacks text." in message(tmp_path)
    edit_config(tmp_path, model_type="clip_vision_model")
    assert "'clip'" in message(tmp_path)


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    """transformers' default configuration is B/32."""
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig())
        return theirs, clip_from_hf(theirs.config.to_dict(), theirs.state_dict(), None)


def test_every_tensor_at_full_size(full_size):
    theirs, ours = full_size
    assert ours.config == clip.paper_config("B/32")
    image = count_parameters(ours.vision) + count_parameters(ours.image_projection)
    text = count_parameters(ours.text) + count_parameters(ours.text_projection)
    assert (image, text) == (87_849_216, 63_428_096)
    assert count_parameters(ours) == image + text + 1 == 151_277_313 == count_parameters(theirs)


@pytest.mark.parametrize("text", [{}, None, {"eos_token_id": 2}, {"eos_token_id": 49407}])
def test_missing_keys_have_the_values_of_b32(text, full_size):
    theirs, ours = full_size
    with torch.device("meta"):
        bare = clip_from_hf({"text_config": text}, theirs.state_dict(), None)
    assert bare.config == ours.config


@pytest.mark.parametrize("name", ["B/16", "L/14", "L/14@336px"])
def test_the_other_sizes_of_the_paper(name):
    config = clip.paper_config(name)
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=dict(hidden_size=config.text_width, intermediate_size=4 * config.text_width,
                             num_attention_heads=config.text_heads),
            vision_config=dict(hidden_size=config.image_width, intermediate_size=4 * config.image_width,
                               num_hidden_layers=config.image_depth, num_attention_heads=config.image_heads,
                               image_size=config.image_size, patch_size=config.patch_size),
            projection_dim=config.embed_dim,
        ))  # fmt: skip
        ours = clip_from_hf(theirs.config.to_dict(), theirs.state_dict(), None)
    assert ours.config == config and count_parameters(ours) == count_parameters(theirs)


# --- pictures for official weights -----------------------------------------------------------------------------------


SHAPES = [(500, 375), (375, 500), (224, 224), (1000, 200), (333, 331), (90, 31), (64, 64), (225, 224)]


@pytest.mark.parametrize("size", [224, 63])
@pytest.mark.parametrize("shape", SHAPES)
def test_preprocess_clip_equals_the_official_one(shape, size):
    processor = getattr(transformers, "CLIPImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no CLIPImageProcessorPil")
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    options = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = processor(**options)(images=image, return_tensors="pt").pixel_values[0]
    ours = preprocess_clip(image, size=size)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # Squeezing instead of cutting, bilinear, and other statistics are noticed.
    squeezed = preprocess(image, size=size, mean=CLIP_MEAN, std=CLIP_STD)
    same = shape == (size, size)  # nothing to resize and nothing to cut
    assert same == torch.allclose(squeezed, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(preprocess(image, size=size), expected, rtol=0, atol=1e-3)


def test_preprocess_clip_by_hand():
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    image.paste((0, 255, 0), (1, 0, 3, 2))  # the middle is green
    green = [(value - mean) / std for value, mean, std in zip((0, 1, 0), CLIP_MEAN, CLIP_STD, strict=True)]
    pixels = preprocess_clip(image, size=2)
    assert pixels.shape == (3, 2, 2) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, torch.tensor(green)[:, None, None].expand(3, 2, 2), rtol=0, atol=1e-6)
    assert preprocess_clip(Image.new("L", (30, 9)), size=8).shape == (3, 8, 8)


# --- texts for official weights --------------------------------------------------------------------------------------


SENTENCES = ["A red kite over the house.", "two  dogs, and it's 12 o'clock", "", "Über den Wolken ☁", "!!! a\tb\nc"]


@pytest.fixture
def official_tokenizer(tmp_path):
    """A small tokenizer of CLIP's kind, learnt here and built and saved by transformers."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=ends[1], end_of_word_suffix="</w>"))
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    learner.train_from_iterator([text.lower() for text in SENTENCES] * 3, trainer)
    learner.add_special_tokens(ends)
    bpe = json.loads(learner.to_str())["model"]
    vocab = bpe["vocab"] | {token: learner.token_to_id(token) for token in ends}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    return theirs


def test_clip_tokenizer_equals_the_official_one(official_tokenizer, tmp_path):
    encode = clip_tokenizer(tmp_path)
    ids = encode(SENTENCES)
    expected = official_tokenizer(SENTENCES, padding=True, return_tensors="pt").input_ids
    assert ids.dtype == torch.int64 and torch.equal(ids, expected)
    start, end = (official_tokenizer.convert_tokens_to_ids(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    assert (ids[:, 0] == start).all() and ids[2].unique().tolist() == sorted({start, end})
    assert ids.shape[1] > 10 and len({tuple(row) for row in ids.tolist()}) == len(SENTENCES)
    assert torch.equal(encode(["A RED   kite"]), encode(["a red kite"]))  # case and spaces mean nothing
    # Cut texts keep their end.
    short = clip_tokenizer(str(tmp_path), max_length=6)(SENTENCES)
    assert torch.equal(short, official_tokenizer(SENTENCES, padding=True, truncation=True, max_length=6,
                                                 return_tensors="pt").input_ids)  # fmt: skip
    assert short.shape == (len(SENTENCES), 6) and (short[:, -1] == end).all()
    # Texts are padded to the longest of their own batch, and none is longer for the company it keeps.
    assert torch.equal(encode(SENTENCES[:1]), ids[:1, : (ids[0] == end).int().argmax() + 1])


def test_what_a_clip_tokenizer_refuses(official_tokenizer, tmp_path):
    encode = clip_tokenizer(tmp_path)
    for wrong in ("a text", []):
        with pytest.raises(ValueError, match="takes a list of texts"):
            encode(wrong)
    with pytest.raises(ValueError, match="max_length=2 leaves no room for words"):
        clip_tokenizer(tmp_path, max_length=2)

    def refusal():
        with pytest.raises(CheckpointError) as caught:
            clip_tokenizer(tmp_path)
        text = str(caught.value)
        assert "\n" not in text and ":" in text
        return text

    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"post_processor": None}))  # no ends
    assert "does not put texts between <|startoftext|> and <|endoftext|>" in refusal()
    file.write_text(json.dumps(content | {"model": {"type": "Abacus"}}))
    assert "describes no tokenizer" in refusal()
    file.write_text("{")
    assert "no readable JSON" in refusal()
    file.unlink()
    assert "has no tokenizer.json" in refusal()


def test_clip_tokenizer_of_a_hub_id(official_tokenizer, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert clip_tokenizer("someone/some-clip", cache_dir="here")(["a red kite"]).shape[0] == 1
    assert asked == dict(repo="someone/some-clip", allow_patterns=["tokenizer.json"], cache_dir="here")
