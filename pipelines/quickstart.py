"""The quickstart: pretrain a base model from text, run R1-Zero on it, show what happened. No GPU, nothing to fetch.

    grpo quickstart

The base answers mostly at once and is then barely better than guessing; rarely it writes out its steps, and is then
mostly right. RL sees only whether the answer is right and well-formed, and thinking grows because it pays.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo.metrics import read_metrics
from pipelines.console import console, print_table
from pipelines.evaluate import EvalResult, evaluate, write_result
from pipelines.pretrain import PretrainConfig, run_pretrain
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.recipes import pretrain_ledger, zero_ledger
from pipelines.report import table_rows, write_report
from pipelines.tasks import get_task, ledger
from pipelines.zero import ZeroConfig, prepare, train
from rollout.engine import EngineConfig
from rollout.pool import StreamingPool, build_pool
from rollout.sample import SamplingParams

FULL_CHAIN = ledger.NUM_STEPS + 1
"""Words of a thought that writes out the start digit and every step."""
NO_THOUGHT = " <think> </think> <answer>"
"""Forced on the model to measure what it can do without thinking."""


def _default_out() -> str:
    return f"runs/quickstart-{datetime.now():%Y%m%d-%H%M%S}"


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """`grpo quickstart`: the whole road in miniature."""

    out: str = field(default_factory=_default_out)
    """Run folder."""
    seed: int = 0
    """Of the text, the base model, the problems and every sampled token."""
    num_documents: int = 90_000
    """Documents of the pretraining corpus: at least as many as pretraining takes, 700 steps of 128, so that none is
    seen twice. What a small model learns by heart of repeated answers it loses in arithmetic."""
    num_prompts: int = 20_000
    """Problems for RL."""
    num_heldout: int = 512
    """Problems for evaluation; none of them is in the corpus or among the RL problems."""
    pretrain: PretrainConfig = field(default_factory=pretrain_ledger)
    """The base model; `data`, `out` and `seed` are set here."""
    zero: ZeroConfig = field(default_factory=zero_ledger)
    """RL; `model`, `data`, `out` and the seed are set here."""


def run_quickstart(config: QuickstartConfig) -> int:
    """Runs everything; the exit status, 1 if the run did not learn."""
    started = time.perf_counter()
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    zero = replace(config.zero, engine=config.zero.engine.resolved())
    if zero.engine.kind == "native" and config.zero.engine.kind == "auto":
        console.print("vLLM is not installed: sampling with the native engine")
    console.print("1/4 text and base model", style="bold")
    data = write_data(config, out / "data")
    base = run_pretrain(replace(config.pretrain, data=str(data["corpus"]), out=str(out / "base"), seed=config.seed))
    pretrain_seconds = time.perf_counter() - started
    zero = replace(
        zero, model=str(base), data=str(data["train"]), num_prompts=0, out=str(out / "zero"),
        trainer=replace(zero.trainer, seed=config.seed),
    )  # fmt: skip
    run = prepare(zero)

    console.print("2/4 the base on held-out problems", style="bold")
    with console.status("starting the engine"):
        pool = build_pool(zero.engine, zero.model)
    try:
        before = measure(pool, zero, data["heldout"], out / "before")
        console.print("3/4 R1-Zero", style="bold")
        train(run, pool)
        console.print("4/4 the trained model on the same problems", style="bold")
        after = measure(pool, zero, data["heldout"], out / "after")
    finally:
        pool.close()
    summary = summarise(before, after, read_metrics(run.out), zero.engine)
    summary |= {
        "seed": config.seed,
        "pretrain_seconds": round(pretrain_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(out, summary, run.out)
    show(summary)
    console.print(f"report {report}\nsummary {out / 'summary.json'}\nmodel {run.out / 'model'}")
    if not summary["learned"]:
        console.print("this run did not learn: accuracy or thinking did not clearly rise", style="bold red")
        return 1
    return 0


def write_data(config: QuickstartConfig, folder: Path) -> dict[str, Path]:
    """Corpus, RL problems and held-out problems as JSON lines; the held-out ones occur nowhere else."""
    folder.mkdir(parents=True)
    corpus = ledger.make_rows(config.num_documents, seed=3 * config.seed)
    training = ledger.make_rows(config.num_prompts, seed=3 * config.seed + 1)
    seen = frozenset(row["question"] for row in corpus + training)
    heldout = ledger.make_rows(config.num_heldout, seed=3 * config.seed + 2, exclude=seen)
    contents: dict[str, Sequence[dict[str, Any]]] = {
        "corpus": [{"text": text} for text in ledger.documents(corpus, random.Random(config.seed))],
        "train": training,
        "heldout": heldout,
    }
    paths = {}
    for name, rows in contents.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model on the held-out problems, as it likes and without thought."""

    free: EvalResult
    no_thought: EvalResult


def measure(pool: StreamingPool, zero: ZeroConfig, heldout: Path, out: Path) -> Measurement:
    """Samples at the training temperature; then again with an empty thought forced on the model."""
    task = get_task(zero.task)
    tokenizer = load_tokenizer(zero.model)
    rows = task_rows(task, str(heldout), split="", count=0, seed=0, max_bad_share=0, report=console.print)
    room = zero.engine.max_model_len - zero.trainer.max_tokens
    params = SamplingParams(
        max_tokens=zero.trainer.max_tokens, temperature=zero.trainer.temperature, stop_token_id=stop_token(tokenizer),
        seed=zero.trainer.seed,
    )  # fmt: skip
    results = []
    for name, prefill in (("free", ""), ("no_thought", NO_THOUGHT)):
        prompts = build_prompts(rows, task, tokenizer, max_tokens=room, report=console.print, prefill=prefill)
        rubric = build_rubric(zero.reward, task)
        result = evaluate(pool, prompts, rubric, decoder(tokenizer), params, accuracy=task.accuracy)
        write_result(result, out / name)
        results.append(result)
    console.print(
        f"accuracy {results[0].accuracy:.1%}, without thought {results[1].accuracy:.1%}, "
        f"thinking {results[0].metrics['thinking_length']:.1f} words"
    )
    return Measurement(free=results[0], no_thought=results[1])


def full_chains(result: EvalResult) -> tuple[float, float]:
    """Share of completions that write out every step, and the accuracy of those (0 if there are none)."""
    chains = [r["metrics"] for r in result.records if r["metrics"].get("thinking_length") == FULL_CHAIN]
    right = sum(metrics["math_answer"] for metrics in chains)
    return len(chains) / len(result.records), right / len(chains) if chains else 0.0


def summarise(
    before: Measurement, after: Measurement, metrics: list[dict[str, Any]], engine: EngineConfig
) -> dict[str, Any]:
    """The table's numbers under stable names; speeds are means over the second half of training."""
    late = metrics[len(metrics) // 2 :]
    learned = (
        after.free.accuracy_low > before.free.accuracy_high
        and after.free.metrics["thinking_length"] > 1.5 * before.free.metrics["thinking_length"]
    )
    summary: dict[str, Any] = {"learned": learned, "engine": engine.kind, "guessing_floor": ledger.GUESSING_FLOOR}
    for name, measured in (("before", before), ("after", after)):
        chain_share, chain_accuracy = full_chains(measured.free)
        summary |= {
            f"accuracy_{name}": measured.free.accuracy,
            f"accuracy_{name}_low": measured.free.accuracy_low,
            f"accuracy_{name}_high": measured.free.accuracy_high,
            f"format_{name}": measured.free.metrics["r1_format"],
            f"think_{name}": measured.free.metrics["thinking_length"],
            f"no_thought_accuracy_{name}": measured.no_thought.accuracy,
            f"full_chain_share_{name}": chain_share,
            f"full_chain_accuracy_{name}": chain_accuracy,
        }
    return summary | {
        "num_heldout": before.free.num_problems,
        "steps": len(metrics),
        "rollout_tokens_per_s": sum(row["speed/rollout_tokens_per_s"] for row in late) / len(late),
        "learn_tokens_per_s": sum(row["speed/learn_tokens_per_s"] for row in late) / len(late),
        "experts_used": metrics[-1]["moe/experts_used"],
        "largest_mismatch": max(row["mismatch/abs_max"] for row in metrics),
        "largest_probe_difference": max(row["sync/probe_difference"] for row in metrics),
    }


def show(summary: dict[str, Any]) -> None:
    print_table("R1-Zero in miniature", ("", "before RL", "after RL"), table_rows(summary))
    console.print(
        f"rollout {summary['rollout_tokens_per_s']:,.0f} tokens/s ({summary['engine']}), "
        f"learning {summary['learn_tokens_per_s']:,.0f} tokens/s, experts in use {summary['experts_used']:.0%}, "
        f"{summary['seconds']:.0f} s in all",
        soft_wrap=True,
    )
    console.print(
        "The base already writes out its steps now and then; RL, which sees only right or wrong and the form, draws "
        "that behaviour out and sharpens it. It does not create it.",
    )
