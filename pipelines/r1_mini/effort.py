"""How much of everything the miniature does: `FULL` for the figures, `TOY` to see in seconds that all parts work."""

from dataclasses import dataclass, replace

from models.config import DeepseekV3Config
from models.presets import TINY

TEACHER = TINY
"""Two layers of eight experts, MLA; the teacher of the ledger."""
WIDE = replace(TINY, kv_lora_rank=64, qk_nope_head_dim=32)
"""The model of the other two, where a number or name must be found again: latents with room for them."""


def student(width: int, *, experts: bool = False) -> DeepseekV3Config:
    """One layer, dense or with four experts; 33,664 parameters at width 32, two thirds of them embeddings and head."""
    return replace(
        TINY,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0 if experts else 1,
        kv_lora_rank=width,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=max(4, width // 2),
    )


@dataclass(frozen=True, kw_only=True)
class TaskEffort:
    """One task's base model and its reinforcement learning."""

    architecture: DeepseekV3Config
    documents: int
    """Of the corpus; each is read once."""
    lr: float
    """Of pretraining."""
    zero_steps: int
    zero_lr: float


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Counts of everything."""

    tasks: dict[str, TaskEffort]
    documents_per_step: int = 128
    num_heldout: int = 512
    num_prompts: int = 20_000
    """Problems for RL, rejection sampling and distillation."""
    group: int = 16
    """Prompts in a step, and completions of each."""
    votes: int = 16
    """Completions of a problem for majority voting."""
    cold_start: int = 128
    """Demonstrations of the cold start before RL."""
    student_documents: tuple[int, ...] = (12_800, 38_400, 102_400)
    """Corpus of each of the students, which differ in nothing else."""
    student_width: int = 32
    small_width: int = 8
    """Of the student that is too small."""
    student_zero_steps: int = 120
    student_epochs: int = 4
    """Passes over the teacher's traces."""
    num_traces: int = 20_480
    """Sampled from the teacher, the right ones are kept."""
    on_policy_steps: int = 100


FULL = Effort(
    tasks={
        "ledger": TaskEffort(architecture=TEACHER, documents=89_600, lr=4e-3, zero_steps=100, zero_lr=3e-4),
        "countdown-mini": TaskEffort(architecture=WIDE, documents=76_800, lr=4e-3, zero_steps=80, zero_lr=3e-4),
        "variables": TaskEffort(architecture=WIDE, documents=115_200, lr=3e-3, zero_steps=100, zero_lr=3e-4),
    }
)
TOY = Effort(
    tasks={
        name: TaskEffort(architecture=student(16), documents=count, lr=1e-2, zero_steps=2, zero_lr=3e-4)
        for name, count in (("ledger", 6400), ("countdown-mini", 256), ("variables", 256))
    },
    documents_per_step=64,
    num_heldout=24,
    num_prompts=256,
    group=4,
    votes=4,
    cold_start=32,
    student_documents=(128, 256),
    student_width=8,
    student_zero_steps=2,
    student_epochs=8,
    num_traces=256,
    on_policy_steps=2,
)
EFFORTS = {"full": FULL, "toy": TOY}
