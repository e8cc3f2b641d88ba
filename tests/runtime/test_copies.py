"""Copies in the background: content, files that fail, lifetime of the tensors, ends, refusals."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import InvalidRequest, ModelFormatError
from stylefast.models.stored_tensors import StoredTensors
from stylefast.runtime.banks import copies
from stylefast.runtime.banks.copies import start_copies
from tests.support.cpp_forms import backends
from tests.support.watch import WAIT

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def form(request, monkeypatch):
    """The form that a test is for: without the extension, or with it."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend == "python":
        monkeypatch.setattr(copies, "extension", lambda: None)
    elif backend == "cpp":
        assert copies.extension() is not None
        monkeypatch.delattr(copies, "copy_blocks_ref")


@pytest.fixture
def copy():
    """Copy to the end; raise the first error."""
    with ThreadPoolExecutor(2) as executor:

        def run(sources, destinations):
            started = start_copies(executor, sources, destinations)
            wait(started)
            for one in started:
                one.result()

        yield run


@backends
def test_tensors_of_any_type_and_shape_arrive_bit_for_bit(copy, backend):
    shapes = [(3, 5, 7), (1,), (), (0, 4), (257,)]
    sources = [torch.randint(0, 2, shape).to(dtype) for shape in shapes for dtype in DTYPES]
    sources.append(torch.tensor([float("nan"), -0.0, float("inf")]))
    destinations = [torch.zeros_like(source) for source in sources]
    copy(sources, destinations)
    for source, destination in zip(sources, destinations):
        assert destination.reshape(-1).view(torch.uint8).equal(source.reshape(-1).view(torch.uint8))


@backends
def test_bytes_may_go_into_a_tensor_of_another_type(copy, backend):
    destination = torch.zeros(8, dtype=torch.uint8)
    copy([torch.tensor([1.0, -2.0])], [destination])
    assert destination.view(torch.float32).tolist() == [1, -2]


@backends
def test_parts_of_files_arrive_beside_tensors_and_a_file_cut_short_is_told(copy, backend, tmp_path):
    kept = {"a": torch.randn(3, 1000), "b": torch.randn(7).half()}
    save_file(kept, tmp_path / "stored.safetensors")
    stored = StoredTensors(tmp_path / "stored.safetensors")
    sources = [stored.span("a", (2,)), torch.arange(5.0), stored.span("b")]
    destinations = [torch.zeros(1000), torch.zeros(5), torch.zeros(7, dtype=torch.float16)]
    copy(sources, destinations)
    for found, wanted in zip(destinations, (kept["a"][2], torch.arange(5.0), kept["b"])):
        assert torch.equal(found, wanted)
    os.truncate(stored.path, stored.header.offsets["b"] - 8)
    with pytest.raises(ModelFormatError, match="stored.safetensors was written to while it was in use"):
        copy(sources, destinations)


@backends
def test_a_file_of_the_same_length_that_was_written_to_is_told(copy, backend, tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "stored.safetensors")
    stored = StoredTensors(tmp_path / "stored.safetensors")
    with open(stored.path, "r+b") as file:
        file.seek(stored.header.offsets["a"])
        file.write(b"\x01")
    os.utime(stored.path, (1, 1))
    with pytest.raises(ModelFormatError, match="stored.safetensors was written to while it was in use"):
        copy([stored.span("a")], [torch.zeros(9)])


@backends
def test_a_file_that_can_not_be_read_is_told(copy, backend, tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "stored.safetensors")
    stored = StoredTensors(tmp_path / "stored.safetensors")
    span, stored.descriptor = stored.span("a"), os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ModelFormatError, match="can't read stored.safetensors: Is a directory"):
        copy([torch.ones(2), span], [torch.zeros(2), torch.zeros(9)])
    os.close(stored.descriptor)


@backends
def test_only_the_given_bytes_are_written(copy, backend):
    store = torch.full((9,), -1.0)
    copy([torch.arange(3.0)], [store[3:6]])
    assert store.tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1]


@backends
def test_an_empty_list_is_done_at_once(copy, backend):
    copy([], [])


@backends
def test_many_threads_may_give_lists(copy, backend):
    failures = []

    def work(number):
        for _ in range(30):
            sources = [torch.full((300,), float(number + i)) for i in range(11)]
            destinations = [torch.zeros(300) for _ in sources]
            copy(sources, destinations)
            failures.extend(i for i, (a, b) in enumerate(zip(sources, destinations)) if not a.equal(b))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert failures == [] and not any(thread.is_alive() for thread in threads)


@backends
def test_tensors_live_until_they_are_copied_and_no_longer(backend):
    destination, source = torch.zeros(200_000), torch.ones(200_000)
    gone, held = weakref.ref(source), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(held.wait)
        started = start_copies(executor, [source], [destination])
        del source
        gc.collect()
        assert gone() is not None
        held.set()
        wait(started)
    assert destination.eq(1).all() and gone() is None


@backends
def test_shutting_down_finishes_what_was_given_and_refuses_more(backend):
    executor = ThreadPoolExecutor(2)
    sources = [torch.full((100_000,), float(i)) for i in range(20)]
    destinations = [torch.zeros(100_000) for _ in sources]
    start_copies(executor, sources, destinations)
    executor.shutdown()
    assert all(a.equal(b) for a, b in zip(sources, destinations))
    with pytest.raises(RuntimeError, match="shutdown"):
        start_copies(executor, sources, destinations)


@backends
def test_a_cancelled_list_is_never_written(backend):
    destination, held = torch.zeros(9), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(held.wait)
        started = start_copies(executor, [torch.ones(9)], [destination])
        assert started[0].cancel()
        held.set()
    assert destination.eq(0).all()


@pytest.mark.parametrize("extension", ["copies.extension", "lambda: None"])
def test_an_interpreter_ends_with_copies_under_way(extension):
    script = (
        "import torch; from concurrent.futures import ThreadPoolExecutor; from stylefast.runtime.banks import copies\n"
        f"copies.extension = {extension}\n"
        "sources, destinations = [torch.ones(1 << 20)] * 30, [torch.empty(1 << 20) for _ in range(30)]\n"
        "copies.start_copies(ThreadPoolExecutor(4), sources, destinations)\n"
        "print('end')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_bad_pairs_are_refused_before_anything_is_copied(copy):
    a, b = torch.ones(4), torch.zeros(4)
    block = torch.zeros(10)
    cases = [
        ([a], [b, b], "1 sources and 2 destinations"),
        ([a, a], [b, torch.zeros(5)], "source 1 has 16 bytes, but destination 1 has 20"),
        ([a], [torch.zeros(4, 2)[:, 0]], r"destination 0 of shape \(4,\) on cpu must be contiguous"),
        ([a.to("meta")], [b], "source 0 of shape .* on meta must be"),
        ([block[:6]], [block[3:9]], "source 0 and destination 0 overlap"),
    ]
    for sources, destinations, message in cases:
        with pytest.raises(InvalidRequest, match=message):
            copy(sources, destinations)
    assert b.eq(0).all()
