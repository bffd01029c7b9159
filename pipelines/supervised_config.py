"""The dials that every supervised stage has: schedule, batch, optimizer, evaluation, checkpoints."""

from dataclasses import dataclass
from typing import Literal

import torch

from grpo.schedule import Decay


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """What every supervised stage has in common."""

    steps: int = 0
    """Optimizer steps; 0 for as many as `epochs` take."""
    epochs: float = 2.0
    """Passes over the samples, where `steps` is 0."""
    samples_per_step: int = 64
    """Samples in one optimizer step."""
    tokens_per_step: int = 0
    """As many samples in one optimizer step as fit into this many tokens; 0 for `samples_per_step` of them."""
    token_budget: int = 8192
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises."""
    lr_decay: Decay = "cosine"
    """What the learning rate does after the warm-up."""
    final_lr_share: float = 0.1
    """Where the cosine ends, as a share of the peak; a tenth in DeepSeek-R1's stages (arXiv:2501.12948)."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    decay_vectors: bool = False
    """Decay the scales of norms, too, not matrices only."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    balance_speed: float = 0.0
    """Change per step of the router's correction bias, which keeps experts evenly loaded; 0 leaves it alone."""
    mtp_weight: float = 0.0
    """Weight of the loss of the multi-token-prediction modules, for a model that has some; DeepSeek-V3: 0.3."""
    curriculum_share: float = 0.0
    """Share of the training over which samples are limited in length, short ones first; 0 for no limit."""
    eval_every: int = 0
    """Steps between two evaluations on held-out samples; 0 for one before and one after training."""
    patience: int = 0
    """Evaluations without a better held-out loss after which training stops; the best weights are kept. 0 for never."""
    save_every: int = 0
    """Steps between two checkpoints, from which --resume continues; 0 for none."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained; `auto` takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and arithmetic. With bfloat16, gradients are added up and AdamW works on copies of the
    weights in float32, which small updates need: 16 bytes a weight in all, as many as with float32."""
    checkpoint_layers: bool = False
    """Compute each layer's activations again in the backward pass: a third more work, far less memory."""
    num_threads: int = 1
    """CPU threads; a second one pays for larger models and on idle cores only."""
    seed: int = 0
    """Of the order of samples, and of fresh weights."""

    def __post_init__(self) -> None:
        for name in ("samples_per_step", "token_budget", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in (
            "steps", "tokens_per_step", "warmup_steps", "eval_every", "patience", "save_every", "lr", "weight_decay",
            "balance_speed", "mtp_weight",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("final_lr_share", "curriculum_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.steps and not self.epochs > 0:
            raise ValueError(f"steps=0 and epochs={self.epochs}: one of them must be positive")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0, got {self.grad_clip}; inf turns clipping off")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience={self.patience} counts evaluations: set eval_every, too")

    @property
    def torch_device(self) -> torch.device:
        wanted = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)
