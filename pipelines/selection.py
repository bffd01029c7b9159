"""Which sampled completions are kept for training: the filters of rejection sampling (arXiv:2501.12948, section 2.3.3:
right answers only, no mixed languages, no long paragraphs, no code blocks), each with the reason that it gives.

    selection = select(traces, SelectConfig(per_prompt=2), accuracy="math_answer", seed=0)
    selection.kept, selection.reasons        # traces; trace id -> why not
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pipelines.overlap import Match, Overlap
from pipelines.traces import Trace
from rewards import RewardFunction, Sample, language_consistency, repetition_penalty

Choice = Literal["first", "random", "shortest", "longest", "best"]


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """What a completion must be like to be kept."""

    correct: bool = True
    """Its answer must be right: the task's accuracy reward gives 1."""
    min_reward: float | None = None
    """Least value of the whole rubric; with a task's own rewards 1.1 asks for the form, too."""
    truncated: bool = False
    """Whether completions that the token limit cut may be kept."""
    min_tokens: int = 0
    """Shortest completion."""
    max_tokens: int = 0
    """Longest completion; 0 for no limit but that of sampling."""
    language: str = ""
    """Two-letter code of the language to think and answer in; empty for any. Languages of one script count as one."""
    min_language: float = 0.95
    """Least share of words of that language; completions without words are left alone."""
    max_repetition: float = 1.0
    """Largest share of word n-grams that stand there before; 1 allows all, 0.3 to 0.5 stops loops."""
    repetition_ngram: int = 4
    """Words in those n-grams."""
    code_blocks: bool = True
    """Whether fenced code may stand in the completion."""
    max_paragraph: int = 0
    """Most characters without an empty line; 0 for any number."""
    per_prompt: int = 0
    """Most completions of one prompt, after all other filters; 0 for all."""
    choice: Choice = "random"
    """Which ones then: the first sampled, random ones, the fewest or most tokens, or the highest rewards. `shortest`
    teaches brevity, `random` keeps the lengths as the model has them."""

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_tokens", "max_paragraph", "per_prompt"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.min_language <= 1 or not 0 <= self.max_repetition <= 1:
            raise ValueError(
                f"min_language and max_repetition are shares from 0 to 1, got {self.min_language} and "
                f"{self.max_repetition}"
            )
        _filters(self)  # refuses an unknown language and n-gram now


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What became of the traces."""

    kept: list[Trace]
    """In the order in which they came."""
    reasons: dict[str, str]
    """Trace id -> why it was left out."""
    matches: dict[str, Match]
    """Trace id -> the evaluation text that it shares a passage with."""


def select(
    traces: Iterable[Trace], config: SelectConfig, *, accuracy: str, seed: int, overlap: Overlap | None = None
) -> Selection:
    """Filters traces; those of one prompt must follow each other. The same traces, configuration and seed give the same
    selection, and what becomes of one prompt does not depend on the others.
    """
    filters = _filters(config)
    kept: list[Trace] = []
    reasons: dict[str, str] = {}
    matches: dict[str, Match] = {}
    for prompt_id, group in groupby(traces, key=lambda trace: trace.prompt_id):
        left: list[Trace] = []
        seen: dict[str, str] = {}
        for trace in group:
            reason = _refused(trace, config, accuracy, filters) or _repeated(trace.completion, seen)
            if not reason and overlap:
                found = overlap.find([trace.question, trace.completion], [trace.question])
                if found:
                    reason, matches[trace.id] = "contaminated", found
            if reason:
                reasons[trace.id] = reason
            else:
                left.append(trace)
        chosen = _choose(left, config, random.Random(f"choice {seed} {prompt_id}"))
        kept += chosen
        reasons |= {trace.id: "not_chosen" for trace in left if trace not in chosen}
    return Selection(kept=kept, reasons=reasons, matches=matches)


def _filters(config: SelectConfig) -> dict[str, RewardFunction]:
    filters = {"repetition": repetition_penalty(ngram=config.repetition_ngram, unit="words")}
    if config.language:
        filters["language"] = language_consistency(language=config.language, part="completion")
    return filters


def _refused(trace: Trace, config: SelectConfig, accuracy: str, filters: dict[str, RewardFunction]) -> str | None:
    """The first reason against a trace, looking at it alone."""
    sample = Sample(prompt=trace.prompt, completion=trace.completion)
    if trace.finish_reason not in ("stop", "length"):
        return "failed"
    if trace.finish_reason == "length" and not config.truncated:
        return "truncated"
    if config.correct and trace.metrics.get(accuracy) is None:
        return "unscored"
    if config.correct and trace.metrics[accuracy] < 1:
        return "wrong"
    if config.min_reward is not None and (trace.reward is None or trace.reward < config.min_reward):
        return "low_reward"
    if trace.tokens < config.min_tokens:
        return "short"
    if config.max_tokens and trace.tokens > config.max_tokens:
        return "long"
    if not config.code_blocks and re.search(r"^ {0,3}(```|~~~)", trace.completion, re.MULTILINE):
        return "code_block"
    if config.max_paragraph and max(map(len, re.split(r"\n\s*\n", trace.completion))) > config.max_paragraph:
        return "long_paragraph"
    if config.language:
        share = filters["language"].score(sample)
        if share.info["words"] and (share.value or 0.0) < config.min_language:
            return "language"
    if config.max_repetition < 1 and -(filters["repetition"].score(sample).value or 0.0) > config.max_repetition:
        return "repetition"
    return None


def _repeated(completion: str, seen: dict[str, str]) -> str | None:
    """Whether another completion of the prompt is the same but for letter case and white space."""
    key = "".join(completion.lower().split())
    if key in seen:
        return "duplicate" if completion == seen[key] else "near_duplicate"
    seen[key] = completion
    return None


def _choose(traces: Sequence[Trace], config: SelectConfig, rng: random.Random) -> list[Trace]:
    """At most `per_prompt`, in the order in which they came; ties go to those that came first."""
    if not config.per_prompt or len(traces) <= config.per_prompt:
        return list(traces)
    ranks = {
        "first": lambda trace: 0.0,
        "random": lambda trace: rng.random(),
        "shortest": lambda trace: trace.tokens,
        "longest": lambda trace: -trace.tokens,
        "best": lambda trace: float("inf") if trace.reward is None else -trace.reward,
    }
    chosen = {trace.id for trace in sorted(traces, key=ranks[config.choice])[: config.per_prompt]}
    return [trace for trace in traces if trace.id in chosen]
