"""The quickstart.

Pinned: (1) a run too short to learn says so, exits 1 and still leaves data, models, numbers and a report; (2) the
summary's names are stable and its numbers those of the evaluations on disk; (3) held-out problems occur neither in the
corpus nor among the RL problems, and the same seed gives the same data; (4) a run counts as learnt only if accuracy
rises beyond both intervals and thinking by half; (5) without vLLM it falls back to the native engine and says so;
(6) an existing folder is refused.
"""

import importlib.util
import json
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from grpo.metrics import read_metrics
from models import load_pretrained
from pipelines.evaluate import EvalResult, wilson_interval
from pipelines.quickstart import FULL_CHAIN, Measurement, QuickstartConfig, full_chains, summarise, write_data
from rollout.engine import EngineConfig
from tests.pipelines.conftest import Outcome, grpo

TINY = (
    "--seed", 3, "--num-documents", 400, "--num-prompts", 40, "--num-heldout", 24,
    "--pretrain.steps", 12, "--pretrain.documents-per-step", 32, "--pretrain.num-threads", 1,
    "--zero.trainer.steps", 2, "--zero.trainer.prompts-per-step", 4, "--zero.trainer.completions-per-prompt", 4,
    "--zero.trainer.log-groups-every", 1, "--zero.num-threads", 1, "--zero.engine.transport", "local",
    "--zero.engine.num-engines", 1,
)  # fmt: skip
STABLE = {
    "accuracy_before", "accuracy_after", "think_before", "think_after", "rollout_tokens_per_s", "learn_tokens_per_s",
    "engine", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "run"


@pytest.fixture(scope="module")
def outcome(out: Path) -> Outcome:
    """A whole quickstart on a machine without vLLM."""
    find_spec = importlib.util.find_spec

    def find_no_vllm(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "vllm" else find_spec(name, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_no_vllm)
        return grpo("quickstart", "--out", out, *TINY)


@pytest.fixture(scope="module")
def summary(out: Path, outcome: Outcome) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_a_run_that_does_not_learn_says_so(out: Path, outcome: Outcome, summary: dict[str, Any]) -> None:
    assert outcome.status == 1, outcome
    said = " ".join(outcome.out.split())
    assert "this run did not learn" in said
    assert summary["learned"] is False
    for shown in ("1/4", "4/4", "before RL", "after RL", str(out / "report.html"), str(out / "summary.json")):
        assert shown in outcome.out.replace("\n", "") or shown in said
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def test_without_vllm_the_native_engine_samples(outcome: Outcome, summary: dict[str, Any]) -> None:
    assert "vLLM is not installed: sampling with the native engine" in " ".join(outcome.out.split())
    assert summary["engine"] == "native"


def test_the_summary_has_the_numbers_on_disk(out: Path, summary: dict[str, Any]) -> None:
    assert set(summary) >= STABLE
    assert all(isinstance(summary[name], int | float) for name in STABLE - {"engine"})
    for when in ("before", "after"):
        results = {
            kind: json.loads((out / when / kind / "results.json").read_text()) for kind in ("free", "no_thought")
        }
        assert summary[f"accuracy_{when}"] == results["free"]["accuracy"]
        assert summary[f"accuracy_{when}_low"] == results["free"]["accuracy_low"]
        assert summary[f"think_{when}"] == results["free"]["metrics"]["thinking_length"]
        assert summary[f"format_{when}"] == results["free"]["metrics"]["r1_format"]
        assert summary[f"no_thought_accuracy_{when}"] == results["no_thought"]["accuracy"]
        assert results["free"]["num_problems"] == summary["num_heldout"] == 24
        records = [json.loads(line) for line in (out / when / "no_thought" / "records.jsonl").read_text().splitlines()]
        assert all(record["metrics"]["thinking_length"] == 0 for record in records), "the control forbids thinking"
    metrics = read_metrics(out / "zero")
    assert len(metrics) == summary["steps"] == 2
    assert summary["rollout_tokens_per_s"] == metrics[-1]["speed/rollout_tokens_per_s"], "the later half of the steps"
    assert summary["learn_tokens_per_s"] == metrics[-1]["speed/learn_tokens_per_s"]
    assert 0 < summary["pretrain_seconds"] < summary["seconds"]


def test_models_and_data_are_left_behind(out: Path, outcome: Outcome) -> None:
    for folder in ("base/model", "zero/model"):
        assert load_pretrained(out / folder).config.n_routed_experts > 1
    questions = {
        name: [json.loads(line)["question"] for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    assert (len(questions["train"]), len(questions["heldout"])) == (40, 24)
    corpus = (out / "data" / "corpus.jsonl").read_text()
    assert corpus.count("\n") == 400
    assert not set(questions["heldout"]) & set(questions["train"])
    assert not any(question in corpus for question in questions["heldout"])


def test_an_existing_folder_is_refused(out: Path, outcome: Outcome) -> None:
    message = grpo("quickstart", "--out", out, *TINY).one_line_error()
    assert message == f"{out} exists already; choose another --out"


def test_the_data_depends_on_the_seed_alone(tmp_path: Path) -> None:
    config = QuickstartConfig(num_documents=50, num_prompts=20, num_heldout=10)
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        paths = write_data(replace(config, seed=seed), tmp_path / name)
        written[name] = {kind: path.read_bytes() for kind, path in paths.items()}
    assert written["a"] == written["b"]
    assert all(written["a"][kind] != written["c"][kind] for kind in ("corpus", "train", "heldout"))


def result(right: int, thinking: float, trials: int = 100) -> EvalResult:
    low, high = wilson_interval(right, trials)
    return EvalResult(
        accuracy=right / trials,
        accuracy_low=low,
        accuracy_high=high,
        num_problems=trials,
        num_unscored=0,
        truncated=0.0,
        metrics={"thinking_length": thinking, "r1_format": 1.0, "math_answer": right / trials},
        seconds=1.0,
        tokens_per_s=1.0,
        records=[{"metrics": {"thinking_length": thinking, "math_answer": float(i < right)}} for i in range(trials)],
    )


@pytest.mark.parametrize(
    ("before", "after", "learned"),
    [
        ((20, 2.0), (90, 10.0), True),
        ((20, 2.0), (35, 10.0), False),  # 0.133-0.289 and 0.264-0.447 overlap
        ((20, 2.0), (45, 10.0), True),
        ((20, 2.0), (90, 3.0), False),  # right without thinking more: not the phenomenon
        ((90, 10.0), (20, 20.0), False),
    ],
)
def test_what_counts_as_learnt(before: tuple[int, float], after: tuple[int, float], learned: bool) -> None:
    metrics = [
        {
            "speed/rollout_tokens_per_s": speed, "speed/learn_tokens_per_s": 2 * speed, "moe/experts_used": 1.0,
            "mismatch/abs_max": speed * 1e-6, "sync/probe_difference": 0.0,
        }
        for speed in (1.0, 9.0, 10.0, 20.0)
    ]  # fmt: skip
    control = result(10, 0.0)
    summary = summarise(
        Measurement(free=result(*before), no_thought=control),
        Measurement(free=result(*after), no_thought=control),
        metrics,
        EngineConfig(kind="native"),
    )
    assert summary["learned"] is learned
    assert (summary["rollout_tokens_per_s"], summary["learn_tokens_per_s"]) == (15.0, 30.0), "warm-up left out"
    assert summary["largest_mismatch"] == 20.0 * 1e-6


def test_full_chains() -> None:
    assert full_chains(result(30, float(FULL_CHAIN))) == (1.0, 0.3)
    assert full_chains(result(30, FULL_CHAIN - 1.0)) == (0.0, 0.0)
