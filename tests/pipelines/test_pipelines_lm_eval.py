"""GSM8K beside lm-evaluation-harness: the same checkpoint, served by vLLM, the same prompts, the same number.

Pinned: (1) strict-match and flexible-extract of lm-evaluation-harness are our extractors strict and flexible, as one
number and problem by problem; (2) prompts and completions are the same texts; (3) an evaluation of the checkpoint by
our own engine says the same. The model has learned half of the problems by heart, and of some the number without its
mark, so that neither number is 0, 1 or the other.
"""

import importlib.resources
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.pretrain import run_pretrain
from pipelines.recipes import pretrain_ledger
from tests.pipelines.conftest import LOCAL, grpo
from tests.pipelines.servers import vllm_server

NAMES = ("Ann", "Bob", "Cem", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
THINGS = ("apples", "books", "coins")
MAX_TOKENS = 40


def make_rows() -> list[dict[str, str]]:
    rows = []
    for number, name in enumerate(NAMES):
        for step, thing in enumerate(THINGS):
            a, b = (7 * number + 3 * step) % 9 + 2, (5 * number + step) % 8 + 11
            question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
            rows.append({"question": question, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"})
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return make_rows()


@pytest.fixture(scope="module")
def data(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gsm8k") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every three problems it learns one with its mark, one without, and one not at all."""
    folder = tmp_path_factory.mktemp("by_heart")
    texts = []
    for number, row in enumerate(rows):
        answer = row["answer"] if number % 3 == 0 else row["answer"].replace("####", "So it is")
        if number % 3 < 2:
            texts.append(f"Question: {row['question']}\nAnswer: {answer}")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 40))
    config = replace(
        pretrain_ledger(), data=str(folder / "corpus.jsonl"), out=str(folder / "model"), steps=120,
        samples_per_step=48, warmup_steps=5, num_threads=1,
    )  # fmt: skip
    return run_pretrain(config)


def harness(
    url: str, data: Path, out: Path, environment: dict[str, str]
) -> tuple[dict[str, float], dict[tuple[str, str], Any]]:
    """Accuracy by filter, and (filter, question) -> its record, of lm-evaluation-harness's own gsm8k on our rows."""
    tasks = out / "tasks"
    tasks.mkdir(parents=True)
    task = {
        "include": str(importlib.resources.files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml"),
        "task": "gsm8k_here", "dataset_path": "json", "dataset_name": None, "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "training_split": None, "fewshot_split": None,
    }  # fmt: skip
    (tasks / "gsm8k_here.yaml").write_text(yaml.safe_dump(task))
    model = f"model=toy,base_url={url}/completions,tokenizer_backend=None,num_concurrent=8,max_gen_toks={MAX_TOKENS}"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model, "--tasks",
        "gsm8k_here", "--include_path", str(tasks), "--output_path", str(out / "results"), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    done = subprocess.run(command, env={**environment, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (out / "results").rglob("results_*.json")
    [samples] = (out / "results").rglob("samples_*.jsonl")
    numbers = json.loads(results.read_text())["results"]["gsm8k_here"]
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    return (
        {name: numbers[f"exact_match,{name}"] for name in ("strict-match", "flexible-extract")},
        {(record["filter"], record["doc"]["question"]): record for record in records},
    )


@pytest.mark.slow
def test_the_harness_finds_the_same(
    model: Path, data: Path, rows: list[dict[str, str]], environment: dict[str, str], tmp_path: Path
) -> None:
    stop = ("--stop", "Question:", "</s>", "<|im_end|>")
    ours = ("--task", "gsm8k", "--data", data, "--template", "plain", "--max-tokens", MAX_TOKENS, *stop)
    with vllm_server(model, "toy", environment) as url:
        theirs, samples = harness(url, data, tmp_path / "harness", environment)
        done = grpo("eval", "--server", url, "--server-model", "toy", *ours, "--out", tmp_path / "served")
        assert done.status == 0, done.err
    done = grpo("eval", "--model", model, *ours, "--out", tmp_path / "own", "--engine.max-model-len", 512, *LOCAL)
    assert done.status == 0, done.err
    for folder in ("served", "own"):
        found = json.loads((tmp_path / folder / "results.json").read_text())["extractors"]
        numbers = {name: found[name]["accuracy"]["value"] for name in ("strict", "flexible")}
        assert numbers == pytest.approx({"strict": theirs["strict-match"], "flexible": theirs["flexible-extract"]})
        records = [json.loads(line) for line in (tmp_path / folder / "records.jsonl").read_text().splitlines()]
        assert [record["question"] for record in records] == [row["question"] for row in rows]
        for record in records:
            for name, filter in (("strict", "strict-match"), ("flexible", "flexible-extract")):
                sample = samples[filter, record["question"]]
                assert record["prompt"] == sample["arguments"]["gen_args_0"]["arg_0"]
                assert record["completion"] == sample["resps"][0][0]
                assert record["extractors"][name]["right"] == (sample["exact_match"] == 1.0)
    assert 0.2 < theirs["strict-match"] < theirs["flexible-extract"] - 0.1 < 0.9, theirs
