"""Background copies: order, progress, lifetime of the tensors, refusals."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import InvalidRequest, MissingDependency, ModelFormatError
from stylefast.models.stored_tensors import StoredTensors
from stylefast.runtime.banks import copy_engine
from stylefast.runtime.banks.copy_engine import CopyEngine
from tests.runtime.backends import backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture
def engine(backend):
    with CopyEngine(threads=2, capacity=8, backend=backend) as engine:
        assert engine.backend == backend
        yield engine


@backends
def test_tensors_of_any_type_and_shape_arrive_bit_for_bit(engine):
    shapes = [(3, 5, 7), (1,), (), (0, 4), (257,)]
    sources = [torch.randint(0, 2, shape).to(dtype) for shape in shapes for dtype in DTYPES]
    sources.append(torch.tensor([float("nan"), -0.0, float("inf")]))
    destinations = [torch.zeros_like(source) for source in sources]
    ticket = engine.copy(sources, destinations)
    ticket.wait()
    assert ticket.done and ticket.chunks == ticket.progress() == len(sources)
    for source, destination in zip(sources, destinations):
        assert destination.reshape(-1).view(torch.uint8).equal(source.reshape(-1).view(torch.uint8))


@backends
def test_parts_of_files_arrive_beside_tensors_and_a_file_cut_short_is_told(engine, tmp_path):
    kept = {"a": torch.randn(3, 1000), "b": torch.randn(7).half()}
    save_file(kept, tmp_path / "stored.safetensors")
    stored = StoredTensors(tmp_path / "stored.safetensors")
    sources = [stored.span("a", (2,)), torch.arange(5.0), stored.span("b")]
    destinations = [torch.zeros(1000), torch.zeros(5), torch.zeros(7, dtype=torch.float16)]
    ticket = engine.copy(sources, destinations)
    ticket.wait()
    ticket.check()
    for found, wanted in zip(destinations, (kept["a"][2], torch.arange(5.0), kept["b"])):
        assert torch.equal(found, wanted)
    os.truncate(stored.path, stored.header.offsets["b"] - 8)
    ticket = engine.copy(sources, destinations)
    ticket.wait()
    with pytest.raises(ModelFormatError, match="stored.safetensors was written to while it was in use"):
        ticket.check()


@backends
def test_a_file_that_can_not_be_read_is_told(engine, tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "stored.safetensors")
    stored = StoredTensors(tmp_path / "stored.safetensors")
    span, stored.descriptor = stored.span("a"), os.open(tmp_path, os.O_RDONLY)
    ticket = engine.copy([span], [torch.zeros(9)])
    ticket.wait()
    with pytest.raises(ModelFormatError, match="can't read stored.safetensors: Is a directory"):
        ticket.check()
    os.close(stored.descriptor)


@backends
def test_only_the_given_bytes_are_written(engine):
    store = torch.full((9,), -1.0)
    engine.copy([torch.arange(3.0)], [store[3:6]]).wait()
    assert store.tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1]


@backends
def test_the_first_chunks_of_a_ticket_are_there_when_waited_for(engine):
    """Forty chunks through a queue of eight, so that giving them blocks as well."""
    sources = [torch.full((5000 + i,), float(i)) for i in range(40)]
    destinations = [torch.full_like(source, -1.0) for source in sources]
    ticket = engine.copy(sources, destinations)
    for k in range(1, 41):
        ticket.wait(k)
        assert k <= ticket.progress() <= 40
        assert destinations[k - 1].equal(sources[k - 1])


@backends
def test_a_ticket_that_is_done_means_that_all_before_it_are(engine):
    sources = [torch.full((50_000,), float(i)) for i in range(6)]
    destinations = [torch.zeros(50_000) for _ in sources]
    tickets = [engine.copy([source], [destination]) for source, destination in zip(sources, destinations)]
    tickets[-1].wait()
    assert all(ticket.done for ticket in tickets)
    assert all(a.equal(b) for a, b in zip(sources, destinations))


@backends
def test_many_threads_may_give_lists(engine):
    failures = []

    def work(number):
        for _ in range(30):
            sources = [torch.full((300,), float(number + i)) for i in range(11)]
            destinations = [torch.zeros(300) for _ in sources]
            engine.copy(sources, destinations).wait()
            failures.extend(i for i, (a, b) in enumerate(zip(sources, destinations)) if not a.equal(b))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [] and not any(thread.is_alive() for thread in threads)


@backends
def test_tensors_live_until_they_are_copied_and_no_longer_than_the_next_call_after(engine):
    destination = torch.zeros(200_000)
    source = torch.ones(200_000)
    gone = weakref.ref(source)
    engine.copy([torch.zeros(2_000_000)], [torch.ones(2_000_000)])
    ticket = engine.copy([source], [destination])
    del source
    ticket.wait()
    assert destination.eq(1).all()
    engine.copy([], []).wait()
    gc.collect()
    assert gone() is None


@backends
def test_closing_finishes_what_is_queued_and_ends_the_engine(backend):
    engine = CopyEngine(backend=backend)
    sources = [torch.full((100_000,), float(i)) for i in range(20)]
    destinations = [torch.zeros(100_000) for _ in sources]
    ticket = engine.copy(sources, destinations)
    engine.close()
    assert ticket.done and all(a.equal(b) for a, b in zip(sources, destinations))
    ticket.wait()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.copy(sources, destinations)


@backends
def test_an_engine_that_is_forgotten_finishes_its_copies(backend):
    before = set(threading.enumerate())
    destination = torch.zeros(300_000)
    CopyEngine(backend=backend).copy([torch.ones(300_000)], [destination])
    gc.collect()
    assert destination.eq(1).all()
    assert set(threading.enumerate()) <= before  # of those, some may have ended meanwhile


@backends
def test_an_interpreter_ends_with_copies_under_way(backend):
    script = (
        "import torch; from stylefast.runtime.banks.copy_engine import CopyEngine\n"
        f"engine = CopyEngine(backend={backend!r})\n"
        "ticket = engine.copy([torch.ones(1 << 20)] * 30, [torch.empty(1 << 20) for _ in range(30)])\n"
        "print('end')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@backends
def test_bad_pairs_are_refused_before_anything_is_copied(engine):
    a, b = torch.ones(4), torch.zeros(4)
    block = torch.zeros(10)
    cases = [
        ([a], [b, b], "1 sources and 2 destinations"),
        ([a, a], [b, torch.zeros(5)], "source 1 has 16 bytes, but destination 1 has 20"),
        ([a], [torch.zeros(4, 2)[:, 0]], r"destination 0 of shape \(4,\) is not contiguous"),
        ([a.to("meta")], [b], "source 0 is on meta"),
        ([block[:6]], [block[3:9]], "source 0 and destination 0 overlap"),
    ]
    for sources, destinations, message in cases:
        with pytest.raises(InvalidRequest, match=message):
            engine.copy(sources, destinations)
    assert b.eq(0).all()


@backends
@pytest.mark.parametrize("chunks", [-2, 3])
def test_waiting_for_chunks_that_a_ticket_does_not_have_is_an_error(engine, chunks):
    ticket = engine.copy([torch.ones(2)] * 2, [torch.zeros(2), torch.zeros(2)])
    with pytest.raises(IndexError, match=f"chunks is {chunks}, but the ticket has 2"):
        ticket.wait(chunks)
    ticket.wait(0)


def test_bad_settings_are_refused(monkeypatch):
    with pytest.raises(InvalidRequest, match="threads is 0 and capacity 5"):
        CopyEngine(threads=0, capacity=5)
    with pytest.raises(InvalidRequest, match="'rust'.*cpp"):
        CopyEngine(backend="rust")
    monkeypatch.setattr(copy_engine, "extension", lambda: None)
    monkeypatch.setattr(copy_engine, "extension_error", lambda: "not built; `make extension`")
    with pytest.raises(MissingDependency, match="make extension"):
        CopyEngine(backend="cpp")
    with CopyEngine() as engine:
        assert engine.backend == "python"
