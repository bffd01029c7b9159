"""The tests of one task as a sequence of counted checks; runs inside the tests' sandbox only.

Three forms: a text that defines `check(candidate)` (HumanEval, LeetCode; a last line `check(...)` names the entry point
and is dropped), a text of statements with asserts, or a list of snippets, each a test of its own (MBPP). In a text
every `assert` is counted as it runs; in "fraction" mode a failed one does not stop those behind it.

Usage: `suite = Suite(tests, entry_point, namespace, stop_at_first=True)`, `suite.bind(names, function)`,
`suite.run(verdict)`.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType
    from typing import Any, Protocol

    class Counter(Protocol):
        """What a suite reports to."""

        num_passed: int
        num_failed: int

        def passed(self) -> None: ...

        def failed(self, test: str, error: BaseException) -> None: ...


_PASSED, _FAILED, _ERROR = "__test_passed__", "__test_failed__", "__test_error__"


class Suite:
    """Parsed tests; SyntaxError or ValueError if there are none in what was given."""

    def __init__(
        self, tests: str | list[str], entry_point: str, namespace: dict[str, Any], *, stop_at_first: bool
    ) -> None:
        self._namespace = namespace
        self._stop_at_first = stop_at_first
        snippets = [tests] if isinstance(tests, str) else tests
        trees = [ast.parse(snippet) for snippet in snippets]
        self.entry_point = entry_point
        self._trees = trees
        if len(trees) == 1 and self._is_check_call(trees[0]):
            call: Any = trees[0].body.pop()
            self.entry_point = self.entry_point or ast.unparse(call.value.args[0])
        self._has_check = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in trees[0].body)
        self._sources = snippets
        asserts = [node for tree in trees for node in _statements(tree) if isinstance(node, ast.Assert)]
        self.num_tests = len(asserts) if len(trees) == 1 else len(trees)
        if not asserts and not self._has_check:
            raise ValueError("the tests hold no assert and no check(candidate)")
        if self._has_check and not self.entry_point:
            raise ValueError("check(candidate) needs an entry_point, the tests name none")

    @staticmethod
    def _is_check_call(tree: ast.Module) -> bool:
        last = tree.body[-1] if tree.body else None
        return (
            isinstance(last, ast.Expr)
            and isinstance(last.value, ast.Call)
            and isinstance(last.value.func, ast.Name)
            and last.value.func.id == "check"
            and len(last.value.args) == 1
        )

    def bind(self, solution_names: set[str], function: Callable[[str], Any]) -> None:
        """Give every name that the tests use and nobody defines a meaning, the solution's being the last resort."""
        nodes = [node for tree in self._trees for node in ast.walk(tree)]
        names = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name))
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        read, bound = _global_names(self._sources)
        entry_name = self.entry_point.split("(")[0].split(".")[0].strip()
        if entry_name and entry_name not in bound:
            self._namespace[entry_name] = function(entry_name)
        free = read - bound - self._namespace.keys()
        unknown = [name for name in names if name in free and name != entry_name]
        num_from_solution = 0
        for name in unknown:
            if hasattr(builtins, name):
                continue
            if name in sys.stdlib_module_names and name not in called:
                self._namespace[name] = __import__(name)
            elif name in solution_names:
                self._namespace[name] = function(name)
                num_from_solution += 1
        if not entry_name and not num_from_solution:  # a task such as `assert sum(10, 15) == 6`
            name = next((name for name in unknown if name in called and name in solution_names), None)
            if name is not None:
                self._namespace[name] = function(name)
        self._candidate = function(self.entry_point) if self._has_check else None

    def run(self, verdict: Counter) -> None:
        """Run the tests in order and report each."""
        if len(self._trees) > 1:
            self._run_snippets(verdict)
            return
        self._namespace[_PASSED] = verdict.passed
        self._namespace[_FAILED] = verdict.failed
        num_failed = verdict.num_failed
        try:
            exec(self._instrumented(), self._namespace)
            if self._has_check:
                answer = self._namespace["check"](self._candidate)
                if answer is False:
                    raise AssertionError("check(candidate) returned False")
                if answer is True:
                    verdict.passed()
            if verdict.num_passed + verdict.num_failed == 0:
                raise AssertionError("no assert was reached")
        except BaseException as error:
            if verdict.num_failed == num_failed:  # raised between two asserts
                verdict.failed(_last_line(error, self._sources[0]), error)

    def _run_snippets(self, verdict: Counter) -> None:
        for tree, source in zip(self._trees, self._sources, strict=True):
            try:
                exec(compile(tree, "tests.py", "exec", dont_inherit=True), dict(self._namespace))
            except BaseException as error:
                verdict.failed(source, error)
                if self._stop_at_first or not isinstance(error, Exception):
                    return
            else:
                verdict.passed()

    def _instrumented(self) -> CodeType:
        tree = _CountAsserts(self._sources[0], self._stop_at_first).visit(self._trees[0])
        return compile(ast.fix_missing_locations(tree), "tests.py", "exec", dont_inherit=True)


class _CountAsserts(ast.NodeTransformer):
    """Wraps every assert so that its outcome is counted."""

    def __init__(self, source: str, stop_at_first: bool) -> None:
        self._source = source
        self._stop_at_first = stop_at_first

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for block in _blocks(node):
            block[:] = [self.visit(statement) for statement in block]
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        text = (ast.get_source_segment(self._source, node) or "assert")[:300]
        template = ast.parse(
            f"try: pass\n"
            f"except BaseException as {_ERROR}:\n"
            f"    {_FAILED}({text!a}, {_ERROR})\n"
            f"    if {self._stop_at_first} or not isinstance({_ERROR}, Exception): raise\n"
            f"else: {_PASSED}()\n"
        ).body[0]
        assert isinstance(template, ast.Try)
        template.body = [node]
        return template


def _blocks(node: ast.AST) -> Iterator[list[ast.AST]]:
    """Lists of statements directly below a node. Expressions are left out: tests may hold megabytes of them."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            yield block


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for block in _blocks(node):
        for statement in block:
            yield statement
            yield from _statements(statement)


def _global_names(sources: list[str]) -> tuple[set[str], set[str]]:
    """The global names that the tests read, in functions too, and those that they define."""
    read: set[str] = set()
    bound: set[str] = set()
    tables = [symtable.symtable(source, "tests.py", "exec") for source in sources]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                read |= {symbol.get_name()} if symbol.is_referenced() else set()
                bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return read, bound


def _last_line(error: BaseException, source: str) -> str:
    """The innermost line of the tests that an exception went through."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            lines = source.splitlines()
            line = lines[trace.tb_lineno - 1].strip() if trace.tb_lineno <= len(lines) else ""
        trace = trace.tb_next
    return line
