"""The package one folder up under its own name, for loaders that look for a folder (generated)."""

import importlib.util
import sys
from pathlib import Path

if "_newton_schulz_rocm_e6f7ae4" not in sys.modules:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location("_newton_schulz_rocm_e6f7ae4", _file)
    sys.modules["_newton_schulz_rocm_e6f7ae4"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["_newton_schulz_rocm_e6f7ae4"])
globals().update({key: value for key, value in vars(sys.modules["_newton_schulz_rocm_e6f7ae4"]).items() if key[:2] != "__"})
