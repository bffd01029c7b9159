"""Habits of the repository itself: sizes, docstrings, portability, and a lock that covers what pyproject.toml asks for.

Import directions are not checked here: import-linter does that (`make layers`).
"""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("grpo", "models", "pipelines", "rewards", "rollout")

MAX_FILE_LINES, MAX_TEST_FILE_LINES, MAX_FUNCTION_LINES = 300, 400, 60
# What decides which numbers come out of a run, and what stands around it: stages, tasks, command line, rewards.
CORE, MAX_CORE_LINES, MAX_OTHER_LINES = ("grpo", "models", "rollout"), 11_600, 16_000
# A grader of mathematical answers and a sandbox for code are programs of their own; reading a reward needs neither.
GRADERS, MAX_GRADER_LINES = ("math_", "code_", "sandbox"), 7_500
EXCEPTIONS: dict[str, str] = {}
"""Path, or path:function, of what may exceed its budget -> the reason."""

# Put together from pieces, so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.}-])/(work|root|home)/" + r"|(?<!\w)/tmp/" + r"w\b")
REGISTRY_HOST = re.compile(r"\b(pypi|pythonhosted|npmjs|debian|download\.pytorch)\." + r"(org|com)\b")
ALLOWED_HOSTS = {"requirements/install.sh": {"download.pytorch" + ".org"}}


def tracked_files() -> list[Path]:
    """Files git tracks, or would if they were added."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def locked_lines() -> list[str]:
    lines = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def locked_versions() -> dict[str, str]:
    pins = [line.split(";")[0].strip().split("==") for line in locked_lines()]
    return {canonicalize_name(name): version for name, version in pins}


def test_files_fit_a_sitting():
    limits = dict.fromkeys(python_files(*PACKAGES, "examples"), MAX_FILE_LINES)
    limits |= dict.fromkeys(python_files("tests"), MAX_TEST_FILE_LINES)
    sizes = {name_of(path): (num_lines(path), limit) for path, limit in limits.items()}
    too_long = {name: size for name, size in sizes.items() if size[0] > size[1] and name not in EXCEPTIONS}
    assert not too_long, f"split these files by noun, (lines, limit): {too_long}"


def test_functions_fit_a_screen():
    too_long = {}
    for path in python_files(*PACKAGES, "examples", "tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{name_of(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES and name not in EXCEPTIONS:
                    too_long[name] = lines
    assert not too_long, f"split these functions, limit {MAX_FUNCTION_LINES} lines: {too_long}"


def test_core_stays_small_enough_to_read():
    sizes = {package: sum(map(num_lines, python_files(package))) for package in PACKAGES}
    assert all(sizes.values()), f"a package has no code, was a folder renamed? {sizes}"
    graders = sum(num_lines(path) for path in python_files("rewards") if path.name.startswith(GRADERS))
    core = sum(sizes[package] for package in CORE)
    others = sum(sizes.values()) - core - graders
    assert core <= MAX_CORE_LINES, f"limit {MAX_CORE_LINES} lines, have {core}: {sizes}"
    assert others <= MAX_OTHER_LINES, f"limit {MAX_OTHER_LINES} lines around the core, have {others}: {sizes}"
    assert graders <= MAX_GRADER_LINES, f"limit {MAX_GRADER_LINES} lines of graders, have {graders}"


def test_exceptions_still_exist():
    gone = [name for name in EXCEPTIONS if not (ROOT / name.split(":")[0]).is_file()]
    assert not gone, f"remove these from EXCEPTIONS: {gone}"


def test_modules_open_with_a_docstring():
    files = python_files(*PACKAGES, "examples")
    silent = [name_of(path) for path in files if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"say in a docstring what each of these is: {silent}"


def test_python_source_is_ascii():
    found = {}
    for path in python_files(*PACKAGES, "examples", "tests"):
        lines = enumerate(path.read_text().splitlines(), 1)
        found |= {f"{name_of(path)}:{number}": line.strip() for number, line in lines if not line.isascii()}
    assert not found, f"write these with escapes or in ASCII: {found}"


def test_no_machine_paths_or_registry_hosts():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a binary file
        hits = {match.group() for pattern in (MACHINE_PATH, REGISTRY_HOST) for match in pattern.finditer(text)}
        found += [f"{name_of(path)}: {hit}" for hit in sorted(hits - ALLOWED_HOSTS.get(name_of(path), set()))]
    assert not found, f"these hold only on one machine or network: {found}"


def test_lock_has_exact_pins_once_and_sorted():
    pin = re.compile(r"[a-z0-9-]+==[A-Za-z0-9.!+]+( ; .+)?")
    loose = [line for line in locked_lines() if not pin.fullmatch(line)]
    assert not loose, f"write these as name==version, names in lower case with hyphens: {loose}"
    names = [line.split("==")[0] for line in locked_lines()]
    assert names == sorted(set(names)), "requirements/cpu.lock: names must be sorted, each once"
    assert "torch" not in names, "torch goes in first and alone, by requirements/install.sh"


def test_lock_covers_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    torch = re.search(r"^TORCH=(\S+)$", (ROOT / "requirements/install.sh").read_text(), re.MULTILINE)
    assert torch, "requirements/install.sh sets TORCH=version on a line of its own"
    versions = locked_versions() | {"torch": torch.group(1)}
    required = [Requirement(line) for line in project["dependencies"] + extras["cpu"] + extras["dev"] + extras["docs"]]
    pins = [(requirement, versions.get(canonicalize_name(requirement.name))) for requirement in required]
    wrong = [f"{r}, locked: {version}" for r, version in pins if version is None or not r.specifier.contains(version)]
    assert not wrong, f"requirements/cpu.lock lacks these, or pins a version outside their range: {wrong}"


def test_lock_covers_cpu_in():
    names = [line for line in (ROOT / "requirements/cpu.in").read_text().splitlines() if line and line[0] != "#"]
    missing = sorted(set(names) - set(locked_versions()))
    assert names and not missing, f"in requirements/cpu.in but not in cpu.lock: {missing}"


def test_one_version_everywhere():
    """What is built, what is cited, and the newest entry of the changelog."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    entries = re.findall(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert entries[0] == (version, str(citation["date-released"])), "the newest entry is of another version or day"
    assert citation["version"] == version


def test_container_recipe_names_what_there_is():
    """It is built nowhere in CI: at least its interpreter, extras and script must be the project's."""
    recipe = (ROOT / "Containerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = re.findall(r"^FROM python:([\d.]+)", recipe, re.MULTILINE)
    extras = re.findall(r"'\.\[([\w,]+)\]'", recipe)
    assert pythons and all(SpecifierSet(project["requires-python"]).contains(version) for version in pythons)
    assert extras and set(",".join(extras).split(",")) <= set(project["optional-dependencies"])
    assert all((ROOT / script).is_file() for script in re.findall(r"^RUN (\S+\.sh)", recipe, re.MULTILINE))
