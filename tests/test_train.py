"""The training loop: what a step does, what a run leaves, how it stops and goes on, and its files."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minivlp
from minivlp import train
from minivlp.models.cnn import ResNetConfig, SmallResNet
from minivlp.models.vit import ViT, ViTConfig
from minivlp.notebooks import ROOT
from minivlp.notebooks.execute import execute
from minivlp.train import (
    CheckpointError,
    History,
    Progress,
    TrainingDiverged,
    evaluating,
    fit,
    learning_rate,
    load_weights,
    parameter_groups,
    save_weights,
    train_step,
)

torch.set_num_threads(1)
TINY = ViTConfig(image_size=8, patch_size=4, channels=1, width=8, depth=1, heads=2, num_classes=3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """Something of everything: a matrix, dropout, batch norm's running averages."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc1, self.norm, self.drop = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.fc2 = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))


def batches(step: int) -> tuple[Tensor, Tensor]:
    """A function of the step alone; the class is where the first three numbers are largest."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def run(model: nn.Module, *, steps: int = 8, **options: object) -> History:
    return fit(model, options.pop("batches", batches), options.pop("loss_fn", loss_fn),
               **{"steps": steps, "lr": 0.02, "progress": None, **options})  # fmt: skip


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    """Bit for bit, buffers included."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at(step: int, action: Callable[[], None]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """`batches`, with something happening when the batch of `step` is asked for."""

    def hooked(now: int) -> tuple[Tensor, Tensor]:
        if now == step:
            action()
        return batches(now)

    return hooked


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


# --- the optimiser's parts -------------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 2, 1), nn.Conv2d(1, 2, 3)
        self.linear, self.norm, self.batch_norm = nn.Linear(4, 5), nn.LayerNorm(5), nn.BatchNorm2d(2)
        self.words, self.tied = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.tied.weight = self.words.weight  # shared, as a language model's output layer often is
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 5)), nn.Parameter(torch.zeros(1, 4, 5))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_only_matrices_decay_and_each_parameter_stands_once():
    model = Everything()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "conv1.weight", "conv2.weight", "linear.weight", "words.weight"  # the last is tied.weight too
    }  # fmt: skip
    assert {names[id(p)] for p in spared["params"]} == {
        "conv1.bias", "conv2.bias", "linear.bias", "norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias",
        "cls_token", "pos_embed", "logit_scale",
    }  # fmt: skip
    everyone = [id(p) for p in decayed["params"] + spared["params"]]
    assert len(everyone) == len(set(everyone)) == sum(p.requires_grad for p in model.parameters())


def test_the_groups_suit_a_model_without_matrices():
    model = nn.LayerNorm(3)
    torch.optim.AdamW(parameter_groups(model, 0.1))
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [0, 2]


def test_decay_acts_on_matrices_alone():
    """Without any gradient signal only the decayed group moves: w * (1 - lr * decay)."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.ones_(model[0].bias)
    before = copy_of(model)
    fit(model, batches, lambda m, x, y: 0.0 * m(x).sum(), steps=1, lr=0.1, weight_decay=0.5, warmup=0, progress=None)
    torch.testing.assert_close(model[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


def test_learning_rate_by_hand():
    rates = [learning_rate(step, steps=20, peak=1.0, warmup=0.2) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])  # 4 steps up; the cosine starts at the top
    assert rates[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))  # a quarter of the way down
    assert rates[12] == pytest.approx(0.5)  # half way
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(5, steps=20, peak=3e-3, warmup=0.2) == pytest.approx(3e-3 * rates[5])


def test_learning_rate_without_warmup_starts_at_the_peak_and_ends_near_zero():
    assert learning_rate(0, steps=1000, peak=0.5, warmup=0.0) == 0.5
    assert 0 < learning_rate(999, steps=1000, peak=0.5, warmup=0.0) < 1e-5
    assert learning_rate(0, steps=1, peak=0.5) == 0.5  # a single step is no climb
    assert learning_rate(3, steps=4, peak=0.5, warmup=1.0) == 0.5  # nothing but climb


# --- one step --------------------------------------------------------------------------------------------------------


def descend(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_step_is_gradient_descent():
    model, x = nn.Linear(1, 1, bias=False), torch.tensor([[3.0]])
    nn.init.constant_(model.weight, 2.0)
    values, norm = train_step(model, descend(model), lambda m, x: m(x).sum(), (x,), clip=0)
    assert (values, norm) == ({"loss": 6.0}, 3.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 3.0)


def test_clipping_shortens_the_gradient_to_its_limit_and_reports_the_full_length():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    _, norm = train_step(model, descend(model), lambda m, x: m(x).sum(), (torch.tensor([[3.0, 4.0]]),), clip=1.0)
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.data, -0.1 * torch.tensor([[0.6, 0.8]]))


def test_named_losses_are_added_up_and_returned_by_name():
    model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    nn.init.constant_(model.weight, 2.0)
    losses = lambda m, x: {"match": m(x).sum(), "contrast": 10 * m(x).sum()}  # noqa: E731
    values, norm = train_step(model, descend(model), losses, (x,), clip=0)
    assert values == {"match": 2.0, "contrast": 20.0}
    assert norm == pytest.approx(11.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1 * 11)


def test_the_gradient_of_the_step_before_is_forgotten():
    model, optimizer = nn.Linear(1, 1, bias=False), None
    optimizer = descend(model)
    norms = [train_step(model, optimizer, lambda m, x: m(x).sum(), (torch.ones(1, 1),), clip=0)[1] for _ in range(3)]
    assert norms == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "bad",
    {
        "loss nan": lambda m, x: m(x).sum() * math.nan,
        "loss inf": lambda m, x: m(x).sum() + math.inf,
        "one of two": lambda m, x: {"good": m(x).sum(), "bad": m(x).sum() * math.nan},
        "gradient alone": lambda m, x: (m(x) * 0).sum().sqrt(),  # loss 0, slope 0 * inf
    }.items(),
    ids=lambda item: item[0],
)
def test_a_step_that_is_not_finite_leaves_the_weights_alone(bad):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = copy_of(model)
    values, norm = train_step(model, optimizer, bad[1], (torch.ones(1, 2),), clip=1.0)
    assert not all(map(math.isfinite, (norm, *values.values())))
    assert same(model, before)
    assert not optimizer.state_dict()["state"]  # the moments have not seen it either


# --- a run -----------------------------------------------------------------------------------------------------------


def test_fit_learns_and_keeps_a_full_history():
    model = Net()
    history = run(model, steps=120, lr=0.02, warmup=0.1)
    first, *_, last = history.smooth(window=20)
    assert last < 0.6 * first
    assert history.steps == len(history.losses["loss"]) == len(history.lr) == 120
    assert history.lr == [learning_rate(step, steps=120, peak=0.02, warmup=0.1) for step in range(120)]
    assert history.seconds > 0
    assert history.stopped == ""
    assert not model.training  # ready to be used


def test_smooth_is_the_mean_of_full_windows():
    assert History(losses={"loss": [1.0, 3.0, 5.0, 7.0, 100.0]}).smooth(window=2) == [2.0, 6.0]


def test_frozen_parts_stay_and_their_old_gradients_do_not_shrink_the_step():
    def trained(old_gradient: float) -> nn.Module:
        torch.manual_seed(1)
        model = Net()
        model.fc1.requires_grad_(False)
        model.fc1.weight.grad = torch.full_like(model.fc1.weight, old_gradient)  # left by an earlier backward()
        run(model, steps=3)
        return model

    torch.manual_seed(1)
    fresh = Net()
    model = trained(0.0)
    assert torch.equal(model.fc1.weight, fresh.fc1.weight)
    assert not torch.equal(model.fc2.weight, fresh.fc2.weight)
    assert same(model, trained(1e6))


def test_several_losses_are_recorded_by_name():
    losses = lambda m, x, y: {"a": loss_fn(m, x, y), "b": 2 * loss_fn(m, x, y).detach()}  # noqa: E731
    history = run(Net(), steps=3, loss_fn=losses)
    assert {name: len(values) for name, values in history.losses.items()} == {"a": 3, "b": 3}


def test_hooks_run_after_each_update_in_order():
    seen = []
    model = Net()

    def clamp(m: nn.Module, step: int) -> None:
        seen.append(step)
        with torch.no_grad():
            m.fc2.weight.clamp_(-0.01, 0.01)

    def look(m: nn.Module, step: int) -> None:
        assert m.fc2.weight.abs().max() <= 0.01  # the hook before it has acted on the updated weights

    run(model, steps=4, lr=0.5, after_step=(clamp, look))
    assert seen == [0, 1, 2, 3]
    assert model.fc2.weight.abs().max() <= 0.01


def test_batches_are_asked_for_by_step_and_in_training_mode():
    asked, modes = [], []

    def note(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return batches(step)

    def mode(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        modes.append(m.training)
        return loss_fn(m, x, y)

    run(Net().eval(), steps=3, batches=note, loss_fn=mode)
    assert asked == [0, 1, 2]
    assert modes == [True] * 3


def test_metrics_come_every_few_steps_and_at_the_end():
    modes = []

    def measure(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"share": torch.tensor(0.25)}

    history = run(Net(), steps=7, evaluate=measure, evaluate_every=3)
    assert history.metric_steps == [3, 6, 7]
    assert history.metrics == {"share": [0.25] * 3}
    assert type(history.metrics["share"][0]) is float  # so that it can be written as JSON
    assert modes == [(False, False)] * 3


def test_measuring_and_saving_do_not_change_training(tmp_path):
    def measure(model: nn.Module) -> dict[str, float]:
        model(torch.randn(5, 4))  # draws numbers; must not move batch norm's averages either
        return {"noise": torch.rand(()).item()}

    plain, watched = Net(), Net()
    watched.load_state_dict(plain.state_dict())
    torch.manual_seed(3)
    a = run(plain, steps=9)
    torch.manual_seed(3)
    b = run(watched, steps=9, evaluate=measure, evaluate_every=2, checkpoint=tmp_path / "c.safetensors",
            checkpoint_every=2)  # fmt: skip
    assert a.losses == b.losses
    assert same(plain, watched)


def test_evaluating_restores_mode_gradients_and_random_state():
    model = Net().train()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise ZeroDivisionError
    assert model.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    with evaluating(model.eval()):
        pass
    assert not model.training


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_says_where_and_keeps_the_last_good_step():
    def poisoned(step: int) -> tuple[Tensor, Tensor]:
        x, y = batches(step)
        return (x * math.nan if step == 5 else x), y

    good, model = Net(), Net()
    model.load_state_dict(good.state_dict())
    torch.manual_seed(7)
    expected = run(good, steps=8, batches=at(5, press_ctrl_c))  # exactly five steps of the same run
    torch.manual_seed(7)
    with pytest.raises(TrainingDiverged) as caught:
        run(model, steps=8, batches=poisoned)
    rate = learning_rate(5, steps=8, peak=0.02)
    for part in ("step 5", "batch 5", f"lr {rate:.1e}", "nan"):
        assert part in str(caught.value)
    assert caught.value.model is model
    assert caught.value.history.losses == expected.losses
    assert caught.value.history.steps == 5
    assert same(model, good)  # batch norm's running averages too: without care they would be NaN
    assert not model.training


def test_an_infinite_gradient_stops_the_run_too():
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (m(x) * 0).sum().sqrt()

    with pytest.raises(TrainingDiverged, match=r"step 0 .*gradient norm (nan|inf)"):
        run(Net(), loss_fn=loss)


def test_a_huge_rate_diverges():
    model = nn.Linear(4, 1)
    with pytest.raises(TrainingDiverged) as caught:
        run(model, lr=1e25, warmup=0.0, loss_fn=lambda m, x, y: m(x).square().mean())
    assert caught.value.history.steps >= 1
    assert all(map(math.isfinite, caught.value.history.losses["loss"]))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_divergence_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(TrainingDiverged("step 3", History(lr=[0.1]), nn.Linear(1, 1))))
    assert (str(error), error.history.lr, type(error.model)) == ("step 3", [0.1], nn.Linear)


def test_ctrl_c_returns_what_was_trained(capsys):
    stopped, whole = Net(), Net()
    whole.load_state_dict(stopped.state_dict())
    after = []
    torch.manual_seed(5)
    run(whole, steps=8, after_step=[lambda m, step: after.append(copy_of(m))])
    torch.manual_seed(5)
    history = run(stopped, steps=8, batches=at(4, press_ctrl_c), progress="net")
    assert history.steps == len(history.losses["loss"]) == 4
    assert "4 of 8 steps" in history.stopped
    assert same(stopped, after[3])
    assert not stopped.training
    assert "stopped by hand after 4 of 8 steps" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["loss_fn", "after_step", "evaluate"])
def test_ctrl_c_anywhere_leaves_a_history_of_one_length(where):
    calls = []

    def maybe(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            press_ctrl_c()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if where == "loss_fn":
            maybe()
        return {"a": loss_fn(m, x, y), "b": loss_fn(m, x, y)}

    def measure(m: nn.Module) -> dict[str, float]:
        if where == "evaluate":
            maybe()
        return {"one": 1.0, "two": 2.0}

    model = Net()
    history = run(model, steps=9, loss_fn=loss, evaluate=measure, evaluate_every=1,
                  after_step=[maybe] if where == "after_step" else [])  # fmt: skip
    assert {len(values) for values in history.losses.values()} == {history.steps} == {3 if where == "evaluate" else 2}
    assert {len(values) for values in history.metrics.values()} == {len(history.metric_steps)} == {2}
    assert not model.training


def test_ctrl_c_at_any_line_of_the_loop_leaves_a_history_of_one_length():
    """Every line of `fit` in turn is where the signal arrives."""
    losses = lambda m, x, y: {"a": loss_fn(m, x, y), "b": loss_fn(m, x, y)}  # noqa: E731
    options = {"steps": 3, "loss_fn": losses, "evaluate": lambda m: {"one": 1.0, "two": 2.0}, "evaluate_every": 1}
    before, stops = sys.gettrace(), []
    for moment in range(1, 1000):
        lines = 0

        def at_line(frame: object, event: str, _: object) -> object:
            nonlocal lines
            if frame.f_code is not fit.__code__:
                return None
            lines += event == "line"
            if lines == moment:  # noqa: B023 - called within this turn alone
                raise KeyboardInterrupt
            return at_line

        sys.settrace(at_line)
        try:
            history = run(Net(), **options)
        except KeyboardInterrupt:  # before the first step or after the last
            continue
        finally:
            sys.settrace(before)
        assert {len(values) for values in (*history.losses.values(), history.lr)} == {history.steps}
        assert {len(values) for values in history.metrics.values()} <= {len(history.metric_steps)}
        if lines < moment:  # the run was over before
            break
        stops.append(history.steps)
    assert history.steps == 3 and not history.stopped
    assert stops == sorted(stops) and set(stops) == {0, 1, 2, 3}


def test_another_error_passes_through_and_still_leaves_eval_mode(capsys):
    model = Net()
    with pytest.raises(IndexError, match="no such row"):
        run(model, batches=at(2, lambda: (_ for _ in ()).throw(IndexError("no such row"))), progress="net")
    assert not model.training
    assert capsys.readouterr().err.count("\n") == 1


# --- checkpoints -----------------------------------------------------------------------------------------------------


def vit_batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("kind", ["net", "vit"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net() if kind == "net" else ViT(ViTConfig(**{**vars(TINY), "dropout": 0.2}))

    def measure(model: nn.Module) -> dict[str, float]:
        return {"noise": torch.rand(()).item()}

    source = batches if kind == "net" else vit_batches
    loss = loss_fn if kind == "net" else lambda m, x, y: F.cross_entropy(m(x)[0], y)
    options = {"steps": 13, "loss_fn": loss, "evaluate": measure, "evaluate_every": 4}

    whole = fresh(1)
    expected = run(whole, batches=source, **options)

    path = tmp_path / "deep" / "run.safetensors"
    options |= {"checkpoint": path, "checkpoint_every": 3}

    def until(last: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        def stop(step: int) -> tuple[Tensor, Tensor]:
            if step == last:
                raise KeyboardInterrupt
            return source(step)

        return stop

    first = run(fresh(1), batches=until(8), **options)
    assert first.steps == 8 and path.exists()
    random.seed(99)
    second = run(fresh(2), batches=until(11), **options)  # other weights and seed: all comes from the file
    assert second.steps == 11
    torch.manual_seed(3)
    resumed = fresh(4)
    history = run(resumed, batches=source, **options)

    assert same(resumed, whole)
    assert (history.losses, history.lr) == (expected.losses, expected.lr)
    assert (history.metrics, history.metric_steps) == (expected.metrics, expected.metric_steps)
    assert history.stopped == ""
    # A finished run is there again at once, without a step.
    again = fresh(5)
    assert run(again, batches=until(0), **options).losses == expected.losses
    assert same(again, whole)


def test_the_optimiser_goes_on_with_its_moments(tmp_path):
    """The state in the file is AdamW's own, not a fresh start: first and second moment and the step count."""
    path = tmp_path / "run.safetensors"
    seen = {}
    step = train.train_step

    def spy(model: nn.Module, optimizer: torch.optim.Optimizer, *args: object, **kwargs: object):
        seen.setdefault("before", deepcopy(optimizer.state_dict()["state"]))
        result = step(model, optimizer, *args, **kwargs)
        seen["after"] = deepcopy(optimizer.state_dict()["state"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", spy)
        run(Net(), steps=6, checkpoint=path, checkpoint_every=3, batches=at(3, press_ctrl_c))
        kept = seen["after"]
        seen.clear()
        run(Net(), steps=6, checkpoint=path, checkpoint_every=3)
    resumed = seen["before"]
    assert resumed.keys() == kept.keys() and kept
    for index, state in kept.items():
        assert state.keys() == resumed[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, resumed[index][key]) for key, value in state.items())
        assert state["step"] == 3


def test_a_checkpoint_holds_the_whole_history_and_may_be_older_than_a_part_of_it(tmp_path):
    path, model = tmp_path / "run.safetensors", Net()
    optimizer = torch.optim.AdamW(model.parameters())
    losses = {"loss": [3.0, 2.0], "early": [1.0]}
    metrics = {"val": [0.5], "seldom": [0.25]}
    history = History(losses, [0.1, 0.2], metrics, [2], 7.5, "by hand", {"early": 0}, {"seldom": [1]})
    assert all(getattr(history, f.name) != getattr(History(), f.name) for f in fields(history))
    train.save_checkpoint(path, model, optimizer, {}, history)
    assert train.load_checkpoint(path, model, optimizer, {}) == history
    tensors, about = train.read_safetensors(path)
    before = json.loads(about["history"])
    del before["began"], before["measured_at"]
    save_file(tensors, path, about | {"history": json.dumps(before)})
    assert train.load_checkpoint(path, model, optimizer, {}) == replace(history, began={}, measured_at={})


def test_ctrl_c_names_the_checkpoint_only_if_there_is_one(tmp_path):
    path = tmp_path / "run.safetensors"
    early = run(Net(), checkpoint=path, checkpoint_every=3, batches=at(2, press_ctrl_c))
    assert not path.exists() and "checkpoint" not in early.stopped
    later = run(Net(), checkpoint=path, checkpoint_every=3, batches=at(5, press_ctrl_c))
    assert path.exists() and "run.safetensors" in later.stopped


@pytest.mark.parametrize(
    "change",
    {
        "lr": {"lr": 0.03},
        "steps": {"steps": 9},
        "betas": {"betas": (0.9, 0.98)},
        "weight decay": {"weight_decay": 0.0},
        "warm-up": {"warmup": 0.5},
        "clip": {"clip": 2.0},
    }.items(),
    ids=lambda item: item[0],
)
def test_a_checkpoint_of_another_recipe_is_refused(change, tmp_path):
    path = tmp_path / "run.safetensors"
    run(Net(), checkpoint=path, checkpoint_every=4)
    model = Net()
    before = copy_of(model)
    with pytest.raises(CheckpointError, match=r"^run\.safetensors belongs to a run with another .* recipe: delete"):
        run(model, checkpoint=path, **change[1])
    assert same(model, before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(Net(), checkpoint=path)
    frozen = Net()
    frozen.fc1.requires_grad_(False)  # the same shapes, but another set of moments
    for other in (Net(width=7), frozen):
        with pytest.raises(CheckpointError, match="another model or recipe"):
            run(other, checkpoint=path)


def spoil(path: Path, kind: str) -> None:
    data = path.read_bytes()
    path.write_bytes({
        "empty": b"", "truncated": data[: len(data) // 2], "header cut": data[:20], "one byte short": data[:-1],
        "text": b"not a checkpoint\n" * 30, "zeros": bytes(len(data)),
    }[kind])  # fmt: skip


@pytest.mark.parametrize("kind", ["empty", "truncated", "header cut", "one byte short", "text", "zeros", "a folder"])
def test_a_damaged_file_gives_one_clear_error(kind, tmp_path):
    checkpoint, weights = tmp_path / "run.safetensors", tmp_path / "vit.safetensors"
    model, vit = Net(), ViT(TINY)
    if kind == "a folder":
        checkpoint.mkdir()
        weights.mkdir()
    else:
        run(model, steps=2, checkpoint=checkpoint)
        save_weights(vit, weights)
        spoil(checkpoint, kind)
        spoil(weights, kind)
    before = copy_of(model), copy_of(vit)
    with pytest.raises(CheckpointError, match=r"^run\.safetensors is damaged or no safetensors file"):
        run(model, steps=2, checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"^vit\.safetensors is damaged or no safetensors file"):
        load_weights(vit, weights)
    assert same(model, before[0]) and same(vit, before[1])


def test_a_foreign_safetensors_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="another model or recipe"):
        run(Net(), checkpoint=path)
    with pytest.raises(CheckpointError, match="holds a file of another program, not a ViT"):
        load_weights(ViT(TINY), path)


# --- files are whole at every moment ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """Input and output share their table, as language models do."""

    @dataclass(frozen=True)
    class Config:
        words: int = 5

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.words.weight


def tied_loss(model: Tied, ids: Tensor) -> Tensor:
    return F.cross_entropy(model.out(model.words(ids)), ids)


def test_shared_weights_can_be_saved_and_stay_shared(tmp_path):
    model, other, path = Tied(), Tied(), tmp_path / "run.safetensors"
    history = fit(model, lambda step: (torch.arange(5),), tied_loss, steps=3, checkpoint=path, progress=None)
    assert fit(other, lambda step: (torch.arange(5),), tied_loss, steps=3, checkpoint=path, progress=None) == history
    assert same(model, other) and other.out.weight is other.words.weight
    save_weights(model, tmp_path / "tied.safetensors")
    load_weights(third := Tied(), tmp_path / "tied.safetensors")
    assert same(model, third) and third.out.weight is third.words.weight


MOMENTS = ("while writing", "disk full", "at fsync", "at replace")


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_write_leaves_the_old_file(moment, tmp_path, monkeypatch):
    """Whatever fails on the way to the new file, what a reader finds under the name is the old one, whole."""
    path = tmp_path / "vit.safetensors"
    old, new = ViT(TINY), ViT(TINY)
    save_weights(old, path)
    content = path.read_bytes()
    checked = []

    def fails(*_: object) -> None:
        checked.append(path.read_bytes() == content)  # a kill right here runs no clean-up: look at the file now
        raise OSError(28, "No space left on device") if moment == "disk full" else KeyboardInterrupt

    def half(tensors: dict[str, Tensor], where: Path, metadata: dict[str, str]) -> None:
        Path(where).write_bytes(content[: len(content) // 2])
        fails()

    if moment in ("while writing", "disk full"):
        monkeypatch.setattr(train, "save_file", half)
    else:
        monkeypatch.setattr(train.os, moment.removeprefix("at "), fails)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_weights(new, path)
    monkeypatch.undo()
    assert checked == [True]
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing is left beside it
    save_weights(new, path)
    load_weights(old, path)
    assert same(old, new)


def test_a_full_disk_during_training_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    write, calls = train.save_file, []

    def fills_up(tensors: dict[str, Tensor], where: Path, metadata: dict[str, str]) -> None:
        calls.append(where)
        if len(calls) == 2:
            Path(where).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, where, metadata)

    whole = Net()
    start = copy_of(whole)
    torch.manual_seed(2)
    run(whole, steps=9)
    interrupted = Net()
    interrupted.load_state_dict(start)
    monkeypatch.setattr(train, "save_file", fills_up)
    torch.manual_seed(2)
    with pytest.raises(OSError, match="No space left"):
        run(interrupted, steps=9, checkpoint=path, checkpoint_every=3)
    assert not interrupted.training
    resumed = Net()
    assert run(resumed, steps=9, checkpoint=path, checkpoint_every=3).steps == 9
    assert same(resumed, whole)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of every fork
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """A process saves checkpoints as fast as it can and is killed, again and again; each time the run can go on."""
    path = tmp_path / "run.safetensors"
    model = nn.Linear(400, 400)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 400)).sum().backward()
    optimizer.step()
    dice = random.Random(0)
    count = 0
    for _ in range(12):
        child = os.fork()
        if child == 0:  # never returns
            try:
                while True:
                    count += 1
                    with torch.no_grad():
                        model.weight.fill_(count)
                        model.bias.fill_(count)
                    train.save_checkpoint(path, model, optimizer, {}, History(lr=[0.1] * count))
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        there = nn.Linear(400, 400)
        history = train.load_checkpoint(path, there, torch.optim.AdamW(there.parameters()), {})
        assert history.steps >= max(1, count)
        count = history.steps
        assert (there.weight == count).all() and (there.bias == count).all()  # all of one save, none of another
    assert count > 1


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_come_back_exactly_with_what_was_said_of_them(tmp_path):
    model, other = ViT(TINY), ViT(TINY)
    save_weights(model, tmp_path / "new" / "vit.safetensors", lesson="01_vit")
    assert not same(model, other)
    metadata = load_weights(other, tmp_path / "new" / "vit.safetensors")
    assert same(model, other)
    assert metadata["lesson"] == "01_vit" and metadata["model"] == "ViT"


def test_half_precision_halves_the_file_and_rounds(tmp_path):
    model, other = SmallResNet(ResNetConfig()), SmallResNet(ResNetConfig())
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    save_weights(model, full)
    save_weights(model, half, dtype=torch.float16)
    assert half.stat().st_size < 0.52 * full.stat().st_size
    stored = load_file(half)
    assert stored["stem.weight"].dtype == torch.float16
    assert stored["stages.0.norm1.num_batches_tracked"].dtype == torch.int64  # counts are not rounded
    load_weights(other, half)
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert torch.equal(other.stem.weight, model.stem.weight.half().float())


def test_wrong_weights_give_one_clear_error(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_weights(ViT(TINY), path)
    with pytest.raises(CheckpointError, match=r"there is no file other\.safetensors: check the path"):
        load_weights(ViT(TINY), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds a ViT, not a SmallResNet"):
        load_weights(SmallResNet(ResNetConfig()), path)
    wider = ViT(ViTConfig(**{**vars(TINY), "width": 12, "pool": "mean"}))
    message = r"was made with pool='cls' \(here 'mean'\), width=8 \(here 12\): build"
    with pytest.raises(CheckpointError, match=message):
        load_weights(wider, path)
    tensors, metadata = train.read_safetensors(path)
    tensors.pop("head.bias")
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"vit\.safetensors has other tensors than a ViT: get it again"):
        load_weights(ViT(TINY), path)


def test_a_config_with_tuples_survives_the_file(tmp_path):
    config = ResNetConfig(widths=(4, 6), blocks=1)
    save_weights(SmallResNet(config), tmp_path / "cnn.safetensors")
    load_weights(SmallResNet(config), tmp_path / "cnn.safetensors")


def test_later_lessons_take_the_own_model_else_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    with pytest.raises(CheckpointError, match=r"there is no file vit\.safetensors"):
        train.trained("vit", ViT(TINY))
    reference, own = ViT(TINY), ViT(TINY)
    save_weights(reference, tmp_path / "data" / "checkpoints" / "vit.safetensors")
    filled = train.trained("vit", model := ViT(TINY).train())
    assert filled is model and not model.training
    assert same(model, reference)
    assert train.keep(own, "vit") == tmp_path / "cache" / "checkpoints" / "vit.safetensors"
    assert same(train.trained("vit", ViT(TINY)), own)
    assert same(train.trained("vit", ViT(TINY), own=False), reference)
    train.keep(ViT(replace(TINY, width=2 * TINY.width)), "vit")  # somebody played with the size
    assert same(train.trained("vit", ViT(TINY)), reference)


# --- the progress line -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: after \\r\\x1b[K a line starts anew."""
    return [line.split("\r\x1b[K")[-1] for line in written.split("\n")]


def test_a_log_gets_one_line_without_times(capsys):
    run(Net(), steps=30, progress="net", evaluate=lambda m: {"share": 0.5})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"net: 30 steps · loss \d\.\d{3} · share 0\.500\n", err)


def test_silence_is_silent(capsys):
    run(Net(), steps=3, progress=None)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_a_live_line_that_ends_as_one(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(train.sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    run(Net(), steps=20, progress="a label of some length", evaluate=lambda m: {"validation accuracy": 0.5},
        evaluate_every=5)  # fmt: skip
    written = terminal.getvalue()
    shown = screen(written)
    assert len(shown) == 2 and shown[1] == ""
    assert shown[0].startswith("a label of some length: 20 steps · loss ")
    live = written.split("\n")[0].split("\r\x1b[K")[1:-1]
    assert len(live) > 5 and any("10/20" in line for line in live)
    assert max(map(len, live)) < 60  # one that wraps would leave its first half behind


def test_the_live_line_is_drawn_at_most_twice_a_second(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock) * 0.1)
    monkeypatch.setattr(train.sys, "stderr", terminal := Terminal())
    line = Progress("x", 100)
    for step in range(100):
        line.update(step + 1, History())
    assert 10 <= terminal.getvalue().count("\r") <= 20


def test_a_notebook_keeps_one_line_and_no_widget(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    setup = """
import time
import torch
from minivlp.train import TrainingDiverged, fit
torch.set_num_threads(1)
"""
    training = """
def batches(step):
    time.sleep(0.2)
    {act}
    return (torch.ones(4, 2),)
try:
    fit(torch.nn.Linear(2, 1), batches, lambda m, x: m(x).square().mean(), steps=6, progress="tiny")
except TrainingDiverged:
    pass
"""
    acts = ("pass", "if step == 4: raise KeyboardInterrupt", "if step == 2: return (torch.full((4, 2), torch.nan),)")
    cells = [new_code_cell(source) for source in (setup, *(training.replace("{act}", act) for act in acts))]
    notebook = new_notebook(cells=cells)
    execute(notebook, name="tiny", folder=tmp_path, timeout=120)
    lines = []
    for cell in notebook.cells[1:]:
        (output,) = cell.outputs
        assert output.output_type == "display_data"
        assert list(output.data) == ["text/plain"]
        lines.append(output.data["text/plain"])
    assert "widgets" not in notebook.metadata
    assert re.fullmatch(r"tiny: 6 steps · loss \d+\.\d{3}", lines[0])
    assert re.fullmatch(r"tiny: stopped by hand after 4 of 6 steps; the weights so far are kept · loss .+", lines[1])
    assert re.fullmatch(r"tiny: 2 steps · loss \d+\.\d{3}", lines[2])


def test_having_ipykernel_loaded_does_not_make_a_notebook(capsys):
    """Test runners import it too; then the line belongs on stderr, and stdout stays clean."""
    import ipykernel  # noqa: F401
    import IPython  # noqa: F401

    run(Net(), steps=2, progress="tiny")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"tiny: 2 steps · loss \d+\.\d{3}\n", err)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_the_self_test_passes_on_a_right_device_and_leaves_the_seed_alone():
    before = torch.get_rng_state()
    assert train.self_test(torch.device("cpu")) == 0.0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_self_test_notices_wrong_gradients(monkeypatch):
    from minivlp import layers

    class Wrong(layers.Block):
        moved = False

        def to(self, *args: object) -> Wrong:
            self.moved = True
            return self

        def forward(self, x: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
            y, weights = super().forward(x, **options)
            return (y * 1.01 if self.moved else y), weights

    monkeypatch.setattr(layers, "Block", Wrong)
    assert train.self_test(torch.device("cpu")) > 1e-3


@pytest.mark.parametrize(
    ("asked", "there", "difference", "expected"),
    [
        ("", True, 0.0, "cpu"),
        ("1", False, 0.0, "cpu"),
        ("1", True, 1e-6, "mps"),
        ("1", True, 0.1, "cpu"),
        ("1", True, math.nan, "cpu"),
    ],
)
def test_mps_only_when_asked_for_and_right(asked, there, difference, expected, monkeypatch, capsys):
    monkeypatch.setenv("MINIVLP_MPS", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    monkeypatch.setattr(train, "self_test", lambda device: difference)
    assert minivlp.pick_device().type == expected
    assert ("self-test" in capsys.readouterr().out) == (asked == "1" and there)


def test_cuda_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert minivlp.pick_device().type == "cuda"


def test_seed_everything_seeds_python_numpy_and_torch():
    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    minivlp.seed_everything(4)
    first = draw()
    assert first != draw()
    minivlp.seed_everything(4)
    assert first == draw()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
def test_cuda_trains_in_bfloat16_with_float32_weights():
    seen = []

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores = m(x)
        seen.append((x.device.type, scores.dtype))
        return F.cross_entropy(scores, y)

    model = Net().cuda()
    first, *_, last = run(model, steps=120, loss_fn=loss).smooth()
    assert last < 0.6 * first
    assert set(seen) == {("cuda", torch.bfloat16)}
    assert all(p.dtype == torch.float32 and p.is_cuda for p in model.parameters())


@cuda
def test_cuda_resumes_bit_for_bit_and_measuring_changes_nothing(tmp_path):
    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net().cuda()

    path = tmp_path / "run.safetensors"
    run(whole := fresh(1), steps=9)
    noise = lambda m: {"noise": torch.rand((), device="cuda").item()}  # noqa: E731
    options = {"steps": 9, "checkpoint": path, "checkpoint_every": 3, "evaluate": noise, "evaluate_every": 2}
    run(fresh(1), batches=at(7, press_ctrl_c), **options)
    run(resumed := fresh(2), **options)
    assert same(resumed, whole)


@cuda
def test_cuda_agrees_with_the_cpu():
    assert train.self_test(torch.device("cuda")) < 1e-3
