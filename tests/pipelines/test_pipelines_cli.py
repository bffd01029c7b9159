"""The command `grpo`, called in this process.

Pinned: (1) flags beat the config file, the file beats the recipe; (2) `--engine` and `--steps` are short for the fields
that are changed most; (3) whatever is wrong with the input ends as one line on stderr that names it and the remedy,
with exit status 2, no box and no traceback; (4) exit status 0 done, 1 did not learn, 2 wrong input, and a failure that
is not the user's keeps its traceback; (5) the help of every command names the command, its recipes and --config.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.config import write_config
from pipelines.evaluate import EvalConfig
from pipelines.pretrain import PretrainConfig
from pipelines.quickstart import QuickstartConfig
from pipelines.recipes import PRETRAIN_RECIPES, ZERO_RECIPES, zero_ledger
from pipelines.zero import ZeroConfig
from rollout.weight_sync import SyncError
from tests.pipelines.conftest import GSM8K, LOCAL, grpo

RunConfig = Callable[[Any], Any]
COMMANDS = ("quickstart", "pretrain", "zero", "eval")


def ignore(config: Any) -> None:
    """Stands in for the work of a command."""


ZERO = cli.Command(config=ZeroConfig, recipes={"default": lambda: ZeroConfig(model="")} | ZERO_RECIPES, run=ignore)
PRETRAIN = cli.Command(config=PretrainConfig, recipes=dict(PRETRAIN_RECIPES), run=ignore)
QUICKSTART = cli.Command(config=QuickstartConfig, recipes={"ledger": QuickstartConfig}, run=ignore)
EVAL = cli.Command(config=EvalConfig, recipes={"default": lambda: EvalConfig(model="")}, run=ignore)


def test_flags_beat_the_file_and_the_file_beats_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("trainer: {steps: 7, temperature: 0.5}\nlearner: {lr: 3e-5}\n")
    flags = ["--config", str(file), "--trainer.steps", "9", "--reward", "math_answer", "0.5*r1_format", "--resume"]
    config = cli.parse(ZERO, ["ledger", *flags])
    recipe = zero_ledger()
    assert config == replace(
        recipe,
        reward=("math_answer", "0.5*r1_format"),
        resume=True,
        trainer=replace(recipe.trainer, steps=9, temperature=0.5),
        learner=replace(recipe.learner, lr=3e-5),
    )


def test_without_a_recipe_the_first_one_holds() -> None:
    assert cli.parse(ZERO, ["--model", "m"]) == ZeroConfig(model="m")
    assert cli.parse(PRETRAIN, []) == PRETRAIN_RECIPES["ledger"]()


def test_the_config_of_a_run_is_a_config_file(tmp_path: Path) -> None:
    config = replace(zero_ledger(), model="somewhere", reward=("r1_format",))
    write_config(config, tmp_path / "config.json")
    assert cli.parse(ZERO, ["--config", str(tmp_path / "config.json")]) == config
    assert cli.parse(ZERO, ["gsm8k", f"--config={tmp_path / 'config.json'}"]) == config


def test_short_flags() -> None:
    zero = cli.parse(ZERO, ["ledger", "--engine", "native", "--steps=3"])
    assert (zero.engine.kind, zero.trainer.steps) == ("native", 3)
    assert cli.parse(EVAL, ["--engine=vllm"]).engine.kind == "vllm"
    quickstart = cli.parse(QUICKSTART, ["--engine", "native", "--steps", "3"])
    assert (quickstart.zero.engine.kind, quickstart.zero.trainer.steps) == ("native", 3)
    assert quickstart.pretrain == QuickstartConfig().pretrain, "only RL is shortened"
    assert cli.parse(PRETRAIN, ["--steps", "4"]).steps == 4, "a field of that very name comes first"


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["zeroo"], ["'zeroo'", "zero"]),
    "unknown recipe": (["zero", "ledgr"], ["unknown recipe 'ledgr'", "ledger"]),
    "unknown flag": (["zero", "--modle", "x"], ["'--modle'", "did you mean '--model'?"]),
    "unknown nested flag": (["zero", "--trainer.stepz", "3"], ["'--trainer.stepz'", "did you mean '--trainer.steps'?"]),
    "section as a flag": (["zero", "--trainer", "5"], ["'--trainer'"]),
    "stray word": (["zero", "ledger", "extra"], ["'extra'"]),
    "--config without file": (["zero", "--config"], ["--config needs a file"]),
    "missing config file": (["zero", "--config", "no.yaml"], ["config file no.yaml not found"]),
    "flag without value": (["zero", "--trainer.steps"], ["--trainer.steps"]),
    "text for a number": (["zero", "--trainer.steps", "abc"], ["trainer.steps", "'abc'"]),
    "unknown choice": (["zero", "--engine.kind", "foo"], ["engine.kind", "'foo'", "'native'"]),
    "contradiction in a section": (
        ["zero", "--trainer.completions-per-prompt", "1"],
        ["completions_per_prompt must be >= 2 for a group baseline, got 1"],
    ),
    "contradiction between flags": (
        ["zero", "--engine.transport", "local", "--engine.num-engines", "2"],
        ["transport 'local' runs exactly 1 engine, got num_engines=2; use 'ray'"],
    ),
    "contradiction between sections": (
        ["zero", "ledger", "--trainer.max-tokens", "5000"],
        ["trainer.max_tokens=5000 leaves no room", "engine.max_model_len=1024; lower the first or raise the second"],
    ),
    "unknown task": (["eval", "--task", "nope"], ["unknown task 'nope'; known: ledger, gsm8k"]),
    "generated task without a number": (["eval", "--task", "ledger"], ["say how many with --limit"]),
    "no model named": (["zero", *LOCAL], ["--model"]),
    "no model to evaluate named": (["eval", *LOCAL], ["--model"]),
    "no data named": (["pretrain", "--out", "o"], ["--data"]),
    "missing model folder": (["zero", "--model", "nowhere", *LOCAL], ["nowhere", "Hugging Face checkpoint"]),
    "missing pretraining data": (["pretrain", "--data", "no.jsonl", "--out", "o"], ["data file no.jsonl not found"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_ends_as_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, parts = REFUSED[name]
    message = grpo(*arguments).one_line_error()
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


WRONG_FILES: dict[str, tuple[list[str], list[str]]] = {
    "missing data file": (["--data", "no.jsonl"], ["data file no.jsonl not found"]),
    "unknown kind of data": (["--data", "rows.csv"], ["rows.csv: unknown kind of file", ".jsonl"]),
    "missing reward file": (["--reward", "no.py:f"], ["reward file 'no.py' not found"]),
    "unknown reward": (["--reward", "math"], ["no reward named 'math'", "math_answer"]),
    "no such function": (["--reward", "mine.py:f"], ["mine.py", "'f'", "functions in it: g"]),
    "weight that is no number": (["--reward", "x*math_answer"], ["'x' before the star is not a number"]),
    "too few prompts for a step": (
        ["--trainer.prompts-per-step", "9"],
        ["9 different prompts are needed"],
    ),
    "no prompt fits": (
        ["--engine.max-model-len", "20", "--trainer.max-tokens", "16"],
        ["no prompt fits into 4 tokens", "engine.max_model_len"],
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_end_as_one_line(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "mine.py").write_text("def g(sample):\n    return 1.0\n")
    arguments, parts = WRONG_FILES[name]
    defaults = [] if "--trainer.max-tokens" in arguments else ["--trainer.max-tokens", "16"]
    message = grpo("zero", "--model", base, "--data", GSM8K, *defaults, *LOCAL, *arguments).one_line_error()
    for part in parts:
        assert part in message
    assert not (tmp_path / "runs").exists(), "a refused run leaves no folder that would block the next try"


def run_instead(monkeypatch: pytest.MonkeyPatch, run: RunConfig) -> None:
    monkeypatch.setattr(cli, "_commands", lambda: {"eval": replace(EVAL, run=run)})


@pytest.mark.parametrize(("result", "status"), [(None, 0), (Path("model"), 0), (0, 0), (1, 1)])
def test_the_result_becomes_the_exit_status(result: Any, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalConfig] = []

    def run(config: EvalConfig) -> Any:
        seen.append(config)
        return result

    run_instead(monkeypatch, run)
    assert grpo("eval", "--model", "m", "--limit", 3).status == status
    assert seen == [EvalConfig(model="m", limit=3)]


@pytest.mark.parametrize("error", [ValueError("a bad row"), FileNotFoundError("a bad row"), ValueError("a bad\n  row")])
def test_errors_of_the_user_become_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: EvalConfig) -> None:
        raise error

    run_instead(monkeypatch, run)
    assert grpo("eval").one_line_error() == "a bad row"
    monkeypatch.setenv("GRPO_VERBOSE", "1")
    with pytest.raises(type(error)):
        grpo("eval")


def test_a_run_that_ended_for_its_gradients_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: EvalConfig) -> None:
        raise FloatingPointError("step 7: 4 optimizer steps in a row were skipped")

    run_instead(monkeypatch, run)
    done = grpo("eval")
    assert done.status == 1
    assert done.err.startswith("grpo: error: step 7: 4 optimizer steps in a row were skipped; traceback in ")


def test_a_tracker_that_is_not_installed_is_named_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # an import of it fails from now on
    flags = ("--data", GSM8K, "--trainer.max-tokens", 16, *LOCAL, "--out", tmp_path / "run")
    message = grpo("zero", "--model", base, *flags, "--trainer.trackers", "trackio").one_line_error()
    assert message == "trainer.trackers: trackio is not installed; run `pip install trackio`, or leave it out"
    assert not (tmp_path / "run").exists()
    assert "comet" in grpo("zero", "--model", base, *flags, "--trainer.trackers", "comet").one_line_error()


@pytest.mark.parametrize(("error", "status"), [(SyncError("other weights"), 1), (KeyError("a defect"), 4)])
def test_other_errors_are_one_line_and_keep_their_traceback_in_a_file(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(config: EvalConfig) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_instead(monkeypatch, run)
    done = grpo("eval")
    assert done.status == status and done.err.count("\n") == 1, done
    text = Path(done.err.rpartition("traceback in ")[2].strip()).read_text()
    assert "Traceback" in text and type(error).__name__ in text


def test_usage() -> None:
    for flag in ("--help", "-h"):
        shown = grpo(flag)
        assert shown.status == 0 and shown.err == ""
        assert all(f"grpo {name}" in shown.out for name in COMMANDS)
    assert grpo().status == 2, "no command is no success"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str) -> None:
    shown = grpo(name, "--help")
    assert shown.status == 0 and shown.err == ""
    assert f"usage: grpo {name}" in shown.out
    assert "--config" in shown.out
    recipes = {"pretrain": PRETRAIN_RECIPES, "zero": ZERO_RECIPES}.get(name, {})
    assert all(recipe in shown.out for recipe in recipes)


def test_help_shows_the_values_of_the_recipe() -> None:
    shown = " ".join(grpo("zero", "ledger", "--help").out.split())
    assert "Longest completion. (default: 32)" in shown and "G, the size of a group." in shown
