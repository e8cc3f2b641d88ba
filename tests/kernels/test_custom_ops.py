"""Every operation as a PyTorch custom op: opcheck, torch.compile without graph breaks, torch.export, gradients."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stylefast import kernels
from stylefast.kernels import registry
from stylefast.kernels.shared_attention import FP8


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
    return (q, *text, text_page, *images, lengths, page, strength, group, masks, mask_index)


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
}
FORMS = ("torch", "cpp", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch", "cpp")
BACKENDS = [(name, backend) for name in CASES for backend in FORMS if backend in registry.operation(name).forms]


def test_every_operation_is_among_the_cases():
    assert set(CASES) == set(registry._operations)


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_opcheck_finds_schema_fake_and_dispatch_right(name, backend):
    with registry.using(backend, name):
        torch.library.opcheck(registry.operation(name).op, CASES[name](0))


@pytest.mark.parametrize("name, backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_form_gives_the_same_results(name, backend, seed):
    arguments, function = CASES[name](seed), by_name(getattr(kernels, name))
    with registry.using("torch", name):
        expected = function(*arguments)
    with registry.using(backend, name):
        torch.testing.assert_close(function(*arguments), expected, rtol=1e-4, atol=1e-5)


def by_name(function):
    """The public function with the custom op's argument order."""
    if function is kernels.shared_attention:
        return lambda *a: function(*a[:7], kernels.Affine(a[8], a[9]), a[10], a[11], a[7], a[12], a[13])
    if function is kernels.dequantise:
        return lambda scale, codes, out: function(codes.view(torch.float8_e4m3fn), scale, out)
    if function is kernels.token_stats:
        return lambda tensors: function(*tensors)
    return function


@pytest.mark.parametrize("name", CASES)
def test_torch_compile_takes_the_public_function_whole_and_never_compiles_again_for_other_values(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = by_name(getattr(kernels, name))
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in range(3):
        arguments = CASES[name](seed)
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
        arguments[8], arguments[10] = arguments[8].float(), arguments[10].float()
    function = by_name(getattr(kernels, name))
    leaf = arguments[0].clone().requires_grad_()
    function(leaf, *arguments[1:]).square().sum().backward()
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6
    with torch.no_grad():
        ends = [function(leaf + sign * step * direction, *arguments[1:]).square().sum() for sign in (1, -1)]
    torch.testing.assert_close((leaf.grad * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_a_forced_backend_without_a_backward_is_an_error_where_gradients_are_wanted():
    x = torch.randn(2, 5, 2, 32, requires_grad=True)
    refusal = pytest.raises(ValueError, match="only the torch form has a backward")
    with registry.using("cpp", "shared_attention"), refusal:
        kernels.shared_attention(x, x, x)
