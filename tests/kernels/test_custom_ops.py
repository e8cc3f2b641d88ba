"""Every operation as a PyTorch custom op: opcheck, torch.compile, torch.export, gradients, autocast, CUDA graphs."""

import os
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stylefast import kernels
from stylefast.kernels import registry
from stylefast.kernels.shared_attention import FP8
from tests.kernels.conformance import assert_as_near_as_pytorch, doubled, moved
from tests.support import fp64


def _shared(seed, pool_type=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(3, 9, 3, 2, 32, generator=generator)
    q, k, v = fused.unbind(2)
    page, mode = torch.randint(-1, 5, (3, 2), generator=generator), torch.randint(0, 3, (3,), generator=generator)
    scale, shift = torch.rand(2, 3, 2, generator=generator)
    affine = torch.randn(2, 3, 3, 2, 32, generator=generator).unbind()
    pool = [torch.randn(2, 5, 2, 32, generator=generator).to(pool_type) for _ in range(2)]
    scales = [torch.rand(2, 2, 32, generator=generator) if pool_type == FP8 else None for _ in range(2)]
    bias = torch.randn(5, 9, generator=generator)
    return (q, k, v, page, mode, scale, shift, bias, *affine, *pool, *scales)


def _gated(seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(3, 7, 2, 32, generator=generator)
    text, images = torch.randn(2, 2, 5, 2, 32, generator=generator), torch.randn(2, 3, 4, 2, 32, generator=generator)
    page = torch.randint(-1, 3, (3, 2), generator=generator)
    strength = torch.randn(3, 2, 6, generator=generator)[:, :, 1]
    group = torch.randint(0, 2, (3, 2), generator=generator)
    masks, mask_index = torch.rand(2, 7, generator=generator), torch.randint(-1, 2, (3, 2), generator=generator)
    lengths, text_page = torch.tensor([4, 2, 3]), torch.randint(0, 2, (3,), generator=generator)
    text_lengths = torch.randint(1, 6, (2,), generator=generator)
    return (q, *text, text_page, text_lengths, *images, lengths, page, strength, group, masks, mask_index)


def _norm(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, 5, 6, generator=generator).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 8, generator=generator)
    mean, variance = torch.rand(2, 2, 4, generator=generator)
    page = torch.randint(-1, 5, (3,), generator=generator)
    return (x, 4, weight, bias, 1e-5, True, page, mean, variance, 30)


def _adain(seed):
    generator = torch.Generator().manual_seed(seed)
    mean, variance = torch.rand(2, 3, 4, 2, 32, generator=generator)
    pool_mean, pool_variance = torch.rand(2, 3, 2, 2, 32, generator=generator)
    page, strength = torch.randint(-1, 6, (4,), generator=generator), torch.rand(4, 3, generator=generator)
    return (mean, variance, page, strength, pool_mean, pool_variance, True)


def _step(seed):
    generator = torch.Generator().manual_seed(seed)
    latents, anchor, noise = torch.randn(3, 2, 4, 6, 6, generator=generator)
    history, predictions = torch.randn(2, 2, 4, 6, 6, generator=generator), torch.randn(5, 4, 6, 6, generator=generator)
    rows, weights = torch.randint(-1, 5, (2, 4), generator=generator), torch.randn(2, 4, generator=generator)
    denoised, update = torch.randn(2, 2, generator=generator), torch.randn(2, 2, 6, generator=generator)
    rescale = torch.rand(2, generator=generator)
    return (latents, anchor, history, predictions, rows, weights, rescale, denoised, update, noise)


def _layer(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 5, 8, generator=generator), *torch.randn(2, 8, generator=generator), 1e-5)


def _add_layer(seed):
    x, *rest = _layer(seed)
    return (x, _layer(seed + 100)[0], *rest)


def _stored(seed):
    generator = torch.Generator().manual_seed(seed)
    values = (100 * torch.randn(3, 5, 19, generator=generator)).to(torch.float8_e4m3fn)
    return torch.rand(3, 19, generator=generator), values.view(torch.uint8), torch.zeros(3, 5, 19)


def _loras(seed):
    generator = torch.Generator().manual_seed(seed)
    x, (down, up) = torch.randn(3, 7, 16, generator=generator), torch.randn(2, 4, 16, 16, generator=generator)
    unit, scale = torch.randint(-1, 4, (2, 3, 2), generator=generator), torch.rand(3, 2, generator=generator)
    return (x, down[:, None], up, unit, scale, 1, 0, list(torch.randn(2, 3, 7, 16, generator=generator)))


CASES = {
    "shared_attention": _shared,
    "token_stats": lambda seed: ([x for x in _shared(seed)[:3]],),
    "adain_affine": _adain,
    "dequantise": _stored,
    "gated_cross_attention": _gated,
    "group_norm_silu": _norm,
    "geglu": lambda seed: (_layer(seed)[0],),
    "layer_norm": _layer,
    "add_layer_norm": _add_layer,
    "guided_step": _step,
    "row_lora": _loras,
}
# arguments that are fp32 whatever the others are; those of adain_affine and dequantise are fp32 throughout
FP32 = {
    "shared_attention": (5, 6, 7, 8, 9),
    "gated_cross_attention": (9, 11),
    "group_norm_silu": (7, 8),
    "row_lora": (4,),
    "adain_affine": range(7),
    "dequantise": range(3),
}
FORMS = ("torch", "cpp", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch", "cpp")
each_form = pytest.mark.parametrize("name, form", [(name, form) for name in CASES for form in FORMS])
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def test_every_operation_is_among_the_cases():
    assert set(CASES) == set(registry._operations)


# what depends on the form: what is written, and how results lie; dispatch and tracing come before it is chosen
OF_A_FORM = ("test_schema", "test_faketensor")


def in_fp64(name, arguments):
    """The arguments of a case in fp64, but for those that an operation takes in fp32 alone."""
    return [a if i in FP32.get(name, ()) else doubled(a) for i, a in enumerate(arguments)]


def assert_near(found, expected, exact):
    """Hold every result to the one expected: its error against `exact` may be twice as large."""
    results = [x if isinstance(x, (tuple, list)) else (x,) for x in (found, expected, exact)]
    for one, other, right in zip(*results, strict=True):
        assert_as_near_as_pytorch(one, other, right.double())


@each_form
def test_opcheck_finds_schema_fake_and_dispatch_right(name, form):
    checks = {} if form == "torch" else {"test_utils": OF_A_FORM}
    with registry.using(form, name):
        torch.library.opcheck(registry.operation(name).op, CASES[name](0), **checks)


@each_form
def test_the_public_function_gives_the_same_in_every_form_and_autocast_changes_nothing(name, form):
    arguments, function = CASES[name](0), by_name(getattr(kernels, name))
    with registry.using("torch", name):
        expected, exact = function(*arguments), function(*in_fp64(name, arguments))
    with registry.using(form, name):
        found = function(*arguments)
        assert_near(found, expected, exact)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(*arguments), found, rtol=0, atol=0)


def by_name(function):
    """The public function with the custom op's argument order."""
    if function is kernels.shared_attention:
        return lambda *a: function(*a[:7], kernels.Affine(a[8], a[9]), a[10], a[11], a[7], a[12], a[13])
    if function is kernels.dequantise:
        return lambda scale, codes, out: function(codes.view(torch.float8_e4m3fn), scale, out)
    if function is kernels.token_stats:
        return lambda tensors: function(*tensors)
    if function is kernels.row_lora:

        def added(x, down, up, unit, scale, stride, padding, ys):
            ys = [y.clone() for y in ys]
            function(x, ys, kernels.LoraPool(down, up), kernels.LoraRows(unit, scale), stride, padding)
            return tuple(ys)

        return added
    return function


@each_device
@pytest.mark.parametrize("name", CASES)
def test_torch_compile_takes_the_public_function_whole_and_never_compiles_again_for_other_values(name, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = by_name(getattr(kernels, name))
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in range(3):
        arguments = moved(CASES[name](seed), device)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert counter.frame_count == 1


def test_inductor_runs_the_ops_between_its_own_kernels():
    torch._dynamo.reset()
    function = by_name(kernels.shared_attention)

    def block(*arguments):
        return function(arguments[0] * 2, *arguments[1:]).relu() + 1

    arguments = _shared(0)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(*arguments), block(*arguments))


class _Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_torch_export_keeps_the_op_in_the_graph(name):
    arguments = CASES[name](0)
    function = by_name(getattr(kernels, name))
    program = torch.export.export(_Call(function), arguments)
    assert f"stylefast.{name}.default" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), function(*arguments))


@pytest.mark.parametrize("name", ["shared_attention", "gated_cross_attention", "geglu", "layer_norm"])
def test_gradients_flow_through_the_public_functions(name):
    arguments = list(CASES[name](0))
    arguments[0] = arguments[0].double()
    if name != "geglu":
        arguments = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in arguments]
    if name == "shared_attention":
        for i in (5, 6, 7, 8, 9):
            arguments[i] = arguments[i].float()
    if name == "gated_cross_attention":
        arguments[9], arguments[11] = arguments[9].float(), arguments[11].float()
    function = by_name(getattr(kernels, name))
    leaf = arguments[0].clone().requires_grad_()
    function(leaf, *arguments[1:]).square().sum().backward()
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6
    with torch.no_grad():
        ends = [function(leaf + sign * step * direction, *arguments[1:]).square().sum() for sign in (1, -1)]
    torch.testing.assert_close((leaf.grad * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_a_forced_form_without_a_backward_is_an_error_where_gradients_are_wanted():
    x = torch.randn(2, 5, 2, 32, requires_grad=True)
    refusal = pytest.raises(ValueError, match="only the torch form has a backward")
    with registry.using("cpp", "shared_attention"), refusal:
        kernels.shared_attention(x, x, x)


# the tables of an operation carry no gradient
DIFFERENTIABLE = {
    "shared_attention": (0, 1, 2, 8, 9, 10, 11),
    "adain_affine": (0, 1),
    "gated_cross_attention": (0, 1, 2, 5, 6),
    "group_norm_silu": (0, 2, 3),
    "geglu": (0,),
    "layer_norm": (0, 1, 2),
    "add_layer_norm": (0, 1, 2, 3),
    "guided_step": (0, 3),
    "row_lora": (0, 1, 2),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_compiled_call_with_gradients_is_one_graph_and_equals_the_eager_one(name):
    torch._dynamo.reset()
    function = by_name(getattr(kernels, name))

    def run(call, arguments):
        arguments, leaves = list(arguments), []
        for i in DIFFERENTIABLE[name]:
            arguments[i] = arguments[i].detach().clone().requires_grad_()
            leaves.append(arguments[i])
        out = call(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        # a compiler may return zeros where no gradient flows
        return [out.detach()] + [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, gradients)]

    case = CASES[name](0)
    found = run(torch.compile(function, backend="aot_eager", fullgraph=True), case)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        # the calls that a compiler sees, whose derivatives round otherwise than those of the eager form
        its_own = run(function, case)
    assert_near(found, its_own, run(function, in_fp64(name, case)))


@pytest.mark.parametrize("name", ["shared_attention", "gated_cross_attention"])
@pytest.mark.parametrize("seed", range(6))
def test_the_traceable_form_equals_the_plain_one_and_reads_no_nan(name, seed):
    operation, case = registry.operation(name), CASES[name](seed)
    arguments, wide = operation.grouped(case), operation.grouped(in_fp64(name, case))
    expected, exact = (operation.forms["torch"](*x) for x in (arguments, wide))
    assert_near(operation.traceable(*arguments), expected, exact)


def test_a_module_with_trainable_projections_compiles_whole():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(64, 192)

        def forward(self, x, page):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(2)
            affine = kernels.adain_affine(*kernels.token_stats(q, k, v), page[:, 0], torch.ones(len(x), 3))
            return kernels.shared_attention(q, k, v, page, affine=affine)

    torch._dynamo.reset()
    block, x, page = Block(), torch.randn(3, 10, 64), torch.tensor([[-1], [0], [0]])
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    fp64.close(compiled(x, page).detach(), fp64.measured(lambda block, x: block(x, page).detach(), block, x))
    compiled(x, page).sum().backward()
    assert block.qkv.weight.grad.isfinite().all() and block.qkv.weight.grad.abs().sum() > 0


def _sized(rows, tokens, parts=3, pages=2):
    q = torch.randn(rows, tokens, 2, 32)
    affine = kernels.Affine(torch.ones(parts, rows, 2, 32), torch.zeros(parts, rows, 2, 32))
    page = torch.full((rows, 1), rows)
    pool = torch.randn(pages, 5, 2, 32)
    return (q, q, q, page, None, None, None, affine, pool, pool, torch.zeros(rows + pages, max(tokens, 5)))


def test_compiled_with_dynamic_shapes_other_sizes_are_taken():
    torch._dynamo.reset()
    compiled = torch.compile(kernels.shared_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 9), (4, 7), (3, 12), (2, 6, 2)):
        arguments = _sized(*sizes)
        torch.testing.assert_close(compiled(*arguments), kernels.shared_attention(*arguments))


def test_a_compiled_group_norm_with_a_pool_takes_other_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(kernels.group_norm_silu, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, side in ((2, 5), (3, 7)):
        x = torch.randn(rows, 8, side, side)
        pool = torch.rand(2, 2, 4).unbind()
        arguments = (x, 4, torch.ones(8), torch.zeros(8), 1e-5, True, torch.full((rows,), rows + 1), *pool, 9)
        torch.testing.assert_close(compiled(*arguments), kernels.group_norm_silu(*arguments))


def test_guided_step_exports_with_any_number_of_predictions():
    arguments = CASES["guided_step"](0)
    rows = torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} if i == 3 else None for i in range(len(arguments)))

    class Step(torch.nn.Module):
        def forward(self, *arguments):
            return kernels.guided_step(*arguments)

    program = torch.export.export(Step(), arguments, dynamic_shapes=(shapes,))
    more = (*arguments[:3], torch.cat([arguments[3]] * 2), *arguments[4:])
    torch.testing.assert_close(program.module()(*more), kernels.guided_step(*more))


def test_training_under_autocast_works():
    q = torch.randn(2, 9, 2, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kernels.shared_attention(q, q, q, torch.tensor([[-1], [0]])).sum().backward()
    assert q.grad.isfinite().all()


def test_values_are_checked_where_gradients_are_wanted_too():
    q = torch.randn(2, 9, 2, 32, requires_grad=True)
    with pytest.raises(ValueError, match="page holds 5"):
        kernels.shared_attention(q, q, q, torch.tensor([[-1], [5]]))
    with pytest.raises(ValueError, match="mode holds 7"):
        kernels.shared_attention(q, q, q, torch.tensor([[-1], [0]]), torch.tensor([0, 7]))


def test_forward_mode_derivatives_are_not_lost():
    q, tangent = torch.randn(2, 2, 9, 2, 32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.double(), tangent.double())
        k = q.double()
        out = kernels.geglu(dual)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
        assert kernels.shared_attention(k, k, k).isfinite().all()


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_first_choice_and_agrees_with_pytorchs_form(name):
    arguments, function, operation = (
        moved(CASES[name](0), "cuda"),
        by_name(getattr(kernels, name)),
        registry.operation(name),
    )
    assert registry.choose(operation, arguments)[0] == "triton"
    with registry.using("torch", name):
        expected, exact = function(*arguments), function(*in_fp64(name, arguments))
    assert_near(function(*arguments), expected, exact)
    torch.library.opcheck(operation.op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_captured_call_follows_new_values_in_the_same_tensors(name):
    arguments, function = moved(CASES[name](0), "cuda"), by_name(getattr(kernels, name))
    function(*arguments)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*arguments)
    for mine, theirs in zip(*(registry.tensors_in(x) for x in (arguments, moved(CASES[name](1), "cuda")))):
        mine.copy_(theirs)
    graph.replay()
    torch.testing.assert_close(result, function(*arguments))


@pytest.mark.gpu
def test_a_page_out_of_range_makes_its_row_nan_and_no_other(monkeypatch):
    q = torch.randn(2, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    page = torch.tensor([[-1], [7]], device="cuda")
    out = kernels.shared_attention(q, q, q, page)
    assert out[0].isfinite().all() and out[1].isnan().all()
    monkeypatch.setenv("STYLEFAST_CHECKS", "1")
    with pytest.raises(ValueError, match="page holds 7"):
        kernels.shared_attention(q, q, q, page)
