"""Lesson 05's recipes: one main run and the experiments around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 05_albef` runs all of them over several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.bench import take_turns
from minivlp.data import CaptionBatches, PairTensors, TokenTable, mask_words
from minivlp.evaluate import accuracy, cloze, probe_scores, recall_at, ridge_probe
from minivlp.layers import count_parameters
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.clip import image_vectors, meaning, text_vectors
from minivlp.lessons.vilt import NOUNS, inside, pairs, probe_pairs, words
from minivlp.lessons.vit import Run
from minivlp.losses import IGNORE, distilled_contrastive_loss, distilled_lm_loss, hard_negatives, masked_lm_loss
from minivlp.models.albef import (
    ALBEF,
    ALBEFConfig,
    MomentumALBEF,
    belong,
    clamp_temperature,
    follow,
    start_from_vit,
)
from minivlp.models.vit import ViT
from minivlp.train import History, evaluating, fit, train_step, trained

NAME = "05_albef"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"albef": ("main", "ALBEF")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: ALBEFConfig = field(default_factory=ALBEFConfig)
    start: str = "vit_normal"  # kept weights of lesson 01 for the image encoder (the paper: DeiT); "": random
    itc: bool = True  # without it there are no similarities, so the wrong partners are any
    itm: bool = True
    negatives: str = "hard"  # drawn by similarity; "uniform": any; "argmax": always the most similar
    alpha: float = 0.4  # the teacher's share of the targets, in the end; 0: no distillation
    ramp: float = 0.3  # share of the steps in which it grows from 0 (the paper: the first of 30 epochs)
    momentum: float = 0.99
    queue: int = 64  # Q, pairs, a multiple of the batch
    duplicates: str = "masked"  # captions that say the same take no part; "wrong": negatives, as in the paper
    share: float = 0.5  # of the words, hidden for MLM (the paper: 0.15 of much longer texts)
    noise: float = 0.0  # share of the training pages whose captions were exchanged on purpose
    train_size: int = 20_000
    steps: int = 560
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    levels: tuple[int, ...] = (1, 1, 4)  # which of the five captions; one level a batch, so that lengths agree
    everything: bool = False  # also measure what only the main run needs


MAIN = Recipe(everything=True)
SHORT = replace(MAIN, steps=240, everything=False)  # for the comparisons
# Few pages, seen often, so that a false caption can be learned by heart; without ITM, which is not distilled.
SMALL = replace(SHORT, train_size=1_000, itm=False, steps=320)
PLANTED = 200  # pages whose captions are exchanged among each other

# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"ALBEF": MAIN},
    "leave one out": {
        "all": SHORT,
        "without ITC": replace(SHORT, itc=False),
        "without hard negatives": replace(SHORT, negatives="uniform"),
        "without MoD": replace(SHORT, alpha=0.0),
    },
    "changes": {
        "the most similar one": replace(SHORT, negatives="argmax"),
        "false negatives kept": replace(SHORT, duplicates="wrong"),
    },
    "queue": {f"Q = {Q:,}": replace(SHORT, queue=Q) for Q in (0, 1024)},
    "noise": {f"{noise:.0%}, {name}": replace(SMALL, noise=noise, alpha=alpha) for noise in (0.0, 0.2, 0.4)
              for name, alpha in (("one-hot", 0.0), ("MoD", SMALL.alpha))},
    "queue as large as the corpus": {
        "masked": replace(SMALL, queue=1024),
        "not masked": replace(SMALL, queue=1024, duplicates="wrong"),
    },
}  # fmt: skip


# --- data ------------------------------------------------------------------------------------------------------------


def sayings(data: PairTensors, levels: Sequence[int]) -> LongTensor:
    """What each page's captions say, as numbers: (N, K), one column for each of K levels; equal where captions mean
    the same, whatever their words. Levels never share a number."""
    numbers: dict[tuple, int] = {}
    return torch.tensor([[numbers.setdefault((level, meaning(scene, level)), len(numbers)) for level in levels]
                         for scene in data.scenes])  # fmt: skip


def rings(size: int, share: float, *, group: int = PLANTED) -> LongTensor:
    """A `share` of `size` pages, always the same ones, in rings of `group`: (R, group). Raises ValueError if they
    cannot be cut into whole rings."""
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: round(share * size)]
    if len(chosen) % group:
        raise ValueError(f"{len(chosen)} pages cannot be cut into rings of {group}: choose another share or size")
    return chosen.view(-1, group)


def plant_noise(size: int, share: float) -> LongTensor:
    """Whose captions each of `size` pages gets, (size): its own, but in each of the `rings` those of the one before."""
    source = torch.arange(size)
    for ring in rings(size, share):
        source[ring] = ring.roll(1)
    return source


class ALBEFBatches(CaptionBatches):
    """All that one step needs; everything random is drawn from `(seed, step)`."""

    def __init__(self, data: PairTensors, recipe: Recipe, *, seed: int) -> None:
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.batch_size, seed=seed)
        self.recipe, self.levels = recipe, sorted(set(recipe.levels))
        self.sayings = sayings(data, self.levels)  # (N, K)
        self.source = plant_noise(len(data.images), recipe.noise)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """-> images (B, C, H, W), ids, mask, hidden ids and labels (B, L); shows (B, K) and says (B), see `belong`;
        noise (2, B), which decides the wrong partners; alpha ()."""
        r, generator = self.recipe, self.generator(step)
        level = r.levels[int(torch.randint(len(r.levels), (), generator=generator))]
        rows = self.order.indices(step)
        source = self.source[rows]  # the pages whose captions are read: their own, but for planted noise
        ids, mask = self.table(source, level)
        hidden, labels = mask_words(ids, words(), generator=generator, share=r.share)
        shows = self.sayings[source]  # what training believes: it does not know of the noise
        noise = torch.rand(2, len(rows), generator=generator)
        alpha = torch.tensor(ramped(r.alpha, step, r.ramp * r.steps))
        return self.images[rows], ids, mask, hidden, labels, shows, shows[:, self.levels.index(level)], noise, alpha


def ramped(alpha: float, step: int, length: float) -> float:
    """The teacher's share at `step`: from 0 in a straight line to `alpha` at step `length`, then constant."""
    return alpha * min(1.0, step / length) if length else alpha


# --- training --------------------------------------------------------------------------------------------------------


def itc_loss(
    vectors: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], temp: Tensor,
    alpha: Tensor, same: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ITC (paper, 3.2 and 3.3). Of pictures and texts: the student's vectors and the teacher's (B, E), and all keys
    (B+Q, E), the teacher's of this batch first. `same` (B, B+Q) twice, which texts belong to each picture and which
    pictures to each text: the first B x B have the truth on the diagonal, all others that belong are left out.

    -> the loss, and both similarities (B, B+Q) over the temperature, pictures choosing texts, then texts pictures.
    """
    (image, text), (image_t, text_t), (image_keys, text_keys) = vectors, teacher, keys
    to_text, to_image = image @ text_keys.T / temp, text @ image_keys.T / temp
    directions = []
    pairs_of = (to_text, image_t @ text_keys.T), (to_image, text_t @ image_keys.T)
    for (logits, teacher_similarity), belongs in zip(pairs_of, same, strict=True):
        own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        directions.append(distilled_contrastive_loss(logits, teacher_similarity / temp, alpha, ignore=belongs & ~own))
    return sum(directions) / 2, to_text, to_image


def wrong_partners(similarity: Tensor, forbidden: Tensor, noise: Tensor, how: str = "hard") -> LongTensor:
    """For each row of similarity (B, B) a column that is not `forbidden`, (B): `hard_negatives`, or for comparison
    "uniform", any of them, or "argmax", the most similar."""
    if how == "argmax":
        return similarity.masked_fill(forbidden, float("-inf")).argmax(dim=1)
    return hard_negatives(torch.zeros_like(similarity) if how == "uniform" else similarity, forbidden, noise)


def itm_loss(
    model: ALBEF, image: Tensor, text: Tensor, mask: Tensor, other_image: LongTensor, other_text: LongTensor
) -> Tensor:
    """ITM (paper, 3.2): B true pairs, each text with a wrong picture, each picture with a wrong text. image (B, S, D')
    and text (B, L, D) are states, `other_image` and `other_text` (B) say whose; only the fusion half runs, on 3 B."""
    # index_select, not []: its gradient is summed up in one order, so that a run can be repeated to the last digit
    wrong_text, wrong_image = text.index_select(0, other_text), image.index_select(0, other_image)
    scores = model.match(torch.cat([text, text, wrong_text]), torch.cat([mask, mask, mask[other_text]]),
                         torch.cat([image, wrong_image, image]))  # fmt: skip
    B = len(image)
    labels = torch.cat([torch.ones(B), torch.zeros(2 * B)]).long().to(scores.device)
    return F.cross_entropy(scores.float(), labels)


@torch.no_grad()
def ask_teacher(
    model: MomentumALBEF, images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor, labels: Tensor, *, guess: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The teacher first follows the student, then says: vectors of pictures and texts (B, E), and if it is to `guess`,
    its scores (M, V) at the M hidden words."""
    teacher = model.teacher
    follow(teacher, model.student, model.momentum)
    image = teacher.vision(images)
    text = teacher.text.read(ids, mask)
    scores = None
    if guess:
        fused, _ = teacher.text(hidden, mask, image)
        scores = teacher.mlm_head(fused[labels != IGNORE])
    return teacher.image_vector(image), teacher.text_vector(text), scores


def albef_loss(
    model: MomentumALBEF, images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor, labels: Tensor, shows: Tensor,
    says: Tensor, noise: Tensor, alpha: Tensor, *, itc: bool = True, itm: bool = True, negatives: str = "hard",
    masked: bool = True, distil: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """ALBEF's objective ITC + ITM + MLM (paper, 3.2) for one batch of `ALBEFBatches`. Moves teacher and queue on."""
    student, queue, B = model.student, model.queue, len(ids)
    clamp_temperature(student)
    image_t, text_t, scores_t = ask_teacher(model, images, ids, mask, hidden, labels, guess=distil)
    keys = torch.cat([image_t, queue.image]), torch.cat([text_t, queue.text])
    if masked:
        same = (belong(shows, torch.cat([says, queue.says])), belong(torch.cat([shows, queue.shows]), says).T)
    else:
        same = (torch.eye(B, len(keys[0]), dtype=torch.bool, device=ids.device),) * 2

    image = student.vision(images)  # once, for all three losses
    text, text_hidden = student.text.read(torch.cat([ids, hidden]), torch.cat([mask, mask])).chunk(2)
    vectors = student.image_vector(image), student.text_vector(text)
    loss, to_text, to_image = itc_loss(vectors, (image_t, text_t), keys, student.temp, alpha, same)
    losses = {"itc": loss} if itc else {}
    queue.push(image_t, text_t, shows, says)
    if itm:
        with torch.no_grad():  # only this batch: of the queue there are vectors, no states to be fused
            other_image = wrong_partners(to_image[:, :B], same[1][:, :B], noise[0], negatives)
            other_text = wrong_partners(to_text[:, :B], same[0][:, :B], noise[1], negatives)
        losses["itm"] = itm_loss(student, image, text, mask, other_image, other_text)
    fused, _ = student.text.fuse(text_hidden, mask, image)
    if distil:
        losses["mlm"] = distilled_lm_loss(student.mlm_head, fused, labels, scores_t, alpha)
    else:
        losses["mlm"] = masked_lm_loss(student.mlm_head, fused, labels)
    return losses


def build(config: ALBEFConfig) -> ALBEF:
    return ALBEF(config)


def begin(recipe: Recipe) -> MomentumALBEF:
    """A new student with its teacher and queue, the image encoder taken from lesson 01's ViT if the recipe says so."""
    student = build(recipe.model)
    if recipe.start:
        experiment, arm = lesson01.CHECKPOINTS[recipe.start]
        start_from_vit(student, trained(recipe.start, ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False))
    levels = len(set(recipe.levels))
    return MomentumALBEF(student, queue_size=recipe.queue, momentum=recipe.momentum, captions=levels)


def loss_of(recipe: Recipe) -> Callable:
    """`fit` wants a function of the model and the batch."""
    return partial(albef_loss, itc=recipe.itc, itm=recipe.itm, masked=recipe.duplicates == "masked",
                   negatives=recipe.negatives if recipe.itc else "uniform", distil=recipe.alpha > 0)  # fmt: skip


def train(
    recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "ALBEF", times: int | None = None
) -> tuple[MomentumALBEF, History]:
    """One run of a recipe: build, batch, fit. The seed fixes weights, queue, pairs and draws, not the planted noise.
    It is looked at `times` during the run."""
    times = times or (4 if recipe.itm and not recipe.everything else 8)
    minivlp.seed_everything(seed)
    model = begin(recipe).to(device)
    batches = ALBEFBatches(pairs("train", recipe.train_size), recipe, seed=seed)
    history = fit(
        model, batches, loss_of(recipe), steps=recipe.steps, lr=recipe.lr, weight_decay=recipe.weight_decay,
        warmup=recipe.warmup, evaluate=validation(recipe), evaluate_every=max(1, recipe.steps // times),
        progress=progress,
    )  # fmt: skip
    clamp_temperature(model.student)  # the last update came after the last clamp
    return model, history


# --- measuring -------------------------------------------------------------------------------------------------------


def word_scores(model: ALBEF, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of every word at every place, (B, L, V), from the fusion half."""
    return model.mlm_head(model.text(ids, mask, model.vision(images))[0])


def states(model: ALBEF, images: Tensor, texts: Sequence[str], *, batch_size: int = 250) -> tuple[Tensor, ...]:
    """What is computed once for each picture and each text, on the model's device: image states (N, 1+P, D'), text
    states (M, L, D) and mask (M, L). A model whose encoders have other names than ALBEF's has `look` and `read`."""
    device = next(model.parameters()).device
    look, read = (model.look, model.read) if hasattr(model, "look") else (model.vision, model.text.read)
    ids, mask = (t.to(device) for t in words().encode_batch(texts))
    with evaluating(model):
        image = torch.cat([look(part.to(device)) for part in images.split(batch_size)])
        parts = zip(ids.split(batch_size), mask.split(batch_size), strict=True)
        return image, torch.cat([read(*part) for part in parts]), mask


def matching(
    model: ALBEF, image: Tensor, text: Tensor, mask: Tensor, pictures: LongTensor, texts: LongTensor,
    *, batch_size: int = 500,
) -> Tensor:  # fmt: skip
    """ITM for M chosen pairs, `pictures` (M) and `texts` (M) as rows of `states`: the log odds of a match (M), CPU."""
    scores = []
    with evaluating(model):
        for i, t in zip(pictures.split(batch_size), texts.split(batch_size), strict=True):
            longest = int(mask[t].sum(1).max())
            logits = model.match(text[t, :longest], mask[t, :longest], image[i])
            scores.append(logits.float().diff(dim=1)[:, 0].cpu())
    return torch.cat(scores)


def all_pairs(model: ALBEF, images: Tensor, texts: Sequence[str]) -> Tensor:
    """ITM of every picture with every text, (N, M): N M passes through the fusion half."""
    image, text, mask = states(model, images, texts)
    grid = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(texts)))
    return matching(model, image, text, mask, *grid.unbind(1)).view(len(images), len(texts))


def rerank(model: ALBEF, similarity: Tensor, held: tuple[Tensor, ...], k: int, *, by_text: bool = False) -> Tensor:
    """ALBEF's search (paper, 4.2): the `k` best of each row of similarity (N, M) get ITM's log odds, all others -100.

    `held` is what `states` gave. Rows are pictures that look for texts, or with `by_text` the other way round."""
    top = similarity.topk(k, dim=1).indices  # (Q, k)
    query = torch.arange(len(top))[:, None].expand_as(top).flatten()
    pictures, texts = (top.flatten(), query) if by_text else (query, top.flatten())
    odds = matching(model, *held, pictures, texts).view_as(top)
    return torch.full_like(similarity, -100.0).scatter(1, top, odds)


def searches(model: ALBEF, split: str = "test", *, n: int = 128, k: int = 16, every: bool = True) -> dict[str, float]:
    """R@1 among the first `n` pages and their full captions, three ways: by ITC's vectors, by ITM of `every` pair, and
    by ITM of the `k` best by ITC."""
    data = pairs(split, n)
    texts, own = [captions[4] for captions in data.captions], torch.arange(n)
    similarity = image_vectors(model, data.images) @ text_vectors(model, texts).T
    held = states(model, data.images, texts)
    found = {"ITC": (similarity, similarity.T)}
    if every:
        odds = all_pairs(model, data.images, texts)
        found["ITM"] = odds, odds.T
    found["re-ranked"] = rerank(model, similarity, held, k), rerank(model, similarity.T, held, k, by_text=True)
    numbers = {}
    for way, (to_text, to_image) in found.items():
        numbers[f"{way}, image to text"] = recall_at(to_text, own, 1)
        numbers[f"{way}, text to image"] = recall_at(to_image, own, 1)
        numbers[way] = (numbers[f"{way}, image to text"] + numbers[f"{way}, text to image"]) / 2
    return numbers


def partners(model: ALBEF, how: str, split: str = "test", *, n: int = 256, seed: int = 0) -> LongTensor:
    """A wrong text for each of `n` pages (full captions), drawn as in training: "hard", "uniform" or "argmax"."""
    data = pairs(split, n)
    texts = [captions[4] for captions in data.captions]
    similarity = image_vectors(model, data.images) @ text_vectors(model, texts).T / model.temp.item()
    says = sayings(data, [4])
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return wrong_partners(similarity, belong(says, says[:, 0]), noise, how)


def shared_facts(data: PairTensors, other: LongTensor) -> float:
    """The share of each page's facts, kind and colour of its things, place, sky and weather, that the page whose text
    it was given has, too; the mean over the pages."""
    facts = [{(t.kind, t.colour) for t in s.things} | {("place", s.place), ("sky", s.sky), ("weather", s.weather)}
             for s in data.scenes]  # fmt: skip
    return statistics.mean(len(facts[i] & facts[j]) / len(facts[i]) for i, j in enumerate(other.tolist()))


def matching_accuracy(model: ALBEF, judge: ALBEF | None = None, *, n: int = 256) -> dict[str, float]:
    """ITM accuracy at even odds on true pairs of the test split and as many wrong ones, drawn at random, and drawn as
    hard ones by `judge` (the model itself)."""
    data, own = pairs("test", n), torch.arange(n)
    held = states(model, data.images, [captions[4] for captions in data.captions])
    right = (matching(model, *held, own, own) > 0).float().mean().item()
    numbers = {}
    for how, name in (("uniform", "random"), ("hard", "hard")):
        wrong = matching(model, *held, own, partners(judge or model, how, n=n)) <= 0
        numbers[f"matching, {name} partners"] = (right + wrong.float().mean().item()) / 2
    return numbers


def probes(model: ALBEF, kind: str, *, n: int = 300) -> dict[str, float]:
    """Share of the pictures that prefer their own caption to the other one of the probe, by ITC and by ITM."""
    images, captions = probe_pairs(kind, n)
    image, text = image_vectors(model, images).view(n, 2, -1), text_vectors(model, captions).view(n, 2, -1)
    first = 2 * torch.arange(n)[:, None]
    pictures, texts = (first + torch.tensor([0, 0, 1, 1])).flatten(), (first + torch.tensor([0, 1, 0, 1])).flatten()
    odds = matching(model, *states(model, images, captions), pictures, texts).view(n, 2, 2)
    return {f"{kind}, ITC": probe_scores(image @ text.transpose(1, 2))["pair"],
            f"{kind}, ITM": probe_scores(odds)["pair"]}  # fmt: skip


def modality_gap(image: Tensor, text: Tensor) -> dict[str, float]:
    """How far apart two clouds of vectors lie, (N, E) each: the distance between their means over the root mean square
    distance of a vector from its own mean, and how often a linear probe, fitted on one half, tells which is which."""
    centre = image.mean(0), text.mean(0)
    spread = torch.cat([image - centre[0], text - centre[1]]).square().sum(1).mean().sqrt()
    half = len(image) // 2
    train, test = (torch.cat([part(image), part(text)]) for part in (lambda x: x[:half], lambda x: x[half:]))
    labels = [torch.tensor([0] * k + [1] * k) for k in (half, len(image) - half)]
    scores = ridge_probe(train, labels[0], test, classes=2)
    return {"distance": ((centre[0] - centre[1]).norm() / spread).item(), "told apart": accuracy(scores, labels[1])}


def gap_of(model: ALBEF, *, n: int = 1000) -> dict[str, float]:
    """`modality_gap` of the test pages' vectors, where ITC compares them."""
    data = pairs("test", n)
    return modality_gap(image_vectors(model, data.images), text_vectors(model, [c[4] for c in data.captions]))


def word_maps(model: ALBEF, images: Tensor, texts: Sequence[str], *, gradient: bool = True, block: int = 0) -> Tensor:
    """Where each word looks: maps (B, L, P) over the patches, from the cross-attention of one fusion block.

    `gradient`: Grad-CAM (paper, 5.1): the attention weights times what each of them adds to the score of a match,
    negative products set to 0. Without it the plain weights. Heads are averaged.
    """
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in words().encode_batch(texts))
    model.eval()
    with torch.enable_grad():
        image = model.vision(images.to(device)).detach()
        fused, named = model.text(ids, mask, image, everything=True)
        weights = named[f"cross_{block}"]  # (B, heads, L, 1+P)
        if gradient:
            score = model.itm_head(fused[:, 0])[:, 1].sum()
            (slope,) = torch.autograd.grad(score, weights)
            weights = (weights * slope).clamp(min=0)
    return weights.detach().mean(dim=1)[:, :, 1:].cpu()


@lru_cache(maxsize=1)
def pages_to_point_at(n: int = 300) -> tuple[PairTensors, Tensor, Tensor]:
    """Test pages with one thing, where its noun stands in their captions of level 1, (n, L) True at its pieces, and how
    much of each of the P patches the thing's box covers, (n, P)."""
    data = pairs("test", 1000)
    data = data.subset([i for i, scene in enumerate(data.scenes) if len(scene.things) == 1])
    hidden = cloze([captions[1] for captions in data.captions], words(), NOUNS)
    chosen = hidden.rows.tolist()[:n]
    at = (hidden.ids == words().mask_id)[: len(chosen)]
    grid = MAIN.model.image_config().grid
    return data.subset(chosen), at, torch.stack([inside(data.scenes[i], grid) for i in chosen])


def pointing(model: ALBEF) -> dict[str, float]:
    """The share of a noun's map that falls on its thing's box: by Grad-CAM, by attention, and spread evenly."""
    data, at, covered = pages_to_point_at()
    texts = [captions[1] for captions in data.captions]
    numbers = {"pointing, evenly": covered.mean(dim=1).mean().item()}
    for name, gradient in (("Grad-CAM", True), ("attention", False)):
        maps = (word_maps(model, data.images, texts, gradient=gradient) * at[:, :, None]).sum(1)  # (n, P)
        total = maps.sum(1, keepdim=True)
        even = torch.full_like(maps, 1 / maps.shape[1])  # a map without any mass points nowhere
        share = torch.where(total > 0, maps / total.clamp(min=1e-30), even)
        numbers[f"pointing, {name}"] = (share * covered).sum(1).mean().item()
    return numbers


def planted_fit(model: ALBEF, recipe: Recipe) -> dict[str, float]:
    """For training pages with an exchanged caption, one ring of them: how often the exchanged one is ranked first among
    the ring's full captions (learned by heart), and how often the true one (seen through)."""
    data, ring = pairs("train", recipe.train_size), rings(recipe.train_size, recipe.noise)[0]
    texts = text_vectors(model, [data.captions[i][4] for i in ring.tolist()])
    similarity, own = image_vectors(model, data.images[ring]) @ texts.T, torch.arange(len(ring))
    return {"fit to planted": recall_at(similarity, own.roll(1), 1), "true caption": recall_at(similarity, own, 1)}


def validation(recipe: Recipe, n: int = 300) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: R@1 by ITC on `n` validation pages, of student and teacher, and what else is watched."""

    def measure(model: MomentumALBEF) -> dict[str, float]:
        numbers = {}
        for name, one in (("val R@1", model.student), ("teacher's val R@1", model.teacher)):
            found = lesson03.retrieval(one, "val", n=n)
            numbers[name] = lesson03.mean_recall(found)
        if recipe.itm:
            data, own = pairs("val", n), torch.arange(n)
            held = states(model.student, data.images, [captions[4] for captions in data.captions])
            odds = matching(model.student, *held, own, own), matching(model.student, *held, own, own.roll(1))
            numbers["val matching"] = ((odds[0] > 0).float().mean() + (odds[1] <= 0).float().mean()).item() / 2
        if recipe.noise:
            numbers |= planted_fit(model.student, recipe)
        return numbers | {"temperature": model.student.temp.item()}

    return measure


def measure(model: ALBEF, recipe: Recipe) -> dict[str, float]:
    """What is recorded of every arm, on the test split; `recipe.everything` adds what only the main run needs."""
    found = lesson03.retrieval(model)
    numbers = found | {"R@1": lesson03.mean_recall(found)} | gap_of(model)
    numbers |= lesson02.grounding(model, pictures=("true", "shuffled", "blank") if recipe.everything else ("true",),
                                  scores_of=word_scores)  # fmt: skip
    if recipe.itm:
        numbers |= searches(model) | matching_accuracy(model) | pointing(model)
        for kind in ("replaced", "attribute_swap", "order_swap", "count") if recipe.everything else ("attribute_swap",):
            numbers |= probes(model, kind)
    if recipe.noise:
        numbers |= planted_fit(model, recipe)
    if recipe.everything:
        numbers |= {f"{name}, 1,000": value for name, value in searches(model, n=1000, k=32, every=False).items()}
        numbers |= {"zero-shot kind": lesson03.zero_shot_kind(model, tier="normal", n=400)}
    return numbers


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, then measure the student on the test split: what the recorder keeps of one arm and seed."""
    model, history = train(recipe, seed=seed, device=device, progress=progress)
    teacher = {"teacher's R@1": statistics.mean(lesson03.retrieval(model.teacher)[f"R@1 {way}"] for way in
                                                ("text to image", "image to text"))}  # fmt: skip
    return Run(model.student, history, measure(model.student, recipe) | teacher)


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    for n in {recipe.train_size for arms in EXPERIMENTS.values() for recipe in arms.values()}:
        pairs("train", n)
    for split, n in (("val", 300), ("test", 128), ("test", 256), ("test", 1000)):
        pairs(split, n)
    lesson03.single_things("test", n=400, tier="normal")
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        probe_pairs(kind)


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000, by ITC (R@1, chance 0.001)": ("main", "ALBEF", "R@1 text to image"),
    "... the 32 best by ITC re-ranked by ITM": ("main", "ALBEF", "re-ranked, text to image, 1,000"),
    "the full caption of a picture, among 1,000, by ITC": ("main", "ALBEF", "R@1 image to text"),
    "... its 32 best re-ranked by ITM": ("main", "ALBEF", "re-ranked, image to text, 1,000"),
    "do picture and full caption belong together? (chance 0.5)": ("main", "ALBEF", "matching, random partners"),
    "... wrong partners drawn by similarity": ("main", "ALBEF", "matching, hard partners"),
    "hidden colour word, its picture shown": ("main", "ALBEF", "colour, true picture"),
    "hidden colour word, another picture shown": ("main", "ALBEF", "colour, shuffled picture"),
    "hidden noun, its picture shown": ("main", "ALBEF", "noun, true picture"),
    "captions with exchanged attributes, by ITM (chance 0.5)": ("main", "ALBEF", "attribute_swap, ITM"),
    "captions with exchanged order, by ITM (chance 0.5)": ("main", "ALBEF", "order_swap, ITM"),
}
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "finds the picture of a caption among 1,000: {} by its vectors, {} after re-ranking",
    ("main", "ALBEF", "R@1 text to image"), ("main", "ALBEF", "re-ranked, text to image, 1,000"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "ALBEF", "re-ranked, text to image, 1,000"),
    "R@1 image to text": ("main", "ALBEF", "re-ranked, image to text, 1,000"),
    "zero-shot kind": ("main", "ALBEF", "zero-shot kind"),
    "attribute swap": ("main", "ALBEF", "attribute_swap, ITM"),
    "order swap": ("main", "ALBEF", "order_swap, ITM"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
CLOCK_STEPS = 40
RERANKED = "ALBEF: vectors of 1,000 pages choose 32 candidates each, which the fusion half re-ranks."
NOTES = {
    **dict.fromkeys(("R@1 text to image", "R@1 image to text", "ms for 1,000 x 1,000 pairs"), RERANKED),
    "training seconds": f"ALBEF: measured over {CLOCK_STEPS} steps, without evaluation, and scaled to all "
    f"{MAIN.steps:,}; lesson 01's training, which the image encoder starts from, is not in it.",
    "VQA": "ALBEF answers with a decoder that is trained for it (paper, 5.3); the lesson has none.",
    **dict.fromkeys(("attribute swap", "order swap"), "ALBEF: by ITM, which reads picture and caption together."),
}  # fmt: skip


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": count_parameters(ALBEF(MAIN.model))}


def ways_to_search(model: ALBEF, *, n: int = 128, k: int = 16) -> dict[str, Callable[[], object]]:
    """Three functions that compare `n` test pages with `n` full captions, from pixels and words on: by vectors, by
    fusing every pair, by vectors and then fusing the `k` best of each picture."""
    data = pairs("test", n)
    texts = [captions[4] for captions in data.captions]

    def vectors() -> Tensor:
        return image_vectors(model, data.images) @ text_vectors(model, texts).T

    def two_steps() -> Tensor:
        held = states(model, data.images, texts)
        similarity = model.image_vector(held[0]) @ model.text_vector(held[1]).T
        return rerank(model, similarity.detach().cpu(), held, k)

    return {"vectors": vectors, "every pair": lambda: all_pairs(model, data.images, texts), "re-ranked": two_steps}


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable, batches: Sequence[Sequence[Tensor]]
) -> None:
    """One training step with each of the batches."""
    for batch in batches:
        train_step(model, optimizer, loss, batch, clip=1.0)


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine: milliseconds of a step with and without each part, of the `ways_to_search`
    among 128, "training seconds" of the main recipe, and "ms for 1,000 x 1,000 pairs"."""
    batches = ALBEFBatches(pairs("train", MAIN.train_size), MAIN, seed=0)
    ready = [[t.to(device) for t in batches(step)] for step in range(CLOCK_STEPS // 4)]
    recipes = {"three losses": MAIN, "without ITM": replace(MAIN, itm=False), "without MoD": replace(MAIN, alpha=0.0)}
    steps = {}
    for name, recipe in recipes.items():
        minivlp.seed_everything(0)
        model = begin(recipe).to(device).train()
        optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, fused=device.type != "mps")

        steps[f"step, {name}"] = partial(take_steps, model, optimizer, loss_of(recipe), ready)
    seconds = {name: statistics.median(values) / len(ready) for name, values in take_turns(steps, rounds=4).items()}
    student = begin(MAIN).student.to(device)
    ways = {f"search, {name}": way for name, way in ways_to_search(student).items()}
    seconds |= {name: statistics.median(values) for name, values in take_turns(ways, rounds=3).items()}
    large = take_turns({"": ways_to_search(student, n=1000, k=32)["re-ranked"]}, rounds=3)[""]
    return {f"ms, {name}": 1000 * value for name, value in seconds.items()} | {
        "training seconds": MAIN.steps * seconds["step, three losses"],
        "ms for 1,000 x 1,000 pairs": 1000 * statistics.median(large),
    }
