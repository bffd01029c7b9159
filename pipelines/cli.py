"""The command `grpo`: chooses a recipe, applies a config file and flags, and turns user errors into one line.

    grpo quickstart
    grpo r1-mini [--out DIR]
    grpo pretrain [RECIPE] [--config FILE.yaml] [--data ...] [--out ...]
    grpo sft [RECIPE] [--model DIR] [--data ...] [--out ...] [--resume]
    grpo zero [RECIPE] [--config FILE.yaml] [--trainer.steps 50] [--resume]
    grpo r1 --recipe tiny|paper [--config FILE.yaml] [--dry-run] [--from STAGE | --only STAGE ...] [--skip STAGE ...]
    grpo distill traces --student DIR|ARCHITECTURE --teacher DIR [--traces TRACES.jsonl] [--out DIR] [--resume]
    grpo distill on-policy --model DIR --teacher DIR [--config FILE.yaml] [--resume]
    grpo dpo --model DIR --data PAIRS.jsonl [--out DIR] [--resume]
    grpo reward-model --model DIR --data PAIRS.jsonl [--out DIR] [--resume]
    grpo replay RUN --step N [--last M] [--out DIR]
    grpo eval [--model DIR | --server URL --server-model NAME] [--task gsm8k] [--data test.jsonl.gz] [--rescore DIR]
    grpo eval compare A B [--out FILE.md]
    grpo sample [--model DIR] [--task gsm8k] [--data train.jsonl] [--completions 8] [--out DIR]
    grpo decontaminate DATA --against FILE... --out CLEAN.jsonl
    grpo reward test REWARD DATA.jsonl | math PAIRS.jsonl --out OUT.jsonl | code PROGRAMS.jsonl --out OUT.jsonl
    grpo model info DIR|PRESET
    grpo doctor [--quick] | RUN | --lr0 RECIPE|FILE.yaml [--model DIR]
    grpo convert SRC --out DST --to bf16|fp8|fp32

`--recipe NAME` is NAME in first place. `--engine native` is short for `--engine.kind native`, `--steps` for
`--trainer.steps`.
Flags beat the config file, the file beats the recipe. `--verbose`, with any command, or GRPO_VERBOSE=1 shows what vLLM,
Ray and transformers say, and tracebacks. Exit status: 0 done, 1 the run failed or did not learn, 2 wrong input, 3 this
machine (disk, memory, port, sandbox), 4 unexpected, 130 stopped by Ctrl-C.
"""

import contextlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import INTERRUPTED, report

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
    from pipelines.decontaminate import DecontaminateConfig, run_decontaminate
    from pipelines.doctor import DoctorConfig, run_doctor
    from pipelines.evaluate import EvalConfig, run_eval
    from pipelines.evaluation.compare import CompareConfig
    from pipelines.model_info import ModelInfoConfig, run_model_info
    from pipelines.quickstart import QuickstartConfig, run_quickstart
    from pipelines.r1_mini.run import MiniConfig, run_r1_mini
    from pipelines.replay import ReplayConfig, run_replay

    return {
        "quickstart": Command(config=QuickstartConfig, recipes={"ledger": QuickstartConfig}, run=run_quickstart),
        **_stages(),
        "r1-mini": Command(config=MiniConfig, recipes={"default": MiniConfig}, run=run_r1_mini),
        "replay": Command(config=ReplayConfig, recipes={"run": ReplayConfig}, run=run_replay),
        "eval": Command(config=EvalConfig, recipes={"default": EvalConfig, "compare": CompareConfig}, run=run_eval),
        "decontaminate": Command(
            config=DecontaminateConfig, recipes={"default": DecontaminateConfig}, run=run_decontaminate
        ),
        "reward": _reward_command(),
        # What to do with the model stands where other commands name their recipe.
        "model": Command(config=ModelInfoConfig, recipes={"info": ModelInfoConfig}, run=run_model_info),
        "doctor": Command(config=DoctorConfig, recipes={"default": DoctorConfig}, run=run_doctor),
        "convert": Command(
            config=ConvertConfig, recipes={"default": lambda: ConvertConfig(source="", out="")}, run=run_convert
        ),
    }


def _stages() -> dict[str, Command]:
    """What makes a model or its data out of another, and the chain of them."""
    from pipelines.distill import OnPolicyConfig, TracesConfig, run_distill
    from pipelines.preference import DPOConfig, run_dpo
    from pipelines.pretrain import PretrainConfig, run_pretrain
    from pipelines.r1 import run_r1
    from pipelines.r1_config import R1Config
    from pipelines.r1_recipes import R1_RECIPES
    from pipelines.recipes import PRETRAIN_RECIPES, SFT_RECIPES, ZERO_RECIPES
    from pipelines.reward_model import RewardModelConfig, run_reward_model
    from pipelines.sample import SampleConfig, run_sample
    from pipelines.sft import SFTConfig, run_sft
    from pipelines.zero import ZeroConfig, run_zero

    return {
        "pretrain": Command(
            config=PretrainConfig,
            recipes={"default": lambda: PretrainConfig(data="", out="")} | PRETRAIN_RECIPES,
            run=run_pretrain,
        ),
        "sft": Command(config=SFTConfig, recipes=dict(SFT_RECIPES), run=run_sft),
        "zero": Command(
            config=ZeroConfig, recipes={"default": lambda: ZeroConfig(model="")} | ZERO_RECIPES, run=run_zero
        ),
        "r1": Command(config=R1Config, recipes=dict(R1_RECIPES), run=run_r1),
        "distill": Command(
            config=object,
            recipes={
                "traces": lambda: TracesConfig(student=""),
                "on-policy": lambda: OnPolicyConfig(model="", teacher=""),
            },
            run=run_distill,
        ),
        "dpo": Command(config=DPOConfig, recipes={"default": lambda: DPOConfig(model="", data="")}, run=run_dpo),
        "reward-model": Command(
            config=RewardModelConfig,
            recipes={"default": lambda: RewardModelConfig(model="", data="")},
            run=run_reward_model,
        ),
        "sample": Command(config=SampleConfig, recipes={"default": lambda: SampleConfig(model="")}, run=run_sample),
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
    named = _take_flag(rest, "--recipe")
    if named is not None:
        rest.insert(0, named)
    if rest and not rest[0].startswith("-") and (len(command.recipes) > 1 or rest[0] in command.recipes):
        recipe = rest.pop(0)
        if recipe not in command.recipes:
            raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(command.recipes)}")
    default = command.recipes[recipe]()
    if path := _take_flag(rest, "--config"):
        default = read_config(type(default), Path(path), default)
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
            # tyro breaks its messages at the 80th column, and paths with them: a check of our own is taken as it was.
            reason = stop.__context__
            own = str(reason) if type(reason) is ValueError else ""
            raise ValueError(own or _first_message(errors.getvalue())) from None
        raise  # --help has been printed
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in names]
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], flags)}")
    return config


def _take_flag(arguments: list[str], flag: str) -> str | None:
    """Removes `FLAG VALUE` or `FLAG=VALUE` from the arguments; the value, None without the flag."""
    for at, argument in enumerate(arguments):
        if argument == flag:
            if at + 1 == len(arguments):
                raise ValueError(f"{flag} needs a {'file' if flag == '--config' else 'name'}")
            del arguments[at]
            return arguments.pop(at)
        if argument.startswith(f"{flag}="):
            return arguments.pop(at).removeprefix(f"{flag}=")
    return None


def _description(command: Command, config: Any) -> str:
    """What `--help` says above the fields."""
    recipes = f" Recipes, as the first word: {', '.join(command.recipes)}." if len(command.recipes) > 1 else ""
    return f"{config.__doc__}{recipes} --config FILE.yaml gives fields; flags beat the file."


def _first_message(box: str) -> str:
    """The first paragraph of the error that tyro draws, as one line. It stands in a box under its title, or, where the
    output's encoding has no such characters, below the title and a line of hyphens."""
    lines = [line.strip(" \u2502") for line in box.splitlines()]
    inside = lines[1:] if lines and lines[0].startswith("\u256d") else lines[2:]
    paragraph = itertools.takewhile(lambda line: line.strip("-\u2500\u2570\u256f"), inside)
    return " ".join(paragraph)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status, see pipelines/errors.py."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verbose = "--verbose" in arguments or bool(os.environ.get("GRPO_VERBOSE"))
    arguments = [argument for argument in arguments if argument != "--verbose"]
    _set_noise(verbose)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    commands = {"reward": _reward_command()} if arguments[0] == "reward" else _commands()
    if arguments[0] not in commands:
        print(f"grpo: error: unknown command {arguments[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    command = commands[arguments[0]]
    config = None
    try:
        config = parse(command, arguments[1:], f"grpo {arguments[0]}")
        result = command.run(config)
    except KeyboardInterrupt:
        print("grpo: stopped; what was saved stays, and --resume goes on where the command has it", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        return 1
    except Exception as error:  # the boundary to the user: nothing is swallowed, see errors.py
        if verbose:
            raise
        return report(error, config)
    return result if isinstance(result, int) else 0


def _set_noise(verbose: bool) -> None:
    """What other packages may print; processes that are started inherit it."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if verbose:
        os.environ |= {"GRPO_VERBOSE": "1", "VLLM_LOGGING_LEVEL": "INFO", "TRANSFORMERS_VERBOSITY": "info"}
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)


if __name__ == "__main__":
    sys.exit(main())
