"""Checks for the exercises of lesson 02 (`notebooks/02_vilt.ipynb`, section 10).

As in lesson 01 each computes the usual wrong answers beside the right one and names the one that equals the learner's;
answers that are random are judged by what they do over many draws. Reading this file before you have tried gives the
answers away, though not in the words you would write.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.checks.core import Attempt, Slip, check, reseed, variants

SIGMAS = 5.0  # what luck may explain: a right answer strays further about once in two million times

# --------------------------------------------------------------------------------------------------------- 1 join


@check
def join(attempt: Attempt) -> str:
    """Exercise 1: mark each token with its modality, then put the picture behind the text (ViLT, eq. 1-3)."""
    # Texts as long as the pictures first: there a concatenation along a wrong dimension shows by its shape.
    settings = [(2, 5, 5, 8), (3, 4, 7, 6)]  # pairs, text tokens, image tokens, width
    for seed, (B, L, S, D) in enumerate(settings):
        generator = torch.Generator().manual_seed(seed)
        scale, shift = 1 + 0.5 * torch.randn(D, generator=generator), torch.randn(D, generator=generator)
        text = F.layer_norm(torch.randn(B, L, D, generator=generator), (D,), scale, shift)
        image = 2 * torch.randn(B, S, D, generator=generator)
        types = torch.randn(2, D, generator=generator)
        behind = "Put the image tokens behind the text tokens: dimension 1."
        hints = {
            (B, L, 2 * D): f"You joined them along the numbers of a token. {behind}",
            (2 * B, L, D): f"You joined them along the batch. {behind}",
            (2, B, L, D): f"You stacked them into a new dimension. {behind}",
            (B, 2, L, D): f"You stacked them into a new dimension. {behind}",
            (B, L, 2, D): f"You stacked them into a new dimension. {behind}",
            (B, L, D): f"You added them, or one of them is missing. {behind}",
            (B, L + S + 2, D): "The types are no tokens of their own: add them to the tokens.",
            (L + S, B, D): "The batch comes first.",
        }
        answer = attempt.tensor(attempt(text, image, types), (B, L + S, D), symbols="(B, L+S, D)", shapes=hints)

        def joined(
            *, marks: str = "right", how: str = "add", norm: str = "never", order: str = "text first",
            text: Tensor = text, image: Tensor = image, types: Tensor = types,
        ) -> Tensor:  # fmt: skip
            D, (zero, one) = text.shape[-1], types
            by_pair = types[torch.arange(len(text)) % 2][:, None]
            for_text, for_image = {
                "right": (zero, one),
                "swapped": (one, zero),
                "never": (zero * 0, zero * 0),
                "text alone": (zero, zero * 0),
                "image alone": (zero * 0, one),
                "0 twice": (zero, zero),
                "1 twice": (one, one),
                "both": (zero + one, zero + one),
                "by pair": (by_pair, by_pair),
            }[marks]
            if norm == "text":
                text = F.layer_norm(text, (D,))
            if norm == "image":
                image = F.layer_norm(image, (D,))
            text = text * for_text if how == "multiply" else text + for_text
            image = image * for_image if how == "multiply" else image + for_image
            if norm == "text after":
                text = F.layer_norm(text, (D,))
            x = torch.cat([text, image] if order == "text first" else [image, text], dim=1)
            return F.layer_norm(x, (D,)) if norm == "all" else x

        attempt.compare(answer, joined(), variants(joined, _JOIN_SLIPS))

    with torch.enable_grad():
        types.requires_grad_(True)
        attempt.learnable(attempt(text, image, types), "types")
    return f"right for {len(settings)} batches"


_JOIN_SLIPS = [
    Slip("marks", "swapped", "the types are swapped: row 0 of `types` marks text, row 1 marks image."),
    Slip("marks", "never", "the types are missing: the blocks could not tell words from patches. Add row 0 to every "
         "text token and row 1 to every image token."),
    Slip("marks", "text alone", "the image tokens bear no type: add row 1 of `types` to each of them."),
    Slip("marks", "image alone", "the text tokens bear no type: add row 0 of `types` to each of them."),
    Slip("marks", "0 twice", "all tokens get the same type, row 0. That marks nothing: image tokens get row 1."),
    Slip("marks", "1 twice", "all tokens get the same type, row 1. That marks nothing: text tokens get row 0."),
    Slip("marks", "both", "every token gets both types. Row 0 is for text alone, row 1 for image alone."),
    Slip("marks", "by pair", "the types are dealt out to the pairs of the batch, not to the modalities. types[0] is "
         "one vector (D): add it to every text token, and types[1] to every image token."),
    Slip("how", "multiply", "you multiply by the types. Add them, like positions."),
    Slip("order", "image first", "the image stands first. ViLT puts the text first, so that token 0 is its class "
         "token."),
    Slip("norm", "all", "you normalise the joined tokens. In ViLT only the text is normalised, and that is done "
         "already; the blocks normalise whatever they read."),
    Slip("norm", "text", "you normalise the text a second time: it comes normalised. Only add its type."),
    Slip("norm", "text after", "the text's LayerNorm comes after its type here. It has been applied already, and the "
         "type is added last, so that nothing distorts it."),
    Slip("norm", "image", "you normalise the image tokens. ViLT has no LayerNorm on that side."),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------- 2 choose_words


@check
def choose_words(attempt: Attempt) -> str:
    """Exercise 2: choose whole words to hide (ViLT, 3.3). Random, so judged by some 3,000 words at two shares."""
    groups = _numbered_words()
    B, L = groups.shape

    def run(seed: int, share: float = 0.4) -> tuple[Tensor]:
        hints = {
            (L,): "Every text needs its own choice.",
            (B, 1): "That is one answer for a whole text.",
            (B, L, 1): "Drop the last dimension.",
            (B, int(groups.max()) + 1): "That is one answer for each word. Give it to all tokens of the word.",
        }
        answer = attempt(groups, share, torch.Generator().manual_seed(seed))
        return (attempt.tensor(answer, (B, L), symbols="(B, L)", dtype=torch.bool, shapes=hints),)

    reseed(1)
    (many,), (few,) = run(0), run(0, 0.15)
    words = groups >= 0
    if not many.any():
        attempt.fail("nothing is chosen, although share=0.4: four words of ten should be.")
    if many.all():
        attempt.fail("every token is chosen, special tokens and padding included. Choose words with probability share.")
    if many[~words].all():
        attempt.fail(
            "the choice is the wrong way round: all special tokens and all padding are chosen. True must mark the "
            "words to hide."
        )
    if many[~words].any():
        attempt.fail(
            f"{many[~words].float().mean():.0%} of the special tokens and padding (-1 in `groups`) are chosen. They "
            "hide nothing that could be guessed: combine your choice with groups >= 0."
        )

    # (B, W) tables of words: how many tokens each has, and how many of these are chosen.
    W = int(groups.max()) + 1
    pieces, hits = (
        torch.zeros(B, W).scatter_add_(1, groups.clamp(min=0), which.float()) for which in (words, many & words)
    )
    _whole(attempt, groups, many, pieces, hits)
    _each_word_alike(attempt, pieces, hits > 0)
    first = words & (groups.roll(1, dims=1) != groups)
    rare, often = (chosen[first].float().mean().item() for chosen in (few, many))
    _word_shares(attempt, rare, often, int(first.sum()), always_one=bool(few.any(1).all()))
    attempt.repeatable(run, drawn="the words")
    return f"right for {int(first.sum()):,} words: {often:.0%} chosen at share=0.4, {rare:.0%} at share=0.15"


def _numbered_words() -> Tensor:
    """500 texts of 4 to 9 words of 1 to 3 pieces, as `Tokenizer.word_groups` numbers them: -1, 0, 1, 1, 2, ..., -1."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in torch.randint(4, 10, (500,), generator=generator).tolist():
        pieces = torch.multinomial(torch.tensor([0.6, 0.25, 0.15]), count, replacement=True, generator=generator) + 1
        numbers = torch.arange(count).repeat_interleave(pieces).tolist()
        rows.append([-1, *numbers, -1])
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def _whole(attempt: Attempt, groups: Tensor, chosen: Tensor, pieces: Tensor, hits: Tensor) -> None:
    """Fail when a word is chosen in part. `pieces` and `hits` (B, W): tokens of each word, and chosen ones."""
    partly = (hits > 0) & (hits < pieces)
    if not partly.any():
        return
    first = groups.roll(1, dims=1) != groups
    if not (chosen & ~first).any():
        attempt.fail(
            "only the first piece of a word is chosen, and the others give it away. Choose all pieces of the word."
        )
    if (chosen & ~first).sum() and not (chosen & first & _long(groups, pieces)).any():
        attempt.fail("the first piece of a word is never chosen with the others. Choose all pieces of the word.")
    part = partly.sum() / ((hits > 0) & (pieces > 1)).sum()
    attempt.fail(
        f"{part:.0%} of the chosen words of several pieces are chosen in part, so that the visible pieces give them "
        "away. Draw one random number for each word, not for each token, and let all its pieces use it."
    )


def _long(groups: Tensor, pieces: Tensor) -> Tensor:
    """True at tokens of words of several pieces: (B, L)."""
    return (groups >= 0) & (pieces.gather(1, groups.clamp(min=0)) > 1)


def _each_word_alike(attempt: Attempt, pieces: Tensor, hit: Tensor) -> None:
    """Fail unless each word meets the same luck, alone: `pieces` (B, W) of each word (0: no word), `hit` (B, W)."""
    W = pieces.shape[1]
    exists = pieces > 0
    counts, words = hit.sum(1), exists.sum(1)  # (B,)
    by_number = hit.sum(0) / exists.sum(0)  # (W,)
    if ((by_number == 0) | (by_number == 1)).all():
        attempt.fail(
            "the same words (by number) are chosen in every text. Draw for each text on its own: random numbers of "
            "shape (B, ...)."
        )
    if ((counts == 0) | (counts == words)).all():
        attempt.fail("of a text either all words are chosen or none. Draw for each word, not for each text.")
    if (counts == 1).all():
        attempt.fail(
            "every text has exactly one chosen word, whatever its length. Draw for each word on its own, with "
            "probability share."
        )

    numbers = torch.arange(W)
    never = {
        "the first word of a text is never chosen. Its number is 0: special tokens are those with -1, so ask for "
        "groups >= 0, not groups > 0.": numbers == 0,
        "the last word of a text is never chosen. Words are numbered from 0, so the last number counts, too: "
        "range(largest + 1).": numbers == words[:, None] - 1,
        f"the words with the largest number in the batch ({W - 1}) are never chosen. Words are numbered from 0, so "
        "there is one word more than the largest number says.": numbers == W - 1,
        "words of several pieces are never chosen. Choose all pieces of a word together.": pieces > 1,
        "words of a single piece are never chosen. They are words like the others.": pieces == 1,
    }
    for message, which in never.items():
        if not hit[which & exists].any():
            attempt.fail(message)

    share = (hit.sum() / exists.sum()).item()
    short, long = exists & (pieces == 1), exists & (pieces > 1)
    rates = [hit[which].float().mean().item() for which in (short, long)]
    if abs(rates[1] - rates[0]) > SIGMAS * math.sqrt(share * (1 - share) * (1 / short.sum() + 1 / long.sum())):
        how = "one of its pieces" if rates[1] > rates[0] else "all of its pieces"
        attempt.fail(
            f"words of several pieces are chosen with {rates[1]:.0%}, words of one piece with {rates[0]:.0%}. Do you "
            f"draw for each token, and take a word when {how} are drawn? Draw once for each word."
        )
    # How the number of chosen words differs from text to text, compared with independent draws (1, give or take 0.06).
    spread = ((counts - share * words) ** 2).sum() / (share * (1 - share) * words).sum()
    if spread < 0.7:
        attempt.fail(
            "every text has nearly the same part of its words chosen. `share` is a probability: draw for each word on "
            "its own, so that by luck a text may have many chosen words or none."
        )
    if spread > 1.4:
        attempt.fail("the words of a text are not chosen independently. Draw for each word on its own.")


def _word_shares(attempt: Attempt, rare: float, often: float, words: int, *, always_one: bool) -> None:
    """Fail when the parts of the words chosen at share 0.15 and 0.4 are off by more than luck explains."""

    def near(part: float, share: float) -> bool:
        return abs(part - share) < SIGMAS * math.sqrt(share * (1 - share) / words)

    if near(rare, 0.15) and near(often, 0.4):
        return
    if near(rare, 0.85) and near(often, 0.6):
        attempt.fail(
            "words are chosen with probability 1 - share. A random number of [0, 1) lies *below* share with "
            "probability share: use <, not >."
        )
    if near(rare, often):
        attempt.fail(
            f"`share` is ignored: you choose {often:.0%} of the words at share=0.4 and {rare:.0%} at share=0.15."
        )
    if always_one:
        attempt.fail(
            "every text has a chosen word, even at share=0.15, where about one text in three should have none by luck. "
            "Do not choose another word when none was drawn."
        )
    attempt.fail(
        f"you choose {often:.0%} of the words at share=0.4 and {rare:.0%} at share=0.15. Each word is chosen with "
        "probability share."
    )


# ----------------------------------------------------------------------------------------------- 3 matching_pairs


@check
def matching_pairs(attempt: Attempt) -> str:
    """Exercise 3: true and false pairs for image-text matching (ViLT, 3.2; official code: exactly half).

    Random, so judged by a thousand small batches.
    """
    n, batches = 6, 1000
    generator = torch.Generator().manual_seed(0)
    reseed(1)
    draws = [_pairs(attempt, n, generator) for _ in range(batches)]
    partner, match = (torch.stack(parts) for parts in zip(*draws, strict=True))  # (batches, n) each
    _labels(attempt, partner, match)
    _halves(attempt, match)
    _partners(attempt, partner, match)
    for other in (2, 64):
        _labels(attempt, *(answer[None] for answer in _pairs(attempt, other, generator)))
    attempt.repeatable(lambda seed: _pairs(attempt, 64, torch.Generator().manual_seed(seed)), drawn="the pairs")
    return f"right for {batches:,} batches of {n} pairs: half of them keep their picture, the others draw evenly"


def _pairs(attempt: Attempt, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One answer, `partner` and `match` (n,), after everything that can be seen without statistics."""
    answer = attempt(n, generator)
    if not isinstance(answer, tuple) or len(answer) != 2:
        attempt.fail("return two things, `partner, match`.")
    hints = {
        (n, n): "Not a table: the number of one picture for each pair.",
        (n, 1): "Drop the last dimension.",
        (n // 2,): "That is half of the pairs. Those that keep their picture stay in the batch, with their own number.",
    }
    partner, match = (
        attempt.tensor(part, (n,), symbols="(n,)", what=f"`{name}`", dtype=torch.long, shapes=hints)
        for name, part in zip(("partner", "match"), answer, strict=True)
    )
    if match.max() > 1 and ((partner == 0) | (partner == 1)).all():
        attempt.fail("the two answers are swapped: return `partner` first, then `match`.")
    if ((match != 0) & (match != 1)).any():
        attempt.fail("`match` must hold nothing but 1 (own picture) and 0 (another's picture).")
    if ((partner < 0) | (partner >= n)).any():
        attempt.fail(f"`partner` must hold numbers of pictures, 0 to n - 1. Yours reach from {partner.min()} to "
                     f"{partner.max()} at n = {n}.")  # fmt: skip
    return partner, match


def _labels(attempt: Attempt, partner: Tensor, match: Tensor) -> None:
    """Fail unless match (batches, n) is 1 exactly where partner (batches, n) is the own picture, at half the places."""
    n = partner.shape[1]
    own, kept = partner == torch.arange(n), match == 1
    counts = kept.sum(1)  # (batches,)
    if own.all():
        attempt.fail("every pair keeps its own picture. Half of them must get another's.")
    if (own == ~kept).all():
        attempt.fail("the labels are inverted: 1 says that text and picture match, 0 that they do not.")
    if (kept & ~own).any():
        attempt.fail(
            f"{(~own)[kept].float().mean():.0%} of the pairs with match 1 have got another's picture. Only those that "
            "keep their own match."
        )
    if (own & ~kept).any():
        attempt.fail(
            f"{own[~kept].float().mean():.0%} of the pairs with match 0 have drawn their own picture, and so they do "
            "match. Draw among the n - 1 others."
        )
    if (counts == n // 2).all():
        return
    if (counts >= n // 2).all() and counts.min() < counts.max():
        attempt.fail(
            "at least half of the pairs match, often more: some of the others have drawn their own picture. Draw among "
            "the n - 1 others, and then exactly half match."
        )
    if counts.min() < counts.max() and abs(counts.float().mean() / n - 0.5) < 0.05:
        attempt.fail(
            f"half of the pairs match on average, but from {counts.min()} to {counts.max()} of {n}: you toss a coin "
            "for each. Wanted is exactly half, at random places: torch.randperm."
        )
    attempt.fail(f"{counts.float().mean():.3g} of {n} pairs match on average. Wanted is half of them, {n // 2}.")


def _halves(attempt: Attempt, match: Tensor) -> None:
    """Fail when some halves, the places with match 1 in match (batches, n), come up more often than others."""
    batches, n = match.shape
    if (match == match[0]).all():
        which = "the first half" if match[0, : n // 2].all() else "the same half"
        attempt.fail(
            f"always {which} of the pairs matches. Draw its places anew each time: "
            "torch.randperm(n, generator=generator)[: n // 2]."
        )
    seen = (match * 2 ** torch.arange(n)).sum(1).unique(return_counts=True)[1]
    kinds = math.comb(n, n // 2)
    expected = batches / kinds
    uneven = ((seen - expected) ** 2).sum() / expected + (kinds - len(seen)) * expected  # chi squared
    if uneven > kinds - 1 + 1.5 * SIGMAS * math.sqrt(2 * (kinds - 1)):  # it has a longer tail than a bell curve
        attempt.fail(
            f"some halves come up more often than others: of the {kinds} that are possible at n = {n} yours had "
            f"{len(seen)}, the commonest {seen.max() / batches:.0%} of the time. Every choice of n / 2 places must be "
            "equally likely: torch.randperm(n, generator=generator)[: n // 2]."
        )


def _partners(attempt: Attempt, partner: Tensor, match: Tensor) -> None:
    """Fail unless the pairs with match 0 draw their pictures independently and evenly among the n - 1 others."""
    batches, n = partner.shape
    other = match == 0
    donor = partner[other].view(batches, n // 2)
    step = ((partner - torch.arange(n)) % n)[other].view(batches, n // 2)  # 1..n-1: how far away the picture comes from
    if (step == step[0, 0]).all():
        attempt.fail(
            f"everyone gets the picture {step[0, 0]} further on, each time (roll). The network would never meet any "
            "other false pair. Draw one of the n - 1 others."
        )
    if (step == step[:, :1]).all():
        attempt.fail(
            "within a batch everyone gets the picture the same number of steps further on. Draw for each pair on its "
            "own."
        )
    if (donor == donor[:, :1]).all():
        attempt.fail("all false pairs of a batch get the same picture. Draw for each pair on its own.")
    from_other = other.gather(1, partner)[other].float().mean()
    if from_other == 1:
        attempt.fail(
            "the pictures come from the false half alone: you shuffle it within itself. Those that keep their picture "
            "may lend it, too. Draw among all n - 1 others."
        )
    if from_other == 0:
        attempt.fail("the pictures come from the matching half alone. Draw among all n - 1 others.")
    if (donor.sort(1).values.diff(dim=1) > 0).all():
        attempt.fail(
            "no two pairs of a batch ever get the same picture: this is a permutation. Draw for each pair on its own, "
            "with torch.randint."
        )
    steps = torch.bincount(step.flatten(), minlength=n)[1:] / step.numel()  # (n-1,)
    fair, luck = 1 / (n - 1), SIGMAS * math.sqrt((n - 2) / (n - 1) ** 2 / step.numel())
    if (steps == 0).any():
        missing = int((steps == 0).nonzero()[0]) + 1
        attempt.fail(
            f"nobody ever gets the picture {missing} further on (of {n}). All n - 1 others must be possible; note that "
            "torch.randint(1, n, ...) never gives n."
        )
    if (steps - fair).abs().max() > luck:
        most = int(steps.argmax()) + 1
        attempt.fail(
            f"the picture {most} further on is drawn {steps.max():.0%} of the time, and each of the n - 1 others "
            f"should be {fair:.0%} of the time (n = {n}). Do you give it to those that have drawn their own? Draw "
            "among the others from the start."
        )
    mine, theirs = other.nonzero()[:, 1], donor.flatten()
    table = torch.bincount(mine * n + theirs, minlength=n * n).view(n, n) / torch.bincount(mine, minlength=n)[:, None]
    table.fill_diagonal_(fair)
    worst = int((table - fair).abs().argmax())
    if abs(table.flatten()[worst] - fair) > 1.3 * SIGMAS * math.sqrt((n - 2) / (n - 1) ** 2 / (batches / 2)):
        attempt.fail(
            f"pair {worst // n} draws picture {worst % n} {table.flatten()[worst]:.0%} of the time. Each of the n - 1 "
            f"others must be equally likely, {fair:.0%} at n = {n}."
        )


# ----------------------------------------------------------------------------------------------- 4 attention_mass


@check
def attention_mass(attempt: Attempt) -> str:
    """Exercise 4: how text and image share out their attention, to text and to image."""
    settings = [(2, 7, (5, 3, 2)), (3, 4, (6, 4, 2, 3))]  # heads, image tokens, real tokens of each text
    for seed, (h, S, lengths) in enumerate(settings):
        generator = torch.Generator().manual_seed(seed)
        B, L = len(lengths), max(lengths)
        T = L + S
        text_mask = torch.arange(L) < torch.tensor(lengths)[:, None]  # (B, L)
        seen = torch.cat([text_mask, torch.ones(B, S, dtype=torch.bool)], dim=1)
        # Each asker has its own taste for text, so that leaving one out, or counting one too many, shows.
        taste = 2 * torch.randn(B, h, T, 1, generator=generator) * (torch.arange(T) < L)
        scores = torch.randn(B, h, T, T, generator=generator) + taste
        maps = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        hints = {
            (B, 2, 2): "Average over the batch, too: one mean over all asking tokens.",
            (h, 2, 2): "Average over the heads, too.",
            (B, h, 2, 2): "Average over batch and heads, too.",
            (2,): "Two kinds of askers times two kinds of answers are wanted, (2, 2).",
            (4,): "Arrange the four numbers in two rows, (2, 2): row 0 for asking text, row 1 for asking image.",
            (T, T): "That is the whole table: sum over the text tokens and over the image tokens that are looked at.",
        }
        answer = attempt.tensor(attempt(maps, text_mask), (2, 2), symbols="(2, 2)", shapes=hints)

        def mass(
            *, askers: str = "real", mean: str = "all askers", block: str = "sum", heads: str = "mean",
            split: str = "text first", read: str = "rows", maps: Tensor = maps, text_mask: Tensor = text_mask,
        ) -> Tensor:  # fmt: skip
            (B, L), T = text_mask.shape, maps.shape[-1]
            A = {"mean": maps.mean(1), "sum": maps.sum(1), "max": maps.amax(1), "first": maps[:, 0]}[heads]
            if read == "columns":
                A = A.transpose(1, 2)
            is_text = torch.arange(T) < L if split == "text first" else torch.arange(T) >= T - L
            share = torch.stack([A[..., is_text].sum(-1), A[..., ~is_text].sum(-1)], -1)  # (B, T, 2)
            if block == "mean":
                share = share / torch.tensor([L, T - L])
            asks = torch.ones(B, T, dtype=torch.bool)
            if askers != "all":
                asks[:, is_text] = text_mask
            if askers == "class tokens":
                asks = torch.zeros(B, T, dtype=torch.bool)
                asks[:, [0, L]] = True
            rows = []
            for kind in (is_text, ~is_text):
                asking = (asks & kind)[..., None]
                total, count = (share * asking).sum(1), asking.sum(1)  # (B, 2), (B, 1)
                if askers == "padding as zero":
                    count = torch.full_like(count, int(kind.sum()))
                rows.append({
                    "all askers": total.sum(0) / count.sum(),
                    "per picture": (total / count).mean(0),
                    "never": total.sum(0),
                    "per batch": total.sum(0) / B,
                }[mean])  # fmt: skip
            table = torch.stack(rows)
            return {"rows": table, "columns": table, "transposed": table.T, "swapped": table.flip(0),
                    "flipped": table.flip(1)}[read]  # fmt: skip

        rows = f"Yours: text looks {_two(answer[0])}, image looks {_two(answer[1])}; each row must sum to 1."
        detail = rows if not torch.allclose(answer.sum(1), torch.ones(2), atol=1e-4) else ""
        attempt.compare(answer, mass(), variants(mass, _MASS_SLIPS), atol=1e-6, detail=detail)
    return f"right for {len(settings)} batches of maps"


def _two(row: Tensor) -> str:
    return f"{row[0]:.3f} at text and {row[1]:.3f} at image"


_MASS_SLIPS = [
    Slip("askers", "all", "the padded tokens ask, too. They look somewhere like the others, but nobody reads what they "
         "find: leave out the text tokens where text_mask is False."),
    Slip("askers", "padding as zero", "you set the rows of padded tokens to 0, but still divide by their number. "
         "Divide by the number of real asking tokens."),
    Slip("askers", "class tokens", "only the two class tokens ask here. Average over all real tokens."),
    Slip("mean", "per picture", "you average within each text first, then over the batch: a token of a short text then "
         "counts more. Take one mean over all asking tokens of the batch."),
    Slip("mean", "never", "this is the sum over the asking tokens: divide by their number."),
    Slip("mean", "per batch", "you divide by the number of pairs. Divide by the number of asking tokens."),
    Slip("block", "mean", "you average over the tokens that are looked at. What a token gives to all text, or to the "
         "whole image, is the sum of its weights there."),
    Slip("heads", "sum", "you add the heads up. Take their mean."),
    Slip("heads", "max", "you take the largest value over the heads. Take their mean."),
    Slip("heads", "first", "you look at one head only. Take the mean of all heads."),
    Slip("split", "image first", "you take the last L tokens for text. In ViLT the text comes first."),
    Slip("read", "columns", "you read the columns of the maps: how much each token is looked at. A row of a map, its "
         "last dimension, says how one token shares out its attention."),
    Slip("read", "transposed", "the table is transposed: its rows are the asking tokens, its columns those that are "
         "looked at."),
    Slip("read", "swapped", "the rows are swapped: asking text comes first, then asking image."),
    Slip("read", "flipped", "the columns are swapped: what goes to text comes first, then what goes to image."),
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------- 5 sinkhorn


@check
def sinkhorn(attempt: Attempt) -> str:
    """Exercise 5: entropic optimal transport between uniform weights (Cuturi 2013, arXiv:1306.0895, algorithm 1)."""
    # Few rounds first: later the order of the updates no longer shows.
    settings = [(3, 5, 0.5, 3), (4, 2, 0.3, 2), (6, 4, 0.1, 50)]  # m, n, epsilon, iterations
    for seed, (m, n, epsilon, iterations) in enumerate(settings):
        cost = 2 * torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
        hints = {
            (n, m): "The plan is transposed: a row for each row of the cost.",
            (): "Is this the distance, the sum of cost * plan? Return the plan.",
            (m,): "Is this u? The plan is diag(u) K diag(v).",
            (n,): "Is this v? The plan is diag(u) K diag(v).",
            (m, m): "diag(u) is (m, m); the plan is diag(u) K diag(v).",
            (n, n): "diag(v) is (n, n); the plan is diag(u) K diag(v).",
            (1, m, n): "No batch dimension is wanted.",
            (m, 1): "Is this u? The plan is diag(u) K diag(v).",
            (n, 1): "Is this v? The plan is diag(u) K diag(v).",
        }
        answer = attempt.tensor(attempt(cost, epsilon, iterations), (m, n), symbols="(m, n)", shapes=hints)

        def plan(
            *, weights: str = "1/m, 1/n", kernel: str = "-C / epsilon", rounds: str = "all", update: str = "u, v",
            read: str = "plan", cost: Tensor = cost, epsilon: float = epsilon, iterations: int = iterations,
        ) -> Tensor:  # fmt: skip
            C = cost.double()
            m, n = C.shape
            K = {
                "-C / epsilon": (-C / epsilon).exp(),
                "+C / epsilon": (C / epsilon).exp(),
                "-C * epsilon": (-C * epsilon).exp(),
                "-C": (-C).exp(),
            }[kernel]
            a, b = {
                "1/m, 1/n": (1 / m, 1 / n),
                "1": (1, 1),
                "swapped": (1 / n, 1 / m),
                "1/mn": (1 / (m * n), 1 / (m * n)),
            }[weights]
            u, v = torch.ones(m, dtype=C.dtype), torch.ones(n, dtype=C.dtype)
            count = {"all": iterations, "one": 1, "one more": iterations + 1, "one less": iterations - 1}[rounds]
            for _ in range(count):
                if update == "v, u":
                    v = b / (u @ K)
                if update == "at once":
                    u, v = a / (K @ v), b / (u @ K)
                elif update != "v":
                    u = a / (K @ v)
                if update in ("u, v", "v"):
                    v = b / (u @ K)
            P = u[:, None] * K * v
            return {
                "plan": P, "without u": K * v, "without v": u[:, None] * K, "without K": u[:, None] * v,
                "cost * plan": C * P, "K": K,
            }[read].float()  # fmt: skip

        columns = answer.sum(0)
        detail = ""
        if (columns - 1 / n).abs().max() > 1e-4:
            least, most = columns.min(), columns.max()
            detail = f"Every column must sum to 1/n = {1 / n:.4f}; yours sum to {least:.4f} .. {most:.4f}."
        attempt.compare(answer, plan(), variants(plan, _SINKHORN_SLIPS), atol=1e-6, detail=detail)
    return f"right for {', '.join(f'{m}x{n}' for m, n, *_ in settings)}"


_SINKHORN_SLIPS = [
    Slip("weights", "1", "rows and columns should sum to 1/m and 1/n, so that the whole plan sums to 1. You use 1 for "
         "both."),
    Slip("weights", "swapped", "m and n are swapped: each of the m rows weighs 1/m (for u), each of the n columns 1/n "
         "(for v)."),
    Slip("weights", "1/mn", "you use 1/(m n) for both. A row weighs 1/m, a column 1/n."),
    Slip("kernel", "+C / epsilon", "the sign in the kernel is wrong: exp(-cost / epsilon), so that cheap ways carry "
         "much."),
    Slip("kernel", "-C * epsilon", "you multiply by epsilon. Divide the cost by it: a small epsilon makes the plan "
         "sharp."),
    Slip("kernel", "-C", "epsilon is not used: the kernel is exp(-cost / epsilon)."),
    Slip("rounds", "one", "you update u and v once only: repeat it `iterations` times."),
    Slip("rounds", "one more", "that is one round too many."),
    Slip("rounds", "one less", "that is one round too few."),
    Slip("update", "v, u", "you update v first. Here u comes first, then v with the new u, so that the columns are "
         "exact in the end."),
    Slip("update", "at once", "you update v with the u of the round before. Compute u first, then v from the new u."),
    Slip("update", "u", "v is never updated: the rows have the right sums, the columns have not. (One such step is a "
         "softmax over each row, divided by m.)"),
    Slip("update", "v", "u is never updated: the columns have the right sums, the rows have not."),
    Slip("read", "without u", "diag(u) is missing at the end: each row i of the plan is multiplied by u_i."),
    Slip("read", "without v", "diag(v) is missing at the end: each column j of the plan is multiplied by v_j."),
    Slip("read", "without K", "K is missing at the end: the plan is u_i K_ij v_j."),
    Slip("read", "cost * plan", "this is cost * plan, the parts of the distance. Return the plan."),
    Slip("read", "K", "this is the kernel K itself. The plan is diag(u) K diag(v)."),
]  # fmt: skip
