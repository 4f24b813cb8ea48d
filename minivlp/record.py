"""Reference runs: rerun a lesson's experiments over several seeds and keep curves and final numbers.

    python -m minivlp.record 01_vit --seeds 5

writes `data/recorded/01_vit.json` (and the first seed's main model to `data/checkpoints/`). The notebook draws its own
run against this band and asserts against it; a file whose recipes are no longer the lesson's is refused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from minivlp import DATA
from minivlp.evaluate import mean_and_spread
from minivlp.train import save_weights, write_atomically


class RecordError(ValueError):
    """A recorded file that is missing, damaged, or made with other recipes than the lesson's."""


def lesson_module(name: str) -> ModuleType:
    """'01_vit' -> the module minivlp.lessons.vit. Raises RecordError if there is none."""
    module = f"minivlp.lessons.{name.split('_', 1)[-1]}"
    unknown = RecordError(f"there is no lesson called {name!r}: write its notebook's name, like 01_vit")
    try:
        lesson = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):  # a library that the lesson needs is what is missing
            raise
        raise unknown from error
    if name != lesson.NAME:
        raise unknown
    return lesson


def recipes_of(lesson: ModuleType) -> dict[str, dict[str, dict]]:
    """Every recipe of a lesson as plain JSON values, for comparison with a recorded file."""
    plain = {experiment: {arm: asdict(recipe) for arm, recipe in arms.items()}
             for experiment, arms in lesson.EXPERIMENTS.items()}  # fmt: skip
    return json.loads(json.dumps(plain))


@dataclass(frozen=True)
class Recorded:
    """A lesson's recorded runs. `runs[experiment][arm]` is a list with one entry a seed: metrics, curves, steps."""

    about: dict
    runs: dict[str, dict[str, list[dict]]]

    def values(self, experiment: str, arm: str, metric: str) -> list[float]:
        """One number a seed."""
        return [run["metrics"][metric] for run in self.runs[experiment][arm]]

    def summary(self, experiment: str, arm: str, metric: str = "test accuracy") -> str:
        """Mean ± standard deviation over the seeds, as text."""
        mean, spread = mean_and_spread(self.values(experiment, arm, metric))
        return f"{mean:.3f} ± {spread:.3f}"

    def table(self, experiment: str, metric: str) -> dict[str, list[float]]:
        """arm -> one number a seed, for the bar plots."""
        return {arm: self.values(experiment, arm, metric) for arm in self.runs[experiment]}

    def curves(self, experiment: str, arm: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and one curve a seed (seeds, n) of a validation metric or a smoothed loss.

        A run that diverged ends early: NaN from there on.
        """
        curves = [run["curves"].get(name, {"steps": [], "values": []}) for run in self.runs[experiment][arm]]
        steps = max((curve["steps"] for curve in curves), key=len)
        if not steps:
            raise KeyError(name)
        rows = [curve["values"] + [math.nan] * (len(steps) - len(curve["values"])) for curve in curves]
        return np.array(steps), np.array(rows)


def load(name: str) -> Recorded:
    """The recorded runs of a lesson. Raises RecordError if they are missing, damaged or out of date."""
    path = DATA / "recorded" / f"{name}.json"
    again = f"run `python -m minivlp.record {name}` to make it again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about, recorded, runs = content["about"], content["recipes"], content["runs"]
    except FileNotFoundError as error:
        raise RecordError(f"{path.name} is missing from data/recorded: {again}") from error
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON, other JSON
        raise RecordError(f"{path.name} is damaged: {again}") from error
    current = recipes_of(lesson_module(name))
    changed = [f"{e}/{a}" for e in current.keys() | recorded.keys()
               for a in current.get(e, {}).keys() | recorded.get(e, {}).keys()
               if current.get(e, {}).get(a) != recorded.get(e, {}).get(a)]  # fmt: skip
    if changed:
        raise RecordError(f"{path.name} was recorded with other recipes ({', '.join(sorted(changed)[:5])}): {again}")
    return Recorded(about, runs)


def one_run(name: str, experiment: str, arm: str, seed: int, threads: int, scratch: Path) -> Path:
    """Run one arm with one seed and keep its numbers in `scratch`, so that an interrupted recording goes on."""
    lesson = lesson_module(name)
    recipe = lesson.EXPERIMENTS[experiment][arm]
    plain = json.loads(json.dumps(asdict(recipe)))
    path = scratch / f"{experiment}.{arm}.{seed}.json".replace(" ", "_").replace("/", "-")
    to_keep = [scratch / f"{weights}.safetensors" for weights, source in lesson.CHECKPOINTS.items()
               if source == (experiment, arm) and seed == 0]  # fmt: skip
    done = path.exists() and json.loads(path.read_text())["recipe"] == plain
    if done and all(weights.exists() for weights in to_keep):
        return path
    torch.set_num_threads(threads)
    run = lesson.run(recipe, seed=seed, device=torch.device("cpu"), progress=None)
    if run.history.stopped:  # `fit` turns Ctrl-C into a short run, which is no result
        raise KeyboardInterrupt
    h, window = run.history, 20
    curves = {}
    for loss, values in h.losses.items():
        joined = h.steps - len(values)  # a loss may join later than the others
        steps = list(range(joined + window, h.steps + 1, window))
        curves[loss] = {"steps": steps, "values": h.smooth(loss, window)}
    curves |= {metric: {"steps": h.metric_steps, "values": values} for metric, values in h.metrics.items()}
    for curve in curves.values():
        curve["values"] = [round(v, 4) for v in curve["values"]]
    metrics = {metric: round(value, 4) for metric, value in run.metrics.items()}
    for weights in to_keep:
        save_weights(run.model, weights, dtype=torch.float16, recipe=json.dumps(plain))
    content = {"recipe": plain, "run": {"seed": seed, "metrics": metrics, "curves": curves}}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content)))
    return path


def run_all(
    name: str, todo: list[tuple[str, str, int]], *, jobs: int, threads: int, scratch: Path
) -> Iterator[tuple[tuple[str, str, int], Path]]:
    """Do every (experiment, arm, seed) of `todo`; yield it with the file of its numbers, in the order of finishing."""
    if jobs == 1:
        before = torch.get_num_threads()
        try:
            yield from ((task, one_run(name, *task, threads, scratch)) for task in todo)
        finally:
            torch.set_num_threads(before)
        return
    # Fresh processes: a fork of one whose torch has used its threads may hang. Ctrl-C ends them on the spot, which
    # their files survive, instead of being taken by `fit` for the wish to see a short run measured.
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        futures = {pool.submit(one_run, name, *task, threads, scratch): task for task in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def record(name: str, *, seeds: int = 5, ablation_seeds: int = 3, jobs: int | None = None) -> Path:
    """Run everything the lesson lists (main run: `seeds` seeds, the others `ablation_seeds`) and write the file.

    `jobs` runs go side by side on the CPU, sharing its cores; wall-clock times are therefore never recorded. With
    `jobs=1` they go one after the other in this process. After Ctrl-C or an error call it again: it goes on from there.
    """
    lesson = lesson_module(name)
    cores = os.cpu_count() or 2
    jobs = jobs or cores
    threads = max(1, cores // jobs)
    scratch = Path("build") / "record" / name
    scratch.mkdir(parents=True, exist_ok=True)
    todo = [(e, a, s) for e, arms in lesson.EXPERIMENTS.items() for a in arms
            for s in range(seeds if e == "main" else ablation_seeds)]  # fmt: skip
    lesson.prepare()  # draw the pictures once, before the processes would all start to
    runs: dict[str, dict[str, list]] = {e: {a: [] for a in arms} for e, arms in lesson.EXPERIMENTS.items()}
    for done, ((e, a, s), path) in enumerate(run_all(name, todo, jobs=jobs, threads=threads, scratch=scratch), 1):
        run = json.loads(path.read_text())["run"]
        runs[e][a].append(run)
        print(f"[{done}/{len(todo)}] {e} / {a}, seed {s}: {run['metrics']}", flush=True)
    for arms in runs.values():
        for arm in arms.values():
            arm.sort(key=lambda run: run["seed"])
    packages = ("torch", "numpy", "datasets", "pillow")
    about = {
        "made": date.today().isoformat(),
        "command": f"python -m minivlp.record {name} --seeds {seeds} --ablation-seeds {ablation_seeds}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {threads} thread(s) a run",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
    path = DATA / "recorded" / f"{name}.json"
    content = json.dumps({"about": about, "recipes": recipes_of(lesson), "runs": runs}, separators=(",", ":"))
    write_atomically(path, lambda temporary: temporary.write_text(content + "\n", encoding="utf-8"))
    for checkpoint in lesson.CHECKPOINTS:
        weights = (scratch / f"{checkpoint}.safetensors").read_bytes()
        write_atomically(DATA / "checkpoints" / f"{checkpoint}.safetensors", partial(Path.write_bytes, data=weights))
    return path


def scoreboard() -> str:
    """The recorded headline numbers of every lesson as a Markdown table."""
    lines = ["| lesson | what is measured | mean ± standard deviation | seeds |", "|---|---|---|---|"]
    for path in sorted((DATA / "recorded").glob("*.json")):
        recorded, lesson = load(path.stem), lesson_module(path.stem)
        for label, (experiment, arm, metric) in getattr(lesson, "SCOREBOARD", {}).items():
            seeds = len(recorded.runs[experiment][arm])
            lines.append(f"| {path.stem} | {label} | {recorded.summary(experiment, arm, metric)} | {seeds} |")
    return "\n".join(lines)


def write_scoreboard(page: Path) -> None:
    """Put the scoreboard between its two marks on a Markdown page. Raises RecordError if the marks are gone."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- scoreboard -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    if not begin or not end:
        raise RecordError(f"{page.name} has lost its marks <!-- scoreboard --> and <!-- end -->: put them back")
    text = before + begin + scoreboard() + end + after
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivlp.record", description=__doc__.splitlines()[0])
    parser.add_argument("lesson", nargs="+", help="for instance 01_vit")
    parser.add_argument("--seeds", type=int, default=5, help="of the main run")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="of every other arm")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: one a core")
    options = parser.parse_args(arguments)
    for name in options.lesson:
        try:
            path = record(name, seeds=options.seeds, ablation_seeds=options.ablation_seeds, jobs=options.jobs)
            if (page := DATA.parent / "notebooks" / "README.md").exists():
                write_scoreboard(page)
            print("wrote", path.name)
        except RecordError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"stopped; finished runs are kept in build/record/{name} and will not be repeated", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
