"""The losses: by hand, beside other implementations and an exact solver, and the usual mistakes told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from minivlp.layers import MLMHead
from minivlp.losses import (
    IGNORE,
    cosine_cost,
    ipot,
    masked_lm_loss,
    transport_distance,
    word_patch_alignment,
    word_positions,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- hidden words ----------------------------------------------------------------------------------------------------


def hidden_words() -> tuple[MLMHead, Tensor, Tensor]:
    """A head, states (3, 6, 8) and labels (3, 6) with five asked positions, none of them in the last text."""
    labels = torch.full((3, 6), IGNORE)
    labels[0, 1:4], labels[1, 2], labels[1, 5] = torch.tensor([3, 0, 9]), 4, 4
    return MLMHead(8, 10), torch.randn(3, 6, 8, requires_grad=True), labels


def test_masked_lm_loss_is_cross_entropy_at_the_asked_positions():
    head, states, labels = hidden_words()
    loss = masked_lm_loss(head, states, labels)
    full = F.cross_entropy(head(states).transpose(1, 2), labels, ignore_index=IGNORE)
    close(loss, full)
    by_hand = [head(states)[b, i].softmax(0)[labels[b, i]].log() for b, i in (labels != IGNORE).nonzero().tolist()]
    close(loss, -torch.stack(by_hand).mean())
    close(torch.autograd.grad(loss, states)[0], torch.autograd.grad(full, states)[0])
    # Neither the mean over all positions nor the mean over texts.
    everywhere = F.cross_entropy(head(states).transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum") / 18
    per_text = torch.stack([masked_lm_loss(head, states[b : b + 1], labels[b : b + 1]) for b in range(3)]).mean()
    assert min((loss - everywhere).abs(), (loss - per_text).abs()) > 0.01


def test_the_head_sees_the_asked_positions_alone():
    head, states, labels = hidden_words()
    seen = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    masked_lm_loss(head, states, labels).backward()
    assert len(seen) == 1 and torch.equal(seen[0], states[labels != IGNORE]) and seen[0].shape == (5, 8)
    assert torch.equal(states.grad.abs().amax(-1) > 0, labels != IGNORE)


def test_nothing_asked_costs_nothing():
    head, states, labels = hidden_words()
    loss = masked_lm_loss(head, states, torch.full_like(labels, IGNORE))
    assert loss.item() == 0 and loss.shape == ()
    loss.backward()
    assert not states.grad.any()
    assert F.cross_entropy(torch.zeros(2, 10), torch.full((2,), IGNORE)).isnan()  # PyTorch's own answer


def test_masked_lm_loss_is_float32_under_autocast():
    head, states, labels = hidden_words()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(states).dtype == torch.bfloat16
        loss = masked_lm_loss(head, states, labels)
    assert loss.dtype == torch.float32 and (loss - masked_lm_loss(head, states, labels)).abs() < 0.05


# --- which tokens, which cost ----------------------------------------------------------------------------------------


def test_word_positions_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    kept = mask.clone()
    assert word_positions(mask).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(mask, kept)  # the input is left alone


def test_cosine_cost_by_hand():
    text = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    image = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]]])
    a = 1 - 0.5**0.5
    close(cosine_cost(text, image), torch.tensor([[[0.0, 1.0, 2.0, a], [1.0, 0.0, 1.0, a]]]))
    words, patches = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    close(cosine_cost(7 * words, 0.1 * patches), cosine_cost(words, patches))  # lengths do not count
    for b in range(2):
        for i in range(3):
            for j in range(4):
                expected = 1 - F.cosine_similarity(words[b, i], patches[b, j], dim=0)
                close(cosine_cost(words, patches)[b, i, j], expected)
    assert cosine_cost(words.bfloat16(), patches.bfloat16()).dtype == torch.float32


# --- transport -------------------------------------------------------------------------------------------------------


def problem(m: int = 5, n: int = 12, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Cost (B, m, n) between random words and patches, and masks without padding."""
    cost = cosine_cost(torch.randn(count, m, 16), torch.randn(count, n, 16))
    return cost, torch.ones(count, m, dtype=torch.bool), torch.ones(count, n, dtype=torch.bool)


def cheapest(cost: Tensor) -> float:
    """The exact optimum of one problem (m, n), by linear programming: the plan's sums are the only constraints."""
    m, n = cost.shape
    sums = [np.kron(np.eye(m)[i], np.ones(n)) for i in range(m)] + [np.kron(np.ones(m), np.eye(n)[j]) for j in range(n)]
    totals = [1 / m] * m + [1 / n] * n
    return linprog(cost.double().numpy().ravel(), A_eq=np.array(sums), b_eq=totals).fun


def uniter(cost: Tensor, *, beta: float = 0.5, iterations: int = 50, inner: int = 1) -> Tensor:
    """IPOT the way the papers write it, one problem (m, n) in double precision: T is (n, m), patches first."""
    C = cost.detach().double().numpy()
    m, n = C.shape
    sigma, T, A = np.full(m, 1 / m), np.ones((n, m)), np.exp(-C.T / beta)
    for _ in range(iterations):
        Q = A * T
        for _ in range(inner):
            delta = 1 / (n * (Q @ sigma))
            sigma = 1 / (m * (Q.T @ delta))
        T = np.diag(delta) @ Q @ np.diag(sigma)
    return torch.from_numpy(T.T)  # (m, n)


@pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 5), (9, 16), (1, 4), (4, 1)])
@pytest.mark.parametrize("iterations", [1, 5, 50])
def test_ipot_equals_the_papers_algorithm(m, n, iterations):
    cost, words, patches = problem(m, n)
    plan = ipot(cost, words, patches, iterations=iterations)
    close(plan[0].double(), uniter(cost[0], iterations=iterations))
    if min(m, n) > 1:  # and not with another beta, another kernel or the roles exchanged
        wrong = [
            uniter(cost[0], beta=1.0, iterations=iterations),
            uniter(1 - cost[0], iterations=iterations),
            uniter(cost[0].T, iterations=iterations).T,  # ends with the patches' sums exact
            uniter(cost[0], iterations=iterations, inner=5) if iterations == 1 else uniter(cost[0], iterations=2),
        ]
        for other in wrong:
            assert (plan[0] - other).abs().max() > 1e-5


def test_ipot_by_hand():
    """Two words, two patches, cost 0 on the diagonal and 1 off it: after k rounds off / diagonal = e^(-k / beta)."""
    cost, words = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool)
    for beta in (0.5, 1.0):
        for k in (1, 2, 3):
            plan = ipot(cost, words, words, beta=beta, iterations=k)
            ratio = math.exp(-k / beta)
            on, off = 0.5 / (1 + ratio), 0.5 * ratio / (1 + ratio)
            close(plan, torch.tensor([[[on, off], [off, on]]]))
            close(transport_distance(cost, plan), torch.tensor([2 * off]))


def test_the_same_vectors_in_another_order_cost_nothing():
    vectors = torch.eye(6)[None]
    order = torch.randperm(6)
    everything = torch.ones(1, 6, dtype=torch.bool)
    cost = cosine_cost(vectors, vectors[:, order])
    plan = ipot(cost, everything, everything)
    close(plan[0], torch.eye(6)[:, order] / 6)
    assert transport_distance(cost, plan).item() == pytest.approx(0, abs=1e-6)
    assert transport_distance(cost, torch.full_like(plan, 1 / 36)).item() > 0.8  # spread evenly it would cost


def test_one_word_goes_everywhere():
    cost, words, patches = problem(1, 7)
    plan = ipot(cost, words, patches)
    close(plan, torch.full((1, 1, 7), 1 / 7))
    close(transport_distance(cost, plan), cost.mean(dim=(1, 2)))


def test_more_iterations_come_nearer_to_the_exact_optimum():
    """At 5 words and 12 patches: about 4 % too dear after 5 rounds, 1 % after 10, below 0.1 % after 50."""
    cost, words, patches = problem(count=6)
    optimum = torch.tensor([cheapest(one) for one in cost])
    excess = {}
    for k, low, high in ((1, 0.1, 0.4), (5, 0.02, 0.08), (10, 0, 0.03), (50, -1e-4, 0.001), (1000, -1e-4, 1e-4)):
        excess[k] = transport_distance(cost, ipot(cost, words, patches, iterations=k)) / optimum - 1
        assert ((low < excess[k]) & (excess[k] < high)).all(), (k, excess[k])
    for fewer, more in ((1, 5), (5, 10), (10, 50)):
        assert (excess[more] < excess[fewer]).all()


def test_sums_of_the_plan():
    """Those over patches are exact by the last step, those over words nearly."""
    cost, words, patches = problem(count=6)
    plan = ipot(cost, words, patches)
    assert plan.min() >= 0
    close(plan.sum(2), torch.full((6, 5), 1 / 5), 1e-6)
    close(plan.sum(1), torch.full((6, 12), 1 / 12), 1e-3)
    assert (ipot(cost, words, patches, iterations=5).sum(1) - 1 / 12).abs().max() > 1e-4
    close(ipot(cost, words, patches, iterations=1000).sum(1), torch.full((6, 12), 1 / 12), 1e-5)


def padded_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Three problems in one batch of 7 x 14: words 1 to m and patches 1 to n, other tokens around them."""
    cost = problem(7, 14, 3)[0]
    words = torch.stack([(torch.arange(7) > 0) & (torch.arange(7) <= m) for m in (5, 3, 1)])
    patches = torch.stack([(torch.arange(14) > 0) & (torch.arange(14) <= n) for n in (13, 6, 9)])
    return cost, words, patches


def test_padding_gets_nothing_and_changes_nothing():
    cost, words, patches = padded_problem()
    plan = ipot(cost, words, patches)
    both = words[:, :, None] & patches[:, None, :]
    assert not plan[~both].any() and plan[both].min() > 0
    close(plan.sum(dim=(1, 2)), torch.ones(3))
    distance = transport_distance(cost, plan)
    for b, (m, n) in enumerate(((5, 13), (3, 6), (1, 9))):
        alone = cost[b : b + 1, 1 : m + 1, 1 : n + 1]
        single = ipot(alone, words[b : b + 1, 1 : m + 1], patches[b : b + 1, 1 : n + 1])
        close(plan[b : b + 1, 1 : m + 1, 1 : n + 1], single)
        close(distance[b : b + 1], transport_distance(alone, single))
        close(plan[b, 1 : m + 1, 1 : n + 1].double(), uniter(alone[0]))
    wild = torch.where(both, cost, 1e4 * torch.rand_like(cost))
    assert torch.equal(ipot(wild, words, patches), plan)  # whatever the padding costs


def test_a_cost_of_zero_at_padding_is_not_enough():
    """The usual mistake: the cost masked with 0, the kernel not. Padding is then free of charge and takes most."""
    cost, words, patches = padded_problem()
    both = words[:, :, None] & patches[:, None, :]
    distance = transport_distance(cost, ipot(cost, words, patches))
    for b in range(3):
        careless = uniter(cost[b] * both[b])
        assert careless[~both[b]].sum() > 0.2
        assert abs((careless * cost[b] * both[b]).sum() - distance[b]) > 0.1


def test_no_gradient_flows_through_the_plan():
    cost, words, patches = padded_problem()
    cost.requires_grad_()
    plan = ipot(cost, words, patches, iterations=5)
    assert not plan.requires_grad
    transport_distance(cost, plan).sum().backward()
    assert torch.equal(cost.grad, plan)  # the gradient is the plan itself
    # With a gradient through the rounds as well it would be another one, from a graph five times as deep. (Near the
    # optimum the two agree, since there no small change of the plan changes what it costs.)
    through = ipot.__wrapped__(cost, words, patches, iterations=5)
    close(through.detach(), plan)
    gradient = torch.autograd.grad(transport_distance(cost, through).sum(), cost)[0]
    assert (gradient - plan).abs().max() > 0.01


# --- word-patch alignment --------------------------------------------------------------------------------------------


def pairs() -> dict[str, Tensor]:
    """Four pairs: texts of 7, 6, 4 and 3 tokens with [CLS] and [SEP], pictures of a class token and 9 patches."""
    text_mask = torch.arange(7) < torch.tensor([7, 6, 4, 3])[:, None]
    return dict(
        text=torch.randn(4, 7, 16), image=torch.randn(4, 10, 16), words=word_positions(text_mask),
        patches=(torch.arange(10) > 0).expand(4, -1), match=torch.tensor([1, 0, 1, 1]),
    )  # fmt: skip


def test_alignment_adds_matching_pairs_and_subtracts_the_others():
    batch = pairs()
    loss, distance = word_patch_alignment(**batch)
    assert loss.shape == () and distance.shape == (4,) and distance.min() > 0
    for b in range(4):
        w, p = batch["words"][b], batch["patches"][b]
        cost = cosine_cost(batch["text"][b : b + 1, w], batch["image"][b : b + 1, p])[0]
        close(distance[b].double(), (uniter(cost) * cost.double()).sum())
    close(loss, (distance[0] - distance[1] + distance[2] + distance[3]) / 4)
    # Not the difference of the two means, not the sum, not the matching pairs alone.
    for wrong in (distance[[0, 2, 3]].mean() - distance[1], 4 * loss, distance[[0, 2, 3]].sum() / 4):
        assert (loss - wrong).abs() > 0.05
    for match in (batch["match"].float(), batch["match"].bool()):
        close(word_patch_alignment(**batch | {"match": match})[0], loss)
    nobody = word_patch_alignment(**batch | {"match": torch.zeros(4)})
    close(nobody[0], -distance.mean())  # below 0: no minimum there


def test_iterations_arrive():
    batch = pairs()
    few, many = (word_patch_alignment(**batch, iterations=k)[1] for k in (2, 200))
    assert (few[:3] - many[:3]).min() > 0.001  # the last text has one word, and one plan


def test_ends_of_the_text_and_the_class_token_take_no_part():
    batch = pairs()
    distance = word_patch_alignment(**batch)[1]
    moved = {name: batch[name].clone() for name in ("text", "image")}
    moved["text"][~batch["words"]] += torch.randn(16)
    moved["image"][:, 0] += torch.randn(16)
    close(word_patch_alignment(**batch | moved)[1], distance)
    # If they did, the numbers would be others.
    with_ends = torch.arange(7) < torch.tensor([7, 6, 4, 3])[:, None]
    with_class = torch.ones(4, 10, dtype=torch.bool)
    for wrong in ({"words": with_ends}, {"patches": with_class}):
        assert (word_patch_alignment(**batch | wrong)[1] - distance).abs().max() > 0.01


def test_a_step_down_brings_matching_pairs_together_and_drives_others_apart():
    batch = pairs()
    text = nn.Parameter(batch["text"])
    loss, before = word_patch_alignment(**batch | {"text": text})
    loss.backward()
    assert torch.equal(text.grad.abs().amax(-1) > 0, batch["words"])
    after = word_patch_alignment(**batch | {"text": text.detach() - 2 * text.grad})[1]
    assert ((after < before) == batch["match"].bool()).all()


def test_alignment_is_float32_under_autocast():
    batch = pairs()
    loss, distance = word_patch_alignment(**batch)
    half = {name: batch[name].bfloat16() for name in ("text", "image")}
    rounded = word_patch_alignment(**batch | {name: value.float() for name, value in half.items()})[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Without a guard of its own the cost is a product in half precision, and two digits are what is left of it.
        coarse = cosine_cost(batch["text"], batch["image"])
        got, distances = word_patch_alignment(**batch)
        from_half = word_patch_alignment(**batch | half)[1]
        plan = ipot(coarse, batch["words"], batch["patches"])
    assert got.dtype == distances.dtype == from_half.dtype == plan.dtype == torch.float32
    close(got, loss)
    close(distances, distance)
    close(from_half, rounded)
    close(plan, ipot(coarse.float(), batch["words"], batch["patches"]))
    assert (coarse.float() - cosine_cost(batch["text"], batch["image"])).abs().max() > 1e-4
