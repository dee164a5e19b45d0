"""``python -m tasks [--json | --markdown]``: the tasks, the configurations and the published results they reproduce.

Imports nothing heavy, so that it answers at once. A configuration file says in its leading comments what it is::

    # FASeg, ResNet-50, ADE20K
    # published: 48.3 mIoU (single scale), ADE20K val

Its task is the one that defines the class named first in the file.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE.parent / "configs"


@dataclass(frozen=True)
class Task:
    """A task and the first line of its package's docstring."""

    name: str
    description: str


@dataclass(frozen=True)
class Config:
    """A configuration by its name below ``configs/`` without ending, and what its leading comments say."""

    name: str
    task: str
    description: str
    published: str


def find_tasks(package: Path) -> list[Task]:
    """The tasks below `package`: folders with a command line."""
    tasks = []
    for main in sorted(package.glob("*/__main__.py")):
        docstring = ast.get_docstring(ast.parse((main.parent / "__init__.py").read_text())) or ""
        tasks.append(Task(main.parent.name, docstring.partition("\n")[0]))
    return tasks


def find_configs(folder: Path, package: Path) -> list[Config]:
    """The configurations below `folder` for the tasks of `package`, by name."""
    tasks = {
        name: source.relative_to(package).parts[0]
        for source in package.glob("*/**/*.py")
        if source.relative_to(package).parts[0] != "core"
        for name in re.findall(r"^class (\w+)", source.read_text(), re.MULTILINE)
    }
    return [read_config(path, folder, tasks) for path in sorted(folder.rglob("*.yaml"))]


def read_config(path: Path, folder: Path, tasks: dict[str, str]) -> Config:
    """What one configuration says of itself; `tasks` are task names by class name. Missing parts are empty."""
    text = path.read_text()
    header = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comments = [line.removeprefix("#").strip() for line in header]
    published = [line.removeprefix("published:").strip() for line in comments if line.startswith("published:")]
    model = re.search(r"^\s*class_path: *(?:[\w.]*\.)?(\w+)", text, re.MULTILINE)
    return Config(
        name=path.relative_to(folder).with_suffix("").as_posix(),
        task=tasks.get(model[1], "") if model else "",
        description=next((line for line in comments if not line.startswith("published:")), ""),
        published="; ".join(published),
    )


def show(tasks: list[Task], configs: list[Config]) -> None:
    """Print every task with its configurations."""
    width = max((len(config.name) for config in configs), default=0)
    for task in [*tasks, Task("", "Other configurations")]:
        own = [config for config in configs if config.task == task.name]
        if task.name:
            print(f"{task.name}: {task.description}")
        elif own:
            print(task.description)
        for config in own:
            print(f"  {config.name:{width}}  {config.description}")
            if config.published:
                print(f"  {'':{width}}  published: {config.published}")
        if task.name or own:
            print()
    print("Run: python -m tasks.<task> {fit,validate,test,predict} -c configs/<name>.yaml")


def markdown(tasks: list[Task], configs: list[Config]) -> str:
    """The page ``docs/zoo.md``: a table of configurations per task."""
    lines = [
        "# Configurations",
        "",
        "Written by `make docs` from the first lines of the files in `configs/`. *Published* is what the papers and",
        "their repositories state, in per cent; what this code reached is in [results.md](results.md).",
    ]
    for task in tasks:
        lines += ["", f"## {task.name}", "", task.description, ""]
        lines += ["| configuration | what it is | published |", "|---|---|---|"]
        for config in configs:
            if config.task == task.name:
                link = f"[`{config.name}.yaml`](../configs/{config.name}.yaml)"
                lines.append(f"| {link} | {config.description} | {config.published} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tasks", description="List tasks, configurations and results.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the page docs/zoo.md")
    options = parser.parse_args(args)
    tasks, configs = find_tasks(PACKAGE), find_configs(CONFIGS, PACKAGE)
    if options.json:
        found = {"tasks": [asdict(task) for task in tasks], "configs": [asdict(config) for config in configs]}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif options.markdown:
        print(markdown(tasks, configs))
    else:
        show(tasks, configs)


if __name__ == "__main__":
    main()
