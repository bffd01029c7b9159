"""From completions to records: what the rewards and the extractors say of each, with all it takes to judge again."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.evaluation.extractors import DEFAULT, read_answer
from pipelines.evaluation.samples import Drawn
from rewards import Rubric, Sample, Score
from rollout.sample import Prompt
from rollout.stream import Key

Record = dict[str, Any]
"""One completion as it stands in records.jsonl; docs/evaluation.md lists the fields."""

_OF_PROMPT = ("id", "prompt_id", "index", "prompt", "prefill", "row")
_OF_COMPLETION = ("completion", "token_ids", "tokens", "finish_reason", "failure", "error", "retries")
_OF_JUDGING = ("reward", "metrics", "info", "status", "extractors")
OWN_FIELDS = (*_OF_PROMPT, *_OF_COMPLETION, *_OF_JUDGING)


def judge(
    prompts: Sequence[Prompt],
    drawn: Mapping[Key, Drawn],
    rubric: Rubric,
    *,
    accuracy: str,
    extractors: Sequence[str] = (),
    about: Callable[[Prompt], dict[str, Any]] = lambda prompt: {},
) -> list[Record]:
    """A record for each completion, in the order of the prompts. What failed is not judged: it has no reward.

    `accuracy` names the reward that the extractor `default` stands for; `about` gives further fields of a record.
    """
    by_prompt: dict[str, list[Drawn]] = {}
    for one in sorted(drawn.values(), key=lambda one: one.index):
        by_prompt.setdefault(one.prompt_id, []).append(one)
    drawn_P = [by_prompt.get(prompt.id, []) for prompt in prompts]
    samples_P = [
        [_sample(prompt, one) for one in of_prompt if not one.failure]
        for prompt, of_prompt in zip(prompts, drawn_P, strict=True)
    ]
    scores_P = rubric.score_groups(samples_P)
    records: list[Record] = []
    for prompt, of_prompt, samples, scores in zip(prompts, drawn_P, samples_P, scores_P, strict=True):
        judged = {sample.index: (sample, score) for sample, score in zip(samples, scores, strict=True)}
        for one in of_prompt:
            sample, score = judged.get(one.index, (None, Score(value=None)))
            record = {
                "id": f"{prompt.id}/{one.index}",
                "prompt_id": prompt.id,
                "index": one.index,
                **about(prompt),
                "prompt": prompt.text,
                "prefill": prompt.prefill,
                "row": dict(prompt.row),
                "completion": one.text,
                **{name: getattr(one, name) for name in _OF_COMPLETION[1:]},
                "reward": score.value,
                "metrics": dict(score.metrics),
                "info": dict(score.info),
                "status": "failed" if one.failure else score.status.value,
            }
            if sample is not None and extractors:
                record["extractors"] = _readings(sample, score, extractors, accuracy)
            records.append(record)
    return records


def _sample(prompt: Prompt, one: Drawn) -> Sample:
    """What the rewards see; text that the prompt forced on the model counts as the model's."""
    return Sample(
        prompt=prompt.text.removesuffix(prompt.prefill),
        completion=prompt.prefill + one.text,
        completion_ids=tuple(one.token_ids),
        finish_reason=one.finish_reason,
        row=prompt.row,
        group_id=prompt.id,
        index=one.index,
    )


def _readings(sample: Sample, score: Score, names: Sequence[str], accuracy: str) -> dict[str, Any]:
    readings: dict[str, Any] = {}
    for name in names:
        if name != DEFAULT:
            reading = read_answer(name, sample)
            readings[name] = None if reading is None else asdict(reading)
        elif accuracy in score.metrics:
            answer = score.info[accuracy].get("extracted")
            readings[name] = {"answer": answer, "right": score.metrics[accuracy] >= 1.0}
        else:
            readings[name] = None
    return readings


def read_records(folder: Path) -> list[Record]:
    """The records of a finished evaluation. Raises FileNotFoundError where there are none, ValueError for others."""
    path = folder / "records.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished evaluation (no records.jsonl)")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        missing = [name for name in (*_OF_PROMPT, *_OF_COMPLETION) if name not in record]
        if missing:
            raise ValueError(f"{path}, line {number}: no record of `grpo eval`, it has no {missing[0]!r}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def completions_of(records: Sequence[Record]) -> tuple[list[Prompt], dict[Key, Drawn]]:
    """What was judged, to be judged again: the inverse of `judge`, up to the prompts' token ids."""
    prompts: dict[str, Prompt] = {}
    drawn: dict[Key, Drawn] = {}
    for record in records:
        name = record["prompt_id"]
        prompts[name] = Prompt(
            id=name, text=record["prompt"], token_ids=[], prefill=record["prefill"], row=record["row"]
        )
        fields = {field: record[field] for field in _OF_COMPLETION[1:]}
        one = Drawn(prompt_id=name, index=record["index"], text=record["completion"], **fields)
        drawn[one.key] = one
    return list(prompts.values()), drawn
