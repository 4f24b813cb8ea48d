"""Official checkpoints into our modules: `config.json` + safetensors in, one of our models out.

Only the transformers file format is read, never its code, and never a pickle: a safetensors file holds numbers alone,
while opening somebody's `pytorch_model.bin` may run whatever program they put into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import LongTensor, Tensor, nn

from minivlp.models.albef import ImageEncoder
from minivlp.models.blip import BLIP, NOTHING_SHARED, BLIPConfig
from minivlp.models.blip2 import BLIP2, BLIP2Speaker, Eye, QFormerConfig
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.lm import DecoderLM, LMConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import CheckpointError

Weights = dict[str, Tensor]
Loader = Callable[..., nn.Module]  # see `loader`

HUB_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]

CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

LOADERS: dict[str, Loader] = {}


def loader(model_type: str) -> Callable[[Loader], Loader]:
    """Register a function `(config, weights, num_classes) -> model` for the `model_type` of a config.json; BLIP-2's
    also takes a `mouth`."""

    def register(function: Loader) -> Loader:
        LOADERS[model_type] = function
        return function

    return register


def from_hf(
    path_or_id: str | PathLike[str], *, num_classes: int | None = None, mouth: nn.Module | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> nn.Module:  # fmt: skip
    """An official checkpoint as our model, in eval mode, float32, on the CPU.

    `path_or_id` is a folder with config.json and model.safetensors (one file, or shards with their index), or a
    Hub id such as "google/vit-base-patch16-224", downloaded once into `cache_dir` (default: the usual Hugging Face
    cache). The class follows from `model_type` in config.json.

    A classifier gets `model.labels`, the class names in the order of the scores. With `num_classes` the checkpoint's
    own classifier is left out and a new one of that many classes put in its place, as for fine-tuning: of zeros in a
    ViT (ViT, 3.2), of random numbers in a ViLT; CLIP, BLIP and BLIP-2 have none. `model.fresh` names the parts of our
    model which the checkpoint has no weights for, such as ("head",); they need training, and a new classifier has
    `labels == ()`. What is new when and where is said at the loader of each kind: `vit_from_hf`, `vilt_from_hf`,
    `clip_from_hf`, `blip_from_hf`, `blip2_from_hf`.

    `mouth` is for a BLIP-2 alone: a language model that takes the place of the checkpoint's own.

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
    given = {} if mouth is None else {"mouth": mouth}
    if given and model_type != "blip-2":
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}, which has no mouth: leave mouth out")
    try:
        return LOADERS[model_type](config, _read_weights(folder), num_classes, **given).eval()
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error


def preprocess(
    image: Image.Image, *, size: int, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """A picture as official weights expect it: squeezed to a square, bilinear -> float32 (3, size, size).

    The defaults give [-1, 1], right for Google's ViT. Feeding it pixels scaled by the ImageNet mean and standard
    deviation instead is a common mistake which costs accuracy without any error message.
    """
    return _pixels(image, size, size, Image.Resampling.BILINEAR, mean, std)


def preprocess_aspect(
    image: Image.Image, *, shorter: int = 384, longer: int = 639, multiple: int = 32,
    mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5,
) -> Tensor:  # fmt: skip
    """A picture as ViLT's weights expect it (paper, 4.2), not squeezed, bicubic -> float32 (3, H, W) in [-1, 1].

    The shorter side becomes `shorter` pixels, or less where the longer one would pass `longer`; then both are cut to
    multiples of `multiple`, the patch side. The paper says at most 640, but the official code computes
    int(1333 / 800 * 384) = 639, and so ends at 608. A side never gets shorter than one patch.
    """
    least = min(image.size)
    sides = [float(shorter) if side == least else shorter / least * side for side in image.size]
    if max(sides) > longer:  # in two steps, like the official code: at 2:1 the last digit decides about a patch
        sides = [longer / max(sides) * side for side in sides]
    width, height = (max(multiple, int(side + 0.5) // multiple * multiple) for side in sides)
    return _pixels(image, width, height, Image.Resampling.BICUBIC, mean, std)


def preprocess_clip(image: Image.Image, *, size: int = 224) -> Tensor:
    """A picture as CLIP's weights expect it, bicubic, cut to its middle square -> float32 (3, size, size).

    The shorter side becomes `size` pixels, what stands over on the longer one is cut off on both ends, and each colour
    is scaled by the mean and standard deviation of CLIP's own training pictures (official code).
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    pixels = _pixels(image, width, height, Image.Resampling.BICUBIC, CLIP_MEAN, CLIP_STD)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, top : top + size, left : left + size].contiguous()


def preprocess_blip(image: Image.Image, *, size: int = 384) -> Tensor:
    """A picture as BLIP's weights expect it: squeezed to a square, bicubic -> float32 (3, size, size).

    The colours are scaled as for CLIP. 384 pixels are those of the fine-tuned checkpoints. BLIP-2's weights expect the
    same, at the `image_size` of their config.json.
    """
    return _pixels(image, size, size, Image.Resampling.BICUBIC, CLIP_MEAN, CLIP_STD)


def pad_pictures(pictures: Sequence[Tensor], patch_size: int) -> tuple[Tensor, Tensor]:
    """Pictures of different sizes as one batch: a list of (C, h, w) -> images (B, C, H, W), image_mask (B, H/P, W/P).

    H and W are the largest of the list; what a smaller picture leaves on the right and at the bottom is 0, and False in
    the mask that `ViLT.forward` wants. Raises ValueError if there is none, or one is not made of whole patches.
    """
    P = patch_size
    if not pictures:
        raise ValueError("there are no pictures to put into a batch: give at least one")
    C = pictures[0].shape[0]
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[0] != C or picture.shape[1] % P or picture.shape[2] % P:
            raise ValueError(
                f"a picture of shape {tuple(picture.shape)} does not fit: all must be ({C}, h, w) with sides of whole "
                f"{P}-pixel patches, as preprocess_aspect(..., multiple={P}) makes them"
            )
    H, W = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    images = pictures[0].new_zeros(len(pictures), C, H, W)
    image_mask = torch.zeros(len(pictures), H // P, W // P, dtype=torch.bool, device=images.device)
    for b, picture in enumerate(pictures):
        _, h, w = picture.shape
        images[b, :, :h, :w] = picture
        image_mask[b, : h // P, : w // P] = True
    return images, image_mask


def _pixels(
    image: Image.Image, width: int, height: int, filter: Image.Resampling,
    mean: float | Sequence[float], std: float | Sequence[float],
) -> Tensor:  # fmt: skip
    pixels = np.asarray(image.convert("RGB").resize((width, height), filter), dtype=np.float32) / 255
    pixels = (pixels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# --- what the official ViT and ViLT share ----------------------------------------------------------------------------

# Official name -> ours, applied in this order. Hub files and transformers v4 say encoder.layer.i, query, dense;
# transformers v5 says layers.i, q_proj, fc1 in its ViT, and still the old names in its ViLT.
TRUNK_NAMES = (
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
)

GELU_NAMES = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh",
              "quick_gelu": "quick"}  # fmt: skip


def trunk_options(config: dict[str, Any], *, image_size: int, patch_size: int) -> dict[str, Any]:
    """The options which every transformer tower has; the sizes given here hold where config.json names none."""
    width, hidden = _whole(config, "hidden_size", 768), _whole(config, "intermediate_size", 3072)
    if hidden % width:
        raise CheckpointError(
            f"its MLP is {hidden} wide, no whole multiple of hidden_size {width}: use a checkpoint where it is"
        )
    return dict(
        image_size=_side(config, "image_size", image_size),
        patch_size=_side(config, "patch_size", patch_size),
        channels=_whole(config, "num_channels", 3),
        width=width,
        depth=_whole(config, "num_hidden_layers", 12),
        heads=_whole(config, "num_attention_heads", 12),
        mlp_ratio=hidden // width,
        dropout=_number(config, "hidden_dropout_prob", 0.0),  # asleep in eval mode; attention dropout we have none
        eps=_number(config, "layer_norm_eps", 1e-12),
    )


def join_trunk(weights: Weights, config: dict[str, Any], *, width: int, depth: int, patches: str) -> Weights:
    """The renamed weights with those of the patches (module `patches`), keys and values in our shapes."""
    weights = dict(weights)
    if not config.get("qkv_bias", True):
        for block in (f"encoder.blocks.{i}.attn" for i in range(depth)):
            weights |= {f"{block}.{part}.bias": torch.zeros(width) for part in "qkv"}
    _flatten_kernel(weights, patches)
    _join_keys_values(weights, (f"encoder.blocks.{i}.attn" for i in range(depth)))
    return weights


def _flatten_kernel(weights: Weights, patches: str) -> None:
    """The patches' convolution kernel (D, C, P, P) becomes the matrix (D, C*P*P) of a `PatchEmbed`."""
    kernel = weights.get(f"{patches}.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        weights[f"{patches}.proj.weight"] = kernel.flatten(1)


def _join_keys_values(weights: Weights, attentions: Iterable[str]) -> None:
    """The matrices of keys and values of these modules become one, as in our `Attention`: keys first."""
    for attn in attentions:
        for kind in ("weight", "bias"):
            pair = [weights.pop(f"{attn}.{part}.{kind}", None) for part in "kv"]
            if all(tensor is not None for tensor in pair):
                weights[f"{attn}.kv.{kind}"] = _join(f"{attn}.kv.{kind}", pair)


def _split_joint(weights: Weights, attentions: Iterable[str]) -> None:
    """The one matrix of queries, keys and values (3 D, D) of these modules becomes the two of our `Attention`."""
    for attn in attentions:
        for kind in ("weight", "bias"):
            joined = weights.get(f"{attn}.qkv.{kind}")
            if joined is not None and joined.ndim and len(joined) % 3 == 0:
                third = len(weights.pop(f"{attn}.qkv.{kind}")) // 3
                weights |= {f"{attn}.q.{kind}": joined[:third], f"{attn}.kv.{kind}": joined[third:]}


def _one_table(weights: Weights, table: str, output: str, model: str) -> None:
    """One word table for reading and writing, as our `model` has it: the output matrix, which may be left out."""
    read = weights.get(table)
    write = weights.setdefault(output, read) if read is not None else None
    if write is not read and not torch.equal(write, read):
        raise CheckpointError(
            f"its decoder reads and writes with two different word tables: our {model} has one for both, choose a "
            "checkpoint where they are tied"
        )


# --- ViT -------------------------------------------------------------------------------------------------------------

# A bare ViTModel lacks the prefix "vit.".
VIT_NAMES = ((r"^vit\.", ""), *TRUNK_NAMES, (r"^classifier\.", "head."))
# Parts of the official classes which are no part of the paper's fine-tuned classifier: the pooler is the tanh layer of
# the pre-training head, the mask token belongs to masked-patch pre-training.
VIT_UNUSED = (r"^(vit\.)?pooler\.", r"^(vit\.)?embeddings\.mask_token$")


@loader("vit")
def vit_from_hf(config: dict[str, Any], weights: Weights, num_classes: int | None) -> ViT:
    """The classes ViTForImageClassification and ViTModel -> our ViT. Without a head of its own it gets one of zeros."""
    options = trunk_options(config, image_size=224, patch_size=16)
    gelu = _gelu(config, "exact", "tanh")
    labels = _labels(config)
    weights = rename(weights, VIT_NAMES, drop=VIT_UNUSED)
    fresh_head = num_classes is not None or "head.weight" not in weights
    if num_classes is None:
        num_classes = len(labels) or 2  # num_labels 0: no head at all; fine-tuning chooses its own number
    model = build(ViT, ViTConfig, num_classes=num_classes, gelu=gelu, **options)
    weights = join_trunk(weights, config, width=model.config.width, depth=model.config.depth,
                         patches="embed.patch_embed")  # fmt: skip
    fill(model, weights, fresh=("head",) if fresh_head else ())
    model.labels = () if fresh_head else labels
    return model


# --- ViLT ------------------------------------------------------------------------------------------------------------

# A bare ViltModel lacks the prefix "vilt.". Older versions of transformers keep the bias of the MLM head's last layer
# as mlm_score.bias, or under both names.
VILT_NAMES = (
    (r"^vilt\.", ""),
    *TRUNK_NAMES,
    (r"^embed\.", "embed.image."),
    (r"^embeddings\.text_embeddings\.word_embeddings\.", "embed.text.word."),
    (r"^embeddings\.text_embeddings\.position_embeddings\.", "embed.text.position."),
    (r"^embeddings\.text_embeddings\.token_type_embeddings\.", "embed.text.segment."),
    (r"^embeddings\.text_embeddings\.LayerNorm\.", "embed.text.norm."),
    (r"^embeddings\.token_type_embeddings\.", "embed.types."),
    (r"^pooler\.dense\.", "pooler."),
    (r"^mlm_score\.transform\.dense\.", "mlm_head.dense."),
    (r"^mlm_score\.transform\.LayerNorm\.", "mlm_head.norm."),
    (r"^mlm_score\.(?:decoder\.)?(weight|bias)$", r"mlm_head.decoder.\1"),
    (r"^rank_output\.", "rank."),
    (r"^classifier\.(\d+)\.", r"answer_head.\1."),
)
VILT_UNUSED = (r"text_embeddings\.(position_ids|token_type_ids)$",)  # older versions save the numbers 0, 1, 2, ...


@loader("vilt")
def vilt_from_hf(config: dict[str, Any], weights: Weights, num_classes: int | None) -> ViLT:
    """ViltModel, ViltForMaskedLM, ViltForQuestionAnswering and ViltForImageAndTextRetrieval -> our ViLT.

    No official class has all of our heads. Those it lacks keep random starting values and stand in `model.fresh`:
    "itm_head", "mlm_head", and "answer_head" if `num_classes` asks for a new one. Without `num_classes` only a
    checkpoint for questions has an answer head, with the answers in `model.labels`.

    The retrieval head gives one score s, trained to rank the captions of a picture (paper, 4.3). It becomes our
    `itm_head` with the scores (0, s): the difference of the two is s, as with a trained `itm_head`. Only the order of
    pairs means something, softmax gives no honest probability of a match.

    The segment vector of BERT, the same for every token, is added to the text positions. An MLM head without an output
    matrix of its own shares the word table in transformers; ours gets a copy, so that training moves them apart.
    Patches are never sampled, whatever `max_image_length` says.
    """
    options = trunk_options(config, image_size=384, patch_size=32)
    _gelu(config, "exact")
    if (types := _whole(config, "modality_type_vocab_size", 2)) < 2:
        raise CheckpointError("modality_type_vocab_size is 1 where text and pictures need one each: choose another")
    weights = rename(weights, VILT_NAMES, drop=VILT_UNUSED)
    weights = join_trunk(weights, config, width=options["width"], depth=options["depth"],
                         patches="embed.image.patch_embed")  # fmt: skip
    if rank := {kind: weights.pop(f"rank.{kind}") for kind in ("weight", "bias") if f"rank.{kind}" in weights}:
        weights |= {f"itm_head.{k}": _join(f"itm_head.{k}", [torch.zeros_like(t), t]) for k, t in rank.items()}
    _fold_segment(weights)
    parts = {name.partition(".")[0] for name in weights}
    if "mlm_head" in parts and "embed.text.word.weight" in weights and config.get("tie_word_embeddings", True):
        weights.setdefault("mlm_head.decoder.weight", weights["embed.text.word.weight"])
    own_answers = num_classes is None and "answer_head" in parts
    if own_answers and _whole(config, "num_images", 1, lowest=-1) > 1:
        raise CheckpointError(
            "its classifier reads several pictures at once (NLVR2): load it with num_classes=... for a new one that "
            "reads one, or choose another checkpoint"
        )
    labels = _labels(config) if own_answers else ()
    model = build(
        ViLT, ViLTConfig, **options, text_eps=options["eps"], modality_types=types,
        vocab_size=_whole(config, "vocab_size", 30522), max_text=_whole(config, "max_position_embeddings", 40),
        answers=len(labels) if own_answers else num_classes or 0,
    )  # fmt: skip
    fresh = tuple(head for head in ("itm_head", "mlm_head") if head not in parts)
    fill(model, weights, fresh=(*fresh, "answer_head") if num_classes else fresh)
    model.labels = labels
    return model


def _fold_segment(weights: Weights) -> None:
    """Add the first segment vector to each text position: `TextEmbeddings` has none."""
    segment, position = weights.pop("embed.text.segment.weight", None), weights.get("embed.text.position.weight")
    if segment is None:
        raise CheckpointError(
            "it lacks BERT's segment vectors (text_embeddings.token_type_embeddings.weight): the file is incomplete, "
            "download it again"
        )
    if position is not None:
        if segment.ndim != 2 or position.ndim != 2 or segment.shape[1] != position.shape[1] or not len(segment):
            raise CheckpointError(
                f"its segment vectors {tuple(segment.shape)} and text positions {tuple(position.shape)} do not fit "
                "together: download it again"
            )
        weights["embed.text.position.weight"] = position.float() + segment[0].float()


# --- CLIP ------------------------------------------------------------------------------------------------------------

CLIP_NAMES = (
    (r"^visual_projection\.", "image_projection."),
    (r"^text_model\.embeddings\.token_embedding\.", "text.word."),
    (r"^text_model\.embeddings\.position_embedding\.", "text.position."),
    (r"^vision_model\.embeddings\.class_embedding$", "vision.cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "vision.pos_embed"),
    (r"^vision_model\.pre_layrnorm\.", "vision.norm_pre."),  # so spelled in every official file
    (r"^text_model\.final_layer_norm\.", "text.encoder.norm."),
    (r"^vision_model\.post_layernorm\.", "vision.encoder.norm."),
    (r"^(text|vision)_model\.encoder\.layers\.(\d+)\.", r"\1.encoder.blocks.\2."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
)
CLIP_UNUSED = (r"^(text|vision)_model\.embeddings\.position_ids$",)  # older versions save the numbers 0, 1, 2, ...
LEGACY_EOS = 2  # see clip_from_hf

# What a config.json that leaves something out means, which is CLIP B/32; only what `trunk_options` takes otherwise.
CLIP_DEFAULTS = {
    "text": dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, layer_norm_eps=1e-5,
                 hidden_act="quick_gelu"),
    "vision": dict(layer_norm_eps=1e-5, hidden_act="quick_gelu"),
}  # fmt: skip


@loader("clip")
def clip_from_hf(config: dict[str, Any], weights: Weights, num_classes: int | None) -> CLIP:
    """The class CLIPModel -> our CLIP, both towers, projections and temperature: nothing is fresh, nobody classifies.

    Our CLIP has one MLP ratio, one activation and one LayerNorm epsilon for both towers, so that the two must agree.

    The end-of-text token is `eos_token_id`, at its first place in the text. Old files say 2 there, whatever their
    vocabulary, and mean the largest id of a text, as OpenAI's code does; the end is the last one of the vocabulary.
    """
    if num_classes is not None:
        raise CheckpointError(
            "CLIP has no classifier: leave num_classes out, and compare pictures with the names of the classes"
        )
    parts = {tower: _tower(config, tower, CLIP_DEFAULTS) for tower in ("text", "vision")}
    text, vision = (trunk_options(part, image_size=224, patch_size=32) for part in parts.values())
    gelus = {tower: _gelu(part, "exact", "quick") for tower, part in parts.items()}
    for name, in_text, in_vision in (
        ("intermediate_size / hidden_size", text["mlp_ratio"], vision["mlp_ratio"]),
        ("layer_norm_eps", text["eps"], vision["eps"]),
        ("hidden_act", gelus["text"], gelus["vision"]),
    ):
        if in_text != in_vision:
            raise CheckpointError(
                f"{name} is {in_text} in its text tower and {in_vision} in its image tower: our CLIP has one for both, "
                "choose a checkpoint where they agree"
            )
    vocab_size = _whole(parts["text"], "vocab_size", 49_408)
    eot = _whole(parts["text"], "eos_token_id", 49_407, lowest=0)
    if eot == LEGACY_EOS:
        eot = vocab_size - 1
    if eot >= vocab_size:
        raise CheckpointError(
            f"eos_token_id {eot} is no id of its {vocab_size} tokens: write that of the end-of-text token into "
            "text_config of config.json"
        )
    model = build(
        CLIP, CLIPConfig, image_size=vision["image_size"], patch_size=vision["patch_size"],
        channels=vision["channels"], image_width=vision["width"], image_depth=vision["depth"],
        image_heads=vision["heads"], vocab_size=vocab_size,
        max_text=_whole(parts["text"], "max_position_embeddings", 77), text_width=text["width"],
        text_depth=text["depth"], text_heads=text["heads"], mlp_ratio=text["mlp_ratio"],
        embed_dim=_whole(config, "projection_dim", 512), eot_id=eot, gelu=gelus["text"], eps=text["eps"],
    )  # fmt: skip
    weights = rename(weights, CLIP_NAMES, drop=CLIP_UNUSED)
    _flatten_kernel(weights, "vision.patch_embed")
    for tower, depth in (("text", text["depth"]), ("vision", vision["depth"])):
        _join_keys_values(weights, (f"{tower}.encoder.blocks.{i}.attn" for i in range(depth)))
    for name, ahead in (("vision.cls_token", (None, None)), ("vision.pos_embed", None)):  # (D), (1+N, D)
        if name in weights:
            weights[name] = weights[name][ahead]  # (1, 1, D), (1, 1+N, D)
    fill(model, weights)
    model.labels = ()
    return model


def _tower(config: dict[str, Any], tower: str, defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part of config.json about one tower. Where an old CLIP has it twice, `..._config_dict` holds."""
    key = f"{tower}_config" if config.get(f"{tower}_config_dict") is None else f"{tower}_config_dict"
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise CheckpointError(f"{key} in config.json is no JSON object: download it again")
    return defaults[tower] | part


def clip_tokenizer(
    path_or_id: str | PathLike[str], *, max_length: int = 77, cache_dir: str | PathLike[str] | None = None
) -> Callable[[Sequence[str]], LongTensor]:
    """The tokenizer of a CLIP checkpoint: a function from a list of texts to ids (B, L) for `CLIP.encode_text`.

    `path_or_id` is a folder with tokenizer.json, or a Hub id as in `from_hf`. The texts are lower-cased and cut into
    pieces of words by byte-level BPE (paper, 2.4), put between the start and the end of a text, cut to `max_length` so
    that the end stays, and filled up to the longest of the batch with further ends. The official code first repairs
    damaged Unicode (ftfy) and HTML; this does not.

    Raises CheckpointError if the file is missing, damaged or of another kind of tokenizer, and ValueError if
    `max_length` leaves no room for words or what should be encoded is no list of texts.
    """
    if max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for words: use 3 or more")
    file = _find_folder(path_or_id, cache_dir, ["tokenizer.json"]) / "tokenizer.json"
    _read_json(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for every malformed file
        raise CheckpointError(f"{file} describes no tokenizer: download it again") from error
    tokenizer.no_padding()
    ends = [tokenizer.token_to_id(token) for token in CLIP_ENDS]
    if tokenizer.encode("").ids != ends:
        raise CheckpointError(f"{file} does not put texts between {' and '.join(CLIP_ENDS)}: take that of a CLIP")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=ends[1], pad_token=CLIP_ENDS[1])

    def encode(texts: Sequence[str]) -> LongTensor:
        if isinstance(texts, str) or not len(texts):
            raise ValueError("a CLIP tokenizer takes a list of texts, at least one: put a single text into a list")
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])

    return encode


# --- BLIP ------------------------------------------------------------------------------------------------------------

# The ViT of BLIP and BLIP-2, but for its last LayerNorm.
BLIP_VISION_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "vision.embed.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "vision.embed.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision.embed.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"vision.encoder.blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
)
# The layers of a text transformer bear the names of BERT, whose output layers are told apart by what stands before
# them; BLIP-2 says attention where BERT says self.
BERT_LAYER_NAMES = (
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross.norm."),
    (r"\.crossattention\.", ".cross.attention."),
    (r"\.attention\.(?:self|attention)\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".norm2."),
)
BLIP_NAMES = (
    *BLIP_VISION_NAMES,
    (r"^vision_model\.post_layernorm\.", "vision.encoder.norm."),
    (r"^text_encoder\.embeddings\.", "text.embed."),
    (r"^text_decoder\.bert\.embeddings\.", "text.decoder_embed."),
    (r"\.(word|position)_embeddings\.", r".\1."),
    (r"^(text\.(?:decoder_)?embed)\.LayerNorm\.", r"\1.norm."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.", r"text.encoder.\1."),
    (r"^text_decoder\.bert\.encoder\.layer\.(\d+)\.", r"text.decoder.\1."),
    *BERT_LAYER_NAMES,
    (r"^text_decoder\.cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^text_decoder\.cls\.predictions\.transform\.LayerNorm\.", "lm_head.norm."),
    (r"^text_decoder\.cls\.predictions\.(?:decoder\.)?(weight|bias)$", r"lm_head.decoder.\1"),
)
BLIP_UNUSED = (r"\.embeddings\.position_ids$",)  # older versions save the numbers 0, 1, 2, ...

# What a config.json that leaves something out means; only what `trunk_options` takes otherwise.
BLIP_DEFAULTS = {"text": dict(num_attention_heads=8), "vision": dict(layer_norm_eps=1e-5)}

# The parts of our BLIP that come from a text encoder, from a text decoder, and from heads that a file may lack.
BLIP_PARTS = ("text.embed", "text.encoder", "text.decoder", "text.decoder_embed", "vision_proj", "text_proj", "temp",
              "itm_head", "lm_head")  # fmt: skip


@loader("blip")
def blip_from_hf(config: dict[str, Any], weights: Weights, num_classes: int | None) -> BLIP:
    """BlipForConditionalGeneration, which writes, and BlipForImageTextRetrieval, which compares -> our BLIP.

    Beside the picture's encoder a file holds one half of the model: the decoder with its head, or the encoder with both
    projections and the matching head, 224M parameters each at the base size, of our 362M. What it lacks keeps random
    starting values and stands in `model.fresh`, the temperature always. Of what encoder and decoder once shared nothing
    is shared here, since fine-tuning moved one without the other. (A file of BlipForQuestionAnswering holds both.)

    The first token decides what the text transformer is asked. Ours puts `[ENC]` there to match and `[DEC]` to write,
    as in training; transformers' retrieval class takes the ids as they come, and so reads `[CLS]` where nobody has
    replaced it, which gives other scores. No config.json says the id of `[ENC]`: it is the one after `[DEC]`, which is
    `bos_token_id` there. A text ends with `sep_token_id`, whatever `eos_token_id` says.
    """
    if num_classes is not None:
        raise CheckpointError(
            "BLIP has no classifier: leave num_classes out, and match pictures with the names of the classes"
        )
    parts = {tower: _tower(config, tower, BLIP_DEFAULTS) for tower in ("text", "vision")}
    text, vision = (trunk_options(part, image_size=384, patch_size=16) for part in parts.values())
    for part in parts.values():
        _gelu(part, "exact")
    if text["mlp_ratio"] != vision["mlp_ratio"]:
        raise CheckpointError(
            f"intermediate_size / hidden_size is {text['mlp_ratio']} in its text tower and {vision['mlp_ratio']} in "
            "its image tower: our BLIP has one for both, choose a checkpoint where they agree"
        )
    vocab_size = _whole(parts["text"], "vocab_size", 30_524)
    pad, sep, dec = (_whole(parts["text"], f"{name}_token_id", default, lowest=0)
                     for name, default in (("pad", 0), ("sep", 102), ("bos", 30_522)))  # fmt: skip
    if max(pad, sep, dec + 1) >= vocab_size:
        raise CheckpointError(
            f"pad_token_id {pad}, sep_token_id {sep}, bos_token_id {dec} and the one after it are not all among its "
            f"{vocab_size} tokens: write the right ones into text_config of config.json"
        )
    weights = rename(weights, BLIP_NAMES, drop=BLIP_UNUSED)
    if not any(name.startswith(("text.encoder.", "text.decoder.")) for name in weights):
        raise CheckpointError(
            "it has neither BLIP's text encoder nor its decoder: take a checkpoint of BlipForConditionalGeneration or "
            "BlipForImageTextRetrieval"
        )
    model = build(
        BLIP, BLIPConfig, image_size=vision["image_size"], patch_size=vision["patch_size"],
        channels=vision["channels"], image_width=vision["width"], image_depth=vision["depth"],
        image_heads=vision["heads"], vocab_size=vocab_size,
        max_text=_whole(parts["text"], "max_position_embeddings", 512), text_width=text["width"],
        text_depth=text["depth"], text_heads=text["heads"], mlp_ratio=text["mlp_ratio"],
        embed_dim=_whole(config, "image_text_hidden_size", 256), dropout=text["dropout"], image_eps=vision["eps"],
        text_eps=text["eps"], pad_id=pad, sep_id=sep, enc_id=dec + 1, dec_id=dec, decoder_own=NOTHING_SHARED,
    )  # fmt: skip
    _flatten_kernel(weights, "vision.embed.patch_embed")
    _split_joint(weights, (f"vision.encoder.blocks.{i}.attn" for i in range(vision["depth"])))
    _join_keys_values(weights, (f"text.{half}.{i}.{attn}" for half in ("encoder", "decoder")
                                for i in range(text["depth"]) for attn in ("attn", "cross.attn")))  # fmt: skip
    _one_table(weights, "text.decoder_embed.word.weight", "lm_head.decoder.weight", "BLIP")
    fill(model, weights, fresh=tuple(p for p in BLIP_PARTS if not any(_inside(name, p) for name in weights)))
    model.labels = ()
    return model


# --- BLIP-2 ----------------------------------------------------------------------------------------------------------

# The language model's layers come first: theirs are called final_layer_norm too, as what follows all of them.
BLIP2_NAMES = (
    (r"^language_model\.model\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"mouth.blocks.\1.norm1."),
    (r"^language_model\.model\.decoder\.layers\.(\d+)\.final_layer_norm\.", r"mouth.blocks.\1.norm2."),
    (r"^language_model\.model\.decoder\.layers\.(\d+)\.(fc[12])\.", r"mouth.blocks.\1.mlp.\2."),
    (r"^language_model\.model\.decoder\.layers\.(\d+)\.", r"mouth.blocks.\1."),
    (r"^language_model\.model\.decoder\.embed_tokens\.", "mouth.word."),
    (r"^language_model\.model\.decoder\.embed_positions\.", "mouth.position."),
    (r"^language_model\.model\.decoder\.final_layer_norm\.", "mouth.norm."),
    (r"^language_model\.lm_head\.", "mouth.lm_head."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^(language|vision|text)_projection\.", r"\1_proj."),
    *BLIP_VISION_NAMES,
    (r"^vision\.", "eye.tower."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^query_tokens$", "qformer.query_tokens"),
    (r"^embeddings\.(word|position)_embeddings\.", r"qformer.embed.\1."),
    (r"^qformer\.layernorm\.", "qformer.embed.norm."),
    (r"^qformer\.encoder\.layer\.(\d+)\.", r"qformer.blocks.\1."),
    (r"\.intermediate_query\.dense\.", ".query_mlp.fc1."),
    (r"\.output_query\.dense\.", ".query_mlp.fc2."),
    (r"\.output_query\.LayerNorm\.", ".query_norm."),
    *BERT_LAYER_NAMES,
)
BLIP2_UNUSED = (r"^embeddings\.position_ids$",)

BERT_SEP = 102
OPT_OFFSET = 2  # the first rows of OPT's position table, which nothing is ever looked up in
# What a config.json that leaves something out means, which is ViT-g.
BLIP2_DEFAULTS = {
    "vision": dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16,
                   layer_norm_eps=1e-6),
    "qformer": dict(hidden_dropout_prob=0.1),
    "text": dict(model_type="opt"),
}  # fmt: skip


@loader("blip-2")
def blip2_from_hf(
    config: dict[str, Any], weights: Weights, num_classes: int | None, *, mouth: nn.Module | None = None
) -> BLIP2 | BLIP2Speaker:
    """Blip2ForImageTextRetrieval, which compares -> our BLIP2, stage 1; Blip2ForConditionalGeneration (or Blip2Model)
    with an OPT, which writes -> our BLIP2Speaker, stage 2, with a DecoderLM for a mouth.

    A file of stage 1 has no head to write with, since transformers' Q-Former cannot write. Ours reads and writes with
    one word table, which is the checkpoint's; what else the head has keeps its starting values and stands in
    `model.fresh`, and so does the temperature. Nor does config.json say the ids of [DEC] and [SEP]: the former is the
    last of the vocabulary, to which training added it, the latter BERT's, 102. The vectors and the scores of matches
    are the official ones; `lm_head` says nothing before it is trained.

    In stage 2 nothing is fresh. The Q-Former has no words left, so that the ids in `model.config` are the mouth's: of
    OPT `dec_id` is `bos_token_id` and `sep_id` is `eos_token_id` (a new line, in the official files). transformers
    wants `image_token_index` once for each query at the beginning of the ids; here the prefix comes without.

    A language model that is no OPT, such as the T5 of "Salesforce/blip2-flan-t5-xl", has no class here. Load it with
    transformers and give it as `mouth`, in a module with what `BLIP2Speaker` asks of one: `config.width`, `write`,
    `speaker` and `lm_head`. Whatever is given, the file's own language model is left out.

    The image encoder counts the blocks that are used, so that the eye skips none. Its MLPs need not be a whole multiple
    of the width: those of ViT-g are 6144 wide, at 1408.
    """
    if num_classes is not None:
        raise CheckpointError(
            "BLIP-2 has no classifier: leave num_classes out, and match pictures with the names of the classes"
        )
    weights = rename(weights, BLIP2_NAMES, drop=BLIP2_UNUSED)
    has = {name.partition(".")[0] for name in weights}
    speaks, compares = bool(has & {"mouth", "language_model", "language_proj"}), bool(has & {"itm_head", "text_proj"})
    if speaks == compares:
        raise CheckpointError(
            f"it has {'both' if speaks else 'neither'} stage 1's heads {'and' if speaks else 'nor'} stage 2's language "
            "model: take a checkpoint of Blip2ForImageTextRetrieval or Blip2ForConditionalGeneration"
        )
    vision, asker, text = (_tower(config, name, BLIP2_DEFAULTS) for name in ("vision", "qformer", "text"))
    eye, image = _eye(vision)
    options = trunk_options(asker, image_size=224, patch_size=14)
    _gelu(asker, "exact")
    if compares:
        if mouth is not None:
            raise CheckpointError("it compares and does not write: leave mouth out")
        words = _bert_words(asker)
    else:
        own_mouth = mouth is None
        mouth = _opt(text) if own_mouth else mouth
        words = {key: getattr(mouth.config, key) for key in ("vocab_size", "max_text", "pad_id", "sep_id", "dec_id")
                 if hasattr(mouth.config, key)}  # fmt: skip
    model = build(
        partial(BLIP2, eye=eye), QFormerConfig, image_width=image["width"], image_eps=image["eps"],
        queries=_whole(config, "num_query_tokens", 32), width=options["width"], depth=options["depth"],
        heads=options["heads"], mlp_ratio=options["mlp_ratio"],
        cross_every=_whole(asker, "cross_attention_frequency", 2),
        embed_dim=_whole(config, "image_text_hidden_size", 256), dropout=options["dropout"], eps=options["eps"],
        **words,
    )  # fmt: skip
    _flatten_kernel(weights, "eye.tower.embed.patch_embed")
    looks = [f"eye.tower.encoder.blocks.{i}.attn" for i in range(image["depth"])]
    if not vision.get("qkv_bias", True):
        weights |= {f"{attn}.qkv.bias": torch.zeros(3 * image["width"]) for attn in looks}
    _split_joint(weights, looks)
    _join_keys_values(weights, (f"qformer.blocks.{i}.{attn}" for i in range(options["depth"])
                                for attn in ("attn", "cross.attn")))  # fmt: skip
    if compares:
        _one_table(weights, "qformer.embed.word.weight", "lm_head.decoder.weight", "BLIP-2")
        fill(model, weights, fresh=("temp", "lm_head.dense", "lm_head.norm", "lm_head.decoder.bias"))
    else:
        model = BLIP2Speaker(model, mouth)
        if own_mouth:
            _join_keys_values(weights, (f"mouth.blocks.{i}.attn" for i in range(mouth.config.depth)))
            _one_table(weights, "mouth.word.weight", "mouth.lm_head.weight", "OPT")
            positions = weights.get("mouth.position.weight")
            if positions is not None and positions.ndim:
                weights["mouth.position.weight"] = positions[OPT_OFFSET:]
        else:
            weights = {name: t for name, t in weights.items() if not name.startswith(("mouth.", "language_model."))}
            weights |= {f"mouth.{name}": t for name, t in mouth.state_dict().items()}
            projection = weights.get("language_proj.weight")
            if projection is not None and len(projection) != mouth.config.width:
                raise CheckpointError(
                    f"the mouth reads vectors of {mouth.config.width} numbers, and its projection gives "
                    f"{len(projection)}: give the language model that the checkpoint was trained with"
                )
        fill(model, weights)
    model.labels = ()
    return model


def _eye(config: dict[str, Any]) -> tuple[Eye, dict[str, Any]]:
    """The frozen image encoder of a vision_config, with its `trunk_options`."""
    _gelu(config, "exact")
    width, hidden = (_whole(config, f"{key}_size", 0) for key in ("hidden", "intermediate"))
    options = trunk_options(config | dict(intermediate_size=width), image_size=224, patch_size=14)
    tower = build(ImageEncoder, ViTConfig, **options)
    for block in tower.encoder.blocks:  # of any width, where our MLP has a whole ratio
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return Eye(tower, skip=0), options


def _bert_words(config: dict[str, Any]) -> dict[str, int]:
    """What a qformer_config says of the words that the Q-Former reads in stage 1."""
    if not config.get("use_qformer_text_input"):
        raise CheckpointError(
            "use_qformer_text_input is false in its qformer_config, so that its Q-Former has no MLPs for words: take a "
            "checkpoint where it is true"
        )
    vocab_size = _whole(config, "vocab_size", 30_522)
    pad = _whole(config, "pad_token_id", 0, lowest=0)
    if max(pad, BERT_SEP) >= vocab_size:
        raise CheckpointError(
            f"pad_token_id {pad} and BERT's [SEP], {BERT_SEP}, are not both among its {vocab_size} tokens: choose a "
            "checkpoint with the vocabulary of BERT"
        )
    return dict(vocab_size=vocab_size, max_text=_whole(config, "max_position_embeddings", 512), pad_id=pad,
                sep_id=BERT_SEP, dec_id=vocab_size - 1)  # fmt: skip


def _opt(config: dict[str, Any]) -> DecoderLM:
    """An empty mouth for the OPT of a text_config. Raises CheckpointError if it is none, or one of another plan."""
    if (kind := config["model_type"]) != "opt":
        raise CheckpointError(
            f"its language model is of type {kind!r} where we have a place for an OPT: load that part with "
            "transformers, and give it to from_hf as mouth=..."
        )
    width, hidden = _whole(config, "hidden_size", 768), _whole(config, "ffn_dim", 3072)
    plan = dict(activation_function="relu", do_layer_norm_before=True, _remove_final_layer_norm=False,
                enable_bias=True, layer_norm_elementwise_affine=True, word_embed_proj_dim=width)  # fmt: skip
    for key, value in plan.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(
                f"its OPT has {key} {config[key]!r} where ours has {value!r}: choose a checkpoint with another OPT"
            )
    if hidden % width:
        raise CheckpointError(
            f"ffn_dim {hidden} is no whole multiple of hidden_size {width}: use a checkpoint where it is"
        )
    vocab_size = _whole(config, "vocab_size", 50_272)
    pad, sep, dec = (_whole(config, f"{key}_token_id", default, lowest=0)
                     for key, default in (("pad", 1), ("eos", 2), ("bos", 2)))  # fmt: skip
    if max(pad, sep, dec) >= vocab_size:
        raise CheckpointError(
            f"pad_token_id {pad}, eos_token_id {sep} and bos_token_id {dec} are not all among its {vocab_size} tokens: "
            "write the right ones into text_config of config.json"
        )
    return build(
        DecoderLM, LMConfig, vocab_size=vocab_size, max_text=_whole(config, "max_position_embeddings", 2048),
        width=width, depth=_whole(config, "num_hidden_layers", 12), heads=_whole(config, "num_attention_heads", 12),
        mlp_ratio=hidden // width, dropout=_number(config, "dropout", 0.1), pad_id=pad, sep_id=sep, dec_id=dec,
    )  # fmt: skip


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
        if name in renamed and not torch.equal(renamed[name], tensor):
            raise CheckpointError(
                f"it holds {name!r} twice, under two names and with different numbers: save it again in one format"
            )
        renamed[name] = tensor
    return renamed


def build(model_class: type[nn.Module], config_class: type, **options: Any) -> Any:
    """`model_class(config_class(**options))`, with an impossible option told as a fault of the checkpoint."""
    try:
        return model_class(config_class(**options))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json asks for an impossible model ({error}): download it again") from error


def fill(model: nn.Module, weights: Weights, *, fresh: tuple[str, ...] = ()) -> None:
    """Copy `weights` into `model`; raises CheckpointError unless names and shapes agree exactly.

    The parts named in `fresh` stay as they are, whatever `weights` says of them, and are noted as `model.fresh`.
    """
    own = model.state_dict()
    weights = weights | {name: own[name] for name in own if any(_inside(name, part) for part in fresh)}
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
    model.fresh = fresh


def _inside(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part of the model, such as "head" or "text.decoder"."""
    return f"{name}.".startswith(f"{part}.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _join(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors in one."""
    if any(tensor.ndim == 0 or tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CheckpointError(f"the parts of {name} have shapes {shapes}, which do not fit together: download it again")
    return torch.cat(list(tensors))


def _gelu(config: dict[str, Any], *kinds: str) -> str:
    act, known = config.get("hidden_act", "gelu"), [name for name, kind in GELU_NAMES.items() if kind in kinds]
    if act not in known:
        raise CheckpointError(f"hidden_act is {act!r}: this model knows {', '.join(map(repr, known))} only")
    return GELU_NAMES[act]


def _whole(config: dict[str, Any], key: str, default: int, *, lowest: int = 1) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise CheckpointError(
            f"config.json says {key}={value!r} where a whole number >= {lowest} belongs: download it again"
        )
    return value


def _number(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise CheckpointError(f"config.json says {key}={value!r} where a number >= 0 belongs: download it again")
    return float(value)


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


def _find_folder(
    path_or_id: str | PathLike[str], cache_dir: str | PathLike[str] | None, files: Sequence[str] = HUB_FILES
) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it together with its config.json")
    if not isinstance(path_or_id, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_id):
        raise CheckpointError(f"there is no folder {folder}: check the path, or give a Hub id such as 'owner/name'")
    from huggingface_hub import snapshot_download  # imported late: reading a folder needs no network library

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=list(files), cache_dir=cache_dir))
    except Exception as error:  # its errors share no base class across versions
        raise CheckpointError(
            f"cannot download {path_or_id!r} from the Hugging Face Hub ({type(error).__name__}): check the name and "
            f"the network, or give the path of a folder that already holds {' and '.join(files[:2])}"
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
