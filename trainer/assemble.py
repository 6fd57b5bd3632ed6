"""The parts of a run, made from its settings: accelerator, shards, batches, held-out rows, optimizer."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from kernels_hub import use_polynorm
from trainer.config import PretrainConfig
from trainer.data.loader import CurriculumLoader, heldout_batches
from trainer.data.shards import TokenCorpus, build_shards, check_tokenizer, load_manifest
from trainer.optim import build_muon_clip
from trainer.sharding import keep_losses_in_float32


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The run's accelerator, with its trackers and the timeout of its collectives.

    Raises:
        ValueError: a tracker is unknown or not installed, or tensor parallelism was not launched for.
    """
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # an earlier run of this process may have used another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.accelerator.is_available(),  # else accelerate takes gloo ranks for single processes
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else a variable divides losses again
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds))],
    )
    kept = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    for name in config.trackers:
        if name not in kept:  # accelerate leaves it out without a word
            mend = "name each" if name == "all" else f"pip install {name}, or take it out of trackers"
            raise ValueError(f"tracker {name!r} is not installed: {mend}")
    ranks, kind = accelerator.num_processes, accelerator.distributed_type
    if config.tensor_parallel > 1 and (config.tensor_parallel != ranks or kind == DistributedType.FSDP):
        raise ValueError(
            f"tensor_parallel is {config.tensor_parallel} and the run has {ranks} ranks of {kind.value}: it takes all "
            "ranks, launched without FSDP; set tensor_parallel 1 to shard with FSDP2 or HSDP"
        )
    return accelerator


def prepare_shards(config: PretrainConfig, tokenizer, accelerator: Accelerator) -> None:
    """Tokenise the domains that `data_dir` lacks, on the main process, and refuse another tokenizer's shards.

    Raises:
        ValueError: a domain has neither shards nor sources, a source cannot be read, or the tokenizer differs.
    """
    with accelerator.main_process_first():
        if accelerator.is_main_process and any(domain.get("sources") for domain in config.domains.values()):
            tokenise_sources(config, tokenizer)
    load_manifest(config.data_dir)
    check_tokenizer(config.data_dir, tokenizer)


def tokenise_sources(config: PretrainConfig, tokenizer) -> dict:
    """Tokenise the sources of every domain that `data_dir` lacks; returns the manifest."""
    return build_shards(
        config.data_dir,
        {name: domain["sources"] for name, domain in config.domains.items() if domain.get("sources")},
        tokenizer,
        heldout_fraction=config.heldout_fraction,
        shard_tokens=config.shard_tokens,
        seed=0,
        num_workers=config.data_workers,
        progress=config.progress,
    )


def put_kernels(config: PretrainConfig, accelerator: Accelerator, model: nn.Module) -> None:
    """Put PolyNorm's kernels into a model on its device, the same on all ranks.

    Raises:
        ValueError: a kernel that the settings name cannot be used here, or ranks found different ones.
    """
    options = {"lockfile": config.kernels_lock, "trust_remote_code": config.trust_kernels}
    choice = use_polynorm(model, config.polynorm, **options)
    chosen = sorted(set(gather_object([str(choice)])))
    if len(chosen) > 1:
        raise ValueError(
            f"PolyNorm runs as {' and '.join(chosen)} on different ranks (on rank {accelerator.process_index} it is "
            f"{choice}): set polynorm to one that all machines can use"
        )
    if config.polynorm not in ("auto", choice.source):
        raise ValueError(
            f"polynorm is {config.polynorm!r}, which cannot be used here ({'; '.join(choice.refused)}): set auto to "
            "take what there is, or torch"
        )


def split_layers(config: PretrainConfig, accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, each layer's matrices split over the ranks where the settings ask for tensor parallelism.

    Raises:
        ValueError: the ranks do not divide the groups, or the words of the head.
    """
    ranks = config.tensor_parallel
    if ranks == 1:
        return model
    if model.config.num_groups % ranks:
        raise ValueError(
            f"tensor_parallel is {ranks}, and attention has {model.config.num_groups} groups, which stay whole: use "
            "a number of ranks that divides them"
        )
    words = model.config.vocab_size
    if words % ranks:
        raise ValueError(
            f"tensor_parallel is {ranks}, and vocab_size {words}, which it does not divide: set vocab_size "
            f"{-(-words // ranks) * ranks}"
        )
    model = apply_tensor_parallelism(model, init_device_mesh(accelerator.device.type, (ranks,)))
    if model.config.tie_word_embeddings:  # it splits either by words, and unties them
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def prepare(
    config: PretrainConfig, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as accelerate runs them."""
    keep_losses_in_float32(getattr(accelerator.state, "fsdp_plugin", None))
    if config.tensor_parallel == 1:
        return accelerator.prepare(model, optimizer)
    # accelerate would copy a model to its ranks; in evaluation mode it only casts, and the ranks have their parts
    return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """MuonClip over the model, or AdamW for all of it (then nothing is clipped).

    Args:
        config: of the run.
        model: not yet prepared by accelerate.
    """
    options = {"lr": config.learning_rate, "adamw_lr": config.adamw_learning_rate, "weight_decay": config.weight_decay}
    options |= {"timeout_seconds": config.timeout_seconds}
    if config.optimizer == "adamw":
        decays = {"other": config.weight_decay}
        return build_muon_clip(model, adamw_patterns=(".*",), weight_decays=decays, qk_clip_threshold=None, **options)
    return build_muon_clip(
        model,
        momentum=config.momentum,
        qk_clip_threshold=config.qk_clip_threshold,
        qk_clip_rule=config.qk_clip_rule,
        chunk_size=config.muon_chunk_size,
        copy_engines=config.muon_copy_engines,
        **options,
    )


def open_loader(config: PretrainConfig, tokenizer, accelerator: Accelerator) -> CurriculumLoader:
    """The run's batches.

    Raises:
        ValueError: a shard is missing or corrupted, or the ranks cannot share a step's rows evenly.
    """
    ranks = accelerator.num_processes // config.tensor_parallel  # those of a row's matrices have the same rows
    plan = config.batch_plan()
    if config.batch_tokens_end is not None and config.batch_rows_multiple % ranks:
        raise ValueError(
            f"batch_rows_multiple is {config.batch_rows_multiple} for {ranks} ranks and a growing batch: set a "
            "multiple of the ranks, or they cannot share the rows evenly"
        )
    for length, rows in (plan.shape(tokens) for tokens in (0, *config.sequence_length_stages)):
        if rows % ranks:
            raise ValueError(
                f"a step of {rows} rows cannot be shared evenly by {ranks} ranks (rows of {length} tokens): set "
                "batch_tokens or batch_rows_multiple so that the number of ranks divides the rows"
            )
    verify = config.verify_checksums and accelerator.is_main_process
    corpora = {name: TokenCorpus(config.data_dir, name, verify=verify) for name in config.domains}
    pad, rank = pad_token_id(tokenizer), accelerator.process_index // config.tensor_parallel
    return CurriculumLoader(corpora, config.mixture(), plan, config.seed, pad, rank, ranks)


def open_heldout(config: PretrainConfig, tokenizer, ranks: int = 1, verify: bool = False) -> dict[str, list[dict]]:
    """Held-out batches by domain, as large as a forward in training; none when evaluation is off.

    Args:
        config: of the run.
        tokenizer: of the run.
        ranks: of the run; each takes batches of its own, but for those that share its rows by tensor parallelism.
        verify: compare the checksums of the held-out shards first.

    Raises:
        ValueError: a held-out shard is missing or corrupted, or a domain has none.
    """
    if not config.eval_steps:
        return {}
    length, pad = config.sequence_length, pad_token_id(tokenizer)
    of_a_rank = config.batch_tokens * config.tensor_parallel // ranks
    rows = max(1, min(config.micro_batch_tokens or of_a_rank, of_a_rank) // length)
    corpora = {name: TokenCorpus(config.data_dir, name, "heldout", verify) for name in config.domains}
    return {name: heldout_batches(corpus, length, rows, config.eval_tokens, pad) for name, corpus in corpora.items()}


def pad_token_id(tokenizer) -> int:
    """What fills the ends of rows."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
