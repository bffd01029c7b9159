"""Rejection sampling: several completions of each prompt, of which the good ones are kept to train on
(arXiv:2501.12948, section 2.3.3).

    grpo sample --model runs/zero/model --task gsm8k --data train.jsonl --completions 8 --select.per-prompt 2 \
        --against gsm8k/test.jsonl --out runs/sample
    grpo sample ... --out runs/sample --resume

The folder holds config.json, all.jsonl (every completion, as it was sampled), and at the end traces.jsonl (the kept
ones, in the order of the prompts) and report.json (how many were left out, by reason). A run that was killed goes on
with `--resume` and ends with the files of an undisturbed one. Resumed when it has ended, it only selects anew: the
fields of `select`, `against` and `ngram` may be other ones then.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.samples import score_groups
from pipelines.config import write_config
from pipelines.console import console, progress_bar
from pipelines.overlap import Overlap, evaluation_texts
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.run_folder import check_resumed
from pipelines.selection import SelectConfig, Selection, select
from pipelines.tasks import Task, get_task
from pipelines.templates import check_template
from pipelines.traces import Source, Trace, append_traces, checkpoint_hash, resume_traces, write_traces
from rewards import Rubric, Score
from rollout.engine import EngineConfig
from rollout.pool import EnginePool, build_pool
from rollout.sample import Completion, CompletionGroup, Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """`grpo sample`: rejection sampling from a checkpoint."""

    model: str
    """Folder of a Hugging Face checkpoint."""
    task: str = "gsm8k"
    """Name of the task, or a file with `TASK = Task(...)`."""
    data: str | None = None
    """File, glob or hub id of the prompts; without it the task generates them or names its own hub id."""
    split: str = "train"
    """Split of a hub data set."""
    num_prompts: int = 0
    """Prompts to use: 0 for all of a data set; generated tasks need a number."""
    reward: tuple[str, ...] = ()
    """Rewards, `[weight*]name` or `[weight*]path/to/file.py:function`; the task's own if none is given."""
    template: str = ""
    """Prompt template, `chat` for the tokenizer's own; empty for the task's."""
    shots: int = 0
    """Worked examples of the task before each question."""
    completions: int = 4
    """Completions of each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 0
    """Longest completion, 0 for the task's own."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which completions are kept."""
    against: tuple[str, ...] = ()
    """Evaluation sets, files or hub ids: completions that share a passage with them are left out."""
    ngram: int = 13
    """Words of such a passage."""
    batch_size: int = 256
    """Prompts between two saves; a killed run loses one batch at most."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    seed: int = 0
    """Of sampling, of the choice among good completions, and of generated rows."""
    out: str = "runs/sample"
    """Folder for the traces."""
    resume: bool = False
    """Continue the run in `out`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engines."""

    def __post_init__(self) -> None:
        task = get_task(self.task)
        for name, least in (("num_prompts", 0), ("max_tokens", 0), ("completions", 1), ("batch_size", 1), ("ngram", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.template:
            check_template(self.template)
        if self.data is None and task.make_rows is not None and self.num_prompts < 1:
            raise ValueError(f"task {task.name} generates its problems: say how many with --num-prompts")


_FREE_TO_CHANGE = ("out", "resume", "against", "ngram", "engine.", "select.")
"""Fields that a resumed run may have otherwise; of the engines the results depend by rounding only."""


def run_sample(config: SampleConfig, pool: EnginePool | None = None) -> Path:
    """The whole of `grpo sample`; the file of kept traces. A `pool` that is passed in stays open.

    Raises ValueError or OSError with the remedy for wrong input.
    """
    task = get_task(config.task)
    config = replace(config, engine=config.engine.resolved())
    tokenizer = load_tokenizer(config.model)
    rubric = build_rubric(config.reward, task)
    if config.select.correct and task.accuracy not in [reward.name for reward in rubric.rewards]:
        raise ValueError(f"task {task.name} counts answers with the reward {task.accuracy!r}: add it to --reward")
    overlap = Overlap(evaluation_texts(config.against, "test"), ngram=config.ngram) if config.against else None
    rows = task_rows(
        task, config.data, split=config.split, count=config.num_prompts, seed=config.seed,
        max_bad_share=config.max_bad_share, report=console.print,
    )  # fmt: skip
    max_tokens = config.max_tokens or task.max_tokens
    if max_tokens >= config.engine.max_model_len:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no room for a prompt within engine.max_model_len="
            f"{config.engine.max_model_len}; lower the first or raise the second"
        )
    prompts = build_prompts(
        rows, task, tokenizer, max_tokens=config.engine.max_model_len - max_tokens, report=console.print,
        template=config.template, shots=config.shots,
    )  # fmt: skip
    source = Source(
        model=config.model, weights=checkpoint_hash(config.model), temperature=config.temperature, top_p=config.top_p,
        max_tokens=max_tokens, seed=config.seed,
    )  # fmt: skip
    params = SamplingParams(
        num_completions=config.completions, max_tokens=max_tokens, temperature=config.temperature, top_p=config.top_p,
        stop_token_id=stop_token(tokenizer), seed=config.seed,
    )  # fmt: skip
    out = Path(config.out)
    open_folder(config, out)
    writer = TraceWriter(task, config.template or task.template, source, tokenizer, rubric)
    _sample_missing(config, prompts, params, writer, out / "all.jsonl", pool)
    traces = resume_traces(out / "all.jsonl")
    selection = select(traces, config.select, accuracy=task.accuracy, seed=config.seed, overlap=overlap)
    write_traces(out / "traces.jsonl", selection.kept)
    report = describe(traces, selection, task.accuracy) | {"select": asdict(config.select), "source": asdict(source)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(
        f"{report['kept']} of {report['sampled']} completions kept, of {report['prompts_kept']} of {report['prompts']} "
        f"prompts; {report['right']} were right; left out: {_counts(report['rejected'])}; traces in {out}",
        soft_wrap=True,
    )
    return out / "traces.jsonl"


def _counts(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none"


def open_folder(config: SampleConfig, out: Path) -> None:
    """Creates the folder with its config.json, or checks that a run to be resumed samples the same."""
    saved = out / "config.json"
    if not config.resume:
        if saved.exists():
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, saved)
        return
    check_resumed(config, out, _FREE_TO_CHANGE)
    write_config(config, saved)


@dataclass(frozen=True)
class TraceWriter:
    """Turns sampled groups into scored traces."""

    task: Task
    template: str
    source: Source
    tokenizer: Any
    rubric: Rubric

    def traces(self, groups: Sequence[CompletionGroup]) -> list[Trace]:
        """One per completion, in the groups' order."""
        scores = score_groups(groups, self.rubric, decoder(self.tokenizer), step=0)
        return [
            self._trace(group.prompt, index, completion, score)
            for group, of_group in zip(groups, scores, strict=True)
            for index, (completion, score) in enumerate(zip(group.completions, of_group, strict=True))
        ]

    def _trace(self, prompt: Prompt, index: int, completion: Completion, score: Score) -> Trace:
        ids = completion.token_ids
        text_ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        return Trace(
            id=f"{prompt.id}/{index}",
            prompt_id=prompt.id,
            task=self.task.name,
            template=self.template,
            question=self.task.question(dict(prompt.row)),
            prompt=prompt.text,
            completion=self.tokenizer.decode(text_ids, skip_special_tokens=False),
            finish_reason=completion.finish_reason.value,
            tokens=len(ids),
            reward=score.value,
            metrics=dict(score.metrics),
            row=dict(prompt.row),
            source=self.source,
        )


def finished_batches(traces: Sequence[Trace], batches: Sequence[Sequence[Prompt]], completions: int) -> int:
    """How many of the first batches are there whole. Raises ValueError where the traces are of other prompts."""
    expected = [f"{prompt.id}/{index}" for batch in batches for prompt in batch for index in range(completions)]
    found = [trace.id for trace in traces]
    if found != expected[: len(found)]:
        raise ValueError("all.jsonl holds completions of other prompts; has the data changed? Choose another --out")
    done, seen = 0, 0
    for batch in batches:
        seen += len(batch) * completions
        done += seen <= len(found)
    return done


def _sample_missing(
    config: SampleConfig, prompts: Sequence[Prompt], params: SamplingParams, writer: TraceWriter, path: Path,
    pool: EnginePool | None,
) -> None:  # fmt: skip
    """Appends the completions that are not there yet, batch by batch; a batch that was cut off is sampled again whole,
    so that each is sampled in the same company, which decides how the engines round.
    """
    batches = [prompts[at : at + config.batch_size] for at in range(0, len(prompts), config.batch_size)]
    traces = resume_traces(path)
    done = finished_batches(traces, batches, config.completions)
    whole = sum(map(len, batches[:done])) * config.completions
    if whole < len(traces):
        write_traces(path, traces[:whole])
    if done == len(batches):
        return
    console.print(f"{len(prompts)} prompts of {writer.task.name}, {config.completions} completions each")
    if pool is None:
        with console.status("starting the engines"):
            engines = build_pool(config.engine, config.model)
    else:
        engines = pool
    try:
        with progress_bar("sampling", len(prompts)) as bar:
            if done:
                bar.advance("resumed", steps=sum(map(len, batches[:done])))
            _run_batches(engines, batches[done:], params, writer, path, bar.advance)
    finally:
        if pool is None:
            engines.close()


def _run_batches(
    engines: EnginePool, batches: Sequence[Sequence[Prompt]], params: SamplingParams, writer: TraceWriter, path: Path,
    advance: Callable[[str, int], None],
) -> None:  # fmt: skip
    right = sampled = tokens = 0
    started = time.perf_counter()
    for batch in batches:
        by_id: dict[str, CompletionGroup] = {}
        for group in engines.generate(batch, params):
            by_id[group.prompt.id] = group
            tokens += group.num_tokens
            rate = tokens / (time.perf_counter() - started)
            note = f"right {right / sampled:.1%}  " if sampled else ""
            advance(f"{note}{rate:,.0f} tokens/s", 1)
        traces = writer.traces([by_id[prompt.id] for prompt in batch])
        append_traces(path, traces)
        sampled += len(traces)
        right += sum(trace.metrics.get(writer.task.accuracy, 0.0) >= 1 for trace in traces)


def describe(traces: Sequence[Trace], selection: Selection, accuracy: str) -> dict[str, Any]:
    """The numbers of report.json. `solve_rates`: of how many completions were right -> prompts."""
    groups = [list(group) for _, group in groupby(traces, key=lambda trace: trace.prompt_id)]
    rights = [sum(trace.metrics.get(accuracy, 0.0) >= 1 for trace in group) for group in groups]
    rates = Counter(f"{right}/{len(group)}" for right, group in zip(rights, groups, strict=True))
    return {
        "prompts": len(groups),
        "sampled": len(traces),
        "right": sum(rights),
        "kept": len(selection.kept),
        "prompts_kept": len({trace.prompt_id for trace in selection.kept}),
        "rejected": dict(Counter(selection.reasons.values()).most_common()),
        "solve_rates": {rate: rates[rate] for rate in sorted(rates, key=lambda rate: int(rate.partition("/")[0]))},
        "mean_tokens": {
            "sampled": fmean(trace.tokens for trace in traces),
            "kept": fmean(trace.tokens for trace in selection.kept) if selection.kept else None,
        },
        "contaminated": [{"trace": name, **asdict(match)} for name, match in selection.matches.items()],
    }
