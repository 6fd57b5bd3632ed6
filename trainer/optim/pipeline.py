"""A Muon step over the chunks of a plan: gather, orthogonalise, scatter, with the neighbours' traffic in between.

    stream   | gather 0 | orthogonalise 0     | orthogonalise 1     | …
    network  | gather 0 | gather 1            | scatter 0, gather 2 | …

At most two chunks' buffers are alive at a time. What is done to a matrix comes in as functions, so that this file
knows about buffers and order only. Passes over shards stay on the products' stream: beside products, on another one,
they took as much from them as they saved.

Legend: N matrices in a batch, A rows, B columns of a matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.optim.communication import Flight, Team
from trainer.optim.plan import Chunk, Piece, Strip

Part = tuple[list[int], Tensor]  # numbers of matrices of one shape, and these matrices (N, A, B)
Batch = list[Part]  # parts of shapes that are equal up to transposition: gate and up, and down
# Kernels read a matrix at such an address in wider words, in which a norm is summed in another order.
_ALIGNMENT_BYTES = 16


def run_pipeline(
    chunks: Sequence[Chunk],
    shapes: Sequence[tuple[int, int]],
    team: Team,
    prologue: Callable[[int, Tensor | None], None],
    orthogonalise: Callable[[list[Tensor]], list[Tensor]],
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
        orthogonalise: maps a batch, parts (N, A, B) in `gather_dtype`, to updates of the same shapes in
            `scatter_dtype`; it may reuse the parts' memory.
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
        batches, updates = _assemble(chunk, shapes, gathered), []
        while batches:  # each batch is freed once it is done with
            numbers, parts = zip(*batches.pop(0), strict=True)
            updates += zip(numbers, orthogonalise(parts), strict=True)
            del parts
        return team.exchange(_to_send(chunk, updates, scatter_dtype, device), chunk.scatter, scatter=True)

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


def _assemble(chunk: Chunk, shapes: Sequence[tuple[int, int]], gathered: Flight) -> list[Batch]:
    """Put owned matrices together, batched by shape up to transposition; in the received buffer where whole there."""
    received = gathered.arrive()
    numbers_by_shape: dict[tuple[int, int], list[int]] = {}
    for number in chunk.owned:
        numbers_by_shape.setdefault(shapes[number], []).append(number)
    strips, wholes = chunk.gather.receive_strips, {}
    batches: dict[tuple[int, int], Batch] = {}
    for shape, numbers in numbers_by_shape.items():
        start = _start_of_run(strips, numbers, shape)
        if start is None or (received.data_ptr() + start * received.itemsize) % _ALIGNMENT_BYTES:
            part = received.new_empty(len(numbers), *shape)  # (N, A, B)
            wholes |= dict(zip(numbers, part, strict=True))
        else:
            part = received[start:][: len(numbers) * shape[0] * shape[1]].view(-1, *shape)  # (N, A, B)
        batches.setdefault((min(shape), max(shape)), []).append((numbers, part))
    for strip in strips:
        if strip.matrix in wholes:
            in_matrix, in_buffer = strip.views(wholes[strip.matrix], received)
            _copy(in_buffer, in_matrix)
    return list(batches.values())


def _to_send(chunk: Chunk, updates: list[Part], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer of a scatter: the updates themselves where they lie as they are sent, else a copy in parts."""
    strips, size = chunk.scatter.send_strips, sum(chunk.scatter.send_splits)
    for numbers, batch in updates:
        if batch.numel() == size and _start_of_run(strips, numbers, tuple(batch.shape[1:])) == 0:
            return batch.view(-1)
    send = torch.empty(size, dtype=dtype, device=device)
    wholes = {number: whole for numbers, batch in updates for number, whole in zip(numbers, batch, strict=True)}
    for strip in strips:
        in_matrix, in_buffer = strip.views(wholes[strip.matrix], send)
        _copy(in_matrix, in_buffer)
    return send


def _start_of_run(strips: Sequence[Strip], numbers: list[int], shape: tuple[int, int]) -> int | None:
    """Element of a buffer from which these matrices lie there whole, one after the other; None if they do not."""
    places = {strip.matrix: strip.offset for strip in strips if strip.is_whole(shape)}
    start = places.get(numbers[0])
    if start is None:
        return None
    following = [start + index * shape[0] * shape[1] for index in range(len(numbers))]
    return start if [places.get(number) for number in numbers] == following else None


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy strided tiles (count, rows, columns), as words of 8 bytes where they consist of such: it is much faster."""
    tiles = (source, target)
    words = torch.int64.itemsize // source.dtype.itemsize
    if (
        source.dtype == target.dtype
        and words > 1
        and not any(number % words for t in tiles for number in (t.shape[-1], t.storage_offset(), *t.stride()[:-1]))
    ):
        source, target = (t.view(torch.int64) for t in tiles)
    target.copy_(source)


def _slot(buffer: Tensor, piece: Piece) -> Tensor:
    """The part of a flat buffer that holds a piece, shaped as its block."""
    return buffer[piece.offset : piece.offset + piece.block.numel].view(piece.block.shape)
