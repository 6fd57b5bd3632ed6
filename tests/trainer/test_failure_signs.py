"""Each signature of a failing run raises its named warning once, and again only after it was gone."""

from trainer.failure_signs import (
    FailureSigns,
    FailureWarning,
    MemorySpikeWarning,
    NoiseHeadsGrowingWarning,
    StalledLossWarning,
)


def entry(step: int, **values) -> dict:
    return {"step": step, "loss": 5.0 - 0.1 * step, "skipped": False, "sequence_length": 32, **values}


def kinds(signs: FailureSigns, entries) -> list[list[type]]:
    return [[type(warning) for warning in signs.read(entry)] for entry in entries]


def test_growing_noise_heads_are_named_with_their_layer(make_config):
    signs = FailureSigns(make_config(warn_noise_share=0.9))
    shares = [[0.2, 0.3], [0.2, 0.95], [0.2, 0.97], [0.2, 0.5], [0.2, 0.91]]
    entries = [entry(step, noise_shares=share, lambdas=[0.2, 0.8]) for step, share in enumerate(shares)]
    between = [entry(9)]  # a step that did not measure tells nothing
    assert kinds(signs, entries[:2] + between) == [[], [NoiseHeadsGrowingWarning], []]
    assert kinds(signs, entries[2:]) == [[], [], [NoiseHeadsGrowingWarning]]
    (warning,) = FailureSigns(make_config()).read(entries[2])
    assert "in layer 1 lambda (0.80)" in str(warning)
    assert isinstance(warning, FailureWarning)


def test_a_memory_spike_is_named_and_longer_rows_are_none(make_config):
    signs = FailureSigns(make_config(warn_memory_rise=0.2))
    usual = [entry(step, peak_memory_bytes=10 * 2**30 + step) for step in range(60)]
    assert not any(kinds(signs, usual))
    assert kinds(signs, [entry(60, peak_memory_bytes=11 * 2**30)]) == [[]]
    (warning,) = signs.read(entry(61, peak_memory_bytes=13 * 2**30))
    assert type(warning) is MemorySpikeWarning
    assert "13.00 GiB from usually 10.00 GiB" in str(warning)
    longer = [entry(62, peak_memory_bytes=40 * 2**30, sequence_length=64)]
    assert kinds(signs, longer) == [[]]


def test_a_stalled_loss_is_named(make_config):
    signs = FailureSigns(make_config(warn_stall_steps=20, warn_stall_drop=0.001))
    falling = [entry(step) for step in range(40)]
    flat = [entry(step, loss=1.0 + 0.0001 * (step % 2)) for step in range(40, 80)]
    assert not any(kinds(signs, falling))
    found = kinds(signs, flat)
    assert [index for index, kind in enumerate(found) if kind] == [19]
    assert found[19] == [StalledLossWarning]
    off = FailureSigns(make_config(warn_stall_steps=0))
    assert not any(kinds(off, flat))
    skipped = FailureSigns(make_config(warn_stall_steps=5))
    assert not any(kinds(skipped, [entry(step, loss=float("nan"), skipped=True) for step in range(9)]))
