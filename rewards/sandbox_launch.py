"""Command lines that start one sandboxed interpreter: bubblewrap, unshare, or rlimits only.

Each tier is a function from a `Plan` (what is visible, what is allowed) to an argument list. This file starts nothing.

Covered, bubblewrap and unshare: own pid, network, ipc, host name and mount namespaces; a read-only root that holds
the interpreter's standard library and the system's shared libraries; /tmp of bounded size; no /proc, no /sys, no home;
empty environment; no capabilities, no_new_privs; rlimits by prlimit. Started by root, every sandbox gets a host uid of
its own, because RLIMIT_NPROC binds neither root nor a user namespace made by root. Started by anyone else, a user
namespace holds the program, and RLIMIT_NPROC counts what is in it (before Linux 5.14: all processes of that user).
Covered, rlimits: the limits of prlimit and the strict seccomp filter. The host's files are readable.
Not covered: what the kernel itself gets wrong; the time that a neighbour takes from another.

Usage: `Popen(bubblewrap_command(plan, ["/runner/side.pyc", "5"], uid=1234))`.
"""

import os
import shlex
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox_limits import Limits

RUNNER_DIR, PACKAGES_DIR, PYTHON = "/runner", "/packages", "/py/bin/python3"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
_PYTHON_FLAGS = ("-I", "-S", "-B", "-X", "utf8")
_STACK_BYTES = 64 << 20
_EXTRA_PROCESSES = 2  # the processes that set a sandbox up count too


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a sandbox of one pool looks like."""

    limits: Limits
    """Bounds, see there."""
    runner_dir: Path
    """Host folder with the compiled runners and the seccomp filter; seen inside as /runner."""
    packages: Path | None = None
    """Host folder of extra importable packages; seen inside as /packages."""

    def __post_init__(self) -> None:
        if self.packages is not None and not self.packages.is_dir():
            raise ValueError(f"packages must be a folder, got {str(self.packages)!r}; make one with pip install -t")

    def binds(self) -> list[tuple[str, str]]:
        """(host path, path inside), read-only."""
        executable, prefix = os.path.realpath(sys.executable), sys.base_prefix
        pairs = [(path, path) for path in ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64")]
        pairs = [(path, inside) for path, inside in pairs if os.path.isdir(path) and not os.path.islink(path)]
        pairs += [(f"/usr/bin/{tool}", f"/usr/bin/{tool}") for tool in ("setpriv", "prlimit")]
        pairs.append((executable, PYTHON))
        if prefix == "/usr":
            standard_library = sysconfig.get_path("stdlib")
            pairs.append((standard_library, f"/py/{sys.platlibdir}/{Path(standard_library).name}"))
        else:
            pairs += [(f"{prefix}/{name}", f"/py/{name}") for name in dict.fromkeys(("lib", sys.platlibdir))]
        pairs.append((str(self.runner_dir), RUNNER_DIR))
        if self.packages is not None:
            pairs.append((str(self.packages.resolve()), PACKAGES_DIR))
        return pairs

    def masks(self) -> list[str]:
        """Folders inside that are covered with an empty one: packages installed beside the standard library."""
        names = ("site-packages", "dist-packages")
        found = []
        for host, inside in self.binds():
            if inside.startswith("/py/lib"):
                found += [f"{inside}/{path.relative_to(host)}" for name in names for path in Path(host).glob(name)]
                found += [f"{inside}/{p.relative_to(host)}" for n in names for p in Path(host).glob(f"python3*/{n}")]
        return sorted(set(found))

    def symlinks(self) -> list[tuple[str, str]]:
        """(target, path inside)."""
        links = [(os.readlink(path), path) for path in ("/lib", "/lib32", "/lib64") if os.path.islink(path)]
        return [*links, ("/tmp/stdin", "/dev/stdin")]

    def environment(self) -> dict[str, str]:
        """All that a program finds in `os.environ`."""
        shared = sysconfig.get_config_var("Py_ENABLE_SHARED") and sys.base_prefix != "/usr"
        return ENVIRONMENT | ({"LD_LIBRARY_PATH": "/py/lib"} if shared else {})

    def prlimit(self, tool: str = "/usr/bin/prlimit") -> list[str]:
        """The command that lowers every limit, soft and hard."""
        limits = self.limits
        cpu_s = int(limits.timeout_s) + 2
        bounds = {
            "as": limits.memory_mb << 20,
            "cpu": cpu_s,
            "nproc": limits.max_processes + _EXTRA_PROCESSES,
            "fsize": min(limits.tmp_mb << 20, 4 * limits.max_output_bytes),
            "nofile": 64,
            "core": 0,
            "stack": min(_STACK_BYTES, (limits.memory_mb << 20) // 4),
        }
        return [tool, *(f"--{name}={value}" for name, value in bounds.items())]


Command = Callable[[Plan, Sequence[str], int | None], list[str]]
"""(plan, interpreter's arguments, host uid of its own where the caller is root) -> argument list."""


def _drop_privileges(uid: int | None) -> list[str]:
    identity = [] if uid is None else [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["/usr/bin/setpriv", *identity, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]


def _interpreter(arguments: Sequence[str], python: str = PYTHON) -> list[str]:
    return [python, *_PYTHON_FLAGS, *arguments]


def bubblewrap_command(plan: Plan, arguments: Sequence[str], uid: int | None) -> list[str]:
    """bwrap, then (as root) setpriv, then prlimit, then the interpreter. The seccomp filter is added by the caller."""
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command = ["bwrap", *namespaces, "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if uid is None:
        command += ["--unshare-user", "--disable-userns"]
    else:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    for name, value in plan.environment().items():
        command += ["--setenv", name, value]
    # bwrap makes the parents of a mount point 0700, which a sandbox with a uid of its own could not enter.
    for folder in ("/usr", "/usr/bin", "/dev", "/py", "/py/bin"):
        command += ["--dir", folder]
    for host, inside in plan.binds():
        command += ["--ro-bind", host, inside]
    for folder in plan.masks():
        command += ["--tmpfs", folder, "--remount-ro", folder]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    for target, path in plan.symlinks():
        command += ["--symlink", target, path]
    command += ["--size", str(plan.limits.tmp_mb << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--chdir", "/tmp", "--hostname", "sandbox", "--remount-ro", "/"]
    drop = [] if uid is None else _drop_privileges(uid)
    return [*command, "--", *drop, *plan.prlimit(), *_interpreter(arguments)]


def unshare_command(plan: Plan, arguments: Sequence[str], uid: int | None) -> list[str]:
    """unshare, a shell script that builds the root and stays as process 1, setpriv, prlimit, the interpreter.

    The shell must not exec the program: process 1 is of another uid (or holds capabilities the program lacks), so
    the program can neither stop it nor clear its parent-death signal.
    """
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child"]
    die_with_parent = ["setpriv", "--pdeathsig", "KILL"]
    script = ["/bin/sh", "-c", _root_script(plan, arguments, uid)]
    inner = [*die_with_parent, "unshare", *namespaces, *script]
    # The parent-death signal is lost on entering a user namespace, so it is set after that.
    return inner if uid is not None else ["unshare", "--user", "--map-root-user", *inner]


def _root_script(plan: Plan, arguments: Sequence[str], uid: int | None) -> str:
    root = shlex.quote(str(plan.runner_dir.parent / "root"))
    lines = ["set -e", "umask 022", f"mount -n -t tmpfs -o size=1m,mode=755,nosuid,nodev sandbox {root}", f"cd {root}"]
    lines.append("mkdir -p usr/bin dev py/bin tmp old")
    for host, inside in [*plan.binds(), *((device, device) for device in DEVICES)]:
        source, target = shlex.quote(host), shlex.quote(inside.lstrip("/"))
        make = f"mkdir -p {target}" if os.path.isdir(host) else f": > {target}"
        lines += [make, f"mount -n --bind {source} {target}"]
        if inside not in DEVICES:
            lines.append(f"mount -n -o remount,bind,ro,nosuid,nodev {target}")
    lines += [f"mount -n -t tmpfs -o size=4k,ro sandbox {shlex.quote(path.lstrip('/'))}" for path in plan.masks()]
    lines += [f"ln -s {shlex.quote(target)} {shlex.quote(path.lstrip('/'))}" for target, path in plan.symlinks()]
    lines.append(f"mount -n -t tmpfs -o size={plan.limits.tmp_mb}m,mode=1777,nosuid,nodev sandbox tmp")
    lines += [
        f"mount -n -o remount,bind,ro,nosuid,nodev {root}",
        "pivot_root . old",
        "cd /tmp",
        "/old/usr/sbin/chroot /old /usr/bin/umount -n -l /",
    ]
    environment = [f"{name}={value}" for name, value in plan.environment().items()]
    drop = (
        _drop_privileges(uid) if uid is not None else [*_drop_privileges(None), "--securebits=+noroot,+noroot_locked"]
    )
    program = [*drop, *plan.prlimit(), *_interpreter(arguments)]
    lines += ["unset OLDPWD PWD", f"export {shlex.join(environment)}", "set +e", shlex.join(program), "exit $?"]
    return "\n".join(lines)


def rlimits_command(plan: Plan, arguments: Sequence[str], uid: int | None) -> list[str]:
    """prlimit and the host's interpreter, in the host's namespaces and under the caller's uid."""
    del uid
    outside = [str(plan.runner_dir / Path(word).name) if word.startswith(RUNNER_DIR) else word for word in arguments]
    # Not nproc: it would count the caller's own processes, and the strict filter allows no fork anyway.
    limits = [word for word in plan.prlimit("prlimit") if not word.startswith("--nproc")]
    return [*limits, *_interpreter(outside, os.path.realpath(sys.executable))]
