"""MuonClip over shards: each matrix is put together on one rank, orthogonalised there, and sent back in parts.

The meaning is `muon_clip_reference.MuonClip`; docs/parallel_muonclip.md draws the flow. A step is
1. agree: one MAX all-reduce says whether all gradients are finite, which parameters have one, the largest logits;
2. matrices: the pipeline of `pipeline.run_pipeline` over a plan made once (`plan.plan_chunks`);
3. the rest: AdamW on local shards;
4. QK-clip of the query and key rows that this rank holds.
"""

import contextlib
import functools
import math
import operator
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trainer.optim.base import check_group
from trainer.optim.communication import Team
from trainer.optim.fused import apply_update, nesterov, not_finite
from trainer.optim.gradients import describe, is_copied, local_gradient, names_of, settle
from trainer.optim.layout import Layout, layout_of, local_of
from trainer.optim.muon_clip_reference import MuonClip, is_hot, update_scale
from trainer.optim.orthogonalise import Orthogonaliser
from trainer.optim.pipeline import run_pipeline
from trainer.optim.plan import Chunk, plan_chunks
from trainer.optim.qk_clip import QKClip

MODES = ("parallel", "distributed")
WIRE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Thirty years of seconds: what a process group's timeout can hold (assumption).
LONGEST_TIMEOUT = 10**9
# Plans kept, one for each set of parameters that had gradients.
_KEPT_PLANS = 8


@dataclass(frozen=True)
class TeamPlan:
    """What one team does in a step: its matrices, each with its group's index, their layouts and this rank's chunks.

    All that the host can know beforehand, since the device waits while it prepares the first transfer. Indices and not
    the groups themselves, because `load_state_dict` puts other dicts in their place.
    """

    team: Team
    matrices: tuple[tuple[int, Tensor], ...]
    layouts: tuple[Layout, ...]
    shapes: tuple[tuple[int, int], ...]
    chunks: tuple[Chunk, ...]
    wire_dtype: torch.dtype


class ParallelMuonClip(MuonClip):
    """MuonClip for DTensor and plain parameters, on any number of ranks.

    Plain parameters are taken as copies that all ranks of `process_group` hold (as under DDP): their matrices are
    shared out too. Parameters may be replaced in `param_groups` (as accelerate does) or added at any time.

    Args:
        params: groups as for `MuonClip`.
        lr: learning rate of the Muon groups.
        method: Newton-Schulz as "gram" (on the s x s Gram matrix, float16, one restart) or "classic".
        coefficients: "motif", "polar_express", "jordan", or (a, b, c) of each Newton-Schulz step.
        mode: "parallel" (one owner a matrix), or "distributed" (every rank gathers and orthogonalises every matrix),
            which is there to be compared with.
        chunk_size: matrices of the largest size that a rank owns in a chunk, or as many small ones; None: all at once.
        pipelined: overlap a chunk's products with its neighbours' transfers.
        max_replicas: copies of the parameters (HSDP, DDP) whose ranks share one matrix's work; None: all. Fewer save
            traffic between copies and repeat work: see docs/parallel_muonclip.md.
        balanced: share matrices out by cost, longest first, instead of in turn.
        copy_engines: let the GPUs' copy engines carry matrices, instead of kernels of NCCL; ranks of one node.
        wire_dtype: dtype of directions on the wire; None: bfloat16 on accelerators, float32 or more elsewhere.
        process_group: all ranks that step together; None: all there are.
        timeout_seconds: how long a collective waits for a rank that does not come.
        backend: of the Newton-Schulz kernels: "auto", "triton", "torch" or "quack".
        options: of `MuonClip`: momentum, weight_decay, adamw_lr, adamw_betas, adamw_eps, qk_clip_threshold,
            qk_clip_rule, attentions.

    Raises:
        ValueError: a setting out of range, or an attention module whose weights are not among the parameters.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        method: str = "gram",
        coefficients: str | tuple = "motif",
        mode: str = "parallel",
        chunk_size: int | None = 1,
        pipelined: bool = True,
        balanced: bool = True,
        max_replicas: int | None = None,
        copy_engines: bool = False,
        wire_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout_seconds: float = 600.0,
        backend: str = "auto",
        **options,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: choose one of {MODES}")
        for name, number in (("chunk_size", chunk_size), ("max_replicas", max_replicas)):
            whole_number = isinstance(number, int) and not isinstance(number, bool)
            if number is not None and not (whole_number and number >= 1):
                raise ValueError(f"{name} is {number!r}: give a whole number from 1, or None for all together")
        switches = {"pipelined": pipelined, "balanced": balanced, "copy_engines": copy_engines}
        for name, switch in switches.items():
            if not isinstance(switch, bool):
                raise ValueError(f"{name} is {switch!r}: give True or False")
        if wire_dtype not in (None, *WIRE_DTYPES):
            raise ValueError(f"wire_dtype is {wire_dtype!r}: give one of {WIRE_DTYPES}, or None")
        if copy_engines and mode == "distributed":
            raise ValueError("copy_engines is set and mode is 'distributed', which moves matrices otherwise: drop one")
        if not 0 < timeout_seconds < LONGEST_TIMEOUT:
            raise ValueError(f"timeout_seconds is {timeout_seconds}: give seconds above 0 and below {LONGEST_TIMEOUT}")
        self.mode, self.chunk_size, self.pipelined, self.balanced = mode, chunk_size, pipelined, balanced
        self.wire_dtype, self.process_group, self.timeout_seconds = wire_dtype, process_group, timeout_seconds
        self.max_replicas, self.copy_engines = max_replicas, copy_engines
        self.orthogonalise = Orthogonaliser(method, coefficients, backend)
        self._teams: dict[tuple[int, ...], Team] = {}
        self._known_parameters: list[Tensor] = []
        self._plans: dict[tuple[bool, ...], list[TeamPlan]] = {}
        self._last_logits, self._last_clipped = torch.empty(0), []
        super().__init__(params, lr, **options)
        places = {id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        weights = [(attention.q_proj.weight, attention.k_proj.weight) for attention in self.attentions]
        self._clipped_places = [(places[id(query)], places[id(key)]) for query, key in weights]

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters on all ranks, or none if any rank's gradient holds a NaN or an infinity.

        Every rank must call it, whatever gradients it has. A sharded parameter that has a gradient on some ranks only
        counts as having a zero gradient on the others; one that has none anywhere is left alone.

        Returns:
            What `closure` returns, or None.

        Raises:
            RuntimeError: a rank died or did not come in time. NCCL does not let the host wait in a collective: there
                PyTorch's watchdog ends the process a minute after `timeout_seconds`, with a message of its own; with
                copy engines a launch fails, which the next wait reports. A step that raised cannot be repeated.
            ValueError: the ranks' parameters or settings differ, or only some copies of a parameter have a gradient.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._prepare()
        with self._control.clear_traps():
            self._step_prepared()
        return loss

    def _step_prepared(self) -> None:
        finite, active, logits = self._agree()
        self._rates = [float(group["lr"]) for group in self.param_groups]  # one on the device is waited for only here
        if finite:
            for plan in self._plan_for(active):
                run = self._run_parallel if self.mode == "parallel" else self._run_distributed
                run(plan)
            used = {id(parameter) for parameter, flag in zip(self._parameters(), active, strict=True) if flag}
            self._step_rest(used)
            moves = any(rate > 0 for rate in self._rates)  # a checkpoint's load steps once with lr 0
            pairs = zip(self._clip.queries, self._clip.keys, strict=True)
            self._last_clipped = [moves and {id(query), id(key)} <= used for query, key in pairs]
            self._last_logits = logits
            self._clip.apply(logits, self._last_clipped)
        else:
            self.skipped_steps += 1
        self._clip.reset()

    def clip_report(self) -> dict:
        """What the last step that was not skipped saw; this asks the device.

        Returns:
            dict: clipped_heads, max_logit (-inf: none recorded), max_logits_by_layer, skipped_steps. Where the model
                tracks behind a gate, logits up to the threshold are upper bounds.
        """
        with self._control.clear_traps() if self._last_logits.is_cuda else contextlib.nullcontext():
            logits = self._last_logits.cpu()  # one wait for the device
        layers = logits.split(self._clip.num_heads) if len(logits) else []
        hot = [int(is_hot(layer, self.qk_clip_threshold).sum()) for layer in layers]
        by_layer = [float(layer.max()) for layer in layers]
        return {
            "clipped_heads": sum(heads for heads, clipped in zip(hot, self._last_clipped, strict=True) if clipped),
            "max_logit": max(by_layer, default=-math.inf),
            "max_logits_by_layer": by_layer,
            "skipped_steps": self.skipped_steps,
        }

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _prepare(self) -> None:
        """Read layouts and connect QK-clip, again whenever the parameters are others than before."""
        parameters = self._parameters()
        known = self._known_parameters
        if len(parameters) == len(known) and all(map(operator.is_, parameters, known)):
            return
        for group in self.param_groups:  # a wrapper may have put others there, or a checkpoint other settings
            check_group(group)
        devices = sorted({str(local_of(parameter).device) for parameter in parameters})
        if len(devices) > 1:
            raise ValueError(f"parameters lie on {', '.join(devices)}: put a rank's model on one device")
        self._device = local_of(parameters[0]).device
        if self.copy_engines and self._device.type != "cuda":
            raise ValueError(f"copy_engines is set and the parameters are on {self._device}: leave it off there")
        shared = dist.is_available() and dist.is_initialized()
        ranks = tuple(sorted(dist.get_process_group_ranks(self.process_group or dist.group.WORLD))) if shared else (0,)
        self._control = self._team(ranks)
        description = [
            (tuple(p.shape), str(getattr(p, "placements", "")), group["algorithm"])
            for group in self.param_groups
            for p in group["params"]
        ]
        digest = zlib.crc32(repr((description, self._settings())).encode())
        self._control.require_equal(digest, "MuonClip's parameters or settings", self._device)
        self._names = names_of(self.param_groups)
        self._copied = [is_copied(parameter, len(ranks)) for parameter in parameters]
        matrices = [p for group in self.param_groups if group["algorithm"] == "muon" for p in group["params"]]
        rank = dist.get_rank() if shared else 0
        together = self.max_replicas or len(ranks)
        self._layouts = {id(matrix): layout_of(matrix, ranks).among(rank, together) for matrix in matrices}
        weights = [[self.param_groups[g]["params"][i] for g, i in pair] for pair in self._clipped_places]
        queries, keys = [query for query, _ in weights], [key for _, key in weights]
        blocks = {id(w): self._block_of(w, ranks, rank) for w in (*queries, *keys)}
        self._clip = QKClip(self.attentions, queries, keys, blocks, self.qk_clip_threshold, self.qk_clip_rule)
        self._plans, self._known_parameters = {}, parameters

    def _settings(self) -> tuple:
        """What must be the same on every rank."""
        how = self.orthogonalise
        schedule = (self.mode, self.chunk_size, self.pipelined, self.balanced, self.max_replicas, self.wire_dtype,
                    self.copy_engines)  # fmt: skip
        work = (how.method, how.coefficients, how.backend, self.qk_clip_threshold, self.qk_clip_rule)
        groups = [(float(g["lr"]), g["momentum"], g["weight_decay"], *g["betas"], g["eps"]) for g in self.param_groups]
        return schedule, work, groups

    def _block_of(self, weight: Tensor, ranks: tuple[int, ...], rank: int):
        layout = self._layouts.get(id(weight)) or layout_of(weight, ranks)
        return layout.blocks[layout.team.index(rank)]

    def _team(self, ranks: tuple[int, ...]) -> Team:
        if ranks not in self._teams:
            self._teams[ranks] = Team(ranks, self.timeout_seconds, self._device, self.copy_engines)
        return self._teams[ranks]

    def _agree(self) -> tuple[bool, tuple[bool, ...], Tensor]:
        """One collective: whether all gradients are finite, which parameters have one on any rank, maximum logits."""
        parameters = self._parameters()
        gradients = [local_of(gradient) for p in parameters if (gradient := p.grad) is not None]
        bad = not_finite(gradients, self._device)  # first, so that the device looks while the host goes on
        held = describe(parameters).flatten().to(self._device, non_blocking=True)  # (3 * P,)
        flags = torch.cat([bad, held])
        agreed = self._control.maximum(torch.cat([flags, self._clip.pack(self._device)]))
        self._make_state()
        bad, *held = agreed[: len(flags)].tolist()  # the step's one wait for the device
        count = len(parameters)
        held = held[:count], held[count : 2 * count], held[2 * count :]
        moved = settle(parameters, self._names, self._copied, held)
        if moved and not bad:  # they are sums of what was looked at
            bad = self._control.maximum(not_finite(moved, self._device)).item()
        active = tuple(map(bool, map(max, held[0], held[1])))
        return not bad, active, agreed[len(flags) :]

    def _plan_for(self, active: tuple[bool, ...]) -> list[TeamPlan]:
        """Plans of the teams this rank is in, for the matrices that have a gradient somewhere."""
        if active not in self._plans:
            if len(self._plans) >= _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            pairs = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
            by_team: dict[tuple[int, ...], list] = {}
            for (index, parameter), used in zip(pairs, active, strict=True):
                if used and self.param_groups[index]["algorithm"] == "muon":
                    layout = self._layouts[id(parameter)]
                    by_team.setdefault(layout.team, []).append((index, parameter, layout))
            self._plans[active] = [self._plan_team(ranks, members) for ranks, members in by_team.items()]
        return self._plans[active]

    def _plan_team(self, ranks: tuple[int, ...], members: list) -> TeamPlan:
        team = self._team(ranks)
        layouts = tuple(layout for _, _, layout in members)
        chunks = plan_chunks(layouts, team.me, self.orthogonalise.cost, self.chunk_size, self.balanced)
        wire_dtype = functools.reduce(torch.promote_types, (self._direction_dtype(p) for _, p, _ in members))
        chunks = team.reserve(chunks, wire_dtype.itemsize)
        matrices = tuple((index, parameter) for index, parameter, _ in members)
        return TeamPlan(team, matrices, layouts, tuple(layout.shape for layout in layouts), chunks, wire_dtype)

    def _run_parallel(self, plan: TeamPlan) -> None:
        def prologue(number: int, out: Tensor | None) -> None:
            self._direction(*plan.matrices[number], out)

        def epilogue(number: int, update: Tensor) -> None:
            self._apply(*plan.matrices[number], update)

        run_pipeline(
            plan.chunks,
            plan.shapes,
            plan.team,
            prologue,
            self.orthogonalise,
            epilogue,
            plan.wire_dtype,
            self.orthogonalise.result_dtype(plan.wire_dtype, self._device),
            self._device,
            self.pipelined,
        )

    def _run_distributed(self, plan: TeamPlan) -> None:
        """Every rank gathers and orthogonalises every matrix, and keeps its own part of the update."""
        for (index, parameter), layout in zip(plan.matrices, plan.layouts, strict=True):
            local = local_of(parameter)
            direction = torch.empty_like(local, dtype=self._direction_dtype(parameter))
            self._direction(index, parameter, direction)
            if isinstance(parameter, DTensor):
                placement = (parameter.device_mesh, parameter.placements)
                shape = {"shape": parameter.shape, "stride": parameter.stride()}
                direction = DTensor.from_local(direction, *placement, run_check=False, **shape).full_tensor()
            update = self.orthogonalise([direction[None]])[0][0]
            part = torch.empty_like(local, dtype=update.dtype)
            block = layout.blocks[plan.team.me]
            for full, own in block.tiles(update, part):
                own.copy_(full)
            self._apply(index, parameter, part)

    def _direction_dtype(self, parameter: Tensor) -> torch.dtype:
        if self.wire_dtype is not None:
            return self.wire_dtype
        on_cpu = self._device.type == "cpu"
        return torch.promote_types(parameter.dtype, torch.float32) if on_cpu else torch.bfloat16

    def _direction(self, group_index: int, parameter: Tensor, out: Tensor | None) -> None:
        """Advance the momentum of this rank's shard and write the Nesterov direction to `out`."""
        momentum_buffer = local_of(self.state[parameter]["momentum_buffer"])
        nesterov(local_gradient(parameter), momentum_buffer, self.param_groups[group_index]["momentum"], out)

    def _apply(self, group_index: int, parameter: Tensor, update: Tensor) -> None:
        rate, decay = self._rates[group_index], self.param_groups[group_index]["weight_decay"]
        step_size = rate * update_scale(*parameter.shape)  # a DTensor's shape is the full one
        apply_update(local_of(parameter), update, 1 - rate * decay, step_size)

    def _make_state(self) -> None:
        """Make every parameter's state, with its placements, so that checkpoints hold the same keys on all ranks."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state and group["algorithm"] == "muon":
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                elif not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["step"] = torch.zeros(())
                if group["algorithm"] == "adamw":  # loading leaves the count where the checkpoint had it
                    state["step"] = state["step"].to(local_of(parameter).device)

    def _step_rest(self, chosen: set[int]) -> None:
        """AdamW on local shards of the parameters with these ids; empty ones only count the step."""
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            if group["algorithm"] != "adamw":
                continue
            used = [parameter for parameter in group["params"] if id(parameter) in chosen]
            for parameter in used:
                if not local_of(parameter).numel():
                    self.state[parameter]["step"] += 1
            used = [parameter for parameter in used if local_of(parameter).numel()]
            if not used:
                continue
            states = [self.state[parameter] for parameter in used]
            adamw(
                [local_of(parameter) for parameter in used],
                [local_gradient(parameter) for parameter in used],
                [local_of(state["exp_avg"]) for state in states],
                [local_of(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                foreach=False,
                fused=self._device.type == "cuda",
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=rate,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
