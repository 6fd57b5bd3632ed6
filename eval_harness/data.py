"""Where a task's rows come from: the hub by default, or one local folder shaped like the hub's copies.

Tasks name `load_benchmark` as their `custom_dataset`, so that lm-eval reads nothing before a task is built. The
local folder is the task manager's metadata `data_dir`: our runner's `--data_dir`, or lm-eval's `--metadata
'{"data_dir": …}'`.
"""

import difflib
from pathlib import Path

import datasets
import pyarrow
import pyarrow.json
import pyarrow.parquet

SUFFIXES = (".parquet", ".jsonl", ".json")


class MissingDataset(FileNotFoundError):
    """A task's rows are neither in the local folder nor reachable; the message says how to get them."""


def load_benchmark(
    *,
    path: str | None = None,
    name: str | None = None,
    file: str | None = None,
    splits: list[str] | None = None,
    data_dir: str | None = None,
    **metadata,
) -> dict[str, datasets.Dataset]:
    """Read a benchmark's splits.

    Args:
        path: repository on the hub, `openai/gsm8k`; locally the folder `gsm8k` under `data_dir`.
        name: configuration of that repository; locally a folder inside it.
        file: instead of `path`: one file in `data_dir` (a set that is on no hub), read as the split `test`.
        splits: which splits the task needs, `["test"]` by default; locally `test.jsonl`, or all of
            `test-00000-of-00002.parquet`, ….
        data_dir: local folder; None reads from the hub.
        metadata: whatever else lm-eval hands to a custom dataset; not used.

    Returns:
        dict: a dataset a split.

    Raises:
        MissingDataset: naming the file that was looked for and the command that gets it.
    """
    if file is not None:
        if data_dir is None:
            raise MissingDataset(f"{file!r} is on no hub: give the folder that holds it with data_dir")
        return {"test": read_rows(_existing(Path(data_dir) / file))}
    splits = splits or ["test"]
    if data_dir is None:
        return _from_hub(path, name, splits)
    folder = local_folder(data_dir, path, name)
    files = {split: _split_files(folder, split, path, name) for split in splits}
    return {split: datasets.concatenate_datasets(list(map(read_rows, files[split]))) for split in splits}


def read_rows(file: Path) -> datasets.Dataset:
    """Read one parquet or JSON-lines file into memory."""
    if file.suffix == ".parquet":
        return datasets.Dataset(pyarrow.parquet.read_table(file))
    options = pyarrow.json.ReadOptions(block_size=64 * 2**20)
    return datasets.Dataset(pyarrow.json.read_json(file, read_options=options))


def local_folder(data_dir: str | Path, path: str, name: str | None) -> Path:
    """Folder of a hub repository's configuration below `data_dir` (or below its `eval` folder)."""
    relative = Path(path.split("/")[-1], *([name] if name else []))
    candidates = [Path(data_dir) / relative, Path(data_dir) / "eval" / relative]
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def _split_files(folder: Path, split: str, path: str, name: str | None) -> list[Path]:
    """The file of a split, or all of its parts."""
    present = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [file for file in present if file.is_file()][:1] or sorted(folder.glob(f"{split}-*-of-*.parquet"))
    number = int(found[0].stem.rpartition("-")[2]) if found and found[0].stem != split else 1
    if len(found) == number:
        return found
    target = folder.parent if name else folder
    lacking = f"is in {folder} with {len(found)} of {number} parts" if found else f"is not in {folder}"
    raise MissingDataset(
        f"split {split!r} of {path}{f' ({name})' if name else ''} {lacking}; get it with "
        f"`{_download(path, target)}`, or leave data_dir out to read it from the hub"
    )


def _existing(file: Path) -> Path:
    if file.is_file():
        return file
    nearby = [other.name for other in file.parent.glob("*")] if file.parent.is_dir() else []
    nearest = difflib.get_close_matches(file.name, nearby, n=1)
    mend = f"did you mean {nearest[0]!r}?" if nearest else "check data_dir"
    raise MissingDataset(f"{file} does not exist; {mend}")


def _from_hub(path: str, name: str | None, splits: list[str]) -> dict[str, datasets.Dataset]:
    try:
        return {split: datasets.load_dataset(path, name, split=split) for split in splits}
    except (OSError, ValueError, RuntimeError) as error:
        command = _download(path, Path("DATA", path.split("/")[-1]))
        raise MissingDataset(
            f"{path}{f' ({name})' if name else ''} could not be read from the hub ({error}); where it is reachable "
            f"run `{command}`, copy DATA here and give data_dir=DATA"
        ) from error


def _download(path: str, target: Path) -> str:
    return f"hf download {path} --repo-type dataset --local-dir {target}"
