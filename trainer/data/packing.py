"""Best-fit packing of documents into rows of one length.

Legend: N documents, P pieces of documents, R rows, L row length, T tokens of a row.
A piece is (document, start, stop); a row is a list of pieces whose lengths add up to at most L.
"""

from bisect import bisect_left, insort

import numpy as np

IGNORE_INDEX = -100


def pack_best_fit(pieces: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Pack pieces into rows: longest first, each into the row it fills best; pieces longer than a row are cut.

    Rows that stay open are emptied into the holes of the fuller ones, so that at most one row, the last, is far from
    full, whatever the lengths. A piece is never cut to less than 1/128 of a row (assumption).

    Args:
        pieces: (P, 3) int64, document, start, stop.
        row_length: L, tokens.

    Returns:
        list[np.ndarray]: R arrays (P_r, 3), fullest row first.

    Raises:
        ValueError: `row_length` is below 2.
    """
    if row_length < 2:
        raise ValueError(f"row_length must be at least 2 tokens, got {row_length}")
    full, rest = _cut_long(pieces, row_length)
    rows: list[list[tuple[int, int, int]]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in sorted(rest, key=lambda piece: piece[1] - piece[2]):
        length = piece[2] - piece[1]
        best = bisect_left(spaces, (length, -1))
        if best == len(spaces):
            rows.append([])
            space, row = row_length, len(rows) - 1
        else:
            space, row = spaces.pop(best)
        rows[row].append(piece)
        if space > length:
            insort(spaces, (space - length, row))
    _fill_holes(rows, spaces, row_length)
    packed = [*([piece] for piece in full), *(row for row in rows if row)]
    packed.sort(key=lambda row: -sum(stop - start for _, start, stop in row))
    return [np.array(row, np.int64) for row in packed]


def _cut_long(pieces: np.ndarray, row_length: int) -> tuple[list, list]:
    """Pieces that fill a row exactly, and the shorter rest."""
    full, rest = [], []
    for document, start, stop in pieces.tolist():
        while stop - start >= row_length:
            full.append((document, start, start + row_length))
            start += row_length
        if stop > start:
            rest.append((document, start, stop))
    return full, rest


def _fill_holes(rows: list[list], spaces: list[tuple[int, int]], row_length: int) -> None:
    """Move the pieces of the emptiest rows into the holes of the others, cutting them where they do not fit."""
    shortest = max(1, row_length // 128)
    holes = [(space, row) for space, row in spaces if space >= shortest]
    while len(holes) > 1:
        donor_space, donor = holes.pop()
        while rows[donor] and holes:
            space, row = holes.pop()
            document, start, stop = rows[donor].pop()
            taken = min(space, stop - start)
            if 0 < stop - start - taken < shortest:
                taken = stop - start - shortest
            if taken < min(shortest, stop - start):
                rows[donor].append((document, start, stop))
                continue
            rows[row].append((document, start, start + taken))
            donor_space += taken
            if start + taken < stop:
                rows[donor].append((document, start + taken, stop))
            if space - taken >= shortest:
                insort(holes, (space - taken, row))
        if rows[donor]:
            insort(holes, (donor_space, donor))
            return


def row_tokens(row: np.ndarray) -> int:
    """Tokens of a row without padding."""
    return int((row[:, 2] - row[:, 1]).sum())


def fill_row(corpus, row: np.ndarray, input_ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray) -> None:
    """Write one packed row into a batch.

    Positions restart with every piece, which makes attention block-diagonal. A piece's first token is predicted by
    nothing, so its label is ignored. Padding is one more piece that only sees itself and is never predicted.

    Args:
        corpus: gives `tokens(document, start, stop)`.
        row: (P, 3) pieces.
        input_ids, labels, position_ids: (T,) int64, written in place; `input_ids` must hold padding.
    """
    labels.fill(IGNORE_INDEX)
    offset = 0
    for document, start, stop in row.tolist():
        end = offset + stop - start
        input_ids[offset:end] = corpus.tokens(document, start, stop)
        labels[offset + 1 : end] = input_ids[offset + 1 : end]
        position_ids[offset:end] = np.arange(stop - start)
        offset = end
    position_ids[offset:] = np.arange(len(position_ids) - offset)
