"""Data for a chain of stages that needs none from elsewhere: the ledger as reasoning, instructions as everything else.

The ledger is thought through in words, and the corpus does so in two languages, often within one thought: what language
consistency, DeepSeek-R1's reward against mixed languages (arXiv:2501.12948 section 2.3.2), is there to mend.

    paths = write_data(GeneratedData(num_documents=20_000), Path("run/data"))
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.presets import TINY
from pipelines.tasks import instructions, ledger
from pipelines.templates import TEMPLATES

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE = ("\u96f6", "\u4e00", "\u4e8c", "\u4e09", "\u56db", "\u4e94", "\u516d", "\u4e03", "\u516b", "\u4e5d")
TASKS = ("ledger", "instructions")
STUDENT = replace(TINY, hidden_size=48, moe_intermediate_size=32, n_routed_experts=4)
"""A third of the teacher's parameters; its vocabulary becomes the teacher's."""


@dataclass(frozen=True, kw_only=True)
class GeneratedData:
    """Data that the chain makes for itself; none with num_documents=0."""

    num_documents: int = 0
    """Texts of the pretraining corpus, three of four about the ledger; 0 where data comes from files."""
    num_cold_start: int = 4_000
    """Worked-out solutions, in English and to the end, for the cold start."""
    num_general: int = 1_000
    """Instructions with the right answer, for the supervised mixture."""
    num_prompts: int = 10_000
    """Problems of each task for RL and sampling."""
    num_heldout: int = 256
    """Problems of each task for evaluation; of the ledger's none occurs elsewhere."""
    seed: int = 0


def thought(row: Mapping[str, Any], depth: int, languages: Sequence[Sequence[str]], rng: random.Random) -> str:
    """The ledger's running results up to step `depth` in words, each in one of the languages; then the answer."""
    shown = row["states"][: depth + 1] if depth else []
    words = "".join(f" {rng.choice(languages)[state]}" for state in shown)
    return f" <think>{words} </think> <answer> {row['answer']} </answer>"


def ledger_documents(rows: Iterable[Mapping[str, Any]], rng: random.Random) -> Iterator[str]:
    """Half think part of the way, the others to the end or not at all; half of the thoughts mix languages."""
    for row in rows:
        draw = rng.random()
        depth = ledger.NUM_STEPS if draw < 0.2 else rng.randrange(1, ledger.NUM_STEPS) if draw < 0.7 else 0
        languages = (ENGLISH,) if rng.random() < 0.5 else (ENGLISH, CHINESE)
        yield TEMPLATES["r1"].format(row["question"]) + thought(row, depth, languages, rng)


def paths(folder: Path) -> dict[str, Path]:
    """What `write_data` writes, by use: corpus, cold_start, general, of each task its prompts and held-out problems,
    and the architecture of a student."""
    names = ["corpus", "cold_start", "general"]
    names += [f"{task}{use}" for task in TASKS for use in ("", "_heldout")]
    return {name: folder / f"{name}.jsonl" for name in names} | {"student": folder / "student" / "config.json"}


def write_data(config: GeneratedData, folder: Path) -> None:
    """JSON lines under `paths(folder)`."""
    rng = random.Random(f"r1 data {config.seed}")
    num_instructions = config.num_documents // 4
    heldout = ledger.make_rows(config.num_heldout, seed=5 * config.seed)
    seen = frozenset(row["question"] for row in heldout)
    corpus_rows, cold_rows, prompts = (
        ledger.make_rows(count, seed=5 * config.seed + number, exclude=seen)
        for number, count in enumerate(
            (config.num_documents - num_instructions, config.num_cold_start, config.num_prompts), 1
        )
    )
    instruction_rows = instructions.make_rows(num_instructions, seed=5 * config.seed)
    general = instructions.make_rows(config.num_general, seed=5 * config.seed + 1)
    corpus = [*ledger_documents(corpus_rows, rng), *instructions.documents(instruction_rows, rng)]
    rng.shuffle(corpus)
    contents: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"text": text} for text in corpus],
        "cold_start": [
            {"question": row["question"], "completion": thought(row, ledger.NUM_STEPS, (ENGLISH,), rng)}
            for row in cold_rows
        ],
        "general": [
            {"question": row["question"], "completion": instructions.completion(row["answer"])} for row in general
        ],
        "ledger": prompts,
        "ledger_heldout": heldout,
        "instructions": instructions.make_rows(config.num_prompts, seed=5 * config.seed + 2),
        "instructions_heldout": instructions.make_rows(config.num_heldout, seed=5 * config.seed + 3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in contents.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths(folder)[name].write_text(text)
    student = paths(folder)["student"]
    student.parent.mkdir(exist_ok=True)
    student.write_text(json.dumps(STUDENT.to_dict(), indent=2) + "\n")
