"""VLMo: one attention, three experts (Bao, Wang et al. 2022, arXiv:2111.02358)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import MLP, Attention, MLMHead, init_normal, take_rows
from minivlp.models.dual_stream import key_mask
from minivlp.models.vilt import ViLTEmbeddings, answer_head
from minivlp.models.vit import ViT, ViTConfig, refuse_unlike

# Which expert computes which tokens, in their order: (name, number of tokens). One block's route through the model.
Route = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class VLMoConfig:
    """Everything that fixes a VLMo's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    vocab_size: int = 340  # V
    max_text: int = 64  # L at most, [CLS] and [SEP] included (the paper: 40, of larger word pieces)
    width: int = 128  # D, numbers per token
    depth: int = 4  # blocks
    pair_depth: int = 1  # F: the last blocks, where all tokens of a pair share an expert (the paper: 2 of 12)
    heads: int = 4
    mlp_ratio: int = 4  # hidden width of the experts' MLPs / D
    layer_scale: float = 1.0  # gamma_1 and gamma_2 start with it (the paper: 0.1, slow in a shallow model); 0: none
    dropout: float = 0.0
    eps: float = 1e-6  # of the LayerNorms in and after the blocks
    text_eps: float = 1e-12  # of the LayerNorm in the text embedding and in the MLM head
    modality_types: int = 2  # text, image; 3: also a second picture
    codes: int = 128  # K, sorts of patches to choose among in stage 1 (BEiT: 8,192)
    answers: int = 0  # size of the VQA head; 0: no such head
    pad_id: int = 0  # the token that fills up short texts
    temperature: float = 0.07  # both logit scales start with its inverse
    experts: str = "modality"  # "one": the same LayerNorm and MLP for everything, a standard transformer
    attention: str = "shared"  # "separate": projections of its own for each modality, below the last F blocks

    def __post_init__(self) -> None:
        for name, allowed in {"experts": ("modality", "one"), "attention": ("shared", "separate")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")
        if not 0 <= self.pair_depth < self.depth:
            raise ValueError(f"pair_depth={self.pair_depth}: choose 0 to {self.depth - 1}, fewer than the blocks")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        self.image_config()  # raises ValueError if the picture cannot be cut into whole patches

    def image_config(self) -> ViTConfig:
        """The shape of a ViT with the same patches, positions and blocks, but for their layer scale."""
        return ViTConfig(self.image_size, self.patch_size, self.channels, self.width, self.depth, self.heads,
                         self.mlp_ratio, dropout=self.dropout, eps=self.eps)  # fmt: skip


def paper_config(name: str = "base") -> VLMoConfig:
    """The paper's models, "base" and "large" (appendix), with absolute positions as in the paper's equations."""
    sizes = {"base": (768, 12, 2, 12), "large": (1024, 24, 3, 16)}
    if name not in sizes:
        raise ValueError(f"no VLMo is called {name!r}: choose one of {', '.join(map(repr, sizes))}")
    width, depth, pair_depth, heads = sizes[name]
    return VLMoConfig(224, 16, vocab_size=30_522, max_text=40, width=width, depth=depth, pair_depth=pair_depth,
                      heads=heads, layer_scale=0.1, codes=8_192)  # fmt: skip


def routes(config: VLMoConfig, text: int, image: int, *, pair_experts: bool | None = None) -> list[Route]:
    """Which expert computes which tokens, block by block, for rows of `text` words, then `image` tokens (paper, 3.1).

    Nothing about it is learned: a word goes to L-FFN ("text"), a patch to V-FFN ("image"), and in the last F blocks
    every token to VL-FFN ("pair") if the row has words and patches, or if `pair_experts` says so.
    """
    own = [(name, n) for name, n in (("text", text), ("image", image)) if n]
    pair = len(own) == 2 if pair_experts is None else pair_experts
    top = [("pair", text + image)] if pair else own
    return [own] * (config.depth - config.pair_depth) + [top] * config.pair_depth


def shares(x: Tensor, route: Route) -> Iterator[tuple[str, Tensor]]:
    """Cut rows x (B, T, D) into the route's pieces, with the name of each. T may end before the route does."""
    start = 0
    for name, n in route:
        if start < x.shape[1]:
            yield name, x[:, start : start + n]
        start += n


class Expert(nn.Module):
    """A LayerNorm and an MLP, what a modality has for itself: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, ratio=config.mlp_ratio, dropout=config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class SeparateAttention(nn.Module):
    """For comparison (paper, appendix): words and patches look at each other, each with projections of its own."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        c = config
        self.of = nn.ModuleDict({name: Attention(c.width, c.heads, dropout=c.dropout) for name in ("text", "image")})

    def forward(self, x: Tensor, route: Route, *, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        parts = list(shares(x, route))
        q = torch.cat([self.of[name].q(part) for name, part in parts], dim=1)
        k, v = torch.cat([self.of[name].kv(part) for name, part in parts], dim=1).chunk(2, dim=-1)
        heads = self.of["text"].heads
        q, k, v = (t.view(B, T, heads, D // heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, D)
        return torch.cat([self.of[name].dropout(self.of[name].proj(part)) for name, part in shares(y, route)], dim=1)


class MoMEBlock(nn.Module):
    """A Multiway block (paper, eq. 2-3): one attention for all tokens, then for each token the MLP of its expert.

    h = x + gamma_1 * MSA(LN(x)), y = h + gamma_2 * FFN_e(LN_e(h)): shared are the first LayerNorm, the attention and
    both layer scales (D); each expert has its own second LayerNorm and MLP.
    """

    def __init__(self, config: VLMoConfig, *, pair: bool) -> None:
        super().__init__()
        c, names = config, ("image", "text", "pair")[: 2 + pair]
        self.separate = c.attention == "separate" and not pair
        self.norm1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = SeparateAttention(c) if self.separate else Attention(c.width, c.heads, dropout=c.dropout)
        if c.experts == "one":
            self.experts = nn.ModuleDict(dict.fromkeys(names, Expert(c)))  # three names, one module
        else:
            self.experts = nn.ModuleDict({name: Expert(c) for name in names})
        for name in ("gamma_1", "gamma_2"):
            scale = nn.Parameter(torch.full((c.width,), c.layer_scale)) if c.layer_scale else None
            self.register_parameter(name, scale)

    def forward(
        self, x: Tensor, route: Route, *, mask: Tensor | None = None, rows: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, T, D) -> (B, rows or T, D) and the attention weights on request. `route` says who computes what."""
        asked = self.norm1(x)
        if self.separate:
            y, weights = self.attn(asked, route, mask=mask)[:, :rows], None
        else:
            y, weights = self.attn(take_rows(asked, rows), asked, mask=mask, need_weights=need_weights)
        h = take_rows(x, rows) + (y if self.gamma_1 is None else self.gamma_1 * y)
        y = torch.cat([self.experts[name](part) for name, part in shares(h, route)], dim=1)
        return h + (y if self.gamma_2 is None else self.gamma_2 * y), weights


class Multiway(nn.Module):
    """What every use shares: words and patches, a stack of Multiway blocks, one last LayerNorm (paper, Fig. 1)."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = ViLTEmbeddings(c, hide_patches=True)
        self.blocks = nn.ModuleList(MoMEBlock(c, pair=i >= c.depth - c.pair_depth) for i in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.pooler = nn.Linear(c.width, c.width)

    def run(
        self, x: Tensor, along: Sequence[Route], *, start: int = 0, mask: Tensor | None = None,
        rows: int | None = None, everything: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Rows x (B, T, D) through the blocks from number `start` on, as many as `along` has routes.

        mask (B, T) is False at padding. `rows` computes only the first tokens in the last block of all. `everything`
        adds "block_i" (B, T, D) and "attention_i" (B, heads, T, T), None where attention is separate.
        """
        named: dict[str, Tensor] = {}
        for i, route in enumerate(along, start):
            last = i == self.config.depth - 1
            how = {"mask": key_mask(mask), "rows": rows if last else None, "need_weights": everything}
            x, weights = self.blocks[i](x, route, **how)
            if everything:
                named |= {f"block_{i}": x, f"attention_{i}": weights}
        return x, named

    def image_states(self, images: Tensor, *, hidden: Tensor | None = None, rows: int | None = None) -> Tensor:
        """Pictures alone: (B, C, H, W) -> final states (B, rows or 1+N, D). `hidden` (B, N): covered patches."""
        x = self.embed.look(images, hidden=hidden)
        return self.norm(self.run(x, routes(self.config, 0, x.shape[1]), rows=rows)[0])

    def text_states(self, ids: Tensor, mask: Tensor, *, rows: int | None = None) -> Tensor:
        """Texts alone: ids and mask (B, L) -> final states (B, rows or L, D)."""
        x = self.embed.read(ids)
        return self.norm(self.run(x, routes(self.config, x.shape[1], 0), mask=mask, rows=rows)[0])


class DualVLMo(Multiway):
    """VLMo as two encoders whose vectors are compared (paper, 3.2): the blocks, with projections and scales for ITC.

    The official code has a second ITC behind the last F blocks with VL-FFN, with projections and a scale of its own.
    """

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        for head, scale in (("itc", "logit_scale"), ("itc_vl", "logit_vl_scale"))[: 1 + (config.pair_depth > 0)]:
            for side in ("image", "text"):
                setattr(self, f"{head}_{side}_proj", nn.Linear(config.width, config.width, bias=False))
            setattr(self, scale, nn.Parameter(torch.tensor(1 / config.temperature).log()))

    def towers(self, x: Tensor, name: str, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The class token of one modality (`name` "image" or "text") as ITC wants it: embedded x (B, T, D) and mask
        (B, T) -> vectors of length 1 (B, D) named "itc" and, if there is a VL-FFN, "itc_vl"."""
        c, n = self.config, {"text": 0, "image": 0} | {name: x.shape[1]}
        low = c.depth - c.pair_depth
        x, _ = self.run(x, routes(c, **n)[:low], mask=mask, rows=1)  # the lower blocks serve both
        vectors = {}
        for head in ("itc", "itc_vl")[: 1 + (c.pair_depth > 0)]:
            top = routes(c, **n, pair_experts=head == "itc_vl")[low:]
            y, _ = self.run(x, top, start=low, mask=mask, rows=1)
            vectors[head] = F.normalize(getattr(self, f"{head}_{name}_proj")(self.norm(y[:, 0])).float(), dim=-1)
        return vectors

    @property
    def temp(self) -> Tensor:
        """What the similarities of the first ITC are divided by, as in ALBEF."""
        return torch.exp(-self.logit_scale)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> vectors of length 1 (B, D)."""
        return F.normalize(self.itc_image_proj(self.image_states(images, rows=1)[:, 0]).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> vectors of length 1 (B, D)."""
        states = self.text_states(ids, ids != self.config.pad_id, rows=1)
        return F.normalize(self.itc_text_proj(states[:, 0]).float(), dim=-1)


class VLMo(DualVLMo):
    """... and as a fusion encoder, with heads for ITM, MLM, stage 1 and answers: all of VLMo (paper, Fig. 1)."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        c = config
        self.itm_head = nn.Linear(c.width, 2)  # scores of "does not match" and "matches"
        self.mlm_head = MLMHead(c.width, c.vocab_size, eps=c.text_eps)  # not tied to the word table (official code)
        self.mim_head = nn.Linear(c.width, c.codes)
        self.answer_head = answer_head(c.width, c.answers) if c.answers else None
        init_vlmo(self)

    def fuse(
        self, text: Tensor, image: Tensor, mask: Tensor | None = None, *, rows: int | None = None,
        everything: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Embedded words (B, L, D) and pictures (B, 1+N, D) -> pooled (B, D) and, by name, the final states "text"
        (B, L, D) and "image" (B, 1+N, D). mask (B, L) is about the words; `rows` and `everything` as in `run`."""
        L, S = text.shape[1], image.shape[1]
        mask = None if mask is None else F.pad(mask, (0, S), value=True)
        along = routes(self.config, L, S)
        x, named = self.run(torch.cat([text, image], dim=1), along, mask=mask, rows=rows, everything=everything)
        states = self.norm(x)
        return torch.tanh(self.pooler(states[:, 0])), named | {"text": states[:, :L], "image": states[:, L:]}

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor | None = None, *, kind: int = 1, **how: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pairs: images (B, C, H, W), ids and mask (B, L) -> what `fuse` gives. `kind`: as in `ViLTEmbeddings.look`."""
        return self.fuse(self.embed.read(ids), self.embed.look(images, kind=kind), mask, **how)

    def look(self, images: Tensor) -> Tensor:
        """What can be done once for each picture: (B, C, H, W) -> embedded tokens (B, 1+N, D), and no more."""
        return self.embed.look(images)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What can be done once for each text: ids (B, L) -> embedded words (B, L, D)."""
        return self.embed.read(ids)

    def match(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ITM: what `read` (B, L, D) and, for as many pictures, `look` (B, 1+N, D) gave -> scores (B, 2)."""
        return self.itm_head(self.fuse(text, image, mask, rows=1)[0])


@torch.no_grad()
def init_vlmo(model: VLMo) -> None:
    """Matrices and tables N(0, 0.02) as in BERT, but the matrices wider spread: 0.02 is right for D = 768."""
    init_normal(model, matrices=0.02 * (768 / model.config.width) ** 0.5)
    for parameter in (model.embed.image.cls_token, model.embed.image.pos_embed, model.embed.mask_patch):
        nn.init.normal_(parameter, std=0.02)


def moves_in_stage_2(name: str) -> bool:
    """Whether a parameter is trained on texts alone (paper, 3.3; official code): embeddings of words and types, L-FFN,
    MLM head, and the last LayerNorm, which pictures use too. Attention, V-FFN and layer scale stay as they were.
    """
    ours = name.startswith(("embed.text.", "embed.types.", "mlm_head.", "norm."))
    return ours or ".experts.text." in name or ".attn.of.text." in name


@torch.no_grad()
def start_from_vit(model: VLMo, vit: ViT) -> None:
    """Give V-FFN and attention a trained ViT's weights, with layer scales of 1, which a ViT has none of. Raises
    ValueError if they do not fit."""
    refuse_unlike(vit, model.config.image_config(), "VLMo")
    model.embed.image.load_state_dict(vit.embed.state_dict())
    model.norm.load_state_dict(vit.encoder.norm.state_dict())
    for ours, theirs in zip(model.blocks, vit.encoder.blocks, strict=True):
        expert, attn = ours.experts["image"], ours.attn.of["image"] if ours.separate else ours.attn
        for to, source in ((ours.norm1, theirs.norm1), (attn, theirs.attn), (expert.norm, theirs.norm2),
                           (expert.mlp, theirs.mlp)):  # fmt: skip
            to.load_state_dict(source.state_dict())
        for scale in (ours.gamma_1, ours.gamma_2):
            if scale is not None:
                nn.init.ones_(scale)


class TwoPictures(nn.Module):
    """Is a sentence about two pictures true? Two passes of the same VLMo, pooled states side by side (paper, 4.1)."""

    def __init__(self, vlmo: VLMo) -> None:
        super().__init__()
        D = vlmo.config.width
        self.config = replace(vlmo.config, modality_types=3)
        self.vlmo = VLMo(self.config)
        weights = vlmo.state_dict()
        types = weights["embed.types.weight"]
        weights["embed.types.weight"] = torch.cat([types[:2], types[1:2]])  # a second picture starts as a picture
        self.vlmo.load_state_dict(weights)
        self.head = nn.Sequential(nn.Linear(2 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, 2))

    def forward(self, left: Tensor, right: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Two pictures (B, C, H, W), a sentence ids and mask (B, L) -> scores of "false" and "true" (B, 2)."""
        pooled = [self.vlmo(images, ids, mask, rows=1, kind=kind)[0] for kind, images in ((1, left), (2, right))]
        return self.head(torch.cat(pooled, dim=1))
