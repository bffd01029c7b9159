"""`grpo doctor --lr0`: a few whole steps of `grpo zero` with learning rate zero.

    grpo doctor --lr0 ledger --model base
    grpo doctor --lr0 runs/zero/config.json

Nothing may move then: the weights stay equal to the bit, the engines score the probe as the learner does after every
sync, and what they sample has the probabilities that the learner computes.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from grpo.learner import Learner
from grpo.trainer import GRPOTrainer
from pipelines.config import read_config
from pipelines.console import waiting
from pipelines.findings import Finding
from pipelines.prompting import decoder, stop_token
from pipelines.recipes import ZERO_RECIPES
from pipelines.zero import PreparedRun, ZeroConfig, build_learner, prepare
from rollout.pool import EnginePool, build_pool
from rollout.weight_sync import SyncError

NEAR = 0.1
"""Share of a limit from which on a check warns."""


def check_drift(zero: ZeroConfig, steps: int) -> list[Finding]:
    """Starts learner and engines and runs the steps. Raises ValueError or OSError for wrong input."""
    with tempfile.TemporaryDirectory() as out:
        run = prepare(still(zero, steps, Path(out) / "run"))
        torch.set_num_threads(run.config.num_threads)
        learner = build_learner(run.config)
        with waiting("starting the engines"):
            pool = build_pool(run.config.engine, run.config.model)
        try:
            return examine(run, learner, pool, steps)
        finally:
            pool.close()


def find_recipe(name: str, model: str) -> ZeroConfig:
    """Raises ValueError for what is neither a recipe nor a file."""
    if name in ZERO_RECIPES:
        zero = ZERO_RECIPES[name]()
    elif name and Path(name).is_file():
        zero = read_config(ZeroConfig, Path(name), default=ZeroConfig(model=""))
    else:
        raise ValueError(
            f"--lr0 needs a recipe of `grpo zero` ({', '.join(ZERO_RECIPES)}) or a config file, got {name!r}"
        )
    return replace(zero, model=model or zero.model)


def still(zero: ZeroConfig, steps: int, out: Path) -> ZeroConfig:
    """The same run with learning rate 0, which ends before it would save anything."""
    trainer = replace(
        zero.trainer, steps=steps + 1, save_every=steps + 1, log_groups_every=0, dump_samples_every=0, trackers=()
    )
    return replace(zero, out=str(out), resume=False, trainer=trainer, learner=replace(zero.learner, lr=0.0))


def examine(run: PreparedRun, learner: Learner, pool: EnginePool, steps: int) -> list[Finding]:
    """Runs the steps and judges them. Stops at the first sync that fails."""
    before = digests(learner)
    rows: list[dict[str, float]] = []
    trainer = GRPOTrainer(
        run.config.trainer, learner, pool, run.prompts, run.rubric, decoder(run.tokenizer), stop_token(run.tokenizer),
        run.out, on_step=lambda step, metrics: rows.append(metrics), tell=lambda message: None,
    )  # fmt: skip
    sync = Finding(level="ok", check="sync", text=f"{steps + 1} syncs, each followed by the probe")
    try:
        trainer.sync(version=0, probe_every=1)
        for step in range(steps):
            trainer.run_step(step)
    except SyncError as error:
        sync = Finding(level="error", check="sync", text=str(error))
    finally:
        trainer.close()
    limits = run.config.trainer
    return [
        judge_weights(before, digests(learner)),
        sync,
        judge(rows, "probe", "sync/probe_difference", limits.probe_limit,
              "the engine scores fixed sequences otherwise than the learner; trainer.probe_limit, if it is bfloat16"),
        judge(rows, "mismatch", "mismatch/kl_k3", limits.mismatch_alarm_kl,
              "what was sampled has another probability in the learner: check temperature and dtype of the engine, "
              "turn on engine.record_experts and learner.replay_experts; trainer.mismatch_alarm_kl=1e-2 if bfloat16"),
        *judge_experts(rows),
    ]  # fmt: skip


def digests(learner: Learner) -> dict[str, str]:
    """Name -> hash of each weight's bytes."""
    return {
        name: hashlib.blake2b(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in learner.named_weights()
    }


def judge_weights(before: dict[str, str], after: dict[str, str]) -> Finding:
    changed = [name for name in before if before[name] != after[name]]
    if not changed:
        return Finding(level="ok", check="weights", text=f"{len(before)} tensors equal to the bit")
    text = (
        f"{len(changed)} of {len(before)} tensors changed with learning rate 0, the first is {changed[0]}; something "
        "beside the optimizer writes weights: a balancing step on the router's bias, or a load into live parameters"
    )
    return Finding(level="error", check="weights", text=text)


def judge(rows: Sequence[dict[str, float]], check: str, metric: str, limit: float, remedy: str) -> Finding:
    """The metric of every step against its limit; a NaN is above every limit."""
    values = [row[metric] for row in rows if metric in row]
    if not values:
        text = "no step measured it: no completion could be trained; look at the rewards and at max_tokens"
        return Finding(level="error", check=check, text=text)
    above = [step for step, value in enumerate(values) if not value <= limit]
    text = f"{metric} from {min(values):.2g} to {max(values):.2g} over {len(values)} steps, limit {limit:.2g}"
    if above:
        return Finding(level="error", check=check, text=f"{text}, first above it at step {above[0]}: {remedy}")
    if max(values) > NEAR * limit:
        return Finding(level="warning", check=check, text=f"{text}, which is near: {remedy}")
    return Finding(level="ok", check=check, text=text)


def judge_experts(rows: Sequence[dict[str, float]]) -> list[Finding]:
    """Whether experts were recorded, and how many the learner would have chosen otherwise; none for a dense model."""
    missing = [row["mismatch/rows_without_experts"] for row in rows if "mismatch/rows_without_experts" in row]
    if not missing:
        return []
    if max(missing) > 0:
        text = (
            f"up to {max(missing):.1%} of the rows have no recorded experts and are not replayed: turn on "
            "engine.record_experts, or give the engine memory so that it preempts no request"
        )
        return [Finding(level="warning", check="experts", text=text)]
    other = max(row["mismatch/other_experts"] for row in rows)
    return [Finding(level="ok", check="experts", text=f"all recorded; the learner would choose {other:.2%} otherwise")]
