"""The parts of a run, made from its settings: accelerator, shards, batches, held-out rows, optimizer."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from trainer.config import PretrainConfig
from trainer.data.loader import CurriculumLoader, heldout_batches
from trainer.data.shards import TokenCorpus, build_shards, check_tokenizer, load_manifest
from trainer.optim import build_muon_clip


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The run's accelerator, with its trackers and the timeout of its collectives.

    Raises:
        ValueError: a tracker is unknown or not installed.
    """
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # an earlier run of this process may have used another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=not torch.accelerator.is_available(),  # else accelerate takes gloo ranks for single processes
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds))],
    )
    kept = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    for name in config.trackers:
        if name not in kept:  # accelerate leaves it out without a word
            raise ValueError(f"tracker {name!r} is not installed: pip install {name}, or take it out of trackers")
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


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """MuonClip over the model, or AdamW for all of it (then nothing is clipped).

    Args:
        config: of the run.
        model: not yet prepared by accelerate.
    """
    options = {"lr": config.learning_rate, "adamw_lr": config.adamw_learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        decays = {"other": config.weight_decay}
        return build_muon_clip(model, adamw_patterns=(".*",), weight_decays=decays, qk_clip_threshold=None, **options)
    return build_muon_clip(
        model,
        momentum=config.momentum,
        qk_clip_threshold=config.qk_clip_threshold,
        qk_clip_rule=config.qk_clip_rule,
        chunk_size=config.muon_chunk_size,
        **options,
    )


def open_loader(config: PretrainConfig, tokenizer, accelerator: Accelerator) -> CurriculumLoader:
    """The run's batches.

    Raises:
        ValueError: a shard is missing or corrupted, or the ranks cannot share a step's rows evenly.
    """
    ranks = accelerator.num_processes
    plan = config.batch_plan()
    if plan.shape(0)[1] % ranks or (config.batch_tokens_end and config.batch_rows_multiple % ranks):
        raise ValueError(
            f"a step of {plan.shape(0)[1]} rows cannot be shared evenly by {ranks} ranks: set batch_tokens or "
            "batch_rows_multiple so that the number of ranks divides the rows"
        )
    verify = config.verify_checksums and accelerator.is_main_process
    corpora = {name: TokenCorpus(config.data_dir, name, verify=verify) for name in config.domains}
    pad = pad_token_id(tokenizer)
    return CurriculumLoader(corpora, config.mixture(), plan, config.seed, pad, accelerator.process_index, ranks)


def open_heldout(config: PretrainConfig, tokenizer) -> dict[str, list[dict]]:
    """Held-out batches by domain; none when evaluation is off."""
    if not config.eval_steps:
        return {}
    length, pad = config.sequence_length, pad_token_id(tokenizer)
    rows = max(1, (config.micro_batch_tokens or config.batch_tokens) // length)
    corpora = {name: TokenCorpus(config.data_dir, name, "heldout") for name in config.domains}
    return {name: heldout_batches(corpus, length, rows, config.eval_tokens, pad) for name, corpus in corpora.items()}


def pad_token_id(tokenizer) -> int:
    """What fills the ends of rows."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
