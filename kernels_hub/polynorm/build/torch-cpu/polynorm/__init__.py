"""The package one folder up under its own name, for loaders that look for a folder (generated)."""

import importlib.util
import sys
from pathlib import Path

if "_polynorm_cpu_3ce8f2c" not in sys.modules:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location("_polynorm_cpu_3ce8f2c", _file)
    sys.modules["_polynorm_cpu_3ce8f2c"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["_polynorm_cpu_3ce8f2c"])
globals().update({key: value for key, value in vars(sys.modules["_polynorm_cpu_3ce8f2c"]).items() if key[:2] != "__"})
