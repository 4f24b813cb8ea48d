"""BLIP: one text transformer that reads, matches and writes (Li et al. 2022, arXiv:2201.12086)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from minivlp.layers import MLMHead, TextEmbeddings, init_normal
from minivlp.models.albef import FusionBlock, ImageEncoder, TwoWidths
from minivlp.models.clip import causal_mask
from minivlp.models.dual_stream import key_mask

# What encoder and decoder may share -> its names in a block.
MED_PARTS = {"self-attention": ("attn", "norm1"), "cross-attention": ("cross",), "feed-forward": ("mlp", "norm2")}
EMBEDDINGS = "embeddings"
NOTHING_SHARED = (*MED_PARTS, EMBEDDINGS)


@dataclass(frozen=True)
class BLIPConfig(TwoWidths):
    """Everything that fixes a BLIP's shape. The defaults are the course's own small model."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16  # P, pixels a side
    channels: int = 3  # C
    image_width: int = 128  # D' of the image encoder
    image_depth: int = 4  # blocks
    image_heads: int = 4
    vocab_size: int = 340  # V
    max_text: int = 64  # L at most
    text_width: int = 128  # D of the words
    text_depth: int = 2  # blocks of the text transformer, all with cross-attention
    text_heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLPs / width
    embed_dim: int = 64  # E, numbers of the shared space
    dropout: float = 0.0
    image_eps: float = 1e-6
    text_eps: float = 1e-12
    pad_id: int = 0  # fills up short texts
    sep_id: int = 3  # [SEP] ends a text
    enc_id: int = 5  # [ENC] leads a text that is read together with a picture
    dec_id: int = 6  # [DEC] leads a text that is written
    temperature: float = 0.07  # similarities are divided by it; learned
    decoder_own: tuple[str, ...] = ("self-attention",)  # what the decoder does not share with the encoder

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.decoder_own) - set(NOTHING_SHARED):
            raise ValueError(f"decoder_own has {sorted(unknown)[0]!r}: choose among {', '.join(NOTHING_SHARED)}")


def paper_config() -> BLIPConfig:
    """The paper's base model at the resolution of its pre-training: ViT-B/16 and BERT-base with eyes."""
    return BLIPConfig(
        224, 16, image_width=768, image_depth=12, image_heads=12, vocab_size=30_524, max_text=512, text_width=768,
        text_depth=12, text_heads=12, embed_dim=256, dropout=0.1, sep_id=102, enc_id=30_523, dec_id=30_522,
    )  # fmt: skip


Past = tuple[Tensor, Tensor]  # keys and values of tokens read before, each (B, heads, T, D/heads)


class MEDBlock(FusionBlock):
    """ALBEF's block with three more ways to be used: without a picture, with some tokens alone, after earlier ones."""

    def forward(
        self, x: Tensor, context: Tensor | Past | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, rows: int | None = None, past: Past | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Past, Tensor | None]:  # fmt: skip
        """x (B, L, D) and what it asks, context (B, S, D') or its `keys_values` -> (B, rows or L, D), the keys and
        values of all tokens read so far, and on request the weights of the cross-attention (B, heads, rows or L, S).

        Without a `context` the cross-attention is passed by. `mask` says who may look at whom, `context_mask` (B, S)
        what is there to be asked; `past` are the tokens before x, and `rows` is as in `Block`.
        """
        keys, values = self.attn.keys_values(x)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        y, _ = self.attn(x[:, :rows], (keys, values), mask=mask)
        x, weights = self.norm1(x[:, :rows] + y), None
        if context is not None:
            x, weights = self.cross(x, context, mask=context_mask, need_weights=need_weights)
        return self.norm2(x + self.mlp(x)), (keys, values), weights


class MEDEncoder(nn.Module):
    """The reading half: one BERT whose blocks all have cross-attention. `encode` passes it by, `ground` uses it."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.embed, self.encoder = self.table(), self.stack()

    def table(self) -> TextEmbeddings:
        c = self.config
        return TextEmbeddings(c.vocab_size, c.max_text, c.text_width, dropout=c.dropout, eps=c.text_eps)

    def stack(self) -> nn.ModuleList:
        c, more = self.config, {"dropout": self.config.dropout, "eps": self.config.text_eps}
        return nn.ModuleList(
            MEDBlock(c.text_width, c.text_heads, context_width=c.image_width, mlp_ratio=c.mlp_ratio, **more)
            for _ in range(c.text_depth)
        )

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text encoder: ids and mask (B, L) -> the state of the first token alone, (B, 1, D)."""
        x = self.embed(ids)
        for i, block in enumerate(self.encoder):
            x, _, _ = block(x, mask=key_mask(mask), rows=1 if i == len(self.encoder) - 1 else None)
        return x

    def ground(
        self, x: Tensor, mask: Tensor, image: Tensor, *, rows: int | None = None, everything: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Image-grounded encoder: embedded words x (B, L, D), and a picture's states (B, S, D') -> (B, rows or L, D).
        `everything` adds "cross_i" (B, heads, L, S), where each word looks in the picture."""
        named: dict[str, Tensor] = {}
        for i, block in enumerate(self.encoder):
            last = i == len(self.encoder) - 1
            x, _, weights = block(x, image, mask=key_mask(mask), rows=rows if last else None, need_weights=everything)
            if everything:
                named[f"cross_{i}"] = weights
        return x, named


class MED(MEDEncoder):
    """The multimodal mixture of encoder and decoder (paper, 3.1): ... and the writing half, whose blocks are the
    encoder's but for what is the decoder's own, by default the self-attention."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config)
        self.decoder = self.stack()
        for own, shared in zip(self.decoder, self.encoder, strict=True):
            for part, names in MED_PARTS.items():
                if part not in config.decoder_own:
                    for name in names:
                        setattr(own, name, getattr(shared, name))  # the very same module, not a copy
        self.decoder_embed = self.table() if EMBEDDINGS in config.decoder_own else self.embed

    def decode(
        self, ids: Tensor, context: Tensor | list[Past] | None, *, context_mask: Tensor | None = None,
        past: list[Past] | None = None,
    ) -> tuple[Tensor, list[Past]]:  # fmt: skip
        """Image-grounded decoder: ids (B, L), each of which sees itself and those before it, and what is asked (a
        picture's states or the blocks' keys and values of them; None: nothing) -> states (B, L, D), and the new `past`.

        With a `past` of T tokens, ids are the ones that follow, and only they are computed.
        """
        T = past[0][0].shape[2] if past else 0
        L = ids.shape[1]
        x, mask = self.decoder_embed(ids, first=T), causal_mask(T + L, device=ids.device)[T:] if L > 1 else None
        kept = []
        for i, block in enumerate(self.decoder):
            asked = context[i] if isinstance(context, list) else context
            x, now, _ = block(x, asked, mask=mask, context_mask=context_mask, past=past[i] if past else None)
            kept.append(now)
        return x, kept


class Speaker:
    """A decoder in the middle of B texts, for `minivlp.generate`. It keeps the keys and values of all that was read, so
    that one more token costs one row of each block.

    `step(ids, past)` gives the states of the tokens that follow a `past` and the new past, `head` the scores. `copies`
    texts go on after each row of the first `past`, those of one next to each other. Without the `cache` each step reads
    all that was said once more.
    """

    def __init__(
        self, step: Callable[[Tensor, list[Past] | None], tuple[Tensor, list[Past]]], head: nn.Module,
        past: list[Past] | None = None, *, copies: int = 1, cache: bool = True,
    ) -> None:  # fmt: skip
        self.step, self.head, self.cache = step, head, cache
        self.past = past and [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in past]
        self.ids: LongTensor | None = None  # without the cache: all that was said

    def __call__(self, tokens: LongTensor) -> Tensor:
        """The newest tokens (B) -> scores of the next ones (B, V)."""
        ids = tokens[:, None]
        if not self.cache:  # the same numbers, each step from the beginning
            ids = self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        states, past = self.step(ids, self.past)
        if self.cache:
            self.past = past
        return self.head(states[:, -1])

    def reorder(self, rows: LongTensor) -> None:
        """Go on as if the texts had been the rows (B); each must be about the same picture as before."""
        if self.cache:
            self.past = [(k[rows], v[rows]) for k, v in self.past]
        else:
            self.ids = self.ids[rows]


def grounded_speaker(
    text: MED, head: nn.Module, context: Tensor, *, context_mask: Tensor | None = None, copies: int = 1,
    cache: bool = True,
) -> Speaker:  # fmt: skip
    """One that writes `copies` texts about each of the contexts (M, S, D'), of which `context_mask` (M, S) says what is
    there: B = M * copies. Keys and values of the contexts are computed once."""
    asked = [block.cross.attn.keys_values(context) for block in text.decoder]
    asked = [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in asked]
    there = None if context_mask is None else context_mask.repeat_interleave(copies, 0)
    return Speaker(lambda ids, past: text.decode(ids, asked, context_mask=there, past=past), head, cache=cache)


def led_by(ids: Tensor, token: int) -> Tensor:
    """The texts (B, L) with another first token: [ENC] and [DEC] take the place of [CLS], nothing is inserted."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


class DualBLIP(nn.Module):
    """BLIP as two encoders (paper, 3.1): a ViT, the text transformer without its eyes, and vectors to compare (ITC)."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.vision = ImageEncoder(c.image_config())
        self.text = MED(c)
        self.vision_proj = nn.Linear(c.image_width, c.embed_dim)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(c.temperature)))

    def look(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> states (B, 1+N, D'), which all three tasks use."""
        return self.vision(images)

    def image_vector(self, states: Tensor) -> Tensor:
        """A picture's states (B, 1+N, D') -> the vector of its class token, of length 1, (B, E)."""
        return F.normalize(self.vision_proj(states[:, 0]).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> vectors of length 1 (B, E)."""
        return self.image_vector(self.look(images))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> vectors of length 1 (B, E), by the text encoder, which no picture reaches."""
        states = self.text.encode(ids, ids != self.config.pad_id)
        return F.normalize(self.text_proj(states[:, 0]).float(), dim=-1)


class BLIP(DualBLIP):
    """... and as image-grounded encoder (ITM) and decoder (LM), with the same weights (paper, Fig. 2)."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config)
        c = config
        self.itm_head = nn.Linear(c.text_width, 2)  # scores of "does not match" and "matches"
        self.lm_head = MLMHead(c.text_width, c.vocab_size, eps=c.text_eps)
        init_normal(self, matrices=0.02 * (768 / c.text_width) ** 0.5)  # as ALBEF here
        for parameter in (self.vision.embed.cls_token, self.vision.embed.pos_embed):
            nn.init.normal_(parameter, std=0.02)
        self.lm_head.decoder.weight = self.text.decoder_embed.word.weight  # one table for reading and writing

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `match` starts from: ids (B, L) -> [ENC] and the words, embedded, (B, L, D)."""
        return self.text.embed(led_by(ids, self.config.enc_id))

    def match(self, words: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """ITM: what `read` gave (B, L, D) and states of as many pictures (B, 1+N, D') -> scores (B, 2)."""
        states, _ = self.text.ground(words, mask, image, rows=1)
        return self.itm_head(states[:, 0])

    def write(self, ids: Tensor, context: Tensor | None, *, context_mask: Tensor | None = None) -> Tensor:
        """Texts (B, L), written about a picture's states (B, 1+N, D') or about nothing -> states (B, L, D). The one at
        token t, given the tokens up to t, with [DEC] in the first place, is what `lm_head` tells the next word from."""
        return self.text.decode(led_by(ids, self.config.dec_id), context, context_mask=context_mask)[0]

    def speaker(self, context: Tensor, **how: object):
        """For `minivlp.generate`: writes about each of the contexts (B, S, D'). `how` as in `grounded_speaker`."""
        return grounded_speaker(self.text, self.lm_head, context, **how)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images (B, C, H, W), ids and mask (B, L) -> by name: "image" (B, 1+N, D'), "image vector" and "text vector"
        (B, E), "match" (B, 2), the scores of each picture with its own text, and "next" (B, L, V), of the next word."""
        image = self.look(images)
        return {"image": image, "image vector": self.image_vector(image), "text vector": self.encode_text(ids),
                "match": self.match(self.read(ids), mask, image),
                "next": self.lm_head(self.write(ids, image))}  # fmt: skip


def teacher_of(model: BLIP) -> BLIP:
    """The momentum model at its start (paper, 3.2): image encoder, text encoder and both projections. It is made after
    the parts were shared, and has neither decoder nor cross-attention, for ITC alone asks it."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    del teacher.itm_head, teacher.lm_head, teacher.text.decoder, teacher.text.decoder_embed
    for block in teacher.text.encoder:
        del block.cross
    return teacher


def untied(model: BLIP) -> BLIP:
    """A copy in which encoder and decoder share nothing any more, as for questions (official code)."""
    apart = type(model)(replace(model.config, decoder_own=NOTHING_SHARED)).to(next(model.parameters()).device)
    apart.load_state_dict(model.state_dict())
    return apart


@torch.no_grad()
def start_alike(model: BLIP) -> None:
    """Give the encoder all the decoder's weights, as where both start from one BERT (official code)."""
    model.text.embed.load_state_dict(model.text.decoder_embed.state_dict())
    model.text.encoder.load_state_dict(model.text.decoder.state_dict())
