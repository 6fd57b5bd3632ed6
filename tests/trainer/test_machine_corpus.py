"""The corpus from the machine: same text every time, held-out text nowhere in the training text, bounded size."""

import pytest

from trainer.data.machine_corpus import DOMAINS, library_docstrings, machine_documents


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_repeat_and_stay_within_the_limit(domain):
    first = list(machine_documents(domain, "train", 200_000))
    assert first == list(machine_documents(domain, "train", 200_000))
    size = sum(len(document["text"].encode()) for document in first)
    assert 150_000 < size <= 200_000
    assert {document["domain"] for document in first} == {domain}


def test_heldout_documents_appear_in_no_training_text():
    heldout = [document["text"] for document in machine_documents("general", "heldout", 50_000)]
    assert len(heldout) > 10
    for domain in ("general", "code"):
        training = "\0".join(document["text"] for document in machine_documents(domain, "train", 20_000_000))
        assert not [text for text in heldout if text in training]


def test_code_has_no_docstrings_and_general_has():
    names = dict(library_docstrings())
    docstring = names["bisect.bisect_right"].splitlines()[0]
    code = "\n".join(document["text"] for document in machine_documents("code", "train", 20_000_000))
    assert docstring not in code
    assert "def bisect_right(" in code or "def insort_right(" in code


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="poetry"):
        next(machine_documents("poetry", "train", 10))
    with pytest.raises(ValueError, match="'all'"):
        next(machine_documents("math", "all", 10))
