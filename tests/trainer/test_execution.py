"""Layers in FP8, recomputed, compiled: the same model, its parameters and its optimizer."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kernels_hub import use_gda_attention
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.diagnostics import attention_modules, track_max_logits
from tests.trainer.storages import Storages
from trainer import execution
from trainer.execution import compile_layers, convert_to_fp8, recompute_layers
from trainer.loop import run_pretraining
from trainer.model import build_model, load_tokenizer
from trainer.optim import build_muon_clip

TOKENS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(15), torch.arange(9)]).expand(2, -1)  # two packed documents


def small_model(num_layers: int = 4, hidden_size: int = 32) -> Motif2ForCausalLM:
    torch.manual_seed(0)
    return Motif2ForCausalLM(
        Motif2Config(
            vocab_size=48,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=num_layers,
            num_attention_heads=6,
            num_key_value_heads=4,
            num_noise_heads=2,
            head_dim=16,
        )
    )


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, position_ids=POSITIONS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_outcome(model, reference, tolerance: float) -> None:
    """Loss and every gradient, the latter relative to its norm."""
    (loss, gradients), (wanted_loss, wanted) = loss_and_gradients(model), loss_and_gradients(reference)
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


class TestFp8:
    @pytest.mark.parametrize(("skipped", "inner"), [(1, {1, 2}), (0, {0, 1, 2, 3})])
    @pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
    def test_the_linear_layers_between_the_edges_are_converted(self, recipe, skipped, inner):
        from torchao.float8.config import ScalingGranularity, ScalingType
        from torchao.float8.float8_linear import Float8Linear

        model = small_model()
        names = convert_to_fp8(model, recipe, skipped, emulate=True)
        converted = {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}
        assert list(converted) == names
        assert {int(name.split(".")[2]) for name in names} == inner
        assert len(names) == 7 * len(inner)
        assert not isinstance(model.lm_head, Float8Linear)
        for module in converted.values():
            assert module.config.cast_config_input.scaling_granularity is ScalingGranularity.AXISWISE
            assert module.config.cast_config_weight.scaling_granularity is ScalingGranularity.AXISWISE
            weight_gradient = module.config.cast_config_grad_output_for_grad_weight.scaling_type
            assert (weight_gradient is ScalingType.DISABLED) == (recipe == "rowwise_with_gw_hp")

    @pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
    def test_losses_and_gradients_are_near_those_without(self, recipe):
        model, reference = small_model(), small_model()
        convert_to_fp8(model, recipe, emulate=True)
        (loss, gradients), (wanted_loss, wanted) = loss_and_gradients(model), loss_and_gradients(reference)
        assert loss != wanted_loss
        # e4m3 rounds to 2^-4 of a value: a gradient through two such layers keeps its direction to about that
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-2, atol=0)
        for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
            assert torch.cosine_similarity(gradients[name].flatten(), wanted[name].flatten(), dim=0) > 0.95, name

    def test_muon_clip_sees_and_clips_the_same_weights(self):
        model, reference = small_model(), small_model()
        names = [name for name, _ in reference.named_parameters()]
        convert_to_fp8(model, "rowwise", emulate=True)
        assert [name for name, _ in model.named_parameters()] == names
        optimizer = build_muon_clip(model, lr=0.01, qk_clip_threshold=1e-3)
        other = build_muon_clip(reference, lr=0.01, qk_clip_threshold=1e-3)
        assert [group["names"] for group in optimizer.param_groups] == [group["names"] for group in other.param_groups]
        before = copy.deepcopy(model.state_dict())
        loss_and_gradients(model)
        optimizer.step()
        assert optimizer.clip_report()["clipped_heads"] == 4 * 6
        assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_what_cannot_be_done_is_refused(self, monkeypatch):
        with pytest.raises(ValueError, match=r"sees none: set fp8 none, or fp8_emulate true"):
            convert_to_fp8(small_model(), "rowwise")
        with pytest.raises(ValueError, match="leaves none of 4 layers"):
            convert_to_fp8(small_model(), "rowwise", skip_edge_layers=2, emulate=True)
        with pytest.raises(ValueError, match=r"layers\.1\..*multiples of 16"):
            convert_to_fp8(small_model(hidden_size=40), "rowwise", emulate=True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        with pytest.raises(ValueError, match=r"capability 8\.9 .* NVIDIA A100 has 8\.0: set fp8 none"):
            convert_to_fp8(small_model(), "rowwise")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        execution.require_fp8_hardware()
        monkeypatch.setitem(sys.modules, "torchao.float8", None)
        with pytest.raises(ValueError, match=r"torchao cannot be imported .* pip install 'motif2\[fp8\]'"):
            convert_to_fp8(small_model(), "rowwise")


def test_a_bfloat16_residual_stream_runs_through_all_layers():
    model, types = small_model(), []
    execution.bfloat16_residual(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, arguments, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss_and_gradients(model)
    assert types == [torch.bfloat16] * 4


class TestRecomputation:
    @pytest.mark.parametrize(("mode", "every"), [("full", 1), ("full", 2), ("selective", 1)])
    def test_gradients_and_maximum_logits_stay_bit_for_bit(self, mode, every):
        model, reference = small_model(), small_model()
        recompute_layers(model, mode, every)
        for each in (model, reference):
            track_max_logits(each)
        assert_equal_outcome(model, reference, tolerance=0.0)
        for one, other in zip(attention_modules(model), attention_modules(reference), strict=True):
            assert torch.equal(one.max_logits, other.max_logits)

    def test_less_stays_alive_after_a_forward_pass(self):
        def layers_bytes(mode, every=1):
            model = small_model()
            if mode != "none":
                recompute_layers(model, mode, every)
            return live_activation_bytes(model)

        none, selective, half, full = (
            layers_bytes(*how) for how in (("none",), ("selective",), ("full", 2), ("full",))
        )
        assert full < 0.2 * none
        assert full < selective < 0.5 * none
        assert full < half < none

    def test_selective_recomputation_computes_no_product_twice(self):
        flops = {}
        for mode in ("none", "selective", "full"):
            model = small_model()
            if mode != "none":
                recompute_layers(model, mode)
            with FlopCounterMode(display=False) as counter:
                loss_and_gradients(model)
            flops[mode] = counter.get_total_flops()
        assert flops["none"] == flops["selective"] < flops["full"]

    def test_selective_recomputation_runs_the_attention_kernel_once(self):
        """An operator of that name, in whatever namespace; another one runs again."""
        runs = []

        @torch.library.custom_op("test_execution::gda_attention", mutates_args=())
        def attention(hidden: torch.Tensor) -> torch.Tensor:
            runs.append("gda_attention")
            return hidden.sin()

        @torch.library.custom_op("test_execution::other", mutates_args=())
        def other(hidden: torch.Tensor) -> torch.Tensor:
            runs.append("other")
            return hidden.sin()

        for operator in (attention, other):
            operator.register_autograd(
                lambda context, gradient: gradient * context.saved_tensors[0].cos(),
                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            )
        model = small_model(1)
        layer = model.model.layers[0]
        layer.forward = lambda hidden_states, **_: attention(other(hidden_states)) ** 2
        recompute_layers(model, "selective")
        loss_and_gradients(model)
        assert sorted(runs) == ["gda_attention", "other", "other"]


def live_activation_bytes(model) -> int:
    """Bytes that came into being in a forward pass and are still there after it, whoever holds them."""
    parameters = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    with Storages() as storages:
        output = model(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False).logits
    for parameter in parameters:
        storages.sizes.pop(parameter, None)
    assert output.requires_grad
    return storages.live_bytes()


class TestCompilation:
    @pytest.mark.slow
    def test_losses_and_gradients_are_the_eager_ones(self):
        """Traced, not lowered to machine code: the graph is the same program, in another order of operations."""
        model, reference = small_model(3), small_model(3)
        counter = CompileCounterWithBackend("aot_eager")
        compile_layers(model, counter)
        for each in (model, reference):
            track_max_logits(each)
        assert_equal_outcome(model, reference, tolerance=1e-6)
        assert (
            counter.frame_count <= 3
        )  # once with the first layer's lambda as a constant, once with any, and the last norm
        for one, other in zip(attention_modules(model), attention_modules(reference), strict=True):
            torch.testing.assert_close(one.max_logits, other.max_logits)

    @pytest.mark.slow
    def test_layers_with_the_attention_kernel_have_the_eager_gradients(self):
        model, reference = small_model(4), small_model(4)
        for each in (model, reference):
            use_gda_attention(each, attn_implementation="gda_kernel")
            track_max_logits(each)
        compile_layers(model, "aot_eager")
        assert_equal_outcome(model, reference, tolerance=1e-6)

    @pytest.mark.parametrize("training", [True, False])
    def test_layers_with_the_attention_kernel_share_their_code(self, training):
        torch._dynamo.reset()
        model = small_model(6)
        use_gda_attention(model, attn_implementation="gda_kernel")
        track_max_logits(model)
        counter = CompileCounter()
        compile_layers(model, counter)
        with torch.set_grad_enabled(training):
            model(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)
        assert counter.frame_count == 3  # the first layer's lambda as a constant, any, and the last norm

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("attention", ["gda_kernel", "gda_fastest", "sdpa"])
    def test_layers_share_their_code_on_a_gpu(self, attention, training):
        """Packed documents; layers with an index of their own in the code would be compiled one by one."""
        torch._dynamo.reset()
        model = small_model(6).cuda()
        if attention.startswith("gda"):
            use_gda_attention(model, attn_implementation=attention)
        track_max_logits(model)
        counter = CompileCounterWithBackend("aot_eager")
        compile_layers(model, counter)
        tokens, positions = TOKENS.cuda(), POSITIONS.cuda()
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
            loss = model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss
        if training:
            loss.backward()
        assert counter.frame_count <= 3

    @pytest.mark.slow
    def test_recomputed_layers_compile(self):
        model, reference = small_model(2), small_model(2)
        recompute_layers(model, "selective")
        compile_layers(model, "aot_eager")
        assert_equal_outcome(model, reference, tolerance=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["none", "full", "selective"])
    def test_machine_code_gives_the_eager_losses(self, mode):
        model, reference = small_model(3), small_model(3)
        if mode != "none":
            recompute_layers(model, mode)
        compile_layers(model)
        for each in (model, reference):
            track_max_logits(each)
        optimizers = [build_muon_clip(each, lr=0.01) for each in (model, reference)]
        for _ in range(3):
            (loss, _), (wanted, _) = loss_and_gradients(model), loss_and_gradients(reference)
            torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
            for optimizer in optimizers:
                optimizer.step()

    def test_parameters_keep_their_names(self):
        model, reference = small_model(2), small_model(2)
        convert_to_fp8(model, "rowwise", 0, emulate=True)
        recompute_layers(model, "full")
        compile_layers(model)
        assert list(model.state_dict()) == list(reference.state_dict())
        assert [type(layer) for layer in model.model.layers] == [type(layer) for layer in reference.model.layers]


def test_the_settings_reach_the_model(make_config):
    config = make_config(
        fp8="rowwise",
        fp8_skip_edge_layers=0,
        fp8_emulate=True,
        gradient_checkpointing="full",
        gradient_checkpointing_every=2,
        compile_layers=True,
        head_dim=16,
    )
    model = build_model(config, load_tokenizer(config.tokenizer))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Float8Linear"
    assert all(isinstance(module, nn.Linear) for module in (model.model.layers[0].mlp.up_proj, model.lm_head))
    forwards = [layer.__dict__["forward"]._torchdynamo_orig_callable for layer in model.model.layers]
    assert [forward.__name__ for forward in forwards] == ["recomputed", "forward"]
    with pytest.raises(ValueError, match="gradient_checkpointing_every is 0"):
        make_config(gradient_checkpointing_every=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of CPUs")
def test_attention_that_cannot_train_on_a_cpu_is_refused(make_config):
    config = make_config(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="no backward pass on CPUs: set sdpa"):
        build_model(config, load_tokenizer(config.tokenizer))


@pytest.mark.slow
def test_a_run_in_fp8_with_recomputation_and_chunks_learns_and_exports_a_plain_model(make_config):
    options = {"fp8": "rowwise_with_gw_hp", "fp8_skip_edge_layers": 0, "fp8_emulate": True, "head_dim": 16}
    config = make_config(
        total_tokens=128 * 12, gradient_checkpointing="selective", loss="chunked", micro_batch_tokens=64, **options
    )
    result = run_pretraining(config)
    assert all(result.last_eval[name] < result.first_eval[name] - 0.1 for name in "ab")
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
