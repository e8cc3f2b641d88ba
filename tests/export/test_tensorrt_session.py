"""Sessions over engines that are stood in for on the CPU, and over real ones where there is a GPU."""

import pytest
import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, OutOfMemory
from stylefast.export.tensorrt import RTX, package_of, present_target
from stylefast.export.tensorrt_build import build_engine
from stylefast.export.tensorrt_session import TensorRTSession
from tests.export.fake_tensorrt import CpuQueue, EngineInvalidityDiagnostics, EngineValidity, fake_tensorrt, plan


@pytest.fixture
def trt():
    return fake_tensorrt()


@pytest.fixture
def engine_file(tmp_path):
    (tmp_path / "a.engine").write_bytes(plan())
    return tmp_path / "a.engine"


def opened(path, trt, **options):
    return TensorRTSession(path, trt=trt, queue=CpuQueue(), **options)


def aligned(*shape):
    """A tensor at a multiple of 256 bytes, as those of torch's CUDA allocator are."""
    raw = torch.zeros(64 + torch.Size(shape).numel())
    skip = -raw.data_ptr() % 256 // 4
    return raw[skip : skip + torch.Size(shape).numel()].view(shape).copy_(torch.randn(shape))


def expected(x, pages):
    return x + pages[torch.arange(len(x)) % len(pages)]


def test_an_engine_tells_its_inputs_outputs_and_layers(engine_file, trt):
    session = opened(engine_file, trt)
    assert session.inputs == {"x": (torch.float32, (-1, 4)), "page_kv_0": (torch.float32, (-1, 4))}
    assert session.outputs == {"out": (torch.float32, (-1, 4))}
    assert session.layers.fused_attentions == 1
    assert session.nbytes > 640


def test_results_are_right_whatever_comes_in_which_order(engine_file, trt):
    session, pages = opened(engine_file, trt, shapes_kept=2), [aligned(2, 4), aligned(3, 4)]
    for rows in (3, 3, 3, 1, 40, 3, 1, 1, 1, 40, 3, 3, 3):
        for pool in (pages[0], pages[0], pages[1], pages[0], pages[1], pages[1], pages[1]):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(session.run({"x": x, "page_kv_0": pool})["out"], expected(x, pool))
            pool += 1


def test_outputs_are_written_where_they_are_wanted_and_made_else(engine_file, trt):
    session, pages, x = opened(engine_file, trt), aligned(2, 4), torch.randn(2, 4)
    out = torch.empty(4, 2).T
    assert session.run({"x": x, "page_kv_0": pages}, {"out": out})["out"] is out
    torch.testing.assert_close(out, expected(x, pages))
    first = session.run({"x": x, "page_kv_0": pages})["out"]
    second = session.run({"x": 2 * x, "page_kv_0": pages})["out"]
    torch.testing.assert_close((first, second), (expected(x, pages), expected(2 * x, pages)))


def test_a_graph_is_recorded_on_the_second_run_and_replayed_after(engine_file, trt):
    session, pages = opened(engine_file, trt), aligned(2, 4)
    counts = []
    for _ in range(5):
        session.run({"x": torch.randn(2, 4), "page_kv_0": pages})
        counts.append((session._queue.recorded, trt.opened.contexts[0].calls))
    assert counts == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2)]


def test_a_graph_is_recorded_anew_only_for_addresses_that_stay(engine_file, trt):
    session, pools = opened(engine_file, trt), [aligned(2, 4), aligned(2, 4)]

    def run(pool):
        session.run({"x": torch.randn(2, 4), "page_kv_0": pools[pool]})
        return session._queue.recorded

    assert [run(pool) for pool in (0, 0, 1, 0, 1, 1, 1, 0, 1)] == [0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_every_shape_has_its_own_context_on_the_same_scratch_memory(engine_file, trt):
    session, pages = opened(engine_file, trt, shapes_kept=2), aligned(2, 4)
    for rows in (1, 2, 1, 3, 1, 2):
        session.run({"x": torch.randn(rows, 4), "page_kv_0": pages})
    # 1, 2, 3, which throws 2 out, and 2 again
    assert [context.shapes["x"][0] for context in trt.opened.contexts] == [1, 2, 3, 2]
    assert len({context.scratch for context in trt.opened.contexts}) == 1


def test_nothing_is_recorded_where_it_is_not_wanted_or_not_possible(tmp_path, trt):
    for name, facts, options in (("a", {}, {"cuda_graphs": False}), ("b", {"capturable": False}, {})):
        (tmp_path / name).write_bytes(plan(**facts))
        session, pages = opened(tmp_path / name, trt, **options), aligned(2, 4)
        for _ in range(4):
            session.run({"x": torch.randn(2, 4), "page_kv_0": pages})
        assert (session._queue.recorded, trt.opened.contexts[0].calls) == (0, 4)


def test_an_engine_that_can_not_be_recorded_runs_without_and_says_so_once(engine_file, trt, caplog, monkeypatch):
    session, pages, tried = opened(engine_file, trt), aligned(2, 4), []

    def record(call):
        tried.append(1)
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(session._queue, "record", record)
    for _ in range(4):
        x = torch.randn(2, 4)
        torch.testing.assert_close(session.run({"x": x, "page_kv_0": pages})["out"], expected(x, pages))
    assert len(tried) == 1 and caplog.text.count("could not be recorded") == 1


def test_the_tightest_profile_is_chosen(engine_file, trt):
    session, pages = opened(engine_file, trt), aligned(2, 4)
    for rows in (4, 5):
        session.run({"x": torch.randn(rows, 4), "page_kv_0": pages})
    assert [context.profile for context in trt.opened.contexts] == [0, 1]


def test_sizes_outside_of_all_profiles_are_refused_with_their_bounds(engine_file, trt):
    session, pages = opened(engine_file, trt), aligned(2, 4)
    with pytest.raises(EngineMismatch, match=r"x of shape \[65, 4\].*profile 0 takes \[1 to 4, 4\].*\[1 to 64, 4\]"):
        session.run({"x": torch.randn(65, 4), "page_kv_0": pages})
    with pytest.raises(EngineMismatch, match=r"page_kv_0 of shape \[9, 4\].*\[1 to 8, 4\] for page_kv_0"):
        session.run({"x": torch.randn(2, 4), "page_kv_0": aligned(9, 4)})


def test_inputs_and_outputs_that_do_not_fit_are_refused(engine_file, trt):
    session, pages, x = opened(engine_file, trt), aligned(2, 4), torch.randn(2, 4)
    with pytest.raises(InvalidRequest, match="needs input 'page_kv_0'"):
        session.run({"x": x})
    with pytest.raises(InvalidRequest, match="has no input 'y'"):
        session.run({"x": x, "page_kv_0": pages, "y": x})
    with pytest.raises(InvalidRequest, match="has no output 'y'"):
        session.run({"x": x, "page_kv_0": pages}, {"y": x})
    with pytest.raises(EngineMismatch, match="float16, and a.engine was exported for float32"):
        session.run({"x": x.half(), "page_kv_0": pages})
    with pytest.raises(EngineMismatch, match=r"shape \[2, 4, 1\], and a.engine was exported for \[None, 4\]"):
        session.run({"x": x[..., None], "page_kv_0": pages})
    with pytest.raises(InvalidRequest, match="on meta"):
        session.run({"x": x.to("meta"), "page_kv_0": pages})
    with pytest.raises(InvalidRequest, match=r"output out is float32 \[3, 4\]"):
        session.run({"x": x, "page_kv_0": pages}, {"out": torch.empty(3, 4)})
    for pool in (aligned(4, 2).T, aligned(3, 4)[1:]):
        with pytest.raises(InvalidRequest, match="multiple of 256 bytes"):
            session.run({"x": x, "page_kv_0": pool})


def test_a_run_that_fails_tells_why(tmp_path, trt):
    for reason, kind in (("illegal instruction", ExportError), ("out of memory", OutOfMemory)):
        (tmp_path / "a").write_bytes(plan(broken=reason))
        with pytest.raises(kind, match=reason):
            opened(tmp_path / "a", trt).run({"x": torch.randn(2, 4), "page_kv_0": aligned(2, 4)})


def test_a_closed_session_runs_no_more_and_keeps_the_compiled_kernels(engine_file, trt, tmp_path):
    kernels = tmp_path / "kernels"
    kernels.write_bytes(b"of another GPU")
    session = opened(engine_file, trt, kernels=kernels)
    session.close()
    session.close()
    assert kernels.read_bytes() == b"compiled" and session.nbytes == 0
    with pytest.raises(ExportError, match="was closed"):
        session.run({"x": torch.randn(2, 4), "page_kv_0": aligned(2, 4)})


@pytest.mark.parametrize(
    ("cause", "kind", "named"),
    [
        ("VERSION_MISMATCH", EngineMismatch, r"built by version 1\.7\.1\.116"),
        ("UNSUPPORTED_CC", EngineMismatch, "other chips"),
        ("MALFORMED_ENGINE", ExportError, "damaged"),
        ("INSUFFICIENT_GPU_MEMORY", OutOfMemory, "memory of the GPU"),
    ],
)
def test_an_engine_that_is_not_for_this_gpu_is_refused_with_the_reason(engine_file, trt, cause, kind, named):
    trt.validity = EngineValidity.INVALID, EngineInvalidityDiagnostics[cause].value
    with pytest.raises(kind, match=named):
        opened(engine_file, trt)


def test_what_is_only_found_while_opening_is_told_apart_too(tmp_path, trt):
    for reason, kind in (("incompatible device", EngineMismatch), ("checksum is wrong", ExportError)):
        (tmp_path / "a").write_bytes(plan(refused=reason))
        with pytest.raises(kind, match=reason):
            opened(tmp_path / "a", trt)


def test_missing_truncated_and_foreign_files_are_refused(tmp_path, engine_file, trt):
    with pytest.raises(ExportError, match="there is no engine at"):
        opened(tmp_path / "b.engine", trt)
    whole = engine_file.read_bytes()
    for data, named in ((whole[:-1], "truncated"), (whole[:20], "truncated"), (b"PK" + whole, "no TensorRT engine")):
        engine_file.write_bytes(data)
        with pytest.raises(ExportError, match=named):
            opened(engine_file, trt)
    engine_file.write_bytes(b"ftrt" + whole[4:])
    with pytest.raises(EngineMismatch, match="of the package 'tensorrt'"):
        opened(engine_file, trt)


def test_devices_without_tensorrt_are_refused(engine_file, trt, monkeypatch):
    with pytest.raises(InvalidRequest, match="'cpu'"):
        TensorRTSession(engine_file, "cpu", trt=trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineMismatch, match="run on CUDA devices"):
        TensorRTSession(engine_file, "cuda", trt=trt)


@pytest.mark.gpu
def test_a_real_engine_agrees_with_torch_on_a_gpu(tmp_path):
    pytest.importorskip("onnx")
    from tests.export.test_tensorrt_build import HEADS, SHAPES, D, attention, projection

    target = present_target()
    pytest.importorskip(package_of([target]))
    build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", [target], [SHAPES])
    kernels = tmp_path / "kernels" if package_of([target]) == RTX else None
    session = TensorRTSession(tmp_path / "a.engine", kernels=kernels, by_address=("k", "v"))
    weight = torch.from_numpy(projection()).cuda()
    for rows, tokens in ((2, 64), (2, 64), (2, 64), (3, 17), (2, 64), (3, 17), (3, 17)):
        x = {name: torch.randn(rows, HEADS, tokens, D, device="cuda", dtype=torch.float16) for name in "qkv"}
        x["mask"] = torch.randn(rows, 1, 1, tokens, device="cuda", dtype=torch.float16)
        wanted = torch.softmax((x["q"] @ x["k"].mT + x["mask"]).float(), -1).half() @ x["v"] @ weight
        for _ in range(3):
            found = session.run(x)["out"]
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-1)
    session.close()


@pytest.mark.gpu
def test_a_truncated_real_engine_is_refused_on_a_gpu(tmp_path):
    pytest.importorskip("onnx")
    from tests.export.test_tensorrt_build import SHAPES, attention

    target = present_target()
    pytest.importorskip(package_of([target]))
    build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", [target], [SHAPES])
    whole = (tmp_path / "a.engine").read_bytes()
    (tmp_path / "a.engine").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match="truncated"):
        TensorRTSession(tmp_path / "a.engine")
