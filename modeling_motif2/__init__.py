"""Motif-2 for Hugging Face transformers: importing this package registers the model with the Auto classes.

`AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the task heads then accept our checkpoints (`model_type`
"motif2") and the official ones ("Motif" or "motif"), without remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_motif2 import Motif2Config, OfficialMotifConfig, OfficialMotifLowerCaseConfig
from .late_stop import stopping_late
from .modeling_motif2 import (
    Motif2Attention,
    Motif2DecoderLayer,
    Motif2ForCausalLM,
    Motif2ForQuestionAnswering,
    Motif2ForSequenceClassification,
    Motif2ForTokenClassification,
    Motif2Model,
    Motif2PolyNormMul,
    Motif2PreTrainedModel,
    Motif2RMSNorm,
)

for _config in (Motif2Config, OfficialMotifConfig, OfficialMotifLowerCaseConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

# `register_for_auto_class` makes `save_pretrained` copy the sources beside the weights, so that a saved folder also
# loads with `trust_remote_code=True` where this package is not installed.
Motif2Config.register_for_auto_class()
for _auto, _model in (
    (AutoModel, Motif2Model),
    (AutoModelForCausalLM, Motif2ForCausalLM),
    (AutoModelForSequenceClassification, Motif2ForSequenceClassification),
    (AutoModelForTokenClassification, Motif2ForTokenClassification),
    (AutoModelForQuestionAnswering, Motif2ForQuestionAnswering),
):
    _auto.register(Motif2Config, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)

__all__ = [
    "Motif2Attention",
    "Motif2Config",
    "Motif2DecoderLayer",
    "Motif2ForCausalLM",
    "Motif2ForQuestionAnswering",
    "Motif2ForSequenceClassification",
    "Motif2ForTokenClassification",
    "Motif2Model",
    "Motif2PolyNormMul",
    "Motif2PreTrainedModel",
    "Motif2RMSNorm",
    "stopping_late",
]
