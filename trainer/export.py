"""A model for `from_pretrained` from a run's checkpoints, without the run.

`python -m trainer.export --checkpoint RUN/checkpoints/step_00000100 --output DIR`

Reads the shards of any number of ranks on one CPU; several checkpoints give their mean.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.averaging import add_checkpoints, in_portions
from trainer.checkpoint_files import MODEL_CONFIG, verify_checkpoint
from trainer.errors import RunStoppedError
from trainer.model import load_tokenizer
from trainer.run_folder import CONFIG, save_whole

DTYPES = ("float32", "bfloat16", "float16")


def export_checkpoints(
    checkpoints: Sequence[Path], output_dir: Path, tokenizer: str | None = None, dtype: str = "float32"
) -> Path:
    """Write the mean of checkpoints as a model folder, complete or not at all.

    The model is held once in `dtype`; the checkpoints are read into it a few tensors at a time.

    Args:
        checkpoints: folders `…/checkpoints/step_00000100` of one model; usually one.
        output_dir: must not exist.
        tokenizer: folder or Hub name; the run's own when None.
        dtype: of the weights written.

    Returns:
        Path: `output_dir`.

    Raises:
        ValueError: `output_dir` exists, a checkpoint is damaged or of another model, or no tokenizer is found.
    """
    output_dir, first = Path(output_dir), Path(checkpoints[0])
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: choose another output, or delete it")
    for path in checkpoints:
        verify_checkpoint(Path(path))
    tokenizer = load_tokenizer(tokenizer or _tokenizer_of_run(first))
    config = AutoConfig.from_pretrained(first / MODEL_CONFIG)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for path in checkpoints:
        _check_weights(Path(path), model)
    state = _mean_weights(checkpoints, model, getattr(torch, dtype))
    return save_whole(model, state, tokenizer, output_dir)


def _mean_weights(checkpoints: Sequence[Path], model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by name; tied ones are one tensor."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    mean = {}
    for names in in_portions({name: 4 * shape.numel() for name, shape in shapes.items()}):
        sums = {name: torch.zeros(shapes[name]) for name in names}
        add_checkpoints(sums, checkpoints)
        mean |= {name: (total / len(checkpoints)).to(dtype) for name, total in sums.items()}
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {name: mean[names[id(weight)]] for name, weight in model.named_parameters(remove_duplicate=False)}


def _check_weights(path: Path, model: nn.Module) -> None:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, weight in model.named_parameters():
        found = stored.get(f"model.{name}")
        if found is None or tuple(found.size) != tuple(weight.shape):
            shape = None if found is None else tuple(found.size)
            raise ValueError(f"{path} holds {name} as {shape}, not {tuple(weight.shape)}: give checkpoints of one run")


def _tokenizer_of_run(checkpoint: Path) -> str:
    settings = checkpoint.absolute().parent.parent / CONFIG
    if not settings.is_file():
        raise ValueError(f"{checkpoint} is in no run's folder ({settings} is missing): give --tokenizer")
    try:
        return yaml.safe_load(settings.read_text())["tokenizer"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{settings} is not the settings of a run: give --tokenizer") from error


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m trainer.export`."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", type=Path, required=True, help="folder step_…; several are averaged", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, must not exist", metavar="DIR")
    parser.add_argument("--tokenizer", help="folder or Hub name; the run's own by default")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights written")
    options = parser.parse_args(argv)
    try:
        folder = export_checkpoints(options.checkpoint, options.output, options.tokenizer, options.dtype)
    except (ValueError, OSError, RunStoppedError) as error:
        raise SystemExit(f"trainer.export: {error}") from error
    print(f"model in {folder}")


if __name__ == "__main__":
    main()
