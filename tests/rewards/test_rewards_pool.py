"""Pins the worker pool.

1. The deadline is wall clock and always holds; what is killed or dies is replaced, and others do not wait for it.
2. It works from threads, asyncio, and forked processes.
3. Nothing is left: not after close, not after the parent is killed, not what a worker had started.
4. Functions travel by name; what cannot is refused before anything runs, with the remedy.
"""

import asyncio
import functools
import math
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.pool import CallStatus, WorkerPool, shared_pool
from rewards.portable import import_file, pack

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
import ctypes, os, subprocess, sys, time

def pid():
    return os.getpid()

def big():
    return len(bytearray(2**30))

def crash():
    ctypes.string_at(0)

def slow_at_first(runs):
    with open(runs, "a") as file:
        print(os.getpid(), file=file)
    if len(open(runs).readlines()) == 1:
        time.sleep(60)
    return "done"

def crash_and_count(crashes):
    with open(crashes, "a") as file:
        file.write("x")
    os._exit(3)

def leave():
    sys.exit("done")

def hang_in_c():
    2 ** (10 ** 10)

def start_child():
    child = subprocess.Popen(["sleep", "60"])
    if len(sys.argv) > 99:
        child.wait()
    open(os.environ["CHILD_PID_FILE"], "w").write(str(child.pid))
    time.sleep(60)

def unreadable():
    return lambda: 1

async def later(seconds):
    import asyncio
    await asyncio.sleep(seconds)
    return "awaited"
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("pool") / "functions.py"
    path.write_text(FUNCTIONS)
    return import_file(path)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, memory_limit_mib=512) as pool:
        pool.start()
        yield pool


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it goes while its file is being read
        return False


def wait_until_gone(*pids: int, limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_result_and_its_time(pool: WorkerPool) -> None:
    outcome = pool.call(math.factorial, 5, timeout_s=5)
    assert (outcome.status, outcome.value, outcome.error) == (CallStatus.OK, 120, "")
    assert 0 < outcome.seconds < 5
    assert pool.call(int, "ff", base=16, timeout_s=5).value == 255
    assert pool.call(functools.partial(operator.add, 1), 2, timeout_s=5).value == 3


def test_an_exception_is_an_outcome_with_its_traceback(pool: WorkerPool) -> None:
    outcome = pool.call(math.factorial, -1, timeout_s=5)
    assert outcome.status is CallStatus.ERROR
    assert "ValueError: factorial() not defined for negative values" in outcome.error


def test_the_deadline_kills_and_the_place_works_on(pool: WorkerPool, functions) -> None:
    for function, args in ((time.sleep, (60,)), (functions.hang_in_c, ())):
        started = time.perf_counter()
        outcome = pool.call(function, *args, timeout_s=0.2)
        assert outcome.status is CallStatus.TIMEOUT
        assert "took longer than 0.2 s" in outcome.error
        assert 0.2 <= outcome.seconds < 1 and time.perf_counter() - started < 2
        assert pool.call(math.factorial, 3, timeout_s=5).value == 6


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("crash", "the worker died"),
        ("big", "MemoryError, limit 512 MiB"),
        ("leave", "SystemExit: done"),
        ("unreadable", "PicklingError|Can't pickle|Can't get local object"),
    ],
)
def test_ways_to_fail(pool: WorkerPool, functions, name: str, error: str) -> None:
    outcome = pool.call(getattr(functions, name), timeout_s=5)
    assert outcome.status is CallStatus.ERROR
    assert any(part in outcome.error for part in error.split("|")), outcome.error
    assert pool.call(math.factorial, 3, timeout_s=5).value == 6


def test_a_worker_that_dies_at_rest_fails_no_call(functions) -> None:
    with WorkerPool(1) as pool:
        os.kill(pool.call(functions.pid, timeout_s=5).value, signal.SIGKILL)
        time.sleep(0.1)
        assert pool.call(math.factorial, 3, timeout_s=5).value == 6


def test_a_call_whose_worker_is_killed_is_begun_again(
    functions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: a function that ends its own process is not run a third time."""
    runs = tmp_path / "runs"
    with WorkerPool(1) as pool, ThreadPoolExecutor(1) as thread:
        call = thread.submit(pool.call, functions.slow_at_first, str(runs), timeout_s=30)
        while not runs.exists() or not runs.read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(int(runs.read_text()), signal.SIGKILL)
        assert call.result().value == "done"
        first, second = map(int, runs.read_text().split())
        assert first != second
        assert [record.message for record in caplog.records if "its call is begun again" in record.message]
        outcome = pool.call(functions.crash_and_count, str(tmp_path / "crashes"), timeout_s=30)
        assert outcome.status is CallStatus.ERROR and outcome.has_died
        assert (tmp_path / "crashes").read_text() == "xx"


def test_a_coroutine_is_run_to_its_end(pool: WorkerPool, functions) -> None:
    assert pool.call(functions.later, 0.01, timeout_s=5).value == "awaited"
    assert pool.call(functions.later, 60, timeout_s=0.2).status is CallStatus.TIMEOUT


def test_others_do_not_wait_for_one_that_hangs(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(2) as threads:
        hanging = threads.submit(pool.call, time.sleep, 60, timeout_s=1.0)
        started = time.perf_counter()
        outcomes = [pool.call(math.factorial, 4, timeout_s=5) for _ in range(50)]
        assert time.perf_counter() - started < 1
        assert {outcome.value for outcome in outcomes} == {24}
        assert hanging.result().status is CallStatus.TIMEOUT


def test_many_threads_get_their_own_results(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda n: pool.call(operator.mul, n, n, timeout_s=5), range(300)))
    assert [outcome.value for outcome in outcomes] == [n * n for n in range(300)]


def test_map_keeps_the_order_around_failures(pool: WorkerPool) -> None:
    outcomes = pool.map(time.sleep, [0, 60, 0, "x", 0], timeout_s=0.3)
    assert [outcome.status.value for outcome in outcomes] == ["ok", "timeout", "ok", "error", "ok"]
    assert pool.map(time.sleep, [], timeout_s=1) == []


def test_from_asyncio(pool: WorkerPool) -> None:
    async def both() -> tuple:
        slow = asyncio.to_thread(pool.call, time.sleep, 60, timeout_s=0.3)
        return await asyncio.gather(slow, asyncio.to_thread(pool.call, math.factorial, 3, timeout_s=5))

    assert [outcome.status.value for outcome in asyncio.run(both())] == ["timeout", "ok"]


def test_large_arguments_and_results(pool: WorkerPool) -> None:
    text = "x" * 5_000_000
    assert pool.call(str.upper, text, timeout_s=20).value == text.upper()


def test_arguments_that_cannot_travel_are_an_error_of_the_call(pool: WorkerPool) -> None:
    outcome = pool.call(len, [threading.Lock()], timeout_s=5)
    assert outcome.status is CallStatus.ERROR
    assert "the arguments:" in outcome.error


def test_functions_that_cannot_travel_are_refused_with_the_remedy(pool: WorkerPool, functions) -> None:
    def inner() -> int:
        return 1

    for function, kind in ((lambda: 1, "is a lambda"), (inner, "defined inside a function")):
        with pytest.raises(ValueError, match=rf"{kind} and cannot be sent .*; define it with `def` at the top level"):
            pool.call(function, timeout_s=1)
    with pytest.raises(ValueError, match="is a lambda"):
        pool.call(functools.partial(lambda x: x, 1), timeout_s=1)
    with pytest.raises(ValueError, match=r"lock.*define it with `def`"):
        pool.call(functools.partial(print, threading.Lock()), timeout_s=1)


def test_functions_of_the_script_that_runs_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from rewards.pool import WorkerPool\n"
        "def f(): return 1\n"
        "try: WorkerPool(1).call(f, timeout_s=1)\n"
        "except ValueError as error: print(error)\n"
    )
    result = run_python(str(script))
    assert "f belongs to the script that runs and cannot be sent to a worker process; define it" in result.stdout


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_a_file_that_changed_is_refused(tmp_path: Path, pool: WorkerPool) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(): return 1\n")
    function = import_file(path).f
    path.write_text("def f(): return 2\n")
    outcome = pool.call(function, timeout_s=5)
    assert outcome.status is CallStatus.ERROR
    assert "has changed since the run loaded it" in outcome.error
    assert pickle.loads(pack(function)) is function, "this process has the module it loaded"


def test_loading_is_not_the_calls_time(tmp_path: Path) -> None:
    path = tmp_path / "slow_import.py"
    path.write_text("import time\ntime.sleep(0.5)\ndef f(): return 1\n")
    function = import_file(path).f
    with WorkerPool(1) as pool:
        outcome = pool.call(function, timeout_s=0.2)
        assert (outcome.status, outcome.value) == (CallStatus.OK, 1) and outcome.seconds < 0.2
    with WorkerPool(1, load_timeout_s=0.2) as pool:
        assert "loading the function took longer than 0.2 s" in pool.call(function, timeout_s=5).error


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="num_workers must be >= 1, got 0"):
        WorkerPool(0)
    with pytest.raises(ValueError, match="memory_limit_mib must be >= 0"):
        WorkerPool(1, memory_limit_mib=-1)
    with WorkerPool(1, preload=["no_such_module"]) as pool:
        with pytest.raises(ValueError, match="preloading no_such_module in the worker server failed"):
            pool.call(len, [], timeout_s=1)
        with pytest.raises(ValueError, match="timeout_s must be > 0, got 0"):
            pool.call(len, [], timeout_s=0)


def test_close_leaves_no_process(functions) -> None:
    pool = WorkerPool(3)
    pool.start()
    pids = {pool.call(functions.pid, timeout_s=5).value for _ in range(3)}
    server = pool._server
    assert server is not None
    pids.add(server._process.pid)
    waiting = threading.Thread(target=pool.call, args=(time.sleep, 60), kwargs={"timeout_s": 30})
    waiting.start()
    time.sleep(0.1)
    pool.close()
    pool.close()
    waiting.join(5)
    assert not waiting.is_alive() and wait_until_gone(*pids)
    with pytest.raises(ValueError, match="closed"):
        pool.call(len, [], timeout_s=1)


def test_what_a_worker_started_dies_with_it(tmp_path: Path, functions, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pid"
    monkeypatch.setenv("CHILD_PID_FILE", str(file))
    with WorkerPool(1) as pool:
        assert pool.call(functions.start_child, timeout_s=1.0).status is CallStatus.TIMEOUT
        assert wait_until_gone(int(file.read_text()))


def test_workers_die_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from rewards.pool import WorkerPool\n"
        "pool = WorkerPool(2); pool.start()\n"
        "print(*[pool.call(os.getpid, timeout_s=5).value for _ in range(2)], pool._server._process.pid, flush=True)\n"
        "pool.call(time.sleep, 60, timeout_s=60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_running, pids))
        parent.send_signal(signal.SIGKILL)
    assert wait_until_gone(*pids)


def test_a_pool_made_in_a_thread_outlives_the_thread(functions) -> None:
    pool = WorkerPool(1)
    maker = threading.Thread(target=pool.start)
    maker.start()
    maker.join()
    time.sleep(0.05)
    pids = {pool.call(functions.pid, timeout_s=5).value for _ in range(3)}
    pool.close()
    assert len(pids) == 1


def test_it_recovers_from_a_dead_server(functions) -> None:
    with WorkerPool(1) as pool:
        pool.start()
        assert pool._server is not None
        pool._server._process.kill()
        pool._server._process.wait()
        outcomes = [pool.call(functions.pid, timeout_s=5) for _ in range(2)]
        assert outcomes[-1].status is CallStatus.OK, outcomes


def test_a_forked_copy_has_processes_of_its_own() -> None:
    script = (
        "import os; from rewards.pool import WorkerPool\n"
        "pool = WorkerPool(1); mine = pool.call(os.getpid, timeout_s=5).value\n"
        "child = os.fork()\n"
        "other = pool.call(os.getpid, timeout_s=5).value\n"
        "if child == 0: pool.close(); os._exit(int(other == mine))\n"
        "assert os.waitpid(child, 0)[1] == 0, 'the copy used its parent\\'s worker'\n"
        "assert other == mine and pool.call(os.getpid, timeout_s=5).value == mine\n"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr


def test_shared_pools_and_copies() -> None:
    assert shared_pool(1) is shared_pool(1)
    assert shared_pool(1) is not shared_pool(2)
    copy = pickle.loads(pickle.dumps(WorkerPool(3, memory_limit_mib=7, preload=["json"])))
    assert (copy.num_workers, copy.memory_limit_mib, copy.preload) == (3, 7, ("json",))
