import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import IGNORE_INDEX, fill_row, pack_best_fit, row_tokens


def whole_documents(lengths) -> np.ndarray:
    return np.array([(index, 0, length) for index, length in enumerate(lengths)], np.int64).reshape(-1, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=120), st.sampled_from([2, 16, 128, 300]))
def test_every_token_is_packed_once_and_no_row_overflows(lengths, row_length):
    rows = pack_best_fit(whole_documents(lengths), row_length)
    seen = [np.zeros(length, int) for length in lengths]
    for row in rows:
        assert 0 < row_tokens(row) <= row_length
        for document, start, stop in row:
            seen[document][start:stop] += 1
    assert all((counts == 1).all() for counts in seen)


@pytest.mark.parametrize("lengths", [[154] * 3000, [129, 128, 127] * 1000, [200, 40, 17] * 1000])
def test_padding_is_under_one_percent_even_for_awkward_lengths(lengths):
    rows = pack_best_fit(whole_documents(lengths), 256)
    assert sum(lengths) / (len(rows) * 256) > 0.99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1023), min_size=1, max_size=60))
def test_no_piece_is_cut_to_a_crumb(lengths):
    for document, start, stop in np.concatenate(pack_best_fit(whole_documents(lengths), 1024)):
        assert stop - start >= min(8, lengths[document])  # 1/128 of a row


def test_documents_that_fit_are_not_cut():
    rows = pack_best_fit(whole_documents([60, 30, 70, 40, 100]), 100)
    assert sorted(sorted(row[:, 0].tolist()) for row in rows) == [[0, 3], [1, 2], [4]]


class Numbers:
    def tokens(self, document, start, stop):
        return np.arange(start, stop) + 100 * document


def test_fill_row_restarts_positions_and_hides_first_tokens():
    ids, labels, positions = np.full(9, 7), np.zeros(9, int), np.zeros(9, int)
    fill_row(Numbers(), np.array([(1, 0, 3), (2, 5, 9)]), ids, labels, positions)
    assert ids.tolist() == [100, 101, 102, 205, 206, 207, 208, 7, 7]
    assert labels.tolist() == [IGNORE_INDEX, 101, 102, IGNORE_INDEX, 206, 207, 208, IGNORE_INDEX, IGNORE_INDEX]
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
