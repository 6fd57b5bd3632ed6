import numpy as np
import pytest
import torch

from tests.trainer.data.conftest import make_documents, make_tokenizer
from trainer.data.curriculum import DomainShare, Mixture
from trainer.data.loader import CurriculumLoader, heldout_batches, permute
from trainer.data.packing import IGNORE_INDEX
from trainer.data.shards import TokenCorpus, build_shards
from trainer.schedules import BatchPlan

SHARES = {"a": DomainShare(0.75, 0.25), "b": DomainShare(0.25, 0.75)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    domains = {"a": make_documents(400), "b": make_documents(300, shift=3)}
    build_shards(folder, domains, make_tokenizer(), shard_tokens=3000, heldout_fraction=0.1, progress=False)
    return folder


def make_loader(folder, rank=0, world_size=1, seed=0, lengths=None, batch_tokens=512):
    corpora = {name: TokenCorpus(folder, name) for name in SHARES}
    plan = BatchPlan(batch_tokens, lengths or {0: 64}, rows_multiple=4)
    return CurriculumLoader(corpora, Mixture(SHARES, 100_000), plan, seed, 0, rank, world_size)


def take(loader, count):
    batches = [loader.next_batch() for _ in range(count)]
    loader.close()
    return batches


def same(left, right):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("input_ids", "labels", "position_ids", "domain_ids")
    )


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000, 4097])
def test_permute_is_a_permutation_that_depends_on_the_key(count):
    first, second = permute(np.arange(count), count, 1), permute(np.arange(count), count, 2)
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 10:
        assert (first != second).any()
        assert abs(np.corrcoef(np.arange(count), first)[0, 1]) < 0.6


def test_order_depends_on_the_seed_alone(folder):
    assert same(take(make_loader(folder), 20), take(make_loader(folder), 20))
    assert not same(take(make_loader(folder), 1), take(make_loader(folder, seed=1), 1))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_rows_of_a_step(folder, world_size):
    whole = take(make_loader(folder), 5)
    ranks = [take(make_loader(folder, rank, world_size), 5) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = torch.stack([rank[step].input_ids for rank in ranks], dim=1).flatten(0, 1)
        assert torch.equal(parts, batch.input_ids)
        assert all(rank[step].tokens_by_domain == batch.tokens_by_domain for rank in ranks)


@pytest.mark.parametrize("lengths", [{0: 64}, {0: 64, 6 * 512: 128}])
def test_a_restart_continues_the_order(folder, lengths):
    whole = take(make_loader(folder, lengths=lengths), 40)
    for stop in (1, 5, 6, 23):
        loader = make_loader(folder, lengths=lengths)
        loader.load_state_dict(whole[stop - 1].state)
        assert same(whole[stop:], take(loader, 40 - stop))


def test_an_epoch_reads_every_token_once_across_length_changes(folder):
    corpus = TokenCorpus(folder, "a")
    loader = make_loader(folder, lengths={0: 64, 3 * 512: 128, 6 * 512: 32})
    stream = loader.streams["a"]
    seen = np.zeros((2, corpus.num_documents, 64), int)
    counts = []
    for length in [64] * 11 + [128] * 7 + [32] * 30:
        counts.extend(map(tuple, stream.take(length)))
    for document, start, stop in counts:
        seen[0, document, start:stop] += 1
    left = [*stream.rows[stream.next_row :], stream.waiting]
    for document, start, stop in np.concatenate(left):
        seen[1, document, start:stop] += 1
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    expected = np.arange(64) < lengths[:, None]
    epochs, rest = divmod(stream.next_document, corpus.num_documents)
    total = seen.sum(0)
    assert ((total == epochs * expected) | (total == (epochs + 1) * expected)).all()
    assert (total[:, 0] == epochs + 1).sum() == rest


def test_counts_describe_the_whole_step(folder):
    (batch,) = take(make_loader(folder), 1)
    assert batch.nominal_tokens == batch.input_ids.numel() == 512
    assert (batch.labels != IGNORE_INDEX).sum() == batch.predicted_tokens
    pairs = 0
    for row in batch.position_ids:
        pairs += int((row + 1).sum())
    padding = 512 - sum(batch.tokens_by_domain.values())
    assert padding < 0.03 * 512
    assert batch.attention_pairs <= pairs <= batch.attention_pairs + padding * (padding + 1) // 2


def test_realised_shares_follow_the_schedule_over_any_thousand_steps(folder):
    loader = make_loader(folder, batch_tokens=256)
    loader.mixture = Mixture(SHARES, 1400 * 256)
    batches = take(loader, 1400)
    totals = np.array([sum(batch.tokens_by_domain.values()) for batch in batches])
    for name in SHARES:
        ahead = [b.tokens_by_domain[name] - b.weights[name] * total for b, total in zip(batches, totals, strict=True)]
        windows = np.convolve(ahead, np.ones(1000), "valid") / np.convolve(totals, np.ones(1000), "valid")
        assert len(windows) == 401
        assert np.abs(windows).max() < 1e-3
    assert 1 - totals.sum() / (1400 * 256) < 0.01


def test_every_epoch_has_an_order_of_its_own(folder):
    stream = make_loader(folder).streams["a"]
    count = stream.corpus.num_documents
    first, second = (stream._documents(count)[:, 0].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second


def test_the_rows_of_a_window_are_shuffled(folder):
    """Packed, those with the longest documents come first."""
    stream = make_loader(folder).streams["a"]
    stream.take(64)
    longest = [(row[:, 2] - row[:, 1]).max() for row in stream.rows]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3


class Equal:
    """Documents of one length."""

    num_documents, fingerprint = 100, ""

    def __init__(self, length: int):
        self.length = length

    def lengths(self, documents):
        return np.full(len(documents), self.length)

    def tokens(self, document, start, stop):
        return np.zeros(stop - start, np.uint16)


def test_padding_is_not_booked_for_a_domain():
    shares = {"a": DomainShare(0.5, 0.5), "b": DomainShare(0.5, 0.5)}
    corpora = {"a": Equal(255), "b": Equal(256)}
    (batch,) = take(CurriculumLoader(corpora, Mixture(shares, 10**6), BatchPlan(8 * 256, {0: 256}), 0, 0), 1)
    assert batch.tokens_by_domain == {"a": 4 * 255, "b": 4 * 256}
    assert batch.state["deficit_tokens"] == {"a": 2, "b": -2}


def test_heldout_batches_are_packed_and_bounded(folder):
    corpus = TokenCorpus(folder, "a", "heldout")
    batches = heldout_batches(corpus, 64, 2, max_tokens=200, pad_token_id=0)
    tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert 100 < tokens <= 200
    assert all(batch["input_ids"].shape[0] <= 2 for batch in batches)


def test_a_domain_without_documents_is_refused(folder):
    with pytest.raises(ValueError, match=r"\['b'\] have no training"):
        CurriculumLoader({"a": TokenCorpus(folder, "a")}, Mixture(SHARES, 10), BatchPlan(64, {0: 64}), 0, 0)


def test_another_mixture_is_refused_at_restart(folder):
    (batch,) = take(make_loader(folder), 1)
    state = batch.state | {"streams": {"c": {}}}
    with pytest.raises(ValueError, match="checkpoint's domains"):
        make_loader(folder).load_state_dict(state)


def test_other_shards_are_refused_at_restart(folder, tmp_path):
    (batch,) = take(make_loader(folder), 1)
    domains = {"a": make_documents(400, shift=1), "b": make_documents(300, shift=3)}
    build_shards(tmp_path, domains, make_tokenizer(), shard_tokens=3000, heldout_fraction=0.1, progress=False)
    make_loader(folder).load_state_dict(batch.state)
    with pytest.raises(ValueError, match="trained on other shards of 'a'"):
        make_loader(tmp_path).load_state_dict(batch.state)
