"""Official checkpoints, both layouts, errors that name tensors, and folders that load without this package."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_motif2 import Motif2Config, Motif2ForCausalLM, Motif2Model
from tests.modeling_motif2.builders import random_ids, small_model
from tests.modeling_motif2.reference import reference_logits

UNUSED_KEYS = {
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "expanded": True,
    "fused_rope": True,
    "rope_scaling": None,
    "use_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "transformers_version": "4.51.3",
    "torch_dtype": "float32",
    "auto_map": {
        "AutoConfig": "configuration_motif.MotifConfig",
        "AutoModelForCausalLM": "modeling_motif.MotifForCausalLM",
    },
}
STYLE_12_7B = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 4,
    "num_noise_heads": 2,
    "head_dim": 6,
    "k_ratio": 1,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
# Motif-2.6B's config.json leaves out the noise heads, head_dim, and tied embeddings (transformers 4's default).
STYLE_2_6B = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 500000.0,
}
STYLES = {"12.7B": STYLE_12_7B, "2.6B": STYLE_2_6B}
CONSTANTS = {
    "vocab_size": 53,
    "hidden_act": "poly_norm",
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "bos_token_id": 3,
    "eos_token_id": 2,
}


def official_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The official names and shapes, listed without help from the model."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    signal = heads - (config.get("num_noise_heads") or heads // 2)
    keys = config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * dim, hidden),
        "self_attn.k_proj.weight": (keys * dim, hidden),
        "self_attn.v_proj.weight": (keys * dim, hidden),
        "self_attn.o_proj.weight": (hidden, signal * 2 * dim),
        "self_attn.lambda_q1": (dim,),
        "self_attn.lambda_k1": (dim,),
        "self_attn.lambda_q2": (dim,),
        "self_attn.lambda_k2": (dim,),
        "self_attn.subln.weight": (2 * dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "mlp.act_fn.weight": (3,),
        "mlp.act_fn.bias": (1,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def official_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Random float32 tensors of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    shapes = official_shapes(config)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def write_official(
    folder, style: str, model_type: str = "Motif", change=None, stops=(2, 5)
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint in the official layout, two shards; `change(tensors)` may spoil it first.

    An instruct checkpoint stops on two tokens (`stops`), a base one on one.
    """
    folder.mkdir(exist_ok=True)
    config = CONSTANTS | STYLES[style]
    tensors = official_tensors(config)
    if change is not None:
        change(tensors)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    head = {"model_type": model_type, "architectures": ["MotifForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(head | config | UNUSED_KEYS))
    eos = list(stops) if len(stops) > 1 else stops[0]
    generation = {"bos_token_id": 3, "eos_token_id": eos, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return tensors


def official_logits(tensors: dict, config: Motif2Config, ids: torch.Tensor) -> torch.Tensor:
    """The float64 reference on tensors as written, not as loaded."""

    class Written:
        def state_dict(self):
            head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
            return tensors | {"lm_head.weight": head}

    Written.config = config
    return reference_logits(Written(), ids)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model_type", ["Motif", "motif"])
def test_official_checkpoints_load_through_the_auto_classes(tmp_path, style, model_type):
    tensors = write_official(tmp_path, style, model_type)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is Motif2Config
    assert config.model_type == "motif2"
    assert config.num_noise_heads == STYLES[style].get("num_noise_heads")
    assert config.tie_word_embeddings == (style == "2.6B")
    assert config.rope_parameters["rope_theta"] == STYLES[style]["rope_theta"]
    assert (config.sliding_window, config.auto_map) == (None, {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is Motif2ForCausalLM
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 5]
    ids = random_ids(1, 11)[0] % 53
    expected = official_logits(tensors, config, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
        backbone = AutoModel.from_pretrained(tmp_path)
        assert type(backbone) is Motif2Model
        torch.testing.assert_close(backbone(ids[None])[0], model.model(ids[None])[0])
    assert type(Motif2ForCausalLM.from_pretrained(tmp_path).config) is Motif2Config


@pytest.mark.parametrize("style", STYLES)
def test_base_and_instruct_checkpoints_stop_where_they_say(tmp_path, style):
    ids = random_ids(1, 4) % 53
    write_official(tmp_path / "probe", style)
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "probe")
    said = free.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    turn_end = said[3]
    for stops in ((2,), (2, turn_end)):
        write_official(tmp_path / f"{len(stops)}", style, stops=stops)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{len(stops)}")
        expected = said[: said.index(turn_end) + 1] if len(stops) > 1 else said
        assert 2 not in said
        assert model.generate(ids, max_new_tokens=8, do_sample=False)[0, 4:].tolist() == expected


def test_a_task_head_loads_from_a_language_model(tmp_path):
    write_official(tmp_path, "12.7B")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.score.weight.shape == (3, 24)


@pytest.mark.parametrize("layout", ["motif2", "official"])
def test_a_saved_task_head_is_expected_to_be_there(tmp_path, layout):
    write_official(tmp_path / "in", "12.7B")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "in", num_labels=3)
    model.save_pretrained(tmp_path / "out", layout=layout)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert named == ["MotifForSequenceClassification" if layout == "official" else "Motif2ForSequenceClassification"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(again.score.weight, model.score.weight)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("layout", ["motif2", "official"])
@pytest.mark.parametrize("style", STYLES)
def test_saving_in_both_layouts_loses_nothing(tmp_path, style, layout):
    tensors = write_official(tmp_path / "in", style)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out", layout=layout)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    if layout == "official":
        original = json.loads((tmp_path / "in" / "config.json").read_text())
        same = set(original) - {"transformers_version", "auto_map", "torch_dtype", "sliding_window", "fused_rope"}
        same -= {"max_window_layers", "expanded"}
        assert {key: written.get(key) for key in same} == {key: original[key] for key in same}
        assert not list((tmp_path / "out").glob("*.py"))
    else:
        assert written["model_type"] == "motif2"
        assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_motif2.Motif2ForCausalLM"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = random_ids(1, 7) % 53
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == [2, 5]


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='megatron' is unknown"):
        small_model().save_pretrained(tmp_path, layout="megatron")


def rename(tensors):
    tensors["model.layers.0.self_attn.lambda_q9"] = tensors.pop("model.layers.0.self_attn.lambda_q1")


def reshape(tensors):
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(24, 48)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    write_official(tmp_path, "12.7B", change=rename)
    with pytest.raises(ValueError, match=r"1 missing: .*lambda_q1; 1 left over: .*lambda_q9"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lambda_q9"):
        AutoModel.from_pretrained(tmp_path)
    write_official(tmp_path, "12.7B", change=reshape)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight is \(24, 48\), not \(24, 96\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.model.layers[1].self_attn.o_proj.weight.shape == (24, 96)


def test_a_doubtful_checkpoint_can_be_loaded_on_request(tmp_path):
    write_official(tmp_path, "12.7B", change=rename)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.0.self_attn.lambda_q1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"num_hidden_layers": None, "hidden_size": None}, "lacks hidden_size, num_hidden_layers"),
        ({"use_bias": True}, "use_bias"),
        ({"head_dim": None}, "head_dim is missing"),
    ],
)
def test_an_official_configuration_that_cannot_be_read_says_why(tmp_path, change, message):
    write_official(tmp_path, "12.7B")
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


FULL_SIZE_12_7B = {
    "vocab_size": 219520,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 16,
    "num_noise_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
FULL_SIZE_2_6B = {
    "vocab_size": 219520,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def test_full_size_has_the_published_tensors():
    config = Motif2Config()
    with torch.device("meta"):
        model = Motif2ForCausalLM(config)
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert actual == official_shapes(FULL_SIZE_12_7B)
    assert len(actual) == 643 == 3 + 16 * 40
    assert actual["model.layers.39.self_attn.q_proj.weight"] == (5120, 4096)
    assert actual["model.layers.39.self_attn.k_proj.weight"] == (2048, 4096)
    assert actual["model.layers.39.self_attn.o_proj.weight"] == (4096, 8192)
    assert actual["model.layers.39.self_attn.subln.weight"] == (256,)
    assert actual["model.layers.39.self_attn.lambda_k2"] == (128,)
    assert actual["lm_head.weight"] == (219520, 4096)
    assert model.num_parameters() == pytest.approx(12.7e9, rel=0.005)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (219395, 219396, 219395)


def test_full_size_2_6b_has_its_tensors_and_ties_its_head():
    written = FULL_SIZE_2_6B | {"model_type": "Motif", "rope_theta": 500000.0, "max_position_embeddings": 16384}
    config = Motif2Config.from_dict(written)
    with torch.device("meta"):
        model = Motif2ForCausalLM(config)
    assert (config.num_groups, config.num_signal_heads_per_group, config.head_dim) == (8, 1, 128)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert actual.pop("lm_head.weight") == (219520, 2048)
    assert actual == official_shapes(FULL_SIZE_2_6B)
    assert actual["model.layers.31.self_attn.q_proj.weight"] == (2048, 2048)
    assert actual["model.layers.31.self_attn.o_proj.weight"] == (2048, 2048)
    assert len(actual) == 2 + 16 * 32
    assert model.num_parameters() == pytest.approx(2.6e9, rel=0.02)


WITHOUT_PACKAGE = """
import sys
sys.path = [path for path in sys.path if path not in ("", {root!r})]
try:
    import modeling_motif2
except ImportError:
    pass
else:
    raise SystemExit("the package is importable here")
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)), {out!r})
model.save_pretrained({again!r})
for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    auto = getattr(transformers, "AutoModelFor" + task)
    head = auto.from_pretrained({folder!r} + task, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(head(ids)[0], {out!r} + task)
"""
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def run_without_package(tmp_path, folder, again):
    """Loads a saved folder with remote code in a process that has no `modeling_motif2`; returns logits and text."""
    root = str(__import__("pathlib").Path(__file__).resolve().parents[2])
    out = tmp_path / "out.pt"
    script = WITHOUT_PACKAGE.format(root=root, folder=str(folder), out=str(out), again=str(again))
    blocker = tmp_path / "blocker"
    blocker.mkdir(exist_ok=True)
    # An editable install puts the package on the path through a finder: refuse it by name.
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'modeling_motif2':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    env = {
        "PYTHONPATH": str(blocker),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.slow  # a process that imports everything anew; the demo's test has one too, in the default run
def test_a_saved_folder_works_without_this_package(tmp_path):
    model = small_model(attention="sdpa")
    model.save_pretrained(tmp_path / "saved")
    heads = {task: getattr(transformers, f"AutoModelFor{task}").from_config(model.config).eval() for task in TASKS}
    for task, head in heads.items():
        head.save_pretrained(tmp_path / f"saved{task}")
    logits, generated = run_without_package(tmp_path, tmp_path / "saved", tmp_path / "again")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        for task, head in heads.items():
            torch.testing.assert_close(torch.load(tmp_path / f"out.pt{task}"), head(ids)[0])
        assert torch.equal(logits, model(ids).logits)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, logits)
    sources = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert {"modeling_motif2.py", "configuration_motif2.py", "diagnostics.py"} <= sources
    assert sources == {path.name for path in (tmp_path / "again").glob("*.py")}


def test_a_saved_model_saves_again_after_its_folder_is_gone(tmp_path):
    small_model().save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "modeling_motif2.py").exists()
