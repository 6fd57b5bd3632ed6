"""Attention of Motif-2-12.7B and one decoding step: `kernels benchmark .` from the folder of this repository."""

import torch
from kernels.benchmark import Benchmark


class GDAAttentionBenchmark(Benchmark):
    """2 rows of 4096 tokens with 8 groups of 4 + 1 heads on a GPU, a few small ones on a CPU."""

    seed = 0

    def setup(self):
        on_gpu = self.device == "cuda"
        batch, tokens, groups, ratio, dim = (2, 4096, 8, 4, 128) if on_gpu else (1, 20, 2, 2, 16)
        shapes = ((batch, tokens, groups, ratio, dim), (batch, tokens, groups, dim))
        shapes += ((batch, tokens, groups, 2, dim),) * 2
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.inputs = [torch.randn(shape, device=self.device, dtype=dtype).requires_grad_() for shape in shapes]
        self.inputs += [torch.tensor(0.4, device=self.device, requires_grad=True)]
        self.inputs += [torch.ones(2 * dim, device=self.device, requires_grad=True)]

    def _definition(self, tokens: slice) -> torch.Tensor:
        signal_query, noise_query, key, value, lambda_, weight = (each.detach().float() for each in self.inputs)
        length = key.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()[tokens]
        value = value.flatten(3)  # (B, S, G, 2D)
        maps = []
        for query, half in ((signal_query, 0), (noise_query[:, :, :, None], 1)):
            logits = torch.einsum("btgrd,bsgd->bgrts", query[:, tokens], key[:, :, :, half]) * key.shape[-1] ** -0.5
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            maps.append(torch.einsum("bgrts,bsgv->btgrv", weights, value))
        difference = maps[0] - lambda_ * maps[1]
        normed = difference * torch.rsqrt(difference.square().mean(-1, keepdim=True) + 1e-5)
        return (normed * weight * 0.7).to(self.inputs[0].dtype)

    def benchmark_attention(self):
        with torch.no_grad():
            self.out = self.kernel.gda_attention(*self.inputs, out_scale=0.7)[0][:, -16:]

    def verify_attention(self) -> torch.Tensor:
        return self._definition(slice(-16, None))

    def benchmark_attention_training(self):
        out, _ = self.kernel.gda_attention(*self.inputs, out_scale=0.7)
        self.out = torch.autograd.grad(out, self.inputs, out.detach())[0]

    def benchmark_decode(self):
        token = [each[:, -1:] if index < 2 else each for index, each in enumerate(self.inputs)]
        self.out = self.kernel.gda_decode(*token, out_scale=0.7)

    def verify_decode(self) -> torch.Tensor:
        return self._definition(slice(-1, None))
