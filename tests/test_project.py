"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minivlp import __version__
from minivlp.notebooks import ROOT
from minivlp.notebooks.links import tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}

# What Colab has installed in mid-2026; each must satisfy our bound, or opening a lesson would reinstall it.
COLAB = {
    "torch": "2.11.0",
    "numpy": "2.1.0",
    "matplotlib": "3.10.0",
    "datasets": "4.0.0",
    "pillow": "11.3.0",
    "tokenizers": "0.22.0",
}


def split(requirement: str) -> tuple[str, str]:
    """`torch>=2.4; python_version < "3.12"` as (`torch`, `>=2.4`)."""
    name, bound = re.fullmatch(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*)?", requirement).groups()
    return name, bound


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_environment_yml_equals_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    nested = [entry for entry in environment["dependencies"] if not isinstance(entry, str)]
    expected = {"python": PROJECT["project"]["requires-python"], "pip": ""}
    for requirement in PROJECT["project"]["dependencies"] + EXTRAS["notebooks"]:
        name, bound = split(requirement)
        expected[CONDA_NAMES.get(name, name)] = bound
    assert dict(split(entry) for entry in plain) == expected
    assert len(plain) == len(expected)
    assert nested == [{"pip": ["-e ."]}]  # Binder knows this line and copies the repository before it builds
    assert environment["channels"] == ["conda-forge"]
    assert environment["name"] == PROJECT["project"]["name"]


def test_bounds_are_low_and_open() -> None:
    for requirement in PROJECT["project"]["dependencies"] + [entry for extra in EXTRAS.values() for entry in extra]:
        assert re.fullmatch(r">=[\d.]+", split(requirement)[1]), requirement


def test_colab_satisfies_the_dependencies() -> None:
    bounds = dict(split(entry) for entry in PROJECT["project"]["dependencies"])
    for name, version in COLAB.items():
        assert numbers(version) >= numbers(bounds[name].removeprefix(">=")), name


def test_version_is_stated_once_and_the_same() -> None:
    assert PROJECT["project"]["version"] == __version__


def test_the_address_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert text.count(PROJECT["project"]["urls"]["Repository"]) == 1
    for path in [*(ROOT / "minivlp").rglob("*.py"), ROOT / "Makefile", ROOT / "environment.yml"]:
        assert PROJECT["project"]["urls"]["Repository"] not in path.read_text(encoding="utf-8"), path


def test_the_package_never_imports_transformers() -> None:
    for path in (ROOT / "minivlp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            outside = path.name != "bench.py"  # the one place that measures against it
            assert not (outside and any(name.split(".")[0] == "transformers" for name in names)), path


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # The tests may run inside `make test`, whose options a make within would inherit.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "TORCH", "WORKERS", "PYTEST_ARGS")
    clean = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=clean, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    def test_help_names_every_target(self) -> None:
        text = make("help").stdout
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
        assert all(re.search(rf"^  {target} +\S", text, re.MULTILINE) for target in phony), text
        assert make().stdout == text

    def test_an_old_python_is_refused_in_words(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "pyproject.toml").touch()
        old = tmp_path / "oldpython"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        done = make("lessons", f"PYTHON={old}", folder=tmp_path)
        assert done.returncode and "needs Python 3.10 or newer" in done.stdout
        assert not (tmp_path / ".venv").exists()

    def test_torch_can_be_chosen_and_is_never_exchanged(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "pyproject.toml").touch()
        for torch, arguments in (("torch==2.13.0", []), ("torch==2.11.0", ["TORCH=torch==2.11.0"])):
            plan = make("-n", "venv", *arguments, folder=tmp_path).stdout.splitlines()
            installs = [line for line in plan if "pip install" in line]
            assert len(installs) == 2 and all(f'"{torch}"' in line for line in installs)

    def test_a_failing_part_fails_the_whole(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "pyproject.toml").touch()
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / ".installed").touch()
        python = tmp_path / ".venv" / "bin" / "python"
        for failing, status in (("ruff", 2), ("pytest", 2), ("none", 0)):
            real = f'[ "$1" = -c ] && exec "{sys.executable}" "$@"'
            python.write_text(f'#!/bin/sh\n{real}\necho ran $2\n[ "$2" != {failing} ]\n')
            python.chmod(0o755)
            done = make("test", folder=tmp_path)
            assert done.returncode == status and "ran ruff" in done.stdout and "ran pytest" in done.stdout


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("exec make test")
