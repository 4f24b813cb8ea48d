"""Lesson 06's recipes: one main run in three stages and the experiments around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 06_vlmo` runs all of them over several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minivlp
from minivlp.bench import take_turns
from minivlp.data import Batches, CaptionBatches, PairTensors, PatchCodes, TokenTable, hide_blocks, mask_words
from minivlp.data.picturebook.describe import ANSWERS
from minivlp.data.picturebook.statements import Statement, statements
from minivlp.evaluate import attention_shares, ridge_probe
from minivlp.layers import count_parameters, patchify, to_float_pixels
from minivlp.lessons import albef as lesson05
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.albef import belong, matching, partners, sayings, states
from minivlp.lessons.vilt import asked, pairs, probe_pairs, words
from minivlp.lessons.vit import Run
from minivlp.losses import contrastive_loss, hard_negatives, masked_lm_loss
from minivlp.models.vit import ViT
from minivlp.models.vlmo import TwoPictures, VLMo, VLMoConfig, moves_in_stage_2, start_from_vit
from minivlp.train import History, evaluating, fit, trained

NAME = "06_vlmo"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"vlmo": ("main", "VLMo")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: VLMoConfig = field(default_factory=VLMoConfig)
    # What comes before the pairs, in this order: for stage 1 "image", masked image modelling, or "labels", kept weights
    # of lesson 01 (the authors' file, too, had seen labels); for stage 2 "text". After another stage, stage 2 trains
    # what `moves_in_stage_2` alone, and a late stage 1 leaves the attention as it is.
    before: tuple[str, ...] = ("labels", "text")
    pairs: int = 1_000  # pages of which picture and captions are known: what is scarce
    unpaired: int = 9_500  # pages of which only the pictures are used, and as many others for their captions alone
    image_steps: int = 450  # of stage 1
    text_steps: int = 450  # of stage 2
    single_batch: int = 32  # pictures or texts a step in stages 1 and 2
    image_lr: float = 2e-3
    text_lr: float = 1e-3
    covered: float = 0.4  # of the patches, in stage 1
    text_share: float = 0.3  # of the words, hidden in stage 2 (the paper: 0.15 of much longer texts)
    text_levels: tuple[int, ...] = (1, 1, 2, 4)
    steps: int = 400  # of stage 3
    batch_size: int = 16  # pairs a step in stage 3
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    levels: tuple[int, ...] = (1, 1, 4)  # which of the five captions; one level a batch, so that lengths agree
    share: float = 0.5  # of the words, hidden in stage 3
    second_itc: bool = True  # the one whose last blocks use VL-FFN (official code)
    itm: bool = True
    mlm: float = 0.25  # weight of MLM in stage 3 (official code); 0: without
    gpus: int = 1  # > 1: the batch as if spread over so many, and wrong partners of the own part alone ("local")
    tune: int = 0  # steps of fine-tuning for questions, and for statements about two pictures
    everything: bool = False  # also measure what only the main run needs


MAIN = Recipe(tune=120, everything=True)
SHORT = replace(MAIN, steps=240, tune=0, everything=False)  # for the comparisons
TUNED = replace(SHORT, tune=MAIN.tune)
ALONE = ("model", "before", "pairs", "unpaired", "image_steps", "text_steps", "single_batch", "image_lr", "text_lr",
         "covered", "text_share", "text_levels", "weight_decay", "warmup")  # fmt: skip # what stages 1 and 2 depend on
# What stages 1 and 2 cost, in steps of stage 3 (see `clock`): so many more get the arms that go without them.
COST = {"image": 90, "text": 110}


def vlmo(**changes: object) -> VLMoConfig:
    return replace(MAIN.model, **changes)


def longer(*before: str) -> Recipe:
    """As much computation as with "image + text", but only the stages `before`: the rest goes into stage 3."""
    return replace(SHORT, before=before, steps=SHORT.steps + sum(n for name, n in COST.items() if name not in before))


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"VLMo": MAIN},
    "start": {
        "nothing": replace(TUNED, before=()),
        "image": replace(TUNED, before=("image",)),
        "text": replace(TUNED, before=("text",)),
        "image + text": replace(TUNED, before=("image", "text")),
        "labels": replace(TUNED, before=("labels",)),
        "labels + text": TUNED,
    },
    "equal compute": {"nothing": longer(), "image": longer("image"), "text": longer("text")},
    "order": {"text, then image": replace(SHORT, before=("text", "image"))},
    "experts": {
        "no VL-FFN": replace(SHORT, model=vlmo(pair_depth=0)),
        "one MLP": replace(SHORT, model=vlmo(experts="one")),
        "one MLP, labels": replace(SHORT, model=vlmo(experts="one"), before=("labels",)),
    },
    # "separate" has as many multiplications as "shared", and as many weights as "shared, wider".
    "attention": {
        "shared": replace(SHORT, model=vlmo(pair_depth=0), before=("image", "text")),
        "separate": replace(SHORT, model=vlmo(pair_depth=0, attention="separate"), before=("image", "text")),
        "shared, wider": replace(SHORT, model=vlmo(pair_depth=0, mlp_ratio=5), before=("image", "text")),
    },
    "negatives": {"4 GPUs": replace(SHORT, gpus=4)},
    "losses": {
        "ITC alone": replace(SHORT, itm=False, mlm=0.0),
        "without ITM": replace(SHORT, itm=False),
        "without MLM": replace(SHORT, mlm=0.0),
    },
    "tuning": {"500 steps": replace(MAIN, tune=500, everything=False)},
    "layer scale": {"0.1": replace(SHORT, model=vlmo(layer_scale=0.1), before=("image", "text"))},
}


# --- data ------------------------------------------------------------------------------------------------------------


def pages(recipe: Recipe, stage: str) -> PairTensors:
    """The training pages of one stage, "pairs", "image" or "text". No page serves two stages, so that no picture of
    stage 1 and no caption of stage 2 has its other half anywhere."""
    first, n = {
        "pairs": (0, recipe.pairs),
        "image": (recipe.pairs, recipe.unpaired),
        "text": (recipe.pairs + recipe.unpaired, recipe.unpaired),
    }[stage]
    return pairs("train", recipe.pairs + 2 * recipe.unpaired).subset(slice(first, first + n))


@lru_cache(maxsize=2)
def _codebook(patch_size: int, codes: int, recipe: Recipe) -> PatchCodes:
    some = pages(recipe, "image").images[:2_000]
    return PatchCodes.fit(patchify(to_float_pixels(some), patch_size).flatten(0, 1), codes=codes)


def patch_codes(recipe: Recipe) -> PatchCodes:
    """The codebook of stage 1, made of its first 2,000 pictures, once for all recipes with the same ones."""
    same = replace(Recipe(), pairs=recipe.pairs, unpaired=recipe.unpaired)
    return _codebook(recipe.model.patch_size, recipe.model.codes, same)


def codes_of(recipe: Recipe, images: Tensor) -> Tensor:
    """The code of each patch: (M, C, H, W) -> (M, N)."""
    codes = patch_codes(recipe)
    return torch.cat([codes(patchify(to_float_pixels(p), recipe.model.patch_size)) for p in images.split(500)])


class ImageBatches(CaptionBatches):
    """Pictures alone, for stage 1; everything random is drawn from `(seed, step)`."""

    def __init__(self, images: Tensor, recipe: Recipe, *, seed: int) -> None:
        self.images, self.recipe, self.seed = images, recipe, seed
        self.codes = codes_of(recipe, images)
        self.order = Batches((torch.arange(len(images)),), batch_size=recipe.single_batch, seed=seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> images (B, C, H, W), hidden (B, N), True at covered patches, and the codes of all patches (B, N)."""
        rows, grid = self.order.indices(step), self.recipe.model.image_config().grid
        hidden = hide_blocks(len(rows), grid, generator=self.generator(step), share=self.recipe.covered)
        return self.images[rows], hidden, self.codes[rows]


class TextBatches(CaptionBatches):
    """Texts alone, for stage 2."""

    def __init__(self, data: PairTensors, recipe: Recipe, *, seed: int) -> None:
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.single_batch, seed=seed)
        self.recipe = recipe

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden ids, mask and labels (B, L)."""
        r, generator = self.recipe, self.generator(step)
        level = r.text_levels[int(torch.randint(len(r.text_levels), (), generator=generator))]
        ids, mask = self.table(self.order.indices(step), level)
        hidden, labels = mask_words(ids, words(), generator=generator, share=r.text_share)
        return hidden, mask, labels


class PairBatches(CaptionBatches):
    """Pairs, for stage 3."""

    def __init__(self, data: PairTensors, recipe: Recipe, *, seed: int) -> None:
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.batch_size, seed=seed)
        self.recipe, self.levels = recipe, sorted(set(recipe.levels))
        self.sayings = sayings(data, self.levels)  # (N, levels)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """-> images (B, C, H, W), ids, mask, hidden ids and labels (B, L); same (B, B), which texts belong to each
        picture; noise (2, B), which decides the wrong partners."""
        r, generator = self.recipe, self.generator(step)
        level = r.levels[int(torch.randint(len(r.levels), (), generator=generator))]
        rows = self.order.indices(step)
        ids, mask = self.table(rows, level)
        hidden, labels = mask_words(ids, words(), generator=generator, share=r.share)
        shows = self.sayings[rows]
        same = belong(shows, shows[:, self.levels.index(level)])
        return self.images[rows], ids, mask, hidden, labels, same, torch.rand(2, len(rows), generator=generator)


# --- the three stages ------------------------------------------------------------------------------------------------


def image_loss(model: VLMo, images: Tensor, hidden: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Stage 1, masked image modelling (BEiT; paper, 3.3): which of the K codes does each covered patch have?"""
    states = model.image_states(images, hidden=hidden)[:, 1:]
    return {"mim": F.cross_entropy(model.mim_head(states[hidden]).float(), codes[hidden])}


def text_loss(model: VLMo, hidden: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Stage 2, masked language modelling (paper, 3.3) without any picture."""
    return {"mlm": masked_lm_loss(model.mlm_head, model.text_states(hidden, mask), labels)}


def out_of_reach(same: Tensor, gpus: int) -> Tensor:
    """Which texts may not be a picture's wrong partner, (B, B): those that belong to it, `same`, and, if the batch is
    spread over `gpus`, those that other ones hold. A row whose own GPU has nothing else left may choose anywhere."""
    holder = torch.arange(len(same), device=same.device) * gpus // len(same)
    local = same | (holder[:, None] != holder)
    return torch.where(local.all(dim=1, keepdim=True), same, local)


def itm_loss(model: VLMo, image: Tensor, text: Tensor, mask: Tensor, other_image: Tensor, other_text: Tensor) -> Tensor:
    """ITM (paper, 3.2): B true pairs, each picture with a wrong text, each text with a wrong picture, from the embedded
    image (B, S, D) and text (B, L, D) on: 3 B passes through all blocks. `other_image`, `other_text` (B) say whose."""
    # index_select, not []: its gradient is summed up in one order, so that a run can be repeated to the last digit
    wrong_text, wrong_image = text.index_select(0, other_text), image.index_select(0, other_image)
    scores = model.match(torch.cat([text, wrong_text, text]), torch.cat([mask, mask[other_text], mask]),
                         torch.cat([image, image, wrong_image]))  # fmt: skip
    labels = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    labels[: len(image)] = 1
    return F.cross_entropy(scores.float(), labels)


def vlmo_loss(
    model: VLMo, images: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor, labels: Tensor, same: Tensor,
    noise: Tensor, *, second_itc: bool = True, itm: bool = True, mlm: float = 0.25, gpus: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """Stage 3, ITC + ITM + MLM (paper, 3.2; weights of the official code) for one batch of `PairBatches`."""
    image, text = model.look(images), model.read(ids, mask)
    pictures, texts = model.towers(image, "image"), model.towers(text, "text", mask)
    logits = model.logit_scale.exp() * pictures["itc"] @ texts["itc"].T  # (B, B)
    losses = {"itc": contrastive_loss(logits, same)}
    if second_itc and "itc_vl" in pictures:
        second = model.logit_vl_scale.exp() * pictures["itc_vl"] @ texts["itc_vl"].T
        losses = {"itc": losses["itc"] / 2, "itc_vl": contrastive_loss(second, same) / 2}
    if itm:
        with torch.no_grad():
            other_text = hard_negatives(logits, out_of_reach(same, gpus), noise[0])
            other_image = hard_negatives(logits.T, out_of_reach(same.T, gpus), noise[1])
        losses["itm"] = itm_loss(model, image, text, mask, other_image, other_text)
    if mlm:
        _, named = model.fuse(model.read(hidden, mask), image, mask, rows=ids.shape[1])
        losses["mlm"] = mlm * masked_lm_loss(model.mlm_head, named["text"], labels)
    return losses


def build(config: VLMoConfig) -> VLMo:
    return VLMo(config)


def loss_of(recipe: Recipe) -> Callable:
    """`fit` wants a function of the model and the batch: stage 3's."""
    return partial(vlmo_loss, second_itc=recipe.second_itc, itm=recipe.itm, mlm=recipe.mlm, gpus=recipe.gpus)


def freeze_for(model: VLMo, stage: str, before: Sequence[str]) -> None:
    """Mark what `stage` may train, given what came `before` it: everything, but the second of two single-modality
    stages leaves alone what it would take from the first."""
    if not before or stage == "pairs":
        model.requires_grad_(True)
        return
    moves = {"image": moves_in_late_stage_1, "text": moves_in_stage_2}[stage]
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):  # one MLP for all has every expert's name
        if moves(name):
            parameter.requires_grad_(True)


def moves_in_late_stage_1(name: str) -> bool:
    """What pictures may train where texts came first: the mirror image of `moves_in_stage_2`."""
    ours = name.startswith(("embed.image.", "embed.types.", "embed.mask_patch", "mim_head.", "norm."))
    return ours or ".experts.image." in name or ".attn.of.image." in name


def fit_stage(model: VLMo, stage: str, recipe: Recipe, *, seed: int, progress: str | None, times: int = 3) -> History:
    """Train one stage, "image", "text" or "pairs", in place; the last is looked at `times` during it."""
    data = pages(recipe, stage)
    make, loss, steps, lr = {
        "image": (ImageBatches, image_loss, recipe.image_steps, recipe.image_lr),
        "text": (TextBatches, text_loss, recipe.text_steps, recipe.text_lr),
        "pairs": (PairBatches, loss_of(recipe), recipe.steps, recipe.lr),
    }[stage]
    batches = make(data.images if stage == "image" else data, recipe, seed=seed)
    looks = {}
    if stage == "pairs" and times:
        looks = {"evaluate": validation(recipe), "evaluate_every": max(1, steps // times)}
    return fit(model, batches, loss, steps=steps, lr=lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup,
               betas=(0.9, 0.98), progress=progress and f"{progress}, {stage}", **looks)  # fmt: skip


@dataclass
class Stage:
    """What a stage left behind: its name, the weights (on the CPU) and its curves."""

    name: str
    weights: dict[str, Tensor]
    history: History


_KEPT: dict[tuple[Recipe, int, str], list[Stage]] = {}  # the newest few, see `before_pairs`


def before_pairs(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> list[Stage]:
    """The stages before the pairs, one after the other. The newest are remembered: runs that differ in stage 3 alone
    start from the very same weights, and do not pay for them twice."""
    alone = replace(Recipe(), **{name: getattr(recipe, name) for name in ALONE})
    key = (alone, seed, str(device))
    if key in _KEPT:
        return _KEPT[key]
    minivlp.seed_everything(seed)
    model = build(recipe.model).to(device)
    done: list[Stage] = []
    for i, name in enumerate(recipe.before):
        if name == "labels":
            experiment, arm = lesson01.CHECKPOINTS["vit_normal"]
            vit = trained("vit_normal", ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
            start_from_vit(model, vit)
            history = History()
        else:
            freeze_for(model, name, recipe.before[:i])
            history = fit_stage(model, name, recipe, seed=seed, progress=progress)
        done.append(Stage(name, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}, history))
        if history.stopped:
            return done  # by hand: nothing to be remembered
    _KEPT[key] = done
    while len(_KEPT) > 8:
        del _KEPT[next(iter(_KEPT))]
    return done


def begin(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> tuple[VLMo, list[Stage]]:
    """The model as stage 3 gets it, and the stages that made it."""
    done = before_pairs(recipe, seed=seed, device=device, progress=progress)
    minivlp.seed_everything(seed)
    model = build(recipe.model).to(device)
    if done:
        model.load_state_dict(done[-1].weights)
    return model, done


def train(
    recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "VLMo", times: int = 3
) -> tuple[VLMo, History, list[Stage]]:
    """One run of a recipe: all its stages, the last one on pairs, looked at `times` during it. The seed fixes weights,
    order and draws. -> the model, stage 3's curves, and the stages before it."""
    model, done = begin(recipe, seed=seed, device=device, progress=progress)
    for stage in done:
        if stage.history.stopped:
            return model, stage.history, done
    freeze_for(model, "pairs", recipe.before)
    return model, fit_stage(model, "pairs", recipe, seed=seed, progress=progress, times=times), done


# --- measuring -------------------------------------------------------------------------------------------------------


def preference(model: VLMo, split: str = "test", *, how: str = "uniform", n: int = 256) -> float:
    """Share of `n` pages that ITM finds more likely with their own full caption than with a wrong one (chance 0.5),
    drawn anywhere or, "hard", by the model's own similarities, see `partners`."""
    data, own = pairs(split, n), torch.arange(n)
    held = states(model, data.images, [captions[4] for captions in data.captions])
    right, wrong = (matching(model, *held, own, texts) for texts in (own, partners(model, how, split, n=n)))
    return (right > wrong).float().mean().item()


def validation(recipe: Recipe, n: int = 200) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: R@1 by vectors, matching, and hidden colours, on `n` validation pages."""

    def measure(model: VLMo) -> dict[str, float]:
        numbers = {"val R@1": lesson03.mean_recall(lesson03.retrieval(model, "val", n=n))}
        if recipe.itm:
            numbers["val matching"] = preference(model, "val", n=n)
        if recipe.mlm:
            numbers["val colour"] = lesson02.grounding(model, "val", n=n, pictures=("true",))["colour, true picture"]
        return numbers

    return measure


def measure(model: VLMo, recipe: Recipe) -> dict[str, float]:
    """What is recorded of every arm, on the test split; `recipe.everything` adds what only the main run needs."""
    found = lesson03.retrieval(model)
    numbers = found | {"R@1": lesson03.mean_recall(found)}
    if recipe.mlm:
        numbers |= lesson02.grounding(model, pictures=("true", "shuffled", "blank") if recipe.everything else ("true",))
    if recipe.itm:
        numbers |= {f"matching, {name} partners": preference(model, how=how)
                    for name, how in (("random", "uniform"), ("hard", "hard"))}  # fmt: skip
        for kind in PROBES if recipe.everything else ("replaced", "attribute_swap"):
            numbers |= lesson05.probes(model, kind, n=300 if recipe.everything else 150)
    if recipe.everything:
        numbers |= lesson05.searches(model, n=100, k=8)
        found = lesson05.searches(model, n=1000, k=8, every=False)
        numbers |= {f"{name}, 1,000": value for name, value in found.items()}
        numbers |= {"zero-shot kind": lesson03.zero_shot_kind(model, tier="normal", n=400)}
        numbers |= attention_of(model)
    return numbers


PROBES = ("replaced", "attribute_swap", "order_swap", "count")
LOOKS = ("text at text", "text at image", "image at text", "image at image")


def attention_of(model: VLMo, *, n: int = 200) -> dict[str, float]:
    """Where each block looks in true pairs (full captions): the four shares of `attention_shares`, by block."""
    data = pairs("test", n)
    ids, mask = words().encode_batch([captions[4] for captions in data.captions])
    device = next(model.parameters()).device
    with evaluating(model):
        _, named = model(data.images.to(device), ids.to(device), mask.to(device), everything=True)
    return {f"block {i}, {name}": share.item() for i in range(model.config.depth) for name, share in
            zip(LOOKS, attention_shares(named[f"attention_{i}"], mask.to(device)), strict=True)}  # fmt: skip


def parts_of(model: VLMo) -> dict[str, list[nn.Parameter]]:
    """The parameters of the blocks by what they belong to: "attention" (with its LayerNorm and the layer scales) and
    the experts."""
    parts: dict[str, list[nn.Parameter]] = {"attention": []}
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            expert = name.split(".")[1] if name.startswith("experts.") else "attention"
            parts.setdefault(expert, []).append(parameter)
    return parts


def gradient_norms(model: VLMo, losses: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """For each loss, how strongly it pulls at each of `parts_of`: its gradient's norm there, 0 where none comes."""

    def norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
        free = [p for p in parameters if p.requires_grad]
        slopes = torch.autograd.grad(loss, free, retain_graph=True, allow_unused=True) if free else ()
        return sum((slope.float().square().sum().item() for slope in slopes if slope is not None), 0.0) ** 0.5

    return {name: {part: norm(loss, own) for part, own in parts_of(model).items()} for name, loss in losses.items()}


def changed_tensors(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that differ in any bit."""
    return [name for name, tensor in before.items() if not torch.equal(tensor.cpu(), after[name].cpu())]


def picture_accuracy(model: VLMo, recipe: Recipe, *, n: int = 300) -> float:
    """Share of covered patches of `n` validation pictures whose code is guessed: what stage 1 learned."""
    images = pairs("val", n).images
    grid, device = recipe.model.image_config().grid, next(model.parameters()).device
    hidden = hide_blocks(n, grid, generator=torch.Generator().manual_seed(0), share=recipe.covered)
    with evaluating(model):
        states_ = model.image_states(images.to(device), hidden=hidden.to(device))[:, 1:]
        guesses = model.mim_head(states_[hidden.to(device)]).argmax(-1).cpu()
    return (guesses == codes_of(recipe, images)[hidden]).float().mean().item()


def frozen_answers(model: VLMo, recipe: Recipe, *, n: int = 250) -> dict[str, dict[str, float]]:
    """Can a question be answered from two vectors? What `ridge_probe` reads from frozen states: the question's class
    token (D), the class tokens of picture and question side by side (2 D), or the pair's pooled token (D). Fitted on
    the questions about the pages of stage 3 -> `answered_right` on the questions about `n` test pages, for each of
    the three."""
    device = next(model.parameters()).device
    asked_of = asked("train", recipe.pairs), asked("test", n)
    features: dict[str, list[Tensor]] = {}
    with evaluating(model):
        for q, images in zip(asked_of, (pages(recipe, "pairs").images, pairs("test", 1000).images), strict=True):
            parts: dict[str, list[Tensor]] = {"the question alone": [], "two class tokens": [], "the pooled pair": []}
            seen = torch.cat([model.image_states(part.to(device), rows=1)[:, 0] for part in images.split(500)])  # once
            for rows in torch.arange(len(q.rows)).split(500):
                ids, mask = q.ids[rows].to(device), q.mask[rows].to(device)
                question, pages_of = model.text_states(ids, mask, rows=1)[:, 0], q.rows[rows]
                pooled, _ = model(images[pages_of].to(device), ids, mask, rows=1)
                apart = torch.cat([seen[pages_of.to(device)], question], dim=1)
                for name, states_ in zip(parts, (question, apart, pooled), strict=True):
                    parts[name].append(states_.cpu())
            for name, found in parts.items():
                features.setdefault(name, []).append(torch.cat(found))
    answers = {}
    for name, (train, test) in features.items():
        scores = ridge_probe(train, asked_of[0].answers, test, classes=len(ANSWERS), l2=0.01)
        answers[name] = lesson02.answered_right(scores.argmax(-1), asked_of[1])
    return answers


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def questions(model: VLMo, recipe: Recipe, *, seed: int, blank: bool = False, progress: str | None = None) -> VLMo:
    """A copy tuned for questions (paper, 4.1: VQA) about the pages of stage 3 alone; `blank` hides the pictures."""
    how = replace(lesson02.MAIN, train_size=recipe.pairs, batch_size=recipe.batch_size // 2, lr=recipe.lr / 2)
    return lesson02.learn_to_answer(model, how, seed=seed, steps=recipe.tune, blank=blank, pages=recipe.pairs,
                                    progress=progress)[0]  # fmt: skip


@lru_cache(maxsize=4)
def told(split: str, n: int) -> tuple[Statement, ...]:
    """Statements about two of the first `n` pages of a split."""
    return tuple(statements(pairs(split, n).scenes))


class StatementBatches:
    """Sentences about two pictures, in an order that the seed fixes."""

    def __init__(self, split: str, n: int, *, batch_size: int, seed: int = 0) -> None:
        self.images, found = pairs(split, n).images, told(split, n)
        self.ids, self.mask = words().encode_batch([s.text for s in found])
        self.left, self.right, self.truth = (torch.tensor([getattr(s, name) for s in found]).long()
                                             for name in ("left", "right", "truth"))  # fmt: skip
        self.order = Batches((torch.arange(len(found)),), batch_size=batch_size, seed=seed)

    def chosen(self, rows: Tensor) -> tuple[Tensor, ...]:
        """-> left and right pictures (B, C, H, W), ids and mask (B, L), truth (B)."""
        L = int(self.mask[rows].sum(1).max())
        pictures = self.images[self.left[rows]], self.images[self.right[rows]]
        return *pictures, self.ids[rows, :L], self.mask[rows, :L], self.truth[rows]

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        return self.chosen(self.order.indices(step))


def statement_loss(model: TwoPictures, left: Tensor, right: Tensor, ids: Tensor, mask: Tensor, truth: Tensor) -> Tensor:
    return F.cross_entropy(model(left, right, ids, mask).float(), truth)


def two_pictures(model: VLMo, recipe: Recipe, *, seed: int, progress: str | None = None) -> TwoPictures:
    """A copy tuned for statements about two pictures (paper, 4.1: NLVR2), of the pages of stage 3 alone."""
    minivlp.seed_everything(seed)
    tuned = TwoPictures(model).to(next(model.parameters()).device)
    history = fit(
        tuned, StatementBatches("train", recipe.pairs, batch_size=recipe.batch_size, seed=seed), statement_loss,
        steps=recipe.tune, lr=recipe.lr / 2, weight_decay=recipe.weight_decay, progress=progress,
    )  # fmt: skip
    if history.stopped and progress is None:
        raise KeyboardInterrupt  # half a fine-tuning is no result
    return tuned


def statements_right(model: TwoPictures, split: str = "test", *, n: int = 500, batch_size: int = 250) -> float:
    """Accuracy on the statements about the first `n` pages of a split; a reader without pictures is right in half."""
    data, device, right = StatementBatches(split, n, batch_size=1), next(model.parameters()).device, []
    with evaluating(model):
        for rows in torch.arange(len(data.truth)).split(batch_size):
            *batch, truth = (t.to(device) for t in data.chosen(rows))
            right.append(model(*batch).argmax(-1) == truth)
    return torch.cat(right).float().mean().item()


def tuned_numbers(model: VLMo, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """Accuracy after fine-tuning the same weights for each of two other tasks."""
    numbers = {"two pictures": statements_right(two_pictures(model, recipe, seed=seed))}
    for name, blank in (("VQA", False), ("VQA, question alone", True)):
        found = lesson02.answers_of(questions(model, recipe, seed=seed, blank=blank), blank=blank)
        numbers[name] = lesson02.answered_right(found, asked("test", 500))["all"]
    return numbers


# --- the runs --------------------------------------------------------------------------------------------------------


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, then measure on the test split: what the recorder keeps of one arm and seed. The curves are stage 3's,
    and with them the losses of the stages before, each counted from its own first step."""
    model, history, done = train(recipe, seed=seed, device=device, progress=progress)
    if history.stopped:
        return Run(model, history, {})
    numbers = measure(model, recipe)
    if recipe.tune:
        numbers |= tuned_numbers(model, recipe, seed=seed)
    for stage in done:
        for name, values in stage.history.losses.items():
            history.losses[f"{stage.name}: {name}"], history.began[f"{stage.name}: {name}"] = values, 0
    return Run(model, history, numbers)


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    pairs("train", MAIN.pairs + 2 * MAIN.unpaired)
    pairs("train", MAIN.pairs)
    for split, n in (("val", 200), ("val", 300), ("test", 100), ("test", 200), ("test", 256), ("test", 500),
                     ("test", 1000)):  # fmt: skip
        pairs(split, n)
    lesson03.single_things("test", n=400, tier="normal")
    for kind in PROBES:
        probe_pairs(kind)


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000, by vectors (R@1, chance 0.001)": ("main", "VLMo", "R@1 text to image"),
    "... the 8 best by vectors re-ranked by the same weights as fusion encoder":
        ("main", "VLMo", "re-ranked, text to image, 1,000"),
    "the full caption of a picture, among 1,000, by vectors": ("main", "VLMo", "R@1 image to text"),
    "more likely with its own caption than with another page's (chance 0.5)":
        ("main", "VLMo", "matching, random partners"),
    "hidden colour word, its picture shown": ("main", "VLMo", "colour, true picture"),
    "hidden colour word, another picture shown": ("main", "VLMo", "colour, shuffled picture"),
    "answers to questions, tuned on 1,000 pages": ("tuning", "500 steps", "VQA"),
    "... tuned on the questions alone": ("tuning", "500 steps", "VQA, question alone"),
    "statements about two pictures (chance 0.5)": ("tuning", "500 steps", "two pictures"),
    "captions with exchanged attributes, by fusion (chance 0.5)": ("main", "VLMo", "attribute_swap, ITM"),
}  # fmt: skip
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "one set of weights finds the picture of a caption among 1,000 ({} by its vectors) and answers questions ({})",
    ("main", "VLMo", "R@1 text to image"), ("tuning", "500 steps", "VQA"),
)  # fmt: skip
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "VLMo", "R@1 text to image"),
    "R@1 image to text": ("main", "VLMo", "R@1 image to text"),
    "zero-shot kind": ("main", "VLMo", "zero-shot kind"),
    "VQA": ("tuning", "500 steps", "VQA"),
    "VQA, question alone": ("tuning", "500 steps", "VQA, question alone"),
    "attribute swap": ("main", "VLMo", "attribute_swap, ITM"),
    "order swap": ("main", "VLMo", "order_swap, ITM"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
SCARCE = f"VLMo: trained with the captions of {MAIN.pairs:,} pages, where lessons 02 to 05 had 20,000."
NOTES = {
    **dict.fromkeys(("R@1 text to image", "R@1 image to text", "zero-shot kind"), SCARCE),
    "training seconds": "VLMo: stages 2 and 3, measured over a few steps of each, without evaluation, and scaled up; "
    "lesson 01's training, which stands for stage 1, is not in it.",
    "VQA": f"VLMo: tuned on the questions about {MAIN.pairs:,} pages, ViLT on those about 6,000.",
    **dict.fromkeys(("attribute swap", "order swap"), "VLMo: by ITM, as a fusion encoder."),
    "ms for 1,000 x 1,000 pairs": "VLMo: as a dual encoder, from pixels and words on.",
}  # fmt: skip


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": count_parameters(VLMo(MAIN.model))}


GALLERIES = {"fusion": (8, 16, 32, 64), "dual": (64, 128, 256, 512, 1000)}


def ways_to_search(model: VLMo, way: str, sizes: Sequence[int]) -> dict[str, Callable[[], object]]:
    """For each size n, a function that compares n test pages with n full captions: "fusion" of every pair, or "dual",
    vectors and one product; both from pixels and words on."""

    def search(n: int) -> Tensor:
        data = pairs("test", 1000)
        texts = [captions[4] for captions in data.captions[:n]]
        if way == "fusion":
            return lesson05.all_pairs(model, data.images[:n], texts)
        return lesson03.image_vectors(model, data.images[:n]) @ lesson03.text_vectors(model, texts).T

    return {f"{way}, {n}": partial(search, n) for n in sizes}


CLOCK_STEPS = 8


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine: milliseconds of a step of each stage, seconds to search among n pages both
    ways, "training seconds" of the main recipe, and "ms for 1,000 x 1,000 pairs"."""
    steps, model = {}, build(MAIN.model).to(device).train()
    for stage, batches, loss in (
        ("image", ImageBatches(pages(MAIN, "image").images[:500], MAIN, seed=0), image_loss),
        ("text", TextBatches(pages(MAIN, "text").subset(slice(500)), MAIN, seed=0), text_loss),
        ("pairs", PairBatches(pages(MAIN, "pairs"), MAIN, seed=0), loss_of(MAIN)),
    ):
        ready = [[t.to(device) for t in batches(step)] for step in range(CLOCK_STEPS)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
        steps[stage] = partial(lesson05.take_steps, model, optimizer, loss, ready)
    seconds = {name: statistics.median(times) / CLOCK_STEPS for name, times in take_turns(steps, rounds=4).items()}
    model = build(MAIN.model).to(device).eval()
    ways = ways_to_search(model, "fusion", GALLERIES["fusion"]) | ways_to_search(model, "dual", GALLERIES["dual"])
    searched = {name: statistics.median(times) for name, times in take_turns(ways, rounds=3).items()}
    counts = {"image": MAIN.image_steps, "text": MAIN.text_steps, "pairs": MAIN.steps}
    trained_here = [*(stage for stage in MAIN.before if stage in counts), "pairs"]
    return {f"ms, step, {name}": 1000 * value for name, value in seconds.items()} | {
        f"seconds, {name}": value for name, value in searched.items()
    } | {
        "training seconds": sum(counts[name] * seconds[name] for name in trained_here),
        "ms for 1,000 x 1,000 pairs": 1000 * searched["dual, 1000"],
    }  # fmt: skip
