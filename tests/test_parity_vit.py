"""Our ViT beside transformers' ViTForImageClassification, weight for weight: the same numbers within 1e-5."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlp.pretrained import from_hf

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5

BASE = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    num_labels=7,
)  # fmt: skip
VARIANTS = {
    "base": {},
    "eps 1e-6": dict(layer_norm_eps=1e-6),
    "eps 0.1": dict(layer_norm_eps=0.1),  # absurd, so that an ignored eps cannot hide
    "tanh GELU": dict(hidden_act="gelu_pytorch_tanh"),
    "tanh GELU, old name": dict(hidden_act="gelu_new"),
    "no qkv bias": dict(qkv_bias=False),
    "patch 4": dict(patch_size=4),
    "patch 16": dict(patch_size=16),
    "one label": dict(num_labels=1),
    "two labels": dict(num_labels=2),
    "1000 labels": dict(num_labels=1000),
    "one head": dict(num_attention_heads=1),
    "narrow MLP": dict(intermediate_size=64),
    "one channel": dict(num_channels=1),
    "one block": dict(num_hidden_layers=1),
}


def reference(**options):
    """The official class with every parameter drawn anew: nothing stays zero, one or tied to its neighbour by chance.

    Matrices get std 0.1, so that attention is far from uniform in a model this narrow.
    """
    config = transformers.ViTConfig(**(BASE | options), attn_implementation="eager")
    model = transformers.ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = "layernorm" in name and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm_weight else noise * (0.1 if parameter.ndim > 1 else 0.02)
    return model


def standard(model):
    """All parameters from N(0, 0.02), LayerNorm weights around one: the scale of real ViT checkpoints."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + ("layernorm" in name and name.endswith("weight"))
    return model


def pictures(model, *, seed=0, count=3):
    side, channels = model.config.image_size, model.config.num_channels
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scale", ["std 0.02", "std 0.1"])
@torch.no_grad()
def test_equals_transformers(name, scale, tmp_path):
    theirs = reference(**VARIANTS[name])
    if scale == "std 0.02":
        standard(theirs)
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    images = pictures(theirs)

    expected = theirs(images, output_hidden_states=True, output_attentions=True)
    logits, named = ours(images, everything=True)
    assert_close(logits, expected.logits)
    assert_close(ours(images)[0], expected.logits)  # the shorter way, where the last block computes one row alone
    assert_close(named["embedded"], expected.hidden_states[0])
    for i in range(theirs.config.num_hidden_layers):
        assert_close(named[f"attention_{i}"], expected.attentions[i])
        assert_close(named[f"block_{i}"], expected.hidden_states[i + 1])
    assert_close(named["tokens"], theirs.vit(images).last_hidden_state)

    # Agreement would be worth nothing if the logits did not depend on the picture, or not on where its parts stand.
    another = theirs(pictures(theirs, seed=1)).logits - expected.logits
    shifted = theirs(images.roll(theirs.config.patch_size, dims=-1)).logits - expected.logits
    assert another.abs().max() > 100 * TOLERANCE
    assert shifted.abs().max() > (1000 * TOLERANCE if scale == "std 0.1" else TOLERANCE)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_gradients_equal_transformers(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    ours, images, labels = from_hf(tmp_path), pictures(theirs), torch.tensor([0, 3, 6])
    theirs(images, labels=labels).loss.backward()
    torch.nn.functional.cross_entropy(ours(images)[0], labels).backward()
    kernel = theirs.vit.embeddings.patch_embeddings.projection.weight.grad
    assert kernel.abs().max() > 1e-3
    assert_close(ours.embed.patch_embed.proj.weight.grad, kernel.flatten(1))
    assert_close(ours.embed.cls_token.grad, theirs.vit.embeddings.cls_token.grad)
    assert_close(ours.embed.pos_embed.grad, theirs.vit.embeddings.position_embeddings.grad)
    assert_close(ours.head.weight.grad, theirs.classifier.weight.grad)


@pytest.mark.parametrize("wrong", ["eps", "heads", "keys and values", "norms", "gelu"])
@torch.no_grad()
def test_the_tolerance_would_notice(wrong, tmp_path):
    """The comparison rejects the mistakes it is there for: each breaks one thing of the loaded model."""
    theirs = reference(layer_norm_eps=1e-3)
    theirs.save_pretrained(tmp_path)
    ours, images = from_hf(tmp_path), pictures(theirs)
    for block in ours.encoder.blocks:
        if wrong == "eps":
            block.norm1.eps = 1e-6
        elif wrong == "heads":
            block.attn.heads = 8
        elif wrong == "keys and values":
            block.attn.kv.weight.copy_(block.attn.kv.weight.roll(BASE["hidden_size"], dims=0))
        elif wrong == "norms":
            block.norm1, block.norm2 = block.norm2, block.norm1
        elif wrong == "gelu":
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    assert (ours(images)[0] - theirs(images).logits).abs().max() > TOLERANCE


OLD_NAMES = {  # transformers v4 and Hub files -> v5; written down here once more, apart from the loader's own table
    "vit.encoder.layer.": "vit.layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}


@pytest.mark.parametrize("names", ["v4", "v5"])
@pytest.mark.parametrize("prefix", ["vit.", ""])
@torch.no_grad()
def test_reads_old_and_new_names(names, prefix, tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {}
    for name, tensor in load_file(file).items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new) if names == "v5" else name.replace(new, old)
        weights[name if prefix else name.removeprefix("vit.")] = tensor
    assert any(("encoder.layer.2.attention.attention.key.weight" in name) == (names == "v4") for name in weights)
    assert any(("layers.2.attention.k_proj.weight" in name) == (names == "v5") for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    images = pictures(theirs)
    assert_close(from_hf(tmp_path)(images)[0], theirs(images).logits)


@torch.no_grad()
def test_reads_shards(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    images = pictures(theirs)
    assert_close(from_hf(tmp_path)(images)[0], theirs(images).logits)


@pytest.mark.parametrize("pooler", [True, False])
@torch.no_grad()
def test_model_without_a_head_gets_a_zero_head(pooler, tmp_path):
    theirs = reference()
    body = transformers.ViTModel(theirs.config, add_pooling_layer=pooler, use_mask_token=pooler).eval()
    body.load_state_dict(theirs.vit.state_dict(), strict=False)
    body.save_pretrained(tmp_path)
    ours, images = from_hf(tmp_path), pictures(theirs)
    logits, named = ours(images)
    assert logits.shape == (3, 7) and not logits.any() and ours.labels == ()
    assert_close(named["pooled"], body(images).last_hidden_state[:, 0])
    assert named["pooled"].std(dim=0).max() > 1e-2


@torch.no_grad()
def test_fine_tuning_replaces_the_head(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    ours, images = from_hf(tmp_path, num_classes=12), pictures(theirs)
    logits, named = ours(images)
    assert logits.shape == (3, 12) and not logits.any() and ours.labels == ()
    assert_close(named["pooled"], theirs.vit(images).last_hidden_state[:, 0])


@torch.no_grad()
def test_half_precision_becomes_float32(tmp_path):
    theirs = reference().half()
    theirs.save_pretrained(tmp_path)
    ours, theirs = from_hf(tmp_path), theirs.float()
    images = pictures(theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_close(ours(images)[0], theirs(images).logits)
