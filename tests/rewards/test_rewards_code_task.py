"""Tasks from rows of the known data sets, comparison of printed output, and what a result is worth."""

import pytest

from rewards.code_cases import same_output
from rewards.code_task import Case, CodeResult, CodeStatus, CodeTask, task_from_row

PROMPT = 'from typing import List\n\ndef add(a, b):\n    """Add."""\n'
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n"


def test_function_rows():
    humaneval = task_from_row({"prompt": PROMPT, "test": CHECK, "entry_point": "add"})
    assert (humaneval.tests, humaneval.entry_point, humaneval.prelude) == (CHECK, "add", PROMPT)
    mbpp = task_from_row(
        {"text": "Add.", "test_list": ["assert f(1) == 1", "assert f(2) == 2"], "test_setup_code": "x = 1"}
    )
    assert mbpp.tests == ("x = 1\nassert f(1) == 1", "x = 1\nassert f(2) == 2")
    assert task_from_row({"tests": CHECK, "entry_point": "add", "prompt": "Add two numbers."}).prelude == ""
    assert task_from_row({"tests": CHECK, "prompt": PROMPT, "prelude": "import math"}).prelude == "import math"
    rllm = task_from_row({"problem": "Add.", "tests": {"functional": CHECK + "check(Solution().add)"}})
    assert rllm.tests == CHECK + "check(Solution().add)"
    apps = task_from_row({"input_output": '{"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}'})
    assert (apps.tests, apps.entry_point) == (("assert f(1, 2) in ([3], 3)",), "f")


@pytest.mark.parametrize(
    "row",
    [
        {"tests": [{"input": "1 2", "output": "3"}]},
        {"tests": {"inputs": ["1 2"], "outputs": ["3"]}},
        {"inputs": ["1 2"], "outputs": ["3"]},
        {"input_output": '{"inputs": ["1 2"], "outputs": ["3"]}'},
        {"test": '[{"input": {"stdin": "1 2"}, "output": {"stdout": "3"}}]'},
    ],
)
def test_stdin_rows(row: dict[str, object]):
    assert task_from_row(row).cases == (Case(stdin="1 2", expected="3"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "neither"),
        ({"tests": []}, "neither"),
        ({"question": "x", "answer": "3"}, "neither"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs, 1 outputs"),
    ],
)
def test_rows_without_tests_are_refused_with_what_was_looked_for(row: dict[str, object], problem: str):
    with pytest.raises(ValueError, match=problem):
        task_from_row(row)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("3\n", "3", True),
        ("3", "3 \n\n", True),
        ("1 2\n3", "1  2\n3\n", True),
        ("1 2\n3", "1 2 3", False),
        ("1\n2", "1", False),
        ("1", "1\n2", False),
        ("", "", True),
        ("", "x", False),
        ("0.5", "0.5000004", True),
        ("0.5", "0.50001", False),
        ("0.5", "1/2", False),
        ("1000000.0", "1000000.9", True),
        ("3", "3.0", False),
        ("3.0", "3", True),
        ("1e-7", "nan", False),
        ("0.5", "inf", False),
        ("YES", "yes", False),
        ("abc 1.0", "abc 1", True),
        ("1.0", "9" * 10_000, False),
    ],
)
def test_same_output(expected: str, printed: str, same: bool):
    assert same_output(expected, printed) is same


def test_value_of_a_result():
    right = CodeResult(status=CodeStatus.OK, num_passed=3, num_tests=3)
    half = CodeResult(status=CodeStatus.WRONG, num_passed=1, num_tests=2)
    broken = CodeResult(status=CodeStatus.ERROR)
    assert [result.value() for result in (right, half, broken)] == [1.0, 0.0, None]
    assert [result.value("fraction") for result in (right, half, broken)] == [1.0, 0.5, None]
    # All asserts that were counted passed, then the program ended: never the full reward.
    ended = CodeResult(status=CodeStatus.CRASH, num_passed=2, num_tests=2)
    assert ended.value("fraction") == pytest.approx(2 / 3)


def test_a_task_has_one_kind_of_tests():
    with pytest.raises(ValueError, match="both"):
        CodeTask(tests="assert f()", cases=(Case(stdin="", expected=""),))
