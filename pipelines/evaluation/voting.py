"""Majority votes among the completions of a problem: cons@k of DeepSeek-R1, maj@k elsewhere (arXiv:2203.11171).

Answers that the verifier holds equal vote together: 1/2, 0.5 and \\frac{1}{2} are one answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from statistics import fmean

Equal = Callable[[str, str], bool]
_MAX_SUBSETS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One completion's."""

    answer: str | None
    """What was extracted; None does not vote."""
    right: bool


def cluster(answers: Sequence[str | None], equal: Equal) -> list[int | None]:
    """The number of each answer's cluster, None for None; an answer joins the first cluster whose first member it
    equals.
    """
    firsts: list[str] = []
    known: dict[str, int] = {}
    for answer in answers:
        if answer is None or answer in known:
            continue
        same = next((number for number, first in enumerate(firsts) if equal(first, answer)), len(firsts))
        known[answer] = same
        if same == len(firsts):
            firsts.append(answer)
    return [None if answer is None else known[answer] for answer in answers]


def consensus(votes: Sequence[Vote], k: int, equal: Equal, seed: str) -> float:
    """Chance that the majority of k of the votes, drawn without replacement, is right. Ties are split evenly; no votes
    at all are wrong.

    Of all subsets of size k if there are no more than 200, else of 200 drawn ones, the same for the same `seed`.
    Raises ValueError for k above the number of votes.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"cons@{k} needs 1 <= k <= samples per problem, got {len(votes)} samples")
    clusters = cluster([vote.answer for vote in votes], equal)
    everyone = range(len(votes))
    if comb(len(votes), k) <= _MAX_SUBSETS:
        subsets = list(combinations(everyone, k))
    else:
        rng = random.Random(f"{seed}/{k}")
        subsets = [tuple(rng.sample(everyone, k)) for _ in range(_MAX_SUBSETS)]
    return fmean(_majority(votes, clusters, subset) for subset in subsets)


def _majority(votes: Sequence[Vote], clusters: Sequence[int | None], subset: Sequence[int]) -> float:
    """Share of the winning clusters that are right; a cluster is as right as its members are on average."""
    members: dict[int, list[bool]] = {}
    for place in subset:
        number = clusters[place]
        if number is not None:
            members.setdefault(number, []).append(votes[place].right)
    most = max(map(len, members.values()), default=0)
    return fmean(fmean(right) for right in members.values() if len(right) == most) if members else 0.0
