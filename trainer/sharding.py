"""FSDP2 as accelerate sets it up, and what must be said to it so that evaluations and losses come out right."""

import dataclasses

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_losses_in_float32(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let FSDP2 hand out what the model gives: accelerate's policy rounds it, and so every token's loss, to bfloat16.

    Args:
        plugin: accelerate's, changed in place; None without FSDP.
    """
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def gather_backwards_in_order(model: nn.Module) -> None:
    """Name the weights that FSDP2 gathers next in a backward: each layer's predecessor that is trained.

    By itself it goes back through all forwards since the last backward, and so from a training step's first into an
    evaluation's last. The weights gathered then are thrown away unused, while another gather already writes where they
    lay: on two GPUs the next forward had wrong rows in its embedding (docs/pretraining.md, Checkpoints). An embedding
    that adapters freeze has no backward, and what is gathered for it is thrown away as well.

    Args:
        model: prepared by accelerate; without FSDP2 nothing happens.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    units = [model.get_input_embeddings(), *layers, model.get_output_embeddings()]
    units = [unit for unit in units if isinstance(unit, FSDPModule)]
    earlier = None
    for unit in units:  # the first names itself, which is there already: an empty list would leave it to FSDP2
        unit.set_modules_to_backward_prefetch([earlier or unit])
        if any(parameter.requires_grad for parameter in unit.parameters()):
            earlier = unit


def drop_gathered_weights(model: nn.Module) -> None:
    """Free what an evaluation left gathered, the weights of norm and head: a later forward would not see them change.

    TRL's fused loss never calls the head. torch 2.11 then waits for it, in the next forward too: it frees nothing, and
    gathers nothing, which fails once a checkpoint has freed the weights. That is ended here.

    Args:
        model: prepared by accelerate; without FSDP2 nothing happens.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._modules_to_run_forward.clear()
            for part in (state, state._fsdp_param_group):  # the second is None where the first holds no weights
                if part is not None:
                    part._training_state = TrainingState.IDLE
            module.reshard()
