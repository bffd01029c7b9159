"""Runs the arms of all seeds, in two processes side by side; what is finished is kept and not run again.

grpo r1-mini --out runs/r1-mini
grpo r1-mini --out runs/r1-mini --arms ledger/base ledger/zero --seeds 0
"""

import json
import os
import resource
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import torch

from pipelines.console import console, progress_bar
from pipelines.r1_mini.arms import Job, arms
from pipelines.r1_mini.effort import EFFORTS
from pipelines.r1_mini.results import write_results


@dataclass(frozen=True, kw_only=True)
class MiniConfig:
    """`grpo r1-mini`: the R1 paper in miniature."""

    out: str = "runs/r1-mini"
    """Folder of the arms' folders and results. Arms whose result is there already are not run again."""
    effort: Literal["full", "toy"] = "full"
    """`full` gives the figures; `toy` shows in seconds that all parts work, and learns nothing."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each repeats everything, data included."""
    arms: tuple[str, ...] = ()
    """Names of the arms to run, with those that they need; all if none is named."""
    workers: int = 2
    """Processes, of one thread each."""

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.seeds:
            raise ValueError(f"need workers >= 1 and a seed, got {self.workers} and {self.seeds}")
        known = arms(EFFORTS[self.effort])
        if unknown := [name for name in self.arms if name not in known]:
            raise ValueError(f"unknown arms {', '.join(unknown)}; known: {', '.join(known)}")


def wanted_arms(config: MiniConfig) -> list[str]:
    """The arms asked for and all that they need, in the table's order."""
    table = arms(EFFORTS[config.effort])
    wanted, unseen = set[str](), list(config.arms or table)
    while unseen:
        if (name := unseen.pop()) not in wanted:
            wanted.add(name)
            unseen += table[name].needs
    return [name for name in table if name in wanted]


def result_path(out: Path, seed: int, name: str) -> Path:
    return out / f"seed-{seed}" / name / "result.json"


def run_arm(out: Path, effort: str, seed: int, name: str) -> dict[str, Any]:
    """Runs one arm in this process and writes its result, with the seconds it took; an unfinished one begins anew."""
    torch.set_num_threads(1)
    console.quiet = True
    path = result_path(out, seed, name)
    rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(parents=True)
    started, before = time.perf_counter(), _cpu_seconds()
    job = Job(effort=EFFORTS[effort], seed=seed, root=out / f"seed-{seed}", name=name)
    numbers = arms(job.effort)[name].run(job)
    numbers |= {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(_cpu_seconds() - before, 1),
    }
    fresh = path.with_name(".result.json.new")
    fresh.write_text(json.dumps(numbers) + "\n")
    fresh.replace(path)
    return numbers


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_r1_mini(config: MiniConfig) -> int:
    """The whole of `grpo r1-mini`. An arm that fails ends the run with its error, when those under way are done."""
    out, table = Path(config.out), arms(EFFORTS[config.effort])
    _check_effort(out, config.effort)
    started = time.perf_counter()
    todo = [(seed, name) for seed in config.seeds for name in wanted_arms(config)]
    done = {one for one in todo if result_path(out, *one).is_file()}
    todo = [one for one in todo if one not in done]
    under_way: dict[Future[dict[str, Any]], tuple[int, str]] = {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the workers start
    workers = ProcessPoolExecutor(config.workers, mp_context=get_context("spawn"))
    with workers, progress_bar("arms", len(todo) + len(done)) as bar:
        bar.advance("finished before", steps=len(done))
        while todo or under_way:
            ready = [(seed, name) for seed, name in todo if all((seed, need) in done for need in table[name].needs)]
            for seed, name in ready[: config.workers - len(under_way)]:
                todo.remove((seed, name))
                under_way[workers.submit(run_arm, out, config.effort, seed, name)] = seed, name
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                seed, name = under_way.pop(future)
                seconds = future.result()["cpu_seconds"]
                done.add((seed, name))
                bar.advance(f"{name}, seed {seed}: {seconds:.0f} s")
    report = write_results(out)
    console.print(f"{time.perf_counter() - started:.0f} s; results {out / 'results.json'}, report {report}")
    return 0


def _check_effort(out: Path, effort: str) -> None:
    """Raises ValueError if the folder holds arms of another effort."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "effort.txt"
    if path.exists() and path.read_text() != effort:
        raise ValueError(f"{out} holds arms of effort {path.read_text()!r}; choose another --out")
    path.write_text(effort)
