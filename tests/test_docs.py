"""The pages keep their word: README.md and docs/*.md against the code.

Pinned, of every page: (1) Python blocks run, in the order of the page; one that begins with `# name.py` is that file;
(2) JSON, TOML and YAML blocks can be read; (3) every `grpo` command, in blocks and in running text, is taken by the
real parser: it names a command, its recipes and flags exist and their values have the right type; `make` targets,
`python -m` modules and their flags exist; (4) what cannot be run says why in its title,
which the site shows: ```sh title="not run: two hosts"; (5) files that are named exist; (6) links that leave docs/ lead
somewhere, and every page is in the navigation (`make docs` checks the links within).
The commands of docs/rewards.md are really run, in test_rewards_docs.py.
"""

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from pipelines import cli
from pipelines.config import flat_fields

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```([\w+-]*)( [^\n]*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}[^\n]*\n|\n(?= {4}))+")
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
PLACEHOLDERS = {"...", "[...]", "COMMAND"}
SHELL = ("sh", "bash")


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    language: str
    """The first word behind the fence; "sh" for an indented block, which is always a command."""
    options: str
    """What stands behind it."""
    text: str

    @property
    def is_run(self) -> bool:
        return "not run" not in self.options


@cache
def source(page: str) -> str:
    return (ROOT / page).read_text()


@cache
def blocks(page: str) -> list[Block]:
    fenced = [Block(language, options, text) for language, options, text in FENCE.findall(source(page))]
    rest = FENCE.sub("", source(page))
    return fenced + [Block("sh", "", text) for text in INDENTED.findall(rest) if is_command(text)]


def is_command(text: str) -> bool:
    """Indented blocks are commands; equations and layouts of folders may be indented, too."""
    return text.split()[0] in ("grpo", "make", "python", "pip", ".venv/bin/grpo")


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of each command, continued lines joined, comments and `NAME=value` in front of it taken off."""
    for line in text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in PLACEHOLDERS]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield words


@cache
def commands() -> dict[str, cli.Command]:
    return cli._commands()


@cache
def flags_of(name: str) -> set[str]:
    """Every flag of a subcommand, with any of its recipes."""
    fields = {field for recipe in commands()[name].recipes.values() for field in flat_fields(recipe())}
    return {"--" + field.replace("_", "-") for field in fields} | {
        "--config",
        "--recipe",
        "--from",
        "--engine",
        "--steps",
    }


def check_grpo(words: list[str]) -> None:
    name, *rest = words
    assert name in commands(), f"there is no command {name!r}"
    command = commands()[name]
    if name == "r1" and "--config" not in rest and "--recipe" not in rest:
        rest = ["tiny", *rest]
    if {"-h", "--help"} & set(rest):
        return
    cli.parse(command, rest)


def check_module(words: list[str]) -> None:
    """`python -m bench.model --preset tiny`: the module is there, and knows its flags."""
    module, *rest = words
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.is_file(), f"there is no module {module}"
    if module == "pipelines.cli":
        return check_grpo(rest)
    known = set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    unknown = [word for word in rest if word.startswith("--") and word not in known]
    assert not unknown, f"{module} does not know {unknown}"


def check_command(words: list[str]) -> None:
    program = Path(words[0]).name
    if program == "grpo":
        check_grpo(words[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", source("Makefile"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"make has no target {words[1:]}"
    elif program.startswith("python") and words[1:2] == ["-m"]:
        check_module(words[2:])
    elif program.startswith("python"):
        assert (ROOT / words[1]).is_file() or words[1] in written, f"there is no file {words[1]}"
    elif program in ("torchrun", "accelerate"):
        check_module(words[words.index("-m") + 1 :])
    elif program == "pip":
        check_extras(words)
    else:
        raise AssertionError('neither grpo, make, python nor pip: say title="not run: REASON" behind the fence')


def check_extras(words: list[str]) -> None:
    asked = {extra for word in words for part in re.findall(r"\[(.+)\]", word) for extra in part.split(",")}
    extras = tomllib.loads(source("pyproject.toml"))["project"]["optional-dependencies"]
    assert asked <= set(extras), f"there is no extra {asked - set(extras)}"


written: set[str] = set()
"""Names of files that Python blocks of the page have written."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one to work in, with the configuration files that pages name."""
    monkeypatch.chdir(tmp_path)
    written.clear()
    for name in ("run.yaml", "my_run.yaml", "data.yaml"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks(page: str, folder: Path) -> None:
    for block in blocks(page):
        assert block.language, f"name the language of this block, text if it has none:\n{block.text}"
        if not block.is_run:
            assert re.search(r'title="not run: [^"]{4,}"', block.options), f"say why this is not run:\n{block.text}"
            continue
        title = re.match(r"# (\w+\.py)\n", block.text)
        if block.language == "python" and title:
            with (folder / title[1]).open("a") as file:
                file.write(block.text)
            written.add(title[1])
            compile(block.text, title[1], "exec")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), {"__name__": "page"})
        elif block.language == "json":  # one object a line, or continued on lines that are indented
            assert all(json.loads(line) for line in re.sub(r"\n +", " ", block.text).splitlines())
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language in SHELL:
            for words in shell_lines(block.text):
                try:
                    check_command(words)
                except (AssertionError, ValueError, OSError) as error:
                    pytest.fail(f"{page}: {shlex.join(words)}\n    {error}")
        else:
            assert block.language == "text", f"{page}: do not know how to check {block.language}"


def spans(page: str) -> list[str]:
    """Code in running text."""
    prose = INDENTED.sub("", FENCE.sub("", source(page)))
    return [" ".join(span.split()) for span in SPAN.findall(prose)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_in_running_text(page: str) -> None:
    known = {"--verbose"}.union(*map(flags_of, commands()))  # cli.main takes it off any command
    for path in (ROOT / "bench").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    wrong = []
    for span in spans(page):
        words = [word for word in span.split() if word not in PLACEHOLDERS]
        if words[0] == "grpo" and len(words) > 1 and words[1].isidentifier():
            ours = flags_of(words[1]) if words[1] in commands() else set()
        elif words[0].startswith("--") and page != "docs/log.md":
            ours = known
        else:
            continue
        flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        plain = {re.sub(r"(--|\.)no-", r"\1", flag): flag for flag in flags}
        for name in plain.keys() - ours - {"--help"}:
            if not name.endswith(".*") or not any(other.startswith(name[:-1]) for other in ours):
                wrong.append(f"{span}: {plain[name]}")
        wrong += [f"{span}: no such command"] if not ours else []
    assert not wrong, f"{page} names what does not exist: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    path = re.compile(r"(?:bench|docs|examples|grpo|models|pipelines|requirements|rewards|rollout|tests)/[\w/.]+\.\w+")
    named = {span for span in spans(page) if path.fullmatch(span)}
    gone = sorted(name for name in named if not (ROOT / name).exists())
    assert not gone, f"{page} names files that do not exist: {gone}"


@pytest.mark.parametrize("page", PAGES)
def test_links_that_leave_the_folder(page: str) -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)#\s]+)[^)\s]*\)", FENCE.sub("", source(page)))
    gone = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not gone, f"{page} has links that lead nowhere: {gone}"
    outside = [target for target in targets if page.startswith("docs/") and target.startswith("..")]
    assert not outside, f"{page}: the built site does not hold {outside}; name the file in backticks instead"


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r'"([\w/]+\.md)"', source("zensical.toml"))
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(nav) == sorted(pages)


@cache
def literals() -> list[str]:
    """Every constant text in the source, the parts of formatted ones apart."""
    files = [
        path
        for package in ("grpo", "models", "pipelines", "rewards", "rollout")
        for path in (ROOT / package).rglob("*.py")
    ]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def table_rows(page: str) -> list[list[str]]:
    """The cells of all rows of a page's tables, head lines left out."""
    tables = re.findall(r"^\|.*\n\|[-| ]+\n((?:\|.*\n)+)", source(page), re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


def test_messages_on_the_page_of_troubles_are_the_programs() -> None:
    cells = [row[0] for row in table_rows("docs/troubleshooting.md")]
    messages = [span for cell in cells for span in SPAN.findall(cell) if " " in span.strip()]
    parts = [part.strip() for message in messages for part in message.split("...") if len(part.strip()) > 1]
    assert len(messages) > 25
    gone = [part for part in parts if not any(part in text for text in literals())]
    assert not gone, f"no message says this any more: {gone}"


def test_options_for_those_who_come_from_elsewhere_are_taken() -> None:
    """With their values, by the real parser; the checks of the configuration included."""
    spans = [span for row in table_rows("docs/coming_from.md") for span in SPAN.findall(row[-1]) if span[:2] == "--"]
    assert len(spans) > 50
    for span in spans:
        check_grpo(["zero", "gsm8k", "--model", "base", *shlex.split(span)])
