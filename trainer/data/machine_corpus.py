"""Text that every machine with Python already has: English and code from the standard library, arithmetic from a seed.

It lets the whole pipeline run without any download. Domains: `general` (the language reference in `pydoc_data.topics`
and docstrings), `code` (sources without their docstrings, so that no held-out docstring is trained on as code) and
`math` (worked problems). About a twentieth of the documents is held out by a hash of the text (assumption).
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from trainer.data.arithmetic import generate_problems

DOMAINS = ("general", "code", "math")
HELDOUT_PERCENT = 5
MIN_DOCUMENT_CHARACTERS = 200
PROBLEMS_PER_DOCUMENT = 8
CORPUS_KINDS = ("add", "add", "subtract")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "__pycache__",
}


def machine_documents(domain: str, split: str, max_bytes: int, seed: int = 0) -> Iterator[dict]:
    """Yield documents of a domain, the same ones in the same order on every machine with this Python.

    Args:
        domain: one of `DOMAINS`.
        split: "train" or "heldout".
        max_bytes: stop after this many bytes of UTF-8 text.
        seed: of the arithmetic problems.

    Yields:
        dict: `text`, `source`, `license` and `domain` of a document.

    Raises:
        ValueError: an unknown domain or split.
        FileNotFoundError: this Python was installed without its library's sources.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}; use one of {DOMAINS}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; use 'train' or 'heldout'")
    if domain == "math":
        documents = _math_documents(split, seed)
    else:
        documents = (text for text in _library_documents(domain) if _is_heldout(text) == (split == "heldout"))
    source, license_name = ("generated", "CC0-1.0") if domain == "math" else ("Python standard library", "PSF-2.0")
    num_bytes = 0
    for text in documents:
        num_bytes += len(text.encode())
        if num_bytes > max_bytes:
            return
        yield {"text": text, "source": source, "license": license_name, "domain": domain}


def library_docstrings() -> tuple[tuple[str, str], ...]:
    """(Qualified name, docstring) of the public functions, classes and modules of the standard library."""
    return _library_texts()[0]


@cache
def _library_documents(domain: str) -> tuple[str, ...]:
    """Documents of `general` or `code`, shuffled by their own hash so that any prefix is a fair sample."""
    if domain == "general":
        texts = [*topics.values(), *(f"{name}\n\n{text}" for name, text in library_docstrings())]
    else:
        texts = _library_texts()[1]
    texts = {text.strip() for text in texts if len(text.strip()) >= MIN_DOCUMENT_CHARACTERS}
    return tuple(sorted(texts, key=_digest))


def _math_documents(split: str, seed: int) -> Iterator[str]:
    """Endless documents of worked sums of two-digit numbers; training and held-out operands are disjoint."""
    while True:
        problems = generate_problems(seed, PROBLEMS_PER_DOCUMENT, split, CORPUS_KINDS, min_operand=10)
        yield "\n\n".join(f"Question: {problem.question}\nAnswer: {problem.solution}" for problem in problems)
        seed += 1


@cache
def _library_texts() -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Docstrings with their names, and pieces of code, of the library's sources; the few templates are left out.

    A syntax tree is kept no longer than its file is read: all of them are a million and a half objects.
    """
    root = Path(sysconfig.get_path("stdlib"))
    docstrings, code = [], []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            continue
        source = path.read_text("utf-8", "ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        docstrings += _docstrings(tree, _module_name(path))
        code += _code_chunks(source, tree)
    if not docstrings:
        raise FileNotFoundError(f"no library sources under {root}; install Python with its library's .py files")
    return tuple(docstrings), tuple(code)


def _module_name(path: Path) -> str:
    parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
            yield from _docstrings(child, f"{name}.{child.name}")


def _code_chunks(source: str, tree: ast.Module) -> Iterator[str]:
    """Top-level functions and classes of a file, without docstrings."""
    lines = source.splitlines()
    documented = [n.body[0] for n in ast.walk(tree) if isinstance(n, _DEFINITIONS) and ast.get_docstring(n)]
    hidden = {number for node in documented for number in range(node.lineno, node.end_lineno + 1)}
    for node in tree.body:
        if isinstance(node, _DEFINITIONS):
            numbers = range(node.lineno, node.end_lineno + 1)
            yield "\n".join(lines[number - 1] for number in numbers if number not in hidden)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _is_heldout(text: str) -> bool:
    return int.from_bytes(_digest(text)[-4:], "big") % 100 < HELDOUT_PERCENT
