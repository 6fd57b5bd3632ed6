"""Pre-train a Motif-2 model: `motif2-pretrain --config recipes/pretrain/motif2_30m.yaml`.

On several accelerators the same command runs under an accelerate file: `accelerate launch --config_file
recipes/accelerate/fsdp2_node.yaml -m trainer.pretrain --config recipes/pretrain/motif2_12b7.yaml`.
"""

import faulthandler
import os
import signal

import torch
import yaml

from modeling_motif2 import Motif2Config
from trainer.cli import parse_recipe
from trainer.config import PretrainConfig
from trainer.errors import RunStoppedError, StoppedBySignalError
from trainer.flops import BYTES_BFLOAT16, BYTES_FLOAT32, count_parameters, flops_per_token, memory_by_rank, run_flops
from trainer.head_loss import FULL_LOGITS_BYTES
from trainer.loop import run_pretraining
from trainer.model import load_tokenizer, model_config
from trainer.step import NonFiniteLossError

DESCRIPTION = """Pre-train a Motif-2 model on a mixture of domains whose shares change at every step.

A recipe names the model's shape, the domains with their sources and shares, the length of the run and the optimizer.
The command tokenises what is missing in data_dir, trains, evaluates on held-out documents, writes checkpoints, and
ends with output_dir/model for from_pretrained. Started again after an interruption it goes on from the last
checkpoint.
See what a recipe would do, without doing it: add --dry_run."""
PEAK_TFLOPS_H100 = 989.0


def main(argv: list[str] | None = None) -> None:
    """Entry point of `motif2-pretrain`."""
    if not faulthandler.is_enabled():  # a shard that is cut short while it is read kills without an exception
        faulthandler.enable(file=2)
    (config,) = parse_recipe(PretrainConfig, description=DESCRIPTION, argv=argv)
    termination = _Termination()
    before = signal.signal(signal.SIGTERM, termination.handle)
    try:
        if config.dry_run:
            print(describe_run(config))
            return
        result = run_pretraining(config, stop_asked=termination)
    except (ValueError, OSError, NonFiniteLossError, RunStoppedError) as error:
        raise SystemExit(f"motif2-pretrain: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("motif2-pretrain: interrupted: start the same command again to go on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)):
        return
    print(f"{result.steps} steps, {result.tokens:,} tokens; model in {result.model_dir}")
    print(f"  padding took {result.padding_share:.2%} of them, {result.lost_share:.2%} were not learnt from in all")
    for name, loss in result.last_eval.items():
        print(f"  held-out loss {name}: {result.first_eval[name]:.4f} -> {loss:.4f}")


class _Termination:
    """SIGTERM, as from a launcher that lost a rank: acted on between two steps, and before the first one at once."""

    def __init__(self):
        self.asked = self.training = False

    def handle(self, *_) -> None:
        """Note the signal.

        Raises:
            StoppedBySignalError: training has not begun.
        """
        repeated, self.asked = self.asked, True
        if not (self.training or repeated):  # a second one would interrupt the cleaning up after the first
            raise StoppedBySignalError("a signal stopped this process before its first step: start the command again")

    def __call__(self) -> bool:
        self.training = True
        return self.asked


def describe_run(config: PretrainConfig) -> str:
    """What a run would do: settings, parameters, FLOPs a token, tokens a step, memory by rank, days."""
    known = config.vocab_size or config.model_name_or_path
    architecture = model_config(config, None if known else load_tokenizer(config.tokenizer))
    counts = count_parameters(architecture)
    plan = config.batch_plan()
    shapes = [plan.shape(tokens) for tokens in (0, *config.sequence_length_stages, config.total_tokens)]
    gpus, mfu, peak = config.dry_run_gpus, config.dry_run_mfu, config.peak_tflops or PEAK_TFLOPS_H100
    days = run_flops(architecture, config.total_tokens, plan.lengths) / (gpus * peak * 1e12 * mfu) / 86_400
    kinds = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total")
    by_length = ", ".join(
        f"{flops_per_token(architecture, length):.4g} in rows of {length}"
        for length in sorted(set(plan.lengths.values()))
    )
    sizes = [f"{rows * length:,} ({rows} rows of {length})" for length, rows in dict.fromkeys(shapes)]
    return "\n".join(
        [
            yaml.safe_dump(config.to_dict(), sort_keys=False),
            f"parameters       {counts['total']:,} ({kinds})",
            f"FLOPs a token    {by_length}",
            f"tokens a step    {' to '.join(sizes)}",
            _describe_memory(config, architecture),
            f"at the start     {BYTES_FLOAT32 * counts['total'] / 2**30:.2f} GiB in every rank's host memory, then "
            "on its GPU: the model is made whole, in float32, and sharded there",
            f"time             {days:.3g} days on {gpus} x {peak:g} TFLOP/s at an MFU of {mfu:.0%} "
            f"({24 * days * gpus:,.0f} GPU hours)",
        ]
    )


def _describe_memory(config: PretrainConfig, architecture: Motif2Config) -> str:
    """Memory of a rank at the run's largest rows, and what it was reckoned with."""
    gpus, plan = config.dry_run_gpus, config.batch_plan()
    shards = config.dry_run_shards or gpus
    length, rows = plan.shape(config.total_tokens)
    rank_tokens = max(length, rows * length * config.tensor_parallel // gpus)  # those ranks have the same rows
    micro = min(config.micro_batch_tokens or rank_tokens, rank_tokens)
    split = config.tensor_parallel > 1  # its ranks hold parts of the words, so that no chunk is whole on any
    large = BYTES_FLOAT32 * micro * architecture.vocab_size > FULL_LOGITS_BYTES
    chunked = config.loss == "chunked" or (config.loss == "auto" and large and not split)
    memory = memory_by_rank(
        architecture,
        micro,
        shards,
        recompute=config.gradient_checkpointing,
        recompute_every=config.gradient_checkpointing_every,
        autocast=config.mixed_precision == "bf16",
        chunked_loss=chunked,
        accumulates=micro < rank_tokens,
        muon=config.optimizer == "muon_clip",
    )
    if split:  # nothing is gathered; autocast copies a rank's own part
        copied = BYTES_BFLOAT16 if config.mixed_precision == "bf16" else 0
        memory["gathered"] = copied * count_parameters(architecture)["total"] / shards
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    return (
        f"memory by rank   {sum(memory.values()) / 2**30:.2f} GiB, states over {shards} of {gpus} ranks, "
        f"{micro:,} tokens at once, {'chunked' if chunked else 'full'} loss ({parts});\n"
        f"{'':17}measured peaks were 2 to 12% lower at 12.7B under FSDP2 and HSDP, 3 to 23% lower at 1.5B, and 20% "
        "higher without compile_layers"
    )


if __name__ == "__main__":
    main()
