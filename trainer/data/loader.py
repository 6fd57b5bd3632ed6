"""From token shards to training batches, in an order that only the seed decides.

Every rank plans the whole step (which domain, which pieces) and reads only its own rows, so the order does not depend
on the number of ranks, on accumulation, or on restarts: the state that a batch carries is enough to go on from it.

Legend: R rows of a step, L row length, P pieces.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.curriculum import DomainAllocator, Mixture
from trainer.data.packing import IGNORE_INDEX, fill_row, pack_best_fit, row_tokens
from trainer.schedules import BatchPlan

WINDOW_ROWS = 256


class DomainStream:
    """Endless packed rows of one domain.

    Documents come in a pseudo-random order that changes with every epoch. A window of about 256 rows is packed at a
    time and its rows are shuffled; what does not fill the last row waits for the next window.

    Args:
        corpus: documents of the domain.
        name: the domain.
        seed: of the run.
    """

    def __init__(self, corpus, name: str, seed: int):
        self.corpus = corpus
        self.key = int.from_bytes(f"{seed}:{name}".encode(), "big") % (2**61 - 1)
        self.next_document = 0
        self.row_length = 0
        self.next_row = 0
        self.rows: list[np.ndarray] = []
        self.waiting = np.empty((0, 3), np.int64)  # (P, 3)

    def take(self, row_length: int) -> np.ndarray:
        """The next row, (P, 3) pieces; a new `row_length` packs what was not yet used again."""
        if row_length != self.row_length:
            self.waiting = np.concatenate([*self.rows[self.next_row :], self.waiting])
            self.rows, self.next_row, self.row_length = [], 0, row_length
        if self.next_row == len(self.rows):
            self._pack_window()
        self.next_row += 1
        return self.rows[self.next_row - 1]

    def _pack_window(self) -> None:
        start = self.next_document
        pieces = [self.waiting]
        num_tokens = row_tokens(self.waiting)
        while num_tokens < WINDOW_ROWS * self.row_length:
            more = self._documents(WINDOW_ROWS)
            pieces.append(more)
            num_tokens += row_tokens(more)
        rows = pack_best_fit(np.concatenate(pieces), self.row_length)
        self.waiting = rows.pop() if len(rows) > 1 else np.empty((0, 3), np.int64)
        order = np.random.default_rng([self.key, start, self.row_length]).permutation(len(rows))
        self.rows, self.next_row = [rows[index] for index in order], 0

    def _documents(self, count: int) -> np.ndarray:
        """The next documents of this epoch, at most `count`, as pieces (P, 3)."""
        epoch, position = divmod(self.next_document, self.corpus.num_documents)
        count = min(count, self.corpus.num_documents - position)
        numbers = permute(np.arange(position, position + count), self.corpus.num_documents, self.key + epoch)
        self.next_document += count
        lengths = self.corpus.lengths(numbers)
        return np.stack([numbers, np.zeros_like(lengths), lengths], axis=1)

    def state_dict(self) -> dict:
        """Everything that `take` depends on, as numbers and tensors."""
        rows = self.rows[self.next_row :]
        return {
            "next_document": self.next_document,
            "row_length": self.row_length,
            "row_sizes": torch.tensor([len(row) for row in rows], dtype=torch.int64),
            "pieces": torch.from_numpy(np.concatenate([*rows, self.waiting])),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.next_document, self.row_length, self.next_row = state["next_document"], state["row_length"], 0
        bounds = np.cumsum(state["row_sizes"].numpy())
        *self.rows, self.waiting = np.split(state["pieces"].numpy(), bounds)


def permute(index: np.ndarray, count: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(count), evaluated where asked, without a table of `count` entries.

    A Feistel network over the next even number of bits; values outside the range walk on until they are inside.

    Args:
        index: positions, (N,) int64.
        count: size of the range.
        key: chooses the permutation.

    Returns:
        np.ndarray: (N,) int64.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    round_keys = np.random.default_rng(key).integers(0, 2**63, 4, dtype=np.uint64) | np.uint64(1)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for round_key in round_keys:
            mixed = (right + np.uint64(1)) * round_key
            mixed = (mixed ^ (mixed >> np.uint64(29))) * round_key
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= count
    return value.astype(np.int64)


@dataclass
class Batch:
    """One rank's rows of a step, and what the whole step holds.

    Args:
        input_ids, labels, position_ids: (R_local, L) int64.
        domain_ids: (R_local,) int64, the number of each row's domain.
        weights: scheduled share of each domain.
        tokens_by_domain: tokens without padding, of the whole step.
        predicted_tokens: labels that count in the loss, of the whole step.
        attention_pairs: pairs of a query and a visible key, of the whole step.
        nominal_tokens: rows times length, of the whole step.
        state: what continues after this batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    domain_ids: torch.Tensor
    weights: dict[str, float]
    tokens_by_domain: dict[str, int]
    predicted_tokens: int
    attention_pairs: int
    nominal_tokens: int
    state: dict


class CurriculumLoader:
    """Batches of the curriculum.

    Args:
        corpora: a corpus for each domain of the mixture.
        mixture: shares by tokens seen.
        plan: sequence length and batch size by tokens seen.
        seed: decides the order.
        pad_token_id: fills the ends of rows.
        rank, world_size: this rank reads rows `rank::world_size`.

    Raises:
        ValueError: a domain of the mixture has no corpus or no training document.
    """

    def __init__(
        self,
        corpora: Mapping,
        mixture: Mixture,
        plan: BatchPlan,
        seed: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        missing = [name for name in mixture.shares if name not in corpora or not corpora[name].num_documents]
        if missing:
            raise ValueError(f"domains {missing} have no training documents: give them sources")
        self.names = list(mixture.shares)
        self.mixture, self.plan, self.pad_token_id = mixture, plan, pad_token_id
        self.rank, self.world_size = rank, world_size
        self.streams = {name: DomainStream(corpora[name], name, seed) for name in self.names}
        self.allocator = DomainAllocator(self.names)
        self.tokens_seen = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: Future | None = None

    def next_batch(self) -> Batch:
        """The next step's batch; the one after it is already being read meanwhile."""
        ahead = self._ahead or self._reader.submit(self._make_batch)
        batch = ahead.result()
        self._ahead = self._reader.submit(self._make_batch)
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch whose `state` this is.

        Raises:
            ValueError: the state belongs to other domains or other shards.
        """
        if list(state["streams"]) != self.names:
            raise ValueError(f"the checkpoint's domains are {list(state['streams'])}, the recipe's {self.names}")
        for name, stream in self.streams.items():
            if state["fingerprints"][name] != stream.corpus.fingerprint:
                raise ValueError(
                    f"the checkpoint was trained on other shards of {name!r} than those in data_dir "
                    f"{stream.corpus.folder.parent}: give the data_dir it was trained on, or another output_dir"
                )
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None
        self.tokens_seen = state["tokens_seen"]
        self.allocator.deficit_tokens = dict(state["deficit_tokens"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])

    def state_dict(self) -> dict:
        """The position before the next batch to be made."""
        return {
            "tokens_seen": self.tokens_seen,
            "deficit_tokens": dict(self.allocator.deficit_tokens),
            "fingerprints": {name: stream.corpus.fingerprint for name, stream in self.streams.items()},
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def _make_batch(self) -> Batch:
        weights = self.mixture.weights(self.tokens_seen)
        length, num_rows = self.plan.shape(self.tokens_seen)
        chosen = []
        tokens_by_domain = dict.fromkeys(self.names, 0)
        for _ in range(num_rows):
            domain = self.allocator.choose(weights, length)
            row = self.streams[domain].take(length)
            num_tokens = row_tokens(row)
            self.allocator.record(weights, domain, num_tokens)
            tokens_by_domain[domain] += num_tokens
            chosen.append((domain, row))
        self.tokens_seen += num_rows * length
        sizes = np.concatenate([row[:, 2] - row[:, 1] for _, row in chosen])  # (P,)
        return Batch(
            **self._read_rows(chosen[self.rank :: self.world_size], length),
            weights=weights,
            tokens_by_domain=tokens_by_domain,
            predicted_tokens=int(sizes.sum()) - len(sizes),
            attention_pairs=int((sizes * (sizes + 1) // 2).sum()),
            nominal_tokens=num_rows * length,
            state=self.state_dict(),
        )

    def _read_rows(self, chosen: list, length: int) -> dict[str, torch.Tensor]:
        corpora = {name: stream.corpus for name, stream in self.streams.items()}
        batch = read_rows([(corpora[domain], row) for domain, row in chosen], length, self.pad_token_id)
        batch["domain_ids"] = torch.tensor([self.names.index(domain) for domain, _ in chosen])
        return batch


def read_rows(rows: list, length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Read packed rows, a list of (corpus, pieces), as `input_ids`, `labels` and `position_ids`, each (R, L) int64."""
    arrays = {
        "input_ids": np.full((len(rows), length), pad_token_id, np.int64),  # (R, L)
        "labels": np.full((len(rows), length), IGNORE_INDEX, np.int64),  # (R, L)
        "position_ids": np.zeros((len(rows), length), np.int64),  # (R, L)
    }
    for index, (corpus, row) in enumerate(rows):
        fill_row(corpus, row, *(array[index] for array in arrays.values()))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def heldout_batches(corpus, length: int, batch_rows: int, max_tokens: int, pad_token_id: int) -> list[dict]:
    """Packed held-out rows of a domain, the same ones at every evaluation.

    Args:
        corpus: held-out documents of one domain.
        length: row length, tokens.
        batch_rows: rows of a batch.
        max_tokens: about how many tokens to read, from the first document on.
        pad_token_id: fills the ends of rows.

    Returns:
        list[dict]: batches as `read_rows` makes them.

    Raises:
        ValueError: the domain holds no held-out document.
    """
    if not corpus.num_documents:
        raise ValueError(
            f"domain {corpus.domain!r} has no held-out document: raise heldout_fraction, or set eval_steps 0"
        )
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    used = max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))
    pieces = np.stack([np.arange(used), np.zeros(used, np.int64), lengths[:used]], axis=1)
    rows = [(corpus, row) for row in pack_best_fit(pieces, length)]
    return [
        read_rows(rows[start : start + batch_rows], length, pad_token_id) for start in range(0, len(rows), batch_rows)
    ]
