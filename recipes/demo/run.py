"""The whole of motif2 on one laptop: corpus, pre-training, three fine-tuning stages, evaluation, use, report.

`make demo` runs it; `python -m recipes.demo.run --help` lists its settings. It calls what the console scripts call,
with the recipes beside this file. Interrupted, it goes on where it stopped.
"""

import itertools
import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_harness.evaluate import evaluate
from recipes.demo.report import text_table, write_report
from sft.chat import attach_chat_template
from sft.config import SftStageConfig
from sft.examples import (
    arithmetic_conversations,
    docstring_conversations,
    prune_worked_examples,
    write_conversations,
)
from sft.stage import run_stage
from trainer.cli import parse_recipe
from trainer.config import PretrainConfig
from trainer.data.arithmetic import generate_problems
from trainer.data.machine_corpus import DOMAINS, machine_documents
from trainer.data.shards import build_shards
from trainer.data.tokenizer import train_tokenizer
from trainer.loop import run_pretraining
from trainer.model import build_model
from trainer.plots import plot_run, plot_scores, plot_stage_losses, read_metrics

RECIPES = Path(__file__).parent
PROMPTS = ("What is 23 + 45?", "What is 58 + 37?")
HELDOUT_TASKS = [f"motif2_heldout_{domain}" for domain in DOMAINS]
ARITHMETIC_TASK = "motif2_arithmetic"
SUMS = {"kinds": ("add",), "min_operand": 10, "words": False}

# What a miniature changes: enough to run every part, too little to learn much.
MINIATURE_PRETRAIN = {"total_tokens": 6144, "warmup_tokens": 1024, "decay_tokens": 2048, "eval_steps": 3}
MINIATURE_STAGE_STEPS = 2
SIZES = ("train_bytes", "heldout_bytes", "vocab_size", "num_conversations", "num_problems")


@dataclass
class DemoConfig:
    """Settings of the demo; sizes are chosen for two CPU cores (assumption)."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of everything the demo writes"})
    overwrite: bool = field(default=False, metadata={"help": "delete an earlier demo in output_dir first"})
    miniature: bool = field(default=False, metadata={"help": "every part, but far too short to learn (two minutes)"})
    train_bytes: int = field(default=1_500_000, metadata={"help": "bytes of training text a domain"})
    heldout_bytes: int = field(default=12_000, metadata={"help": "bytes of held-out text a domain"})
    vocab_size: int = field(default=5120, metadata={"help": "entries of the tokenizer"})
    num_conversations: int = field(default=2000, metadata={"help": "conversations of stages 1 and 2 each"})
    num_problems: int = field(default=100, metadata={"help": "held-out problems that are scored"})
    dry_run: bool = field(default=False, metadata={"help": "print the resolved settings and exit"})

    def __post_init__(self):
        if self.miniature:
            self.train_bytes, self.heldout_bytes, self.vocab_size = 60_000, 1_500, 512
            self.num_conversations, self.num_problems = 60, 4
        for name in ("train_bytes", "heldout_bytes", "num_conversations", "num_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")


class Demo:
    """Runs the parts in order and keeps what they found in `results.json`, so that a second start goes on."""

    def __init__(self, config: DemoConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.data = self.folder / "data"
        self.results_path = self.folder / "results.json"
        self.settings_path = self.folder / "settings.json"
        self.results = self._claim_folder()

    def _claim_folder(self) -> dict:
        """Enter the folder; what an earlier start with the same settings found.

        Raises:
            ValueError: the folder holds something else, or a demo with other settings.
        """
        names = {name: getattr(self.config, name) for name in ("miniature", *SIZES)}
        recipes = {path.name: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
        settings = {**names, "recipes": recipes}
        if self.folder.exists() and any(self.folder.iterdir()):
            if not self.settings_path.is_file():
                raise ValueError(f"output_dir {self.folder} holds something that is no demo; choose another folder")
            if self.config.overwrite:
                shutil.rmtree(self.folder)
            elif json.loads(self.settings_path.read_text()) != settings:
                raise ValueError(
                    f"output_dir {self.folder} holds a demo with other settings or recipes; --overwrite starts anew, "
                    "or choose another folder"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_path.write_text(json.dumps(settings, indent=1))
        return json.loads(self.results_path.read_text()) if self.results_path.is_file() else {}

    def run(self) -> None:
        """Do every part that is not done yet, then write the report and print the table."""
        self._part("data", self.make_data)
        self._part("untrained", self.score_untrained)
        self._part("pre-training", self.pretrain)
        for stage in (1, 2, 3):
            self._part(f"stage {stage}", lambda stage=stage: self.fine_tune(stage))
        self._part("use", self.use)
        self.report()

    def _part(self, name: str, work) -> None:
        if name in self.results:
            print(f"[{name}] done before; --overwrite starts anew")
            return
        print(f"\n[{name}]", flush=True)
        started = time.perf_counter()
        outcome = work()
        self.results[name] = {**outcome, "seconds": round(time.perf_counter() - started, 1)}
        written = self.results_path.with_suffix(".tmp")
        written.write_text(json.dumps(self.results, indent=1))
        written.replace(self.results_path)

    def make_data(self) -> dict:
        """Corpus, tokenizer, token shards, held-out sets and the conversations of the three stages."""
        config = self.config
        self.data.mkdir(parents=True, exist_ok=True)
        documents = {name: list(machine_documents(name, "train", config.train_bytes)) for name in DOMAINS}
        heldout = {name: list(machine_documents(name, "heldout", config.heldout_bytes)) for name in DOMAINS}
        texts = (document["text"] for document in itertools.chain.from_iterable(documents.values()))
        tokenizer = attach_chat_template(train_tokenizer(texts, config.vocab_size))
        tokenizer.save_pretrained(self.folder / "tokenizer")
        manifest = build_shards(self.folder / "shards", documents, tokenizer, heldout=heldout)
        for name in DOMAINS:
            _write_jsonl(self.data / f"heldout_{name}.jsonl", heldout[name])
        problems = generate_problems(1, config.num_problems, "heldout", **SUMS)
        rows = [{"question": problem.question, "answer": problem.solution} for problem in problems]
        _write_jsonl(self.data / "arithmetic.jsonl", rows)
        worked = arithmetic_conversations(generate_problems(2, config.num_conversations, "train", **SUMS))
        general = docstring_conversations(config.num_conversations, max_characters=200)
        stages = {1: general, 2: worked, 3: prune_worked_examples(worked).kept}
        for stage, conversations in stages.items():
            write_conversations(conversations, self.data / f"sft_stage{stage}.jsonl")
        tokens = {name: manifest["domains"][name]["train"]["tokens"] for name in DOMAINS}
        return {"tokens": tokens, "conversations": {stage: len(rows) for stage, rows in stages.items()}}

    def pretrain_config(self) -> PretrainConfig:
        """The recipe, with this demo's folder."""
        settings = {
            "output_dir": self.folder / "pretrain",
            "tokenizer": self.folder / "tokenizer",
            "data_dir": self.folder / "shards",
            **(MINIATURE_PRETRAIN if self.config.miniature else {}),
        }
        return _read_recipe(PretrainConfig, "pretrain.yaml", settings)

    def score_untrained(self) -> dict:
        """Scores of the model before its first step."""
        config = self.pretrain_config()
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        set_seed(config.seed)
        model = build_model(config, tokenizer)
        return {"parameters": model.num_parameters(), **self._score(model, tokenizer, chat=False)}

    def pretrain(self) -> dict:
        """Pre-train, then score."""
        shutil.rmtree(self.folder / "pretrain" / "model", ignore_errors=True)  # interrupted while it was scored
        result = run_pretraining(self.pretrain_config())
        losses = {"first_eval": result.first_eval, "last_eval": result.last_eval}
        return {
            "tokens": result.tokens,
            "steps": result.steps,
            **losses,
            **self._score_folder(result.model_dir, False),
        }

    def fine_tune(self, stage: int) -> dict:
        """One fine-tuning stage, then score."""
        before = "pretrain" if stage == 1 else f"stage{stage - 1}"
        settings = {
            "model_name_or_path": self.folder / before / "model",
            "output_dir": self.folder / f"stage{stage}",
            "train_files": self.data / f"sft_stage{stage}.jsonl",
        }
        if self.config.miniature:
            settings["max_steps"] = MINIATURE_STAGE_STEPS
        shutil.rmtree(settings["output_dir"], ignore_errors=True)  # an interrupted stage is short: it starts anew
        result = run_stage(_read_recipe(SftStageConfig, f"stage{stage}.yaml", settings))
        losses = {"steps": result.steps, "first_loss": result.first_loss, "last_loss": result.last_loss}
        return {**losses, **self._score_folder(result.model_dir, True)}

    def use(self) -> dict:
        """Let a process that cannot import this project load the final model and answer."""
        command = [sys.executable, RECIPES / "outsider.py", self.folder / "stage3" / "model", *PROMPTS]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"the exported model does not work without this project:\n{finished.stderr[-3000:]}")
        answers = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
        for answer in answers:
            print(f"> {answer['prompt']}\n{answer['answer']}\n")
        return {"answers": answers}

    def _score_folder(self, model_dir: Path, chat: bool) -> dict:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        return self._score(model, AutoTokenizer.from_pretrained(model_dir), chat)

    def _score(self, model, tokenizer, chat: bool) -> dict:
        """Held-out bits per byte by domain, and arithmetic accuracy (through the chat template after fine-tuning)."""
        options = {"data_dir": self.data, "batch_size": 16}
        heldout = evaluate(model, tokenizer, HELDOUT_TASKS, **options)
        arithmetic = evaluate(
            model, tokenizer, [ARITHMETIC_TASK], apply_chat_template=chat, **{**options, "batch_size": 50}
        )
        (error,) = arithmetic.standard_errors[ARITHMETIC_TASK].values()
        return {
            "heldout": {domain: heldout.metrics[f"motif2_heldout_{domain}"]["bits_per_byte"] for domain in DOMAINS},
            "arithmetic": arithmetic.score(ARITHMETIC_TASK),
            "arithmetic_error": error,
        }

    def report(self) -> None:
        """Pictures, page and the table in the terminal."""
        stages = ["untrained", "pre-training", "stage 1", "stage 2", "stage 3"]
        table = [["after", *(f"{domain}, bits/byte" for domain in DOMAINS), "arithmetic", "seconds"]]
        for stage in stages:
            found = self.results[stage]
            scores = [f"{found['heldout'][domain]:.3f}" for domain in DOMAINS]
            accuracy = f"{found['arithmetic']:.1%} ± {found['arithmetic_error']:.1%}"
            table.append([stage, *scores, accuracy, f"{found['seconds']:.0f}"])
        pictures = self._pictures(stages)
        answers = [(answer["prompt"], answer["answer"]) for answer in self.results["use"]["answers"]]
        page = write_report(
            self.folder / "report.html",
            title="Motif-2 on one laptop",
            summary=self._summary(),
            table=table,
            conversations=answers,
            pictures=pictures,
            facts=self._facts(),
        )
        print(f"\n{text_table(table)}\n\nreport: {page}\nmodel:  {self.folder / 'stage3' / 'model'}")

    def _pictures(self, stages: list[str]) -> list[tuple[str, Path]]:
        folder = self.folder / "pictures"
        run = plot_run(self.folder / "pretrain" / "metrics.jsonl", folder)
        losses = {}
        for stage in (1, 2, 3):
            rows = read_metrics(self.folder / f"stage{stage}" / "metrics.jsonl")
            losses[f"stage {stage}"] = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        captions = (
            "Loss",
            "Mixture over time",
            "Learning rate",
            "Lambda by layer",
            "Maximum attention logits by layer",
        )
        scores = [self.results[stage]["arithmetic"] for stage in stages]
        errors = [self.results[stage]["arithmetic_error"] for stage in stages]
        return [
            *zip(captions, run, strict=True),
            ("Fine-tuning loss", plot_stage_losses(losses, folder / "stages.png")),
            ("Arithmetic", plot_scores(stages, scores, errors, "right answers", folder / "arithmetic.png")),
        ]

    def _summary(self) -> str:
        found = self.results["pre-training"]
        falls = all(found["last_eval"][name] < found["first_eval"][name] for name in DOMAINS)
        before, after = self.results["untrained"]["arithmetic"], self.results["stage 3"]["arithmetic"]
        return (
            f"A Motif-2 of {self.results['untrained']['parameters'] / 1e6:.1f}M parameters, pre-trained on "
            f"{found['tokens']:,} tokens of text found on this machine and fine-tuned in three stages. Held-out loss "
            f"{'fell in all' if falls else 'did not fall in all'} {len(DOMAINS)} domains during pre-training; right "
            f"answers on held-out arithmetic went from {before:.1%} to {after:.1%}."
        )

    def _facts(self) -> dict[str, str]:
        packages = ("torch", "transformers", "accelerate", "trl", "lm-eval", "kernels")
        seconds = sum(found["seconds"] for found in self.results.values())
        return {
            "seconds in all": f"{seconds:.0f}",
            "tokens in the corpus": _listed(self.results["data"]["tokens"]),
            "conversations by stage": _listed(self.results["data"]["conversations"]),
            "versions": ", ".join(f"{name} {version(name)}" for name in packages),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
        }


def _read_recipe(config_class: type, name: str, settings: dict):
    """A recipe beside this file, with some settings given as if on the command line."""
    words = itertools.chain.from_iterable((f"--{key}", str(value)) for key, value in settings.items())
    argv = ["--config", str(RECIPES / name), *words]
    return parse_recipe(config_class, description=__doc__, argv=argv)[0]


def _listed(counts: dict) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `make demo`."""
    (config,) = parse_recipe(DemoConfig, description=__doc__, argv=argv)
    if config.dry_run:
        print(yaml.safe_dump(vars(config), sort_keys=False))
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        Demo(config).run()
    except ValueError as error:
        raise SystemExit(f"demo: {error}") from error


if __name__ == "__main__":
    main()
