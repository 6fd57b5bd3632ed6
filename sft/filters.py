"""What is already there and what must not be trained on: near-duplicates (MinHash) and evaluation text (13-grams).

Shapes: N rows, B of them at a time, H hidden size.
"""

import json
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy
from datasketch import MinHash, MinHashLSH

# Kana and Chinese characters, which stand without spaces between words: each counts as a word (assumption).
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
SHINGLE_WORDS = 5
NGRAM_WORDS = 13
# A shorter evaluation text is looked for as a whole, if it has at least so many words (assumption).
SHORTEST_TEXT_WORDS = 8
BLOCK_ROWS = 256


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without punctuation; Chinese and Japanese characters one by one."""
    return _WORD.findall(text.lower())


def _ngrams(tokens: list[str], length: int) -> Iterator[bytes]:
    for start in range(len(tokens) - length + 1):
        yield " ".join(tokens[start : start + length]).encode()


def _hashed(grams: Iterable[bytes]) -> set[bytes]:
    return {blake2b(gram, digest_size=8).digest() for gram in grams}


def nested_texts(value: object) -> Iterator[str]:
    """Every text and number in nested lists and objects, in order."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(value)
        elif isinstance(value, dict | list | tuple):
            waiting += reversed(list(value.values() if isinstance(value, dict) else value))


def conversation_text(row: dict) -> str:
    """All that a conversation says, turn by turn."""
    return "\n".join(map(message_text, row["messages"]))


def message_text(message: dict) -> str:
    """All that a turn says: thinking, text and calls (names and arguments), in lines."""
    texts = [message.get("reasoning_content"), message.get("content")]
    for call in message.get("tool_calls") or []:
        inner = call.get("function") or call
        arguments = inner["arguments"]
        texts += [inner["name"], *nested_texts(json.loads(arguments) if isinstance(arguments, str) else arguments)]
    return "\n".join(text for text in texts if text)


class NearDuplicates:
    """Finds texts that are nearly the same as one added before.

    Args:
        threshold: Jaccard similarity of five-word shingles from which two texts count as the same.
        num_permutations: MinHash length; the estimate's error is about its inverse square root.

    Raises:
        ValueError: the threshold is not between 0 and 1.
    """

    def __init__(self, threshold: float = 0.8, num_permutations: int = 128):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; use a similarity between 0 and 1, such as 0.8")
        self.threshold = threshold
        self._template = MinHash(num_perm=num_permutations, seed=1)
        self._index = MinHashLSH(threshold=threshold, num_perm=num_permutations)
        self._added: list[tuple[str, MinHash]] = []

    def add(self, key: str, text: str) -> str | None:
        """Add a text, unless one like it is there.

        Args:
            key: names the text.
            text: compared by its words, without case and punctuation.

        Returns:
            str | None: the key of the earlier text that it repeats (it is then not added), or None.
        """
        tokens = words(text)
        grams = set(_ngrams(tokens, SHINGLE_WORDS)) or {" ".join(tokens).encode()}
        sketch = self._template.copy()
        sketch.update_batch(sorted(grams))
        for candidate in sorted(self._index.query(sketch)):
            earlier, known = self._added[candidate]
            if sketch.jaccard(known) >= self.threshold:
                return earlier
        self._index.insert(len(self._added), sketch)
        self._added.append((key, sketch))
        return None


class Contamination:
    """Finds text of the evaluation sets: any 13 words in a row, or a short evaluation text as a whole.

    Args:
        texts: questions and answers of the evaluation sets.

    Source: the 13-gram rule of GPT-3 (arXiv 2005.14165, appendix C).
    """

    def __init__(self, texts: Iterable[str]):
        self._grams: dict[int, set[bytes]] = {}
        self.num_texts = 0
        for text in texts:
            tokens = words(text)
            length = min(NGRAM_WORDS, len(tokens))
            if length >= SHORTEST_TEXT_WORDS:
                self.num_texts += 1
                self._grams.setdefault(length, set()).update(_hashed(_ngrams(tokens, length)))

    def found_in(self, text: str) -> bool:
        """Whether a text shares a marked run of words with an evaluation text."""
        tokens = words(text)
        return any(not known.isdisjoint(_hashed(_ngrams(tokens, length))) for length, known in self._grams.items())


def nearest_by_embedding(embeddings: numpy.ndarray, threshold: float) -> dict[int, int]:
    """Rows that repeat an earlier row in meaning.

    Args:
        embeddings: (N, H) float, one row a text; scaled to unit length here.
        threshold: cosine similarity from which two texts count as the same.

    Returns:
        dict: index of each row that repeats one that is kept, with the index of that row.
    """
    unit = embeddings / numpy.maximum(numpy.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)  # (N, H)
    kept = numpy.empty_like(unit)  # (N, H), of which the first len(originals) rows are set
    originals: list[int] = []  # index of each kept row
    repeats: dict[int, int] = {}
    for start in range(0, len(unit), BLOCK_ROWS):
        block = unit[start : start + BLOCK_ROWS]  # (B, H)
        before = len(originals)
        earlier = block @ kept[:before].T  # (B, before)
        within = block @ block.T  # (B, B)
        for row in range(len(block)):
            new = [index - start for index in originals[before:]]
            similarity = numpy.concatenate([earlier[row], within[row, new]])  # (kept,)
            if similarity.size and similarity.max() >= threshold:
                repeats[start + row] = originals[int(similarity.argmax())]
            else:
                kept[len(originals)] = block[row]
                originals.append(start + row)
    return repeats
