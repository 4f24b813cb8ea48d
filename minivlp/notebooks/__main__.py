"""`python -m minivlp.notebooks COMMAND [LESSON ...]`; the Makefile's targets call this."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minivlp.notebooks import BUILD, ROOT, execute, files, guards, lessons, links, students, sync


def _run(args: argparse.Namespace) -> int:
    outcomes = execute.run_lessons(lessons(args.names))
    failed = [outcome.name for outcome in outcomes if outcome.error]
    if failed:
        print(f"{len(failed)} of {len(outcomes)} lessons failed: {', '.join(failed)}.")
    return bool(failed)


def _execute(args: argparse.Namespace) -> int:
    failed = False
    for path in lessons(args.names):
        try:
            changed = execute.execute_in_place(path)
            print(f"{path.stem}  {'stored anew' if changed else 'unchanged'}", flush=True)
        except execute.LessonError as error:
            print(f"{error}\n{path.stem}  left as it was", flush=True)
            failed = True
    return failed


def _sync(args: argparse.Namespace) -> int:
    for path in lessons(args.names):
        notebook = files.read(path)
        changed = sync.sync(notebook)
        if changed:
            files.write(notebook, path)
            print(f"{path.stem}  rewrote {', '.join(changed)}; now `make notebooks LESSON={path.stem}`")
        else:
            print(f"{path.stem}  in step with the package")
    return _problems({path.stem: sync.check(files.read(path)) for path in lessons(args.names)})


def _links(args: argparse.Namespace) -> int:
    changed = links.link_all(ROOT)
    print("\n".join(changed) if changed else f"All badges and setup cells lead to {links.address(ROOT).repository}.")
    return 0


def _check(args: argparse.Namespace) -> int:
    found = {path.stem: guards.check(path) for path in lessons(args.names)}
    found["all lessons"] = sync.check_homes({path.stem: files.read(path) for path in lessons()})
    found["links"] = [f"Out of line: {text}. Run `make links`." for text in links.link_all(ROOT, dry=True)]
    status = _problems(found)
    if not status:
        print("No problems.")
    return status


def _problems(found: dict[str, list[str]]) -> int:
    for where, problems in found.items():
        for problem in problems:
            print(f"{where}  {problem}")
    return any(found.values())


def _students(args: argparse.Namespace) -> int:
    for path in students.write_student_editions(lessons(args.names)):
        print(f"{path.stem}  {path.relative_to(ROOT)}")
    return 0


def _mark(args: argparse.Namespace) -> int:
    if not args.names:
        print('Name the handed-in notebooks: make mark SUBMISSIONS="ann/01_vit.ipynb ben/01_vit.ipynb".')
        return 2
    marks = []
    for path in map(Path, args.names):
        own = students.mark(path, students.lesson_of(path, lessons()))
        for mark in own:
            print(f"    {mark.check:24} {mark.points:g} of {mark.possible:g}  {mark.error}".rstrip())
        total, possible = sum(mark.points for mark in own), sum(mark.possible for mark in own)
        print(f"{path}  {total:g} of {possible:g} points", flush=True)
        marks += own
    students.write_marks(marks, BUILD / "marks.csv")
    print(f"Table: {(BUILD / 'marks.csv').relative_to(ROOT)}")
    return 0


COMMANDS = {
    "run": (_run, "run lessons and keep executed copies in build/"),
    "execute": (_execute, "execute lessons in place"),
    "sync": (_sync, "copy changed definitions from the package into the lessons"),
    "links": (_links, "rewrite badges and setup cells from pyproject.toml"),
    "check": (_check, "look for problems without running anything"),
    "students": (_students, "write editions without solutions to build/students/"),
    "mark": (_mark, "mark handed-in notebooks"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 when all is well, 1 on problems, 2 on wrong use, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m minivlp.notebooks", description="Tools for the lessons.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", help="lessons (01, 01_vit or a path); all when left out")
    args = parser.parse_args(arguments)
    try:
        return int(COMMANDS[args.command][0](args))
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
