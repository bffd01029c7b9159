"""Tools as an environment: a calculator, and Python in the code sandbox.

A call is `<tool name="calculator">2+2</tool>`; it ends the turn and is answered by `<result>4</result>`, or, where the
call is wrong, by `<error>...</error>` that says why. A turn without a call is the completion's last.

    with PythonTool() as python:
        tools = Tools({"calculator": calculator, "python": python})
"""

import ast
import asyncio
import math
import operator
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from rewards.code_cases import CaseRunner
from rewards.code_extract import extract_code
from rewards.code_task import CodeStatus
from rewards.sandbox import open_sandbox
from rewards.sandbox_limits import Limits
from rollout.environment import Done, Observation
from rollout.sample import Prompt

Tool = Callable[[str], Awaitable[str]]
"""What stands between the tags -> the result. Raises ToolError for the caller's mistake."""

_END = "</tool>"
_OPENING = re.compile(r'<tool name="([^"<>]*)">')


class ToolError(Exception):
    """What is wrong with a call, for the policy to read."""


class Tools:
    """Implements `rollout.environment.Environment`; without state."""

    turn_ends: tuple[str, ...] = (_END,)

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        """`tools` by the name that calls them."""
        self._tools = dict(tools)

    def start(self, prompt: Prompt) -> None:
        return None

    async def step(self, state: None, text: str) -> Observation | Done:
        call, end, _ = text.partition(_END)
        if not end:
            return Done()
        try:
            answer = f"<result>{await self._result(call)}</result>"
        except ToolError as error:
            answer = f"<error>{error}</error>"
        return Observation(answer.encode("utf-8", "replace").decode())  # a lone surrogate is no text for a tokenizer

    async def _result(self, call: str) -> str:
        opening = _OPENING.search(call)
        if opening is None:
            raise ToolError(f'no call before {_END}; write <tool name="{next(iter(self._tools))}">...{_END}')
        if opening[1] not in self._tools:
            raise ToolError(f"no tool {opening[1][:100]!r}; there is {', '.join(self._tools)}")
        return await self._tools[opening[1]](call[opening.end() :])


class PythonTool:
    """Runs a program in the code sandbox, each in a new one; its result is what the program prints.

    The program stands between the tags as it is or in a fenced block. A call is wrong where the program raises, or goes
    over a limit. What the sandbox covers: `rewards.code_grade`. SandboxError if it does not work here.
    """

    def __init__(
        self,
        sandbox: str = "auto",
        *,
        limits: Limits | None = None,
        num_workers: int | None = None,
        max_chars: int = 2000,
        allow_unsafe_code: bool = False,
    ) -> None:
        """`num_workers` programs run at a time, others wait; `max_chars` bounds the printed text that is shown."""
        num_workers = num_workers or len(os.sched_getaffinity(0))
        self._limits = limits or Limits(memory_mb=512, max_output_bytes=1 << 16)
        self._sandbox = open_sandbox(
            sandbox, limits=self._limits, allow_unsafe_code=allow_unsafe_code, num_waiting=num_workers
        )
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="python-tool")
        self._max_chars = max_chars

    async def __call__(self, text: str) -> str:
        code = extract_code(text).code or text.strip("\n") + "\n"
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, code)

    def _run(self, code: str) -> str:
        runner = CaseRunner(self._sandbox.solutions, self._limits, code)
        try:
            output = runner.execute(stdin="", deadline=math.inf)
        finally:
            runner.close()
        printed = output.printed
        if len(printed) > self._max_chars:
            printed = f"{printed[: self._max_chars]}\n[output truncated]\n"
        if output.status is CodeStatus.OK:
            return printed
        raise ToolError(f"{printed}{output.status}: {output.error}")

    def close(self) -> None:
        """Waits for what runs, then kills the sandboxes that wait."""
        self._threads.shutdown(cancel_futures=True)
        self._sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Number = int | float
_MAX_CHARS, _MAX_BITS = 200, 1024
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


async def calculator(text: str) -> str:
    """The value of an expression in Python's notation, see `calculate`; 12 digits of a fraction."""
    value = calculate(text.strip())
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def calculate(text: str) -> Number:
    """Evaluates numbers, parentheses and + - * / // % **.

    Raises ToolError for anything else, and where a value on the way is no real number, or is an integer of more than
    1024 bits. Those bounds and that of the text's length bound the time, whatever is asked.
    """
    if len(text) > _MAX_CHARS:
        raise ToolError(f"an expression has at most {_MAX_CHARS} characters, got {len(text)}")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last is the parser's word for too deep
        raise ToolError(f"not an expression: {text}") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _combined(type(op), _value(left), _value(right))
        case _:
            raise ToolError(f"{ast.unparse(node)} is not supported; use numbers, parentheses and + - * / // % **")
    # isfinite raises OverflowError for an integer that no float could hold, which is one of more than 1024 bits.
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ToolError(f"the value of {ast.unparse(node)} is no finite real number")
    return value


def _combined(op: type[ast.operator], left: Number, right: Number) -> Number:
    # Everything else is quick for numbers of bounded size.
    if op is ast.Pow and isinstance(left, int) and isinstance(right, int):
        least_bits = (left.bit_length() - 1) * right
        if least_bits > _MAX_BITS:
            raise ToolError("the result is too large")
    return _BINARY[op](left, right)
