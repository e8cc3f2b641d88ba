"""guided_step in every form: the formula, diffusers' guidance rescale, and values that must not leak."""

import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels.guided_step import guided_step, guided_step_ref, operation
from tests.kernels.conformance import (
    FLOATS,
    NAN,
    Draw,
    captured,
    doubled,
    each,
    each_type,
    equal,
    forms,
    normal,
    same_bits_on_any_number_of_threads,
)

SMALL = {"block": 32, "splits": 4, "num_warps": 4}  # several pieces and blocks of the small pictures below


def reference(*grouped):
    return guided_step_ref(*operation.flat(grouped))


FORMS = forms(reference, small=SMALL, whole=SMALL | {"splits": 1}, committed=None)
CORE = [form for form in FORMS if form.name not in ("triton-whole", "triton-committed")]
FAST = "torch cpp triton"
EXAMPLES = {"torch": 25, "cpp": 25, "triton": 4}
PICTURES = ("latents", "anchor", "history", "predictions", "noise")


def case(shape=(4, 7, 5), state=torch.float32, network=torch.float32, pictures=5):
    """Pictures with one, two and four branches, with and without rescale, and full or sparse coefficients."""
    draw = Draw(3)
    layouts = [[0, -1, -1, 1], [2, 3, 4, 5], [-1, -1, -1, 6], [7, -1, 8, 9], [10, 11, 12, 13]]
    update = draw.normal(pictures, 2, 6)
    update[draw.uniform(pictures, 2, 6) < 0.3] = 0.0
    return {
        "latents": draw.normal(pictures, *shape, dtype=state),
        "anchor": draw.normal(pictures, *shape, dtype=state),
        "history": draw.normal(pictures, 2, *shape, dtype=network),
        "predictions": draw.normal(14, *shape, dtype=network),
        "branch_rows": torch.tensor([layouts[i % 5] for i in range(pictures)]).reshape(pictures, 4),
        "branch_weights": draw.normal(pictures, 4) * 3,
        "rescale": torch.tensor([0.0, 0.7, 0.0, 1.0, 0.3])[torch.arange(pictures) % 5],
        "denoised": draw.normal(pictures, 2),
        "update": update,
        "noise": draw.normal(pictures, *shape, dtype=state),
    }


def step(form, case):
    return form(operation, *operation.grouped(tuple(case.values())))


def exact(case):
    return guided_step_ref(*doubled(tuple(case.values())))


def check(found, case, units=64):
    """Compare with fp64: some units of the largest number that goes in or comes out, in the type of each result."""
    for name, one, other in zip(("latents", "anchor", "history"), found, exact(case), strict=True):
        assert one.dtype == case[name].dtype and not one.isnan().any(), name
        size = max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        unit = max(torch.finfo(one.dtype).eps, units * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(one.double(), other, rtol=unit, atol=unit * size, msg=lambda m, n=name: f"{n}: {m}")


@each_type(FORMS, FAST)
def test_drawn_steps_equal_the_formula_and_leave_out_what_weighs_nothing(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        pictures, rows, shape = draw.one((2, 3, 1, 0)), draw.one(range(1, 6)), [draw.one(range(1, 6)) for _ in range(3)]
        leads = {"latents": (pictures,), "anchor": (pictures,), "noise": (pictures,), "history": (pictures, 2)}
        given = {name: draw.normal(*lead, *shape) for name, lead in leads.items()}
        given["predictions"] = draw.normal(rows, *shape, dtype=dtype)
        if draw.one((True, False)):  # with gaps between the lines
            for name, x in given.items():
                given[name] = x.new_full((*x.shape[:-1], shape[2] + 2), NAN)[..., 1:-1].copy_(x)
        latents, anchor, noise, history, predictions = given.values()
        branches = draw.some(pictures, 4, values=range(-1, rows))
        weights = draw.some(pictures, 4, values=(0.0, 1.0, -2.5, 7.0))
        rescale = draw.some(pictures, values=(0.0, 0.0, 0.7, 1.0))
        denoised = torch.tensor(draw.some(pictures, values=((1.0, 0.0), (0.0, 1.0), (1.0, -0.6), (-0.6, 1.0)))).view(
            -1, 2
        )
        update = torch.tensor(draw.some(pictures, 2, 6, values=(0.0, 1.0, -0.6))).view(-1, 2, 6)
        used = {r for p in range(pictures) for r, weight in zip(branches[p], weights[p]) if r >= 0 and weight != 0}
        used |= {branches[p][3] for p in range(pictures) if rescale[p] != 0}
        predictions[[r for r in range(rows) if r not in used]] = NAN
        for p in range(pictures):
            idle = (update[p] == 0).all(0)
            if idle[0] and denoised[p, 0] == 0:
                latents[p] = NAN
            for unused, x in ((idle[1], anchor[p]), (idle[4], history[p, 1]), (idle[5], noise[p])):
                if unused:
                    x[:] = NAN
        tables = (draw.table(branches, pictures, 4, dtype=torch.int64), draw.table(weights, pictures, 4))
        arguments = (latents, anchor, history, predictions, *tables, torch.tensor(rescale), denoised, update, noise)
        before = tuple(x.clone() for x in arguments)
        found, expected = form(operation, *operation.grouped(arguments)), guided_step_ref(*doubled(arguments))
        for name, one, other in zip(("latents", "anchor", "history"), found, expected, strict=True):
            if name == "history":  # the last x0 moves on whatever it holds
                assert equal(one[:, 1], history[:, 0])
            assert one.is_contiguous() and not one[:, :1].isnan().any()
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-4, equal_nan=True)
        assert equal(arguments, before)


@each(FORMS, FAST)
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 1, 1), (3, 1, 11), (4, 33, 40)], ids=str)
def test_mixed_pictures_equal_the_formula(form, shape):
    if shape == (4, 33, 40) and form.name in ("triton-small", "triton-whole"):
        shape = (4, 9, 11)  # takes the interpreter 13 blocks a picture, also in several splits and with a rest, not 165
    arguments = case(shape)
    check(step(form, arguments), arguments)


@each(CORE, FAST)
def test_types_may_be_mixed_and_are_rounded_when_stored(form):
    for state in FLOATS:
        for network in FLOATS:
            arguments = case((4, 5, 7), state, network)
            check(step(form, arguments), arguments)


@each(CORE)
def test_the_update_uses_x0_before_it_is_rounded_and_the_history_moves_on_bit_by_bit(form):
    arguments = case(network=torch.bfloat16)
    arguments["update"].zero_()
    arguments["update"][:, 0, 2] = 1  # the new latents are x0 itself
    latents, anchor, history = step(form, arguments)
    assert equal(history[:, 1], arguments["history"][:, 0]) and (anchor == 0).all()
    torch.testing.assert_close(history[:, 0].float(), latents, rtol=8e-3, atol=1e-30)
    assert not equal(latents, latents.bfloat16().float())


@each(CORE)
def test_what_has_no_weight_may_hold_nan(form):
    arguments = case()
    arguments["branch_weights"][1, 2] = 0.0
    arguments["branch_weights"][0, 1:3] = arguments["branch_weights"][2, :3] = arguments["branch_weights"][3, 1] = NAN
    arguments["update"][:, :, [1, 4, 5]] = 0.0
    arguments["denoised"][2, 1] = 0.0
    expected = step(form, arguments | {"branch_weights": arguments["branch_weights"].nan_to_num(0.0)})
    poisoned = {name: x.clone() for name, x in arguments.items()}
    poisoned["predictions"][4] = poisoned["anchor"][:] = poisoned["history"][:, 1] = poisoned["noise"][:] = NAN
    poisoned["predictions"][6] = NAN
    found = step(form, poisoned)
    assert equal(found, expected) and all(x.isfinite().all() for x in found)


@each(CORE)
def test_nan_in_a_used_branch_reaches_only_its_own_picture(form):
    arguments = case()
    arguments["predictions"][3] = NAN
    arguments["update"][:, 0, 2] = 1.0
    latents, _, history = step(form, arguments)
    assert latents[1].isnan().all() and history[1, 0].isnan().all()
    assert torch.isfinite(latents[[0, 2, 3, 4]]).all() and torch.isfinite(history[[0, 2, 3, 4]]).all()


@each(CORE)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_rescale_equals_diffusers(form, strength):
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    null, full = normal(2, 3, 4, 6, 6)
    expected = rescale_noise_cfg(null + 5.0 * (full - null), full, guidance_rescale=strength)
    zeros = torch.zeros(3, 4, 6, 6)
    arguments = {
        "latents": zeros,
        "anchor": zeros,
        "history": torch.zeros(3, 2, 4, 6, 6),
        "predictions": torch.cat([null, full]),
        "branch_rows": torch.tensor([[i, -1, -1, 3 + i] for i in range(3)]),
        "branch_weights": torch.tensor([[-4.0, 0.0, 0.0, 5.0]]).expand(3, 4),
        "rescale": torch.full((3,), strength),
        "denoised": torch.tensor([[0.0, 1.0]]).expand(3, 2),
        "update": torch.zeros(3, 2, 6),
        "noise": zeros,
    }
    torch.testing.assert_close(step(form, arguments)[2][:, 0], expected, atol=1e-5, rtol=1e-5)


@each(CORE)
def test_constant_outputs_and_pictures_without_a_full_branch_are_not_rescaled(form):
    arguments = case()
    arguments["branch_rows"][0, 3] = -1
    arguments["branch_weights"][1] = 0  # output 0 everywhere
    arguments["rescale"][:2] = 0.7
    plain = arguments | {"rescale": torch.tensor([0.0, 0.0, *arguments["rescale"][2:]])}
    assert equal(step(form, arguments), step(form, plain))
    arguments["predictions"][:] = 0.5
    check(step(form, arguments), arguments)


@each(CORE, FAST)
def test_deviations_of_predictions_far_from_zero_keep_their_digits(form):
    arguments = case((4, 33, 40), pictures=1)
    arguments["predictions"] = arguments["predictions"] + 1000
    arguments["branch_weights"] = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    arguments["rescale"] = torch.ones(1)  # the output gets the deviation of the full branch: its own by half
    arguments["denoised"] = torch.tensor([[0.0, 1.0]])
    found = step(form, arguments)[2][0, 0]
    full = arguments["predictions"][1]
    torch.testing.assert_close(found, full, rtol=1e-6 if form.kind == "cpp" else 1e-4, atol=0)


@each(CORE, FAST)
def test_pictures_and_tables_of_any_strides_give_the_same(form):
    arguments = case()
    turned = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in arguments.items() if x.ndim > 3}
    tables = {name: torch.stack([x, x], -1)[..., 0] for name, x in arguments.items() if x.ndim < 4}
    last = {"predictions": arguments["predictions"].contiguous(memory_format=torch.channels_last)}
    rows = {name: torch.cat([arguments[name]] * 2, 1)[:, :4] for name in ("predictions", "latents", "noise")}
    for changes in (turned | tables, last, rows):
        check(step(form, arguments | changes), arguments)


@each(CORE, "torch cpp")
def test_pictures_do_not_depend_on_their_neighbours(form):
    arguments = case()
    check(step(form, arguments), arguments)
    for i in range(5):
        alone = {name: x if name == "predictions" else x[i : i + 1] for name, x in arguments.items()}
        check(step(form, alone), alone)
    assert all(x.numel() == 0 for x in step(form, {name: x[:0] for name, x in arguments.items()}))


@each(CORE, "cpp triton")
def test_a_row_out_of_range_is_refused_or_makes_its_picture_nan_and_no_other(form):
    arguments = case()
    arguments["update"][:, 0, 2] = 1.0  # x0 counts
    expected = exact(arguments)
    arguments["branch_rows"][1, 2] = 14
    if form.kind == "cpp":
        with pytest.raises(ValueError, match="branch_rows is 14, but it must be from -1 to 13"):
            step(form, arguments)
        arguments["branch_rows"][1, 2] = -2
        with pytest.raises(ValueError, match="branch_rows is -2"):
            step(form, arguments)
        return
    found, others = step(form, arguments), [0, 2, 3, 4]
    assert found[0][1].isnan().all() and found[2][1, 0].isnan().all()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one[others].double(), other[others], rtol=2e-5, atol=5e-5)


@each(CORE, "cpp")
def test_one_thread_and_many_give_the_same_bits(form):
    given = operation.grouped(tuple(case((4, 80, 81)).values()))
    same_bits_on_any_number_of_threads(form, operation, *given)


@pytest.mark.parametrize("name", [name for name in case() if name != "latents"])
def test_shapes_that_do_not_fit_are_refused_by_the_name_of_the_argument(name):
    arguments = case()
    arguments[name] = arguments[name][..., :-1] if name != "predictions" else arguments[name][:, :-1]
    with pytest.raises(InvalidRequest, match=name):
        guided_step(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 128, 128), (4, 37, 53)], ids=str)
def test_captured_in_a_graph_it_follows_new_coefficients(shape):
    arguments = case(shape, network=torch.bfloat16)
    replay, given = captured(operation, *operation.grouped(tuple(arguments.values())))
    check(replay(), arguments)
    arguments["update"], arguments["rescale"] = arguments["update"] * -0.5, torch.full((5,), 0.3)
    for there, new in zip(operation.flat(given), arguments.values(), strict=True):
        there.copy_(new)
    check(replay(), arguments)
