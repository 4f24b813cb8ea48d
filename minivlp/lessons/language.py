"""The ready-made parts of lesson 08: language models that learn from the course's texts alone, captions, questions and
answers, and never see a picture. Two mouths stand in for OPT and FlanT5, and the words of a Q-Former for BERT.

    python -m minivlp.lessons.language

trains them all again, about 20 minutes on two cores, and writes them to `data/checkpoints`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp import DATA
from minivlp.data import Batches
from minivlp.data.picturebook.describe import captions
from minivlp.data.picturebook.questions import questions
from minivlp.data.picturebook.sample import sample
from minivlp.data.text import pad
from minivlp.generate import greedy
from minivlp.lessons.vilt import words
from minivlp.losses import masked_lm_loss, next_words
from minivlp.models.blip2 import BLIP2, QFormerConfig
from minivlp.models.lm import DecoderLM, EncoderDecoderLM, LMConfig
from minivlp.train import History, evaluating, fit, save_weights, trained


@dataclass(frozen=True)
class LanguageRecipe:
    """All that fixes a language model but its seed."""

    kind: str = "decoder-only"  # or "encoder-decoder"; "words", those of a Q-Former, read from left to right
    model: LMConfig | QFormerConfig = field(default_factory=LMConfig)
    pages: int = 12_000  # scenes that are told of and never drawn
    steps: int = 1_500
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05


# name of the kept weights -> recipe
READY_MADE = {
    "mouth": LanguageRecipe(),
    "mouth_worse": LanguageRecipe(steps=500),  # the same, stopped early
    "mouth_prefix": LanguageRecipe("encoder-decoder", lr=1e-3),
    "qformer_words": LanguageRecipe("words", QFormerConfig(), lr=1e-3),
}


def build(recipe: LanguageRecipe) -> nn.Module:
    """A new language model."""
    if recipe.kind == "words":
        return BLIP2(recipe.model, None)
    return (DecoderLM if recipe.kind == "decoder-only" else EncoderDecoderLM)(recipe.model)


def ready_made(name: str) -> nn.Module:
    """A kept language model, in eval mode. Raises CheckpointError if there is none."""
    return trained(name, build(READY_MADE[name]), own=False)


# What is told of one scene: its full caption, then what follows from it: pairs of a question and its answer, or of
# nothing and another caption.
Telling = tuple[str, list[tuple[str, str]]]


@lru_cache(maxsize=2)
def tellings(n: int, *, first: int = 200_000) -> list[Telling]:
    """`n` scenes in words, far from all pages that are ever drawn."""
    told = []
    for index in range(first, first + n):
        scene, draw = sample(index, split="train", tier="normal", seed=0), random.Random(index)
        sentences = captions(scene)
        asked = [(item.question, item.answer) for item in questions(scene)]
        items = [*draw.sample(asked, min(len(asked), 4)), ("", draw.choice(sentences))]
        draw.shuffle(items)
        told.append((sentences[4], items))
    return told


def pieces(texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text without [CLS] and [SEP]; none of an empty one."""
    full = iter(words().encode_batch([text for text in texts if text])[0].tolist()) if any(texts) else iter(())
    special = {words().pad_id, words().cls_id, words().sep_id}
    return [[i for i in next(full) if i not in special] if text else [] for text in texts]


class LanguageBatches:
    """Tellings as batches, a row a scene; which ones is drawn from `(seed, step)`.

    Decoder-only, or words: every sentence from [DEC] to [SEP], the full caption first. Encoder-decoder: the encoder
    reads the full caption, [SEP], and the question of one item (or the beginning of the other caption, cut anywhere);
    the decoder writes the rest of that item, then the others whole. One row in ten has no full caption in which things
    could be looked up.
    """

    group = 4  # batches are drawn together and cut by length, so that little is spent on padding

    def __init__(self, recipe: LanguageRecipe, *, seed: int, told: list[Telling] | None = None) -> None:
        told, w, draw = tellings(recipe.pages) if told is None else told, words(), random.Random(seed)
        contexts = pieces([context for context, _ in told])
        flat = [item for _, items in told for item in items]
        asked, said = iter(pieces([prompt for prompt, _ in flat])), iter(pieces([text for _, text in flat]))
        read, written = [], []
        for context, (_, items) in zip(contexts, told, strict=True):
            start = [*context, w.sep_id] if draw.random() < 0.9 else []
            (prompt, text), *others = [(next(asked), next(said)) for _ in items]
            rest = [token for p, t in others for token in (w.dec_id, *p, *t, w.sep_id)]
            if recipe.kind != "encoder-decoder":
                written.append([*([w.dec_id] if start else []), *start, w.dec_id, *prompt, *text, w.sep_id, *rest])
                continue
            if not prompt:
                cut = draw.randrange(len(text))
                prompt, text = text[:cut], text[cut:]
            read.append([*start, *prompt] or [w.sep_id])
            written.append([w.dec_id, *text, w.sep_id, *rest])
        self.tables = [pad(rows, w.pad_id) for rows in (written, read) if rows]
        self.lengths, self.seed = self.tables[0][1].sum(1), seed
        self.order = Batches((self.lengths,), batch_size=self.group * recipe.batch_size, seed=seed)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """-> ids and mask (B, L) of what is written, and for an encoder-decoder also of what is read."""
        group, place = divmod(step, self.group)
        drawn = self.order.indices(group)
        turn = torch.randperm(self.group, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + group))
        chosen = drawn[self.lengths[drawn].argsort(stable=True)].view(self.group, -1)[turn[place]]
        batch = []
        for ids, mask in self.tables:
            L = int(mask[chosen].sum(1).max())
            batch += [ids[chosen, :L], mask[chosen, :L]]
        return tuple(batch)


def language_loss(
    model: nn.Module, ids: LongTensor, mask: Tensor, read: Tensor | None = None, there: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each next token of what is written (B, L), after what is `read` (B, L') if anything is."""
    states = model.write(ids, None, **({} if read is None else {"prompt": read, "prompt_mask": there}))
    return masked_lm_loss(model.lm_head, states, next_words(ids, mask))


def learn_language(
    recipe: LanguageRecipe, *, seed: int, device: torch.device | None = None, progress: str | None = "words alone"
) -> tuple[nn.Module, History]:
    """A new language model, trained on tellings."""
    minivlp.seed_everything(seed)
    model = build(recipe).to(device)
    history = fit(model, LanguageBatches(recipe, seed=seed), language_loss, steps=recipe.steps, lr=recipe.lr,
                  weight_decay=recipe.weight_decay, progress=progress)  # fmt: skip
    return model, history


# --- measuring -------------------------------------------------------------------------------------------------------

LONGEST_ANSWER = 8  # tokens


def by_length(rows: Sequence[Sequence[int]]) -> list[tuple[list[int], LongTensor]]:
    """Rows of one length together, since a decoder-only model is prompted without padding: their numbers, and ids."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    return [(at, torch.tensor([rows[i] for i in at])) for at in groups.values()]


def answers_after(
    model: nn.Module, prompts: Sequence[list[int]], *, prefix: Tensor | None = None, longest: int = LONGEST_ANSWER
) -> list[str]:
    """What a language model writes after each of M prompts, lists of ids, most likely word by most likely word, and
    after `prefix` (M, P, D) if there is one. A decoder-only model's prompts begin with [DEC]."""
    w, device, found = words(), next(model.parameters()).device, [""] * len(prompts)
    with evaluating(model):
        for at, ids in by_length(prompts):
            for part, some in zip(torch.tensor(at).split(500), ids.to(device).split(500), strict=True):
                before = None if prefix is None else prefix[part].to(device)
                speaker = model.speaker(before, prompt=some)
                first = torch.full_like(some[:, 0], w.dec_id) if model.has_encoder else some[:, -1]
                for i, row in zip(part.tolist(), greedy(speaker, first, end=w.sep_id, longest=longest), strict=True):
                    found[i] = w.decode(row)
    return found


def prompts_of(model: nn.Module, questions: Sequence[str], contexts: Sequence[str] | None = None) -> list[list[int]]:
    """Questions as prompts, each after a sentence that is told before it, if there are `contexts`."""
    w, asked = words(), pieces(questions)
    told = [[] for _ in asked] if contexts is None else [[*context, w.sep_id] for context in pieces(contexts)]
    if model.has_encoder:
        return [[*t, *q] for t, q in zip(told, asked, strict=True)]
    return [[*([w.dec_id, *t] if t else []), w.dec_id, *q] for t, q in zip(told, asked, strict=True)]


def answered(model: nn.Module, *, n: int = 150, told: bool = True) -> float:
    """Reading comprehension: the share of the questions about `n` new scenes that are answered right after their full
    captions, or, if not `told`, from the question alone. No picture is drawn."""
    told_of = tellings(n, first=900_000)
    asked = [(story, prompt, answer) for story, items in told_of for prompt, answer in items if prompt]
    stories, prompts, right = zip(*asked, strict=True)
    found = answers_after(model, prompts_of(model, prompts, stories if told else None))
    return sum(a == b for a, b in zip(found, right, strict=True)) / len(right)


def fluency(model: nn.Module, recipe: LanguageRecipe, *, n: int = 640) -> float:
    """Cross-entropy per token on new scenes."""
    batches, device = LanguageBatches(recipe, seed=0, told=tellings(n, first=900_000)), next(model.parameters()).device
    losses = []
    with evaluating(model):
        for step in range(batches.order.steps_per_epoch * batches.group):
            losses.append(language_loss(model, *(t.to(device) for t in batches(step))).item())
    return sum(losses) / len(losses)


def main() -> None:
    """Train all ready-made parts, one after the other, and keep them."""
    for name, recipe in READY_MADE.items():
        model, _ = learn_language(recipe, seed=0, progress=name)
        save_weights(model, DATA / "checkpoints" / f"{name}.safetensors", dtype=torch.float16)


if __name__ == "__main__":
    main()
