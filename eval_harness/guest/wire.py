"""What crosses between the judge and the program it judges: plain data only, in a format of our own.

Runs inside the sandbox, where every import costs a program's start-up: builtins only. A value is a tag, and a length
or a text; nothing that is read can run code. Objects that are not plain data stay where they are; a number stands for
them (`Remote`).
"""

import posix

MAX_MESSAGE_BYTES = 8 * 2**20
MAX_DEPTH = 200
_SEQUENCES = {"l": list, "t": tuple, "e": set, "z": frozenset}
_TAGS = {kind: tag for tag, kind in _SEQUENCES.items()}


class Remote:
    """An object of the other side, known by its number."""

    def __init__(self, number, kind="object"):
        self.__dict__.update(_number=number, _kind=kind)


def encode(value, keep=None, depth=0):
    """Write a value as bytes.

    Args:
        value: None, numbers, text, bytes, ranges, and lists, tuples, sets and dicts of them. Subclasses travel as the
            plain type below them, so that an overridden comparison stays at home.
        keep: takes any other object and returns its number; None refuses such objects.
        depth: nesting so far.

    Raises:
        TypeError: an object that is no plain data, where none may be kept.
        ValueError: nested deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")
    if value is None or value is True or value is False:
        return {None: b"N", True: b"T", False: b"F"}[value]
    if isinstance(value, int):
        return _text("i", hex(int.__index__(value)))
    if isinstance(value, float):
        return _text("f", float.__repr__(value))
    if isinstance(value, complex):
        return _text("c", complex.__repr__(value))
    if isinstance(value, str):
        return _text("s", str.__str__(value))
    if isinstance(value, (bytes, bytearray)):
        return _frame("b", bytes(value))
    if isinstance(value, range):
        return b"r" + b"".join(encode(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        pairs = [(key, dict.__getitem__(value, key)) for key in dict.__iter__(value)]
        inner = b"".join(encode(part, keep, depth + 1) for pair in pairs for part in pair)
        return b"d%d:" % len(pairs) + inner
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            items = list(kind.__iter__(value))
            return tag.encode() + b"%d:" % len(items) + b"".join(encode(item, keep, depth + 1) for item in items)
    if isinstance(value, Remote):
        return _text("o", f"{value._number} {value._kind}")
    if keep is None:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the program")
    return _text("o", f"{keep(value)} {type(value).__name__}")


def decode(payload, find=Remote):
    """Read the value that `encode` wrote; `find(number, kind)` gives the object for a number.

    Raises:
        ValueError: the bytes are no such value, or nested deeper than MAX_DEPTH.
    """
    try:
        value, end = _read(payload, 0, find, 0)
    except (IndexError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"unreadable message: {error!r}") from None
    if end != len(payload):
        raise ValueError("unreadable message: bytes are left over")
    return value


def _read(payload, position, find, depth):
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")
    tag, position = chr(payload[position]), position + 1
    if tag in "NTF":
        return {"N": None, "T": True, "F": False}[tag], position
    if tag == "r":
        parts = []
        for _ in range(3):
            part, position = _read(payload, position, find, depth + 1)
            parts.append(part)
        return range(*parts), position
    colon = payload.index(b":", position, position + 12)
    size, position = int(payload[position:colon]), colon + 1
    if size < 0 or size > len(payload) - position:
        raise ValueError("unreadable message: a length exceeds the message")
    if tag in "ltezd":
        items = []
        for _ in range(size * (2 if tag == "d" else 1)):
            item, position = _read(payload, position, find, depth + 1)
            items.append(item)
        if tag == "d":
            return dict(zip(items[::2], items[1::2], strict=True)), position
        return _SEQUENCES[tag](items), position
    body, position = payload[position : position + size], position + size
    if tag == "b":
        return body, position
    text = body.decode("utf-8", "surrogatepass")
    if tag == "o":
        number, _, kind = text.partition(" ")
        return find(int(number), kind), position
    reader = {"i": lambda digits: int(digits, 16), "f": float, "c": complex, "s": str}[tag]
    return reader(text), position


def send(descriptor, payload):
    """Write one message."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message has {len(payload)} bytes, more than {MAX_MESSAGE_BYTES}")
    payload = len(payload).to_bytes(4, "big") + payload
    while payload:
        payload = payload[posix.write(descriptor, payload) :]


def receive(descriptor):
    """Read one message; None when the other side has closed."""
    head = _exactly(descriptor, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "big")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes is announced, more than {MAX_MESSAGE_BYTES}")
    return _exactly(descriptor, size)


def read_all(descriptor):
    """Everything up to the end of a file."""
    parts = []
    while part := posix.read(descriptor, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def _exactly(descriptor, size):
    parts = []
    while size:
        part = posix.read(descriptor, min(size, 1 << 16))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _text(tag, text):
    return _frame(tag, text.encode("utf-8", "surrogatepass"))


def _frame(tag, body):
    return tag.encode() + b"%d:" % len(body) + body
