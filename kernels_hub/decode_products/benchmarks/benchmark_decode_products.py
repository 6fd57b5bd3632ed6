"""Products of one token with the MLP's weights of Motif-2-12.7B: `kernels benchmark .` from its folder."""

import torch
from kernels.benchmark import Benchmark


class DecodeProductsBenchmark(Benchmark):
    """Hidden size 4096 and intermediate size 16384 on a GPU, small ones on a CPU."""

    seed = 0

    def setup(self):
        on_gpu = self.device == "cuda"
        hidden, intermediate = (4096, 16384) if on_gpu else (64, 96)
        options = {"device": self.device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
        self.x = torch.randn(1, 1, hidden, **options)
        self.weights = [torch.randn(intermediate, hidden, **options) / hidden**0.5 for _ in range(2)]
        self.norm_weight = torch.ones(hidden, device=self.device)
        self.factors = torch.full((3,), 1 / 3, device=self.device), torch.zeros(1, device=self.device)
        self.both = torch.randn(1, 1, 2 * intermediate, **options)

    def benchmark_normed_product(self):
        self.out = self.kernel.product(self.x, self.weights, norm_weight=self.norm_weight)

    def verify_normed_product(self) -> torch.Tensor:
        wide = self.x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide @ torch.cat(self.weights).float().T).to(self.x.dtype)

    def benchmark_poly_norm_mul(self):
        self.out = self.kernel.poly_norm_mul(self.both, *self.factors)

    def verify_poly_norm_mul(self) -> torch.Tensor:
        gate, up = self.both.float().chunk(2, dim=-1)
        powers = (gate**3, gate**2, gate)
        normed = sum(power * torch.rsqrt(power.square().mean(-1, keepdim=True) + 1e-6) for power in powers)
        return (normed / 3 * up).to(self.x.dtype)
