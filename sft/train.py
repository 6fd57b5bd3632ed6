"""Fine-tune one stage: `motif2-sft --config recipes/sft/stage1.yaml`, or `accelerate launch -m sft.train …`."""

import logging

from accelerate import PartialState

from sft.config import SftStageConfig
from trainer.cli import parse_recipe


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
            print(describe_stage(config))
            return
        result = run_stage(config)
        if config.eval_tasks and PartialState().is_main_process:
            from sft.evaluation import evaluate_stage

            print(evaluate_stage(config))
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"motif2-sft: {error}") from error
    print(
        f"{result.steps} updates, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
        f"PolyNorm by {result.kernel}; model in {result.model_dir}"
    )


if __name__ == "__main__":
    main()
