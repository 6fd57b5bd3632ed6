"""Other Muons for parallel_muonclip.py: torch's on whole matrices, and packages from a folder on the same shards.

`bench` is that program's `Bench`. Packages come one after the other, each in processes of its own, one a rank, which
are ended when its time is up: one that compiles for longer takes nothing from the next. One that cannot run says why.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

# Defaults apart, so that all do the same: five steps, Nesterov, plain decay, the update's size as AdamW's.
_DTENSOR = {"lr": 1e-4, "wd": 0.1, "use_cautious_wd": False, "orthogonalization_strategy": "newton_schulz"}


def _muon_fsdp2(module, bench, parameters: list[nn.Parameter]) -> Optimizer:
    return module.Muon([{"params": parameters, "lr": 1e-4, "weight_decay": 0.1, "use_muon": True}])


def _dtensor_muon(module, bench, parameters: list[nn.Parameter]) -> Optimizer:
    return module.Muon(parameters, **_DTENSOR)


def _dtensor_muon_foreach(module, bench, parameters: list[nn.Parameter]) -> Optimizer:
    return module.MuonForeach(parameters, batch_size=2 * bench.world_size, **_DTENSOR)


def _muonium(module, bench, parameters: list[nn.Parameter]) -> Optimizer:
    return module.Muon(parameters, batch_size=2 * bench.world_size, **_DTENSOR)


def _dion(module, bench, parameters: list[nn.Parameter]) -> Optimizer:
    by_shape: dict = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    groups = [{"params": members} for members in by_shape.values()]
    options = {"lr": 1e-4, "mu": 0.95, "nesterov": True, "adjust_lr": "rms_norm", "use_triton": bench.cuda}
    return module.Muon(groups, distributed_mesh=bench.mesh, **options)


# row: (package, how its optimizer is made)
PEERS: dict[str, tuple[str, Callable]] = {
    "dion Muon, Triton": ("dion", _dion),
    "muon-fsdp2": ("muon_fsdp2", _muon_fsdp2),
    "muonium": ("muonium", _muonium),
    "dtensor-muon, MuonForeach": ("dtensor_muon", _dtensor_muon_foreach),
    "dtensor-muon, Muon": ("dtensor_muon", _dtensor_muon),
}


def time_torch_muon(bench) -> None:
    """torch.optim.Muon on a rank's share of whole matrices: no sharding, so no communication either."""
    parameters = []
    for index in range(bench.rank, bench.num_layers * len(bench.shapes), bench.world_size):
        shape = list(bench.shapes.values())[index // bench.world_size % len(bench.shapes)]
        parameters.append(nn.Parameter(torch.randn(shape, device=bench.device)))
        parameters[-1].grad = torch.randn(shape, device=bench.device)
    optimizer = torch.optim.Muon(parameters, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    bench.report("torch.optim.Muon, whole share", "-", "plain", *bench.measure(optimizer.step))


def time_peers(bench) -> None:
    """Every package of `PEERS`, each in processes of its own, with the seconds that one may take."""
    arguments = bench.arguments
    if not arguments.peers:
        bench.say("not run: name a folder that holds the packages with --peers")
        return
    bench.layers.clear()
    bench.clean()
    with contextlib.ExitStack() as stack:
        folder = [
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)) if bench.rank == 0 else ""
        ]
        dist.broadcast_object_list(folder)
        wanted = [row for row in PEERS if any(part in row for part in arguments.peer_rows)]
        for number, row in enumerate(wanted):
            told = ["--peer", row, "--peer_folder", f"{folder[0]}/{number}"]
            if bench.rank == 0:
                os.mkdir(told[-1])
            dist.barrier()
            reason = _run(bench, told)
            found = Path(told[-1]) / "rows.json"
            if bench.rank == 0 and found.is_file():
                bench.rows += json.loads(found.read_text())
            elif bench.rank == 0:
                bench.keep({"row": f"{row}: {reason}"})
            if reason:
                bench.say(f"{row}: {reason}")
            bench.save()
        dist.barrier()  # the folder goes after that


def _run(bench, told: list[str]) -> str:
    """Run this program on this rank for one package; why there is no row of it, if so."""
    limit, failed = bench.arguments.peer_seconds, Path(told[-1]) / "failed"
    own = {"TORCHINDUCTOR_CACHE_DIR": str(failed.parents[1] / f"inductor_{bench.rank}")}  # ranks race for a common one
    process = subprocess.Popen([sys.executable, *sys.argv, *told], env=os.environ | own)
    started, ended = time.perf_counter(), None
    while process.poll() is None:
        now = time.perf_counter()
        ended = ended or (now if failed.exists() else None)
        if now - started > limit or (ended and now - ended > 5):  # another rank has failed: this one may wait for it
            process.kill()
            process.wait()
            return "failed on another rank" if ended else f"not done after {limit:.0f} s"
        time.sleep(0.2)
    if process.returncode:
        failed.touch()
        return f"does not run here: exit code {process.returncode}"
    return ""


def time_peer(bench) -> None:
    """One package on fresh shards, in a process group of its own; its row goes to the folder."""
    arguments = bench.arguments
    sys.path.insert(0, arguments.peers)
    package, make = PEERS[arguments.peer]
    try:
        parameters = [parameter for layer in bench.layers for parameter in layer.values()]
        optimizer = make(importlib.import_module(package), bench, parameters)
        bench.report(arguments.peer, "-", None, *bench.measure(optimizer.step))
    except Exception as error:
        if bench.rank == 0:
            print(f"{arguments.peer}: {type(error).__name__}: {error}"[:600], flush=True)
            print(traceback.format_exc()[-1500:], file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the others
    if bench.rank == 0:
        (Path(arguments.peer_folder) / "rows.json").write_text(json.dumps(bench.rows))
    dist.barrier()
    dist.destroy_process_group()
