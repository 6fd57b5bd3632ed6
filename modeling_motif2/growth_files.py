"""Checkpoint files of growth: read a slice at a time, write a shard at a time, and go on after an interruption.

A grown folder holds `growth.json` from the start: what grows, from which files (SHA-256), and the shards that are
finished. A shard is written under another name, then renamed, then entered there with its SHA-256, each step safe on
the disk before the next. Going on believes no shard that does not have that checksum any more. `config.json` comes
last, so a folder that is not finished does not load.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .growth_rules import Rule

FORMAT_VERSION = 1
MANIFEST = "growth.json"
INDEX = "model.safetensors.index.json"
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Files of a checkpoint that hold neither weights nor shape, and so go along unchanged.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
INCOMPLETE = "complete the download, or write the checkpoint anew"
_READ_BYTES = 2**24


class CheckpointReader:
    """Reads tensors of a safetensors checkpoint by name, whole or some rows, without keeping the files mapped.

    Args:
        folder: holds model.safetensors, or shards and their index.

    Raises:
        ValueError: there are no safetensors files, one is missing or broken, or a dtype cannot be grown.
        OSError: a file may not be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self.files = self._find_files()
        for file in self.files:
            self._read_header(file)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return getattr(torch, self._tensors[name][2])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, on the CPU in the stored dtype."""
        with safe_open(self.folder / self._tensors[name][0], framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        return {file: file_sha256(self.folder / file) for file in tqdm(self.files, desc="checksum of the source")}

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index, INCOMPLETE).get("weight_map")
            named = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            wrong = sorted(repr(file) for file in named if not isinstance(file, str) or Path(file).name != file)
            if not named or wrong:
                raise ValueError(
                    f"{index} needs a weight_map from tensors to files of its folder, and "
                    f"{'names ' + ', '.join(wrong) if wrong else 'has none'}: {INCOMPLETE}"
                )
            files = sorted(named)
        elif (self.folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            raise ValueError(
                f"{self.folder} holds no model.safetensors and no {INDEX}: growth reads safetensors; convert other "
                "weights with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
            )
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise ValueError(f"{self.folder} lacks {', '.join(missing)}, which its index names: complete the download")
        return files

    def _read_header(self, file: str) -> None:
        known = {code: dtype for dtype, code in DTYPES.items()}
        path = self.folder / file
        try:
            path.open("rb").close()  # Errors of the system with their own words; safetensors has others.
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in known:
                        raise ValueError(
                            f"{name} in {file} is stored as {part.get_dtype()}: growth needs {', '.join(DTYPES)}; "
                            "dequantise the checkpoint first"
                        )
                    if name in self._tensors:
                        raise ValueError(
                            f"{name} is in {self._tensors[name][0]} and in {file} of {self.folder}: {INCOMPLETE}"
                        )
                    self._tensors[name] = (file, tuple(part.get_shape()), known[part.get_dtype()])
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): {INCOMPLETE}") from error


@dataclass(frozen=True)
class Shard:
    """One file of the grown checkpoint and the tensors in it."""

    file: str
    rules: dict[str, Rule]
    dtype: torch.dtype

    @property
    def header(self) -> bytes:
        """The safetensors header, its length in front."""
        header: dict = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, rule in self.rules.items():
            end = offset + math.prod(rule.shape) * self.dtype.itemsize
            code = DTYPES[str(self.dtype).removeprefix("torch.")]
            header[name] = {"dtype": code, "shape": list(rule.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(math.prod(rule.shape) for rule in self.rules.values()) * self.dtype.itemsize


def plan_shards(rules: dict[str, Rule], dtype: torch.dtype, max_shard_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_bytes` (or one tensor, where that is larger), in order."""
    parts: list[dict[str, Rule]] = []
    filled = max_shard_bytes
    for name, rule in rules.items():
        size = math.prod(rule.shape) * dtype.itemsize
        if filled + size > max_shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = rule
        filled += size
    count = len(parts)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", part, dtype) for i, part in enumerate(parts, start=1)]


class GrowthFolder:
    """The folder of a grown checkpoint, finished or begun.

    Args:
        folder: created when missing; may hold an interrupted growth with the same settings.
        settings: all that decides the bytes of the shards; kept in the manifest.
        shards: the files to write.

    Attributes:
        missing: shards that are not finished, or whose file has gone or changed.
        damaged: names of finished files that do not have the size and SHA-256 of the manifest any more.

    Raises:
        ValueError: the folder holds something else, a manifest that cannot be read, or a growth with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict, shards: list[Shard]):
        self.folder = Path(folder)
        self.shards = shards
        path = self.folder / MANIFEST
        fresh = {"format_version": FORMAT_VERSION, **settings, "shards": {}, "complete": False}
        if path.is_file():
            self.manifest = read_json(path, "remove this folder and grow again")
            differing = [
                key for key in fresh if key not in ("shards", "complete") and self.manifest.get(key) != fresh[key]
            ]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a growth with other settings ({', '.join(differing)}; see its {MANIFEST}): "
                    "choose another output folder, or remove this one"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no {MANIFEST}: choose another output folder")
        else:
            self.manifest = fresh

        self.damaged: list[str] = []
        self.missing = self._find_missing()

    @property
    def is_complete(self) -> bool:
        """Whether every file is there, and the shards are as they were written."""
        rest = all((self.folder / file).is_file() for file in (INDEX, "config.json"))
        return self.manifest.get("complete") is True and rest and not self.missing

    def _find_missing(self) -> list[Shard]:
        """Compare the files with the manifest, by size and SHA-256."""
        entries = self.manifest.get("shards")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(f"{self.folder / MANIFEST} lists no shards: remove this folder and grow again")
        finished = [shard for shard in self.shards if shard.file in entries and (self.folder / shard.file).is_file()]
        for shard in tqdm(finished, desc="checksum of finished shards", unit="file", disable=not finished):
            path = self.folder / shard.file
            if path.stat().st_size != shard.num_bytes or file_sha256(path) != entries[shard.file].get("sha256"):
                self.damaged.append(shard.file)
        intact = {shard.file for shard in finished} - set(self.damaged)
        return [shard for shard in self.shards if shard.file not in intact]

    def check_room(self) -> str:
        """Compare the bytes still to be written with the disk's.

        Returns:
            Both numbers in a sentence.

        Raises:
            ValueError: the disk has less room; both numbers are named.
            PermissionError: the folder may not be written.
        """
        needed = self.num_bytes_missing
        place = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
        effective = os.access in os.supports_effective_ids
        if needed and not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        # What an interruption left half written and what is damaged goes before new bytes come, so it counts as free.
        leavings = [*self.folder.glob("*.partial"), *(self.folder / shard.file for shard in self.missing)]
        free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in leavings if file.is_file())
        if needed > free:
            raise ValueError(
                f"the grown checkpoint needs {needed:,} more bytes in {self.folder}, and the disk has {free:,} free: "
                f"make room for {needed - free:,} bytes, or choose a smaller dtype or another disk"
            )
        return f"{needed:,} bytes to write in {self.folder}, {free:,} free on its disk"

    @property
    def num_bytes_missing(self) -> int:
        """Bytes of the shards that are still to be written."""
        return sum(shard.num_bytes for shard in self.missing)

    def write(self, source: CheckpointReader) -> None:
        """Write the shards that are missing, then the index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        for shard in self.missing:
            self.manifest["shards"].pop(shard.file, None)
        self.manifest["complete"] = False
        self._save_manifest()
        for shard in self.missing:
            (self.folder / shard.file).unlink(missing_ok=True)
        total = sum(shard.num_bytes for shard in self.shards)
        with tqdm(total=total, initial=total - self.num_bytes_missing, unit="B", unit_scale=True, desc="grow") as bar:
            for shard in self.missing:
                bar.set_postfix_str(shard.file)
                checksum = _write_shard(self.folder / shard.file, shard, source, bar)
                self.manifest["shards"][shard.file] = {"sha256": checksum, "bytes": shard.num_bytes}
                self.manifest["shards"] = dict(sorted(self.manifest["shards"].items()))
                self._save_manifest()
        weight_map = {name: shard.file for shard in self.shards for name in shard.rules}
        size = sum(shard.num_bytes - len(shard.header) for shard in self.shards)
        parameters = size // self.shards[0].dtype.itemsize
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
        write_durably(self.folder / INDEX, [_json_bytes(index)])

    def finish(self, config: dict, source: Path, with_code: bool) -> None:
        """Copy the tokenizer and other companions, write config.json, and mark the folder complete."""
        for pattern in COMPANIONS + (("*.py",) if with_code else ()):
            for file in sorted(source.glob(pattern)):
                if file.is_file():
                    write_durably(self.folder / file.name, [file.read_bytes()])
        write_durably(self.folder / "config.json", [_json_bytes(config)])
        self.manifest["complete"] = True
        self._save_manifest()
        self.missing, self.damaged = [], []

    def _save_manifest(self) -> None:
        write_durably(self.folder / MANIFEST, [_json_bytes(self.manifest)])


def _write_shard(path: Path, shard: Shard, source: CheckpointReader, bar: tqdm) -> str:
    """Write one shard and return its SHA-256."""
    checksum = hashlib.sha256()

    def pieces() -> Iterator[memoryview | bytes]:
        for piece in _pieces(shard, source):
            yield piece
            checksum.update(piece)
            bar.update(len(piece))

    write_durably(path, pieces())
    return checksum.hexdigest()


def _pieces(shard: Shard, source: CheckpointReader) -> Iterator[memoryview | bytes]:
    yield shard.header
    for name, rule in shard.rules.items():
        for block in rule.blocks(source, shard.dtype, name):
            yield memoryview(block.contiguous().view(torch.uint8).numpy()).cast("B")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            checksum.update(piece)
    return checksum.hexdigest()


def read_json(path: Path, mend: str) -> dict:
    """Reads a JSON object.

    Args:
        path: the file.
        mend: what to do when it is not one, for the error.

    Raises:
        ValueError: the file is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}): {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: {mend}")
    return content


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _json_bytes(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_durably(path: Path, pieces: Iterable[memoryview | bytes]) -> None:
    """Write a file so that a reader, even after a power cut, sees the old content or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder safe against a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
