"""One way to read settings for every entry point: a YAML recipe, then the command line, which wins.

Built on TRL's `TrlParser` (dataclasses and YAML). It adds what a person mistyping a key needs: the nearest known key.
"""

import difflib
import itertools
import sys
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        for number, (key, _) in enumerate(node.value):
            if key.value in [earlier.value for earlier, _ in node.value[:number]]:
                raise yaml.YAMLError(f"{key.value!r} is given twice, again in line {key.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class RecipeParser(TrlParser):
    """Parser of `--config recipe.yaml --key value …` into dataclasses; unknown keys are fatal."""

    def __init__(self, *config_classes: type, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(list(config_classes), **kwargs)
        self.add_argument("--config", metavar="RECIPE", help="YAML recipe; settings on the command line win over it")

    def parse(self, argv: list[str] | None = None) -> tuple:
        """Parse `argv` (default: the process's) into one instance of each dataclass.

        Raises:
            SystemExit: the recipe cannot be read, a key is unknown (the nearest known key is named), or a dataclass
                refuses a value in its `__post_init__`.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        recipes = self._recipes(argv)
        if len(recipes) > 1:
            self.error(f"--config is given {len(recipes)} times ({', '.join(recipes)}); one run reads one recipe")
        if recipes:
            self.set_defaults(**self._read_recipe(recipes[0]))
        namespace, rest = self.parse_known_args(argv)
        for word in rest:
            self._refuse_unknown(word, "on the command line")
        values = vars(namespace)
        values.pop("config", None)
        try:
            return tuple(
                config_class(**{name: values[name] for name in self._init_fields(config_class) if name in values})
                for config_class in self.dataclass_types
            )
        except (ValueError, TypeError) as error:
            self.error(str(error))

    def error(self, message: str):
        """Say what is wrong, without the whole list of settings before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    @staticmethod
    def _init_fields(config_class: type) -> list[str]:
        return [name for name, field in config_class.__dataclass_fields__.items() if field.init]

    @staticmethod
    def _recipes(argv: list[str]) -> list[str]:
        """The values of `--config`, in both of its spellings."""
        apart = [after for word, after in itertools.pairwise(argv) if word == "--config"]
        return apart + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]

    def _read_recipe(self, path: str) -> dict:
        if not Path(path).is_file():
            self.error(f"recipe {path!r} does not exist; recipes are the YAML files under recipes/")
        try:
            recipe = yaml.load(Path(path).read_text(), _UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"recipe {path!r} is not valid YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"recipe {path!r} must hold `key: value` lines, got {type(recipe).__name__}")
        known = self._known_keys()
        for key in recipe:
            if key not in known:
                self._refuse_unknown(key, f"in {path}")
        for action in self._actions:
            if action.dest in recipe:
                action.required = False
        return {key: self._coerce(key, value, path) for key, value in recipe.items()}

    def _coerce(self, key: str, value, path: str):
        """The value as the field's type; numbers that YAML reads as text (`1e-3`) become numbers.

        Raises:
            SystemExit: the recipe holds a value of another type.
        """
        action = next(action for action in self._actions if action.dest == key)
        hint = self._hint(key)
        if isinstance(value, str) and action.type is not None:
            try:
                value = action.type(value)
            except (ValueError, TypeError) as error:
                self.error(f"{key}: {value!r} in {path} cannot be read: {error}")
        if not _fits(value, hint):
            self.error(f"{key}: {value!r} in {path} is {_kind(value)}; write {_wanted(hint)}")
        return value

    def _hint(self, key: str):
        return next(get_type_hints(owner)[key] for owner in self.dataclass_types if key in owner.__dataclass_fields__)

    def _known_keys(self) -> set[str]:
        return {action.dest for action in self._actions} - {"help", "config"}

    def _refuse_unknown(self, word: str, where: str):
        key = word.lstrip("-").split("=")[0].replace("-", "_")
        nearest = difflib.get_close_matches(key, self._known_keys(), n=1, cutoff=0.5)
        mend = f"did you mean {nearest[0]!r}?" if nearest else "--help lists the known ones"
        self.error(f"unknown setting {word!r} {where}; {mend}")


def _fits(value, hint) -> bool:
    """Whether a YAML value is of a field's type; a whole number also is a `float`, a yes or no is never a number."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(entry, *get_args(hint)) for entry in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _kind(value) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _wanted(hint) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_wanted(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(repr(choice) for choice in get_args(hint))}"
    if get_origin(hint) is list:
        return f"a list, each entry {_wanted(*get_args(hint))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes)"}
    return words.get(hint) or ("nothing" if hint is type(None) else f"a {getattr(hint, '__name__', hint)}")


def parse_recipe(
    *config_classes: type, description: str, argv: list[str] | None = None, prog: str | None = None
) -> tuple:
    """Read a recipe and the command line into one instance of each of `config_classes`.

    Args:
        config_classes: dataclasses whose fields carry `metadata={"help": …}`.
        description: first paragraph of `--help`.
        argv: words to parse; the process's own by default.
        prog: name of the command in its messages; by default that of the process's file.

    Returns:
        tuple: an instance of each class, in order.

    Raises:
        SystemExit: on `--help`, an unreadable recipe, an unknown key, or a value that a dataclass refuses.
    """
    return RecipeParser(*config_classes, description=description, prog=prog).parse(argv)
