"""What the papers combine, as configurations of the same few parts. docs/grpo.md says what each changes.

    algorithm = preset("dapo", max_tokens=2048)
    LearnerConfig(objective=algorithm.objective, correction=algorithm.correction)
    TrainerConfig(advantages=algorithm.advantages, max_tokens=2048)

Numbers are the papers' where they state them. What is not of the objective is left to the other options: DAPO's dynamic
sampling (`rollout.max_oversampling`) and overlong rewards, minibatches, learning rates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from grpo.advantages import AdvantageConfig
from grpo.corrections import CorrectionConfig
from grpo.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Advantages of the trainer, objective and correction of the learner."""

    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


def preset(name: str, *, max_tokens: int) -> Algorithm:
    """`max_tokens` is the trainer's. Raises ValueError, naming what there is, for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name](max_tokens)


def _grpo(_: int) -> Algorithm:
    """DeepSeekMath, arXiv:2402.03300 section 4.2; the clip is PPO's, the paper states none."""
    return Algorithm(objective=ObjectiveConfig(aggregation="sequence", kl_coef=0.04))


def _r1(_: int) -> Algorithm:
    """R1's first RL stage (Nature 645:633, supplement): epsilon 10, the reference replaced every 400 steps."""
    return Algorithm(
        objective=ObjectiveConfig(
            aggregation="sequence", clip_low=1.0, clip_high=10.0, kl_coef=0.001, reference_every=400
        )
    )


def _dr_grpo(max_tokens: int) -> Algorithm:
    """arXiv:2503.20783: neither the deviation nor the length of a sample divides anything."""
    objective = ObjectiveConfig(aggregation="constant", constant_length=max_tokens)
    return Algorithm(advantages=AdvantageConfig(scale="none"), objective=objective)


def _dapo(_: int) -> Algorithm:
    """arXiv:2503.14476: clip-higher, token mean, no KL."""
    return Algorithm(objective=ObjectiveConfig(aggregation="token", clip_high=0.28))


def _gspo(_: int) -> Algorithm:
    """arXiv:2507.18071 section 5.1."""
    return Algorithm(objective=ObjectiveConfig(loss="gspo", aggregation="sequence", clip_low=3e-4, clip_high=4e-4))


def _gspo_token(_: int) -> Algorithm:
    """arXiv:2507.18071 section 4.3."""
    return Algorithm(
        objective=ObjectiveConfig(loss="gspo_token", aggregation="sequence", clip_low=3e-4, clip_high=4e-4)
    )


def _cispo(_: int) -> Algorithm:
    """arXiv:2506.13585, which does not state its bound; a cap of 5 is ScaleRL's (arXiv:2510.13786)."""
    return Algorithm(objective=ObjectiveConfig(loss="cispo", aggregation="token", clip_low=1.0, clip_high=4.0))


def _gmpo(_: int) -> Algorithm:
    """arXiv:2507.20673."""
    return Algorithm(objective=ObjectiveConfig(loss="gmpo", aggregation="sequence", clip_low=0.4, clip_high=0.4))


def _sapo(_: int) -> Algorithm:
    """arXiv:2511.20347."""
    return Algorithm(objective=ObjectiveConfig(loss="sapo", aggregation="sequence"))


def _rloo(max_tokens: int) -> Algorithm:
    """arXiv:2402.14740 with its KL of TL;DR. It sums over a sample's tokens; the constant only scales that."""
    return Algorithm(
        advantages=AdvantageConfig(baseline="leave_one_out", scale="none"),
        objective=ObjectiveConfig(
            loss="reinforce", aggregation="constant", constant_length=max_tokens,
            kl_in="reward", kl_estimator="k1", kl_coef=0.03,
        ),
    )  # fmt: skip


def _reinforce_pp(_: int) -> Algorithm:
    """REINFORCE++, arXiv:2501.03262: no group baseline, advantages normalized over the batch, KL in the reward."""
    return Algorithm(
        advantages=AdvantageConfig(baseline="batch", scale="batch_std"),
        objective=ObjectiveConfig(kl_in="reward", kl_estimator="k1", kl_coef=0.001),
    )


def _reinforce_pp_baseline(_: int) -> Algorithm:
    """The same paper: the group's mean is taken off, the batch's deviation divides."""
    return Algorithm(advantages=AdvantageConfig(scale="batch_std"), objective=ObjectiveConfig())


def _v3_2(_: int) -> Algorithm:
    """DeepSeek-V3.2, arXiv:2512.02556 section 3.1. KL weight and mask's delta are not published."""
    return Algorithm(
        advantages=AdvantageConfig(scale="none"),
        objective=ObjectiveConfig(aggregation="sequence", kl_estimator="k3_weighted", kl_coef=0.001),
        correction=CorrectionConfig(off_policy_delta=0.5),
    )


PRESETS: dict[str, Callable[[int], Algorithm]] = {
    "grpo": _grpo,
    "r1": _r1,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
    "gspo": _gspo,
    "gspo_token": _gspo_token,
    "cispo": _cispo,
    "gmpo": _gmpo,
    "sapo": _sapo,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "v3_2": _v3_2,
}
