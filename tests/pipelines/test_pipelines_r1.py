"""`grpo r1`.

1. the chain: which stage reads what, and what leaving one out means
2. the data that it makes: held-out problems occur nowhere else, languages are mixed in the corpus alone
3. `grpo r1 --recipe tiny` in a process of its own, with vLLM where it is installed: killed in the middle of RL, it goes
   on there; what was done is not done again; RL and distillation do what they are for
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.r1 import Chain
from pipelines.r1_data import CHINESE, GeneratedData, paths, write_data
from pipelines.r1_recipes import tiny
from tests.pipelines.conftest import ROOT, grpo

LIMIT_S = 900


def inputs(*skip: str) -> dict[str, list[str]]:
    """Stage -> what it reads, within the run folder."""
    chain = Chain(replace(tiny(), out="run", skip=skip))
    return {stage.name: [path.relative_to("run").as_posix() for path in stage.inputs] for stage in chain.stages}


def test_each_stage_reads_what_the_one_before_wrote():
    reads = inputs()
    assert reads["cold-start"] == ["base/model", "data/cold_start.jsonl"]
    assert reads["reasoning"] == ["cold-start/model", "data/ledger.jsonl"]
    assert reads["sampling"] == ["reasoning/model", "data/ledger.jsonl"]
    assert reads["mixture-data"] == ["sampling/traces.jsonl", "data/general.jsonl"]
    assert reads["mixture"] == ["base/model", "mixture-data/rows.jsonl"], "the base is trained anew"
    assert reads["scenarios"] == ["mixture/model", "data/ledger.jsonl", "data/instructions.jsonl"]
    assert reads["distill"] == ["student-base/model", "mixture-data/rows.jsonl"]
    assert reads["eval-distill"] == ["distill/model", "data/ledger_heldout.jsonl", "data/instructions_heldout.jsonl"]
    assert len([name for name in reads if name.startswith("eval-")]) == 7


def test_a_stage_that_is_left_out_is_bridged():
    assert inputs("cold-start")["reasoning"][0] == "base/model", "R1-Zero"
    assert inputs("reasoning")["sampling"][0] == "cold-start/model"
    assert not {"distill", "student-base", "eval-distill"} & set(inputs("distill"))
    assert not [name for name in inputs("evaluation") if name.startswith(("eval-", "report"))]
    run = ("r1", "--recipe", "tiny", "--out", "run", "--dry-run")
    assert "--skip sampling: stages that can be left out are" in grpo(*run, "--skip", "sampling").one_line_error()
    assert "there is no stage 'reason'" in grpo(*run, "--from", "reason").one_line_error()
    assert "give one of them" in grpo(*run, "--from", "reasoning", "--only", "base").one_line_error()
    assert "the chain needs data for corpus" in grpo("r1", "--out", "run", "--dry-run").one_line_error()
    assert "--recipe needs a name" in grpo("r1", "--recipe").one_line_error()


def test_everything_that_a_stage_reads_is_among_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reward files, held-out rows, evaluation sets to keep out, globs; hub ids are nothing to hash."""
    monkeypatch.chdir(tmp_path)
    for name in ("judge.py", "held.jsonl", "sets/a.jsonl", "rows/1.jsonl", "rows/2.jsonl", "rm/model/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ledger").mkdir()  # a folder that is called as a task
    config = tiny()
    judged = (
        "math_answer",
        "0.5*judge.py:short(length=3)",
        "judge.py:long",
        "reward_model(folder='rm/model') if math_answer",
    )
    config = replace(
        config, out="run", general="owner/name:config@train",
        cold_start=replace(config.cold_start, data="rows/*.jsonl", heldout="held.jsonl"),
        reasoning=replace(config.reasoning, reward=judged),
        sampling=replace(config.sampling, against=("sets/a.jsonl",)),
    )  # fmt: skip
    stages = {stage.name: stage for stage in Chain(config).stages}
    reads = {name: [str(path) for path in stage.inputs] for name, stage in stages.items()}
    assert reads["cold-start"] == ["run/base/model", "rows/1.jsonl", "rows/2.jsonl", "held.jsonl"]
    assert reads["reasoning"][1:] == ["run/data/ledger.jsonl", "judge.py", "rm/model"]
    assert reads["sampling"][-1] == "sets/a.jsonl" and reads["mixture-data"] == ["run/sampling/traces.jsonl"]
    other = Chain(replace(config, reasoning=replace(config.reasoning, extra_reward=("tag_count",))))
    changed = next(stage for stage in other.stages if stage.name == "eval-base").config
    assert changed != stages["eval-base"].config, "the base is judged by the rewards of reasoning"


def test_generated_data(tmp_path: Path):
    config = GeneratedData(num_documents=400, num_cold_start=30, num_general=20, num_prompts=40, num_heldout=25)
    write_data(config, tmp_path)
    text = {name: path.read_text() for name, path in paths(tmp_path).items()}
    heldout = [json.loads(line)["question"] for line in text["ledger_heldout"].splitlines()]
    assert len(set(heldout)) == 25
    assert not any(question in text[name] for question in heldout for name in ("corpus", "cold_start", "ledger"))
    assert any(word in text["corpus"] for word in CHINESE)
    assert not any(word in text["cold_start"] + text["general"] for word in CHINESE)
    again = tmp_path / "again"
    write_data(config, again)
    assert all(path.read_text() == text[name] for name, path in paths(again).items())


def start(out: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines.cli", "r1", "--recipe", "tiny", "--out", str(out)]
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A run that was killed some steps into RL, and its continuation."""
    out = tmp_path_factory.mktemp("r1") / "run"
    first = start(out, environment)
    metrics, deadline = out / "reasoning" / "metrics.jsonl", time.monotonic() + LIMIT_S
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
            assert first.poll() is None, out.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline, "RL does not begin"
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = {record["name"]: record for record in json.loads((out / "manifest.json").read_text())}
    second = start(out, environment)
    try:
        assert second.wait(LIMIT_S) == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        if second.poll() is None:
            os.killpg(second.pid, signal.SIGKILL)
            second.wait()
    after = {record["name"]: record for record in json.loads((out / "manifest.json").read_text())}
    yield {"out": out, "before": before, "after": after, "log": out.with_suffix(".log").read_text()}


@pytest.mark.slow
def test_a_killed_chain_goes_on_where_it_was(run: dict[str, Any]):
    before, after = run["before"], run["after"]
    assert [record["status"] for record in before.values()] == ["done", "done", "done", "running"]
    assert {record["status"] for record in after.values()} == {"done"} and len(after) == 18
    for name in ("data", "base", "cold-start"):
        assert after[name] == before[name], "it was done, and is not done again"
        assert f"{name}: up to date" in run["log"]
    assert "4/18 reasoning: goes on, was interrupted" in run["log"]
    assert "training 5/30" in run["log"] and "resumed" in run["log"]
    rows = [json.loads(line) for line in (run["out"] / "reasoning" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(30))


@pytest.mark.slow
def test_the_chain_learns(run: dict[str, Any]):
    rows = json.loads((run["out"] / "report" / "report.json").read_text())
    found = {(row["checkpoint"], row["task"]): row for row in rows}
    assert len(found) == 14
    base, cold = found["base", "ledger"], found["cold-start", "ledger"]
    reasoning = found["reasoning", "ledger"]
    assert cold["accuracy_low"] > base["accuracy_high"] and reasoning["accuracy_low"] > base["accuracy_high"], reasoning
    assert found["distill", "ledger"]["accuracy_low"] > found["student-base", "ledger"]["accuracy_high"]
    for name in ("reasoning", "scenarios", "distill"):
        assert base["language"] < 0.8 and found[name, "ledger"]["language"] > 0.9, "thinks in English"
    instructed, uninstructed = found["scenarios", "instructions"], found["base", "instructions"]
    assert instructed["accuracy_low"] > uninstructed["accuracy_high"], instructed
    assert "| distill | ledger |" in (run["out"] / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_whole_chain_has_nothing_to_do(run: dict[str, Any]):
    outcome = grpo("r1", "--recipe", "tiny", "--out", run["out"], "--dry-run")
    assert outcome.status == 0 and outcome.out.count("up to date") == 18, outcome.out
    changed = grpo("r1", "--recipe", "tiny", "--out", run["out"], "--dry-run", "--scenarios.learner.lr", 1e-4)
    assert "scenarios: runs, configuration changed: learner.lr 0.0003 -> 0.0001" in changed.out
    assert "eval-scenarios: runs, input is made anew" in changed.out
    assert "distill: up to date" in changed.out
