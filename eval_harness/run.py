"""Entry point `motif2-eval`: score a checkpoint on the report's tables, compare two runs, or check for contamination.

motif2-eval --model PATH --suite base --tasks gsm8k,math --data_dir DIR --limit 100 --output runs/eval
motif2-eval compare runs/eval_a runs/eval_b
motif2-eval contamination --corpus FILE --data_dir DIR
"""

import os
import sys
from dataclasses import asdict

import yaml

from eval_harness.code_tasks import WEAK_VARIABLE, sandbox
from eval_harness.compare import main as compare_runs
from eval_harness.config import EvalConfig
from eval_harness.contamination import main as check_corpus
from eval_harness.loading import count_rows, nearest
from eval_harness.sandbox import WEAK_LACKS, SandboxUnavailable
from trainer.cli import parse_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the command; see `--help`.

    Raises:
        SystemExit: with the mend, for everything that a user can mistake.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    if name not in COMMANDS:
        sys.exit(f"motif2-eval: unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    try:
        COMMANDS[name](argv)
    except (ValueError, OSError, ImportError, NotImplementedError, SandboxUnavailable) as error:
        sys.exit(f"motif2-eval{' ' * bool(name)}{name}: {error}")


def _run(argv: list[str]) -> None:
    (config,) = parse_recipe(EvalConfig, description=__doc__, argv=argv)
    if config.weak_sandbox:
        os.environ[WEAK_VARIABLE] = "1"
        print(f"weak sandbox: {WEAK_LACKS}", file=sys.stderr)
    _dry_run(config) if config.dry_run else _evaluate(config)


COMMANDS = {"": _run, "compare": compare_runs, "contamination": check_corpus}


def _dry_run(config: EvalConfig) -> None:
    """Print the settings, and each row's task with the number of problems."""
    print(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), end="")
    suite = config.loaded_suite()
    if suite is not None:
        print(f"# {suite.title}; {suite.decoding}")
    for name, rows in count_rows(_task_names(config), config.data_dir, config.skip_missing).items():
        print(f"{name}: {rows} rows")
    for row in suite.rows if suite is not None else ():
        if row.why_not:
            print(f"not run: {row.label} ({row.why_not})")


def _evaluate(config: EvalConfig) -> None:
    from eval_harness.evaluate import evaluate, refuse_finished
    from eval_harness.report import write_report

    refuse_finished(config.output)
    names = _task_names(config)
    if any("humaneval" in name or "mbpp" in name for name in names):
        sandbox()  # refuses now, not after hours of generation
    suite = config.loaded_suite()
    chat = suite.chat if suite is not None else config.chat
    result = evaluate(
        lambda: _load_model(config, chat),
        None,
        names,
        data_dir=config.data_dir,
        output_dir=config.output,
        limit=config.limit,
        batch_size=config.batch_size,
        apply_chat_template=chat,
        generation_options=config.generation_options(),
        shots={row.task: row.shots for row in config.rows()},
        task_generation={row.task: row.generation for row in config.rows() if row.generation},
        repeats=config.repeats,
        skip_missing=config.skip_missing,
        seed=config.seed,
        identity={
            "model": config.model,
            "backend": config.backend,
            "model_args": config.lasting_options(),
            "dtype": config.dtype,
            "chat": chat,
        },
    )
    if result is not None:
        print(write_report(config.output, asdict(config), config.rows()))


def _task_names(config: EvalConfig) -> list[str]:
    return list(dict.fromkeys(row.task for row in config.rows())) or config.task_names


def _load_model(config: EvalConfig, chat: bool):
    """lm-eval's model for the chosen backend; a missing chat template is refused before any weight is read.

    Raises:
        ValueError: no such model, chat is asked for and the tokenizer has no chat template, or a backend is not
            installed or does not tell its window.
    """
    from transformers import AutoTokenizer

    from eval_harness.backends import load_backend
    from eval_harness.evaluate import require_chat_template, wrap_model

    options = config.lm_eval_options()
    local = config.backend in ("hf", "vllm")
    if local and config.model.startswith(("/", ".", "~")) and not os.path.isdir(config.model):
        raise ValueError(f"model {config.model!r} is no folder; give a checkpoint's folder, or a name on the hub")
    try:
        if chat and local and "gguf_file" not in options:
            require_chat_template(AutoTokenizer.from_pretrained(config.tokenizer or config.model))
        if config.backend == "hf":
            lm = wrap_model(config.model, config.tokenizer, config.batch_size, dtype=config.dtype, **options)
        else:
            lm = load_backend(config.backend, config.model, options, config.batch_size)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"model {config.model!r} could not be loaded ({error}); give a folder with config.json, weights and "
            f"tokenizer, or a name on the hub, and check model_args {config.model_args!r}"
        ) from error
    if chat and "chat-completions" not in config.backend:  # there the server applies its own
        require_chat_template(getattr(lm, "tokenizer", None))
    return lm


if __name__ == "__main__":
    main()
