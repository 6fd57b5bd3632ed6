"""Checkpoint files of growth: read a slice at a time, write a shard at a time, and go on after an interruption.

A grown folder holds `growth.json` from the start: what grows, from which files (SHA-256), and the shards that are
finished. A shard is written under another name, then renamed, then entered there. `config.json` comes last, so a
folder that is not finished does not load.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
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
_READ_BYTES = 2**24


class CheckpointReader:
    """Reads tensors of a safetensors checkpoint by name, whole or some rows, without keeping the files mapped.

    Args:
        folder: holds model.safetensors, or shards and their index.

    Raises:
        ValueError: there are no safetensors files, one is missing or cannot be read, or a dtype cannot be grown.
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
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in known:
                        raise ValueError(
                            f"{name} in {file} is stored as {part.get_dtype()}: growth needs {', '.join(DTYPES)}; "
                            "dequantise the checkpoint first"
                        )
                    self._tensors[name] = (file, tuple(part.get_shape()), known[part.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file} cannot be read: {error}; is the download complete?") from error


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

    Raises:
        ValueError: the folder holds something else, or a growth with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict, shards: list[Shard]):
        self.folder = Path(folder)
        self.shards = shards
        path = self.folder / MANIFEST
        fresh = {"format_version": FORMAT_VERSION, **settings, "shards": {}, "complete": False}
        if path.is_file():
            self.manifest = json.loads(path.read_text())
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

    @property
    def is_complete(self) -> bool:
        """Whether every file is there."""
        return self.manifest["complete"] and not self.missing

    @property
    def missing(self) -> list[Shard]:
        """Shards that are not finished, or whose file has gone."""
        return [shard for shard in self.shards if not self._is_finished(shard)]

    def _is_finished(self, shard: Shard) -> bool:
        path = self.folder / shard.file
        return shard.file in self.manifest["shards"] and path.is_file() and path.stat().st_size == shard.num_bytes

    def check_room(self) -> int:
        """Bytes still to be written.

        Raises:
            ValueError: the disk has less room; both numbers are named.
        """
        needed = sum(shard.num_bytes for shard in self.missing)
        place = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
        # A partial file of an interrupted growth is overwritten, so its bytes count as free.
        free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in self.folder.glob("*.partial"))
        if needed > free:
            raise ValueError(
                f"the grown checkpoint needs {needed:,} more bytes in {self.folder}, and the disk has {free:,} free: "
                f"make room for {needed - free:,} bytes, or choose a smaller dtype or another disk"
            )
        return needed

    def write(self, source: CheckpointReader) -> None:
        """Write the shards that are missing, then the index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_manifest()
        total = sum(shard.num_bytes for shard in self.shards)
        missing = self.missing
        with tqdm(total=total, unit="B", unit_scale=True, desc="grow") as bar:
            bar.update(total - sum(shard.num_bytes for shard in missing))
            for shard in missing:
                bar.set_postfix_str(shard.file)
                checksum = _write_shard(self.folder / shard.file, shard, source, bar)
                self.manifest["shards"][shard.file] = {"sha256": checksum, "bytes": shard.num_bytes}
                self.manifest["shards"] = dict(sorted(self.manifest["shards"].items()))
                self._save_manifest()
        weight_map = {name: shard.file for shard in self.shards for name in shard.rules}
        size = sum(shard.num_bytes - len(shard.header) for shard in self.shards)
        parameters = size // self.shards[0].dtype.itemsize
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
        write_atomically(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def finish(self, config: dict, source: Path, with_code: bool) -> None:
        """Copy the tokenizer and other companions, write config.json, and mark the folder complete."""
        for pattern in COMPANIONS + (("*.py",) if with_code else ()):
            for file in sorted(source.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, self.folder / file.name)
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        self.manifest["complete"] = True
        self._save_manifest()

    def _save_manifest(self) -> None:
        write_atomically(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")


def _write_shard(path: Path, shard: Shard, source: CheckpointReader, bar: tqdm) -> str:
    """Write one shard and return its SHA-256."""
    partial = path.with_name(path.name + ".partial")
    checksum = hashlib.sha256()
    with open(partial, "wb") as file:
        for piece in _pieces(shard, source):
            file.write(piece)
            checksum.update(piece)
            bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
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


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
