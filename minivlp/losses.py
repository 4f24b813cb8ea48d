"""The losses of the course. Each takes tensors, and a head where only some of its outputs are needed.

Shapes: B pairs, L text tokens, S image tokens, D width, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of positions that are not asked for, as everywhere in PyTorch


def masked_lm_loss(
    head: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of the hidden words (BERT, 3.1): states (B, L, D), labels (B, L), `IGNORE` where nothing is hidden.

    Label `smoothing` spreads this share of the target evenly over all words (BLIP's LM: 0.1).

    `head` turns (M, D) into scores (M, V). It runs at the M asked positions alone, about one in seven, since the others
    would be thrown away. Without any asked position the loss is 0.
    """
    asked = labels != IGNORE
    if not asked.any():
        return states.sum() * 0.0
    return F.cross_entropy(head(states[asked]).float(), labels[asked], label_smoothing=smoothing)


def word_positions(text_mask: Tensor) -> Tensor:
    """True at the words of each text: (B, L) -> (B, L), the mask without `[CLS]` (first) and `[SEP]` (last token)."""
    words = text_mask.clone()
    words[:, 0] = False
    words[torch.arange(len(words), device=words.device), text_mask.sum(1) - 1] = False
    return words


def cosine_cost(text: Tensor, image: Tensor) -> Tensor:
    """What it costs to carry a word to a patch: text (B, L, D), image (B, S, D) -> 1 - cosine, (B, L, S) in [0, 2]."""
    return 1 - F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).transpose(1, 2)


@torch.no_grad()
def ipot(cost: Tensor, words: Tensor, patches: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """A nearly cheapest plan to carry the words onto the patches: cost (B, L, S) -> plan (B, L, S), float32.

    Every word has the same weight and every patch takes the same weight, 1 in all: the sums over patches are 1/m at the
    m `words` (B, L), those over words 1/n at the n `patches` (B, S), and nothing moves to or from padding. Inexact
    proximal point iteration with one inner step (Xie et al. 2018, arXiv:1802.04307, algorithm 1; UNITER's `ot.py`).
    """
    cost = cost.float()
    both = words[:, :, None] & patches[:, None, :]  # (B, L, S)
    m, n = words.sum(1, keepdim=True), patches.sum(1, keepdim=True)  # (B, 1)
    kernel = torch.exp(-cost / beta).masked_fill(~both, 0)  # A; padding takes no part
    plan, sigma = both.float(), words / m
    with torch.autocast(cost.device.type, enabled=False):  # half precision is too coarse for fifty products in a row
        for _ in range(iterations):
            q = kernel * plan
            delta = patches / (n * torch.einsum("bls,bl->bs", q, sigma)).masked_fill(~patches, 1)
            sigma = words / (m * torch.einsum("bls,bs->bl", q, delta)).masked_fill(~words, 1)
            plan = sigma[:, :, None] * q * delta[:, None, :]
    return plan


def transport_distance(cost: Tensor, plan: Tensor) -> Tensor:
    """What a plan costs: (B, L, S) twice -> (B). The gradient flows through `cost` alone, `ipot` gives none."""
    return (cost * plan).sum(dim=(1, 2))


def word_patch_alignment(
    text: Tensor, image: Tensor, words: Tensor, patches: Tensor, match: Tensor, *, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """Loss and distances (B) of word-patch alignment (ViLT, 3.2, weight 0.1): near where pairs match, far elsewhere.

    text (B, L, D), image (B, S, D) final states; `words` (B, L) and `patches` (B, S) say which of them take part;
    match (B) is 1 where text and picture belong together. The loss (official code) is the sum of the distances of
    the matching pairs minus that of the others, divided by B: it has no lower bound at 0.
    """
    with torch.autocast(text.device.type, enabled=False):
        cost = cosine_cost(text, image)
        distance = transport_distance(cost, ipot(cost, words, patches, iterations=iterations))
    sign = torch.where(match.bool(), 1.0, -1.0)
    return (sign * distance).mean(), distance


def contrastive_loss(logits: Tensor, positives: Tensor | None = None, *, smoothing: float = 0.0) -> Tensor:
    """CLIP's loss (paper, Fig. 3), the mean of two cross-entropies: logits (B, B), a row for each picture.

    Along each row every picture chooses its text among B, along each column every text its picture; the true pairs
    stand on the diagonal. `positives` (B, B), True also where picture and text belong together off the diagonal, for
    instance because two captions are the same, shares each target out evenly among them. Label `smoothing` spreads
    this share of each target over the whole batch (BLIP-2: 0.1).
    """
    logits, smooth = logits.float(), {"label_smoothing": smoothing}
    if positives is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own, **smooth) + F.cross_entropy(logits.T, own, **smooth)) / 2
    targets = positives.float()
    to_text = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), **smooth)
    to_image = F.cross_entropy(logits.T, (targets / targets.sum(0, keepdim=True)).T, **smooth)
    return (to_text + to_image) / 2


def same_texts(ids: Tensor) -> Tensor:
    """Which texts of a batch are word for word the same: ids (B, L), padded alike -> (B, B), True on the diagonal."""
    return (ids[:, None] == ids[None]).all(dim=-1)


def next_words(ids: Tensor, mask: Tensor) -> Tensor:
    """The labels of a language model that reads ids (B, L) from left to right: at each token the one that follows it,
    `IGNORE` at the last one and at padding, where `mask` (B, L) is False. For `masked_lm_loss`."""
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], IGNORE)
    return labels


def distilled_contrastive_loss(
    logits: Tensor, teacher_logits: Tensor, alpha: float | Tensor, positives: Tensor | None = None,
    *, ignore: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One direction of ALBEF's ITC (3.2 and 3.3): logits (B, M) of B queries over M = B + Q keys.

    The target is alpha times the teacher's softmax plus 1 - alpha times the truth: key i for query i, or, if there are
    `positives` (B, M), evenly all of them. Keys in `ignore` (B, M) take no part. Gradients flow into `logits` alone.
    """
    B, M = logits.shape
    logits, teacher_logits = logits.float(), teacher_logits.detach().float()
    truth = torch.eye(B, M, device=logits.device) if positives is None else positives.float()
    if ignore is not None:
        logits, teacher_logits = (t.masked_fill(ignore, -1e4) for t in (logits, teacher_logits))
        truth = truth.masked_fill(ignore, 0)
    truth = truth / truth.sum(dim=1, keepdim=True)
    target = alpha * teacher_logits.softmax(dim=1) + (1 - alpha) * truth
    return F.cross_entropy(logits, target)


def distilled_lm_loss(
    head: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor, teacher_scores: Tensor, alpha: float | Tensor
) -> Tensor:
    """ALBEF's MLM (paper, 3.3): states (B, L, D), labels (B, L), `IGNORE` where nothing is hidden.

    `teacher_scores` (M, V) are the teacher's at the M asked positions, in reading order. The target is alpha times
    their softmax plus 1 - alpha times the hidden word. Without any asked position the loss is 0.
    """
    asked = labels != IGNORE
    if not asked.any():
        return states.sum() * 0.0
    scores = head(states[asked]).float()
    truth = F.one_hot(labels[asked], scores.shape[-1]).float()
    return F.cross_entropy(scores, alpha * teacher_scores.detach().float().softmax(dim=-1) + (1 - alpha) * truth)


@torch.no_grad()
def hard_negatives(similarity: Tensor, forbidden: Tensor, noise: Tensor) -> Tensor:
    """ITM's wrong partners (ALBEF, 3.2): similarity (B, B), divided by the temperature -> one column for each row (B).

    Drawn, not picked: column j with a chance that grows with softmax(similarity), never a `forbidden` one (B, B), such
    as the true partner. `noise` (B) are uniform random numbers in [0, 1) that decide. Every allowed column keeps a
    small chance (1e-4, as in BLIP), or a sure model would leave nothing to draw from. Raises ValueError if a row
    forbids everything.
    """
    if forbidden.all(dim=1).any():
        raise ValueError("a row has no wrong partner left: use a larger batch, or batches without repetitions")
    chance = (similarity.float().softmax(dim=1) + 1e-4).masked_fill(forbidden, 0)
    edges = chance.cumsum(dim=1)  # (B, B), the right ends of the columns' shares
    point = noise[:, None].clamp(max=1 - 1e-6) * edges[:, -1:]  # below the last edge, also after rounding
    return torch.searchsorted(edges, point, right=True)[:, 0]
