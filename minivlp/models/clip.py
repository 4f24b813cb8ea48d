"""CLIP: two towers that meet in one matrix of similarities (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import Attention, Block, Encoder, PatchEmbed, take_rows
from minivlp.models.cnn import ResNetConfig, SmallResNet
from minivlp.models.vit import ViT

MAX_LOGIT_SCALE = math.log(100)  # paper, 2.5: logits are never scaled by more than 100


@dataclass(frozen=True)
class CLIPConfig:
    """Everything that fixes a CLIP's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    image_width: int = 128  # D of the image tower
    image_depth: int = 4  # blocks
    image_heads: int = 4
    vocab_size: int = 340  # V
    max_text: int = 64  # L at most, start and end included (the paper: 76, its code 77)
    text_width: int = 128  # D of the text tower
    text_depth: int = 4
    text_heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLPs / D
    embed_dim: int = 128  # E, numbers of the shared space
    eot_id: int = 3  # the end-of-text token, whose state stands for the whole text; [SEP] in our vocabulary
    gelu: str = "exact"  # "quick" for OpenAI's weights, "exact" for those of open_clip
    eps: float = 1e-5  # of every LayerNorm
    image_tower: str = "vit"  # or "resnet"
    projection: str = "linear"  # the paper's, or "mlp": a hidden layer and a GELU (what SimCLR needed)
    logit_scale: float = math.log(1 / 0.07)  # t at the start; similarities are multiplied by exp(t)
    learn_scale: bool = True

    def __post_init__(self) -> None:
        choices = {"gelu": ("exact", "quick"), "image_tower": ("vit", "resnet"), "projection": ("linear", "mlp")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def paper_config(name: str) -> CLIPConfig:
    """The paper's ViT models (its Table 20) by their names: "B/32", "B/16", "L/14" or "L/14@336px"."""
    sizes = {"B": (768, 12, 12, 512, 8, 512), "L": (1024, 24, 16, 768, 12, 768)}
    size, _, rest = name.partition("/")
    patch, _, pixels = rest.partition("@")
    if name not in ("B/32", "B/16", "L/14", "L/14@336px"):
        raise ValueError(f"no CLIP is called {name!r}: choose B/32, B/16, L/14 or L/14@336px")
    width, depth, heads, text_width, text_heads, embed_dim = sizes[size]
    return CLIPConfig(
        int(pixels.removesuffix("px") or 224), int(patch), image_width=width, image_depth=depth, image_heads=heads,
        vocab_size=49_408, max_text=77, text_width=text_width, text_depth=12, text_heads=text_heads,
        embed_dim=embed_dim, eot_id=49_407, gelu="quick",
    )  # fmt: skip


def causal_mask(length: int, *, device: torch.device | str | None = None) -> Tensor:
    """Who may look at whom when reading from left to right: (T, T), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class CLIPText(nn.Module):
    """The text tower (paper, 2.4): words and positions -> causal blocks -> LayerNorm -> the end-of-text token's state.

    The mask lets a word look at earlier words alone, so only the last token, end-of-text, has seen all of them.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.text_width)
        self.position = nn.Embedding(c.max_text, c.text_width)
        self.encoder = Encoder(
            c.text_width, c.text_depth, c.text_heads, mlp_ratio=c.mlp_ratio, eps=c.eps, gelu=c.gelu
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Words plus positions: (B, L) -> (B, L, D). No LayerNorm here, unlike BERT. Raises ValueError if too long."""
        L = ids.shape[1]
        if self.position.num_embeddings < L:
            raise ValueError(f"a text of {L} tokens does not fit {self.position.num_embeddings} positions: cut it with "
                             "encode_batch(..., max_length=...) or build the model with a larger max_text")  # fmt: skip
        return self.word(ids) + self.position.weight[:L]

    def forward(self, ids: Tensor, *, everything: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """ids (B, L) -> (B, D). `everything` adds "text" (B, L, D), all final states, and the `Encoder`'s names.

        What stands behind the first end-of-text is padding, and no mask is needed for it: nobody who is read can look
        to the right. Raises ValueError for a text that is too long or has no end.
        """
        x, L = self.embed(ids), ids.shape[1]
        ends = ids == self.config.eot_id
        if not ends.any(dim=1).all():
            raise ValueError(f"a text has no end-of-text token {self.config.eot_id}: was it cut off?")
        eot = ends.int().argmax(dim=1)  # (B), the first one
        mask = causal_mask(L, device=ids.device)
        if everything:
            states, named = self.encoder(x, mask=mask, everything=True)
            return take_rows(states, eot)[:, 0], named | {"text": states}
        *blocks, last = self.encoder.blocks
        for block in blocks:
            x, _ = block(x, mask=mask)
        # Only one token of the last block is read: it looks at everything up to itself.
        before = torch.arange(L, device=ids.device) <= eot[:, None]
        x, _ = last(x, mask=before[:, None, None, :], rows=eot)
        return self.encoder.norm(x)[:, 0], {}


def check_pictures(images: Tensor, config: CLIPConfig) -> None:
    """Raises ValueError for pictures of any other shape than (B, C, H, W) with the configured channels and size."""
    expected = (config.channels, config.image_size, config.image_size)
    if images.shape[1:] != expected:  # 32x128 has as many patches as 64x64, and would pass unnoticed
        raise ValueError(f"expected pictures (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}: "
                         "resize them or build the model with another image_size")  # fmt: skip


class CLIPVision(nn.Module):
    """The image tower: patches without bias, class token, positions, **a LayerNorm before the blocks** (paper, 2.4),
    blocks, LayerNorm on the class token."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.image_width, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.image_width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.grid**2, c.image_width))
        self.norm_pre = nn.LayerNorm(c.image_width, eps=c.eps)
        self.encoder = Encoder(
            c.image_width, c.image_depth, c.image_heads, mlp_ratio=c.mlp_ratio, eps=c.eps, gelu=c.gelu
        )

    def embed(self, images: Tensor) -> Tensor:
        """What the blocks are given: images (B, C, H, W) -> (B, 1+N, D)."""
        check_pictures(images, self.config)
        x = self.patch_embed(images)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm_pre(x)

    def forward(self, images: Tensor, *, everything: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W) -> (B, D). `everything` adds "embedded" (B, 1+N, D) and the `Encoder`'s names."""
        x = self.embed(images)
        states, named = self.encoder(x, rows=None if everything else 1, everything=everything)
        return states[:, 0], named | {"embedded": x} if everything else {}


class CLIPResNet(nn.Module):
    """A convolutional image tower. The paper's ResNets pool with attention; this small one takes the mean."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.net = SmallResNet(ResNetConfig(channels=config.channels))
        self.net.head = nn.Identity()
        self.width = self.net.config.widths[-1]

    def forward(self, images: Tensor, *, everything: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W) -> (B, D), and on request the "map" (B, D, h, w)."""
        pooled, named = self.net(images)
        return pooled, named if everything else {}


class CLIP(nn.Module):
    """Image tower and text tower, a projection each into E shared numbers, and a temperature (paper, Fig. 3)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.vision = CLIPVision(c) if c.image_tower == "vit" else CLIPResNet(c)
        self.text = CLIPText(c)
        width = c.image_width if c.image_tower == "vit" else self.vision.width
        self.image_projection = projection(width, c.embed_dim, kind=c.projection)
        self.text_projection = projection(c.text_width, c.embed_dim, kind=c.projection)
        self.logit_scale = nn.Parameter(torch.tensor(float(c.logit_scale)), requires_grad=c.learn_scale)
        init_clip(self)

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> vectors of length 1, (B, E)."""
        return F.normalize(self.image_projection(self.vision(images)[0]).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Texts (B, L) -> vectors of length 1, (B, E)."""
        return F.normalize(self.text_projection(self.text(ids)[0]).float(), dim=-1)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W), ids (B', L) -> logits exp(t) * cosine, **a row for each picture** (B, B'), and by name
        "image" (B, E) and "text" (B', E), the vectors of length 1."""
        image, text = self.encode_image(images), self.encode_text(ids)
        return self.compare(image, text), {"image": image, "text": text}

    def compare(self, image: Tensor, text: Tensor) -> Tensor:
        """Vectors of length 1, (B, E) and (B', E), -> logits exp(t) * cosine (B, B')."""
        with torch.autocast(image.device.type, enabled=False):  # half precision is too coarse for logits up to 100
            return self.logit_scale.exp() * image @ text.T


def projection(width: int, embed_dim: int, *, kind: str = "linear") -> nn.Module:
    """From a tower's D numbers into the shared space: one matrix without bias, or "mlp", with a hidden layer."""
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim, bias=False))


def clamp_logit_scale(model: CLIP, step: int = 0) -> None:
    """Keep t in [0, ln 100] (paper, 2.5; open_clip): to be called after every update, `fit(after_step=[...])`."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


@torch.no_grad()
def init_clip(model: nn.Module) -> None:
    """Starting values by width W and depth L as in the official code: the deeper, the smaller what a block adds.

    Words N(0, 0.02), positions N(0, 0.01); in the blocks q, k, v W^-0.5, what is added to the stream
    W^-0.5 (2L)^-0.5, the MLP's first layer (2W)^-0.5; projections and the picture's class token and positions W^-0.5.
    The official release does so for the text tower and leaves the image tower's blocks at PyTorch's defaults, though
    the paper speaks of a modified initialisation; we use the same rule for both.
    """
    for name, module in model.named_modules():
        if isinstance(module, Encoder):
            for block in module.blocks:
                init_block(block, len(module.blocks))
        elif isinstance(module, CLIPText):
            nn.init.normal_(module.word.weight, std=0.02)
            nn.init.normal_(module.position.weight, std=0.01)
        elif isinstance(module, CLIPVision):
            for table in (module.cls_token, module.pos_embed):
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)
        elif isinstance(module, nn.Linear) and "projection" in name:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_block(block: Block, depth: int) -> None:
    """One block of a tower with `depth` of them, see `init_clip`. Biases 0."""
    attention: Attention = block.attn
    W = attention.q.in_features
    deep = W**-0.5 * (2 * depth) ** -0.5
    stds = {attention.q: W**-0.5, attention.kv: W**-0.5, attention.proj: deep,
            block.mlp.fc1: (2 * W) ** -0.5, block.mlp.fc2: deep}  # fmt: skip
    for layer, std in stds.items():
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_from_vit(model: nn.Module, vit: ViT, images: Tensor) -> None:
    """Give the image tower a trained ViT's patches, positions and blocks (not the paper's way: it starts at random).

    A ViT has no LayerNorm before its blocks. So that they see what they are used to, that of CLIP starts with the mean
    size of the ViT's tokens, measured on `images`. Raises ValueError, with nothing copied, if the two do not fit.
    """
    vision = model.vision
    if not isinstance(vision, CLIPVision):
        raise ValueError("this image tower is no ViT and cannot start from one: build the CLIP with image_tower='vit'")
    c = vision.config
    needed = {"image_size": c.image_size, "patch_size": c.patch_size, "channels": c.channels, "width": c.image_width,
              "depth": c.image_depth, "heads": c.image_heads, "mlp_ratio": c.mlp_ratio, "gelu": c.gelu,
              "pool": "cls", "position": "1d", "norm": "pre"}  # fmt: skip
    for name, value in needed.items():
        theirs = getattr(vit.config, name)
        if theirs != value:
            raise ValueError(f"the ViT has {name}={theirs!r} where this CLIP needs {value!r}: build both alike")
    size = vit.embed(images).std(dim=-1, correction=0).mean()
    vision.patch_embed.proj.weight.copy_(vit.embed.patch_embed.proj.weight)
    vision.cls_token.copy_(vit.embed.cls_token)
    vision.pos_embed.copy_(vit.embed.pos_embed)
    vision.pos_embed[:, 1:] += vit.embed.patch_embed.proj.bias  # CLIP's patches have no bias: it is a position's part
    vision.norm_pre.weight.fill_(size)
    vision.encoder.load_state_dict(vit.encoder.state_dict())
