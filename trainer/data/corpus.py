"""Documents from local files and from dataset hubs, one dictionary `{"text": …}` at a time."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        path: a local file (.jsonl, .jsonl.zst, .parquet, .txt), a folder of such files, or the name of a Hub dataset.
        name: configuration of a Hub dataset.
        split: split of a Hub dataset.
        text_field: field that holds the text.
        license: licence of the documents, kept in the manifest; a document's own `license` wins.
        max_documents: stop after so many documents.
        streaming: read a Hub dataset as it is transferred; otherwise it is downloaded first.
    """

    path: str
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    license: str | None = None
    max_documents: int | None = None
    streaming: bool = True

    def __post_init__(self):
        for name in ("path", "name", "split", "text_field", "license"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name not in ("name", "license")):
                raise ValueError(f"{name} of source {self.path!r} is {value!r}: write text")
        if self.max_documents is not None and (type(self.max_documents) is not int or self.max_documents < 1):
            raise ValueError(
                f"max_documents of source {self.path!r} is {self.max_documents!r}: use 1 or more, or null"
            )

    @classmethod
    def parse(cls, source: "Source | str | dict") -> "Source":
        """A `Source` from a path or from a recipe's mapping.

        Raises:
            ValueError: a key is unknown, `path` is missing, or a value is of another type.
        """
        if isinstance(source, Source):
            return source
        if isinstance(source, str):
            return cls(path=source)
        if not isinstance(source, dict):
            raise ValueError(f"source {source!r} is neither a path nor a mapping with `path`")
        known = [field.name for field in fields(cls)]
        unknown = set(source) - set(known)
        if unknown or "path" not in source:
            raise ValueError(f"source {source!r} needs `path` and may have {known}; unknown: {sorted(unknown)}")
        return cls(**source)


def read_documents(source: Source) -> Iterator[dict]:
    """Yield the documents of one source in its own order.

    Half a surrogate pair, which JSON can write and UTF-8 cannot, becomes U+FFFD.

    Args:
        source: files or a Hub dataset.

    Yields:
        dict: at least `text` (str) and `license` (str or None).

    Raises:
        ValueError: the source does not exist or cannot be read, or a document has no text; the place is named.
    """
    for count, document in enumerate(_raw_documents(source)):
        if source.max_documents is not None and count >= source.max_documents:
            return
        text = document.get(source.text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"document {count} of {source.path} has no text in field {source.text_field!r}; "
                f"its fields are {sorted(document)}: set `text_field`"
            )
        license = document.get("license") or source.license
        if isinstance(license, list):
            license = ", ".join(map(str, license))
        elif license is not None:
            license = str(license)  # a number or a mapping is no key of the manifest's
        yield {**document, "text": _encodable(text), "license": license}


def _encodable(text: str) -> str:
    """The text, with pairs of surrogates joined and lone ones replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def chain_documents(sources: Iterable[Source]) -> Iterator[dict]:
    """Yield the documents of several sources, one source after another."""
    for source in sources:
        yield from read_documents(source)


def _raw_documents(source: Source) -> Iterator[dict]:
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"folder {path} holds no corpus file; known suffixes: {', '.join(SUFFIXES)}")
    elif path.is_file():
        files = [path]
    else:
        yield from _hub_documents(source)
        return
    for file in files:
        yield from _file_documents(file)


def _file_documents(file: Path) -> Iterator[dict]:
    if file.name.endswith((".jsonl", ".jsonl.zst")):
        return _json_lines(file)
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    if file.suffix == ".txt":
        return _whole_text(file)
    raise ValueError(f"{file} is no corpus file; known suffixes: {', '.join(SUFFIXES)}")


def _json_lines(file: Path) -> Iterator[dict]:
    number = 0
    try:
        with open_text(file) as lines:
            for line in lines:
                number += 1
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise ValueError(f"a line must hold an object, got {type(document).__name__}")
                yield document
    except (ValueError, OSError, RecursionError) as error:  # the last: brackets without end
        raise ValueError(f"{file} cannot be read near line {max(number, 1)}: {error}") from error


def open_text(file: Path, errors: str = "strict") -> TextIO:
    """A file's text, decompressed where its name ends with .zst; one that was cut short is an OSError at its end.

    Args:
        file: in UTF-8, with or without a byte order mark.
        errors: what becomes of other bytes, as for `open`.
    """
    if file.suffix != ".zst":
        return file.open(encoding="utf-8-sig", errors=errors)
    import pyarrow  # knows a file that was cut short, of which zstandard gives what is there without a word

    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), encoding="utf-8-sig", errors=errors)


def _parquet_rows(file: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _whole_text(file: Path) -> Iterator[dict]:
    try:
        yield {"text": file.read_text(encoding="utf-8-sig")}
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _hub_documents(source: Source) -> Iterator[dict]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)
    except Exception as error:
        raise ValueError(
            f"{source.path!r} is neither a local file or folder nor a dataset that can be opened ({error}); "
            "correct `path`, or download the data and give its local path"
        ) from error
    number = 0
    try:
        for document in dataset:
            yield document
            number += 1
    except Exception as error:  # of the network or of the hub's files, by any of several libraries
        raise ValueError(
            f"{source.path!r} cannot be read on after {number} documents ({error}): start the same command again"
        ) from error
