"""Evaluate a finished stage, write its card and upload its model: `python -m sft.publish --run_dir runs/sft/stage3 …`.

The card says what the run recorded: settings, data with sources and licences, results before and after. With
`--evaluate` the stage is evaluated first, as its recipe or `--eval_tasks` say; what was interrupted goes on.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from eval_harness.sandbox import SandboxUnavailable
from sft.config import SftStageConfig
from sft.export import CONFIG_FILE, push_stage, refuse_unfinished, write_stage_card
from trainer.cli import parse_recipe


@dataclass
class PublishConfig:
    """Settings of the publication.

    Raises:
        ValueError: no run is named.
    """

    run_dir: str = field(default="", metadata={"help": "folder of a finished stage"})
    evaluate: bool = field(default=False, metadata={"help": "run the stage's eval_tasks before and after it, now"})
    eval_tasks: list[str] = field(default_factory=list, metadata={"help": "tasks to evaluate; empty: the stage's own"})
    eval_data_dir: str = field(default="", metadata={"help": "folder with the tasks' rows; empty: the stage's own"})
    eval_limit: int = field(default=-1, metadata={"help": "rows a task; 0: all; -1: the stage's own"})
    push_to_hub: str = field(default="", metadata={"help": "repository (you/name); empty: only write the card"})
    hub_private: bool = field(default=False, metadata={"help": "make that repository private where it is new"})
    license: str = field(
        default="", metadata={"help": "licence of the weights, as the Hub names it; empty: the stage's own"}
    )
    name: str = field(default="", metadata={"help": "title of the card; empty: the run's name"})

    def __post_init__(self):
        if not self.run_dir:
            raise ValueError("run_dir is empty; give the folder of a finished stage")
        if (self.eval_tasks or self.eval_data_dir or self.eval_limit != -1) and not self.evaluate:
            raise ValueError("eval_tasks, eval_data_dir and eval_limit are for evaluate; set that too, or none")
        if self.eval_limit < -1:
            raise ValueError(f"eval_limit is {self.eval_limit}; use 1 or more, 0 for all, or -1 for the stage's own")


def main(argv: list[str] | None = None) -> None:
    """Evaluate where asked, write the card, upload, and print where both are.

    Raises:
        SystemExit: the folder holds no finished run, or the Hub refused; the message says what to do.
    """
    (config,) = parse_recipe(PublishConfig, description=__doc__, argv=argv)
    try:
        refuse_unfinished(config.run_dir)
        if config.evaluate:
            print(evaluate_run(config))
        print(write_stage_card(config.run_dir, config.license, config.name or None))
        if config.push_to_hub:
            print(push_stage(config.run_dir, config.push_to_hub, config.hub_private))
    except (ValueError, OSError, SandboxUnavailable) as error:
        raise SystemExit(f"sft.publish: {error}") from error


def evaluate_run(config: PublishConfig) -> str:
    """Evaluate a finished stage before and after; returns the table. Errors as for `evaluate_stage`."""
    from sft.evaluation import evaluate_stage

    settings = yaml.safe_load((Path(config.run_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
    known = {setting.name for setting in fields(SftStageConfig)}  # an earlier version's run may have others
    settings = {name: value for name, value in settings.items() if name in known}
    settings |= {"output_dir": config.run_dir}
    settings |= {name: getattr(config, name) for name in ("eval_tasks", "eval_data_dir") if getattr(config, name)}
    settings |= {"eval_limit": config.eval_limit} if config.eval_limit != -1 else {}
    return evaluate_stage(SftStageConfig(**settings))


if __name__ == "__main__":
    main()
