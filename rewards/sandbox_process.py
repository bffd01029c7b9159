"""One sandboxed process: its pipes, its memory watch, its end.

A process here is used for one thing and then killed with everything it started; it is never handed from one program
to the next. `Nursery` keeps some started and waiting, so that starting one costs no time when a program arrives.

Covered: the whole pid namespace is dead when `kill` returns (bubblewrap, unshare), whatever the program did: daemons,
ignored signals, stopped processes. Memory of all processes of a sandbox together, by a look every `WATCH_INTERVAL_S`.
If the grading process dies, its sandboxes die with it.
Not covered: in the rlimits tier a process is alone (strict seccomp); where the filter is missing, a daemon survives.
A program can overshoot the memory limit for one interval.

Usage: `process = nursery.take()`, write to `process.request_fd`, read `process.reply_fd`, then `process.kill()`.
"""

import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rewards.sandbox_launch import RUNNER_DIR, Command, Plan
from rewards.sandbox_limits import SandboxError

WATCH_INTERVAL_S = 0.1
START_TIMEOUT_S = 20.0
_NUM_TRIES = 3  # one that waits may fall to the kernel's out-of-memory killer
READY = b"R"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_FIRST_UID, _NUM_UIDS = 1 << 30, 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """A look at all processes of a sandbox."""

    num_processes: int
    """Processes, without process 1 of the namespace."""
    resident_bytes: int
    """Their resident memory together; shared pages count for each."""
    num_files: int
    """Files in /tmp, 0 where they cannot be counted; each costs memory of the kernel's, whatever its size."""


class SandboxProcess:
    """A started interpreter in its sandbox, waiting for its first message."""

    def __init__(self, popen: subprocess.Popen[bytes], request_fd: int, reply_fd: int, folder: str | None) -> None:
        self.request_fd = request_fd
        """Write end of the pipe that the process reads, or a socket's end for both directions."""
        self.reply_fd = reply_fd
        """Read end of the pipe that the process writes."""
        self.returncode: int | None = None
        """Exit status of the launcher, once it ended: that of the program, 128 + signal if a signal ended it."""
        self._popen = popen
        self._folder = folder
        self._init_pidfd: int | None = None
        self._init_pid: int | None = None

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Return when the interpreter has started; SandboxError if it does not."""
        readable, _, _ = select.select([self.reply_fd], [], [], timeout_s)
        if not readable or os.read(self.reply_fd, 1) != READY or self._popen.poll() is not None:
            self.kill()
            problem = "ended before its use" if readable else f"did not start within {timeout_s} s"
            raise SandboxError(f"a sandbox {problem} (exit status {self.returncode})")
        self._find_init()
        return self

    def _find_init(self) -> None:
        """Get hold of process 1 of the sandbox, the launcher's only child; in the rlimits tier there is none."""
        children = _children(self._popen.pid)
        if children and self._init_pidfd is None:
            try:
                self._init_pidfd = os.pidfd_open(children[0])
            except ProcessLookupError:
                return
            self._init_pid = children[0]

    def usage(self) -> Usage:
        """Look at all processes below the launcher."""
        num_processes = resident = 0
        for pid in self.pids():
            try:
                with open(f"/proc/{pid}/statm", "rb") as file:
                    resident += int(file.read().split()[1]) * _PAGE_BYTES
            except (OSError, IndexError):
                continue  # it ended meanwhile
            num_processes += pid != self._init_pid
        return Usage(num_processes=num_processes, resident_bytes=resident, num_files=self._num_files())

    def _num_files(self) -> int:
        if self._init_pid is None:
            return 0
        try:
            found = os.statvfs(f"/proc/{self._init_pid}/root/tmp")
        except OSError:  # gone, or not ours to look at
            return 0
        return found.f_files - found.f_ffree

    def pids(self) -> list[int]:
        """Process 1 of the namespace and all that run in it, by the host's numbers."""
        found = [self._popen.pid] if self._init_pid is None else [self._init_pid]
        for pid in found:  # grows
            found += _children(pid)
        return found

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status if the program ends by itself within the time."""
        try:
            self.returncode = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return self.returncode

    def kill(self) -> None:
        """End every process of the sandbox and return when they are gone; a second call does nothing."""
        if self._popen.poll() is None:
            self._find_init()
        if self._init_pidfd is not None:
            # Process 1 becomes waitable only when its whole namespace is dead, and the launcher waits for it.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
            select.select([self._init_pidfd], [], [], 5.0)
            os.close(self._init_pidfd)
            self._init_pidfd = None
        elif self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        try:
            self.returncode = self._popen.wait(1.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self.returncode = self._popen.wait()
        for fd in {self.request_fd, self.reply_fd} - {-1}:
            os.close(fd)
        self.request_fd = self.reply_fd = -1
        if self._folder is not None:
            _remove_folder(self._folder)
            self._folder = None


def _children(pid: int) -> list[int]:
    """Direct children of all threads of a process; empty if it is gone."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass
    return found


def _remove_folder(folder: str) -> None:
    for path in Path(folder).iterdir():
        path.unlink(missing_ok=True)
    os.rmdir(folder)


class Launcher:
    """Starts processes of one tier."""

    def __init__(self, command: Command, plan: Plan, *, filter_path: Path | None, is_isolated: bool) -> None:
        self.plan = plan
        self._command = command
        self._filter_path = filter_path
        self._is_isolated = is_isolated
        self._next_uid = secrets.randbelow(_NUM_UIDS)

    def start(self, runner: str, *, stderr: int = subprocess.DEVNULL) -> SandboxProcess:
        """Start the runner of that name on two pipes; it gets the descriptors it reads and writes as arguments.

        The caller's thread must outlive the process: the kernel ties a parent-death signal to the thread that forked.
        """
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        return self._start(runner, (request_read, reply_write), (request_write, reply_read), stderr)

    def start_with_socket(self, runner: str) -> SandboxProcess:
        """Start a runner on one Unix socket, over which descriptors can be sent; else as `start`."""
        inside, outside = socket.socketpair()
        inside_fd, outside_fd = inside.detach(), outside.detach()
        return self._start(runner, (inside_fd, inside_fd), (outside_fd, outside_fd), subprocess.DEVNULL)

    def _start(self, runner: str, inside: tuple[int, int], outside: tuple[int, int], stderr: int) -> SandboxProcess:
        passed, folder = set(inside), None
        arguments = [f"{RUNNER_DIR}/{runner}.pyc", *(str(fd) for fd in inside)]
        command = self._command(self.plan, arguments, self._own_uid())
        environment = {"PATH": f"{os.defpath}:/usr/sbin:/sbin"}
        if self._filter_path is not None:
            filter_fd = os.open(self._filter_path, os.O_RDONLY)
            command[1:1] = ["--seccomp", str(filter_fd)]
            passed.add(filter_fd)
        if not self._is_isolated:
            folder = tempfile.mkdtemp(prefix="code-")
            environment = self.plan.environment() | {"HOME": folder}
        try:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=sorted(passed),
                env=environment, cwd=folder or "/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            for fd in set(outside):
                os.close(fd)
            raise SandboxError(f"cannot start {command[0]}: {error}") from None
        finally:
            for fd in passed:
                os.close(fd)
        return SandboxProcess(popen, *outside, folder)

    def _own_uid(self) -> int | None:
        """A host uid that no other sandbox has: process limits count per uid."""
        if os.getuid() != 0:
            return None
        self._next_uid = (self._next_uid + 1) % _NUM_UIDS
        return _FIRST_UID + self._next_uid


class Nursery:
    """Starts processes on one thread of its own and keeps `num_waiting` of one kind ahead of demand."""

    def __init__(self, start: Callable[[], SandboxProcess], num_waiting: int) -> None:
        self._start = start
        self._num_waiting = num_waiting
        self._waiting: deque[SandboxProcess | SandboxError] = deque()
        self._changed = threading.Condition()
        self._num_wanted = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="sandbox-nursery", daemon=True)
        self._thread.start()

    def take(self) -> SandboxProcess:
        """Return a started process, which the caller kills; wait for one if none is there."""
        for _ in range(_NUM_TRIES - 1):
            try:
                return self._take().wait_until_ready()
            except SandboxError:
                if self._is_closed:
                    raise
        return self._take().wait_until_ready()

    def _take(self) -> SandboxProcess:
        with self._changed:
            self._num_wanted += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._num_wanted -= 1
            if self._is_closed:
                raise SandboxError("the sandbox pool is closed")
            process = self._waiting.popleft()
            self._changed.notify_all()
        if isinstance(process, SandboxError):
            raise process
        return process

    def close(self) -> None:
        """Kill what waits and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or len(self._waiting) < max(self._num_waiting, self._num_wanted)
                )
                if self._is_closed:
                    break
            try:
                process = self._start()
            except SandboxError as error:
                process = error
                time.sleep(0.1)  # a machine out of processes needs no busy loop
            with self._changed:
                self._waiting.append(process)
                self._changed.notify_all()
        # Before this thread ends: that would kill the launchers alone and leave zombies to the host's process 1.
        for process in self._waiting:
            if isinstance(process, SandboxProcess):
                with contextlib.suppress(SandboxError):
                    process.wait_until_ready().kill()
        self._waiting.clear()
