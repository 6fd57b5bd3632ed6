"""What an experiment's recipe says, and which runs follow from it. Imports no torch: it only plans."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from trainer.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECALL = "recall"
# How a run may end; a cut one was stopped for lack of time, and is made anew by the next call.
DONE, DIVERGED, CUT = "done", "diverged", "cut"
METRICS, DESCRIPTION = "metrics.jsonl", "description.json"
RATES = ("learning_rate", "adamw_learning_rate")
ATTENTIONS = ("motif2", "softmax", "softmax_norm")
# `--tiny`: every part in seconds on a CPU, too short to learn anything.
TINY = {
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "sequence_length": 128,
    "batch_tokens": 512,
    "micro_batch_tokens": None,
    "total_tokens": 4096,
    "annealing_tokens": 0,
    "eval_steps": 4,
    "eval_tokens": 512,
    "exact_logit_steps": 2,
    "mixed_precision": "no",
    "compile_layers": False,
}
TINY_SEEDS = 2
# Settings of every run: nothing is kept, printed or tracked but metrics.jsonl.
QUIET = {
    "overwrite": True,
    "verify_checksums": False,
    "checkpoint_steps": 0,
    "spike_window_steps": 0,
    "norm_steps": 0,
    "log_steps": 1_000_000,
    "trackers": [],
    "progress": False,
}


SOURCE_SEED = 1000  # added to a run's seed for the small model that it grows from: other weights, another order


@dataclass(frozen=True)
class Growing:
    """How a run's model is grown from a small one, whose shape follows.

    Args:
        source_share: tokens that the small model is trained on, as a part of the run's own.
        width: factor on hidden and intermediate size.
        source_ratio: signal heads a group of the small model; None is as many as in the large one.
        insert_every: after every so many blocks of the small model a copy is inserted; None is none.
        noise_snr_db: of the noise that tells copies apart, in decibels.
        compensated: keep lambda as it was where a block's index changes; without, the grown model computes something
            else than the small one.
    """

    source_share: float
    width: int = 1
    source_ratio: int | None = None
    insert_every: int | None = None
    noise_snr_db: float | None = None
    compensated: bool = True

    def source_shape(self, shape: dict) -> dict:
        """Shape of the small model.

        Raises:
            ValueError: the large one cannot be grown so.
        """
        found = {name: shape[name] // self.width for name in ("hidden_size", "intermediate_size")}
        if any(found[name] * self.width != shape[name] for name in found):
            raise ValueError(f"width {self.width} does not divide {[shape[name] for name in found]}")
        layers = shape["num_hidden_layers"]
        if self.insert_every:
            fitting = [count for count in range(1, layers) if count + count // self.insert_every == layers]
            if not fitting:
                raise ValueError(f"no number of layers becomes {layers} with insert_every {self.insert_every}")
            layers = fitting[-1]
        if self.source_ratio is not None:
            found["num_attention_heads"] = shape["num_noise_heads"] * (self.source_ratio + 1)
        return found | {"num_hidden_layers": layers}


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Args:
        name: short, for files.
        label: for tables.
        settings: fields of `PretrainConfig` in which it differs.
        attention: "motif2", "softmax" for standard attention, "softmax_norm" for that with a norm on its output.
        sweep: learning rates to choose from, as settings; the first is tried first. None takes the recipe's.
        against: the arms it is compared with; None is the recipe's first.
        grow: arguments of `Growing` for a model that is grown from a small one; None starts from random weights.
        turn: added to its recipe's.
    """

    name: str
    label: str
    settings: dict = field(default_factory=dict)
    attention: str = "motif2"
    sweep: list[dict] | None = None
    against: list[str] | None = None
    grow: dict | None = None
    turn: int = 0


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        recipe: name of its recipe.
        arm: name of its arm.
        point: number of its learning rate in the arm's sweep.
        seed: decides weights and the order of the data.
        settings: of `PretrainConfig`, complete but for folders.
        attention: as for `Arm`.
        growing: how the model is grown; None starts from random weights.
        source: settings of the small model that it grows from.
        turn: runs of a lower one are made first, over all recipes of a call.
    """

    recipe: str
    arm: str
    point: int
    seed: int
    settings: dict
    attention: str
    growing: Growing | None = None
    source: dict = field(default_factory=dict)
    turn: int = 0

    @property
    def key(self) -> str:
        """Hash of everything the run depends on but the data."""
        content = {"settings": self.settings, "attention": self.attention}
        if self.growing:
            content |= {"growing": vars(self.growing), "source": self.source}
        content = json.dumps(content, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.arm}/lr{self.settings['learning_rate']:g}/seed{self.seed}"

    @property
    def size(self) -> float:
        """About how long it takes, in no unit: tokens times layers, as launches limit small models."""
        trained = [settings for settings in (self.settings, self.source) if settings]
        return sum(settings["total_tokens"] * settings["num_hidden_layers"] for settings in trained)


@dataclass
class Recipe:
    """A recipe of `recipes/experiments`.

    Args:
        name: of its results' folder.
        page: document whose part between `<!-- results: NAME -->` and `<!-- end of results -->` the report fills.
        question: one sentence.
        data_dir: holds `tokenizer` and `shards`.
        seeds: every arm has a run with each; arms with one seed see the same text in the same order.
        warmup_share, decay_share, annealing_share: parts of a run's tokens.
        pretrain: settings of every run.
        arms: by name; the first is the baseline.
        sweep: learning rates, as lists of settings; the one with the lowest held-out loss on the first seed is each
            arm's. Empty: those in `pretrain`.
        all_rates: every arm has all seeds at every learning rate, not at its best one only.
        seeds_first: every arm first gets all seeds at the first of its learning rates, then the other rates are tried:
            where there may be no time for both.
        turn: of its runs, see `Run`.
        measures: rows of the table.
        compared: measures of which differences are shown; the first is what the verdict is about. Empty: the first of
            `measures`.
        lower_is_better: of what the verdict is about.
        plot: what the figure's panels show over tokens.
        same: "parameters", "flops" or nothing: what must be equal between arms within `within`.
        within: largest relative difference.

    Raises:
        ValueError: an arm, setting or measure does not fit; the message says which.
    """

    name: str
    page: str
    question: str
    data_dir: str
    seeds: list[int]
    pretrain: dict
    arms: dict[str, Arm]
    measures: list[str]
    warmup_share: float = 0.06
    decay_share: float = 0.3
    annealing_share: float = 0.0
    sweep: list[dict] = field(default_factory=list)
    all_rates: bool = False
    seeds_first: bool = False
    turn: int = 0
    lower_is_better: bool = True
    compared: list[str] = field(default_factory=list)
    plot: list[str] = field(default_factory=lambda: ["heldout_mean"])
    same: str | None = None
    within: float = 0.01
    tiny: bool = False

    def __post_init__(self):
        if self.tiny:
            self.seeds = self.seeds[:TINY_SEEDS]
        self.compared = self.compared or self.measures[:1]
        self.arms = {name: self._arm(name, arm) for name, arm in self.arms.items()}
        for arm in self.arms.values():
            if arm.attention not in ATTENTIONS:
                raise ValueError(f"arm {arm.name!r} has attention {arm.attention!r}: choose one of {ATTENTIONS}")
            if not set(self.baselines(arm.name)) <= set(self.arms):
                raise ValueError(f"arm {arm.name!r} is compared with {arm.against!r}: name some of {list(self.arms)}")
        if self.same not in (None, "parameters", "flops"):
            raise ValueError(f"same is {self.same!r}: write parameters, flops, or leave it out")
        if not self.seeds or not self.arms or not self.measures:
            raise ValueError(f"{self.name}: seeds, arms and measures must each have an entry")
        shares = (self.warmup_share, self.decay_share, self.annealing_share)
        if min(shares) < 0 or self.warmup_share + self.decay_share > 1 or self.annealing_share >= 1:
            raise ValueError(f"{self.name}: warm-up, decay and annealing are {shares} of a run: use shares below 1")

    @classmethod
    def read(cls, path: str | Path, tiny: bool = False) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: it cannot be read, a key is unknown or missing, or the trainer refuses a run's settings.
        """
        if not Path(path).is_file():
            raise ValueError(f"recipe {str(path)!r} does not exist: they are in recipes/experiments")
        recipe = yaml.safe_load(Path(path).read_text())
        known = {entry.name for entry in fields(cls)} - {"name", "tiny"}
        missing = {"page", "question", "data_dir", "seeds", "pretrain", "arms", "measures"} - set(recipe)
        if set(recipe) - known or missing:
            raise ValueError(f"{path}: unknown {sorted(set(recipe) - known)}, missing {sorted(missing)}")
        made = cls(name=Path(path).stem, tiny=tiny, **recipe)
        for arm in made.arms:
            for point in range(len(made.points(arm))):
                try:
                    run = made.run(arm, point, made.seeds[0])
                    for settings in (run.settings, run.source) if run.source else (run.settings,):
                        PretrainConfig(**settings, tokenizer="-", data_dir="-")
                except (TypeError, ValueError, KeyError) as error:
                    raise ValueError(f"{path}: arm {arm!r} has settings that do not fit: {error}") from error
        return made

    @property
    def domains(self) -> list[str]:
        """Every domain that a run of it reads."""
        named = [arm.settings.get("domains") or self.pretrain.get("domains") or {} for arm in self.arms.values()]
        return list(dict.fromkeys(name for domains in named for name in domains))

    def baselines(self, arm: str) -> list[str]:
        """The arms that `arm` is compared with; none where that is itself."""
        against = self.arms[arm].against
        return [name for name in ([next(iter(self.arms))] if against is None else against) if name != arm]

    def points(self, arm: str) -> list[dict]:
        """Learning rates of an arm, as settings."""
        own = self.arms[arm].sweep
        return (self.sweep if own is None else own) or [{}]

    def run(self, arm: str, point: int, seed: int) -> Run:
        """One run with all its settings."""
        settings = {**self.pretrain, **self.arms[arm].settings, **self.points(arm)[point], **QUIET, "seed": seed}
        if self.tiny:
            settings |= TINY
        self._set_length(settings, 1.0)
        growing, source = self.arms[arm].grow, {}
        if growing is not None:
            growing = Growing(**growing)
            source = settings | growing.source_shape(settings) | {"seed": seed + SOURCE_SEED}
            source |= {name: self.pretrain[name] for name in RATES if name in self.pretrain}
            self._set_length(source, growing.source_share)
            source["eval_steps"] = source["total_tokens"] // source["batch_tokens"]
        turn = self.turn + self.arms[arm].turn
        return Run(self.name, arm, point, seed, settings, self.arms[arm].attention, growing, source, turn)

    def _set_length(self, settings: dict, share: float) -> None:
        """Whole steps of a share of the run's tokens, and the phases of the learning rate and the mixture in them."""
        batch = settings["batch_tokens"]
        total = int(share * settings["total_tokens"]) // batch * batch
        settings["total_tokens"] = total
        settings["warmup_tokens"] = int(self.warmup_share * total)
        settings["decay_tokens"] = int(self.decay_share * total)
        settings["annealing_tokens"] = int(self.annealing_share * total)

    def runs(self, records: Mapping[str, dict]) -> list[Run]:
        """All runs that are known by now, the most important first.

        First every arm on the first seed, at each of its learning rates; once an arm has been tried at all of them,
        the other seeds at its best one. Where `all_rates` is set, the other seeds at the other rates follow. Where
        `seeds_first` is set, the other seeds at the first rate go before the first seed at the other rates.

        Args:
            records: of finished runs, by key.
        """
        tried = max(len(self.points(arm)) for arm in self.arms)
        pairs = [(arm, point) for point in range(tried) for arm in self.arms if point < len(self.points(arm))]
        best = {arm: self.best_point(arm, records) if len(self.points(arm)) > 1 else 0 for arm in self.arms}
        chosen = [(arm, point) for arm, point in best.items() if point is not None]
        others = [pair for pair in pairs if pair not in chosen] if self.all_rates else []
        first, *later = self.seeds
        runs = [self.run(arm, point, first) for arm, point in pairs] + [
            self.run(arm, point, seed) for wanted in (chosen, others) for seed in later for arm, point in wanted
        ]
        if not self.seeds_first:
            return runs
        early = [self.run(arm, 0, seed) for seed in self.seeds for arm in self.arms]
        keys = {run.key for run in early}
        return early + [
            replace(run, turn=self.turn + (2 if run.seed == first else 3)) for run in runs if run.key not in keys
        ]

    def best_point(self, arm: str, records: Mapping[str, dict]) -> int | None:
        """Number of the learning rate with the lowest held-out loss on the first seed; None before all are tried."""
        losses = []
        for point in range(len(self.points(arm))):
            record = records.get(self.run(arm, point, self.seeds[0]).key)
            if record is None:
                return None
            loss = record.get("heldout_mean")
            losses.append(math.inf if record["status"] == DIVERGED or loss in (None, "") else float(loss))
        return losses.index(min(losses))

    def _arm(self, name: str, arm: dict) -> Arm:
        known = {entry.name for entry in fields(Arm)} - {"name"}
        if set(arm) - known or "label" not in arm:
            raise ValueError(f"arm {name!r} needs label and may have {sorted(known)}, it has {sorted(arm)}")
        if not isinstance(arm["label"], str):  # YAML takes 4:1 for the number 241
            raise ValueError(f"arm {name!r} has the label {arm['label']!r}, which is no text: put it in quotes")
        return Arm(name, **arm)
