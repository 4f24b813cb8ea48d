"""Writing token by token: by hand and by trying all texts, with a decoder that is a table, and then with a BLIP."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import LongTensor, Tensor, nn
from tower_helpers import close, shake

from minivlp.generate import beam_search, discourage, forbid_end, greedy, keep_nucleus, nucleus
from minivlp.models.blip import BLIP, BLIPConfig

torch.set_num_threads(1)

INF = float("inf")
END = 0


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Table:
    """A decoder made by hand: scores of the next token after each of the last `memory` tokens, (B, V ** memory, V), a
    table for each picture about which `copies` texts are written. `asked` is what it was told at each step."""

    def __init__(self, scores: Tensor, *, memory: int = 1, copies: int = 1) -> None:
        self.V = scores.shape[-1]
        self.tables = scores.expand(-1, self.V**memory, self.V).repeat_interleave(copies, dim=0)
        self.state = torch.zeros(len(self.tables), dtype=torch.long)
        self.asked: list[list[int]] = []

    def __call__(self, tokens: LongTensor) -> Tensor:
        self.asked.append(tokens.tolist())
        self.state = (self.state * self.V + tokens) % self.tables.shape[1]
        return self.tables[torch.arange(len(self.state)), self.state]

    def reorder(self, rows: LongTensor) -> None:
        assert torch.equal(self.tables[rows], self.tables)  # nobody goes on about another picture
        self.state = self.state[rows]


def chances(*rows: list[float]) -> Tensor:
    """After each token: the chances of the next one, as scores (1, V, V)."""
    return torch.tensor(rows).log()[None]


def firsts(count: int, token: int = 1) -> LongTensor:
    return torch.full((count,), token)


# --- what may be said ------------------------------------------------------------------------------------------------


def test_forbid_end_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, 5.0]])
    kept = scores.clone()
    for length, shortest in ((0, 1), (2, 5), (4, 5)):
        assert forbid_end(scores, 2, length, shortest).tolist() == [[3, 1, -INF], [0, -1, -INF]]
        assert torch.equal(scores, kept)
    for length, shortest in ((0, 0), (1, 1), (7, 5)):
        assert torch.equal(forbid_end(scores, 2, length, shortest), kept)


def test_discourage_by_hand():
    scores = torch.tensor([[4.0, -4.0, 1.0, -1.0], [4.0, -4.0, 0.0, -1.0]])
    kept = scores.clone()
    texts = torch.tensor([[0, 1, 0], [2, 2, 3]])  # twice said is as good as once
    assert discourage(scores, texts, 2.0).tolist() == [[2, -8, 1, -1], [4, -4, 0, -2]]
    assert discourage(scores, texts, 0.5).tolist() == [[8, -2, 1, -1], [4, -4, 0, -0.5]]
    assert torch.equal(discourage(scores, texts, 1.0), kept) and torch.equal(scores, kept)
    # Each is less likely than before, whatever its sign, where a plain division would make some more likely.
    assert (discourage(scores, texts, 1.1).gather(1, texts) <= kept.gather(1, texts)).all()


def test_keep_nucleus_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]]).log()
    for p, first, second in ((0.01, [1], [0]), (0.49, [1], [0]), (0.51, [1, 3], [0]), (0.74, [1, 3], [0, 1]),
                             (0.76, [1, 2, 3], [0, 1]), (0.91, [0, 1, 2, 3], [0, 1, 2, 3]),
                             (1.0, [0, 1, 2, 3], [0, 1, 2, 3])):  # fmt: skip
        kept = keep_nucleus(scores, p)
        inside = kept > -INF
        assert inside[0].nonzero()[:, 0].tolist() == first, p
        assert inside[1].sum() == len(second) and inside[1, 0], p  # which of three alike is open
        assert torch.equal(kept[inside], scores[inside])
    assert not scores.isinf().any()
    even = torch.zeros(1, 2)  # one half each: the first alone reaches p = 0.5
    assert [(keep_nucleus(even, p) > -INF).sum().item() for p in (0.49, 0.5, 0.51)] == [1, 1, 2]


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    """Of many random rows: what is kept reaches p, without its least likely token it would not, and nothing outside is
    more likely than anything inside."""
    scores = 3 * torch.randn(200, 12)
    for p in (0.0, 0.3, 0.9, 0.99):
        inside = keep_nucleus(scores, p) > -INF
        chance = scores.softmax(-1)
        total = (chance * inside).sum(-1)
        least = chance.masked_fill(~inside, 2).amin(-1)
        assert inside.any(-1).all() and (total >= p - 1e-6).all()
        assert ((total - least < p + 1e-6) | (inside.sum(-1) == 1)).all()
        assert (chance.masked_fill(inside, -1).amax(-1) <= least).all()
    assert (keep_nucleus(scores, 0.0) > -INF).sum() == 200  # the first one always


# --- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_by_hand():
    after = chances([0.25] * 4, [0.1, 0.2, 0.6, 0.1], [0.2, 0.1, 0.3, 0.4], [0.5, 0.3, 0.1, 0.1])
    decoder = Table(after)
    assert greedy(decoder, firsts(1), end=END, longest=9).tolist() == [[2, 3, 0]]
    assert decoder.asked == [[1], [2], [3]]  # the first token is not part of the text, and nothing is asked after it
    assert greedy(Table(after), firsts(1), end=END, longest=2).tolist() == [[2, 3]]
    assert greedy(Table(after), firsts(1), end=END, longest=9, shortest=2).tolist() == [[2, 3, 0]]
    assert greedy(Table(after), firsts(1), end=END, longest=9, shortest=3).tolist() == [[2, 3, 1, 2, 3, 0]]
    assert greedy(Table(after), firsts(1), end=3, longest=9).tolist() == [[2, 3]]
    assert greedy(Table(after), firsts(1, 3), end=END, longest=9).tolist() == [[0]]


def test_greedy_goes_on_until_all_texts_have_ended():
    short, long = chances(*[[0.7, 0.1, 0.1, 0.1]] * 4), chances(*[[0.1, 0.2, 0.3, 0.4]] * 3, [0.4, 0.3, 0.2, 0.1])
    decoder = Table(torch.cat([short, long, short]))
    assert greedy(decoder, firsts(3), end=END, longest=9).tolist() == [[0, 0], [3, 0], [0, 0]]
    assert decoder.asked == [[1, 1, 1], [0, 3, 0]]


# --- nucleus sampling ------------------------------------------------------------------------------------------------


def drawn(decoder: Table, count: int, *, number: int = 0, **options: object) -> LongTensor:
    generator = torch.Generator().manual_seed(number)
    return nucleus(decoder, firsts(count), **(dict(end=END, longest=1, generator=generator) | options))


def test_nucleus_draws_by_chance_inside_and_never_outside():
    table = chances(*[[0.1, 0.5, 0.15, 0.25]] * 4).repeat(4000, 1, 1)
    tokens = drawn(Table(table), 4000, p=0.8).flatten()
    share = torch.bincount(tokens, minlength=4) / 4000
    assert share[0] == 0  # not in the nucleus
    close(share[1:], torch.tensor([0.5, 0.15, 0.25]) / 0.9, 0.03)
    share = torch.bincount(drawn(Table(table), 4000, p=1.0).flatten(), minlength=4) / 4000
    close(share, torch.tensor([0.1, 0.5, 0.15, 0.25]), 0.03)
    assert (drawn(Table(table), 4000, p=0.2) == 1).all()  # with a small p it is greedy


def test_the_generator_decides():
    table = torch.randn(30, 4, 4)
    one, again, other = (drawn(Table(table), 30, number=n, longest=6) for n in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    state = torch.get_rng_state()
    drawn(Table(table), 30, number=3)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is drawn from
    generator = torch.Generator().manual_seed(1)
    first, second = (drawn(Table(table), 30, longest=6, generator=generator) for _ in range(2))
    assert torch.equal(first, one) and not torch.equal(first, second)


def test_nucleus_texts_end():
    table = chances([0.01, 0.01, 0.01, 0.97], *[[0.1, 0.3, 0.3, 0.3]] * 3).repeat(300, 1, 1)
    texts = drawn(Table(table), 300, p=1.0, longest=12)
    assert texts.shape == (300, 12)
    for text in texts.tolist():
        assert END not in text or set(text[text.index(END) :]) == {END}
    lengths = (texts != END).sum(1)
    assert lengths.min() == 0 and lengths.max() > 4
    assert (drawn(Table(table), 300, p=1.0, longest=12, shortest=3) != END).sum(1).min() == 3
    ends = chances(*[[0.97, 0.01, 0.01, 0.01]] * 4)
    assert drawn(Table(ends), 1, longest=12).tolist() == [[0]]  # and so does the loop


def test_the_penalty_of_nucleus_sampling():
    """With a nucleus of one token the next one is the most likely, and one that was said already is less likely."""
    scores = torch.tensor([[[-9.0, 3.0, 2.5, 2.4]] * 4])
    assert drawn(Table(scores), 1, p=0.01, longest=5).tolist() == [[1, 1, 1, 1, 1]]
    # The first token counts as said: 3 / 1.3 = 2.31, then 2.5 / 1.3 = 1.92, then 2.4 / 1.3 = 1.85.
    assert drawn(Table(scores), 1, p=0.01, longest=5, penalty=1.3).tolist() == [[2, 3, 1, 1, 1]]
    assert drawn(Table(scores), 1, p=0.01, longest=5, penalty=1.1).tolist() == [[1, 1, 1, 1, 1]]
    low = scores - 5  # -2, -2.5, -2.6: times 1.3 is -2.6, -3.25, -3.38
    assert drawn(Table(low), 1, p=0.01, longest=4, penalty=1.28).tolist() == [[2, 1, 1, 1]]
    # Without an end that is forbidden first: its -inf would stay one.
    assert drawn(Table(low), 1, p=0.01, longest=4, penalty=1.28, shortest=9).tolist() == [[2, 1, 1, 1]]


# --- beam search -----------------------------------------------------------------------------------------------------


def all_texts(V: int, longest: int, shortest: int = 0) -> list[tuple[int, ...]]:
    """Every text there is: words from 1 up, and then the end, unless it is as long as it may be."""
    texts = []
    for length in range(longest + 1):
        for words in itertools.product(range(1, V), repeat=length):
            if length == longest:
                texts.append(words)
            elif length >= shortest:
                texts.append((*words, END))
    return texts


def next_words(table: Tensor, text: tuple[int, ...], *, memory: int, first: int = 1) -> list[float]:
    """Log-probabilities of what follows a text, by a table (V ** memory, V)."""
    V, said = table.shape[-1], (first, *text)[-memory:]
    return table[sum(word * V**i for i, word in enumerate(reversed(said)))].log_softmax(-1).tolist()


def log_probability(table: Tensor, text: tuple[int, ...], *, memory: int) -> float:
    return sum(next_words(table, text[:i], memory=memory)[token] for i, token in enumerate(text))


def beams_by_hand(
    table: Tensor, *, memory: int, beams: int, longest: int, shortest: int, penalty: float
) -> tuple[int, ...]:
    """The same search about one picture, with lists."""
    going: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, longest + 1):
        candidates = [
            (total + value, (*text, word)) for total, text in going
            for word, value in enumerate(next_words(table, text, memory=memory)) if word != END or length > shortest
        ]  # fmt: skip
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ended = [text[-1] == END or length == longest for _, text in candidates]
        finished += [(total / length**penalty, text) for (total, text), end in
                     list(zip(candidates, ended, strict=True))[:beams] if end]  # fmt: skip
        finished = sorted(finished, reverse=True)[:beams]
        going = [c for c, end in zip(candidates, ended, strict=True) if not end][:beams]
        if not going or (len(finished) == beams and going[0][0] / length**penalty <= finished[-1][0]):
            break
    return finished[0][1]


def padded(text: tuple[int, ...], length: int) -> list[int]:
    return [*text, *[END] * (length - len(text))]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("shortest", [0, 2])
def test_with_enough_beams_the_best_of_all_texts_is_found(penalty, shortest):
    V, longest, memory, B = 4, 3, 3, 6
    scores = 1.5 * torch.randn(B, V**memory, V)
    decoder = Table(scores, memory=memory, copies=V**longest)
    found = beam_search(decoder, firsts(B), end=END, longest=longest, beams=V**longest, shortest=shortest,
                        length_penalty=penalty)  # fmt: skip
    texts = all_texts(V, longest, shortest)
    assert len(texts) == sum(3**n for n in range(shortest, longest + 1))
    best = []
    for table in scores:
        best.append(max(texts, key=lambda t, table=table: log_probability(table, t, memory=memory) / len(t) ** penalty))
    assert found.tolist() == [padded(text, found.shape[1]) for text in best]
    assert found.shape[1] == max(map(len, best)) and len(set(best)) > 2


@pytest.mark.parametrize("shortest", [0, 2])
def test_one_beam_is_greedy(shortest):
    scores = 2 * torch.randn(40, 125, 5)
    options = dict(end=END, longest=6, shortest=shortest)
    expected = greedy(Table(scores, memory=3), firsts(40), **options)
    assert torch.equal(beam_search(Table(scores, memory=3), firsts(40), beams=1, **options), expected)
    lengths = (expected != END).sum(1)
    assert lengths.min() == shortest and lengths.max() == 6
    assert not torch.equal(beam_search(Table(scores, memory=3, copies=3), firsts(40), beams=3, **options), expected)


def test_more_beams_find_what_greedy_misses():
    """After 1 the token 2 is more likely, but all that follows it is not."""
    table = chances([0.25] * 4, [0.1, 0.0, 0.5, 0.4], [0.2, 0.25, 0.3, 0.25], [0.9, 0.05, 0.05, 0.0])
    assert greedy(Table(table), firsts(1), end=END, longest=3).tolist() == [[2, 2, 2]]  # 0.5 * 0.3 * 0.3
    two = beam_search(Table(table, copies=2), firsts(1), end=END, longest=3, beams=2)
    assert two.tolist() == [[3, 0]]  # 0.4 * 0.9
    # Without the length's say the shortest text has the highest probability of them all only if it is the likeliest.
    table = chances([0.25] * 4, [0.3, 0.0, 0.4, 0.3], [0.5, 0.1, 0.3, 0.1], [0.5, 0.2, 0.2, 0.1])
    plain = beam_search(Table(table, copies=3), firsts(1), end=END, longest=3, beams=3, length_penalty=0.0)
    per_token = beam_search(Table(table, copies=3), firsts(1), end=END, longest=3, beams=3)
    assert plain.tolist() == [[0]] and per_token.tolist() == [[2, 0]]  # 0.3 > 0.4 * 0.5, but 0.3 < 0.2 ** (1 / 2)


def test_a_finished_text_is_not_continued():
    """The end is likely everywhere, and after it another word would be certain: it must never be asked for."""
    table = chances([0.01, 0.01, 0.01, 0.97], *[[0.5, 0.1, 0.2, 0.2]] * 3)
    for beams in (2, 3, 5):
        decoder = Table(table, copies=beams)
        found = beam_search(decoder, firsts(1), end=END, longest=5, beams=beams, length_penalty=3.0)
        assert all(token != END for step in decoder.asked for token in step)
        text = found[0].tolist()
        assert END not in text or set(text[text.index(END) :]) == {END}


def test_each_picture_has_its_own_search():
    """A batch gives what each of its pictures gives alone, and the end fills up what is shorter."""
    scores = 2 * torch.randn(12, 25, 5)
    options = dict(end=END, longest=7, beams=3)
    together = beam_search(Table(scores, memory=2, copies=3), firsts(12), **options)
    for b in range(12):
        alone = beam_search(Table(scores[b : b + 1], memory=2, copies=3), firsts(1), **options)[0]
        assert together[b].tolist() == padded(tuple(alone.tolist()), together.shape[1])
    assert len(set((together != END).sum(1).tolist())) > 2


def test_the_search_stops_when_nothing_can_get_better():
    table = chances([0.25] * 4, *[[0.97, 0.01, 0.01, 0.01]] * 3)
    decoder = Table(table, copies=2)
    assert beam_search(decoder, firsts(1), end=END, longest=50, beams=2).tolist() == [[0]]
    assert len(decoder.asked) < 5
    assert beam_search(Table(table, copies=2), firsts(1), end=END, longest=50, beams=2, shortest=2).shape == (1, 3)


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize(("longest", "shortest", "penalty"), [(6, 0, 1.0), (5, 2, 0.0), (6, 0, 2.0)])
def test_beam_search_is_the_search_by_hand(beams, longest, shortest, penalty):
    """Of 30 pictures, with a decoder that remembers: the wrong rows to go on with would be noticed."""
    V, memory, B = 5, 3, 30
    scores = 1.5 * torch.randn(B, V**memory, V)
    options = dict(beams=beams, longest=longest, shortest=shortest)
    decoder = Table(scores, memory=memory, copies=beams)
    found = beam_search(decoder, firsts(B), end=END, length_penalty=penalty, **options)
    expected = [beams_by_hand(table, memory=memory, penalty=penalty, **options) for table in scores]
    assert found.tolist() == [padded(text, found.shape[1]) for text in expected]
    assert len(set(expected)) > B / 2 and len(set(map(len, expected))) > 2


# --- a BLIP that writes ----------------------------------------------------------------------------------------------

SMALL = BLIPConfig(
    image_size=16, patch_size=8, image_width=16, image_depth=1, image_heads=2, vocab_size=30, max_text=12,
    text_width=16, text_depth=2, text_heads=2, embed_dim=8,
)  # fmt: skip
ENDS, LONGEST = SMALL.sep_id, 8


@pytest.fixture
def blip() -> tuple[BLIP, Tensor]:
    """A model, and what it sees in 5 pictures."""
    model = shake(BLIP(SMALL), 0.5, but="temp")
    model.lm_head.decoder.weight = nn.Parameter(torch.randn(30, 16))  # with the word table it only repeats itself
    return model, torch.randn(5, 5, 16)


@torch.no_grad()
def test_greedy_writing_is_the_most_likely_next_word_each_time(blip):
    model, image = blip
    first = firsts(5, SMALL.dec_id)
    texts = greedy(model.speaker(image), first, end=ENDS, longest=LONGEST)
    ids = first[:, None]
    for t in range(texts.shape[1]):
        scores = model.lm_head(model.text.decode(ids, image)[0])[:, -1]
        going = ~(texts[:, :t] == ENDS).any(1)
        assert torch.equal(scores.argmax(-1)[going], texts[going, t])
        ids = torch.cat([ids, texts[:, t : t + 1]], dim=1)
    assert len(set(map(tuple, texts.tolist()))) == 5  # the picture matters


@pytest.mark.parametrize("how", ["greedy", "nucleus", "beams"])
@torch.no_grad()
def test_with_the_cache_it_writes_the_same(blip, how):
    model, image = blip
    copies = 3 if how == "beams" else 1

    def write(**options: object) -> LongTensor:
        speaker = model.speaker(image, copies=copies, **options)
        first, limits = firsts(5, SMALL.dec_id), dict(end=ENDS, longest=LONGEST, shortest=3)
        if how == "greedy":
            return greedy(speaker, first, **limits)
        if how == "beams":
            return beam_search(speaker, first, beams=3, **limits)
        return nucleus(speaker, first, generator=torch.Generator().manual_seed(0), penalty=1.1, **limits)

    texts = write()
    assert torch.equal(texts, write(cache=False)) and texts.shape[0] == 5 and 4 <= texts.shape[1] <= LONGEST
    assert (texts[:, :3] != ENDS).all() and len(set(map(tuple, texts.tolist()))) == 5


@torch.no_grad()
def test_beams_of_a_blip_find_likelier_texts(blip):
    model, image = blip
    first = firsts(5, SMALL.dec_id)

    def per_token(texts: LongTensor) -> Tensor:
        """Log-probability of each text, up to its end, divided by its length."""
        ids = torch.cat([first[:, None], texts], dim=1)
        words = model.lm_head(model.text.decode(ids[:, :-1], image)[0]).log_softmax(-1)
        words = words.gather(2, texts[:, :, None])[..., 0]
        counts = (texts.cumsum(1) * 0 + 1).masked_fill((texts == ENDS).cumsum(1) - (texts == ENDS).long() > 0, 0)
        return (words * counts).sum(1) / counts.sum(1)

    options = dict(end=ENDS, longest=LONGEST)
    one = per_token(greedy(model.speaker(image), first, **options))
    four = per_token(beam_search(model.speaker(image, copies=4), first, beams=4, **options))
    assert (four >= one - 1e-5).float().mean() >= 0.8 and four.mean() > one.mean()
    assert math.isfinite(four.mean())
