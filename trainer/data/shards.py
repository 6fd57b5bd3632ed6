"""Token shards on disk: written once from documents, then read through memory maps.

Layout of a folder of shards:
    manifest.json                      tokenizer, counts, sources, licences and checksums, its own included
    <domain>/train_00000.tokens.npy    tokens of the shard's documents, end to end, each closed by end-of-text
    <domain>/train_00000.ends.npy      where each document ends (exclusive), int64
    <domain>/heldout_00000.*           the same for held-out documents, and their text as .jsonl
A domain is listed in the manifest once it is complete; until then `<domain>/progress.json` says how far it is.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trainer.data.corpus import Source, chain_documents
from trainer.data.encoding import Encode, encoder

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
BATCH_DOCUMENTS = 512
HELDOUT = object()  # key of documents that were given to be held out; no document's own


def build_shards(
    output_dir: str | Path,
    domains: Mapping[str, Iterable],
    tokenizer,
    *,
    heldout: Mapping[str, Iterable[dict]] | None = None,
    heldout_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    num_workers: int = 1,
    progress: bool = True,
) -> dict:
    """Tokenise documents into shards by domain; complete domains and shards of an earlier call are kept.

    Args:
        output_dir: folder of shards, created when missing.
        domains: for each domain its documents (dictionaries with `text`, perhaps `license`), or a list of sources
            (`Source`, path, or mapping), in an order that repeats: a restart skips what was already written.
        tokenizer: a fast tokenizer with an end-of-text token.
        heldout: documents to hold out, for domains that come already split.
        heldout_fraction: share of documents that a hash of their text holds out, where `heldout` has no entry.
        shard_tokens: tokens at which a shard is closed.
        seed: changes which documents are held out.
        num_workers: processes that tokenise; the shards are the same with any number.
        progress: show a bar.

    Returns:
        dict: the manifest.

    Raises:
        ValueError: a domain has no document or an unreadable one, or the folder holds shards made with other settings
            or from other sources.
    """
    output_dir = Path(output_dir)
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "heldout_fraction": heldout_fraction,
        "shard_tokens": shard_tokens,
        "seed": seed,
    }
    manifest = _open_manifest(output_dir, settings)
    missing = {}
    for name, documents in domains.items():
        sources, documents = _resolve_documents(documents)
        if name in manifest["domains"] and (output_dir / name).is_dir():
            _check_sources(output_dir, name, manifest["domains"][name]["sources"], sources)
        else:  # new, or its folder was deleted to make it again
            missing[name] = sources, documents
            if manifest["domains"].pop(name, None):
                _write_manifest(output_dir, manifest)  # interrupted from here on, it is not complete
    with encoder(tokenizer, num_workers if missing else 1) as encode:
        for name, (sources, documents) in missing.items():
            writer = _DomainWriter(
                output_dir / name, sources, tokenizer, encode, settings, name in (heldout or {}), progress
            )
            explicit = ({**document, HELDOUT: True} for document in (heldout or {}).get(name, ()))
            manifest["domains"][name] = writer.write(itertools.chain(explicit, documents))
            _write_manifest(output_dir, manifest)
            (output_dir / name / "progress.json").unlink(missing_ok=True)
    return manifest


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over everything that decides which tokens a text becomes."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return _json_checksum({key: value for key, value in state.items() if key not in ("truncation", "padding")})


def _open_manifest(output_dir: Path, settings: dict) -> dict:
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (output_dir / MANIFEST).is_file():
        _write_manifest(output_dir, {**settings, "domains": {}})
    manifest = load_manifest(output_dir)
    differing = [key for key, value in settings.items() if manifest.get(key) != value]
    if differing:
        changes = ", ".join(f"{key} {manifest.get(key)!r} -> {settings[key]!r}" for key in differing)
        raise ValueError(f"{output_dir} holds shards made with other settings ({changes}): choose another folder")
    return manifest


def _resolve_documents(documents: Iterable) -> tuple[list[dict] | None, Iterable[dict]]:
    """The sources as they go into the manifest (None for ready documents), and the documents."""
    if not isinstance(documents, list | tuple) or not documents:
        return None, documents
    if isinstance(documents[0], dict) and "text" in documents[0]:
        return None, documents
    sources = [Source.parse(source) for source in documents]
    return [vars(source) for source in sources], chain_documents(sources)


def _check_sources(output_dir: Path, domain: str, before: list[dict] | None, now: list[dict] | None) -> None:
    """Refuse shards made from other sources; documents that come ready (`now` is None) cannot be compared."""
    if now is None or _decisive(before) == _decisive(now):
        return
    raise ValueError(
        f"domain {domain!r} in {output_dir} was tokenised from {_decisive(before)}, and the recipe's sources are "
        f"{_decisive(now)}: choose another data_dir, delete {output_dir / domain} to tokenise it again, or take "
        "`sources` out of the recipe to train on what is there"
    )


def _decisive(sources: list[dict] | None) -> list[dict] | str:
    """What of the sources decides documents and licences, and was set."""
    if sources is None:
        return "documents given directly"
    return [{key: value for key, value in source.items() if key != "streaming" and value} for source in sources]


class _DomainWriter:
    """Writes one domain's documents as shards and remembers after each shard how far it came."""

    def __init__(
        self,
        folder: Path,
        sources: list[dict] | None,
        tokenizer,
        encode: Encode,
        settings: dict,
        explicit_heldout: bool,
        progress: bool,
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token: set `eos_token` before tokenising")
        self.folder = folder
        self.encode, self.eos_token_id = encode, tokenizer.eos_token_id
        self.dtype = np.uint16 if settings["vocab_size"] <= 2**16 else np.uint32
        self.shard_tokens = settings["shard_tokens"]
        self.seed = settings["seed"]
        self.heldout_fraction = 0.0 if explicit_heldout else settings["heldout_fraction"]
        self.progress = progress
        folder.mkdir(parents=True, exist_ok=True)
        progress_file = folder / "progress.json"
        self.entry = (
            _read_json(progress_file)
            if progress_file.is_file()
            else {
                "documents_read": 0,
                "licenses": {},
                "sources": sources,
                **{split: _empty_split() for split in SPLITS},
            }
        )
        _check_sources(folder.parent, folder.name, self.entry.setdefault("sources", sources), sources)
        self._clear_buffers()

    def write(self, documents: Iterable[dict]) -> dict:
        """Write all documents and return the domain's entry of the manifest."""
        licenses = Counter(self.entry["licenses"])
        rest = itertools.islice(documents, self.entry["documents_read"], None)
        bar = tqdm(desc=f"tokenise {self.folder.name}", unit=" documents", disable=not self.progress)
        with bar:
            bar.update(self.entry["documents_read"])
            for batch, encoded in self.encode(_batches(rest, BATCH_DOCUMENTS)):
                self._add(batch, encoded, licenses)
                bar.update(len(batch))
                if self.num_buffered >= self.shard_tokens:
                    self._flush(licenses)
        if self.num_buffered:
            self._flush(licenses)
        if not self.entry["train"]["tokens"]:
            raise ValueError(f"domain {self.folder.name!r} has no training document: check its sources")
        return {key: value for key, value in self.entry.items() if key != "documents_read"}

    def _add(self, batch: list[dict], encoded: list[list[int]], licenses: Counter) -> None:
        for document, tokens in zip(batch, encoded, strict=True):
            self.num_read += 1
            if not tokens:
                continue
            licenses[document.get("license") or "unknown"] += 1
            split = "heldout" if HELDOUT in document or self._is_held_out(document["text"]) else "train"
            self.buffers[split].append(np.array([*tokens, self.eos_token_id], self.dtype))
            self.num_buffered += len(tokens) + 1
            if split == "heldout":
                self.heldout_texts.append(document["text"])

    def _is_held_out(self, text: str) -> bool:
        digest = hashlib.sha256(f"{self.seed}:{text}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.heldout_fraction * 2**64

    def _flush(self, licenses: Counter) -> None:
        for split in SPLITS:
            if self.buffers[split]:
                self._write_shard(split)
        self.entry["licenses"] = dict(licenses)
        self.entry["documents_read"] += self.num_read
        _write_json(self.folder / "progress.json", self.entry)
        self._clear_buffers()

    def _write_shard(self, split: str) -> None:
        entry = self.entry[split]
        stem = f"{split}_{len(entry['shards']):05d}"
        documents = self.buffers[split]
        tokens = np.concatenate(documents)
        files = {
            f"{stem}.tokens.npy": _save_array(self.folder / f"{stem}.tokens.npy", tokens),
            f"{stem}.ends.npy": _save_array(
                self.folder / f"{stem}.ends.npy", np.cumsum([len(d) for d in documents], dtype=np.int64)
            ),
        }
        if split == "heldout":
            lines = "".join(json.dumps({"text": text}) + "\n" for text in self.heldout_texts)
            path = self.folder / f"{stem}.jsonl"
            _atomic_write(path, lines.encode())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_checksum(path)}
        entry["shards"].append({"name": stem, "documents": len(documents), "tokens": len(tokens), "files": files})
        entry["documents"] += len(documents)
        entry["tokens"] += len(tokens)

    def _clear_buffers(self) -> None:
        self.buffers: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.heldout_texts: list[str] = []
        self.num_buffered = self.num_read = 0


class TokenCorpus:
    """One split of one domain: documents by number, read through memory maps.

    Args:
        folder: folder of shards.
        domain: a domain of the manifest.
        split: "train" or "heldout".
        verify: also compare every file's checksum, which reads everything once.

    Raises:
        ValueError: the manifest lacks the domain, or a shard is missing, cut short or corrupted; the file is named.
    """

    def __init__(self, folder: str | Path, domain: str, split: str = "train", verify: bool = False):
        self.folder, self.domain, self.split = Path(folder) / domain, domain, split
        entry = load_manifest(folder)["domains"].get(domain)
        if entry is None:
            known = sorted(load_manifest(folder)["domains"])
            raise ValueError(f"domain {domain!r} is not in {folder}; it has {known}: tokenise it first")
        shards = entry[split]["shards"]
        self.num_documents, self.num_tokens = entry[split]["documents"], entry[split]["tokens"]
        self.fingerprint = _json_checksum({"shards": [shard["files"] for shard in shards]})
        for shard in shards:
            self._check_shard(shard, verify)
        self._tokens = [np.load(self.folder / f"{shard['name']}.tokens.npy", mmap_mode="r") for shard in shards]
        self._ends = [np.load(self.folder / f"{shard['name']}.ends.npy", mmap_mode="r") for shard in shards]
        self._first_document = np.cumsum([0, *(shard["documents"] for shard in shards)])

    def _check_shard(self, shard: dict, verify: bool) -> None:
        mend = f"restore it, or delete {self.folder} and tokenise its sources again (python -m trainer.data)"
        for name, expected in shard["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"shard file {path} is lost: {mend}")
            found = {"bytes": path.stat().st_size}
            if verify:
                found["sha256"] = file_checksum(path)
            if any(expected[key] != value for key, value in found.items()):
                raise ValueError(f"shard file {path} is corrupted ({found} but {expected} was written): {mend}")

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, end-of-text included.

        Args:
            documents: document numbers, (N,) int64.

        Returns:
            np.ndarray: (N,) int64.
        """
        lengths = np.empty(len(documents), np.int64)  # (N,)
        shards = self._shard_of(documents)  # (N,)
        for shard in np.unique(shards):
            chosen = shards == shard  # (N,)
            local = documents[chosen] - self._first_document[shard]
            ends = self._ends[shard]
            lengths[chosen] = ends[local] - np.where(local > 0, ends[np.maximum(local - 1, 0)], 0)
        return lengths

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start:stop` of a document, (stop - start,) unsigned."""
        shard = int(self._shard_of(document))
        local = document - self._first_document[shard]
        begin = int(self._ends[shard][local - 1]) if local > 0 else 0
        return self._tokens[shard][begin + start : begin + stop]

    def _shard_of(self, documents):
        return np.searchsorted(self._first_document, documents, side="right") - 1


def load_manifest(folder: str | Path) -> dict:
    """Read a folder's manifest.

    Raises:
        ValueError: there is none, it is not readable, its checksum differs, or its format is another.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no token shards (no {MANIFEST}): set `sources` so that they can be built")
    manifest = _read_json(path)
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is corrupted (no mapping): restore it, or tokenise again")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {manifest.get('format_version')!r}, not {FORMAT_VERSION}: tokenise again")
    if manifest.pop("checksum", None) != _json_checksum(manifest):
        raise ValueError(f"{path} is corrupted (its checksum differs): restore it, or tokenise again")
    return manifest


def check_tokenizer(folder: str | Path, tokenizer) -> None:
    """Refuse a tokenizer other than the one that made the shards.

    Raises:
        ValueError: the fingerprints differ.
    """
    made_with, given = load_manifest(folder)["tokenizer"], tokenizer_fingerprint(tokenizer)
    if made_with != given:
        raise ValueError(
            f"{folder} was tokenised with a tokenizer of fingerprint {made_with[:12]}…, the run's is {given[:12]}…: "
            "use the same tokenizer, or tokenise into another folder"
        )


def heldout_texts(folder: str | Path, domain: str) -> Iterator[str]:
    """Yield the text of a domain's held-out documents."""
    for shard in load_manifest(folder)["domains"][domain]["heldout"]["shards"]:
        with (Path(folder) / domain / f"{shard['name']}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _empty_split() -> dict:
    return {"documents": 0, "tokens": 0, "shards": []}


def _batches(documents: Iterable[dict], size: int) -> Iterator[list[dict]]:
    documents = iter(documents)
    while batch := list(itertools.islice(documents, size)):
        yield batch


def _save_array(path: Path, array: np.ndarray) -> dict:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
    return {"bytes": path.stat().st_size, "sha256": file_checksum(path)}


def _atomic_write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _json_checksum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: dict) -> None:
    _write_json(folder / MANIFEST, {"checksum": _json_checksum(manifest), **manifest})


def _write_json(path: Path, value: dict) -> None:
    _atomic_write(path, json.dumps(value, indent=1).encode())


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is corrupted ({error}): delete its folder and tokenise again") from error
