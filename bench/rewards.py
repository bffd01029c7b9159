"""Our math reward beside Math-Verify: accuracy, false positives, self-equality, perturbed golds, time; and fuzzing.

Usage: `python -m bench.rewards --data shared/data`, `python -m bench.rewards --data shared/data --fuzz 200000`.
The data folder is the one described in its README; nothing is downloaded.
"""

import argparse
import gzip
import json
import random
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.math_mutations import hostile, perturbed
from rewards.math_answer import read_gold
from rewards.math_compare import compare
from rewards.math_pairs import grade_pair

DATA_SETS = {
    "GSM8K": ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz"),
    "MATH": ("math/train.jsonl.gz", "math/test.jsonl.gz"),
    "MATH-500": ("math500/test.jsonl.gz",),
    "AIME 2024": ("aime/aime24.jsonl.gz",),
    "AIME 1983-2023": ("aime/rllm_train_aime_1983_2023.json.gz",),
    "AMC23": ("amc23/test.jsonl.gz",),
}
PERTURBATIONS_PER_GOLD, MATH_VERIFY_SAMPLE, DEADLINE_S = 3, 60, 2.0
Grade = Callable[[str, str, str], bool]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.json` or `.jsonl` file, compressed or not."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return json.loads(text) if ".json." in f"{path.name}." and text.lstrip().startswith("[") else read_lines(text)


def read_lines(text: str) -> list[dict[str, Any]]:
    """One row per line; not `splitlines`, which also splits at Unicode line ends inside strings."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def golds_of(data: Path, name: str) -> list[str]:
    """The usable gold answers of a data set."""
    answers = (str(row["answer"]) for file in DATA_SETS[name] for row in rows_of(data / file))
    return [gold for answer in answers if (gold := read_gold(answer)[0]) is not None]


def ours(gold: str, predicted: str, kind: str) -> bool:
    """Our verdict."""
    return bool(grade_pair(gold, predicted, kind).verdict)


def math_verify() -> Grade | None:
    """Math-Verify with its own alarms, boxes first, golds between dollars; None if it is not installed."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError:
        return None
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def grade(gold: str, predicted: str, kind: str) -> bool:
        text = predicted if kind == "completion" else f"\\boxed{{{predicted}}}"
        parsed_gold = parse(f"${gold}$" if "boxed" not in gold else gold, extraction_config=configs)
        return bool(verify(parsed_gold, parse(text, extraction_config=configs)))

    return grade


def quantiles(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum."""
    ordered = sorted(seconds)
    median, high = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"median {median * 1e6:9.1f} us   p99 {high * 1e3:8.2f} ms   max {ordered[-1] * 1e3:8.1f} ms"


def timed(grade: Grade, pairs: Sequence[tuple[str, str, str]]) -> tuple[list[bool], list[float]]:
    """Verdicts and seconds."""
    verdicts, seconds = [], []
    for pair in pairs:
        started = time.perf_counter()
        verdicts.append(grade(*pair))
        seconds.append(time.perf_counter() - started)
    return verdicts, seconds


def bench_pairs(data: Path, graders: dict[str, Grade]) -> None:
    """Accuracy on the public pairs, by policy and by category."""
    rows = rows_of(data / "math_pairs_dev.jsonl")
    for name, grade in graders.items():
        pairs = [(row["gold"], row["pred"], row["kind"]) for row in rows]
        verdicts, seconds = timed(grade, pairs)
        wrong: dict[str, list[str]] = defaultdict(list)
        for policy in ("strict", "convention"):
            chosen = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row["policy"] == policy]
            right = sum(verdict == row["expect"] for row, verdict in chosen)
            false_positives = sum(verdict and not row["expect"] for row, verdict in chosen)
            print(f"{name:12} pairs, {policy:10} {right}/{len(chosen)} = {right / len(chosen):.3f}", end="   ")
            print(f"false positives {false_positives}, false negatives {len(chosen) - right - false_positives}")
            for row, verdict in chosen:
                if verdict != row["expect"]:
                    wrong[row["category"]].append(row["id"])
        print(f"{name:12} {quantiles(seconds)}")
        print(f"{name:12} wrong: {', '.join(f'{kind} {len(ids)}' for kind, ids in sorted(wrong.items())) or 'none'}\n")


def bench_golds(data: Path, graders: dict[str, Grade], seed: int) -> None:
    """Each gold against itself, and against answers near it that are wrong."""
    for name, grade in graders.items():
        for data_set in DATA_SETS:
            rng = random.Random(seed)
            golds = golds_of(data, data_set)
            if name != "ours":
                golds = rng.sample(golds, min(MATH_VERIFY_SAMPLE, len(golds)))
            same, seconds = timed(grade, [(gold, gold, "answer") for gold in golds])
            near = [(gold, perturbed(gold, rng), "answer") for gold in golds for _ in range(PERTURBATIONS_PER_GOLD)]
            pairs = [(gold, wrong, kind) for gold, wrong, kind in near if wrong is not None]
            accepted, more_seconds = timed(grade, pairs)
            print(f"{name:12} {data_set:15} equal to itself {sum(same)}/{len(same)}", end="   ")
            print(f"perturbed and accepted {sum(accepted)}/{len(pairs)}   {quantiles(seconds + more_seconds)}")
        print()


def fuzz(data: Path, count: int, seed: int) -> None:
    """Random and mutated answers: exceptions end the program, slow ones are counted, memory is printed."""
    rng = random.Random(seed)
    seeds = sorted({gold for name in DATA_SETS for gold in golds_of(data, name)})
    slowest, slowest_pair, late, equal = 0.0, ("", ""), 0, 0
    for index in range(count):
        gold, predicted = (hostile(seeds, rng) if rng.random() < 0.7 else rng.choice(seeds) for _ in range(2))
        if index % 5 == 0:
            predicted = gold + rng.choice(("", ".", " ", "0", "\\"))
        started = time.perf_counter()
        equal += compare(gold, predicted).equal
        seconds = time.perf_counter() - started
        late += seconds > DEADLINE_S
        if seconds > slowest:
            slowest, slowest_pair = seconds, (gold, predicted)
        if (index + 1) % max(1, count // 8) == 0:
            mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"fuzz {index + 1:8} done   {equal} equal   {late} late   slowest {slowest:.3f} s   {mebibytes} MiB")
    print(f"slowest pair: {slowest_pair!r:.300}")


def main() -> None:
    """Run the benchmark or the fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with math_pairs_dev.jsonl and data sets")
    parser.add_argument("--fuzz", type=int, default=0, help="only fuzz, with so many answers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.fuzz:
        fuzz(arguments.data, arguments.fuzz, arguments.seed)
        return
    theirs = math_verify()
    graders: dict[str, Grade] = {"ours": ours} | ({} if theirs is None else {"Math-Verify": theirs})
    if theirs is None:
        print("Math-Verify is not installed: pip install math-verify[antlr4_13_2]")
    bench_pairs(arguments.data, graders)
    bench_golds(arguments.data, graders, arguments.seed)


if __name__ == "__main__":
    main()
