"""Direct preference optimization: a policy learns from pairs which of two completions is the better one.

    grpo dpo --model sft --data pairs.jsonl --out runs/dpo

DPO (arXiv:2305.18290 eq. 7) and what became of it: see `PreferenceLoss`. The reference is the policy before training,
asked once. A step needs the pair's two log-probabilities before it knows the weight of each gradient, so it makes a
forward pass of all its pairs first; then each completion is a sample of the learner's whose "advantage" is that weight.
So a pair need not fit into one micro-batch, and the gradient is exact whatever the micro-batches.

Shape: P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.corrections import CorrectionConfig
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import from_pretrained
from models.auto import checkpoint_layers
from models.checkpoint import replace_folder, tensor_shapes
from models.lora import LoRAConfig, add_lora
from pipelines.console import console
from pipelines.pairs import Pair, PairConfig, learn_from_pairs, load_pairs
from pipelines.prompting import load_tokenizer
from pipelines.run_folder import open_run_folder
from pipelines.zero import device_of


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """Of one pair, with h = log(pi / pi_ref) of the chosen completion less that of the rejected one."""

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid` is DPO, -log sigmoid(beta h); `ipo` is (h - 1 / (2 beta))^2 (arXiv:2310.12036 eq. 17)."""
    beta: float = 0.1
    """How much a deviation from the reference costs; larger stays nearer."""
    label_smoothing: float = 0.0
    """Share of pairs that are thought to be the wrong way round: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
    (conservative DPO). `sigmoid` only."""
    length_normalized: bool = False
    """Log-probabilities as means over a completion's tokens in place of sums; larger betas go with it. IPO's authors
    mean it so."""
    nll_coef: float = 0.0
    """Weight of -log pi(chosen) per token, which keeps it from falling with the rejected one (RPO, arXiv:2404.19733
    eq. 1, there 1)."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.nll_coef >= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                "need beta > 0, nll_coef >= 0 and label_smoothing from 0 to below 0.5, got "
                f"{self.beta}, {self.nll_coef} and {self.label_smoothing}"
            )
        if self.label_smoothing and self.kind == "ipo":
            raise ValueError("label_smoothing has no effect with kind 'ipo'; set it to 0")

    def of_pairs(
        self,
        chosen_P: Tensor,
        rejected_P: Tensor,
        reference_2P: tuple[Tensor, Tensor],
        lengths_2P: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[P] from sums of log-probabilities over completions, the policy's and the reference's (of chosen and
        rejected), and the completions' lengths in tokens."""
        ratios = [policy_P - before_P for policy_P, before_P in zip((chosen_P, rejected_P), reference_2P, strict=True)]
        if self.length_normalized:
            ratios = [ratio_P / length_P for ratio_P, length_P in zip(ratios, lengths_2P, strict=True)]
        h_P = ratios[0] - ratios[1]
        if self.kind == "ipo":
            loss_P = (h_P - 1 / (2 * self.beta)).square()
        else:
            s = self.label_smoothing
            loss_P = -(1 - s) * F.logsigmoid(self.beta * h_P) - s * F.logsigmoid(-self.beta * h_P)
        return loss_P - self.nll_coef * chosen_P / lengths_2P[0]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairConfig):
    """`grpo dpo`: preference optimization of a checkpoint that answers already."""

    out: str = "runs/dpo"
    """Run folder."""
    pairs_per_step: int = 64
    """Pairs in one optimizer step; the last step of an epoch has what is left."""
    lr: float = 5e-7
    """Peak learning rate of AdamW."""
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    """What an optimizer step minimizes, averaged over its pairs."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters in place of the whole model, if `lora.rank` is set."""


def run_dpo(config: DPOConfig) -> Path:
    """The whole of `grpo dpo`; the folder of the trained model."""
    tokenizer = load_tokenizer(config.model)
    tensor_shapes(config.model)  # are the weights there?
    pairs = load_pairs(tokenizer, config)
    out = Path(config.out)
    open_run_folder(config, out)
    steps = config.num_steps(len(pairs))
    console.print(f"{len(pairs)} pairs, {config.pairs_per_step} a step, {config.epochs} epochs: {steps} steps")
    dpo = DPO(build_learner(config, steps), config.loss, pairs)
    learn_from_pairs(dpo.learner, len(pairs), config, dpo.begin, dpo.update, _line, "DPO")
    with replace_folder(out / "model") as fresh:
        dpo.learner.write_policy(fresh)
        tokenizer.save_pretrained(str(fresh))
    return out / "model"


def build_learner(config: DPOConfig, steps: int) -> Learner:
    """A learner whose loss is the sum of advantage times log-probability, over the number of samples."""
    torch.set_num_threads(config.num_threads)
    dtype, device = getattr(torch, config.dtype), device_of(config.device)
    model = from_pretrained(config.model, dtype=dtype, device=device, quantize=config.lora.quantize_base)
    if config.checkpoint_layers:
        checkpoint_layers(model)
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.seed)
    settings = LearnerConfig(
        lr=config.lr, warmup_steps=config.warmup_steps, lr_decay=config.lr_decay, weight_decay=config.weight_decay,
        grad_clip=config.grad_clip, token_budget=config.token_budget,
        objective=ObjectiveConfig(loss="reinforce", aggregation="constant", constant_length=1),
        correction=CorrectionConfig(old_logprobs="learner"),
    )  # fmt: skip
    return Learner(model, settings, steps)


class DPO:
    """A policy and its pairs."""

    def __init__(self, learner: Learner, loss: PreferenceLoss, pairs: Sequence[Pair]) -> None:
        self.learner, self.loss, self.pairs = learner, loss, pairs
        self.reference_2P = torch.zeros(2, len(pairs))

    def begin(self, kept: dict[str, Any] | None) -> dict[str, Any]:
        """The reference's log-probabilities, from a checkpoint or from the untrained policy."""
        if kept is None:
            with console.status("the reference's log-probabilities"):
                samples = [s for pair in self.pairs for s in (pair.chosen, pair.rejected)]
                self.reference_2P = _sums(self.learner.with_old_logprobs(samples))
        else:
            self.reference_2P = kept["reference"]
        return {"reference": self.reference_2P}

    def update(self, places: Sequence[int]) -> dict[str, float]:
        """One optimizer step on the pairs at `places`; loss, implicit rewards beta log(pi / pi_ref) and how often the
        chosen one's is larger, all before the step."""
        pairs = [self.pairs[place] for place in places]
        samples = self.learner.with_old_logprobs([s for pair in pairs for s in (pair.chosen, pair.rejected)])
        policy_2P = _sums(samples).requires_grad_()
        reference_2P = self.reference_2P[:, list(places)]
        lengths_2P = torch.tensor([[p.chosen.num_trained, p.rejected.num_trained] for p in pairs]).T.float()
        loss_P = self.loss.of_pairs(
            policy_2P[0], policy_2P[1], (reference_2P[0], reference_2P[1]), (lengths_2P[0], lengths_2P[1])
        )
        (gradient_2P,) = torch.autograd.grad(loss_P.mean(), policy_2P)
        # The learner divides by the number of samples and minimizes -advantage log pi.
        advantages = (-gradient_2P * len(samples)).T.flatten().tolist()
        weighted = [replace(s, advantage=a, old_logprobs=None) for s, a in zip(samples, advantages, strict=True)]
        report = self.learner.update(weighted)
        rewards_2P = self.loss.beta * (policy_2P.detach() - reference_2P)
        margin_P = rewards_2P[0] - rewards_2P[1]
        return {
            "dpo/loss": loss_P.mean().item(),
            "dpo/margin": margin_P.mean().item(),
            "dpo/accuracy": (margin_P > 0).float().mean().item(),
            "dpo/reward_chosen": rewards_2P[0].mean().item(),
            "dpo/reward_rejected": rewards_2P[1].mean().item(),
            "dpo/logprob_chosen": policy_2P[0].mean().item(),
            "dpo/logprob_rejected": policy_2P[1].mean().item(),
            **{name: report[name] for name in report if name in _LEARNERS or name.startswith("moe/")},
        }


_LEARNERS = ("policy/grad_norm", "policy/lr", "policy/skipped_steps", "policy/entropy")


def _sums(samples: Sequence[TrainingSample]) -> Tensor:
    """[2, P] from the log-probabilities of chosen and rejected in turns."""
    assert all(sample.old_logprobs is not None for sample in samples)
    return torch.tensor([sum(sample.old_logprobs or ()) for sample in samples]).view(-1, 2).T.contiguous()


def _line(metrics: dict[str, float]) -> str:
    return f"loss {metrics['dpo/loss']:.3f}  accuracy {metrics['dpo/accuracy']:.0%}  margin {metrics['dpo/margin']:.2f}"
