"""Every metric of the course. Metrics take arrays of numbers; only `predict` and `features` touch a model."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data.text import Tokenizer
from minivlp.train import evaluating


def predict(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Class scores (N, K) and pooled features (N, D) of pictures (N, C, H, W), both float32 on the CPU."""
    device = next(model.parameters()).device
    scores, pooled = [], []
    with evaluating(model):
        for batch in images.split(batch_size):
            logits, named = model(batch.to(device))
            scores.append(logits.float().cpu())
            pooled.append(named["pooled"].float().cpu())
    return torch.cat(scores), torch.cat(pooled)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of `scores` (N, K) whose largest entry stands at `labels` (N,)."""
    return (scores.argmax(dim=-1) == labels.to(scores.device)).float().mean().item()


def confusion(scores: Tensor, labels: Tensor) -> np.ndarray:
    """Counts (K, K): row = the true class, column = the predicted one."""
    K = scores.shape[-1]
    return torch.bincount(labels * K + scores.argmax(dim=-1), minlength=K * K).view(K, K).numpy()


def ridge_probe(train: Tensor, labels: Tensor, test: Tensor, *, classes: int, l2: float = 1.0) -> Tensor:
    """The few-shot metric of ViT (section 4.1): scores (M, K) for `test` (M, D) by least squares in closed form.

    Features `train` (N, D) are standardised, the targets are +1 for the true class and -1 for every other one, and
    `l2` (times N) keeps the weights small; the bias is not regularised. Computed in float64.
    """
    mean, std = train.double().mean(0), train.double().std(0, correction=0).clamp(min=1e-6)
    x, y = (train.double() - mean) / std, 2.0 * nn.functional.one_hot(labels, classes).double() - 1
    bias = y.mean(0)  # x is centred, so the unregularised bias is the mean target
    weights = torch.linalg.solve(x.T @ x + l2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - bias))
    return ((test.double() - mean) / std @ weights + bias).float()


def k_per_class(labels: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Indices of `k` random examples of each class, for few-shot probes. Raises ValueError if a class has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for value in labels.unique():
        (of_class,) = torch.where(labels == value)
        if len(of_class) < k:
            raise ValueError(f"class {value.item()} has {len(of_class)} examples, fewer than k={k}")
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:k]])
    return torch.cat(chosen)


def attention_distance(weights: Tensor, *, patch_size: int, prefix: int = 1) -> Tensor:
    """How far heads look (ViT, Fig. 7 right): weights (B, heads, T, T) -> mean distance (heads,) in pixels.

    For each patch, the distance to every patch's centre weighted by attention; class tokens (the first `prefix`) have
    no place in the picture, so they are left out and the rest of each row is scaled back to sum 1.
    """
    w = weights[..., prefix:, prefix:]
    w = w / w.sum(dim=-1, keepdim=True)
    grid = round(w.shape[-1] ** 0.5)
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float() * patch_size  # (N, 2)
    distances = torch.cdist(places, places).to(w.device)  # (N, N) pixels
    return (w * distances).sum(dim=-1).mean(dim=(0, 2))


def attention_shares(weights: Tensor, text_mask: Tensor) -> Tensor:
    """How a single stream shares out its attention: weights (B, heads, T, T) of one layer, text first, and text_mask
    (B, L) -> four shares: text at text, text at image, image at text, image at image.

    The first two add up to 1, and the last two. Heads are averaged; padded tokens do not count as looking.
    """
    L = text_mask.shape[1]
    w = weights.mean(dim=1)  # (B, T, T)
    looking = w[:, :L][text_mask], w[:, L:].flatten(0, 1)  # (words, T) and (image tokens, T)
    return torch.stack([part.sum(-1).mean() for rows in looking for part in (rows[:, :L], rows[:, L:])])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0.0 for a single one)."""
    v = np.asarray(values, dtype=float)
    return float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0


def recall_at(scores: Tensor, truth: Tensor, k: int) -> float:
    """R@k: share of the queries (rows of `scores` (Q, G)) whose own item `truth` (Q,) is among the k best of G.

    Items that score exactly as high as the truth count as better, so a model that knows nothing scores 0.
    """
    own = scores.gather(1, truth[:, None])
    better = (scores >= own).sum(dim=1) - 1
    return (better < k).float().mean().item()


def probe_scores(scores: Tensor) -> dict[str, float]:
    """Winoground's numbers (Thrush et al. 2022): scores (n, 2, 2), `[p, i, c]` of picture i with caption c of probe p.

    "pair": share of pictures that prefer their own caption (chance 1/2); "text": both pictures of a probe do (1/4);
    "image": both captions prefer their own picture (1/4); "group": both of these (1/6).
    """
    a, b, c, d = scores[:, 0, 0], scores[:, 0, 1], scores[:, 1, 1], scores[:, 1, 0]
    text, image = (a > b) & (c > d), (a > d) & (c > b)
    pair = torch.cat([a > b, c > d])
    return {name: v.float().mean().item() for name, v in
            {"pair": pair, "text": text, "image": image, "group": text & image}.items()}  # fmt: skip


@dataclass(frozen=True)
class Cloze:
    """Sentences with one word hidden whole, for pictures whose numbers are `rows` (n,)."""

    rows: Tensor  # (n,) of the pictures
    ids: Tensor  # (n, L), [MASK] at every piece of the hidden word
    mask: Tensor  # (n, L), True at tokens
    answers: tuple[str, ...]  # n facts, for instance "cat" where "kitten" was hidden
    facts: Mapping[str, str]  # every word that counts -> the fact it names


def cloze(captions: Sequence[str], tokenizer: Tokenizer, facts: Mapping[str, str]) -> Cloze:
    """Hide in each caption the first word that names a fact; captions without one are left out.

    `facts` maps words to what they name ("kitten" -> "cat"), so that any name of the right thing counts as right.
    """
    ids, mask = tokenizer.encode_batch(captions)
    groups = tokenizer.word_groups(ids)
    rows, answers = [], []
    for row, caption in enumerate(captions):
        words = split_words(caption)  # the words that BERT's rules make: their numbers agree
        hidden = next((k for k, word in enumerate(words) if word in facts), None)
        if hidden is not None:
            rows.append(row)
            answers.append(facts[words[hidden]])
            ids[row, groups[row] == hidden] = tokenizer.mask_id
    chosen = torch.tensor(rows)
    return Cloze(chosen, ids[chosen], mask[chosen], tuple(answers), facts)


def filled_in(
    cloze: Cloze, tokenizer: Tokenizer, scores: Callable[[Tensor, Tensor, Tensor], Tensor], *, batch_size: int = 250
) -> list[str]:
    """The most likely word for each hidden one, as text, n of them.

    `scores(rows, ids, mask)` gives the vocabulary scores (B, L, V) for the pictures `rows` (B,).
    """
    words = []
    for chosen in torch.arange(len(cloze.rows)).split(batch_size):
        ids, mask = cloze.ids[chosen], cloze.mask[chosen]
        guess = scores(cloze.rows[chosen], ids, mask).argmax(-1).cpu()
        words += [tokenizer.decode(g[i == tokenizer.mask_id]) for g, i in zip(guess, ids, strict=True)]
    return words


def cloze_accuracy(cloze: Cloze, words: Sequence[str]) -> float:
    """Share of the hidden words that were filled in with a name of the right fact."""
    return sum(cloze.facts.get(word) == answer for word, answer in zip(words, cloze.answers, strict=True)) / len(words)


def split_words(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv:1510.03055): different n-grams of words / all n-grams, over all texts together.

    It falls as texts are added, so compare equally many. 0.0 where no text has n words.
    """
    words = [split_words(text) for text in texts]
    ngrams = [tuple(text[k : k + n]) for text in words for k in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def unique(texts: Sequence[str]) -> float:
    """Different texts / all texts; 0.0 where there are none."""
    return len(set(texts)) / len(texts) if texts else 0.0


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a whole corpus (Papineni et al. 2002), 0..1: `references` has one or more right captions per text.

    Not smoothed, as in the paper: 0.0 where not a single 4-gram is right. Case does not count. Raises ValueError if
    there is no text, or one without references.
    """
    from sacrebleu.metrics import BLEU  # not at the top: it takes a fifth of a second, which few who come here need

    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts need as many lists of references, none of them empty")
    most = max(map(len, references))
    # sacrebleu wants the first reference of every text, then the second, ...; None where a text has fewer
    columns = [[several[k] if k < len(several) else None for several in references] for k in range(most)]
    # `force` leaves out its warning that texts look tokenised: one of a full stop with a space before it
    score = BLEU(lowercase=True, smooth_method="none", force=True).corpus_score(texts, columns).score
    return min(score / 100, 1.0)  # all right is 100.00000000000004


def peak_memory(step: Callable[[], object], *, device: torch.device) -> int:
    """Bytes that `step()` needs at its highest point, beyond what is held when it begins.

    Call `step` once before, so that what stays (optimiser state, say) is already there. On the CPU torch's profiler
    follows every allocation and release, on CUDA the allocator's own counter does. Raises ValueError for other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"peak memory cannot be followed on {device.type}: measure it on the CPU or on CUDA")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        profiler.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])), default=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: nothing is written to the process's standard error, where the profiler announces itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
