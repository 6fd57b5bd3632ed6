"""Entry point `motif2-eval`: score a checkpoint from the command line."""

import sys
from dataclasses import asdict, dataclass, field

import yaml

from trainer.cli import parse_recipe


@dataclass
class EvalConfig:
    """Settings of one run."""

    model: str = field(default="", metadata={"help": "checkpoint folder or hub name"})
    tokenizer: str | None = field(default=None, metadata={"help": "where the tokenizer lies, if not with the model"})
    tasks: str = field(default="", metadata={"help": "task names, separated by commas"})
    data_dir: str | None = field(default=None, metadata={"help": "local folder with the rows; the hub by default"})
    limit: int | None = field(default=None, metadata={"help": "rows a task at most, from the top"})
    batch_size: int = field(default=16, metadata={"help": "sequences at a time"})
    chat: bool = field(default=False, metadata={"help": "wrap prompts into the tokenizer's chat template"})
    seed: int = field(default=1234, metadata={"help": "of few-shot draws and sampling"})
    dry_run: bool = field(default=False, metadata={"help": "print the resolved settings and exit"})

    def __post_init__(self):
        if not self.model:
            raise ValueError("model is empty; give --model with a checkpoint folder or a hub name")
        if not self.task_names:
            raise ValueError("tasks is empty; give --tasks with names, separated by commas")
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def main(argv: list[str] | None = None) -> None:
    """Run one evaluation; see `--help`."""
    (config,) = parse_recipe(EvalConfig, description=__doc__, argv=argv)
    from eval_harness.evaluate import evaluate, load_tasks

    try:
        if config.dry_run:
            print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
            _, loaded = load_tasks(config.task_names, config.data_dir, config.chat)
            print("rows:", {task.task_name: len(task.eval_docs) for task in loaded if hasattr(task, "eval_docs")})
            return
        result = evaluate(
            config.model,
            config.tokenizer,
            config.task_names,
            data_dir=config.data_dir,
            limit=config.limit,
            batch_size=config.batch_size,
            apply_chat_template=config.chat,
            seed=config.seed,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"motif2-eval: {error}")
    if result is None:
        return
    for task, metrics in result.metrics.items():
        for metric, score in metrics.items():
            print(f"{task:32} {metric:24} {score:.4f}")


if __name__ == "__main__":
    main()
