"""Distillation: a student learns what a teacher would say.

    grpo distill traces --student tiny --teacher teacher --sample.task gsm8k --sample.data train.jsonl.gz
    grpo distill on-policy --model student --teacher teacher --task gsm8k --data train.jsonl.gz --out runs/distill

From the teacher's text ("traces", DeepSeek-R1's way): `grpo sample` and `grpo sft`, one behind the other.

On its own samples ("on-policy": GKD, arXiv:2306.13649; Thinking Machines, 2025; Qwen3, arXiv:2505.09388), the loop is
that of `grpo zero`, with a teacher's advantages or divergence in place of the reward's, or beside them. The run folder
is that of `grpo zero`, and so is `--resume`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from grpo.batch import TrainingSample
from grpo.objective import check_supervision
from models import from_pretrained
from models.checkpoint import tensor_shapes
from pipelines.console import console
from pipelines.data import load_rows
from pipelines.prompting import load_tokenizer
from pipelines.sample import SampleConfig, run_sample
from pipelines.sft import SFTConfig, run_sft
from pipelines.sft_data import check_row, encode_rows
from pipelines.teacher import SampledTeacher, WholeTeacher, check_same_tokenizer
from pipelines.templates import get_template
from pipelines.zero import device_of, prepare, serve_rank, train
from pipelines.zero_config import ZeroConfig
from rollout.engine import EngineConfig
from rollout.pool import EnginePool, build_pool


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(ZeroConfig):
    """`grpo distill on-policy`: a student, `model`, learns from a teacher on what it samples itself."""

    teacher: str
    """Folder of the teacher's checkpoint; its tokenizer must be the student's."""
    out: str = "runs/distill"
    """Run folder."""
    divergence: Literal["sampled", "whole"] = "sampled"
    """What the teacher says of each token: `sampled`, the probability of the one that the student sampled, asked of an
    engine; or `whole`, its whole distribution, from a model beside the learner's: less noise, more memory."""
    beta: float = 1.0
    """Of `whole`: 1 for KL(student || teacher), 0 for KL(teacher || student), between them GKD's mixture of both."""
    kl_coef: float = 1.0
    """Weight of the teacher: lambda in A_t = reward_weight A - lambda (log pi_S - log pi_T), or of the divergence."""
    reward_weight: float = 0.0
    """Weight of the rewards' advantages; 0 learns from the teacher alone, and rewards are only logged."""
    traces: str = ""
    """For `whole`: file of the teacher's completions, `prompt` and `completion`, that are learned from as well."""
    on_policy_share: float = 1.0
    """GKD's lambda: share of a step's samples that are the student's own; the others come from `traces`."""
    teacher_engine: EngineConfig = field(default_factory=lambda: EngineConfig(placement="separate"))
    """The engine that serves the teacher for `sampled`; its `max_model_len` follows from the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_supervision("process", self.learner.objective)
        if not (self.kl_coef > 0 and self.reward_weight >= 0 and 0 <= self.beta <= 1):
            raise ValueError(
                "need kl_coef > 0, reward_weight >= 0 and beta from 0 to 1, got "
                f"{self.kl_coef}, {self.reward_weight} and {self.beta}"
            )
        if self.trainer.top_k or self.trainer.top_p < 1:
            raise ValueError(
                "the teacher's distribution is over the whole vocabulary, so must be the sampler's: set trainer.top_k "
                f"to 0 and trainer.top_p to 1, got {self.trainer.top_k} and {self.trainer.top_p}"
            )
        if not 0 < self.on_policy_share <= 1 or (self.on_policy_share < 1) != bool(self.traces):
            raise ValueError(
                f"on_policy_share={self.on_policy_share} with traces={self.traces!r}: above 0 and below 1 it needs "
                "traces for the rest, 1 has no use for them"
            )
        if self.on_policy_share < 1 and self.trainer.temperature != 1:
            raise ValueError(f"trainer.temperature={self.trainer.temperature} with traces: set it to 1")
        if self.divergence == "sampled":
            self._check_sampled()
        elif self.mesh.ranks > 1:
            raise ValueError(
                f"divergence 'whole' with mesh.ranks={self.mesh.ranks}: each rank would hold the whole teacher; take "
                "'sampled', or one rank"
            )

    def _check_sampled(self) -> None:
        if self.beta != 1 or self.traces:
            raise ValueError(
                f"beta={self.beta} and traces={self.traces!r}: another beta than 1, or tokens that the student did not "
                "sample, need the teacher's whole distribution: set divergence to 'whole'"
            )
        if self.trainer.temperature != 1:
            raise ValueError(
                f"trainer.temperature={self.trainer.temperature}: engines score at temperature 1, and the student's "
                "probabilities must be comparable; set it to 1, or divergence to 'whole'"
            )
        if self.teacher_engine.num_engines != 1:
            raise ValueError(
                f"teacher_engine.num_engines={self.teacher_engine.num_engines}: each engine of a pool scores all "
                "samples; set it to 1, and teacher_engine.tensor_parallel_size for a large teacher"
            )


def run_on_policy(
    config: OnPolicyConfig, pool: EnginePool | None = None, teacher_pool: EnginePool | None = None
) -> Path:
    """The whole of `grpo distill on-policy`; the folder of the trained student. Pools that are passed in stay open."""
    if os.environ.get("RANK", "0") != "0":
        serve_rank(config)
        return Path(config.out) / "model"
    tokenizer = load_tokenizer(config.teacher)
    tensor_shapes(config.teacher)  # are the weights there?
    check_same_tokenizer(load_tokenizer(config.model), tokenizer)
    check_vocabularies(config.model, config.teacher, len(tokenizer))
    run = prepare(config)
    if config.divergence == "whole":
        return train(run, pool, whole_teacher(config, run.tokenizer))
    with served_teacher(config, teacher_pool) as teacher:
        return train(run, pool, teacher)


def check_vocabularies(student: str, teacher: str, tokens: int) -> None:
    """Raises ValueError where a model lacks tokens of the tokenizer, or the teacher such as the student may sample."""
    sizes = [json.loads((Path(folder) / "config.json").read_text())["vocab_size"] for folder in (student, teacher)]
    if min(sizes) < tokens or sizes[0] > sizes[1]:
        raise ValueError(
            f"student {student} and teacher {teacher} have {sizes[0]} and {sizes[1]} rows in their heads for {tokens} "
            "tokens: each needs a row for each token, and the teacher as many as the student"
        )


@contextmanager
def served_teacher(config: OnPolicyConfig, pool: EnginePool | None) -> Iterator[SampledTeacher]:
    """The teacher behind an engine, which ends with the block unless `pool` was given."""
    # The engine gives the likeliest token behind what it scores, for which there must be room.
    engine = replace(config.teacher_engine.resolved(), max_model_len=config.engine.max_model_len + 1)
    beside = config.engine.num_engines * (config.engine.transport == "ray") + config.mesh.ranks
    with console.status("starting the teacher"):
        engines = pool or build_pool(engine, config.teacher, slots_beside=beside)
    try:
        yield SampledTeacher(
            pool=engines,
            kl_coef=config.kl_coef,
            reward_weight=config.reward_weight,
            tokens_per_call=config.learner.token_budget,
        )
    finally:
        if pool is None:
            engines.close()


def whole_teacher(config: OnPolicyConfig, tokenizer: PreTrainedTokenizerBase) -> WholeTeacher:
    """The teacher as a frozen model on the learner's device, in the learner's dtype."""
    dtype = getattr(torch, config.dtype)
    model = from_pretrained(config.teacher, dtype=dtype, device=device_of(config.device)).requires_grad_(False)
    return WholeTeacher(
        model=model,
        beta=config.beta,
        kl_coef=config.kl_coef,
        reward_weight=config.reward_weight,
        vocab_size=len(tokenizer),
        traces=trace_samples(config, tokenizer) if config.traces else (),
        traces_per_step=round(config.trainer.samples_per_step * (1 / config.on_policy_share - 1)),
        seed=config.trainer.seed,
    )


def trace_samples(config: OnPolicyConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[TrainingSample, ...]:
    """The teacher's completions as the student would have sampled them. Raises ValueError if none is short enough."""
    rows = load_rows(
        config.traces, split="train", check=check_row, max_bad_share=config.max_bad_share, report=console.print
    )
    encoded = encode_rows(
        [row.row for row in rows], get_template("r1"), tokenizer, max_length=config.engine.max_model_len
    )
    if encoded.num_dropped:
        console.print(f"{encoded.num_dropped} of {len(rows)} traces are longer than engine.max_model_len: left out")
    store = encoded.store
    return tuple(
        TrainingSample(
            token_ids=store.ids_W[start:end].tolist(),
            loss_mask=store.trained_W[start:end].tolist(),
            sampling_logprobs=[0.0] * int(end - start),
            advantage=0.0,
        )
        for start, end in pairwise(store.starts)
    )


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    """`grpo distill traces`: a student learns the text that a teacher wrote."""

    student: str
    """Folder of a checkpoint; or, for random weights, a named size or a folder with a config.json alone, of our
    architecture or a dense one of transformers."""
    teacher: str = ""
    """Folder of the teacher's checkpoint: it writes the traces, and a student of random weights gets its tokenizer."""
    traces: str = ""
    """File of the teacher's completions, as `grpo sample` writes it; without it the teacher writes them now."""
    out: str = "runs/distill"
    """Run folder: sample/ with the traces, sft/ with the student."""
    resume: bool = False
    """Go on with what an interrupted run has left in `out`."""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(model="", out=""))
    """What the teacher writes and which of it is kept; its `model`, `out` and `resume` are set here."""
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(data="", out=""))
    """How the student learns it; its `model`, `architecture`, `tokenizer`, `data`, `out` and `resume` are set here."""

    def __post_init__(self) -> None:
        given = [self.sample.model, self.sample.out, self.sft.data, self.sft.out]
        given += [self.sft.model, self.sft.architecture, self.sft.tokenizer]
        if any(given) or self.sample.resume or self.sft.resume:
            raise ValueError(
                "student, teacher, traces, out and resume belong to the whole: give them without sample. or sft."
            )


def run_traces(config: TracesConfig) -> Path:
    """The whole of `grpo distill traces`; the folder of the trained student."""
    is_fresh = not any(Path(config.student).glob("*.safetensors"))
    if not config.student:
        raise ValueError("no student given: add --student with a checkpoint's folder or an architecture")
    if not config.teacher and (is_fresh or not config.traces):
        raise ValueError(
            "no teacher given: add --teacher, which writes the traces where --traces is not given, and whose tokenizer "
            "a student of random weights gets"
        )
    if config.teacher:
        load_tokenizer(config.teacher)
    traces, out = config.traces, Path(config.out)
    if not config.traces:
        sample = replace(config.sample, model=config.teacher, out=str(out / "sample"))
        finished = out / "sample" / "traces.jsonl"
        if finished.exists() and not config.resume:
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        started = (out / "sample").exists()
        traces = str(finished if finished.exists() else run_sample(replace(sample, resume=config.resume and started)))
    started = (out / "sft" / "config.json").exists()
    learning = replace(config.sft, data=traces, out=str(out / "sft"), resume=config.resume and started)
    if is_fresh:
        return run_sft(replace(learning, architecture=config.student, tokenizer=config.teacher))
    return run_sft(replace(learning, model=config.student))


def run_distill(config: TracesConfig | OnPolicyConfig) -> Path:
    """By the kind of the configuration."""
    return run_traces(config) if isinstance(config, TracesConfig) else run_on_policy(config)
