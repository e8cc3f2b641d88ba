"""What compilers and automatic differentiation may ask of the operations beyond plain inference."""

import pytest
import torch

from stylefast import kernels
from stylefast.kernels import registry
from tests.kernels.test_custom_ops import CASES, by_name


def _floats(arguments):
    return [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def _first(result):
    return result[0] if isinstance(result, tuple) else result


# the tables of an operation carry no gradient
DIFFERENTIABLE = {
    "shared_attention": (0, 1, 2, 8, 9, 10, 11),
    "adain_affine": (0, 1),
    "gated_cross_attention": (0, 1, 2, 4, 5),
    "group_norm_silu": (0, 2, 3),
    "geglu": (0,),
    "layer_norm": (0, 1, 2),
    "add_layer_norm": (0, 1, 2, 3),
    "guided_step": (0, 3),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("seed", range(2))
def test_a_compiled_call_with_gradients_is_one_graph_and_equals_the_eager_one(name, seed):
    torch._dynamo.reset()
    function, results = by_name(getattr(kernels, name)), []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        arguments = list(CASES[name](seed))
        leaves = []
        for i in DIFFERENTIABLE[name]:
            arguments[i] = arguments[i].detach().clone().requires_grad_()
            leaves.append(arguments[i])
        out = _first(call(*arguments))
        results.append((out, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for leaf, eager, compiled in zip(leaves, results[0][1], results[1][1]):
        # a compiler may return zeros where no gradient flows
        eager, compiled = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in (eager, compiled))
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["shared_attention", "gated_cross_attention"])
@pytest.mark.parametrize("seed", range(6))
def test_the_traceable_form_equals_the_plain_one_and_reads_no_nan(name, seed):
    operation, arguments = registry.operation(name), CASES[name](seed)
    arguments = operation.grouped(arguments)
    expected = operation.forms["torch"](*arguments)
    torch.testing.assert_close(operation.traceable(*arguments), expected, rtol=1e-4, atol=1e-5)


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
    torch.testing.assert_close(compiled(x, page), block(x, page), rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_autocast_changes_nothing(name, backend):
    if backend not in registry.operation(name).forms:
        backend = "torch"
    arguments, function = CASES[name](0), by_name(getattr(kernels, name))
    with registry.using(backend, name):
        expected = function(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(*arguments), expected, rtol=0, atol=0)


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
