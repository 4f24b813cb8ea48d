"""The few blocks that every model of the course is made of: patches, words, attention, MLP, block.

Shapes use one letter each: B batch, C channels, H height, W width, P patch side, N patches, L text tokens, T tokens
of both, D width, V words of the vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_float_pixels(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 -> float32 in [-1, 1], the range of the official ViT; floats pass through untouched."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut pictures into square patches: (B, C, H, W) -> (B, N, C*P*P), N = H/P * W/P in reading order.

    A patch lists its pixels channel by channel, row by row, the order of a convolution kernel's weights.
    Raises ValueError if the picture cannot be cut into whole patches.
    """
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"a {H}x{W} picture cannot be cut into whole {P}x{P} patches: resize it or choose another P")
    x = images.reshape(B, C, H // P, P, W // P, P)  # split both sides into (which patch, where inside it)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P): patch coordinates first, contents last
    return x.reshape(B, (H // P) * (W // P), C * P * P)


class PatchEmbed(nn.Module):
    """Patches -> tokens by one linear layer (ViT, eq. 1; CLIP's has no bias): (B, C, H, W) -> (B, N, D).

    The same numbers as a convolution with kernel P and stride P, whose weight is `proj.weight` reshaped.
    """

    def __init__(self, patch_size: int, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size * patch_size, width, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(to_float_pixels(images), self.patch_size))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, 3.2): every token of `x` asks, the tokens of `context` answer.

    With `context=None` the tokens ask each other: self-attention. D must be a multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width or width, 2 * width)  # keys and values in one product
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def split(self, t: Tensor) -> Tensor:  # (B, T, D) -> (B, heads, T, D/heads)
        return t.view(*t.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What can be kept of context (B, S, D') that is asked again and again: each (B, heads, S, D/heads)."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, T, D), context (B, S, D') or its `keys_values` -> answer (B, T, D) and, on request, the weights
        (B, heads, T, S). `mask` is boolean, broadcastable to (B, heads, T, S); True means "may look at"."""
        B, T, D = x.shape
        q = self.split(self.q(x))
        k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        weights = None
        if need_weights:  # the same computation, spelled out, because the fused kernel never stores the weights
            scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5  # (B, heads, T, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = scores.softmax(dim=-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, D/heads)
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.dropout(self.proj(y)), weights


class QuickGELU(nn.Module):
    """OpenAI's cheap stand-in for the GELU, x * sigmoid(1.702 x). Weights trained with one need the same one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# name -> a new activation: GELUs, and the ReLU that OPT has
GELUS = {"exact": nn.GELU, "tanh": partial(nn.GELU, approximate="tanh"), "quick": QuickGELU, "relu": nn.ReLU}


class MLP(nn.Module):
    """Two linear layers with a GELU between, applied to each token alone: (..., D) -> (..., ratio*D) -> (..., D)."""

    def __init__(self, width: int, *, ratio: int = 4, dropout: float = 0.0, gelu: str = "exact") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.act = GELUS[gelu]()
        self.fc2 = nn.Linear(ratio * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


def take_rows(x: Tensor, rows: int | Tensor | None) -> Tensor:
    """Some tokens of x (B, T, D): all (None), the first `rows`, or one of each, the one that `rows` (B) says."""
    if isinstance(rows, Tensor):
        return x[torch.arange(len(x), device=x.device), rows].unsqueeze(1)  # (B, 1, D)
    return x[:, :rows]


class Block(nn.Module):
    """One transformer layer: attention mixes tokens, the MLP works on each; both are added to the stream `x`.

    norm="pre" (ViT, eq. 2-3): x + f(LN(x)), the stream itself is never normalised. norm="post" (BERT): LN(x + f(x)).
    """

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0, eps: float = 1e-6,
        norm: str = "pre", gelu: str = "exact",
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_first = norm == "pre"
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, ratio=mlp_ratio, dropout=dropout, gelu=gelu)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, rows: int | Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> (B, rows or T, D) and the attention weights on request.

        `rows=1` updates only the first token, which still looks at all: the same numbers for less work when
        nothing after this block reads the other tokens. A tensor (B) of places updates one token of each sequence.
        """
        asked = self.norm1(x) if self.norm_first else x
        y, weights = self.attn(take_rows(asked, rows), asked, mask=mask, need_weights=need_weights)
        x = take_rows(x, rows) + y
        if self.norm_first:
            return x + self.mlp(self.norm2(x)), weights
        x = self.norm1(x)
        return self.norm2(x + self.mlp(x)), weights


class Encoder(nn.Module):
    """A stack of blocks and, after pre-norm blocks, one last LayerNorm: (B, T, D) -> (B, rows or T, D)."""

    def __init__(
        self, width: int, depth: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0, eps: float = 1e-6,
        norm: str = "pre", gelu: str = "exact",
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, norm=norm, gelu=gelu)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps) if norm == "pre" else nn.Identity()

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, rows: int | None = None, everything: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`rows` applies to the last block alone (see `Block`). `everything` asks for the intermediates by name:
        "block_i" (B, T, D) and "attention_i" (B, heads, T, T), i = 0 .. depth-1."""
        named: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x, weights = block(x, mask=mask, rows=rows if last else None, need_weights=everything)
            if everything:
                named |= {f"block_{i}": x, f"attention_{i}": weights}
        return self.norm(x), named


class TextEmbeddings(nn.Module):
    """Token ids -> vectors: word + position, then LayerNorm and dropout (BERT): (B, L) -> (B, L, D).

    BERT also adds a segment vector, the same for every token of a lone sentence. A constant can live in the position
    table, so there is none here; `from_hf` adds it there.
    """

    def __init__(
        self, vocab_size: int, max_text: int, width: int, *, dropout: float = 0.0, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_text, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, ids: Tensor, *, first: int = 0) -> Tensor:
        """`first` is the position of the first token given, where the ones before it have been read already. Raises
        ValueError if a text is longer than the position table."""
        end, room = first + ids.shape[1], self.position.num_embeddings
        if room < end:
            raise ValueError(f"a text of {end} tokens does not fit {room} positions: cut it with encode_batch(..., "
                             "max_length=...) or build the model with a larger max_text")  # fmt: skip
        return self.dropout(self.norm(self.word(ids) + self.position.weight[first:end]))


class MLMHead(nn.Module):
    """From a token's final state back to the vocabulary (BERT, A.1): (..., D) -> (..., V).

    Linear, GELU, LayerNorm, then the output layer with a bias of its own.
    """

    def __init__(self, width: int, vocab_size: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(states))))


@torch.no_grad()
def init_xavier(model: nn.Module) -> None:
    """The starting values of the official (JAX) ViT and of MAE: Xavier-uniform matrices, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():  # after the loop above, which visits an Attention before the layers inside it
        if isinstance(module, Attention):
            for matrix in module.kv.weight.chunk(2):  # two matrices in one tensor: each has its own fan-out
                nn.init.xavier_uniform_(matrix)


@torch.no_grad()
def init_normal(model: nn.Module, *, std: float = 0.02, matrices: float | None = None) -> None:
    """BERT's starting values: matrices and tables N(0, std), biases 0, LayerNorms the identity. `matrices` is another
    std for the linear layers alone."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std if matrices is None else matrices)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())
