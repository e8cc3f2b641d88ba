"""Style banks: what goes in comes out, within the stored type's error, and what does not fit is refused by name."""

import dataclasses
import json
import re

import pytest
import torch

from stylefast.errors import InvalidRequest, NumericsError, StyleError
from stylefast.models.row_features import RowFeatures as KeptFeatures
from stylefast.models.unet import UNet
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import BankInfo, BankWriter, StyleBank
from stylefast.styles.bank_size import BankShapes, bank_bytes, bank_tensors, page_bytes
from tests.support.rows import plain_rows
from tests.support.small_bank import SHAPES, fill, places, random_features, random_latents, small_bank, small_info
from tests.support.small_sdxl import sdxl_unet_config, small_unet_config
from tests.support.small_unet import CONFIG, random_inputs

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")
# largest error of rounding to the nearest: relative to the number, and for the smallest ones to the stored unit
ROUNDING = {
    "float32": (0.0, 0.0),
    "float16": (2**-11, 2**-25),
    "bfloat16": (2**-8, 2**-134),
    "float8_e4m3fn": (2**-4, 2**-10),
}


def restored(bank: StyleBank, layer: int, where) -> torch.Tensor:
    """Keys and values [2, tokens, channels], or hidden states [1, tokens, channels], as a reader computes them."""
    name = bank.info.store
    found = bank.tensors[f"{name}.{layer}"][where].float()
    if bank.info.dtype == "float8_e4m3fn":
        scale = bank.tensors[f"scale.{layer}"][where]
        found = found * (scale[:, None] if name == "kv" else scale)
    return found.flatten(-2) if name == "kv" else found[None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", ["kv", "hidden"])
def test_features_come_back_within_the_rounding_of_the_stored_type(store, dtype):
    bank = small_bank(store=store, dtype=dtype, layers=(0, 2))
    relative, smallest = ROUNDING[dtype]
    for i, (step, branch, reference) in enumerate(places(bank.info)):
        where, features = (step, bank.info.branches.index(branch), reference), random_features(seed=i)
        for layer in bank.info.layers:
            given = features.layers[layer]
            expected = torch.stack([given.k, given.v]).flatten(2) if store == "kv" else given.hidden[None]
            unit = expected.abs().amax(1, keepdim=True) / 448 if dtype == "float8_e4m3fn" else 1.0
            # two roundings more in fp8, of the quotient and of the product
            bound = expected.abs() * (relative + (2**-22 if relative == 2**-4 else 0)) + smallest * unit
            assert ((restored(bank, layer, where) - expected).abs() <= bound).all()
            assert torch.equal(bank.tensors[f"mean.{layer}"][where], given.mean)
            assert torch.equal(bank.tensors[f"variance.{layer}"][where], given.variance)
        for i_norm in range(len(SHAPES.groups)):
            assert torch.equal(bank.tensors[f"norm_mean.{i_norm}"][where], features.norm_means[i_norm])
            assert torch.equal(bank.tensors[f"norm_variance.{i_norm}"][where], features.norm_variances[i_norm])
    assert bank.shapes.norm_elements == random_features().norm_elements
    for (_, reference), latents in random_latents(bank.info).items():
        assert torch.equal(bank.tensors["latents"][0, reference], latents)


def test_latents_come_back_bit_for_bit():
    bank = small_bank(store="latents")
    assert set(bank.tensors) == {"latents"} and bank.tensors["latents"].shape == (3, 2, 4, 5, 3)
    for where, latents in random_latents(bank.info).items():
        assert torch.equal(bank.tensors["latents"][where], latents)


def test_a_page_of_keys_and_values_is_one_contiguous_piece():
    bank = small_bank(dtype="float16")
    page = bank.tensors["kv.0"][1, 1, 1]
    assert page.is_contiguous() and page.shape == (2, 15, 2, 3)


def test_a_channel_of_zeros_and_one_of_denormals_survive_fp8():
    features = random_features()
    features.layers[0].k[:, 0, 0], features.layers[0].k[:, 0, 1] = 0.0, 1e-42
    info = small_info(dtype="float8_e4m3fn", steps=1, branches=("full",), references=1, layers=(0,))
    writer = BankWriter(info, SHAPES)
    writer.put(0, "full", 0, features)
    writer.put_latents(1, 0, torch.zeros(SHAPES.latents))
    bank = writer.finish()
    assert bank.tensors["scale.0"][0, 0, 0, 0, 0, :2].tolist() == [1.0, 1.0]
    assert restored(bank, 0, (0, 0, 0)).isfinite().all() and (restored(bank, 0, (0, 0, 0))[0, :, :2] == 0).all()


def test_putting_the_same_place_again_replaces_it():
    writer = fill(BankWriter(small_info(), SHAPES))
    again = random_features(seed=99)
    writer.put(1, "null", 0, again)
    assert torch.equal(writer.finish().tensors["kv.1"][1, 0, 0, 1], again.layers[1].v)


def test_tensors_of_other_types_and_strides_are_taken():
    writer, features = BankWriter(small_info(dtype="float16"), SHAPES), random_features()
    strided = {
        i: f._replace(k=f.k.double().transpose(0, 1).contiguous().transpose(0, 1), hidden=None)
        for i, f in features.layers.items()
    }
    writer.put(0, "full", 1, features._replace(layers=strided))
    assert torch.equal(writer._tensors["kv.0"][0, 1, 1, 0], features.layers[0].k.half())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["k", "v", "mean", "variance", "norm_means"])
def test_numbers_that_are_not_finite_are_refused_with_step_and_layer(part, bad):
    features = random_features()
    target = features.norm_means[1] if part == "norm_means" else getattr(features.layers[1], part)
    target.view(-1)[-1] = bad
    writer = BankWriter(small_info(), SHAPES)
    where = "group norm 1" if part == "norm_means" else "layer 1"
    with pytest.raises(NumericsError, match=f"step 1, branch 'null', reference 0, {where}"):
        writer.put(1, "null", 0, features)
    with pytest.raises(NumericsError, match="step 2"):
        writer.put_latents(2, 0, torch.full(SHAPES.latents, bad))


def test_numbers_beyond_float16_are_refused_with_the_type_to_take():
    features = random_features()
    features.layers[1].v[3, 0, 2] = -65600.0
    with pytest.raises(StyleError, match=r"layer 1 reaches 65600 at step 0.*beyond float16's 65504; use bfloat16"):
        BankWriter(small_info(dtype="float16"), SHAPES).put(0, "full", 0, features)
    BankWriter(small_info(dtype="bfloat16"), SHAPES).put(0, "full", 0, features)
    # a layer that is not stored may reach as far as it likes
    BankWriter(small_info(dtype="float16", layers=(0,)), SHAPES).put(0, "full", 0, features)


def changed(layer=1, **parts):
    features = random_features()
    features.layers[layer] = features.layers[layer]._replace(**parts)
    return features


@pytest.mark.parametrize(
    "place, features, said",
    [
        ((2, "full", 0), random_features(), "step 2, branch 'full' is outside the bank's 2 steps"),
        ((-1, "full", 0), random_features(), "step -1"),
        ((0, "style", 0), random_features(), "branches null, full"),
        ((0, "full", 2), random_features(), "reference 2 is outside the bank's 2 references"),
        ((0, "full", 0), changed(k=torch.zeros(7, 1, 5)), r"k of layer 1 has the shape \(7, 1, 5\).*\(6, 1, 5\)"),
        ((0, "full", 0), changed(v=None), "v of layer 1 has the shape None"),
        ((0, "full", 0), changed(mean=torch.zeros(2, 1, 5)), "mean of layer 1"),
        ((0, "full", 0), random_features()._replace(layers={0: random_features().layers[0]}), "lack.* layer 1"),
        ((0, "full", 0), random_features()._replace(norm_means=()), "norm_means has 0 entries; the model has 2"),
        ((0, "full", 0), random_features()._replace(norm_elements=(30, 13)), "norm_elements.*24x40 pixels"),
    ],
    ids=[
        "a step too far",
        "a negative step",
        "a branch it lacks",
        "a reference too many",
        "keys of another size",
        "no values",
        "statistics of two parts",
        "a layer missing",
        "no norms",
        "norms of another size",
    ],
)
def test_features_that_do_not_fit_the_bank_are_refused(place, features, said):
    with pytest.raises(StyleError, match=said):
        BankWriter(small_info(), SHAPES).put(*place, features)


def test_latents_that_do_not_fit_the_bank_are_refused():
    writer, latents = BankWriter(small_info(), SHAPES), torch.zeros(SHAPES.latents)
    with pytest.raises(StyleError, match=r"latents of step 1: .*store='kv' holds step 2 \(the end\) only"):
        writer.put_latents(1, 0, latents)
    with pytest.raises(StyleError, match="reference -1"):
        writer.put_latents(2, -1, latents)
    with pytest.raises(StyleError, match=r"\(4, 3, 5\); this bank needs \(4, 5, 3\)"):
        writer.put_latents(2, 0, latents.transpose(1, 2))
    writer = BankWriter(small_info(store="latents"), SHAPES)
    with pytest.raises(StyleError, match="holds step 0 to 2"):
        writer.put_latents(3, 0, latents)
    with pytest.raises(StyleError, match="a bank of latents stores no features"):
        writer.put(0, "full", 0, random_features())


@pytest.mark.parametrize(
    "store, said",
    [
        ("kv", "5 entries are missing, including the latents of step 2, reference 0"),
        ("latents", "6 entries are missing, including the latents of step 0, reference 0"),
    ],
)
def test_an_incomplete_bank_can_not_be_finished(store, said):
    writer = BankWriter(small_info(store=store), SHAPES)
    if store == "kv":
        for place in places(writer.info)[:-3]:
            writer.put(*place, random_features())
    with pytest.raises(StyleError, match=said):
        writer.finish()


def test_a_bank_that_lacks_only_features_names_them():
    writer = BankWriter(small_info(), SHAPES)
    for (step, reference), latents in random_latents(writer.info).items():
        writer.put_latents(step, reference, latents)
    *others, (step, branch, reference) = places(writer.info)
    for place in others:
        writer.put(*place, random_features())
    with pytest.raises(StyleError, match=f"including step {step}, branch '{branch}', reference {reference}$"):
        writer.finish()


def test_a_finished_writer_takes_nothing_more():
    writer = fill(BankWriter(small_info(), SHAPES))
    writer.finish()
    for call in (
        writer.finish,
        lambda: writer.put(0, "full", 0, random_features()),
        lambda: writer.put_latents(2, 0, torch.zeros(SHAPES.latents)),
    ):
        with pytest.raises(StyleError, match="this bank is finished"):
            call()


def test_info_survives_json():
    info = small_info(guidance=None)
    assert BankInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
    assert list(info.to_json()) == [entry.name for entry in dataclasses.fields(BankInfo)]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": 2}, "format 2; this version of stylefast reads format 1"),
        ({"store": "keys"}, "store .* 'keys'; choose one of kv, hidden, latents"),
        ({"dtype": "int8"}, "dtype .* 'int8'; choose one of float32"),
        ({"noise": "white"}, "noise .* 'white'"),
        ({"prompt": None}, "prompt .* None .*; it must be a string"),
        ({"steps": 0}, "steps .* 0; it must be a whole number of at least 1"),
        ({"steps": True}, "steps .* True"),
        ({"references": 1.0}, "references .* 1.0"),
        ({"seed": -1}, "seed .* -1"),
        ({"size": (24,)}, r"size .* \(24,\); it must be \(width, height\)"),
        ({"size": 24}, "size .* 24; it must be a list"),
        ({"guidance": float("nan")}, "guidance .* nan"),
        ({"guidance_rescale": -0.5}, "guidance_rescale .* -0.5"),
        ({"branches": ()}, r"branches .* \(\)"),
        ({"branches": ("full", "full")}, "branches"),
        ({"branches": ("half",)}, "half"),
        ({"layers": (1, 0)}, "must be ascending"),
        ({"layers": ()}, "needs at least one self-attention layer"),
        ({"store": "latents", "dtype": "float16"}, "a bank of latents has no layers and the type float32"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_description_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(StyleError, match=said):
        small_info(**changes)


def test_metadata_with_missing_or_unknown_fields_is_refused():
    content = small_info().to_json()
    with pytest.raises(StyleError, match="missing or unknown fields: 'colour'"):
        BankInfo.from_json(content | {"colour": "red"})
    content.pop("seed")
    with pytest.raises(StyleError, match="missing or unknown fields: 'seed'"):
        BankInfo.from_json(content)
    # another format is named as such, whatever its fields are
    with pytest.raises(StyleError, match="has format 3"):
        BankInfo.from_json({"format": 3, "pages": []})


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(StyleError, match="self-attention layer 3 does not exist; the model has 0 to 2"):
        BankWriter(small_info(layers=(0, 3)), SHAPES)


def test_settings_are_what_a_request_must_ask_for():
    asked = {"steps": 2, "scheduler": "euler", "size": (24, 40), "guidance": 5.0, "negative_prompt": ""}
    assert small_bank().settings == asked
    asked.pop("guidance")
    bank = small_bank(guidance=None, noise="forward")
    assert bank.settings == asked
    bank.check_fits(**asked, guidance=2.5)


def test_a_request_of_the_same_kind_fits():
    bank = small_bank()
    bank.check_fits(**{**bank.info.to_json(), "model": "the same under another name"})
    bank.check_fits(branches=("full",), layers=(1,), guidance=5)


@pytest.mark.parametrize(
    "field, asked, said",
    [
        (
            "steps",
            20,
            "was baked with steps=2, but steps=20 is requested; bake the style again with steps=20, or request steps=2",
        ),
        ("scheduler", "ddim", "scheduler='euler', but scheduler='ddim' is requested"),
        ("size", (40, 24), "size=(24, 40), but size=(40, 24)"),
        ("guidance", 4.0, "guidance=5.0, but guidance=4.0"),
        ("negative_prompt", "blurry", "negative_prompt='', but negative_prompt='blurry'"),
        ("seed", 8, "seed=7, but seed=8"),
        ("dtype", "float16", "dtype='float32', but dtype='float16'"),
        ("schedule", "beefbeefbeefbeef", "schedule is feedc0defeed in the bank and beefbeefbeef here"),
        ("styles", "cafe", "styles is none in the bank and cafe here"),
        ("branches", ("null", "style", "full"), "has the branches null, full, but the request also needs style"),
        ("layers", (0, 1, 2), "has the layers 0, 1, but the request also needs 2"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_request_that_differs_in_one_field_is_told_which(field, asked, said):
    with pytest.raises(StyleError, match=re.escape(said)):
        small_bank().check_fits(**{field: asked})


def test_a_bank_of_another_model_names_both_models():
    said = r"'small' \(fingerprint 0123456789ab\).*'large' \(fedcba987654\).*load 'small'"
    with pytest.raises(StyleError, match=said):
        small_bank().check_fits(fingerprint="fedcba9876543210", model="large")


def test_the_first_field_that_differs_is_the_one_named():
    with pytest.raises(StyleError, match="baked with scheduler="):
        small_bank().check_fits(seed=1, steps=9, scheduler="ddim")
    with pytest.raises(InvalidRequest, match="has no field colour"):
        small_bank().check_fits(colour="red")


def test_a_bank_of_latents_serves_every_branch_and_layer():
    small_bank(store="latents").check_fits(branches=BRANCHES, layers=(0, 1, 2))


def test_banks_have_numbers_and_names_of_their_own(tmp_path):
    first, second = small_bank(), small_bank(prompt="")
    assert first.id != second.id and first.name == "a fox, watercolor" and second.name == f"bank {second.id}"
    assert small_bank(tmp_path / "brand.bank").name == "brand"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", ["kv", "hidden", "latents"])
def test_counted_bytes_equal_those_of_a_bank(store, dtype):
    config, size, layers = small_unet_config(), (56, 40), (1, 3)
    shapes = BankShapes.from_config(config, size, pixels_per_latent=4)
    dtype = "float32" if store == "latents" else dtype
    bank = small_bank(shapes=shapes, store=store, dtype=dtype, layers=layers, size=size, references=1)
    arguments = {"store": store, "dtype": dtype, "layers": layers, "pixels_per_latent": 4}
    assert bank_bytes(config, size, 2, **arguments) == bank.nbytes
    if store != "latents":
        # all but the final latents is pages
        assert 4 * page_bytes(config, size, **arguments) + bank.tensors["latents"].nbytes == bank.nbytes


@pytest.mark.parametrize("size", [(64, 64), (36, 52)], ids=["even maps", "odd maps"])
def test_counted_shapes_are_those_that_a_unet_shows(size):
    config, features = CONFIG, KeptFeatures()
    shapes = BankShapes.from_config(config, size, pixels_per_latent=4)
    torch.manual_seed(0)
    unet = UNet(config).requires_grad_(False).eval()
    inputs = random_inputs(2, height=size[1] // 4, width=size[0] // 4)
    time = unet.embed(inputs.timesteps, inputs.pooled, inputs.time_ids)
    rows = plain_rows(unet.layout, 2)
    unet(inputs.latents, time, unet.project_text(inputs.text), None, rows, recorder=features)
    assert shapes.latents == tuple(inputs.latents.shape[1:])
    assert [tuple(features.layers[i][1].shape[1:]) for i in range(len(shapes.layers))] == [*map(tuple, shapes.layers)]
    assert [features.norms[i][0].shape[1] for i in range(len(features.norms))] == list(shapes.groups)
    assert [features.norm_elements[i] for i in range(len(features.norms))] == list(shapes.norm_elements)


def test_sdxl_at_30_steps_takes_25_gigabytes_of_keys_and_values():
    config, size = sdxl_unet_config(), (1024, 1024)
    shapes = BankShapes.from_config(config, size)
    assert len(shapes.layers) == 70 and shapes.latents == (4, 128, 128)
    tensors = bank_tensors(shapes, steps=30, branches=2, references=1, store="kv", dtype="float16", layers=range(70))
    assert sum(spec.nbytes for name, spec in tensors.items() if name.startswith("kv.")) == 25_165_824_000
    whole = bank_bytes(config, size, 30)
    assert whole == sum(spec.nbytes for spec in tensors.values()) == pytest.approx(25.2e9, rel=0.01)
    assert page_bytes(config, size) == pytest.approx(419.4e6, rel=0.01)
    assert bank_bytes(config, size, 30, store="hidden") == pytest.approx(12.6e9, rel=0.02)
    assert bank_bytes(config, size, 30, dtype="float8_e4m3fn") == pytest.approx(12.6e9, rel=0.02)
    assert bank_bytes(config, size, 30, store="latents") == 31 * 4 * 128 * 128 * 4


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda config: bank_bytes(config, (1024, 1020), 30), "1024x1020; both sides must be multiples of 8"),
        (lambda config: bank_bytes(config, (0, 64), 30), "0x64"),
        (lambda config: bank_bytes(config, (64, 64), 30, store="all"), "store is 'all'"),
        (lambda config: bank_bytes(config, (64, 64), 30, dtype="int4"), "'int4'; it must be one of"),
        (lambda config: bank_bytes(config, (64, 64), 30, layers=(70,)), "self-attention layer 70 does not exist"),
        (lambda config: page_bytes(config, (64, 64), "latents"), "a bank of latents has no pages"),
    ],
    ids=["an odd side", "no width", "an unknown store", "an unknown type", "an unknown layer", "pages"],
)
def test_sizes_that_can_not_be_counted_are_refused(call, said):
    with pytest.raises(StyleError, match=said):
        call(sdxl_unet_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": ((15, 2, 0),)},
        {"groups": (4,)},
        {"latents": (4, 5)},
        {"norm_elements": (30, 1.5)},
    ],
    ids=str,
)
def test_shapes_that_make_no_sense_are_refused(changes):
    with pytest.raises(StyleError, match="shapes"):
        dataclasses.replace(SHAPES, **changes)
