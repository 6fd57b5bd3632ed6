"""A Muon step over the chunks of a plan: gather, orthogonalise, scatter, with the neighbours' traffic in between.

    products | orthogonalise 0     | orthogonalise 1                | …
    shards   | prologue 1          | prologue 2, epilogue 0         | …
    network  | gather 1            | scatter 0, gather 2            | …

At most two chunks' buffers are alive at a time. What is done to a matrix comes in as functions, so that this file
knows about buffers and order only. Legend: N matrices in a batch, A rows, B columns of a matrix.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from trainer.optim.communication import Flight, Team
from trainer.optim.plan import Chunk, Piece, Strip

Batch = tuple[list[int], Tensor]  # numbers of matrices of one shape, and these matrices (N, A, B)


class Lanes:
    """The current stream, for products, and another for all that is done to shards and buffers beside them.

    Buffers belong to the second: it waits for the products that read one before it makes or frees another.

    Args:
        beside: the second stream; None: everything runs on the current one, in the order it is called.
        device: of the streams.
    """

    def __init__(self, beside: torch.cuda.Stream | None, device: torch.device):
        self.stream = beside
        self.current = None if beside is None else torch.cuda.current_stream(device)
        self.shards_follow()

    def beside(self):
        """Context in which work goes to the shards' lane."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event | None:
        """The point that the shards' lane has reached."""
        return None if self.stream is None else self.stream.record_event()

    def products_follow(self, mark: torch.cuda.Event | None) -> None:
        """Let products wait for a mark."""
        if mark is not None:
            self.current.wait_event(mark)

    def shards_follow(self) -> None:
        """Let the shards' lane wait for the products so far."""
        if self.stream is not None:
            self.stream.wait_stream(self.current)

    def lend(self, update: Tensor) -> None:
        """Say that the shards' lane will read what products made, which may be the current stream's memory."""
        if self.stream is not None:
            update.record_stream(self.stream)


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
    beside: torch.cuda.Stream | None = None,
) -> None:
    """Run all chunks of one team.

    Args:
        chunks: this rank's plan.
        shapes: (A, B) of every matrix of the team.
        team: the ranks that exchange.
        prologue: called once for each matrix; writes this rank's part of the direction, shaped as its block, into the
            tensor it is given (None: nobody asks this rank for it).
        orthogonalise: maps a batch (N, A, B) in `gather_dtype` to updates of the same shape in `scatter_dtype`; it may
            reuse the batch.
        epilogue: called with this rank's part of each update, shaped as its block.
        gather_dtype: dtype of directions on the wire.
        scatter_dtype: dtype of updates on the wire.
        device: of the buffers.
        pipelined: overlap a chunk's products with the transfers of its neighbours.
        beside: stream for all but the products; None: the current one.
    """

    def start_gather(chunk: Chunk) -> Flight:
        send = torch.empty(sum(chunk.gather.send_splits), dtype=gather_dtype, device=device)
        slots = {piece.matrix: _slot(send, piece) for piece in chunk.gather.sends}
        for number in chunk.members:
            prologue(number, slots.get(number))
        return team.exchange(send, chunk.gather)

    def start_scatter(chunk: Chunk, updates: list[Batch]) -> Flight:
        return team.exchange(_to_send(chunk, updates, scatter_dtype, device), chunk.scatter)

    def finish(chunk: Chunk, scattered: Flight) -> None:
        received = scattered.arrive()
        for piece in chunk.scatter.receives:
            epilogue(piece.matrix, _slot(received, piece))

    if not chunks:
        return
    lanes = Lanes(beside, device)
    with lanes.beside():
        batches = _assemble(chunks[0], shapes, start_gather(chunks[0]))
        assembled = lanes.mark()
    unfinished: tuple[Chunk, Flight] | None = None
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        with lanes.beside():
            upcoming = start_gather(following) if pipelined and following else None
        lanes.products_follow(assembled)
        updates, read = _orthogonalise(batches, orthogonalise, lanes)
        with lanes.beside():
            if unfinished:
                finish(*unfinished)
            if upcoming:
                batches = _assemble(following, shapes, upcoming)
                assembled = lanes.mark()
            lanes.shards_follow()
            read.clear()
            unfinished = (chunk, start_scatter(chunk, updates))
            del updates
            if not pipelined:
                finish(*unfinished)
                unfinished = None
                batches = _assemble(following, shapes, start_gather(following)) if following else []
                assembled = lanes.mark()
    with lanes.beside():
        if unfinished:
            finish(*unfinished)
        lanes.products_follow(lanes.mark())


def _assemble(chunk: Chunk, shapes: Sequence[tuple[int, int]], gathered: Flight) -> list[Batch]:
    """Put owned matrices together, batched by shape; in the received buffer itself where they lie there whole."""
    received = gathered.arrive()
    numbers_by_shape: dict[tuple[int, int], list[int]] = {}
    for number in chunk.owned:
        numbers_by_shape.setdefault(shapes[number], []).append(number)
    strips, batches, wholes = chunk.gather.receive_strips, [], {}
    for shape, numbers in numbers_by_shape.items():
        start = _start_of_run(strips, numbers, shape)
        if start is None:
            batch = received.new_empty(len(numbers), *shape)  # (N, A, B)
            wholes |= dict(zip(numbers, batch, strict=True))
        else:
            batch = received[start:][: len(numbers) * shape[0] * shape[1]].view(-1, *shape)  # (N, A, B)
        batches.append((numbers, batch))
    for strip in strips:
        if strip.matrix in wholes:
            in_matrix, in_buffer = strip.views(wholes[strip.matrix], received)
            in_matrix.copy_(in_buffer)
    return batches


def _orthogonalise(
    batches: list[Batch], orthogonalise: Callable[[Tensor], Tensor], lanes: Lanes
) -> tuple[list[Batch], list[Tensor]]:
    """Updates of each batch, and batches that products may still read though the shards' lane owns their memory.

    `batches` is emptied, so that each is freed once it is done with.
    """
    updates, read = [], []
    while batches:
        numbers, batch = batches.pop(0)
        updates.append((numbers, orthogonalise(batch)))
        lanes.lend(updates[-1][1])
        if lanes.stream is not None:
            read.append(batch)
        del batch
    return updates, read


def _to_send(chunk: Chunk, updates: list[Batch], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer of a scatter: the updates themselves where they lie as they are sent, else a copy in parts."""
    strips, size = chunk.scatter.send_strips, sum(chunk.scatter.send_splits)
    for numbers, batch in updates:
        if batch.numel() == size and _start_of_run(strips, numbers, tuple(batch.shape[1:])) == 0:
            return batch.view(-1)
    send = torch.empty(size, dtype=dtype, device=device)
    wholes = {number: whole for numbers, batch in updates for number, whole in zip(numbers, batch, strict=True)}
    for strip in strips:
        in_matrix, in_buffer = strip.views(wholes[strip.matrix], send)
        in_buffer.copy_(in_matrix)
    return send


def _start_of_run(strips: Sequence[Strip], numbers: list[int], shape: tuple[int, int]) -> int | None:
    """Element of a buffer from which these matrices lie there whole, one after the other; None if they do not."""
    places = {strip.matrix: strip.offset for strip in strips if strip.is_whole(shape)}
    start = places.get(numbers[0])
    if start is None:
        return None
    following = [start + index * shape[0] * shape[1] for index in range(len(numbers))]
    return start if [places.get(number) for number in numbers] == following else None


def _slot(buffer: Tensor, piece: Piece) -> Tensor:
    """The part of a flat buffer that holds a piece, shaped as its block."""
    return buffer[piece.offset : piece.offset + piece.block.numel].view(piece.block.shape)
