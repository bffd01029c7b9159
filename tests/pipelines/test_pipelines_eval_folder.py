"""The folder of an evaluation: resume, refusal, judging again, comparison.

Pinned: (1) an evaluation that is killed in the middle goes on by sample and ends with the same results; (2) a folder
with another configuration, another checkpoint or other data is refused and stays as it was; (3) old completions are
judged again by new rewards and extractors without a model; (4) completions per problem, stop strings and worked
examples reach the engine; (5) two evaluations are compared problem by problem, as by hand.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.compare import compare
from pipelines.evaluation.judge import judge
from pipelines.evaluation.samples import Drawn, SampleLog
from pipelines.statistics import clustered_error, paired_interval
from rewards import Rubric, math_answer
from rollout.sample import Prompt
from tests.pipelines.conftest import GSM8K, LOCAL, ROOT, grpo

TIMES = ("seconds", "tokens_per_s")


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_killed_evaluation_goes_on_by_sample(base: Path, environment: dict[str, str], tmp_path: Path) -> None:
    arguments = [
        "eval", "--model", base, "--task", "ledger", "--limit", 30, "--num-samples", 4, "--temperature", 1,
        "--engine.max-num-seqs", 3, *LOCAL,
    ]  # fmt: skip
    assert grpo(*arguments, "--out", tmp_path / "whole").status == 0
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments), "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("sampling 24/120"):
                process.send_signal(signal.SIGKILL)
                break
    left = lines(tmp_path / "killed" / "samples.jsonl")
    assert 24 <= len(left) < 120 and not (tmp_path / "killed" / "records.jsonl").exists()
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"prompt_id": "ledger-9", "ind')  # what a kill in the middle of a line leaves
    again = grpo(*arguments, "--out", tmp_path / "killed", "--engine.max-num-seqs", 5)
    assert again.status == 0, again.err
    assert f"{120 - len(left)} completions to sample" in again.out
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert lines(tmp_path / "killed" / "records.jsonl") == lines(tmp_path / "whole" / "records.jsonl")
    assert not (tmp_path / "killed" / "samples.jsonl").exists()
    done = grpo(*arguments, "--out", tmp_path / "killed")
    assert "0 completions to sample" in done.out and results(tmp_path / "killed") == results(tmp_path / "whole")


def test_the_log_drops_a_torn_line_and_failures_on_demand(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl")
    fine, failed = Drawn(prompt_id="a", index=0, text="x"), Drawn(prompt_id="a", index=1, failure="timeout")
    log.append([fine, failed])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"text": "\u00e9'.encode()[:-1])
    again = SampleLog(tmp_path / "samples.jsonl")
    assert again.drawn == {("a", 0): fine, ("a", 1): failed}
    assert again.drop_failed() == 1
    assert SampleLog(tmp_path / "samples.jsonl").drawn == {("a", 0): fine}


@pytest.fixture(scope="module")
def evaluated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three completions of each of eight GSM8K problems; and the data beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copy(GSM8K, folder / "test.jsonl")
    shutil.copytree(base, folder / "model")
    done = grpo(*command(folder))
    assert done.status == 0, done.err
    return folder


def command(folder: Path) -> tuple[object, ...]:
    return (
        "eval", "--model", folder / "model", "--data", folder / "test.jsonl", "--max-tokens", 24, "--num-samples", 3,
        "--temperature", 1, "--stop", "then", "--shots", 1, "--out", folder / "out", *LOCAL,
    )  # fmt: skip


def test_samples_stop_strings_and_examples_reach_the_engine(evaluated: Path) -> None:
    records = [json.loads(line) for line in lines(evaluated / "out" / "records.jsonl")]
    assert [record["id"] for record in records] == [f"gsm8k-{n}/{i}" for n in range(1, 9) for i in range(3)]
    assert len({record["completion"] for record in records}) > 12, "completions of one problem differ"
    assert not any("then" in record["completion"] for record in records)
    cut = [record for record in records if record["finish_reason"] == "stop" and record["tokens"] > 3]
    assert cut, "some were ended by the stop string"
    assert all("A box holds 6 eggs." in record["prompt"] for record in records)
    found = json.loads((evaluated / "out" / "results.json").read_text())
    assert list(found["pass_at"]) == ["1", "2", "3"] == list(found["cons_at"])
    assert set(found["extractors"]) == {"strict", "flexible", "boxed", "answer", "default"}


def test_another_configuration_checkpoint_or_data_is_refused(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    config = (folder / "out" / "config.json").read_text().replace(str(evaluated), str(folder))
    (folder / "out" / "config.json").write_text(config)
    assert grpo(*command(folder)).status == 0, "the same goes on"
    before = {path: path.read_bytes() for path in (folder / "out").iterdir() if path.name != "results.json"}
    other = grpo(*command(folder), "--seed", 5, "--top-p", 0.5).one_line_error()
    assert "holds an evaluation with another" in other and "top_p" in other and "seed" in other
    (folder / "test.jsonl").write_text("\n".join(reversed(lines(GSM8K))) + "\n")
    assert "the prompts have changed" in grpo(*command(folder)).one_line_error()
    shutil.copy(GSM8K, folder / "test.jsonl")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert "the weights have changed" in grpo(*command(folder)).one_line_error()
    (folder / "out" / "config.json").unlink()
    assert "already holds results" in grpo(*command(folder)).one_line_error()
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "config.json")


def test_old_completions_are_judged_by_new_rewards(evaluated: Path, tmp_path: Path) -> None:
    judge_file = tmp_path / "judge.py"
    judge_file.write_text("def has_nine(completion):\n    return float('9' in completion)\n")
    out, rescored = evaluated / "out", tmp_path / "again"
    arguments = ("eval", "--rescore", out, "--reward", "math_answer", f"{judge_file}:has_nine", "--out", rescored)
    moved = evaluated / "model.away"
    (evaluated / "model").rename(moved)  # nothing of the model is needed
    try:
        done = grpo(*arguments, "--extractors", "flexible", "boxed")
        assert done.status == 0, done.err
    finally:
        moved.rename(evaluated / "model")
    old = [json.loads(line) for line in lines(out / "records.jsonl")]
    new = [json.loads(line) for line in lines(rescored / "records.jsonl")]
    same = ("id", "prompt", "completion", "token_ids", "finish_reason", "source", "question")
    assert [[record[name] for name in same] for record in new] == [[record[name] for name in same] for record in old]
    assert all(record["metrics"]["has_nine"] == ("9" in record["completion"]) for record in new)
    assert any(record["metrics"]["has_nine"] for record in new)
    found = json.loads((rescored / "results.json").read_text())
    assert found["accuracy"] == results(out)["accuracy"] and set(found["extractors"]) == {"flexible", "boxed"}
    assert "r1_format" not in found["metrics"]
    plain = grpo("eval", "--rescore", out, "--out", tmp_path / "plain")
    assert plain.status == 0 and results(tmp_path / "plain") == results(out), "as it was judged at first"
    idle = grpo("eval", "--rescore", out, "--temperature", 0.3, "--out", tmp_path / "x").one_line_error()
    assert "temperature has no effect with --rescore" in idle
    assert "choose another" in grpo("eval", "--rescore", out, "--out", out).one_line_error()


def test_what_has_no_room_is_not_taken_for_what_is_missing(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (
        "eval", "--model", base, "--data", GSM8K, "--max-tokens", 24, "--engine.max-model-len", 260, "--out", out,
        *LOCAL,
    )  # fmt: skip
    assert grpo(*arguments).status == 0
    before = lines(out / "records.jsonl")
    records = [json.loads(line) for line in before]
    fitting = [record for record in records if not record["failure"]]
    assert 0 < len(fitting) < 8, "some prompts are too long, not all"
    again = grpo(*arguments)
    assert "8 problems of gsm8k; 0 completions to sample" in again.out and "engines" not in again.out, again.out
    for record in fitting[: 8 - len(fitting)]:
        record["failure"] = "engine"
    (out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    failed = min(len(fitting), 8 - len(fitting))
    retried = grpo(*arguments, "--retry-failed")
    assert f"{failed} completions to sample" in retried.out
    assert lines(out / "records.jsonl") == before


def judged(answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    prompts = [Prompt(id=name, text="Q", token_ids=[], row={"answer": "5"}) for name in answers]
    drawn = {
        (name, i): Drawn(prompt_id=name, index=i, text=text, finish_reason="stop", failure="" if text else "timeout")
        for name, texts in answers.items() for i, text in enumerate(texts)
    }  # fmt: skip
    return json.loads(json.dumps(judge(prompts, drawn, Rubric([math_answer]), accuracy="math_answer")))


def test_comparison_by_hand() -> None:
    before = judged({"a": ["5", "4"], "b": ["4", "4"], "c": ["5", "5"], "d": ["5", "5"], "e": ["", ""]})
    after = judged({"a": ["5", "5"], "b": ["5", ""], "c": ["5", "4"], "d": ["5", "5"], "e": ["5", "5"]})
    found = compare(before, after, "math_answer")
    differences = [0.5, 1.0, -0.5, 0.0]  # by problem; e was not scored before
    assert found.difference == pytest.approx(1 / 4)
    assert (found.accuracy_before, found.accuracy_after) == (2.5 / 4, 3.5 / 4)
    assert (found.low, found.high) == paired_interval(differences)
    assert found.standard_error == clustered_error(differences)
    assert (found.better, found.worse, found.num_problems, found.num_left_out) == (2, 1, 4, 1)
    assert found.p_value == 1.0 and found.same_prompts
    with pytest.raises(ValueError, match=r"not of the same problems: 1 are in one only, such as e"):
        compare(before[:-2], after, "math_answer")
    after[0]["row"] = {"answer": "6"}
    with pytest.raises(ValueError, match="problem a is not the same"):
        compare(before, [*after[:1], *after[2:]], "math_answer")


def test_comparison_command(evaluated: Path, tmp_path: Path) -> None:
    greedy = grpo(
        "eval", "--model", evaluated / "model", "--data", evaluated / "test.jsonl", "--max-tokens", 24, "--out",
        tmp_path / "greedy", *LOCAL,
    )  # fmt: skip
    assert greedy.status == 0, greedy.err
    done = grpo("eval", "compare", evaluated / "out", tmp_path / "greedy", "--out", tmp_path / "comparison.md")
    assert done.status == 0, done.err
    assert "the prompts differ" in done.out, "one had a worked example"
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert numbers["num_problems"] == 8 and not numbers["same_prompts"]
    assert numbers["accuracy_before"] == results(evaluated / "out")["accuracy"]
    assert "| difference, points |" in (tmp_path / "comparison.md").read_text()
    assert "name the folders" in grpo("eval", "compare", tmp_path).one_line_error()
