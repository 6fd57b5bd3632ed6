"""Answers that were paid for, written down one by one, so that a run that was interrupted goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path

from sft.files import new_train_file, write_lines, write_text

JOURNAL_FILE = "journal.jsonl"
SETTINGS_FILE = "settings.json"


class Journal:
    """The finished pieces of a run, one JSON line each.

    Args:
        folder: of the run.
        identity: settings that must be the same at every start.
        key: field of a line that names the piece.
        work: what the run is called in an error.

    Raises:
        ValueError: the folder holds a finished run, one with other settings, or a journal that is none.
    """

    def __init__(self, folder: str | Path, identity: dict, key: str = "task", work: str = "synthesis"):
        self.folder = Path(folder)
        self.path = self.folder / JOURNAL_FILE
        self.identity, self.key = identity, key
        new_train_file(folder, f"a finished {work}")
        known = self.folder / SETTINGS_FILE
        try:
            before = json.loads(known.read_text(encoding="utf-8")) if known.exists() else identity
            self.done = {line[key]: line for line in self._read()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output_dir {str(folder)!r} holds no readable {work}: {error!r}; remove it") from error
        changed = [name for name in identity if before.get(name, identity[name]) != identity[name]]
        if changed:
            changes = ", ".join(f"{name} {before.get(name)!r} -> {identity[name]!r}" for name in changed)
            raise ValueError(
                f"output_dir {str(folder)!r} holds a {work} with other settings ({changes}); restore them, "
                "choose another folder, or remove this one"
            )

    def _read(self) -> Iterator[dict]:
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        yield from map(json.loads, lines[:-1])  # what follows the last end was cut short, perhaps in a character

    def open(self) -> None:
        """Make the folder, and drop a line that was cut short; the journal is replaced as a whole."""
        write_text(json.dumps(self.identity, indent=1) + "\n", self.folder / SETTINGS_FILE)
        write_lines(self.done.values(), self.path)

    def add(self, line: dict) -> None:
        """Write down one finished piece."""
        self.done[line[self.key]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
