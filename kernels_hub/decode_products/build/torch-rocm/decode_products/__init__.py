"""The package one folder up under its own name, for loaders that look for a folder (generated)."""

import importlib.util
import sys
from pathlib import Path

if "_decode_products_rocm_116fd52" not in sys.modules:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location("_decode_products_rocm_116fd52", _file)
    sys.modules["_decode_products_rocm_116fd52"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["_decode_products_rocm_116fd52"])
globals().update({key: value for key, value in vars(sys.modules["_decode_products_rocm_116fd52"]).items() if key[:2] != "__"})
