"""The factors of a LoRA multiply to its change, exactly, and what has none of low rank is refused by name."""

import hashlib
import importlib
import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stylefast.errors import AdapterError, InvalidRequest, ModelError
from stylefast.models.lora_changes import Replacement, Scaling, change_of
from stylefast.models.lora_factors import MAX_RANK, NotLowRank, blora_part, factors_of, row_factors, split
from stylefast.models.lora_file import read_lora
from tests.models.test_lora_changes import draw, tucker

# roundings of the factors and, in float32, of their product with a rank of up to 128 in float64
EXACT, SINGLE = 1e-12, 1e-6


def product(factors, shape):
    """The change that factors stand for, element by element as their docstring has it."""
    delta = torch.einsum("tir,ro->oit", factors.down.double(), factors.up.double())
    return delta.reshape(shape)


def assert_factors(tensors, shape, scaling, expected, rank=None):
    """`expected` is a function of the tensors in fp64, of the weight's shape."""
    change = change_of(tensors, tuple(shape), scaling, "style: layer")
    exact = expected({role: tensor.double() for role, tensor in tensors.items()}).reshape(shape)
    size = float(exact.abs().max())
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        factors = factors_of(change, tuple(shape), dtype)
        assert factors.down.shape == (math.prod(shape[2:]), shape[1], factors.rank)
        assert factors.up.shape == (factors.rank, shape[0]) and factors.up.dtype == factors.down.dtype == dtype
        assert factors.rank <= min(MAX_RANK, shape[0], math.prod(shape[1:]))
        assert float((product(factors, shape) - exact).abs().max()) <= bound * size
        assert rank is None or factors.rank == rank
    merged = change.delta(torch.zeros(shape)).double()
    assert float((product(factors_of(change, tuple(shape)), shape) - merged).abs().max()) <= 2 * SINGLE * size


def kron(first, second):
    """Block by block, as the definition has it."""
    blocks = [torch.cat([first[i, j] * second for j in range(first.shape[1])], 1) for i in range(first.shape[0])]
    return torch.cat(blocks, 0)


sides = st.integers(1, 24)
kernels = st.sampled_from([(), (1, 1), (3, 3)])
scalings = st.builds(Scaling, st.sampled_from([None, 0.5, -1.0, 3.0]), st.booleans())
few = settings(max_examples=40)


@few
@given(out=sides, inner=sides, kernel=kernels, rank=st.integers(1, 30), scaling=scalings)
def test_low_rank(out, inner, kernel, rank, scaling):
    shape = (out, inner, *kernel)
    tensors = {"down": draw(rank, inner, *kernel), "up": draw(out, rank, *[1] * len(kernel))}
    factor = scaling.of(rank)
    assert_factors(
        tensors,
        shape,
        scaling,
        lambda t: factor * torch.einsum("or,rix->oix", t["up"].flatten(1), t["down"].view(rank, inner, -1)),
        rank=min(rank, out, inner * math.prod(kernel)),
    )


@few
@given(out=sides, inner=sides, rank=st.integers(1, 8), other=st.integers(1, 8), scaling=scalings)
def test_a_middle_kernel_is_folded_into_the_first_factor(out, inner, rank, other, scaling):
    tensors = {"down": draw(rank, inner, 1, 1), "up": draw(out, rank, 1, 1), "mid": draw(rank, rank, 3, 3)}
    factor = scaling.of(rank)
    assert_factors(
        tensors,
        (out, inner, 3, 3),
        scaling,
        lambda t: factor * tucker(t["mid"], t["down"].flatten(1), t["up"].flatten(1).T),
    )


@few
@given(out=sides, inner=sides, kernel=kernels, ranks=st.tuples(*[st.integers(1, 12)] * 2), scaling=scalings)
def test_hadamard_product(out, inner, kernel, ranks, scaling):
    taps = math.prod(kernel)
    tensors = {f"hada_w{p}_a": draw(out, ranks[p - 1], seed=p) for p in (1, 2)}
    tensors |= {f"hada_w{p}_b": draw(ranks[p - 1], inner * taps, seed=p) for p in (1, 2)}
    factor = scaling.of(ranks[0])
    assert_factors(
        tensors,
        (out, inner, *kernel),
        scaling,
        lambda t: factor * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
        rank=min(ranks[0] * ranks[1], out, inner * taps),
    )


def test_hadamard_product_with_middle_kernels():
    tensors = {}
    for p, rank in ((1, 2), (2, 3)):
        tensors |= {
            f"hada_w{p}_a": draw(rank, 16, seed=p),
            f"hada_w{p}_b": draw(rank, 8, seed=p),
            f"hada_t{p}": draw(rank, rank, 3, 3, seed=p),
        }
    assert_factors(
        tensors,
        (16, 8, 3, 3),
        Scaling(1.0),
        lambda t: (
            0.5
            * tucker(t["hada_t1"], t["hada_w1_b"], t["hada_w1_a"])
            * tucker(t["hada_t2"], t["hada_w2_b"], t["hada_w2_a"])
        ),
        rank=6,
    )


@few
@given(
    first=st.tuples(*[st.integers(1, 5)] * 2),
    second=st.tuples(*[st.integers(1, 6)] * 2),
    kernel=kernels,
    ranks=st.tuples(*[st.one_of(st.none(), st.integers(1, 7))] * 2),
    scaling=scalings,
)
def test_kronecker_product(first, second, kernel, ranks, scaling):
    tensors, taps = {}, math.prod(kernel)
    for place, (out, inner), rank in ((1, first, ranks[0]), (2, second, ranks[1])):
        kernel_here = kernel if place == 2 else ()
        if rank is None:
            tensors[f"lokr_w{place}"] = draw(out, inner, *kernel_here, seed=place)
        else:
            tensors[f"lokr_w{place}_a"] = draw(out, rank, seed=place)
            tensors[f"lokr_w{place}_b"] = draw(rank, inner * math.prod(kernel_here), seed=place)
    scaled = [rank for rank in ranks if rank is not None]
    factor = scaling.of(scaled[-1]) if scaled else 1.0

    def expected(t):
        whole = []
        for place, (out, inner), kernel_here in ((1, first, ()), (2, second, kernel)):
            stored = t.get(f"lokr_w{place}")
            stored = t[f"lokr_w{place}_a"] @ t[f"lokr_w{place}_b"] if stored is None else stored
            whole.append(stored.reshape(out, inner, math.prod(kernel_here)))
        return factor * torch.stack([kron(whole[0][:, :, 0], whole[1][:, :, x]) for x in range(taps)], -1)

    shape = (first[0] * second[0], first[1] * second[1], *kernel)
    of_first = min(first) if ranks[0] is None else ranks[0]
    of_second = min(second[0], second[1] * taps) if ranks[1] is None else ranks[1]
    assert_factors(tensors, shape, scaling, expected, rank=min(of_first * of_second, shape[0], shape[1] * taps))


def test_kronecker_product_with_a_middle_kernel():
    tensors = {"lokr_w1": draw(4, 2), "lokr_w2_a": draw(2, 5), "lokr_w2_b": draw(3, 6), "lokr_t2": draw(2, 3, 3, 3)}

    def expected(t):
        second = tucker(t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
        grid = [[kron(t["lokr_w1"], second[:, :, y, x]) for x in range(3)] for y in range(3)]
        return torch.stack([torch.stack(row, -1) for row in grid], -2) / 3

    assert_factors(tensors, (20, 12, 3, 3), Scaling(1.0), expected, rank=4)


def test_a_rank_above_the_smaller_side_of_the_weight_is_reduced_to_it():
    tensors = {"down": draw(200, 64, 3, 3), "up": draw(4, 200, 1, 1)}
    expected = {"rank": 4, "expected": lambda t: torch.einsum("or,rix->oix", t["up"][..., 0, 0], t["down"].flatten(2))}
    assert_factors(tensors, (4, 64, 3, 3), Scaling(None), **expected)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(40, 24), torch.nn.functional.linear, (5, 40)),
    "1x1": (lambda: torch.nn.Conv2d(40, 24, 1), torch.nn.functional.conv2d, (2, 40, 3, 3)),
    "3x3": (lambda: torch.nn.Conv2d(40, 24, 3), torch.nn.functional.conv2d, (2, 40, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("locon.LoConModule", {}),
        ("locon.LoConModule", {"use_tucker": True}),
        ("loha.LohaModule", {}),
        ("loha.LohaModule", {"use_tucker": True}),
        ("lokr.LokrModule", {}),
        ("lokr.LokrModule", {"use_tucker": True, "factor": 2}),
        ("lokr.LokrModule", {"decompose_both": True, "factor": 8}),
        ("lokr.LokrModule", {"full_matrix": True, "factor": 8}),
        ("locon.LoConModule", {"rs_lora": True}),
    ],
    ids=str,
)
def test_factors_do_to_a_layer_what_the_module_of_lycoris_that_was_trained_did(kind, options, layer, tmp_path):
    name, module = kind.split(".")
    build, apply, inputs = LAYERS[layer]
    layer = build().double()
    trained = getattr(importlib.import_module(f"lycoris.modules.{name}"), module)(
        "layer", layer, multiplier=1.0, lora_dim=3, alpha=2.0, **options
    )
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    shape = tuple(layer.weight.shape)
    weights = {"unet": {"mid_block.attentions.0.proj_in.weight": torch.zeros(shape)}}
    state = {f"lycoris_mid_block_attentions_0_proj_in.{role}": value for role, value in trained.state_dict().items()}
    (factors,) = row_factors(
        read(tmp_path, weights | {"text_encoder": {}, "text_encoder_2": {}}, state, "lycoris.safetensors")
    ).values()
    trained.apply_to()
    x = draw(*inputs).double()
    with torch.no_grad():
        theirs = trained.double().eval()(x) - apply(x, layer.weight, layer.bias)
    error = apply(x, product(factors, shape)) - theirs
    assert float(error.abs().max()) <= SINGLE * float(theirs.abs().max())


@pytest.mark.parametrize(("factor", "most"), [(8, 16), (4, 32), (-1, 4)])
def test_the_settings_of_lycoris_that_fit_are_those_of_the_docs(factor, most):
    from lycoris.functional.general import factorization

    # [out, in] of SDXL's linear layers in its transformers
    shapes = [(n, n) for n in (640, 1280)] + [(10240, 1280), (1280, 5120), (1280, 2048), (5120, 640)]
    ranks = []
    for (out, inner), dim in itertools.product(shapes, (most, most + 1)):
        (small_out, large_out), (small_in, large_in) = factorization(out, factor), factorization(inner, factor)
        tensors = {"lokr_w1": draw(small_out, small_in, seed=1), "lokr_w2_a": draw(large_out, dim, seed=2)}
        change = change_of(
            tensors | {"lokr_w2_b": draw(dim, large_in, seed=3)}, (out, inner), Scaling(None), "style: layer"
        )
        try:
            ranks.append((dim, factors_of(change, (out, inner)).rank))
        except NotLowRank:
            ranks.append((dim, None))
    assert all(rank is not None for dim, rank in ranks if dim == most) and (most, MAX_RANK) in ranks
    assert (most + 1, None) in ranks


# refusals


def lora_of(rank, out=160, inner=160, **more):
    return {"down": draw(rank, inner), "up": draw(out, rank), **more}


def loha_of(ranks, out=160):
    tensors = {f"hada_w{p}_a": draw(out, r) for p, r in zip("12", ranks, strict=True)}
    return tensors | {f"hada_w{p}_b": draw(r, out) for p, r in zip("12", ranks, strict=True)}


@pytest.mark.parametrize(
    ("tensors", "shape", "reason"),
    [
        (lora_of(4, dora_scale=draw(160)), (160, 160), "a DoRA, whose change depends on the whole weight"),
        (lora_of(129), (160, 160), "a LoRA of rank 129, above the limit of 128"),
        (loha_of((16, 9)), (160, 160), r"a LoHa of rank 144 \(16 x 9\), above the limit of 128"),
        ({"lokr_w1": draw(10, 10), "lokr_w2": draw(16, 16)}, (160, 160), r"a LoKr of rank 160 \(10 x 16\), above"),
        ({"diff": draw(160, 160)}, (160, 160), "a full difference"),
        ({"diff": draw(160)}, (160,), "a change of a bias or a norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_low_rank_is_refused_by_name_and_with_the_way_out(tensors, shape, reason):
    with pytest.raises(NotLowRank, match=reason) as caught:
        factors_of(change_of(tensors, shape, Scaling(None), "style: layer"), shape)
    assert "with engine.load_lora, which then holds for every request" in str(caught.value)
    assert re.match(reason, caught.value.reason)


def test_trained_weights_are_refused_by_name():
    with pytest.raises(NotLowRank, match="a trained weight, stored in full"):
        factors_of(Replacement(draw(8, 8)), (8, 8))


@pytest.mark.parametrize("tensors", [lora_of(128), loha_of((16, 8)), loha_of((128, 1))])
def test_the_limit_itself_is_taken(tensors):
    assert factors_of(change_of(tensors, (160, 160), Scaling(None), ""), (160, 160)).rank == MAX_RANK


@pytest.mark.parametrize(
    "tensors", [{"down": torch.ones(1, 4), "up": torch.full((4, 1), 1e38)}, loha_of((2, 2), out=4)]
)
def test_factors_that_float32_cannot_hold_are_refused(tensors):
    tensors = {role: 1e20 * value if role.startswith("hada") else value for role, value in tensors.items()}
    with pytest.raises(AdapterError, match=r"exceed torch.float32, multiplied by alpha / rank"):
        factors_of(change_of(tensors, (4, 4), Scaling(1e3), "style: layer"), (4, 4))


# whole files

CONTENT = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STYLE = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
SHAPES = {
    ("unet", "conv_in"): (6, 4, 3, 3),
    ("unet", "up_blocks.0.resnets.0.conv1"): (8, 8, 3, 3),
    ("unet", "up_blocks.0.attentions.0.proj_in"): (8, 8),
    ("unet", CONTENT): (8, 8),
    ("unet", "up_blocks.0.attentions.1.proj_in"): (8, 8),
    ("unet", STYLE): (8, 8),
    ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"): (8, 10),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"): (7, 7),
}
ORIGINAL = {  # kohya's spelling, after the original SDXL code
    CONTENT: "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q",
    STYLE: "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q",
}


@pytest.fixture(scope="module")
def weights():
    found = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for (part, module), shape in SHAPES.items():
        found[part][f"{module}.weight"] = torch.zeros(shape, dtype=torch.float16)
    found["unet"]["up_blocks.0.resnets.1.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    return found


def state_of(places=SHAPES, rank=2):
    state = {}
    for part, module in places:
        out, inner, *kernel = SHAPES[part, module]
        state[f"{part}.{module}.lora_down.weight"] = draw(rank, inner, *kernel)
        state[f"{part}.{module}.lora_up.weight"] = draw(out, rank, *[1] * len(kernel))
    return state


def read(tmp_path, weights, state, name="style.safetensors", **metadata):
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name, metadata=metadata or None)
    return read_lora(tmp_path / name, weights)


def test_a_file_gives_the_factors_of_every_part_with_its_alpha_or_without(weights, tmp_path):
    state = state_of() | {f"unet.{STYLE}.alpha": torch.tensor(6.0)}
    factors = row_factors(read(tmp_path, weights, state))
    assert set(factors) == {(part, f"{module}.weight") for part, module in SHAPES}
    for (part, module), shape in SHAPES.items():
        down, up = (state[f"{part}.{module}.lora_{way}.weight"].double().flatten(1) for way in ("down", "up"))
        expected = (3.0 if module == STYLE else 1.0) * up @ down
        error = product(factors[part, f"{module}.weight"], shape) - expected.view(shape)
        assert float(error.abs().max()) <= SINGLE * float(expected.abs().max())


def test_a_file_that_is_not_low_rank_throughout_is_refused_as_a_whole(weights, tmp_path):
    state = state_of() | {f"unet.{module}.dora_scale": torch.ones(8) for module in (CONTENT, STYLE)}
    state |= {f"unet.conv_in.{role}.weight": None for role in ("lora_down", "lora_up")}
    state |= {"unet.conv_in.diff": draw(6, 4, 3, 3)}
    lora = read(tmp_path, weights, {key: value for key, value in state.items() if value is not None})
    factors, reasons = split(lora)
    assert len(factors) == 5 and set(reasons) | set(factors) == set(lora.changes)
    assert reasons["unet", "conv_in.weight"] == "a full difference"
    with pytest.raises(NotLowRank, match="3 of its 8 changes have no factors") as caught:
        row_factors(lora)
    kept = sum(2 * math.prod(shape) for shape in SHAPES.values()) / 1e6
    assert f"{kept:.1f} MB of originals are kept" in str(caught.value)
    assert f"unet.{CONTENT}.weight is a DoRA" in str(caught.value) and "engine.load_lora" in str(caught.value)


def test_many_layers_without_factors_are_named_in_part(weights, tmp_path):
    state = state_of() | {
        f"{part}.{module}.dora_scale": torch.ones(shape[0]) for (part, module), shape in SHAPES.items()
    }
    with pytest.raises(NotLowRank, match=r"8 of its 8 changes .*; and 5 more\)") as caught:
        row_factors(read(tmp_path, weights, state))
    assert len(str(caught.value)) < 1000


def test_factors_too_large_for_their_type_name_the_layer(weights, tmp_path):
    state = state_of([("unet", STYLE)]) | {f"unet.{STYLE}.alpha": torch.tensor(3e38)}
    with pytest.raises(AdapterError, match=rf"style: unet\.{STYLE}\.weight: its factors exceed"):
        row_factors(read(tmp_path, weights, state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"unet.{STYLE}.lora_down.weight": torch.zeros(0, 8), f"unet.{STYLE}.lora_up.weight": torch.zeros(8, 0)},
            "rank 0",
        ),
        ({f"unet.{STYLE}.lora_down.weight": torch.full((2, 8), float("nan"))}, "NaN or infinity"),
        ({f"unet.{STYLE}.lora_up.weight": torch.full((8, 2), float("-inf")).half()}, "NaN or infinity"),
        ({f"unet.{STYLE}.lora_up.weight": torch.full((8, 2), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ({f"unet.{STYLE}.lora_down.weight": torch.zeros(2, 9)}, r"changes a weight of \[8, 9\]"),
        ({f"unet.{STYLE}.alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 8)}, r"\(Flux\)"),
        ({"lora_unet_input_blocks_7_1_attn2_to_k.lora_down.weight": torch.zeros(2, 768)}, r"\(Stable Diffusion 1\)"),
        ({f"unet.{STYLE}.oft_blocks": torch.zeros(2, 2)}, "OFT or BOFT"),
    ],
)
def test_what_no_lora_of_this_model_is_ends_before_any_factors(changes, message, weights, tmp_path):
    with pytest.raises(ModelError, match=message):
        row_factors(read(tmp_path, weights, state_of() | changes))


def test_a_pickle_that_contains_code_is_not_run(weights, tmp_path):
    torch.save({"made by": print}, tmp_path / "lora.bin")
    with pytest.raises(ModelError, match="contains code"):
        row_factors(read_lora(tmp_path / "lora.bin", weights))


def test_values_whose_sum_overflows_are_finite_all_the_same(weights, tmp_path):
    state = state_of([("unet", STYLE)])
    state[f"unet.{STYLE}.lora_down.weight"] = torch.full((2, 8), 3e38)
    assert read(tmp_path, weights, state).changes


def test_the_digest_is_that_of_all_files_in_order(weights, tmp_path):
    lora = read(tmp_path, weights, state_of())
    assert lora.digest == hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    content = hashlib.sha256()
    for part, module, shape in (("unet", STYLE, (8, 8)), ("text_encoder", "encoder.layers.0.self_attn.q_proj", (7, 7))):
        folder = tmp_path / "peft" / part
        folder.mkdir(parents=True)
        state = {f"base_model.model.{module}.lora_A.weight": draw(2, shape[1])}
        state |= {f"base_model.model.{module}.lora_B.weight": draw(shape[0], 2)}
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            content.update((folder / name).read_bytes())
    assert read_lora(tmp_path / "peft", weights).digest == content.hexdigest()


@pytest.mark.parametrize("what, module", [("content", CONTENT), ("style", STYLE)])
@pytest.mark.parametrize("spelling", ["diffusers", "original"])
def test_a_part_of_a_blora_is_the_block_of_the_paper(what, module, spelling, weights, tmp_path):
    state = state_of([("unet", CONTENT), ("unet", STYLE), ("text_encoder", "encoder.layers.0.self_attn.q_proj")])
    if spelling == "original":
        for ours, theirs in ORIGINAL.items():
            state = {key.replace(f"unet.{ours}", theirs): value for key, value in state.items()}
    lora = read(tmp_path, weights, state)
    part = blora_part(lora, what)
    assert set(part.changes) == set(part.targets) == {("unet", f"{module}.weight")}
    assert part.changes["unet", f"{module}.weight"] is lora.changes["unet", f"{module}.weight"]
    assert part.name == f"style-{what}"
    assert len({part.digest, lora.digest, blora_part(lora, "style" if what == "content" else "content").digest}) == 3


def test_a_block_that_the_file_lacks_and_an_unknown_part_are_refused(weights, tmp_path):
    lora = read(tmp_path, weights, state_of([("unet", CONTENT), ("unet", "conv_in")]))
    with pytest.raises(AdapterError, match=r"changes nothing in unet\.up_blocks\.0\.attentions\.1, .* carries style"):
        blora_part(lora, "style")
    with pytest.raises(InvalidRequest, match="did you mean 'style'"):
        blora_part(lora, "styl")
