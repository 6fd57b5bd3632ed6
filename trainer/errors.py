"""What stops a run on purpose: each error says what happened, where the last good state is, and what to do."""

from torch.distributed import DistError

GLOO_SIGNS = ("gloo/transport", "Connection closed by peer", "caused pair closure")


class RunStoppedError(RuntimeError):
    """A run cannot go on; its last complete checkpoint is untouched."""


class CheckpointError(RunStoppedError):
    """A checkpoint could not be written, on this rank or another."""


class StoppedBySignalError(RunStoppedError):
    """A launcher or a cluster asked the process to end."""


class LostRankError(RunStoppedError):
    """Another rank died or hangs: it did not answer within the timeout."""


class LossSpikeError(RunStoppedError):
    """The loss spiked again after as many rewinds as are allowed."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone or silent; gloo says it in words alone."""
    return isinstance(error, DistError) or any(sign in str(error) for sign in GLOO_SIGNS)
