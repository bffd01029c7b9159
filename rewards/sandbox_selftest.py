"""Proving that a tier holds on this machine, before it is trusted with anything.

A probe runs in a real sandbox and tries what must fail (see `rewards.sandbox_probe`); its own report is believed,
since it is ours. Takes about a quarter of a second.

Usage: `problems = self_test(launcher, is_isolated=True)`; empty means that the tier holds.
"""

import os
import select
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rewards.code_codec import receive, send
from rewards.sandbox_launch import PACKAGES_DIR, RUNNER_DIR
from rewards.sandbox_limits import SandboxError
from rewards.sandbox_process import Launcher, SandboxProcess

_PROBE_TIMEOUT_S = 20.0
_Check = tuple[str, Callable[[dict[str, Any]], bool]]


def _is_refused(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda report: bool(report[name])


_CHECKS_OF_ALL: tuple[_Check, ...] = (
    ("memory is not bounded", lambda report: report["allocate"] == "MemoryError"),
    ("the network can be reached", _is_refused("connect")),
    ("it can write outside /tmp", lambda report: all(report["write_outside"])),
    ("it can change its root", _is_refused("chroot")),
)
_CHECKS_OF_ISOLATED: tuple[_Check, ...] = (
    ("host files can be read", lambda report: all(report["read_host"] + report["list_host"])),
    ("it can become root", lambda report: report["uid"] == 0 or bool(report["become_root"])),
    ("/tmp is not bounded", lambda report: report["tmp_mb"] <= report["limits"].tmp_mb),
    ("processes are not bounded", lambda report: report["num_forked"] <= report["limits"].max_processes + 2),
    ("it sees the host's processes", lambda report: report["pid"] not in report["host_pids"]),
    ("a daemon survived its end", lambda report: not report["survivors"]),
    ("processes cannot be watched", lambda report: len(report["host_pids"]) >= 2),
)
_CHECKS_OF_FILTER: tuple[_Check, ...] = (
    ("the system call filter is not active", _is_refused("memfd")),
    ("vsock can be reached", _is_refused("vsock")),
)
_CHECKS_OF_STRICT: tuple[_Check, ...] = (("it can fork", lambda report: report["num_forked"] == 0),)


def self_test(launcher: Launcher, *, is_isolated: bool, has_filter: bool) -> list[str]:
    """Return what does not hold, in words; empty if all does."""
    try:
        report = _probe(launcher)
    except (SandboxError, OSError, EOFError, ValueError) as error:
        return [str(error) or type(error).__name__]
    checks = [*_CHECKS_OF_ALL, *(_CHECKS_OF_ISOLATED if is_isolated else _CHECKS_OF_STRICT if has_filter else ())]
    checks += _CHECKS_OF_FILTER if has_filter else ()
    problems = [problem for problem, holds in checks if not holds(report)]
    allowed = {*launcher.plan.environment(), "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
    if not allowed.issuperset(report["environment"]):
        problems.append(f"the environment leaks {sorted(set(report['environment']) - allowed)}")
    return problems


def _probe(launcher: Launcher) -> dict[str, Any]:
    limits = launcher.plan.limits
    process = launcher.start("sandbox_probe")
    with tempfile.NamedTemporaryFile(prefix="host-") as host_file, socket.create_server(("127.0.0.1", 0)) as server:
        try:
            process.wait_until_ready()
            order = {
                "memory_mb": limits.memory_mb,
                "max_processes": limits.max_processes,
                "tmp_mb": limits.tmp_mb,
                "port": server.getsockname()[1],
                "host_files": [host_file.name, "/etc/passwd"],
                "host_folders": _host_folders(launcher),
                "folders": ["", "/dev", "/py", "/usr/lib", RUNNER_DIR, PACKAGES_DIR, "/var/tmp"],
            }
            send(process.request_fd, order)
            report = _receive(process)
            host_pids = process.pids()
        finally:
            process.kill()
    survivors = [pid for pid in host_pids if _is_alive(pid)]
    return report | {"limits": limits, "host_pids": host_pids, "survivors": survivors}


def _host_folders(launcher: Launcher) -> list[str]:
    """Folders of the host that a sandbox has none of the same name of."""
    home = os.path.expanduser("~")
    return [str(launcher.plan.runner_dir.parent), "/etc", *([] if home in ("/", "/tmp", "~") else [home])]


def _receive(process: SandboxProcess) -> dict[str, Any]:
    readable, _, _ = select.select([process.reply_fd], [], [], _PROBE_TIMEOUT_S)
    if not readable:
        raise SandboxError(f"the probe did not answer within {_PROBE_TIMEOUT_S} s")
    return receive(process.reply_fd)


def _is_alive(pid: int) -> bool:
    for _ in range(10):
        if not os.path.exists(f"/proc/{pid}"):
            return False
        time.sleep(0.01)
    return True
