"""Processes and all their descendants, through /proc: what they take together, and how to end them.

Limits of the kernel's (`setrlimit`) hold for one process each, and none counts the kernel's own memory for a thread.
So the sandbox also looks at the sum. This needs no privilege and no control group that one may write to.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CLEANUP_SECONDS = 5
_MEMORY = ("RssAnon", "RssShmem", "VmSwap")  # pages of files, such as libraries, can be dropped and are not counted


@dataclass(frozen=True)
class Usage:
    """What processes take together; `busy` says whether any computes, or waits for a processor or a disk."""

    memory_bytes: int
    threads: int
    busy: bool


def usage(roots: Iterable[int]) -> Usage:
    """Resident memory and threads of processes and of all their descendants; zero for those that have ended.

    A page that several processes share is counted for each of them.
    """
    memory_kib = threads = 0
    busy = False
    for pid in _tree(roots):
        facts = _status(pid)
        memory_kib += sum(int(facts.get(name, "0 kB").split()[0]) for name in _MEMORY)
        threads += int(facts.get("Threads", 0))
        busy |= facts.get("State", "Z")[0] in "RD" or _another_thread_runs(pid, facts)
    return Usage(1024 * memory_kib, threads, busy)


def end(process: subprocess.Popen, group: bool) -> None:
    """Kill a sandbox and wait until all of it is gone.

    The first process inside is killed rather than bubblewrap: the kernel then ends everything in its namespace before
    bubblewrap, its parent, sees it end.

    Args:
        process: bubblewrap, or the program itself in the weaker mode.
        group: kill its process group and its descendants instead (the weaker mode).
    """
    if group:
        descendants = list(_tree([process.pid]))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _kill(descendants[1:])
        _wait_for(descendants[1:])
    elif process.poll() is None:
        _kill(children(process.pid))
    try:
        process.wait(0.5 if not group else CLEANUP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(CLEANUP_SECONDS)


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started and that still run."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _tree(roots: Iterable[int]) -> Iterator[int]:
    waiting, seen = list(roots), set()
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            yield pid
            waiting += children(pid)


def _another_thread_runs(pid: int, facts: dict[str, str]) -> bool:
    if int(facts.get("Threads", 0)) < 2:
        return False
    with contextlib.suppress(OSError):
        return any(
            _status(f"{pid}/task/{thread}").get("State", "Z")[0] in "RD" for thread in os.listdir(f"/proc/{pid}/task")
        )
    return False


def _status(pid: int | str) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _wait_for(pids: Iterable[int]) -> None:
    """Wait until killed processes that are no children of ours have ended."""
    deadline = time.monotonic() + CLEANUP_SECONDS
    for pid in pids:
        while _status(pid).get("State", "Z")[0] not in "ZX" and time.monotonic() < deadline:
            time.sleep(0.005)
