"""A toy task for attention: which value stood behind this key? The other pairs distract.

A document lists n pairs of words, then after a line break the same pairs in another order:
` key value key value …\\n key value …<end>`. In the second list every value can be told from its key.

Shapes: B documents, T tokens, H query heads, N queries of a batch.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from modeling_motif2.diagnostics import attention_modules
from trainer.data.shards import TokenCorpus

FEWEST_PAIRS, MOST_PAIRS = 2, 16  # assumption, as all numbers here
WORDS = 128
BATCH_DOCUMENTS = 64
MEASURED_DOCUMENTS = 512
WORD = re.compile("Ġ[a-z]{3,7}")


def recall_words(tokenizer) -> list[str]:
    """Words that are one token each behind a space, at most `WORDS`; the first half are keys, the others values.

    Raises:
        ValueError: the vocabulary has too few.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted((word for word in vocabulary if WORD.fullmatch(word)), key=vocabulary.get)[:WORDS]
    if len(words) < 2 * MOST_PAIRS:
        raise ValueError(f"the tokenizer has {len(words)} words of 3 to 7 letters: train one with more entries")
    order = np.random.default_rng(0).permutation(len(words) // 2 * 2)
    return [words[index][1:] for index in order]


def recall_documents(tokenizer, num_tokens: int, seed: int = 0) -> Iterator[dict]:
    """Yield documents until they have about `num_tokens` tokens."""
    words = recall_words(tokenizer)
    keys, values = words[: len(words) // 2], words[len(words) // 2 :]
    rng = np.random.default_rng(seed)
    counts = np.arange(FEWEST_PAIRS, MOST_PAIRS + 1)
    made = 0
    while made < num_tokens:
        count = int(rng.choice(counts, p=1 / counts / (1 / counts).sum()))  # as many tokens of every length
        chosen = zip(rng.choice(len(keys), count, False), rng.choice(len(values), count, False), strict=True)
        pairs = [f" {keys[key]} {values[value]}" for key, value in chosen]
        again = [pairs[index] for index in rng.permutation(count)]
        made += 4 * count + 2
        yield {"text": "".join(pairs) + "\n" + "".join(again), "license": "CC0-1.0"}


@torch.no_grad()
def measure_recall(model: torch.nn.Module, shards) -> dict[str, float]:
    """Accuracy on held-out documents, and where attention looks when the answer is due.

    Args:
        model: with eager attention, whose streams return their maps.
        shards: folder with the domain "recall".

    Returns:
        dict: `recall_accuracy`, and by number of pairs; `<map>_target` and `<map>_distractors`, shares of a signal or
            noise map's mass on the right value and on the other pairs, as a mean over heads and layers; with
            `best_` for the signal head with the most mass on the right value, and the noise map of its group.
    """
    corpus = TokenCorpus(shards, "recall", "heldout")
    numbers = np.arange(min(corpus.num_documents, MEASURED_DOCUMENTS))
    lengths = corpus.lengths(numbers)
    correct: dict[str, list[bool]] = defaultdict(list)
    sums: dict[tuple, torch.Tensor] = {}
    num_queries = 0
    for start in range(0, len(numbers), BATCH_DOCUMENTS):
        part = slice(start, start + BATCH_DOCUMENTS)
        documents = [corpus.tokens(int(n), 0, int(s)) for n, s in zip(numbers[part], lengths[part], strict=True)]
        places = torch.tensor(_places(documents), device=model.device)  # (N, 4)
        ids = np.zeros((len(documents), max(map(len, documents))), np.int64)  # (B, T)
        for row, document in zip(ids, documents, strict=True):
            row[: len(document)] = document
        ids = torch.from_numpy(ids).to(model.device)
        with _recorded_maps(model) as maps:
            logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
        row, query, target, pairs = places.unbind(1)
        hits = logits[row, query].argmax(-1) == ids[row, query + 1]  # (N,)
        for hit, count in zip(hits.tolist(), pairs.tolist(), strict=True):
            correct["recall_accuracy"].append(hit)
            correct[f"recall_accuracy_{_bin(count)}"].append(hit)
        for place, attention_map in maps.items():
            mass = attention_map[row, :, query].float()  # (N, H, T)
            found = mass.gather(2, target[:, None, None].expand(-1, mass.shape[1], 1))[..., 0]  # (N, H)
            columns = torch.arange(mass.shape[2], device=mass.device)
            own = (columns == target[:, None]) | (columns == target[:, None] - 1)  # (N, T)
            distracting = (columns < 2 * pairs[:, None]) & ~own
            distracted = (mass * distracting[:, None]).sum(2)  # (N, H)
            sums[place] = sums.get(place, 0) + torch.stack((found.sum(0), distracted.sum(0))).double().cpu()  # (2, H)
        num_queries += len(places)
    means = {place: total / num_queries for place, total in sums.items()}
    return {name: float(np.mean(hits)) for name, hits in sorted(correct.items())} | _masses(means)


def _places(documents: list[np.ndarray]) -> list[tuple[int, int, int, int]]:
    """Of every query: its document, its key's place, the place of the right value, and the number of pairs."""
    places = []
    for row, document in enumerate(documents):
        count = (len(document) - 2) // 4
        first = {int(key): 2 * index for index, key in enumerate(document[: 2 * count : 2])}
        queries = range(2 * count + 1, 4 * count + 1, 2)
        places += [(row, query, first[int(document[query])] + 1, count) for query in queries]
    return places


def _bin(count: int) -> str:
    """Name of the third of the pair counts that `count` lies in."""
    width = (MOST_PAIRS - FEWEST_PAIRS + 1) // 3
    low = FEWEST_PAIRS + (count - FEWEST_PAIRS) // width * width
    return f"{low}_{low + width - 1}"


class _recorded_maps:
    """Inside the block, `{(layer, "signal" or "noise"): map (B, heads, T, T)}` of the last forward."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.maps, self.handles = model, {}, []

    def __enter__(self) -> dict[tuple[int, str], torch.Tensor]:
        for attention in attention_modules(self.model):
            for name in ("signal", "noise"):
                stream = getattr(attention, name, None)
                if stream is not None:
                    self.handles.append(stream.register_forward_hook(self._keep(attention.layer_idx, name)))
        return self.maps

    def _keep(self, layer: int, name: str):
        def keep(module, arguments, result):
            self.maps[layer, name] = result[1]

        return keep

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def _masses(means: dict[tuple[int, str], torch.Tensor]) -> dict[str, float]:
    """Means over heads and layers, and those of the best head with its group's noise map; see `measure_recall`."""
    found = {}
    for name in ("signal", "noise"):
        own = [mass for (_, stream), mass in means.items() if stream == name]
        if own:
            target, distractors = torch.stack([mass.mean(1) for mass in own]).mean(0).tolist()
            found |= {f"{name}_target": target, f"{name}_distractors": distractors}
    signals = {layer: mass for (layer, stream), mass in means.items() if stream == "signal"}  # (2, H) each
    layer = max(signals, key=lambda layer: float(signals[layer][0].max()))
    head = int(signals[layer][0].argmax())
    best = {"signal": signals[layer][:, head]}
    if (layer, "noise") in means:
        heads, groups = signals[layer].shape[1], means[layer, "noise"].shape[1]
        best["noise"] = means[layer, "noise"][:, head * groups // heads]
    for name, mass in best.items():
        found |= {f"best_{name}_target": float(mass[0]), f"best_{name}_distractors": float(mass[1])}
    return found | {"best_layer": layer}
