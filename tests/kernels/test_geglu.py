"""GEGLU in every form: fp64, the far ends of the gate, strides."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylefast.kernels.geglu import geglu_ref, operation
from tests.kernels.conformance import (
    CPP,
    FLOATS,
    GPU,
    NAN,
    Draw,
    assert_as_near_as_pytorch,
    captured,
    each,
    each_type,
    equal,
    forms,
    normal,
)

FORMS = forms(geglu_ref, small={"rows": 2, "columns": 16, "num_warps": 4}, committed=None)
CORE = [form for form in FORMS if form.name != "triton-committed"]
EXAMPLES = {"torch": 20, "cpp": 20, "triton": 4}


def composed(x):
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)


def check(form, x, **bound):
    assert_as_near_as_pytorch(form(operation, x), composed(x), geglu_ref(x.double()), **bound)


@each_type(FORMS)
def test_drawn_calls_are_as_near_to_the_formula_as_pytorch(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        lead, inner = [draw.one((1, 2, 3, 5)) for _ in range(draw.one(range(4)))], draw.one((1, 7, 16, 17, 33, 70))
        x = (draw.normal(*lead, 2 * inner) * draw.one((0.1, 1.0, 6.0))).to(dtype)
        wide = x.new_full((*lead, 2 * inner + 5), NAN)[..., 2 : 2 * inner + 2].copy_(x)
        check(form, draw.one((x, wide)))


@each(CPP, "cpp")
def test_gelu_errs_no_more_than_pytorchs_over_all_sizes_of_gate(form):
    gate = torch.cat([torch.linspace(-14, 14, 40001), torch.tensor([-1e-30, 1e-30, 1e-3, -1e-3, 30.0, -30.0])])
    found = form(operation, torch.cat([torch.ones_like(gate), gate])[None])[0]
    exact = F.gelu(gate.double())
    assert (found.double() - exact).abs().max() <= 2 * (F.gelu(gate).double() - exact).abs().max()
    # the negative tail keeps its digits, which 1 + erf can't
    tail = (gate > -5) & (gate < 0)
    assert ((found.double() - exact).abs() <= 2e-6 * exact.abs())[tail].all()


@each(CORE, "torch cpp triton")
def test_far_gates_close_or_open_all_the_way(form):
    x = torch.tensor([[1.0, 1.0, 2.0, 2.0, -60.0, 60.0, -3e38, 1e38]])
    assert equal(form(operation, x) + 0.0, torch.tensor([[0.0, 60.0, 0.0, 2e38]]))


@each(CPP, "cpp")
def test_infinities_and_nan_follow_the_formula(form):
    gate = torch.tensor([math.inf, -math.inf, NAN, 0.0, -0.0, 1e30, -1e30])
    expected = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert equal(form(operation, torch.cat([torch.ones(7), gate])), expected)


@each(CORE)
def test_slices_transposed_rows_single_rows_and_strided_channels_are_taken(form):
    wide = normal(6, 4, 50)
    columns = () if form.kind == "cpp" else (normal(8, 4).t(),)  # the public function refuses these
    for x in (wide[1::2, :, 3:29], wide.transpose(0, 1)[..., :26], wide[0, 0, :26], wide[:, 1:3, :26], *columns):
        check(form, x)


@each(CPP, "cpp")
def test_large_results_in_fresh_memory_are_complete(form):
    x = normal(1500, 2 * 1024)  # 6 MB of results
    out = form(operation, x)
    assert_as_near_as_pytorch(out[::97], composed(x[::97]), geglu_ref(x[::97].double()))
    assert out.isfinite().all()


@each(CORE, "torch cpp triton")
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_zero_sizes_do_nothing(form, shape):
    assert form(operation, torch.empty(shape)).shape == (shape[0], shape[1] // 2)


@each(CORE[-2:-1])
def test_the_kernel_writes_into_rows_that_lie_apart(form):
    from stylefast.kernels.gpu.geglu import geglu

    x, out = normal(5, 34), torch.full((5, 40), NAN)
    geglu(x, out[:, 3:20], config=form.config)
    torch.testing.assert_close(out[:, 3:20].double(), geglu_ref(x.double()), rtol=1.3e-6, atol=1e-5)
    assert out[:, :3].isnan().all() and out[:, 20:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4096, 5120), (8, 1024, 10240), (3, 77, 2562), (5, 48)], ids=str)
def test_sdxls_sizes_on_a_gpu_are_as_near_as_pytorch_and_follow_new_values_in_a_graph(shape):
    for dtype in FLOATS:
        check(GPU, normal(*shape, dtype=dtype) * 2)
    x = normal(*shape)
    replay, given = captured(operation, x)
    given[0].mul_(-0.5)
    torch.testing.assert_close(replay().double(), geglu_ref(-0.5 * x.double()), rtol=1e-5, atol=1e-5)
