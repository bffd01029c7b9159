"""Rejection sampling: several completions for each prompt; those with a high enough reward are kept as traces.

grpo sample --model runs/zero/model --task gsm8k --data train.jsonl.gz --out runs/sample
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.samples import Decode, score_groups
from pipelines.config import write_config
from pipelines.console import console, progress_bar
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.tasks import get_task
from pipelines.traces import Source, Trace, append_traces, checkpoint_hash, resume_traces, write_traces
from rewards import Rubric
from rollout.engine import EngineConfig
from rollout.pool import build_pool
from rollout.sample import CompletionGroup, FinishReason, SamplingParams


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """`grpo sample`: completions of a checkpoint, of which the good ones are kept."""

    model: str
    """Folder of a Hugging Face checkpoint."""
    task: str = "gsm8k"
    """Name of the task."""
    data: str | None = None
    """File or hub id; without it the task generates its rows or names its own hub id."""
    split: str = "train"
    """Split of a hub data set."""
    num_prompts: int = 0
    """Prompts to use, 0 for all of a data set; generated tasks need a number."""
    reward: tuple[str, ...] = ()
    """Rewards; the task's own if none is given."""
    completions: int = 4
    """Completions of each prompt."""
    min_reward: float = 1.0
    """What a completion must reach to be kept."""
    temperature: float = 1.0
    """Of sampling."""
    max_tokens: int = 0
    """Longest completion, 0 for the task's own."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    seed: int = 0
    """Of sampling, and of generated rows."""
    out: str = "runs/sample"
    """Folder for `traces.jsonl`, those that are kept, and `all.jsonl`."""
    resume: bool = False
    """Go on with what an interrupted run has left in `out`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engines."""


def run_sample(config: SampleConfig) -> Path:
    """The whole of `grpo sample`; the file of the traces that are kept."""
    task, engine = get_task(config.task), config.engine.resolved()
    tokenizer = load_tokenizer(config.model)
    rubric = build_rubric(config.reward, task)
    rows = task_rows(
        task, config.data, split=config.split, count=config.num_prompts, seed=config.seed,
        max_bad_share=config.max_bad_share, report=console.print,
    )  # fmt: skip
    max_tokens = config.max_tokens or task.max_tokens
    prompts = build_prompts(rows, task, tokenizer, max_tokens=engine.max_model_len - max_tokens, report=console.print)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out / "config.json")
    done = {trace.prompt_id for trace in resume_traces(out / "all.jsonl")} if config.resume else set()
    left = [prompt for prompt in prompts if prompt.id not in done]
    params = SamplingParams(
        num_completions=config.completions, max_tokens=max_tokens, temperature=config.temperature,
        stop_token_id=stop_token(tokenizer), seed=config.seed,
    )  # fmt: skip
    source = Source(
        model=config.model, weights=checkpoint_hash(config.model), temperature=config.temperature,
        max_tokens=max_tokens, seed=config.seed,
    )  # fmt: skip
    pool = build_pool(engine, config.model)
    try:
        with progress_bar("sampling", len(prompts)) as bar:
            for start in range(0, len(left), 64):
                groups = list(pool.generate(left[start : start + 64], params))
                append_traces(out / "all.jsonl", _traces(groups, rubric, decoder(tokenizer), config, source))
                bar.advance("", steps=len(groups))
    finally:
        pool.close()
    kept = [
        trace
        for trace in resume_traces(out / "all.jsonl")
        if trace.finish_reason == "stop" and trace.reward is not None and trace.reward >= config.min_reward
    ]
    count = write_traces(out / "traces.jsonl", kept)
    console.print(f"{count} of {len(prompts) * config.completions} completions kept")
    return out / "traces.jsonl"


def _traces(
    groups: Sequence[CompletionGroup], rubric: Rubric, decode: Decode, config: SampleConfig, source: Source
) -> list[Trace]:
    task = get_task(config.task)
    traces = []
    for group, scores in zip(groups, score_groups(groups, rubric, decode, step=0), strict=True):
        texts = decode([completion.token_ids for completion in group.completions])
        for index, (completion, text, score) in enumerate(zip(group.completions, texts, scores, strict=True)):
            if completion.finish_reason is not FinishReason.ERROR:
                traces.append(
                    Trace(
                        id=f"{group.prompt.id}/{index}", prompt_id=group.prompt.id, task=task.name,
                        template=task.template, question=task.question(dict(group.prompt.row)),
                        prompt=group.prompt.text, completion=text, finish_reason=completion.finish_reason.value,
                        tokens=len(completion.token_ids), reward=score.value, metrics=dict(score.metrics),
                        row=dict(group.prompt.row), source=source,
                    )
                )  # fmt: skip
    return traces
