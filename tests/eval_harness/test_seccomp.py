"""The filter, run by a small interpreter of classic BPF on both architectures."""

import errno
import struct

import pytest

from eval_harness.seccomp import ALLOW, ARCHITECTURES, CLONE, CLONE_THREAD, ERRNO, KILL, REFUSED, build_filter

OTHER_ARCHITECTURE = 0x40000003
HARMLESS = {
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "futex": (202, 98),
    "exit_group": (231, 94),
    "execve": (59, 221),
}


def decide(program: bytes, architecture: int, call: int, first_argument: int = 0) -> int:
    data = struct.pack("=IIQQ", call, architecture, 0, first_argument)
    instructions = list(struct.iter_unpack("=HBBI", program))
    position, loaded = 0, 0
    while True:
        code, if_true, if_false, value = instructions[position]
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return value
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
            position += if_true if holds else if_false
        position += 1


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_every_refused_call_is_refused_and_no_other(machine):
    column, architecture = ARCHITECTURES[machine]
    program = build_filter(machine)
    refused = {numbers[column] for numbers in REFUSED.values()} - {None}
    for call in range(424):
        if call == CLONE[column]:
            continue
        expected = ERRNO | errno.EPERM if call in refused else ALLOW
        assert decide(program, architecture, call) == expected, call
    for numbers in HARMLESS.values():
        assert numbers[column] not in refused
    assert len(refused) > 50


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_threads_may_start_and_processes_may_not(machine):
    column, architecture = ARCHITECTURES[machine]
    program = build_filter(machine)
    assert decide(program, architecture, CLONE[column], CLONE_THREAD | 0x100) == ALLOW
    assert decide(program, architecture, CLONE[column], 17) == ERRNO | errno.EPERM
    assert decide(program, architecture, CLONE[column], 0x10000000) == ERRNO | errno.EPERM
    assert decide(program, architecture, 435) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_other_numberings_end_the_process(machine):
    _, architecture = ARCHITECTURES[machine]
    program = build_filter(machine)
    assert decide(program, OTHER_ARCHITECTURE, 1) == KILL
    if machine == "x86_64":
        assert decide(program, architecture, 0x40000000 + 39) == KILL


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="riscv64"):
        build_filter("riscv64")
