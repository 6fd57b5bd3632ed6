"""Newton-Schulz orthogonalisation of batched matrices, as the Muon optimizer uses it.

`newton_schulz` is the entry; `newton_schulz_flops` counts its work. The Triton kernels are in `triton_kernels`, their
launches in `triton_products`.
"""

from .arithmetic import default_restarts, newton_schulz_flops
from .coefficients import COEFFICIENTS
from .orthogonalize import newton_schulz

__all__ = ["COEFFICIENTS", "default_restarts", "newton_schulz", "newton_schulz_flops"]
