"""The Newton-Schulz repository's own tests, in torch."""

from tests.kernels_hub.own_tests import own_tests

globals().update(own_tests("newton_schulz", "test_newton_schulz"))
