"""Compare a grown model with its source on text, in float64, holding one layer of one model in memory at a time.

Shapes: T tokens, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer

from .configuration_motif2 import Motif2Config
from .growth_files import CheckpointReader
from .growth_plan import Growth
from .growth_rules import row_blocks
from .modeling_motif2 import Motif2Model, Motif2RotaryEmbedding

# Largest relative error that counts as the same function, by the dtype the grown weights are stored in. In float64
# only the order of sums differs; in the others lambda_q2, lambda_k2, subln and noisy or odd-numbered copies are
# rounded when they are stored, and the bound is four units of that rounding (assumption).
TOLERANCES = {torch.float64: 1e-12} | {
    dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)
}

SAMPLE_TEXT = """The tide had gone out before dawn, and the boats lay on their sides in the mud like cattle asleep.
A boy walked between them with a bucket, counting aloud: one, two, three, and at every tenth he made a chalk mark.
When the water came back at noon there were 47 marks, so 470 shells, and he divided them among his 5 sisters.

def shells_each(marks, sisters):
    total = 10 * marks
    return total // sisters, total % sisters
"""


@dataclass(frozen=True)
class Verification:
    """Relative errors of a grown model against its source: largest difference over largest magnitude.

    Attributes:
        places: (name, error) in the order of the forward pass, from the embeddings to the logits.
        tolerance: largest error that passes.
        num_tokens: length of the text in tokens.
    """

    places: tuple[tuple[str, float], ...]
    tolerance: float
    num_tokens: int

    @property
    def error(self) -> float:
        """Relative error of the logits."""
        return self.places[-1][1]

    @property
    def first_difference(self) -> str | None:
        """The first place whose error does not pass, or None."""
        return next((name for name, error in self.places if not error <= self.tolerance), None)

    @property
    def passed(self) -> bool:
        """Whether every place passes."""
        return self.first_difference is None

    def report(self) -> str:
        """The errors by place, and the verdict."""
        width = max(len(name) for name, _ in self.places)
        lines = [f"{name:<{width}}  {error:.2e}" for name, error in self.places]
        verdict = (
            f"the same function: relative error of the logits {self.error:.2e}, bound {self.tolerance:.1e}, "
            f"{self.num_tokens} tokens in float64"
            if self.passed
            else f"NOT the same function: the error first exceeds {self.tolerance:.1e} at {self.first_difference}"
        )
        return "\n".join([*lines, verdict])


def verify_growth(
    growth: Growth,
    source: CheckpointReader,
    target_config: Motif2Config,
    target: CheckpointReader,
    text_path: str | Path | None = None,
    num_tokens: int = 64,
) -> Verification:
    """Run both models on the same text and compare every hidden state and the logits.

    Args:
        growth: what grew; it says which layers correspond.
        source: the parent's tensors.
        target_config: configuration of the grown model.
        target: the grown model's tensors.
        text_path: a text file; a built-in sample by default.
        num_tokens: length of the comparison in tokens.
    """
    token_ids = read_token_ids(source.folder, growth.source.vocab_size, text_path, num_tokens)
    states = _hidden_states(growth.source, source, token_ids, "source")
    grown = _hidden_states(target_config, target, token_ids, "grown")
    wide = [state.repeat(1, growth.width) for state in states]  # (T, C)
    places = [("embeddings", relative_error(grown[0], wide[0]))]
    for index, block in enumerate(growth.blocks):
        origin = f"inserted after {block.source}" if block.inserted else f"source's {block.source}"
        places.append((f"layer {index} ({origin})", relative_error(grown[index + 1], wide[block.source + 1])))
    places.append(("final norm", relative_error(grown[-1], wide[-1])))
    places.append(("logits", _logits_error(growth.source, source, states[-1], target_config, target, grown[-1])))
    dtypes = {target.dtype(name) for name in target.names}
    return Verification(tuple(places), max(TOLERANCES[dtype] for dtype in dtypes), len(token_ids))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest magnitude."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def read_token_ids(folder: Path, vocab_size: int, text_path: str | Path | None, num_tokens: int) -> torch.Tensor:
    """Tokens (T,) of a text, by the checkpoint's tokenizer, or the text's bytes where the checkpoint has none."""
    text = SAMPLE_TEXT if text_path is None else Path(text_path).read_text(encoding="utf-8")
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        token_ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    else:
        print("the source has no tokenizer: comparing on the text's bytes as token ids")
        token_ids = list(text.encode())
    if not token_ids:
        raise ValueError(f"{text_path} holds no token to compare on")
    return torch.tensor(token_ids[:num_tokens]) % vocab_size


@torch.no_grad()
def _hidden_states(
    config: Motif2Config, reader: CheckpointReader, token_ids: torch.Tensor, description: str
) -> list[torch.Tensor]:
    """The embeddings, every layer's output and the final norm's, each (T, C) in float64."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        backbone = Motif2Model(config).eval()
    backbone.rotary_emb = Motif2RotaryEmbedding(config)
    embeddings = [reader.rows("model.embed_tokens.weight", token, token + 1) for token in token_ids.tolist()]
    states = [torch.cat(embeddings).double()]  # (T, C)
    modules = [(f"model.layers.{i}.", layer) for i, layer in enumerate(backbone.layers)]
    with tqdm(total=len(modules) + 1, desc=f"run the {description}", unit="layer") as bar:
        for prefix, module in [*modules, ("model.norm.", backbone.norm)]:
            module.register_forward_pre_hook(_loader(reader, prefix))
            module.register_forward_hook(_recorder(states, bar))
        backbone(inputs_embeds=states[0][None], use_cache=False)
    return states


def _loader(reader: CheckpointReader, prefix: str) -> Callable:
    def load(module: nn.Module, _):
        weights = {name: reader.tensor(prefix + name).double() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)

    return load


def _recorder(states: list[torch.Tensor], bar: tqdm) -> Callable:
    def record(module: nn.Module, _, output: torch.Tensor):
        states.append(output[0])
        module.to("meta")
        bar.update()

    return record


@torch.no_grad()
def _logits_error(
    source_config: Motif2Config,
    source: CheckpointReader,
    source_state: torch.Tensor,
    target_config: Motif2Config,
    target: CheckpointReader,
    target_state: torch.Tensor,
) -> float:
    """Relative error of the logits, (T, V), reckoned for a block of the vocabulary at a time."""
    heads = [
        "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        for config in (source_config, target_config)
    ]
    difference = magnitude = torch.zeros((), dtype=torch.float64)
    for start, stop in row_blocks((target_config.vocab_size, target_config.hidden_size)):
        reference = source_state @ source.rows(heads[0], start, stop).double().T  # (T, rows)
        logits = target_state @ target.rows(heads[1], start, stop).double().T
        difference = torch.maximum(difference, (logits - reference).abs().max())
        magnitude = torch.maximum(magnitude, reference.abs().max())
    return (difference / magnitude).item()
