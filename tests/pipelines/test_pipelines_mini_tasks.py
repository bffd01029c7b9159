"""Countdown-mini and variables.

Pinned: (1) every attempt of a demonstration is worked out and judged as Python does, with each number once; (2) the
reward takes every solution and nothing else; (3) the shares of documents, and how attempts are distributed; (4) the
values of a chain, by an evaluation of the question's own text; (5) distractors have nothing to do with the question,
and no chain deeper than `MAX_SHOWN_DEPTH` is worked out; (6) held-out problems are nowhere else; (7) a true thought is
told from one with any word changed; (8) every word of the documents is one token.
"""

import random
from collections import Counter
from itertools import permutations, product
from typing import Any

import pytest

from pipelines.prompting import build_rubric
from pipelines.r1_mini.stages import VOCABULARY, documents, make_rows, new_tokenizer, problem
from pipelines.tasks import countdown_mini, get_task, variables
from pipelines.templates import R1_PREAMBLE
from rewards import Sample

COUNTDOWN = countdown_mini.make_rows(1500, seed=5)
VARIABLES = variables.make_rows(1500, seed=5, depths=range(1, 7))


def in_python(first: int, steps: list[tuple[str, int]]) -> list[int]:
    """Running results by Python's own evaluation of a bracketed expression."""
    text, results = str(first), []
    for sign, amount in steps:
        text = f"({text}) {'*' if sign == 'x' else sign} {amount}"
        results.append(eval(text))
    return results


def solution_values(numbers: list[int]) -> set[int]:
    """Every value that an order and two operations give within the bounds."""
    values = set()
    for order in permutations(numbers):
        for signs in product("+-x", repeat=2):
            results = in_python(order[0], list(zip(signs, order[1:], strict=True)))
            if all(0 <= result <= 30 for result in results):
                values.add(results[-1])
    return values


def test_targets_are_what_the_numbers_can_make() -> None:
    for row in COUNTDOWN[:100]:
        assert row["target"] in solution_values(row["numbers"])
        assert len(set(row["numbers"])) == 3 and set(row["numbers"]) <= set(range(1, 10))
    (numbers,) = {tuple(COUNTDOWN[0]["numbers"])}
    reached = {results[-1] for results in countdown_mini.outcomes(tuple(sorted(numbers))).values()}
    assert reached == solution_values(list(numbers))


def attempts_of(completion: str) -> list[list[str]]:
    words = completion.partition("<think>")[2].partition("</think>")[0].split()
    assert len(words) % 7 == 0
    return [words[start : start + 7] for start in range(0, len(words), 7)]


def test_every_attempt_is_worked_out_and_judged_rightly() -> None:
    seen = Counter[str]()
    for row, (_, completion) in zip(COUNTDOWN, documents("countdown-mini", COUNTDOWN, random.Random(0)), strict=True):
        for first, second, middle, third, last, target, verdict in attempts_of(completion):
            steps = [(second[0], int(second[1:])), (third[0], int(third[1:]))]
            assert sorted([int(first), steps[0][1], steps[1][1]]) == sorted(row["numbers"])
            assert [int(middle), int(last)] == in_python(int(first), steps)
            assert int(target) == row["target"]
            assert verdict == ("yes" if last == target else "no")
            seen[verdict] += 1
    assert min(seen.values()) > 300, "both verdicts occur often"


def test_the_reward_takes_every_solution_and_nothing_else() -> None:
    for row in COUNTDOWN[:150]:
        solutions = set(countdown_mini.solutions(row))
        assert solutions
        for expression in countdown_mini.outcomes(tuple(sorted(row["numbers"]))):
            sample = Sample(prompt="", completion=f" <think> </think> <answer> {expression} </answer>", row=row)
            assert countdown_mini.countdown_answer.score(sample).value == float(expression in solutions)


@pytest.mark.parametrize(
    "answer",
    [
        "20",
        "4 +8 +8",
        "4 +8",
        "4 +8 +8 +0",
        "20 -0 +0",
        "4+8+8",
        "8 x8 -44",
        "",
        "__import__('os')",
        "4 + 8 + 8",
        "4 +16",
    ],
)
def test_other_numbers_or_forms_do_not_score(answer: str) -> None:
    row = {"question": "", "numbers": [4, 8, 7], "target": 20}
    completion = f" <think> 4 +8 12 +8 20 20 yes </think> <answer> {answer} </answer>"
    assert countdown_mini.countdown_answer.score(Sample(prompt="", completion=completion, row=row)).value == 0


def test_shares_and_lengths_of_the_attempts() -> None:
    rows = countdown_mini.make_rows(8000, seed=1)
    counts = [len(attempts_of(completion)) for _, completion in documents("countdown-mini", rows, random.Random(3))]
    none = sum(count == 0 for count in counts) / len(counts)
    assert abs(none - 0.3) < 5 * (0.3 * 0.7 / len(counts)) ** 0.5
    long = sum(count >= 8 for count in counts) / len(counts)
    assert 0.02 < long < 0.07, "few go on; of the 8% that do, half solve it within seven attempts"
    assert max(counts) == countdown_mini.MAX_ATTEMPTS
    assert 1.2 < sum(count for count in counts if count < 8) / len(counts) < 1.8


def read_question(row: dict[str, Any]) -> tuple[dict[str, tuple[str, str]], str, str, int]:
    words = row["question"].split()
    at = words.index("what")
    assert words[at : at + 2] == ["what", "is"] and words[at + 3] == "if" and words[at + 5] == "is"
    definitions = {words[i + 2]: (words[i], words[i + 1]) for i in range(0, at, 3)}
    assert len(definitions) == at // 3, "no variable is defined twice"
    return definitions, words[at + 2], words[at + 4], int(words[at + 6])


def test_values_of_a_chain_from_the_questions_text() -> None:
    for row in VARIABLES:
        definitions, asked, given, value = read_question(row)
        chain = []
        while asked != given:  # back to what is given
            asked, operation = definitions[asked]
            chain.append(operation)
        assert len(chain) == row["depth"]
        for operation in reversed(chain):
            value = eval(f"({value}) {operation.replace('x', '*')}") % 11
        assert row["answer"] == str(value)
        used = {name for name in row["thought"] if name.isalpha()}
        others = [one for name, (parent, _) in definitions.items() for one in (name, parent) if name not in used]
        assert not set(others) & used


def test_no_deep_chain_is_worked_out() -> None:
    rows = make_rows("variables", 3000, 4, corpus=True)
    depths = Counter[int]()
    for row, (_, completion) in zip(rows, documents("variables", rows, random.Random(0)), strict=True):
        words = completion.partition("<think>")[2].partition("</think>")[0].split()
        assert words == row["thought"][: len(words)]
        depths[row["depth"]] += bool(words)
    assert all(depths[depth] > 300 for depth in (1, 2, 3)) and not any(depths[depth] for depth in (4, 5, 6))


@pytest.mark.parametrize("task", ["countdown-mini", "variables"])
def test_heldout_problems_are_nowhere_else(task: str) -> None:
    heldout = {problem(task, row) for row in make_rows(task, 100, seed=2)}
    others = make_rows(task, 3000, seed=0, exclude=frozenset(heldout), corpus=True)
    assert heldout and not heldout & {problem(task, row) for row in others}


@pytest.mark.parametrize("task", ["countdown-mini", "variables", "ledger"])
def test_every_word_is_one_token(task: str) -> None:
    pairs = documents(task, make_rows(task, 5000, 0, corpus=True), random.Random(0))
    tokenizer = new_tokenizer(pairs)
    assert len(tokenizer) <= VOCABULARY
    for prompt, completion in pairs[-200:]:
        text = prompt + completion
        words = text.removeprefix(R1_PREAMBLE).split()
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(words) + 1


def test_a_true_thought_is_told_from_any_other() -> None:
    row = {"question": "", "numbers": [7, 3, 5], "target": 20}
    words = ["7", "x3", "21", "+5", "26", "20", "no", "7", "-3", "4", "x5", "20", "20", "yes"]
    assert countdown_mini.is_true_thought(words, row)
    for place in range(len(words)):
        for word in ("7", "+5", "yes", "no", "21"):
            changed = [*words[:place], word, *words[place + 1 :]]
            assert changed == words or not countdown_mini.is_true_thought(changed, row)
    assert not countdown_mini.is_true_thought([], row) and not countdown_mini.is_true_thought(words[:-1], row)


@pytest.mark.parametrize("name", ["countdown-mini", "variables"])
def test_a_demonstration_gets_the_full_reward(name: str) -> None:
    task = get_task(name)
    row = (COUNTDOWN if name == "countdown-mini" else VARIABLES)[3]
    if name == "countdown-mini":
        completion = countdown_mini.completion(
            row, [countdown_mini.solutions(row)[0]], countdown_mini.solutions(row)[0]
        )
    else:
        completion = variables.completion(row, 99)
    score = build_rubric((), task).score(Sample(prompt="", completion=completion, row=row))
    assert score.value == pytest.approx(1.1) and task.check(row) is None
