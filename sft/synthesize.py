"""Stage 2: synthetic reasoning that verifies itself. Only checked answers are kept, with where they come from.

`python -m sft.synthesize --config recipes/sft/synthesize.yaml`. Candidates come from an OpenAI-compatible endpoint or
a causal LM in this process. Interrupted, the same command goes on where it stopped.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from eval_harness.sandbox import Sandbox, SandboxUnavailable
from sft.chat import attach_chat_template, set_stop_tokens
from sft.config import ROW_RULES
from sft.data import DataReport, read_rows
from sft.examples import write_conversations
from sft.files import TRAIN_FILE, write_text
from sft.filters import Contamination
from sft.journal import Journal
from sft.prepare import evaluation_texts
from sft.samplers import Endpoint, EndpointError, LocalModel, RequestRefused, Sampler, in_order
from sft.tasks import Task, compose_tasks, tasks_from_rows
from sft.verify import user_turn, verify_candidates
from trainer.cli import parse_recipe

# Settings that may change between two starts of one synthesis.
FREE_SETTINGS = ("endpoint_url", "key_variable", "timeout_seconds", "workers", "progress", "dry_run")
SHOWN_TASKS = 3


@dataclass
class SynthesizeConfig:
    """Settings of a synthesis.

    Raises:
        ValueError: a value is out of range, there is nothing to solve, or not exactly one source of answers.
    """

    output_dir: str = field(default="", metadata={"help": "gets train.jsonl, report.json and journal.jsonl"})
    task_files: list[str] = field(
        default_factory=list,
        metadata={"help": ".jsonl or .parquet rows: question and answer (math), or text and test_list (code)"},
    )
    bad_rows: str = field(default="skip", metadata={"help": "rows of task_files that are no task: skip or refuse"})
    task_license: str = field(default="unknown", metadata={"help": "licence of task_files' rows that state none"})
    composed_tasks: int = field(default=0, metadata={"help": "tasks composed here, with answers by construction"})
    composed_depth: int = field(default=3, metadata={"help": "operations of a composed task (assumption)"})
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "evaluation sets; tasks that share 13 words with them are left out"}
    )
    max_tasks: int = field(default=0, metadata={"help": "first tasks only; 0: all"})
    endpoint_url: str = field(default="", metadata={"help": "OpenAI-compatible endpoint, up to /v1"})
    endpoint_model: str = field(default="", metadata={"help": "name of the model at that endpoint"})
    key_variable: str = field(default="OPENAI_API_KEY", metadata={"help": "environment variable with its key"})
    timeout_seconds: float = field(default=120.0, metadata={"help": "longest wait for one answer of the endpoint"})
    workers: int = field(default=8, metadata={"help": "requests at a time to the endpoint (assumption)"})
    model_name_or_path: str = field(default="", metadata={"help": "causal LM to sample from instead of an endpoint"})
    candidates: int = field(default=4, metadata={"help": "answers sampled a task (assumption)"})
    keep_per_task: int = field(default=1, metadata={"help": "verified answers kept a task, shortest first"})
    temperature: float = field(default=0.8, metadata={"help": "of the sampling (assumption)"})
    max_tokens: int = field(default=2048, metadata={"help": "longest answer"})
    seed: int = field(default=0, metadata={"help": "seed of composed tasks and of a local model's sampling"})
    progress: bool = field(default=True, metadata={"help": "show a progress bar"})
    dry_run: bool = field(default=False, metadata={"help": "print settings, tasks by skill and examples, and exit"})

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir is empty; set it in the recipe or on the command line")
        if not self.task_files and not self.composed_tasks:
            raise ValueError("there is nothing to solve; set task_files, or composed_tasks above 0")
        if self.bad_rows not in ROW_RULES:
            raise ValueError(f"bad_rows is {self.bad_rows!r}; use skip or refuse")
        if bool(self.endpoint_url) == bool(self.model_name_or_path):
            raise ValueError(
                f"endpoint_url is {self.endpoint_url!r} and model_name_or_path {self.model_name_or_path!r}; "
                "set exactly one of them"
            )
        if bool(self.endpoint_url) != bool(self.endpoint_model):
            raise ValueError(
                f"endpoint_url is {self.endpoint_url!r} and endpoint_model {self.endpoint_model!r}; "
                "set both or neither"
            )
        for name in ("composed_depth", "workers", "candidates", "keep_per_task", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; use seconds above 0")
        for name in ("composed_tasks", "max_tasks", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")

    def identity(self, tasks: list[Task]) -> dict:
        """What one synthesis must keep from start to start: settings and tasks, which the journal knows by number."""
        digest = blake2b(repr(tasks).encode(), digest_size=8).hexdigest()
        settings = {name: value for name, value in asdict(self).items() if name not in FREE_SETTINGS}
        return settings | {"digest_of_tasks": digest}


def load_tasks(config: SynthesizeConfig) -> tuple[list[Task], int, DataReport]:
    """The tasks to solve, how many were left out for sharing text with the evaluation sets, and rows that are none.

    Raises:
        ValueError: a file cannot be read, a row is no task and `bad_rows` is "refuse", or no task is left.
    """
    tasks, report = [], DataReport()
    for file in config.task_files:
        name = Path(file).name.split(".")[0]
        tasks += tasks_from_rows(read_rows(file), report, name, config.task_license, config.bad_rows)
    tasks += compose_tasks(config.seed, config.composed_tasks, config.composed_depth)
    if len({task.identifier for task in tasks}) < len(tasks):
        raise ValueError(f"two of task_files {config.task_files} have the same name; rename one of them")
    contamination = Contamination(evaluation_texts(config.eval_files))
    clean = [task for task in tasks if not contamination.found_in(task.question)]
    if not clean:
        raise ValueError("\n".join(["no task is left", *report.dropped_lines()]))
    return clean[: config.max_tasks or None], len(tasks) - len(clean), report


def load_sampler(config: SynthesizeConfig) -> Sampler:
    """Where the answers come from.

    Raises:
        ValueError: the endpoint's address or the model cannot be used, or the model has no way to chat.
    """
    if config.endpoint_url:
        return Endpoint(
            config.endpoint_url,
            config.endpoint_model,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            key_variable=config.key_variable,
            timeout_seconds=config.timeout_seconds,
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_motif2  # noqa: F401 (registers the architecture)

    name = config.model_name_or_path
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model and tokenizer can be loaded from model_name_or_path {name!r}: {error}") from error
    if tokenizer.chat_template is None:
        try:
            set_stop_tokens(model, attach_chat_template(tokenizer))
        except ValueError as error:
            raise ValueError(f"model {name!r} has no chat template, and Motif's does not fit: {error}") from error
    return LocalModel(model.to("cuda" if on_gpu else "cpu"), tokenizer, config.temperature, config.max_tokens)


def sample_tasks(
    tasks: Iterable[Task], sampler: Sampler, candidates: int, workers: int = 1
) -> Iterator[tuple[Task, list[str] | RequestRefused]]:
    """Each task with its candidate answers or why it was refused, in order, up to `workers` of them at a time."""

    def ask(task: Task) -> list[str] | RequestRefused:
        try:
            return sampler.sample([user_turn(task)], candidates)
        except RequestRefused as refusal:
            return refusal

    return in_order(ask, tasks, workers)


def synthesize(config: SynthesizeConfig, sampler: Sampler | None = None) -> Path:
    """Sample candidates for every task, keep those that verify, and write them.

    Args:
        config: the settings.
        sampler: answers conversations; default: what the settings name.

    Returns:
        Path: the conversations.

    Raises:
        ValueError: a file or the output folder cannot be used, or nothing verified.
        EndpointError: the endpoint fails; what was solved is kept. Tasks that it refuses are counted and passed over.
        OSError: a file cannot be written; what was solved is kept.
        SandboxUnavailable: there is a code task and programs cannot be confined here.
    """
    tasks, left_out, bad = load_tasks(config)
    journal = Journal(config.output_dir, config.identity(tasks))
    todo = [task for task in tasks if task.identifier not in journal.done]
    sandbox = Sandbox() if any(task.domain == "code" for task in todo) else None
    sampler = sampler or load_sampler(config)
    journal.open()
    workers = config.workers if config.endpoint_url else 1
    kept, refused = sum(len(line["rows"]) for line in journal.done.values()), {}
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), unit="task", disable=not config.progress) as bar:
        for task, candidates in sample_tasks(todo, sampler, config.candidates, workers):
            bar.update()
            if isinstance(candidates, RequestRefused):
                refused[task.identifier] = candidates  # not in the journal: the next start asks again
                continue
            found = verify_candidates(task, candidates, sampler.name, config.keep_per_task, sandbox)
            journal.add({"task": task.identifier, "rows": found.rows, "rejected": dict(found.rejected)})
            kept += len(found.rows)
            bar.set_postfix(kept=kept)
    facts = {"left_out_as_evaluation_text": left_out, "bad_rows": dict(bad.dropped), "bad_row_places": bad.places}
    return _write(config, tasks, journal, refused, facts)


def _write(
    config: SynthesizeConfig, tasks: list[Task], journal: Journal, refused: dict[str, RequestRefused], facts: dict
) -> Path:
    solved = [journal.done[task.identifier] for task in tasks if task.identifier not in refused]
    rejected = Counter(f"request refused, status {refusal.status}" for refusal in refused.values())
    for line in solved:
        rejected.update(line["rejected"])
    rows = [row for line in solved for row in line["rows"]]
    report = {
        "tasks": len(tasks),
        **facts,
        "rows": len(rows),
        "rejected": dict(rejected.most_common()),
        "unsolved": [*(line["task"] for line in solved if not line["rows"]), *refused],
        "refused": {task: str(refusal) for task, refusal in refused.items()},
    }
    folder = Path(config.output_dir)
    write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", folder / "report.json")
    if not rows:
        raise ValueError(
            f"no answer to {len(tasks)} tasks verified ({dict(rejected)}); look at {folder / 'report.json'}, and use "
            "a stronger model, more candidates or more max_tokens"
        )
    return write_conversations(rows, folder / TRAIN_FILE)


def describe_synthesis(config: SynthesizeConfig) -> str:
    """What `synthesize` would do: settings, tasks by domain and skill, the first of them; nothing is asked or written.

    Raises:
        ValueError: a file or the output folder cannot be used.
    """
    lines = [yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)]
    missing = [file for file in (*config.task_files, *config.eval_files) if not Path(file).is_file()]
    if missing:
        return "\n".join([*lines, f"not on this machine, tasks not read: {', '.join(missing)}"])
    tasks, left_out, bad = load_tasks(config)
    solved = Journal(config.output_dir, config.identity(tasks)).done
    lines.append(f"{len(tasks):,} tasks, {left_out:,} left out as evaluation text, {len(solved):,} solved before")
    lines += bad.dropped_lines()
    counts = Counter((task.domain, task.skill) for task in tasks)
    lines += [f"{count:8,} {domain}, {skill}" for (domain, skill), count in counts.most_common()]
    lines.append(f"{config.candidates * (len(tasks) - len(solved)):,} answers of up to {config.max_tokens:,} tokens")
    lines += [f"\n[{task.identifier}]\n{user_turn(task)['content']}" for task in tasks[:SHOWN_TASKS]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Synthesize as a recipe says and print the counts, or say what would be done (`--dry_run`).

    Raises:
        SystemExit: a setting, file, the endpoint or the sandbox cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(SynthesizeConfig, description=__doc__, argv=argv)
    try:
        if config.dry_run:
            print(describe_synthesis(config))
            return
        train_file = synthesize(config)
    except (EndpointError, OSError) as error:
        raise SystemExit(f"sft.synthesize: {error}; what was solved is kept: the same command goes on") from error
    except (ValueError, SandboxUnavailable) as error:
        raise SystemExit(f"sft.synthesize: {error}") from error
    report = json.loads(train_file.with_name("report.json").read_text(encoding="utf-8"))
    print(f"{report['rows']:,} verified answers, {len(report['unsolved']):,} of {report['tasks']:,} tasks unsolved")
    for kind, counts in (("rejected", report["rejected"]), ("rows left out", report["bad_rows"])):
        print("".join(f"{count:8,} {kind}: {reason}\n" for reason, count in counts.items()), end="")
    print(train_file)


if __name__ == "__main__":
    main()
