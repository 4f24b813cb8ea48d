"""Every metric against numbers worked out by hand or by another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from minivlp.data import Tokenizer
from minivlp.evaluate import (
    accuracy,
    attention_distance,
    attention_shares,
    bleu,
    cloze,
    cloze_accuracy,
    confusion,
    distinct,
    filled_in,
    k_per_class,
    mean_and_spread,
    peak_memory,
    predict,
    probe_scores,
    recall_at,
    ridge_probe,
    split_words,
    unique,
)
from minivlp.models.cnn import ResNetConfig, SmallResNet

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- predicting ------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Its answers betray training mode (dropout, batch norm), gradients and the size of the batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.sizes.append(len(x))
        pooled = self.drop(self.norm(self.fc(x)))
        return 2 * pooled, {"pooled": pooled}


def test_predict_is_the_forward_pass_in_eval_mode():
    model, x = Noisy().train(), torch.randn(7, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    scores, features = predict(model, x, batch_size=3)
    assert model.sizes == [3, 3, 1]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    expected = model.eval()(x)[1]["pooled"].detach()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, 2 * expected, rtol=0, atol=1e-6)
    assert not scores.requires_grad and not features.requires_grad
    predict(model, x)
    assert not model.training


def test_predict_takes_pictures_as_they_are_stored_and_gives_float32():
    model = SmallResNet(ResNetConfig(widths=(4, 6), blocks=1)).double()
    model.forward = lambda images, forward=model.forward: forward((images.double() / 127.5) - 1)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    scores, features = predict(model, images, batch_size=2)
    assert (scores.dtype, features.dtype) == (torch.float32, torch.float32)
    assert (scores.shape, features.shape) == ((5, 12), (5, 6))


# --- counting --------------------------------------------------------------------------------------------------------

SCORES = torch.tensor([[0.1, 0.9, 0.0], [5.0, 4.0, 3.0], [0.0, 0.0, 1.0], [-3.0, -1.0, -2.0]])  # says 1, 0, 2, 1
LABELS = torch.tensor([1, 2, 2, 0])


def test_accuracy_by_hand():
    assert accuracy(SCORES, LABELS) == 0.5
    assert accuracy(SCORES, torch.tensor([1, 0, 2, 1])) == 1.0
    assert accuracy(SCORES, torch.tensor([0, 1, 0, 0])) == 0.0


def test_confusion_has_the_truth_in_rows():
    counts = confusion(SCORES, LABELS)
    assert counts.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert isinstance(counts, np.ndarray)
    assert confusion(SCORES[:1], LABELS[:1]).shape == (3, 3)  # classes that do not occur have rows as well


def test_mean_and_spread_by_hand():
    assert mean_and_spread([2.0, 4.0, 6.0]) == (4.0, 2.0)  # squares 4 + 0 + 4, over n - 1 = 2
    assert mean_and_spread([0.5]) == (0.5, 0.0)
    assert mean_and_spread(torch.tensor([1.0, 1.0])) == (1.0, 0.0)


# --- few-shot probe --------------------------------------------------------------------------------------------------


def probe_data() -> tuple[Tensor, Tensor, Tensor]:
    """Unbalanced classes and features of very different offset and scale: standardisation and bias must matter."""
    labels = torch.tensor([0] * 14 + [1] * 5 + [2] * 3)
    scale, offset = torch.tensor([1.0, 30.0, 0.01, 5.0]), torch.tensor([3.0, -50.0, 0.2, 0.0])
    train = (torch.randn(22, 4) + nn.functional.one_hot(labels, 4)) * scale + offset
    return train, labels, torch.randn(6, 4) * scale + offset


def least_squares(train: Tensor, labels: Tensor, test: Tensor, l2: float) -> np.ndarray:
    """The same problem by stacking sqrt(l2 N) under the features, with a bias column that gets no such row."""
    x, z = train.double().numpy(), test.double().numpy()
    mean, std = x.mean(0), x.std(0)
    x, z = (x - mean) / std, (z - mean) / std
    n, d = x.shape
    y = np.where(labels.numpy()[:, None] == np.arange(3), 1.0, -1.0)
    top = np.hstack([x, np.ones((n, 1))])
    bottom = np.hstack([math.sqrt(l2 * n) * np.eye(d), np.zeros((d, 1))])
    weights, *_ = linalg.lstsq(np.vstack([top, bottom]), np.vstack([y, np.zeros((d, 3))]))
    return np.hstack([z, np.ones((len(z), 1))]) @ weights


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_ridge_probe_is_regularised_least_squares_with_a_free_bias(l2):
    train, labels, test = probe_data()
    scores = ridge_probe(train, labels, test, classes=3, l2=l2)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), least_squares(train, labels, test, l2), atol=1e-5)
    # The input matters, or this would compare constants.
    assert scores.std(0).min() > 1e-3


def test_the_bias_of_the_probe_is_not_regularised():
    """Under a huge penalty only the bias is left: the mean target, 2 * share - 1."""
    train, labels, test = probe_data()
    scores = ridge_probe(train, labels, test, classes=3, l2=1e9)
    expected = 2 * torch.tensor([14, 5, 3]) / 22 - 1
    torch.testing.assert_close(scores, expected.expand(6, 3), rtol=0, atol=1e-5)


def test_the_probe_does_not_care_for_the_scale_of_features_nor_for_dead_ones():
    train, labels, test = probe_data()
    scores = ridge_probe(train, labels, test, classes=3)
    scaled = ridge_probe(1000 * train + 7, labels, 1000 * test + 7, classes=3)
    torch.testing.assert_close(scaled, scores, atol=1e-3, rtol=0)
    dead, dead_test = (torch.cat([x, torch.full((len(x), 1), 4.0)], 1) for x in (train, test))
    torch.testing.assert_close(ridge_probe(dead, labels, dead_test, classes=3), scores, atol=1e-6, rtol=0)


def test_the_probe_leaves_room_for_classes_without_an_example():
    train, labels, test = probe_data()
    scores = ridge_probe(train, labels, test, classes=5)
    assert scores.shape == (6, 5)
    torch.testing.assert_close(scores[:, 3:], torch.full((6, 2), -1.0))


def test_the_probe_reads_what_is_linear():
    x = torch.randn(300, 8)
    labels = x[:, :3].argmax(1)
    assert accuracy(ridge_probe(x[:200], labels[:200], x[200:], classes=3, l2=0.01), labels[200:]) > 0.85


# --- sampling --------------------------------------------------------------------------------------------------------


def test_k_per_class_takes_k_different_ones_of_each():
    labels = torch.tensor([3, 1, 1, 3, 7, 7, 1, 3, 7, 1])
    chosen = k_per_class(labels, 2)
    assert len(set(chosen.tolist())) == 6
    assert labels[chosen].tolist() == [1, 1, 3, 3, 7, 7]


def test_k_per_class_depends_on_its_seed_alone():
    labels = torch.arange(4).repeat(50)
    first = k_per_class(labels, 5, seed=1)
    state = torch.get_rng_state()
    torch.rand(10)
    assert torch.equal(k_per_class(labels, 5, seed=1), first)
    assert not torch.equal(k_per_class(labels, 5, seed=2), first)
    torch.set_rng_state(state)
    after = torch.rand(1)
    torch.set_rng_state(state)
    k_per_class(labels, 5)
    assert torch.equal(torch.rand(1), after)  # it draws from its own generator


def test_k_per_class_names_the_class_with_too_few():
    with pytest.raises(ValueError, match="class 7 has 1 examples, fewer than k=2"):
        k_per_class(torch.tensor([1, 1, 7]), 2)


# --- attention distance ----------------------------------------------------------------------------------------------


def test_attention_distance_on_a_grid_of_two_by_two():
    """Patches of 10 px; 0 1 / 2 3. Distances: beside or below 10, across the corner 10 sqrt 2."""
    eye, uniform = torch.eye(4), torch.full((4, 4), 0.25)
    across = torch.eye(4).flip(1)  # 0 looks at 3, 1 at 2
    beside = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.float32)
    weights = torch.stack([eye, beside, across, uniform])[None]  # (1, 4 heads, 4, 4)
    expected = torch.tensor([0.0, 10.0, 10 * math.sqrt(2), (0 + 10 + 10 + 10 * math.sqrt(2)) / 4])
    torch.testing.assert_close(attention_distance(weights, patch_size=10, prefix=0), expected)


def test_attention_distance_ignores_the_class_token():
    patches = torch.rand(2, 3, 9, 9).softmax(-1)
    expected = attention_distance(patches, patch_size=4, prefix=0)
    weights = torch.zeros(2, 3, 10, 10)
    weights[..., 1:, 1:] = 0.2 * patches  # every patch gives 0.8 of its attention to the class token
    weights[..., 1:, 0] = 0.8
    weights[..., 0, :] = torch.rand(2, 3, 10).softmax(-1)  # where the class token looks is no distance
    torch.testing.assert_close(attention_distance(weights, patch_size=4), expected)


def test_attention_distance_counts_patches_of_all_pictures_alike():
    near, far = torch.eye(4)[None, None], torch.eye(4).flip(1)[None, None]
    both = attention_distance(torch.cat([near, far]), patch_size=1, prefix=0)
    torch.testing.assert_close(both, torch.tensor([math.sqrt(2) / 2]))


# --- pairs of texts and pictures -------------------------------------------------------------------------------------


def test_recall_counts_ties_against_the_truth():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
    truth = torch.tensor([0, 1, 2])
    assert [round(recall_at(scores, truth, k), 4) for k in (1, 2, 3)] == [0.3333, 0.6667, 1.0]


def test_recall_of_no_opinion_is_zero_and_of_random_scores_is_chance():
    assert recall_at(torch.zeros(5, 9), torch.arange(5), 1) == 0.0
    scores = torch.rand(4000, 10, generator=torch.Generator().manual_seed(0))
    assert abs(recall_at(scores, torch.zeros(4000, dtype=torch.long), 3) - 0.3) < 0.03


def test_probe_scores_by_hand():
    #                      picture a: own, other   picture b: a's caption, own
    right = [[2.0, 1.0], [0.0, 3.0]]
    text_only = [[5.0, 4.0], [6.0, 7.0]]  # each picture prefers its own caption, but caption a prefers picture b
    wrong = [[1.0, 2.0], [3.0, 0.0]]
    found = probe_scores(torch.tensor([right, text_only, wrong]))
    expected = {"pair": 4 / 6, "text": 2 / 3, "image": 1 / 3, "group": 1 / 3}
    assert found == pytest.approx(expected)


def test_probe_scores_of_a_bag_of_words_are_never_a_pass():
    """Both captions alike: nothing is preferred, and a tie is no preference."""
    assert set(probe_scores(torch.ones(4, 2, 2)).values()) == {0.0}


FACTS = {"cat": "cat", "kitten": "cat", "cottage": "house", "house": "house", "dog": "dog"}


def test_cloze_hides_the_first_named_word_whole():
    tokenizer = Tokenizer.default()
    captions = ["a red cottage and a dog", "nothing here", "we see a kitten"]
    made = cloze(captions, tokenizer, FACTS)
    assert made.rows.tolist() == [0, 2] and made.answers == ("house", "cat")
    for row, word in enumerate(("cottage", "kitten")):
        pieces = len(tokenizer.encode(word)) - 2
        assert (made.ids[row] == tokenizer.mask_id).sum() == pieces
    visible = tokenizer.decode(made.ids[0][made.mask[0]])
    assert "dog" in visible and "cottage" not in visible


def test_filled_in_words_are_read_at_the_hidden_places_alone():
    tokenizer = Tokenizer.default()
    made = cloze(["a red cottage and a dog", "we see a kitten"], tokenizer, FACTS)
    answers = [tokenizer.encode("cottage")[1:-1], tokenizer.encode("dog")[1:-1]]

    def scores(rows, ids, mask):
        out = torch.zeros(*ids.shape, tokenizer.vocab_size)
        out[..., tokenizer.encode("a")[1]] = 1.0  # everywhere else "a"
        for b, row in enumerate(rows.tolist()):
            for place, token in zip((ids[b] == tokenizer.mask_id).nonzero().flatten(), answers[row], strict=True):
                out[b, place, token] = 2.0
        return out

    words = filled_in(made, tokenizer, scores, batch_size=1)
    assert words == ["cottage", "dog"]
    assert cloze_accuracy(made, words) == 0.5  # a cottage is a house; a dog is no cat
    assert cloze_accuracy(made, ["house", "kitten"]) == 1.0


def test_attention_shares_by_hand_and_without_padded_askers():
    weights = torch.zeros(1, 2, 5, 5)  # 3 words, the last one padding, and 2 image tokens
    weights[:, 0, 0, 0] = weights[:, 1, 0, 3] = 1.0  # one head stays with the text, the other crosses over
    weights[:, :, 1] = torch.tensor([0.25, 0.0, 0.0, 0.25, 0.5])
    weights[:, :, 2, 4] = 1.0  # the padded token looks at the picture alone, and must not count
    weights[:, :, 3, 1] = weights[:, :, 4, 4] = 1.0
    shares = attention_shares(weights, torch.tensor([[True, True, False]]))
    assert torch.allclose(shares, torch.tensor([0.375, 0.625, 0.5, 0.5]))


# --- what was written ------------------------------------------------------------------------------------------------


def test_words_are_split_at_spaces_and_punctuation():
    assert split_words("A red cat, on\tthe beach.") == ["a", "red", "cat", ",", "on", "the", "beach", "."]
    assert split_words(" ") == []


def test_distinct_by_hand():
    texts = ["a red cat", "A red dog", "wow"]
    assert distinct(texts, 1) == 5 / 7  # a red cat dog wow
    assert distinct(texts, 2) == 3 / 4  # "a red" twice; none goes on from one text into the next
    assert distinct(texts, 3) == 1.0
    assert distinct(texts, 4) == distinct([], 1) == distinct([""], 1) == 0.0
    assert distinct(["a cat , a cat"], 2) == distinct(["a cat, a cat"], 2) == 3 / 4  # a cat, cat ,, , a


def test_unique_by_hand():
    assert unique(["a cat", "a dog", "a cat", "a cat"]) == 0.5
    assert unique(["a cat"]) == 1.0 and unique([]) == 0.0


def test_bleu_of_the_reference_itself_is_one():
    texts = ["a red cat left of a ball", "two dogs, a house and a tree"]
    assert bleu(texts, [[text] for text in texts]) == 1.0
    assert bleu([text.upper() for text in texts], [["no", text] for text in texts]) == 1.0
    assert bleu(["a red cat left of a ball"], [["two dogs on the beach"]]) == 0.0
    assert bleu([""], [["a red cat left of a ball"]]) == 0.0


def test_bleu_by_hand():
    """Counts are clipped at a reference's own, and summed up over the corpus before anything is divided."""
    texts = ["a a red cat near a ball", "two dogs"]
    references = [["a red cat near a small red ball"], ["two big dogs", "dogs on the beach today"]]
    # 1: "a" counts twice, not three times; 2: all but "a a", "a ball" and "two dogs"; 3 and 4: what lies in
    # "a red cat near a". 9 words, where the references of the nearest length have 8 + 3.
    shares, brevity = ((6 + 2) / (7 + 2), (4 + 0) / (6 + 1), 3 / 5, 2 / 4), math.exp(1 - 11 / 9)
    assert bleu(texts, references) == pytest.approx(brevity * math.prod(shares) ** (1 / 4), rel=1e-12)
    # One more reference allows "a" three times and "a a" once. The nearest length is still 8.
    shares = (9 / 9, 5 / 7, 3 / 5, 2 / 4)
    more = [[*references[0], "a a a"], references[1]]
    assert bleu(texts, more) == pytest.approx(brevity * math.prod(shares) ** (1 / 4), rel=1e-12)
    # Texts longer than their references are not punished beyond their shares.
    assert bleu(["a red cat on a mat"], [["a red cat on a"]]) == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu(["two red dogs here"], [["two red dogs there"]]) == 0.0  # no 4-gram is right, and nothing is smoothed


def test_bleu_takes_any_number_of_references_but_none(caplog):
    texts, references = ["a red cat on a mat"] * 120, [["a red cat on a mat"]] * 119
    assert bleu(texts, [*references, ["x", "a red cat on a mat", "y"]]) == 1.0
    assert bleu([f"{text} ." for text in texts], [["a red cat on a mat."]] * 120) == 1.0
    assert not caplog.records  # sacrebleu keeps its advice to itself
    for wrong in (references, [*references, []]):
        with pytest.raises(ValueError, match="120 texts need as many lists of references"):
            bleu(texts, wrong)
    with pytest.raises(ValueError, match="0 texts"):
        bleu([], [])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_peak_memory_is_the_highest_point_and_not_the_sum(capfd):
    cpu, MB = torch.device("cpu"), 2**20

    def one() -> None:
        torch.zeros(10 * MB, dtype=torch.uint8)

    def after_each_other() -> None:
        for _ in range(3):
            torch.zeros(10 * MB, dtype=torch.uint8)  # released before the next one

    def together() -> None:
        kept = [torch.zeros(10 * MB, dtype=torch.uint8) for _ in range(3)]
        del kept

    held = torch.zeros(50 * MB, dtype=torch.uint8)  # what is there before does not count
    sizes = [peak_memory(step, device=cpu) / MB for step in (one, after_each_other, together)]
    assert sizes == pytest.approx([10, 10, 30], abs=0.5)
    assert len(held) == 50 * MB
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""  # the profiler announces itself on standard error


def test_peak_memory_counts_what_the_backward_pass_needs():
    weights = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(4096, 256)  # 4 MB

    def layers(n: int) -> None:
        y = x
        for _ in range(n):
            y = (y @ weights).tanh()  # tanh remembers its result
        y.sum().backward()

    few, many = (peak_memory(lambda n=n: layers(n), device=torch.device("cpu")) for n in (2, 6))
    assert many - few == pytest.approx(4 * 4 * 2**20, rel=0.3)


def test_peak_memory_knows_where_it_cannot_count():
    with pytest.raises(ValueError, match="cannot be followed on meta: measure it on the CPU or on CUDA"):
        peak_memory(lambda: None, device=torch.device("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_cuda():
    cuda = torch.device("cuda")
    assert peak_memory(lambda: torch.zeros(10 * 2**20, dtype=torch.uint8, device=cuda), device=cuda) >= 10 * 2**20
