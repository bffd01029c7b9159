"""The tools that a completion may call.

Pinned: (1) the calculator's arithmetic is Python's; (2) nothing but arithmetic is evaluated, and no expression takes
long, whatever it asks for; (3) a call's form, and what is said to one that is wrong; (4) Python: what is printed,
errors, limits, a flood; (5) a program cannot make an answer that is no text.
"""

import asyncio
import time
from collections.abc import Iterator

import pytest

from rewards.sandbox_limits import Limits
from rollout.environment import Done, Observation
from rollout.tools import PythonTool, ToolError, Tools, calculate, calculator


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2+2", "4"),
        (" 7 // 2 * 3 % 4 ", "1"),
        ("-(3 - 5) ** 3", "8"),
        ("2**-2", "0.25"),
        ("10/4", "2.5"),
        ("6/2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("1_000 * +3", "3000"),
        ("2**1000", str(2**1000)),
        ("1 ** 10**300 + 0 ** 5", "1"),
        ("(-1) ** 10**300", "1"),
        ("9" * 200, "9" * 200),
        ("(10**308)**-(10**308)", "0"),
    ],
)
def test_calculator_computes(text: str, expected: str) -> None:
    assert asyncio.run(calculator(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9**9", "too large"),
        ("(10**300)**(10**300)", "too large"),
        ("(-9)**999999999", "too large"),
        ("10**300 * 10**300", "too large"),
        ("9.9**999", "too large"),
        ("10**309 / 3", "too large"),
        ("1e999", "no finite real number"),
        ("1e308 * 10", "no finite real number"),
        ("1e308 * 10 - 1e308 * 10", "no finite real number"),
        ("(-8) ** 0.5", "no finite real number"),
        ("1 / (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("5 % 0.0", "division by zero"),
        ("(" * 100 + "1" + ")" * 99, "not an expression"),
        ("1" * 201, "at most 200 characters, got 201"),
        ("", "not an expression"),
        ("1 +", "not an expression"),
        ("1\0", "not an expression"),
        ("x = 1", "not an expression"),
        ("import os", "not an expression"),
        ("__import__('os').system('true')", "not supported"),
        ("abs(-1)", "not supported"),
        ("x", "not supported"),
        ("(1).real", "not supported"),
        ("[1][0]", "not supported"),
        ("'a' * 10**9", "not supported"),
        ("b'a'", "not supported"),
        ("1j", "not supported"),
        ("True + 1", "not supported"),
        ("1 << 10**9", "not supported"),
        ("2 ^ 3", "not supported"),
        ("~1", "not supported"),
        ("1 < 2", "not supported"),
        ("1 if 1 else 2", "not supported"),
        ("lambda: 1", "not supported"),
        ("[x for x in (1, 2)]", "not supported"),
        ("f'{1}'", "not supported"),
        ("(a := 1)", "not supported"),
        ("1,000", "not supported"),
        ("...", "not supported"),
    ],
)
def test_calculator_refuses(text: str, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ToolError, match=message):
        calculate(text)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize("text", ["-" * 199 + "1", "(" * 99 + "1" + ")" * 99, "1" + "**1" * 66, "2" + "**2" * 66])
def test_calculator_is_quick_on_deep_expressions(text: str) -> None:
    started = time.perf_counter()
    try:
        assert abs(calculate(text)) == 1
    except ToolError as error:
        assert "too large" in str(error) and text.startswith("2")
    assert time.perf_counter() - started < 0.1


def answer(tools: Tools, text: str) -> str | None:
    """What is answered to a turn; None for the last."""
    step = asyncio.run(tools.step(None, text))
    return step.text if isinstance(step, Observation) else None


def test_the_form_of_a_call() -> None:
    tools = Tools({"calculator": calculator})
    assert answer(tools, 'I compute <tool name="calculator"> 6 * 7 </tool>') == "<result>42</result>"
    assert answer(tools, 'Two tokens <tool name="calculator">1</tool>\n') == "<result>1</result>"
    assert asyncio.run(tools.step(None, "The answer is 42.")) == Done()
    assert asyncio.run(tools.step(None, '<tool name="calculator">6 * 7')) == Done(), "ended by the stop token"
    wrong = {
        '<tool name="calculator">6 *</tool>': "not an expression: 6 *",
        '<tool name="search">6</tool>': "no tool 'search'; there is calculator",
        '<tool name="calculator">1+<tool name="calculator">2</tool>': "not an expression: 1+<tool",
        "<tool name=calculator>6</tool>": 'no call before </tool>; write <tool name="calculator">...</tool>',
        "</tool>": 'no call before </tool>; write <tool name="calculator">...</tool>',
    }
    for call, message in wrong.items():
        got = answer(tools, call)
        assert got is not None and got.startswith(f"<error>{message}") and got.endswith("</error>"), got


@pytest.fixture(scope="module")
def python() -> Iterator[PythonTool]:
    limits = Limits(timeout_s=2.0, memory_mb=256, max_output_bytes=1 << 14)
    with PythonTool(limits=limits, num_workers=2, max_chars=100, allow_unsafe_code=True) as tool:
        yield tool


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(6 * 7)", "<result>42\n</result>"),
        ("\n```python\nfor i in range(3):\n    print(i)\n```\n", "<result>0\n1\n2\n</result>"),
        ("x = 1", "<result></result>"),
        ("print('a')\nraise ValueError('b')", "<error>a\ncrash: ValueError: b</error>"),
        ("print('a')\n1 / 0", "<error>a\ncrash: ZeroDivisionError: division by zero</error>"),
        ("print(", "<error>syntax: SyntaxError: '(' was never closed (solution.py, line 1)</error>"),
        ("print(input())", "<error>crash: EOFError: EOF when reading a line</error>"),
        ("import os; os._exit(3)", "<error>crash: exit status 3</error>"),
        ("print('x' * 101)", f"<result>{'x' * 100}\n[output truncated]\n</result>"),
        ("import os; os.write(1, b'\\xff\\xed\\xa0\\x80')", "<result>" + 4 * "\ufffd" + "</result>"),
    ],
)
def test_python_runs_programs(python: PythonTool, code: str, expected: str) -> None:
    assert answer(Tools({"python": python}), f'<tool name="python">{code}</tool>') == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("while True: pass", "<error>timeout: out of time</error>"),
        ("while True: print('x' * 1000)", f"<error>{'x' * 100}\n[output truncated]\ncrash: OSError"),
        ("x = 'a' * 10**9", "<error>oom: MemoryError</error>"),
    ],
)
def test_python_stops_at_its_limits(python: PythonTool, code: str, expected: str) -> None:
    started = time.perf_counter()
    got = answer(Tools({"python": python}), f'<tool name="python">{code}</tool>')
    assert got is not None and got.startswith(expected), got
    assert time.perf_counter() - started < 10 and len(got) < 300
    assert answer(Tools({"python": python}), '<tool name="python">print(1)</tool>') == "<result>1\n</result>", "goes on"


def test_an_answer_is_text_whatever_a_tool_returns() -> None:
    async def surrogate(text: str) -> str:
        return "\ud800"

    assert answer(Tools({"s": surrogate}), '<tool name="s"></tool>') == "<result>?</result>"
