"""FLIP: CLIP that looks at half of each picture while it trains (Li et al. 2022, arXiv:2212.00794)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import Encoder, PatchEmbed, init_xavier, patchify, to_float_pixels
from minivlp.models.clip import CLIP, CLIPConfig, CLIPText, check_pictures

PAPER_SIZES = {  # released code: patch, image width, depth and heads, text width, depth and heads, shared numbers E
    "B/16": (16, 768, 12, 12, 512, 12, 8, 512),
    "L/16": (16, 1024, 24, 16, 768, 12, 12, 768),
    "H/14": (14, 1280, 32, 16, 1024, 24, 16, 1024),
}


@dataclass(frozen=True)
class FLIPConfig(CLIPConfig):
    """CLIP's choices with FLIP's changes, and three new ones. The defaults are the course's own small model."""

    patch_size: int = 8  # 64 patches: what is removed must cost something
    text_width: int = 64  # a small text tower: what it costs cannot be saved (the paper's: 4 to 7 % of a picture)
    text_depth: int = 2
    text_heads: int = 2
    pad_id: int = 0  # the token that fills up short texts
    position: str = "sincos"  # fixed waves, or "learned" as in CLIP
    pool: str = "mean"  # of all tokens, "patches": without the class token, "cls": CLIP's

    def __post_init__(self) -> None:
        choices = {"gelu": ("exact", "tanh"), "position": ("sincos", "learned"), "pool": ("mean", "patches", "cls"),
                   "image_tower": ("vit",), "projection": ("linear", "mlp")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.position == "sincos" and self.image_width % 4:
            raise ValueError(f"position='sincos' needs an image_width that is a multiple of 4, not {self.image_width}")


def paper_config(name: str) -> FLIPConfig:
    """The paper's models by their names: "B/16", "L/16" or "H/14", at 224 pixels with BERT's vocabulary."""
    if name not in PAPER_SIZES:
        raise ValueError(f"no FLIP is called {name!r}: choose one of {', '.join(PAPER_SIZES)}")
    patch, width, depth, heads, text_width, text_depth, text_heads, embed_dim = PAPER_SIZES[name]
    return FLIPConfig(
        224, patch, image_width=width, image_depth=depth, image_heads=heads, vocab_size=30_522, max_text=32,
        text_width=text_width, text_depth=text_depth, text_heads=text_heads, embed_dim=embed_dim, gelu="tanh", eps=1e-6,
    )  # fmt: skip


def keep_count(tokens: int, ratio: float) -> int:
    """K = floor(N * (1 - ratio)). Raises ValueError if ratio is not in [0, 1) or nothing would be left."""
    K = int(tokens * (1 - ratio) + 1e-6)  # 10 * (1 - 0.9) is 0.9999999999999998
    if not (0 <= ratio < 1 and K):
        raise ValueError(f"removing {ratio:.0%} of {tokens} tokens cannot be done: choose a ratio from 0 to below 1 "
                         "that leaves at least one")  # fmt: skip
    return K


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stay (MAE's sampling, which FLIP uses): noise (B, N), any random numbers, -> keep, removed, restore.

    Each row is sorted on its own. `keep` (B, K), see `keep_count`, lists the places with the least noise; `removed`
    (B, N) is True at all others; `restore` (B, N) brings "first the kept, then the removed" back in order.
    """
    K = keep_count(noise.shape[1], ratio)
    shuffle = noise.argsort(dim=1)  # (B, N), the places from the least noise to the most
    removed = torch.ones_like(noise, dtype=torch.bool)
    removed.scatter_(1, shuffle[:, :K], False)
    return shuffle[:, :K], removed, shuffle.argsort(dim=1)


def text_masking(noise: Tensor, words: Tensor, ratio: float, *, prioritised: bool = True) -> Tensor:
    """Which tokens of a text stay (paper, 3 and Table 1c): noise (B, L) in [0, 1), words (B, L) -> keep (B, K).

    `words` is False at padding, which `prioritised` removes first. The first token always stays, and stays first: it
    will speak for the text. Nothing is replaced, unlike in BERT.
    """
    if prioritised:
        noise = noise + (~words).float()  # a bias larger than any noise: padding goes to the end of the row
    noise = noise.index_fill(1, torch.tensor([0], device=noise.device), -1.0)
    return random_masking(noise, ratio)[0]


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed positions (MAE's): (grid * grid, width), waves of width/4 lengths from 2 pi to 20,000 pi patches.

    The first half says the column, the second the row; each is width/4 sines, then width/4 cosines.
    """
    frequency = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)  # (grid, width/4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width/2), of a column or a row
    column, row = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)  # in reading order
    return torch.cat([column, row], dim=1).float()


class FLIPVision(nn.Module):
    """The image tower: a plain ViT that can be given some of the patches only (paper, 3).

    No LayerNorm before the blocks; the mean runs over the class token too (released code).
    """

    def __init__(self, config: FLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.image_width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.image_width))
        if c.position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(c.grid**2, c.image_width))
        else:
            self.register_buffer("pos_embed", sincos_positions(c.grid, c.image_width))
        sizes = c.image_width, c.image_depth, c.image_heads
        self.encoder = Encoder(*sizes, mlp_ratio=c.mlp_ratio, eps=c.eps, gelu=c.gelu)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images (B, C, H, W), keep (B, K) -> tokens (B, 1+K, D), class token first; without `keep` K = N."""
        check_pictures(images, self.config)
        patches = patchify(images, self.config.patch_size)  # (B, N, C*P*P)
        positions = self.pos_embed  # (N, D)
        if keep is not None:  # what is dropped is dropped before anything is computed from it
            patches = patches.take_along_dim(keep[..., None], dim=1)  # (B, K, C*P*P)
            positions = positions[keep]  # (B, K, D), of the patch's place in the whole picture
        x = self.patch_embed.proj(to_float_pixels(patches)) + positions
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # the class token gets no position

    def forward(
        self, images: Tensor, keep: Tensor | None = None, *, everything: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W), keep (B, K) -> (B, D) and "tokens" (B, 1+K, D), the final states that were computed.
        `everything` adds "embedded" (B, 1+K, D) and the `Encoder`'s names."""
        x, pool = self.embed(images, keep), self.config.pool
        only_first = pool == "cls" and not everything
        states, named = self.encoder(x, rows=1 if only_first else None, everything=everything)
        named |= {"tokens": states} | ({"embedded": x} if everything else {})
        pooled = states[:, 0] if pool == "cls" else states[:, int(pool == "patches") :].mean(dim=1)
        return pooled, named


class FLIPText(CLIPText):
    """The text tower: CLIP's without the causal mask, read at its first token (paper, 3: non-autoregressive)."""

    def forward(
        self, ids: Tensor, keep: Tensor | None = None, *, everything: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids (B, L), keep (B, K), whose first column is 0, -> (B, D). `everything` as in `CLIPText`."""
        x, words = self.embed(ids), ids != self.config.pad_id  # (B, L, D), (B, L)
        if keep is not None:
            x, words = x.take_along_dim(keep[..., None], dim=1), words.take_along_dim(keep, dim=1)
        mask = words[:, None, None, :]  # nobody looks at padding (the released code computes this mask and forgets it)
        states, named = self.encoder(x, mask=mask, rows=None if everything else 1, everything=everything)
        return states[:, 0], named | {"text": states} if everything else {}


class FLIP(CLIP):
    """CLIP with other towers, which can be told what to look at. Everything else is inherited."""

    def __init__(self, config: FLIPConfig) -> None:
        super().__init__(config)
        self.vision, self.text = FLIPVision(config), FLIPText(config)
        init_flip(self)

    def encode_image(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Pictures (B, C, H, W), of which the patches `keep` (B, K) are seen, -> vectors of length 1, (B, E)."""
        return F.normalize(self.image_projection(self.vision(images, keep)[0]).float(), dim=-1)

    def encode_text(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Texts (B, L), of which the tokens `keep` (B, K) are read, -> vectors of length 1, (B, E)."""
        return F.normalize(self.text_projection(self.text(ids, keep)[0]).float(), dim=-1)

    def forward(
        self, images: Tensor, ids: Tensor, *, keep: Tensor | None = None, text_keep: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `CLIP.forward`; without `keep` and `text_keep`, as always after training, whole pictures and texts."""
        image, text = self.encode_image(images, keep), self.encode_text(ids, text_keep)
        return self.compare(image, text), {"image": image, "text": text}


@torch.no_grad()
def init_flip(model: FLIP) -> None:
    """The released code's starting values, MAE's: Xavier for all matrices, N(0, 0.02) for words and learned vectors."""
    init_xavier(model)
    for table in (model.text.word.weight, model.text.position.weight, model.vision.cls_token):
        nn.init.normal_(table, std=0.02)
    if model.config.position == "learned":
        nn.init.normal_(model.vision.pos_embed, std=0.02)
