"""Compare a grown model with its source on text, in float64, holding one layer of one model in memory at a time.

Two questions are asked. Running freely, does every hidden state, and do the logits, equal the source's? And does each
block alone, given the source's own state, do what its parent does? The second is the sharper one where weights are
stored in few bits: a block's error is not hidden under the residual stream, nor under what earlier blocks have left.

Where the grown weights hold exactly what they should, only the order of sums differs, and 1e-12 is the bound of both.
Other dtypes than float64 round lambda_q2, lambda_k2 and subln when blocks move, noisy copies, and converted weights.
What that does depends on the model: sharp attention magnifies it. So the bound is measured: the source runs once more
with just those weights off by random parts of half a unit of rounding, and the grown model may be twice as far away.

Shapes: T tokens, C hidden size, F features into `o_proj`, V vocabulary.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer

from .configuration_motif2 import Motif2Config
from .growth_files import CheckpointReader, one_line
from .growth_plan import Growth
from .growth_rules import expand_heads, output_head_map, row_blocks
from .layers import Motif2RotaryEmbedding
from .modeling_motif2 import Motif2Model

EXACT_BOUND = 1e-12
# Times what rounding the source's weights does (assumption): of copies only the last one's rounding is left, so growth
# itself stays below once, but two draws of random rounding differ.
ROUNDING_FACTOR = 2.0
# What is computed anew for blocks whose index changes.
COMPENSATED = ("subln.weight", "lambda_q2", "lambda_k2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
COLUMNS = ("heads", "update", "state")
# Characters of a text that are read for each token wanted (assumption: no tokenizer's tokens are longer on average).
CHARACTERS_A_TOKEN = 64

SAMPLE_TEXT = """The tide had gone out before dawn, and the boats lay on their sides in the mud like cattle asleep.
A boy walked between them with a bucket, counting aloud: one, two, three, and at every tenth he made a chalk mark.
When the water came back at noon there were 47 marks, so 470 shells, and he divided them among his 5 sisters.

def shells_each(marks, sisters):
    total = 10 * marks
    return total // sisters, total % sisters
"""


@dataclass(frozen=True)
class Place:
    """Errors of a grown model at one place of the forward pass.

    Attributes:
        name: what lies there.
        errors: by column. "heads" and "update": what a block given the source's state feeds into `o_proj`, and what it
            adds to the stream, root mean square over the source's. "state": the stream's (or the logits') largest
            difference over the source's largest magnitude, each model running freely.
        bounds: largest error that passes, by column.
    """

    name: str
    errors: dict[str, float]
    bounds: dict[str, float]


@dataclass(frozen=True)
class Verification:
    """Errors of a grown model against its source.

    Attributes:
        places: in the order of the forward pass, from the embeddings to the logits.
        num_tokens: length of the text in tokens.
    """

    places: tuple[Place, ...]
    num_tokens: int

    @property
    def error(self) -> float:
        """Relative error of the logits."""
        return self.places[-1].errors["state"]

    @property
    def bound(self) -> float:
        """Largest relative error of the logits that passes."""
        return self.places[-1].bounds["state"]

    @property
    def first_difference(self) -> str | None:
        """The first place whose error does not pass, with both numbers, or None."""
        for place in self.places:
            for column, error in place.errors.items():
                if not error <= place.bounds[column]:
                    return f"{place.name}, {column}: {error:.2e}, bound {place.bounds[column]:.1e}"
        return None

    @property
    def passed(self) -> bool:
        """Whether every place passes."""
        return self.first_difference is None

    def report(self) -> str:
        """The errors by place, and the verdict."""
        width = max(len(place.name) for place in self.places)
        lines = ["  ".join([" " * width, *(f"{column:>8}" for column in COLUMNS)])]
        for place in self.places:
            errors = (f"{place.errors[column]:.2e}" if column in place.errors else "" for column in COLUMNS)
            lines.append("  ".join([f"{place.name:<{width}}", *(f"{error:>8}" for error in errors)]).rstrip())
        difference = self.first_difference
        if difference is not None:
            return "\n".join([*lines, f"NOT the same function: the error first exceeds its bound at {difference}"])
        worst, bound = max(
            (place.errors[column], place.bounds[column])
            for place in self.places
            for column in ("heads", "update")
            if column in place.errors
        )
        lines.append(
            f"the same function: relative error of the logits {self.error:.2e}, bound {self.bound:.1e}; of a block "
            f"alone at most {worst:.2e}, bound {bound:.1e}; {self.num_tokens} tokens in float64"
        )
        return "\n".join(lines)


@dataclass
class Trace:
    """What a model computes on a text, in float64.

    Attributes:
        states: the embeddings, every block's output and the final norm's, (T, C) each, running freely.
        heads: what every block feeds into `o_proj`, (T, F), given a state.
        updates: what every block then adds to that state, (T, C).
    """

    states: list[torch.Tensor] = field(default_factory=list)
    heads: list[torch.Tensor] = field(default_factory=list)
    updates: list[torch.Tensor] = field(default_factory=list)


def verify_growth(
    growth: Growth,
    source: CheckpointReader,
    target_config: Motif2Config,
    target: CheckpointReader,
    token_ids: torch.Tensor,
) -> Verification:
    """Run both models on the same tokens and compare them block by block, every hidden state, and the logits.

    Args:
        growth: what grew; it says which layers and heads correspond.
        source: the parent's tensors.
        target_config: configuration of the grown model.
        target: the grown model's tensors.
        token_ids: (T,) int64, as of `read_token_ids`.
    """
    parent = _run(growth.source, source, token_ids, "source")
    dtypes = {target.dtype(name) for name in target.names}
    allowed = _allowed(growth, source, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps), token_ids, parent)
    wide = [state.repeat(1, growth.width) for state in parent.states]  # (T, C)
    grown = _run(target_config, target, token_ids, "grown", [wide[block.source] for block in growth.blocks])
    columns = expand_heads(
        output_head_map(growth.source.num_groups, growth.source_ratio, growth.ratio), 2 * growth.source.head_dim
    )
    places = [Place("embeddings", {"state": relative_error(grown.states[0], wide[0])}, allowed[0])]
    for index, block in enumerate(growth.blocks):
        heads = parent.heads[block.source][:, columns]  # (T, F)
        update = parent.updates[block.source].repeat(1, growth.width)
        errors = {
            "heads": _ratio(grown.heads[index] - heads, heads),
            "update": _ratio(grown.updates[index] - (0.0 if block.inserted else update), update),
            "state": relative_error(grown.states[index + 1], wide[block.source + 1]),
        }
        bounds = allowed[block.source + 1]
        if block.inserted:
            bounds = bounds | {"update": 0.0}
        origin = f"inserted after {block.source}" if block.inserted else f"source's {block.source}"
        places.append(Place(f"layer {index} ({origin})", errors, bounds))
    places.append(Place("final norm", {"state": relative_error(grown.states[-1], wide[-1])}, allowed[-2]))
    logits = ((growth.source, source, parent.states[-1]), (target_config, target, grown.states[-1]))
    places.append(Place("logits", {"state": _logits_error(*logits)}, allowed[-1]))
    return Verification(tuple(places), len(token_ids))


def _allowed(
    growth: Growth, source: CheckpointReader, stored: torch.dtype, token_ids: torch.Tensor, parent: "Trace"
) -> list[dict[str, float]]:
    """Bounds by column: of the embeddings, the source's blocks, the final norm and the logits."""
    config = growth.source
    rounded = RoundedTensors(growth, source, stored)
    if not rounded.names:
        return [dict.fromkeys(COLUMNS, EXACT_BOUND)] * (config.num_hidden_layers + 3)
    control = _run(config, rounded, token_ids, "source with rounded weights", parent.states)
    bounds = [{"state": relative_error(*states)} for states in zip(control.states, parent.states, strict=True)]
    for index in range(config.num_hidden_layers):
        bounds[index + 1] |= {
            "heads": _ratio(control.heads[index] - parent.heads[index], parent.heads[index]),
            "update": _ratio(control.updates[index] - parent.updates[index], parent.updates[index]),
        }
    logits = ((config, source, parent.states[-1]), (config, rounded, control.states[-1]))
    bounds.append({"state": _logits_error(*logits)})
    return [{column: EXACT_BOUND + ROUNDING_FACTOR * error for column, error in place.items()} for place in bounds]


class RoundedTensors:
    """A parent's tensors in float64, those that growth rounds off by a random part of half a unit of rounding.

    Args:
        growth: what grew.
        source: the parent's tensors.
        stored: dtype of the grown weights.

    Attributes:
        names: the tensors that growth rounds.
    """

    def __init__(self, growth: Growth, source: CheckpointReader, stored: torch.dtype):
        self.source = source
        self.rounding = torch.finfo(stored).eps / 2
        self.names = set()
        for name in source.names:
            converted = torch.promote_types(source.dtype(name), stored) != stored
            moved = bool(growth.insert_after) and name.endswith(COMPENSATED)
            noisy = growth.noise_snr_db is not None and name.endswith("_proj.weight")
            # What float64 rounds lies below the bound of what is exact.
            if converted or (stored != torch.float64 and (moved or noisy)):
                self.names.add(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor; equal calls give equal numbers."""
        rows = self.source.rows(name, start, stop).double()
        if name not in self.names:
            return rows
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{start}".encode()))
        errors = torch.rand(rows.shape, generator=generator, dtype=torch.float32)
        return rows.addcmul_(rows, errors.mul_(2).sub_(1).double(), value=self.rounding)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.source.shape(name)[0])


def _ratio(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """A difference's root mean square over the reference's; nothing over nothing is no error."""
    return 0.0 if not difference.any() else (difference.norm() / reference.norm()).item()


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude."""
    difference = (value - reference).abs().max()
    return 0.0 if difference == 0 else (difference / reference.abs().max()).item()


def read_token_ids(folder: Path, vocab_size: int, text_path: str | Path | None, num_tokens: int) -> torch.Tensor:
    """Tokens of a text by the checkpoint's tokenizer, or the text's bytes where the checkpoint has none.

    Args:
        folder: of the checkpoint.
        vocab_size: its model's.
        text_path: a text file; a built-in sample by default.
        num_tokens: most that are kept.

    Returns:
        (T,) int64, 2 to `num_tokens` ids.

    Raises:
        ValueError: the text is not UTF-8 or too short, the tokenizer cannot be read, or it is another vocabulary's.
    """
    text = SAMPLE_TEXT
    if text_path is not None:
        try:
            with open(text_path, encoding="utf-8") as file:
                text = file.read(CHARACTERS_A_TOKEN * num_tokens)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"verify_text={str(text_path)!r} is not UTF-8 text ({error}): give a text file"
            ) from error
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            token_ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:num_tokens]
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise ValueError(
                f"the tokenizer of {folder} cannot be read ({one_line(error)}): complete it, or move its files "
                "away to compare on bytes"
            ) from error
        if max(token_ids, default=0) >= vocab_size:
            raise ValueError(
                f"the tokenizer of {folder} gives id {max(token_ids)}, and the model knows {vocab_size}: it "
                "belongs to another checkpoint"
            )
    else:
        print("the source has no tokenizer: comparing on the text's bytes as token ids")
        token_ids = [byte % vocab_size for byte in text.encode()[:num_tokens]]
    if len(token_ids) < 2:
        raise ValueError(f"verify_text={str(text_path)!r} holds {len(token_ids)} tokens: 2 or more are compared")
    return torch.tensor(token_ids)


@torch.no_grad()
def _run(
    config: Motif2Config,
    reader: "CheckpointReader | RoundedTensors",
    token_ids: torch.Tensor,
    description: str,
    given: list[torch.Tensor] | None = None,
) -> Trace:
    """Runs a model freely, and every block also alone on the state (T, C) given for it (by default its own)."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        backbone = Motif2Model(config).eval()
    backbone.rotary_emb = Motif2RotaryEmbedding(config)
    embeddings = [reader.rows("model.embed_tokens.weight", token, token + 1) for token in token_ids.tolist()]
    trace = Trace(states=[torch.cat(embeddings).double()])  # (T, C)
    with tqdm(total=config.num_hidden_layers + 1, desc=f"run the {description}", unit="layer") as bar:
        for index, layer in enumerate(backbone.layers):
            layer.register_forward_pre_hook(_loader(reader, f"model.layers.{index}."))
            own = None if given is None else given[index]
            layer.register_forward_hook(_block_recorder(trace, bar, own), with_kwargs=True)
        backbone.norm.register_forward_pre_hook(_loader(reader, "model.norm."))
        backbone.norm.register_forward_hook(lambda module, arguments, output: trace.states.append(output[0]))
        backbone(inputs_embeds=trace.states[0][None], use_cache=False)
        bar.update()
    return trace


def _loader(reader: CheckpointReader, prefix: str) -> Callable:
    def load(module: nn.Module, _):
        weights = {name: reader.tensor(prefix + name).double() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)

    return load


def _block_recorder(trace: Trace, bar: tqdm, given: torch.Tensor | None) -> Callable:
    def record(block: nn.Module, arguments: tuple, keywords: dict, output: torch.Tensor):
        trace.states.append(output[0])
        state = arguments[0] if given is None else given[None]  # (1, T, C)
        watch = block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: trace.heads.append(inputs[0][0])  # (T, F)
        )
        # Past the hooks of the call that this one is inside.
        trace.updates.append((block.forward(state, **keywords) - state)[0])
        watch.remove()
        block.to("meta")
        bar.update()

    return record


@torch.no_grad()
def _logits_error(*models: tuple[Motif2Config, CheckpointReader, torch.Tensor]) -> float:
    """Relative error of the second model's logits (T, V), reckoned for a block of the vocabulary at a time.

    Args:
        models: configuration, tensors and last hidden states (T, C) of the reference and of the other.
    """
    heads = [
        "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight" for config, _, _ in models
    ]
    difference = magnitude = torch.zeros((), dtype=torch.float64)
    widest = max(config.hidden_size for config, _, _ in models)
    for start, stop in row_blocks((models[0][0].vocab_size, widest)):
        reference, logits = (
            state @ reader.rows(head, start, stop).double().T  # (T, rows)
            for head, (_, reader, state) in zip(heads, models, strict=True)
        )
        difference = torch.maximum(difference, (logits - reference).abs().max())
        magnitude = torch.maximum(magnitude, reference.abs().max())
    return 0.0 if difference == 0 else (difference / magnitude).item()
