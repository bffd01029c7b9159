"""Choosing a tier: what is refused and said, the self-test against sandboxes with a hole, what outlives the grader."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rewards import sandbox as sandbox_module
from rewards.sandbox import Tier, open_sandbox
from rewards.sandbox_launch import Plan, bubblewrap_command, unshare_command
from rewards.sandbox_limits import Limits, SandboxError
from rewards.sandbox_process import Launcher
from rewards.sandbox_seccomp import build_filter
from rewards.sandbox_selftest import self_test

ROOT = Path(__file__).parents[2]


def needs(tier: str) -> None:
    try:
        open_sandbox(tier, num_waiting=0).close()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tier", ["bubblewrap", "unshare"])
def test_isolating_tiers_pass_their_self_test_and_say_so(tier: str):
    needs(tier)
    with open_sandbox(tier, num_waiting=1) as sandbox:
        identity = "a host uid per program" if os.getuid() == 0 else "a user namespace"
        assert sandbox.description.startswith(f"code sandbox: {tier}, {identity}")
        assert sandbox.tier.is_isolated()


def test_rlimits_needs_the_word_of_the_caller():
    with pytest.raises(SandboxError, match="--allow-unsafe-code"):
        open_sandbox("rlimits")
    with open_sandbox("rlimits", allow_unsafe_code=True, num_waiting=0) as sandbox:
        assert "UNSAFE" in sandbox.description


def test_auto_says_what_it_refused_and_never_falls_to_rlimits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sandbox_module._TOOLS, Tier.BUBBLEWRAP, ("no-such-tool",))
    monkeypatch.setitem(sandbox_module._TOOLS, Tier.UNSHARE, ("none-either",))
    with pytest.raises(SandboxError, match=r"bubblewrap refused: no-such-tool not found; unshare refused.*apt-get"):
        open_sandbox("auto")
    with open_sandbox("auto", allow_unsafe_code=True, num_waiting=0) as sandbox:
        assert "UNSAFE" in sandbox.description and "bubblewrap refused" in sandbox.description


def test_unknown_names_and_limits_are_refused():
    with pytest.raises(ValueError, match="auto, bubblewrap"):
        open_sandbox("docker")
    with pytest.raises(ValueError, match="memory_mb"):
        Limits(memory_mb=10)
    with pytest.raises(ValueError, match="timeout_s"):
        Limits(timeout_s=0)
    with pytest.raises(ValueError, match="packages"):
        Plan(limits=Limits(), runner_dir=Path("x"), packages=Path("no-such-folder"))


def without(*options: str, number: int = 0) -> Callable[[list[str]], list[str]]:
    """Take an option and its arguments out of a command."""

    def cut(command: list[str]) -> list[str]:
        kept, position = [], 0
        while position < len(command):
            if command[position].startswith(options):
                position += number + 1
            else:
                kept.append(command[position])
                position += 1
        return kept

    return cut


HOLES = [
    (without("--nproc"), "processes are not bounded"),
    (without("--as="), "memory is not bounded"),
    (without("--unshare-net"), "the network can be reached"),
    (without("--unshare-pid"), "it sees the host's processes"),
    (without("--size", number=1), "/tmp is not bounded"),
    (without("--clearenv"), "the environment leaks"),
    (without("--seccomp", number=1), "the system call filter is not active"),
    (lambda command: [command[0], "--ro-bind", "/etc", "/etc", *command[1:]], "host files can be read"),
]


@pytest.mark.skipif(os.getuid() != 0, reason="the holes are cut into the command line that root uses")
@pytest.mark.parametrize(("hole", "problem"), HOLES, ids=[problem for _, problem in HOLES])
def test_self_test_finds_the_hole(hole: Callable[[list[str]], list[str]], problem: str, tmp_path: Path):
    needs("bubblewrap")

    def command(plan: Plan, arguments: Sequence[str], uid: int | None) -> list[str]:
        return hole(bubblewrap_command(plan, arguments, uid))

    limits = Limits(memory_mb=256, max_processes=8, tmp_mb=8)
    plan = Plan(limits=limits, runner_dir=tmp_path / "runner")
    sandbox_module._compile_runners(plan.runner_dir)
    filter_path = tmp_path / "filter.bpf"
    filter_path.write_bytes(build_filter() or b"")
    is_filtered = problem != "the system call filter is not active"
    launcher = Launcher(command, plan, filter_path=filter_path if is_filtered else None, is_isolated=True)
    if problem == "the environment leaks":
        launcher = _with_environment(launcher)
    problems = self_test(launcher, is_isolated=True, has_filter=True)
    assert any(found.startswith(problem) for found in problems), problems


def _with_environment(launcher: Launcher) -> Launcher:
    inner = launcher._command

    def command(plan: Plan, arguments: Sequence[str], uid: int | None) -> list[str]:
        return ["env", "SECRET_TOKEN=x", *inner(plan, arguments, uid)]

    launcher._command = command
    launcher._filter_path = None
    return launcher


def test_filter_is_built_for_known_machines_only():
    for machine in ("x86_64", "aarch64"):
        plain, strict = build_filter(machine=machine), build_filter(strict=True, machine=machine)
        assert plain is not None and strict is not None
        assert len(plain) % 8 == len(strict) % 8 == 0 and len(plain) < len(strict) < 8 * 4096
    assert build_filter(machine="riscv64") is None


def test_unshare_keeps_the_shell_as_process_one(tmp_path: Path):
    """The parent-death signal must come after whatever changes the credentials, and the shell must not exec."""
    plan = Plan(limits=Limits(), runner_dir=tmp_path)
    as_root, as_user = unshare_command(plan, ["x"], 1234), unshare_command(plan, ["x"], None)
    assert as_root[:4] == ["setpriv", "--pdeathsig", "KILL", "unshare"]
    assert as_user[:4] == ["unshare", "--user", "--map-root-user", "setpriv"]
    assert as_root[-1].splitlines()[-1] == "exit $?"
    assert "--reuid=1234" in as_root[-1] and "noroot_locked" in as_user[-1]


GRADER = """
import sys
sys.path.insert(0, {root!r})
from rewards.code_grade import CodeGrader
from rewards.code_task import CodeTask
from rewards.sandbox_limits import Limits
code = '''
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(15, {name!r})
for number in signal.valid_signals():
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.fork()
time.sleep(600)
'''
with CodeGrader({tier!r}, limits=Limits(timeout_s=300)) as grader:
    print("ready", flush=True)
    grader.grade(CodeTask(tests="assert f()"), code)
"""


def named(name: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_same = (entry / "comm").read_text().strip() == name
                is_zombie = ") Z " in (entry / "stat").read_text()
            except OSError:
                continue
            if is_same and not is_zombie:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("tier", ["bubblewrap", "unshare"])
def test_programs_die_with_the_grader(tier: str):
    needs(tier)
    name = f"orphan{os.getpid() % 100000}"
    source = GRADER.format(root=str(ROOT), tier=tier, name=name.encode())
    grader = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    assert grader.stdout is not None
    assert grader.stdout.readline() == b"ready\n"
    assert wait_until(lambda: len(named(name)) >= 2), "the program did not start"
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    assert wait_until(lambda: not named(name)), f"still running: {named(name)}"


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("tier", ["bubblewrap", "unshare"])
def test_tiers_work_for_ordinary_users_too(tier: str):
    """With the system's Python: the one that runs the tests may lie in root's home."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or not (ROOT.stat().st_mode & 0o005):
        pytest.skip("no Python that an ordinary user can start")
    version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
    if version.stdout != b"True\n":
        pytest.skip(f"{python} is older than 3.11")
    needs(tier)
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rewards.sandbox import open_sandbox\n"
    source += f"with open_sandbox({tier!r}, num_waiting=0) as sandbox: print(sandbox.description)\n"
    user = ["setpriv", "--reuid=64123", "--regid=64123", "--clear-groups", "env", "-i", "PATH=/usr/bin:/bin", "HOME=/"]
    found = subprocess.run([*user, python, "-B", "-c", source], capture_output=True, text=True, cwd="/")
    if "Operation not permitted" in found.stderr or "user namespace" in found.stderr:
        pytest.skip(f"user namespaces are not for ordinary users here: {found.stderr[-200:]}")
    assert found.stdout.startswith(f"code sandbox: {tier}, a user namespace"), found.stderr
