"""The PolyNorm repository's own tests, in torch; `test_interpreter.py` runs them in Triton's interpreter too."""

from tests.kernels_hub.own_tests import own_tests

globals().update(own_tests("polynorm", "test_polynorm"))
