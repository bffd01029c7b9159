"""The examples.

Pinned: (1) every example runs in a process of its own and shows what it says it shows; (2) the command in the docstring
of the custom reward is understood, and its reward judges as it says; (3) the functions of an example can be used alone.
"""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipelines import cli
from pipelines.prompting import load_tokenizer
from pipelines.recipes import ZERO_RECIPES
from pipelines.zero import ZeroConfig
from rewards import Rubric, Sample, ScoreStatus, load_reward
from rollout.sample import SamplingParams
from tests.pipelines.conftest import GSM8K, LOCAL, ROOT, grpo
from tests.pipelines.servers import Answer, ScriptedServer, message

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, environment: dict[str, str], *arguments: object) -> str:
    """Standard output of an example, which must end with status 0."""
    [path] = [path for path in EXAMPLES if path.name.startswith(name)]
    command = [sys.executable, str(path.relative_to(ROOT)), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here() -> None:
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04", "05", "06", "07"]


def test_custom_reward_shows_three_verdicts(environment: dict[str, str]) -> None:
    lines = run("01", environment).splitlines()
    rewards = [float(number) for line in lines for number in re.findall(r"reward (\d\.\d\d)", line)]
    brief, long, wrong = rewards
    assert (brief, wrong) == (1.0, 0.0) and 0.5 <= long < 1.0


def test_custom_reward_as_the_command_line_loads_it() -> None:
    docstring = ast.get_docstring(ast.parse(EXAMPLES[0].read_text())) or ""
    [line] = [line.strip() for line in docstring.splitlines() if line.strip().startswith("grpo zero")]
    command = cli.Command(config=ZeroConfig, recipes={"default": lambda: ZeroConfig(model="")} | ZERO_RECIPES, run=str)
    config = cli.parse(command, shlex.split(line)[2:])
    assert (config.task, config.data, len(config.reward)) == ("gsm8k", "train.jsonl", 1)
    path, _, function = config.reward[0].rpartition(":")
    reward = load_reward(f"{ROOT / path}:{function}")
    rubric = Rubric([reward, load_reward("0.1*r1_format")])
    score = rubric.score(Sample(prompt="", completion="<answer>42</answer>", row={"answer": "#### 42"}))
    assert score.value == 1.0 and score.metrics[f"{function}/words"] == 1
    no_gold = reward.score(Sample(prompt="", completion="<answer>42</answer>", row={}))
    assert no_gold.value is None and no_gold.status is ScoreStatus.OK
    endless = reward.score(Sample(prompt="", completion="a " * 10_000 + "#### 42", row={"answer": "42"}))
    assert endless.value == 0.5, "right beats wrong at any length"


def test_grpo_by_hand_learns_to_count(environment: dict[str, str]) -> None:
    lines = run("02", environment).splitlines()
    rewards = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert len(rewards) == 20
    assert rewards[0] < 0.2 and rewards[-1] > 0.8, rewards
    assert "0 -> 1 2 3" in lines[20], "greedy decoding continues the count"


def test_tools_learns_to_call_the_calculator(environment: dict[str, str]) -> None:
    lines = run("04", environment).splitlines()
    rewards = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert len(rewards) == 100
    assert rewards[0] < 0.1 and rewards[-1] > 0.6, rewards
    call, answer = lines[100:102]
    assert call.startswith('policy       <tool name="calculator">') and call.endswith("</tool>")
    assert re.fullmatch(r"environment  <result>\d+</result>", answer)


def test_evaluate_checkpoint_on_rows_of_a_file(environment: dict[str, str], base: Path) -> None:
    lines = run("03", environment, base, "gsm8k", GSM8K).splitlines()
    interval = r"\(95% interval \d+\.\d% to \d+\.\d%\)"
    assert re.fullmatch(rf"accuracy \d+\.\d% of 8 problems {interval}, 0 not scored", lines[0])
    assert any(line.split()[0] == "math_answer" for line in lines)
    assert any(line.startswith("gsm8k-1/0: ") and "not '18'" in line for line in lines), "some mistakes are shown"


def test_evaluate_server_counts_votes(environment: dict[str, str]) -> None:
    """A server whose answers to the first problem are right in three of four cases."""

    def answer(path: str, request: dict[str, Any], before: int) -> Answer:
        right = "Janet" in request["messages"][-1]["content"] and request["seed"] != unlucky
        return 200, {}, message(r"\boxed{18}" if right else r"\boxed{1}")

    unlucky = SamplingParams(max_tokens=1, stop_token_id=0).seed_of("1", 2) % 2**31
    with ScriptedServer(answer).running() as url:
        lines = run("06", environment, url, "toy", GSM8K).splitlines()
    assert lines[0].startswith("accuracy 9.4% of 8 problems (95% interval") and lines[0].endswith("failures none")
    assert [line.split()[:2] for line in lines[1:]] == [
        ["pass@1", "9.4%"], ["pass@4", "12.5%"], ["cons@1", "9.4%"], ["cons@4", "12.5%"],
    ]  # fmt: skip


def test_evaluate_checkpoint_on_generated_rows(base: Path) -> None:
    result = runpy.run_path(str(EXAMPLES[2]))["evaluate_checkpoint"](str(base), "ledger", None)
    assert (result.num_problems, result.num_unscored) == (64, 0) and 0 <= result.accuracy <= 0.5


@pytest.mark.slow
def test_distill_into_a_dense_student(environment: dict[str, str], base: Path, tmp_path: Path) -> None:
    lines = run("07", environment, base, tmp_path).splitlines()
    first, last = map(float, re.findall(r"\d+\.\d+", next(line for line in lines if line.startswith("traces:"))))
    assert last < 0.6 * first
    [gaps] = [line for line in lines if line.startswith("on its own samples:")]
    first, last = map(float, re.findall(r"-?\d+\.\d+", gaps))
    assert last < 0.7 * first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "on-policy" / "model")
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(load_tokenizer(str(base)))


def test_custom_task_judges_right_and_wrong(environment: dict[str, str]) -> None:
    rewards = [float(line.rpartition(" ")[2]) for line in run("05", environment).splitlines()]
    assert rewards[::2] == [1.1] * 3 and all(0.1 <= wrong < 0.7 for wrong in rewards[1::2])


def test_custom_task_is_evaluated(base: Path, tmp_path: Path) -> None:
    outcome = grpo("eval", "--model", base, "--task", EXAMPLES[4], "--limit", 2, "--max-tokens", 4,
                   *LOCAL, "--engine.max-model-len", 200, "--out", tmp_path)  # fmt: skip
    assert outcome.status == 0 and "2 problems of backwards" in outcome.out, outcome
