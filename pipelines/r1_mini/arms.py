"""What is compared: the arms, each a function of the artifacts of those that it needs.

An arm works in its own folder `<out>/seed-<n>/<name>` and returns numbers; models lie in `model` there.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.config import DeepseekV3Config
from pipelines.prompting import load_tokenizer
from pipelines.r1_mini import controls
from pipelines.r1_mini.effort import FULL, Effort, student
from pipelines.r1_mini.stages import (
    Loop,
    Pair,
    Row,
    curve,
    distill_on_policy,
    documents,
    make_rows,
    new_tokenizer,
    pretrain,
    problem,
    read_json_rows,
    reinforce,
    sample,
    summarise,
    supervise,
    write_rows,
)  # fmt: skip
from pipelines.tasks import countdown_mini, get_task, ledger, variables
from pipelines.templates import TEMPLATES

NO_THOUGHT = " <think> </think> <answer>"
"""Forced on the model to measure what it can do without thinking."""
STUDENT_LR = 8e-3
"""Of a student's pretraining and SFT."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm of one seed."""

    effort: Effort
    seed: int
    root: Path
    """Folder of the seed."""
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def heldout(self, task: str) -> list[Row]:
        return read_json_rows(self.root / task / "base" / "heldout.jsonl")

    def prompts(self, task: str) -> Path:
        return self.root / task / "base" / "prompts.jsonl"

    def measure(self, task: str, model: Path, **changes: Any) -> dict[str, Any]:
        """Of one sampled completion for each held-out problem."""
        settings: dict[str, Any] = {"count": 1, "seed": self.seed} | changes
        return summarise(task, sample(model, task, self.heldout(task), **settings))

    def loop(self, task: str, steps: int, lr: float) -> Loop:
        return Loop(task=task, data=self.prompts(task), steps=steps, lr=lr, group=self.effort.group, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Arm:
    run: Callable[[Job], dict[str, Any]]
    needs: tuple[str, ...] = ()


def votes(task: str, model: Path, job: Job) -> dict[str, Any]:
    """Majority voting; of countdown there is none, where each expression is an answer of its own."""
    return {} if task == "countdown-mini" else {"votes": job.measure(task, model, count=job.effort.votes)}


def base(task: str, job: Job) -> dict[str, Any]:
    """The task's data and base model: problems that are held out are nowhere else."""
    effort, settings = job.effort, job.effort.tasks[task]
    heldout = make_rows(task, effort.num_heldout, 3 * job.seed + 2)
    exclude = frozenset(problem(task, row) for row in heldout)
    corpus = make_rows(task, settings.documents, 3 * job.seed, exclude, corpus=True)
    pairs = documents(task, corpus, random.Random(job.seed))
    write_rows(job.folder / "heldout.jsonl", heldout)
    write_rows(job.prompts(task), make_rows(task, effort.num_prompts, 3 * job.seed + 1, exclude))
    write_rows(job.folder / "corpus.jsonl", pairs)
    model = pretrain(
        pairs, new_tokenizer(pairs), settings.architecture, job.folder / "model",
        documents_per_step=effort.documents_per_step, lr=settings.lr, seed=job.seed,
    )  # fmt: skip
    return {
        "sampled": job.measure(task, model),
        "greedy": job.measure(task, model, temperature=0.0),
        "no_thought": job.measure(task, model, prefill=NO_THOUGHT),
    } | votes(task, model, job)


def zero(task: str, start: str, reward: tuple[str, ...], job: Job) -> dict[str, Any]:
    """GRPO from the model of `start`."""
    settings = job.effort.tasks[task]
    loop = job.loop(task, settings.zero_steps, settings.zero_lr)
    model = reinforce(loop, job.root / start / "model", job.folder, reward)
    return {
        "curve": curve(job.folder, task),
        "sampled": job.measure(task, model),
        "greedy": job.measure(task, model, temperature=0.0),
        "no_thought": job.measure(task, model, prefill=NO_THOUGHT),
    } | votes(task, model, job)


def demonstration(task: str, row: Row, rng: random.Random) -> Pair:
    """A whole thought with the right answer, written by who knows it."""
    if task == "countdown-mini":
        attempts = countdown_mini.attempts_until(row, rng, countdown_mini.MAX_ATTEMPTS)
        completion = countdown_mini.completion(row, attempts, attempts[-1])
    else:
        whole = {
            "ledger": partial(ledger.completion, depth=ledger.NUM_STEPS),
            "variables": partial(variables.completion, shown=99),
        }
        completion = whole[task](row)
    return TEMPLATES["r1"].format(row["question"]), completion


def cold_start(task: str, job: Job) -> dict[str, Any]:
    """SFT of the base on a few demonstrations (R1's first stage)."""
    rows, rng = read_json_rows(job.prompts(task))[-job.effort.cold_start :], random.Random(job.seed)
    pairs = [demonstration(task, row, rng) for row in rows]
    tokens = supervise(job.root / task / "base/model", pairs, job.folder / "model", epochs=2, lr=1e-3, seed=job.seed)
    return {"tokens": tokens, "sampled": job.measure(task, job.folder / "model")}


def continued(task: str, job: Job) -> dict[str, Any]:
    """Control: the base goes on with new documents of the same kind, for as many tokens as RL learned from."""
    settings = job.effort.tasks[task]
    count = job.effort.group**2 * settings.zero_steps
    pairs = documents(task, make_rows(task, count, 3 * job.seed + 1000, corpus=True), random.Random(job.seed + 1))
    tokens = supervise(job.root / task / "base/model", pairs, job.folder / "model", epochs=1, lr=1e-3, seed=job.seed)
    return {"tokens": tokens, "sampled": job.measure(task, job.folder / "model")}


def own_samples(task: str, job: Job) -> dict[str, Any]:
    """Control: SFT on the base's own right completions (RFT), as many problems and completions as RL saw."""
    settings, start = job.effort.tasks[task], job.root / task / "base/model"
    rows = read_json_rows(job.prompts(task))[: job.effort.group * settings.zero_steps]
    groups = sample(start, task, rows, count=job.effort.group, seed=job.seed)
    pairs = [(one.prompt, one.completion) for group in groups for one in group if one.right and not one.truncated]
    if not pairs:
        raise ValueError(f"{job.name}: of {len(rows)} problems the base solves none; pretrain it longer")
    tokens = supervise(start, pairs, job.folder / "model", epochs=2, lr=1e-3, seed=job.seed)
    return {"accepted": len(pairs), "tokens": tokens, "sampled": job.measure(task, job.folder / "model")}


def teacher_traces(job: Job) -> dict[str, Any]:
    """Sampled from the ledger's trained model, one of each problem; what is wrong or ill-formed is left out."""
    rows = read_json_rows(job.prompts("ledger"))[: job.effort.num_traces]
    groups = sample(job.root / "ledger/zero/model", "ledger", rows, count=1, seed=job.seed)
    kept = [one for (one,) in groups if one.right and one.metrics["r1_format"] == 1]
    if len(kept) < 10:
        raise ValueError(f"{job.name}: {len(kept)} of {len(rows)} traces are right; ten at least are needed")
    write_rows(job.folder / "traces.jsonl", [(one.prompt, one.completion) for one in kept])
    return {"sampled": len(rows), "kept": len(kept)}


def student_base(architecture: DeepseekV3Config, num_documents: int, job: Job) -> dict[str, Any]:
    """A student pretrained on the first documents of the teacher's corpus."""
    pairs = [tuple(pair) for pair in read_json_rows(job.root / "ledger/base/corpus.jsonl")]
    if num_documents > len(pairs):
        pairs += documents(
            "ledger", make_rows("ledger", num_documents - len(pairs), 3 * job.seed + 2000), random.Random(job.seed + 2)
        )
    model = pretrain(
        pairs[:num_documents], load_tokenizer(str(job.root / "ledger/base/model")), architecture, job.folder / "model",
        documents_per_step=job.effort.documents_per_step, lr=STUDENT_LR, seed=job.seed,
    )  # fmt: skip
    return {"sampled": job.measure("ledger", model), "votes": job.measure("ledger", model, count=job.effort.votes)}


def student_zero(start: str, job: Job) -> dict[str, Any]:
    model = reinforce(job.loop("ledger", job.effort.student_zero_steps, 3e-4), job.root / start / "model", job.folder)
    return {"curve": curve(job.folder, "ledger"), "sampled": job.measure("ledger", model)}


def student_distilled(start: str, job: Job) -> dict[str, Any]:
    """SFT on the teacher's traces."""
    pairs = read_json_rows(job.root / "traces/traces.jsonl")
    tokens = supervise(
        job.root / start / "model", pairs, job.folder / "model", epochs=job.effort.student_epochs, lr=STUDENT_LR,
        seed=job.seed,
    )  # fmt: skip
    return {"tokens": tokens, "sampled": job.measure("ledger", job.folder / "model")}


def student_traces_by_tokens(start: str, job: Job) -> dict[str, Any]:
    """Accuracy by trained tokens: SFT of an eighth, a quarter and half of the length, each with its own schedule."""
    pairs, points = read_json_rows(job.root / "traces/traces.jsonl"), []
    for part in (8, 4, 2):
        out, epochs = job.folder / f"part-{part}", job.effort.student_epochs / part
        tokens = supervise(job.root / start / "model", pairs, out, epochs=epochs, lr=STUDENT_LR, seed=job.seed)
        points.append((tokens, job.measure("ledger", out)["accuracy"]))
    return {"points": points, "whole": f"{start}-distilled"}


def student_on_policy(start: str, job: Job) -> dict[str, Any]:
    """A cold start of half the SFT, then on-policy distillation; from a tenth of the traces it stayed at chance."""
    pairs, cold = read_json_rows(job.root / "traces/traces.jsonl"), job.folder / "cold"
    epochs = job.effort.student_epochs / 2
    tokens = supervise(job.root / start / "model", pairs, cold, epochs=epochs, lr=STUDENT_LR, seed=job.seed)
    first = job.measure("ledger", cold)
    loop = job.loop("ledger", job.effort.on_policy_steps, 5e-4)
    model = distill_on_policy(loop, cold, job.root / "ledger/zero/model", job.folder / "loop")
    return {
        "cold": first, "cold_tokens": tokens, "curve": curve(job.folder / "loop", "ledger"),
        "samples_per_step": job.effort.group**2, "sampled": job.measure("ledger", model),
    }  # fmt: skip


COIN = (f"{controls.__file__}:coin", "0*math_answer", "0*r1_format", "0*thinking_length")


def arms(effort: Effort = FULL) -> dict[str, Arm]:
    """All arms by name, in the order in which they are begun."""
    table: dict[str, Arm] = {}
    for task in effort.tasks:
        get_task(task)
        table[f"{task}/base"] = Arm(run=partial(base, task))
        table[f"{task}/zero"] = Arm(run=partial(zero, task, f"{task}/base", ()), needs=(f"{task}/base",))
    table["traces"] = Arm(run=teacher_traces, needs=("ledger/zero",))
    table["ledger/cold"] = Arm(run=partial(cold_start, "ledger"), needs=("ledger/base",))
    table["ledger/cold-zero"] = Arm(run=partial(zero, "ledger", "ledger/cold", ()), needs=("ledger/cold",))
    table["ledger/coin"] = Arm(run=partial(zero, "ledger", "ledger/base", COIN), needs=("ledger/base",))
    table["ledger/continued"] = Arm(run=partial(continued, "ledger"), needs=("ledger/base",))
    table["ledger/own-samples"] = Arm(run=partial(own_samples, "ledger"), needs=("ledger/base",))
    dense, moe, small = (
        student(effort.student_width),
        student(effort.student_width, experts=True),
        student(effort.small_width),
    )
    students = {f"dense-{count}": (dense, count) for count in effort.student_documents}
    students |= {"moe": (moe, effort.student_documents[0]), "small": (small, effort.student_documents[-1])}
    for name, (architecture, count) in students.items():
        start = f"student/{name}"
        table[start] = Arm(run=partial(student_base, architecture, count), needs=("ledger/base",))
        table[f"{start}-zero"] = Arm(run=partial(student_zero, start), needs=(start,))
        if name in ("moe", "small", f"dense-{effort.student_documents[0]}"):
            table[f"{start}-distilled"] = Arm(run=partial(student_distilled, start), needs=(start, "traces"))
    first = f"student/dense-{effort.student_documents[0]}"
    table["student/by-tokens"] = Arm(run=partial(student_traces_by_tokens, first), needs=(first, "traces"))
    table["student/on-policy"] = Arm(run=partial(student_on_policy, first), needs=(first, "traces"))
    return table
