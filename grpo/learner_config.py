"""The learner's dials: optimizer, objective, and how a batch is cut."""

from dataclasses import dataclass, field

from grpo.corrections import CorrectionConfig
from grpo.objective import ObjectiveConfig
from grpo.optimizer import OptimizerName
from grpo.schedule import Decay


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Objective and optimizer."""

    optimizer: OptimizerName = "adamw"
    """AdamW with its state in full, in 8 bits, or in main memory; see `grpo.optimizer`."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises."""
    lr_decay: Decay = "constant"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, of matrices only."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients. 0.999, as in verl and TRL: a mean over 1,000 steps keeps one large
    gradient from being followed by large steps. Where a policy moves far in few steps, a shorter memory adapts sooner:
    Open-Reasoner-Zero (arXiv:2503.24290) and MiniMax-M1 (arXiv:2506.13585) take 0.95, slime's scripts 0.98."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    skip_norm: float = 0.0
    """A step is skipped if its gradient norm exceeds this many times the median of the last 100; 0 for no limit. One
    whose norm is not finite is always skipped."""
    max_skipped_steps: int = 3
    """Optimizer steps that may be skipped in a row; one more ends the run."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What an optimizer step minimizes."""
    token_budget: int = 8192
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""
    share_prompts: bool = True
    """Compute a prompt once for those of its completions that are in one micro-batch; the gradient is the same."""
    replay_experts: bool = True
    """Use the experts that the sampler recorded (arXiv:2510.11370); rows without a recording choose for themselves."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Importance weights and masks for samples of another policy than the learner's."""

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"lr must be >= 0, got {self.lr}")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0, got {self.grad_clip}; inf turns clipping off")
        if not (self.skip_norm == 0 or self.skip_norm > 1) or self.max_skipped_steps < 0:
            raise ValueError(
                "need skip_norm > 1 or 0 for none, and max_skipped_steps >= 0, got "
                f"{self.skip_norm} and {self.max_skipped_steps}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be >= 1, got {self.token_budget}")
