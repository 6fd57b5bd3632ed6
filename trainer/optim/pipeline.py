"""A Muon step over the chunks of a plan: gather, orthogonalise, scatter, with the neighbours' traffic in between.

    stream   | gather 0 | orthogonalise 0     | orthogonalise 1     | …
    network  | gather 0 | gather 1            | scatter 0, gather 2 | …

At most two chunks' buffers are alive at a time. What is done to a matrix comes in as functions, so that this file
knows about buffers and order only. Legend: A rows, B columns of a matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.optim.communication import Flight, Team
from trainer.optim.plan import Chunk, Piece


def run_pipeline(
    chunks: Sequence[Chunk],
    shapes: Sequence[tuple[int, int]],
    team: Team,
    prologue: Callable[[int, Tensor | None], None],
    orthogonalise: Callable[[Tensor], Tensor],
    epilogue: Callable[[int, Tensor], None],
    gather_dtype: torch.dtype,
    scatter_dtype: torch.dtype,
    device: torch.device,
    pipelined: bool = True,
) -> None:
    """Run all chunks of one team.

    Args:
        chunks: this rank's plan.
        shapes: (A, B) of every matrix of the team.
        team: the ranks that exchange.
        prologue: called once for each matrix; writes this rank's part of the direction, shaped as its block, into the
            tensor it is given (None: nobody asks this rank for it).
        orthogonalise: maps a batch (count, A, B) in `gather_dtype` to updates of the same shape in `scatter_dtype`; it
            may reuse the batch.
        epilogue: called with this rank's part of each update, shaped as its block.
        gather_dtype: dtype of directions on the wire.
        scatter_dtype: dtype of updates on the wire.
        device: of the buffers.
        pipelined: overlap a chunk's products with the transfers of its neighbours.
    """

    def start_gather(chunk: Chunk) -> Flight:
        send = torch.empty(sum(chunk.gather.send_splits), dtype=gather_dtype, device=device)
        slots = {piece.matrix: _slot(send, piece) for piece in chunk.gather.sends}
        for number in chunk.members:
            prologue(number, slots.get(number))
        return team.exchange(send, chunk.gather)

    def start_scatter(chunk: Chunk, gathered: Flight) -> Flight:
        updates = _orthogonalise_owned(chunk, shapes, gathered, orthogonalise)
        send = torch.empty(sum(chunk.scatter.send_splits), dtype=scatter_dtype, device=device)
        for strip in chunk.scatter.send_strips:
            in_matrix, in_buffer = strip.views(updates[strip.matrix], send)
            in_buffer.copy_(in_matrix)
        return team.exchange(send, chunk.scatter)

    def finish(chunk: Chunk, scattered: Flight) -> None:
        received = scattered.arrive()
        for piece in chunk.scatter.receives:
            epilogue(piece.matrix, _slot(received, piece))

    gathered = start_gather(chunks[0]) if chunks else None
    unfinished: tuple[Chunk, Flight] | None = None
    for index, chunk in enumerate(chunks):
        following = chunks[index + 1] if index + 1 < len(chunks) else None
        upcoming = start_gather(following) if pipelined and following else None
        scattered = start_scatter(chunk, gathered)
        if unfinished:
            finish(*unfinished)
        unfinished = (chunk, scattered)
        if not pipelined:
            finish(*unfinished)
            unfinished = None
            upcoming = start_gather(following) if following else None
        gathered = upcoming
    if unfinished:
        finish(*unfinished)


def _orthogonalise_owned(
    chunk: Chunk, shapes: Sequence[tuple[int, int]], gathered: Flight, orthogonalise: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """Put owned matrices together, batched by shape, and orthogonalise them; updates (A, B) by number."""
    received = gathered.arrive()
    numbers_by_shape: dict[tuple[int, int], list[int]] = {}
    for number in chunk.owned:
        numbers_by_shape.setdefault(shapes[number], []).append(number)
    batches = [
        (numbers, received.new_empty(len(numbers), *shape))  # (count, A, B)
        for shape, numbers in numbers_by_shape.items()
    ]
    wholes = {number: matrix for numbers, batch in batches for number, matrix in zip(numbers, batch, strict=True)}
    for strip in chunk.gather.receive_strips:
        in_matrix, in_buffer = strip.views(wholes[strip.matrix], received)
        in_matrix.copy_(in_buffer)
    del received, wholes
    updates = {}
    while batches:
        numbers, batch = batches.pop(0)
        updates |= dict(zip(numbers, orthogonalise(batch), strict=True))
        del batch
    return updates


def _slot(buffer: Tensor, piece: Piece) -> Tensor:
    """The part of a flat buffer that holds a piece, shaped as its block."""
    return buffer[piece.offset : piece.offset + piece.block.numel].view(piece.block.shape)
