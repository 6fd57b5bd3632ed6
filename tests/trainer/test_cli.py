"""A recipe sets values, the command line wins, and what is mistyped is named with the nearest known key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from trainer.cli import parse_recipe


@dataclass
class Settings:
    learning_rate: float = field(default=1e-3, metadata={"help": "peak"})
    num_steps: int = field(default=10, metadata={"help": "steps"})
    dry_run: bool = field(default=False, metadata={"help": "print and exit"})
    precision: Literal["no", "bf16"] = field(default="no", metadata={"help": "arithmetic"})
    files: list[str] = field(default_factory=list, metadata={"help": "inputs"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder"})

    def __post_init__(self):
        if self.num_steps <= 0:
            raise ValueError(f"num_steps is {self.num_steps}; use 1 or more")


def read(tmp_path, recipe: str, *words: str) -> Settings:
    (tmp_path / "recipe.yaml").write_bytes(recipe.encode("utf-8", "surrogateescape"))
    (settings,) = parse_recipe(Settings, description="", argv=["--config", str(tmp_path / "recipe.yaml"), *words])
    return settings


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path):
    settings = read(tmp_path, "learning_rate: 4e-4\nnum_steps: 7\n", "--num_steps", "3", "--dry_run")
    assert (settings.learning_rate, settings.num_steps, settings.dry_run) == (4e-4, 3, True)


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("learning_rat: 1.0\n", (), "did you mean 'learning_rate'"),
        ("num_steps: 5\n", ("--num_step", "3"), "did you mean 'num_steps'"),
        ("num_steps: 0\n", (), "num_steps is 0; use 1 or more"),
        ("- a\n", (), "must hold"),
        ("a: [\n", (), "not valid YAML"),
        ("num_steps: 5\nnum_steps: 6\n", (), "not valid YAML: 'num_steps' is given twice, again in line 2"),
        ("a: {b: {c: 1, d: 2, c: 3}}\n", (), "'c' is given twice"),
        ("num_steps: \udcff\n", (), "not valid YAML"),
        ("num_steps: many\n", (), "cannot be read"),
        ("num_steps: 2.5\n", (), "num_steps: 2.5 in"),
        ("num_steps: true\n", (), "write a whole number"),
        ("num_steps:\n", (), "is empty; write a whole number"),
        ("learning_rate: [1]\n", (), "write a number"),
        ("precision: no\n", (), "write one of 'no', 'bf16'"),
        ("files: a.jsonl\n", (), "write a list, each entry text"),
        ("files: [1]\n", (), "write a list, each entry text"),
        ("tokenizer: 7\n", (), "write text (in quotes) or nothing"),
        ("dry_run: 1\n", (), "write true or false"),
        ("num_steps: 5\n", ("--config", "other.yaml"), "--config is given 2 times"),
        ("num_steps: 5\n", ("--config=other.yaml",), "--config is given 2 times"),
    ],
)
def test_bad_settings_are_refused_with_the_mend(tmp_path, capsys, recipe, words, message):
    with pytest.raises(SystemExit):
        read(tmp_path, recipe, *words)
    printed = capsys.readouterr().err
    assert message in printed
    assert "usage" not in printed  # a hundred settings before the one line that matters


def test_values_of_the_right_types_pass(tmp_path):
    settings = read(tmp_path, "learning_rate: 1\ntokenizer: null\nfiles: [a, b]\nprecision: bf16\ndry_run: yes\n")
    assert (settings.learning_rate, settings.tokenizer, settings.files) == (1, None, ["a", "b"])
    assert (settings.precision, settings.dry_run) == ("bf16", True)


def test_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(Settings, description="", argv=["--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err
