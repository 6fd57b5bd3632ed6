"""Forward and backward at the width of Motif-2-12.7B: `kernels benchmark .` from the folder of this repository."""

import torch
from kernels.benchmark import Benchmark


class PolyNormBenchmark(Benchmark):
    """8192 rows of 16384 columns on a GPU, a few small rows on a CPU."""

    seed = 0

    def setup(self):
        shape = (8192, 16384) if self.device == "cuda" else (16, 256)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.x, self.up = (torch.randn(shape, device=self.device, dtype=dtype).requires_grad_() for _ in range(2))
        self.weight = torch.tensor([0.4, 0.3, 0.3], device=self.device).requires_grad_()
        self.bias = torch.tensor([0.05], device=self.device).requires_grad_()

    def _definition(self) -> torch.Tensor:
        def norm(z):
            return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)

        x = self.x.float()
        powers = self.weight[0] * norm(x**3) + self.weight[1] * norm(x**2) + self.weight[2] * norm(x)
        return (powers + self.bias).to(self.x.dtype)

    def benchmark_poly_norm(self):
        with torch.no_grad():
            self.out = self.kernel.poly_norm(self.x, self.weight, self.bias)

    def verify_poly_norm(self) -> torch.Tensor:
        with torch.no_grad():
            return self._definition()

    def benchmark_poly_norm_mul(self):
        with torch.no_grad():
            self.out = self.kernel.poly_norm_mul(self.x, self.up, self.weight, self.bias)

    def benchmark_poly_norm_mul_training(self):
        y = self.kernel.poly_norm_mul(self.x, self.up, self.weight, self.bias)
        self.out = torch.autograd.grad(y, (self.x, self.up, self.weight, self.bias), y.detach())[0]
