"""Three fine-tuning stages on real conversations, from a base model trained here: what does each stage change?

    python benchmarks/sft_stages.py --prepare ../data     make the data on a CPU: shards, conversations, held-out rows
    python benchmarks/sft_stages.py                       train and measure on an accelerator, in under nine minutes
    python benchmarks/sft_stages.py --tiny …              either of them in miniature: every part, too short to learn

`--prepare` reads `pretrain/<domain>.jsonl.zst`, `sft/<domain>.parquet` and `eval/`. The base model and the model after
each stage answer the same held-out questions, through the chat template. sft_stages.csv, sft_stages.json,
sft_stages.png and sft_stages.log lie in $OUT, or in benchmarks/results/ when that is unset.

Shapes: B answers at a time, P tokens of a prompt, N tokens written.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import modeling_motif2  # noqa: E402, F401 (registers the architecture)
from benchmarks.sft_stages_data import FULL, TINY, Size, make_data  # noqa: E402
from eval_harness.statistics import paired_difference  # noqa: E402
from sft.chat import attach_chat_template, stop_token_ids  # noqa: E402
from sft.config import SftStageConfig  # noqa: E402
from sft.data import read_rows  # noqa: E402
from sft.prune import PruneConfig, prune, read_conversations, write_pruned  # noqa: E402
from sft.prune_page import reason_kind  # noqa: E402
from sft.stage import run_stage  # noqa: E402
from trainer.config import PretrainConfig  # noqa: E402
from trainer.loop import run_pretraining  # noqa: E402
from trainer.plots import read_metrics  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
FIELDS = ("after", "metric", "rows", "value", "difference", "low", "high", "verdict")
FINAL = re.compile(r"####\s*\$?(-?[\d,]+)\.?$")
STAGES = {1: "general instructions", 2: "reasoning", 3: "pruned reasoning"}
LEARNING_RATES = {1: 1e-3, 2: 5e-4, 3: 2e-4}
# Of the seconds left before a stage, the share that its updates may take (assumption).
STAGE_SHARES = {1: 0.35, 2: 0.4, 3: 0.3}
MIXTURE = {"general": 0.35, "stem": 0.15, "math": 0.3, "code": 0.2}
SHOWN_ANSWERS = 3


class Run:
    """The base model, the three stages and what is measured after each.

    Args:
        data: folder that `make_data` wrote.
        work: folder for models and stages.
        results: folder of the tables.
        size: how much.
    """

    def __init__(self, data: Path, work: Path, results: Path, size: Size):
        self.data, self.work, self.results, self.size = data, work, results, size
        self.started = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: list[dict] = []
        self.scores: dict[str, dict[str, list[float]]] = {}
        self.facts: dict = {"stages": {}, "seconds": {}}
        self.failures: list[str] = []
        self.step_seconds = size.step_seconds
        results.mkdir(parents=True, exist_ok=True)
        self.log = (results / "sft_stages.log").open("w", encoding="utf-8")

    def seconds_left(self) -> float:
        return self.size.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        """Print a line with the time, and keep it."""
        line = f"[{time.monotonic() - self.started:6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def everything(self) -> int:
        """All parts in order; a part that fails is written down, and the tables keep what there is. Exit status."""
        model = self.part("pre-training", self.pretrain)
        for stage in STAGES:
            model = model and self.part(
                f"stage {stage}", lambda stage=stage, model=model: self.fine_tune(stage, model)
            )
        self.say("failed: " + "; ".join(self.failures) if self.failures else "done")
        self.save()
        self.log.close()
        return int(bool(self.failures))

    def part(self, name: str, work) -> Path | None:
        """One part and what is measured after it; the model's folder, or None after a failure."""
        begun = time.monotonic()
        try:
            model_dir = work()
            self.facts["seconds"][name] = round(time.monotonic() - begun, 1)
            self.measure(name, model_dir)
            self.save()
            return model_dir
        except Exception:
            self.failures.append(name)
            self.say(f"{name} failed\n{traceback.format_exc()}")
            return None

    def pretrain(self) -> Path:
        """The base model, for as many tokens as its share of the time allows."""
        size = self.size
        settings = size.model | size.pretrain
        still = {"total_tokens": 12 * settings["batch_tokens"], "learning_rate": 1e-9, "adamw_learning_rate": 1e-9}
        timed = run_pretraining(self.pretrain_config("calibrate", settings | still, eval_steps=0))
        speeds = sorted(row["tokens_per_second"] for row in read_metrics(timed.metrics_path)[4:])
        speed = speeds[len(speeds) // 2]
        batch = settings["batch_tokens"]
        affordable = speed * size.pretrain_share * self.seconds_left()
        total = int(min(settings["total_tokens"], max(affordable, 4 * batch))) // batch * batch
        self.say(f"{speed:,.0f} tokens a second: the base model sees {total:,} tokens")
        eval_steps = max(1, total // batch // 4)
        run = run_pretraining(self.pretrain_config("base", settings | {"total_tokens": total}, eval_steps=eval_steps))
        self.facts["pretraining"] = {
            "tokens": run.tokens,
            "steps": run.steps,
            "tokens_per_second": speed,
            "first_heldout": run.first_eval,
            "last_heldout": run.last_eval,
        }
        self.say(f"held-out loss {run.first_eval} -> {run.last_eval}")
        return run.model_dir

    def pretrain_config(self, name: str, settings: dict, eval_steps: int) -> PretrainConfig:
        total = settings["total_tokens"]
        return PretrainConfig(
            **settings,
            output_dir=str(self.work / name),
            overwrite=True,
            tokenizer=str(self.data / "tokenizer"),
            data_dir=str(self.data / "shards"),
            domains={domain: {"start": share, "end": share} for domain, share in MIXTURE.items()},
            warmup_tokens=int(0.06 * total),
            decay_tokens=int(0.3 * total),
            verify_checksums=False,
            checkpoint_steps=0,
            eval_steps=eval_steps,
            eval_tokens=8 * settings["sequence_length"],
            mixed_precision="bf16" if self.device.type == "cuda" else "no",
            log_steps=50,
            progress=False,
        )

    def fine_tune(self, stage: int, model_dir: Path) -> Path:
        """One stage; stage 3 prunes stage 2's data with the model after stage 2 first."""
        size = self.size
        train_file = self.data / f"stage{stage}" / "train.jsonl"
        if stage == 3:
            train_file = self.prune(model_dir)
        output_dir = self.work / f"stage{stage}"
        shutil.rmtree(output_dir, ignore_errors=True)
        rows = [row for _, row in read_rows(train_file)]
        tokens = self.conversation_tokens(model_dir, rows)
        updates = max(2, round(size.max_epochs[stage] * tokens / (size.max_length * size.accumulation)))
        steps = int(min(updates, max(2, STAGE_SHARES[stage] * self.seconds_left() / self.step_seconds)))
        config = SftStageConfig(
            model_name_or_path=str(model_dir),
            output_dir=str(output_dir),
            train_files=[str(train_file)],
            max_length=size.max_length,
            gradient_accumulation_steps=size.accumulation,
            max_steps=steps,
            learning_rate=LEARNING_RATES[stage],
            dtype="bfloat16" if self.device.type == "cuda" else "float32",
            gradient_checkpointing=False,
            preview_samples=1 if stage == 1 else 0,
            progress=False,
            use_cpu=self.device.type == "cpu",
        )
        begun = time.monotonic()
        result = run_stage(config)
        self.step_seconds = (time.monotonic() - begun) / steps
        origins = Counter(row.get("origin") or "unknown" for row in rows)
        self.facts["stages"][stage] = {
            "data": vars(result.data),
            "origins": dict(origins),
            "updates": result.steps,
            "of_updates_wanted": updates,
            "learning_rate": LEARNING_RATES[stage],
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "polynorm": str(result.kernel),
            "seconds_per_update": round(self.step_seconds, 3),
        }
        self.say(
            f"stage {stage}, {STAGES[stage]}: {result.steps} updates (wanted {updates}) on {result.data.kept} "
            f"conversations, loss {result.first_loss:.3f} -> {result.last_loss:.3f}, origins {dict(origins)}"
        )
        return result.model_dir

    @staticmethod
    def conversation_tokens(model_dir: Path, rows: list[dict]) -> int:
        """Tokens of conversations, roughly: from every tenth of them."""
        tokenizer = attach_chat_template(AutoTokenizer.from_pretrained(model_dir))
        sample = rows[::10]
        return 10 * sum(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in sample)

    def prune(self, model_dir: Path) -> Path:
        """Stage 3's data: stage 2's without what the model after stage 2 finds redundant or of low utility."""
        folder = self.work / "pruned"
        shutil.rmtree(folder, ignore_errors=True)
        source = self.data / "stage2" / "train.jsonl"
        places, rows = zip(*read_rows(source), strict=True)
        config = PruneConfig(train_files=[str(source)], output_dir=str(folder), max_length=512)
        model, tokenizer = self.load(model_dir)
        reading = read_conversations(model, tokenizer, rows, config.max_length, batch_size=64)
        decisions = prune(places, rows, config, reading)
        counts = Counter(reason_kind(decision.reason) for decision in decisions)
        self.facts["pruning"] = dict(counts.most_common())
        self.say(f"pruning: {dict(counts.most_common())}")
        return write_pruned(rows, decisions, folder)

    def load(self, model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(self.device).eval()
        return model, attach_chat_template(AutoTokenizer.from_pretrained(model_dir))

    def measure(self, after: str, model_dir: Path) -> None:
        """Held-out loss by domain, arithmetic and GSM8K in their format, and whether replies end their turn."""
        begun = time.monotonic()
        model, tokenizer = self.load(model_dir)
        heldout = [row for _, row in read_rows(self.data / "heldout.jsonl")]
        reading = read_conversations(model, tokenizer, heldout, max_length=1024, batch_size=32)
        scores: dict[str, list[float]] = {}
        for row, loss in zip(heldout, reading.loss.tolist(), strict=True):
            if loss == loss:  # an instruction that fills the window has no loss
                scores.setdefault(f"loss_{row['domain']}", []).append(loss)
        shown = []
        for name in ("arithmetic", "gsm8k"):
            rows = [row for _, row in read_rows(self.data / f"{name}.jsonl")]
            replies = self.answer(model, tokenizer, [row["question"] for row in rows])
            finals = [FINAL.search(text) for text, _ in replies]
            wanted = [row["answer"].rpartition("####")[2].strip().replace(",", "") for row in rows]
            scores[f"{name}_accuracy"] = [
                float(final is not None and final[1].replace(",", "") == number)
                for final, number in zip(finals, wanted, strict=True)
            ]
            scores[f"{name}_format"] = [
                float(final is not None and ended) for final, (_, ended) in zip(finals, replies, strict=True)
            ]
            shown += [(row["question"], text) for row, (text, _) in zip(rows, replies, strict=True)][:SHOWN_ANSWERS]
        questions = [row["messages"][0]["content"] for row in heldout if row["domain"] == "general"]
        replies = self.answer(model, tokenizer, questions)
        scores["general_format"] = [float(ended and bool(text)) for text, ended in replies]
        shown += [(question, text) for question, (text, _) in zip(questions, replies, strict=True)][:SHOWN_ANSWERS]
        self.tabulate(after, scores)
        self.facts.setdefault("answers", {})[after] = shown
        for question, text in shown:
            self.say(f"    {question[:300]!r} -> {text[:300]!r}")
        self.facts["seconds"][f"measuring after {after}"] = round(time.monotonic() - begun, 1)

    @torch.no_grad()
    def answer(self, model, tokenizer, questions: list[str], batch_size: int = 100) -> list[tuple[str, bool]]:
        """Greedy replies to questions, and whether each ended its turn within the tokens it had."""
        replies, stops = [], stop_token_ids(tokenizer)
        tokenizer.padding_side = "left"
        for first in range(0, len(questions), batch_size):
            turns = [[{"role": "user", "content": question}] for question in questions[first : first + batch_size]]
            prompt = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
            ).to(model.device)  # (B, P)
            written = model.generate(
                **prompt,
                max_new_tokens=self.size.new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )[:, prompt["input_ids"].shape[1] :]  # (B, N)
            for row in written.tolist():
                ends = [row.index(stop) for stop in stops if stop in row]
                replies.append((tokenizer.decode(row[: min(ends, default=len(row))]).strip(), bool(ends)))
        return replies

    def tabulate(self, after: str, scores: dict[str, list[float]]) -> None:
        """One line a metric: its mean, and the paired difference to the model before with its 95% interval."""
        before = self.scores[next(reversed(self.scores))] if self.scores else None
        for metric, values in scores.items():
            row = {"after": after, "metric": metric, "rows": len(values), "value": round(sum(values) / len(values), 5)}
            if before is not None:
                paired = paired_difference(before[metric], values)
                row |= {name: round(getattr(paired, name), 5) for name in ("difference", "low", "high")}
                less_is_better = metric.startswith("loss")
                better = "better" if (paired.difference < 0) == less_is_better else "worse"
                row["verdict"] = "no difference shown" if paired.low <= 0 <= paired.high else better
            self.rows.append(row)
            self.say("  ".join(f"{name} {row[name]}" for name in FIELDS if name in row))
        self.scores[after] = scores

    def save(self) -> None:
        """Write the table, the facts and the plot."""
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.facts |= {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": done.stdout.strip() or os.environ.get("COMMIT", "unknown"),
            "size": vars(self.size),
            "failures": self.failures,
        }
        with (self.results / "sft_stages.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.results / "sft_stages.json").write_text(json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n")
        if self.rows:
            plot(self.rows, self.results / "sft_stages.png")


def plot(rows: list[dict], path: Path) -> None:
    """Draw held-out losses, accuracies and formats after each part, from the rows of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12.0, 3.8), layout="constrained")
    panels_of = {"loss": "held-out loss of answers (nats a token)", "accuracy": "right answers", "format": "in format"}
    parts = list(dict.fromkeys(row["after"] for row in rows))
    for axes, (kind, title) in zip(panels, panels_of.items(), strict=True):
        for metric in dict.fromkeys(row["metric"] for row in rows if kind in row["metric"]):
            values = [
                next(row["value"] for row in rows if (row["after"], row["metric"]) == (part, metric)) for part in parts
            ]
            axes.plot(parts, values, marker="o", label=metric.replace(kind, "").strip("_"))
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=20)
        axes.grid(axis="y", color="#e6e8eb")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(0, 1.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Make the data, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", metavar="FOLDER", help="make --data_dir from this folder of real data, and stop")
    parser.add_argument("--data_dir", type=Path, default=ROOT / ".gpu" / "sft_stages", help="what --prepare makes")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "sft_stages", help="models and stages")
    parser.add_argument("--seconds", type=float, help="of the whole run, the time of its imports not counted")
    parser.add_argument("--tiny", action="store_true", help="every part in miniature")
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.seconds:
        size = replace(size, seconds=options.seconds)
    if options.prepare:
        make_data(Path(options.prepare), options.data_dir, size)
        return
    if not (options.data_dir / "stage2" / "train.jsonl").is_file():
        raise SystemExit(f"{options.data_dir} holds no data; make it with --prepare")
    raise SystemExit(Run(options.data_dir, options.work_dir, RESULTS, size).everything())


if __name__ == "__main__":
    main()
