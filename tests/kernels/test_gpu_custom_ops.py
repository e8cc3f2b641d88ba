"""The public operations on a CUDA device: Triton is chosen, agrees with PyTorch's form, compiles and is captured."""

import pytest
import torch

from stylefast import kernels
from stylefast.kernels import registry
from tests.kernels.test_custom_ops import CASES, by_name

pytestmark = pytest.mark.gpu


def _on_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return [_on_gpu(x) for x in value] if isinstance(value, list) else value


def _case(name, seed):
    return [_on_gpu(argument) for argument in CASES[name](seed)], by_name(getattr(kernels, name))


@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_first_choice(name):
    arguments, _ = _case(name, 0)
    assert registry.choose(registry.operation(name), tuple(arguments))[0] == "triton"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_triton_agrees_with_pytorchs_form(name, seed):
    arguments, function = _case(name, seed)
    with registry.using("torch", name):
        expected = function(*arguments)
    torch.testing.assert_close(function(*arguments), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_finds_schema_fake_and_dispatch_right(name):
    torch.library.opcheck(registry.operation(name).op, tuple(_case(name, 0)[0]))


@pytest.mark.parametrize("name", CASES)
def test_torch_compile_takes_the_public_function_whole(name):
    torch._dynamo.reset()
    arguments, function = _case(name, 0)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(*arguments), function(*arguments))


@pytest.mark.parametrize("name", CASES)
def test_a_captured_call_follows_new_values_in_the_same_tensors(name):
    arguments, function = _case(name, 0)
    function(*arguments)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*arguments)
    others = [_on_gpu(argument) for argument in CASES[name](1)]
    for mine, theirs in zip(arguments, others):
        for into, new in zip(*((x if isinstance(x, list) else [x]) for x in (mine, theirs))):
            if isinstance(into, torch.Tensor):
                into.copy_(new)
    graph.replay()
    torch.testing.assert_close(captured, function(*arguments))


def test_a_page_out_of_range_makes_its_row_nan_and_no_other(monkeypatch):
    q = torch.randn(2, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    page = torch.tensor([[-1], [7]], device="cuda")
    out = kernels.shared_attention(q, q, q, page)
    assert out[0].isfinite().all() and out[1].isnan().all()
    monkeypatch.setenv("STYLEFAST_CHECKS", "1")
    with pytest.raises(ValueError, match="page holds 7"):
        kernels.shared_attention(q, q, q, page)
