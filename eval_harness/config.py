"""Settings of `motif2-eval`."""

from dataclasses import dataclass, field
from pathlib import Path

from lm_eval.utils import simple_parse_args_string

from eval_harness.suites import Row, Suite, load_suite

BACKENDS = (
    "hf",
    "vllm",
    "local-completions",
    "local-chat-completions",
    "openai-completions",
    "openai-chat-completions",
)
WINDOW_OPTIONS = ("max_length", "max_model_len", "truncation", "truncate")


@dataclass
class EvalConfig:
    """One run."""

    model: str = field(default="", metadata={"help": "checkpoint folder, hub name, or the name an API knows"})
    suite: str | None = field(default=None, metadata={"help": "base or instruct: the report's tables"})
    tasks: str = field(default="", metadata={"help": "rows of the suite, or (without one) task names; by commas"})
    data_dir: str | None = field(default=None, metadata={"help": "local folder with the rows; the hub by default"})
    skip_missing: bool = field(default=False, metadata={"help": "leave out parts of a group whose rows are missing"})
    output: str = field(default="", metadata={"help": "folder for responses, samples and the report"})
    limit: int | None = field(default=None, metadata={"help": "rows a task at most, from the top"})
    max_gen_toks: int | None = field(
        default=None, metadata={"help": "generate at most so many tokens (the protocol's own by default)"}
    )
    batch_size: int = field(default=16, metadata={"help": "sequences at a time"})
    backend: str = field(default="hf", metadata={"help": f"how the model runs: {', '.join(BACKENDS)}"})
    model_args: str = field(default="", metadata={"help": "more of lm-eval's model arguments, key=value by commas"})
    tokenizer: str | None = field(default=None, metadata={"help": "where the tokenizer lies, if not with the model"})
    dtype: str = field(default="auto", metadata={"help": "weights' type; auto takes the checkpoint's"})
    chat: bool = field(default=False, metadata={"help": "without a suite: apply the tokenizer's chat template"})
    repeats: int = field(default=1, metadata={"help": "programs a problem of HumanEval and MBPP; 10 gives pass@10"})
    temperature: float | None = field(
        default=None, metadata={"help": "sample at this temperature, 0 is greedy (the protocol's own by default)"}
    )
    weak_sandbox: bool = field(default=False, metadata={"help": "run generated programs without bubblewrap (unsafe)"})
    seed: int = field(default=1234, metadata={"help": "of few-shot draws and sampling"})
    dry_run: bool = field(default=False, metadata={"help": "print the resolved settings and the rows, and exit"})

    def __post_init__(self):
        if not self.model:
            raise ValueError(
                "model is empty; give --model with a checkpoint folder, a hub name, or an API's model name"
            )
        if self.suite is None and not self.task_names:
            raise ValueError(
                "neither suite nor tasks is given; use --suite base, --suite instruct, or --tasks NAME,NAME"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; use one of {', '.join(BACKENDS)}")
        for name in ("batch_size", "limit", "max_gen_toks", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 for greedy decoding, or more")
        greedy = self.temperature == 0 or (self.temperature is None and self.suite != "instruct")
        if self.repeats > 1 and greedy:
            raise ValueError(
                f"repeats is {self.repeats} with greedy decoding, which writes the same program each time; "
                "add --temperature 0.8"
            )
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"data_dir {self.data_dir!r} is no folder; give the folder that holds gsm8k, mmlu, …")
        if not self.output and not self.dry_run:
            raise ValueError("output is empty; give --output with a folder for responses, samples and the report")
        self.lm_eval_options()
        if self.suite is not None:
            self.rows()

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def loaded_suite(self) -> Suite | None:
        """The suite, where one is named."""
        return load_suite(self.suite) if self.suite is not None else None

    def rows(self) -> list[Row]:
        """Chosen rows of the suite; none without a suite."""
        suite = self.loaded_suite()
        return suite.choose(self.task_names) if suite is not None else []

    def generation_options(self) -> dict | None:
        """What overrides the tasks' own generation settings; None where nothing does."""
        suite = self.loaded_suite()
        options = dict(suite.generation) if suite is not None else {}
        if self.max_gen_toks is not None:
            options["max_gen_toks"] = self.max_gen_toks
        if self.temperature is not None:
            options |= {"do_sample": self.temperature > 0, "temperature": self.temperature}
        return options or None

    def lm_eval_options(self) -> dict:
        """`model_args` as a dictionary; numbers, `True`, `False` and `None` are read as such.

        Raises:
            ValueError: a word without `=`.
        """
        if bad := [word for word in self.model_args.split(",") if word and "=" not in word]:
            raise ValueError(f"model_args holds {bad[0]!r}; write key=value,key=value")
        return simple_parse_args_string(self.model_args)

    def lasting_options(self) -> dict:
        """What of `model_args` must stay when an interrupted run goes on: it may have stopped for want of a window."""
        return {name: value for name, value in self.lm_eval_options().items() if name not in WINDOW_OPTIONS}
