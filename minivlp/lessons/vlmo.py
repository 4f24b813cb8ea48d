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
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.data import CaptionBatches, PairTensors, PatchCodes, TokenTable, hide_blocks, mask_words
from minivlp.layers import patchify, to_float_pixels
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.albef import belong, sayings
from minivlp.lessons.vilt import pairs, words
from minivlp.lessons.vit import Run
from minivlp.losses import contrastive_loss, hard_negatives, masked_lm_loss
from minivlp.models.vit import ViT
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.train import History, evaluating, fit, trained

NAME = "06_vlmo"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"vlmo": ("main", "VLMo")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: VLMoConfig = field(default_factory=VLMoConfig)
    before: tuple[str, ...] = ("image", "text")  # the stages before the pairs, in their order
    pairs: int = 1_000  # pages of which picture and captions are known: the scarce data
    unpaired: int = 9_500  # pages of which only the picture is used, and as many others of which only the captions are
    image_steps: int = 300  # of stage 1
    text_steps: int = 300  # of stage 2
    steps: int = 300  # of stage 3
    single_batch: int = 64  # pictures or texts a step in stages 1 and 2
    batch_size: int = 32  # pairs a step in stage 3
    single_lr: float = 1e-3
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    levels: tuple[int, ...] = (1, 1, 4)  # which of the five captions in stage 3; one level a batch
    share: float = 0.5  # of the words, hidden for MLM (the paper: 0.15 of much longer texts)
    text_share: float = 0.3
    covered: float = 0.4  # of the patches, in stage 1
    itm: bool = True
    mlm: float = 0.25  # weight of MLM in stage 3 (official code); 0: without
    chunks: int = 1  # simulated GPUs: wrong partners come from the own one alone; 1: from everywhere ("global")
    everything: bool = False  # also measure what only the main run needs


MAIN = Recipe(everything=True)


# --- data ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def pages() -> PairTensors:
    return pairs("train", 20_000)


def paired(recipe: Recipe) -> PairTensors:
    """The pages of stage 3."""
    return pages().subset(slice(recipe.pairs))


def alone(recipe: Recipe, what: str) -> PairTensors:
    """The pages of stage 1 ("image": their pictures are used) or stage 2 ("text": their captions): all different ones,
    and none of stage 3's."""
    first = recipe.pairs + (0 if what == "image" else recipe.unpaired)
    return pages().subset(slice(first, first + recipe.unpaired))


@lru_cache(maxsize=2)
def patch_codes(config: VLMoConfig, recipe: Recipe) -> PatchCodes:
    """The codebook of stage 1, made of 2,000 of its pictures."""
    some = alone(recipe, "image").images[:2_000]
    return PatchCodes.fit(patchify(to_float_pixels(some), config.patch_size).flatten(0, 1), codes=config.codes)


class ImageBatches:
    def __init__(self, recipe: Recipe, *, seed: int) -> None:
        self.recipe, self.images = recipe, alone(recipe, "image").images
        c = recipe.model
        codes = patch_codes(c, recipe)
        self.codes = torch.cat([codes(patchify(to_float_pixels(p), c.patch_size)) for p in self.images.split(500)])
        self.order = CaptionBatches.__new__(CaptionBatches)
        from minivlp.data import Batches
        self.order = Batches((torch.arange(len(self.images)),), batch_size=recipe.single_batch, seed=seed)
        self.seed = seed

    def __call__(self, step):
        rows = self.order.indices(step)
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32 ^ 0x5EED)
        grid = self.recipe.model.image_config().grid
        return self.images[rows], hide_blocks(len(rows), grid, generator=g, share=self.recipe.covered), self.codes[rows]


def mim_loss(model, images, hidden, codes):
    states = model.image_states(images, hidden=hidden)[:, 1:]
    return {"mim": F.cross_entropy(model.mim_head(states[hidden]).float(), codes[hidden])}


class TextBatches(CaptionBatches):
    def __init__(self, recipe, *, seed):
        data = alone(recipe, "text")
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.single_batch, seed=seed)
        self.recipe = recipe

    def __call__(self, step):
        g = self.generator(step)
        level = (1, 1, 2, 4)[int(torch.randint(4, (), generator=g))]
        ids, mask = self.table(self.order.indices(step), level)
        return (*mask_words(ids, words(), generator=g, share=self.recipe.text_share), mask)


def text_loss(model, hidden, labels, mask):
    return {"mlm": masked_lm_loss(model.mlm_head, model.text_states(hidden, mask), labels)}


class PairBatches(CaptionBatches):
    def __init__(self, recipe: Recipe, *, seed: int) -> None:
        data = paired(recipe)
        super().__init__(data.images, TokenTable(data.captions, words()), batch_size=recipe.batch_size, seed=seed)
        self.recipe, self.levels = recipe, sorted(set(recipe.levels))
        self.sayings = sayings(data, self.levels)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        r, generator = self.recipe, self.generator(step)
        level = r.levels[int(torch.randint(len(r.levels), (), generator=generator))]
        rows = self.order.indices(step)
        ids, mask = self.table(rows, level)
        hidden, labels = mask_words(ids, words(), generator=generator, share=r.share)
        shows = self.sayings[rows]
        return self.images[rows], ids, mask, hidden, labels, belong(shows, shows[:, self.levels.index(level)]), torch.rand(2, len(rows), generator=generator)


def vlmo_loss(model: VLMo, images, ids, mask, hidden, labels, same, noise, *, itm=True, mlm=0.25, chunks=1):
    image, text = model.embed.look(images), model.embed.read(ids)
    towers = model.towers(image, "image"), model.towers(text, "text", mask[:, None, None])
    scales = {"itc": model.logit_scale, "itc_vl": getattr(model, "logit_vl_scale", None)}
    losses = {}
    n = len(towers[0])
    for head in towers[0]:
        logits = scales[head].exp() * towers[0][head] @ towers[1][head].T
        losses[head] = contrastive_loss(logits, same) / n
        if head == "itc":
            similarity = logits.detach()
    B = len(ids)
    if itm:
        chunk = torch.arange(B, device=ids.device) * chunks // B
        forbidden = same | (chunk[:, None] != chunk)
        other_text = hard_negatives(similarity, forbidden, noise[0])
        other_image = hard_negatives(similarity.T, forbidden.T, noise[1])
        pooled, _ = model.fuse(torch.cat([text, text[other_text], text]), torch.cat([image, image, image[other_image]]),
                               torch.cat([mask, mask[other_text], mask]), rows=1)
        labels_ = torch.cat([torch.ones(B), torch.zeros(2 * B)]).long().to(ids.device)
        losses["itm"] = F.cross_entropy(model.itm_head(pooled).float(), labels_)
    if mlm:
        _, named = model.fuse(model.embed.read(hidden), image, mask, rows=ids.shape[1])
        losses["mlm"] = mlm * masked_lm_loss(model.mlm_head, named["text"], labels)
    return losses


def moves_in_stage_2(name: str) -> bool:
    return name.startswith(("embed.text.", "embed.types.", "mlm_head.", "norm.")) or ".experts.text." in name


def train(recipe: Recipe, *, seed: int, device=torch.device("cpu"), progress=None, times=2):
    minivlp.seed_everything(seed)
    model = VLMo(recipe.model).to(device)
    histories = {}
    def go(name, batches, loss, steps, lr, **how):
        histories[name] = fit(model, batches, loss, steps=steps, lr=lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup, betas=(0.9, 0.98), progress=progress, **how)
    for stage in recipe.before:
        if stage == "labels":
            vit = trained("vit_normal", ViT(lesson01.EXPERIMENTS[lesson01.CHECKPOINTS["vit_normal"][0]][lesson01.CHECKPOINTS["vit_normal"][1]].model), own=False)
            model.embed.image.load_state_dict(vit.embed.state_dict())
            for b, v in zip(model.blocks, vit.encoder.blocks):
                b.norm1.load_state_dict(v.norm1.state_dict()); b.attn.load_state_dict(v.attn.state_dict())
                b.experts["image"].norm.load_state_dict(v.norm2.state_dict()); b.experts["image"].mlp.load_state_dict(v.mlp.state_dict())
                if b.gamma_1 is not None:
                    b.gamma_1.data.fill_(1); b.gamma_2.data.fill_(1)
            model.norm.load_state_dict(vit.encoder.norm.state_dict())
        if stage == "image":
            go("image", ImageBatches(recipe, seed=seed), mim_loss, recipe.image_steps, recipe.single_lr)
        if stage == "text":
            if any(s in recipe.before for s in ("image", "labels")):
                for n, p in model.named_parameters():
                    p.requires_grad_(moves_in_stage_2(n))
            go("text", TextBatches(recipe, seed=seed), text_loss, recipe.text_steps, recipe.single_lr)
            model.requires_grad_(True)
    if recipe.steps:
        go("pairs", PairBatches(recipe, seed=seed), partial(vlmo_loss, itm=recipe.itm, mlm=recipe.mlm, chunks=recipe.chunks),
           recipe.steps, recipe.lr, evaluate=validation(), evaluate_every=max(1, recipe.steps // times))
    return model, histories


def validation(n: int = 300):
    def measure(model):
        found = lesson03.retrieval(model, "val", n=n)
        g = lesson02.grounding(model, "val", n=n, pictures=("true",))
        return {"R1": (found["R@1 text to image"] + found["R@1 image to text"]) / 2, "R5": (found["R@5 text to image"] + found["R@5 image to text"]) / 2,
                "match": lesson02.matching_accuracy(model, "val", n=n, level=4), "prefer": prefer(model, n=n),
                "noun": g["noun, true picture"], "col": g["colour, true picture"]}
    return measure


def prefer(model, split="val", n=300):
    data = pairs(split, n)
    ids, mask = TokenTable(data.captions, words())(torch.arange(len(data)), 4)
    return (lesson02.matching(model, data.images, ids, mask) > lesson02.matching(model, data.images.roll(1, dims=0), ids, mask)).float().mean().item()
