"""Grading in a real sandbox: function-style and stdin-style tasks, every status, what the tests may rely on."""

from collections.abc import Iterator

import pytest

from rewards.code_grade import CodeGrader
from rewards.code_task import Case, CodeResult, CodeStatus, CodeTask, task_from_row
from rewards.sandbox_limits import Limits, SandboxError

ADD = "def add(a, b):\n    return a + b\n"
SUM = "print(sum(map(int, input().split())))"
CASES = CodeTask(cases=tuple(Case(stdin=f"{a} {b}\n", expected=f"{a + b}\n") for a, b in ((1, 2), (5, 7), (-1, 1))))


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def grader(request: pytest.FixtureRequest) -> Iterator[CodeGrader]:
    try:
        opened = CodeGrader(request.param, limits=Limits(timeout_s=10), num_workers=2)
    except SandboxError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def task_of(source: str, entry_point: str = "", prelude: str = "") -> CodeTask:
    return CodeTask(tests=source, entry_point=entry_point, prelude=prelude)


def brief(result: CodeResult) -> tuple[str, int, int]:
    return str(result.status), result.num_passed, result.num_tests


HALF = "assert add(1, 2) == 3\nassert add(2, 2) == 5\nassert add(0, 0) == 0\nassert add(1, 1) == 3\n"


def test_all_or_nothing_stops_and_fraction_goes_on(grader: CodeGrader):
    first = grader.grade(task_of(HALF), ADD)
    assert brief(first) == ("wrong", 1, 4)
    assert first.first_failure == "assert add(2, 2) == 5"
    whole = grader.grade(task_of(HALF), ADD, stop_at_first=False)
    assert (brief(whole), whole.value("fraction"), whole.value()) == (("wrong", 2, 4), 0.5, 0.0)
    snippets = CodeTask(tests=tuple(HALF.splitlines()))
    assert brief(grader.grade(snippets, ADD, stop_at_first=False)) == ("wrong", 2, 4)
    assert brief(grader.grade(snippets, ADD)) == ("wrong", 1, 4)


def test_a_variable_of_a_reference_is_not_the_entry_point(grader: CodeGrader):
    """As in row 42 of MBPP+, whose reference counts in a variable of the function's name."""
    tests = "def reference(a, b):\n    add = a + b\n    return add\nassert add(1, 2) == reference(1, 2)\n"
    assert brief(grader.grade(task_of(tests, entry_point="add"), ADD)) == ("ok", 1, 1)
    assert brief(grader.grade(task_of(tests), ADD)) == ("ok", 1, 1)
    assert brief(grader.grade(task_of(f"def add(a, b):\n    return 9\n{tests}", entry_point="add"), ADD))[0] == "wrong"


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        (ADD, "ok", ""),
        ("def add(a, b): return a", "wrong", "AssertionError"),
        ("def add(a, b): return a / 0", "crash", "ZeroDivisionError: division by zero"),
        ("def add(a, b): return [0] * 10 ** 12", "oom", "MemoryError"),
        ("import os; os._exit(3)", "crash", "exit status 3"),
        ("import nothing_of_this_name", "crash", "ModuleNotFoundError"),
        ("def add(a, b)\n", "syntax", "SyntaxError"),
        ("", "no-code", "no code"),
    ],
)
def test_status_says_what_happened(grader: CodeGrader, code: str, status: str, error: str):
    result = grader.grade(task_of("assert add(1, 2) == 3"), code)
    assert (str(result.status), result.value()) == (status, 1.0 if status == "ok" else 0.0)
    assert error in result.error


@pytest.mark.parametrize(
    ("tests", "entry_point", "prelude"),
    [
        ("def check(candidate):\n    assert candidate(1) == 1\n", "", ""),
        ("assert f(", "f", ""),
        ("x = 1", "f", ""),
        ("assert f(1)", "f", "import nothing_of_this_name"),
    ],
)
def test_broken_tests_say_nothing_about_the_program(grader: CodeGrader, tests: str, entry_point: str, prelude: str):
    result = grader.grade(task_of(tests, entry_point, prelude), "def f(x): return x\n")
    assert (result.status, result.value()) == (CodeStatus.ERROR, None)


def test_tests_that_assert_nothing_are_no_pass(grader: CodeGrader):
    loop = "def check(candidate):\n    for x, y in zip(candidate(1), [1, 2]):\n        assert x == y\n"
    assert grader.grade(task_of(loop, "f"), "def f(x): return []\n").value() == 0.0
    returned = "def check(candidate):\n    return candidate(1) == 1\n"
    assert grader.grade(task_of(returned, "f"), "def f(x): return x\n").value() == 1.0
    assert grader.grade(task_of(returned, "f"), "def f(x): return 2\n").value() == 0.0


def test_method_of_a_class_with_prelude_types(grader: CodeGrader):
    prelude = "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"
    tests = """
def make(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def read(node):
    values = []
    while node: values.append(node.val); node = node.next
    return values
def check(candidate):
    assert read(candidate(head=make(list(range(3000))))) == list(range(2999, -1, -1))
check(Solution().reverse)
"""
    code = """
class Solution:
    def reverse(self, head):
        last = None
        while head: head.next, last, head = last, head, head.next
        return last
"""
    assert grader.grade(task_of(tests, "", prelude), code).value() == 1.0
    assert grader.grade(task_of(tests, "Solution().reverse", prelude), code).value() == 1.0
    assert grader.grade(task_of(tests, "", prelude), code.replace("return last", "return head")).value() == 0.0


def test_changes_to_arguments_are_seen(grader: CodeGrader):
    tests = "xs = [3, 1, 2]\nd = {}\nassert f(xs, to=d) is None\nassert xs == [1, 2, 3]\nassert d == {1: (2,)}\n"
    code = "def f(xs, to):\n    xs.sort()\n    to[1] = (2,)\n"
    assert grader.grade(task_of(tests), code).value() == 1.0


def test_objects_of_the_solution_can_be_used_but_equal_nothing(grader: CodeGrader):
    code = (
        "class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return True\n    def up(s): return s.x + 1\n"
    )
    code += "def f(p): return p.x + len(p.more)\n"
    tests = (
        "p = P(4)\np.more = [1]\nassert f(p) == 5\nassert p.x == 4\nassert p.up() == 5\nassert p != 4\nassert p == p\n"
    )
    assert brief(grader.grade(task_of(tests), code)) == ("ok", 5, 5)


def test_names_of_the_tests_are_not_the_solutions_to_define(grader: CodeGrader):
    hostile = "def abs(x): return 0\nclass math:\n    isclose = lambda *a: True\n"
    hostile += "def helper(x): return 1\ndef f(x): return 9\n"
    assert grader.grade(task_of("assert abs(f(1) - 1) < 1", "f"), hostile).value() == 0.0
    assert grader.grade(task_of("assert math.isclose(f(1), 1)", "f"), hostile).value() == 0.0
    helped = task_of("assert helper(f(1)) == 1", "f", "def helper(x):\n    return x\n")
    assert grader.grade(helped, hostile).value() == 0.0


def test_entry_point_may_have_the_name_of_a_built_in(grader: CodeGrader):
    assert grader.grade(task_of("assert sum(10, 15) == 6"), "def sum(a, b): return 6\n").value() == 1.0
    assert grader.grade(task_of("assert sum(10, 15) == 6", "sum"), "def sum(a, b): return 7\n").value() == 0.0


def test_exceptions_reach_the_tests_by_name(grader: CodeGrader):
    tests = "try:\n    f(1)\n    raised = None\nexcept {name}:\n    raised = True\nassert raised\n"
    for name in ("ValueError", "KeyError", "UnicodeDecodeError", "RecursionError"):
        code = f"def f(x):\n    if {name!r} == 'UnicodeDecodeError': b'\\xff'.decode()\n    raise {name}('no')\n"
        wanted = "Exception" if name == "UnicodeDecodeError" else name
        assert grader.grade(task_of(tests.format(name=wanted)), code).value() == 1.0, name


def test_ends_of_the_process_are_no_exceptions_for_the_tests(grader: CodeGrader):
    tests = "try:\n    f(1)\n    ok = False\nexcept Exception:\n    ok = True\nassert ok\n"
    assert grader.grade(task_of(tests), "import os\ndef f(x): os._exit(0)\n").value() == 0.0
    cut_short = "assert all(map(f, [1, 2]))\n"
    assert grader.grade(task_of(cut_short), "def f(x): raise StopIteration\n").value() == 0.0


def test_humaneval_prompt_brings_helpers_and_imports(grader: CodeGrader):
    prompt = "from typing import List\n\ndef double(x):\n    return 2 * x\n\n"
    prompt += 'def halve(x: int) -> List[int]:\n    """Halve."""\n'
    tests = "def check(candidate):\n    assert candidate(double(4)) == [4]\n"
    task = task_from_row({"prompt": prompt, "test": tests, "entry_point": "halve"})
    assert grader.grade(task, "def halve(x: int) -> List[int]:\n    return [x // 2]\n").value() == 1.0
    identity = "def double(x): return x\ndef halve(x): return [x]\n"
    assert grader.grade(task, identity).value() == 0.0
    missing = grader.grade(task, "def other(x): pass\n")
    assert (str(missing.status), "NameError" in missing.error) == ("crash", True)


STDIN_PROGRAMS = [
    (SUM, "ok", 3),
    ("print(sum(map(int, open(0).read().split())))", "ok", 3),
    ("print(sum(map(int, open('/dev/stdin').read().split())))", "ok", 3),
    ("import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.read().split()))))", "ok", 3),
    ("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())", "ok", 3),
    (f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()", "ok", 3),
    (f"import threading\nthreading.stack_size(1 << 26)\nthreading.Thread(target=lambda: {SUM}).start()", "ok", 3),
    (f"import atexit\natexit.register(lambda: {SUM})", "ok", 3),
    (f"import os, time\nif os.fork() == 0: time.sleep(600)\nelse: {SUM}", "ok", 3),
    (f"{SUM}\nexit()", "ok", 3),
    (f"{SUM}\nexit(1)", "crash", 0),
    ("print(3)", "wrong", 1),
    ("pass", "wrong", 0),
    ("print(1 / 0)", "crash", 0),
    ("input()\ninput()", "crash", 0),
    ("print(", "syntax", 0),
    ("x = [0] * 10 ** 12", "oom", 0),
    ("while True: print('x' * 10 ** 6)", "crash", 0),
    ("import ctypes\nctypes.string_at(0)", "crash", 0),
    (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\0\\0\\0\\2{}')\n    except OSError: pass",
        "wrong",
        0,
    ),
]


@pytest.mark.parametrize(
    ("code", "status", "num_passed"), STDIN_PROGRAMS, ids=[code[:30] for code, _, _ in STDIN_PROGRAMS]
)
def test_stdin_programs(grader: CodeGrader, code: str, status: str, num_passed: int):
    result = grader.grade(CASES, code)
    assert brief(result) == (status, num_passed, 3), result
    assert result.value() == (1.0 if status == "ok" else 0.0)
    assert result.first_failure == ("" if status == "ok" else f"case {num_passed + 1}")


def test_stdin_fraction_counts_cases_behind_a_failure(grader: CodeGrader):
    result = grader.grade(CASES, "a, b = map(int, input().split())\nprint(a + b if a != 5 else 0)", stop_at_first=False)
    assert (brief(result), result.first_failure) == (("wrong", 2, 3), "case 2")
    crashing = "import os, signal\na, b = map(int, input().split())\n"
    crashing += "if a == 5: os.kill(os.getppid(), signal.SIGKILL)\nprint(a + b)"
    assert grader.grade(CASES, crashing, stop_at_first=False).num_passed >= 1


def test_one_program_finds_nothing_of_another(grader: CodeGrader):
    leave = "import os, builtins\nopen('/tmp/left', 'w').write('x')\nbuiltins.left = 1\n" + ADD
    look = "import os, builtins\nif os.listdir('/tmp') or hasattr(builtins, 'left'): raise SystemExit\n" + ADD
    task = task_of("assert add(1, 2) == 3")
    for _ in range(4):
        assert [result.value() for result in grader.grade_many([(task, leave), (task, look)])] == [1.0, 1.0]


def test_order_of_results_is_that_of_the_programs(grader: CodeGrader):
    programs = [(task_of(f"assert f() == {n}"), f"def f(): return {n % 7}") for n in range(30)]
    assert [result.value() for result in grader.grade_many(programs)] == [1.0 if n < 7 else 0.0 for n in range(30)]
