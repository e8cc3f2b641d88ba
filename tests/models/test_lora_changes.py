"""Every kind of change is its formula, computed in fp64 beside it."""

import pytest
import torch

from stylefast.errors import AdapterError
from stylefast.models.lora_changes import Scaling, change_of

LINEAR, CONVOLUTION, PIXEL = (6, 8), (6, 8, 3, 3), (6, 8, 1, 1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_delta(tensors, shape, scaling, expected, weight=None):
    """`expected` is a function of the tensors in fp64."""
    weight = torch.zeros(shape) if weight is None else weight
    change = change_of(tensors, tuple(shape), scaling, "style: layer")
    delta = change.delta(weight)
    assert delta.shape == weight.shape and delta.dtype == torch.float32
    wide = expected({role: tensor.double() for role, tensor in tensors.items()})
    torch.testing.assert_close(delta.double(), wide.view(shape), rtol=2e-5, atol=2e-6)


def tucker(middle, b, a):
    """sum_ij a[i, out] b[j, in] middle[i, j, ...] as loops over the two ranks."""
    total = 0
    for i in range(middle.shape[0]):
        for j in range(middle.shape[1]):
            total = total + a[i][:, None, None, None] * b[j][None, :, None, None] * middle[i, j][None, None]
    return total


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION, PIXEL], ids=str)
@pytest.mark.parametrize("scaling", [Scaling(None), Scaling(2.5), Scaling(-1.0), Scaling(3.0, True)], ids=str)
def test_low_rank(shape, scaling):
    tensors = {"down": draw(3, *shape[1:]), "up": draw(6, 3, *[1] * (len(shape) - 2))}
    scale = 1 if scaling.alpha is None else scaling.alpha / (3**0.5 if scaling.rank_stabilised else 3)
    assert_delta(tensors, shape, scaling, lambda t: scale * t["up"].flatten(1) @ t["down"].flatten(1))


def test_a_linear_layer_may_be_stored_as_a_convolution_of_one_pixel_and_back():
    product = draw(6, 3).double() @ draw(3, 8).double()
    for stored, shape in ((((6, 3, 1, 1), (3, 8, 1, 1)), LINEAR), (((6, 3), (3, 8)), PIXEL)):
        tensors = {"up": draw(6, 3).view(stored[0]), "down": draw(3, 8).view(stored[1])}
        assert_delta(tensors, shape, Scaling(None), lambda t: product)


def test_low_rank_with_a_middle_kernel():
    tensors = {"down": draw(3, 8, 1, 1), "up": draw(6, 3, 1, 1), "mid": draw(3, 3, 3, 3)}
    assert_delta(
        tensors, CONVOLUTION, Scaling(1.5), lambda t: 0.5 * tucker(t["mid"], t["down"].flatten(1), t["up"].flatten(1).T)
    )


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION], ids=str)
def test_hadamard_product(shape):
    inner = torch.Size(shape[1:]).numel()
    tensors = {f"hada_w{p}_a": draw(6, 2, seed=p) for p in (1, 2)}
    tensors |= {f"hada_w{p}_b": draw(2, inner, seed=p) for p in (1, 2)}
    assert_delta(
        tensors,
        shape,
        Scaling(3.0),
        lambda t: 1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    )


def test_hadamard_product_with_middle_kernels():
    tensors = {}
    for p in (1, 2):
        tensors |= {
            f"hada_w{p}_a": draw(2, 6, seed=p),
            f"hada_w{p}_b": draw(2, 8, seed=p),
            f"hada_t{p}": draw(2, 2, 3, 3, seed=p),
        }
    assert_delta(
        tensors,
        CONVOLUTION,
        Scaling(1.0),
        lambda t: (
            0.5
            * tucker(t["hada_t1"], t["hada_w1_b"], t["hada_w1_a"])
            * tucker(t["hada_t2"], t["hada_w2_b"], t["hada_w2_a"])
        ),
    )


def kron(first, second):
    """Block by block, as the definition has it."""
    blocks = [torch.cat([first[i, j] * second for j in range(first.shape[1])], 1) for i in range(first.shape[0])]
    return torch.cat(blocks, 0)


def test_kronecker_product_of_whole_matrices_has_no_rank_and_ignores_alpha():
    tensors = {"lokr_w1": draw(2, 4), "lokr_w2": draw(3, 2)}
    assert_delta(tensors, LINEAR, Scaling(7.0), lambda t: kron(t["lokr_w1"], t["lokr_w2"]))


def test_kronecker_product_with_factors():
    tensors = {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(3, 2), "lokr_w2_b": draw(2, 2)}
    assert_delta(tensors, LINEAR, Scaling(1.0), lambda t: 0.5 * kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]))
    tensors = {"lokr_w1_a": draw(2, 3), "lokr_w1_b": draw(3, 4), "lokr_w2": draw(3, 2)}
    assert_delta(tensors, LINEAR, Scaling(6.0), lambda t: 2 * kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2"]))


@pytest.mark.parametrize("stored", ["whole", "factors", "middle kernel"])
def test_kronecker_product_for_a_convolution(stored):
    second = {
        "whole": {"lokr_w2": draw(3, 2, 3, 3)},
        "factors": {"lokr_w2_a": draw(3, 2), "lokr_w2_b": draw(2, 2 * 9)},
        "middle kernel": {"lokr_t2": draw(2, 2, 3, 3), "lokr_w2_a": draw(2, 3), "lokr_w2_b": draw(2, 2, seed=1)},
    }[stored]

    def expected(t):
        if stored == "whole":
            whole = t["lokr_w2"]
        elif stored == "factors":
            whole = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(3, 2, 3, 3)
        else:
            whole = tucker(t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
        scale = 1.0 if stored == "whole" else 0.5
        return scale * torch.stack(
            [torch.stack([kron(t["lokr_w1"], whole[:, :, y, x]) for x in range(3)], -1) for y in range(3)], -2
        )

    assert_delta({"lokr_w1": draw(2, 4)} | second, CONVOLUTION, Scaling(1.0), expected)


@pytest.mark.parametrize("shape", [(6,), LINEAR, CONVOLUTION], ids=str)
def test_a_full_difference_is_added_as_it_is(shape):
    assert_delta({"diff": draw(*shape)}, shape, Scaling(5.0), lambda t: t["diff"])


@pytest.mark.parametrize(
    ("role", "stored", "shape", "per_output"),
    [
        ("magnitude", (6,), LINEAR, True),
        ("magnitude", (8,), (8, 8), True),
        ("magnitude", (1, 8, 1, 1), (8, 8, 3, 3), True),
        ("dora_scale", (6,), LINEAR, True),
        ("dora_scale", (6, 1), LINEAR, True),
        ("dora_scale", (1, 8), LINEAR, False),
        ("dora_scale", (1, 8), (8, 8), False),
        ("dora_scale", (8, 1), (8, 8), True),
        ("dora_scale", (6, 1, 1, 1), CONVOLUTION, True),
        ("dora_scale", (1, 8, 1, 1), CONVOLUTION, False),
    ],
)
def test_dora_gives_the_changed_weight_the_stored_lengths(role, stored, shape, per_output):
    weight = draw(*shape, seed=5)
    tensors = {"down": draw(2, *shape[1:]), "up": draw(shape[0], 2), role: draw(*stored).abs() + 0.5}

    def expected(t):
        changed = weight.double() + (0.5 * t["up"].flatten(1) @ t["down"].flatten(1)).view(shape)
        lengths = t[role].flatten()
        out = torch.empty_like(changed)
        for i, length in enumerate(lengths):
            place = (i,) if per_output else (slice(None), i)
            out[place] = changed[place] / changed[place].square().sum().sqrt() * length
        return out - weight.double()

    assert_delta(tensors, shape, Scaling(1.0), expected, weight)


def test_dora_works_on_the_other_kinds_too():
    weight = draw(*LINEAR, seed=5)
    tensors = {"lokr_w1": draw(2, 4), "lokr_w2": draw(3, 2), "dora_scale": draw(6, 1).abs()}

    def expected(t):
        changed = weight.double() + kron(t["lokr_w1"], t["lokr_w2"])
        return changed / changed.norm(dim=1, keepdim=True) * t["dora_scale"] - weight.double()

    assert_delta(tensors, LINEAR, Scaling(1.0), expected, weight)


@pytest.mark.parametrize(
    "tensors",
    [
        {"up": draw(6, 2)},
        {"up": draw(6, 2), "down": draw(3, 8)},
        {"up": draw(6, 2, 3, 3), "down": draw(2, 8)},
        {"up": draw(6, 2), "down": draw(2, 8), "mid": draw(3, 2, 3, 3)},
        {"up": draw(6, 2), "down": draw(2, 8), "diff": draw(6, 8)},
        {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 8)},
        {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 8), "hada_w2_a": draw(6, 2), "hada_w2_b": draw(3, 8)},
        {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(3, 2)},
        {"lokr_w1": draw(2, 4), "lokr_w2": draw(3, 2), "lokr_w2_a": draw(3, 2)},
        {"lokr_w1": draw(2, 4), "lokr_w2": draw(4, 2)},
        {"diff": draw(6, 9)},
        {"diff": draw(8, 6)},
        {"diff": draw(1)},
        {"up": draw(6, 2), "down": draw(2, 8), "magnitude": draw(8)},
        {"up": draw(6, 2), "down": draw(2, 8), "magnitude": draw(6), "dora_scale": draw(6)},
        {"magnitude": draw(6)},
        {"up": torch.tensor(1.0), "down": draw(2, 8)},
        {"lokr_w1": torch.tensor(1.0), "lokr_w2": draw(3, 2)},
    ],
    ids=lambda tensors: ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in tensors.items()),
)
def test_tensors_that_do_not_belong_together_are_refused(tensors):
    with pytest.raises(AdapterError, match="style: layer"):
        change_of(tensors, LINEAR, Scaling(None), "style: layer")
