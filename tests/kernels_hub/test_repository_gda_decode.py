"""The attention repository's own tests of decoding, in torch and in Triton's interpreter."""

from tests.kernels_hub.own_tests import own_tests

globals().update(own_tests("gda_attention", "test_decode"))
