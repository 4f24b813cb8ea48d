"""Our training step beside other people's: `python -m minivlp.bench`, on the CPU in float32.

Every contender of a row gets the same weights, the same batch and the same optimiser, and must first give the same
numbers. They then take turns, each round in another order, so that a slow moment of the machine hits all of them;
times are medians over the rounds, and ratios are medians of the ratios within one round. Where a contender does fewer
operations for the same numbers, its name says so. On a machine with other work, `--cpu-time` gives steadier numbers.

A later lesson adds a `Row` to `ROWS`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.generate import greedy
from minivlp.layers import Block, Encoder, init_normal, take_rows
from minivlp.losses import IGNORE, contrastive_loss, next_words, word_positions
from minivlp.models.albef import ALBEF, ALBEFConfig, FusionBlock, ImageEncoder, MomentumALBEF, PairQueue, TextEncoder
from minivlp.models.blip import BLIP, MED, BLIPConfig, Past, led_by, teacher_of
from minivlp.models.blip2 import BLIP2, BLIP2Speaker, Eye, QFormerConfig, grounded_mask, joint_mask
from minivlp.models.clip import CLIP, CLIPConfig, causal_mask
from minivlp.models.dual_stream import key_mask
from minivlp.models.flip import FLIP, FLIPConfig, FLIPVision, random_masking
from minivlp.models.lm import DecoderLM, LMConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.models.vit import ViT, ViTConfig
from minivlp.models.vlmo import MoMEBlock, Route, VLMo, VLMoConfig, shares
from minivlp.pretrained import TRUNK_NAMES, blip_from_hf, from_hf, join_trunk, rename

Batch = tuple[Tensor, ...]
Outputs = Tensor | tuple[Tensor, ...]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One implementation: `outputs(batch)` is a tensor, or several, that all contenders of a row must agree on."""

    name: str
    model: nn.Module
    outputs: Callable[[Batch], Outputs]


@dataclass(frozen=True)
class Row:
    """One comparison. The first contender is the one that the others' times are divided by."""

    name: str  # what --rows selects by
    title: str
    contenders: Callable[[], list[Contender]]
    batch: Callable[[], Batch]
    loss: Callable[[Any, Batch], Tensor] | None  # (outputs, batch) -> scalar; None: forward alone, without gradients
    update: bool = True  # whether AdamW's part of the step is timed too
    note: str = ""  # printed below the table: where a lead comes from
    unit: str = "pictures"  # what is counted a second,
    each: int = 1  # and how many of it an entry of the batch is


# --- ViT -------------------------------------------------------------------------------------------------------------


class TorchViT(nn.Module):
    """The same ViT from torch's own parts, as one would put it together with `nn.TransformerEncoder`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = config
        self.patch_embed = nn.Conv2d(c.channels, c.width, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.tokens, c.width))
        layer = nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp_ratio * c.width, dropout=0.0, activation="gelu", layer_norm_eps=c.eps,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        norm = nn.LayerNorm(c.width, eps=c.eps)
        self.encoder = nn.TransformerEncoder(layer, c.depth, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(c.width, c.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.encoder(x)[:, 0])

    @torch.no_grad()
    def copy_from(self, ours: ViT) -> TorchViT:
        self.patch_embed.weight.copy_(ours.embed.patch_embed.proj.weight.view_as(self.patch_embed.weight))
        self.patch_embed.bias.copy_(ours.embed.patch_embed.proj.bias)
        self.cls_token.copy_(ours.embed.cls_token)
        self.pos_embed.copy_(ours.embed.pos_embed)
        copy_encoder(self.encoder, ours.encoder)
        self.head.load_state_dict(ours.head.state_dict())
        return self


@torch.no_grad()
def copy_encoder(theirs: nn.TransformerEncoder, ours: Encoder) -> None:
    """Give torch's encoder, built at the same sizes with `norm_first`, the weights of ours."""
    for layer, block in zip(theirs.layers, ours.blocks, strict=True):
        layer.self_attn.in_proj_weight.copy_(torch.cat([block.attn.q.weight, block.attn.kv.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([block.attn.q.bias, block.attn.kv.bias]))
        layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        layer.linear1.load_state_dict(block.mlp.fc1.state_dict())
        layer.linear2.load_state_dict(block.mlp.fc2.state_dict())
        layer.norm1.load_state_dict(block.norm1.state_dict())
        layer.norm2.load_state_dict(block.norm2.state_dict())
    theirs.norm.load_state_dict(ours.norm.state_dict())


def every_token(model: ViT, images: Tensor) -> Tensor:
    """Class scores with all tokens computed in the last block too, as the peers do, although only one is read."""
    tokens, _ = model.encoder(model.embed(images))
    return model.head(model.hidden(tokens[:, 0]))


def vit_contenders(config: ViTConfig) -> list[Contender]:
    """Ours twice, transformers' (if installed) and torch's, all with the weights of the first."""
    theirs = None
    if transformers_installed():
        theirs, ours = transformers_pair(config)
    else:
        ours = ViT(config)
        nn.init.normal_(ours.head.weight, std=0.02)  # a zero head would agree with everything
    short = ViT(ours.config)
    short.load_state_dict(ours.state_dict())
    peer = TorchViT(ours.config).copy_from(ours)
    contenders = [
        Contender("minivlp ViT, every token", ours, lambda batch: every_token(ours, batch[0])),
        Contender("minivlp ViT, last block for the class token alone", short, lambda batch: short(batch[0])[0]),
        Contender("torch.nn.TransformerEncoder", peer, lambda batch: peer(batch[0])),
    ]
    if theirs is not None:
        name = "transformers ViTForImageClassification, sdpa"
        contenders.append(Contender(name, theirs, lambda batch: theirs(batch[0]).logits))
    return contenders


def transformers_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def open_clip_installed() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def transformers_pair(config: ViTConfig) -> tuple[nn.Module, ViT]:
    """The official class at the sizes of `config` with random weights, and our model loaded from what it saves."""
    import transformers  # this file alone knows it, and only if it is there

    official = transformers.ViTConfig(
        image_size=config.image_size, patch_size=config.patch_size, num_channels=config.channels,
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp_ratio * config.width, num_labels=config.num_classes, layer_norm_eps=config.eps,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(official)
    return theirs, as_ours(theirs)


def as_ours(theirs: nn.Module) -> Any:
    """Our model with the weights of an official one, by way of the files that it saves."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return from_hf(folder)


def vit_row(patch_size: int, *, training: bool, batch_size: int = 64) -> Row:
    """The course's own ViT (width 128, depth 4) on pictures of 64 pixels."""
    config = ViTConfig(patch_size=patch_size)

    def batch() -> Batch:
        generator = torch.Generator().manual_seed(0)
        side, K = config.image_size, config.num_classes
        images = torch.rand(batch_size, config.channels, side, side, generator=generator) * 2 - 1
        return images, torch.randint(K, (batch_size,), generator=generator)

    step = "training step (forward, backward, AdamW)" if training else "forward in eval mode"
    return Row(
        name=f"vit-p{patch_size}-{'train' if training else 'eval'}",
        title=f"ViT, {step}: {config.image_size} px, patch {patch_size}, width {config.width}, depth {config.depth}, "
        f"batch {batch_size}",
        contenders=lambda: vit_contenders(config),
        batch=batch,
        loss=(lambda logits, batch: F.cross_entropy(logits, batch[1])) if training else None,
    )


# --- ViLT ------------------------------------------------------------------------------------------------------------

# (images, ids, mask, rows) -> pooled output (B, D) and at least the first `rows` text states
ReadPair = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def pair_scores(read: ReadPair, word_head: nn.Module, match_head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two passes of a pre-training step: scores of the M hidden words (M, V), and of the pairs matching (B, 2)."""
    images, hidden_ids, labels, other_images, ids, mask, _ = batch
    L = ids.shape[1]
    _, text = read(images, hidden_ids, mask, L)
    pooled, _ = read(other_images, ids, mask, 1)
    return word_head(text[labels != IGNORE]), match_head(pooled)


def pair_loss(scores: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """Masked words plus matching, each cross-entropy (ViLT, 3.2, without the alignment term)."""
    labels, match = batch[2], batch[6]
    return F.cross_entropy(scores[0], labels[labels != IGNORE]) + F.cross_entropy(scores[1], match)


def vilt_contenders(config: ViLTConfig) -> list[Contender]:
    """Ours twice and transformers' (if installed), all with the weights of the first.

    The outputs compared are scores of words and of pairs. They come from text states and pooled output; the official
    class shuffles its patches, so that its image states have another order at each call.
    """
    theirs = None
    if transformers_installed():
        theirs, ours = transformers_vilt_pair(config)
    else:
        ours = ViLT(config)
    short = ViLT(ours.config)
    short.load_state_dict(ours.state_dict())

    def reader(model: ViLT, *, every: bool) -> ReadPair:
        def read(images: Tensor, ids: Tensor, mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
            pooled, named = model(images, ids, mask, rows=None if every else rows)
            return pooled, named["text"]

        return read

    def read_theirs(images: Tensor, ids: Tensor, mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        out = theirs.vilt(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
        return out.pooler_output, out.last_hidden_state[:, : ids.shape[1]]

    def contender(name: str, model: Any, read: ReadPair, word_head: nn.Module) -> Contender:
        return Contender(name, model, lambda batch: pair_scores(read, word_head, model.itm_head, batch))

    contenders = [
        contender("minivlp ViLT, every token", ours, reader(ours, every=True), ours.mlm_head),
        contender("minivlp ViLT, rows=: last block only for what is read", short, reader(short, every=False),
                  short.mlm_head),
    ]  # fmt: skip
    if theirs is not None:
        name = "transformers ViltModel with the same heads, eager (it has no sdpa)"
        contenders.append(contender(name, theirs, read_theirs, theirs.mlm_score))
    return contenders


def transformers_vilt_pair(config: ViLTConfig) -> tuple[nn.Module, ViLT]:
    """The official body and MLM head with random weights plus a matching head, and our model with the same weights.

    Both train the same numbers: the official segment vectors, which ours keeps in the position table, stay at zero, and
    the MLM head's output matrix is not tied to the word table.
    """
    import transformers

    official = transformers.ViltConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.max_text, image_size=config.image_size,
        patch_size=config.patch_size, num_channels=config.channels, hidden_size=config.width,
        num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp_ratio * config.width, layer_norm_eps=config.eps,
    )  # fmt: skip
    theirs = transformers.ViltForMaskedLM(official)
    embeddings = theirs.vilt.embeddings
    for zeros in (embeddings.cls_token, embeddings.position_embeddings):  # zeros would agree with everything
        nn.init.normal_(zeros, std=0.02)
    nn.init.zeros_(embeddings.text_embeddings.token_type_embeddings.weight).requires_grad_(False)
    ours = as_ours(theirs)
    theirs.mlm_score.decoder.weight = nn.Parameter(theirs.mlm_score.decoder.weight.detach().clone())
    theirs.itm_head = nn.Linear(config.width, 2)
    theirs.itm_head.load_state_dict(ours.itm_head.state_dict())
    return theirs, ours


def random_pairs(
    config: ViLTConfig | CLIPConfig | ALBEFConfig | VLMoConfig | BLIPConfig, *, batch_size: int, longest: int,
    generator: torch.Generator,
) -> Batch:  # fmt: skip
    """Random pictures and texts of 8 to `longest` tokens: images (B, C, H, W), ids and mask (B, L)."""
    side, first = config.image_size, 7  # the course's tokenizer: words begin at 7
    images = torch.rand(batch_size, config.channels, side, side, generator=generator) * 2 - 1
    lengths = torch.randint(8, longest + 1, (batch_size,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    return images, torch.randint(first, config.vocab_size, (batch_size, longest), generator=generator) * mask, mask


def pair_batch(config: ViLTConfig, *, batch_size: int, longest: int) -> Batch:
    """Random pictures and texts of 8 to `longest` tokens: B `images` (B, C, H, W) and their `hidden_ids` (B, L) with
    `labels` (B, L) for the MLM pass, then `other_images`, half of them swapped, `ids`, `mask` and `match` (B)."""
    generator = torch.Generator().manual_seed(0)
    mask_id = 4  # [MASK] of the course's tokenizer
    images, ids, mask = random_pairs(config, batch_size=batch_size, longest=longest, generator=generator)
    asked = word_positions(mask) & (torch.rand(ids.shape, generator=generator) < 0.15)
    match = torch.randperm(batch_size, generator=generator) % 2
    other_images = torch.where(match[:, None, None, None] == 1, images, images.roll(1, dims=0))
    return images, ids.masked_fill(asked, mask_id), ids.masked_fill(~asked, IGNORE), other_images, ids, mask, match


def vilt_row(*, batch_size: int = 64, longest: int = 14) -> Row:
    """The course's own ViLT (width 128, depth 4) on pictures of 64 pixels with short texts, some padded."""
    config = ViLTConfig()
    return Row(
        name="vilt-train",
        title="ViLT, training step (MLM pass, ITM pass, backward, AdamW): "
        f"{config.image_size} px, patch {config.patch_size}, texts of 8 to {longest} tokens, width {config.width}, "
        f"depth {config.depth}, batch {batch_size}",
        contenders=lambda: vilt_contenders(config),
        batch=lambda: pair_batch(config, batch_size=batch_size, longest=longest),
        loss=pair_loss,
    )


# --- CLIP ------------------------------------------------------------------------------------------------------------


def every_token_of_both(model: CLIP, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `clip_outputs` says, with all tokens computed in the last blocks too, although each tower reads one."""
    vision, text = model.vision, model.text
    patches = vision.patch_embed(images)
    x = torch.cat([vision.cls_token.expand(len(images), -1, -1), patches], dim=1) + vision.pos_embed
    states, _ = vision.encoder(vision.norm_pre(x))
    image = F.normalize(model.image_projection(states[:, 0]), dim=-1)
    L = ids.shape[1]
    states, _ = text.encoder(text.word(ids) + text.position.weight[:L], mask=causal_mask(L))
    ends = (ids == model.config.eot_id).int().argmax(dim=1)
    words = F.normalize(model.text_projection(take_rows(states, ends)[:, 0]), dim=-1)
    return model.logit_scale.exp() * image @ words.T, image, words


def clip_outputs(model: CLIP, images: Tensor, ids: Tensor, **options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What all contenders must agree on: logits (B, B), and of pictures and texts the vectors of length 1, (B, E)."""
    logits, named = model(images, ids, **options)
    return logits, named["image"], named["text"]


def clip_contenders(config: CLIPConfig) -> list[Contender]:
    """Ours twice, transformers' and open_clip's (if installed), all with the weights of the first."""
    theirs = None
    if transformers_installed():
        theirs, ours = transformers_clip_pair(config)
    else:
        ours = CLIP(config)
    short = CLIP(ours.config)
    short.load_state_dict(ours.state_dict())
    contenders = [
        Contender("minivlp CLIP, every token", ours, lambda batch: every_token_of_both(ours, *batch)),
        Contender("minivlp CLIP, last blocks for the pooled tokens alone", short,
                  lambda batch: clip_outputs(short, *batch)),
    ]  # fmt: skip
    if theirs is not None:

        def read_theirs(batch: Batch) -> tuple[Tensor, ...]:
            out = theirs(pixel_values=batch[0], input_ids=batch[1])
            return out.logits_per_image, out.image_embeds, out.text_embeds

        contenders.append(Contender("transformers CLIPModel, sdpa", theirs, read_theirs))
    if open_clip_installed():
        peer = open_clip_from(ours)

        def read_peer(batch: Batch) -> tuple[Tensor, ...]:
            image, text, scale = peer(*batch)
            return scale * image @ text.T, image, text

        contenders.append(Contender("open_clip CLIP", peer, read_peer))
    return contenders


def transformers_clip_pair(config: CLIPConfig) -> tuple[nn.Module, CLIP]:
    """The official class at the sizes of `config` with random weights, and our model loaded from what it saves."""
    import transformers

    both = dict(hidden_act={"quick": "quick_gelu", "exact": "gelu"}[config.gelu], layer_norm_eps=config.eps)
    text = dict(
        vocab_size=config.vocab_size, max_position_embeddings=config.max_text, hidden_size=config.text_width,
        num_hidden_layers=config.text_depth, num_attention_heads=config.text_heads,
        intermediate_size=config.mlp_ratio * config.text_width, eos_token_id=config.eot_id, bos_token_id=None,
    )  # fmt: skip
    vision = dict(
        image_size=config.image_size, patch_size=config.patch_size, num_channels=config.channels,
        hidden_size=config.image_width, num_hidden_layers=config.image_depth, num_attention_heads=config.image_heads,
        intermediate_size=config.mlp_ratio * config.image_width,
    )  # fmt: skip
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text | both, vision_config=vision | both, projection_dim=config.embed_dim,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    return theirs, as_ours(theirs)


# Our name -> that of open_clip and of OpenAI's code.
OPEN_CLIP_NAMES = (
    (r"^text\.encoder\.norm\.", "ln_final."),
    (r"^text\.word\.", "token_embedding."),
    (r"^text\.position\.weight$", "positional_embedding"),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^image_projection\.weight$", "visual.proj"),
    (r"^vision\.cls_token$", "visual.class_embedding"),
    (r"^vision\.pos_embed$", "visual.positional_embedding"),
    (r"^vision\.patch_embed\.proj\.", "visual.conv1."),
    (r"^vision\.norm_pre\.", "visual.ln_pre."),
    (r"^vision\.encoder\.norm\.", "visual.ln_post."),
    (r"^text\.encoder\.blocks\.", "transformer.resblocks."),
    (r"^vision\.encoder\.blocks\.", "visual.transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def open_clip_from(ours: CLIP, *, ratio: float = 0.0) -> nn.Module:
    """The class of open_clip (3.3 was tried) at the sizes of our CLIP or FLIP and with its weights.

    A FLIP has its own kind of patches there (open_clip's have no bias) and its fixed positions, as open_clip computes
    them; in training mode it drops `ratio` of the patches. With pool="mean" open_clip's picture is not pooled: all
    final states, each projected. It knows no padding: texts must fill `max_text`.
    """
    from open_clip.model import CLIP as OpenCLIP  # this file alone knows it, and only if it is there
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    c = ours.config
    flip = isinstance(c, FLIPConfig)
    vision = dict(
        layers=c.image_depth, width=c.image_width, head_width=c.image_width // c.image_heads, mlp_ratio=c.mlp_ratio,
        patch_size=c.patch_size, image_size=c.image_size,
    )  # fmt: skip
    text = dict(
        context_length=c.max_text, vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads,
        layers=c.text_depth, mlp_ratio=c.mlp_ratio, pool_type="eos", eos_id=c.eot_id,
    )  # fmt: skip
    if flip:
        pool = {"mean": "none", "patches": "avg", "cls": "tok"}[c.pool]
        positions = {"sincos": "sin_cos_2d", "learned": "learnable"}[c.position]
        vision |= dict(no_ln_pre=True, pos_embed_type=positions, pool_type=pool, patch_dropout=ratio)
        text |= dict(no_causal_mask=True, pool_type="first")
    both = dict(norm_kwargs=dict(eps=c.eps), act_kwargs=dict(approximate="tanh") if c.gelu == "tanh" else None)
    theirs = OpenCLIP(
        c.embed_dim, CLIPVisionCfg(**vision, **both), CLIPTextCfg(**text, **both), quick_gelu=c.gelu == "quick"
    )
    weights = rename(ours.state_dict(), OPEN_CLIP_NAMES)
    for name in [name for name in weights if ".attn.q." in name]:
        joined = name.replace(".attn.q.", ".attn.in_proj_")
        weights[joined] = torch.cat([weights.pop(name), weights.pop(name.replace(".attn.q.", ".attn.kv."))])
    for name in ("text_projection", "visual.proj"):
        weights[name] = weights[name].T
    if flip:
        table = theirs.visual.positional_embedding.detach()  # the first row is the class token's
        if c.position == "learned":
            table = torch.cat([torch.zeros_like(table[:1]), weights["visual.positional_embedding"]])
        weights["visual.positional_embedding"] = table
        theirs.visual.conv1 = nn.Conv2d(c.channels, c.image_width, c.patch_size, c.patch_size)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in weights.items()})
    return theirs


def caption_batch(config: CLIPConfig, *, batch_size: int, longest: int) -> Batch:
    """Random `images` (B, C, H, W) and texts of 8 to `longest` tokens, `ids` (B, L), each closed by the end token."""
    generator = torch.Generator().manual_seed(0)
    images, ids, mask = random_pairs(config, batch_size=batch_size, longest=longest, generator=generator)
    return images, ids.scatter(1, mask.sum(1, keepdim=True) - 1, config.eot_id)


def clip_row(*, batch_size: int = 64, longest: int = 14) -> Row:
    """The course's own CLIP (both towers of width 128, depth 4) on pictures of 64 pixels with short texts."""
    config = CLIPConfig(max_text=longest)  # open_clip reads texts of the full length only
    return Row(
        name="clip-train",
        title="CLIP, training step (both towers, contrastive loss, backward, AdamW): "
        f"{config.image_size} px, patch {config.patch_size}, texts of 8 to {longest} tokens, "
        f"width {config.image_width}, depth {config.image_depth}, batch {batch_size}",
        contenders=lambda: clip_contenders(config),
        batch=lambda: caption_batch(config, batch_size=batch_size, longest=longest),
        loss=lambda outputs, batch: contrastive_loss(outputs[0]),
    )


# --- FLIP ------------------------------------------------------------------------------------------------------------

NOISE_SEED = 0


class EmbedAll(FLIPVision):
    """The textbook order: every patch becomes a token with a position, then most of them are thrown away."""

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = super().embed(images)
        if keep is None:
            return x
        return torch.cat([x[:, :1], x[:, 1:].take_along_dim(keep[..., None], dim=1)], dim=1)


class MaskedKeys(FLIPVision):
    """Looks like FLIP and saves nothing: all tokens are computed, and nobody may look at those that are left out."""

    def forward(self, images: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.embed(images)  # (B, 1+N, D)
        seen = torch.zeros(len(x), x.shape[1] - 1, dtype=torch.bool).scatter(1, keep, True)
        seen = F.pad(seen, (1, 0), value=True)  # (B, 1+N), the class token always
        states, _ = self.encoder(x, mask=seen[:, None, None, :])
        return (states * seen[..., None]).sum(1) / seen.sum(1, keepdim=True), {}


class MAETower(nn.Module):
    """transformers' encoder of MAE in the place of a `FLIPVision`. It takes the noise and chooses by itself."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.mae = theirs

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mae(images, noise=noise).last_hidden_state.mean(dim=1), {}


class OpenCLIPTower(nn.Module):
    """open_clip's image tower with its own PatchDropout in the place of a `FLIPVision`.

    It draws numbers where others are given theirs: those of `flip_batch`, as long as both start from `NOISE_SEED`.
    """

    def __init__(self, ours: FLIP, ratio: float) -> None:
        super().__init__()
        self.visual = open_clip_from(ours, ratio=ratio).visual
        self.visual.proj = None  # so that the final states come out

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        torch.default_generator.manual_seed(NOISE_SEED)
        return self.visual(images).mean(dim=1), {}


def transformers_mae(config: FLIPConfig, ratio: float) -> nn.Module:
    """The official encoder of MAE at the sizes of `config` with random weights, which leaves out `ratio`."""
    import transformers

    c = config
    official = transformers.ViTMAEConfig(
        image_size=c.image_size, patch_size=c.patch_size, num_channels=c.channels, hidden_size=c.image_width,
        num_hidden_layers=c.image_depth, num_attention_heads=c.image_heads,
        intermediate_size=c.mlp_ratio * c.image_width, layer_norm_eps=c.eps,
        hidden_act={"exact": "gelu", "tanh": "gelu_pytorch_tanh"}[c.gelu], mask_ratio=ratio,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.ViTMAEModel(official)
    # Built from a configuration, version 5.24 takes its patches for loaded ones and leaves the positions at zero.
    theirs.embeddings.patch_embeddings.projection._is_hf_initialized = False
    theirs.embeddings.initialize_weights()
    return theirs


def load_mae(ours: FLIPVision, theirs: nn.Module) -> FLIPVision:
    """Our tower with the weights of the official encoder. The fixed positions stay each one's own."""
    c = ours.config
    names, positions = (*TRUNK_NAMES, (r"^embed\.", "")), r"^embeddings\.position_embeddings$"
    weights = rename(theirs.state_dict(), names, drop=[positions])
    weights = join_trunk(weights, {}, width=c.image_width, depth=c.image_depth, patches="patch_embed")
    ours.load_state_dict(weights | {"pos_embed": ours.pos_embed})
    return ours


def flip_contenders(config: FLIPConfig, ratio: float, *, whole: bool) -> list[Contender]:
    """Image towers with the same weights, alone or each in a FLIP whose other parts are ours.

    All are given the pictures and the noise; which patches to look at is decided within the time that counts.
    """
    ours = FLIP(config)
    theirs = transformers_mae(config, ratio) if transformers_installed() else None
    if theirs is not None:
        load_mae(ours.vision, theirs)

    def like_ours(kind: type[FLIPVision]) -> FLIPVision:
        tower = kind(config)
        tower.load_state_dict(ours.vision.state_dict())
        return tower

    def ours_chooses(noise: Tensor) -> Tensor | None:
        return random_masking(noise, ratio)[0] if ratio else None

    def contender(name: str, tower: nn.Module, choose: Callable[[Tensor], Tensor | None]) -> Contender:
        if not whole:
            return Contender(name, tower, lambda batch: tower(batch[0], choose(batch[2]))[0])
        model = FLIP(config)
        model.load_state_dict(ours.state_dict())
        model.vision = tower
        return Contender(name, model, lambda batch: clip_outputs(model, *batch[:2], keep=choose(batch[2])))

    contenders = [contender("minivlp FLIP", like_ours(FLIPVision), ours_chooses)]
    if ratio:
        contenders += [
            contender("minivlp FLIP, all patches embedded first", like_ours(EmbedAll), ours_chooses),
            contender("minivlp FLIP, a mask in the attention instead", like_ours(MaskedKeys), ours_chooses),
        ]
    if theirs is not None:
        contenders.append(contender("transformers ViTMAEModel, sdpa", MAETower(theirs), lambda noise: noise))
    if open_clip_installed():
        name = "open_clip VisionTransformer, PatchDropout"
        contenders.append(contender(name, OpenCLIPTower(ours, ratio), lambda noise: noise))
    return contenders


def flip_batch(config: FLIPConfig, *, batch_size: int, longest: int) -> Batch:
    """Random `images` (B, C, H, W), texts of 8 to `longest` tokens, `ids` (B, L), and `noise` (B, N) for the patches.

    The noise is what PatchDropout draws from `NOISE_SEED`, negated: it keeps the largest, we the least.
    """
    generator = torch.Generator().manual_seed(0)
    images, ids, _ = random_pairs(config, batch_size=batch_size, longest=longest, generator=generator)
    noise = torch.randn(batch_size, config.grid**2, generator=torch.Generator().manual_seed(NOISE_SEED))
    return images, ids, -noise


def flip_loss(outputs: Any, batch: Batch) -> Tensor:
    """Contrastive for the whole model; of a tower alone the mean square of its features, only to have a gradient."""
    return contrastive_loss(outputs[0]) if isinstance(outputs, tuple) else outputs.square().mean()


def flip_row(ratio: float, *, whole: bool, batch_size: int = 64, longest: int = 14) -> Row:
    """The course's own FLIP (image tower of width 128, depth 4) on 64 patches, of which `ratio` are left out."""
    config = FLIPConfig(max_text=longest)
    step = "training step (both towers, contrastive loss, backward, AdamW)" if whole else "image tower (no AdamW)"
    return Row(
        name=f"flip-{'train' if whole else 'tower'}-{100 * ratio:.0f}",
        title=f"FLIP, {step}, {ratio:.0%} of the patches left out: {config.image_size} px, patch {config.patch_size}, "
        + f"texts of 8 to {longest} tokens, " * whole
        + f"width {config.image_width}, depth {config.image_depth}, batch {batch_size}",
        contenders=lambda: flip_contenders(config, ratio, whole=whole),
        batch=lambda: flip_batch(config, batch_size=batch_size, longest=longest),
        loss=flip_loss,
        update=whole,
    )


# --- ALBEF -----------------------------------------------------------------------------------------------------------


class EveryToken(TextEncoder):
    """Computes all words in the last block, also for ITM, which reads the class token alone."""

    def fuse(
        self, states: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None, **how: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        states, named = super().fuse(states, mask, image, **how)
        return states[:, :rows], named


class ViTTower(nn.Module):
    """transformers' ViT in the place of an `ImageEncoder`."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.vit = theirs

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images).last_hidden_state


class BertText(nn.Module):
    """transformers' BERT in the place of a `TextEncoder`: a model that reads, and layers with cross-attention."""

    def __init__(self, bert: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.bert, self.layers = bert, layers

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def fuse(
        self, states: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        for layer in self.layers:
            states = layer(states, mask[:, None, None, :], encoder_hidden_states=image)
        return states[:, :rows], {}

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.fuse(self.read(ids, mask), mask, image)


@torch.no_grad()
def load_bert_layer(ours: Block, theirs: nn.Module) -> None:
    """Give our block the weights of a BertLayer, those of its cross-attention too if it has one."""
    looks = [(ours.attn, ours.norm1, theirs.attention)]
    if isinstance(ours, FusionBlock):
        looks.append((ours.cross.attn, ours.cross.norm, theirs.crossattention))
    pairs = [(ours.mlp.fc1, theirs.intermediate.dense), (ours.mlp.fc2, theirs.output.dense),
             (ours.norm2, theirs.output.LayerNorm)]  # fmt: skip
    for attn, norm, other in looks:
        key, value = other.self.key, other.self.value
        attn.kv.weight.copy_(torch.cat([key.weight, value.weight]))
        attn.kv.bias.copy_(torch.cat([key.bias, value.bias]))
        pairs += [(attn.q, other.self.query), (attn.proj, other.output.dense), (norm, other.output.LayerNorm)]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())


def transformers_albef_pair(config: ALBEFConfig) -> tuple[ALBEF, ALBEF]:
    """An ALBEF whose encoders and MLM head are official classes, and ours with the same weights.

    BERT's cross-attention knows only pictures as wide as its words. The official segment vectors, which ours keeps in
    the position table, stay at zero.
    """
    import transformers

    c = config
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            image_size=c.image_size, patch_size=c.patch_size, num_channels=c.channels, hidden_size=c.image_width,
            num_hidden_layers=c.image_depth, num_attention_heads=c.image_heads,
            intermediate_size=c.mlp_ratio * c.image_width, layer_norm_eps=c.image_eps, attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    bert = dict(
        vocab_size=c.vocab_size, max_position_embeddings=c.max_text, hidden_size=c.text_width,
        num_attention_heads=c.text_heads, intermediate_size=c.mlp_ratio * c.text_width, layer_norm_eps=c.text_eps,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=c.pad_id, attn_implementation="sdpa",
    )  # fmt: skip
    lower = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=c.text_depth, **bert))
    decoder = transformers.BertConfig(
        num_hidden_layers=c.fusion_depth, is_decoder=True, add_cross_attention=True, **bert
    )
    upper = transformers.BertModel(decoder, add_pooling_layer=False).encoder.layer
    embeddings, guess = lower.bert.embeddings, lower.cls.predictions
    for part in (vit, lower, upper):
        init_normal(part, matrices=0.02 * (768 / c.text_width) ** 0.5)  # as ours, or the picture would hardly matter
    nn.init.zeros_(embeddings.token_type_embeddings.weight).requires_grad_(False)

    ours = ALBEF(c)
    theirs = copy.deepcopy(ours)  # the other heads
    theirs.vision, theirs.text, theirs.mlm_head = ViTTower(vit), BertText(lower.bert, upper), lower.cls
    weights = rename(vit.state_dict(), TRUNK_NAMES)
    weights = join_trunk(weights, {}, width=c.image_width, depth=c.image_depth, patches="embed.patch_embed")
    ours.vision.load_state_dict(weights)
    for block, layer in zip(
        [*ours.text.text_blocks, *ours.text.fusion_blocks], [*lower.bert.encoder.layer, *upper], strict=True
    ):
        load_bert_layer(block, layer)
    for own, other in (
        (ours.text.embed.word, embeddings.word_embeddings), (ours.text.embed.position, embeddings.position_embeddings),
        (ours.text.embed.norm, embeddings.LayerNorm), (ours.mlm_head.dense, guess.transform.dense),
        (ours.mlm_head.norm, guess.transform.LayerNorm), (ours.mlm_head.decoder, guess.decoder),
    ):  # fmt: skip
        own.load_state_dict(other.state_dict())
    return theirs, ours


def albef_contenders(config: ALBEFConfig, *, queue: int) -> list[Contender]:
    """Ours twice and one of transformers' parts (if installed), all with the weights of the first and equal queues.

    All take lesson 05's step. Their outputs are its three losses; to ask for them moves teacher and queue on.
    """
    from minivlp.lessons.albef import albef_loss  # not above: the lesson takes its clock from this file

    theirs, ours = transformers_albef_pair(config) if transformers_installed() else (None, ALBEF(config))
    every = ALBEF(config)
    every.text = EveryToken(config)
    every.mlm_head.decoder.weight = every.text.embed.word.weight
    every.load_state_dict(ours.state_dict())
    start = PairQueue(queue, config.embed_dim, captions=2).state_dict()

    def contender(name: str, student: ALBEF) -> Contender:
        model = MomentumALBEF(student, queue_size=queue, momentum=0.99, captions=2)
        model.queue.load_state_dict(start)
        return Contender(name, model, lambda batch: tuple(albef_loss(model, *batch).values()))

    contenders = [
        contender("minivlp ALBEF, every token", every),
        contender("minivlp ALBEF, last block for ITM's class token alone", ours),
    ]
    if theirs is not None:
        contenders.append(contender("transformers ViTModel and BERT layers, sdpa", theirs))
    return contenders


def albef_batch(config: ALBEFConfig | VLMoConfig | BLIPConfig, *, batch_size: int, longest: int) -> Batch:
    """Random pictures and texts of 8 to `longest` tokens as a batch of lesson 05: `images` (B, C, H, W), `ids` and
    `mask` (B, L), hidden ids and labels (B, L), `shows` (B, 2), `says` (B), noise (2, B) and the teacher's share ()."""
    generator = torch.Generator().manual_seed(0)
    mask_id = 4  # [MASK] of the course's tokenizer
    images, ids, mask = random_pairs(config, batch_size=batch_size, longest=longest, generator=generator)
    asked = word_positions(mask) & (torch.rand(ids.shape, generator=generator) < 0.5)
    says = torch.arange(batch_size)
    noise = torch.rand(2, batch_size, generator=generator)
    return (images, ids, mask, ids.masked_fill(asked, mask_id), ids.masked_fill(~asked, IGNORE),
            torch.stack([says, says + batch_size], dim=1), says, noise, torch.tensor(0.4))  # fmt: skip


def albef_row(*, batch_size: int = 32, longest: int = 14) -> Row:
    """The course's own ALBEF (width 128, depth 4 for the picture, 2 + 2 for the words) with its teacher and queue."""
    config = ALBEFConfig()
    return Row(
        name="albef-train",
        title="ALBEF, training step (ITC, ITM and MLM with teacher and queue, backward, AdamW): "
        f"{config.image_size} px, patch {config.patch_size}, texts of 8 to {longest} tokens, "
        f"width {config.text_width}, depth {config.image_depth} and {config.text_depth} + {config.fusion_depth}, "
        f"batch {batch_size}",
        contenders=lambda: albef_contenders(config, queue=2 * batch_size),
        batch=lambda: albef_batch(config, batch_size=batch_size, longest=longest),
        loss=lambda losses, batch: sum(losses),
        note="All take the same step from the same function. The lead of the second row is ITM's: it reads only the "
        "class tokens of the three pairs for each picture, so that the last fusion block leaves out all other words.",
    )


# --- VLMo ------------------------------------------------------------------------------------------------------------


class AllInTheLast(VLMo):
    """Computes all tokens in the last block, whatever is read of them."""

    def run(self, x: Tensor, along: Sequence[Route], **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return super().run(x, along, **how | {"rows": None})


class BeitBlock(nn.Module):
    """transformers' parts in the place of a `MoMEBlock`: attention, layer scales and experts are those of BeitLayers.

    The layer with V-FFN is whole and shares its attention and scales; of the others only LayerNorm and MLP are left.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layer = layers["image"]
        self.others = nn.ModuleDict(
            {name: nn.Sequential(layer.layernorm_after, layer.mlp) for name, layer in layers.items() if name != "image"}
        )

    def forward(
        self, x: Tensor, route: Route, *, mask: Tensor | None = None, rows: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        layer, parts = self.layer, []
        h = x + layer.lambda_1 * layer.attention(layer.layernorm_before(x), attention_mask=mask)[0]
        for name, part in shares(h, route):
            own = name == "image"
            parts.append(layer.mlp(layer.layernorm_after(part)) if own else self.others[name](part))
        return h + layer.lambda_2 * torch.cat(parts, dim=1), None


@torch.no_grad()
def beit_block(ours: MoMEBlock, config: Any) -> BeitBlock:
    """The weights of our block in BeitLayers of this configuration (transformers 5.24 was tried)."""
    from transformers.models.beit.modeling_beit import BeitLayer

    layers = {}
    for name, expert in ours.experts.items():
        layers[name] = layer = BeitLayer(config)
        for own, other in (
            (expert.norm, layer.layernorm_after), (expert.mlp.fc1, layer.mlp.fc1), (expert.mlp.fc2, layer.mlp.fc2),
        ):  # fmt: skip
            other.load_state_dict(own.state_dict())
    shared, attention = layers["image"], layers["image"].attention
    attention.k_proj = nn.Linear(config.hidden_size, config.hidden_size)  # with a bias, which BEiT leaves out
    for kind in ("weight", "bias"):
        key, value = getattr(ours.attn.kv, kind).chunk(2)
        getattr(attention.k_proj, kind).copy_(key)
        getattr(attention.v_proj, kind).copy_(value)
    attention.q_proj.load_state_dict(ours.attn.q.state_dict())
    attention.o_proj.load_state_dict(ours.attn.proj.state_dict())
    shared.layernorm_before.load_state_dict(ours.norm1.state_dict())
    shared.lambda_1.copy_(ours.gamma_1)
    shared.lambda_2.copy_(ours.gamma_2)
    return BeitBlock(layers)


def transformers_vlmo(ours: VLMo) -> VLMo:
    """The same VLMo from official parts: BERT's and BEiT's embeddings, BEiT's layers, BERT's MLM head.

    The official segment vectors, which ours keeps in the position table, stay at zero, and the MLM head's output matrix
    is not tied to the word table. The other heads are copies of ours.
    """
    import transformers
    from transformers.models.beit.modeling_beit import BeitEmbeddings

    c = ours.config
    both = dict(hidden_size=c.width, num_attention_heads=c.heads, intermediate_size=c.mlp_ratio * c.width,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")  # fmt: skip
    beit = transformers.BeitConfig(
        image_size=c.image_size, patch_size=c.patch_size, num_channels=c.channels, layer_norm_eps=c.eps,
        layer_scale_init_value=c.layer_scale, use_absolute_position_embeddings=True, **both,
    )  # fmt: skip
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            num_hidden_layers=1, vocab_size=c.vocab_size, max_position_embeddings=c.max_text, layer_norm_eps=c.text_eps,
            pad_token_id=c.pad_id, **both,
        )
    )  # fmt: skip
    words, guess, image = bert.bert.embeddings, bert.cls.predictions, BeitEmbeddings(beit)
    guess.decoder.weight = nn.Parameter(guess.decoder.weight.detach().clone())
    nn.init.zeros_(words.token_type_embeddings.weight).requires_grad_(False)
    for own, other in (
        (ours.embed.text.word, words.word_embeddings), (ours.embed.text.position, words.position_embeddings),
        (ours.embed.text.norm, words.LayerNorm), (ours.mlm_head.dense, guess.transform.dense),
        (ours.mlm_head.norm, guess.transform.LayerNorm), (ours.mlm_head.decoder, guess.decoder),
    ):  # fmt: skip
        other.load_state_dict(own.state_dict())
    patches = image.patch_embeddings.projection
    with torch.no_grad():
        for own, other in (
            (ours.embed.image.patch_embed.proj.weight, patches.weight),
            (ours.embed.image.patch_embed.proj.bias, patches.bias),
            (ours.embed.image.cls_token, image.cls_token), (ours.embed.image.pos_embed, image.position_embeddings),
        ):  # fmt: skip
            other.copy_(own.view_as(other))
    theirs = copy.deepcopy(ours)
    theirs.embed.text, theirs.embed.image, theirs.mlm_head = words, image, bert.cls
    theirs.blocks = nn.ModuleList(beit_block(block, beit) for block in ours.blocks)
    return theirs


def vlmo_contenders(config: VLMoConfig) -> list[Contender]:
    """Ours twice and one of transformers' parts (if installed), all with the same weights.

    All take the step of lesson 06's stage 3. Their outputs are its four losses: ITC is two of them.
    """
    from minivlp.lessons.vlmo import vlmo_loss  # not above: the lesson takes its clock from this file

    every, short = AllInTheLast(config), VLMo(config)
    short.load_state_dict(every.state_dict())

    def contender(name: str, model: VLMo) -> Contender:
        return Contender(name, model, lambda batch: tuple(vlmo_loss(model, *batch).values()))

    contenders = [
        contender("minivlp VLMo, every token", every),
        contender("minivlp VLMo, rows=: last block only for what is read", short),
    ]
    if transformers_installed():
        name = "transformers BeitLayers, BERT embeddings and MLM head, sdpa"
        contenders.append(contender(name, transformers_vlmo(every)))
    return contenders


def vlmo_batch(config: VLMoConfig, *, batch_size: int, longest: int) -> Batch:
    """Random pictures and texts of 8 to `longest` tokens as a batch of lesson 06's stage 3: `images` (B, C, H, W),
    `ids` and `mask` (B, L), hidden ids and labels (B, L), `same` (B, B), noise (2, B)."""
    images, ids, mask, hidden, labels, _, _, noise, _ = albef_batch(config, batch_size=batch_size, longest=longest)
    return images, ids, mask, hidden, labels, torch.eye(batch_size, dtype=torch.bool), noise


def vlmo_row(*, batch_size: int = 16, longest: int = 14) -> Row:
    """The course's own VLMo (width 128, depth 4, VL-FFN in the last block) in its third stage."""
    config = VLMoConfig()
    return Row(
        name="vlmo-train",
        title="VLMo, training step of stage 3 (both ITCs, ITM and MLM, backward, AdamW): "
        f"{config.image_size} px, patch {config.patch_size}, texts of 8 to {longest} tokens, "
        f"width {config.width}, depth {config.depth}, VL-FFN in the last {config.pair_depth}, batch {batch_size}",
        contenders=lambda: vlmo_contenders(config),
        batch=lambda: vlmo_batch(config, batch_size=batch_size, longest=longest),
        loss=lambda losses, batch: sum(losses),
        note="All take the same step from the same function. The second row leaves out, in the last block alone, all "
        "but the class tokens for both ITCs and for ITM, and all patches for MLM.",
    )


# --- BLIP ------------------------------------------------------------------------------------------------------------


class EveryWord(MED):
    """Computes all words in the last block, also where the first one alone is read."""

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.encoder:
            x, _, _ = block(x, mask=key_mask(mask))
        return x[:, :1]

    def ground(
        self, x: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None, **how: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        states, named = super().ground(x, mask, image, **how)
        return states[:, :rows], named


class BlipTower(nn.Module):
    """transformers' ViT of BLIP in the place of an `ImageEncoder`."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.vit = theirs

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images).last_hidden_state


class BlipText(nn.Module):
    """transformers' two text models of BLIP in the place of a `MED`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def embed(self, ids: Tensor) -> Tensor:
        return self.encoder.embeddings(ids)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, :1]

    def ground(
        self, x: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        states = self.encoder(encoder_embeds=x, attention_mask=mask.long(), encoder_hidden_states=image)
        return states.last_hidden_state[:, :rows], {}

    def decode(
        self, ids: Tensor, context: Tensor, *, context_mask: Tensor | None = None, past: list[Past] | None = None
    ) -> tuple[Tensor, list[Past]]:
        out = self.decoder(input_ids=ids, encoder_hidden_states=context, is_decoder=True, use_cache=False)
        return out.last_hidden_state, []


def transformers_blip(config: BLIPConfig) -> tuple[nn.Module, nn.Module, BLIP]:
    """The official classes that match and that write, which share what BLIP shares and look at pictures with one ViT,
    and ours with the same weights."""
    import transformers

    c = config
    vision = transformers.BlipVisionConfig(
        image_size=c.image_size, patch_size=c.patch_size, hidden_size=c.image_width, num_hidden_layers=c.image_depth,
        num_attention_heads=c.image_heads, intermediate_size=c.mlp_ratio * c.image_width, layer_norm_eps=c.image_eps,
    )  # fmt: skip
    text = transformers.BlipTextConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.max_text, hidden_size=c.text_width,
        num_hidden_layers=c.text_depth, num_attention_heads=c.text_heads,
        intermediate_size=c.mlp_ratio * c.text_width, layer_norm_eps=c.text_eps, pad_token_id=c.pad_id,
        sep_token_id=c.sep_id, eos_token_id=c.sep_id, bos_token_id=c.dec_id, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    official = transformers.BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=c.embed_dim
    )
    reader = transformers.BlipForImageTextRetrieval(official)
    writer = transformers.BlipForConditionalGeneration(official)
    matrices, pixels = 0.02 * (768 / c.text_width) ** 0.5, reader.vision_model.embeddings
    for part in (reader, writer):  # as ours, or the picture would hardly matter
        init_normal(part, matrices=matrices)
    nn.init.normal_(pixels.patch_embedding.weight, std=matrices)  # from 1e-10, at which all pictures look the same
    for parameter in (pixels.class_embedding, pixels.position_embedding):
        nn.init.normal_(parameter, std=0.02)
    writer.vision_model = reader.vision_model
    bert, guess = writer.text_decoder.bert, writer.text_decoder.cls.predictions
    bert.embeddings = reader.text_encoder.embeddings
    for own, shared in zip(bert.encoder.layer, reader.text_encoder.encoder.layer, strict=True):
        for name in ("crossattention", "intermediate", "output"):
            setattr(own, name, getattr(shared, name))
    guess.decoder.weight, guess.decoder.bias = bert.embeddings.word_embeddings.weight, guess.bias
    ours = BLIP(c)
    weights = blip_from_hf(official.to_dict(), reader.state_dict() | writer.state_dict(), None).state_dict()
    ours.load_state_dict(weights | {"temp": ours.temp.detach()})
    return reader, writer, ours


def blip_contenders(config: BLIPConfig, *, queue: int) -> list[Contender]:
    """Ours twice and one of transformers' parts (if installed), all with the weights of the first and equal queues.

    All take lesson 07's step. Their outputs are its three losses; to ask for them moves teacher and queue on.
    """
    from minivlp.lessons.blip import blip_loss  # not above: the lesson takes its clock from this file

    reader, writer, ours = transformers_blip(config) if transformers_installed() else (None, None, BLIP(config))
    every = BLIP(config)
    every.text = EveryWord(config)
    every.lm_head.decoder.weight = every.text.decoder_embed.word.weight
    every.load_state_dict(ours.state_dict())
    start = PairQueue(queue, config.embed_dim).state_dict()

    def contender(name: str, student: BLIP, teacher: nn.Module) -> Contender:
        model = MomentumALBEF(student, queue_size=queue, momentum=0.99, teacher=teacher)
        model.queue.load_state_dict(start)
        return Contender(name, model, lambda batch: tuple(blip_loss(model, *batch).values()))

    contenders = [
        contender("minivlp BLIP, every token", every, teacher_of(every)),
        contender("minivlp BLIP, rows=: last block only for what is read", ours, teacher_of(ours)),
    ]
    if reader is not None:
        theirs = copy.deepcopy(ours)  # the other heads
        theirs.vision = BlipTower(reader.vision_model)
        theirs.text = BlipText(reader.text_encoder, writer.text_decoder.bert)
        theirs.lm_head = writer.text_decoder.cls
        teacher = copy.deepcopy(theirs).requires_grad_(False)
        del teacher.itm_head, teacher.lm_head, teacher.text.decoder
        for layer in teacher.text.encoder.encoder.layer:
            del layer.crossattention
        contenders.append(contender("transformers BLIP text models and ViT, eager (no sdpa)", theirs, teacher))
    return contenders


def blip_batch(config: BLIPConfig, *, batch_size: int, longest: int) -> Batch:
    """Random pictures and texts of 8 to `longest` tokens as a batch of lesson 07: `images` (B, C, H, W), `ids` and
    `mask` (B, L), `says` (B), noise (2, B) and the teacher's share ()."""
    images, ids, mask, _, _, _, says, noise, alpha = albef_batch(config, batch_size=batch_size, longest=longest)
    return images, ids, mask, says, noise, alpha


def blip_row(*, batch_size: int = 32, longest: int = 14) -> Row:
    """The course's own BLIP (width 128, depth 4 for the picture, 3 for the words) with its teacher and queue."""
    config = BLIPConfig()
    return Row(
        name="blip-train",
        title="BLIP, training step (ITC, ITM and LM with teacher and queue, backward, AdamW): "
        f"{config.image_size} px, patch {config.patch_size}, texts of 8 to {longest} tokens, "
        f"width {config.text_width}, depth {config.image_depth} and {config.text_depth}, batch {batch_size}",
        contenders=lambda: blip_contenders(config, queue=2 * batch_size),
        batch=lambda: blip_batch(config, batch_size=batch_size, longest=longest),
        loss=lambda losses, batch: sum(losses),
        note="All take the same step from the same function. The second row leaves out, in the last block alone, all "
        "words but the first for ITC and ITM.",
    )


def generate_contenders(config: BLIPConfig, *, length: int) -> list[Contender]:
    """Ours, with and without its cache, and transformers' own `generate` (if installed), all with the same weights.

    The output is what they write about each picture, exactly `length` tokens, the most likely one each time.
    """
    _, theirs, ours = transformers_blip(config) if transformers_installed() else (None, None, BLIP(config))
    ours.eval()
    # with the word table as its output layer, an untrained model would say one word again and again
    ours.lm_head.decoder.weight = nn.Parameter(torch.randn_like(ours.lm_head.decoder.weight))

    def write(images: Tensor, cache: bool) -> Tensor:
        speaker = ours.speaker(ours.look(images), cache=cache)
        first = torch.full((len(images),), config.dec_id)
        return greedy(speaker, first, end=config.sep_id, longest=length, shortest=length)

    contenders = [
        Contender("minivlp BLIP, greedy with its cache", ours, lambda batch: write(batch[0], True)),
        Contender("minivlp BLIP, each token from the beginning", ours, lambda batch: write(batch[0], False)),
    ]
    if theirs is not None:
        theirs.eval().text_decoder.cls.predictions.decoder.weight = ours.lm_head.decoder.weight
        how = dict(do_sample=False, num_beams=1, min_new_tokens=length, max_new_tokens=length, use_cache=True)

        def generate(batch: Batch) -> Tensor:
            return theirs.generate(pixel_values=batch[0], **how)[:, 1:]

        contenders.append(Contender("transformers BlipForConditionalGeneration.generate", theirs, generate))
    return contenders


def generate_row(batch_size: int, *, length: int = 20) -> Row:
    """The course's own BLIP writes about pictures it sees for the first time."""
    config = BLIPConfig()
    return Row(
        name=f"blip-generate-{batch_size}",
        title=f"BLIP, looking at {batch_size} picture{'s' * (batch_size > 1)} and greedily writing {length} tokens "
        f"about each: {config.image_size} px, patch {config.patch_size}, width {config.text_width}, "
        f"depth {config.image_depth} and {config.text_depth}",
        contenders=lambda: generate_contenders(config, length=length),
        batch=lambda: blip_batch(config, batch_size=batch_size, longest=8)[:1],
        loss=None,
        note="All write the same words. The lead over transformers is less work around each token, which weighs less "
        "the more pictures are written about at once.",
        unit="tokens",
        each=length,
    )


# --- BLIP-2 ----------------------------------------------------------------------------------------------------------


def transformers_blip2(*, speaks: bool) -> tuple[nn.Module, BLIP2 | BLIP2Speaker]:
    """The official class that compares, or with an OPT the one that speaks, at the course's sizes with random weights,
    and our model with the same."""
    import transformers

    q, lm = QFormerConfig(), LMConfig()
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=64,
                  patch_size=16, initializer_range=0.02)  # fmt: skip
    asker = dict(
        hidden_size=q.width, intermediate_size=q.mlp_ratio * q.width, num_hidden_layers=q.depth,
        num_attention_heads=q.heads, vocab_size=q.vocab_size, max_position_embeddings=q.max_text,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cross_attention_frequency=q.cross_every,
        use_qformer_text_input=not speaks,
    )  # fmt: skip
    text = dict(
        model_type="opt", vocab_size=lm.vocab_size, hidden_size=lm.width, word_embed_proj_dim=lm.width,
        ffn_dim=lm.mlp_ratio * lm.width, num_hidden_layers=lm.depth, num_attention_heads=lm.heads,
        max_position_embeddings=lm.max_text, dropout=0.0, pad_token_id=lm.pad_id, bos_token_id=lm.dec_id,
        eos_token_id=lm.sep_id,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=asker, text_config=text, num_query_tokens=q.queries,
        image_text_hidden_size=q.embed_dim, image_token_index=UNUSED if speaks else None,
    )  # fmt: skip
    theirs = getattr(transformers, f"Blip2For{'ConditionalGeneration' if speaks else 'ImageTextRetrieval'}")(config)
    init_normal(theirs, matrices=0.05)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("query_tokens", "class_embedding", "position_embedding")):
            nn.init.normal_(parameter, std=0.5 if name == "query_tokens" else 0.02)  # zeros would agree with everything
    return theirs, as_ours(theirs)


UNUSED = 4  # [MASK], which no text here has, stands where the official class wants image tokens


class TheirBLIP2(nn.Module):
    """Stage 1 with the official Q-Former and our heads. It has neither a past nor a head to write with, so that ITG is
    a pass of its own, queries and words under one mask."""

    def __init__(self, theirs: nn.Module, ours: BLIP2) -> None:
        super().__init__()
        self.config = ours.config
        for name in ("ln_vision", "vision_proj", "text_proj", "itm_head", "lm_head", "temp"):
            setattr(self, name, copy.deepcopy(getattr(ours, name)))
        self.qformer, self.embeddings, self.query_tokens = theirs.qformer, theirs.embeddings, theirs.query_tokens
        self.lm_head.decoder.weight = self.embeddings.word_embeddings.weight

    def run(self, words: Tensor | None, image: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """`mask` broadcastable to (B, 1, T, T), True where one may look."""
        B = len(image if words is None else words)
        parts = [] if image is None else [self.query_tokens.expand(B, -1, -1)]
        x = torch.cat([*parts, *([] if words is None else [words])], dim=1)
        if mask is not None:
            lowest = torch.finfo(x.dtype).min
            mask = torch.zeros(B, 1, x.shape[1], x.shape[1]).masked_fill(~mask, lowest)
        Q = 0 if image is None else self.config.queries
        return self.qformer(x, query_length=Q, attention_mask=mask, encoder_hidden_states=image).last_hidden_state

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(None, image), image

    def query_vectors(self, states: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(states).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        states = self.run(self.embeddings(ids), None, key_mask(ids != self.config.pad_id))
        return F.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.embeddings(ids)

    def match(self, words: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        Q = self.config.queries
        return self.itm_head(self.run(words, image, joint_mask(mask, Q))[:, :Q]).mean(dim=1)

    def write(self, ids: Tensor, image: Tensor) -> Tensor:
        Q = self.config.queries
        words = self.embeddings(led_by(ids, self.config.dec_id))
        return self.run(words, image, grounded_mask(ids.shape[1], Q))[:, Q:]


def blip2_batch(config: QFormerConfig, *, batch_size: int, longest: int) -> Batch:
    """Random states of an eye (B, S, D') and texts of 8 to `longest` tokens as a batch of lesson 08's stage 1."""
    images, ids, mask = random_pairs(BLIPConfig(), batch_size=batch_size, longest=longest,
                                     generator=(generator := torch.Generator().manual_seed(0)))  # fmt: skip
    states = torch.randn(batch_size, 17, config.image_width, generator=generator)
    return states, ids, mask, torch.arange(batch_size), torch.rand(2, batch_size, generator=generator), images


def first_stages() -> tuple[nn.Module | None, BLIP2]:
    """The official class that compares, None if it is not installed, and ours, which needs no eye here."""
    theirs, ours = None, BLIP2(QFormerConfig(), None)
    if transformers_installed():
        theirs, ours = transformers_blip2(speaks=False)
        ours.eye = None
    return theirs, ours


def qformer_contenders() -> list[Contender]:
    """The Q-Former alone, queries that ask a picture."""
    theirs, ours = first_stages()
    contenders = [Contender("minivlp Q-Former", ours.qformer, lambda batch: ours.see(batch[0])[0])]
    if theirs is not None:
        peer = TheirBLIP2(theirs, ours)
        contenders.append(Contender("transformers Blip2QFormerModel", peer, lambda batch: peer.see(batch[0])[0]))
    return contenders


def stage1_contenders() -> list[Contender]:
    """Lesson 08's three losses, by our model and by the official Q-Former with the same heads."""
    from minivlp.lessons.blip2 import stage1_loss  # not above: the lesson takes its clock from this file

    theirs, ours = first_stages()
    models = {"minivlp BLIP-2, stage 1": ours}
    if theirs is not None:
        models["transformers Blip2QFormerModel, our heads"] = TheirBLIP2(theirs, ours)
    return [Contender(name, model, lambda batch, model=model: tuple(stage1_loss(model, *batch[:5]).values()))
            for name, model in models.items()]  # fmt: skip


def stage2_contenders() -> list[Contender]:
    """Pictures, Q-Former, projection and a frozen OPT: the scores of each next word, by both."""
    if not transformers_installed():
        first = BLIP2(QFormerConfig(), Eye(ImageEncoder(BLIPConfig().image_config())))
        theirs, ours = None, BLIP2Speaker(first, DecoderLM(LMConfig()))
    else:
        theirs, ours = transformers_blip2(speaks=True)
    c, dec = ours.config, LMConfig().dec_id

    def speak(batch: Batch) -> Tensor:
        return ours.mouth.lm_head(ours.write(led_by(batch[1], dec), ours.look(batch[5])))[batch[2]]

    contenders = [Contender("minivlp BLIP-2, stage 2", ours, speak)]
    if theirs is not None:
        for part in (theirs.vision_model.embeddings, theirs.vision_model.encoder, theirs.language_model):
            part.requires_grad_(False)

        def official(batch: Batch) -> Tensor:
            places = batch[1].new_full((len(batch[1]), c.queries), UNUSED)
            ids = torch.cat([places, led_by(batch[1], dec)], dim=1)
            there = F.pad(batch[2].long(), (c.queries, 0), value=1)
            out = theirs(pixel_values=batch[5], input_ids=ids, attention_mask=there)
            return out.logits[:, c.queries :][batch[2]]

        contenders.append(Contender("transformers Blip2ForConditionalGeneration, OPT", theirs, official))
    return contenders


def blip2_row(part: str, what: str, contenders: Callable[[], list[Contender]], *, batch_size: int = 32,
              longest: int = 14, note: str = "") -> Row:  # fmt: skip
    """One part of lesson 08 at the course's sizes."""
    config = QFormerConfig()

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        if part == "stage1":
            return sum(outputs)
        labels = next_words(batch[1], batch[2])[batch[2]]
        return F.cross_entropy(outputs, labels) if part == "stage2" else outputs.square().mean()

    return Row(
        name=f"blip2-{part}",
        title=f"BLIP-2, {what}, training step (forward, backward, AdamW): {config.queries} queries, width "
        f"{config.width}, depth {config.depth}, texts of 8 to {longest} tokens, batch {batch_size}",
        contenders=contenders,
        batch=lambda: blip2_batch(config, batch_size=batch_size, longest=longest),
        loss=loss,
        note=note,
    )


ROWS: list[Row] = [
    *(vit_row(patch_size, training=training) for training in (True, False) for patch_size in (16, 8)),
    vilt_row(),
    clip_row(),
    *(flip_row(ratio, whole=whole) for whole in (False, True) for ratio in (0.0, 0.5, 0.75)),
    albef_row(),
    vlmo_row(),
    blip_row(),
    *(generate_row(batch_size) for batch_size in (1, 32)),
    blip2_row("qformer", "the Q-Former alone", qformer_contenders),
    blip2_row("stage1", "stage 1 (ITC, ITM, ITG)", stage1_contenders,
              note="For ITG ours keeps the queries' keys and values; the official Q-Former has no past and runs "
              "queries and words under one mask. For ITC and ITM ours computes in the last block only what is read."),
    blip2_row("stage2", "stage 2 with pictures and a frozen OPT", stage2_contenders),
]


# --- running ---------------------------------------------------------------------------------------------------------


def check_equal(row: Row, contenders: Sequence[Contender], batch: Batch, *, tolerance: float = 1e-4) -> float:
    """The largest difference of any contender's outputs and loss from the first one's; RuntimeError above tolerance."""
    with torch.no_grad():
        outputs = [contender.outputs(batch) for contender in contenders]
        parts = [o if isinstance(o, tuple) else (o,) for o in outputs]
        worst = max((a - b).abs().max().item() for own in parts for a, b in zip(own, parts[0], strict=True))
        if row.loss is not None:
            losses = [row.loss(o, batch).item() for o in outputs]
            worst = max(worst, *(abs(loss - losses[0]) for loss in losses))
    if not worst <= tolerance:
        raise RuntimeError(f"{row.name}: the contenders differ by {worst:.1e}, their times mean nothing")
    return worst


def stepper(row: Row, contender: Contender, batch: Batch) -> Callable[[], None]:
    """What is timed: one training step, its forward and backward part, or one forward pass."""
    if row.loss is None:
        contender.model.eval()

        def forward() -> None:
            with torch.inference_mode():
                contender.outputs(batch)

        return forward

    contender.model.train()
    optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        row.loss(contender.outputs(batch), batch).backward()
        if row.update:
            optimizer.step()

    return step


def race(
    row: Row, *, rounds: int = 15, seconds: float = 0.2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of one step of each contender: see `take_turns`. RuntimeError if they do not give the same numbers."""
    torch.manual_seed(0)
    batch, contenders = row.batch(), row.contenders()
    check_equal(row, contenders, batch)
    steps = {contender.name: stepper(row, contender, batch) for contender in contenders}
    return take_turns(steps, rounds=rounds, seconds=seconds, clock=clock)


def take_turns(
    steps: Mapping[str, Callable[[], None]], *, rounds: int = 15, seconds: float = 0.2,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of one call, name -> one number per round. In a round each step runs again and again for about `seconds`.

    Each round has another order, so that a slow moment of the machine hits all of them. Before the first round comes a
    warm-up that does not count.
    """
    repeats = {}
    for name, step in steps.items():
        step()  # warm-up: allocator, thread pool, optimiser state
        step()
        repeats[name] = max(1, round(seconds / timed(step, 2, clock)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            times[name].append(timed(steps[name], repeats[name], clock))
        order = order[1:] + order[:1]
    return times


def timed(step: Callable[[], None], repeats: int, clock: Clock) -> float:
    """Seconds of one of `repeats` calls, with the garbage collector held back."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeats):
            step()
        return (clock() - start) / repeats
    finally:
        gc.enable()


def report(row: Row, times: dict[str, list[float]], batch_size: int) -> str:
    """A table: median milliseconds, pictures or the row's own unit a second, and time divided by the first contender's,
    round by round; below it the row's note."""
    names = list(times)
    width = max(map(len, names))
    lines = [row.title, f"  {'':{width}}  {'ms':>7}  {row.unit + '/s':>10}  {'time / first':>12}"]
    for name in names:
        median = statistics.median(times[name])
        ratio = statistics.median(own / first for own, first in zip(times[name], times[names[0]], strict=True))
        lines.append(f"  {name:{width}}  {1e3 * median:7.1f}  {batch_size * row.each / median:10.0f}  {ratio:12.2f}")
    return "\n".join([*lines, f"  {row.note}"] if row.note else lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minivlp.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="NAME", help="only rows whose name contains a NAME")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of one thread, on a busy machine")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if any(name in row.name for name in options.rows)]
    if not rows:
        parser.error(f"no row is called {' '.join(options.rows)}: there are {', '.join(row.name for row in ROWS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least one is needed")
    if options.cpu_time and options.threads not in (None, 1):
        parser.error("--cpu-time counts one thread: a second one that waits would be counted as working")
    if options.cpu_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    threads, kind = torch.get_num_threads(), "CPU time" if options.cpu_time else "wall-clock time"
    print(f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, float32, {options.rounds} rounds, {kind}")
    if not transformers_installed():
        print("transformers is not installed and left out: pip install transformers to compare with it")
    clock = time.process_time if options.cpu_time else time.perf_counter
    for row in rows:
        times = race(row, rounds=options.rounds, clock=clock)
        print(f"\n{report(row, times, len(row.batch()[0]))}", flush=True)


if __name__ == "__main__":
    main()
