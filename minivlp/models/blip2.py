"""BLIP-2: a frozen eye, a frozen mouth, and a small transformer of queries between them (Li et al. 2023,
arXiv:2301.12597)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from minivlp.layers import MLP, Block, MLMHead, TextEmbeddings, init_normal
from minivlp.models.blip import Past, Speaker, led_by
from minivlp.models.dual_stream import CrossAttention, key_mask
from minivlp.models.lm import prefix_mask


@dataclass(frozen=True)
class QFormerConfig:
    """Everything that fixes a Q-Former's shape. The defaults are the course's own small one."""

    image_width: int = 128  # D' of the frozen image encoder
    queries: int = 8  # Q, learned vectors that ask the picture
    vocab_size: int = 340  # V
    max_text: int = 160  # L at most, queries not counted
    width: int = 128  # D of queries and words
    depth: int = 4  # blocks
    heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLPs / width
    cross_every: int = 2  # blocks 0, 2, 4, ... have a cross-attention
    embed_dim: int = 64  # E, numbers of the shared space
    dropout: float = 0.0
    eps: float = 1e-12
    image_eps: float = 1e-6  # of the LayerNorm on the frozen states
    pad_id: int = 0  # fills up short texts
    sep_id: int = 3  # [SEP] ends a text
    dec_id: int = 6  # [DEC] leads a text that is written
    temperature: float = 0.07  # similarities are divided by it; learned

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.queries < 1 or self.cross_every < 1:
            raise ValueError("choose at least 1 for queries and cross_every, or nothing ever sees the picture")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: choose a positive one, similarities are divided by it")


def paper_config(*, image_width: int = 1408) -> QFormerConfig:
    """The paper's Q-Former: BERT-base with 32 queries, on ViT-g (1408) or CLIP's ViT-L (1024)."""
    return QFormerConfig(
        image_width, 32, vocab_size=30_523, max_text=512, width=768, depth=12, heads=12, embed_dim=256, dropout=0.1,
        sep_id=102, dec_id=30_522,
    )  # fmt: skip


# --- the eye ---------------------------------------------------------------------------------------------------------


class Eye(nn.Module):
    """A trained image encoder that is never trained again: always in eval mode, without gradients (paper, 3.1).

    `tower` has `embed` and `encoder.blocks`, like a ViT or CLIP's image tower. A copy is taken. What comes out are the
    states before its last `skip` blocks: the paper found those of the last one but one to do better. Raises ValueError
    for a `skip` that leaves no block.
    """

    def __init__(self, tower: nn.Module, *, skip: int = 1) -> None:
        super().__init__()
        depth = len(tower.encoder.blocks)
        if not 0 <= skip < depth:
            raise ValueError(f"skip={skip} of {depth} blocks: choose 0 to {depth - 1}, so that one is left to see with")
        self.tower = copy.deepcopy(tower)
        del self.tower.encoder.blocks[depth - skip :]
        for name in ("norm", "head", "hidden"):  # what follows the blocks there
            if hasattr(owner := self.tower.encoder if name == "norm" else self.tower, name):
                delattr(owner, name)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> states (B, 1+N, D')."""
        x = self.tower.embed(images)
        for block in self.tower.encoder.blocks:
            x, _ = block(x)
        return x


# --- Q-Former --------------------------------------------------------------------------------------------------------


class QFormerBlock(Block):
    """A BERT layer for queries and words (paper, 3.1, Fig. 2): they share the self-attention, the queries alone may ask
    the picture, and each kind has an MLP of its own. LayerNorm after each."""

    def __init__(
        self, width: int, heads: int, *, image_width: int | None, mlp_ratio: int = 4, dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps, norm="post")
        self.cross = image_width and CrossAttention(width, heads, context_width=image_width, dropout=dropout, eps=eps)
        self.query_mlp, self.query_norm = MLP(width, ratio=mlp_ratio, dropout=dropout), nn.LayerNorm(width, eps=eps)

    def forward(
        self, x: Tensor, queries: int, image: Tensor | None = None, *, mask: Tensor | None = None,
        past: Past | None = None, rows: int | None = None, need_weights: bool = False,
    ) -> tuple[Tensor, Past, Tensor | None]:  # fmt: skip
        """x (B, T, D), of which the first `queries` are queries and the others words, image (B, S, D') -> (B, rows or
        T, D), keys and values of all read so far, and on request where the queries look (B, heads, Q, S).

        `mask` says who may look at whom, `past` are tokens before x, and `rows` is as in `Block`.
        """
        keys, values = self.attn.keys_values(x)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        x = x[:, :rows]
        y, _ = self.attn(x, (keys, values), mask=mask)
        x, weights, parts = self.norm1(x + y), None, []
        if queries:
            q = x[:, :queries]
            if self.cross:
                q, weights = self.cross(q, image, need_weights=need_weights)
            parts.append(self.query_norm(q + self.query_mlp(q)))
        if queries < x.shape[1]:
            words = x[:, queries:]
            parts.append(self.norm2(words + self.mlp(words)))
        return torch.cat(parts, dim=1), (keys, values), weights


class QFormer(nn.Module):
    """The querying transformer: Q learned queries and, in stage 1, words."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = TextEmbeddings(c.vocab_size, c.max_text, c.width, dropout=c.dropout, eps=c.eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, c.queries, c.width))
        self.blocks = nn.ModuleList(
            QFormerBlock(c.width, c.heads, image_width=c.image_width if i % c.cross_every == 0 else None,
                         mlp_ratio=c.mlp_ratio, dropout=c.dropout, eps=c.eps)
            for i in range(c.depth)
        )  # fmt: skip

    def queries(self, batch: int) -> Tensor:
        """(B, Q, D): as the words, normalised by the embeddings' LayerNorm, but without positions."""
        return self.embed.dropout(self.embed.norm(self.query_tokens).expand(batch, -1, -1))

    def forward(
        self, x: Tensor, queries: int, image: Tensor | None = None, *, mask: Tensor | None = None,
        past: list[Past] | None = None, rows: int | None = None, everything: bool = False,
    ) -> tuple[Tensor, list[Past], dict[str, Tensor]]:  # fmt: skip
        """All blocks, each as `QFormerBlock`: x (B, T, D) -> states (B, rows or T, D), the new `past`, and with
        `everything` "cross_i" (B, heads, Q, S), where each query looks, for the blocks that do. `rows` is for the last
        block alone."""
        kept, named = [], {}
        for i, block in enumerate(self.blocks):
            x, now, weights = block(
                x, queries, image, mask=mask, past=past[i] if past else None,
                rows=rows if i == len(self.blocks) - 1 else None, need_weights=everything and bool(block.cross),
            )  # fmt: skip
            kept.append(now)
            if weights is not None:
                named[f"cross_{i}"] = weights
        return x, kept, named

    @torch.no_grad()
    def without_words(self) -> nn.Module:
        """A copy for stage 2, with all that works on words alone left out: tables and the words' MLPs."""
        alone = copy.deepcopy(self)
        del alone.embed.word, alone.embed.position
        for block in alone.blocks:
            del block.mlp, block.norm2
        return alone


def separate_mask(text_mask: Tensor, queries: int) -> Tensor:
    """ITC's, "uni-modal" (paper, Fig. 2): queries see queries, words see words: text_mask (B, L) -> (B, 1, T, T) with
    T = Q+L. The model makes two passes of it instead."""
    B, L = text_mask.shape
    mask = text_mask.new_zeros(B, queries + L, queries + L)
    mask[:, :queries, :queries] = True
    mask[:, queries:, queries:] = text_mask[:, None, :]
    return mask[:, None]


def joint_mask(text_mask: Tensor, queries: int) -> Tensor:
    """ITM's, "bi-directional": all see all but padding: text_mask (B, L) -> (B, 1, 1, Q+L)."""
    return key_mask(torch.cat([text_mask.new_ones(len(text_mask), queries), text_mask], dim=1))


def grounded_mask(length: int, queries: int, *, device: torch.device | str | None = None) -> Tensor:
    """ITG's, "multimodal causal" (UniLM's): queries see queries alone, each word all queries and the words up to
    itself: (T, T) with T = Q+L. The model reads the queries first and keeps their keys and values instead."""
    mask = torch.zeros(queries + length, queries + length, dtype=torch.bool, device=device)
    mask[:queries, :queries] = True
    mask[queries:] = prefix_mask(queries, length, device=device)
    return mask


class DualBLIP2(nn.Module):
    """Stage 1 as two encoders (paper, 3.2): the frozen eye, a trained LayerNorm on its states, the Q-Former, and
    vectors to compare (ITC). Without an eye only states that are given can be looked at."""

    def __init__(self, config: QFormerConfig, eye: Eye | None) -> None:
        super().__init__()
        self.config = c = config
        self.ln_vision = nn.LayerNorm(c.image_width, eps=c.image_eps)
        self.qformer = QFormer(c)
        self.vision_proj = nn.Linear(c.width, c.embed_dim)
        self.text_proj = nn.Linear(c.width, c.embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(c.temperature)))
        self.eye = eye

    def look(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> the frozen states, normalised, (B, S, D')."""
        return self.ln_vision(self.eye(images))

    def see(self, image: Tensor) -> tuple[Tensor, list[Past]]:
        """A picture's states (B, S, D') -> what the queries make of them (B, Q, D), and their keys and values."""
        states, past, _ = self.qformer(self.qformer.queries(len(image)), self.config.queries, image)
        return states, past

    def query_vectors(self, states: Tensor) -> Tensor:
        """The queries' states (B, Q, D) -> as many vectors of length 1, (B, Q, E)."""
        return F.normalize(self.vision_proj(states).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> Q vectors of length 1 for each, (B, Q, E)."""
        return self.query_vectors(self.see(self.look(images))[0])

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> vectors of length 1 (B, E), of [CLS], which no query and no picture reaches."""
        x, _, _ = self.qformer(self.qformer.embed(ids), 0, mask=key_mask(ids != self.config.pad_id), rows=1)
        return F.normalize(self.text_proj(x[:, 0]).float(), dim=-1)


class BLIP2(DualBLIP2):
    """... and, with the same weights, matching (ITM) and writing (ITG)."""

    def __init__(self, config: QFormerConfig, eye: Eye | None) -> None:
        super().__init__(c := config, None)
        self.itm_head, self.lm_head = nn.Linear(c.width, 2), MLMHead(c.width, c.vocab_size, eps=c.eps)
        init_normal(self, matrices=0.02 * (768 / c.width) ** 0.5)  # as BLIP here
        nn.init.normal_(self.qformer.query_tokens, std=0.02)  # not zero: equal queries would stay equal
        self.lm_head.decoder.weight = self.qformer.embed.word.weight  # one table for reading and writing
        self.eye = eye  # after the starting values: it has its own

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `match` starts from: ids (B, L) -> the words, embedded, (B, L, D)."""
        return self.qformer.embed(ids)

    def match(self, words: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ITM: what `read` gave (B, L, D), mask (B, L), states of as many pictures (B, S, D') -> scores (B, 2) of "does
        not match" and "matches", the mean of the queries'."""
        x, Q = torch.cat([self.qformer.queries(len(words)), words], dim=1), self.config.queries
        states, _, _ = self.qformer(x, Q, image, mask=joint_mask(mask, Q), rows=Q)
        return self.itm_head(states).mean(dim=1)

    def write(self, ids: Tensor, past: list[Past] | None) -> Tensor:
        """ITG: texts (B, L), with [DEC] in the first place, about what the queries saw, their keys and values (None:
        about nothing) -> states (B, L, D). From the one at token t `lm_head` tells the next word."""
        ids = led_by(ids, self.config.dec_id)
        mask = prefix_mask(past[0][0].shape[2] if past else 0, ids.shape[1], device=ids.device)
        return self.qformer(self.qformer.embed(ids), 0, mask=mask, past=past)[0]

    def speaker(self, image: Tensor, *, copies: int = 1) -> Speaker:
        """For `minivlp.generate`: the Q-Former itself writes about a picture's states (B, S, D')."""

        def step(ids: Tensor, past: list[Past]) -> tuple[Tensor, list[Past]]:  # queries take no position
            words = self.qformer.embed(ids, first=past[0][0].shape[2] - self.config.queries)
            return self.qformer(words, 0, past=past)[:2]

        return Speaker(step, self.lm_head, self.see(image)[1], copies=copies)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images (B, C, H, W), ids and mask (B, L) -> by name: "image" (B, S, D'), "queries" (B, Q, D), "query vectors"
        (B, Q, E), "text vector" (B, E), "match" (B, 2) and "next" (B, L, V), the scores of each next word."""
        states, past = self.see(image := self.look(images))
        return {"image": image, "queries": states, "query vectors": self.query_vectors(states),
                "text vector": self.encode_text(ids), "match": self.match(self.read(ids), mask, image),
                "next": self.lm_head(self.write(ids, past))}  # fmt: skip


def query_similarities(queries: Tensor, texts: Tensor) -> Tensor:
    """Every query of every picture with every text: (M, Q, E) and (N, E) -> cosines (M, N, Q). ITC takes the largest of
    the Q (paper, 3.2)."""
    return torch.einsum("mqe,ne->mnq", queries, texts)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class BLIP2Speaker(nn.Module):
    """Stage 2 (paper, 3.3): the queries' states, through one linear layer, are a prefix for a frozen language model.

    `mouth` is a `DecoderLM` or an `EncoderDecoderLM`, of which no copy is taken. It is frozen, but gradients flow
    through it, to the prefix.
    """

    def __init__(self, first: BLIP2, mouth: nn.Module) -> None:
        super().__init__()
        self.config = first.config
        self.eye = first.eye
        self.ln_vision = copy.deepcopy(first.ln_vision)
        self.qformer = first.qformer.without_words()
        self.language_proj = nn.Linear(first.config.width, mouth.config.width)
        nn.init.normal_(self.language_proj.weight, std=0.02 * (768 / first.config.width) ** 0.5)
        nn.init.zeros_(self.language_proj.bias)
        self.mouth = mouth.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.mouth.eval()  # frozen: no dropout either
        return self

    def look(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> the frozen states, normalised, (B, S, D')."""
        return self.ln_vision(self.eye(images))

    def prefix(self, image: Tensor) -> Tensor:
        """A picture's states (B, S, D') -> what the mouth is given in the place of words, (B, Q, D_LM)."""
        states, _, _ = self.qformer(self.qformer.queries(len(image)), self.config.queries, image)
        return self.language_proj(states)

    def write(self, ids: Tensor, image: Tensor, **prompt: Tensor) -> Tensor:
        """Texts (B, L) that begin with [DEC], about a picture's states (B, S, D') -> states of the mouth (B, L, D_LM),
        from which `mouth.lm_head` tells each next word. `prompt` as in the mouth's own `write`."""
        return self.mouth.write(ids, self.prefix(image), **prompt)

    def speaker(self, image: Tensor, **how: LongTensor | int):
        """For `minivlp.generate`: the mouth goes on after a picture's states (B, S, D'). `how` as the mouth's own."""
        return self.mouth.speaker(self.prefix(image), **how)
