"""What `grpo zero` can be told: model, tasks, rewards, and the sections of loop, learner and engines."""

from dataclasses import dataclass, field
from typing import Literal

from grpo.learner_config import LearnerConfig
from grpo.trainer import TrainerConfig
from models.lora import LoRAConfig
from models.parallel import MeshConfig
from pipelines.mixture import TaskPart, parse_mixture
from pipelines.tasks import get_task
from rollout.engine import EngineConfig


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """`grpo zero`: reinforcement learning from a base checkpoint."""

    model: str
    """Folder of the base checkpoint, in Hugging Face form."""
    task: str = "gsm8k"
    """Name of the task."""
    data: str | None = None
    """File or hub id of the prompts; without it the task generates them or names its own hub id."""
    split: str = "train"
    """Split of a hub data set."""
    num_prompts: int = 0
    """Prompts to use, of each task: 0 for all of a data set; generated tasks need a number."""
    mixture: tuple[str, ...] = ()
    """Several tasks instead of `task` and `data`, each `[weight*]task[=data]`, judged by its own rewards:
    `2*math=a.jsonl gsm8k=b.jsonl` takes two prompts of the first for one of the second."""
    reward: tuple[str, ...] = ()
    """Rewards, `[weight*]name` or `[weight*]path/to/file.py:function`; the task's own if none is given."""
    extra_reward: tuple[str, ...] = ()
    """Rewards that every task gets beside its own, language consistency for example, as in DeepSeek-R1."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    out: str = "runs/zero"
    """Run folder."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner works; `auto` takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the learner's weights, gradients and optimizer state."""
    checkpoint_layers: bool = False
    """Compute each layer's activations again in the backward pass: a third more work, far less memory; for sequences of
    tens of thousands of tokens."""
    num_threads: int = 1
    """CPU threads of the learner; a second one pays for larger models and on idle cores only."""
    log_tokens_of: int = 4
    """Groups of each dump to `groups.jsonl` (trainer.log_groups_every) that come with numbers for each token; two more
    forward passes over them, and some 60 bytes per token."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Objective and optimizer."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The learner's ranks; they are started by Ray, unless torchrun or `accelerate launch` has."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters in place of the whole model, if `lora.rank` is set."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engines that sample."""

    def __post_init__(self) -> None:
        if self.mixture and (self.data is not None or self.reward):
            raise ValueError(
                f"mixture={' '.join(self.mixture)} with {'data' if self.data is not None else 'reward'}: each task of "
                "a mixture has data and rewards of its own; write task=data, and use --extra-reward for what all get"
            )
        if self.num_prompts < 0:
            raise ValueError(f"num_prompts must be >= 0, got {self.num_prompts}")
        if self.log_tokens_of < 0:
            raise ValueError(f"log_tokens_of must be >= 0, got {self.log_tokens_of}")
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, got {self.num_threads}")
        for part in self.parts():
            if part.data is None and part.task.make_rows is not None and self.num_prompts < 1:
                raise ValueError(f"task {part.task.name} generates its problems: say how many with --num-prompts")
        if self.trainer.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"trainer.max_tokens={self.trainer.max_tokens} leaves no room for a prompt within "
                f"engine.max_model_len={self.engine.max_model_len}; lower the first or raise the second"
            )
        if self.learner.token_budget < self.engine.max_model_len:
            raise ValueError(
                f"learner.token_budget={self.learner.token_budget} is smaller than one sequence may be, "
                f"engine.max_model_len={self.engine.max_model_len}; raise the first or lower the second"
            )
        if self.lora.rank and self.mesh.ranks > 1:
            raise ValueError(
                f"lora.rank={self.lora.rank} with mesh.ranks={self.mesh.ranks}: adapters are not divided among ranks; "
                "train them with one rank"
            )
        if self.num_prompts and self.num_prompts * len(self.parts()) < self.trainer.prompts_per_step:
            raise ValueError(
                f"num_prompts={self.num_prompts} is fewer than trainer.prompts_per_step="
                f"{self.trainer.prompts_per_step}; raise the first or lower the second"
            )

    def parts(self) -> list[TaskPart]:
        """The tasks of the run, one without a mixture."""
        return parse_mixture(self.mixture) or [TaskPart(task=get_task(self.task), data=self.data, weight=1)]
