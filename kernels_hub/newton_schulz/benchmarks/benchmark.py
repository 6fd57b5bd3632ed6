"""For `kernels benchmark`: one matrix of each projection of Motif-2-12.7B, Gram and classic form, against float64.

On a CPU the matrices are an eighth of that in each direction.
"""

import torch
from kernels.benchmark import Benchmark

SHAPES = {"gate": (4096, 16384), "query": (5120, 4096), "key": (2048, 4096), "output": (4096, 8192)}


class NewtonSchulzBenchmark(Benchmark):
    seed = 0

    def _prepare(self, name: str) -> None:
        scale = 1 if self.device == "cuda" else 8
        rows, columns = (side // scale for side in SHAPES[name])
        self.matrix = torch.randn(rows, columns, device=self.device)
        self.out = torch.empty_like(self.matrix)

    def _verify(self) -> torch.Tensor:
        return self.kernel.newton_schulz(self.matrix.double(), "classic").float()

    def setup_gate(self):
        self._prepare("gate")

    def benchmark_gate(self):
        self.kernel.newton_schulz(self.matrix, out=self.out)

    def verify_gate(self) -> torch.Tensor:
        return self._verify()

    def setup_query(self):
        self._prepare("query")

    def benchmark_query(self):
        self.kernel.newton_schulz(self.matrix, out=self.out)

    def verify_query(self) -> torch.Tensor:
        return self._verify()

    def setup_key(self):
        self._prepare("key")

    def benchmark_key(self):
        self.kernel.newton_schulz(self.matrix, out=self.out)

    def verify_key(self) -> torch.Tensor:
        return self._verify()

    def setup_output(self):
        self._prepare("output")

    def benchmark_output(self):
        self.kernel.newton_schulz(self.matrix, out=self.out)

    def verify_output(self) -> torch.Tensor:
        return self._verify()
