"""Distillation into a small dense student: first the teacher's text, then the teacher's opinion of the student's own.

    python examples/07_distill_dense.py runs/ledger-zero/model runs/student

The teacher is any checkpoint that solves the ledger task. The student is of Qwen3's architecture, by transformers, with
random weights: its config.json is all that is needed. The same in two commands:

    grpo distill traces --student sizes --teacher TEACHER --sample.task ledger --sample.num-prompts 200 ...
    grpo distill on-policy --model runs/student/traces/sft/model --teacher TEACHER --task ledger ...
"""

import sys
from pathlib import Path

from transformers import Qwen3Config

from grpo.learner_config import LearnerConfig
from grpo.metrics import read_metrics
from grpo.trainer import TrainerConfig
from pipelines.distill import OnPolicyConfig, TracesConfig, run_distill
from pipelines.sample import SampleConfig
from pipelines.selection import SelectConfig
from pipelines.sft import SFTConfig
from rollout.engine import EngineConfig

TEACHERS = EngineConfig(kind="native", transport="local", max_model_len=512)  # for our own model alone
STUDENTS = EngineConfig(kind="vllm", transport="local", max_model_len=512)  # transport="ray" for anything large
TASK, NUM_PROMPTS, MAX_TOKENS = "ledger", 200, 32


def write_sizes(folder: Path) -> str:
    """A dense student: the sizes alone, the vocabulary will be the teacher's."""
    Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def from_traces(teacher: str, out: Path) -> Path:
    """SFT on what the teacher writes; no completion is refused, as a teacher of any quality shall do here."""
    config = TracesConfig(
        student=write_sizes(out / "sizes"), teacher=teacher, out=str(out / "traces"),
        sample=SampleConfig(
            model="", out="", task=TASK, num_prompts=NUM_PROMPTS, max_tokens=MAX_TOKENS,
            select=SelectConfig(correct=False, truncated=True), engine=TEACHERS,
        ),
        sft=SFTConfig(data="", out="", steps=60, samples_per_step=32, lr=3e-3),
    )  # fmt: skip
    return run_distill(config)


def on_policy(student: Path, teacher: str, out: Path) -> Path:
    """The student samples, the teacher says how likely each token would have been to it."""
    config = OnPolicyConfig(
        model=str(student), teacher=teacher, task=TASK, num_prompts=NUM_PROMPTS, out=str(out / "on-policy"),
        trainer=TrainerConfig(steps=10, prompts_per_step=8, completions_per_prompt=8, max_tokens=MAX_TOKENS),
        learner=LearnerConfig(lr=1e-3), engine=STUDENTS, teacher_engine=TEACHERS,
    )  # fmt: skip
    return run_distill(config)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit(__doc__)
    teacher, out = arguments[0], Path(arguments[1])
    student = from_traces(teacher, out)
    trained = on_policy(student, teacher, out)
    losses = [row["loss/train"] for row in read_metrics(out / "traces" / "sft")]
    gaps = [row["distill/divergence"] for row in read_metrics(out / "on-policy")]
    print(f"traces: loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token in {len(losses)} steps")
    print(f"on its own samples: KL to the teacher {gaps[0]:.3f} -> {gaps[-1]:.3f} nats a token in {len(gaps)} steps")
    print(f"the student: {trained}")


if __name__ == "__main__":
    main(sys.argv[1:])
