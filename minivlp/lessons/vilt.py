"""Lesson 02's recipes: one main run and the experiments around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 02_vilt` runs all of them over several seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.data import Batches, CaptionBatches, PairTensors, Tokenizer, TokenTable, load_pairs, mask_words, to_tensors
from minivlp.data.picturebook.claims import COLOUR_WORDS, KIND_WORDS, with_article
from minivlp.data.picturebook.describe import ANSWERS, questions
from minivlp.data.picturebook.draw import draw
from minivlp.data.picturebook.probes import probe
from minivlp.data.picturebook.world import CANVAS, COLOURS, KINDS, Scene
from minivlp.evaluate import Cloze, accuracy, cloze, cloze_accuracy, filled_in, probe_scores, recall_at
from minivlp.lessons import vit as lesson01
from minivlp.lessons.vit import Run
from minivlp.losses import cosine_cost, ipot, masked_lm_loss, word_patch_alignment, word_positions
from minivlp.models.vilt import ViLT, ViLTConfig, start_from_vit
from minivlp.models.vit import ViT
from minivlp.train import History, evaluating, fit, trained

NAME = "02_vilt"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"vilt": ("main", "ViLT")}

# A fact -> the words that name it, for the sentences with a hidden word.
NOUNS = {word: kind for kind, names in KIND_WORDS.items() for forms in names for word in forms}
COLOUR_NAMES = {word: colour for colour in COLOURS for word in COLOUR_WORDS.get(colour, (colour,))}
BLANK = 127  # the grey of a picture that shows nothing


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: ViLTConfig = field(default_factory=ViLTConfig)
    start: str = "vit_normal"  # kept weights of lesson 01 to start from; "": random
    train_size: int = 20_000
    steps: int = 800
    batch_size: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    first: float = 0.3  # share of the steps, at the start, with the cloze (MLM) alone, on pages with one thing
    levels: tuple[int, ...] = (1,)  # which of the five captions; one level a batch, so that lengths agree
    share: float = 0.5  # of the words, hidden for MLM (the paper: 0.15 of much longer texts)
    whole_word: bool = True
    wpa: float = 0.1  # weight of word-patch alignment; 0: without
    mpp: float = 0.0  # weight of masked-patch prediction
    retrieval: bool = False  # also search among 1,000 test pairs
    answer: int = 0  # steps of fine-tuning for questions, with pictures and without


MAIN = Recipe(retrieval=True, answer=250)
PLAIN = replace(MAIN, retrieval=False, answer=0)  # the same run with fewer measurements, for the comparisons


def vilt(**changes: object) -> ViLTConfig:
    return replace(MAIN.model, **changes)


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"ViLT": MAIN},
    "changes": {
        "token masking": replace(PLAIN, whole_word=False),
        "without WPA": replace(PLAIN, wpa=0.0),
        "without modality types": replace(PLAIN, model=vilt(modality_types=0)),
        "masked patches too": replace(PLAIN, model=vilt(patch_colours=True), mpp=1.0),
        "all losses from step 1": replace(PLAIN, first=0.0),
        "random start": replace(PLAIN, start=""),
        "two encoders": replace(PLAIN, model=vilt(attend="separate")),
    },
}


# --- data ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def words() -> Tokenizer:
    return Tokenizer.default()


@lru_cache(maxsize=4)
def pairs(split: str, n: int) -> PairTensors:
    """`n` pages of the normal tier with their captions, in memory."""
    return to_tensors(load_pairs("picturebook", split, tier="normal", n=n))


class ViLTBatches(CaptionBatches):
    """All that one step of pre-training needs; everything random is drawn from `(seed, step)`.

    The first steps see pages with one thing, for with two a sentence does not say which word is which, and nothing but
    the cloze: before words mean anything, a wrong picture cannot be told, and ITM's gradient is noise.
    """

    def __init__(self, data: PairTensors, recipe: Recipe, *, seed: int) -> None:
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.batch_size, seed=seed)
        self.recipe = recipe
        alone = torch.tensor([i for i, scene in enumerate(data.scenes) if len(scene.things) == 1])
        self.simple = Batches((alone,), batch_size=recipe.batch_size, seed=seed)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """-> images (B, C, H, W), ids (B, L), mask (B, L), hidden ids and labels (B, L) for MLM, and for ITM the
        pictures shown (B, C, H, W), half of them exchanged, with match (B), 1 where text and picture belong."""
        r, generator = self.recipe, self.generator(step)
        simple = step < r.first * r.steps
        rows = self.simple(step)[0] if simple else self.order.indices(step)
        ids, mask = self.table(rows, r.levels[int(torch.randint(len(r.levels), (), generator=generator))])
        hidden, labels = mask_words(ids, words(), generator=generator, share=r.share, whole_word=r.whole_word)
        partner, match = false_partners(rows, len(self.images), generator)
        batch = self.images[rows], ids, mask, hidden, labels
        return batch if simple else (*batch, self.images[partner], match)


def false_partners(rows: Tensor, size: int, generator: torch.Generator) -> tuple[LongTensor, LongTensor]:
    """For ITM: exactly half of the pairs (B) get another picture, any of the `size` but their own, with match 0."""
    B = len(rows)
    match = torch.ones(B, dtype=torch.long)
    match[torch.randperm(B, generator=generator)[: B // 2]] = 0
    other = (rows + torch.randint(1, size, (B,), generator=generator)) % size
    return torch.where(match == 1, rows, other), match


# --- pre-training ----------------------------------------------------------------------------------------------------


def vilt_loss(
    model: ViLT, images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor, labels: Tensor,
    shown: Tensor | None = None, match: Tensor | None = None, *, wpa: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """ViLT's objective ITM + MLM + 0.1 WPA (paper, 3.2) in two passes; the arguments are those of `ViLTBatches`.

    Without `shown` and `match` it is the first pass alone.
    """
    # Pass 1, pairs that belong together: guess the hidden words. Only the words are read from the last block.
    _, named = model(images, hidden, mask, rows=ids.shape[1])
    losses = {"mlm": masked_lm_loss(model.mlm_head, named["text"], labels)}
    if shown is None:
        return losses
    # Pass 2, nothing hidden, half of the pictures exchanged: do they belong together?
    pooled, named = model(shown, ids, mask, rows=None if wpa else 1)
    losses["itm"] = F.cross_entropy(model.itm_head(pooled), match)
    if wpa:
        image = named["image"][:, 1:]  # patches alone
        patches = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        distance, _ = word_patch_alignment(named["text"], image, word_positions(mask), patches, match)
        losses["wpa"] = wpa * distance
    return losses


def masked_patch_loss(
    model: ViLT, images: Tensor, ids: Tensor, mask: Tensor, *, generator: torch.Generator, share: float = 0.15
) -> Tensor:
    """MPP (paper, 4.5; official code): hide 15 % of the patches and guess each channel's mean, one of 256 values."""
    B, C, H, _ = images.shape
    P = model.config.patch_size
    asked = (torch.rand(B, (H // P) ** 2, generator=generator) < share).to(images.device)
    covered = asked & (torch.rand(asked.shape, generator=generator) < 0.8).to(images.device)  # the rest stays visible
    mean = F.avg_pool2d(images.float(), P).flatten(2).transpose(1, 2).round().long()  # (B, N, C), 0..255
    if not asked.any():
        return model.embed.mask_patch.sum() * 0.0
    _, named = model(images, ids, mask, hidden=covered)
    scores = model.mpp_head(named["image"][:, 1:][asked]).view(-1, C, 256)
    return F.cross_entropy(scores.flatten(0, 1).float(), mean[asked].flatten())


def build(config: ViLTConfig) -> ViLT:
    return ViLT(config)


def begin(recipe: Recipe) -> ViLT:
    """A new model, its patches and blocks taken from lesson 01's ViT if the recipe says so."""
    model = build(recipe.model)
    if recipe.start:
        experiment, arm = lesson01.CHECKPOINTS[recipe.start]
        start_from_vit(model, trained(recipe.start, ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False))
    return model


def loss_of(recipe: Recipe) -> Callable:
    """`fit` wants a function of the model and the batch: the objective with the recipe's weights."""
    generator = torch.Generator().manual_seed(0)

    def loss(model: ViLT, images: Tensor, ids: Tensor, mask: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        losses = vilt_loss(model, images, ids, mask, *rest, wpa=recipe.wpa)
        if recipe.mpp:
            losses["mpp"] = recipe.mpp * masked_patch_loss(model, images, ids, mask, generator=generator)
        return losses

    return loss


def train(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "ViLT") -> tuple[ViLT, History]:
    """One run of a recipe: build, batch, fit. The seed fixes the weights and the order of the pairs."""
    minivlp.seed_everything(seed)
    model = begin(recipe).to(device)
    history = fit(
        model, ViLTBatches(pairs("train", recipe.train_size), recipe, seed=seed), loss_of(recipe), steps=recipe.steps,
        lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup, evaluate=validation(),
        evaluate_every=max(1, recipe.steps // 8), progress=progress,
    )  # fmt: skip
    return model, history


# --- measuring -------------------------------------------------------------------------------------------------------


def sentences(split: str, n: int, facts: dict[str, str], *, level: int = 1) -> Cloze:
    """Captions of a split with a noun (`NOUNS`) or a colour (`COLOUR_NAMES`) hidden."""
    return cloze([captions[level] for captions in pairs(split, n).captions], words(), facts)


def word_scores(model: ViLT, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ViLT's scores of every word at every place: (B, L, V)."""
    _, named = model(images, ids, mask, rows=ids.shape[1])
    return model.mlm_head(named["text"])


def guess_words(
    model: nn.Module, hidden: Cloze, images: Tensor, *, picture: str = "true", scores_of: Callable = word_scores
) -> list[str]:
    """Fill in the hidden words with the true pictures, with "shuffled" ones (each sentence gets the next one's), or
    with "blank" grey ones. `scores_of` is how the model is asked, see `word_scores`."""
    device = next(model.parameters()).device
    if picture == "blank":
        images = torch.full_like(images, BLANK)
    rows = hidden.rows.roll(1) if picture == "shuffled" else hidden.rows
    with evaluating(model):

        def scores(_: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return scores_of(model, next(batches).to(device), ids.to(device), mask.to(device))

        batches = iter(images[rows].split(250))
        return filled_in(hidden, words(), scores)


def grounding(
    model: nn.Module, split: str = "test", *, n: int = 1000, pictures: tuple[str, ...] = ("true", "shuffled", "blank"),
    scores_of: Callable = word_scores,
) -> dict[str, float]:  # fmt: skip
    """Accuracy at hidden nouns and colours with the true, a wrong and no picture: what the picture adds is the gap."""
    numbers = {}
    for name, facts in (("noun", NOUNS), ("colour", COLOUR_NAMES)):
        hidden = sentences(split, n, facts)
        for picture in pictures:
            guesses = guess_words(model, hidden, pairs(split, n).images, picture=picture, scores_of=scores_of)
            numbers[f"{name}, {picture} picture"] = cloze_accuracy(hidden, guesses)
    return numbers


def word_plans(model: ViLT, images: Tensor, ids: Tensor, mask: Tensor, *, iterations: int = 1000) -> Tensor:
    """Where each word of matching pairs is carried (paper, Fig. 4): plans (B, L, N), rows of all tokens but the words
    are zero. The paper, too, takes 1,000 rounds to look at."""
    device = next(model.parameters()).device
    with evaluating(model):
        _, named = model(images.to(device), ids.to(device), mask.to(device))
    patches = torch.ones(len(images), named["image"].shape[1] - 1, dtype=torch.bool, device=device)
    cost = cosine_cost(named["text"], named["image"][:, 1:])
    return ipot(cost, word_positions(mask.to(device)), patches, iterations=iterations).cpu()


def inside(scene: Scene, grid: int) -> Tensor:
    """How much of each patch the first thing's box covers, (grid * grid) numbers in [0, 1], in reading order."""
    edges = torch.linspace(0, CANVAS, grid + 1)
    left, top, right, bottom = scene.things[0].box
    wide, high = (
        (torch.minimum(edges[1:], torch.tensor(high)) - torch.maximum(edges[:-1], torch.tensor(low))).clamp(min=0)
        for low, high in ((left, right), (top, bottom))
    )
    return (high[:, None] * wide).flatten() / (CANVAS / grid) ** 2


def pointing(model: ViLT, *, n: int = 200) -> dict[str, float]:
    """Does the plan carry a noun to its thing? The share of its mass that lands on the thing's box, on test pages with
    one thing, and the share it would be if it were spread evenly."""
    data = pairs("test", 1000)
    data = data.subset([i for i, scene in enumerate(data.scenes) if len(scene.things) == 1][:n])
    texts = [captions[1] for captions in data.captions]
    ids, mask = words().encode_batch(texts)
    hidden = cloze(texts, words(), NOUNS)  # its [MASK]s stand where the nouns are
    plans = word_plans(model, data.images, ids, mask)[hidden.rows]  # (n, L, N)
    noun = (plans * (hidden.ids == words().mask_id)[:, :, None]).sum(1)  # (n, N)
    covered = torch.stack([inside(data.scenes[i], model.config.image_config().grid) for i in hidden.rows.tolist()])
    return {"noun on its thing": (noun / noun.sum(1, keepdim=True) * covered).sum(1).mean().item(),
            "spread evenly": covered.mean(1).mean().item()}  # fmt: skip


def matching(model: ViLT, images: Tensor, ids: Tensor, mask: Tensor, *, batch_size: int = 250) -> Tensor:
    """How well pictures (M) and texts (M, L) go together, pair by pair: the log odds of a match, (M), on the CPU."""
    device = next(model.parameters()).device
    scores = []
    with evaluating(model):
        for part in torch.arange(len(images)).split(batch_size):
            L = int(mask[part].sum(1).max())  # no longer than the longest of the part
            batch = (t.to(device) for t in (images[part], ids[part, :L], mask[part, :L]))
            scores.append(model.itm_head(model(*batch, rows=1)[0]).float().diff(dim=1)[:, 0].cpu())
    return torch.cat(scores)


def match_table(model: ViLT, images: Tensor, texts: list[str]) -> Tensor:
    """Every text with every picture: (texts, pictures). A fusion model has no shortcut: each pair is a pass."""
    rows = []
    for text in texts:
        ids, mask = words().encode_batch([text])
        rows.append(matching(model, images, ids.expand(len(images), -1), mask.expand(len(images), -1)))
    return torch.stack(rows)


def matching_accuracy(model: ViLT, split: str = "test", *, n: int = 1000, level: int = 4) -> float:
    """ITM accuracy on true pairs and as many with another picture of the split, decided at even odds."""
    data = pairs(split, n)
    ids, mask = TokenTable(data.captions, words())(torch.arange(len(data)), level)
    right = matching(model, data.images, ids, mask) > 0
    wrong = matching(model, data.images.roll(1, dims=0), ids, mask) > 0
    return (right.float().mean().item() + (~wrong).float().mean().item()) / 2


@lru_cache(maxsize=8)
def probe_pairs(kind: str, n: int = 300) -> tuple[Tensor, tuple[str, ...]]:
    """n probes as pictures (2n, C, H, W) and captions, a and b in turn."""
    made = [probe(index, kind) for index in range(n)]
    scenes = [scene for p in made for scene in (p.scene_a, p.scene_b)]
    images = torch.stack([torch.from_numpy(np.asarray(draw(scene)).transpose(2, 0, 1).copy()) for scene in scenes])
    return images, tuple(text for p in made for text in (p.caption_a, p.caption_b))


def probe_accuracy(model: ViLT, kind: str, *, n: int = 300) -> dict[str, float]:
    """Winoground's numbers on one kind of probe: both captions with both pictures."""
    images, captions = probe_pairs(kind, n)
    ids, mask = words().encode_batch(captions)
    picture = torch.tensor([0, 0, 1, 1]) + 2 * torch.arange(n)[:, None]  # of each probe: a a b b
    caption = torch.tensor([0, 1, 0, 1]) + 2 * torch.arange(n)[:, None]  # with captions a b a b
    scores = matching(model, images[picture.flatten()], ids[caption.flatten()], mask[caption.flatten()])
    return probe_scores(scores.view(n, 2, 2))


def zero_shot_kind(model: ViLT, *, n: int = 500) -> float:
    """Accuracy of naming the one thing on a page, out of 12 kinds, by the best match of "a picture of a cat" (...)."""
    data = pairs("test", 1000)
    data = data.subset([i for i, scene in enumerate(data.scenes) if len(scene.things) == 1][:n])
    scores = match_table(model, data.images, [f"a picture of {with_article(kind)}" for kind in KINDS])  # (12, n)
    return accuracy(scores.T, data.labels("kind")[0])


def retrieval(model: ViLT, *, queries: int = 30, gallery: int = 1000) -> dict[str, float]:
    """R@1 of the first test captions among all test pictures, and of the first pictures among all captions.

    A fusion model must read each pair, so a few queries are asked; each still has the whole gallery.
    """
    data = pairs("test", gallery)
    texts = [captions[-1] for captions in data.captions]
    truth = torch.arange(queries)
    numbers = {}
    for k in (1, 5, 10):
        if k == 1:
            to_image = match_table(model, data.images, texts[:queries])  # (queries, gallery)
            to_text = match_table(model, data.images[:queries], texts).T
        numbers |= {f"R@{k} text to image": recall_at(to_image, truth, k),
                    f"R@{k} image to text": recall_at(to_text, truth, k)}  # fmt: skip
    return numbers


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """Questions with answers: `rows` (M) of their pictures, ids and mask (M, L), answers (M), numbered as `ANSWERS`."""

    rows: Tensor
    ids: Tensor
    mask: Tensor
    answers: Tensor
    texts: list[str]
    types: list[str]


@lru_cache(maxsize=4)
def asked(split: str, n: int) -> Questions:
    """All questions about the first `n` pages of a split."""
    items = [(row, item) for row, scene in enumerate(pairs(split, n).scenes) for item in questions(scene)]
    ids, mask = words().encode_batch([item.question for _, item in items])
    number = {answer: i for i, answer in enumerate(ANSWERS)}
    return Questions(
        torch.tensor([row for row, _ in items]), ids, mask, torch.tensor([number[item.answer] for _, item in items]),
        [item.question for _, item in items], [item.type for _, item in items],
    )  # fmt: skip


def answer_loss(model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    """Softmax cross-entropy over the known answers, from the pooled text class token."""
    return F.cross_entropy(model.answer_head(model(images, ids, mask, rows=1)[0]), answers)


def learn_to_answer(
    model: ViLT, recipe: Recipe, *, seed: int, steps: int, blank: bool = False, pages: int = 6_000,
    progress: str | None = "questions",
) -> tuple[ViLT, History]:  # fmt: skip
    """Fine-tune a copy of `model` for questions; `blank` hides the pictures, which leaves the questions alone."""
    minivlp.seed_everything(seed)
    device = next(model.parameters()).device
    tuned = type(model)(replace(model.config, answers=len(ANSWERS)))
    tuned.load_state_dict(model.state_dict(), strict=False)  # all but the new head
    data, q = pairs("train", recipe.train_size), asked("train", pages)
    order = Batches((torch.arange(len(q.rows)),), batch_size=2 * recipe.batch_size, seed=seed)

    def batches(step: int) -> tuple[Tensor, ...]:
        chosen = order.indices(step)
        L = int(q.mask[chosen].sum(1).max())
        images = data.images[q.rows[chosen]]
        images = torch.full_like(images, BLANK) if blank else images
        return images, q.ids[chosen, :L], q.mask[chosen, :L], q.answers[chosen]

    tuned = tuned.to(device)
    history = fit(tuned, batches, answer_loss, steps=steps, lr=recipe.lr, weight_decay=recipe.weight_decay,
                  progress=progress)  # fmt: skip
    if history.stopped and progress is None:
        raise KeyboardInterrupt  # half a fine-tuning is no result
    return tuned, history


def answers_of(model: ViLT, split: str = "test", *, n: int = 500, blank: bool = False) -> Tensor:
    """The answer's number for each question about the first `n` pages of a split, (M)."""
    q, data = asked(split, n), pairs(split, n)
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for part in torch.arange(len(q.rows)).split(250):
            images = data.images[q.rows[part]]
            images = torch.full_like(images, BLANK) if blank else images
            pooled, _ = model(images.to(device), q.ids[part].to(device), q.mask[part].to(device), rows=1)
            found.append(model.answer_head(pooled).argmax(-1).cpu())
    return torch.cat(found)


def answered_right(found: Tensor, q: Questions) -> dict[str, float]:
    """Accuracy over all questions and for each type."""
    right = found == q.answers
    numbers = {"all": right.float().mean().item()}
    for name in dict.fromkeys(q.types):
        chosen = torch.tensor([t == name for t in q.types])
        numbers[name] = right[chosen].float().mean().item()
    return numbers


# --- the runs --------------------------------------------------------------------------------------------------------


def validation(n: int = 300) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: how it does at hidden nouns and colours and at matching, on `n` validation pages."""

    def measure(model: nn.Module) -> dict[str, float]:
        numbers = grounding(model, "val", n=n, pictures=("true",))
        return {"val noun": numbers["noun, true picture"], "val colour": numbers["colour, true picture"],
                "val matching": matching_accuracy(model, "val", n=n, level=1)}  # fmt: skip

    return measure


def measure(model: ViLT) -> dict[str, float]:
    """What is recorded of every arm: the grounding gap, matching, and the two probes with the same words."""
    numbers = grounding(model) | pointing(model)
    for level in (1, 4):
        numbers[f"matching, level {level}"] = matching_accuracy(model, level=level)
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        found = probe_accuracy(model, kind)
        numbers |= {kind: found["pair"], f"{kind}, group": found["group"]}
    return numbers


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, then measure on the test split: what the recorder keeps of one arm and seed."""
    model, history = train(recipe, seed=seed, device=device, progress=progress)
    metrics = measure(model)
    if recipe.retrieval:
        metrics |= retrieval(model) | {"zero-shot kind": zero_shot_kind(model)}
    if recipe.answer:
        for name, blank in (("VQA", False), ("VQA, question alone", True)):
            tuned, _ = learn_to_answer(model, recipe, seed=seed, steps=recipe.answer, blank=blank, progress=None)
            right = answered_right(answers_of(tuned, blank=blank), asked("test", 500))
            metrics |= {name if kind == "all" else f"{name}, {kind}": value for kind, value in right.items()}
    return Run(model, history, metrics)


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    for split, n in (("train", MAIN.train_size), ("val", 300), ("test", 1000), ("test", 500)):
        pairs(split, n)


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "hidden colour word (one of 10 colours), its picture shown": ("main", "ViLT", "colour, true picture"),
    "hidden colour word, another picture shown": ("main", "ViLT", "colour, shuffled picture"),
    "hidden noun (one of 12 kinds), its picture shown": ("main", "ViLT", "noun, true picture"),
    "hidden noun, another picture shown": ("main", "ViLT", "noun, shuffled picture"),
    "do picture and full caption belong together? (chance 0.5)": ("main", "ViLT", "matching, level 4"),
    "answers to questions": ("main", "ViLT", "VQA"),
    "... tuned on the questions alone": ("main", "ViLT", "VQA, question alone"),
    "captions with exchanged attributes (chance 0.5)": ("main", "ViLT", "attribute_swap"),
    "captions with exchanged order (chance 0.5)": ("main", "ViLT", "order_swap"),
}
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "guesses a hidden colour word: {} with its picture, {} with another",
    ("main", "ViLT", "colour, true picture"), ("main", "ViLT", "colour, shuffled picture"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "ViLT", "R@1 text to image"),
    "R@1 image to text": ("main", "ViLT", "R@1 image to text"),
    "zero-shot kind": ("main", "ViLT", "zero-shot kind"),
    "VQA": ("main", "ViLT", "VQA"),
    "VQA, question alone": ("main", "ViLT", "VQA, question alone"),
    "attribute swap": ("main", "ViLT", "attribute_swap"),
    "order swap": ("main", "ViLT", "order_swap"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
QUERIES = retrieval.__kwdefaults__["queries"]
CLOCK_STEPS, CLOCK_TEXTS, CLOCK_PICTURES = 40, 4, 250
NOTES = {
    **dict.fromkeys(
        ("R@1 text to image", "R@1 image to text"),
        f"ViLT: each query searches 1,000 candidates, but only {QUERIES} queries a seed are asked.",
    ),
    "training seconds": f"ViLT: measured over {CLOCK_STEPS} steps spread over the whole run, without evaluation, and "
    f"scaled to all {MAIN.steps:,}; lesson 01's training, which it starts from, is not in it.",
    "ms for 1,000 x 1,000 pairs": f"ViLT: each pair is a pass; measured on {CLOCK_TEXTS} full captions x "
    f"{CLOCK_PICTURES} pictures and scaled to a million pairs.",
}  # fmt: skip


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": sum(p.numel() for p in ViLT(MAIN.model).parameters())}


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine, both scaled up from a part: see `NOTES`.

    "training seconds" of the main recipe: `CLOCK_STEPS` of its batches at even distances, so that both phases and all
    caption levels count with their shares; and "ms for 1,000 x 1,000 pairs", the milliseconds to score a million pairs.
    """
    minivlp.seed_everything(0)
    model = begin(MAIN).to(device)
    batches = ViLTBatches(pairs("train", MAIN.train_size), MAIN, seed=0)
    history = fit(
        model, lambda step: batches(step * MAIN.steps // CLOCK_STEPS), loss_of(MAIN), steps=CLOCK_STEPS, lr=MAIN.lr,
        weight_decay=MAIN.weight_decay, warmup=MAIN.warmup, progress=None,
    )  # fmt: skip
    if history.stopped:
        raise KeyboardInterrupt  # half a measurement is none
    data = pairs("test", 1000)
    images, texts = data.images[:CLOCK_PICTURES], [captions[-1] for captions in data.captions[:CLOCK_TEXTS]]
    match_table(model, images, texts[:1])  # the first call of a shape is slower
    start = time.perf_counter()
    match_table(model, images, texts)
    milliseconds = 1000 * (time.perf_counter() - start)
    return {"training seconds": history.seconds * MAIN.steps / CLOCK_STEPS,
            "ms for 1,000 x 1,000 pairs": milliseconds * 1e6 / (len(images) * len(texts))}  # fmt: skip
