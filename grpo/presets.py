"""What the papers combine, as configurations of the same few parts. docs/grpo.md says what each changes.

    algorithm = preset("dapo", max_tokens=2048)
    LearnerConfig(objective=algorithm.objective, correction=algorithm.correction)
    TrainerConfig(advantages=algorithm.advantages, max_tokens=2048)

Numbers are the papers' where they state them. What is not of the objective is left to the other options: DAPO's dynamic
sampling (`rollout.max_oversampling`) and overlong rewards, minibatches, learning rates.
"""

from dataclasses import dataclass, field
from typing import Any

from grpo.advantages import AdvantageConfig
from grpo.corrections import CorrectionConfig
from grpo.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Advantages of the trainer, objective and correction of the learner."""

    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


def preset(name: str, *, max_tokens: int) -> Algorithm:
    """`max_tokens` is the trainer's. Raises ValueError, naming what there is, for an unknown name."""
    known = _presets(max_tokens)
    if name not in known:
        raise ValueError(f"there is no preset {name!r}; known: {', '.join(known)}")
    return known[name]


def _presets(max_tokens: int) -> dict[str, Algorithm]:
    unscaled, over_batch = AdvantageConfig(scale="none"), AdvantageConfig(baseline="batch", scale="batch_std")
    leave_one_out = AdvantageConfig(baseline="leave_one_out", scale="none")
    per_sample: dict[str, Any] = {"aggregation": "sequence"}
    constant: dict[str, Any] = {"aggregation": "constant", "constant_length": max_tokens}
    narrow: dict[str, Any] = {"clip_low": 3e-4, "clip_high": 4e-4}
    in_reward: dict[str, Any] = {"kl_in": "reward", "kl_estimator": "k1"}
    return {
        # DeepSeekMath, arXiv:2402.03300 section 4.2; the clip is PPO's, the paper states none.
        "grpo": _of(kl_coef=0.04, **per_sample),
        # The first RL stage (Nature 645:633, supplement): epsilon 10, the reference replaced every 400 steps.
        "r1": _of(clip_low=1.0, clip_high=10.0, kl_coef=0.001, reference_every=400, **per_sample),
        # arXiv:2503.20783: neither the deviation nor the length of a sample divides anything.
        "dr_grpo": _of(unscaled, **constant),
        # arXiv:2503.14476: clip-higher, token mean, no KL.
        "dapo": _of(clip_high=0.28),
        # arXiv:2507.18071 sections 5.1 and 4.3.
        "gspo": _of(loss="gspo", **narrow, **per_sample),
        "gspo_token": _of(loss="gspo_token", **narrow, **per_sample),
        # arXiv:2506.13585, which does not state its bound; a weight of at most 5 is ScaleRL's (arXiv:2510.13786).
        "cispo": _of(loss="cispo", clip_low=1.0, clip_high=4.0),
        # arXiv:2507.20673.
        "gmpo": _of(loss="gmpo", clip_low=0.4, clip_high=0.4, **per_sample),
        # arXiv:2511.20347.
        "sapo": _of(loss="sapo", **per_sample),
        # arXiv:2402.14740 with its KL of TL;DR. It sums over a sample's tokens; the constant only scales that.
        "rloo": _of(leave_one_out, loss="reinforce", kl_coef=0.03, **in_reward, **constant),
        # REINFORCE++, arXiv:2501.03262, without a group baseline and with one.
        "reinforce_pp": _of(over_batch, kl_coef=0.001, **in_reward),
        "reinforce_pp_baseline": _of(AdvantageConfig(scale="batch_std")),
        # DeepSeek-V3.2, arXiv:2512.02556 section 3.1. KL weight and the mask's delta are not published.
        "v3_2": Algorithm(
            advantages=unscaled,
            objective=ObjectiveConfig(aggregation="sequence", kl_estimator="k3_weighted", kl_coef=0.001),
            correction=CorrectionConfig(off_policy_delta=0.5),
        ),
    }


def _of(advantages: AdvantageConfig | None = None, **objective: Any) -> Algorithm:
    return Algorithm(advantages=advantages or AdvantageConfig(), objective=ObjectiveConfig(**objective))


PRESETS = tuple(_presets(1))
"""Their names."""
