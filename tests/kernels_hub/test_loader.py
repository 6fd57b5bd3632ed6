"""Choosing PolyNorm kernels for a model: order, fallback with its reason, lock, and proof that the choice runs."""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from types import MethodType

import accelerate
import kernels.utils
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model

import kernels_hub
from kernels_hub import loader, sources
from kernels_hub.build import ROOT
from modeling_motif2 import Motif2Config, Motif2ForCausalLM


@pytest.fixture
def model():
    config = Motif2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=4,
        num_noise_heads=2,
        head_dim=8,
    )
    return Motif2ForCausalLM(config)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(loader, "_said", set())


def _step(model):
    tokens = torch.arange(8)[None]
    model(tokens, labels=tokens).loss.backward()


def test_local_kernels_run_in_training_and_inference(model, capsys):
    tokens = torch.arange(8)[None]
    want = model(tokens).logits
    choice = kernels_hub.use_polynorm(model, "local")
    assert (choice.source, choice.num_modules) == ("local", 2)
    assert kernels_hub.polynorm_in_use(model) == choice
    torch.testing.assert_close(model(tokens).logits, want)
    for mode in (model.train(), model.eval()):
        assert kernels_hub.assert_polynorm_runs(mode, lambda: _step(model)) == choice
    kernels_hub.use_polynorm(model, "local")
    assert capsys.readouterr().err.count("PolyNorm: local kernel") == 1


def test_torch_can_be_put_back(model):
    kernels_hub.use_polynorm(model, "local")
    assert kernels_hub.use_polynorm(model, "torch").source == "torch"
    assert kernels_hub.polynorm_in_use(model).source == "torch"
    kernels_hub.assert_polynorm_runs(model, lambda: _step(model))


@pytest.mark.parametrize("first", ["offload", "kernel"])
def test_an_offloaded_model_keeps_its_device_hooks(model, first):
    tokens = torch.arange(8)[None]
    want = model(tokens).logits
    if first == "kernel":
        kernels_hub.use_polynorm(model, "local")
    accelerate.cpu_offload(model, execution_device="cpu")
    act_fn = model.model.layers[0].mlp.act_fn
    assert act_fn.weight.is_meta
    assert kernels_hub.polynorm_in_use(model).source == ("local" if first == "kernel" else "torch")
    for source, number in (("local", 2), ("torch", 0), ("local", 2)):
        choice = kernels_hub.use_polynorm(model, source)
        assert kernels_hub.polynorm_in_use(model) == choice
        logits = []
        names = loader._operators(lambda seen=logits: seen.append(model(tokens).logits))
        assert sum(name.split("::")[0] in loader._namespaces for name in names) == number
        torch.testing.assert_close(logits[0], want)
    remove_hook_from_submodules(model)
    assert kernels_hub.polynorm_in_use(model).source == "local"


def test_a_forward_of_another_library_is_left_alone(model):
    act_fn = model.model.layers[1].mlp.act_fn
    act_fn.forward = other = lambda x, mul: x * mul
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn runs .*take it out first"):
        kernels_hub.use_polynorm(model, "local")
    assert act_fn.forward is other
    del act_fn.forward
    assert kernels_hub.polynorm_in_use(model).source == "torch"  # nothing was put into the first layer either


@pytest.mark.parametrize("source", ["local", "torch"])
def test_frozen_parameters(model, source):
    model.requires_grad_(False)
    assert kernels_hub.use_polynorm(model, source).source == source


def test_a_model_with_adapters(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    choice = kernels_hub.use_polynorm(adapted, "local")
    assert kernels_hub.assert_polynorm_runs(adapted, lambda: _step(adapted)) == choice


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(model, made_inside):
    with torch.inference_mode():
        model = Motif2ForCausalLM(model.config) if made_inside else model
        assert kernels_hub.use_polynorm(model, "local").source == "local"


def _changed_layer(monkeypatch, **members) -> sources.Layers:
    """Let every source give the local layer with `members` in place of its own."""
    local = sources.load_layers("local", {"FusedMulPolyNorm"})
    changed = type("FusedMulPolyNorm", (local.classes["FusedMulPolyNorm"],), members)
    layers = sources.Layers(local.namespace, {"FusedMulPolyNorm": changed}, local.module)
    monkeypatch.setattr(loader, "load_layers", lambda *_, **__: layers)
    return local


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_kernel_that_skips_a_mode_is_an_error(model, monkeypatch, mode):
    def forward(self, x, mul):
        if self.training == (mode == "training"):
            return x * mul * self.weight.sum() + self.bias
        return local.classes["FusedMulPolyNorm"].forward(self, x, mul)

    local = _changed_layer(monkeypatch, forward=forward)
    with pytest.raises(AssertionError, match=f"in {mode}, at least"):
        kernels_hub.use_polynorm(model, "hub")


def test_models_that_share_a_kernel_keep_their_own_choice(model, monkeypatch):
    other = Motif2ForCausalLM(model.config)
    local = sources.load_layers("local", {"FusedMulPolyNorm"})
    first = kernels_hub.use_polynorm(model, "local")
    monkeypatch.setattr(loader, "load_layers", lambda *_, **__: local)
    second = kernels_hub.use_polynorm(other, "hub")
    assert (kernels_hub.polynorm_in_use(model), kernels_hub.polynorm_in_use(other)) == (first, second)
    assert (first.source, second.source) == ("local", "hub")


def test_a_replaced_forward_is_noticed(model):
    choice = kernels_hub.use_polynorm(model, "local")
    act_fn = model.model.layers[1].mlp.act_fn
    act_fn.forward = MethodType(type(act_fn).forward, act_fn)  # what kernelize does without a mapping
    with pytest.raises(ValueError, match="differ"):
        kernels_hub.polynorm_in_use(model)
    with pytest.raises(AssertionError, match="something replaced"):
        loader._assert_counts(choice, loader._operators(lambda: _step(model)), 4, "the step")
    act_fn.forward = lambda x, mul: x * mul
    with pytest.raises(ValueError, match="did not put there"):
        kernels_hub.polynorm_in_use(model)


def test_auto_without_a_gpu_says_so_once(model):
    with pytest.warns(UserWarning, match="no GPU in this process"):
        assert kernels_hub.use_polynorm(model).source == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels_hub.use_polynorm(model)


def test_auto_takes_the_first_that_works(model, monkeypatch):
    tried = []
    local = sources.load_layers("local", {"FusedMulPolyNorm"})

    def load(source, names, **_):
        tried.append(source)
        if source != "official":
            raise sources.KernelUnavailable("not today")
        return local

    monkeypatch.setattr(loader, "backend", lambda: "cuda")
    monkeypatch.setattr(loader, "load_layers", load)
    choice = kernels_hub.use_polynorm(model)
    assert tried == ["local", "hub", "official"]
    assert (choice.source, choice.refused) == ("official", ("local: not today", "hub: not today"))


@pytest.mark.filterwarnings("ignore:Skipping publisher trust check")
@pytest.mark.parametrize("source", ["hub", "official"])
def test_offline_falls_back_to_torch(model, source):
    with pytest.warns(UserWarning, match=f"plain torch, not as a kernel: {source}: .*offline mode"):
        choice = kernels_hub.use_polynorm(model, source)
    assert choice.source == kernels_hub.polynorm_in_use(model).source == "torch"


@pytest.mark.parametrize(("installed", "reason"), [(None, "not installed"), ("0.17.0", "0.17.0")])
def test_without_kernels_or_outside_its_window(model, monkeypatch, installed, reason):
    monkeypatch.setattr(sources, "is_kernels_available", lambda: False)
    if installed is None:
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(kernels, "__version__", installed)
    with pytest.warns(UserWarning, match=f"the package kernels is {reason}; transformers needs >=0.16"):
        assert kernels_hub.use_polynorm(model, "hub").source == "torch"


@pytest.mark.slow
def test_local_needs_no_kernels_package():
    code = """
import sys
sys.modules["kernels"] = None
from kernels_hub import sources
sources.is_kernels_available = lambda: False
print(sources.load_local("polynorm").layers.PolyNorm)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert "layers.PolyNorm" in run.stdout, run.stderr


def test_a_kernel_without_backward_is_refused_for_training(model, monkeypatch):
    @torch.no_grad
    def forward(self, x, mul):
        return local.classes["FusedMulPolyNorm"].forward(self, x, mul)

    local = _changed_layer(monkeypatch, has_backward=False, forward=forward)
    with pytest.warns(UserWarning, match="has no backward"):
        assert kernels_hub.use_polynorm(model, "hub", training=True).source == "torch"
    assert kernels_hub.use_polynorm(model, "hub", training=False).source == "hub"


def test_wrong_settings(model):
    with pytest.raises(ValueError, match="'fast'"):
        kernels_hub.use_polynorm(model, "fast")
    with pytest.raises(ValueError, match="no PolyNorm module"):
        kernels_hub.use_polynorm(torch.nn.Linear(2, 2))


@pytest.fixture
def cached_repository(tmp_path, monkeypatch):
    """Our repository in a Hub cache, as a download leaves it, and the lock that `kernels lock` would write for it."""
    repository, commit = "motif2/polynorm", "a" * 40
    cache = tmp_path / "kernels--motif2--polynorm"
    files = []
    for path in sorted((ROOT / "polynorm" / "build" / "torch-cpu").rglob("*.*")):
        if "__pycache__" in path.parts:
            continue
        relative = path.relative_to(ROOT / "polynorm" / "build" / "torch-cpu").as_posix()
        data = path.read_bytes()
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        files.append((relative.encode(), bytes.fromhex(blob)))
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        (cache / "blobs" / blob).write_bytes(data)
        link = cache / "snapshots" / commit / "build" / "torch-cpu" / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / blob)
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text(commit)
    digest = hashlib.sha256(b"".join(name + blob for name, blob in sorted(files))).hexdigest()
    lock = [{"repo_id": repository, "sha": commit, "variants": {"torch-cpu": {"hash": f"sha256-{digest}"}}}]
    (tmp_path / "kernels.lock").write_text(json.dumps(lock))
    monkeypatch.setattr(kernels.utils, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore:Skipping publisher trust check")
def test_a_locked_kernel_loads_and_a_changed_one_does_not(model, cached_repository):
    lockfile = cached_repository / "kernels.lock"
    assert kernels_hub.use_polynorm(model, "hub", lockfile=lockfile).source == "hub"
    blob = next((cached_repository / "kernels--motif2--polynorm").glob("snapshots/*/build/*/layers.py"))
    blob.resolve().write_text(blob.read_text() + "# changed\n")
    with pytest.raises(ValueError, match="hash"):
        kernels_hub.use_polynorm(model, "hub", lockfile=lockfile)


@pytest.mark.parametrize("lockfile", [None, ""])
def test_no_lock_file_locks_nothing(model, lockfile):
    assert kernels_hub.use_polynorm(model, "torch", lockfile=lockfile).source == "torch"
    assert kernels_hub.use_polynorm(model, "local", lockfile=lockfile).source == "local"


def test_a_kernel_that_is_not_locked_is_an_error(model, tmp_path):
    (tmp_path / "kernels.lock").write_text("[]")
    with pytest.raises(ValueError, match=r"does not lock motif2/polynorm"):
        kernels_hub.use_polynorm(model, "hub", lockfile=tmp_path / "kernels.lock")


def test_what_a_lock_does_not_cover_is_an_error(model, cached_repository, monkeypatch):
    lockfile = cached_repository / "kernels.lock"
    for source, reason in (("local", "not this checkout"), ("torch", "loads none")):
        with pytest.raises(ValueError, match=reason):
            kernels_hub.use_polynorm(model, source, lockfile=lockfile)
    with pytest.raises(ValueError, match=r"absent\.lock does not exist"):
        kernels_hub.use_polynorm(model, "hub", lockfile="absent.lock")
    monkeypatch.setenv("LOCAL_KERNELS", f"motif2/polynorm={ROOT / 'polynorm'}")
    with pytest.raises(ValueError, match="LOCAL_KERNELS puts a folder"):
        kernels_hub.use_polynorm(model, "hub", lockfile=lockfile)


@pytest.mark.filterwarnings("ignore:Skipping publisher trust check")
def test_auto_takes_only_what_is_locked(model, cached_repository, monkeypatch):
    monkeypatch.setattr(loader, "backend", lambda: "cuda")
    choice = kernels_hub.use_polynorm(model, lockfile=cached_repository / "kernels.lock")
    assert choice.source == "hub"
    assert "not this checkout" in choice.refused[0]
    (cached_repository / "kernels.lock").write_text("[]")
    with pytest.warns(UserWarning, match="does not lock Motif-Technologies/activation"):
        choice = kernels_hub.use_polynorm(model, lockfile=cached_repository / "kernels.lock")
    assert choice.source == "torch"
    assert [reason.partition(":")[0] for reason in choice.refused] == ["local", "hub", "official"]


def test_a_lock_without_this_variant_is_an_error(model, cached_repository):
    lockfile = cached_repository / "kernels.lock"
    lockfile.write_text(lockfile.read_text().replace("torch-cpu", "torch-cuda"))
    with pytest.raises(ValueError, match=r"has no torch-cpu, only \['torch-cuda'\]"):
        kernels_hub.use_polynorm(model, "hub", lockfile=lockfile)


def test_an_untrusted_publisher_is_no_error_of_the_lock(model, cached_repository, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("not from a trusted publisher")

    monkeypatch.setattr(kernels, "get_kernel", refuse)
    for name in [name for name in sys.modules if name.startswith("_polynorm_cpu")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(UserWarning, match="not from a trusted publisher"):
        choice = kernels_hub.use_polynorm(model, "hub", lockfile=cached_repository / "kernels.lock")
    assert choice.source == "torch"


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_local_kernel_that_cannot_be_imported(model, monkeypatch, tmp_path, with_kernels):
    variant = tmp_path / "polynorm" / "build" / "torch-cpu"
    shutil.copytree(ROOT / "polynorm" / "build" / "torch-cpu", variant)
    metadata = json.loads((variant / "metadata.json").read_text()) | {"id": f"_broken_{with_kernels}".lower()}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    (variant / "__init__.py").write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(sources, "CHECKOUT", tmp_path)
    monkeypatch.setattr(sources, "is_kernels_available", lambda: with_kernels)
    for _ in range(2):
        with pytest.raises(sources.KernelUnavailable, match="No module named 'a_module_that_is_not_there'"):
            sources.load_local("polynorm")
    with pytest.warns(UserWarning, match="plain torch, not as a kernel: local: .*a_module_that_is_not_there"):
        assert kernels_hub.use_polynorm(model, "local").source == "torch"


@pytest.mark.parametrize("metadata", ["", "{}", "[]"])
def test_a_build_cut_off_while_it_was_written(model, monkeypatch, tmp_path, metadata):
    variant = tmp_path / "polynorm" / "build" / "torch-cpu"
    variant.mkdir(parents=True)
    (variant / "metadata.json").write_text(metadata)
    monkeypatch.setattr(sources, "CHECKOUT", tmp_path)
    with pytest.raises(sources.KernelUnavailable, match=r"run python kernels_hub/build\.py polynorm"):
        sources.load_local("polynorm")


def test_a_gpu_without_triton(model, monkeypatch):
    found = sources.importlib.util.find_spec
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    monkeypatch.setattr(sources, "backend", lambda: "cuda")
    with pytest.warns(UserWarning, match="local: its kernels need Triton on a GPU"):
        assert kernels_hub.use_polynorm(model, "local").source == "torch"


def test_only_the_main_process_prints(model, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    kernels_hub.use_polynorm(model, "local")
    assert "PolyNorm:" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    kernels_hub.use_polynorm(model, "local")
    assert "PolyNorm: local kernel" in capsys.readouterr().err
