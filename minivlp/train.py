"""One training loop for every lesson, and the safe keeping of what it produces.

The loop knows nothing of the model: it asks `batches` for the step's batch and `loss_fn` for its loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minivlp import CACHE, DATA


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number. `history` and `model` are those of the last good step."""

    def __init__(self, message: str, history: History, model: nn.Module) -> None:
        super().__init__(message)
        self.history, self.model = history, model

    def __reduce__(self) -> tuple:  # so that it survives the way back from a process of a pool
        return type(self), (str(self), self.history, self.model)


class CheckpointError(ValueError):
    """A file of weights that cannot be used here; the message says why and what to do."""


@dataclass
class History:
    """What a run leaves for the plots: `losses[name][i]` and `lr[i]` of step i, and the metrics with their steps."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    lr: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    metric_steps: list[int] = field(default_factory=list)
    seconds: float = 0.0  # of training alone, metrics not counted
    stopped: str = ""  # why the run ended early, empty if it did not
    # name of a loss -> the step before its first value, where that does not follow from the number of values
    began: dict[str, int] = field(default_factory=dict)
    # name of a metric -> its own steps, where they are not `metric_steps`
    measured_at: dict[str, list[int]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.lr)

    def smooth(self, name: str = "loss", window: int = 20) -> list[float]:
        """The mean loss of each full window of steps, which is what can be read off a noisy curve."""
        values = self.losses[name]
        return [sum(values[i : i + window]) / window for i in range(0, len(values) - window + 1, window)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: only matrices that multiply (Linear, Conv) decay; biases, norms, tokens, positions and scales
    do not, because pulling them towards zero changes what the model can say without making it simpler."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]


def learning_rate(step: int, *, steps: int, peak: float, warmup: float = 0.1) -> float:
    """The rate at `step` (0-based) of `steps`: linear warm-up for the first share `warmup`, then a cosine to zero."""
    warm = int(steps * warmup)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable, batch: Sequence[Tensor], *, clip: float
) -> tuple[dict[str, float], float]:
    """One step of gradient descent; returns the named losses and the gradient's norm before clipping.

    `loss_fn(model, *batch)` returns one loss or a dict of losses, whose sum is minimised. The weights are left alone
    if loss or gradient is not finite: the caller sees it in the returned numbers.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        losses = loss_fn(model, *batch)
    losses = dict(losses) if isinstance(losses, Mapping) else {"loss": losses}
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip or math.inf).item()
    values = {name: loss.item() for name, loss in losses.items()}
    if all(map(math.isfinite, (norm, *values.values()))):
        optimizer.step()
    return values, norm


def fit(
    model: nn.Module,
    batches: Callable[[int], Sequence[Tensor]],
    loss_fn: Callable,
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    after_step: Sequence[Callable[[nn.Module, int], None]] = (),
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 100,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: str | None = "training",
) -> History:
    """Train `model` in place for `steps` steps with AdamW, warm-up + cosine and clipping; return the `History`.

    batches:    step -> the batch's tensors; a function of the step alone, so that a resumed run sees the same ones
    loss_fn:    (model, *batch) -> a loss, or a dict of named losses to add up
    warmup:     share of the steps;  clip: largest gradient norm, 0 for none
    after_step: called with (model, step) after each update: clamps, momentum copies
    evaluate:   model -> named numbers, every `evaluate_every` steps and at the end, in eval mode without gradients
    checkpoint: a .safetensors file; if it is there the run goes on from it, bit for bit on the same machine
    progress:   the label of the live line; None for silence

    Ctrl-C keeps what was trained so far and says so in `history.stopped`. Raises TrainingDiverged, with the weights of
    the last good step in `model`, when loss or gradient stop being finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=device.type != "mps")
    recipe = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "warmup": warmup, "clip": clip, "betas": betas}
    history = History()
    if checkpoint is not None and Path(checkpoint).exists():
        history = load_checkpoint(checkpoint, model, optimizer, recipe)
    line = Progress(progress, steps)
    model.zero_grad(set_to_none=True)  # a gradient left on a frozen weight would count when clipping
    model.train()
    start = time.perf_counter() - history.seconds
    try:
        for step in range(history.steps, steps):
            rate = learning_rate(step, steps=steps, peak=lr, warmup=warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [t.to(device, non_blocking=True) for t in batches(step)]
            buffers = [buffer.clone() for buffer in model.buffers()]
            values, norm = train_step(model, optimizer, loss_fn, batch, clip=clip)
            if not all(map(math.isfinite, (norm, *values.values()))):
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # the running averages of batch norm have already seen this batch
                raise TrainingDiverged(
                    f"step {step} (batch {step}, lr {rate:.1e}): loss {values}, gradient norm {norm:.3g} is not finite;"
                    " the weights are those of the step before. Lower lr, lengthen warmup, or look at this batch.",
                    history,
                    model,
                )
            for hook in after_step:
                hook(model, step)
            for name, value in values.items():
                history.losses.setdefault(name, []).append(value)
            history.lr.append(rate)
            history.seconds = time.perf_counter() - start
            if evaluate is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                with evaluating(model):
                    for name, value in evaluate(model).items():
                        history.metrics.setdefault(name, []).append(float(value))
                history.metric_steps.append(step + 1)
                start = time.perf_counter() - history.seconds
            line.update(step + 1, history)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                save_checkpoint(checkpoint, model, optimizer, recipe, history)
    except KeyboardInterrupt:
        # Between two steps nothing is half-done; within one, at most this step's entry in the history is missing.
        history.stopped = f"stopped by hand after {history.steps} of {steps} steps; the weights so far are kept"
        for values in history.losses.values():
            del values[history.steps :]
        for values in history.metrics.values():
            del values[len(history.metric_steps) :]
        if checkpoint is not None and Path(checkpoint).exists():
            history.stopped += f", the last checkpoint is in {checkpoint}"
    finally:
        model.eval()
        line.close(history)
    return history


@contextmanager
def evaluating(model: nn.Module):
    """Within: eval mode, no gradients, random state set aside; so looking at a model never changes its training."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []), torch.no_grad():
            yield model
    finally:
        model.train(training)


class Progress:
    """One live line that is rewritten in place, in Jupyter and in a terminal, and ends as one tidy line."""

    def __init__(self, label: str | None, steps: int) -> None:
        self.label, self.steps, self.last, self.begin = label, steps, 0.0, time.perf_counter()
        self.handle = None
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if label and hasattr(shell, "kernel"):  # a notebook, not a terminal
            from IPython.display import display

            self.handle = display({"text/plain": f"{label}: starting"}, raw=True, display_id=True)

    def update(self, step: int, history: History) -> None:
        now = time.perf_counter()
        if self.label and now - self.last > 0.5:
            self.last = now
            done = step / self.steps
            bar = "█" * round(20 * done) + "░" * (20 - round(20 * done))
            self._show(f"{self.label} {bar} {step}/{self.steps} · {summary(history)} · {now - self.begin:.0f} s")

    def close(self, history: History) -> None:
        """The line that stays names no seconds: they differ from run to run, and the notebooks must not."""
        if self.label:
            self._show(f"{self.label}: {history.stopped or f'{history.steps} steps'} · {summary(history)}", end="\n")

    def _show(self, text: str, end: str = "") -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty() or end:
            if not end:  # a live line that wraps could not be rewritten
                text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, end=end, file=sys.stderr, flush=True)


def summary(history: History) -> str:
    """The newest numbers in words: each loss as the mean of its last 20 steps, each metric as last measured."""
    losses = (f"{name} {sum(v[-20:]) / len(v[-20:]):.3f}" for name, v in history.losses.items())
    metrics = (f"{name} {v[-1]:.3f}" for name, v in history.metrics.items())
    return " · ".join((*losses, *metrics)) or "no step done"


# --- files ----------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move: a kill at any moment leaves
    the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def own_copy(tensor: Tensor) -> Tensor:
    """The values in CPU memory of their own: safetensors refuses tensors that share it, as tied weights do."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def save_weights(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None, **about: str) -> None:
    """Write the weights (as `dtype`, if given) and the model's config to a .safetensors file, atomically."""
    tensors = {k: own_copy(v).to(dtype if v.is_floating_point() else None) for k, v in model.state_dict().items()}
    metadata = {"model": type(model).__name__, "config": json.dumps(asdict(model.config))} | about
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Fill `model` from a file of `save_weights`; return the file's metadata.

    Raises CheckpointError if the file is missing, damaged, of another model or of another config.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("model") != type(model).__name__:
        kind = metadata.get("model", "file of another program")
        raise CheckpointError(f"{Path(path).name} holds a {kind}, not a {type(model).__name__}: give the right file")
    theirs, ours = json.loads(metadata["config"]), json.loads(json.dumps(asdict(model.config)))
    if theirs != ours:
        wrong = ", ".join(f"{k}={theirs.get(k)!r} (here {ours.get(k)!r})" for k in sorted(theirs.keys() | ours.keys())
                          if theirs.get(k) != ours.get(k))  # fmt: skip
        raise CheckpointError(f"{Path(path).name} was made with {wrong}: build the model with the file's config")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        kind = type(model).__name__
        raise CheckpointError(f"{Path(path).name} has other tensors than a {kind}: get it again") from error
    return metadata


def keep(model: nn.Module, name: str) -> Path:
    """Keep the weights of a model trained here under a name, for later lessons; returns the file."""
    path = CACHE / "checkpoints" / f"{name}.safetensors"
    save_weights(model, path)
    return path


def trained(name: str, model: nn.Module, *, own: bool = True) -> nn.Module:
    """Fill `model` with the weights kept under `name`, in eval mode: those trained on this machine if there are any
    that fit (and `own`), else the reference weights of the course. Raises CheckpointError as `load_weights`."""
    mine, reference = (folder / "checkpoints" / f"{name}.safetensors" for folder in (CACHE, DATA))
    try:
        load_weights(model, mine if own else reference)
    except CheckpointError:  # none, or of a model that somebody played with: every lesson still runs alone
        if not own:
            raise
        load_weights(model, reference)
    return model.eval()


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a .safetensors file and its metadata, with one clear error for whatever is wrong with it."""
    if not Path(path).exists():
        raise CheckpointError(f"there is no file {Path(path).name}: check the path, or run what writes it first")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{Path(path).name} is damaged or no safetensors file ({error}): get it again") from error


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict, history: History
) -> None:
    """Everything a run needs to go on: weights, optimizer moments, random state, history, in one safetensors file."""
    state = {f"model.{k}": own_copy(v) for k, v in model.state_dict().items()}
    for i, parameter in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": own_copy(torch.as_tensor(v)) for k, v in parameter.items()}
    state["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    metadata = {"run": fingerprint(model, recipe), "history": json.dumps(asdict(history))}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata))


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict
) -> History:
    """Put a run back where `save_checkpoint` left it. Raises CheckpointError if the file belongs to another run."""
    state, metadata = read_safetensors(path)
    if metadata.get("run") != fingerprint(model, recipe):
        name = Path(path).name
        raise CheckpointError(f"{name} belongs to a run with another model or recipe: delete it to start anew")
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            moments.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])
    return History(**json.loads(metadata["history"]))


def fingerprint(model: nn.Module, recipe: dict) -> str:
    """A short name for (shapes of the model, what is frozen, recipe): equal exactly when a checkpoint fits."""
    shapes = {name: [*p.shape, p.requires_grad] for name, p in model.named_parameters()}
    return hashlib.sha256(json.dumps([shapes, recipe], sort_keys=True).encode()).hexdigest()[:16]


def self_test(device: torch.device) -> float:
    """The largest difference between `device` and CPU in the gradients of a small attention layer, relative."""
    from minivlp.layers import Block

    with torch.random.fork_rng([]):  # the run's own seed stays as it is
        torch.manual_seed(0)
        block, there, x = Block(32, 4), Block(32, 4).to(device), torch.randn(2, 9, 32)
    there.load_state_dict(block.state_dict())
    for b, t in ((block, x), (there, x.to(device))):
        b(t)[0].square().mean().backward()
    pairs = [(p.grad, q.grad.cpu()) for p, q in zip(block.parameters(), there.parameters(), strict=True)]
    return max(((p - q).abs().max() / p.abs().max().clamp(min=1e-8)).item() for p, q in pairs)
