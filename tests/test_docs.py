"""What the pages promise: their commands are accepted, their links lead somewhere, generated tables are current."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from tasks.__main__ import CONFIGS, PACKAGE, find_configs, find_tasks, markdown

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """Task and arguments of every task's command in the code blocks of a page; continued lines are one."""
    blocks = "\n".join(re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    found = (re.search(r"-m tasks\.(\w+ .*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def all_commands():
    configs = [line for path in CONFIGS.rglob("*.yaml") for line in path.read_text().splitlines()]
    options = {line.partition(": ")[2] for line in configs if line.startswith("# multi-scale and flip: ")}
    hints = [
        ["segmentation", "validate", "-c", "configs/faseg.yaml", *shlex.split(option)] for option in sorted(options)
    ]
    found = [command for page in PAGES for command in commands(page.read_text())] + hints
    return sorted({tuple(command) for command in found})


def test_commands_are_found_in_code_blocks():
    text = (
        "```bash\npython -m tasks.segmentation fit -c a.yaml \\\n    --x '[1, 2]'  # why\n```\n-m tasks.segmentation no"
    )
    assert commands(text) == [["segmentation", "fit", "-c", "a.yaml", "--x", "[1, 2]"]]
    subcommands = {"segmentation": {"fit", "validate", "test", "predict", "check"}}
    subcommands["classification"] = subcommands["segmentation"] - {"test"}
    subcommands["video"] = subcommands["classification"] | {"evaluate"}
    subcommands["navigation"] = {"fit", "check", "evaluate"}
    for task, names in subcommands.items():
        assert {command[1] for command in all_commands() if command[0] == task} == names


@pytest.mark.parametrize(
    ("task", "arguments"), [(task, rest) for task, *rest in all_commands()], ids=[" ".join(c) for c in all_commands()]
)
def test_commands_are_accepted(task, arguments, run_cli, tmp_path):
    """The parser takes every command as it stands; files that only a user has are put in its way."""
    if arguments[0] == "evaluate":
        assert importlib.import_module(f"tasks.{task}.evaluate").make_parser().parse_args(arguments[1:])
        return
    for option, value in itertools.pairwise(arguments):
        if option == "--ckpt_path":
            (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / value).touch()
        elif option == "-c" and not (ROOT / value).exists():
            (tmp_path / value).write_text("seed_everything: 1\n")
    outcome = run_cli(*arguments, "--print_config")
    assert outcome.code == 0, outcome.err
    assert f"class_path: tasks.{task}." in outcome.out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"\b(?:configs|docs|tests|tasks|backbones|kernels|efficiency)/[\w./-]+\.(?:yaml|md|py)\b", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_reachable_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name not in readme] == []


def test_the_table_of_configurations_is_current():
    page = markdown(find_tasks(PACKAGE), find_configs(CONFIGS, PACKAGE)) + "\n"
    assert (ROOT / "docs" / "zoo.md").read_text() == page, "run `make docs`"
