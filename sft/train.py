"""Fine-tune one stage: `motif2-sft --config recipes/sft/stage1.yaml`, or `accelerate launch -m sft.train …`."""

import logging

from accelerate import PartialState
from accelerate.utils import release_memory

from eval_harness.sandbox import SandboxUnavailable
from sft.config import SftStageConfig
from trainer.cli import parse_recipe
from trainer.errors import CheckpointError


def main(argv: list[str] | None = None) -> None:
    """Read a recipe and the command line, then fine-tune, or say what would be done (`--dry_run`).

    Args:
        argv: words to parse; the process's own by default.

    Raises:
        SystemExit: a setting, file, row or output folder cannot be used; the message says why and what to do.
    """
    (config,) = parse_recipe(SftStageConfig, description=__doc__, argv=argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from sft.stage import describe_stage, run_stage

    try:
        if config.dry_run:
            PartialState().print(describe_stage(config))
            return
        result = run_stage(config)
        release_memory()  # of the trained model, before others are loaded
        if PartialState().is_main_process:
            finish(config)
    except (ValueError, OSError, FloatingPointError, CheckpointError, SandboxUnavailable) as error:
        raise SystemExit(f"motif2-sft: {error}") from error
    PartialState().print(
        f"{result.steps} updates, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
        f"PolyNorm by {result.kernel}; model in {result.model_dir}"
    )


def finish(config: SftStageConfig) -> None:
    """After a stage, on one process: evaluate where tasks are named, write the card, upload where asked.

    Args:
        config: of the finished stage.

    Raises:
        ValueError: an unknown task, or the Hub refused.
    """
    from sft.export import push_stage, write_stage_card

    if config.eval_tasks:
        from sft.evaluation import evaluate_stage

        print(evaluate_stage(config))
    write_stage_card(config.output_dir, config.license)
    if config.push_to_hub:
        print(push_stage(config.output_dir, config.push_to_hub, config.hub_private))


if __name__ == "__main__":
    main()
