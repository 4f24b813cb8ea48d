"""Loading official checkpoints: what is honoured, and one clear sentence for everything that can be wrong."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from minivlp import pretrained
from minivlp.pretrained import CLIP_MEAN, CLIP_STD, CheckpointError, fill, from_hf, preprocess, preprocess_blip

D, DEPTH, HIDDEN, K = 8, 2, 32, 3

CONFIG = {
    "model_type": "vit", "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 2,
    "intermediate_size": HIDDEN, "image_size": 16, "patch_size": 8, "num_channels": 3, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu", "qkv_bias": True, "id2label": {"2": "cat", "0": "house", "1": "tree"},
}  # fmt: skip


def official_weights() -> dict[str, torch.Tensor]:
    """Names and shapes of a Hub file, written down by hand; the values are random."""
    shapes = {
        "vit.embeddings.cls_token": (1, 1, D),
        "vit.embeddings.position_embeddings": (1, 5, D),
        "vit.embeddings.patch_embeddings.projection.weight": (D, 3, 8, 8),
        "vit.embeddings.patch_embeddings.projection.bias": (D,),
        "vit.layernorm.weight": (D,),
        "vit.layernorm.bias": (D,),
        "classifier.weight": (K, D),
        "classifier.bias": (K,),
    }
    for i in range(DEPTH):
        linears = {
            "attention.attention.query": (D, D),
            "attention.attention.key": (D, D),
            "attention.attention.value": (D, D),
            "attention.output.dense": (D, D),
            "intermediate.dense": (HIDDEN, D),
            "output.dense": (D, HIDDEN),
        }
        norms = {"layernorm_before": (D,), "layernorm_after": (D,)}
        for name, shape in (linears | norms).items():
            shapes[f"vit.encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"vit.encoder.layer.{i}.{name}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, official_weights())
    return tmp_path


def write(folder, weights=None, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    if weights is not None:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def message(call) -> str:
    """The text of the CheckpointError that `call()` must raise: one line, a ':' or ';' before the advice."""
    with pytest.raises(CheckpointError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and (":" in text or ";" in text) and 20 < len(text) < 500, text
    return text


# --- what is read ----------------------------------------------------------------------------------------------------


def test_every_tensor_arrives_at_its_place(folder):
    model, official = from_hf(folder), official_weights()
    own = model.state_dict()
    assert not model.training
    assert torch.equal(own["embed.cls_token"], official["vit.embeddings.cls_token"])
    assert torch.equal(own["embed.pos_embed"], official["vit.embeddings.position_embeddings"])
    kernel = official["vit.embeddings.patch_embeddings.projection.weight"]
    assert torch.equal(own["embed.patch_embed.proj.weight"].view(D, 3, 8, 8), kernel)
    for i in range(DEPTH):
        theirs, ours = f"vit.encoder.layer.{i}.", f"encoder.blocks.{i}."
        for kind in ("weight", "bias"):
            for old, new in {
                "attention.attention.query": "attn.q", "attention.output.dense": "attn.proj",
                "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
                "layernorm_before": "norm1", "layernorm_after": "norm2",
            }.items():  # fmt: skip
                assert torch.equal(own[f"{ours}{new}.{kind}"], official[f"{theirs}{old}.{kind}"])
            keys, values = own[f"{ours}attn.kv.{kind}"].chunk(2)
            assert torch.equal(keys, official[f"{theirs}attention.attention.key.{kind}"])
            assert torch.equal(values, official[f"{theirs}attention.attention.value.{kind}"])
    assert torch.equal(own["head.weight"], official["classifier.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in official.values())


def test_labels_follow_the_scores(folder):
    assert from_hf(folder).labels == ("house", "tree", "cat")


def test_labels_missing_means_two_nameless_classes(tmp_path):
    weights = official_weights()
    weights["classifier.weight"], weights["classifier.bias"] = torch.randn(2, D), torch.randn(2)
    write(tmp_path, weights)
    config = {k: v for k, v in CONFIG.items() if k != "id2label"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_hf(tmp_path).labels == ("LABEL_0", "LABEL_1")


def test_options_are_honoured(folder):
    write(folder, layer_norm_eps=0.25, hidden_act="gelu_new", hidden_dropout_prob=0.5, image_size=[16, 16])
    model = from_hf(folder)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.25}
    assert {m.approximate for m in model.modules() if isinstance(m, torch.nn.GELU)} == {"tanh"}
    assert model.config.dropout == 0.5 and model.config.image_size == 16


def test_no_qkv_bias_becomes_zero(tmp_path):
    weights = {
        name: tensor for name, tensor in official_weights().items()
        if not name.endswith(("query.bias", "key.bias", "value.bias"))
    }  # fmt: skip
    write(tmp_path, weights, qkv_bias=False)
    attn = from_hf(tmp_path).encoder.blocks[0].attn
    assert not attn.q.bias.any() and not attn.kv.bias.any() and attn.proj.bias.all()


def test_new_head_of_any_size(folder):
    model = from_hf(folder, num_classes=5)
    assert model.head.weight.shape == (5, D) and not model.head.weight.any() and model.labels == ()
    assert model.fresh == ("head",) and from_hf(folder).fresh == ()
    own = official_weights()["vit.layernorm.weight"]
    assert torch.equal(model.encoder.norm.weight, own)


def test_a_path_may_be_text(folder):
    assert from_hf(str(folder)).config == from_hf(folder).config


def test_transformers_is_never_imported(folder):
    program = f"import sys; from minivlp.pretrained import from_hf; from_hf({str(folder)!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "minivlp.models.vit" in modules
    assert "transformers" not in modules


def test_a_further_model_type_can_register(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "LOADERS", dict(pretrained.LOADERS))

    @pretrained.loader("tiny")
    def tiny(config, weights, num_classes):
        return torch.nn.Linear(config["hidden_size"], len(weights))

    write(folder, model_type="tiny")
    assert from_hf(folder).weight.shape == (len(official_weights()), D)


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_missing_folder_and_file(tmp_path, folder):
    assert "no folder" in message(lambda: from_hf(tmp_path / "nowhere"))
    assert "no folder" in message(lambda: from_hf("./nowhere"))
    assert "give the folder" in message(lambda: from_hf(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in message(lambda: from_hf(folder))
    (folder / "config.json").unlink()
    assert "no config.json" in message(lambda: from_hf(folder))


def test_pickle_is_refused_and_never_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return open, (str(trap), "w")

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    text = message(lambda: from_hf(folder))
    assert "pytorch_model.bin" in text and "safetensors" in text
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert "truncated" in message(lambda: from_hf(folder))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"PK\x03\x04" * 99])
def test_other_files_under_that_name(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "no safetensors file" in message(lambda: from_hf(folder))


@pytest.mark.parametrize("content", ["", '{"model_type": "vit"', "[1, 2]", "\x00"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    text = message(lambda: from_hf(folder))
    assert "config.json" in text and "download it again" in text


@pytest.mark.parametrize("model_type", ["bert", None, ["vit"]])
def test_unknown_model_type(folder, model_type):
    write(folder, model_type=model_type)
    text = message(lambda: from_hf(folder))
    assert repr(model_type) in text and "'vit'" in text


@pytest.mark.parametrize("name", ["vit.embeddings.cls_token", "vit.encoder.layer.1.attention.attention.key.weight"])
def test_missing_tensor(tmp_path, name):
    weights = official_weights()
    del weights[name]
    write(tmp_path, weights)
    assert "it lacks" in message(lambda: from_hf(tmp_path))


def test_missing_tensors_are_counted_not_listed(tmp_path):
    write(tmp_path, official_weights(), num_hidden_layers=4)
    assert "more" in message(lambda: from_hf(tmp_path))


def test_head_without_its_bias(tmp_path):
    weights = official_weights()
    del weights["classifier.bias"]
    write(tmp_path, weights)
    assert "head.bias" in message(lambda: from_hf(tmp_path))


@pytest.mark.parametrize("name", ["decoder.0.weight", "vit.encoder.layer.2.layernorm_before.weight", "distillation"])
def test_unexpected_tensor(tmp_path, name):
    write(tmp_path, official_weights() | {name: torch.zeros(D)})
    assert "no place for" in message(lambda: from_hf(tmp_path))


def test_both_names_of_one_tensor(tmp_path):
    weights = official_weights()
    write(tmp_path, weights | {"vit.layers.0.attention.q_proj.weight": torch.zeros(D, D)})
    assert "twice" in message(lambda: from_hf(tmp_path))
    query = weights["vit.encoder.layer.0.attention.attention.query.weight"]
    write(tmp_path, weights | {"vit.layers.0.attention.q_proj.weight": query.clone()})  # the same numbers do no harm
    assert torch.equal(from_hf(tmp_path).encoder.blocks[0].attn.q.weight, query)


@pytest.mark.parametrize("shape", [(D, D + 1), (D,), ()])
def test_keys_and_values_that_do_not_fit_together(shape, tmp_path):
    name = "vit.encoder.layer.0.attention.attention.key.weight"
    write(tmp_path, official_weights() | {name: torch.zeros(shape)})
    assert "encoder.blocks.0.attn.kv.weight" in message(lambda: from_hf(tmp_path))


@pytest.mark.parametrize("shape", [(D, 3 * 8 * 9), (D,), ()])
def test_a_kernel_of_another_shape(shape, tmp_path):
    write(tmp_path, official_weights() | {"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(shape)})
    assert "embed.patch_embed.proj.weight has shape" in message(lambda: from_hf(tmp_path))


@pytest.mark.parametrize(
    "config",
    [{"patch_size": 4}, {"intermediate_size": 64}, {"num_channels": 1}, {"image_size": 32}, {"id2label": {"0": "x"}}],
)
def test_shape_mismatch(folder, config):
    write(folder, **config)
    text = message(lambda: from_hf(folder))
    assert "has shape" in text and "config.json" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_act": "relu"}, "'relu'"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        ({"hidden_act": ["gelu"]}, "['gelu']"),
        ({"layer_norm_eps": "small"}, "a number >= 0"),
        ({"hidden_dropout_prob": None}, "a number >= 0"),
        ({"hidden_dropout_prob": -0.1}, "a number >= 0"),
        ({"hidden_dropout_prob": True}, "a number >= 0"),
        ({"hidden_dropout_prob": 2}, "impossible model"),
        ({"image_size": [16, 32]}, "only square"),
        ({"patch_size": [8, 4]}, "only square"),
        ({"intermediate_size": 33}, "no whole multiple"),
        ({"hidden_size": "wide"}, "whole number"),
        ({"num_hidden_layers": 0}, "whole number"),
        ({"num_attention_heads": 3}, "impossible model"),
        ({"image_size": 20}, "impossible model"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
    ],
)
def test_config_we_cannot_build(folder, config, words):
    write(folder, **config)
    assert words in message(lambda: from_hf(folder))


def shards(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder):
    weights = official_weights()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    expected = from_hf(folder).state_dict()
    shards(folder, {name: file for file, part in files.items() for name in part})
    loaded = from_hf(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in message(lambda: from_hf(folder))


def test_index_must_stay_in_its_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    save_file(official_weights(), elsewhere)
    shards(folder, {"x": str(elsewhere)})
    assert "outside" in message(lambda: from_hf(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in message(lambda: from_hf(folder))


def test_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def offline(repo, **options):
        asked.update(options, repo=repo)
        raise OSError("name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    text = message(lambda: from_hf("google/vit-base-patch16-224", cache_dir=tmp_path))
    assert "google/vit-base-patch16-224" in text and "network" in text and "folder" in text
    assert asked["cache_dir"] == tmp_path and asked["repo"] == "google/vit-base-patch16-224"
    assert not any(pattern.endswith((".bin", "*")) for pattern in asked["allow_patterns"])


def test_hub_id_goes_through_the_download(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(folder))
    assert from_hf("someone/some-vit").labels == ("house", "tree", "cat")


def test_fresh_parts_may_be_parts_of_parts():
    """ "text.decoder" may be fresh where a file has the rest of `text`, and "text.decoder_embed" is another part."""

    def model() -> torch.nn.Module:
        text = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("decoder", "decoder_embed", "encoder")})
        return torch.nn.ModuleDict({"text": text, "temp": torch.nn.Linear(1, 1)})

    source, ours = model().state_dict(), model()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    fill(ours, source, fresh=("text.decoder", "temp"))
    fresh = [name for name, t in ours.state_dict().items() if torch.equal(t, before[name])]
    assert fresh == ["text.decoder.weight", "text.decoder.bias", "temp.weight", "temp.bias"]
    assert ours.fresh == ("text.decoder", "temp")
    for kind in ("weight", "bias"):  # a file without them is as good, but only without those
        del source[f"text.decoder.{kind}"]
    fill(ours, source, fresh=("text.decoder",))
    del source["text.decoder_embed.bias"]
    assert "it lacks text.decoder_embed.bias" in message(lambda: fill(ours, source, fresh=("text.decoder",)))


# --- pictures for official weights -----------------------------------------------------------------------------------


def test_preprocess_range_and_order():
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    image.putpixel((1, 0), (0, 255, 0))  # x=1, y=0: top right
    pixels = preprocess(image, size=2)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels.tolist() == [[[1, -1], [1, 1]], [[-1, 1], [-1, -1]], [[-1, -1], [-1, -1]]]


def test_preprocess_other_modes_and_statistics():
    assert preprocess(Image.new("L", (9, 5), 255), size=4).eq(1).all()
    assert preprocess(Image.new("RGBA", (9, 5), (0, 0, 0, 255)), size=4).eq(-1).all()
    pixels = preprocess(Image.new("RGB", (3, 3), (51, 102, 153)), size=1, mean=(0.1, 0.2, 0.3), std=(0.1, 0.2, 0.5))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([1.0, 1.0, 0.6]))


def test_preprocess_blip_squeezes_and_scales_like_clip():
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    red = [(value - mean) / std for value, mean, std in zip((1, 0, 0), CLIP_MEAN, CLIP_STD, strict=True)]
    pixels = preprocess_blip(image, size=6)
    assert pixels.shape == (3, 6, 6) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, torch.tensor(red)[:, None, None].expand(3, 6, 6), rtol=0, atol=1e-6)
    image.paste((0, 255, 0), (0, 0, 1, 2))  # a quarter at the left, which cutting would lose
    assert preprocess_blip(image, size=4)[1, :, 0].min() > 1 > preprocess_blip(image, size=4)[1, :, 2:].max()
    assert preprocess_blip(Image.new("L", (30, 9))).shape == (3, 384, 384)


@pytest.mark.parametrize("shape", [(300, 200), (64, 90), (224, 224)])
def test_preprocess_equals_the_official_one(shape):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "ViTImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no ViTImageProcessorPil")
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor()(images=image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess(image, size=224), expected, rtol=0, atol=1e-6)
