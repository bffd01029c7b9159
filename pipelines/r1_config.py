"""What `grpo r1` can be told: the section of each stage, and which stages to run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pipelines.evaluate import EvalConfig
from pipelines.pretrain import PretrainConfig
from pipelines.r1_cost import Lengths, Machine
from pipelines.r1_data import GeneratedData
from pipelines.sample import SampleConfig
from pipelines.sft import SFTConfig
from pipelines.zero import ZeroConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What the dry run's arithmetic assumes where no file says it."""

    architecture: str = ""
    """Of the policy: a preset, or a folder with a config.json; the base's own if empty."""
    student: str = ""
    """The same of the student, or one of r1_cost.DENSE."""
    num_cold_start: int = 0
    """Rows for the cold start; 0 to count them in the file."""
    num_mixture: int = 0
    """Rows for SFT on the mixture and for distillation; 0 for all general ones and all that is sampled."""
    row_tokens: int = 0
    """Tokens of a row of the mixture's completions; 0 for `lengths`."""
    lengths: Lengths = field(default_factory=Lengths)
    """Mean tokens of prompts and completions."""
    machine: Machine = field(default_factory=Machine)
    """What runs it."""


@dataclass(frozen=True, kw_only=True)
class R1Config:
    """`grpo r1`: from a base to a reasoner and a distilled student, DeepSeek-R1's stages (arXiv:2501.12948)."""

    out: str = "runs/r1"
    """Run folder: a folder for each stage, and manifest.json."""
    base: str = ""
    """Folder of the base checkpoint; without it `pretrain` makes one."""
    student: str = ""
    """Folder of the checkpoint that is distilled into; without it `student_pretrain` makes one."""
    general: str = ""
    """File of rows for SFT beside the sampled traces: `question` or `prompt`, and `completion`."""
    eval_tasks: tuple[str, ...] = ()
    """Held-out problems on which every checkpoint is evaluated, each `task[=data]`."""
    engine: Literal["", "vllm", "native"] = ""
    """The kind of all engines, in place of what the sections say."""
    from_stage: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Run this stage and all after it, done or not."""
    only: tuple[str, ...] = ()
    """Run these stages alone, done or not; what they read must be there."""
    skip: tuple[str, ...] = ()
    """Leave these stages out of the chain: what comes after takes what came before."""
    dry_run: bool = False
    """Print the plan and its arithmetic; run nothing, and load no model."""
    generate: GeneratedData = field(default_factory=GeneratedData)
    """Data that the chain makes for itself."""
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(data="", out=""))
    """The base, where none is named."""
    cold_start: SFTConfig = field(default_factory=lambda: SFTConfig(data="", out=""))
    """SFT of the base on readable solutions."""
    reasoning: ZeroConfig = field(default_factory=lambda: ZeroConfig(model=""))
    """RL on reasoning tasks, with language consistency."""
    sampling: SampleConfig = field(default_factory=lambda: SampleConfig(model=""))
    """Completions of that policy, of which the right ones are kept."""
    mixture: SFTConfig = field(default_factory=lambda: SFTConfig(data="", out=""))
    """SFT of the base, anew, on those and on general rows."""
    scenarios: ZeroConfig = field(default_factory=lambda: ZeroConfig(model=""))
    """RL on reasoning and general tasks."""
    student_pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(data="", out=""))
    """The student before distillation, where none is named."""
    distill: SFTConfig = field(default_factory=lambda: SFTConfig(data="", out=""))
    """SFT of the student on the same rows as the mixture's."""
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(model=""))
    """Of every checkpoint; model, task and data are set by the chain."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """For --dry-run."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("no run folder given: add --out")
        if both := set(self.only) & set(self.skip):
            raise ValueError(f"--only and --skip both name {', '.join(sorted(both))}")
        if self.only and self.from_stage:
            raise ValueError("--only runs stages alone, --from runs all after one: give one of them")
