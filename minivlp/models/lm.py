"""Language models that have never seen a picture: the mouths that BLIP-2 is given (arXiv:2301.12597, 3.3).

One of either kind: decoder-only like OPT (arXiv:2205.01068), encoder-decoder like T5. Both write about a `prefix`, some
vectors (B, P, D) that take the place of words: nothing in here knows that they may come from a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from minivlp.layers import Block, MLMHead, init_normal
from minivlp.models.blip import MED, MED_PARTS, BLIPConfig, Past, Speaker, grounded_speaker
from minivlp.models.clip import causal_mask
from minivlp.models.dual_stream import key_mask


@dataclass(frozen=True)
class LMConfig:
    """Everything that fixes a language model's shape. The defaults are the course's own small ones."""

    vocab_size: int = 340  # V
    max_text: int = 160  # tokens at most, those of a prefix included
    width: int = 128  # D
    depth: int = 4  # blocks; of an encoder-decoder, in each half
    heads: int = 4
    mlp_ratio: int = 4  # hidden width of the MLPs / width
    act: str = "relu"  # of the MLPs of a decoder-only model: OPT has a ReLU
    dropout: float = 0.0
    eps: float = 1e-5
    pad_id: int = 0  # fills up short texts
    sep_id: int = 3  # ends a text
    dec_id: int = 6  # begins one

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


def prefix_mask(prefix: int, length: int, *, device: torch.device | str | None = None) -> Tensor:
    """Who may look at whom where `length` tokens are written after a `prefix`: (L, P+L). Each sees the whole prefix,
    itself and the tokens before it."""
    before = torch.ones(length, prefix, dtype=torch.bool, device=device)
    return torch.cat([before, causal_mask(length, device=device)], dim=1)


class CausalBlock(Block):
    """A pre-norm block that can go on after earlier tokens, of which it is given keys and values."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, past: Past | None = None) -> tuple[Tensor, Past]:
        """x (B, L, D), `mask` (L, T+L), `past` of T tokens -> (B, L, D), and the keys and values of all T+L."""
        asked = self.norm1(x)
        keys, values = self.attn.keys_values(asked)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        y, _ = self.attn(asked, (keys, values), mask=mask)
        x = x + y
        return x + self.mlp(self.norm2(x)), (keys, values)


class CausalTransformer(nn.Module):
    """OPT on a small scale: a stack of causal blocks between two uses of one table of words."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.width)
        self.position = nn.Embedding(c.max_text, c.width)
        self.blocks = nn.ModuleList(
            CausalBlock(c.width, c.heads, mlp_ratio=c.mlp_ratio, dropout=c.dropout, eps=c.eps, gelu=c.act)
            for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)
        init_normal(self)
        self.lm_head.weight = self.word.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Words as vectors, without positions: (B, L) -> (B, L, D)."""
        return self.word(ids)

    def forward(self, x: Tensor, past: list[Past] | None = None) -> tuple[Tensor, list[Past]]:
        """Vectors in the place of words x (B, L, D), after a `past` of T tokens -> states (B, L, D), and the new past.
        Raises ValueError if T+L is more than the position table has."""
        T, L = past[0][0].shape[2] if past else 0, x.shape[1]
        if self.config.max_text < T + L:
            raise ValueError(f"{T + L} tokens do not fit {self.config.max_text} positions: shorten the text or build "
                             "the model with a larger max_text")  # fmt: skip
        x = x + self.position.weight[T : T + L]
        mask, kept = prefix_mask(T, L, device=x.device) if L > 1 else None, []
        for i, block in enumerate(self.blocks):
            x, now = block(x, mask=mask, past=past[i] if past else None)
            kept.append(now)
        return self.norm(x), kept


class DecoderLM(CausalTransformer):
    """A decoder-only language model: it goes on after whatever stands before, words or other vectors."""

    has_encoder = False  # a prompt is the beginning of the text

    def write(
        self, ids: Tensor, prefix: Tensor | None, *, prompt: Tensor | None = None, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """Texts (B, L) that begin with [DEC], after a prefix (B, P, D) -> states (B, L, D), from which `lm_head` tells
        each next word. Raises ValueError for a prompt: that belongs into the texts here, before the answer."""
        if prompt is not None:
            raise ValueError("a decoder-only model has one sequence: put the prompt before the text, in `ids`")
        x = self.embed(ids) if prefix is None else torch.cat([prefix, self.embed(ids)], dim=1)
        return self(x)[0][:, x.shape[1] - ids.shape[1] :]

    def speaker(
        self, prefix: Tensor | None, *, prompt: LongTensor | None = None, prompt_mask: Tensor | None = None,
        copies: int = 1,
    ) -> Speaker:  # fmt: skip
        """For `minivlp.generate`: goes on after a prefix (B, P, D) and the [DEC] and words of a prompt (B, L), all of
        one length; the first token given is the prompt's last, or [DEC] where there is no prompt."""
        parts = [] if prefix is None else [prefix]
        if prompt is not None and prompt.shape[1] > 1:
            parts.append(self.embed(prompt[:, :-1]))
        past = self(torch.cat(parts, dim=1))[1] if parts else None
        return Speaker(lambda ids, past: self(self.embed(ids), past), self.lm_head, past, copies=copies)


class EncoderDecoderLM(nn.Module):
    """An encoder-decoder language model, T5's plan with BERT's parts: one half reads prefix and prompt, both ways, the
    other writes and asks it. BLIP's blocks, where a text takes the picture's place."""

    has_encoder = True  # which reads the prompt

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.text = MED(BLIPConfig(
            image_width=c.width, vocab_size=c.vocab_size, max_text=c.max_text, text_width=c.width, text_depth=c.depth,
            text_heads=c.heads, image_heads=c.heads, mlp_ratio=c.mlp_ratio, dropout=c.dropout, text_eps=c.eps,
            decoder_own=tuple(MED_PARTS),
        ))  # fmt: skip
        for block in self.text.encoder:
            del block.cross  # it reads, and asks nobody
        self.lm_head = MLMHead(c.width, c.vocab_size, eps=c.eps)
        init_normal(self, matrices=0.02 * (768 / c.width) ** 0.5)
        self.lm_head.decoder.weight = self.text.embed.word.weight

    def read(
        self, prefix: Tensor | None, prompt: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The encoder: a prefix (B, P, D), a prompt (B, L) and its mask -> states (B, P+L, D) and which of them there
        are, (B, P+L)."""
        parts = [] if prefix is None else [(prefix, prefix.new_ones(prefix.shape[:2], dtype=torch.bool))]
        if prompt is not None:
            words = self.text.embed(prompt, first=0 if prefix is None else prefix.shape[1])
            parts.append((words, prompt != self.config.pad_id if mask is None else mask))
        x, there = (torch.cat(several, dim=1) for several in zip(*parts, strict=True))
        for block in self.text.encoder:
            x, _, _ = block(x, mask=key_mask(there))
        return x, there

    def write(
        self, ids: Tensor, prefix: Tensor | None, *, prompt: Tensor | None = None, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """Texts (B, L) from [DEC] on, about a prefix (B, P, D) and a prompt (B, L') -> states (B, L, D)."""
        context, mask = self.read(prefix, prompt, prompt_mask)
        return self.text.decode(ids, context, context_mask=mask)[0]

    def speaker(self, prefix: Tensor | None, *, prompt=None, prompt_mask=None, copies: int = 1) -> Speaker:
        """For `minivlp.generate`: writes from [DEC] on. Arguments as in `write`, `copies` as in `grounded_speaker`."""
        context, mask = self.read(prefix, prompt, prompt_mask)
        return grounded_speaker(self.text, self.lm_head, context, context_mask=mask, copies=copies)
