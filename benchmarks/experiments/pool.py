"""Many runs over several GPUs and several processes a GPU. Imports no torch: a process chooses its GPU first."""

import collections
import contextlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.experiments.curves import curve, read_steps, summarise
from benchmarks.experiments.recipe import CUT, DESCRIPTION, METRICS, Run

POLL_SECONDS = 20.0
MAX_ATTEMPTS = 2
ALONE = "alone"
FEWEST_SHARE = 0.65
RECENT_RUNS = 8  # the slowest of them tells how long the next will take
LATER_SHARE = 0.8  # assumption: of the time of a process's first run, which compiles; a later one needs so much


@dataclass
class Worker:
    """A process that trains one run after another, and this side of the pipe to it."""

    number: int
    process: multiprocessing.Process
    pipe: Connection
    ready: bool = False
    run: Run | None = None
    since: float = 0.0


@dataclass
class Outcome:
    """What a call did.

    Args:
        finished: runs that ended.
        failed: names of runs that failed, with the reason.
        left: names of runs that there was no time for.
        cut: number of runs that were stopped.
    """

    finished: int = 0
    cut: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Pool:
    """Worker processes, spread over GPUs.

    Args:
        devices: what CUDA_VISIBLE_DEVICES is for the workers in turn; empty runs on the CPU.
        workers_per_device: processes that share one.
        folder: for runs and the workers' logs.
        sharing: how they share it, for the records.
    """

    def __init__(self, devices: list[str], workers_per_device: int, folder: Path, sharing: str = ALONE):
        self.folder, self.sharing = folder, sharing
        self.context = multiprocessing.get_context("spawn")
        self.devices = (devices or [""]) * workers_per_device
        folder.mkdir(parents=True, exist_ok=True)
        self.workers = [self._start(number) for number in range(len(self.devices))]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        for worker in self.workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.terminate()

    def work(
        self,
        data: Path,
        next_runs: Callable[[], list[Run]],
        finish: Callable[[Run, dict], None],
        deadline: float,
        say: Callable[[str], None],
    ) -> Outcome:
        """Train until nothing is left or there is no more time.

        Args:
            data: folder with `tokenizer` and `shards`.
            next_runs: all unfinished runs that are known by now, the most important first.
            finish: takes a run and its record.
            deadline: on `time.monotonic`'s clock; a run starts only if it should end by then, and what goes on then is
                stopped: `finish` gets what it had come to.
            say: prints a line.

        Raises:
            RuntimeError: a worker died before it had a run; its log tells why.
        """
        outcome = Outcome()
        self.attempts: dict[str, int] = {}
        recent: collections.deque[float] = collections.deque([0.0], maxlen=RECENT_RUNS)  # seconds a size
        while True:
            waiting = self._waiting(next_runs())
            for worker in self.workers:
                if worker.run is None and worker.ready:
                    left = (deadline - time.monotonic()) / self._slowness()
                    if (run := next((run for run in waiting if max(recent) * run.size <= left), None)) is not None:
                        waiting.remove(run)
                        self._give(worker, run, data)
            busy = [worker for worker in self.workers if worker.run is not None]
            starting = [worker for worker in self.workers if not worker.ready]
            if not busy and not (starting and waiting and time.monotonic() < deadline):
                outcome.left = [run.name for run in waiting]
                return outcome
            if time.monotonic() >= deadline:
                outcome.cut = sum(self._cut(worker, finish) for worker in busy)
                outcome.left = [run.name for run in self._waiting(next_runs())]
                return outcome
            seconds = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            for pipe in wait([worker.pipe for worker in self.workers], seconds):
                worker = next(worker for worker in self.workers if worker.pipe is pipe)
                run, took = worker.run, time.monotonic() - worker.since
                kind, content = self._receive(worker)
                if run is None:
                    if kind == "failed":
                        raise RuntimeError(f"no run can start: {content}")
                    continue
                if kind == "done":
                    recent.append(LATER_SHARE * took / run.size)
                    outcome.finished += 1
                    finish(run, content | self._place(worker))
                else:
                    outcome.failed[run.name] = content.strip().splitlines()[-1]
                    say(f"{run.name} failed: {outcome.failed[run.name]}")

    def _slowness(self) -> float:
        """Seconds of one more run in parts of what it takes beside as many as there are workers.

        Processes that share a GPU are the faster the fewer they are, until they cannot keep it busy: of eight that
        take turns, four took 66 seconds where all took 98 to 111 (attention experiment, H100).
        """
        if self.sharing == ALONE:
            return 1.0
        busy = 1 + sum(worker.run is not None for worker in self.workers)
        return max(FEWEST_SHARE, busy / len(self.workers))

    def _waiting(self, runs: list[Run]) -> list[Run]:
        """Those that nobody trains and that have not failed too often."""
        taken = {worker.run.key for worker in self.workers if worker.run is not None}
        return [run for run in runs if run.key not in taken and self.attempts.get(run.key, 0) < MAX_ATTEMPTS]

    def _cut(self, worker: Worker, finish: Callable[[Run, dict], None]) -> bool:
        """Stop a worker and hand over what its run had come to; whether there was anything."""
        worker.process.terminate()
        worker.process.join(5)
        run, worker.run = worker.run, None
        folder = self._run_folder(run)
        steps = read_steps(folder / METRICS)
        if len([row for row in steps if "eval" in row]) < 2:
            return False
        record = json.loads((folder / DESCRIPTION).read_text()) | summarise(steps) | self._place(worker)
        record |= {"status": CUT, "seconds": round(time.monotonic() - worker.since, 1), "curve": curve(steps)}
        finish(run, record)
        return True

    def _place(self, worker: Worker) -> dict:
        workers = len(self.devices) // len(set(self.devices))
        return {"worker": worker.number, "workers_per_device": workers, "sharing": self.sharing}

    def _run_folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.key

    def _give(self, worker: Worker, run: Run, data: Path) -> None:
        self.attempts[run.key] = self.attempts.get(run.key, 0) + 1
        worker.run, worker.since = run, time.monotonic()
        worker.pipe.send((run, data, self._run_folder(run)))

    def _receive(self, worker: Worker) -> tuple[str, object]:
        """A worker's next word; one that died or failed, whose GPU context may be broken, is replaced."""
        worker.run = None
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            content = f"worker {worker.number} died with exit status {code}, see {self._log(worker.number)}"
            kind = "failed"
        worker.ready = kind != "failed"
        if not worker.ready:
            fresh = self._start(worker.number)
            worker.process, worker.pipe = fresh.process, fresh.pipe
        return kind, content

    def _log(self, number: int) -> Path:
        return self.folder / f"worker_{number}.log"

    def _start(self, number: int) -> Worker:
        here, there = self.context.Pipe()
        arguments = (there, self.devices[number], self._log(number))
        process = self.context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        return Worker(number, process, here)


def _serve(pipe: Connection, device: str, log: Path) -> None:
    """A worker: trains what comes through the pipe until None comes or a run fails."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    from benchmarks.experiments.training import train  # torch must see only this worker's device

    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        run, data, folder = task
        print(f"--- {run.name}", flush=True)
        try:
            pipe.send(("done", train(run, data, folder)))
        except Exception:
            print(traceback.format_exc(), flush=True)
            pipe.send(("failed", traceback.format_exc()))
            return
