"""Official checkpoints into our modules: `config.json` + safetensors in, one of our models out.

Only the transformers file format is read, never its code, and never a pickle: a safetensors file holds numbers alone,
while opening somebody's `pytorch_model.bin` may run whatever program they put into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import CheckpointError

Weights = dict[str, Tensor]
Loader = Callable[[dict[str, Any], Weights, "int | None"], nn.Module]

HUB_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]

LOADERS: dict[str, Loader] = {}


def loader(model_type: str) -> Callable[[Loader], Loader]:
    """Register a function `(config, weights, num_classes) -> model` for the `model_type` of a config.json."""

    def register(function: Loader) -> Loader:
        LOADERS[model_type] = function
        return function

    return register


def from_hf(
    path_or_id: str | PathLike[str], *, num_classes: int | None = None, cache_dir: str | PathLike[str] | None = None
) -> nn.Module:
    """An official checkpoint as our model, in eval mode, float32, on the CPU.

    `path_or_id` is a folder with config.json and model.safetensors (one file, or shards with their index), or a
    Hub id such as "google/vit-base-patch16-224", downloaded once into `cache_dir` (default: the usual Hugging Face
    cache). The class follows from `model_type` in config.json.

    A classifier gets `model.labels`, the class names in the order of the scores. With `num_classes` the checkpoint's
    own head is left out and a new zero one of that many classes put in its place, as for fine-tuning (ViT, 3.2). A
    checkpoint without a head always gets such a new one; a new head has `labels == ()`.

    Raises CheckpointError if anything is missing, damaged or of another kind.
    """
    folder = _find_folder(path_or_id, cache_dir)
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in LOADERS:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of type {model_type!r}: choose a checkpoint of type "
            + " or ".join(map(repr, sorted(LOADERS)))
        )
    try:
        return LOADERS[model_type](config, _read_weights(folder), num_classes).eval()
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error


def preprocess(
    image: Image.Image, *, size: int, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """A picture as official weights expect it: squeezed to a square, bilinear -> float32 (3, size, size).

    The defaults give [-1, 1], right for Google's ViT. Feeding it pixels scaled by the ImageNet mean and standard
    deviation instead is a common mistake which costs accuracy without any error message.
    """
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = (pixels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# --- ViT -------------------------------------------------------------------------------------------------------------

# Official name -> ours, applied in this order. Hub files and transformers v4 say encoder.layer.i, query, dense;
# transformers v5 says layers.i, q_proj, fc1. A bare ViTModel lacks the prefix "vit.".
VIT_NAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.(cls_token)$", r"embed.\1"),
    (r"^embeddings\.position_embeddings$", "embed.pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed.patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"encoder.blocks.\1."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^classifier\.", "head."),
)
# Parts of the official classes which are no part of the paper's fine-tuned classifier: the pooler is the tanh layer of
# the pre-training head, the mask token belongs to masked-patch pre-training.
VIT_UNUSED = (r"^(vit\.)?pooler\.", r"^(vit\.)?embeddings\.mask_token$")

GELU_NAMES = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@loader("vit")
def vit_from_hf(config: dict[str, Any], weights: Weights, num_classes: int | None) -> ViT:
    """The classes ViTForImageClassification and ViTModel -> our ViT."""
    width, hidden = _whole(config, "hidden_size", 768), _whole(config, "intermediate_size", 3072)
    if hidden % width:
        raise CheckpointError(
            f"its MLP is {hidden} wide, no whole multiple of hidden_size {width}: use a checkpoint where it is"
        )
    act = config.get("hidden_act", "gelu")
    if act not in GELU_NAMES:
        raise CheckpointError(f"hidden_act is {act!r}: this ViT knows {', '.join(map(repr, GELU_NAMES))} only")

    labels = _labels(config)
    weights = rename(weights, VIT_NAMES, drop=VIT_UNUSED)
    fresh_head = num_classes is not None or "head.weight" not in weights
    if num_classes is None:
        num_classes = len(labels) or 2  # num_labels 0: no head at all; fine-tuning chooses its own number
    model = build(
        ViT,
        ViTConfig,
        image_size=_side(config, "image_size", 224),
        patch_size=_side(config, "patch_size", 16),
        channels=_whole(config, "num_channels", 3),
        width=width,
        depth=_whole(config, "num_hidden_layers", 12),
        heads=_whole(config, "num_attention_heads", 12),
        mlp_ratio=hidden // width,
        num_classes=num_classes,
        gelu=GELU_NAMES[act],
        dropout=float(config.get("hidden_dropout_prob", 0.0)),  # asleep in eval mode; attention dropout we have none
        eps=float(config.get("layer_norm_eps", 1e-12)),
    )
    own = model.state_dict()
    if fresh_head:
        weights |= {name: own[name] for name in ("head.weight", "head.bias")}
    if (kernel := weights.get("embed.patch_embed.proj.weight")) is not None:
        weights["embed.patch_embed.proj.weight"] = kernel.flatten(1)  # convolution kernel (D, C, P, P) -> (D, C*P*P)
    for block in (f"encoder.blocks.{i}.attn" for i in range(model.config.depth)):
        if not config.get("qkv_bias", True):
            weights |= {f"{block}.{part}.bias": torch.zeros(width) for part in "qkv"}
        for kind in ("weight", "bias"):  # our keys and values share one matrix: keys first
            pair = [weights.pop(f"{block}.{part}.{kind}", None) for part in "kv"]
            if all(tensor is not None for tensor in pair):
                weights[f"{block}.kv.{kind}"] = torch.cat(pair)
    fill(model, weights)
    model.labels = () if fresh_head else labels
    return model


# --- helpers for every loader ----------------------------------------------------------------------------------------


def rename(weights: Weights, names: Sequence[tuple[str, str]], *, drop: Sequence[str] = ()) -> Weights:
    """Apply the (regular expression, replacement) pairs to each name in order; names matching `drop` are left out."""
    renamed: Weights = {}
    for official, tensor in weights.items():
        if any(re.search(pattern, official) for pattern in drop):
            continue
        name = official
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise CheckpointError(f"it holds {name!r} twice, under an old and a new name: save it again in one format")
        renamed[name] = tensor
    return renamed


def build(model_class: type[nn.Module], config_class: type, **options: Any) -> Any:
    """`model_class(config_class(**options))`, with an impossible option told as a fault of the checkpoint."""
    try:
        return model_class(config_class(**options))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json asks for an impossible model ({error}): download it again") from error


def fill(model: nn.Module, weights: Weights) -> None:
    """Copy `weights` into `model`; raises CheckpointError unless names and shapes agree exactly."""
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise CheckpointError(
            f"it lacks {_some(missing)}: the file is incomplete or config.json belongs to another model; "
            "download both again"
        )
    if unexpected := sorted(weights.keys() - own.keys()):
        raise CheckpointError(
            f"it holds {_some(unexpected)}, which {type(model).__name__} has no place for: "
            "take the checkpoint of a plain model of this type with a matching config.json"
        )
    if wrong := [name for name in own if own[name].shape != weights[name].shape]:
        name = wrong[0]
        raise CheckpointError(
            f"{name} has shape {tuple(weights[name].shape)}, config.json says {tuple(own[name].shape)} "
            f"({len(wrong)} such tensor{'s' * (len(wrong) > 1)}): use the config.json that belongs to these weights"
        )
    model.load_state_dict(weights)  # copies, and turns half precision into the model's float32


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _whole(config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json says {key}={value!r} where a whole number >= 1 belongs: download it again")
    return value


def _side(config: dict[str, Any], key: str, default: int) -> int:
    """A side in pixels, which the format writes as one number or as [height, width]."""
    value = config.get(key, default)
    if isinstance(value, list) and len(value) == 2:
        if value[0] != value[1]:
            raise CheckpointError(f"{key} is {value[0]}x{value[1]}: only square ones are supported, choose another")
        value = value[0]
    return _whole({key: value}, key, default)


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Class names in the order of the scores. The format leaves both keys out when there are two nameless classes."""
    if "id2label" not in config:
        count = config.get("num_labels", 2)
        return tuple(f"LABEL_{i}" for i in range(count))
    try:
        by_index = {int(index): str(label) for index, label in config["id2label"].items()}
        return tuple(by_index[i] for i in range(len(by_index)))
    except (AttributeError, ValueError, KeyError) as error:
        raise CheckpointError("id2label in config.json does not number the classes 0, 1, 2, ...: repair it") from error


def _find_folder(path_or_id: str | PathLike[str], cache_dir: str | PathLike[str] | None) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it together with its config.json")
    if not isinstance(path_or_id, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_id):
        raise CheckpointError(f"there is no folder {folder}: check the path, or give a Hub id such as 'owner/name'")
    from huggingface_hub import snapshot_download  # imported late: reading a folder needs no network library

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=HUB_FILES, cache_dir=cache_dir))
    except Exception as error:  # its errors share no base class across versions
        raise CheckpointError(
            f"cannot download {path_or_id!r} from the Hugging Face Hub ({type(error).__name__}): check the name and "
            "the network, or give the path of a folder that already holds config.json and model.safetensors"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: give a whole folder as save_pretrained writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise CheckpointError(f"{path} is no readable JSON: download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    return content


def _read_weights(folder: Path) -> Weights:
    """All tensors of model.safetensors, or of the shards which model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map: download it again")
        weights: Weights = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index.name} points outside its folder ({shard}): do not trust this checkpoint")
            weights |= _read_safetensors(folder / shard)
        return weights
    if (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        raise CheckpointError(
            "it holds only a pickled pytorch_model.bin, which may run foreign code when opened and is not read here: "
            "take the safetensors version, or save it again with transformers' save_pretrained"
        )
    raise CheckpointError("it has no model.safetensors: choose a checkpoint which is published in that format")


def _read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing: download it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is truncated or no safetensors file: download it again") from error
