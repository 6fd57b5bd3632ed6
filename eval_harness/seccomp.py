"""A seccomp filter for generated programs, assembled by hand: classic BPF over the number of a system call.

One process a program: new threads are allowed, new processes are not, so a fork bomb and a daemon end at their first
call, and the memory limit of the process is the limit in total. Refused besides: sockets, tracing and reading other
processes, shared memory that no limit counts, namespaces and mounts, and what administers the machine. Calls newer
than number 424 (the same on every architecture) do not exist; libraries then use the older ones.
"""

import errno
import platform
import struct

# Number of each refused call on x86_64 and aarch64; None where the architecture has no such call.
REFUSED = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "execveat": (322, 281),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mknodat": (259, 33),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}
CLONE = (56, 220)
CLONE_THREAD = 0x10000
FIRST_NEW_CALL = 424
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CALL_OFFSET, ARCHITECTURE_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16


def build_filter(machine: str | None = None) -> bytes:
    """Assemble the filter for bubblewrap's `--seccomp`.

    Args:
        machine: "x86_64" or "aarch64"; this machine's by default.

    Returns:
        bytes: `struct sock_filter` entries, 8 bytes each.

    Raises:
        ValueError: another architecture.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"no system call table for {machine!r}; known: {', '.join(ARCHITECTURES)}")
    column, architecture = ARCHITECTURES[machine]
    program = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        *_answer(EQUAL, architecture, KILL, unless=True),
        (LOAD, 0, 0, CALL_OFFSET),
    ]
    if machine == "x86_64":
        program += _answer(AT_LEAST, 0x40000000, KILL)  # the x32 numbering of the same calls
    program += _answer(AT_LEAST, FIRST_NEW_CALL, ERRNO | errno.ENOSYS)
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            program += _answer(EQUAL, numbers[column], ERRNO | errno.EPERM)
    program += [
        (EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT_OFFSET),
        *_answer(ANY_BIT, CLONE_THREAD, ERRNO | errno.EPERM, unless=True),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _answer(test: int, value: int, result: int, unless: bool = False) -> list[tuple[int, int, int, int]]:
    """Return `result` when the loaded word passes the test (or, with `unless`, when it does not)."""
    return [(test, int(unless), int(not unless), value), (RETURN, 0, 0, result)]
