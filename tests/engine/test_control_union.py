"""Union ControlNets: pictures of several types in one network, alone and together, as in diffusers' pipelines."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stylefast as sf
from stylefast.errors import AdapterError, InvalidRequest, ModelFormatError
from stylefast.record import from_record, to_record
from stylefast.runtime.backends.compiled import CompileBackend
from tests.support.fp64 import Twins, close, measured
from tests.support.oracle.sampler import make_scheduler
from tests.support.scene import SIZE, apart, small_picture
from tests.support.small_control import edges, small_control, small_union

STEPS = 4
GIVEN = {"size": SIZE, "steps": STEPS}
LINES, DEPTH = edges(1), edges(2)


@pytest.fixture(scope="module")
def union(pipe):
    return small_union(pipe)


@pytest.fixture(scope="module")
def nets(pipe, union):
    return {"union": union, "promax": small_union(pipe, 6, types=8), "lines": small_control(pipe, 1)}


@pytest.fixture(scope="module")
def steered(pipe, nets):
    engine = sf.Engine.from_pipeline(pipe)
    for name, net in nets.items():
        engine.controls.add(net, name)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def twins(steered, nets):
    return Twins(steered, controls=nets)


def theirs(pipe, net, pictures, modes, scales, kind="", rest=True, **options):
    """Latents of diffusers' union pipeline, which in guess mode gives the network twice as many types as rows.

    rest: the network adds nothing at steps outside of every window.
    """
    import diffusers

    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    made = getattr(diffusers, f"StableDiffusionXLControlNetUnion{kind}Pipeline")(
        **{name: getattr(pipe, name) for name in names},
        controlnet=net,
        scheduler=make_scheduler("euler", pipe.scheduler.config),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    forward = type(net).forward

    def resting(self, latents, *arguments, control_type, conditioning_scale, **named):
        named |= {"control_type": control_type[: len(latents)], "conditioning_scale": conditioning_scale}
        maps, middle = forward(self, latents, *arguments, **named)
        on = float(any(conditioning_scale) or not rest)
        return [x * on for x in maps], middle * on

    with mock.patch.object(type(net), "forward", resting):
        return made(
            "a cat",
            height=SIZE[1],
            width=SIZE[0],
            control_image=list(pictures),
            control_mode=list(modes),
            controlnet_conditioning_scale=list(scales),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
            **options,
        ).images


def ours(engine, *controls, **options):
    return engine.generate(
        "a cat", control=list(controls), **GIVEN | {"seed": 3, "output": "latents"} | options
    ).latents


@pytest.mark.parametrize("mode", [0, 3, "depth"])
def test_a_picture_of_one_type_equals_diffusers(pipe, union, steered, mode):
    found = ours(steered, sf.Control(LINES, "union", weight=0.7, mode=mode))
    close(found, measured(theirs, pipe, union, [LINES], [1 if mode == "depth" else mode], [0.7]))


@pytest.mark.parametrize(
    ("modes", "scales"), [((3, 1), (0.7, 0.4)), ((1, 3), (1.0, 1.0)), ((5, 5), (0.5, 1.5)), ((2, 0), (0.8, 0.0))]
)
def test_pictures_of_several_types_are_fused_as_in_diffusers(pipe, union, steered, modes, scales):
    pairs = zip((LINES, DEPTH), modes, scales, strict=True)
    found = ours(steered, *(sf.Control(one, "union", weight=scale, mode=mode) for one, mode, scale in pairs))
    close(found, measured(theirs, pipe, union, [LINES, DEPTH], modes, scales))


def test_the_type_and_the_fusion_matter(steered):
    kinds = [
        [sf.Control(LINES, "union", mode="canny")],
        [sf.Control(LINES, "union", mode="depth")],
        [sf.Control(LINES, "union", mode="canny"), sf.Control(LINES, "union", mode="depth")],
        [sf.Control(LINES, "promax", mode="tile")],
    ]
    found = [ours(steered, *controls) for controls in kinds]
    for i, one in enumerate(found):
        for other in found[:i]:
            apart(one, other)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_a_window_covers_the_steps_that_it_covers_in_diffusers(pipe, union, steered, window, both):
    controls = [sf.Control(LINES, "union", window=window, mode=3), sf.Control(DEPTH, "union", weight=0.6, mode=1)]
    start, end = window
    if both:
        options = {"control_guidance_start": [start, 0.0], "control_guidance_end": [end, 1.0]}
        found = ours(steered, *controls)
        expected = measured(theirs, pipe, union, [LINES, DEPTH], [3, 1], [1.0, 0.6], **options)
    else:
        options = {"control_guidance_start": start, "control_guidance_end": end}
        found, expected = ours(steered, controls[0]), measured(theirs, pipe, union, [LINES], [3], [1.0], **options)
    close(found, expected)


def test_nothing_is_added_at_steps_outside_of_every_window(pipe, union, steered):
    """Diffusers then goes on to add what the network makes of no picture."""
    controls = [
        sf.Control(LINES, "union", window=(0, 0.5), mode=3),
        sf.Control(DEPTH, "union", window=(0, 0.5), mode=1),
    ]
    found = ours(steered, *controls)
    given = [LINES, DEPTH], [3, 1], [1.0, 1.0]
    close(found, measured(theirs, pipe, union, *given, control_guidance_end=0.5))
    apart(found, theirs(pipe, union, *given, control_guidance_end=0.5, rest=False))
    unsteered = [sf.Control(LINES, "union", weight=0, mode=3), sf.Control(DEPTH, "union", weight=0, mode=1)]
    assert torch.equal(ours(steered, *unsteered)[0], ours(steered)[0])


@pytest.mark.parametrize("count", [1, 2])
def test_guess_mode_equals_diffusers(pipe, union, steered, count):
    controls = [
        sf.Control(LINES, "union", weight=0.8, guess_mode=True, mode=3),
        sf.Control(DEPTH, "union", weight=0.6, guess_mode=True, mode=1),
    ]
    found = ours(steered, *controls[:count])
    given = [part[:count] for part in ([LINES, DEPTH], [3, 1], [0.8, 0.6])]
    close(found, measured(theirs, pipe, union, *given, guess_mode=True))


def test_with_a_picture_to_begin_with_it_equals_diffusers(pipe, union, steered):
    picture = small_picture(3).resize(SIZE)
    controls = [sf.Control(LINES, "union", window=(0, 0.5), mode=3), sf.Control(DEPTH, "union", weight=0.6, mode=1)]
    found = ours(steered, *controls, image=picture, strength=0.5)

    def expected(pipe, net):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(pipe.unet.dtype) / 127.5 - 1
        with torch.no_grad():
            clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        options = {"image": clean, "strength": 0.5, "control_guidance_start": [0.0, 0.0]}
        options |= {"control_guidance_end": [0.5, 1.0]}
        return theirs(pipe, net, [LINES, DEPTH], [3, 1], [1.0, 0.6], kind="Img2Img", **options)

    close(found, measured(expected, pipe, union))


@pytest.mark.parametrize("config", [{"global_pool_conditions": True}, {"addition_embed_type": None}], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_networks_of_other_settings_equal_diffusers(pipe, steered, config, count):
    net = small_union(pipe, 7, **config)
    steered.controls.add(net, "other")
    try:
        given = [part[:count] for part in ([LINES, DEPTH], [3, 1], [0.5, 0.6])]
        found = ours(steered, *(sf.Control(p, "other", weight=w, mode=m) for p, m, w in zip(*given, strict=True)))
        close(found, measured(theirs, pipe, net, *given))
    finally:
        steered.controls.remove("other")


def kinds_of_rows() -> dict[str, sf.Request]:
    canny = sf.Control(LINES, "union", weight=0.7, mode="canny")
    depth = sf.Control(edges(4), "union", weight=0.5, window=(0, 0.5), mode="depth")
    style = sf.StyleAligned(prompt="a star in oil", seed=9)
    guess = [sf.Control(edges(i), "union", guess_mode=True, mode=i) for i in (0, 5)]
    begun = {"image": small_picture(3), "control": [canny, depth]}
    followed = [sf.Control(edges(6), "union", mode=4, reference="same"), depth]
    return {
        "plain": sf.Request("a cat", **GIVEN),
        "lines": sf.Request("a boat", seed=1, control=sf.Control(LINES, "lines"), **GIVEN),
        "one": sf.Request("a tree", seed=2, control=canny, **GIVEN),
        "two": sf.Request("a fish", seed=3, control=[canny, depth], **GIVEN),
        "three": sf.Request("a dog", seed=4, control=[depth, sf.Control(edges(7), "lines"), canny], **GIVEN),
        "guess": sf.Request("a sun", seed=5, control=guess, **GIVEN),
        "promax": sf.Request("a hat", seed=6, control=[sf.Control(LINES, "promax", mode="repaint"), canny], **GIVEN),
        "begun": sf.Request("a car", seed=7, **begun, **GIVEN),
        "styled": sf.Request("a pot", seed=8, style=style, control=followed, **GIVEN),
        "long": sf.Request("a cat, " * 60, seed=9, guidance=1.0, control=[canny, depth], **GIVEN),
    }


def test_all_kinds_of_rows_share_a_batch_and_equal_themselves_alone(steered, twins):
    requests = kinds_of_rows()
    before = steered.runner.calls
    together = steered.generate(list(requests.values()), output="latents").latents
    assert steered.runner.calls - before == STEPS
    for request, latents in zip(requests.values(), together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_all_rows_of_a_union_share_one_forward_whatever_their_types(steered, monkeypatch):
    seen, rows = [], []
    net, check = steered.controls["union"], steered.runner._check_room
    forward = net.forward
    monkeypatch.setattr(steered.runner, "_check_room", lambda count, size: (rows.append(count), check(count, size))[1])
    monkeypatch.setattr(net, "forward", lambda latents, *rest: (seen.append(len(latents)), forward(latents, *rest))[1])
    canny, depth = sf.Control(LINES, "union", mode=3), sf.Control(DEPTH, "union", mode=1, window=(0, 0.5))
    three = [canny, depth, sf.Control(DEPTH, "union", mode=5)]
    requests = [sf.Request("a cat", control=control, **GIVEN) for control in (canny, depth, three, None)]
    steered.generate(requests, output="latents")
    assert seen == [6, 6, 4, 4]  # both branches of each picture that is steered, once
    assert rows[-STEPS:] == [14, 14, 12, 12]  # with the UNet's
    assert [sample.network_runs for sample in steered._planner.samples(requests)] == [1, 1, 1, 0]


def test_compiled_steps_take_unions(pipe, union):
    engine = sf.Engine.from_pipeline(pipe)
    engine.runner.backend = CompileBackend(engine.unet, cache=None, compiler="eager")
    engine.controls.add(union, "union")
    controls = [sf.Control(LINES, "union", mode=3), sf.Control(DEPTH, "union", weight=0.6, mode=1)]
    close(ours(engine, *controls), measured(theirs, pipe, union, [LINES, DEPTH], [3, 1], [1.0, 0.6]))
    engine.close()


def drawn(twins, control):
    return twins.drawn([sf.Request("a cat", seed=3, control=control, **GIVEN)])


def test_folders_and_single_files_load(nets, steered, twins, tmp_path):
    for name, mode in (("union", 3), ("promax", 7)):
        expected = drawn(twins, sf.Control(LINES, name, mode=mode))
        nets[name].save_pretrained(tmp_path / f"{name}-folder")
        file = tmp_path / f"{name}-single.safetensors"
        save_file(load_file(tmp_path / f"{name}-folder" / "diffusion_pytorch_model.safetensors"), file)
        for source in (tmp_path / f"{name}-folder", file):
            added = steered.controls.add(source)
            close(ours(steered, sf.Control(LINES, added, mode=mode)), expected)
            steered.controls.remove(added)


def test_the_weights_and_not_the_config_say_that_it_is_a_union_and_of_how_many_types(nets, steered, twins, tmp_path):
    """The published promax network lies in the folder of one with fewer types."""
    nets["promax"].save_pretrained(tmp_path / "promax")
    file = tmp_path / "promax" / "config.json"
    config = json.loads(file.read_text())
    for change in ({"num_control_type": 6}, {"_class_name": "ControlNetModel", "num_control_type": None}):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        file.write_text(json.dumps(changed))
        steered.controls.add(tmp_path / "promax", "again")
        try:
            control, same = (sf.Control(LINES, name, mode="repaint") for name in ("again", "promax"))
            close(ours(steered, control), drawn(twins, same))
        finally:
            steered.controls.remove("again")


def test_networks_that_do_not_fit_are_refused_by_name(pipe, union, steered, tmp_path):
    channels = union.config.block_out_channels[0]
    with pytest.raises(AdapterError, match=rf"task_embedding of shape \[6, 16\].*\[types, {channels}\]"):
        steered.controls.add(small_union(pipe, num_trans_channel=16), "n")
    with pytest.raises(AdapterError, match="channel_order='bgr'"):
        steered.controls.add(small_union(pipe, controlnet_conditioning_channel_order="bgr"), "n")
    union.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for missing in ("task_embedding", "transformer_layes.1.attn.in_proj_bias", "control_add_embedding.linear_1.weight"):
        save_file({key: x for key, x in state.items() if key != missing}, file)
        with pytest.raises(ModelFormatError, match=rf"the weights of cut don't fit its config.*\"{missing}"):
            steered.controls.add(tmp_path / "cut", "n")
    save_file(state | {"task_embedding": torch.zeros(())}, file)
    with pytest.raises(AdapterError, match=r"task_embedding of shape \[\]"):
        steered.controls.add(tmp_path / "cut", "n")


def test_modes_that_a_network_lacks_are_refused_by_name(steered):
    with pytest.raises(InvalidRequest, match=r"no mode, but the union ControlNet 'union'.*canny \(3\).*segment \(5\)$"):
        ours(steered, sf.Control(LINES, "union"))
    for wrong in ("tile", 6, 10**30):
        with pytest.raises(InvalidRequest, match=r"its 6 types the picture has; give its number, 0 to 5"):
            ours(steered, sf.Control(LINES, "union", mode=wrong))
    with pytest.raises(InvalidRequest, match=r"mode='canny', but the network 'lines' reads pictures of one type"):
        ours(steered, sf.Control(LINES, "lines", mode="canny"))
    with pytest.raises(InvalidRequest, match="choose one of openpose, depth, .* did you mean 'canny'"):
        sf.Control(LINES, "union", mode="cany")
    for wrong in (-1, 1.5, True, [3]):
        with pytest.raises(InvalidRequest, match="mode is .*; it must be a whole number"):
            sf.Control(LINES, "union", mode=wrong)
    mixed = [sf.Control(LINES, "union", mode=3), sf.Control(DEPTH, "union", mode=1, guess_mode=True)]
    with pytest.raises(InvalidRequest, match="guess_mode is true for some and false for others"):
        ours(steered, *mixed)


def test_a_record_gives_the_same_modes_back():
    controls = [sf.Control(LINES, "union", mode="canny"), sf.Control(DEPTH, "union", mode=1), sf.Control(LINES)]
    record = json.loads(json.dumps(to_record([sf.Request("a cat", control=controls)])))
    (again,) = from_record(record)
    assert [control.mode for control in again.controls] == ["canny", 1, None]
    with pytest.raises(InvalidRequest, match="mode is 'cany'"):
        from_record(json.loads(json.dumps(record).replace('"canny"', '"cany"')))
