"""What the tests of the Newton-Schulz kernels share: the package, a float64 reference, and spectra."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

REPOSITORY = Path(__file__).resolve().parents[2] / "kernels_hub" / "newton_schulz"


def load_package() -> ModuleType:
    """The sources under `torch-ext`, under the name other code in this checkout gives them."""
    if "newton_schulz" not in sys.modules:
        file = REPOSITORY / "torch-ext" / "newton_schulz" / "__init__.py"
        spec = importlib.util.spec_from_file_location("newton_schulz", file)
        sys.modules["newton_schulz"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["newton_schulz"])
    return sys.modules["newton_schulz"]


def polynomial_of_singular_values(matrices: torch.Tensor, steps: tuple) -> torch.Tensor:
    """U p(S) V' in float64: what the iteration would give without rounding, reached without iterating on matrices."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def draw(rows: int, columns: int, spectrum: str, seed: int = 0) -> torch.Tensor:
    """A float64 matrix, rows <= columns, of a named spectrum."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if spectrum == "gaussian":
        return gaussian(rows, columns)
    left, right = torch.linalg.qr(gaussian(rows, rows))[0], torch.linalg.qr(gaussian(columns, rows))[0]
    index = torch.arange(rows, dtype=torch.float64)
    if spectrum == "power_law":
        return (left / (index + 1)) @ right.mT
    if spectrum == "exponential":
        return (left * 10 ** (-4 * index / (rows - 1))) @ right.mT
    rank = rows // 16
    return left[:, :rank] @ right[:, :rank].mT + 1e-3 * gaussian(rows, columns) / columns**0.5
