"""Writing texts token by token: greedy, beam search, nucleus sampling, for any decoder with a key/value cache.

A decoder here is an object that is called with the newest token of each text, (B) -> scores of the next one (B, V), and
keeps what it has read. For beam search it also has `reorder(rows)`: go on as if the texts had been the rows (B).
What comes back is (B, at most `longest`): without the first token, with the `end` token, filled up with it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import LongTensor, Tensor


class Decoder(Protocol):
    def __call__(self, tokens: LongTensor) -> Tensor: ...

    def reorder(self, rows: LongTensor) -> None: ...


def forbid_end(scores: Tensor, end: int, length: int, shortest: int) -> Tensor:
    """Scores (B, V) of the token after `length` ones: no text may end with fewer than `shortest` tokens, `end` not
    counted."""
    if length < shortest:
        scores = scores.clone()
        scores[:, end] = float("-inf")
    return scores


def discourage(scores: Tensor, texts: LongTensor, penalty: float) -> Tensor:
    """Make what was said already less likely (CTRL, arXiv:1909.05858, 4.1): scores (B, V) of the tokens in texts (B, T)
    are divided by `penalty` where they are positive and multiplied where they are negative. 1.0: nothing changes."""
    if penalty == 1.0:
        return scores
    said = scores.gather(1, texts)
    return scores.scatter(1, texts, torch.where(said > 0, said / penalty, said * penalty))


@torch.no_grad()
def greedy(decoder: Decoder, first: LongTensor, *, end: int, longest: int, shortest: int = 0) -> LongTensor:
    """Always the most likely next token. `first` (B) is what each text begins with, such as `[DEC]`."""
    token, texts, done = first, [], torch.zeros_like(first, dtype=torch.bool)
    for length in range(longest):
        token = forbid_end(decoder(token), end, length, shortest).argmax(dim=-1).masked_fill(done, end)
        texts.append(token)
        done = done | (token == end)
        if done.all():
            break
    return torch.stack(texts, dim=1)


def keep_nucleus(scores: Tensor, p: float) -> Tensor:
    """The smallest set of tokens whose chances sum up to at least p (Holtzman et al. 2020): scores (B, V) -> the same,
    -inf outside of it. The most likely token is always in it."""
    ordered, order = scores.sort(dim=-1, descending=True)
    chance = ordered.softmax(dim=-1)
    before = chance.cumsum(dim=-1) - chance  # of all more likely tokens
    outside = (before >= p) & (before > 0)  # of the first it is 0: even with p = 0 one is left
    return scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


@torch.no_grad()
def nucleus(
    decoder: Decoder, first: LongTensor, *, end: int, longest: int, generator: torch.Generator, p: float = 0.9,
    shortest: int = 0, penalty: float = 1.0,
) -> LongTensor:  # fmt: skip
    """Draw each next token, by its chance, among the likely ones (`keep_nucleus`). `penalty` see `discourage`; the
    `generator`, on the CPU, decides."""
    token, texts, done = first, first[:, None], torch.zeros_like(first, dtype=torch.bool)
    for length in range(longest):
        scores = forbid_end(discourage(decoder(token), texts, penalty), end, length, shortest)
        chance = keep_nucleus(scores.float(), p).softmax(dim=-1).cpu()
        token = torch.multinomial(chance, 1, generator=generator)[:, 0].to(first.device).masked_fill(done, end)
        texts = torch.cat([texts, token[:, None]], dim=1)
        done = done | (token == end)
        if done.all():
            break
    return texts[:, 1:]


@torch.no_grad()
def beam_search(
    decoder: Decoder, first: LongTensor, *, end: int, longest: int, beams: int = 3, shortest: int = 0,
    length_penalty: float = 1.0,
) -> LongTensor:  # fmt: skip
    """Keep the `beams` best beginnings of each text; of those that end, return the one with the highest log-probability
    per token (length ** `length_penalty`). The decoder holds B * beams texts, those of one picture next to each other.

    A text's search is over when no open beginning is ahead of the worst of its `beams` finished ones (the rule of
    transformers; it may end too early, for a mean can still rise).
    """
    B, k, device = len(first), beams, first.device
    rows = torch.arange(B, device=device)[:, None]
    token, texts = first.repeat_interleave(k), first.new_empty(B, k, 0)
    total = torch.full((B, k), -1e9, device=device)  # log-probability of each open beginning
    total[:, 0] = 0.0  # all are equal at first: only one may branch
    best, finished = torch.full((B, k), -1e9, device=device), first.new_full((B, k, longest), end)
    open_ = torch.ones(B, 1, dtype=torch.bool, device=device)
    for length in range(longest):
        scores = forbid_end(decoder(token).float().log_softmax(dim=-1), end, length, shortest)
        V = scores.shape[-1]
        # 2 k candidates: even if k of them end, k are left to go on
        top, where = (total[:, :, None] + scores.view(B, k, V)).flatten(1).topk(2 * k, dim=1)
        source, word = where // V, where % V  # (B, 2k): which beginning, and its next token
        candidates = torch.cat([texts[rows, source], word[:, :, None]], dim=2)
        ends = (word == end) | (length + 1 == longest)
        # a text that ends counts if it is among the k best candidates
        score = (top / (length + 1) ** length_penalty).masked_fill(~(ends & open_), -1e9)
        score[:, k:] = -1e9
        padded = torch.nn.functional.pad(candidates, (0, longest - length - 1), value=end)
        best, order = torch.cat([best, score], dim=1).topk(k, dim=1)
        finished = torch.cat([finished, padded], dim=1)[rows, order]
        total, order = top.masked_fill(ends, -1e9).topk(k, dim=1)  # what goes on
        texts, token = candidates[rows, order], word[rows, order].flatten()
        open_ &= total[:, :1] / (length + 1) ** length_penalty > best[:, -1:]
        if not open_.any():
            break
        decoder.reorder((rows * k + source[rows, order]).flatten())
    used = int((finished[:, 0] != end).sum(1).max()) + 1
    return finished[:, 0, : min(used, longest)]
