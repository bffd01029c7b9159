"""`grpo sample` with a tiny model: traces are exact, filtered and counted; a killed run ends as an undisturbed one."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.prompting import load_tokenizer, stop_token
from pipelines.sample import SampleConfig, run_sample
from pipelines.selection import SelectConfig
from pipelines.tasks import get_task
from pipelines.traces import Trace, checkpoint_hash, iter_traces, read_traces
from rewards import Sample, load_rubric
from rollout.engine import EngineConfig
from rollout.pool import LocalPool
from rollout.sample import Prompt, SamplingParams
from tests.pipelines.conftest import ROOT, grpo

ENGINE = EngineConfig(kind="native", transport="local", max_model_len=160)
FLAGS = ("--engine.kind", "native", "--engine.transport", "local", "--engine.max-model-len", "160", "--task", "ledger",
         "--num-prompts", "24", "--completions", "8", "--batch-size", "8", "--seed", "3")  # fmt: skip


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleConfig:
    return SampleConfig(
        model=str(base), task="ledger", num_prompts=24, completions=8, batch_size=8, seed=3, engine=ENGINE,
        out=str(tmp_path_factory.mktemp("sample") / "whole"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: SampleConfig) -> Path:
    return run_sample(config).parent


def all_traces(folder: Path) -> list[Trace]:
    return list(iter_traces(folder / "all.jsonl"))


def test_traces_say_exactly_what_was_seen_and_written(whole: Path, config: SampleConfig) -> None:
    traces = all_traces(whole)
    task, tokenizer = get_task("ledger"), load_tokenizer(config.model)
    assert task.make_rows is not None
    rows = task.make_rows(24, 3)
    assert [trace.id for trace in traces] == [f"ledger-{p}/{i}" for p in range(1, 25) for i in range(8)]
    rubric = load_rubric(task.rewards)
    prompts = [Prompt(id=f"ledger-{n}", text=traces[8 * n - 8].prompt, row=rows[n - 1],
                      token_ids=tokenizer(traces[8 * n - 8].prompt)["input_ids"]) for n in range(1, 9)]  # fmt: skip
    params = SamplingParams(num_completions=8, max_tokens=32, stop_token_id=stop_token(tokenizer), seed=3)
    groups = {group.prompt.id: group for group in LocalPool(ENGINE, config.model).generate(prompts, params)}
    sampled = [completion for prompt in prompts for completion in groups[prompt.id].completions]
    assert [trace.tokens for trace in traces[:64]] == [len(completion.token_ids) for completion in sampled]
    texts = tokenizer.batch_decode([completion.token_ids for completion in sampled])
    assert [trace.completion for trace in traces[:64]] == [t.removesuffix(str(tokenizer.eos_token)) for t in texts]
    for trace in traces:
        row = rows[int(trace.prompt_id.removeprefix("ledger-")) - 1]
        assert trace.row == row and trace.question == row["question"]
        assert trace.prompt.endswith(f" User: {row['question']} Assistant:")
        assert str(tokenizer.eos_token) not in trace.completion
        assert (trace.finish_reason == "length") <= (trace.tokens == 32)
        if "<|" in trace.completion:
            continue  # another special token, which the rewards do not see
        score = rubric.score(Sample(prompt=trace.prompt, completion=trace.completion, row=row,
                                    finish_reason=trace.finish_reason))  # fmt: skip
        assert (trace.reward, trace.metrics) == (score.value, dict(score.metrics))
        assert trace.source.weights == checkpoint_hash(config.model) and trace.source.max_tokens == 32


def test_only_good_completions_are_kept_and_all_are_counted(whole: Path) -> None:
    traces, kept = all_traces(whole), read_traces(whole / "traces.jsonl")
    report = json.loads((whole / "report.json").read_text())
    right = [trace for trace in traces if trace.metrics["math_answer"] == 1.0]
    assert 0 < len(kept) <= len(right) < len(traces), "the tiny model is right now and then: one in ten by chance"
    assert all(trace in right and trace.finish_reason == "stop" for trace in kept)
    assert [trace.id for trace in kept] == [trace.id for trace in traces if trace in kept], "in the prompts' order"
    assert report["sampled"] == 192 == report["kept"] + sum(report["rejected"].values())
    per_prompt = Counter(trace.prompt_id for trace in right)
    rates = Counter(f"{per_prompt[f'ledger-{i}']}/8" for i in range(1, 25))
    assert report["solve_rates"] == rates and report["right"] == len(right)


def test_it_selects_anew_without_sampling(whole: Path, config: SampleConfig) -> None:
    before = (whole / "traces.jsonl").read_bytes()
    again = replace(config, resume=True, model=config.model, select=SelectConfig(correct=False, truncated=True))
    assert len(read_traces(run_sample(again, pool=None))) > len(before.splitlines())
    run_sample(replace(config, resume=True))
    assert (whole / "traces.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 700, 5_000])
def test_a_run_cut_off_anywhere_ends_the_same(whole: Path, config: SampleConfig, tmp_path: Path, cut: int) -> None:
    """The file of completions ends after so many bytes of the second batch."""
    lines = (whole / "all.jsonl").read_bytes().splitlines(keepends=True)
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_bytes((whole / "config.json").read_bytes())
    (part / "all.jsonl").write_bytes(b"".join(lines[:64]) + b"".join(lines[64:])[:cut])
    run_sample(replace(config, out=str(part), resume=True))
    for name in ("all.jsonl", "traces.jsonl", "report.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_files(
    whole: Path, config: SampleConfig, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "pipelines.cli", "sample", "--model", config.model, *FLAGS, "--out", str(out)]
    unbuffered = environment | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=unbuffered, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("sampling 10/24"):  # in the middle of the second batch
                process.kill()
    assert (out / "all.jsonl").exists() and not (out / "report.json").exists()
    done = grpo(*command[3:], "--resume")
    assert done.status == 0, done.err
    for name in ("all.jsonl", "traces.jsonl", "report.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def changed(config: SampleConfig, **fields: Any) -> SampleConfig:
    return replace(config, resume=True, **fields)


def test_what_does_not_go_together_is_refused(whole: Path, config: SampleConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        run_sample(config)
    with pytest.raises(ValueError, match="was started with another seed; resume it"):
        run_sample(changed(config, seed=4))
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run_sample(changed(config, out=str(tmp_path)))
    with pytest.raises(ValueError, match="counts answers with the reward 'math_answer': add it to --reward"):
        run_sample(replace(config, out=str(tmp_path / "new"), reward=("r1_format",)))
    with pytest.raises(ValueError, match="max_tokens=160 leaves no room"):
        run_sample(replace(config, out=str(tmp_path / "new"), max_tokens=160))
    assert not (tmp_path / "new").exists()


def test_an_evaluation_set_takes_its_problems_out(whole: Path, config: SampleConfig, tmp_path: Path) -> None:
    kept = read_traces(whole / "traces.jsonl")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"question": kept[0].question}) + "\n")
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.json", "all.jsonl"):
        (part / name).write_bytes((whole / name).read_bytes())
    run_sample(changed(config, out=str(part), against=(str(heldout),)))
    left = read_traces(part / "traces.jsonl")
    assert left == [trace for trace in kept if trace.prompt_id != kept[0].prompt_id]
    report = json.loads((part / "report.json").read_text())
    assert report["contaminated"][0]["evaluation_text"] == kept[0].question
