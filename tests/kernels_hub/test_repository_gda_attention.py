"""The attention repository's own tests, in torch; `test_interpreter.py` runs them in Triton's interpreter too."""

from tests.kernels_hub.own_tests import own_tests

globals().update(own_tests("gda_attention", "test_gda_attention", "test_hopper", "test_flash"))
