"""Stage 2 data: every sample scored, the best of each domain kept, every decision written.

`python -m sft.curate --config recipes/sft/prepare_stage2.yaml`. Synthetic rows come from `sft.synthesize` before, as
one more file. With `judge_url` a model rates the answers too; interrupted, the same command goes on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from sft.config import ROW_RULES
from sft.data import DataReport, load_rows
from sft.examples import write_conversations
from sft.files import new_train_file, write_lines
from sft.journal import Journal
from sft.samplers import Endpoint, EndpointError, Judge, RequestRefused, in_order
from sft.scoring import question_and_answer, score_conversation, select_by_quality
from trainer.cli import parse_recipe

NO_NUMBER = "scored without the judge, whose reply was no number"


@dataclass
class CurateConfig:
    """Settings of the selection.

    Raises:
        ValueError: a value is out of range, or a judge is half named.
    """

    train_files: list[str] = field(default_factory=list, metadata={"help": "open and synthetic conversations"})
    output_dir: str = field(default="", metadata={"help": "gets train.jsonl and decisions.jsonl"})
    bad_rows: str = field(default="skip", metadata={"help": "malformed rows: skip (and count) or refuse"})
    keep_share: float = field(default=0.5, metadata={"help": "share of each domain that stays (assumption)"})
    min_completeness: float = field(default=0.5, metadata={"help": "answers less complete than this go (assumption)"})
    judge_url: str = field(default="", metadata={"help": "OpenAI-compatible endpoint, up to /v1, of a model as judge"})
    judge_model: str = field(default="", metadata={"help": "name of the judge at that endpoint"})
    judge_workers: int = field(default=8, metadata={"help": "requests at a time to the judge (assumption)"})
    judge_timeout_seconds: float = field(default=120.0, metadata={"help": "longest wait for one answer of the judge"})
    progress: bool = field(default=True, metadata={"help": "show a progress bar while the judge rates"})

    def __post_init__(self):
        if self.bad_rows not in ROW_RULES:
            raise ValueError(f"bad_rows is {self.bad_rows!r}; use skip or refuse")
        for name in ("train_files", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set it in the recipe or on the command line")
        if not 0 < self.keep_share <= 1 or not 0 <= self.min_completeness <= 1:
            raise ValueError(
                f"keep_share is {self.keep_share} and min_completeness {self.min_completeness}; use shares from 0 to 1"
            )
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError(
                f"judge_url is {self.judge_url!r} and judge_model {self.judge_model!r}; set both or neither"
            )
        if self.judge_workers < 1 or not self.judge_timeout_seconds > 0:
            raise ValueError(
                f"judge_workers is {self.judge_workers} and judge_timeout_seconds {self.judge_timeout_seconds}; use 1 "
                "worker or more, and seconds above 0"
            )


def curate(
    config: CurateConfig, judge: Callable[[str, str], float] | None = None, report: DataReport | None = None
) -> tuple[Path, Counter]:
    """Score, select and write.

    Args:
        config: the settings.
        judge: question and answer to a number from 0 to 1.
        report: gets the rows dropped, with their places, where given.

    Returns:
        tuple: the file of kept rows, and rows by decision.

    Raises:
        ValueError: a file cannot be read, nothing is in it, or the folder holds selected data.
        EndpointError: the judge fails; its ratings so far are kept.
        OSError: a file cannot be written.
    """
    train_file = new_train_file(config.output_dir, "selected data")
    report, malformed = DataReport() if report is None else report, []
    loaded = list(load_rows(config.train_files, report, config.bad_rows, malformed=malformed))
    if not loaded:
        raise ValueError(f"no conversation in {config.train_files}: {report.summary()}")
    rows = [row for _, row in loaded]
    scores, notes = [score_conversation(row) for row in rows], Counter()
    if judge is not None:
        ratings, notes = rate_rows(rows, judge, config)
        scores = [replace(score, judge=rating) for score, rating in zip(scores, ratings, strict=True)]
    kept, dropped = select_by_quality(rows, scores, config.keep_share, config.min_completeness)
    if not kept:
        raise ValueError(f"none of {len(rows)} rows is complete enough; lower min_completeness")
    reasons = dict(dropped)
    lines = []
    for index, (place, row) in enumerate(loaded):
        line = {"place": place, "domain": row.get("domain"), "kept": index not in reasons}
        line |= {"reason": reasons.get(index, "kept"), "total": scores[index].total, **asdict(scores[index])}
        lines.append(line)
        if index in reasons:
            report.drop("incomplete" if reasons[index].startswith("incomplete") else "low score", place)
    lines += [{"place": place, "kept": False, "reason": f"malformed: {problem}"} for place, problem in malformed]
    write_lines(lines, train_file.with_name("decisions.jsonl"))
    write_conversations([rows[index] for index in kept], train_file)
    return train_file, Counter({"kept": len(kept)}) + report.dropped + notes


def rate_rows(
    rows: Sequence[dict], judge: Callable[[str, str], float], config: CurateConfig
) -> tuple[list[float | None], Counter]:
    """A judge's number for each row, several asked for at a time and written down one by one.

    Args:
        rows: well-formed conversations; the same question and answer are judged once.
        judge: question and answer to a number from 0 to 1.
        config: the settings.

    Returns:
        tuple: numbers, None where the judge gave none, and how many rows have none for which reason.

    Raises:
        ValueError: the folder holds ratings of another judge, or the judge gave no number at all.
        EndpointError: the judge fails; its ratings so far are kept.
    """
    journal = Journal(config.output_dir, {"judge_model": config.judge_model}, key="answer", work="selection")
    texts = [question_and_answer(row) for row in rows]
    keys = [blake2b(repr(text).encode("utf-8"), digest_size=16).hexdigest() for text in texts]
    ratings: dict[str, float | str] = {key: line["rating"] for key, line in journal.done.items()}
    todo = [(key, *text) for key, text in dict(zip(keys, texts, strict=True)).items() if key not in ratings]
    journal.open()
    asked = in_order(lambda item: _rating(judge, *item[1:]), todo, config.judge_workers)
    for (key, *_), rating in tqdm(asked, total=len(todo), unit="answer", disable=not config.progress):
        ratings[key] = rating
        if isinstance(rating, float) or rating == NO_NUMBER:  # what was refused is asked for at the next start
            journal.add({"answer": key, "rating": rating})
    found = [ratings[key] for key in keys]
    notes = Counter(rating for rating in found if isinstance(rating, str))
    if notes.total() == len(found):
        raise ValueError(f"the judge rated none of {len(found)} rows: {dict(notes)}; use another judge, or none")
    return [None if isinstance(rating, str) else rating for rating in found], notes


def _rating(judge: Callable[[str, str], float], question: str, answer: str) -> float | str:
    """The judge's number, or why there is none."""
    try:
        rating = float(judge(question, answer))
    except RequestRefused as refusal:
        return f"scored without the judge, which refused the request with status {refusal.status}"
    except ValueError:
        return NO_NUMBER
    return rating if 0 <= rating <= 1 else NO_NUMBER


def main(argv: list[str] | None = None) -> None:
    """Select as a recipe says and print the counts.

    Raises:
        SystemExit: a setting, file or the judge cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(CurateConfig, description=__doc__, argv=argv)
    report, judge = DataReport(), None
    try:
        if config.judge_url:
            endpoint = Endpoint(
                config.judge_url,
                config.judge_model,
                temperature=0.0,
                timeout_seconds=config.judge_timeout_seconds,
            )
            judge = Judge(endpoint)
        train_file, counts = curate(config, judge, report)
    except EndpointError as error:
        raise SystemExit(f"sft.curate: {error}; the ratings so far are kept: the same command goes on") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"sft.curate: {error}") from error
    others = [(reason, count) for reason, count in counts.most_common() if reason not in report.dropped]
    print("\n".join([*(f"  {count:,} {reason}" for reason, count in others), *report.dropped_lines()]))
    print(f"{train_file}; every score: {train_file.with_name('decisions.jsonl')}")


if __name__ == "__main__":
    main()
