"""Lesson 07's recipes: one main run, which pre-trains, cleans its own data and trains again, and the experiments around
it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 07_blip` runs all of them over several seeds.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.bench import take_turns
from minivlp.data import Batches, PairTensors, TokenTable, load_pairs
from minivlp.data.picturebook.describe import ANSWERS, captions
from minivlp.data.picturebook.sample import sample
from minivlp.data.picturebook.understand import caption_facts, understand
from minivlp.data.picturebook.web import contradicts
from minivlp.evaluate import bleu, distinct, recall_at, unique
from minivlp.generate import beam_search, greedy, nucleus
from minivlp.layers import count_parameters
from minivlp.lessons import albef as lesson05
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.albef import matching, ramped, rerank, states, wrong_partners
from minivlp.lessons.clip import image_vectors, text_vectors
from minivlp.lessons.vilt import BLANK, asked, pairs, words
from minivlp.lessons.vit import Run
from minivlp.losses import masked_lm_loss, next_words
from minivlp.models.albef import MomentumALBEF, belong, clamp_temperature, follow, start_from_vit
from minivlp.models.blip import (
    BLIP,
    MED_PARTS,
    NOTHING_SHARED,
    BLIPConfig,
    start_alike,
    teacher_of,
    untied,
)
from minivlp.models.vit import ViT
from minivlp.train import History, evaluating, fit, own_copy, trained

NAME = "07_blip"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"blip": ("main", "BLIP")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: BLIPConfig = field(default_factory=BLIPConfig)
    start: str = "vit_normal"  # kept weights of lesson 01 for the image encoder (the paper: ViT of ImageNet)
    text_steps: int = 400  # of learning to write without pictures, before all else (the paper starts from BERT)
    text_lr: float = 2e-3
    human: int = 2_000  # pages with captions written by hand (the paper: COCO and Visual Genome)
    web: int = 4_000  # pages with one caption each as found on the web, 45 % of them wrong or empty
    levels: tuple[int, ...] = (1, 4)  # which of the five captions written by hand are used, in turn or all
    itc: bool = True  # without it there are no similarities, so the wrong partners are any
    alpha: float = 0.4  # the teacher's share of ITC's targets, in the end
    ramp: float = 0.3  # share of the steps in which it grows from 0 (official code: two of 20 epochs)
    momentum: float = 0.99
    queue: int = 256  # Q, pairs, a multiple of the batch
    smoothing: float = 0.1  # of LM's targets, in training alone
    steps: int = 400  # of pre-training, and again of the new model on the cleaned data
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    captioner: str = ""  # who writes captions for the web's pages: "", nobody; "nucleus" or "beam", how
    filter: bool = False  # leave out texts that the filter calls unmatched
    apart: bool = True  # captioner and filter are two models; False: one, tuned for both
    anew: bool = True  # a new model learns from the cleaned data; False: the old one goes on
    tune: int = 200  # steps of fine-tuning, of captioner and filter each, on the pages written by hand
    tune_lr: float = 1e-3
    answer: int = 0  # steps of fine-tuning for questions
    everything: bool = False  # also measure what only the main run needs


MAIN = Recipe(captioner="beam", filter=True, answer=200, everything=True)
CAPFILT = replace(MAIN, steps=300, answer=0, everything=False)  # for the comparisons
BASE = replace(CAPFILT, captioner="", filter=False)  # pre-training on the data as they are


def blip(**changes: object) -> BLIPConfig:
    return replace(BASE.model, **changes)


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"BLIP": MAIN},
    "CapFilt": {  # all train their last model for the same number of steps
        "neither": BASE,
        "filter": replace(BASE, filter=True),
        "captioner": replace(CAPFILT, filter=False),
        "both": CAPFILT,
    },
    "CapFilt, changed": {
        "nucleus sampling": replace(CAPFILT, captioner="nucleus"),
        "one model for both": replace(CAPFILT, apart=False),
        "the old model goes on": replace(CAPFILT, anew=False),
        "longer, without CapFilt": replace(BASE, steps=2 * BASE.steps),
    },
    "sharing": {
        "everything": replace(BASE, model=blip(decoder_own=())),
        "all but cross-attention": replace(BASE, model=blip(decoder_own=("cross-attention",))),
        "nothing": replace(BASE, model=blip(decoder_own=NOTHING_SHARED)),
    },
    "losses": {"without ITC": replace(BASE, itc=False)},
}


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Pairs of a picture and a text, several pairs a picture: `rows` (M) number the pictures in `pages`; `texts`,
    `source` ("human", "web", "synthetic") and `noise`, what is wrong with each (known of web texts alone), are M."""

    pages: PairTensors
    rows: LongTensor
    texts: list[str]
    source: list[str]
    noise: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Corpus) -> Corpus:
        """Both together; of the same pages."""
        return Corpus(self.pages, torch.cat([self.rows, other.rows]), self.texts + other.texts,
                      self.source + other.source, self.noise + other.noise)  # fmt: skip

    def chosen(self, keep: Tensor) -> Corpus:
        """The pairs where keep (M) is True."""
        (at,) = torch.where(keep)
        return Corpus(self.pages, self.rows[at], *([part[i] for i in at.tolist()]
                                                   for part in (self.texts, self.source, self.noise)))  # fmt: skip

    def false(self) -> Tensor:
        """Which texts plainly contradict their picture, or say nothing of it: (M). No training ever asks this."""
        scenes = self.pages.scenes
        claims = [understand(text) for text in self.texts]
        false = [not claim.nouns or contradicts(claim, scenes[row])
                 for claim, row in zip(claims, self.rows.tolist(), strict=True)]  # fmt: skip
        return torch.tensor(false, dtype=torch.bool)


def all_pages(recipe: Recipe) -> PairTensors:
    """The training pages: first those written by hand, then those of the web."""
    return pairs("train", recipe.human + recipe.web)


def human_pairs(recipe: Recipe, *, all_levels: bool = False) -> Corpus:
    """The pairs (I_h, T_h) of the paper: each page written by hand with one caption, of each of the `levels` in turn,
    or, for fine-tuning, with a caption of each level."""
    data, levels = all_pages(recipe), recipe.levels
    pairs_of = [(row, level) for row in range(recipe.human) for i, level in enumerate(levels)
                if all_levels or row % len(levels) == i]  # fmt: skip
    texts = [data.captions[row][level] for row, level in pairs_of]
    rows = torch.tensor([row for row, _ in pairs_of])
    return Corpus(data, rows, texts, ["human"] * len(texts), ["clean"] * len(texts))


@lru_cache(maxsize=2)
def _web_texts(n: int) -> tuple[list[str], list[str]]:
    found = load_pairs("picturebook", "train", tier="normal", n=n).select_columns(["web_caption", "web_noise"])
    return list(found["web_caption"]), list(found["web_noise"])


def web_pairs(recipe: Recipe) -> Corpus:
    """The pairs (I_w, T_w): each page of the web with the one text found beside it."""
    n = recipe.human + recipe.web
    texts, noise = _web_texts(n)
    rows = torch.arange(recipe.human, n)
    return Corpus(all_pages(recipe), rows, texts[recipe.human :], ["web"] * len(rows), noise[recipe.human :])


@lru_cache(maxsize=1)
def sentences(first: int = 100_000, n: int = 3_000) -> list[list[str]]:
    """The captions of `n` pages that nobody has drawn, far from all others: texts without pictures."""
    return [captions(sample(index, split="train", tier="normal", seed=0)) for index in range(first, first + n)]


class TextBatches:
    """Texts alone; everything random is drawn from `(seed, step)`."""

    def __init__(self, recipe: Recipe, *, seed: int) -> None:
        self.table, self.seed = TokenTable(sentences(), words()), seed
        self.order = Batches((torch.arange(len(self.table)),), batch_size=recipe.batch_size, seed=seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """-> ids and mask (B, L), all captions of one level, so that lengths agree."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32 ^ 0x7E87)
        return self.table(self.order.indices(step), int(torch.randint(1, 5, (), generator=generator)))


class PairBatches:
    """Pairs of a corpus; everything random is drawn from `(seed, step)`.

    Four batches are drawn together and cut by the length of their texts, so that little is spent on padding. `images`
    (N, ...) may stand for the pages' pictures, such as what a frozen encoder makes of them.
    """

    group = 4

    def __init__(self, corpus: Corpus, *, batch_size: int, seed: int, images: Tensor | None = None) -> None:
        self.images, self.rows, self.seed = corpus.pages.images if images is None else images, corpus.rows, seed
        self.table = TokenTable(corpus.texts, words())
        numbers: dict[str, int] = {}
        self.says = torch.tensor([numbers.setdefault(text, len(numbers)) for text in corpus.texts])  # equal texts
        self.order = Batches((torch.arange(len(corpus)),), batch_size=self.group * batch_size, seed=seed)

    def chosen(self, step: int) -> LongTensor:
        """The pairs (B) of a step."""
        group, place = divmod(step, self.group)
        drawn = self.order.indices(group)
        by_length = drawn[self.table.lengths[drawn].argsort(stable=True)].view(self.group, -1)
        turn = torch.randperm(self.group, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + group))
        return by_length[turn[place]]

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """-> images (B, ...), ids and mask (B, L), says (B), the number of each text, and noise (2, B), which decides
        the wrong partners."""
        chosen = self.chosen(step)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32 ^ 0x5EED)
        ids, mask = self.table(chosen, 0)
        noise = torch.rand(2, len(chosen), generator=generator)
        return self.images[self.rows[chosen]], ids, mask, self.says[chosen], noise


class BLIPBatches(PairBatches):
    """... and alpha (), the teacher's share of ITC's targets at this step."""

    def __init__(self, corpus: Corpus, recipe: Recipe, *, seed: int) -> None:
        super().__init__(corpus, batch_size=recipe.batch_size, seed=seed)
        self.recipe = recipe

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        r = self.recipe
        return *super().__call__(step), torch.tensor(ramped(r.alpha, step, r.ramp * r.steps))


# --- training --------------------------------------------------------------------------------------------------------


def lm_loss(
    model: BLIP, context: Tensor | None, ids: Tensor, mask: Tensor, *, smoothing: float = 0.1,
    context_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LM (paper, 3.2): from [DEC] on, each next word of the texts (B, L), given a picture's states (B, S, D') and the
    words before it, up to [SEP]."""
    states = model.write(ids, context, context_mask=context_mask)
    return masked_lm_loss(model.lm_head, states, next_words(ids, mask), smoothing=smoothing)


@torch.no_grad()
def ask_teacher(model: MomentumALBEF, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher first follows the student, then says its vectors of pictures and texts, (B, E) each."""
    follow(model.teacher, model.student, model.momentum)
    return model.teacher.encode_image(images), model.teacher.encode_text(ids)


def blip_loss(
    model: MomentumALBEF, images: Tensor, ids: Tensor, mask: Tensor, says: Tensor, noise: Tensor, alpha: Tensor,
    *, itc: bool = True, itm: bool = True, lm: bool = True, smoothing: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """BLIP's objective ITC + ITM + LM (paper, 3.2) for one batch of `BLIPBatches`. Moves teacher and queue on."""
    student, queue, B = model.student, model.queue, len(ids)
    image = student.look(images)  # once, for all three losses
    losses: dict[str, Tensor] = {}
    same = belong(says[:, None], torch.cat([says, queue.says])), belong(torch.cat([says[:, None], queue.shows]), says).T
    to_text = to_image = torch.zeros(B, B, device=ids.device)
    if itc:
        clamp_temperature(student)
        image_t, text_t = ask_teacher(model, images, ids)
        keys = torch.cat([image_t, queue.image]), torch.cat([text_t, queue.text])
        vectors = student.image_vector(image), student.encode_text(ids)
        losses["itc"], to_text, to_image = lesson05.itc_loss(
            vectors, (image_t, text_t), keys, student.temp, alpha, same
        )
        queue.push(image_t, text_t, says[:, None], says)
    if itm:
        with torch.no_grad():
            other_image = wrong_partners(to_image[:, :B], same[1][:, :B], noise[0])
            other_text = wrong_partners(to_text[:, :B], same[0][:, :B], noise[1])
        losses["itm"] = lesson05.itm_loss(student, image, student.read(ids), mask, other_image, other_text)
    if lm:
        losses["lm"] = lm_loss(student, image, ids, mask, smoothing=smoothing)
    return losses


def build(config: BLIPConfig) -> BLIP:
    return BLIP(config)


def with_teacher(student: BLIP, recipe: Recipe) -> MomentumALBEF:
    """What is trained: the student, a teacher that follows it, and a queue."""
    return MomentumALBEF(student, queue_size=recipe.queue, momentum=recipe.momentum, teacher=teacher_of(student))


def words_loss(model: BLIP, ids: Tensor, mask: Tensor) -> Tensor:
    """LM without any picture: the cross-attention is passed by."""
    return lm_loss(model, None, ids, mask)


_WORDS: dict[tuple, dict[str, Tensor]] = {}  # the newest few, see `learn_words`


def learn_words(model: BLIP, recipe: Recipe, *, seed: int, progress: str | None = None) -> None:
    """Let the decoder of a new model write sentences without pictures, then give the encoder the same weights: the
    course's stand-in for BERT, which the paper starts both from. The newest are remembered."""
    key = (recipe.model, recipe.text_steps, recipe.text_lr, recipe.batch_size, recipe.weight_decay, seed)
    if key not in _WORDS:
        history = fit(model, TextBatches(recipe, seed=seed), words_loss, steps=recipe.text_steps, lr=recipe.text_lr,
                      weight_decay=recipe.weight_decay, progress=progress and f"{progress}, words alone")  # fmt: skip
        if history.stopped:
            raise KeyboardInterrupt  # half a start is none
        start_alike(model)
        _WORDS[key] = {name: own_copy(t) for name, t in model.text.state_dict().items()} | {
            f"lm_head.{name}": own_copy(t) for name, t in model.lm_head.state_dict().items()
        }
        while len(_WORDS) > 16:
            del _WORDS[next(iter(_WORDS))]
    kept = _WORDS[key]
    model.text.load_state_dict({name: t for name, t in kept.items() if not name.startswith("lm_head.")})
    model.lm_head.load_state_dict({name[8:]: t for name, t in kept.items() if name.startswith("lm_head.")})


def begin(recipe: Recipe, *, seed: int = 0, device: torch.device | None = None, progress: str | None = None) -> BLIP:
    """A new model, the image encoder taken from lesson 01's ViT and the words from sentences alone, if the recipe says
    so."""
    minivlp.seed_everything(seed)
    model = build(recipe.model).to(device)
    if recipe.start:
        experiment, arm = lesson01.CHECKPOINTS[recipe.start]
        start_from_vit(model, trained(recipe.start, ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False))
    if recipe.text_steps:
        learn_words(model, recipe, seed=seed, progress=progress)
    return model


def fit_on(
    corpus: Corpus, model: BLIP, recipe: Recipe, *, seed: int, steps: int, lr: float, progress: str | None,
    times: int = 0, **losses: bool,
) -> History:  # fmt: skip
    """Train `model` in place on a corpus, with the `losses` of `blip_loss`. It is looked at `times` during it."""
    looks = {"evaluate": validation(recipe), "evaluate_every": max(1, steps // times)} if times else {}
    kept = with_teacher(model, recipe)
    history = fit(
        kept, BLIPBatches(corpus, replace(recipe, steps=steps), seed=seed),
        partial(blip_loss, smoothing=recipe.smoothing, **losses), steps=steps, lr=lr, weight_decay=recipe.weight_decay,
        warmup=recipe.warmup, progress=progress, **looks,
    )  # fmt: skip
    clamp_temperature(model)  # the last update came after the last clamp
    if history.stopped and progress is None:
        raise KeyboardInterrupt  # half a training is no result
    return history


def pretrain(
    corpus: Corpus, recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "BLIP", times: int = 2,
    start: BLIP | None = None,
) -> tuple[BLIP, History]:  # fmt: skip
    """ITC + ITM + LM on a corpus, by a new model, or by `start`, of which a copy goes on. The seed fixes weights, queue
    and order."""
    model = begin(recipe, seed=seed, device=device, progress=progress) if start is None else copy.deepcopy(start)
    minivlp.seed_everything(seed)
    history = fit_on(corpus, model, recipe, seed=seed, steps=recipe.steps, lr=recipe.lr, progress=progress,
                     times=times, itc=recipe.itc)  # fmt: skip
    return model, history


def tuned_for(model: BLIP, recipe: Recipe, *, seed: int, progress: str | None = None, **losses: bool) -> BLIP:
    """A copy of the model, tuned on the pages written by hand with the given `losses` of `blip_loss`."""
    minivlp.seed_everything(seed)
    tuned = copy.deepcopy(model)
    fit_on(human_pairs(recipe, all_levels=True), tuned, recipe, seed=seed, steps=recipe.tune, lr=recipe.tune_lr,
           progress=progress, **losses)  # fmt: skip
    return tuned


def captioner_of(model: BLIP, recipe: Recipe, **how: object) -> BLIP:
    """Fine-tuned to write (paper, 3.3): LM alone. Without label smoothing, unlike the official code: of 340 words, the
    tenth of the target that goes to all of them is enough to fill a nucleus with nonsense."""
    return tuned_for(model, replace(recipe, smoothing=0.0), itc=False, itm=False, **how)


def filter_of(model: BLIP, recipe: Recipe, **how: object) -> BLIP:
    """Fine-tuned to judge (paper, 3.3): ITC and ITM."""
    return tuned_for(model, recipe, lm=False, **how)


# --- writing ---------------------------------------------------------------------------------------------------------

LONGEST, SHORTEST, BEAMS, NUCLEUS = 32, 4, 3, 0.9  # tokens at most and at least


def write(
    model: BLIP, images: Tensor, how: str = "beam", *, seed: int = 0, batch_size: int = 500, **options: object
) -> list[str]:
    """A caption for each of the pictures (N, C, H, W), by "greedy", "beam" search or "nucleus" sampling. `options` are
    those of the functions in `minivlp.generate`, for instance shortest=12."""
    device, texts = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(seed)
    limits = {"end": words().sep_id, "longest": LONGEST, "shortest": SHORTEST} | options
    with evaluating(model):
        for part in images.split(batch_size):
            image = model.look(part.to(device))
            first = torch.full((len(part),), model.config.dec_id, device=device)
            if how == "greedy":
                ids = greedy(model.speaker(image), first, **limits)
            elif how == "beam":
                ids = beam_search(model.speaker(image, copies=BEAMS), first, beams=BEAMS, **limits)
            else:
                ids = nucleus(model.speaker(image), first, generator=generator, **{"p": NUCLEUS} | limits)
            texts += [words().decode(row) for row in ids]
    return texts


# --- CapFilt ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judged(model: BLIP, corpus: Corpus, *, batch_size: int = 500) -> Tensor:
    """The filter's opinion of each pair: the log odds of a match (M), on the CPU. Each picture is looked at once."""
    device = next(model.parameters()).device
    ids, mask = words().encode_batch(corpus.texts)
    pictures, place = corpus.rows.unique(return_inverse=True)
    odds = torch.empty(len(corpus))
    with evaluating(model):
        image = torch.cat([model.look(corpus.pages.images[p].to(device)) for p in pictures.split(batch_size)])
        for rows in mask.sum(1).argsort().split(batch_size):  # texts of like lengths together
            L = int(mask[rows].sum(1).max())
            batch = ids[rows, :L].to(device), mask[rows, :L].to(device)
            scores = model.match(model.read(batch[0]), batch[1], image[place[rows].to(device)])
            odds[rows] = scores.float().diff(dim=1)[:, 0].cpu()
    return odds


@dataclass
class Bootstrapped:
    """What CapFilt made: its two models, all texts that were up for judgement, the filter's log odds (M) and which of
    them are kept (M), and the data set that comes out."""

    captioner: BLIP | None
    filter: BLIP | None
    candidates: Corpus
    odds: Tensor
    kept: Tensor
    data: Corpus


def capfilt(model: BLIP, recipe: Recipe, *, seed: int, progress: str | None = None) -> Bootstrapped:
    """Captioning and filtering (paper, 3.3, Fig. 3) with copies of one pre-trained model. What is not asked for is left
    out: without a captioner no new texts, without a filter all texts are kept."""
    both = None
    if not recipe.apart:  # no smoothing here either, see `captioner_of`
        unsmoothed = replace(recipe, smoothing=0.0)
        both = tuned_for(model, unsmoothed, seed=seed, progress=progress and "captioner and filter")
    captioner = filter_ = None
    candidates = web_pairs(recipe)
    if recipe.captioner:
        captioner = both or captioner_of(model, recipe, seed=seed, progress=progress and "captioner")
        rows = candidates.rows
        texts = write(captioner, candidates.pages.images[rows], recipe.captioner, seed=seed)
        said = torch.tensor([bool(text) for text in texts])
        made = Corpus(candidates.pages, rows, texts, ["synthetic"] * len(texts), [""] * len(texts)).chosen(said)
        candidates = candidates + made
    odds = torch.full((len(candidates),), torch.inf)
    if recipe.filter:
        filter_ = both or filter_of(model, recipe, seed=seed, progress=progress and "filter")
        odds = judged(filter_, candidates)
    data = human_pairs(recipe) + candidates.chosen(odds > 0)
    return Bootstrapped(captioner, filter_, candidates, odds, odds > 0, data)


_KEPT: dict[tuple[Recipe, int, str], tuple[BLIP, History]] = {}  # the newest few, see `first_model`


def first_model(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "BLIP",
                times: int = 2) -> tuple[BLIP, History]:  # fmt: skip
    """The model pre-trained on the data as they are. The newest are remembered, so that all that comes after it starts
    from the very same weights and does not pay for them twice."""
    names = ("captioner", "filter", "apart", "anew", "answer", "everything", "tune", "tune_lr")
    key = (replace(recipe, **{name: getattr(BASE, name) for name in names}), seed, str(device))
    if key not in _KEPT:
        model, history = pretrain(human_pairs(recipe) + web_pairs(recipe), recipe, seed=seed, device=device,
                                  progress=progress, times=times)  # fmt: skip
        if history.stopped:
            return model, history  # by hand: nothing to be remembered
        _KEPT[key] = model, history
        while len(_KEPT) > 8:
            del _KEPT[next(iter(_KEPT))]
    return _KEPT[key]


def second_model(
    first: BLIP, recipe: Recipe, made: Bootstrapped, *, seed: int, device: torch.device,
    progress: str | None = "BLIP, on cleaned data", times: int = 2,
) -> tuple[BLIP, History]:  # fmt: skip
    """The new model that learns from the cleaned data; with `anew=False` the first one, which goes on."""
    return pretrain(made.data, recipe, seed=seed, device=device, progress=progress, times=times,
                    start=None if recipe.anew else first)  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def validation(recipe: Recipe, n: int = 200) -> Callable[[MomentumALBEF], dict[str, float]]:
    """A function of what is trained: R@1 by vectors, matching, and the facts of captions, on `n` validation pages."""

    def measure(model: MomentumALBEF) -> dict[str, float]:
        student, data, numbers = model.student, pairs("val", n), {}
        if recipe.itc:
            numbers["val R@1"] = lesson03.mean_recall(lesson03.retrieval(student, "val", n=n))
        numbers["val matching"] = preference(student, "val", n=n)
        facts = caption_facts(write(student, data.images, "greedy"), data.scenes)
        return numbers | {"val colours": facts["colours, precision"]}

    return measure


def caption_numbers(texts: Sequence[str], split: str = "test") -> dict[str, float]:
    """Captions of the first pages of a split against their scenes and their full captions."""
    data = pairs(split, 1000)
    scenes, references = data.scenes[: len(texts)], [[c[1], c[4]] for c in data.captions[: len(texts)]]
    return caption_facts(texts, scenes) | {"BLEU": bleu(texts, references)}


def search(model: BLIP, *, n: int = 256, k: int = 16) -> dict[str, float]:
    """R@1 among `n` test pages and their full captions: by vectors, by ITM of the `k` best, and, as BLIP does
    it, by ITM plus the cosine, here the log odds of a match (official code: the score of "matches" alone)."""
    data, own = pairs("test", 1000).subset(slice(n)), torch.arange(n)
    texts = [captions[4] for captions in data.captions]
    cosine = image_vectors(model, data.images) @ text_vectors(model, texts).T
    held = states(model, data.images, texts)
    found = {"by vectors": (cosine, cosine.T)}
    odds = [rerank(model, s, held, k, by_text=by_text) for s, by_text in ((cosine, False), (cosine.T, True))]
    found["re-ranked by ITM"] = odds[0], odds[1]
    found["re-ranked"] = odds[0] + cosine, odds[1] + cosine.T
    return {name: statistics.mean(recall_at(scores, own, 1) for scores in both) for name, both in found.items()}


def preference(model: BLIP, split: str = "test", *, n: int = 256) -> float:
    """Share of `n` pages that ITM finds more likely with their own full caption than with another's."""
    data, own = pairs(split, n), torch.arange(n)
    held = states(model, data.images, [captions[4] for captions in data.captions])
    right, wrong = (matching(model, *held, own, texts) for texts in (own, own.roll(1)))
    return (right > wrong).float().mean().item()


def measure(model: BLIP, captioner: BLIP, recipe: Recipe, *, n: int = 300) -> dict[str, float]:
    """What is recorded of every arm's last model, on the test split: retrieval, matching, and the captions of `n`
    pages by its copy that was tuned to write."""
    numbers: dict[str, float] = {"matching": preference(model)}
    if recipe.itc:
        found = lesson03.retrieval(model)
        numbers |= found | {"R@1": lesson03.mean_recall(found)} | search(model)
    images = pairs("test", 1000).images[:n]
    texts = write(captioner, images, "beam")
    return numbers | caption_numbers(texts) | {"unique": unique(texts)}


def led_differently(model: BLIP, *, n: int = 256) -> dict[str, float]:
    """What the first token is worth: matching with [CLS] or [DEC] where [ENC] belongs, and LM's loss per token, without
    smoothing, with [CLS] or [ENC] where [DEC] belongs; full captions of `n` test pages."""
    data = pairs("test", 1000).subset(slice(n))
    device, numbers, own = next(model.parameters()).device, {}, torch.arange(n)
    texts = [captions[4] for captions in data.captions]
    ids, mask = (t.to(device) for t in words().encode_batch(texts))
    tokens = {"[ENC]": model.config.enc_id, "[DEC]": model.config.dec_id, "[CLS]": words().cls_id}
    config = model.config
    try:
        for name, token in tokens.items():
            model.config = replace(config, enc_id=token, dec_id=token)
            held = states(model, data.images, texts)
            right, wrong = (matching(model, *held, own, other) for other in (own, own.roll(1)))
            numbers[f"matching, led by {name}"] = (right > wrong).float().mean().item()
            with evaluating(model):
                numbers[f"LM, led by {name}"] = lm_loss(model, held[0], ids, mask, smoothing=0.0).item()
    finally:
        model.config = config
    return numbers


def word_losses(model: BLIP, *, n: int = 500) -> dict[str, float]:
    """LM's cross-entropy per token on the full captions of `n` test pages, without smoothing: with their own pictures,
    with others', and with blank ones."""
    data, device = pairs("test", 1000).subset(slice(n)), next(model.parameters()).device
    ids, mask = (t.to(device) for t in words().encode_batch([captions[4] for captions in data.captions]))
    shown = {"true": data.images, "shuffled": data.images.roll(1, dims=0), "blank": torch.full_like(data.images, BLANK)}
    with evaluating(model):
        return {f"LM, {name} picture": lm_loss(model, model.look(images.to(device)), ids, mask, smoothing=0.0).item()
                for name, images in shown.items()}  # fmt: skip


def loss_of_each(model: BLIP, corpus: Corpus, *, batch_size: int = 500) -> Tensor:
    """LM's cross-entropy per token for each pair of a corpus, without smoothing, (M), on the CPU."""
    device, found = next(model.parameters()).device, torch.empty(len(corpus))
    ids, mask = words().encode_batch(corpus.texts)
    with evaluating(model):
        for rows in mask.sum(1).argsort().split(batch_size):
            L = int(mask[rows].sum(1).max())
            now, there = ids[rows, :L].to(device), mask[rows, :L].to(device)
            image = model.look(corpus.pages.images[corpus.rows[rows]].to(device))
            scores = model.lm_head(model.write(now, image)).float().transpose(1, 2)  # (B, V, L)
            labels = next_words(now, there)
            loss = nn.functional.cross_entropy(scores, labels, reduction="none")
            found[rows] = (loss.sum(1) / (labels >= 0).sum(1)).cpu()
    return found


def gradient_cosines(model: BLIP, recipe: Recipe, *, seed: int = 0, batches: int = 8) -> dict[str, float]:
    """Do ITM and LM pull in one direction? The cosine of their gradients in the encoder's parts that the decoder uses,
    too, mean over some batches of the data as they are."""
    kept = with_teacher(copy.deepcopy(model), recipe)
    data = BLIPBatches(human_pairs(recipe) + web_pairs(recipe), recipe, seed=seed)
    device, found = next(model.parameters()).device, {}
    shared = {part: names for part, names in MED_PARTS.items() if part not in model.config.decoder_own}
    groups = {part: [p for block in kept.student.text.encoder for name in names
                     for p in getattr(block, name).parameters()] for part, names in shared.items()}  # fmt: skip
    for step in range(batches):
        losses = blip_loss(kept, *(t.to(device) for t in data(step)), itc=recipe.itc, smoothing=recipe.smoothing)
        for part, own in groups.items():
            itm, lm = (torch.cat([g.flatten() for g in torch.autograd.grad(losses[name], own, retain_graph=True)])
                       for name in ("itm", "lm"))  # fmt: skip
            found.setdefault(f"cosine of ITM and LM, {part}", []).append(torch.cosine_similarity(itm, lm, dim=0).item())
    return {name: statistics.mean(values) for name, values in found.items()}


def report(made: Bootstrapped) -> dict[str, float]:
    """CapFilt in numbers: how many texts of each source there are and are kept, which share of them is false (see
    `Corpus.false`), what the filter keeps of each kind of noise, and how varied the written texts are."""
    c, kept, false, numbers = made.candidates, made.kept, made.candidates.false(), {}
    for source in dict.fromkeys(c.source):
        of = torch.tensor([s == source for s in c.source])
        numbers |= {f"{source} texts": of.sum().item(), f"{source} kept": (of & kept).sum().item(),
                    f"{source} false": false[of].float().mean().item(),
                    f"{source} false, kept": share_of(false & of & kept, of & kept),
                    f"{source} filtered out": 1 - share_of(of & kept, of),
                    f"{source} filter's recall": share_of(false & of & ~kept, false & of),
                    f"{source} filter's precision": share_of(false & of & ~kept, of & ~kept)}  # fmt: skip
    for kind in sorted(set(c.noise) - {""}):
        of = torch.tensor([noise == kind for noise in c.noise])
        numbers[f"kept, {kind}"] = share_of(of & kept, of)
    if written := [text for text, source in zip(c.texts, c.source, strict=True) if source == "synthetic"]:
        numbers |= {"distinct-1": distinct(written, 1), "distinct-2": distinct(written, 2), "unique": unique(written)}
    numbers |= {"pairs in the end": len(made.data), "false in the end": made.data.false().float().mean().item()}
    return {f"CapFilt: {name}": float(value) for name, value in numbers.items()}


def share_of(part: Tensor, whole: Tensor) -> float:
    """How much of `whole` (M) is `part` (M), 0.0 of nothing."""
    return part.sum().item() / max(1, whole.sum().item())


# --- questions -------------------------------------------------------------------------------------------------------


def answer_loss(model: BLIP, images: Tensor, ids: Tensor, mask: Tensor, answer: Tensor, there: Tensor) -> Tensor:
    """Questions (B, L) answered by writing (paper, 5.3): the image-grounded encoder reads the question, and the decoder
    asks its states instead of the picture's; answers and their mask (B, L')."""
    return lm_loss(model, grounded(model, images, ids, mask), answer, there, smoothing=0.0, context_mask=mask)


def grounded(model: BLIP, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The states of questions (B, L) that have seen their pictures, (B, L, D)."""
    return model.text.ground(model.read(ids), mask, model.look(images))[0]


def learn_to_answer(
    model: BLIP, recipe: Recipe, *, seed: int, blank: bool = False, progress: str | None = None
) -> BLIP:
    """A copy, encoder and decoder untied, tuned for the questions about the pages written by hand. `blank` hides the
    pictures, which leaves the questions alone."""
    minivlp.seed_everything(seed)
    tuned, data, q = untied(model), all_pages(recipe), asked("train", recipe.human)
    answers, there = words().encode_batch(ANSWERS)
    order = Batches((torch.arange(len(q.rows)),), batch_size=recipe.batch_size, seed=seed)

    def batches(step: int) -> tuple[Tensor, ...]:
        chosen = order.indices(step)
        L, images = int(q.mask[chosen].sum(1).max()), data.images[q.rows[chosen]]
        images = torch.full_like(images, BLANK) if blank else images
        right = q.answers[chosen]
        return images, q.ids[chosen, :L], q.mask[chosen, :L], answers[right], there[right]

    history = fit(tuned, batches, answer_loss, steps=recipe.answer, lr=recipe.tune_lr,
                  weight_decay=recipe.weight_decay, progress=progress)  # fmt: skip
    if history.stopped and progress is None:
        raise KeyboardInterrupt  # half a fine-tuning is no result
    return tuned


def answers_of(model: BLIP, *, n: int = 500, blank: bool = False) -> Tensor:
    """The number of the answer that is written to each question about the first `n` test pages, (M); -1 if it is none
    of the known ones."""
    q, data, device = asked("test", n), pairs("test", 1000), next(model.parameters()).device
    number, found = {answer: i for i, answer in enumerate(ANSWERS)}, []
    with evaluating(model):
        for part in torch.arange(len(q.rows)).split(500):
            images = data.images[q.rows[part]]
            images = torch.full_like(images, BLANK) if blank else images
            ids, mask = q.ids[part].to(device), q.mask[part].to(device)
            first = torch.full((len(part),), model.config.dec_id, device=device)
            speaker = model.speaker(grounded(model, images.to(device), ids, mask), context_mask=mask)
            found += [number.get(words().decode(row), -1)
                      for row in greedy(speaker, first, end=words().sep_id, longest=8)]  # fmt: skip
    return torch.tensor(found)


# --- the runs --------------------------------------------------------------------------------------------------------


def main_numbers(model: BLIP, captioner: BLIP, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """What only the main run needs, of its last model."""
    numbers = led_differently(model) | word_losses(model)
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        numbers |= lesson05.probes(model, kind)
    numbers |= {"zero-shot kind": lesson03.zero_shot_kind(model, tier="normal", n=400)}
    numbers |= {f"{name}, 1,000": value for name, value in search(model, n=1000, k=16).items()}
    images = pairs("test", 1000).images[:300]
    for how in ("greedy", "beam", "nucleus"):
        texts = write(captioner, images, how, seed=seed)
        found = caption_numbers(texts) | {"distinct-2": distinct(texts, 2), "unique": unique(texts)}
        numbers |= {f"{how}: {name}": value for name, value in found.items()}
    shuffled = write(captioner, images.roll(1, dims=0), "beam")
    numbers |= {f"another picture: {name}": value for name, value in caption_numbers(shuffled).items()}
    for name, blank in (("VQA", False), ("VQA, question alone", True)):
        tuned = learn_to_answer(model, recipe, seed=seed, blank=blank)
        right = lesson02.answered_right(answers_of(tuned, blank=blank), asked("test", 500))
        numbers |= {name if kind == "all" else f"{name}, {kind}": value for kind, value in right.items()}
    return numbers


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Everything a recipe asks for, then measured on the test split: what the recorder keeps of one arm and seed. The
    curves are those of the first model, and with "again: " those of the last."""
    model, history = first_model(recipe, seed=seed, device=device, progress=progress)
    if history.stopped:
        return Run(model, history, {})
    history = copy.deepcopy(history)
    numbers: dict[str, float] = {}
    if recipe.captioner or recipe.filter:
        made = capfilt(model, recipe, seed=seed, progress=progress)
        model, again = second_model(model, recipe, made, seed=seed, device=device, progress=progress)
        history.losses |= {f"again: {name}": values for name, values in again.losses.items()}
        history.metrics |= {f"again: {name}": values for name, values in again.metrics.items()}
        numbers |= report(made)
    else:
        numbers |= gradient_cosines(model, recipe, seed=seed)
    captioner = captioner_of(model, recipe, seed=seed)
    numbers |= measure(model, captioner, recipe)
    if recipe.everything:
        numbers |= main_numbers(model, captioner, recipe, seed=seed)
    return Run(model, history, numbers)


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    all_pages(BASE)
    web_pairs(BASE)
    for split, n in (("train", BASE.human), ("val", 200), ("test", 256), ("test", 500), ("test", 1000)):
        pairs(split, n)
    lesson03.single_things("test", n=400, tier="normal")
    for kind in ("replaced", "attribute_swap", "order_swap", "count"):
        lesson02.probe_pairs(kind)


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000, by vectors (R@1, chance 0.001)": ("main", "BLIP", "R@1 text to image"),
    "the full caption of a picture, among 1,000, by vectors": ("main", "BLIP", "R@1 image to text"),
    "... mean of both ways, the 16 best re-ranked by matching and cosine": ("main", "BLIP", "re-ranked, 1,000"),
    "more likely with its own caption than with another page's (chance 0.5)": ("main", "BLIP", "matching"),
    "captions that are written: colours said of a thing that are right": ("main", "BLIP", "beam: colours, precision"),
    "... captions of another picture": ("main", "BLIP", "another picture: colours, precision"),
    "... things said that the picture does not show": ("main", "BLIP", "beam: hallucinated"),
    "... BLEU-4": ("main", "BLIP", "beam: BLEU"),
    "false texts of the web, before the filter": ("main", "BLIP", "CapFilt: web false"),
    "... after it": ("main", "BLIP", "CapFilt: web false, kept"),
    "answers to questions, written word by word": ("main", "BLIP", "VQA"),
    "... tuned on the questions alone": ("main", "BLIP", "VQA, question alone"),
}
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "writes captions ({} of the colours it names are right) and cleans its own data (false web texts: {}, then {})",
    ("main", "BLIP", "beam: colours, precision"), ("main", "BLIP", "CapFilt: web false"),
    ("main", "BLIP", "CapFilt: web false, kept"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "BLIP", "R@1 text to image"),
    "R@1 image to text": ("main", "BLIP", "R@1 image to text"),
    "zero-shot kind": ("main", "BLIP", "zero-shot kind"),
    "VQA": ("main", "BLIP", "VQA"),
    "VQA, question alone": ("main", "BLIP", "VQA, question alone"),
    "attribute swap": ("main", "BLIP", "attribute_swap, ITM"),
    "order swap": ("main", "BLIP", "order_swap, ITM"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
CLOCK_STEPS = 8
NOISY = f"BLIP: trained with the captions of {BASE.human:,} pages and with what CapFilt made of {BASE.web:,} web pages."
NOTES = {
    **dict.fromkeys(("R@1 text to image", "R@1 image to text", "zero-shot kind"), NOISY),
    "training seconds": f"BLIP: words alone, two pre-trainings, two fine-tunings, measured over {CLOCK_STEPS} steps of "
    "each, without evaluation, and scaled up; lesson 01's training is not in it.",
    "VQA": f"BLIP: writes its answers; tuned on the questions about {BASE.human:,} pages.",
    **dict.fromkeys(("attribute swap", "order swap"), "BLIP: by ITM, which reads picture and caption together."),
    "ms for 1,000 x 1,000 pairs": "BLIP: by its vectors, from pixels and words on.",
}  # fmt: skip


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": count_parameters(BLIP(BASE.model))}


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine: milliseconds of a step with all losses, of captioner, filter and words
    alone; tokens a second by greedy decoding, with the cache and without; "training seconds" of the main run, and "ms
    for 1,000 x 1,000 pairs"."""
    corpus = human_pairs(BASE) + web_pairs(BASE)
    of_step = {"three losses": {}, "captioner": {"itc": False, "itm": False}, "filter": {"lm": False}}
    steps = {}
    for name, losses in of_step.items():
        data = BLIPBatches(corpus if name == "three losses" else human_pairs(BASE, all_levels=True), BASE, seed=0)
        ready = [[t.to(device) for t in data(step)] for step in range(CLOCK_STEPS)]
        model = with_teacher(build(BASE.model).to(device), BASE).train()
        optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, fused=device.type != "mps")
        steps[name] = partial(lesson05.take_steps, model, optimizer, partial(blip_loss, **losses), ready)
    writer, texts_alone = build(BASE.model).to(device).train(), TextBatches(BASE, seed=0)
    optimizer = torch.optim.AdamW(writer.parameters(), lr=1e-4, fused=device.type != "mps")
    ready = [[t.to(device) for t in texts_alone(step)] for step in range(CLOCK_STEPS)]
    steps["words alone"] = partial(lesson05.take_steps, writer, optimizer, words_loss, ready)
    seconds = {name: statistics.median(t) / CLOCK_STEPS for name, t in take_turns(steps, rounds=4).items()}
    model, images = build(BASE.model).to(device).eval(), pairs("test", 1000).images
    first = torch.full((64,), model.config.dec_id, device=device)
    with evaluating(model):
        image = model.look(images[:64].to(device))
        ways = {name: partial(spoken, model, image, first, cache) for name, cache in (("cached", True), ("from the "
                "beginning", False))}  # fmt: skip
        spoken_in = {name: statistics.median(t) for name, t in take_turns(ways, rounds=4).items()}
    texts = [captions[4] for captions in pairs("test", 1000).captions]
    searched = take_turns({"": lambda: image_vectors(model, images) @ text_vectors(model, texts).T}, rounds=3)[""]
    return {f"ms, step, {name}": 1000 * value for name, value in seconds.items()} | {
        f"tokens a second, {name}": 64 * LONGEST / value for name, value in spoken_in.items()
    } | {
        "training seconds": 2 * MAIN.steps * seconds["three losses"] + MAIN.text_steps * seconds["words alone"]
        + MAIN.tune * (seconds["captioner"] + seconds["filter"]),
        "ms for 1,000 x 1,000 pairs": 1000 * statistics.median(searched),
    }  # fmt: skip


def spoken(model: BLIP, image: Tensor, first: LongTensor, cache: bool) -> LongTensor:
    """Exactly `LONGEST` tokens about each picture: no token ends a text."""
    return greedy(model.speaker(image, cache=cache), first, end=-1, longest=LONGEST)
