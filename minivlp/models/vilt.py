"""ViLT: one transformer reads words and patches side by side (Kim, Son, Kim 2021, arXiv:2102.03334)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlp.layers import Encoder, MLMHead, TextEmbeddings, init_normal
from minivlp.models.vit import ViT, ViTConfig, ViTEmbeddings, interpolate_positions

ATTEND = ("all", "cross", "separate")


@dataclass(frozen=True)
class ViLTConfig:
    """Everything that fixes a ViLT's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side, of the learned position grid
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    vocab_size: int = 340  # V
    max_text: int = 64  # L at most, [CLS] and [SEP] included (the paper: 40, of larger word pieces)
    width: int = 128  # D, numbers per token
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLP / D
    dropout: float = 0.0
    eps: float = 1e-6  # of the LayerNorms in and after the blocks
    text_eps: float = 1e-12  # of the LayerNorm in the text embedding and in the MLM head
    modality_types: int = 2  # 0: none; 2: text and image; NLVR2 uses a third for its second picture
    attend: str = "all"  # who may look at whom, see `block_mask`
    patch_colours: bool = False  # a head that guesses the mean colour of hidden patches (paper, 4.5)
    answers: int = 0  # K, size of the VQA head; 0: no such head

    def __post_init__(self) -> None:
        if self.attend not in ATTEND:
            raise ValueError(f"attend={self.attend!r}: choose one of {', '.join(map(repr, ATTEND))}")
        self.image_config()  # raises ValueError if the picture cannot be cut into whole patches

    def image_config(self) -> ViTConfig:
        """The shape of the ViT whose patches, positions and blocks this model takes over."""
        return ViTConfig(self.image_size, self.patch_size, self.channels, self.width, self.depth, self.heads,
                         self.mlp_ratio, dropout=self.dropout, eps=self.eps)  # fmt: skip


def block_mask(L: int, S: int, attend: str = "all", *, device: torch.device | None = None) -> Tensor:
    """Who may look at whom among L text and S image tokens: (L+S, L+S) boolean, True = "may look at".

    "all": everyone at everyone, a single stream. "cross": only at the other modality, cross-attention in both
    directions with shared weights. "separate": only at the own modality, two encoders with shared weights.
    """
    text = torch.arange(L + S, device=device) < L
    same = text[:, None] == text[None, :]
    return {"all": torch.ones_like(same), "cross": ~same, "separate": same}[attend]


def padded_positions(table: Tensor, image_mask: Tensor) -> Tensor:
    """Positions for pictures of different sizes in a padded batch (official code; the paper's 4.1 says "interpolate").

    table (1, 1+g*g, D) and image_mask (B, rows, columns), True in the upper left rectangle that a picture fills
    -> (B, 1 + rows*columns, D): each picture gets the whole table, stretched to its own rectangle; zeros elsewhere.
    """
    B, rows, columns = image_mask.shape
    D = table.shape[2]
    positions = table.new_zeros(B, rows, columns, D)
    sizes = torch.stack([image_mask[:, :, 0].sum(1), image_mask[:, 0].sum(1)], dim=1)  # (B, 2): rows, columns filled
    for b, (r, c) in enumerate(sizes.tolist()):
        positions[b, :r, :c] = interpolate_positions(table, (r, c))[0, 1:].view(r, c, D)
    return torch.cat([table[:, :1].expand(B, -1, -1), positions.flatten(1, 2)], dim=1)


class ViLTEmbeddings(nn.Module):
    """Words and patches in one row, marked by type (ViLT, eq. 1-3): what the transformer sees."""

    def __init__(self, config: ViLTConfig, *, hide_patches: bool = False) -> None:
        super().__init__()
        c = config
        self.text = TextEmbeddings(c.vocab_size, c.max_text, c.width, dropout=c.dropout, eps=c.text_eps)
        self.image = ViTEmbeddings(c.image_config())
        self.types = nn.Embedding(c.modality_types, c.width) if c.modality_types else None
        if hide_patches:
            self.mask_patch = nn.Parameter(torch.zeros(c.width))

    def read(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D), normalised before the type is added, which would otherwise be distorted."""
        return self.text(ids) if self.types is None else self.text(ids) + self.types.weight[0]

    def look(
        self, images: Tensor, *, image_mask: Tensor | None = None, hidden: Tensor | None = None, kind: int = 1
    ) -> Tensor:
        """images (B, C, H, W) -> (B, 1 + N, D), not normalised. `kind` is the picture's row in the table of types.

        `image_mask` (B, H/P, W/P) marks the patches that a picture fills, `hidden` (B, N) those to be replaced by the
        learned `mask_patch`.
        """
        if image_mask is None and hidden is None:
            image = self.image(images)
        else:  # the same steps, with other positions or patches
            patches, table = self.image.patch_embed(images), self.image.pos_embed
            if hidden is not None:
                patches = torch.where(hidden[..., None], self.mask_patch, patches)
            image = torch.cat([self.image.cls_token.expand(len(patches), -1, -1), patches], dim=1)
            image = self.image.dropout(image + (table if image_mask is None else padded_positions(table, image_mask)))
        return image if self.types is None else image + self.types.weight[kind]

    def forward(self, images: Tensor, ids: Tensor, **how: Tensor | None) -> Tensor:
        """images (B, C, H, W), ids (B, L) -> (B, L + 1 + N, D), text first. `how` as in `look`."""
        return torch.cat([self.read(ids), self.look(images, **how)], dim=1)


def pair_mask(
    x: Tensor, L: int, text_mask: Tensor | None = None, image_mask: Tensor | None = None, attend: str = "all"
) -> Tensor:
    """Who may look at whom in rows x (B, T, D) of L words and the picture's tokens: (B, 1, 1 or T, T) boolean.

    Padding may not be looked at. Padded tokens themselves are computed like the others, and never read.
    """
    B, T, _ = x.shape
    seen = x.new_ones(B, T, dtype=torch.bool)
    if text_mask is not None:
        seen[:, :L] = text_mask
    if image_mask is not None:
        seen[:, L + 1 :] = image_mask.flatten(1)
    mask = seen[:, None, None, :]  # every head and every row alike
    return mask if attend == "all" else mask & block_mask(L, T - L, attend, device=x.device)


class ViLT(nn.Module):
    """One row of words and patches -> one encoder -> heads on top (ViLT, Fig. 3, eq. 1-5)."""

    def __init__(self, config: ViLTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = ViLTEmbeddings(c, hide_patches=c.patch_colours)
        self.encoder = Encoder(c.width, c.depth, c.heads, mlp_ratio=c.mlp_ratio, dropout=c.dropout, eps=c.eps)
        self.pooler = nn.Linear(c.width, c.width)
        self.itm_head = nn.Linear(c.width, 2)  # scores of "does not match" and "matches"
        self.mlm_head = MLMHead(c.width, c.vocab_size, eps=c.text_eps)
        self.mpp_head = MLMHead(c.width, c.channels * 256, eps=c.text_eps) if c.patch_colours else None
        self.answer_head = answer_head(c.width, c.answers) if c.answers else None
        init_normal(self)
        for layer in (self.pooler, self.itm_head):  # 0.02 is BERT's choice at D = 768; a narrow p needs larger numbers,
            nn.init.normal_(layer.weight, std=0.02 * (768 / c.width) ** 0.5)  # or ITM stays at ln 2 in many seeds
        for parameter in (self.embed.image.cls_token, self.embed.image.pos_embed):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, images: Tensor, ids: Tensor, text_mask: Tensor | None = None, *, image_mask: Tensor | None = None,
        hidden: Tensor | None = None, rows: int | None = None, everything: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """images (B, C, H, W), ids (B, L) -> pooled p (B, D), and by name "text" (B, L, D), "image" (B, 1+N, D).

        text_mask (B, L) is True at tokens; image_mask and hidden as in `ViLTEmbeddings`; without them all is real.
        `rows` computes only the first tokens in the last block, 1 for p alone, L for all words (with attend="all");
        `everything` adds "embedded", "block_i" (B, T, D) and "attention_i" (B, heads, T, T), T = L + 1 + N.
        """
        L, attend = ids.shape[1], self.config.attend
        x = self.embed(images, ids, image_mask=image_mask, hidden=hidden)
        mask = pair_mask(x, L, text_mask, image_mask, attend)
        # A block mask has a row for each token; and two encoders need both class tokens after the last block.
        rows = rows if attend == "all" and not everything else None
        states, named = self.encoder(x, mask=mask, rows=rows, everything=everything)
        named |= {"text": states[:, :L], "image": states[:, L:]} | ({"embedded": x} if everything else {})
        pooled = torch.tanh(self.pooler(states[:, 0]))  # the text's class token; the image's has no head
        if attend == "separate":
            pooled = pooled * torch.tanh(self.pooler(states[:, L]))
        return pooled, named


def answer_head(width: int, answers: int) -> nn.Sequential:
    """The head of fine-tuning for questions with K frequent answers (paper, 4.3): (B, D) -> (B, K)."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, answers))


def start_from_vit(model: ViLT, vit: ViT) -> ViLT:
    """Take patches, class token, positions and blocks from a trained ViT (paper, 4.2); everything else stays random.

    Raises ValueError if they differ in shape, or if the ViT lacks one of these parts.
    """
    theirs = {f"embed.image.{k}": v for k, v in vit.embed.state_dict().items()}
    theirs |= {f"encoder.{k}": v for k, v in vit.encoder.state_dict().items()}
    ours = {k: v for k, v in model.state_dict().items() if k.startswith(("embed.image.", "encoder."))}
    wrong = [k for k in ours | theirs if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape]
    if vit.config.heads != model.config.heads:  # no shape shows them
        wrong.append("heads")
    if wrong:
        raise ValueError(f"{wrong[0]} of the ViT does not fit this ViLT: give both the same patches, width, depth and "
                         "heads, and the ViT a class token, 1d positions and pre-norm")  # fmt: skip
    model.load_state_dict(theirs, strict=False)
    return model
