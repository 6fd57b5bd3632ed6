"""What parallel_muonclip.py checks before it times: kernels and whole steps against float64, copies against shards.

`bench` is that program's `Bench`: ranks, device, shapes, and how a matrix is shared out.
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.optim.muon_clip_reference import newton_schulz_reference, update_scale
from trainer.optim.orthogonalise import Orthogonaliser

SPECTRA = ("gaussian", "power_law", "low_rank_noise")


def matrix_of(spectrum: str, shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """A float32 matrix with Gaussian entries, singular values falling as 1/k, or 16 directions in noise."""
    generator = torch.Generator(device).manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, device=device)
    if spectrum == "gaussian":
        return randn(shape)
    if spectrum == "low_rank_noise":
        return randn(shape[0], 16) @ randn(16, shape[1]) + 1e-2 * randn(shape)
    size = min(shape)
    left = torch.linalg.qr(randn(shape[0], size))[0]
    right = torch.linalg.qr(randn(shape[1], size))[0]
    return left / torch.arange(1, size + 1, device=device) @ right.mT


def real_gradients(bench) -> dict[str, Tensor]:
    """Gradients of one full-size Motif-2 layer on real text: the bytes of a long Python source."""
    scale = bench.arguments.scale
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=256,
        hidden_size=4096 // scale,
        intermediate_size=16384 // scale,
        num_hidden_layers=1,
        num_attention_heads=40,
        num_key_value_heads=16,
        num_noise_heads=8,
        head_dim=128 // scale,
    )
    with bench.device:
        model = Motif2ForCausalLM(config)
    text = Path(argparse.__file__).read_bytes()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 4 * 4096 // scale].long().view(4, -1)
    ids = ids.to(bench.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layer = model.model.layers[0]
    modules = {name: getattr(layer.mlp if name[:4] in ("gate", "up_p", "down") else layer.self_attn, name)
               for name in bench.shapes}  # fmt: skip
    return {name: module.weight.grad for name, module in modules.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to `expected` (float64)."""
    return float((actual.double() - expected).norm() / expected.norm())


def plain_bfloat16(matrix: Tensor) -> Tensor:
    """The report's path: the classic form in bfloat16 without symmetric kernels."""
    return newton_schulz_reference(matrix.bfloat16())


def check_kernels(bench) -> None:
    """Every shape and spectrum against the float64 polynomial, beside the report's bfloat16 path."""
    bench.say("| shape | spectrum | report's bfloat16 | classic | gram |\n|---|---|---|---|---|")
    makers = {method: Orthogonaliser(method, "motif", "auto") for method in ("classic", "gram")}
    cases = [(shape, spectrum) for shape in sorted(set(bench.shapes.values())) for spectrum in SPECTRA]
    gradients = real_gradients(bench)
    cases += [(bench.shapes[name], f"gradient of {name}") for name in gradients]
    for index, (shape, spectrum) in enumerate(cases):
        errors = torch.zeros(3, dtype=torch.float64, device=bench.device)
        if index % bench.world_size == bench.rank:
            real = gradients.get(spectrum.removeprefix("gradient of "))
            matrix = matrix_of(spectrum, shape, bench.device, seed=index) if real is None else real
            expected = newton_schulz_reference(matrix.double())
            results = [plain_bfloat16(matrix), *(maker([matrix.clone()[None]])[0][0] for maker in makers.values())]
            errors += torch.tensor([relative_error(result, expected) for result in results], device=bench.device)
        dist.all_reduce(errors)
        plain, classic, gram = errors.tolist()
        bench.say(f"| {shape[0]} x {shape[1]} | {spectrum} | {plain:.1e} | {classic:.1e} | {gram:.1e} |")
        found = {"bfloat16_error": plain, "classic_error": classic, "gram_error": gram}
        bench.keep({"row": f"error, {shape[0]} x {shape[1]}, {spectrum}", **found})
        if not (classic <= 1.05 * plain + 1e-6 and gram <= 1.05 * plain + 1e-6):
            raise SystemExit(f"{shape} {spectrum}: an error is larger than the report's path has: nothing is timed")


def check_step(bench, table: dict[str, dict]) -> dict[str, dict[str, Tensor]]:
    """One step on one layer against float64 on the whole matrices, and every row's step against the others' bits.

    Returns:
        dict: the new weights by method and name.
    """
    first: dict[str, dict[str, Tensor]] = {}
    for row, options in table.items():
        compare_step(bench, row, options, first)
    return first


def compare_step(bench, row: str, options: dict, first: dict[str, dict[str, Tensor]]) -> None:
    """One row's step on one layer; `first` holds what each method's first row gave."""
    weights = {name: 0.02 * matrix_of("gaussian", shape, bench.device, 7) for name, shape in bench.shapes.items()}
    gradients = {name: matrix_of("gaussian", shape, bench.device, 8) for name, shape in bench.shapes.items()}
    layer = {}
    for name, shape in bench.shapes.items():
        layer[name] = nn.Parameter(bench.sharded(bench.own_rows(weights[name]), shape))
        layer[name].grad = bench.sharded(bench.own_rows(gradients[name]), shape)
    bench.optimizer([layer], qk_clip_threshold=1e9, weight_decay=0.0, **options).step()
    same = first.setdefault(options["method"], {name: p.detach().full_tensor() for name, p in layer.items()})
    worst = 0.0
    for name, parameter in layer.items():
        full = parameter.detach().full_tensor()
        if not torch.equal(full, same[name]):
            raise SystemExit(f"{row} differs from other {options['method']} rows in {name}: nothing is timed")
        update = (weights[name].double() - full) / (1e-4 * update_scale(*full.shape))
        worst = max(worst, relative_error(update, newton_schulz_reference(gradients[name].double())))
    bench.say(f"{row}: largest relative error of an update {worst:.1e}")
    # bfloat16 on the wire and in the classic form is good for less than 1e-2 (assumption: twice that is a fault)
    if not worst < 2e-2:
        raise SystemExit(f"{row} is wrong by {worst}: nothing is timed")
