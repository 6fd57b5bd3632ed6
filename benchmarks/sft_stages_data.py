"""What benchmarks/sft_stages.py trains on: its sizes, and how its data folder is made from real text on a CPU."""

import hashlib
import itertools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sft.chat import attach_chat_template  # noqa: E402
from sft.curate import CurateConfig, curate  # noqa: E402
from sft.data import read_rows  # noqa: E402
from sft.examples import arithmetic_conversations, write_conversations  # noqa: E402
from sft.prepare import PrepareConfig, prepare, write_prepared  # noqa: E402
from trainer.data.arithmetic import generate_problems  # noqa: E402
from trainer.data.corpus import Source, read_documents  # noqa: E402
from trainer.data.shards import build_shards  # noqa: E402
from trainer.data.tokenizer import train_tokenizer  # noqa: E402

DOMAINS = ("general", "math", "code")
# Of the documents of each pre-training domain, the share that a hash of their text takes (assumption): 15M tokens.
TAKEN = {"general": 0.36, "stem": 0.31, "math": 0.23, "code": 0.11}
EVAL_SETS = (
    "gsm8k/main/test",
    "hendrycks_math/*/test",
    "openai_humaneval/**/*",
    "mbpp/full/test",
    "mbpp/sanitized/test",
)


@dataclass(frozen=True)
class Size:
    """How much of everything; all of it an assumption.

    Args:
        taken: factor of TAKEN.
        first_documents: documents of a domain that are looked at; 0: all.
        heldout_fraction: share of the pre-training documents that is held out.
        vocab_size, tokenizer_bytes: of the tokenizer.
        model: shape and learning rates of the base model.
        pretrain: length of rows and steps, and tokens at most.
        conversations: real ones by domain at most.
        num_problems: worked arithmetic problems of stage 2.
        heldout, heldout_problems: conversations a domain, and problems of arithmetic and of GSM8K, that are measured.
        max_length, accumulation: tokens of a packed sequence, and sequences of an update.
        max_epochs: passes over the data of each stage at most.
        new_tokens: longest answer.
        seconds: of the whole run.
        pretrain_share: of those, for pre-training.
        step_seconds: guess of an update's time in stage 1; later stages use what stage 1 took.
    """

    taken: float
    first_documents: int
    heldout_fraction: float
    vocab_size: int
    tokenizer_bytes: int
    model: dict
    pretrain: dict
    conversations: dict
    num_problems: int
    heldout: int
    heldout_problems: int
    max_length: int
    accumulation: int
    max_epochs: dict
    new_tokens: int
    seconds: float
    pretrain_share: float
    step_seconds: float


FULL = Size(
    taken=1.0,
    first_documents=0,
    heldout_fraction=0.02,
    vocab_size=16384,
    tokenizer_bytes=12_000_000,
    model={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 4,
        "num_noise_heads": 2,
        "head_dim": 64,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "learning_rate": 0.004,
        "adamw_learning_rate": 0.002,
    },
    pretrain={"total_tokens": 30_000_000, "sequence_length": 1024, "batch_tokens": 32768, "micro_batch_tokens": 16384},
    conversations={"general": 6000, "math": 5000, "code": 2500},
    num_problems=6000,
    heldout=120,
    heldout_problems=200,
    max_length=4096,
    accumulation=8,
    max_epochs={1: 3.0, 2: 3.0, 3: 1.0},
    new_tokens=160,
    seconds=500.0,
    pretrain_share=0.4,
    step_seconds=1.0,
)
TINY = replace(
    FULL,
    taken=1.0,
    first_documents=100,
    heldout_fraction=0.4,
    vocab_size=1024,
    tokenizer_bytes=200_000,
    model=FULL.model
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 2,
        "num_noise_heads": 1,
        "head_dim": 16,
    },
    pretrain={"total_tokens": 8192, "sequence_length": 128, "batch_tokens": 1024, "micro_batch_tokens": None},
    conversations={"general": 40, "math": 30, "code": 30},
    num_problems=60,
    heldout=4,
    heldout_problems=4,
    max_length=1024,
    accumulation=1,
    max_epochs={1: 0.2, 2: 0.2, 3: 0.2},
    new_tokens=8,
    seconds=600.0,
    step_seconds=1.0,
)


def make_data(source: Path, folder: Path, size: Size) -> None:
    """Tokenizer, shards, the conversations of stages 1 and 2, and the held-out rows.

    Args:
        source: folder with `pretrain`, `sft` and `eval`.
        folder: gets everything the run reads.
        size: how much.

    Raises:
        FileNotFoundError: a folder or file is missing.
    """
    for name in ("pretrain", "sft", "eval"):
        if not (source / name).is_dir():
            raise FileNotFoundError(f"{source / name} is missing; --prepare takes the folder that holds it")
    texts = (text for domain in TAKEN for text in first_bytes(documents(source, domain, size), size))
    tokenizer = attach_chat_template(train_tokenizer(texts, size.vocab_size, show_progress=False))
    tokenizer.save_pretrained(folder / "tokenizer")
    domains = {name: documents(source, name, size) for name in TAKEN}
    build_shards(folder / "shards", domains, tokenizer, heldout_fraction=size.heldout_fraction, progress=False)
    heldout = []
    for domain in DOMAINS:
        rows = [row for _, row in read_rows(source / "sft" / f"{domain}.parquet")]
        rows.sort(key=lambda row: digest(row["messages"][0]["content"]))
        heldout += rows[: size.heldout]
        write_conversations(rows[size.heldout :][: size.conversations[domain]], folder / "raw" / f"{domain}.jsonl")
    write_conversations(heldout, folder / "heldout.jsonl")
    problems = generate_problems(1, size.heldout_problems, "heldout")
    arithmetic = [{"question": problem.question, "answer": problem.solution} for problem in problems]
    write_conversations(arithmetic, folder / "arithmetic.jsonl")
    gsm8k = [row for _, row in read_rows(source / "eval" / "gsm8k" / "main" / "test.parquet")]
    write_conversations(gsm8k[: size.heldout_problems], folder / "gsm8k.jsonl")
    eval_files = [path for pattern in EVAL_SETS for path in sorted((source / "eval").glob(f"{pattern}.parquet"))]
    config = PrepareConfig(
        train_files=[str(folder / "raw" / f"{domain}.jsonl") for domain in DOMAINS],
        eval_files=[str(path) for path in (*eval_files, folder / "heldout.jsonl")],
        output_dir=str(folder / "stage1"),
        tokenizer=str(folder / "tokenizer"),
        max_tokens=1024,
    )
    prepared = prepare(config, tokenizer)
    first = write_prepared(prepared, config.output_dir)
    print(prepared.report.summary())
    worked = arithmetic_conversations(generate_problems(2, size.num_problems, "train"))
    for row in worked:
        row["skill"] = row.pop("kind")
    write_conversations(worked, folder / "raw" / "arithmetic.jsonl")
    chosen = CurateConfig([str(first), str(folder / "raw" / "arithmetic.jsonl")], str(folder / "stage2"))
    _, counts = curate(chosen)
    print(dict(counts))
    shutil.rmtree(folder / "raw")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total / 2**20:.1f} MiB")


def digest(text: str) -> bytes:
    """A hash that decides what is taken and held out."""
    return hashlib.sha256(b"sft_stages:" + text.encode("utf-8", "surrogatepass")).digest()


def documents(source: Path, domain: str, size: Size) -> Iterator[dict]:
    """The documents of a pre-training domain whose hash falls into its share."""
    found = read_documents(Source(str(source / "pretrain" / f"{domain}.jsonl.zst")))
    for document in itertools.islice(found, size.first_documents or None):
        if int.from_bytes(digest(document["text"])[:8], "big") < TAKEN[domain] * size.taken * 2**64:
            yield document


def first_bytes(found: Iterator[dict], size: Size) -> Iterator[str]:
    """Texts for the tokenizer, of one domain."""
    seen = 0
    for document in found:
        if seen >= size.tokenizer_bytes // len(TAKEN):
            return
        seen += len(document["text"].encode("utf-8", "surrogatepass"))
        yield document["text"]
