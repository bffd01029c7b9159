"""The command `grpo`: chooses a recipe, applies a config file and flags, and turns user errors into one line.

    grpo quickstart
    grpo r1-mini [--out DIR]
    grpo pretrain [RECIPE] [--config FILE.yaml] [--data ...] [--out ...]
    grpo sft [RECIPE] [--model DIR] [--data ...] [--out ...] [--resume]
    grpo zero [RECIPE] [--config FILE.yaml] [--trainer.steps 50] [--resume]
    grpo distill on-policy --model STUDENT --teacher TEACHER [--config FILE.yaml] [--resume]
    grpo replay RUN --step N [--last M] [--out DIR]
    grpo eval [--model DIR] [--task gsm8k] [--data test.jsonl.gz]
    grpo reward test REWARD DATA.jsonl | math PAIRS.jsonl --out OUT.jsonl | code PROGRAMS.jsonl --out OUT.jsonl
    grpo model info DIR|PRESET
    grpo doctor --lr0 RECIPE|FILE.yaml [--model DIR]
    grpo convert SRC --out DST --to bf16|fp8|fp32

`--engine native` is short for `--engine.kind native`, `--steps` for `--trainer.steps`.
Flags beat the config file, the file beats the recipe. Exit status: 0 done, 1 the run failed or did not learn, 2 wrong
input.
"""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_USAGE = __doc__ or ""
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
    "KMP_BLOCKTIME": "0",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: its configuration class, its recipes, and what runs it."""

    config: type
    """The class of all recipes' configurations."""
    recipes: dict[str, Callable[[], Any]]
    """Name -> whole configuration; the first is the default where no recipe is named."""
    run: Callable[[Any], Any]
    """Raises ValueError or OSError for wrong input; an int result is the exit status."""


def _commands() -> dict[str, Command]:
    """Imported late, so that `grpo --help` does not wait for torch."""
    from pipelines.convert import ConvertConfig, run_convert
    from pipelines.distill import OnPolicyConfig, run_on_policy
    from pipelines.doctor import DoctorConfig, run_doctor
    from pipelines.evaluate import EvalConfig, run_eval
    from pipelines.model_info import ModelInfoConfig, run_model_info
    from pipelines.pretrain import PretrainConfig, run_pretrain
    from pipelines.quickstart import QuickstartConfig, run_quickstart
    from pipelines.r1_mini.run import MiniConfig, run_r1_mini
    from pipelines.recipes import PRETRAIN_RECIPES, SFT_RECIPES, ZERO_RECIPES
    from pipelines.replay import ReplayConfig, run_replay
    from pipelines.sft import SFTConfig, run_sft
    from pipelines.zero import ZeroConfig, run_zero

    return {
        "quickstart": Command(config=QuickstartConfig, recipes={"ledger": QuickstartConfig}, run=run_quickstart),
        "r1-mini": Command(config=MiniConfig, recipes={"default": MiniConfig}, run=run_r1_mini),
        "pretrain": Command(
            config=PretrainConfig,
            recipes={"default": lambda: PretrainConfig(data="", out="")} | PRETRAIN_RECIPES,
            run=run_pretrain,
        ),
        "sft": Command(config=SFTConfig, recipes=dict(SFT_RECIPES), run=run_sft),
        "zero": Command(
            config=ZeroConfig, recipes={"default": lambda: ZeroConfig(model="")} | ZERO_RECIPES, run=run_zero
        ),
        "distill": Command(
            config=OnPolicyConfig,
            recipes={"on-policy": lambda: OnPolicyConfig(model="", teacher="")},
            run=run_on_policy,
        ),
        "replay": Command(config=ReplayConfig, recipes={"run": ReplayConfig}, run=run_replay),
        "eval": Command(config=EvalConfig, recipes={"default": lambda: EvalConfig(model="")}, run=run_eval),
        "reward": _reward_command(),
        # What to do with the model stands where other commands name their recipe.
        "model": Command(config=ModelInfoConfig, recipes={"info": ModelInfoConfig}, run=run_model_info),
        "doctor": Command(config=DoctorConfig, recipes={"default": DoctorConfig}, run=run_doctor),
        "convert": Command(
            config=ConvertConfig, recipes={"default": lambda: ConvertConfig(source="", out="")}, run=run_convert
        ),
    }


def _reward_command() -> Command:
    """Apart from the others, because it needs no torch."""
    from pipelines.reward_command import REWARD_ACTIONS, RewardAction, run_reward

    return Command(config=RewardAction, recipes=dict(REWARD_ACTIONS), run=run_reward)


_SHORT_FLAGS = {"--engine": "engine.kind", "--steps": "trainer.steps"}
"""Flags for the two fields that are changed most, where a command has no field of that very name."""


def _expand_short_flags(arguments: list[str], names: list[str]) -> list[str]:
    """`--engine native` -> `--engine.kind native`, wherever in the configuration that field stands."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in _SHORT_FLAGS and flag.removeprefix("--") not in names:
            flag = next((f"--{name}" for name in names if name.endswith(_SHORT_FLAGS[flag])), flag)
        expanded.append(flag + equals + value)
    return expanded


def parse(command: Command, arguments: Sequence[str], program: str = "grpo") -> Any:
    """The configuration that recipe, config file and flags together ask for. Raises ValueError for an unknown key."""
    import tyro

    from pipelines.config import did_you_mean, flat_fields, read_config

    rest = list(arguments)
    recipe = next(iter(command.recipes))
    if rest and not rest[0].startswith("-") and (len(command.recipes) > 1 or rest[0] in command.recipes):
        recipe = rest.pop(0)
        if recipe not in command.recipes:
            raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(command.recipes)}")
    default = command.recipes[recipe]()
    if path := _take_config_flag(rest):
        default = read_config(type(default), path, default)
    names = list(flat_fields(default))
    rest = _expand_short_flags(rest, names)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                type(default),
                prog=program,
                args=rest,
                default=default,
                return_unknown_args=True,
                description=_description(command, type(default)),
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_first_message(errors.getvalue())) from None
        raise  # --help has been printed
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in names]
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], flags)}")
    return config


def _take_config_flag(arguments: list[str]) -> Path | None:
    """Removes `--config FILE` or `--config=FILE` from the arguments; the file, None without the flag."""
    for at, argument in enumerate(arguments):
        if argument == "--config":
            if at + 1 == len(arguments):
                raise ValueError("--config needs a file")
            del arguments[at]
            return Path(arguments.pop(at))
        if argument.startswith("--config="):
            return Path(arguments.pop(at).removeprefix("--config="))
    return None


def _description(command: Command, config: Any) -> str:
    """What `--help` says above the fields."""
    recipes = f" Recipes, as the first word: {', '.join(command.recipes)}." if len(command.recipes) > 1 else ""
    return f"{config.__doc__}{recipes} --config FILE.yaml gives fields; flags beat the file."


def _first_message(box: str) -> str:
    """The first paragraph inside the box that tyro draws around an error, as one line."""
    lines = [line.strip(" \u2502") for line in box.splitlines()]
    inside = [line for line in lines if not line.startswith("\u256d")]
    paragraph = itertools.takewhile(lambda line: line and line[0] not in "\u2500\u2570", inside)
    return " ".join(paragraph)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status. GRPO_TRACEBACK=1 shows where a one-line error came from."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    commands = {"reward": _reward_command()} if arguments[0] == "reward" else _commands()
    if arguments[0] not in commands:
        print(f"grpo: error: unknown command {arguments[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    command = commands[arguments[0]]
    try:
        result = command.run(parse(command, arguments[1:], f"grpo {arguments[0]}"))
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("GRPO_TRACEBACK"):
            raise
        print(f"grpo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
