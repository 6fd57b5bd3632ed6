"""Stage 2 data: every sample scored, the best of each domain kept, every decision written.

`python -m sft.curate --config recipes/sft/prepare_stage2.yaml`. Synthetic rows come from `sft.synthesize` before, as
one more file. With `judge_url` a model rates the answers too.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sft.data import DataReport, load_rows
from sft.examples import write_conversations
from sft.samplers import Endpoint, EndpointError, Judge
from sft.scoring import Score, score_conversation, select_by_quality
from trainer.cli import parse_recipe


@dataclass
class CurateConfig:
    """Settings of the selection.

    Raises:
        ValueError: a value is out of range, or a judge is half named.
    """

    train_files: list[str] = field(default_factory=list, metadata={"help": "open and synthetic conversations"})
    output_dir: str = field(default="", metadata={"help": "gets train.jsonl and decisions.jsonl"})
    keep_share: float = field(default=0.5, metadata={"help": "share of each domain that stays (assumption)"})
    min_completeness: float = field(default=0.5, metadata={"help": "answers less complete than this go (assumption)"})
    judge_url: str = field(default="", metadata={"help": "OpenAI-compatible endpoint, up to /v1, of a model as judge"})
    judge_model: str = field(default="", metadata={"help": "name of the judge at that endpoint"})

    def __post_init__(self):
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


def curate(config: CurateConfig, judge: Callable[[str, str], float] | None = None) -> tuple[Path, Counter]:
    """Score, select and write.

    Args:
        config: the settings.
        judge: question and answer to a number from 0 to 1.

    Returns:
        tuple: the file of kept rows, and rows by decision.

    Raises:
        ValueError: a file cannot be read, nothing is in it, or the folder holds selected data.
    """
    train_file = Path(config.output_dir) / "train.jsonl"
    if train_file.exists():
        raise ValueError(
            f"output_dir {config.output_dir!r} holds selected data; choose another folder, or remove this one"
        )
    report = DataReport()
    loaded = list(load_rows(config.train_files, report))
    if not loaded:
        raise ValueError(f"no conversation in {config.train_files}: {report.summary()}")
    rows = [row for _, row in loaded]
    scores = [_score(row, judge, report.dropped) for row in rows]
    kept, dropped = select_by_quality(rows, scores, config.keep_share, config.min_completeness)
    if not kept:
        raise ValueError(f"none of {len(rows)} rows is complete enough; lower min_completeness")
    write_conversations([rows[index] for index in kept], train_file)
    reasons = dict(dropped)
    with train_file.with_name("decisions.jsonl").open("w", encoding="utf-8") as file:
        for index, (place, row) in enumerate(loaded):
            line = {"place": place, "domain": row.get("domain"), "kept": index not in reasons}
            line |= {"reason": reasons.get(index, "kept"), "total": scores[index].total, **asdict(scores[index])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = Counter({"kept": len(kept)}) + report.dropped
    counts.update("incomplete" if reason.startswith("incomplete") else "low score" for reason in reasons.values())
    return train_file, counts


def _score(row: dict, judge: Callable[[str, str], float] | None, counts: Counter) -> Score:
    """A row's score; where the judge's reply is no number, its own scores alone, counted."""
    try:
        return score_conversation(row, judge)
    except ValueError:
        counts["scored without the judge, whose reply was no number"] += 1
        return score_conversation(row)


def main(argv: list[str] | None = None) -> None:
    """Select as a recipe says and print the counts.

    Raises:
        SystemExit: a setting, file or the judge cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(CurateConfig, description=__doc__, argv=argv)
    judge = Judge(Endpoint(config.judge_url, config.judge_model, temperature=0.0)) if config.judge_url else None
    try:
        train_file, counts = curate(config, judge)
    except (ValueError, EndpointError) as error:
        raise SystemExit(f"sft.curate: {error}") from error
    print("\n".join(f"{count:8,} {reason}" for reason, count in counts.most_common()))
    print(f"{train_file}; every score: {train_file.with_name('decisions.jsonl')}")


if __name__ == "__main__":
    main()
