"""Configurations from files.

Pinned: (1) every recipe survives JSON and YAML and comes back equal; (2) a file may hold a part of the fields, also
inside a section; (3) `lr: 3e-4`, a string to PyYAML, is a number; (4) an unknown key, a wrong type, a contradiction, a
misplaced scalar, a missing or a broken file gives one line with the file, the key and the remedy; (5) numbers that make
no sense are refused when the configuration is made, not in the middle of a run.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.trainer import TrainerConfig
from pipelines.config import read_config, write_config
from pipelines.evaluate import EvalConfig
from pipelines.pretrain import PretrainConfig
from pipelines.quickstart import QuickstartConfig
from pipelines.recipes import PRETRAIN_RECIPES, ZERO_RECIPES, zero_ledger
from pipelines.zero import ZeroConfig
from rollout.engine import EngineConfig

CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    **{f"pretrain {name}": recipe for name, recipe in PRETRAIN_RECIPES.items()},
    **{f"zero {name}": recipe for name, recipe in ZERO_RECIPES.items()},
    "zero with rewards": lambda: ZeroConfig(model="m", reward=("math_answer", "0.1*rewards.py:short"), data="d.jsonl"),
    "eval": lambda: EvalConfig(model="m", reward=("math_answer",)),
    "quickstart": QuickstartConfig,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], ZeroConfig]:
    """Reads the text of a file over the ledger recipe."""

    def read_text(text: str) -> ZeroConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return read_config(ZeroConfig, path, default=zero_ledger())

    return read_text


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_is_written_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = CONFIGURATIONS[name]()
    as_json, as_yaml = tmp_path / "config.json", tmp_path / "config.yaml"
    write_config(config, as_json)
    as_yaml.write_text(yaml.safe_dump(json.loads(as_json.read_text())))
    # The default differs from `config` in every section, so what is equal afterwards came from the file.
    default = _changed(config)
    assert default != config
    for path in (as_json, as_yaml):
        again = read_config(type(config), path, default=default)
        assert again == config and hash(again) == hash(config), "lists must come back as tuples"


def _changed(config: Any) -> Any:
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _changed(value)
        elif field.name in ("seed", "max_model_len", "token_budget", "num_threads"):
            changes[field.name] = value + 1
    return dataclasses.replace(config, **changes)


def test_a_file_may_hold_a_part_of_the_fields(read: Callable[[str], ZeroConfig]) -> None:
    config = read("out: elsewhere\ntrainer:\n  steps: 7\nlearner: {lr: 0.5, objective: {aggregation: sequence}}\n")
    expected = zero_ledger()
    expected = dataclasses.replace(
        expected,
        out="elsewhere",
        trainer=dataclasses.replace(expected.trainer, steps=7),
        learner=dataclasses.replace(expected.learner, lr=0.5, objective=ObjectiveConfig(aggregation="sequence")),
    )
    assert config == expected


@pytest.mark.parametrize(
    ("text", "lr"), [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1", 1.0), ("'2e-5'", 2e-5), ("1_000.5", 1000.5)]
)
def test_numbers_as_people_write_them(read: Callable[[str], ZeroConfig], text: str, lr: float) -> None:
    learner = read(f"learner:\n  lr: {text}\n").learner
    assert learner.lr == lr and isinstance(learner.lr, float)


def test_lists_and_null(read: Callable[[str], ZeroConfig]) -> None:
    config = read("reward: [math_answer, 0.1*r1_format]\ndata: null\n")
    assert config.reward == ("math_answer", "0.1*r1_format") and config.data is None


REFUSED = {
    "unknown key": ("trainr: {steps: 2}", "unknown key 'trainr'; did you mean 'trainer'?"),
    "unknown key, nothing near": ("zzzzz: 1", "unknown key 'zzzzz'; known: model, task, data,"),
    "unknown nested key": ("trainer: {stepz: 2}", "unknown key 'trainer.stepz'; did you mean 'trainer.steps'?"),
    "key that is no text": ("5: 2", "unknown key '5'; known: model,"),
    "text for a number": ("learner: {lr: abc}", "learner.lr: Input should be a valid number"),
    "fraction for an integer": ("trainer: {steps: 2.5}", "trainer.steps: Input should be a valid integer"),
    "bool for an integer": ("trainer: {steps: true}", "trainer.steps: "),
    "number for a text": ("model: 5", "model: Input should be a valid string, got 5"),
    "null for a text": ("model: null", "model: Input should be a valid string, got None"),
    "bool for a name": ("task: no", "task: Input should be a valid string, got False"),
    "not one of the choices": ("engine: {kind: foo}", "engine.kind: Input should be 'auto', 'vllm' or 'native', got"),
    "scalar for a list": ("reward: math_answer", "reward: Input should be a valid tuple, got 'math_answer'"),
    "scalar for a section": ("trainer: 5", "trainer is a section with fields steps, prompts_per_step,"),
    "nothing in a section": ("trainer:", "trainer is a section with fields steps, prompts_per_step,"),
    "contradiction": (
        "trainer: {completions_per_prompt: 1}",
        "trainer: completions_per_prompt must be >= 2 for a group baseline, got 1",
    ),
    "contradiction between sections": (
        "trainer: {max_tokens: 5000}",
        "trainer.max_tokens=5000 leaves no room for a prompt within engine.max_model_len=1024; lower the first or",
    ),
    "unknown task": ("task: nope", "unknown task 'nope'; known: ledger, gsm8k"),
    "not a number": ("learner: {lr: .nan}", "learner: lr must be >= 0, got nan"),
    "broken YAML": ("a: [1\nb: 2", "not YAML: while parsing a flow sequence"),
    "tab": ("trainer:\n\tsteps: 2", "not YAML: while scanning for the next token"),
    "code": ("model: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    "empty": ("", "expected `field: value` lines, got NoneType"),
    "a list": ("- 1", "expected `field: value` lines, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(read: Callable[[str], ZeroConfig], tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        read(text + "\n")
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^config file {path} not found$"):
            read_config(ZeroConfig, path, default=zero_ledger())


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_config(ZeroConfig, path, default=zero_ledger())


SENSELESS: dict[str, Callable[[], Any]] = {
    "completions_per_prompt must be >= 2": lambda: TrainerConfig(completions_per_prompt=1),
    "minibatches=3 must divide the 16 samples": lambda: TrainerConfig(
        prompts_per_step=4, completions_per_prompt=4, minibatches=3
    ),
    "temperature must be > 0": lambda: TrainerConfig(temperature=0),
    "prompts_per_step must be >= 1, got 0": lambda: TrainerConfig(prompts_per_step=0),
    "steps must be >= 1, got 0": lambda: TrainerConfig(steps=0),
    "max_tokens must be >= 1, got 0": lambda: TrainerConfig(max_tokens=0),
    "save_every must be >= 1, got 0": lambda: TrainerConfig(save_every=0),
    "lr must be >= 0, got -1": lambda: LearnerConfig(lr=-1),
    "need 0 <= clip_low <= 1": lambda: ObjectiveConfig(clip_low=1.5),
    "kl_coef must be >= 0, got -0.1": lambda: ObjectiveConfig(kl_coef=-0.1),
    "token_budget must be >= 1, got 0": lambda: LearnerConfig(token_budget=0),
    "num_engines must be >= 1, got 0": lambda: EngineConfig(num_engines=0),
    "transport 'local' runs exactly 1 engine, got num_engines=2; use 'ray'": lambda: EngineConfig(
        transport="local", num_engines=2
    ),
    "token_budget=100 is smaller than one sequence may be": lambda: ZeroConfig(
        model="m", learner=LearnerConfig(token_budget=100)
    ),
    "num_prompts=3 is fewer than trainer.prompts_per_step=16": lambda: ZeroConfig(model="m", num_prompts=3),
    "num_prompts must be >= 0, got -1": lambda: ZeroConfig(model="m", num_prompts=-1),
    "say how many with --num-prompts": lambda: ZeroConfig(model="m", task="ledger"),
    "num_threads must be >= 1, got 0": lambda: ZeroConfig(model="m", num_threads=0),
    "say how many with --limit": lambda: EvalConfig(model="m", task="ledger"),
    "limit must be >= 0, got -3": lambda: EvalConfig(model="m", limit=-3),
    "samples_per_step must be >= 1, got 0": lambda: PretrainConfig(data="d", out="o", samples_per_step=0),
}


@pytest.mark.parametrize("message", SENSELESS)
def test_senseless_numbers_are_refused_at_once(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SENSELESS[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)
