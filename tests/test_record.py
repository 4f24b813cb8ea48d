"""Reference runs: what is written, what is refused, and what an interruption leaves."""

from __future__ import annotations

import getpass
import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import minivlp.lessons
from minivlp import DATA, record, train
from minivlp.models.cnn import SmallResNet
from minivlp.notebooks import ROOT
from minivlp.record import RecordError

torch.set_num_threads(1)
NAME = "09_toy"

# A lesson in miniature: one main arm, one experiment whose second arm diverges. SLOW makes its runs last.
TOY = '''
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minivlp.models.cnn import ResNetConfig, SmallResNet
from minivlp.train import TrainingDiverged, fit

NAME = "09_toy"
CHECKPOINTS = {"toy": ("main", "toy")}
prepared = []


@dataclass(frozen=True)
class Recipe:
    model: ResNetConfig = ResNetConfig(widths=(2, 3), blocks=1, num_classes=2)
    steps: int = 45
    lr: float = 1e-3


@dataclass
class Run:
    model: object
    history: object
    metrics: dict


EXPERIMENTS = {"main": {"toy": Recipe()}, "rate / steps": {"low rate": Recipe(lr=1e-4), "1e25": Recipe(lr=1e25)}}


def prepare():
    prepared.append(True)


def batches(step):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return torch.randn(2, 3, 8, 8), torch.tensor([0, 1])


def loss(model, x, y):
    scores, _ = model(x)
    return F.cross_entropy(scores, y)


def run(recipe, *, seed, device, progress):
    with open("runs.log", "a") as log:
        print(os.getpid(), recipe.lr, seed, torch.get_num_threads(), file=log)
    torch.manual_seed(seed)
    model = SmallResNet(recipe.model).to(device)
    try:
        history = fit(model, batches, loss, steps=recipe.steps, lr=recipe.lr, warmup=0, progress=progress,
                      evaluate=lambda m: {"val": torch.rand(()).item()}, evaluate_every=15)
    except TrainingDiverged as error:
        return Run(error.model, error.history, {"score": 0.5, "diverged": 1.0})
    return Run(model, history, {"score": model.head.bias[0].item()})
'''


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder in place of the clone's; the working directory is empty as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def toy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / "toy.py").write_text(TOY)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # more threads than free cores would wait for each other
    monkeypatch.setattr(minivlp.lessons, "__path__", [*minivlp.lessons.__path__, str(tmp_path / "lessons")])
    importlib.invalidate_caches()
    yield importlib.import_module("minivlp.lessons.toy")
    sys.modules.pop("minivlp.lessons.toy")
    vars(minivlp.lessons).pop("toy", None)


def runs_done() -> list[list[str]]:
    return [line.split() for line in Path("runs.log").read_text().splitlines()] if Path("runs.log").exists() else []


def scratch_files() -> list[str]:
    return sorted(path.name for path in Path("build/record", NAME).glob("*"))


# --- lessons by name -------------------------------------------------------------------------------------------------


def test_a_lesson_is_found_by_its_notebooks_name():
    assert record.lesson_module("01_vit").__name__ == "minivlp.lessons.vit"


@pytest.mark.parametrize("name", ["99_nothing", "nothing", "", "02_vit", "vit", "01_", "../vit"])
def test_an_unknown_lesson_is_named(name):
    with pytest.raises(RecordError, match=r"^there is no lesson called .*: write its notebook's name, like 01_vit"):
        record.lesson_module(name)


def test_a_missing_library_is_not_called_a_missing_lesson(toy, tmp_path):
    (tmp_path / "lessons" / "needy.py").write_text("import a_library_that_nobody_has\n")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="a_library_that_nobody_has"):
        record.lesson_module("10_needy")


def test_the_command_line_says_what_is_wrong(capsys):
    assert record.main(["99_nothing"]) == 1
    assert capsys.readouterr().err == "there is no lesson called '99_nothing': write its notebook's name, like 01_vit\n"


# --- a whole recording -----------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(toy: ModuleType, capsys: pytest.CaptureFixture) -> dict:
    """The written file of a recording in this process, read back."""
    assert record.main([NAME, "--seeds", "3", "--ablation-seeds", "2", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 8 and "[7/7] rate / steps / 1e25, seed 1" in out and out.endswith("wrote 09_toy.json\n")
    return json.loads((record.DATA / "recorded" / f"{NAME}.json").read_text())


def test_the_file_says_how_it_was_made(recorded, toy):
    about = recorded["about"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["made"])
    assert about["command"] == "python -m minivlp.record 09_toy --seeds 3 --ablation-seeds 2"
    assert re.fullmatch(r"\d+ CPU cores, \w+, \d+ thread\(s\) a run", about["machine"])
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"].keys() >= {"python", "torch", "numpy", "datasets", "pillow"}
    assert recorded["recipes"]["main"]["toy"] == {
        "model": {"channels": 3, "widths": [2, 3], "blocks": 1, "num_classes": 2}, "steps": 45, "lr": 1e-3,
    }  # fmt: skip
    assert toy.prepared == [True]


def test_the_file_says_nothing_of_the_machine_or_its_user(recorded, tmp_path):
    text = json.dumps(recorded)
    words = {str(tmp_path), str(ROOT), str(Path.home()), getpass.getuser(), socket.gethostname()}
    assert not [word for word in words if re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", text)]
    for value in [*recorded["about"].values(), *recorded["about"]["versions"].values()]:
        assert not re.search(r"(^|[ '\"=])[~/]|\b[A-Za-z]:\\", str(value))


def test_every_arm_and_seed_is_there_with_curves_and_numbers(recorded):
    runs = recorded["runs"]
    assert {e: {a: [run["seed"] for run in arm] for a, arm in arms.items()} for e, arms in runs.items()} == {
        "main": {"toy": [0, 1, 2]}, "rate / steps": {"low rate": [0, 1], "1e25": [0, 1]},
    }  # fmt: skip
    for run in runs["main"]["toy"]:
        assert run["curves"]["loss"]["steps"] == [20, 40]  # full windows of 20 steps
        assert run["curves"]["val"]["steps"] == [15, 30, 45]
        assert all(len(curve["values"]) == len(curve["steps"]) for curve in run["curves"].values())
        assert all(value == round(value, 4) for curve in run["curves"].values() for value in curve["values"])
    first, second, _ = runs["main"]["toy"]
    assert first["curves"] != second["curves"]
    assert runs["rate / steps"]["1e25"][0]["metrics"] == {"score": 0.5, "diverged": 1.0}


def test_the_numbers_are_those_of_the_run(recorded, toy):
    run = toy.run(toy.EXPERIMENTS["main"]["toy"], seed=1, device=torch.device("cpu"), progress=None)
    kept = recorded["runs"]["main"]["toy"][1]
    assert kept["metrics"]["score"] == pytest.approx(run.metrics["score"], abs=1e-4)
    assert kept["curves"]["loss"]["values"] == pytest.approx(run.history.smooth(window=20), abs=1e-4)
    assert kept["curves"]["val"]["values"] == pytest.approx(run.history.metrics["val"], abs=1e-4)


def test_recording_in_this_process_leaves_its_threads_as_they_were(toy):
    torch.set_num_threads(2)
    try:
        record.record(NAME, seeds=1, ablation_seeds=0, jobs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert runs_done()[0][3] == "1"


def test_the_reference_weights_are_those_of_the_first_seed(recorded, toy, data, monkeypatch):
    monkeypatch.setattr(train, "DATA", data)
    model = train.trained("toy", SmallResNet(toy.Recipe().model), own=False)
    score = recorded["runs"]["main"]["toy"][0]["metrics"]["score"]
    assert model.head.bias[0].item() == pytest.approx(score, abs=1e-3)
    tensors, about = train.read_safetensors(data / "checkpoints" / "toy.safetensors")
    assert tensors["stem.weight"].dtype == torch.float16
    assert json.loads(about["recipe"]) == recorded["recipes"]["main"]["toy"]


def test_recorded_runs_come_back_as_arrays(recorded):
    loaded = record.load(NAME)
    assert loaded.about == recorded["about"]
    scores = [run["metrics"]["score"] for run in recorded["runs"]["main"]["toy"]]
    assert loaded.values("main", "toy", "score") == scores
    assert loaded.table("rate / steps", "score") == {
        "low rate": [run["metrics"]["score"] for run in recorded["runs"]["rate / steps"]["low rate"]],
        "1e25": [0.5, 0.5],
    }
    steps, curves = loaded.curves("main", "toy", "loss")
    assert steps.tolist() == [20, 40] and curves.shape == (3, 2)
    assert curves[1].tolist() == recorded["runs"]["main"]["toy"][1]["curves"]["loss"]["values"]
    mean, spread = np.mean(scores), np.std(scores, ddof=1)
    assert loaded.summary("main", "toy", "score") == f"{mean:.3f} ± {spread:.3f}"
    with pytest.raises(KeyError):
        loaded.curves("main", "toy", "no such curve")


def test_a_run_that_ended_early_has_a_curve_that_does():
    runs = [{"curves": {"loss": {"steps": [20], "values": [3.0]}}}, {"curves": {}},
            {"curves": {"loss": {"steps": [20, 40], "values": [2.0, 1.0]}}}]  # fmt: skip
    steps, curves = record.Recorded({}, {"e": {"a": runs}}).curves("e", "a", "loss")
    assert steps.tolist() == [20, 40]
    np.testing.assert_equal(curves, [[3.0, math.nan], [math.nan, math.nan], [2.0, 1.0]])


# --- what is refused -------------------------------------------------------------------------------------------------

AGAIN = r"run `python -m minivlp\.record 09_toy` to make it again"


def write(data: Path, content: object) -> Path:
    path = data / "recorded" / f"{NAME}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def good(toy: ModuleType) -> dict:
    return {"about": {"made": "today"}, "recipes": record.recipes_of(toy), "runs": {"main": {"toy": []}}}


def test_a_missing_file_is_named_with_the_command_that_makes_it(toy):
    with pytest.raises(RecordError, match=rf"09_toy\.json is missing from data/recorded: {AGAIN}"):
        record.load(NAME)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"about": {}, "recipes"', b"\xff\xfe not text", b"[1, 2]", b"null", b"3", {"about": {}, "recipes": {}},
     {"recipes": {}, "runs": {}}, {"about": {}, "recipes": {}, "runs": {}, "timings": {"seconds": 3.0}}],
    ids=["empty", "cut", "not text", "a list", "null", "a number", "no runs", "no about", "timings of nowhere"],
)  # fmt: skip
def test_a_damaged_file_is_refused(content, toy, data):
    write(data, content)
    with pytest.raises(RecordError, match=rf"^09_toy\.json is damaged: {AGAIN}$"):
        record.load(NAME)


def test_a_file_of_the_same_recipes_is_taken(toy, data):
    write(data, good(toy))
    assert record.load(NAME).about == {"made": "today"}


def change(recipes: dict, how: str) -> str:
    if how == "a number":
        recipes["main"]["toy"]["lr"] = 0.5
    elif how == "deep inside":
        recipes["rate / steps"]["1e25"]["model"]["widths"] = [2, 4]
        return "rate / steps/1e25"
    elif how == "a field more":
        recipes["main"]["toy"]["dropout"] = 0.0
    elif how == "an arm less":
        del recipes["main"]["toy"]
    elif how == "an arm more":
        recipes["main"]["other"] = recipes["main"]["toy"]
        return "main/other"
    elif how == "an experiment less":
        del recipes["main"]
    elif how == "an experiment more":
        recipes["other"] = {"arm": {}}
        return "other/arm"
    return "main/toy"


@pytest.mark.parametrize(
    "how",
    ["a number", "deep inside", "a field more", "an arm less", "an arm more", "an experiment less",
     "an experiment more"],
)  # fmt: skip
def test_a_file_of_other_recipes_is_refused(how, toy, data):
    content = good(toy)
    where = change(content["recipes"], how)
    write(data, content)
    message = rf"^09_toy\.json was recorded with other recipes \({re.escape(where)}\): {AGAIN}$"
    with pytest.raises(RecordError, match=message):
        record.load(NAME)


# --- timings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clocked(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The toy lesson with a clock and facts; the list has (device, threads, runs done before) of each measurement."""
    calls = []

    def clock(device: torch.device) -> dict[str, float]:
        calls.append((str(device), torch.get_num_threads(), len(runs_done())))
        return {"training seconds": 12.34567 + len(calls)}

    monkeypatch.setattr(toy, "clock", clock, raising=False)
    monkeypatch.setattr(toy, "facts", lambda: {"parameters": 77}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return calls


def content_of(name: str = NAME) -> dict:
    return json.loads((record.DATA / "recorded" / f"{name}.json").read_text())


def test_the_clock_runs_last_with_all_threads_and_leaves_them_as_they_were(clocked, toy):
    assert record.main([NAME, "--seeds", "2", "--ablation-seeds", "1", "--jobs", "1"]) == 0
    assert clocked == [("cpu", 2, 4)] and torch.get_num_threads() == 1
    loaded = record.load(NAME)
    assert loaded.timings == {"training seconds": 13.346} and loaded.facts == {"parameters": 77}
    assert re.fullmatch(r"2 CPU cores, \w+, 2 thread\(s\), torch [\w.+]+", loaded.clocked)
    assert content_of()["timings"]["threads"] == 2


def test_the_clock_alone_leaves_the_runs_untouched(clocked, toy, capsys):
    record.record(NAME, seeds=2, ablation_seeds=1, jobs=1)
    before = content_of()
    assert record.main([NAME, "--clock"]) == 0
    assert capsys.readouterr().out.endswith("wrote 09_toy.json\n")
    after = content_of()
    assert len(runs_done()) == 4 and len(clocked) == 2
    assert after["timings"]["values"] == {"training seconds": 14.346} != before["timings"]["values"]
    assert {k: v for k, v in after.items() if k != "timings"} == {k: v for k, v in before.items() if k != "timings"}


def test_a_file_from_before_there_were_timings_is_taken_and_can_get_some(clocked, toy, data):
    content = good(toy)
    write(data, content)
    assert (record.load(NAME).timings, record.load(NAME).facts, record.load(NAME).clocked) == ({}, {}, "")
    record.clock(NAME)
    assert record.load(NAME).timings == {"training seconds": 13.346}
    assert {k: content_of()[k] for k in content} == content and runs_done() == []


def test_an_interrupted_clock_leaves_the_file_and_the_threads(clocked, toy, data, monkeypatch, capsys):
    def stopped(device: torch.device) -> dict[str, float]:
        raise KeyboardInterrupt

    path = write(data, good(toy))
    before = path.read_bytes()
    monkeypatch.setattr(toy, "clock", stopped)
    assert record.main([NAME, "--clock"]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert path.read_bytes() == before and torch.get_num_threads() == 1


def test_a_clock_without_a_fitting_file_or_anything_to_measure_is_refused(toy, data, monkeypatch):
    with pytest.raises(RecordError, match=r"^09_toy has nothing to measure: give its module a function `clock` or"):
        record.clock(NAME)
    monkeypatch.setattr(toy, "clock", lambda device: pytest.fail("measured for nothing"), raising=False)
    with pytest.raises(RecordError, match="is missing from data/recorded"):
        record.clock(NAME)
    write(data, good(toy) | {"recipes": {}})
    with pytest.raises(RecordError, match="was recorded with other recipes"):
        record.clock(NAME)


# --- going on after an interruption ----------------------------------------------------------------------------------


def one(seed: int = 0, experiment: str = "main", arm: str = "toy") -> Path:
    scratch = Path("build/record", NAME)
    scratch.mkdir(parents=True, exist_ok=True)
    return record.one_run(NAME, experiment, arm, seed, 1, scratch)


def test_a_finished_run_is_not_repeated(toy):
    path = one()
    content = path.read_bytes()
    assert one() == path and len(runs_done()) == 1
    assert path.read_bytes() == content
    assert one(seed=1) != path and one(experiment="rate / steps", arm="low rate") != path
    assert len(runs_done()) == 3


def test_a_loss_that_says_where_it_began_keeps_steps_of_its_own(toy, monkeypatch):
    """Lesson 06: a stage before the last may have more steps than that has, or fewer, from its own first one on."""
    real = toy.run

    def run(recipe, **how):
        run = real(recipe, **how)
        run.history.losses |= {"stage": [float(i) for i in range(65)], "short stage": [1.0] * 25, "late": [2.0] * 25}
        run.history.began |= {"stage": 0, "short stage": 0}
        return run

    monkeypatch.setattr(toy, "run", run)
    curves = json.loads(one().read_text())["run"]["curves"]
    assert curves["stage"] == {"steps": [20, 40, 60], "values": [9.5, 29.5, 49.5]}
    assert curves["short stage"] == {"steps": [20], "values": [1.0]}
    assert curves["late"] == {"steps": [40], "values": [2.0]}  # without a word, it ends with the run of 45 steps
    assert curves["loss"]["steps"] == [20, 40]


def test_a_finished_run_is_repeated_when_its_recipe_has_changed(toy):
    path = one()
    arms = toy.EXPERIMENTS["main"]
    arms["toy"] = toy.Recipe(steps=60)
    assert one() == path and len(runs_done()) == 2
    content = json.loads(path.read_text())
    assert content["recipe"]["steps"] == 60
    assert content["run"]["curves"]["loss"]["steps"] == [20, 40, 60]


def test_a_run_whose_weights_are_gone_is_repeated(toy):
    path = one()
    (path.parent / "toy.safetensors").unlink()
    one()
    assert (path.parent / "toy.safetensors").exists() and len(runs_done()) == 2


def test_ctrl_c_in_this_process_keeps_finished_runs_and_no_half_ones(toy, monkeypatch, capsys):
    steps = []

    def interrupted(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(step)
        if len(steps) == 45 + 30:  # in the middle of the second run
            raise KeyboardInterrupt
        return batches(step)

    batches = toy.batches
    monkeypatch.setattr(toy, "batches", interrupted)
    arguments = [NAME, "--seeds", "2", "--ablation-seeds", "1", "--jobs", "1"]
    assert record.main(arguments) == 130
    err = capsys.readouterr().err
    assert err == "stopped; finished runs are kept in build/record/09_toy and will not be repeated\n"
    assert scratch_files() == ["main.toy.0.json", "toy.safetensors"]
    assert not (record.DATA / "recorded").exists()
    monkeypatch.setattr(toy, "batches", batches)
    assert record.main(arguments) == 0
    done = [(float(rate), int(seed)) for _, rate, seed, _ in runs_done()]
    assert done == [(1e-3, 0), (1e-3, 1), (1e-3, 1), (1e-4, 0), (1e25, 0)]  # only the second was begun twice
    assert len(record.load(NAME).values("main", "toy", "score")) == 2


# --- several processes -----------------------------------------------------------------------------------------------

DRIVER = """
import os
import sys
from pathlib import Path

import minivlp.lessons
from minivlp import record

os.cpu_count = lambda: 2
here = Path(__file__).parent
minivlp.lessons.__path__.append(str(here / "lessons"))
record.DATA = here / "data"

if __name__ == "__main__":
    sys.exit(record.main(sys.argv[1:]))
"""


def start(tmp_path: Path, *, slow: float) -> subprocess.Popen:
    """`python -m minivlp.record` for the toy lesson, in processes that know it too, as a group of its own."""
    (tmp_path / "driver.py").write_text(DRIVER)
    options = ["--seeds", "2", "--ablation-seeds", "1", "--jobs", "2"]
    command = [sys.executable, str(tmp_path / "driver.py"), NAME, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": str(slow), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C to a group of processes")
@pytest.mark.parametrize("to", ["the whole group, as a terminal does", "the first process alone"])
def test_ctrl_c_ends_all_processes_and_keeps_finished_runs_alone(to, toy, tmp_path):
    process = start(tmp_path, slow=0.03)
    try:
        first = process.stdout.readline()  # two runs of four are under way, one of them has ended
        assert first.startswith("[1/4]")
        (os.killpg if "group" in to else os.kill)(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[0] == "stopped; finished runs are kept in build/record/09_toy and will not be repeated"
    assert "Traceback" not in err
    workers = {int(run[0]) for run in runs_done()}
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    finished = [json.loads(path.read_text()) for path in Path("build/record", NAME).glob("*.json")]
    assert 1 <= len(finished) < 4
    assert all(run["run"]["curves"]["loss"]["steps"] == [20, 40] for run in finished)
    assert not (tmp_path / "data" / "recorded").exists()


def test_runs_side_by_side_give_the_same_file_and_share_the_cores(toy, tmp_path):
    process = start(tmp_path, slow=0.0)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "wrote 09_toy.json"
    assert len(runs_done()) == 4
    assert os.getpid() not in {int(run[0]) for run in runs_done()}
    assert {run[3] for run in runs_done()} == {"1"}  # two cores, two processes
    loaded = record.load(NAME)
    for e, a, seeds in (("main", "toy", 2), ("rate / steps", "low rate", 1), ("rate / steps", "1e25", 1)):
        assert [run["seed"] for run in loaded.runs[e][a]] == list(range(seeds))
    here = json.loads(one(seed=1, experiment="rate / steps", arm="low rate").read_text())["run"]
    there = json.loads(one(seed=0, experiment="rate / steps", arm="low rate").read_text())["run"]
    assert loaded.runs["rate / steps"]["low rate"] == [there]
    assert here["curves"] != there["curves"]


# --- the files of the clone ------------------------------------------------------------------------------------------

LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("name", LESSONS)
def test_the_recorded_runs_of_every_lesson_fit_its_recipes(name):
    recorded = record.load(name)
    assert re.search(rf"record {name} --seeds \d+", recorded.about["command"])
    for experiment, arms in recorded.runs.items():
        for arm, runs in arms.items():
            seeds = [run["seed"] for run in runs]
            assert len(set(seeds)) == len(seeds) >= (5 if experiment == "main" else 3), (experiment, arm)
            assert all(run["metrics"] for run in runs)
    assert not re.search(r"/(home|Users|root|tmp|work)/", (DATA / "recorded" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", LESSONS)
def test_the_reference_weights_of_every_lesson_fit_its_models(name):
    lesson = record.lesson_module(name)
    for weights, (experiment, arm) in lesson.CHECKPOINTS.items():
        recipe = lesson.EXPERIMENTS[experiment][arm]
        model = train.trained(weights, lesson.build(recipe.model), own=False)
        assert all(p.isfinite().all() for p in model.parameters())
        about = train.read_safetensors(DATA / "checkpoints" / f"{weights}.safetensors")[1]
        assert json.loads(about["recipe"]) == record.recipes_of(lesson)[experiment][arm]


def test_the_reference_vit_is_as_good_as_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVLP_CACHE", str(tmp_path))
    lesson = record.lesson_module("01_vit")
    model = train.trained("vit", lesson.build(lesson.MAIN.model), own=False)
    first = record.load("01_vit").values("main", "ViT", "test accuracy")[0]
    assert lesson.test_accuracy(model, "test", lesson.MAIN) == pytest.approx(first, abs=0.01)  # half precision rounds
