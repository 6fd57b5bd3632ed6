"""Other Muons for parallel_muonclip.py: torch's on whole matrices, and packages from a folder on the same shards.

`bench` is that program's `Bench`. A package that cannot run is printed with its reason. One that compiles for longer
than its limit ends the program, since the ranks can then be anywhere; so packages come last, and slow compilers last
of them.
"""

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable

import torch
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


# row: (package, how its optimizer is made); quick compilers first
PEERS: dict[str, tuple[str, Callable]] = {
    "muon-fsdp2": ("muon_fsdp2", _muon_fsdp2),
    "dion Muon, Triton": ("dion", _dion),
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


def time_peers(bench, folder: str, limit_seconds: float) -> None:
    """Every package of `PEERS` that lies in a folder, on fresh shards; what fails says why."""
    if not folder:
        bench.say("not run: name a folder that holds the packages with --peers")
        return
    sys.path.insert(0, folder)
    for row, (package, make) in PEERS.items():
        bench.renew_layers(copies=1)  # some write into gradients
        parameters = [parameter for layer in bench.layers for parameter in layer.values()]
        watch = threading.Timer(limit_seconds, _give_up, (bench, row, limit_seconds))
        watch.daemon = True
        watch.start()
        optimizer = None
        try:
            optimizer = make(importlib.import_module(package), bench, parameters)
            bench.report(row, "-", None, *bench.measure(optimizer.step))
        except Exception as error:
            if bench.rank == 0:
                print(f"{row}: does not run here: {type(error).__name__}: {error}"[:600], flush=True)
                print(traceback.format_exc()[-1500:], file=sys.stderr, flush=True)
        finally:
            watch.cancel()
        del optimizer, parameters
        bench.save()


def _give_up(bench, row: str, limit_seconds: float) -> None:
    bench.say(f"{row}: took over {limit_seconds:.0f} s, most likely to compile; the program ends here")
    os._exit(0)
