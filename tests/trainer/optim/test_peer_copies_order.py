"""Copies into peers' buffers: whatever the streams' speeds, no slot is written while somebody else uses it.

What the pipeline queues on each rank's two streams is recorded over several steps. Two accesses are in order if a
chain of waits and barriers says so.
"""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.optim.test_layout_and_plan import cost_of, row_layout
from tests.trainer.optim.test_peer_copies import gather_locally
from trainer.optim import communication, peer_copies
from trainer.optim.peer_copies import PeerCopies
from trainer.optim.pipeline import run_pipeline
from trainer.optim.plan import plan_chunks


class Recorder:
    """What one rank queues on its two streams: (stream, what, slots it touches, event or barrier).

    A touched slot is (rank it lies on, its start, what is written: None where it is read, "all", or one rank's piece).
    """

    def __init__(self, monkeypatch, me: int, ranks: int):
        self.queued, self.stream, self.barriers = [], "products", itertools.count()
        self.me, self.ranks, self.gathered, self.scattered = me, ranks, None, None
        copying = SimpleNamespace(wait_stream=lambda _: self.add("wait", stream="copies"), record_event=self.record)
        products = SimpleNamespace(wait_event=lambda event: self.add("arrive", event=event))
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: copying)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: products)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: self.on_copies())
        self.copies = PeerCopies(None, me, torch.device("cpu"), 1.0)
        self.copies.peers = [torch.zeros(10_000, dtype=torch.uint8)] * ranks
        self.copies._handle = SimpleNamespace(barrier=lambda **_: self.add("barrier", event=next(self.barriers)))
        self.copies._allocate = lambda size: setattr(self.copies, "slot_bytes", size)
        self.view, self.copies._view = self.copies._view, self.look

    def add(self, what: str, slots: tuple = (), event: int | None = None, stream: str | None = None) -> None:
        self.queued.append((stream or self.stream, what, slots, event))

    def record(self) -> int:
        self.add("event")
        return len(self.queued) - 1

    @contextlib.contextmanager
    def on_copies(self):
        self.stream = "copies"
        yield
        self.stream = "products"

    def look(self, rank: int, slot: int, offset: int, *rest) -> torch.Tensor:
        if self.stream == "copies":  # a piece goes to a peer; an update's may come out of the slot it was gathered in
            source = ((self.me, self.gathered, None),) if slot >= peer_copies._TURNS * self.copies.slot_bytes else ()
            self.add("copy", (*source, (rank, slot, f"piece of {self.me}")))
        elif slot < peer_copies._TURNS * self.copies.slot_bytes:
            self.next_gathered = slot
        else:
            self.next_scattered = slot
        return self.view(rank, slot, offset, *rest)

    def orthogonalise(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        self.add("orthogonalise", ((self.me, self.gathered, "all"),))
        return parts

    def epilogue(self, *_) -> None:
        self.add("epilogue", ((self.me, self.scattered, None),))

    def run(self, plan: tuple, shapes: list, pipelined: bool, steps: int = 3) -> list[tuple]:
        team = communication.Team((0,), 1.0, torch.device("cpu"))
        team.group, team.copies, exchange = "of all ranks", self.copies, team.exchange
        plan = team.reserve(plan, 4)

        def watched(send, route, scatter=False):
            flight = exchange(send, route, scatter)
            name = "scattered" if scatter else "gathered"
            slot, arrive = getattr(self, f"next_{name}"), flight.arrive

            def arrives():
                received = arrive()
                setattr(self, name, slot)
                return received

            flight.arrive = arrives
            return flight

        team.exchange = watched
        dtypes = torch.float32, torch.float32, torch.device("cpu")
        for _ in range(steps):
            run_pipeline(plan, shapes, team, lambda *_: None, self.orthogonalise, self.epilogue, *dtypes, pipelined)
        return self.queued


def unordered(by_rank: list[list[tuple]]) -> int:
    """Pairs of accesses to a slot, not both reads, of which neither must come before the other."""
    first, after, accesses = {}, {}, {}
    for rank, queued in enumerate(by_rank):
        for place, (_, what, _, event) in enumerate(queued):
            node = (rank, place)
            first[node] = first.setdefault(event, node) if what == "barrier" else node  # one node on all ranks
    for rank, queued in enumerate(by_rank):
        last: dict[str, tuple] = {}
        for place, (stream, what, slots, event) in enumerate(queued):
            own = first[rank, place]
            needs = after.setdefault(own, set())
            needs |= {last[stream]} if stream in last else set()
            needs |= {last["products"]} if what == "wait" and "products" in last else set()
            needs |= {first[rank, event]} if what == "arrive" else set()
            last[stream] = own
            for owner, slot, written in slots:
                accesses.setdefault((owner, slot), []).append((own, written))
    numbers = {node: number for number, node in enumerate(after)}
    before = dict.fromkeys(after, 0)  # bits: all that must have come before
    changed = True
    while changed:
        changed = False
        for node, needs in after.items():
            bits = before[node]
            for need in needs:
                bits |= before[need] | 1 << numbers[need]
            changed |= bits != before[node]
            before[node] = bits
    return sum(
        not (before[a] >> numbers[b] & 1 or before[b] >> numbers[a] & 1)
        for touched in accesses.values()
        for (a, x), (b, y) in itertools.combinations(touched, 2)
        if a != b and (x or y) and not (x and y and x != y and "all" not in (x, y))  # pieces lie side by side
    )


def recorded(monkeypatch, ranks: int, chunk_size: int | None, pipelined: bool) -> list[list[tuple]]:
    shapes = [(8, 8)] * 11 + [(4, 8)] * 5
    layouts = [row_layout(shape, ranks) for shape in shapes]
    plans = [plan_chunks(layouts, me, cost_of, chunk_size, True) for me in range(ranks)]
    gather_locally(monkeypatch, plans)
    return [Recorder(monkeypatch, me, ranks).run(plan, shapes, pipelined) for me, plan in enumerate(plans)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("pipelined", [True, False])
def test_no_buffer_is_written_while_another_uses_it(monkeypatch, ranks, chunk_size, pipelined):
    assert unordered(recorded(monkeypatch, ranks, chunk_size, pipelined)) == 0


def test_every_wait_is_needed(monkeypatch):
    by_rank = recorded(monkeypatch, 2, 1, True)
    kinds = {
        "the copies' wait for the products": lambda what, _: what == "wait",
        "the barrier before the copies": lambda what, number: what == "barrier" and number % 2 == 0,
        "the barrier after the copies": lambda what, number: what == "barrier" and number % 2 == 1,
        "the products' wait for what arrives": lambda what, _: what == "arrive",
    }
    for kind, is_it in kinds.items():
        nothing = ("products", "nothing", (), None)
        fewer = [[nothing if is_it(entry[1], entry[3]) else entry for entry in queued] for queued in by_rank]
        assert unordered(fewer), f"{kind} could be left out"
    monkeypatch.setattr(peer_copies, "_TURNS", 1)
    assert unordered(recorded(monkeypatch, 2, 1, True)), "one buffer of a direction is too few"
