"""The repository's own tests of one token's products, in torch; `test_interpreter.py` runs them interpreted too."""

from tests.kernels_hub.own_tests import own_tests

globals().update(own_tests("decode_products", "test_decode_products"))
