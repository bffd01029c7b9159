"""How many programs a second the code reward grades, and whether right ones pass: over HumanEval, MBPP, LeetCode files.

    python -m bench.code_rewards --humaneval HumanEval.jsonl.gz [--mbpp mbpp.jsonl.gz] [--leetcode LeetCode*.jsonl.gz]
        [--sandbox auto] [--workers 2] [--rounds 3] [--packages DIR]

Prints, per file: right solutions that pass, wrong variants that do (`return None`; answers off by one where they are
numbers), gradings per second. The unit to compare with on a busy machine is printed too: starts per second of
`bwrap ... python -I -S -c pass`, a sandbox that does nothing, with as many threads.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards.code_grade import CodeGrader
from rewards.code_task import CodeResult, CodeTask, task_from_row
from rewards.sandbox_limits import Limits

Program = tuple[str, CodeTask, str]
_NUM_STARTS = 60

_RETURN_NONE = "\n\n{name} = lambda *args, **kwargs: None\n"
_OFF_BY_ONE = """

def {name}(*args, __right={name}, **kwargs):
    value = __right(*args, **kwargs)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, 0] if isinstance(value, (list, tuple)) else None
"""


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            yield json.loads(line)


def humaneval(row: dict[str, Any]) -> Program:
    """A HumanEval row with its canonical solution."""
    return row["task_id"], task_from_row(row), row["prompt"] + row["canonical_solution"]


def mbpp(row: dict[str, Any]) -> Program:
    """An MBPP row with its solution; the entry point is the called name that the solution defines."""
    return f"MBPP/{row['task_id']}", task_from_row(row), row["code"]


def leetcode(row: dict[str, Any]) -> Program:
    """A LeetCodeDataset row with its solution."""
    return row["task_id"], task_from_row(row), row["completion"]


READERS: dict[str, Callable[[dict[str, Any]], Program]] = {"humaneval": humaneval, "mbpp": mbpp, "leetcode": leetcode}


def starts_per_second(num_threads: int) -> float:
    """Empty sandboxes a second; 0 without bubblewrap."""
    if shutil.which("bwrap") is None:
        return 0.0
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--die-with-parent", sys.executable, "-I", "-S", "-c", "pass"]

    def start(_: int) -> None:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    started = time.monotonic()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(start, range(_NUM_STARTS)))
    return _NUM_STARTS / (time.monotonic() - started)


def wrong_variants(programs: list[Program]) -> list[tuple[CodeTask, str]]:
    """Two wrong programs for each task whose entry point is a plain function."""
    variants = []
    for _, task, code in programs:
        if task.entry_point.isidentifier():
            variants += [(task, code + text.format(name=task.entry_point)) for text in (_RETURN_NONE, _OFF_BY_ONE)]
    return variants


def report(title: str, results: list[CodeResult], seconds: float, unit: float) -> None:
    """Print one line."""
    passed = sum(result.value() == 1 for result in results)
    rate = len(results) / seconds
    beside = f", {rate / unit:.2f} of empty sandboxes ({unit:.1f}/s)" if unit else ""
    print(f"{title}: {passed}/{len(results)} pass, {rate:.1f} gradings/s{beside}", flush=True)


def main() -> None:
    """Run what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in READERS:
        parser.add_argument(f"--{name}", type=Path, nargs="*", default=[])
    parser.add_argument("--sandbox", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--timeout", type=float, default=10.0)
    options = parser.parse_args()
    limits = Limits(timeout_s=options.timeout)
    with CodeGrader(options.sandbox, limits=limits, num_workers=options.workers, packages=options.packages) as grader:
        print(grader.description)
        for name, reader in READERS.items():
            for path in getattr(options, name):
                programs = [reader(row) for row in rows_of(path)]
                for _ in range(options.rounds):
                    unit = starts_per_second(options.workers)
                    started = time.monotonic()
                    results = grader.grade_many([(task, code) for _, task, code in programs])
                    report(f"{path.name} right", results, time.monotonic() - started, unit)
                for (task_id, _, _), result in zip(programs, results, strict=True):
                    if result.value() != 1:
                        print(f"  {task_id}: {result.status}, {result.first_failure[:80]} {result.error[:120]}")
                variants = wrong_variants(programs)
                if variants:
                    started = time.monotonic()
                    results = grader.grade_many(variants)
                    report(f"{path.name} wrong variants", results, time.monotonic() - started, 0.0)


if __name__ == "__main__":
    main()
