"""Tasks, templates and prompts.

Pinned: (1) the chain's arithmetic, by an evaluation of the question's own text that shares no code with the task;
(2) rows are distinct, depend on the seed alone and avoid the held-out questions; (3) the demonstrations' shares; (4) a
full demonstration scores 1.0 for its answer and for its form, at every depth, and no other digit does; (5) guessing
gives one in ten; (6) the R1 template ends with " Assistant:"; (7) prompts that do not fit are dropped and counted.
"""

import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pipelines.data import NumberedRow, load_rows
from pipelines.prompting import build_prompts, build_rubric, task_rows
from pipelines.tasks import TASKS, get_task, ledger
from pipelines.templates import R1_PREAMBLE, TEMPLATES, get_template
from pipelines.tokenizer import train_tokenizer
from rewards import Sample, load_reward, math_answer, r1_format, thinking_length
from tests.pipelines.conftest import GSM8K

ROWS = ledger.make_rows(2000, seed=7)


def last_digits(question: str) -> list[int]:
    """The start digit and the running results of a question, read from its text and worked out with big integers."""
    words = re.fullmatch(r"Keep the last digit: start at (\d) then (.*) gives what\?", question)
    assert words is not None
    value = int(words[1])
    states = [value]
    for word in words[2].split():
        sign, amount = word[0], int(word[1:])
        value = value + amount if sign == "+" else value - amount if sign == "-" else value * amount
        states.append(value % 10)  # the value itself is never reduced
    return states


def test_the_arithmetic_of_every_chain() -> None:
    for row in ROWS:
        assert row["states"] == last_digits(row["question"])
        assert len(row["states"]) == 11 and row["answer"] == str(row["states"][-1])


def test_rows_are_distinct_and_depend_on_the_seed_alone() -> None:
    assert len({row["question"] for row in ROWS}) == len(ROWS)
    assert ledger.make_rows(50, seed=7) == ROWS[:50], "a longer list begins with the shorter one"
    assert ledger.make_rows(50, seed=8) != ROWS[:50]


def test_excluded_questions_do_not_come_back() -> None:
    seen = frozenset(row["question"] for row in ROWS[:1000])
    heldout = ledger.make_rows(1000, seed=7, exclude=seen)
    assert not seen & {row["question"] for row in heldout}
    assert heldout == ledger.make_rows(2000, seed=7)[1000:]


def test_guessing_is_right_one_time_in_ten() -> None:
    counts = Counter(row["answer"] for row in ROWS)
    assert set(counts) == set("0123456789") and ledger.GUESSING_FLOOR == 0.1
    # Binomial: 2000 draws of 1/10 have a standard deviation of 13.4; the likeliest digit pays hardly more than any.
    assert all(abs(count - 200) < 5 * 13.4 for count in counts.values())


def test_one_step_alone_does_not_tell_the_answer() -> None:
    """Every operation permutes the ten digits, so an unknown earlier state leaves the answer unknown."""
    for operation in ledger.OPERATIONS:
        assert sorted(ledger.apply(state, operation) for state in range(10)) == list(range(10)), operation


def thought(document: str) -> list[int]:
    inside = re.fullmatch(r".* Assistant: <think>(.*) </think> <answer> \d </answer>", document, re.DOTALL)
    assert inside is not None, document
    return [int(word) for word in inside[1].split()]


def test_shares_of_the_documents() -> None:
    rows = ledger.make_rows(6000, seed=1)
    documents = list(ledger.documents(rows, random.Random(0), share_partial=0.25, share_full=0.08))
    depths = Counter(max(len(thought(document)) - 1, 0) for document in documents)
    assert len(documents) == len(rows)
    for count, share in (
        (depths[0], 0.67),
        (depths[10], 0.08),
        (sum(depths[depth] for depth in range(1, 10)), 0.25),
        *((depths[depth], 0.25 / 9) for depth in range(1, 10)),
    ):
        deviation = (share * (1 - share) * len(rows)) ** 0.5
        assert abs(count - share * len(rows)) < 5 * deviation
    for row, document in zip(rows, documents, strict=True):
        shown = thought(document)
        assert shown == row["states"][: len(shown)], "what is written out is the truth"


@pytest.mark.parametrize("depth", range(11))
def test_the_gold_scores_one_on_its_own_demonstration(depth: int) -> None:
    row = ROWS[depth]
    prompt = TEMPLATES["r1"].format(row["question"])
    completion = ledger.completion(row, depth)
    assert ledger.document(row, depth) == prompt + completion
    sample = Sample(prompt=prompt, completion=completion, row=row)
    assert math_answer.score(sample).value == 1.0
    assert r1_format.score(sample).value == 1.0
    assert thinking_length.score(sample).value == (depth + 1 if depth else 0)
    assert build_rubric((), get_task("ledger")).score(sample).value == pytest.approx(1.1)


def test_no_other_digit_scores() -> None:
    row = ROWS[0]
    for digit in set("0123456789") - {row["answer"]}:
        completion = ledger.completion({**row, "answer": digit}, 10)
        assert math_answer.score(Sample(prompt="", completion=completion, row=row)).value == 0.0


def test_thinking_is_not_rewarded() -> None:
    rubric = build_rubric((), get_task("ledger"))
    values = {
        rubric.score(Sample(prompt="", completion=ledger.completion(ROWS[0], depth), row=ROWS[0])).value
        for depth in range(11)
    }
    assert len(values) == 1


@pytest.mark.parametrize("row", [{}, {"question": "q"}, {"question": "q", "answer": 7}, {"question": 1, "answer": "7"}])
def test_a_ledger_row_needs_question_and_answer(row: dict[str, Any]) -> None:
    reason = get_task("ledger").check(row)
    assert reason is not None and "is missing or not a text" in reason
    assert get_task("ledger").check(ROWS[0]) is None


def test_registries_name_what_they_know() -> None:
    with pytest.raises(ValueError, match=r"^unknown task 'sums'; known: ledger, gsm8k, .*; or a file my_task.py"):
        get_task("sums")
    with pytest.raises(ValueError, match=r"^unknown template 'chat'; known: none, plain, r1$"):
        get_template("chat")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_fits_together(name: str) -> None:
    task = get_task(name)
    assert task.name == name and task.template in TEMPLATES
    rewards = [load_reward(spec) for spec in task.rewards]
    assert task.accuracy in [reward.name for reward in rewards if reward.weight > 0]


def test_the_r1_template() -> None:
    text = TEMPLATES["r1"].format("What is 2 + 2?")
    assert text.startswith(R1_PREAMBLE) and text.endswith(" User: What is 2 + 2? Assistant:")
    assert "<think> reasoning process here </think> <answer> answer here </answer>" in R1_PREAMBLE
    assert TEMPLATES["plain"].format("1?") == "Question: 1?\nAnswer:"


def test_braces_in_a_question_are_text() -> None:
    assert TEMPLATES["r1"].format("{x} %s {0}").endswith(" User: {x} %s {0} Assistant:")


TOKENIZER = train_tokenizer(["a b c"], 300, [R1_PREAMBLE])
TASK = get_task("ledger")


def test_prompts_carry_id_text_tokens_and_row() -> None:
    rows = [NumberedRow(number=n, row={"question": q, "answer": "1"}) for n, q in ((3, "a"), (8, "b"))]
    prompts = build_prompts(rows, TASK, TOKENIZER, max_tokens=100, report=pytest.fail, prefill=" <think>")
    assert [prompt.id for prompt in prompts] == ["ledger-3", "ledger-8"], "the line number of the row"
    assert [prompt.text[len(R1_PREAMBLE) :] for prompt in prompts] == [
        " User: a Assistant: <think>",
        " User: b Assistant: <think>",
    ]
    assert [TOKENIZER.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]
    assert all(prompt.prefill == " <think>" for prompt in prompts) and prompts[1].row == rows[1].row


def test_prompts_that_do_not_fit_are_dropped_and_counted() -> None:
    rows = [NumberedRow(number=n, row={"question": "c" * 10 * n, "answer": "1"}) for n in (1, 2, 3)]
    lengths = [len(p.token_ids) for p in build_prompts(rows, TASK, TOKENIZER, max_tokens=99, report=pytest.fail)]
    reports: list[str] = []
    fitting = build_prompts(rows, TASK, TOKENIZER, max_tokens=lengths[1], report=reports.append)
    assert [prompt.id for prompt in fitting] == ["ledger-1", "ledger-2"]
    assert reports == [f"1 of 3 prompts are longer than {lengths[1]} tokens: left out"]
    with pytest.raises(ValueError, match=f"no prompt fits into {lengths[0] - 1} tokens; raise engine.max_model_len"):
        build_prompts(rows, TASK, TOKENIZER, max_tokens=lengths[0] - 1, report=reports.append)


def rows_of(task_name: str, data: str | None, count: int, **changes: Any) -> list[NumberedRow]:
    task = replace(get_task(task_name), **changes)
    return task_rows(task, data, split="test", count=count, seed=3, max_bad_share=0, report=pytest.fail)


def test_rows_come_from_the_file_then_from_the_generator() -> None:
    whole = load_rows(str(GSM8K), split="test", check=TASK.check, max_bad_share=0, report=pytest.fail)
    assert rows_of("gsm8k", str(GSM8K), 0) == whole
    assert rows_of("gsm8k", str(GSM8K), 3) == whole[:3]
    assert rows_of("ledger", str(GSM8K), 2) == whole[:2], "a file beats the generator"
    settings: dict[str, Any] = {"count": 5, "seed": 3, "max_bad_share": 0, "report": pytest.fail}
    generated = task_rows(get_task("ledger"), None, split="train", **settings)
    assert [row.number for row in generated] == [1, 2, 3, 4, 5]
    assert [row.row for row in generated] == ledger.make_rows(5, seed=3)
    heldout = rows_of("ledger", None, 5)
    assert len(heldout) == 5 and not any(row in generated for row in heldout), "of another split, others"
    assert heldout == rows_of("ledger", None, 5)
    with pytest.raises(ValueError, match="task gsm8k needs --data: a file or a hub id"):
        rows_of("gsm8k", None, 0, default_data=None)
