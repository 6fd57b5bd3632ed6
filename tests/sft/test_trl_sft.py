"""TRL's own arguments drive our stage: the recipe loads, a run equals ours, and mistakes are named."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from sft.stage import run_stage
from sft.trl_sft import Motif2Arguments, check_rows, main

RECIPE = Path(__file__).parents[2] / "recipes" / "sft" / "trl_sft.yaml"


@pytest.fixture
def words(workplace, tmp_path) -> list[str]:
    """A recipe with the data and TRL's words for the settings of the fixture `settings`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"datasets: [{{path: json, data_files: {workplace / 'train.jsonl'}, columns: [messages]}}]\n"
        "packing: true\nassistant_only_loss: true\nlearning_rate: 9.0\n"
    )
    text = f"--config {recipe} --model_name_or_path {workplace / 'base'} --output_dir {tmp_path / 'trl'} "
    text += "--dtype float32 --attn_implementation sdpa --max_length 256 --max_steps 2 --learning_rate 5e-3 "
    text += "--weight_decay 0.1 --lr_scheduler_type cosine --warmup_steps 0.3 --per_device_train_batch_size 1 "
    text += "--gradient_accumulation_steps 2 --bf16 false --gradient_checkpointing false --use_cpu true --seed 0 "
    text += "--save_strategy no --logging_steps 1 --report_to none --disable_tqdm true --kernels torch"
    return text.split()


def test_trl_arguments_train_as_ours_do(words, settings, workplace, tmp_path):
    main([*words, "--qk_clip_threshold", "0.02"])
    # The same rows in the same order: TRL reads the file as it lies, so ours does not shuffle it either.
    from sft import stage

    load = stage.load_conversations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_conversations", lambda *args, **options: load(*args, **(options | {"seed": None})))
        ours = run_stage(settings("ours", max_steps=2, warmup_ratio=0.3, qk_clip_threshold=0.02))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trl").state_dict()
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(ours.model_dir).state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trl")
    stops = json.loads((tmp_path / "trl" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|endoftext|>", "<|endofturn|>"]


def test_adapters_train_with_trls_optimizer(words, tmp_path):
    adapters = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    with pytest.raises(SystemExit, match="set muon_clip: false"):
        main([*words, *adapters])
    main([*words, *adapters, "--muon_clip", "false", "--max_steps", "1"])
    assert (tmp_path / "trl" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rat", "1e-3", "--no_such_flag", "1"], "no_such_flag"),
        (["--kernels", "fast"], "kernels is 'fast'; use one of auto"),
        (["--bad_rows", "ignore"], "bad_rows is 'ignore'; use one of skip, refuse"),
        (["--qk_clip_threshold", "0"], "qk_clip_threshold is 0.0"),
        (["--model_name_or_path", ""], "model_name_or_path is empty"),
        (["--kernels_lock", "some.lock"], "some.lock locks kernels, and source is 'torch'"),
    ],
)
def test_mistakes_are_named(words, extra, message):
    with pytest.raises(SystemExit, match=message):
        main([*words, *extra])


def test_data_must_be_named(words):
    with pytest.raises(SystemExit, match="no data is named; set dataset_name, or datasets"):
        main(words[2:])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dataset_train_split", "training"], "the data has no split 'training', only train; set dataset_train_"),
        (
            ["--eval_strategy", "steps", "--eval_steps", "1"],
            "the data has no split 'test', only train; .* no",
        ),
    ],
)
def test_a_split_that_is_missing_is_named(words, extra, message):
    with pytest.raises(SystemExit, match=message):
        main([*words, *extra])


def test_the_recipe_is_in_trls_words():
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, Motif2Arguments))
    words = ["--config", str(RECIPE), "--use_cpu", "true"]
    _, arguments, model, mixture, motif2 = parser.parse_args_and_config(words)
    assert (arguments.packing, arguments.assistant_only_loss, motif2.muon_clip) == (True, True, True)
    assert mixture.datasets[0].columns == ["messages"]
    assert model.model_name_or_path


USER, REPLY = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}
BAD_ROWS = {
    "unknown role": [{"role": "critic", "content": "x"}, REPLY],
    "missing role": [{"content": "x"}, REPLY],
    "no messages": [],
    "last turn is not the assistant's": [USER],
    "chat markup inside a text": [USER, REPLY | {"content": "x<|endofturn|><|startofturn|><|user|>\ny"}],
}


@pytest.fixture
def with_bad_rows(words, workplace, tmp_path) -> list[str]:
    """The words of a run of one update on 20 good rows and the bad ones, of which the first is row 20."""
    good = (workplace / "train.jsonl").read_text().splitlines()[:20]
    good = [{"messages": json.loads(line)["messages"]} for line in good]
    rows = good + [{"messages": messages} for messages in BAD_ROWS.values()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(workplace / "train.jsonl"), str(tmp_path / "rows.jsonl")))
    return [*words, "--max_steps", "1"]


def test_rows_that_cannot_train_are_counted_and_left_out(with_bad_rows, tmp_path, capsys):
    main(with_bad_rows)
    shown = capsys.readouterr().out
    assert "20 of 25 rows of train kept" in shown
    for index, reason in enumerate(BAD_ROWS, start=20):
        assert f"dropped 1: {reason} (first: train:{index})" in shown
    assert shown.count("tokens trained]") == 2, "two sequences with their loss mask"
    previewed = shown[shown.index("<|beginoftext|>") : shown.rindex("tokens trained]")]
    assert previewed.count("<|user|>") == previewed.count("<|assistant|>\n⟦") == previewed.count("<|endofturn|>⟧") > 1
    assert previewed.count("⟦") == previewed.count("⟧") == previewed.count("<|user|>"), "replies alone are trained"
    assert "critic" not in shown
    assert (tmp_path / "trl" / "model.safetensors").exists()


def test_the_first_bad_row_stops_where_that_is_asked_for(with_bad_rows):
    with pytest.raises(SystemExit, match="row 20 of train is malformed: unknown role; mend it, or set bad_rows: skip"):
        main([*with_bad_rows, "--bad_rows", "refuse"])


def test_streams_prompts_and_texts_are_checked_too():
    rows = [{"prompt": [USER], "completion": [REPLY]}, {"prompt": [USER], "completion": [USER]}]
    assert len(check_rows(Dataset.from_list(rows), "train", "skip")) == 1
    assert len(list(check_rows(Dataset.from_list(rows).to_iterable_dataset(), "train", "skip"))) == 1
    with pytest.raises(ValueError, match="row 1 of train is malformed"):
        list(check_rows(Dataset.from_list(rows).to_iterable_dataset(), "train", "refuse"))
    assert len(check_rows(Dataset.from_list([{"text": "a"}, {"text": "b"}]), "train", "refuse")) == 2
    with pytest.raises(ValueError, match="0 of 1 rows of train kept; dropped 1: last turn"):
        check_rows(Dataset.from_list(rows[1:]), "train", "skip")


def test_a_file_that_is_no_json_is_named(with_bad_rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [\nnothing')
    with pytest.raises(SystemExit, match="the data cannot be read: "):
        main(with_bad_rows)


def test_it_goes_on_from_a_whole_checkpoint_alone(words, tmp_path):
    saving = [*words, "--save_strategy", "steps", "--save_steps", "1"]
    main(saving)
    first = tmp_path / "trl" / "checkpoint-1"
    main([*saving, "--resume_from_checkpoint", str(first)])
    (first / "optimizer.pt").unlink()
    with pytest.raises(SystemExit, match=r"checkpoint-1' is not complete: optimizer.pt is missing; name another one"):
        main([*saving, "--resume_from_checkpoint", str(first)])
