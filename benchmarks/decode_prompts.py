"""What `decode.py` times of whole calls: transformers' `generate`, and a prompt's prefill.

Shapes: B rows, T tokens of the prompt.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from modeling_motif2 import stopping_late

PAIRS = 3  # of a short and a long call


def generations(model, prompt: int, tokens: tuple[int, int], options: dict) -> Iterator[tuple[str, float, str]]:
    """Times a token of `generate` in four ways: without and with every guard, stopping one step late and at once.

    A token's time is the difference of two calls over that of their lengths, so that the prompt is not in it. These
    watch for an end token that is not written; another one, which is, must end the same text in every way.

    Args:
        model: ready to decode.
        prompt: tokens of the prompt.
        tokens: new tokens of a short and of a long call.
        options: for Inductor.

    Yields:
        A name's end, the milliseconds of a token (median of pairs of calls), and what else is worth telling.

    Raises:
        AssertionError: if a way writes other tokens than the first, or ends elsewhere.
    """
    few, many = tokens
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=prompt + many)

    def call(count: int, config: CompileConfig, end: int | None) -> tuple[torch.Tensor, float]:
        cache.reset()
        started = time.perf_counter()
        written = model.generate(
            ids, past_key_values=cache, compile_config=config, max_new_tokens=count, do_sample=False, eos_token_id=end,
            pad_token_id=0,
        )  # fmt: skip
        written.sum().item()  # waits for the device
        return written, time.perf_counter() - started

    wanted = None
    for filtered in (True, False):
        more = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe} if filtered else {}
        config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options | more)
        config._compile_all_devices = True
        torch.compiler.reset()
        _, compiling = call(few, config, None)
        if wanted is None:
            wanted, _ = call(many, config, None)
            said = wanted[0, prompt:].tolist()
            never = min(set(range(3, model.config.vocab_size)) - set(said))
            stop = max(said.index(token) for token in said) + 1  # the last token that is new ends the text
        for late in (True, False):
            found = []
            with stopping_late() if late else contextlib.nullcontext():
                ended, _ = call(many, config, said[stop - 1])
                assert torch.equal(ended, wanted[:, : prompt + stop]), "it ended elsewhere, or with other tokens"
                for _ in range(PAIRS):
                    (_, short), (written, long) = call(few, config, never), call(many, config, never)
                    found.append(1e3 * (long - short) / (many - few))
            assert torch.equal(written, wanted), "another way to stop or to guard wrote other tokens"
            name = (", late stop" if late else "") + ("" if filtered else ", every guard")
            note = f"{PAIRS} times {min(found):.2f} to {max(found):.2f} ms; the first call took {compiling:.0f} s"
            yield name, statistics.median(found), note


@torch.no_grad()
def prompt_milliseconds(model, batch: int, tokens: int, kind: str) -> float:
    """Median time of a prompt (B, T), logits of the last token only.

    Args:
        model: ready.
        batch: B.
        tokens: T.
        kind: of cache, "static" or "dynamic"; empty for none.
    """
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=tokens + 64) if kind == "static" else None
    times = []
    for _ in range(4):
        if kind == "static":
            cache.reset()
        else:
            cache = DynamicCache(config=model.config) if kind else None
        if ids.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model(
            ids, past_key_values=cache, use_cache=bool(kind), logits_to_keep=1
        ).logits.sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])
