"""ViT: an image is a sentence of patches (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import Encoder, PatchEmbed, init_xavier

# Paper, Table 1 (Ti and S: the official repository): width, depth, heads. The MLP is always four times as wide.
PAPER_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes a ViT's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    width: int = 128  # D, numbers per token
    depth: int = 4  # L, blocks
    heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLP / D
    num_classes: int = 12  # K
    pool: str = "cls"  # "cls": read the class token; "mean": no class token, average the patches
    position: str = "1d"  # "1d": one learned vector per token; "2d": column half + row half; "none"
    norm: str = "pre"  # "pre" (the paper) or "post" (BERT)
    gelu: str = "exact"  # "exact" (erf) or "tanh" (flax's default)
    dropout: float = 0.0
    eps: float = 1e-6  # of LayerNorm; checkpoints in the transformers format say 1e-12
    head_hidden: int = 0  # > 0: the tanh layer that the paper's head has during pre-training

    def __post_init__(self) -> None:
        choices = {
            "pool": ("cls", "mean"),
            "position": ("1d", "2d", "none"),
            "norm": ("pre", "post"),
            "gelu": ("exact", "tanh"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")
        if self.position == "2d" and self.width % 2:
            raise ValueError(f"position='2d' needs an even width, not {self.width}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """T, the length of the sequence: the patches and, if there is one, the class token."""
        return self.grid**2 + (self.pool == "cls")


def paper_config(name: str, *, image_size: int = 224, num_classes: int = 1000) -> ViTConfig:
    """The paper's models by their names (Table 1), for instance `paper_config("B/16")`."""
    size, _, patch = name.partition("/")
    if size not in PAPER_SIZES or not patch.isdigit():
        raise ValueError(f"no ViT is called {name!r}: write size/patch with a size of {', '.join(PAPER_SIZES)}")
    width, depth, heads = PAPER_SIZES[size]
    return ViTConfig(image_size, int(patch), width=width, depth=depth, heads=heads, num_classes=num_classes)


def refuse_unlike(vit: ViT, needed: ViTConfig, model: str) -> None:
    """Raises ValueError if a trained ViT's weights do not fit a `model` (its name) that has a ViT's parts inside, with
    the shape that it needs."""
    for name in ("image_size", "patch_size", "channels", "width", "depth", "heads", "mlp_ratio", "pool", "position",
                 "norm", "gelu"):  # fmt: skip
        ours, theirs = getattr(needed, name), getattr(vit.config, name)
        if ours != theirs:
            raise ValueError(f"the ViT has {name}={theirs!r} where this {model} needs {ours!r}: build both alike")


class ViTEmbeddings(nn.Module):
    """Patches, class token and positions: what the transformer sees (ViT, eq. 1). (B, C, H, W) -> (B, T, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.width)
        if c.pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        if c.position == "1d":
            self.pos_embed = nn.Parameter(torch.zeros(1, c.tokens, c.width))
        elif c.position == "2d":  # appendix D.4: one half of a code says the column, the other half the row
            self.pos_x = nn.Parameter(torch.zeros(1, c.grid, c.width // 2))
            self.pos_y = nn.Parameter(torch.zeros(1, c.grid, c.width // 2))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, images: Tensor) -> Tensor:
        """`images` are uint8, or floats in [-1, 1]. Raises ValueError at any size but the configured one."""
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"expected pictures (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
                             "for another resolution use at_resolution(model, side)")  # fmt: skip
        x = self.patch_embed(images)  # (B, N, D)
        if c.position == "2d":
            column, row = self.pos_x.repeat(1, c.grid, 1), self.pos_y.repeat_interleave(c.grid, dim=1)
            x = x + torch.cat([column, row], dim=-1)
        if c.pool == "cls":
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D)
        if c.position == "1d":
            x = x + self.pos_embed
        return self.dropout(x)


class ViT(nn.Module):
    """Embeddings -> L encoder blocks -> class token (or mean) -> head (ViT, Fig. 1, eq. 1-4)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = ViTEmbeddings(c)
        self.encoder = Encoder(
            c.width, c.depth, c.heads, mlp_ratio=c.mlp_ratio, dropout=c.dropout, eps=c.eps, norm=c.norm, gelu=c.gelu
        )
        self.hidden = nn.Sequential(nn.Linear(c.width, c.head_hidden), nn.Tanh()) if c.head_hidden else nn.Identity()
        self.head = nn.Linear(c.head_hidden or c.width, c.num_classes)
        init_vit(self)

    def forward(self, images: Tensor, *, everything: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W) -> class scores (B, K) and the named intermediates.

        `named["pooled"]` (B, D) is always there. With `everything=True` so are "embedded" and "block_i" (B, T, D),
        "attention_i" (B, heads, T, T) and "tokens", the final normalised states (B, T, D).
        """
        embedded = self.embed(images)
        cls = self.config.pool == "cls"
        # Only the class token is read, so the last block need not compute the others: same scores, less work.
        tokens, named = self.encoder(embedded, rows=1 if cls and not everything else None, everything=everything)
        if everything:
            named |= {"embedded": embedded, "tokens": tokens}
        named["pooled"] = tokens[:, 0] if cls else tokens.mean(dim=1)
        return self.head(self.hidden(named["pooled"])), named


@torch.no_grad()
def init_vit(model: ViT) -> None:
    """The official (JAX) initialisation: Xavier in the blocks, positions N(0, 0.02), class token and head zero.

    A zero head makes every class equally likely, so the first loss is exactly ln K.
    """
    init_xavier(model)
    patches = model.embed.patch_embed.proj.weight  # (D, C*P*P)
    nn.init.trunc_normal_(patches, std=patches.shape[1] ** -0.5)
    for name, parameter in model.embed.named_parameters(recurse=False):
        if name.startswith("pos_"):
            nn.init.normal_(parameter, std=0.02)
    nn.init.zeros_(model.head.weight)


def interpolate_positions(table: Tensor, new_grid: int | tuple[int, int], *, prefix: int = 1) -> Tensor:
    """Stretch learned positions to another grid (ViT, 3.2): (1, prefix + g*g, D) -> (1, prefix + rows*columns, D).

    `new_grid` is (rows, columns), or one number for both. The first `prefix` rows of the table (the class token) have
    no place in the picture and stay as they are. Bilinear with corners kept, as in the official JAX code; transformers
    uses bicubic without corners, which gives slightly other numbers.
    """
    first, grid = table[:, :prefix], table[:, prefix:]
    g = round(grid.shape[1] ** 0.5)
    if g * g != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} positions are no square grid: is prefix={prefix} right?")
    size = (new_grid, new_grid) if isinstance(new_grid, int) else new_grid
    grid = grid.transpose(1, 2).unflatten(2, (g, g))  # (1, D, g, g): a picture with D channels
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=True)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def at_resolution(model: ViT, image_size: int) -> ViT:
    """A copy of `model` for larger or smaller pictures: same patch size, another number of patches (ViT, 3.2)."""
    if model.config.position == "2d":
        raise ValueError("at_resolution knows the positions '1d' and 'none' only")
    resized = ViT(replace(model.config, image_size=image_size)).to(model.head.weight.device)
    weights = model.state_dict()
    if model.config.position == "1d":
        prefix = int(model.config.pool == "cls")
        table = interpolate_positions(weights["embed.pos_embed"], resized.config.grid, prefix=prefix)
        weights = weights | {"embed.pos_embed": table}
    resized.load_state_dict(weights)
    return resized.train(model.training)
