"""Lesson 08's recipes: one main run, both stages of BLIP-2 between a frozen eye and a frozen mouth, and the experiments
around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 08_blip2` runs all of them over several seeds.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minivlp
from minivlp.bench import take_turns
from minivlp.data.picturebook.claims import with_article
from minivlp.data.picturebook.describe import ANSWERS
from minivlp.data.picturebook.understand import caption_facts
from minivlp.data.picturebook.world import KINDS
from minivlp.evaluate import accuracy, probe_scores, recall_at, unique
from minivlp.generate import greedy
from minivlp.layers import count_parameters
from minivlp.lessons import albef as lesson05
from minivlp.lessons import blip as lesson07
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.albef import matching, rerank, states, wrong_partners
from minivlp.lessons.blip import Corpus, PairBatches, caption_numbers, write
from minivlp.lessons.clip import image_vectors, recalls, text_vectors
from minivlp.lessons.language import answered, answers_after, prompts_of, ready_made
from minivlp.lessons.vilt import asked, pairs, words
from minivlp.lessons.vit import Run
from minivlp.losses import contrastive_loss, masked_lm_loss, next_words
from minivlp.models.albef import belong, clamp_temperature
from minivlp.models.blip import BLIP, led_by
from minivlp.models.blip2 import BLIP2, BLIP2Speaker, Eye, QFormerConfig, query_similarities
from minivlp.models.clip import CLIP
from minivlp.models.vit import ViT
from minivlp.train import History, evaluating, fit, own_copy, trained

NAME = "08_blip2"
# name of the kept weights -> (experiment, arm), of the first seed
CHECKPOINTS = {"blip2": ("main", "BLIP-2")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: QFormerConfig = field(default_factory=QFormerConfig)
    eye: str = "clip"  # whose image encoder is the frozen eye, kept weights of an earlier lesson
    mouth: str = "mouth"  # the frozen language model, kept weights of `minivlp.lessons.language`
    pages: int = 6_000
    levels: tuple[int, ...] = (1, 4)  # which of the five captions are pairs
    words: str = "qformer_words"  # what the Q-Former starts from, a model of texts alone (the paper: BERT); "": random
    itc: bool = True  # without it there are no similarities, so the wrong partners are any
    itm: bool = True
    itg: bool = True
    smoothing: float = 0.1  # of ITC's and ITG's targets, in training alone
    steps: int = 350  # of stage 1
    second: int = 350  # of stage 2
    second_pages: int = 6_000  # the first so many of them are used in stage 2
    batch_size: int = 32
    lr: float = 1e-3
    second_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    end_to_end: float = 0.0  # eye and mouth are trained, too, at this share of the rate: what BLIP-2 does without
    everything: bool = False  # also measure what only the main run needs


MAIN = Recipe(everything=True)
BASE = replace(MAIN, steps=200, second=150, everything=False)  # for the comparisons
STAGE1_IN_STAGE2 = 4  # steps of stage 2 for one of stage 1: `clock` measures 3.5 in time, `facts` 4.3 in operations


def qformer(**changes: object) -> QFormerConfig:
    return replace(BASE.model, **changes)


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"BLIP-2": MAIN},
    "losses": {
        "all three": BASE,
        "without ITC": replace(BASE, itc=False),
        "without ITM": replace(BASE, itm=False),
        "without ITG": replace(BASE, itg=False),
    },
    "500 pages in stage 2": {
        "after stage 1": replace(BASE, second_pages=500),
        "random Q-Former": replace(BASE, second_pages=500, steps=0, words=""),
    },
    "mouth": {
        "encoder-decoder": replace(BASE, mouth="mouth_prefix"),
        "encoder-decoder, random Q-Former": replace(BASE, mouth="mouth_prefix", steps=0, words=""),
        "stopped early": replace(BASE, mouth="mouth_worse"),
    },
    "stage 2 alone": {  # from a random Q-Former, or from texts
        "equal steps": replace(BASE, steps=0, words=""),
        "equal steps, after texts": replace(BASE, steps=0),
        "equal computation": replace(BASE, steps=0, words="", second=BASE.second + STAGE1_IN_STAGE2 * BASE.steps),
    },
    "eye": {
        "ViT of lesson 01": replace(BASE, eye="vit_normal"),
        "BLIP of lesson 07": replace(BASE, eye="blip"),
    },
    "queries": {f"{Q}": replace(BASE, model=qformer(queries=Q)) for Q in (1, 4, 16)},
    "end to end": {
        "at the same rate": replace(BASE, end_to_end=1.0),
        "eye and mouth at a tenth of the rate": replace(BASE, end_to_end=0.1),
    },
    "Q-Former": {
        "cross-attention in every block": replace(BASE, model=qformer(cross_every=1)),
        "words start at random": replace(BASE, words=""),
    },
}


# --- the frozen parts ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def eye_of(name: str) -> Eye:
    """The frozen eye: the image encoder of an earlier lesson's kept model, without its last block."""
    if name == "clip":
        return Eye(trained(name, CLIP(lesson03.MAIN.model), own=False).vision)
    if name == "blip":
        return Eye(trained(name, BLIP(lesson07.MAIN.model), own=False).vision)
    experiment, arm = lesson01.CHECKPOINTS[name]
    return Eye(trained(name, ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False))


@lru_cache(maxsize=4)
def features(eye: str, split: str, n: int) -> Tensor:
    """What the eye makes of the first `n` pages of a split, (n, S, D'), on the CPU: it is frozen, so once is enough."""
    with torch.no_grad():
        return torch.cat([eye_of(eye)(part) for part in pairs(split, n).images.split(250)])


def thawed(model: nn.Module) -> nn.Module:
    """A copy that is trained end to end: nothing in it is frozen, and the eye is asked with gradients."""
    free = copy.deepcopy(model).requires_grad_(True)
    free.eye.__class__ = _OpenEye
    return free


class _OpenEye(Eye):
    """What the eye would be if it were trained, for comparison."""

    def train(self, mode: bool = True) -> Eye:
        return nn.Module.train(self, mode)

    forward = inspect.unwrap(Eye.forward)  # the same without `no_grad`


def slower(model: nn.Module, share: float) -> list[Callable[[nn.Module, int], None]]:
    """For `fit`, after each step: eye and mouth take only a `share` of each update, which is what AdamW would do at
    this share of the rate. Nothing to do for 0, where they are frozen."""
    if not share:
        return []
    parts = [p for part in ("eye", "mouth") if hasattr(model, part) for p in getattr(model, part).parameters()]
    kept = [p.detach().clone() for p in parts]

    @torch.no_grad()
    def hold_back(_: nn.Module, step: int) -> None:
        for parameter, before in zip(parts, kept, strict=True):
            parameter.copy_(before.lerp_(parameter, share))

    return [hold_back]


def corpus(recipe: Recipe, pages: int) -> Corpus:
    """The training pairs: each of the first `pages` pages with one caption of each of the `levels`."""
    data = pairs("train", recipe.pages)
    of = [(row, level) for row in range(pages) for level in recipe.levels]
    texts = [data.captions[row][level] for row, level in of]
    return Corpus(data, torch.tensor([row for row, _ in of]), texts, ["human"] * len(of), ["clean"] * len(of))


def batches(recipe: Recipe, *, seed: int, pages: int | None = None) -> PairBatches:
    """-> the eye's states (B, S, D') in the place of pictures, which an eye that is trained must see each time (then
    B, C, H, W), ids and mask (B, L), says (B), noise (2, B)."""
    seen = None if recipe.end_to_end else features(recipe.eye, "train", recipe.pages)
    return PairBatches(corpus(recipe, pages or recipe.pages), batch_size=recipe.batch_size, seed=seed, images=seen)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def stage1_loss(
    model: BLIP2, image: Tensor, ids: Tensor, mask: Tensor, says: Tensor, noise: Tensor,
    *, itc: bool = True, itm: bool = True, itg: bool = True, smoothing: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """ITC + ITM + ITG (paper, 3.2) for one batch of `batches`: states of the frozen eye (B, S, D'), or pictures
    (B, C, H, W), which it then looks at, ids and mask (B, L), says (B), noise (2, B)."""
    image = model.ln_vision(image) if image.ndim == 3 else model.look(image)
    states, past = model.see(image)  # the queries' one pass, for ITC and ITG
    same, losses = belong(says[:, None], says), {}
    logits = torch.zeros(len(ids), len(ids), device=ids.device)
    if itc:
        clamp_temperature(model)
        similarity = query_similarities(model.query_vectors(states), model.encode_text(ids))  # (B, B, Q)
        logits = similarity.amax(dim=2) / model.temp
        losses["itc"] = contrastive_loss(logits, same, smoothing=smoothing)
    if itm:
        with torch.no_grad():
            other_image = wrong_partners(logits.T, same, noise[0])
            other_text = wrong_partners(logits, same, noise[1])
        losses["itm"] = lesson05.itm_loss(model, image, model.read(ids), mask, other_image, other_text)
    if itg:
        written = model.write(ids, past)
        losses["itg"] = masked_lm_loss(model.lm_head, written, next_words(ids, mask), smoothing=smoothing)
    return losses


@torch.no_grad()
def start_queries(model: BLIP2) -> None:
    """Give the queries' MLPs the weights of the words' (official code: both are BERT's at first)."""
    for block in model.qformer.blocks:
        block.query_mlp.load_state_dict(block.mlp.state_dict())
        block.query_norm.load_state_dict(block.norm2.state_dict())


WORDS_PARTS = ("qformer.embed", ".attn.", ".norm1.", ".norm2.", ".mlp.", "lm_head")


@torch.no_grad()
def start_from_words(model: BLIP2, words: BLIP2) -> None:
    """Give a new Q-Former the weights of one that has read and written texts alone, the stand-in for BERT (paper, 3.1):
    self-attention, MLPs, the queries' too, tables and the head. Cross-attention and queries stay random."""
    kept = {name: t for name, t in words.state_dict().items()
            if any(part in name for part in WORDS_PARTS) and ".cross." not in name}  # fmt: skip
    model.load_state_dict(kept, strict=False)
    start_queries(model)


def begin(recipe: Recipe, *, seed: int = 0, device: torch.device | None = None) -> BLIP2:
    """A new Q-Former behind a copy of the frozen eye (`features` goes on with the first one, on the CPU), which starts
    from `words` if the recipe says so."""
    eye = copy.deepcopy(eye_of(recipe.eye))  # before the seed is set: it is built the first time, which draws numbers
    minivlp.seed_everything(seed)
    model = BLIP2(recipe.model, eye).to(device)
    if recipe.words:
        start_from_words(model, ready_made(recipe.words))
    return thawed(model) if recipe.end_to_end else model


_FIRST: dict[tuple, tuple[BLIP2, History]] = {}  # the newest few, see `stage1`


def stage1(
    recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "stage 1", times: int = 4
) -> tuple[BLIP2, History]:
    """The first stage: the Q-Former learns to see with the frozen eye. The newest are remembered, so that all that
    differs in stage 2 starts from the very same weights."""
    bare = replace(recipe, mouth=BASE.mouth, second=0, second_pages=0, second_lr=0.0, everything=False)
    key = (bare, seed, str(device), times)
    if key not in _FIRST:
        model = begin(recipe, seed=seed, device=device)
        minivlp.seed_everything(seed)
        history = History()
        if recipe.steps:
            loss = partial(stage1_loss, itc=recipe.itc, itm=recipe.itm, itg=recipe.itg, smoothing=recipe.smoothing)
            history = fit(model, batches(recipe, seed=seed), loss, steps=recipe.steps, lr=recipe.lr,
                          weight_decay=recipe.weight_decay, warmup=recipe.warmup, progress=progress,
                          after_step=slower(model, recipe.end_to_end), evaluate=validation1(recipe),
                          evaluate_every=math.ceil(recipe.steps / times))  # fmt: skip
            clamp_temperature(model)  # the last update came after the last clamp
        if history.stopped:
            if progress is None:
                raise KeyboardInterrupt  # half a training is no result
            return model, history
        _FIRST[key] = model, history
        while len(_FIRST) > 16:
            del _FIRST[next(iter(_FIRST))]
    return _FIRST[key]


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def cut(ids: Tensor, mask: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prefix LM (paper, 3.3): texts (B, L) cut in two, after `share` (B), in [0, 1), of their words: the beginning, for
    the encoder, with its mask, and [DEC] with the rest up to [SEP], for the decoder, with its mask."""
    inner = mask.sum(1) - 2  # words, without [CLS] and [SEP]
    head = (share * inner).long()  # (B), at least one word is left
    place = torch.arange(ids.shape[1], device=ids.device)
    first = place[None] < head[:, None]
    read = torch.where(first, ids.roll(-1, dims=1), 0)
    rest = (place[None] + head[:, None]).clamp(max=ids.shape[1] - 1)  # [CLS]'s place is where [DEC] will stand
    written = ids.gather(1, rest)
    there = place[None] < (mask.sum(1) - head)[:, None]
    written = torch.where(there, written, 0)
    R, W = max(1, int(first.sum(1).max())), int(there.sum(1).max())
    return read[:, :R], first[:, :R], written[:, :W], there[:, :W]


def stage2_loss(
    model: BLIP2Speaker, image: Tensor, ids: Tensor, mask: Tensor, says: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """LM on the text alone, never on the prefix (paper, 3.3, Fig. 3), for one batch of `batches`. A decoder-only mouth
    writes all of it, an encoder-decoder reads its beginning beside the prefix and writes the rest."""
    image, dec, prompt = model.ln_vision(image) if image.ndim == 3 else model.look(image), model.config.dec_id, {}
    if model.mouth.has_encoder:
        read, there, ids, mask = cut(ids, mask, noise[0])
        prompt = {"prompt": read, "prompt_mask": there}
    states = model.write(led_by(ids, dec), image, **prompt)
    return {"lm": masked_lm_loss(model.mouth.lm_head, states, next_words(ids, mask))}


def stage2(
    first: BLIP2, recipe: Recipe, *, seed: int, progress: str | None = "stage 2", times: int = 4
) -> tuple[BLIP2Speaker, History]:
    """The second stage: a copy of the Q-Former learns to be understood by the frozen mouth."""
    minivlp.seed_everything(seed)
    device = next(first.parameters()).device
    model = BLIP2Speaker(first, ready_made(recipe.mouth)).to(device)
    if recipe.end_to_end:
        model = thawed(model)
    data = batches(recipe, seed=seed + 1, pages=recipe.second_pages)
    history = fit(model, data, stage2_loss, steps=recipe.second, lr=recipe.second_lr, warmup=recipe.warmup,
                  weight_decay=recipe.weight_decay, progress=progress, evaluate=validation2(recipe),
                  evaluate_every=math.ceil(recipe.second / times),
                  after_step=slower(model, recipe.end_to_end))  # fmt: skip
    if history.stopped and progress is None:
        raise KeyboardInterrupt
    return model, history


# --- measuring stage 1 -----------------------------------------------------------------------------------------------


def similarities(model: BLIP2, images: Tensor, texts: Sequence[str]) -> Tensor:
    """ITC's cosines of M pictures with N texts for each query, (M, N, Q), on the CPU."""
    return query_similarities(image_vectors(model, images), text_vectors(model, texts))


def full_captions(split: str, n: int) -> list[str]:
    return [captions[4] for captions in pairs(split, n).captions]


def preference(model: BLIP2, split: str = "test", *, n: int = 256) -> float:
    """Share of `n` pages that ITM finds more likely with their own full caption than with another's."""
    data, own = pairs(split, n), torch.arange(n)
    held = states(model, data.images, full_captions(split, n))
    right, wrong = (matching(model, *held, own, other) for other in (own, own.roll(1)))
    return (right > wrong).float().mean().item()


def validation1(recipe: Recipe, n: int = 200) -> Callable[[BLIP2], dict[str, float]]:
    """A function of the model: R@1 by ITC, matching, and the facts of what the Q-Former writes, on `n` pages."""

    def measure(model: BLIP2) -> dict[str, float]:
        data, numbers = pairs("val", n), {}
        if recipe.itc:
            found = recalls(similarities(model, data.images, full_captions("val", n)).amax(dim=2))
            numbers["val R@1"] = lesson03.mean_recall(found)
        if recipe.itm:
            numbers["val matching"] = preference(model, "val", n=n)
        if recipe.itg:
            facts = caption_facts(write(model, data.images, "greedy"), data.scenes)
            numbers["val colours, Q-Former"] = facts["colours, precision"]
        return numbers

    return measure


def search(model: BLIP2, *, n: int = 256, k: int = 16) -> dict[str, float]:
    """R@1 among `n` test pages and their full captions, the mean of both ways: by ITC, and with the `k` best re-ranked
    by ITM plus ITC (official code; here the log odds of a match plus the cosine)."""
    data, texts = pairs("test", 1000).subset(slice(n)), full_captions("test", 1000)[:n]
    cosine = similarities(model, data.images, texts).amax(dim=2)
    held = states(model, data.images, texts)
    ways = rerank(model, cosine, held, k) + cosine, rerank(model, cosine.T, held, k, by_text=True) + cosine.T
    again = statistics.mean(recall_at(scores, torch.arange(n), 1) for scores in ways)
    return {f"R@1 by ITC, {n:,}": lesson03.mean_recall(recalls(cosine)), f"R@1 re-ranked, {n:,}": again}


def measure1(model: BLIP2, recipe: Recipe) -> dict[str, float]:
    """What is recorded of every arm's stage 1, on the test split."""
    numbers = {}
    if recipe.itc:
        found = recalls(similarities(model, pairs("test", 1000).images, full_captions("test", 1000)).amax(dim=2))
        numbers |= found | {"R@1": lesson03.mean_recall(found)}
    if recipe.itm:
        numbers["matching"] = preference(model)
    if recipe.itc and recipe.itm:
        numbers |= search(model)
    if recipe.itg:
        written = caption_numbers(write(model, pairs("test", 1000).images[:300], "beam"))
        numbers |= {f"Q-Former: {name}": value for name, value in written.items()}
    return numbers


# --- measuring stage 2 -----------------------------------------------------------------------------------------------


def prefixes(model: BLIP2Speaker, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """What the mouth is given of each picture: (N, Q, D_LM), on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model.prefix(model.look(part.to(device))).cpu() for part in images.split(batch_size)])


def answers_of(
    model: BLIP2Speaker, split: str = "test", *, n: int = 500, prefix: Callable[[Tensor], Tensor | None] = lambda p: p
) -> Tensor:
    """Zero-shot answers to the questions about the first `n` pages: the number of each written answer, (M), -1 if it is
    none of the known ones. `prefix` may change what the mouth is given of the pictures, or leave it out (None)."""
    q, number = asked(split, n), {answer: i for i, answer in enumerate(ANSWERS)}
    given = prefix(prefixes(model, pairs(split, n).images))
    given = None if given is None else given[q.rows]
    found = answers_after(model.mouth, prompts_of(model.mouth, q.texts), prefix=given)
    return torch.tensor([number.get(text, -1) for text in found])


def validation2(recipe: Recipe, n: int = 200, asked_of: int = 60) -> Callable[[BLIP2Speaker], dict[str, float]]:
    """A function of the model: facts of its captions of `n` validation pages, zero-shot answers about some of them."""

    def measure(model: BLIP2Speaker) -> dict[str, float]:
        data = pairs("val", n)
        facts = caption_facts(write(model, data.images, "greedy"), data.scenes)
        right = (answers_of(model, "val", n=asked_of) == asked("val", asked_of).answers).float().mean().item()
        return {"val colours": facts["colours, precision"], "val objects": facts["objects, recall"], "val VQA": right}

    return measure


def measure2(model: BLIP2Speaker, recipe: Recipe, *, n: int = 300) -> dict[str, float]:
    """What is recorded of every arm's stage 2, on the test split: captions of `n` pages and zero-shot answers about
    the first 200."""
    numbers = caption_numbers(texts := write(model, pairs("test", 1000).images[:n], "beam"))
    right = (answers_of(model, n=200) == asked("test", 200).answers).float().mean().item()
    return numbers | {"unique": unique(texts), "VQA, 200 pages": right}


def majority(split: str = "test", *, n: int = 500) -> float:
    """Share of the questions about `n` pages that are answered right by always giving the most common answer of the
    question's type."""
    q, right = asked(split, n), 0
    for kind in set(q.types):
        of = q.answers[torch.tensor([t == kind for t in q.types])]
        right += int(of.bincount().max())
    return right / len(q.answers)


def controls(model: BLIP2Speaker, *, n: int = 300) -> dict[str, float]:
    """What the pictures are worth: captions and answers about other pages' pictures, after a prefix of zeros, and after
    none at all."""
    images, numbers = pairs("test", 1000).images, {}
    numbers |= {f"another picture: {name}": value for name, value in
                caption_numbers(write(model, images[:n].roll(1, dims=0), "beam")).items()}  # fmt: skip
    changed = {"": lambda p: p, ", another picture": lambda p: p.roll(1, dims=0), ", zeros": torch.zeros_like,
               ", question alone": lambda p: None}  # fmt: skip
    q = asked("test", 500)
    for name, change in changed.items():
        right = lesson02.answered_right(answers_of(model, prefix=change), q)
        numbers |= {f"VQA{name}" if kind == "all" else f"VQA{name}, {kind}": value for kind, value in right.items()}
    with evaluating(model):
        first = torch.full((n,), words().dec_id, device=next(model.parameters()).device)
        zeros = torch.zeros_like(prefixes(model, images[:n])).to(first.device)
        ids = greedy(model.mouth.speaker(zeros), first, end=words().sep_id, longest=lesson07.LONGEST)
        texts = [words().decode(row) for row in ids]
    return numbers | {f"zeros: {name}": value for name, value in caption_numbers(texts).items()} | {
        "VQA, most common answer of the type": majority()}  # fmt: skip


def winners(model: BLIP2, *, n: int = 1000) -> Tensor:
    """Which query says most that picture and full caption of `n` test pages belong together: shares (Q)."""
    own = similarities(model, pairs("test", 1000).images[:n], full_captions("test", 1000)[:n]).diagonal().T  # (n, Q)
    return own.argmax(dim=1).bincount(minlength=model.config.queries) / n


def query_maps(model: BLIP2, images: Tensor, *, block: int = -1) -> Tensor:
    """Where each query looks: (B, Q, N) over the patches, mean over heads, in the first or last cross-attention."""
    device = next(model.parameters()).device
    with evaluating(model):
        image = model.look(images.to(device))
        _, _, named = model.qformer(model.qformer.queries(len(image)), model.config.queries, image, everything=True)
    return list(named.values())[block].mean(dim=1)[:, :, 1:].cpu()


def query_likeness(model: BLIP2, *, n: int = 200) -> float:
    """How alike a picture's Q vectors are: their mean cosine with each other, over `n` test pages. 1: all the same."""
    v = image_vectors(model, pairs("test", 1000).images[:n])  # (n, Q, E)
    Q = v.shape[1]
    return float("nan") if Q < 2 else ((v @ v.transpose(1, 2)).sum(dim=(1, 2)) - Q).mean().item() / (Q * (Q - 1))


def probe_numbers(model: BLIP2, kind: str, *, n: int = 300) -> dict[str, float]:
    """Share of the pictures that prefer their own caption to the other one of the probe, by ITC and by ITM."""
    images, captions = lesson02.probe_pairs(kind, n)
    first = 2 * torch.arange(n)[:, None]
    pictures, texts = (first + torch.tensor([0, 0, 1, 1])).flatten(), (first + torch.tensor([0, 1, 0, 1])).flatten()
    odds = matching(model, *states(model, images, captions), pictures, texts).view(n, 2, 2)
    image, text = image_vectors(model, images)[pictures], text_vectors(model, captions)[texts]  # (4n, Q, E), (4n, E)
    cosine = torch.einsum("mqe,me->mq", image, text).amax(dim=1).view(n, 2, 2)
    return {f"{kind}, ITC": probe_scores(cosine)["pair"], f"{kind}, ITM": probe_scores(odds)["pair"]}


def zero_shot_kind(model: BLIP2, *, n: int = 400) -> float:
    """Accuracy of choosing among the 12 kinds by their names, on normal pages with one thing."""
    data = lesson03.single_things("test", n=n, tier="normal")
    texts = [lesson03.TEMPLATES[0].format(with_article(kind)) for kind in KINDS]
    return accuracy(similarities(model, data.images, texts).amax(dim=2), data.labels("kind")[0])


def gaps(model: BLIP2, *, n: int = 1000) -> dict[str, float]:
    """How far pictures and texts lie apart (`lesson05.modality_gap`) where they meet: the winning query's vector and
    the text's."""
    data, texts = pairs("test", 1000).subset(slice(n)), full_captions("test", 1000)[:n]
    image, text = image_vectors(model, data.images), text_vectors(model, texts)
    best = torch.einsum("nqe,ne->nq", image, text).argmax(dim=1)
    return {f"gap, {name}": value for name, value in
            lesson05.modality_gap(image[torch.arange(n), best], text).items()}  # fmt: skip


def blinded(model: BLIP2, *, n: int = 256) -> float:
    """R@1 among `n` test pages when the cross-attention answers nothing (its last layer is zero): chance is 1/n."""
    blind = copy.deepcopy(model)
    with torch.no_grad():
        for block in blind.qformer.blocks:
            if block.cross:
                block.cross.attn.proj.weight.zero_()
                block.cross.attn.proj.bias.zero_()
    scores = similarities(blind, pairs("test", 1000).images[:n], full_captions("test", 1000)[:n]).amax(dim=2)
    return lesson03.mean_recall(recalls(scores))


def weights_hash(module: nn.Module) -> str:
    """A fingerprint of all weights of a module, 12 digits: equal before and after, nothing was trained."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(own_copy(tensor).numpy().tobytes())
    return digest.hexdigest()[:12]


# --- the runs --------------------------------------------------------------------------------------------------------


def main_numbers(first: BLIP2, second: BLIP2Speaker) -> dict[str, float]:
    """What only the main run needs, of both its stages."""
    numbers = controls(second) | gaps(first) | {"R@1 by ITC, 256, cross-attention zero": blinded(first),
                                                "likeness of queries": query_likeness(first)}  # fmt: skip
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        numbers |= probe_numbers(first, kind)
    return numbers | {"zero-shot kind": zero_shot_kind(first)} | {
        f"wins, query {i + 1}": share.item() for i, share in enumerate(winners(first).sort(descending=True).values)
    }  # fmt: skip


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Everything a recipe asks for, then measured on the test split: what the recorder keeps of one arm and seed. The
    curves of stage 2 bear "stage 2: " before their names."""
    first, history = stage1(recipe, seed=seed, device=device, progress=progress, times=4 if recipe.everything else 1)
    history = copy.deepcopy(history)
    numbers = measure1(first, recipe) if recipe.steps else {}
    second, later = stage2(first, recipe, seed=seed, progress=progress)
    numbers |= measure2(second, recipe)
    numbers["trainable, stage 2"] = sum(p.numel() for p in second.parameters() if p.requires_grad)
    if recipe.end_to_end:  # a frozen one forgets nothing
        numbers["comprehension"] = answered(second.mouth)
    if recipe.everything:
        numbers |= main_numbers(first, second)
    history.losses |= {f"stage 2: {name}": values for name, values in later.losses.items()}
    history.metrics |= {f"stage 2: {name}": values for name, values in later.metrics.items()}
    history.began |= {f"stage 2: {name}": 0 for name in later.losses}
    history.measured_at |= {f"stage 2: {name}": later.metric_steps for name in later.metrics}
    return Run(second, history, numbers)


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    for split, n in (("train", BASE.pages), ("val", 60), ("val", 200), ("test", 200), ("test", 256), ("test", 500),
                     ("test", 1000)):  # fmt: skip
        pairs(split, n)
    lesson03.single_things("test", n=400, tier="normal")
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        lesson02.probe_pairs(kind)


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000, by vectors (R@1, chance 0.001)": ("main", "BLIP-2",
                                                                                    "R@1 text to image"),
    "the full caption of a picture, among 1,000, by vectors": ("main", "BLIP-2", "R@1 image to text"),
    "more likely with its own caption than with another page's (chance 0.5)": ("main", "BLIP-2", "matching"),
    "captions by the frozen mouth: colours said of a thing that are right": ("main", "BLIP-2", "colours, precision"),
    "... captions of another picture": ("main", "BLIP-2", "another picture: colours, precision"),
    "... things said that the picture does not show": ("main", "BLIP-2", "hallucinated"),
    "... BLEU-4": ("main", "BLIP-2", "BLEU"),
    "captions by the Q-Former itself: colours that are right": ("main", "BLIP-2", "Q-Former: colours, precision"),
    "questions answered without ever having been asked about a picture": ("main", "BLIP-2", "VQA"),
    "... another picture's prefix": ("main", "BLIP-2", "VQA, another picture"),
    "... the question alone": ("main", "BLIP-2", "VQA, question alone"),
}  # fmt: skip
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "a frozen eye and a frozen mouth, {} of the colours it names are right, {} of the questions answered untrained "
    "(another picture's prefix: {})",
    ("main", "BLIP-2", "colours, precision"), ("main", "BLIP-2", "VQA"), ("main", "BLIP-2", "VQA, another picture"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "BLIP-2", "R@1 text to image"),
    "R@1 image to text": ("main", "BLIP-2", "R@1 image to text"),
    "zero-shot kind": ("main", "BLIP-2", "zero-shot kind"),
    "VQA": ("main", "BLIP-2", "VQA"),
    "VQA, question alone": ("main", "BLIP-2", "VQA, question alone"),
    "attribute swap": ("main", "BLIP-2", "attribute_swap, ITM"),
    "order swap": ("main", "BLIP-2", "order_swap, ITM"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
CLOCK_STEPS = 8
NOTES = {
    "parameters": "BLIP-2: of stage 2, with frozen eye and mouth.",
    "training seconds": f"BLIP-2: both stages, measured over {CLOCK_STEPS} steps of each, without evaluation, and "
    "scaled up; eye, mouth and the start of the Q-Former's words are ready-made.",
    "VQA": "BLIP-2: writes its answers, and was never trained on a question about a picture.",
    **dict.fromkeys(("attribute swap", "order swap"), "BLIP-2: by ITM of stage 1."),
    "ms for 1,000 x 1,000 pairs": "BLIP-2: by ITC of stage 1, from pixels and words on.",
}  # fmt: skip


def sizes(model: nn.Module) -> dict[str, int]:
    """Parameters, all and those that are trained."""
    return {"all": count_parameters(model), "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def both_stages(recipe: Recipe = BASE) -> tuple[BLIP2, BLIP2Speaker]:
    """New models of both stages, on the CPU."""
    first = BLIP2(recipe.model, copy.deepcopy(eye_of(recipe.eye)))
    return first, BLIP2Speaker(first, ready_made(recipe.mouth))


def build(config: QFormerConfig) -> BLIP2Speaker:
    """What `CHECKPOINTS` keeps: stage 2 with the main recipe's eye and mouth."""
    return both_stages(replace(MAIN, model=config))[1]


def ways_to_train(first: BLIP2, second: BLIP2Speaker) -> Iterator[tuple[str, nn.Module, Callable, PairBatches]]:
    """What freezing is compared by, for either stage: its name, a model, its loss and its batches; with the frozen
    states at hand, looking at the pictures each time, and trained end to end."""
    kept, looked = batches(BASE, seed=0), batches(replace(BASE, end_to_end=1.0), seed=0)
    for stage, model, loss in (("stage 1", first, stage1_loss), ("stage 2", second, stage2_loss)):
        yield stage, model, loss, kept
        yield f"{stage}, looking each time", model, loss, looked
        yield f"{stage}, end to end", thawed(model), loss, looked


def operations(model: nn.Module, loss: Callable, data: PairBatches) -> int:
    """Floating-point operations of a step, forward and backward, the mean of `CLOCK_STEPS`: two for each multiplication
    with addition in the matrix products."""
    own = copy.deepcopy(model).train()
    # PyTorch's counter does not know the fused attention of the CPU, but the products that it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in range(CLOCK_STEPS):
            sum(loss(own, *data(step)).values()).backward()
    return counter.get_total_flops() // CLOCK_STEPS


def facts() -> dict[str, float]:
    """Numbers that no run is needed for: parameters, operations of a step, and how far pictures and texts lie apart
    before any training (mean of five seeds)."""
    first, second = both_stages()
    of = {"stage 1": sizes(first), "stage 2": sizes(second)}
    before = [gaps(begin(MAIN, seed=seed)) for seed in range(5)]
    return {f"{kind}, {stage}": n for stage, both in of.items() for kind, n in both.items()} | {
        "parameters": of["stage 2"]["all"]} | {
        f"operations, step, {name}": operations(model, loss, data)
        for name, model, loss, data in ways_to_train(first, second)} | {
        f"before training: {name}": statistics.mean(gap[name] for gap in before) for name in before[0]}  # fmt: skip


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine: milliseconds of a step of either stage, with the frozen states at hand,
    looking at the pictures each time, and trained end to end; of stage 1 without each loss; "training seconds" of the
    main run, and "ms for 1,000 x 1,000 pairs"."""
    first, second = (model.to(device) for model in both_stages())
    kept, steps = batches(BASE, seed=0), {}

    def add(name: str, model: nn.Module, loss: Callable, data: PairBatches) -> None:
        ready = [[t.to(device) for t in data(step)] for step in range(CLOCK_STEPS)]
        own = copy.deepcopy(model).train()
        trained = [p for p in own.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type != "mps")
        steps[name] = partial(lesson05.take_steps, own, optimizer, loss, ready)

    for way in ways_to_train(first, second):
        add(*way)
    for name in ("itc", "itm", "itg"):
        add(f"stage 1 without {name.upper()}", first, partial(stage1_loss, **{name: False}), kept)
    seconds = {name: statistics.median(t) / CLOCK_STEPS for name, t in take_turns(steps, rounds=4).items()}
    images, texts = pairs("test", 1000).images, full_captions("test", 1000)
    searched = take_turns({"": lambda: similarities(first, images, texts).amax(dim=2)}, rounds=3)[""]
    return {f"ms, step, {name}": 1000 * value for name, value in seconds.items()} | {
        "training seconds": MAIN.steps * seconds["stage 1"] + MAIN.second * seconds["stage 2"],
        "ms for 1,000 x 1,000 pairs": 1000 * statistics.median(searched),
    }  # fmt: skip
