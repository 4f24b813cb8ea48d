"""Lesson 03's recipes: one main run and the experiments around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 03_clip` runs all of them over several seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.data import CaptionBatches, PairTensors, TokenTable
from minivlp.data.picturebook.claims import with_article
from minivlp.data.picturebook.world import COLOURS, KINDS, Scene
from minivlp.evaluate import accuracy, k_per_class, probe_scores, recall_at, ridge_probe
from minivlp.lessons import vit as lesson01
from minivlp.lessons.vilt import pairs, probe_pairs, words
from minivlp.lessons.vit import Run, pictures
from minivlp.losses import contrastive_loss, masked_lm_loss, next_words
from minivlp.models.clip import (
    CLIP,
    CLIPConfig,
    CLIPText,
    CLIPVision,
    causal_mask,
    clamp_logit_scale,
    init_clip,
    projection,
    start_from_vit,
)  # fmt: skip
from minivlp.models.vit import ViT
from minivlp.train import History, TrainingDiverged, evaluating, fit, trained

NAME = "03_clip"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"clip": ("main", "CLIP")}

TEMPLATES = (
    "a picture of {}", "a drawing of {}", "an image of {}", "a painting of {}", "an illustration of {}",
    "a cartoon of {}", "you can see {}",
)  # fmt: skip
SHOTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    objective: str = "contrastive"  # or "words", which words the caption has; "caption", word after word; "tutorial"
    start: str = "vit_normal"  # kept weights of lesson 01 for the image tower; "": random, as in the paper
    train_size: int = 20_000
    steps: int = 500
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    levels: tuple[int, ...] = (1, 4, 4)  # which of the five captions; one level a batch, so that lengths agree
    duplicates: str = "wrong"  # captions of the same meaning in a batch: wrong pairs as in the paper, "shared" targets,
    # or "unique": there are none
    clamp: bool = True  # keep t below ln 100


MAIN = Recipe()
SHORT = replace(MAIN, steps=120)  # for the comparisons


def clip(**changes: object) -> CLIPConfig:
    return replace(MAIN.model, **changes)


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"CLIP": MAIN},
    "objective": {
        "contrastive": SHORT,
        "which words": replace(SHORT, objective="words"),
        "word after word": replace(SHORT, objective="caption"),
        "a tutorial's loss": replace(SHORT, objective="tutorial"),
    },
    "temperature": {
        "exp(t) = 1, fixed": replace(SHORT, model=clip(logit_scale=0.0, learn_scale=False)),
        "1/0.07, fixed": replace(SHORT, model=clip(learn_scale=False)),
        "learned, not clamped": replace(SHORT, clamp=False),
    },
    "projection": {"with a hidden layer": replace(SHORT, model=clip(projection="mlp"))},
    "image tower": {
        "ViT, random start": replace(SHORT, start=""),
        "residual network, random start": replace(SHORT, start="", model=clip(image_tower="resnet")),
    },
    "duplicates": {
        "shared targets": replace(SHORT, duplicates="shared"),
        "left out of a batch": replace(SHORT, duplicates="unique"),
    },
    # the same number of pairs seen in all
    "batch": {f"B = {B}": replace(SHORT, batch_size=B, steps=SHORT.steps * SHORT.batch_size // B) for B in (16, 256)},
    # the same number of steps
    "pairs": {f"{n:,} pairs": replace(SHORT, train_size=n) for n in (500, 2_000)},
}


# --- data ------------------------------------------------------------------------------------------------------------


def meaning(scene: Scene, level: int) -> tuple:
    """What a caption of this level says, whatever its words: equal for "a red kitten" and "the picture of a red cat".

    Relations and the places of level 3 are left out: only levels 0, 1, 2 and 4 are meant.
    """
    things = sorted((thing.kind, thing.colour, thing.size)[: 1 + min(level, 2)] for thing in scene.things)
    return tuple(things), (scene.place, scene.sky, scene.weather) if level == 4 else ()


class CLIPBatches(CaptionBatches):
    """Pictures with one caption each; everything random is drawn from `(seed, step)`."""

    def __init__(self, data: PairTensors, recipe: Recipe, *, seed: int) -> None:
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.batch_size, seed=seed)
        self.recipe = recipe
        self.meanings = {}  # level -> (N), equal numbers where captions mean the same
        for level in sorted(set(recipe.levels)):
            numbers: dict[tuple, int] = {}
            of_each = [numbers.setdefault(meaning(scene, level), len(numbers)) for scene in data.scenes]
            self.meanings[level] = torch.tensor(of_each)

    def __call__(self, step: int) -> tuple[Tensor, LongTensor, Tensor, Tensor]:
        """-> images (B, C, H, W), ids (B, L), mask (B, L) and the meanings' numbers (B). With `duplicates="unique"`
        no meaning comes twice, and B may be smaller."""
        r, generator = self.recipe, self.generator(step)
        level = r.levels[int(torch.randint(len(r.levels), (), generator=generator))]
        rows = self.order.indices(step)
        if r.duplicates == "unique":  # look at more pages, keep the first of each meaning
            more = torch.randint(len(self.images), (3 * r.batch_size,), generator=generator)
            rows = torch.cat([rows, more])
            first = same(self.meanings[level][rows]).int().argmax(dim=1)  # the first page that means what each does
            rows = rows[first == torch.arange(len(rows))][: r.batch_size]
        return self.images[rows], *self.table(rows, level), self.meanings[level][rows]


def same(numbers: Tensor) -> Tensor:
    """Which of B numbers are equal: (B) -> (B, B)."""
    return numbers[:, None] == numbers[None]


# --- training --------------------------------------------------------------------------------------------------------


def clip_loss(
    model: CLIP, images: Tensor, ids: Tensor, mask: Tensor, meanings: Tensor | None = None, *, shared: bool = False
) -> dict[str, Tensor]:
    """CLIP's objective for one batch of `CLIPBatches`; `shared` lets captions of one meaning share their targets."""
    logits, _ = model(images, ids)
    return {"contrastive": contrastive_loss(logits, same(meanings) if shared else None)}


def tutorial_loss(model: CLIP, images: Tensor, ids: Tensor, mask: Tensor, *_: Tensor) -> dict[str, Tensor]:
    """What a popular tutorial trains and calls CLIP. **Not CLIP's loss**: vectors of any length, temperature 1, and
    targets made of the model's own similarities, through which the gradient flows."""
    image, text = model.image_projection(model.vision(images)[0]), model.text_projection(model.text(ids)[0])
    logits = text @ image.T
    targets = ((image @ image.T + text @ text.T) / 2).softmax(dim=-1)
    to_image, to_text = F.cross_entropy(logits, targets), F.cross_entropy(logits.T, targets.T)
    return {"contrastive": (to_image + to_text) / 2}


class WordPredictor(nn.Module):
    """The paper's bag of words (2.3, Fig. 2): which words does the caption have? Image tower and one matrix."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = CLIPVision(config)
        self.head = nn.Linear(config.image_width, config.vocab_size)
        init_clip(self)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> scores (B, V)."""
        return self.head(self.vision(images)[0])


class Captioner(nn.Module):
    """The paper's first attempt (2.3): the caption word after word. The picture is the text tower's first token."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision, self.text = CLIPVision(config), CLIPText(config)
        self.image_projection = projection(config.image_width, config.text_width)
        self.head = nn.Linear(config.text_width, config.vocab_size)
        init_clip(self)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """images (B, C, H, W), ids (B, L) -> states (B, L, D): each has seen the picture and the words so far."""
        image = self.image_projection(self.vision(images)[0])[:, None]
        x = torch.cat([image, self.text.embed(ids)], dim=1)  # (B, 1+L, D)
        return self.text.encoder(x, mask=causal_mask(x.shape[1], device=x.device))[0][:, 1:]


def words_loss(model: WordPredictor, images: Tensor, ids: Tensor, mask: Tensor, *_: Tensor) -> dict[str, Tensor]:
    """Softmax over the vocabulary against the caption's words, each with the same share (Joulin et al. 2016)."""
    present = F.one_hot(ids, model.config.vocab_size).amax(1).float()  # (B, V)
    present[:, list(words().special_ids)] = 0
    return {"words": F.cross_entropy(model(images), present / present.sum(1, keepdim=True))}


def caption_loss(model: Captioner, images: Tensor, ids: Tensor, mask: Tensor, *_: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of each next word, given the picture and the words before it."""
    return {"caption": masked_lm_loss(model.head, model(images, ids), next_words(ids, mask))}


OBJECTIVES: dict[str, tuple[type[nn.Module], Callable]] = {
    "contrastive": (CLIP, clip_loss), "tutorial": (CLIP, tutorial_loss),
    "words": (WordPredictor, words_loss), "caption": (Captioner, caption_loss),
}  # fmt: skip


def build(config: CLIPConfig) -> CLIP:
    return CLIP(config)


def begin(recipe: Recipe) -> nn.Module:
    """A new model, its image tower's weights taken from lesson 01's ViT if the recipe says so."""
    model = OBJECTIVES[recipe.objective][0](recipe.model)
    if recipe.start and isinstance(model.vision, CLIPVision):
        experiment, arm = lesson01.CHECKPOINTS[recipe.start]
        vit = trained(recipe.start, ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
        start_from_vit(model, vit, pairs("train", MAIN.train_size).images[:64])
    return model


def loss_of(recipe: Recipe) -> Callable:
    """`fit` wants a function of the model and the batch."""
    loss = OBJECTIVES[recipe.objective][1]
    return partial(loss, shared=recipe.duplicates == "shared") if loss is clip_loss else loss


def train(
    recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "CLIP"
) -> tuple[nn.Module, History]:
    """One run of a recipe: build, batch, fit. The seed fixes the weights and the order of the pairs."""
    minivlp.seed_everything(seed)
    model = begin(recipe).to(device)
    history = fit(
        model, CLIPBatches(pairs("train", recipe.train_size), recipe, seed=seed), loss_of(recipe), steps=recipe.steps,
        lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup, betas=(0.9, 0.98),
        after_step=[clamp_logit_scale] if recipe.clamp and isinstance(model, CLIP) else [],
        evaluate=validation(), evaluate_every=max(1, recipe.steps // 8), progress=progress,
    )  # fmt: skip
    return model, history


# --- measuring -------------------------------------------------------------------------------------------------------


def image_vectors(model: CLIP, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """Pictures (N, C, H, W) -> vectors of length 1 (N, E), on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model.encode_image(part.to(device)).float().cpu() for part in images.split(batch_size)])


def text_vectors(model: CLIP, texts: Sequence[str], *, batch_size: int = 250) -> Tensor:
    """N texts -> vectors of length 1 (N, E), on the CPU."""
    device = next(model.parameters()).device
    ids, mask = words().encode_batch(texts)
    vectors = []
    with evaluating(model):
        for part in torch.arange(len(ids)).split(batch_size):
            longest = int(mask[part].sum(1).max())
            vectors.append(model.encode_text(ids[part, :longest].to(device)).float().cpu())
    return torch.cat(vectors)


def retrieval(model: CLIP, split: str = "test", *, n: int = 1000, level: int = 4) -> dict[str, float]:
    """R@1, 5 and 10 among the first `n` pages of a split, both ways."""
    data = pairs(split, n)
    return recalls(image_vectors(model, data.images) @ text_vectors(model, [c[level] for c in data.captions]).T)


def recalls(scores: Tensor) -> dict[str, float]:
    """R@1, 5 and 10 both ways: scores (N, N), a row for each picture, whose own text has the same number."""
    own = torch.arange(len(scores))
    return {f"R@{k} {way}": recall_at(s, own, k) for k in (1, 5, 10) for way, s in
            (("text to image", scores.T), ("image to text", scores))}  # fmt: skip


def mean_recall(found: dict[str, float]) -> float:
    """R@1 of what `retrieval` found, the mean of its two ways."""
    return (found["R@1 text to image"] + found["R@1 image to text"]) / 2


def class_vectors(model: CLIP, names: Sequence[str], templates: Sequence[str] = TEMPLATES[:1]) -> Tensor:
    """The zero-shot classifier (paper, 3.1.4): K names in all templates -> (K, E). Each sentence's vector has length 1;
    their mean is brought to length 1 again: an ensemble of texts, not of probabilities."""
    sentences = [template.format(name) for name in names for template in templates]
    vectors = text_vectors(model, sentences).view(len(names), len(templates), -1)
    return F.normalize(vectors.mean(dim=1), dim=-1)


def single_things(split: str, *, n: int = 1000, tier: str = "easy") -> PairTensors:
    """`n` pages with one thing each."""
    return pictures(split, tier=tier, n=n)


def zero_shot_kind(model: CLIP, split: str = "test", *, n: int = 1000, templates: Sequence[str] = TEMPLATES[:1],
                   article: bool = True, tier: str = "easy") -> float:  # fmt: skip
    """Accuracy of choosing among the 12 kinds by their names."""
    data = single_things(split, n=n, tier=tier)
    names = [with_article(kind) if article else kind for kind in KINDS]
    scores = image_vectors(model, data.images) @ class_vectors(model, names, templates).T
    return accuracy(scores, data.labels("kind")[0])


def zero_shot_pair(model: CLIP, split: str = "test", *, n: int = 1000) -> float:
    """Accuracy of choosing among all 120 names such as "a red cat"."""
    data = single_things(split, n=n)
    names = [with_article(f"{colour} {kind}") for kind in KINDS for colour in COLOURS]
    scores = image_vectors(model, data.images) @ class_vectors(model, names).T
    return accuracy(scores, data.labels("kind")[0] * len(COLOURS) + data.labels("colour")[0])


def few_shot(model: CLIP, *, shots: Sequence[int] = SHOTS, draws: int = 3) -> dict[str, float]:
    """Accuracy of a linear probe on the same frozen vectors that the zero-shot classifier uses, k examples a kind,
    mean over `draws` choices of examples."""
    train_set, test_set = single_things("train"), single_things("test")
    labels = train_set.labels("kind")[0]
    features, test_features = image_vectors(model, train_set.images), image_vectors(model, test_set.images)
    numbers = {}
    for k in shots:
        found = []
        for seed in range(draws):
            chosen = k_per_class(labels, k, seed=seed)
            scores = ridge_probe(features[chosen], labels[chosen], test_features, classes=len(KINDS))
            found.append(accuracy(scores, test_set.labels("kind")[0]))
        numbers[f"kind, {k} shots"] = sum(found) / draws
    return numbers


def probe_accuracy(model: CLIP, kind: str, *, n: int = 300) -> dict[str, float]:
    """Winoground's numbers on one kind of probe: both captions with both pictures."""
    images, captions = probe_pairs(kind, n)
    image, text = image_vectors(model, images).view(n, 2, -1), text_vectors(model, captions).view(n, 2, -1)
    return probe_scores(image @ text.transpose(1, 2))


def named_by(model: nn.Module, images: Tensor) -> Tensor:
    """Scores (N, 12) of the kinds' names for each objective: similarity, words' scores, or a sentence's likelihood."""
    if isinstance(model, CLIP):
        return image_vectors(model, images) @ class_vectors(model, [with_article(kind) for kind in KINDS]).T
    device = next(model.parameters()).device
    scores = []
    with evaluating(model):
        if isinstance(model, WordPredictor):
            pieces = [words().encode(kind)[1:-1] for kind in KINDS]
            for part in images.split(250):
                log = model(part.to(device)).log_softmax(-1).cpu()
                scores.append(torch.stack([log[:, ids].mean(1) for ids in pieces], dim=1))
            return torch.cat(scores)
        ids, mask = words().encode_batch([TEMPLATES[0].format(with_article(kind)) for kind in KINDS])
        labels = next_words(ids, mask)
        for part in images.split(50):
            B, K = len(part), len(KINDS)
            states = model(part.to(device).repeat_interleave(K, 0), ids.repeat(B, 1).to(device))
            loss = F.cross_entropy(model.head(states).transpose(1, 2).cpu(), labels.repeat(B, 1), reduction="none")
            scores.append(-loss.sum(1).view(B, K))
    return torch.cat(scores)


def validation(n: int = 300) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: kinds named without examples, and retrieval, on `n` validation pages."""

    def measure(model: nn.Module) -> dict[str, float]:
        data = single_things("val", n=n)
        numbers = {"val kind": accuracy(named_by(model, data.images), data.labels("kind")[0])}
        if isinstance(model, CLIP):
            found = retrieval(model, "val", n=n)
            numbers |= {f"val R@1 {way}": found[f"R@1 {way}"] for way in ("text to image", "image to text")}
            numbers["exp(t)"] = model.logit_scale.exp().item()
        return numbers

    return measure


def measure(model: CLIP) -> dict[str, float]:
    """All that a trained model is measured by, on the test split."""
    metrics = retrieval(model) | {f"{k}, short captions": v for k, v in retrieval(model, level=1).items()}
    metrics |= {
        "zero-shot kind": zero_shot_kind(model),
        "bare word": zero_shot_kind(model, templates=("{}",), article=False),
        "ensemble": zero_shot_kind(model, templates=TEMPLATES),
        "normal tier": zero_shot_kind(model, tier="normal", n=400),
        "crayon": zero_shot_kind(model, "crayon"),
        "chalk": zero_shot_kind(model, "chalk"),
        "colour and kind": zero_shot_pair(model),
        "colour and kind, withheld": zero_shot_pair(model, "heldout_colour"),
        "exp(t)": model.logit_scale.exp().item(),
    } | few_shot(model)
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        found = probe_accuracy(model, kind)
        metrics |= {kind: found["pair"], f"{kind}, group": found["group"]}
    return metrics


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, then measure on the test split: what the recorder keeps of one arm and seed."""
    try:
        model, history = train(recipe, seed=seed, device=device, progress=progress)
    except TrainingDiverged as error:  # a result like any other: the weights of the last good step
        model, history = error.model, error.history
    if not isinstance(model, CLIP):
        data = single_things("test")
        return Run(model, history, {"zero-shot kind": accuracy(named_by(model, data.images), data.labels("kind")[0])})
    return Run(model, history, measure(model))


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    for n in {recipe.train_size for arms in EXPERIMENTS.values() for recipe in arms.values()}:
        pairs("train", n)
    pairs("val", 300)
    pairs("test", 1000)
    single_things("val", n=300)
    for split in ("train", "test", "crayon", "chalk", "heldout_colour"):
        single_things(split)
    single_things("test", n=400, tier="normal")


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000 (R@1, chance 0.001)": ("main", "CLIP", "R@1 text to image"),
    "the full caption of a picture, among 1,000 (R@1, chance 0.001)": ("main", "CLIP", "R@1 image to text"),
    "kind by its name, easy pages (chance 0.083)": ("main", "CLIP", "zero-shot kind"),
    "... with seven templates": ("main", "CLIP", "ensemble"),
    "... drawn in crayon": ("main", "CLIP", "crayon"),
    "... drawn in chalk": ("main", "CLIP", "chalk"),
    "colour and kind, one of 120 names": ("main", "CLIP", "colour and kind"),
    "... combinations withheld from training": ("main", "CLIP", "colour and kind, withheld"),
    "captions with exchanged attributes (chance 0.5)": ("main", "CLIP", "attribute_swap"),
    "captions with exchanged order (chance 0.5)": ("main", "CLIP", "order_swap"),
    "captions with another count (chance 0.5)": ("main", "CLIP", "count"),
}
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "finds the picture of a caption among 1,000: {}, chance 0.001",
    ("main", "CLIP", "R@1 text to image"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "CLIP", "R@1 text to image"),
    "R@1 image to text": ("main", "CLIP", "R@1 image to text"),
    "zero-shot kind": ("main", "CLIP", "normal tier"),
    "attribute swap": ("main", "CLIP", "attribute_swap"),
    "order swap": ("main", "CLIP", "order_swap"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
CLOCK_STEPS = 40
NOTES = {
    "training seconds": f"CLIP: measured over {CLOCK_STEPS} steps, without evaluation, and scaled to all "
    f"{MAIN.steps:,}; lesson 01's training, which the image tower starts from, is not in it.",
    "VQA": "CLIP chooses among given texts; it has no head for answers.",
}


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": sum(p.numel() for p in CLIP(MAIN.model).parameters())}


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine: "training seconds" of the main recipe, scaled up from `CLOCK_STEPS` steps,
    and "ms for 1,000 x 1,000 pairs", 1,000 pictures and 1,000 full captions encoded and compared."""
    minivlp.seed_everything(0)
    model = begin(MAIN).to(device)
    batches = CLIPBatches(pairs("train", MAIN.train_size), MAIN, seed=0)
    history = fit(model, batches, loss_of(MAIN), steps=CLOCK_STEPS, lr=MAIN.lr, weight_decay=MAIN.weight_decay,
                  warmup=MAIN.warmup, progress=None)  # fmt: skip
    if history.stopped:
        raise KeyboardInterrupt  # half a measurement is none
    retrieval(model)  # the first call of a shape is slower
    start = time.perf_counter()
    retrieval(model)
    return {"training seconds": history.seconds * MAIN.steps / CLOCK_STEPS,
            "ms for 1,000 x 1,000 pairs": 1000 * (time.perf_counter() - start)}  # fmt: skip
