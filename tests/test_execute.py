"""Running lessons: progress, headlines, failures, interrupts; and the same bytes from the same code."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from minivlp.notebooks import ROOT, execute, files, lessons


def store(path: Path, *cells: str | tuple[str, dict]) -> Path:
    """A notebook of code cells (`(source, metadata)` where a cell has tags); a string that starts with # is text."""
    made = []
    for cell in cells:
        source, metadata = (cell, {}) if isinstance(cell, str) else cell
        markdown = source.startswith("#")
        made.append(new_markdown_cell(source) if markdown else new_code_cell(source, metadata=metadata))
    for index, cell in enumerate(made):
        cell.id = f"cell-{index}"
    files.write(new_notebook(cells=made), path)
    return path


def tagged(*names: str) -> dict:
    return {"tags": list(names)}


LIVELY = (
    "# 01 · Lively",
    "import time\nfor i in range(4):\n    print(f'\\rstep {i}', end='', flush=True)\n    time.sleep(0.02)\nprint()",
    "from IPython.display import display\nhandle = display({'text/plain': 'start'}, raw=True, display_id=True)\n"
    "handle.update({'text/plain': 'end'}, raw=True)",
    "print('out 1', flush=True)\nprint('out 2')",
    "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1))\nplt.plot([0, 1])\nplt.show()",
    ("import time\nprint(time.time())", tagged("varies")),
    ("print('all is', 1.5)", tagged("headline")),
)


def test_executing_twice_gives_the_same_bytes_but_for_what_varies(tmp_path: Path) -> None:
    path = store(tmp_path / "01_lively.ipynb", *LIVELY)
    assert execute.execute_in_place(path)
    first = files.read(path)
    execute.execute_in_place(path)
    second = files.read(path)
    assert files.compare(first, second) == []
    assert first.cells[5].outputs != second.cells[5].outputs
    second.cells[5].outputs = first.cells[5].outputs
    files.write(second, tmp_path / "again.ipynb")
    files.write(first, path)
    assert (tmp_path / "again.ipynb").read_bytes() == path.read_bytes()

    assert [cell.execution_count for cell in first.cells[1:]] == [1, 2, 3, 4, 5, 6]
    assert first.cells[1].outputs == [new_output("stream", name="stdout", text="step 3\n")]
    assert [output.data["text/plain"] for output in first.cells[2].outputs] == ["end"]
    assert first.cells[3].outputs == [new_output("stream", name="stdout", text="out 1\nout 2\n")]
    assert "version" not in first.metadata.language_info
    assert files.normalise(first) == first
    assert path.read_bytes().endswith(b"}\n") and not path.read_bytes().endswith(b"\n\n")


def test_compare_sees_what_may_not_differ(tmp_path: Path) -> None:
    notebook = files.read(store(tmp_path / "01_a.ipynb", "1", ("2", tagged("varies"))))
    other = files.normalise(notebook)
    for index in (0, 1):
        other.cells[index].outputs = [new_output("stream", name="stdout", text="new")]
    assert files.compare(files.normalise(notebook), other) == ["Cell 0: outputs differs."]
    other.cells[1].source = "3"
    assert "Cell 1: source differs." in files.compare(files.normalise(notebook), other)
    other.cells.pop()
    assert files.compare(notebook, other) == ["One has 2 cells, the other 1."]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1%\r50%\r100%\ndone\n", "100%\ndone\n"),
        ("loading\r       \r", ""),  # a bar that goes away
        ("long line\rshort\n", "shortline\n"),
        ("\x1b[2K\rstep 1\x1b[K\r\nend", "step 1\nend"),
        ("  table  \n", "  table  \n"),
    ],
)
def test_carriage_returns_end_as_on_a_terminal(text: str, shown: str) -> None:
    assert files.resolve_carriage_returns(text) == shown


def test_a_bar_that_vanishes_leaves_no_output(tmp_path: Path) -> None:
    notebook = files.read(store(tmp_path / "01_a.ipynb", "1"))
    notebook.cells[0].outputs = [new_output("stream", name="stderr", text="\r 50%\r     \r")]
    assert files.normalise(notebook).cells[0].outputs == []


def test_pictures_lose_what_names_the_program() -> None:
    from PIL import PngImagePlugin

    data = []
    for version in ("1", "22"):
        note = PngImagePlugin.PngInfo()
        note.add_text("Software", f"Matplotlib version {version}")
        buffer = io.BytesIO()
        Image.linear_gradient("L").save(buffer, "PNG", pnginfo=note, dpi=(100, 100))
        data.append(buffer.getvalue())
    plain = files.strip_png(data[0])
    assert data[0] != data[1] and plain == files.strip_png(data[1]) and b"Software" not in plain
    with Image.open(io.BytesIO(plain)) as image:
        assert image.tobytes() == Image.linear_gradient("L").tobytes()
        assert image.info["dpi"] == pytest.approx((100, 100), rel=1e-3)
    assert files.strip_png(b"no png") == b"no png"


def test_pictures_shrink_once_and_look_the_same():
    ramp = np.linspace(0, 255, 128 * 128).reshape(128, 128)
    noise = np.random.default_rng(0).integers(0, 3, (128, 128))  # many thousand colours, as anti-aliasing makes
    pixels = np.stack([ramp, ramp.T, ramp[::-1] * 0.5 + noise, np.full_like(ramp, 255)], -1).astype(np.uint8)

    def png(array):
        Image.fromarray(array).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    small = files.shrink_png(png(pixels))
    with Image.open(io.BytesIO(small)) as picture:
        assert picture.mode == "P"
        difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - pixels[..., :3])
    assert len(small) < 0.6 * len(png(pixels)) and difference.mean() < 6
    assert files.shrink_png(small) == small == files.shrink_png(png(pixels))
    pixels[0, 0, 3] = 0  # a hole must stay a hole
    assert files.shrink_png(png(pixels)) == png(pixels)
    assert files.shrink_png(b"no png") == b"no png"


def test_ids_are_made_from_the_text(tmp_path: Path) -> None:
    path = tmp_path / "01_old.ipynb"
    cells = ", ".join('{"cell_type": "markdown", "metadata": {}, "source": "same"}' for _ in range(2))
    path.write_text(f'{{"nbformat": 4, "nbformat_minor": 4, "metadata": {{}}, "cells": [{cells}]}}')
    ids = [cell.id for cell in files.read(path).cells]
    assert ids == [cell.id for cell in files.read(path).cells] and len(set(ids)) == 2


def test_a_failed_execution_overwrites_nothing(tmp_path: Path) -> None:
    path = store(tmp_path / "01_bad.ipynb", "print('new')", "## Part two\nText.", "total = 0\n1 / total\n# end")
    before = path.read_bytes()
    with pytest.raises(execute.LessonError) as caught:
        execute.execute_in_place(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["01_bad.ipynb"]
    text = str(caught.value)
    assert 'cell 2 of 2 failed, under "Part two"' in text
    assert "    | 1 / total" in text and "ZeroDivisionError: division by zero" in text


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "01_a.ipynb", "1")
    before = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        files.write(new_notebook(cells=[new_code_cell("2")]), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_lessons_run_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = store(tmp_path / "01_bad.ipynb", "## Start", "import nothing_of_that_name")
    result = ("print('accuracy', 0.97)", tagged("headline"))
    good = store(tmp_path / "02_good.ipynb", "## Start", "print('noise')", result)
    before = good.read_bytes()
    outcomes = execute.run_lessons([bad, good], target=tmp_path / "build")
    assert [(o.name, bool(o.error), o.headline) for o in outcomes] == [
        ("01_bad", True, ""),
        ("02_good", False, "accuracy 0.97"),
    ]
    out = capsys.readouterr().out
    assert "ModuleNotFoundError" in out and "01_bad  FAILED after" in out
    assert out.rstrip().split("\n")[-1].startswith("02_good  done in") and out.rstrip().endswith("accuracy 0.97")
    assert "cell 1/2 · 0 s · Start" in out or "cell 1/2 · 1 s · Start" in out
    assert good.read_bytes() == before
    assert files.read(tmp_path / "build" / "02_good.ipynb").cells[1].outputs[0].text == "noise\n"
    assert (tmp_path / "build" / "01_bad.ipynb").exists()


def test_a_kernel_that_dies_and_one_that_hangs_are_named(tmp_path: Path) -> None:
    notebook = files.read(store(tmp_path / "01_dies.ipynb", "import os\nos._exit(1)"))
    with pytest.raises(execute.LessonError, match="the kernel died"):
        execute.execute(notebook, name="01_dies", folder=tmp_path)
    notebook = files.read(store(tmp_path / "01_hangs.ipynb", "import time\ntime.sleep(60)"))
    with pytest.raises(execute.LessonError, match="it ran for more than 1 seconds"):
        execute.execute(notebook, name="01_hangs", folder=tmp_path, timeout=1)


def test_ctrl_c_stops_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    source = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    path = store(tmp_path / "01_long.ipynb", source)
    before = path.read_bytes()
    command = [sys.executable, "-m", "minivlp.notebooks", "execute", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and out.rstrip().endswith("Stopped.") and "Traceback" not in out, out
    assert path.read_bytes() == before
    with pytest.raises(ProcessLookupError):  # the kernel is gone as well
        os.kill(int(mark.read_text()), 0)


def test_nbval_runs_every_cell_and_compares_the_tagged_ones(tmp_path: Path) -> None:
    checked, free = tagged("nbval-check-output"), {}
    path = store(tmp_path / "01_a.ipynb", *(("print(1)", checked), ("print(2)", checked), ("print(3)", free), "1 / 0"))
    notebook = files.read(path)
    for count, text in enumerate(("1\n", "not 2\n", "not 3\n"), start=1):
        cell = notebook.cells[count - 1]
        cell.execution_count, cell.outputs = count, [new_output("stream", name="stdout", text=text)]
    files.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", "-v"]
    done = subprocess.run([*command, path.name], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    verdicts = re.findall(r"::Cell \d (PASSED|FAILED)", done.stdout)
    assert verdicts == ["PASSED", "FAILED", "PASSED", "FAILED"], done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_with_what_the_cell_says() -> None:
    screen = Terminal()
    with execute.Progress("01_vit", 40, stream=screen) as progress:
        progress.at(7, "Training")
        progress.says("step 10 loss 2.1\rstep 20 loss 1.9")
        time.sleep(1.2)
    shown = screen.getvalue()
    assert "\n" not in shown and shown.endswith("\r\x1b[K")
    assert "01_vit  cell 7/40 · 1 s · Training · step 20 loss 1.9" in shown


def test_progress_in_a_log_is_one_line_per_section() -> None:
    log = io.StringIO()
    with execute.Progress("01_vit", 3, stream=log) as progress:
        for cell, heading in enumerate(["One", "One", "Two"], start=1):
            progress.at(cell, heading)
    assert log.getvalue() == "01_vit  cell 1/3 · 0 s · One\n01_vit  cell 3/3 · 0 s · Two\n"


def test_clock() -> None:
    assert [execute.clock(seconds) for seconds in (0.2, 59.4, 59.6, 125)] == ["0 s", "59 s", "1 min 00 s", "2 min 05 s"]


def test_lessons_by_name(tmp_path: Path) -> None:
    first, second = (store(tmp_path / name, "1") for name in ("01_vit.ipynb", "02_clip.ipynb"))
    store(tmp_path / "scratch.ipynb", "1")
    assert lessons(folder=tmp_path) == [first, second]
    assert lessons(["02", "01_vit"], folder=tmp_path) == [second, first]
    assert lessons([str(first)], folder=tmp_path / "elsewhere") == [first]
    with pytest.raises(FileNotFoundError, match=r"No lesson is called '03'. There are: 01_vit, 02_clip\."):
        lessons(["03"], folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no lesson"):
        lessons(folder=tmp_path / "elsewhere")
