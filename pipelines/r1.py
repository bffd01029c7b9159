"""The whole of DeepSeek-R1 (arXiv:2501.12948 section 2.3), from a base to a reasoner and a distilled student.

    grpo r1 --recipe tiny                     # everything in miniature, on a CPU
    grpo r1 --config run.yaml --dry-run       # the plan of a real run: samples, tokens, steps, disk, GPU-hours
    grpo r1 --config run.yaml                 # begins, or goes on where it was stopped

Stages, each a folder of the run: data and base where they are not given; cold-start (SFT on readable solutions);
reasoning (RL with language consistency); sampling (its right completions) and mixture-data (those and general rows);
mixture (SFT of the base, anew); scenarios (RL on all tasks); student-base and distill (the same rows, a smaller model);
an evaluation of every checkpoint on the same problems; report. manifest.py says which of them must run.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.console import console
from pipelines.data import load_rows
from pipelines.evaluate import run_eval
from pipelines.manifest import Manifest, Selection, Stage
from pipelines.mixture import parse_mixture
from pipelines.pretrain import PretrainConfig, run_pretrain
from pipelines.r1_config import R1Config
from pipelines.r1_data import paths, write_data
from pipelines.r1_plan import print_plan
from pipelines.r1_report import write_report
from pipelines.sample import run_sample
from pipelines.sft import SFTConfig, run_sft
from pipelines.sft_data import check_row
from pipelines.tasks import get_task
from pipelines.version import code_version
from pipelines.zero import ZeroConfig, run_zero
from rollout.engine import EngineConfig

OPTIONAL = ("cold-start", "reasoning", "scenarios", "student-base", "distill", "evaluation", "report")
"""Stages that may be left out on their own; evaluation is that of every checkpoint."""
_SET_BY_CHAIN = frozenset(("out", "resume"))
_BETWEEN_PATHS = re.compile(r"[\s*=:,()'\"]+")


def run_r1(config: R1Config) -> Path:
    """The whole of `grpo r1`; the run folder. Raises what a stage raises, ValueError for a chain that lacks data."""
    chain = Chain(config)
    out = Path(config.out)
    if config.dry_run:
        print_plan(config, Manifest(out).plan(chain.stages, chain.selection))
        return out
    with Manifest.open(out, code_version()) as manifest:
        manifest.run(chain.stages, chain.selection, lambda line: console.print(line, style="bold", soft_wrap=True))
    return out


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model of the chain."""

    name: str
    folder: Path


class Chain:
    """The stages that a configuration asks for."""

    def __init__(self, config: R1Config) -> None:
        """Raises ValueError for a stage that is not known, or for data that is needed and not given."""
        self.config, self.out = config, Path(config.out)
        self.stages: list[Stage] = []
        self.checkpoints: list[Checkpoint] = []
        self.data = paths(self.out / "data") if config.generate.num_documents else {}
        if unknown := [name for name in config.skip if name not in OPTIONAL]:
            raise ValueError(f"--skip {unknown[0]}: stages that can be left out are {', '.join(OPTIONAL)}")
        self._build()
        names = [stage.name for stage in self.stages]
        self.selection = Selection(first=config.from_stage, only=config.only)
        self.selection.check(names)

    def _build(self) -> None:
        config = self.config
        if self.data:
            self._add(
                "data", config.generate, (), tuple(self.data.values()),
                lambda folder, _: write_data(config.generate, folder),
            )  # fmt: skip
        base = self._base("base", config.base, config.pretrain)
        policy = base
        if "cold-start" not in config.skip:
            policy = self._sft(
                "cold-start", config.cold_start, policy, self._file("cold_start", config.cold_start.data)
            )
        if "reasoning" not in config.skip:
            policy = self._rl("reasoning", config.reasoning, policy)
        rows = self._mixture_data(policy)
        policy = self._sft("mixture", config.mixture, base, rows)
        if "scenarios" not in config.skip:
            policy = self._rl("scenarios", config.scenarios, policy)
        if "distill" not in config.skip:
            fresh = config.distill.architecture
            student = None if fresh else self._base("student-base", config.student, config.student_pretrain, base)
            self._sft("distill", config.distill, student, rows, tokenizer=policy)
        self._evaluations()

    def _add(
        self, name: str, section: Any, inputs: tuple[Path, ...], outputs: tuple[Path, ...],
        run: Callable[[Path, bool], Any], resumes: bool = False,
    ) -> None:  # fmt: skip
        folder, fields = self.out / name, section if isinstance(section, dict) else asdict(section)
        decides = json.loads(json.dumps({key: value for key, value in fields.items() if key not in _SET_BY_CHAIN}))
        inputs = tuple(dict.fromkeys((*inputs, *named_files(decides))))
        self.stages.append(
            Stage(
                name=name, config=decides, inputs=inputs, folder=folder, outputs=outputs,
                run=lambda resume: run(folder, resume), resumes=resumes,
            )
        )  # fmt: skip

    def _file(self, use: str, given: str | None) -> Path:
        """The user's file, or what the chain generates for that use."""
        if given:
            return Path(given)
        if use not in self.data:
            raise ValueError(
                f"the chain needs data for {use}: name a file in its section, or set generate.num_documents"
            )
        return self.data[use]

    def _base(self, name: str, given: str, section: PretrainConfig, tokenizer: Path | None = None) -> Path:
        """A checkpoint that is given, or a stage that pretrains one, with the tokenizer of another if that is named."""
        model = Path(given) if given else self.out / name / "model"
        self.checkpoints.append(Checkpoint(name=name, folder=model))
        if given:
            return model
        corpus = self._file("corpus", section.data)
        architecture = section.architecture or str(self._file("student", "").parent)
        shape = Path(architecture) / "config.json"
        shared = str(tokenizer) if tokenizer else section.tokenizer
        filled = replace(section, data=str(corpus), architecture=architecture, tokenizer=shared)
        inputs = (*_local((corpus, shape), self.out), *([Path(shared)] if shared else []))
        self._add(name, section, inputs, (model,), lambda *at: run_pretrain(_at(filled, *at)), section.save_every > 0)
        return model

    def _sft(
        self, name: str, section: SFTConfig, start: Path | None, rows: Path, tokenizer: Path | None = None
    ) -> Path:
        """SFT of the checkpoint `start`, or of fresh weights with that tokenizer."""
        model = self.out / name / "model"
        self.checkpoints.append(Checkpoint(name=name, folder=model))
        given = {"model": str(start)} if start else {"tokenizer": str(tokenizer)}

        filled = replace(section, data=str(rows), **given)
        inputs = (*filter(None, [start or tokenizer]), *_local((rows,), self.out))
        self._add(name, section, inputs, (model,), lambda *at: run_sft(_at(filled, *at)), section.save_every > 0)
        return model

    def _rl(self, name: str, section: ZeroConfig, start: Path) -> Path:
        model = self.out / name / "model"
        self.checkpoints.append(Checkpoint(name=name, folder=model))
        section = replace(section, engine=self._engine(section.engine))
        where = {part.task.name: self._task_data(part.task.name, part.data) for part in section.parts()}
        if section.mixture:
            weights = {part.task.name: part.weight for part in section.parts()}
            chosen = {"mixture": tuple(f"{weights[task]}*{task}={data}" for task, data in where.items())}
        else:
            chosen = {"data": where[section.task]}
        filled = replace(section, model=str(start), **chosen)  # type: ignore[arg-type]
        inputs = (start, *_local(tuple(Path(data) for data in where.values() if data), self.out))
        self._add(name, section, inputs, (model,), lambda *at: run_zero(_at(filled, *at)), resumes=True)
        return model

    def _task_data(self, task: str, given: str | None) -> str | None:
        return given or (str(self.data[task]) if task in self.data else None)

    def _mixture_data(self, policy: Path) -> Path:
        """Completions of the policy that are right, and general rows; both are what the base and the student learn."""
        config = self.config
        section = replace(config.sampling, engine=self._engine(config.sampling.engine))
        data = self._task_data(section.task, section.data)
        traces, joined = self.out / "sampling" / "traces.jsonl", self.out / "mixture-data" / "rows.jsonl"

        filled = replace(section, model=str(policy), data=data)
        inputs = (policy, *_local((Path(data),) if data else (), self.out))
        self._add("sampling", section, inputs, (traces,), lambda *at: run_sample(_at(filled, *at)), resumes=True)
        general = self._file("general", config.general)
        both = (traces, general)
        self._add("mixture-data", {}, _local(both, self.out), (joined,), lambda *_: join_rows(both, joined))
        return joined

    def _evaluations(self) -> None:
        config = self.config
        if "evaluation" in config.skip:
            return
        specs = config.eval_tasks or tuple(task.removesuffix("_heldout") for task in self.data if "_heldout" in task)
        parts = [(part.task.name, part.data or self._held_out(part.task.name)) for part in parse_mixture(specs)]
        if not parts:
            raise ValueError("no problems to evaluate on: name them with --eval-tasks task=data, or --skip evaluation")
        results: dict[str, list[Path]] = {}
        section = replace(config.evaluation, engine=self._engine(config.evaluation.engine))
        rewards = {
            task: section.reward or (*get_task(task).rewards, *config.reasoning.extra_reward) for task, _ in parts
        }
        for checkpoint in self.checkpoints:
            name = f"eval-{checkpoint.name}"
            results[checkpoint.name] = [self.out / name / task / "results.json" for task, _ in parts]

            def run(folder: Path, resume: bool, model: Path = checkpoint.folder) -> None:
                for task, data in parts:
                    filled = replace(section, model=str(model), task=task, data=data, reward=rewards[task])
                    run_eval(replace(filled, out=str(folder / task)))

            files = tuple(Path(data) for _, data in parts if data)
            inputs = (checkpoint.folder, *_local(files, self.out))
            decides = asdict(section) | {"tasks": parts_json(parts), "rewards": rewards}
            self._add(name, decides, inputs, tuple(results[checkpoint.name]), run)
        if "report" not in config.skip:
            read = tuple(path for of_checkpoint in results.values() for path in of_checkpoint)
            written = (self.out / "report" / "report.md", self.out / "report" / "report.json")
            self._add("report", {}, read, written, lambda folder, _: write_report(folder, results))

    def _held_out(self, task: str) -> str | None:
        path = self.data.get(f"{task}_heldout")
        return str(path) if path else None

    def _engine(self, section: EngineConfig) -> EngineConfig:
        return replace(section, kind=self.config.engine) if self.config.engine else section


def _at(section: Any, folder: Path, resume: bool) -> Any:
    """The section for a run in that folder, which can go on only if it had begun."""
    return replace(section, out=str(folder), resume=resume and (folder / "config.json").exists())


def parts_json(parts: list[tuple[str, str | None]]) -> list[str]:
    """The tasks; where their data is a file, that is an input and its content counts, not its name."""
    return [task if data and Path(data).suffix else f"{task}={data}" for task, data in parts]


def _local(files: tuple[Path, ...], out: Path) -> tuple[Path, ...]:
    """Those that are files, or will be, and all that a glob stands for: a hub id is none."""
    found = [[path] if path.is_relative_to(out) or path.exists() else sorted(glob.glob(str(path))) for path in files]
    return tuple(Path(path) for of_one in found for path in of_one)


def named_files(values: Any) -> Iterator[Path]:
    """Files and folders in the texts of a configuration, such as those of `0.5*my/rewards.py:short` and
    `reward_model(folder='runs/rm/model')`. A bare word without an ending is a name, though a folder has it, too."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from named_files(value)
    elif isinstance(values, str):
        words = map(Path, _BETWEEN_PATHS.split(values))
        yield from (path for path in words if (path.suffix or len(path.parts) > 1) and path.exists())


def join_rows(sources: tuple[Path, ...], joined: Path) -> None:
    """All rows that SFT can use, one file after the other. Raises ValueError for a file with malformed rows."""
    joined.parent.mkdir(parents=True, exist_ok=True)
    with joined.open("w") as file:
        for source in sources:
            for row in load_rows(str(source), split="train", check=check_row, max_bad_share=0, report=console.print):
                file.write(json.dumps(row.row, ensure_ascii=False) + "\n")
