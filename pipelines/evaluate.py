"""Evaluation: one completion per problem, judged by the same rewards that training uses.

    grpo eval --model DIR --task gsm8k --data test.jsonl.gz

writes `results.json` (the summary) and `records.jsonl` (every completion with its score) into `--out`.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.samples import Decode, score_groups
from pipelines.config import write_config
from pipelines.console import console, progress_bar
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.tasks import get_task
from rewards import Rubric
from rollout.engine import EngineConfig
from rollout.pool import EnginePool, build_pool
from rollout.sample import FinishReason, Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`grpo eval`: accuracy of a checkpoint on a task."""

    model: str
    """Folder of a Hugging Face checkpoint."""
    task: str = "gsm8k"
    """Name of the task."""
    data: str | None = None
    """File or hub id; without it the task generates its rows or names its own hub id."""
    split: str = "test"
    """Split of a hub data set."""
    limit: int = 0
    """Problems to evaluate, 0 for all of a data set; generated tasks need a number."""
    reward: tuple[str, ...] = ()
    """Rewards, `[weight*]name` or `[weight*]path/to/file.py:function`; the task's own if none is given."""
    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int = 0
    """Longest completion, 0 for the task's own."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    seed: int = 0
    """Of sampling, and of generated rows."""
    out: str = "runs/eval"
    """Folder for the results."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engines."""

    def __post_init__(self) -> None:
        task = get_task(self.task)
        if self.limit < 0 or self.max_tokens < 0:
            name = "limit" if self.limit < 0 else "max_tokens"
            raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.data is None and task.make_rows is not None and self.limit < 1:
            raise ValueError(f"task {task.name} generates its problems: say how many with --limit")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one evaluation found."""

    accuracy: float
    """Share of right answers among scored problems."""
    accuracy_low: float
    """Lower end of the 95% Wilson interval."""
    accuracy_high: float
    """Upper end."""
    num_problems: int
    num_unscored: int
    """Problems whose completion failed or got no score; not in the accuracy."""
    truncated: float
    """Share of completions cut at the token limit."""
    metrics: dict[str, float]
    """Mean of each reward's value and metrics."""
    seconds: float
    tokens_per_s: float
    """Sampled tokens per second of generation."""
    records: list[dict[str, Any]]
    """One per problem: id, question row, completion, what was extracted, score."""

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "records"}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% score interval for a share (E. B. Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def evaluate(
    pool: EnginePool,
    prompts: Sequence[Prompt],
    rubric: Rubric,
    decode: Decode,
    params: SamplingParams,
    *,
    accuracy: str,
    batch_size: int = 256,
    on_batch: Callable[[int], None] = lambda done: None,
) -> EvalResult:
    """Samples one completion per prompt and scores it; `accuracy` names the reward whose value 1 is a right answer."""
    assert params.num_completions == 1, "accuracy and its interval are defined for one completion per problem"
    records: list[dict[str, Any]] = []
    tokens = truncated = 0
    seconds = 0.0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        started = time.perf_counter()
        by_id = {group.prompt.id: group for group in pool.generate(batch, params)}
        seconds += time.perf_counter() - started
        groups = [by_id[prompt.id] for prompt in batch]
        for group, (score,) in zip(groups, score_groups(groups, rubric, decode, step=0), strict=True):
            completion = group.completions[0]
            tokens += len(completion.token_ids)
            truncated += completion.finish_reason is FinishReason.LENGTH
            records.append(
                {
                    "id": group.prompt.id,
                    "prompt": group.prompt.text,
                    "row": dict(group.prompt.row),
                    "completion": decode([completion.token_ids])[0],
                    "finish_reason": completion.finish_reason.value,
                    "value": score.value,
                    "metrics": dict(score.metrics),
                    "info": dict(score.info),
                    "status": score.status.value,
                }
            )
        on_batch(len(batch))
    scored = [
        record["metrics"]
        for record in records
        if accuracy in record["metrics"] and record["finish_reason"] != FinishReason.ERROR
    ]
    right = sum(metrics[accuracy] >= 1.0 for metrics in scored)
    low, high = wilson_interval(right, len(scored))
    names = {name for metrics in scored for name in metrics}
    return EvalResult(
        accuracy=right / len(scored) if scored else 0.0,
        accuracy_low=low,
        accuracy_high=high,
        num_problems=len(records),
        num_unscored=len(records) - len(scored),
        truncated=truncated / len(records),
        metrics={name: fmean(m[name] for m in scored if name in m) for name in sorted(names)},
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        records=records,
    )


def write_result(result: EvalResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
    with (folder / "records.jsonl").open("w") as file:
        file.writelines(json.dumps(record, default=str) + "\n" for record in result.records)


def run_eval(config: EvalConfig) -> EvalResult:
    """The whole of `grpo eval`."""
    task = get_task(config.task)
    engine = config.engine.resolved()
    tokenizer = load_tokenizer(config.model)
    rubric = build_rubric(config.reward, task)
    if task.accuracy not in [reward.name for reward in rubric.rewards]:
        raise ValueError(f"task {task.name} counts answers with the reward {task.accuracy!r}: add it to --reward")
    rows = task_rows(
        task, config.data, split=config.split, count=config.limit, seed=config.seed,
        max_bad_share=config.max_bad_share, report=console.print,
    )  # fmt: skip
    prompts = build_prompts(rows, task, tokenizer, max_tokens=engine.max_model_len - 1, report=console.print)
    params = SamplingParams(
        max_tokens=config.max_tokens or task.max_tokens,
        temperature=config.temperature,
        stop_token_id=stop_token(tokenizer),
        seed=config.seed,
    )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out / "config.json")
    console.print(f"{len(prompts)} problems of {task.name}, engine {engine.kind}")
    with console.status("starting the engines"):
        pool = build_pool(engine, config.model)
    try:
        with progress_bar("evaluating", len(prompts)) as bar:
            result = evaluate(
                pool, prompts, rubric, decoder(tokenizer), params, accuracy=task.accuracy,
                on_batch=lambda done: bar.advance("", steps=done),
            )  # fmt: skip
    finally:
        pool.close()
    write_result(result, out)
    console.print(
        f"accuracy {result.accuracy:.1%} (95% interval {result.accuracy_low:.1%} to {result.accuracy_high:.1%}), "
        f"{result.num_problems} problems, {result.truncated:.1%} cut at the token limit, "
        f"{result.tokens_per_s:,.0f} tokens/s; results in {out}",
        soft_wrap=True,
    )
    return result
