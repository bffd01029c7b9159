"""Tasks from files, few-shot and chat prompts, and the tasks' own examples.

Pinned: (1) a user's file is a task, and what is wrong with one is one line; (2) worked examples are judged right by
their task where it needs no tests, and are shown in the template's form; (3) chat prompts are the tokenizer's own;
(4) rows in verl's and others' forms give bare questions and answers; (5) countdown takes right equations alone.
"""

from pathlib import Path
from typing import Any

import pytest

from pipelines.data import NumberedRow
from pipelines.prompting import build_prompts, build_rubric, task_rows
from pipelines.tasks import TASKS, get_task
from pipelines.tasks.countdown import evaluate
from pipelines.tasks.math_rows import check_row, prepare_row
from pipelines.templates import R1_PREAMBLE, TEMPLATES
from pipelines.tokenizer import train_tokenizer
from rewards import Sample, load_reward
from tests.pipelines.conftest import ROOT, grpo

CUSTOM = str(ROOT / "examples" / "05_custom_task.py")
TOKENIZER = train_tokenizer(["a b c"], 300, [R1_PREAMBLE])
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_file_is_a_task() -> None:
    task = get_task(CUSTOM)
    assert task.name == "backwards" and task.make_rows is not None and task.gold is not None
    row = task.make_rows(1, 0)[0]
    sample = Sample(prompt="", completion=f" <think> so </think> <answer> {task.gold(row)} </answer>", row=row)
    assert build_rubric((), task).score(sample).value == pytest.approx(1.1)
    assert task.check({}) == "needs the fields 'word' and 'answer'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found (from"),
        ("TASK = 5", "has a TASK of type int; write `TASK = Task(...)`"),
        ("x = 1", "has no TASK; write `TASK = Task(...)`"),
        ("import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("from pipelines.tasks import Task\nTASK = Task(name='x')", "cannot be loaded: TypeError: "),
        ("def f(:", "cannot be loaded: SyntaxError: "),
    ],
)
def test_a_wrong_task_file_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "my_task.py"
    if content is not None:
        path.write_text(content)
    error = grpo("eval", "--model", "m", "--task", path).one_line_error()
    assert message in error and path.name in error  # a long path may be broken at the 80th column


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.examples and task.accuracy != "code"])
def test_worked_examples_are_right(name: str) -> None:
    """In their form; an equation of countdown also in what it says."""
    task = get_task(name)
    for example in task.examples:
        assert (
            TEMPLATES["r1"]
            .format("q", [example])
            .startswith(f"{R1_PREAMBLE} User: {example.question} Assistant: <think>")
        )
        sample = Sample(prompt="", completion=example.completion, row={})
        assert load_reward("r1_format").score(sample).value == 1.0
        if name == "countdown":
            equation = example.completion.partition("<answer>")[2].partition("</answer>")[0]
            value, numbers = evaluate(equation)
            shown = example.question.partition("[")[2].partition("]")[0]
            assert numbers == sorted(map(int, shown.split(",")))
            assert f"equals {value}." in example.question


GSM8K_GOLD = (3 * 6 - 5, 2 * 8 + 3 * 8 // 2, 12 * 5 + 20 * 2, (90 - 90 // 3) // 4)


def test_worked_examples_of_gsm8k_have_the_right_results() -> None:
    answers = [example.completion.partition("<answer>")[2] for example in get_task("gsm8k").examples]
    assert [int(answer.removesuffix("</answer>")) for answer in answers] == list(GSM8K_GOLD)


ROW = [NumberedRow(number=1, row={"question": "c?", "answer": "1"})]


def prompt_of(**options: Any) -> str:
    [prompt] = build_prompts(ROW, get_task("gsm8k"), TOKENIZER, max_tokens=5000, report=pytest.fail, **options)
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    return prompt.text


def test_few_shot_prompts() -> None:
    first, second = get_task("gsm8k").examples[:2]
    assert prompt_of(template="plain", shots=2) == (
        f"Question: {first.question}\nAnswer:{first.completion}\n\n"
        f"Question: {second.question}\nAnswer:{second.completion}\n\nQuestion: c?\nAnswer:"
    )
    assert prompt_of(shots=1) == (
        f"{R1_PREAMBLE} User: {first.question} Assistant:{first.completion}\n\n User: c? Assistant:"
    )
    assert prompt_of(template="none") == "c?"
    with pytest.raises(ValueError, match="shots=5: task gsm8k has 4 worked examples"):
        prompt_of(shots=5)


def test_chat_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no chat template; choose another --template"):
        prompt_of(template="chat")
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    example = get_task("gsm8k").examples[0]
    assert prompt_of(template="chat") == "<user>c?\n<assistant>"
    assert prompt_of(template="chat", shots=1) == (
        f"<user>{example.question}\n<assistant>{example.completion.strip()}\n<user>c?\n<assistant>"
    )
    with pytest.raises(ValueError, match=r"unknown template 'chats'; known: none, plain, r1, chat"):
        prompt_of(template="chats")


def verl(content: str, gold: str) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return {"prompt": prompt, "reward_model": {"ground_truth": gold, "style": "rule"}}


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?\n\nRemember to put your "
    'answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (verl(DAPO, "2"), "What is 1+1?", "2"),
        (verl("1+1? Let's think step by step and output the final answer within \\boxed{}.", '["2"]'), "1+1?", "2"),
        ({"problem": "1+1?", "answer": 2.0}, "1+1?", "2"),
        ({"question": "1+1?", "ground_truth": "2.50"}, "1+1?", "2.50"),
        ({"problem": "1+1?", "solution": "It is $\\boxed{\\frac{4}{2}}$."}, "1+1?", "\\frac{4}{2}"),
    ],
)
def test_rows_of_math_in_all_their_forms(row: dict[str, Any], question: str, answer: str) -> None:
    assert check_row(row) is None
    prepared = prepare_row(row)
    assert (prepared["question"], prepared["answer"]) == (question, answer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "2"}, "no text in 'question'"),
        ({"prompt": [{"role": "system", "content": "x"}], "answer": "2"}, "no text in 'question'"),
        ({"problem": "p"}, "no gold answer in"),
        ({"problem": "p", "answer": "..."}, "has no letter or digit"),
        ({"problem": "p", "answer": '["2'}, "begins like a JSON list"),
    ],
)
def test_unusable_rows_of_math(row: dict[str, Any], reason: str) -> None:
    assert reason in (check_row(row) or "")


def test_rows_are_prepared_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"problem": "p", "answer": 27.0}\n')
    [row] = task_rows(get_task("amc23"), str(path), split="", count=0, seed=0, max_bad_share=0, report=pytest.fail)
    assert row.row["question"] == "p" and row.row["answer"] == "27"


@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("(44 - 19) * 2", 1.0),
        ("2 * (44 - 19) = 50", 1.0),
        ("-(19 - 44) * 2", 1.0),
        ("44 - 19 * 2", 0.0),
        ("44 + 6", 0.0),
        ("50", 0.0),
        ("(44 - 19) * 2 * 19 / 19", 0.0),
        ("44 ** 19 ** 2", 0.0),
        ("__import__('os')", 0.0),
        ("44 / (19 - 19) * 2", 0.0),
        ("(" * 150, 0.0),
        ("4" * 500, 0.0),
    ],
)
def test_countdown_takes_right_equations_alone(equation: str, value: float) -> None:
    row = {"nums": [44, 19, 2], "target": 50}
    sample = Sample(prompt="", completion=f"<think>x</think> <answer>{equation}</answer>", row=row)
    score = load_reward("countdown").score(sample)
    assert score.value == value and score.status.value == "ok", score.info
