"""The package one folder up under its own name, for loaders that look for a folder (generated)."""

import importlib.util
import sys
from pathlib import Path

if "_gda_attention_rocm_91d034f" not in sys.modules:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location("_gda_attention_rocm_91d034f", _file)
    sys.modules["_gda_attention_rocm_91d034f"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["_gda_attention_rocm_91d034f"])
globals().update({key: value for key, value in vars(sys.modules["_gda_attention_rocm_91d034f"]).items() if key[:2] != "__"})
