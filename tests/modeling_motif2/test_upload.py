"""Uploading with huggingface_hub to a Hub that records the commit, and loading back what was recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.modeling_motif2.builders import small_model
from tests.modeling_motif2.recording_hub import RecordingHub

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
from transformers import AutoModelForCausalLM
import modeling_motif2
model = AutoModelForCausalLM.from_pretrained({folder!r})
card = dict(training="Drawn at random.", license="apache-2.0", evaluation=dict(coin_flips=dict(accuracy=0.5)))
url = model.push_to_hub("someone/motif-small", commit_message="First weights", token="secret", **card)
assert url.endswith("/commit/" + "0" * 40), url
again = AutoModelForCausalLM.from_pretrained("someone/motif-small")
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
there = dict(push_to_hub=True, repo_id="someone/motif-official", token="secret")
there |= dict(commit_description="In the official layout.", tags=["tiny"])
model.save_pretrained({second!r}, layout="official", **there)
again = AutoModelForCausalLM.from_pretrained("someone/motif-official")
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
model.push_to_hub("someone/motif-small", commit_message="Second weights", token="secret")
model.add_model_tags("kept")
aside = dict(revision="next", commit_message="Third weights", commit_description="Beside the others.", tags="tiny")
for _ in range(2):
    model.push_to_hub("someone/motif-small", token="secret", **aside)
"""


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """A Hub after three uploads from a process of its own: huggingface_hub reads its endpoint when imported."""
    folder = tmp_path_factory.mktemp("hub")
    model = small_model()
    model.save_pretrained(folder / "local")
    with RecordingHub() as hub:
        script = SCRIPT.format(root=str(ROOT), folder=str(folder / "local"), second=str(folder / "official"))
        env = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=250)
        assert done.returncode == 0, done.stderr
        yield hub, folder, model


def test_each_upload_is_one_commit(uploaded):
    hub, folder, _ = uploaded
    first, official, second = hub.commits[:3]
    assert first[:2] == ("someone/motif-small", "First weights")
    local = {path.name for path in (folder / "local").iterdir()}
    assert set(first[2]) == local
    assert {"modeling_motif2.py", "config.json", "model.safetensors", "README.md"} <= local
    assert official[0] == "someone/motif-official"
    assert not [path for path in official[2] if path.endswith(".py")]
    assert second[1] == "Second weights"
    assert "README.md" not in second[2]


def test_a_branch_a_description_and_tags_arrive(uploaded):
    hub, _, _ = uploaded
    assert hub.commits[1][3] == "In the official layout."
    assert "- tiny" in hub.files["someone/motif-official"]["README.md"].decode()
    third, tagged, again = hub.commits[3:]
    assert third[:2] == ("someone/motif-small@next", "Third weights")
    assert third[3] == "Beside the others."
    assert tagged[::2] == ("someone/motif-small@next", ["README.md"])
    card = hub.files["someone/motif-small@next"]["README.md"].decode()
    assert "Drawn at random." in card
    assert "- motif2" in card
    assert "- kept" in card
    assert "- tiny" in card
    assert "- tiny" not in hub.files["someone/motif-small"]["README.md"].decode()
    assert again[1] == "Third weights"


def test_the_card_was_uploaded_and_kept(uploaded):
    hub, _, _ = uploaded
    card = hub.files["someone/motif-small"]["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "# motif-small" in card
    assert "Drawn at random." in card
    assert "| coin_flips | accuracy | 0.5 |" in card


@pytest.mark.parametrize("repo", ["someone/motif-small", "someone/motif-official"])
def test_what_was_recorded_loads(uploaded, tmp_path, repo):
    hub, _, model = uploaded
    for path, content in hub.files[repo].items():
        (tmp_path / path).write_bytes(content)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_was_recorded_has_the_sources_of_a_saved_folder(uploaded):
    hub, folder, _ = uploaded
    for path in (folder / "local").glob("*.py"):
        assert hub.files["someone/motif-small"][path.name] == path.read_bytes()
