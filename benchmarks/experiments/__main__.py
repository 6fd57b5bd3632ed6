"""Make the runs of experiments, many at a time, and say what they show.

    python -m benchmarks.experiments --recipe recipes/experiments/attention.yaml --tiny
        every part in a minute on a CPU, too short to learn anything
    python -m benchmarks.experiments --recipe recipes/experiments/{attention,optimizer}.yaml --gpus 4 --workers_per_gpu 10
        all runs of these recipes, those of the first one first; the same command again makes only what is missing
    python -m benchmarks.experiments --recipe recipes/experiments/attention.yaml --report
        tables, verdicts and figure from the results, into the recipe's page
    python -m benchmarks.experiments --recipe recipes/experiments/attention.yaml --afresh --results FOLDER
        every run again, whatever is in the repository

Results lie in FOLDER/<recipe>/runs.csv and curves.csv, with FOLDER as --results says. A run whose settings are there, or
in benchmarks/results/experiments, for whichever recipe, is finished (with --afresh: only what is in FOLDER/<recipe>); one that was cut by --seconds is there as far as it
came, and made anew by the next call. Small models leave a GPU idle most of the time, so several processes share it, at
the same time where NVIDIA's MPS runs. A recipe's keys are explained in benchmarks/experiments/recipe.py.
"""  # noqa: E501

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.experiments.pool import ALONE, Outcome, Pool
from benchmarks.experiments.recipe import ROOT, Recipe, Run
from benchmarks.experiments.results import Results, all_results
from benchmarks.experiments.sharing import shared_gpus

TINY_FOLDER = ROOT / "runs" / "experiments_tiny"
KEPT = ROOT / "benchmarks" / "results" / "experiments"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    try:
        recipes = [Recipe.read(path, arguments.tiny) for path in arguments.recipe]
        devices = choose_devices(arguments.gpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(arguments.results)
    if arguments.list:
        for recipe in recipes:
            finished = Results(folder / recipe.name).finished
            for run in recipe.runs(finished):
                print(f"{'done' if run.key in finished else '    '} {run.key} {run.name}")
        return 0
    if arguments.merge:
        for recipe in recipes:
            taken = Results(folder / recipe.name).take(Results(Path(arguments.merge) / recipe.name))
            print(f"{recipe.name}: {taken} runs taken from {arguments.merge}")
        return 0
    if not arguments.report:
        if arguments.tiny and folder == TINY_FOLDER:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            outcome = make_runs(recipes, arguments, devices, folder)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if outcome.failed:
            return 1
    if arguments.report or arguments.tiny:
        from benchmarks.experiments.report import report  # matplotlib is not needed where runs are made

        for recipe in recipes:
            pages = folder if arguments.tiny else ROOT
            print(report(recipe, Results(folder / recipe.name), pages))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", nargs="+", required=True, metavar="YAML", help="the most important first")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to use; 0 trains on the CPU")
    parser.add_argument("--workers_per_gpu", type=int, default=1, help="processes a GPU, or on the CPU")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="what has not ended by then is cut (default: no limit)"
    )
    parser.add_argument(
        "--results", metavar="FOLDER", help="default: $OUT/experiments or benchmarks/results/experiments"
    )
    parser.add_argument(
        "--work", metavar="FOLDER", help="for data, unfinished runs and logs (default runs/experiments)"
    )
    parser.add_argument("--tiny", action="store_true", help="try everything in miniature; results in runs/")
    parser.add_argument("--report", action="store_true", help="make no run: tables, verdicts and figures only")
    parser.add_argument("--merge", metavar="FOLDER", help="make no run: take another machine's results into --results")
    parser.add_argument(
        "--afresh", action="store_true", help="take over no finished run from the repository; needs --results"
    )
    parser.add_argument("--list", action="store_true", help="make no run: name those that are known by now")
    arguments = parser.parse_args(argv)
    if arguments.workers_per_gpu < 1 or arguments.gpus < 0:
        parser.error(
            f"--gpus {arguments.gpus} --workers_per_gpu {arguments.workers_per_gpu}: use 0 or more, 1 or more"
        )
    if arguments.afresh and not arguments.results:
        parser.error("--afresh needs --results with a folder of its own")
    if arguments.afresh and Path(arguments.results).resolve() == KEPT:
        parser.error(f"--afresh with --results {arguments.results}: its runs are finished, name another folder")
    usual = Path(os.environ["OUT"]) / "experiments" if os.environ.get("OUT") else KEPT
    arguments.results = arguments.results or (TINY_FOLDER if arguments.tiny else usual)
    arguments.work = arguments.work or (TINY_FOLDER if arguments.tiny else ROOT / "runs" / "experiments")
    return arguments


def choose_devices(gpus: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each GPU in turn; empty for the CPU.

    Raises:
        ValueError: fewer are visible.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(gpus)]
    names = [name for name in visible.split(",") if name]
    if len(names) < gpus:
        raise ValueError(f"--gpus is {gpus}, but CUDA_VISIBLE_DEVICES is {visible!r}: ask for {len(names)}")
    return names[:gpus]


def make_runs(recipes: list[Recipe], arguments: argparse.Namespace, devices: list[str], folder: Path) -> Outcome:
    """Train what is missing."""
    started = time.monotonic()
    results = {recipe.name: Results(folder / recipe.name) for recipe in recipes}
    others = [*to_adopt(arguments), *results.values()]
    commit = current_commit()

    def next_runs() -> list[Run]:
        for recipe in recipes:
            results[recipe.name].adopt(recipe.runs, others)
        finished = {recipe.name: results[recipe.name].finished for recipe in recipes}
        known = sorted(
            (run for recipe in recipes for run in recipe.runs(finished[recipe.name])), key=lambda run: run.turn
        )
        missing: dict[str, Run] = {}
        for run in known:  # what two recipes ask for is made once, for the first
            if run.key not in finished[run.recipe]:
                missing.setdefault(run.key, run)
        return list(missing.values())

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    def finish(run: Run, record: dict) -> None:
        results[run.recipe].add(record | {"commit": commit})
        loss = f"held-out loss {record['heldout_mean']:.4f}" if "heldout_mean" in record else record["status"]
        recall = f"  recall {record['recall_accuracy']:.3f}" if "recall_accuracy" in record else ""
        logit = f"  logit {record['max_logit']:.0f}" if "max_logit" in record else ""
        speed = f"{record.get('tokens_per_second', 0):,} tokens/s"
        say(f"{run.name}  {record['status']} in {record['seconds']} s, {speed}  {loss}{recall}{logit}")

    if not next_runs():
        say("all runs are finished")
        return Outcome()
    say(f"{len(next_runs())} runs to make, {len(devices) or 1} x {arguments.workers_per_gpu} workers")
    work = Path(arguments.work)
    with contextlib.ExitStack() as stack:
        if devices and arguments.workers_per_gpu > 1:
            devices, sharing = stack.enter_context(shared_gpus(devices, say))
            say(f"processes share a GPU by {sharing}")
        else:
            sharing = ALONE
        pool = stack.enter_context(Pool(devices, arguments.workers_per_gpu, work, sharing))
        from benchmarks.experiments.data import prepare_data  # while the workers import what they need

        data = prepare_data(recipes, work / "data", arguments.tiny)
        say("data is ready")
        outcome = pool.work(data, next_runs, finish, started + arguments.seconds, say)
    tokens = sum(float(record["tokens"]) for result in results.values() for record in result.records.values())
    failed, left = len(outcome.failed), len(outcome.left)
    say(f"{outcome.finished} runs finished, {outcome.cut} cut, {failed} failed, {left} not begun")
    say(f"{tokens / 1e6:.1f}M tokens in all finished runs; results in {folder}")
    return outcome


def to_adopt(arguments: argparse.Namespace) -> list[Results]:
    """Results whose finished runs are taken over."""
    return [] if arguments.afresh else [*all_results(KEPT), *all_results(Path(arguments.results))]


def current_commit() -> str:
    """Short hash of the checkout, or what the environment says where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown")


if __name__ == "__main__":
    sys.exit(main())
