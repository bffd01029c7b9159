"""R1-Zero: GRPO from a base checkpoint with rule-based rewards alone (arXiv:2501.12948 section 2.2).

    grpo zero --model base --task gsm8k --data train.jsonl.gz --out runs/zero
    grpo zero --model base --task gsm8k --data train.jsonl.gz --out runs/zero --resume
    grpo zero --model base --task gsm8k --data train.jsonl.gz --out runs/zero --mesh.ranks 4
    grpo zero --model base --mixture 2*math=a.jsonl gsm8k=b.jsonl --out runs/zero

The run folder holds config.json, metrics.jsonl, tensorboard/, groups.jsonl, checkpoints/ and at the end model/; also
samples/ if asked, and culprits/ if it ended because of bad gradients. With --lora.rank, model/ is the merged model, and
model/adapter/ has the adapters alone.
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from grpo.learner import Learner
from grpo.learner_group import LearnerGroup, serve
from grpo.metrics import check_trackers
from grpo.trainer import GRPOTrainer, Teach
from models import from_pretrained
from models.auto import checkpoint_layers
from models.checkpoint import replace_folder, tensor_shapes
from models.lora import add_lora
from models.parallel import ALONE, join, leave
from pipelines.config import write_config
from pipelines.console import console, progress_bar
from pipelines.mixture import MixedSource, TaskRubric
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.run_folder import check_resumed
from pipelines.token_report import TokenReport
from pipelines.zero_config import ZeroConfig
from rewards import Rubric
from rollout.pool import EnginePool, build_pool
from rollout.prompts import PromptSource
from rollout.sample import Prompt


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Everything that can be wrong with the input has been read and checked."""

    config: ZeroConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    rubric: Rubric
    out: Path


def prepare(config: ZeroConfig) -> PreparedRun:
    """Reads data, tokenizer and rewards and opens the run folder. Raises ValueError or OSError with the remedy."""
    config = replace(config, engine=config.engine.resolved())
    tokenizer = load_tokenizer(config.model)
    tensor_shapes(config.model)  # are the weights there?
    check_trackers(config.trainer.trackers)
    source, rubric = read_tasks(config, tokenizer)
    source.take(0, config.trainer.prompts_per_step)  # are there enough? Before a folder is made
    out = Path(config.out)
    open_run_folder(config, out)
    return PreparedRun(config=config, tokenizer=tokenizer, prompts=source, rubric=rubric, out=out)


def read_tasks(config: ZeroConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSource, Rubric]:
    """The prompts of all tasks and what judges them."""
    room = config.engine.max_model_len - config.trainer.max_tokens
    prompts: dict[str, list[Prompt]] = {}
    rubrics: dict[str, Rubric] = {}
    for part in config.parts():
        name = part.task.name
        rubrics[name] = build_rubric((*(config.reward or part.task.rewards), *config.extra_reward), part.task)
        rows = task_rows(
            part.task, part.data, split=config.split, count=config.num_prompts, seed=config.trainer.seed,
            max_bad_share=config.max_bad_share, report=console.print,
        )  # fmt: skip
        prompts[name] = build_prompts(rows, part.task, tokenizer, max_tokens=room, report=console.print)
    if not config.mixture:
        return PromptSource(prompts[config.parts()[0].task.name], config.trainer.seed), rubrics.popitem()[1]
    task_of = {prompt.id: name for name, of_task in prompts.items() for prompt in of_task}
    weights = [part.weight for part in config.parts()]
    return MixedSource(prompts, weights, config.trainer.seed), TaskRubric(rubrics, task_of)


def open_run_folder(config: ZeroConfig, out: Path) -> None:
    """Creates the folder with its config.json, or checks that a run to be resumed has the same configuration."""
    saved = out / "config.json"
    if not config.resume:
        if saved.exists():
            raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, saved)
        return
    check_resumed(config, out, free=("out", "resume", "mesh."))


def run_zero(config: ZeroConfig, pool: EnginePool | None = None) -> Path:
    """The whole of `grpo zero`; the folder of the trained model. A `pool` that is passed in stays open.

    Where torchrun has started several, the process of rank 0 does this, the others are the learner's other ranks.
    """
    if os.environ.get("RANK", "0") != "0":
        serve_rank(config)
        return Path(config.out) / "model"
    return train(prepare(config), pool)


def device_of(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Where this process's part of a learner works; `auto` takes a GPU if there is one."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


def build_learner(config: ZeroConfig) -> Learner:
    """The base checkpoint in training, our model or a dense one of transformers, whole or by adapters; one rank of it
    in a job of several."""
    torch.set_num_threads(config.num_threads)
    total_steps = config.trainer.steps * config.trainer.minibatches
    device = device_of(config.device)
    mesh = join(config.mesh, device)
    dtype, quantize = getattr(torch, config.dtype), config.lora.quantize_base
    # What is to be sharded never is whole on the device.
    place = device if mesh is ALONE else torch.device("cpu")
    model = from_pretrained(config.model, dtype=dtype, device=place, quantize=quantize)
    if config.checkpoint_layers:
        checkpoint_layers(model)
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.trainer.seed)
    return Learner(model, config.learner, total_steps, mesh)


def serve_rank(config: ZeroConfig) -> None:
    """One of the learner's ranks but 0, until that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.SIG_IGN)  # rank 0 ends its step and saves, for which it needs the others
    try:
        serve(build_learner(config))
    finally:
        leave()  # after an error, too: closed connections tell the others


@contextlib.contextmanager
def started_learner(config: ZeroConfig) -> Iterator[Learner | LearnerGroup]:
    """The learner with all its ranks, within the block."""
    if config.mesh.ranks == 1:
        yield build_learner(config)
        leave()
        return
    if torch.cuda.is_available() and config.engine.kind == "vllm" and config.engine.placement == "colocated":
        raise ValueError(
            f"mesh.ranks={config.mesh.ranks} with engine.placement='colocated': rank 0 hands out the weights, which "
            "reach engines on other GPUs only with engine.placement='separate'"
        )
    with contextlib.ExitStack() as stack:
        if "WORLD_SIZE" not in os.environ:
            from grpo.ray_learner import started_ranks  # Ray starts processes: only for those who ask

            engines = config.engine.num_engines if config.engine.transport == "ray" else 0
            others = functools.partial(serve_rank, config)
            ranks = started_ranks(config.mesh.ranks, others, num_threads=config.num_threads, slots_beside=engines)
            stack.enter_context(ranks)
        stack.callback(leave)
        group = LearnerGroup(build_learner(config))
        yield group
        group.close()  # not after an error: ranks may be in the middle of something, and end with rank 0


def no_teacher(learner: Learner | LearnerGroup) -> Teach:
    """The samples teach what their rewards say."""
    return lambda samples, step: (samples, {})


class NoRewardsError(RuntimeError):
    """Reward functions fail in every completion: the run would end with the model that it began with."""


class RewardWatch:
    """Raises NoRewardsError once no completion of `MAX_STEPS` steps in a row had a reward and functions failed."""

    MAX_STEPS = 3

    def __init__(self, out: Path) -> None:
        self.out, self.in_a_row = out, 0

    def see(self, metrics: dict[str, float]) -> None:
        has_failed = "reward/mean" not in metrics and metrics.get("reward/errors", 0) > 0
        self.in_a_row = self.in_a_row + 1 if has_failed else 0
        if self.in_a_row == self.MAX_STEPS:
            raise NoRewardsError(
                f"no completion of the last {self.MAX_STEPS} steps had a reward, because reward functions failed: "
                f"{self.out / 'groups.jsonl'} has each error, grpo reward test tries a function on stored completions"
            )


def train(
    run: PreparedRun, pool: EnginePool | None = None, teacher: Callable[[Learner | LearnerGroup], Teach] = no_teacher
) -> Path:
    """The loop, and the trained model; `teacher` may change what is learned from the samples, see distill.py."""
    config = run.config
    console.print(f"engine {config.engine.kind}; {config.trainer.arithmetic()}", soft_wrap=True)
    set_seed(config.trainer.seed % 2**32)  # for rewards and adapters that use the global generators; nothing else does
    watch = RewardWatch(run.out)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        bar.advance(console_line(metrics))
        watch.see(metrics)

    with started_learner(config) as learner:
        with console.status("starting the engines"):
            engines = pool or build_pool(config.engine, config.model)
        try:
            with progress_bar("training", config.trainer.steps) as bar:
                trainer = GRPOTrainer(
                    config.trainer, learner, engines, run.prompts, run.rubric,
                    decoder(run.tokenizer), stop_token(run.tokenizer), run.out,
                    on_step=on_step,
                    tell=lambda message: console.print(message, style="bold red", soft_wrap=True),
                    teach=teacher(learner),
                    inspect=TokenReport.for_run(learner, decoder(run.tokenizer), config.log_tokens_of),
                )  # fmt: skip
                if trainer.first_step:
                    bar.advance("resumed", steps=trainer.first_step)
                elif config.resume:
                    console.print("there is no checkpoint yet: the run begins again from step 0")
                finished = trainer.run()
        finally:
            if pool is None:
                engines.close()
        if finished == config.trainer.steps:
            with replace_folder(run.out / "model") as fresh:
                learner.write_policy(fresh)
                run.tokenizer.save_pretrained(str(fresh))
    if finished < config.trainer.steps:
        console.print(f"stopped and saved after {finished} of {config.trainer.steps} steps; --resume continues")
        raise SystemExit(130)
    return run.out / "model"


def console_line(metrics: dict[str, float]) -> str:
    """The few numbers worth watching."""
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("reward", "reward/mean", lambda x: f"{x:.2f}"),
        ("KL to teacher", "distill/divergence", lambda x: f"{x:.3f}"),
        ("thinking", "reward/thinking_length", lambda x: f"{x:.1f}"),
        ("tokens", "completion/tokens", lambda x: f"{x:.1f}"),
        ("entropy", "policy/entropy", lambda x: f"{x:.2f}"),
        ("mismatch", "mismatch/abs_max", lambda x: f"{x:.0e}"),
        ("tokens/s", "speed/rollout_tokens_per_s", lambda x: f"{x:,.0f}"),
    ]
    return "  ".join(f"{title} {write(metrics[name])}" for title, name, write in shown if name in metrics)
