"""ALBEF: align before fuse (Li et al. 2021, arXiv:2107.07651)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import Block, Encoder, MLMHead, TextEmbeddings, init_normal
from minivlp.models.dual_stream import CrossAttention, key_mask
from minivlp.models.vit import ViT, ViTConfig, ViTEmbeddings, refuse_unlike

TEMPERATURES = (0.001, 0.5)  # official code: the temperature is kept between these


class TwoWidths:
    """For configs with an image encoder and a text transformer, each with a width and heads of its own."""

    def __post_init__(self) -> None:
        self.image_config()  # raises ValueError if the picture cannot be cut into whole patches
        for name in ("image", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(f"{name}_width {width} is not a multiple of {name}_heads {heads}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: choose a positive one, similarities are divided by it")

    def image_config(self) -> ViTConfig:
        """Of the image encoder, a ViT with a class token."""
        return ViTConfig(
            self.image_size, self.patch_size, self.channels, self.image_width, self.image_depth, self.image_heads,
            self.mlp_ratio, dropout=self.dropout, eps=self.image_eps,
        )  # fmt: skip


@dataclass(frozen=True)
class ALBEFConfig(TwoWidths):
    """Everything that fixes an ALBEF's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    image_width: int = 128  # D' of the image encoder
    image_depth: int = 4  # blocks
    image_heads: int = 4
    vocab_size: int = 340  # V
    max_text: int = 64  # L at most
    text_width: int = 128  # D of the words
    text_depth: int = 2  # the lower half: blocks in which words see words alone (the paper: 6)
    fusion_depth: int = 2  # the upper half: blocks in which they also ask the picture (the paper: 6)
    text_heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLPs / width
    embed_dim: int = 64  # E, numbers of the shared space
    dropout: float = 0.0
    image_eps: float = 1e-6
    text_eps: float = 1e-12
    pad_id: int = 0  # the token that fills up short texts
    temperature: float = 0.07  # similarities are divided by it; learned as it is, not as a logarithm like CLIP's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion_depth < 1:
            raise ValueError(f"fusion_depth={self.fusion_depth}: choose at least 1, or no word ever sees the picture")


def paper_config() -> ALBEFConfig:
    """The paper's model at the resolution of its pre-training: ViT-B/16 and BERT-base, its upper half with eyes."""
    return ALBEFConfig(
        256, 16, image_width=768, image_depth=12, image_heads=12, vocab_size=30_522, max_text=512, text_width=768,
        text_depth=6, fusion_depth=6, text_heads=12, embed_dim=256, dropout=0.1,
    )  # fmt: skip


class ImageEncoder(nn.Module):
    """A ViT without its head: (B, C, H, W) -> the final states of class token and patches, (B, 1+N, D')."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = config
        self.embed = ViTEmbeddings(c)
        self.encoder = Encoder(c.width, c.depth, c.heads, mlp_ratio=c.mlp_ratio, dropout=c.dropout, eps=c.eps)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(self.embed(images))[0]


class FusionBlock(Block):
    """Words look at words, then at the picture, then each by itself; LayerNorm after each, as in BERT (paper, 3.1).

    Words ask, the picture answers: nothing flows into the picture's states.
    """

    def __init__(
        self, width: int, heads: int, *, context_width: int, mlp_ratio: int = 4, dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, norm="post")
        self.cross = CrossAttention(width, heads, context_width=context_width, dropout=dropout, eps=eps)

    def forward(
        self, x: Tensor, image: Tensor, *, mask: Tensor | None = None, rows: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, L, D), image (B, S, D') -> (B, rows or L, D) and, on request, who looks where in the picture,
        (B, heads, rows or L, S). `mask` is about the words, `rows` as in `Block`."""
        y, _ = self.attn(x[:, :rows], x, mask=mask)
        x = self.norm1(x[:, :rows] + y)
        x, weights = self.cross(x, image, need_weights=need_weights)
        return self.norm2(x + self.mlp(x)), weights


class TextEncoder(nn.Module):
    """One text transformer in two halves (paper, Fig. 1): the lower reads words, the upper joins them with the picture.

    `read` then `fuse` is the whole of it; the official code calls the three modes "text", "fusion", "multi_modal".
    """

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        c, more = config, {"mlp_ratio": config.mlp_ratio, "dropout": config.dropout, "eps": config.text_eps}
        self.embed = TextEmbeddings(c.vocab_size, c.max_text, c.text_width, dropout=c.dropout, eps=c.text_eps)
        self.text_blocks = nn.ModuleList(
            Block(c.text_width, c.text_heads, norm="post", **more) for _ in range(c.text_depth)
        )
        self.fusion_blocks = nn.ModuleList(
            FusionBlock(c.text_width, c.text_heads, context_width=c.image_width, **more) for _ in range(c.fusion_depth)
        )

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L), mask (B, L), True at tokens, -> states (B, L, D) that know nothing of any picture."""
        x = self.embed(ids)
        for block in self.text_blocks:
            x, _ = block(x, mask=key_mask(mask))
        return x

    def fuse(
        self, states: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None, everything: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `read` gave (B, L, D), and a picture's states (B, S, D') -> (B, rows or L, D).

        `rows` computes only the first tokens in the last block, 1 for the class token. `everything` adds "cross_i"
        (B, heads, L, S), where each word looks in the picture.
        """
        named: dict[str, Tensor] = {}
        for i, block in enumerate(self.fusion_blocks):
            last = i == len(self.fusion_blocks) - 1
            states, weights = block(
                states, image, mask=key_mask(mask), rows=rows if last else None, need_weights=everything
            )
            if everything:
                named[f"cross_{i}"] = weights
        return states, named

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor, **how: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Both halves, one after the other."""
        return self.fuse(self.read(ids, mask), mask, image, **how)


class ALBEF(nn.Module):
    """Image encoder, text encoder in two halves, and heads for three questions (paper, Fig. 1)."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        self.config = c = config
        self.vision = ImageEncoder(c.image_config())
        self.text = TextEncoder(c)
        self.vision_proj = nn.Linear(c.image_width, c.embed_dim)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(c.temperature)))
        self.itm_head = nn.Linear(c.text_width, 2)  # scores of "does not match" and "matches"
        self.mlm_head = MLMHead(c.text_width, c.vocab_size, eps=c.text_eps)
        init_normal(self, matrices=0.02 * (768 / c.text_width) ** 0.5)  # with BERT's 0.02 ITM stays at chance here
        for parameter in (self.vision.embed.cls_token, self.vision.embed.pos_embed):
            nn.init.normal_(parameter, std=0.02)
        self.mlm_head.decoder.weight = self.text.embed.word.weight  # one table for reading and for guessing (BERT)

    def image_vector(self, states: Tensor) -> Tensor:
        """A picture's states (B, 1+N, D') -> the vector of its class token, of length 1, (B, E)."""
        return F.normalize(self.vision_proj(states[:, 0]).float(), dim=-1)

    def text_vector(self, states: Tensor) -> Tensor:
        """States of `text.read` (B, L, D) -> the vector of the class token, of length 1, (B, E)."""
        return F.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> vectors of length 1 (B, E)."""
        return self.image_vector(self.vision(images))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> vectors of length 1 (B, E), by the lower half alone."""
        return self.text_vector(self.text.read(ids, ids != self.config.pad_id))

    def match(self, states: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ITM: states of `text.read` (B, L, D) and of as many pictures (B, 1+N, D') -> scores (B, 2)."""
        fused, _ = self.text.fuse(states, mask, image, rows=1)
        return self.itm_head(fused[:, 0])

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images (B, C, H, W), ids and mask (B, L) -> by name: "image" (B, 1+N, D') and "text" (B, L, D), the states;
        "image vector" and "text vector" (B, E); "match" (B, 2), the scores of each picture with its own text."""
        image, text = self.vision(images), self.text.read(ids, mask)
        return {"image": image, "text": text, "image vector": self.image_vector(image),
                "text vector": self.text_vector(text), "match": self.match(text, mask, image)}  # fmt: skip


@torch.no_grad()
def clamp_temperature(model: ALBEF, step: int = 0) -> None:
    """Keep the temperature in [0.001, 0.5] (official code, at every forward)."""
    model.temp.clamp_(*TEMPERATURES)


def teacher_of(model: ALBEF) -> ALBEF:
    """The momentum model at its start: a copy that is never trained by a gradient, and has no matching head."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    del teacher.itm_head
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher a little towards the student: each weight becomes momentum * old + (1 - momentum) * student's.

    Once a step, before the teacher is asked (official code).
    """
    own = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        weight.lerp_(own[name], 1 - momentum)


class PairQueue(nn.Module):
    """The vectors of the last Q pairs, made by the teacher, to choose among beside the batch's (MoCo; paper, 3.2).

    A ring: the oldest are written over. `says` numbers what each caption says, equal where two say the same, and
    `shows` lists the numbers of all K captions of each picture, so that a pair that belongs together is known; -1 and
    -2 for the random vectors that it starts with.
    """

    def __init__(self, size: int, embed_dim: int, *, captions: int = 1) -> None:
        super().__init__()
        for name in ("image", "text"):
            self.register_buffer(name, F.normalize(torch.randn(size, embed_dim), dim=-1))  # (Q, E)
        self.register_buffer("shows", torch.full((size, captions), -1))  # (Q, K)
        self.register_buffer("says", torch.full((size,), -2))  # (Q)
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, shows: Tensor, says: Tensor) -> None:
        """Write vectors (B, E) twice, shows (B, K) and says (B). Raises ValueError if Q is not a multiple of B.
        A queue of 0 keeps nothing."""
        Q, B = len(self.says), len(says)
        if not Q:
            return
        if Q % B:
            raise ValueError(f"a queue of {Q} pairs cannot be filled by batches of {B}: choose a multiple of {B}")
        start = int(self.next)
        for ring, rows in ((self.image, image), (self.text, text), (self.shows, shows), (self.says, says)):
            ring[start : start + B] = rows
        self.next.fill_((start + B) % Q)


def belong(shows: Tensor, says: Tensor) -> Tensor:
    """Which pictures and captions belong together: shows (M, K), says (N) -> (M, N), true where a picture has that
    caption, or one that says the same."""
    return (shows[:, :, None] == says).any(dim=1)


class MomentumALBEF(nn.Module):
    """What is trained: a student, the teacher that follows it, and the queue. Only the student is kept and used."""

    def __init__(
        self, student: ALBEF, *, queue_size: int = 1024, momentum: float = 0.995, captions: int = 1,
        teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.teacher = student, teacher_of(student) if teacher is None else teacher
        self.queue = PairQueue(queue_size, student.config.embed_dim, captions=captions)
        self.momentum = momentum


@torch.no_grad()
def start_from_vit(model: nn.Module, vit: ViT) -> None:
    """Give the image encoder, an `ImageEncoder` called `vision`, a trained ViT's weights (paper, 4.1: DeiT). Raises
    ValueError if they do not fit."""
    refuse_unlike(vit, model.config.image_config(), type(model).__name__)
    model.vision.embed.load_state_dict(vit.embed.state_dict())
    model.vision.encoder.load_state_dict(vit.encoder.state_dict())
