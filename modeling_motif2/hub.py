"""Loading that names what is wrong with a checkpoint, and saving to a folder that is ready for the Hub."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from .model_card import write_model_card

LAYOUTS = ("motif2", "official", "engine")
# What `trust_remote_code` finds in a saved folder, whatever head the model was saved with.
AUTO_MAP = {
    "AutoConfig": "configuration_motif2.Motif2Config",
    "AutoModel": "modeling_motif2.Motif2Model",
    "AutoModelForCausalLM": "modeling_motif2.Motif2ForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_motif2.Motif2ForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_motif2.Motif2ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_motif2.Motif2ForTokenClassification",
}
# Weights that a task head adds to the backbone: a checkpoint of the language model does not have them.
TASK_HEAD_WEIGHTS = ("score.", "qa_outputs.")
LANGUAGE_HEAD_WEIGHT = "lm_head.weight"
NAMES_IN_A_MESSAGE = 20
# Arguments of `push_to_hub` that `save_pretrained(push_to_hub=True)` takes too.
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision", "tags")


class Motif2HubMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of Motif-2 models; goes before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(
        cls,
        *args,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Loads a checkpoint in our layout or the official one; see `PreTrainedModel.from_pretrained`.

        Args:
            *args: the folder or repository, then what transformers takes.
            strict: whether a checkpoint that does not fit is an error; False only warns, as transformers does.
            ignore_mismatched_sizes: whether a tensor of another shape is drawn anew instead of being an error.
            output_loading_info: whether to return transformers' record of the loading too.
            **kwargs: what transformers takes.

        Raises:
            ValueError: if tensors are missing, left over or of another shape; the message names them.
        """
        model, info = super().from_pretrained(
            *args, ignore_mismatched_sizes=strict or ignore_mismatched_sizes, output_loading_info=True, **kwargs
        )
        if strict and not getattr(model, "_hf_peft_config_loaded", False):
            _refuse_what_does_not_fit(info, model, shapes=not ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, layout: str = "motif2", push_to_hub: bool = False, **kwargs):
        """Saves weights, configuration, the sources of this model and a model card.

        Args:
            save_directory: folder; a README.md that is already there is left alone.
            *args: what transformers takes.
            layout: "motif2" (loads with this package, or with `trust_remote_code=True` without it), "official" (a
                config.json like those of the official checkpoints, without sources), or "engine" (like "motif2", each
                layer's attention in one call, see `Motif2Config.for_engines`).
            push_to_hub: whether to upload the folder afterwards, to `repo_id` or the folder's name.
            **kwargs: what transformers takes, and `push_to_hub`'s arguments.

        Raises:
            ValueError: if the layout is unknown, or cannot tell this configuration; nothing is written then.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is unknown: use one of {', '.join(LAYOUTS)}.")
        if layout == "official":
            self.config.to_official_dict()  # refuses here what it cannot tell
        folder = Path(save_directory)
        upload = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        upload["tags"] = self._all_tags(upload.get("tags"))
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        on_this_rank = self.should_save_on_this_rank(kwargs.get("is_main_process", True))
        if on_this_rank and (folder / "config.json").exists():
            if layout == "official":
                _make_official(folder, self.config.to_official_dict())
            elif layout == "engine":
                self.config.for_engines().save_pretrained(folder)
            if not (folder / "README.md").exists():
                write_model_card(folder, num_parameters=self.num_parameters(), tags=upload["tags"])
        if on_this_rank and push_to_hub:
            upload_folder(folder, upload.pop("repo_id", folder.name), token=kwargs.get("token"), **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: str = "motif2",
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | str | None = None,
        **card,
    ) -> str:
        """Saves to a temporary folder and uploads it in one commit; a model card already on the Hub is kept.

        Args:
            repo_id: "name" or "organisation/name"; made when it does not exist.
            layout: as in `save_pretrained`.
            commit_message: what the commit says.
            commit_description: what it says below that.
            private: whether a new repository is private.
            token: access token, True for the stored one.
            revision: branch, made when it does not exist.
            create_pr: whether to open a pull request instead of committing.
            max_shard_size: largest file of weights.
            tags: of the model card, beside the model's own (`add_model_tags`); what a card already on the Hub lacks is
                added to it in a second commit.
            **card: what `write_model_card` takes, to say how the model was made.

        Returns:
            URL of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, layout=layout, max_shard_size=max_shard_size)
            tags = self._all_tags(tags)
            card = {"name": repo_id.split("/")[-1], "num_parameters": self.num_parameters(), "tags": tags} | card
            write_model_card(folder, **card)
            return upload_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            )

    def _all_tags(self, tags: list[str] | str | None) -> list[str]:
        return [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> str:
    """Uploads a saved folder to the Hub in one commit; arguments as in `Motif2HubMixin.push_to_hub`.

    Returns:
        URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
    except EntryNotFoundError:
        card = None
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        commit_message=commit_message or "Upload Motif-2 model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=None if card is None else ["README.md"],
    )
    there = [] if card is None else card.data.tags or []
    if card is not None and set(tags or []) - set(there):
        card.data.tags = list(dict.fromkeys([*there, *tags]))
        api.upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            commit_message="Add tags",
            revision=commit.pr_revision or revision,
        )
    return commit.commit_url


def _make_official(folder: Path, config: dict) -> None:
    """Turns a folder just saved in our layout into the official one."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for source in Path(__file__).parent.glob("*.py"):
        (folder / source.name).unlink(missing_ok=True)


def _refuse_what_does_not_fit(info: dict, model, shapes: bool) -> None:
    has_language_head = hasattr(model, "lm_head")
    # A task head is drawn anew where the checkpoint is another model's, never where it should have one.
    new = () if type(model).__name__ in (model.config.architectures or []) else TASK_HEAD_WEIGHTS
    missing = [name for name in info["missing_keys"] if not name.startswith(new)]
    extra = [name for name in info["unexpected_keys"] if has_language_head or name != LANGUAGE_HEAD_WEIGHT]
    wrong = [
        f"{name} is {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"] if shapes
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("left over", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            "the checkpoint's tensors do not fit its config.json: " + "; ".join(problems) + ". Mend the file or the "
            "configuration, or pass strict=False to go on with those tensors drawn anew."
        )


def _listed(names: list[str]) -> str:
    shown = sorted(names)[:NAMES_IN_A_MESSAGE]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "")
