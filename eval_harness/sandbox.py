"""Run generated programs without trusting them: two bubblewrap sandboxes a program, one for it and one for its judge.

The program's sandbox has no network, no host file but Python and the system's libraries (read-only), nothing it could
write to, no privilege and one process (`seccomp`), with limits on memory, processor time, files, messages and
wall-clock time. The tests run in a second sandbox, as its judge: it calls the program's functions over a pipe and gets
plain data back. So the program never sees a test or an expected value, and its builtins, comparisons and exit code
count for nothing. The verdict carries a random token that only the judge was told. The memory and the threads of both
sandboxes are summed up every few milliseconds, in however many processes they are (`process_tree`); over the limit,
all of it is killed.

    Sandbox().run(Program(source="def f(x): return x + 1", tests="assert f(1) == 2", names=("f",))).passed
"""

import contextlib
import math
import os
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from eval_harness.guest import wire
from eval_harness.process_tree import end, usage
from eval_harness.seccomp import build_filter

GUEST_DIR = Path(__file__).with_name("guest")
INSTALL = "install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`)"
WEAK_LACKS = (
    "generated programs can read this user's files, write wherever this user can, fill the disk, use the network, "
    "start processes that outlive them and escape the limit of memory in total, and reach the process that judges them"
)
MOST_WORKERS = 64  # assumption
WALL_FACTOR = 30  # assumption
WATCH_SECONDS = 0.05  # assumption: a program can fill about a hundred MiB in this time


class SandboxUnavailable(RuntimeError):
    """Programs cannot be confined on this machine; the message says why and what to install."""


@dataclass(frozen=True)
class Program:
    """What is to be judged.

    Attributes:
        source: the generated program.
        tests: statements that raise unless the program is right; they see `setup` and `names` only.
        names: functions and classes of the program that the tests call.
        setup: trusted statements that run before the tests, beside them.
    """

    source: str
    tests: str
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Outcome:
    """Verdict on one program; `reason` is empty when it passed."""

    passed: bool
    reason: str
    seconds: float


@dataclass
class Sandbox:
    """A bounded pool of confined judgements.

    Attributes:
        timeout_seconds: processor time a program has, and as long again in which it and its judge only wait. Time in
            which they are ready to run and the machine is busy with others is not counted, so that a busy machine
            changes no verdict; but after `WALL_FACTOR` times as long the program ends in any case (assumption).
        memory_bytes: memory of a program and its judge in total, over all their processes; also the address space of
            each process (assumption).
        threads: threads of both in total: the kernel's memory for a thread is in no limit (assumption).
        workers: programs at a time; by default two a processor, since half of a program's time is waiting, but at most
            `MOST_WORKERS`: each holds up to ten file descriptors, of which a process often may have 1,024.
        weak: go on without bubblewrap. What is then missing is `WEAK_LACKS`.

    Raises:
        SandboxUnavailable: bubblewrap is missing or does not work here, and `weak` is not set.
    """

    timeout_seconds: float = 10.0
    memory_bytes: int = 2**30
    threads: int = 256
    workers: int = field(default_factory=lambda: min(2 * len(os.sched_getaffinity(0)), MOST_WORKERS))
    weak: bool = False

    def __post_init__(self):
        for name in ("timeout_seconds", "memory_bytes", "threads", "workers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use more than 0")
        self._prefix = [] if self.weak else _bubblewrap_command()
        self._filter = None if self.weak else build_filter()
        probe = self.run(Program("def one(): return 1", "assert one() == 1", ("one",)))
        if not probe.passed and self.weak:
            raise SandboxUnavailable(f"a trivial program did not run even without bubblewrap: {probe.reason}")
        if not probe.passed:
            raise SandboxUnavailable(
                f"bubblewrap is installed but a trivial program did not run in it ({probe.reason}); allow "
                "unprivileged user namespaces (`sysctl kernel.unprivileged_userns_clone=1`, in Docker `--security-opt "
                f"seccomp=unconfined`), or accept the weaker mode, in which {WEAK_LACKS}"
            )

    def run(self, program: Program) -> Outcome:
        """Judge one program."""
        started = time.monotonic()
        token = secrets.token_hex(16)
        job = wire.encode((token, program.setup, program.tests, list(program.names)))
        with contextlib.ExitStack() as stack:
            to_program, to_judge, verdict = (
                [stack.enter_context(_Descriptor(fd)) for fd in os.pipe()] for _ in range(3)
            )
            limits = [self.memory_bytes, math.ceil(self.timeout_seconds)]
            source = program.source.encode("utf-8", "surrogatepass")
            processes = [
                self._start("candidate.py", source, [to_program[0], to_judge[1]], limits),
                self._start("judge.py", job, [to_judge[0], to_program[1], verdict[1]], limits),
            ]
            for descriptor in (*to_program, *to_judge, verdict[1]):
                descriptor.close()
            try:
                message = self._receive(verdict[0].number, [process.pid for process in processes])
            finally:
                for process in processes:
                    end(process, group=self.weak)
        passed, reason = (False, message) if isinstance(message, str) else _read_verdict(message, token)
        return Outcome(passed, reason, time.monotonic() - started)

    def run_many(self, programs: Iterable[Program]) -> list[Outcome]:
        """Judge programs, `workers` at a time; outcomes come in the programs' order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.run, programs))

    def _receive(self, descriptor: int, pids: list[int]) -> bytes | str | None:
        """The judge's message; None when it dies without one; a reason when too much time or memory is taken."""
        received, idle_seconds = b"", 0.0
        started = looked = time.monotonic()
        readable = select.poll()  # `select.select` knows only descriptors below 1,024
        readable.register(descriptor, select.POLLIN)
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4], "big"):
            if readable.poll(1000 * WATCH_SECONDS):
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return None
                received += part
                continue
            taken, now = usage(pids), time.monotonic()
            idle_seconds += 0 if taken.busy else now - looked
            looked = now
            if taken.memory_bytes > self.memory_bytes:
                return f"more than {self.memory_bytes} bytes of memory in total ({taken.memory_bytes})"
            if taken.threads > self.threads:
                return f"more than {self.threads} threads in total ({taken.threads})"
            if idle_seconds > self.timeout_seconds or now - started > WALL_FACTOR * self.timeout_seconds:
                return f"no verdict within {now - started:.3g} seconds, {idle_seconds:.3g} of them spent waiting"
        return received[4:]

    def _start(self, script: str, job: bytes, pipes: list["_Descriptor"], limits: list[int]) -> subprocess.Popen:
        folder = GUEST_DIR if self.weak else Path("/guest")
        numbers = [pipe.number for pipe in pipes]
        python = [sys.executable if self.weak else _interpreter(), "-I", "-S", "-B", str(folder / script)]
        with contextlib.ExitStack() as stack:
            stdin = stack.enter_context(tempfile.TemporaryFile())
            stdin.write(job)
            stdin.seek(0)
            prefix = list(self._prefix)
            passed = list(numbers)
            if self._filter is not None:
                rules = stack.enter_context(tempfile.TemporaryFile())
                rules.write(self._filter)
                rules.seek(0)
                prefix += ["--seccomp", str(rules.fileno())]
                passed.append(rules.fileno())
            return subprocess.Popen(
                [*prefix, *python, *map(str, [*numbers, *limits])],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                env={},
                start_new_session=self.weak,
            )


class _Descriptor:
    """A file descriptor that closes once."""

    def __init__(self, number: int):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        if self.number >= 0:
            os.close(self.number)
            self.number = -1


def _interpreter() -> str:
    """The real interpreter behind this virtual environment: only its own prefix is visible inside."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(Path(sys.base_prefix, "bin", version).resolve())


def _bubblewrap_command() -> list[str]:
    """bubblewrap and its settings, up to the command.

    Raises:
        SandboxUnavailable: it is not installed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable(
            f"generated programs run in bubblewrap, which is not installed: {INSTALL}; or accept the weaker mode "
            f"(`--weak_sandbox`), in which {WEAK_LACKS}"
        )
    command = [bwrap, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    if "--disable-userns" in subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout:
        command += ["--disable-userns"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    interpreter, library = _interpreter(), sysconfig.get_paths()["stdlib"]
    for path in {interpreter, library, str(Path(interpreter).parents[1] / "lib")}:
        if Path(path).exists() and not path.startswith(("/usr/lib", "/lib")):
            command += ["--ro-bind", path, path]
    packages = Path(library, "site-packages")
    if packages.is_dir():
        command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    command += ["--ro-bind", str(GUEST_DIR), "/guest", "--dev-bind", "/dev/null", "/dev/null"]
    return [*command, "--chdir", "/", "--remount-ro", "/"]


def _read_verdict(message: bytes | None, token: str) -> tuple[bool, str]:
    if message is None:
        return False, "the judge ended without a verdict"
    stated, reason = wire.decode(message)
    if stated != token:
        return False, "the verdict carries a wrong token"
    return reason is None, reason or ""
