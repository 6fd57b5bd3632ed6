"""No hostile program passes, reaches the host, leaves a process, or keeps the next program from running."""

import os
import random
import resource
import shutil
import socket
import subprocess
import sys

import psutil
import pytest

from eval_harness.guest import wire
from eval_harness.process_tree import Usage, usage
from eval_harness.sandbox import INSTALL, WEAK_LACKS, Program, Sandbox, SandboxUnavailable, _read_verdict
from tests.eval_harness.hostile_programs import (
    ESCAPES,
    FORKED_MEMORY,
    MANY_THREADS,
    NESTED_MEMORY,
    NUISANCES,
    PASS_ATTEMPTS,
)

RIGHT = Program("def f(x): return x + 1", "assert f(2) == 3\nassert f(-1) == 0", ("f",))
MEMORY_BYTES = 256 * 2**20 + random.Random().randrange(2**20)  # a mark on the command line of our own processes

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(timeout_seconds=1.0, memory_bytes=MEMORY_BYTES, workers=4)


@pytest.fixture(scope="module")
def patient():
    return Sandbox(timeout_seconds=60.0, memory_bytes=MEMORY_BYTES, workers=2)


def our_processes() -> list[str]:
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        if str(MEMORY_BYTES) in (process.info["cmdline"] or []):
            lines.append(" ".join(process.info["cmdline"]))
    return lines


@needs_bubblewrap
def test_there_are_enough_of_them():
    assert len(PASS_ATTEMPTS | NUISANCES | ESCAPES) == len(PASS_ATTEMPTS) + len(NUISANCES) + len(ESCAPES) >= 40


@needs_bubblewrap
@pytest.mark.parametrize("family", [PASS_ATTEMPTS, NUISANCES, ESCAPES], ids=["pass", "nuisance", "escape"])
def test_hostile_programs(sandbox, patient, tmp_path, family):
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        values = {"{canary!r}": repr(str(canary)), "{port}": str(server.getsockname()[1])}
        sources = list(family.values())
        for mark, value in values.items():
            sources = [source.replace(mark, value) for source in sources]
        outcomes = sandbox.run_many([Program(source, RIGHT.tests, ("f",)) for source in sources])
        passed = [name for name, outcome in zip(family, outcomes, strict=True) if outcome.passed]
        assert passed == []
        with pytest.raises(BlockingIOError):
            server.accept()
    assert canary.read_text() == "untouched"
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert our_processes() == []
    assert patient.run(RIGHT).passed


@needs_bubblewrap
@pytest.mark.parametrize("source", [FORKED_MEMORY, NESTED_MEMORY], ids=["children", "nested"])
@pytest.mark.parametrize("mode", ["confined", "without the filter"])
def test_memory_is_limited_in_total(source, mode):
    """Each of eight processes stays under the limit of one. The filter refuses the first fork; without it, the sum."""
    sandbox = Sandbox(timeout_seconds=30.0, memory_bytes=MEMORY_BYTES)
    if mode == "without the filter":
        sandbox._filter = None
    outcome = sandbox.run(Program(source.replace("{size}", str(MEMORY_BYTES // 4)), RIGHT.tests, ("f",)))
    assert not outcome.passed
    assert ("PermissionError" if mode == "confined" else "bytes of memory in total") in outcome.reason
    assert our_processes() == []


@needs_bubblewrap
def test_the_same_children_pass_where_their_sum_is_small():
    sandbox = Sandbox(timeout_seconds=30.0, memory_bytes=MEMORY_BYTES)
    sandbox._filter = None
    assert sandbox.run(Program(FORKED_MEMORY.replace("{size}", str(2**20)), RIGHT.tests, ("f",))).passed


def test_memory_is_limited_in_total_in_the_weaker_mode():
    weak = Sandbox(weak=True, timeout_seconds=30.0, memory_bytes=MEMORY_BYTES)
    source = FORKED_MEMORY.replace("{size}", str(MEMORY_BYTES // 4))
    assert "bytes of memory in total" in weak.run(Program(source, RIGHT.tests, ("f",))).reason
    assert our_processes() == []


@needs_bubblewrap
@pytest.mark.parametrize("weak", [False, True], ids=["confined", "weak"])
def test_waiting_is_limited_and_waiting_for_the_machine_is_not_counted(weak, monkeypatch):
    sandbox = Sandbox(weak=weak, timeout_seconds=1.0)
    outcome = sandbox.run(Program("import time\ndef f(x): time.sleep(60)", RIGHT.tests, ("f",)))
    assert "spent waiting" in outcome.reason
    monkeypatch.setattr("eval_harness.sandbox.usage", lambda pids: Usage(0, 1, busy=True))
    assert sandbox.run(
        Program("import time\ndef f(x):\n    time.sleep(1)\n    return x + 1", RIGHT.tests, ("f",))
    ).passed


@needs_bubblewrap
@pytest.mark.parametrize("threads", [100, 1000])
def test_threads_are_limited_in_total(threads):
    outcome = Sandbox(timeout_seconds=30.0, threads=threads).run(Program(MANY_THREADS, RIGHT.tests, ("f",)))
    assert outcome.passed == (threads == 1000), outcome.reason
    assert outcome.passed or "threads in total" in outcome.reason


def test_usage_counts_descendants_and_forgets_the_dead():
    hold = "import sys, time; held = bytearray(b'x') * 2**26; print(flush=True); time.sleep(60)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        taken = usage([parent.pid])
        for child in psutil.Process(parent.pid).children():
            child.kill()
    assert 2**26 < taken.memory_bytes < 2**27
    assert taken.threads >= 2
    assert usage([parent.pid]) == usage([])


@needs_bubblewrap
def test_refusals_are_the_sandbox_s_and_not_a_mistake_in_the_program(patient):
    reasons = {}
    for name, source in (ESCAPES | NUISANCES).items():
        if name in ("makes a namespace", "opens a local socket", "leaves a daemon behind", "raises its own limits"):
            reasons[name] = patient.run(Program(source, RIGHT.tests, ("f",))).reason
    assert "PermissionError" in reasons["opens a local socket"]
    assert "PermissionError" in reasons["leaves a daemon behind"]
    assert "AssertionError" in reasons["makes a namespace"]
    assert "not allowed to raise maximum limit" in reasons["raises its own limits"]


@needs_bubblewrap
def test_right_programs_pass_and_wrong_ones_say_why(patient):
    assert patient.run(RIGHT).passed
    wrong = patient.run(Program("def f(x): return x", RIGHT.tests, ("f",)))
    assert (wrong.passed, "AssertionError" in wrong.reason) == (False, True)
    assert "ZeroDivisionError" in patient.run(Program("def f(x): return 1 / 0", RIGHT.tests, ("f",))).reason
    assert "SyntaxError" in patient.run(Program("def f(x) return 1", RIGHT.tests, ("f",))).reason
    assert "KeyError" in patient.run(Program("def g(x): return 1", RIGHT.tests, ("f",))).reason


@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "tests"),
    [
        (
            "def f(x): return {1: [x, (2.5, None)], 'a': {x}, b'b': frozenset()}",
            "assert f(1) == {1: [1, (2.5, None)], 'a': {1}, b'b': frozenset()}",
        ),
        ("def f(x): return -(10 ** x)", "assert f(5000) == -(10 ** 5000)"),
        (
            "def f(x): return float('nan'), float('-inf'), complex(1, -2), True",
            "a = f(0)\nassert a[0] != a[0] and a[1:] == (float('-inf'), 1 - 2j, True)",
        ),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(x): return (n * n for n in range(x))", "assert list(f(4)) == [0, 1, 4, 9]"),
        (
            "class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return [p.a for p in ps]",
            "assert f([P(1), P(2)]) == [1, 2]",
        ),
        ("def f(x): return '\\ud800 \\u00e9' + x", "assert f('z') == '\\ud800 \\u00e9z'"),
        (
            "def f(x):\n    raise KeyError(x)",
            "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    raise ValueError",
        ),
    ],
)
def test_values_cross_unchanged(patient, source, tests):
    names = ("f", "P") if "class P" in source else ("f",)
    outcome = patient.run(Program(source, tests, names))
    assert outcome.passed, outcome.reason


def test_a_verdict_without_the_judge_s_token_counts_for_nothing():
    assert _read_verdict(wire.encode(("token", None)), "token") == (True, "")
    assert _read_verdict(wire.encode(("guessed", None)), "token") == (False, "the verdict carries a wrong token")


@needs_bubblewrap
def test_many_programs_keep_their_order(patient):
    programs = [Program(f"def f(): return {number}", f"assert f() == {number % 3}", ("f",)) for number in range(9)]
    assert [outcome.passed for outcome in patient.run_many(programs)] == [number < 3 for number in range(9)]


def test_a_process_with_many_open_files_runs_programs():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        assert Sandbox(weak=True, timeout_seconds=60).run(RIGHT).passed
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_bubblewrap_it_refuses_and_says_what_the_weaker_mode_lacks(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap") as refusal:
        Sandbox()
    assert WEAK_LACKS in str(refusal.value)
    assert Sandbox(weak=True, timeout_seconds=60).run(RIGHT).passed


def test_the_weaker_mode_still_ends_what_does_not_end():
    weak = Sandbox(weak=True, timeout_seconds=1)
    assert "no verdict" in weak.run(Program("import time\ntime.sleep(10**6)", "f()", ("f",))).reason
    busy = weak.run(Program("while True: pass", "f()", ("f",)))
    assert not busy.passed
    # whichever limit comes first on a loaded machine: processor time, or the wall clock
    assert "used up its processor time" in busy.reason or "no verdict" in busy.reason


@pytest.mark.parametrize("setting", [{"timeout_seconds": 0}, {"memory_bytes": -1}, {"workers": 0}, {"threads": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sandbox(**setting)
