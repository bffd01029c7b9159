"""Hostile programs against both isolating tiers: each gets the score it deserves, the host and the grader live on.

The programs are in code_attacks.txt; the few that a text file cannot hold are here. The rlimits tier gets only those
that touch nothing outside their own process.
"""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.code_grade import CodeGrader
from rewards.code_task import Case, CodeStatus, CodeTask
from rewards.sandbox import open_sandbox
from rewards.sandbox_limits import Limits, SandboxError

CHECK = """def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(-5, 7) == 2
    assert candidate(0, 0) == 0
    assert candidate(123456789, 987654321) == 1111111110
    assert candidate(40, 2) == 42
"""
TASK = CodeTask(tests=CHECK, entry_point="add")
PATIENT, IMPATIENT = Limits(timeout_s=20), Limits(timeout_s=1.0, memory_mb=512)


def read_attacks() -> dict[str, list[tuple[str, str, float]]]:
    """Group -> (name, program, score)."""
    text = Path(__file__).with_name("code_attacks.txt").read_text()
    groups: dict[str, list[tuple[str, str, float]]] = {}
    parts: dict[str, str] = {}
    for block in text.split("\n#### ")[1:]:
        header, _, body = block.partition("\n")
        group, name, score = header.split()
        body = re.sub(r"^#include (\w+)$", lambda match: parts[match[1]], body, flags=re.MULTILINE)
        if group == "PART":
            parts[name] = body
        else:
            groups.setdefault(group, []).append((name, body, float(score)))
    groups["SOURCES"] = [
        ("null byte", parts["RIGHT"] + "\0", 0.0),
        ("surrogate", "x = '\ud800'\n" + parts["WRONG"], 0.0),
        ("deep brackets", "(" * 5000 + ")" * 5000, 0.0),
        ("long chain", "x = " + "-" * 200_000 + "1\n" + parts["WRONG"], 0.0),
        ("long comment", "#" + "x" * 900_000 + "\n" + parts["RIGHT"], 1.0),
        ("too long", "#" + "x" * 2_000_000 + "\n" + parts["RIGHT"], 0.0),
        ("empty", " \n", 0.0),
    ]
    return groups


ATTACKS = read_attacks()


@pytest.fixture(scope="module", params=["bubblewrap", "unshare"])
def tier(request: pytest.FixtureRequest) -> str:
    try:
        open_sandbox(request.param, num_waiting=0).close()
    except SandboxError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module")
def impatient(tier: str) -> Iterator[CodeGrader]:
    os.environ["FAKE_SECRET"] = "hunter2"
    with CodeGrader(tier, limits=IMPATIENT, num_workers=4) as grader:
        yield grader
    del os.environ["FAKE_SECRET"]


def unexpected(grader: CodeGrader, group: str) -> dict[str, object]:
    results = grader.grade_many([(TASK, code) for _, code, _ in ATTACKS[group]])
    pairs = zip(ATTACKS[group], results, strict=True)
    return {name: result for (name, _, score), result in pairs if result.value() != score}


def test_file_of_attacks_is_read_whole():
    assert {group: len(programs) for group, programs in ATTACKS.items()} == {
        "CONTROLS": 19, "EXITS": 17, "VALUES": 21, "FORGERIES": 18, "RESOURCES": 23, "CONTAINED": 29, "VANDALISM": 6,
        "SOURCES": 7,
    }  # fmt: skip


@pytest.mark.parametrize("group", ["CONTROLS", "CONTAINED", "SOURCES"])
def test_right_programs_pass_and_find_nothing_to_reach(tier: str, group: str):
    with CodeGrader(tier, limits=PATIENT, num_workers=2) as grader:
        assert unexpected(grader, group) == {}


@pytest.mark.parametrize("group", ["EXITS", "VALUES", "FORGERIES", "VANDALISM"])
def test_wrong_programs_fail(impatient: CodeGrader, group: str):
    assert unexpected(impatient, group) == {}


def test_exhaustion_ends_in_time(impatient: CodeGrader):
    results = impatient.grade_many([(TASK, code) for _, code, _ in ATTACKS["RESOURCES"]])
    names = [name for name, _, _ in ATTACKS["RESOURCES"]]
    found = dict(zip(names, results, strict=True))
    assert {name for name, result in found.items() if result.value() != 0} == set()
    assert {name for name, result in found.items() if result.seconds > IMPATIENT.timeout_s + 2} == set()
    for name in ("loop", "loop_in_call", "catches_all", "ignores_signals", "bigint", "regex", "sleep"):
        assert found[name].status is CodeStatus.TIMEOUT, (name, found[name])


def test_exhaustion_is_named_where_it_is_noticed(tier: str):
    wanted = dict.fromkeys(("memory", "memory_at_once", "memory_of_many"), CodeStatus.OOM)
    wanted |= dict.fromkeys(("fork_bomb", "thread_bomb", "many_files", "large_file"), CodeStatus.CRASH)
    programs = {name: code for name, code, _ in ATTACKS["RESOURCES"] if name in wanted}
    with CodeGrader(tier, limits=PATIENT, num_workers=2) as grader:
        found = grader.grade_many([(TASK, code) for code in programs.values()])
    assert dict(zip(programs, (result.status for result in found), strict=True)) == wanted


def test_nothing_is_left_running(impatient: CodeGrader):
    marker = f"left-{os.getpid()}"
    daemon = f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, {marker.encode()!r})
    if os.fork() == 0:
        time.sleep(3600)
    time.sleep(3600)
def add(a, b):
    time.sleep(0.02)
    return a + b
"""
    assert impatient.grade(TASK, daemon).value() == 1.0
    assert marker[:15] not in processes().values()


def processes() -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
            except OSError:
                continue
    return found


def test_stdin_programs_are_held_by_the_same_limits(impatient: CodeGrader):
    case = Case(stdin="1 2\n", expected="3\n")
    task = CodeTask(cases=(case, case))
    names = ("loop", "ignores_signals", "memory", "memory_of_many", "fork_bomb", "thread_bomb", "output_flood", "disk")
    names += ("kill_all", "kill_parent", "stop_parent", "remove_all", "message_flood")
    programs = {name: code for group in ("RESOURCES", "VANDALISM") for name, code, _ in ATTACKS[group] if name in names}
    results = dict(zip(programs, impatient.grade_many([(task, code) for code in programs.values()]), strict=True))
    assert len(results) == len(names)
    assert {name: result for name, result in results.items() if result.value() != 0} == {}


def test_rlimits_tier_takes_away_network_files_and_processes():
    programs = {
        "fork": "import os; os.fork()\n",
        "exec": "import os; os.execv('/bin/true', ['true'])\n",
        "socket": "import socket; socket.socket()\n",
        "write": "open('x', 'w')\n",
        "signal": "import os; os.kill(os.getpid(), 0)\n",
    }
    right = "def add(a, b):\n    return a + b\n"
    with CodeGrader("rlimits", limits=PATIENT, allow_unsafe_code=True) as grader:
        assert "UNSAFE" in grader.description
        if "no seccomp" in grader.description:
            pytest.skip("no seccomp filter on this machine")
        assert grader.grade(TASK, right).value() == 1.0
        for name, attempt in programs.items():
            result = grader.grade(TASK, attempt + right)
            assert (result.value(), "PermissionError" in result.error) == (0.0, True), (name, result)


def test_server_on_the_host_gets_no_connection(impatient: CodeGrader):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0.1)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\ndef add(a, b): return a + b\n"
        assert impatient.grade(TASK, code).value() == 0.0
        with pytest.raises(TimeoutError):
            server.accept()
