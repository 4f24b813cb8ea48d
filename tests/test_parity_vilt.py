"""Our ViLT beside transformers' four ViLT classes, weight for weight: the same numbers within 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_helpers import (
    TOLERANCE,
    assert_close,
    assert_differ,
    edit,
    edit_config,
    edit_file,
    message,
    random_pictures,
    randomise,
    saved,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from minivlp.layers import count_parameters
from minivlp.pretrained import from_hf, pad_pictures, preprocess_aspect, vilt_from_hf

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

WORDS = 50

BASE = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    vocab_size=WORDS, max_position_embeddings=12, num_labels=7,
)  # fmt: skip
VARIANTS = {
    "base": {},
    "eps 0.1": dict(layer_norm_eps=0.1),  # absurd, so that an ignored eps cannot hide
    "no qkv bias": dict(qkv_bias=False),
    "patch 4": dict(patch_size=4),
    "patch 16": dict(patch_size=16),
    "three modality types": dict(modality_type_vocab_size=3),
    "one segment": dict(type_vocab_size=1),
    "three segments": dict(type_vocab_size=3),
    "dropout": dict(hidden_dropout_prob=0.1),
    "long texts": dict(max_position_embeddings=100),
    "one label": dict(num_labels=1),
    "two labels": dict(num_labels=2),
    "one head": dict(num_attention_heads=1),
    "narrow MLP": dict(intermediate_size=64),
    "one channel": dict(num_channels=1),
    "one block": dict(num_hidden_layers=1),
    "old name of GELU": dict(hidden_act="gelu_python"),
}


def reference(kind="ForMaskedLM", **options):
    return randomise(getattr(transformers, f"Vilt{kind}")(transformers.ViltConfig(**(BASE | options))))


def pictures(model, *, seed=0):
    return random_pictures(model.config.image_size, model.config.num_channels, seed=seed)


def texts(*, seed=0, lengths=(9, 6, 3)):
    """ids (B, L) with 0 at the padding, and the mask."""
    ids = torch.randint(1, WORDS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def call(theirs, images, ids, mask, image_mask=None):
    """The official class, its boolean mask of patches spread out to pixels."""
    if image_mask is not None:
        side = images.shape[2] // image_mask.shape[1]
        image_mask = image_mask.repeat_interleave(side, 1).repeat_interleave(side, 2).long()
    return theirs(input_ids=ids, attention_mask=mask.long(), pixel_values=images, pixel_mask=image_mask)


def assert_same_rows(ours, theirs):
    """The same rows in another order: (N, D) twice, each row of ours with its own nearest row of theirs."""
    assert ours.shape == theirs.shape
    distance = (ours[:, None] - theirs[None]).abs().amax(dim=-1)  # (N, N)
    nearest = distance.argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(ours)))
    assert_close(ours, theirs[nearest])
    if len(ours) > 1:  # rows that hardly differ would find each other in any case
        assert distance.topk(2, dim=1, largest=False).values[:, 1].min() > 100 * TOLERANCE


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_transformers(name, tmp_path):
    theirs = reference(**VARIANTS[name])
    ours = saved(theirs, tmp_path)
    images, (ids, mask), L = pictures(theirs), texts(), 9

    states, expected = (call(model, images, ids, mask) for model in (theirs.vilt, theirs))
    pooled, named = ours(images, ids, mask)
    assert_close(pooled, states.pooler_output)
    assert_close(named["text"], states.last_hidden_state[:, :L])
    assert_close(ours.mlm_head(named["text"]), expected.logits)
    assert_close(named["image"][:, 0], states.last_hidden_state[:, L])
    for ours_rows, their_rows in zip(named["image"][:, 1:], states.last_hidden_state[:, L + 1 :], strict=True):
        assert_same_rows(ours_rows, their_rows)
    assert_close(ours(images, ids, mask, rows=1)[0], states.pooler_output)  # the shorter ways through the last block
    assert_close(ours(images, ids, mask, rows=L)[1]["text"], states.last_hidden_state[:, :L])

    # Agreement would be worth nothing if the outputs did not depend on all that goes in.
    other_ids = torch.where(mask, texts(seed=1)[0], 0)
    fewer = mask & (torch.arange(L) < 2)
    for changed in (
        (pictures(theirs, seed=1), ids, mask),
        (images.roll(theirs.vilt.embeddings.patch_embeddings.projection.kernel_size[0], dims=-1), ids, mask),
        (images, other_ids, mask),
        (images, ids, fewer),
    ):
        other = call(theirs.vilt, *changed)
        assert_differ(other.pooler_output, states.pooler_output)
        assert_differ(call(theirs, *changed).logits, expected.logits)
        assert_close(ours(*changed)[0], other.pooler_output)


@torch.no_grad()
def test_the_official_order_of_patches_is_random():
    """Why image rows are compared as sets. If this fails one day, compare them directly."""
    theirs = reference("Model")
    images, (ids, mask) = pictures(theirs), texts()
    first, second = (call(theirs, images, ids, mask).last_hidden_state[:, 9:] for _ in range(2))
    assert (first - second).abs().max() > 0.1
    assert_close(first[:, 0], second[:, 0])


@pytest.mark.parametrize("sizes", [[(32, 32), (24, 40), (40, 16)], [(8, 8), (16, 48), (32, 24)], [(40, 24)] * 3])
@torch.no_grad()
def test_pictures_of_different_sizes(sizes, tmp_path):
    theirs = reference()
    ours = saved(theirs, tmp_path)
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(3, h, w, generator=generator).clamp(-1, 1) for h, w in sizes]
    images, image_mask = pad_pictures(batch, 8)
    ids, mask = texts()
    states = call(theirs.vilt, images, ids, mask, image_mask)
    pooled, named = ours(images, ids, mask, image_mask=image_mask)
    assert_close(pooled, states.pooler_output)
    assert_close(named["text"], states.last_hidden_state[:, :9])
    assert_close(ours.mlm_head(named["text"]), call(theirs, images, ids, mask, image_mask).logits)
    for b, (h, w) in enumerate(sizes):
        n = h * w // 64  # the official output has its real patches first, copies of padding behind
        assert_same_rows(named["image"][b, 1:][image_mask[b].flatten()], states.last_hidden_state[b, 10 : 10 + n])

    # Padding changes nothing; taking it for picture would, and so would other positions.
    for b, picture in enumerate(batch):
        alone, whole = pad_pictures([picture], 8)
        assert_close(ours(alone, ids[b : b + 1], mask[b : b + 1], image_mask=whole)[0], pooled[b : b + 1])
    noisy = torch.where(F.interpolate(image_mask[:, None].float(), scale_factor=8).bool(), images, 1.0)
    assert_close(ours(noisy, ids, mask, image_mask=image_mask)[0], pooled)
    padded = ~image_mask.flatten(1).all(dim=1)
    everywhere = ours(images, ids, mask, image_mask=torch.ones_like(image_mask))[0]
    assert not padded.any() or ((everywhere - pooled).abs().amax(dim=1) > 100 * TOLERANCE)[padded].all()
    ours.embed.image.pos_embed[:, 1:] = ours.embed.image.pos_embed[:, 1:].flip(1)
    assert_differ(ours(images, ids, mask, image_mask=image_mask)[0], pooled)


@pytest.mark.parametrize("labels", [1, 2, 7])
@torch.no_grad()
def test_questions(labels, tmp_path):
    theirs = reference("ForQuestionAnswering", num_labels=labels)
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    expected = call(theirs, images, ids, mask).logits
    assert_close(ours.answer_head(ours(images, ids, mask)[0]), expected)
    assert expected.shape == (3, labels) and ours.labels == tuple(f"LABEL_{i}" for i in range(labels))
    assert ours.fresh == ("itm_head", "mlm_head")
    assert_differ(call(theirs, pictures(theirs, seed=1), ids, mask).logits, expected)
    assert_differ(call(theirs, images, torch.where(mask, texts(seed=1)[0], 0), mask).logits, expected)


@torch.no_grad()
def test_answers_in_the_order_of_the_scores(tmp_path):
    ours = saved(reference("ForQuestionAnswering", num_labels=3, id2label={2: "two", 0: "no", 1: "yes"}), tmp_path)
    assert ours.labels == ("no", "yes", "two") and ours.config.answers == 3


@torch.no_grad()
def test_retrieval(tmp_path):
    theirs = reference("ForImageAndTextRetrieval")
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    expected = call(theirs, images, ids, mask).logits
    scores = ours.itm_head(ours(images, ids, mask, rows=1)[0])
    assert_close(scores.diff(dim=1), expected)
    assert not scores[:, 0].any()
    assert ours.fresh == ("mlm_head",) and ours.labels == () and ours.answer_head is None
    assert_differ(call(theirs, pictures(theirs, seed=1), ids, mask).logits, expected)
    assert_differ(call(theirs, images, torch.where(mask, texts(seed=1)[0], 0), mask).logits, expected)


def test_gradients_equal_transformers(tmp_path):
    theirs = reference()
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    labels = torch.where(torch.arange(9) == 1, ids, -100)
    call_with_loss = dict(input_ids=ids, attention_mask=mask.long(), pixel_values=images, labels=labels)
    theirs(**call_with_loss).loss.backward()
    F.cross_entropy(ours.mlm_head(ours(images, ids, mask)[1]["text"]).flatten(0, 1), labels.flatten()).backward()
    embeddings, text = theirs.vilt.embeddings, theirs.vilt.embeddings.text_embeddings
    kernel = embeddings.patch_embeddings.projection.weight.grad
    assert kernel.abs().max() > 1e-3
    assert_close(ours.embed.image.patch_embed.proj.weight.grad, kernel.flatten(1))
    assert_close(ours.embed.image.pos_embed.grad, embeddings.position_embeddings.grad)
    assert_close(ours.embed.text.position.weight.grad, text.position_embeddings.weight.grad)
    assert_close(ours.embed.types.weight.grad, embeddings.token_type_embeddings.weight.grad)
    assert_close(ours.embed.text.norm.weight.grad, text.LayerNorm.weight.grad)
    # One tied matrix there, two here: its gradient is the sum of both.
    assert_close(ours.embed.text.word.weight.grad + ours.mlm_head.decoder.weight.grad, text.word_embeddings.weight.grad)


WRONG = (
    "text eps", "block eps", "MLM eps", "heads", "keys and values", "norms", "no segment", "types exchanged",
    "types before the LayerNorm", "pooled from the picture", "no tanh", "decoder bias",
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_the_tolerance_would_notice(wrong, tmp_path):
    """The comparison rejects the mistakes it is there for: each breaks one thing of the loaded model."""
    theirs = reference(layer_norm_eps=1e-3)
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    states, logits = call(theirs.vilt, images, ids, mask), call(theirs, images, ids, mask).logits
    embed = ours.embed
    if wrong == "text eps":
        embed.text.norm.eps = 1e-12
    elif wrong == "block eps":
        ours.encoder.norm.eps = 1e-12
    elif wrong == "MLM eps":
        ours.mlm_head.norm.eps = 1e-12
    elif wrong == "heads":
        ours.encoder.blocks[1].attn.heads = 8
    elif wrong == "keys and values":
        kv = ours.encoder.blocks[0].attn.kv.weight
        kv.copy_(kv.roll(BASE["hidden_size"], dims=0))
    elif wrong == "norms":
        block = ours.encoder.blocks[0]
        block.norm1, block.norm2 = block.norm2, block.norm1
    elif wrong == "no segment":
        embed.text.position.weight.sub_(theirs.vilt.embeddings.text_embeddings.token_type_embeddings.weight[0])
    elif wrong == "types exchanged":
        embed.types.weight.copy_(embed.types.weight.flip(0))
    elif wrong == "types before the LayerNorm":
        embed.text.position.weight.add_(embed.types.weight[0])
        embed.types.weight[0] = 0
    elif wrong == "decoder bias":
        ours.mlm_head.decoder.bias.zero_()
    pooled, named = ours(images, ids, mask)
    if wrong == "pooled from the picture":
        pooled = torch.tanh(ours.pooler(named["image"][:, 0]))
    if wrong == "no tanh":
        pooled = ours.pooler(named["text"][:, 0])
    off_pooled = (pooled - states.pooler_output).abs().max()
    off_words = (ours.mlm_head(named["text"]) - logits).abs().max()
    assert max(off_pooled, off_words) > 10 * TOLERANCE


# --- what is read ----------------------------------------------------------------------------------------------------


NEW_NAMES = {  # what transformers v5 calls the parts of its ViT, and may call those of ViLT one day
    "encoder.layer.": "layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}


@pytest.mark.parametrize("names", ["old", "new"])
@torch.no_grad()
def test_reads_old_and_new_names(names, tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    weights = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for old, new in NEW_NAMES.items():
            name = name.replace(old, new) if names == "new" else name.replace(new, old)
        weights[name] = tensor
    assert any("layers.2.attention.k_proj.weight" in name for name in weights) == (names == "new")
    save_file(weights, tmp_path / "model.safetensors")
    images, (ids, mask) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids, mask)[0], call(theirs.vilt, images, ids, mask).pooler_output)


@pytest.mark.parametrize("names", ["mlm_score.bias", "mlm_score.decoder.bias", "mlm_score.bias mlm_score.decoder.bias"])
@torch.no_grad()
def test_bias_of_the_decoder_under_each_of_its_names(names, tmp_path):
    theirs = reference()
    edit(theirs, tmp_path, {"mlm_score.decoder.bias": None, "mlm_score.bias": None})
    edit_file(tmp_path, {name: theirs.mlm_score.decoder.bias.detach().clone() for name in names.split()})
    images, (ids, mask) = pictures(theirs), texts()
    ours = from_hf(tmp_path)
    expected = call(theirs, images, ids, mask).logits
    assert_close(ours.mlm_head(ours(images, ids, mask)[1]["text"]), expected)


@torch.no_grad()
def test_tied_and_untied_decoder(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    assert "mlm_score.decoder.weight" not in load_file(tmp_path / "model.safetensors")  # tied, and so saved once
    ours = from_hf(tmp_path)
    assert torch.equal(ours.mlm_head.decoder.weight, ours.embed.text.word.weight)
    assert ours.mlm_head.decoder.weight is not ours.embed.text.word.weight
    own = torch.randn(WORDS, 32)
    edit_file(tmp_path, {"mlm_score.decoder.weight": own})
    ours = from_hf(tmp_path)
    assert torch.equal(ours.mlm_head.decoder.weight, own)
    assert torch.equal(ours.embed.text.word.weight, theirs.vilt.embeddings.text_embeddings.word_embeddings.weight)
    edit_file(tmp_path, {"mlm_score.decoder.weight": None})
    edit_config(tmp_path, tie_word_embeddings=False)
    assert "mlm_head.decoder.weight" in message(tmp_path)


@torch.no_grad()
def test_sides_as_pairs(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, image_size=[32, 32], patch_size=[8, 8])
    images, (ids, mask) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids, mask)[0], call(theirs.vilt, images, ids, mask).pooler_output)


@torch.no_grad()
def test_positions_that_older_versions_save(tmp_path):
    theirs = reference()
    numbers = {f"vilt.embeddings.text_embeddings.{name}": torch.arange(12)[None]
               for name in ("position_ids", "token_type_ids")}  # fmt: skip
    edit(theirs, tmp_path, numbers)
    images, (ids, mask) = pictures(theirs), texts()
    assert_close(from_hf(tmp_path)(images, ids, mask)[0], call(theirs.vilt, images, ids, mask).pooler_output)


@torch.no_grad()
def test_half_precision_becomes_float32(tmp_path):
    theirs = reference().half()
    ours, theirs = saved(theirs, tmp_path), theirs.float()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    images, (ids, mask) = pictures(theirs), texts()
    assert_close(ours(images, ids, mask)[0], call(theirs.vilt, images, ids, mask).pooler_output)


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [
        ("Model", ("itm_head", "mlm_head")),
        ("ForMaskedLM", ("itm_head",)),
        ("ForImageAndTextRetrieval", ("mlm_head",)),
        ("ForQuestionAnswering", ("itm_head", "mlm_head")),
    ],
)
@torch.no_grad()
def test_what_the_checkpoint_lacks_is_fresh_and_named(kind, fresh, tmp_path):
    theirs = reference(kind)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(saved(theirs, tmp_path))
    assert not models[0].training and models[0].fresh == models[1].fresh == fresh
    own, other = (model.state_dict() for model in models)
    for name in own:
        part = name.partition(".")[0]
        random = part in fresh and ".norm." not in name and name.endswith("weight")
        assert torch.equal(own[name], other[name]) != random, name
    images, (ids, mask) = pictures(theirs), texts()
    body = theirs if kind == "Model" else theirs.vilt
    assert_close(models[0](images, ids, mask)[0], call(body, images, ids, mask).pooler_output)


@pytest.mark.parametrize("kind", ["Model", "ForQuestionAnswering", "ForImagesAndTextClassification"])
@torch.no_grad()
def test_a_new_answer_head_of_any_size(kind, tmp_path):
    options = dict(num_images=2, modality_type_vocab_size=3) if kind == "ForImagesAndTextClassification" else {}
    theirs = reference(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path, num_classes=5)
    assert ours.config.answers == 5 and ours.labels == () and "answer_head" in ours.fresh
    assert ours.answer_head[3].weight.shape == (5, 64) and 0.01 < ours.answer_head[3].weight.std() < 0.03
    images, (ids, mask) = pictures(theirs), texts()
    body = theirs if kind == "Model" else theirs.vilt
    assert_close(ours(images, ids, mask)[0], call(body, images, ids, mask).pooler_output)


# --- what can be wrong -----------------------------------------------------------------------------------------------


TEXT = "vilt.embeddings.text_embeddings."


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("ForMaskedLM", {"vilt.pooler.dense.weight": None}, "lacks pooler.weight"),
        ("ForMaskedLM", {f"{TEXT}word_embeddings.weight": None}, "lacks embed.text.word.weight"),
        ("ForMaskedLM", {f"{TEXT}position_embeddings.weight": None}, "lacks embed.text.position.weight"),
        ("ForMaskedLM", {f"{TEXT}token_type_embeddings.weight": None}, "lacks BERT's segment vectors"),
        ("ForMaskedLM", {f"{TEXT}token_type_embeddings.weight": torch.zeros(2, 31)}, "do not fit together"),
        ("ForMaskedLM", {f"{TEXT}token_type_embeddings.weight": torch.zeros(0, 32)}, "do not fit together"),
        ("ForMaskedLM", {f"{TEXT}token_type_embeddings.weight": torch.zeros(32)}, "do not fit together"),
        ("ForMaskedLM", {"mlm_score.transform.dense.bias": None}, "lacks mlm_head.dense.bias"),
        ("ForMaskedLM", {"mlm_score.bias": torch.ones(WORDS)}, "mlm_head.decoder.bias' twice"),
        ("ForMaskedLM", {"mlm_score.decoder.weight": torch.zeros(3, 32)}, "mlm_head.decoder.weight has shape (3, 32)"),
        ("ForMaskedLM", {"vilt.encoder.layer.3.output.dense.bias": torch.zeros(32)}, "no place for"),
        ("ForMaskedLM", {"vilt.encoder.layer.0.attention.attention.key.weight": torch.zeros(32, 9)}, "fit together"),
        ("ForMaskedLM", {"vilt.encoder.layer.0.attention.attention.key.bias": torch.tensor(0.0)}, "fit together"),
        ("ForMaskedLM", {"vilt.embeddings.patch_embeddings.projection.weight": torch.zeros(3)}, "has shape (3,)"),
        ("ForImageAndTextRetrieval", {"rank_output.bias": None}, "lacks itm_head.bias"),
        ("ForImageAndTextRetrieval", {"rank_output.bias": torch.tensor(0.0)}, "fit together"),
        ("ForImageAndTextRetrieval", {"rank_output.weight": torch.zeros(2, 32)}, "itm_head.weight has shape (4, 32)"),
        ("ForQuestionAnswering", {"classifier.3.bias": None}, "lacks answer_head.3.bias"),
        ("ForTokenClassification", {}, "lacks pooler.bias"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(kind, changes, words, tmp_path):
    edit(reference(kind), tmp_path, changes)
    assert words in message(tmp_path)


def test_two_pictures_at_once(tmp_path):
    reference("ForImagesAndTextClassification", num_images=2, modality_type_vocab_size=3).save_pretrained(tmp_path)
    assert "num_classes" in message(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_act": "gelu_new"}, "'gelu_new'"),
        ({"hidden_act": ["gelu"]}, "['gelu']"),
        ({"modality_type_vocab_size": 1}, "modality_type_vocab_size"),
        ({"modality_type_vocab_size": 3}, "embed.types.weight has shape"),
        ({"vocab_size": 51}, "has shape"),
        ({"vocab_size": "many"}, "whole number"),
        ({"max_position_embeddings": 40}, "embed.text.position.weight has shape"),
        ({"intermediate_size": 33}, "no whole multiple"),
        ({"num_attention_heads": 5}, "impossible model"),
        ({"image_size": 33}, "impossible model"),
        ({"image_size": [32, 64]}, "only square"),
        ({"hidden_dropout_prob": 1.5}, "impossible model"),
        ({"hidden_dropout_prob": "none"}, "a number >= 0"),
        ({"layer_norm_eps": None}, "a number >= 0"),
    ],
)
def test_config_we_cannot_build(config, words, tmp_path):
    reference().save_pretrained(tmp_path)
    edit_config(tmp_path, **config)
    assert words in message(tmp_path)


def test_answers_that_do_not_fit_their_names(tmp_path):
    reference("ForQuestionAnswering").save_pretrained(tmp_path)
    edit_config(tmp_path, id2label={"0": "no", "1": "yes"})
    assert "answer_head.3.weight has shape (7, 64)" in message(tmp_path)
    edit_config(tmp_path, id2label={"0": "no", "2": "yes"})
    assert "id2label" in message(tmp_path)


# --- full size -------------------------------------------------------------------------------------------------------


def test_every_tensor_at_full_size():
    """All names and shapes of transformers' default configuration, ViLT-B/32, find their place."""
    with torch.device("meta"):
        theirs = transformers.ViltForMaskedLM(transformers.ViltConfig())
        ours = vilt_from_hf(theirs.config.to_dict(), theirs.state_dict(), None)
    assert (ours.config.image_size, ours.config.patch_size, ours.config.width, ours.config.depth) == (384, 32, 768, 12)
    assert count_parameters(ours.encoder) + count_parameters(ours.embed.image.patch_embed) == 87_416_064
    itm, segments, tied = 2 * 768 + 2, 2 * 768, 30522 * 768
    assert count_parameters(ours) == count_parameters(theirs) + itm - segments + tied


# --- pictures for official weights -----------------------------------------------------------------------------------


SHAPES = [(500, 375), (375, 500), (384, 384), (1000, 500), (640, 300), (64, 64), (333, 331), (90, 31), (650, 325)]


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocess_aspect_equals_the_official_one(shape):
    processor = getattr(transformers, "ViltImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no ViltImageProcessorPil")
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor()(images=image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess_aspect(image), expected, rtol=0, atol=1e-6)


def test_preprocess_aspect_sizes():
    def size(width, height, **options):
        return tuple(preprocess_aspect(Image.new("RGB", (width, height)), **options).shape[1:])

    assert size(500, 375) == (384, 512) and size(375, 500) == (512, 384)
    assert size(1000, 500) == (320, 608) and size(1000, 500, longer=640) == (320, 640)  # the code's and the paper's
    assert size(1000, 499) == (288, 608)  # where rounding decides about a row of patches
    assert size(64, 64, shorter=64, longer=107, multiple=16) == (64, 64)
    assert size(4000, 20) == (32, 608)  # never less than one patch
    white = preprocess_aspect(Image.new("L", (9, 9), 255), mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0))
    assert white[:, 0, 0].tolist() == [1, 2, 1] and white.is_contiguous() and white.dtype == torch.float32


def test_pad_pictures_equals_the_official_one():
    processor = getattr(transformers, "ViltImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no ViltImageProcessorPil")
    generator = np.random.default_rng(0)
    raw = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SHAPES[:4]]
    images, image_mask = pad_pictures([preprocess_aspect(image) for image in raw], 32)
    expected = processor()(images=raw, return_tensors="pt")
    torch.testing.assert_close(images, expected.pixel_values, rtol=0, atol=1e-6)
    assert image_mask.dtype == torch.bool and not image_mask.all()
    assert torch.equal(image_mask.repeat_interleave(32, 1).repeat_interleave(32, 2).long(), expected.pixel_mask)


def test_pad_pictures_by_hand():
    images, image_mask = pad_pictures([torch.ones(1, 2, 4), torch.full((1, 4, 2), 3.0)], 2)
    assert images.shape == (2, 1, 4, 4) and image_mask.tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
    assert images[0, 0].tolist() == [[1] * 4] * 2 + [[0] * 4] * 2 and images[1, 0].tolist() == [[3, 3, 0, 0]] * 4


@pytest.mark.parametrize("wrong", [[], [(3, 8, 9)], [(3, 8, 8), (1, 8, 8)], [(3, 8, 8), (8, 8)]])
def test_pad_pictures_refuses(wrong):
    with pytest.raises(ValueError, match=r"at least one|does not fit"):
        pad_pictures([torch.zeros(shape) for shape in wrong], 8)
