"""A seccomp filter as bytes: the system calls that a graded program never needs and a sandbox is the poorer for.

It closes what namespaces and rlimits leave open: nested user namespaces, memory that no rlimit counts (memfd, System V
shared memory), ptrace, keyrings, io_uring, bpf, mounts, and socket families without a namespace (vsock reaches the
hypervisor from inside any network namespace). This file builds filters; bubblewrap or `rewards.code_solution_side`
installs them.

Covered: x86_64 and aarch64; 32-bit and x32 calls are killed or refused. `strict` also takes away fork, exec, sockets,
signals and every way of changing files: all that stands between a program and the host in the rlimits tier.
Not covered: any other machine (`build_filter` returns None there), reading files, bugs of the kernel.

Usage: `Path("filter.bpf").write_bytes(build_filter())`, then `bwrap --seccomp FD`.
"""

import errno
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_X32_BIT = 0x40000000

_NEW_NAMESPACES = 0x7E020080  # CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC, NEWUTS, NEWCGROUP, NEWNS and NEWTIME
_CLONE_THREAD = 0x00010000
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_UNIX, _INET, _INET6 = 1, 2, 10

# Name -> number on (x86_64, aarch64); None where the machine has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "acct": (163, 89),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
}
_DENIED_IF_STRICT: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "ioprio_set": (251, 30),
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)

_Instruction = tuple[int, int, int, int]


def build_filter(*, strict: bool = False, machine: str = platform.machine()) -> bytes | None:
    """Return the program as an array of `struct sock_filter`, or None where this file does not know the machine."""
    if machine not in _AUDIT_ARCH:
        return None
    column = list(_AUDIT_ARCH).index(machine)
    denied = _DENIED | (_DENIED_IF_STRICT if strict else {})
    numbers = {numbers[column] for numbers in denied.values()}
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT),
        _refuse(errno.ENOSYS),
    ]
    for number in sorted(number for number in numbers if number is not None):
        program += [(_JUMP_EQUAL, 0, 1, number), _refuse(errno.EPERM)]
    # glibc falls back to clone, whose flags a filter can see; clone3 hides them behind a pointer.
    program += [(_JUMP_EQUAL, 0, 1, _number(_CLONE3, column)), _refuse(errno.ENOSYS)]
    program += _when_called(_CLONE, column, 0, [(_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES), _refuse(errno.EPERM)])
    if strict:
        program += [(_JUMP_EQUAL, 0, 1, _number(_OPENAT2, column)), _refuse(errno.ENOSYS)]
        program += [(_JUMP_EQUAL, 0, 1, _number(_SOCKET, column)), _refuse(errno.EPERM)]
        program += _when_called(_CLONE, column, 0, [(_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), _refuse(errno.EPERM)])
        for call, argument in ((_OPEN, 1), (_OPENAT, 2)):
            program += _when_called(call, column, argument, [(_JUMP_ANY_BIT, 0, 1, _WRITING), _refuse(errno.EPERM)])
    else:
        families = [(_JUMP_EQUAL, jump, 0, family) for jump, family in ((3, _UNIX), (2, _INET), (1, _INET6))]
        program += _when_called(_SOCKET, column, 0, [*families, _refuse(errno.EAFNOSUPPORT)])
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _number(call: tuple[int, int], column: int) -> int:
    return call[column]


def _refuse(code: int) -> _Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def _when_called(
    call: tuple[int, int | None], column: int, argument: int, tests: list[_Instruction]
) -> list[_Instruction]:
    """Run `tests` on the low half of an argument of one call; what falls through goes on with the number loaded."""
    number = call[column]
    if number is None:
        return []
    load = (_LOAD, 0, 0, _FIRST_ARGUMENT_AT + 8 * argument)
    reload = (_LOAD, 0, 0, _NUMBER_AT)
    return [(_JUMP_EQUAL, 0, len(tests) + 2, number), load, *tests, reload]
