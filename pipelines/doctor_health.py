"""Signs that the machinery of a run is not well: engines, experts, gradients, reward functions.

What is common to all rules is in doctor_rules.py, with the rules of what is learned.
"""

from pipelines.doctor_rules import Curves, fine, smooth, stretch, warn
from pipelines.findings import Finding


def mismatch_growth(run: Curves) -> Finding | None:
    """Above its alarm the run said so already. Below, ten times what it was is growth if it also passes a tenth of the
    alarm; less is rounding (float32: 1e-13 to 1e-9)."""
    kl = smooth(run.points("mismatch/kl_k3"))
    if not kl:
        return None
    first, now, limit = kl[0][1], kl[-1][1], run.alarm_kl
    above = stretch(kl, lambda value: value > limit)
    grown = stretch(kl, lambda value: value > max(10 * first, limit / 10))
    if not (above or grown):
        return fine("mismatch", f"KL of engine and learner {now:.1e} per token, alarm at {limit:.0e}")
    return warn(
        "mismatch",
        f"mismatch/kl_k3 {first:.1e} at first, {now:.1e} now, "
        + (f"above trainer.mismatch_alarm_kl={limit:.0e} {above}" if above else f"ten times the first {grown}"),
        "engine.record_experts with learner.replay_experts for a mixture of experts, learner.correction (docs/"
        "mismatch.md); grpo doctor --lr0 RUN/config.json tells whether the engines are to blame",
        level="error" if above else "warning",
    )


def stale_versions(run: Curves) -> Finding | None:
    """Tokens of older weights ten times as far from the learner as its own alarm allows, or one group in ten begun anew
    because it had become too old."""
    restarted = run.points("groups/restarted")
    if not restarted:
        return None
    lags = run.names("mismatch/kl_k3_lag_")
    said = []
    for name in lags:
        if since := stretch(smooth(run.points(name)), lambda value: value > 10 * run.alarm_kl):
            said.append(
                f"tokens {name.rpartition('_')[2]} versions old differ by {run.points(name)[-1][1]:.1e} {since}"
            )
    if since := stretch(restarted, lambda groups: groups >= max(1.0, 0.1 * run.prompts_per_step)):
        said.append(f"{restarted[-1][1]:.0f} groups begun anew in the last step, a tenth of all or more {since}")
    if not said:
        return fine("versions", f"{len(lags)} ages of tokens" if lags else "all tokens of the newest weights")
    return warn(
        "versions",
        "; ".join(said),
        "lower trainer.rollout.max_policy_lag or partial_share, or learner.correction with old_logprobs learner",
    )


def dead_experts(run: Curves) -> Finding | None:
    """Experts without a token in a whole batch get no gradient, and stay so; half the experts idle is as bad."""
    dead, used = run.points("moe/dead_experts"), run.points("moe/experts_used")
    if not dead:
        return None
    since, idle = stretch(dead, lambda experts: experts >= 1), stretch(used, lambda share: share < 0.5)
    if not (since or idle):
        return fine("experts", f"{used[-1][1]:.0%} in use" if used else "none without a token")
    return warn(
        "experts",
        f"{dead[-1][1]:.0f} without a token {since or idle}, {used[-1][1]:.0%} with a tenth of the mean load or more",
        "too small batches leave experts out by chance; else balance the base longer (its balance_speed), look "
        "at moe/load_entropy",
    )


def skipped_steps(run: Curves) -> Finding | None:
    """Every skipped step is a bad gradient; one in twenty is a failing run."""
    skipped = run.points("policy/skipped_steps")
    if not skipped:
        return None
    bad = [step for step, count in skipped if count > 0]
    if not bad:
        return fine("gradients", f"all {len(skipped)} steps applied")
    return warn(
        "gradients",
        f"{len(bad)} of {len(skipped)} steps skipped, the first at step {bad[0]}, the last at {bad[-1]}",
        "culprits/ in the run folder names the samples, if it ended for that; lower learner.lr, dtype float32",
        level="error" if len(bad) >= 0.05 * len(skipped) else "warning",
    )


def reward_failures(run: Curves) -> Finding | None:
    """Scores that are missing bias what is learned; from one in a hundred on somebody should look, from half of them on
    it is another experiment."""
    names = [n for suffix in ("/errors", "/timeouts") for n in run.names("reward/", suffix)]
    if not names:
        return None
    said, worst = [], 0.0
    for name in names:
        bad = [(step, share) for step, share in run.points(name) if share > 0.01]
        if bad:
            worst = max(worst, *(share for _, share in bad))
            most = max(bad, key=lambda point: point[1])
            said.append(
                f"{name} first at step {bad[0][0]}, in {len(bad)} steps, at most {most[1]:.0%} at step {most[0]}"
            )
    if not said:
        return fine("failures", "no reward function failed in more than 1%")
    return warn(
        "failures",
        "; ".join(said),
        "groups.jsonl has each error; grpo reward test REWARD groups.jsonl tries the function again; timeout_s",
        level="error" if worst >= 0.5 else "warning",
    )


def engine_failures(run: Curves) -> Finding | None:
    """Engines that had to be replaced, and completions that no engine could finish."""
    restarts, failed = run.points("engine/restarts"), run.points("samples/failed")
    first = next((step for step, count in restarts if count > 0), None)
    broken = [(step, share) for step, share in failed if share > 0]
    if not restarts and not failed:
        return None
    if first is None and not broken:
        return fine("engines", "none replaced, no completion given up")
    text = [] if first is None else [f"{restarts[-1][1]:.0f} engines replaced, the first by step {first}"]
    text += [f"{max(s for _, s in broken):.0%} of a step's completions failed, first at step {broken[0][0]}"] * bool(
        broken
    )
    return warn("engines", "; ".join(text), "--verbose shows why; memory (grpo doctor), engine.stall_timeout_s")
