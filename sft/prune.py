"""Stage 3 data: the synthetic part of stage 2's without what is redundant, of low utility or incoherent.

`python -m sft.prune --config recipes/sft/prepare_stage3.yaml`. Every decision is written with its reason, and a page
shows what went and what stayed. Rows that people wrote are kept.

Shapes: N conversations, B of them at a time, T tokens of a conversation, H hidden size, V vocabulary.
Source: arXiv 2511.07464, post-training stage 3, names the aims; measures and thresholds are an assumption. Utility is
the ratio of the answer's loss with and without its instruction (arXiv 2308.12032).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.chat import REPLY_HEADER, encode_conversations
from sft.config import ROW_RULES
from sft.data import DataReport, load_rows, row_tools
from sft.equations import false_equation
from sft.examples import write_conversations
from sft.files import new_train_file, write_lines, write_text
from sft.filters import NearDuplicates, conversation_text, nearest_by_embedding
from sft.prune_page import reason_kind, render_page
from sft.scoring import score_conversation
from trainer.cli import parse_recipe

HUMAN = "human"
HELD = "pruned data"


@dataclass
class PruneConfig:
    """Settings of the pruning.

    Raises:
        ValueError: a value is out of range.
    """

    train_files: list[str] = field(default_factory=list, metadata={"help": "stage 2's conversations"})
    output_dir: str = field(default="", metadata={"help": "gets train.jsonl, decisions.jsonl and page.html"})
    bad_rows: str = field(default="skip", metadata={"help": "malformed rows: skip (and count) or refuse"})
    model_name_or_path: str = field(
        default="", metadata={"help": "model after stage 2; empty: no losses, no embeddings"}
    )
    duplicate_threshold: float = field(default=0.8, metadata={"help": "MinHash similarity of a duplicate"})
    embedding_threshold: float = field(default=0.995, metadata={"help": "cosine similarity of a duplicate in meaning"})
    min_consistency: float = field(default=0.75, metadata={"help": "structural consistency below this is incoherent"})
    min_completeness: float = field(default=0.5, metadata={"help": "completeness below this is malformed"})
    keep_share: float = field(default=0.7, metadata={"help": "share of each domain and skill kept, by utility"})
    min_per_skill: int = field(default=20, metadata={"help": "utility takes no skill below so many rows"})
    max_length: int = field(default=2048, metadata={"help": "tokens of a conversation that the model reads"})
    batch_size: int = field(default=16, metadata={"help": "conversations that it reads at a time"})

    def __post_init__(self):
        if self.bad_rows not in ROW_RULES:
            raise ValueError(f"bad_rows is {self.bad_rows!r}; use skip or refuse")
        for name in ("train_files", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set it in the recipe or on the command line")
        for name in ("duplicate_threshold", "embedding_threshold", "keep_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use a number above 0 and up to 1")
        for name in ("min_per_skill", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")


@dataclass
class Decision:
    """What became of one row, and why.

    Args:
        place: file and row.
        kept: whether it stays.
        reason: of the decision.
        domain, skill: its group.
        loss: of the answer given its instruction; None without a model.
        utility: 1 - (loss with the instruction) / (loss without); what the instruction explains.
    """

    place: str
    kept: bool
    reason: str
    domain: str
    skill: str
    loss: float | None = None
    utility: float | None = None


@dataclass(frozen=True)
class Reading:
    """How a model reads conversations: losses (N,) with and without the instruction, and embeddings (N, H).

    Losses are NaN, and embeddings 0, where the instruction alone was too long to be read.
    """

    loss: numpy.ndarray
    loss_alone: numpy.ndarray
    embeddings: numpy.ndarray

    @property
    def utility(self) -> numpy.ndarray:
        """Share of the answer's loss that its instruction takes away (N,)."""
        return 1 - self.loss / numpy.maximum(self.loss_alone, 1e-9)


def read_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    max_length: int,
    batch_size: int = 16,
) -> Reading:
    """Losses and embeddings of conversations.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: with the chat template.
        rows: conversations; the last turn is the answer.
        max_length: answers are cut there; where the instruction alone is longer, losses are NaN.
        batch_size: conversations at a time.

    Returns:
        Reading: mean loss an answer token, with and without what comes before; mean final hidden state.
    """
    header = tokenizer(REPLY_HEADER, add_special_tokens=False)["input_ids"]
    whole, answers = [], []  # token ids and where the answer starts
    for row in rows:
        (ids,), (marks,) = encode_conversations(tokenizer, [row["messages"]], [row_tools(row)])
        start = len(marks) - marks[::-1].index(0)
        whole.append((ids[:max_length], start))
        answers.append((header + ids[start:max_length], len(header)))
    loss, embeddings = _answer_losses(model, whole, batch_size)
    loss_alone, _ = _answer_losses(model, answers, batch_size)
    return Reading(loss, loss_alone, embeddings)


@torch.no_grad()
def _answer_losses(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], batch_size: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mean loss from each start on, (N,), and mean hidden state, (N, H); NaN and 0 where nothing is left."""
    losses = numpy.full(len(sequences), numpy.nan)
    embeddings = numpy.zeros((len(sequences), model.config.hidden_size), numpy.float32)
    backbone, head = model.base_model, model.get_output_embeddings()
    readable = [index for index, (ids, start) in enumerate(sequences) if start < len(ids)]
    readable.sort(key=lambda index: len(sequences[index][0]))  # little padding
    for first in range(0, len(readable), batch_size):
        batch = readable[first : first + batch_size]
        rows = [torch.tensor(sequences[index][0], device=model.device) for index in batch]
        tokens = pad_sequence(rows, batch_first=True)  # (B, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (B, T)
        hidden = backbone(tokens, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, H)
        for row, index in enumerate(batch):
            ids, start = sequences[index]
            logits = head(hidden[row, start - 1 : len(ids) - 1]).float()  # (answer, V)
            losses[index] = cross_entropy(logits, tokens[row, start : len(ids)]).item()
            embeddings[index] = hidden[row, : len(ids)].float().mean(0).cpu().numpy()
    return losses, embeddings


def prune(
    places: Sequence[str], rows: Sequence[dict], config: PruneConfig, reading: Reading | None = None
) -> list[Decision]:
    """Decide on every row, in this order: malformed, incoherent, unread, near-duplicate, same meaning, low utility.

    A row repeats one that people wrote, wherever it stands, or an earlier one that passed the rules before.

    Args:
        places: names of the rows.
        rows: conversations with `domain`, `skill` and `origin`; those of origin "human" stay.
        config: thresholds.
        reading: what a model makes of the rows; the last two rules need it.

    Returns:
        list[Decision]: one a row.
    """
    decisions = []
    duplicates = NearDuplicates(min(config.duplicate_threshold, 0.999))
    for place, row in zip(places, rows, strict=True):
        if row.get("origin") == HUMAN:
            duplicates.add(place, conversation_text(row))
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        decision = Decision(place, True, "kept", row.get("domain") or "unknown", row.get("skill") or "none")
        unread = reading is not None and numpy.isnan(reading.loss[index])
        if reading is not None and not unread:
            decision.loss, decision.utility = float(reading.loss[index]), float(reading.utility[index])
        if row.get("origin") == HUMAN:
            decision.reason = "written by a person"
        elif problem := _answer_problem(row, config):
            decision.kept, decision.reason = False, problem
        elif unread:
            decision.kept, decision.reason = False, f"instruction longer than {config.max_length} tokens"
        elif repeated := duplicates.add(place, conversation_text(row)):
            decision.kept, decision.reason = False, f"near-duplicate of {repeated}"
        decisions.append(decision)
    if reading is not None:
        _drop_same_meaning(decisions, reading, config)
        _drop_low_utility(decisions, config)
    return decisions


def _answer_problem(row: dict, config: PruneConfig) -> str | None:
    """Why an answer cannot be trusted, by its form and by the equations in it."""
    score = score_conversation(row)
    if score.completeness < config.min_completeness:
        return f"malformed: completeness {score.completeness:.2f}"
    if score.consistency < config.min_consistency:
        return f"incoherent: consistency {score.consistency:.2f}"
    equation = false_equation(row["messages"][-1]["content"] or "")
    return f"incoherent: {equation} is false" if equation else None


def _drop_same_meaning(decisions: list[Decision], reading: Reading, config: PruneConfig) -> None:
    """Within a domain and skill, people's rows first: rows of other skills are never each other's duplicates."""
    read = ~numpy.isnan(reading.loss)  # (N,)
    if not read.any():
        return
    mean = reading.embeddings[read].mean(0)  # (H,)
    for group in _groups(decisions).values():
        members = sorted(
            (index for index in group if read[index]), key=lambda index: decisions[index].reason == "kept"
        )
        centred = reading.embeddings[members] - mean  # (members, H)
        for repeat, original in nearest_by_embedding(centred, config.embedding_threshold).items():
            decision = decisions[members[repeat]]
            if decision.reason == "kept":
                decision.kept = False
                decision.reason = f"means the same as {decisions[members[original]].place}"


def _drop_low_utility(decisions: list[Decision], config: PruneConfig) -> None:
    """The rows whose instruction explains least of the answer go, but every skill keeps `min_per_skill`."""
    for members in _groups(decisions).values():
        limit = max(config.min_per_skill, round(config.keep_share * len(members)))
        synthetic = [index for index in members if decisions[index].reason == "kept"]
        synthetic.sort(key=lambda index: -decisions[index].utility)
        for index in synthetic[max(0, limit - (len(members) - len(synthetic))) :]:
            decisions[index].kept = False
            decisions[index].reason = "low utility"


def _groups(decisions: list[Decision]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, decision in enumerate(decisions):
        if decision.kept:
            groups[decision.domain, decision.skill].append(index)
    return groups


def write_pruned(
    rows: Sequence[dict],
    decisions: Sequence[Decision],
    output_dir: str | Path,
    malformed: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write decisions.jsonl, page.html, and last train.jsonl; returns the latter.

    Args:
        rows: conversations.
        decisions: one a row.
        output_dir: folder of the three files.
        malformed: place and problem of rows that could not be read as conversations.

    Raises:
        ValueError: the folder holds pruned data, or nothing was kept.
        OSError: a file cannot be written; there is no train.jsonl then.
    """
    folder, train_file = Path(output_dir), new_train_file(output_dir, HELD)
    kept = [row for row, decision in zip(rows, decisions, strict=True) if decision.kept]
    if not kept:
        raise ValueError(f"pruning kept none of {len(rows)} rows; lower its thresholds or raise keep_share")
    lines = [asdict(decision) for decision in decisions]
    lines += [{"place": place, "kept": False, "reason": f"malformed: {problem}"} for place, problem in malformed]
    write_lines(lines, folder / "decisions.jsonl")
    write_text(render_page(rows, decisions, malformed), folder / "page.html")
    return write_conversations(kept, train_file)


def main(argv: list[str] | None = None) -> None:
    """Prune as a recipe says and print what went.

    Raises:
        SystemExit: a setting or file cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(PruneConfig, description=__doc__.replace("%", "%%"), argv=argv)
    report, malformed = DataReport(), []
    try:
        new_train_file(config.output_dir, HELD)
        loaded = list(load_rows(config.train_files, report, config.bad_rows, malformed=malformed))
        if not loaded:
            raise ValueError(f"no conversation in {config.train_files}: {report.summary()}")
        places, rows = zip(*loaded, strict=True)
        reading = _read_with_model(config, rows) if config.model_name_or_path else None
        decisions = prune(places, rows, config, reading)
        train_file = write_pruned(rows, decisions, config.output_dir, malformed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"sft.prune: {error}") from error
    counts = Counter(reason_kind(decision.reason) for decision in decisions)
    print("\n".join([*(f"{count:8,} {reason}" for reason, count in counts.most_common()), *report.dropped_lines()]))
    print(f"{train_file}; look at {train_file.with_name('page.html')}")


def _read_with_model(config: PruneConfig, rows: Sequence[dict]) -> Reading:
    from transformers import AutoModelForCausalLM

    import modeling_motif2  # noqa: F401 (registers the architecture)
    from sft.stage import load_tokenizer

    tokenizer = load_tokenizer(config.model_name_or_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path).to(device).eval()
    return read_conversations(model, tokenizer, rows, config.max_length, config.batch_size)


if __name__ == "__main__":
    main()
