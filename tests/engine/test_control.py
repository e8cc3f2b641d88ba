"""ControlNets: each row its own picture, network, weight and steps, as in diffusers' pipelines."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import AdapterError, ImageError, InvalidRequest, ModelNotFound, OutOfMemory
from stylefast.record import from_record, to_record
from tests.support.fp64 import Twins, close, measured
from tests.support.pipelines import of_kind
from tests.support.scene import SIZE, apart, learned, small_picture
from tests.support.small_control import STEPS, edges, small_control, small_control_for, under

LINES = edges(1)


@pytest.fixture(scope="module")
def nets(pipe):
    return {"lines": small_control(pipe, 1), "depth": small_control(pipe, 2)}


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


def theirs(pipe, nets, pictures, scales, scheduler="euler", kind="", **options):
    """Latents of diffusers' ControlNet pipeline."""
    networks = nets if len(nets) > 1 else nets[0]
    made = of_kind(pipe, f"ControlNet{kind}", scheduler, controlnet=networks, add_watermarker=False)
    pictures = pictures if len(nets) > 1 else pictures[0]
    given = {"control_image": pictures} if kind else {"image": pictures}
    return made(
        "a cat",
        height=SIZE[1],
        width=SIZE[0],
        controlnet_conditioning_scale=scales if len(nets) > 1 else scales[0],
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **given | options,
    ).images


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmpp_2m"])
def test_one_network_equals_diffusers(pipe, nets, steered, scheduler):
    found = under(steered, sf.Control(LINES, "lines", weight=0.7), scheduler=scheduler)
    close(found, measured(theirs, pipe, [nets["lines"]], [LINES], [0.7], scheduler))


def test_several_networks_add_up_as_in_diffusers(pipe, nets, steered):
    found = under(steered, sf.Control(LINES, "lines", weight=0.7), sf.Control(edges(2), "depth", weight=0.4))
    close(found, measured(theirs, pipe, list(nets.values()), [LINES, edges(2)], [0.7, 0.4]))


def test_the_same_network_reads_two_pictures_of_a_row(pipe, nets, steered):
    found = under(steered, sf.Control(LINES, "lines", weight=0.7), sf.Control(edges(2), "lines", weight=0.4))
    close(found, measured(theirs, pipe, [nets["lines"]] * 2, [LINES, edges(2)], [0.7, 0.4]))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.1, 0.9)])
def test_a_window_covers_the_steps_that_it_covers_in_diffusers(pipe, nets, steered, window):
    found = under(steered, sf.Control(LINES, "lines", window=window))
    start, end = window
    options = {"control_guidance_start": start, "control_guidance_end": end}
    close(found, measured(lambda pipe, net: theirs(pipe, [net], [LINES], [1.0], **options), pipe, nets["lines"]))


def test_guess_mode_equals_diffusers(pipe, nets, steered):
    found = under(steered, sf.Control(LINES, "lines", weight=0.8, guess_mode=True))
    guessed = measured(lambda pipe, net: theirs(pipe, [net], [LINES], [0.8], guess_mode=True), pipe, nets["lines"])
    close(found, guessed)
    apart(found, under(steered, sf.Control(LINES, "lines", weight=0.8)))


def test_with_a_picture_to_begin_with_windows_count_the_steps_that_run(pipe, nets, steered):
    picture = small_picture(3).resize(SIZE)
    control = sf.Control(LINES, "lines", weight=0.6, window=(0, 0.5))
    found = under(steered, control, image=picture, strength=0.5)

    def expected(pipe, net):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(pipe.unet.dtype) / 127.5 - 1
        with torch.no_grad():
            clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        options = {"image": clean, "strength": 0.5, "control_guidance_end": 0.5}
        return theirs(pipe, [net], [LINES], [0.6], kind="Img2Img", **options)

    close(found, measured(expected, pipe, nets["lines"]))


def kinds_of_rows() -> dict[str, sf.Request]:
    style = sf.StyleAligned(small_picture(1))
    given = {"size": SIZE, "steps": STEPS}
    lines = sf.Control(LINES, "lines", weight=0.7)
    return {
        "plain": sf.Request("a cat", **given),
        "lines": sf.Request("a boat", seed=1, control=lines, **given),
        "depth": sf.Request("a tree", seed=2, control=sf.Control(edges(4), "depth", window=(0, 0.5)), **given),
        "both": sf.Request("a fish", seed=3, control=[lines, sf.Control(edges(5), "depth", guess_mode=True)], **given),
        "styled": sf.Request("a dog", seed=4, style=style, control=sf.Control(edges(6), "lines"), **given),
        "begun": sf.Request("a car", seed=5, image=small_picture(3), control=sf.Control(edges(7), "lines"), **given),
        "long": sf.Request("a cat, " * 60, seed=6, control=sf.Control(edges(8), "lines"), **given),
        "one branch": sf.Request("a sun", seed=7, guidance=1.0, control=sf.Control(edges(9), "depth"), **given),
        "learned": sf.Request(
            "a sun", seed=8, style=sf.DreamStyler(learned()), control=sf.Control(edges(10), "lines"), **given
        ),
    }


def test_all_kinds_of_rows_share_a_batch_and_equal_themselves_alone(steered, twins):
    requests = kinds_of_rows()
    before = steered.runner.calls
    together = steered.generate(list(requests.values()), output="latents").latents
    assert steered.runner.calls - before == STEPS
    for request, latents in zip(requests.values(), together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_a_network_runs_only_for_the_rows_that_want_it(steered, monkeypatch):
    seen = []
    net = steered.controls["lines"]
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda latents, *rest: (seen.append(len(latents)), forward(latents, *rest))[1])
    requests = [sf.Request(f"a cat {i}", size=SIZE, steps=STEPS) for i in range(3)]
    control = sf.Control(LINES, "lines", window=(0, 0.5))
    steered.generate([*requests, sf.Request("a dog", size=SIZE, steps=STEPS, control=control)], output="latents")
    assert seen == [2, 2]  # both branches of one picture, in half of the steps
    seen.clear()
    steered.generate("a dog", size=SIZE, steps=STEPS, control=sf.Control(LINES, "lines", weight=0))
    assert seen == []


@pytest.mark.parametrize("reference", ["none", "same", "own"])
def test_the_styles_reference_is_steered_by_nothing_its_readers_picture_or_its_own(steered, twins, reference):
    """As the reference's own request would be; with "none" it is the picture that it is without any control."""
    own = edges(12)
    style = sf.StyleAligned(prompt="a star in oil", seed=9)
    control = sf.Control(LINES, "lines", weight=0.8, reference=own if reference == "own" else reference)
    request = sf.Request("a dog", size=SIZE, steps=STEPS, style=style, control=control)
    found = steered.generate(request, output="latents").latents
    # the same call with the reference as its first picture
    steering = {"none": None, "same": LINES, "own": own}[reference]
    leader = sf.StyleAligned()
    first = sf.Request("a star in oil", size=SIZE, steps=STEPS, seed=9, style=leader)
    if steering is not None:
        first = replace(first, control=sf.Control(steering, "lines", weight=0.8))
    second = replace(request, style=leader, control=replace(control, reference="none"))
    close(found, twins.drawn([first, second])[1:])


def test_requests_that_share_a_style_but_not_the_control_of_its_reference_have_references_of_their_own(steered, twins):
    style = sf.StyleAligned(prompt="a star in oil", seed=9)
    controls = [sf.Control(edges(i), "lines", reference="same") for i in (1, 2)]
    requests = [sf.Request("a dog", size=SIZE, steps=STEPS, style=style, control=control) for control in controls]
    together = steered.generate(requests, output="latents").latents
    for request, latents in zip(requests, together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_a_control_of_a_request_that_reads_a_bank(steered, twins):
    style = sf.StyleAligned(prompt="a star", seed=2)
    bank = steered.bake(style, steps=STEPS, size=SIZE)
    control = sf.Control(LINES, "lines")
    given = {"control": control, **bank.settings}
    live = sf.Request("a cat", style=style, **given)
    close(
        steered.generate(sf.Request("a cat", style=sf.StyleAligned(bank), **given), output="latents").latents,
        twins.drawn([live]),
    )


def test_both_passes_of_an_enlarged_picture_are_steered(steered, monkeypatch):
    sizes = []
    net = steered.controls["lines"]
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda x, *rest: (sizes.append(tuple(x.shape[2:])), forward(x, *rest))[1])
    steered.generate(
        "a cat", size=SIZE, steps=STEPS, upscale=2, upscale_strength=0.5, control=sf.Control(LINES, "lines")
    )
    assert sizes == [(8, 12)] * 4 + [(16, 24)] * 2


def test_what_a_picture_is_is_what_it_looks_like(steered):
    """Grey, palette and transparent pictures, and larger ones of the same shape, are read as pictures are elsewhere."""
    (expected,) = under(steered, sf.Control(LINES, "lines"))
    for same in (LINES.convert("L"), LINES.convert("P"), np.asarray(LINES)):
        assert torch.equal(under(steered, sf.Control(same, "lines"))[0], expected)
    large = LINES.resize((2 * SIZE[0], 2 * SIZE[1]), Image.Resampling.NEAREST)
    assert torch.isfinite(under(steered, sf.Control(large, "lines"))[0]).all()


def test_nothing_is_held_when_all_is_done(pipe, nets):
    engine = sf.Engine.from_pipeline(pipe)
    engine.controls.add(nets["lines"], "lines")
    net = weakref.ref(engine.controls["lines"])
    control = sf.Control(LINES, "lines")
    under(engine, control)
    pages = engine.runner.conditions.control_text[net()]
    assert pages.used == 0
    assert engine.memory()["model"]["controls"] == engine.controls.nbytes > 0
    report = engine.memory()
    assert report["held"] == sum(report["model"].values()) + sum(report["conditions"].values()) + sum(
        (report["latents"], report["graphs"], report["workspace"]["tables"])
    )
    engine.controls.remove("lines")
    del pages, control
    engine.runner._buffers.clear()
    gc.collect()
    assert net() is None
    engine.close()


def test_a_network_beyond_the_memory_limit_is_refused(pipe, nets):
    engine = sf.Engine.from_pipeline(pipe)
    limit = engine.memory()["held"] + sum(x.nbytes for x in nets["lines"].parameters()) // 2
    engine.close()
    engine = sf.Engine.from_pipeline(pipe, memory_limit=limit)
    with pytest.raises(OutOfMemory, match="the control network 'lines' takes .* raise memory_limit"):
        engine.controls.add(nets["lines"], "lines")
    assert not engine.controls and engine.memory()["model"]["controls"] == 0
    engine.close()


def test_a_network_that_is_removed_stays_for_those_that_use_it(steered, nets, twins):
    steered.controls.add(nets["lines"], "gone")
    with steered.scheduler.paused():
        job = steered.submit(
            sf.Request("a cat", size=SIZE, steps=STEPS, seed=3, control=sf.Control(LINES, "gone")), output="latents"
        )
        steered.controls.remove("gone")
    same = sf.Request("a cat", size=SIZE, steps=STEPS, seed=3, control=sf.Control(LINES, "lines"))
    close(job.result(60).latents[0][None], twins.drawn([same]))
    with pytest.raises(InvalidRequest, match="no ControlNet named 'gone'"):
        under(steered, sf.Control(LINES, "gone"))


def test_compiled_steps_take_control_and_compile_nothing_for_other_rows(pipe, nets):
    from stylefast.runtime.backends.compiled import CompileBackend

    engine = sf.Engine.from_pipeline(pipe)
    engine.runner.backend = CompileBackend(engine.unet, cache=None, compiler="eager")
    engine.controls.add(nets["lines"], "lines")
    twins = Twins(engine, controls={"lines": nets["lines"]})
    request = sf.Request("a cat", size=SIZE, steps=2, control=sf.Control(LINES, "lines"))
    close(engine.generate(request, output="latents").latents, twins.drawn([request]))
    before = engine.runner.backend.compilations
    close(
        engine.generate(replace(request, prompt="a boat"), output="latents").latents,
        twins.drawn([replace(request, prompt="a boat")]),
    )
    assert engine.runner.backend.compilations == before
    engine.close()


def test_a_record_gives_the_same_control_back(tmp_path):
    LINES.save(tmp_path / "lines.png")
    style = sf.StyleAligned(prompt="a star")
    controls = [
        sf.Control(tmp_path / "lines.png", "lines", weight=0.5, window=(0.1, 0.9), reference="same"),
        sf.Control(LINES, guess_mode=True, reference=edges(3)),
    ]
    record = json.loads(json.dumps(to_record([sf.Request("a cat", style=style, control=controls)])))
    (again,) = from_record(record)
    assert [(c.network, c.weight, c.window, c.guess_mode) for c in again.controls] == [
        ("lines", 0.5, (0.1, 0.9), False),
        (None, 1.0, (0.0, 1.0), True),
    ]
    assert again.controls[0].reference == "same" and np.array_equal(again.controls[1].reference, edges(3))
    (short,) = from_record({"requests": [{"prompt": "a cat", "control": "lines.png"}]}, base=tmp_path)
    assert short.controls[0].weight == 1.0
    for wrong in ({"picture": 1}, {"weight": 1}, 5, [[]]):
        with pytest.raises(InvalidRequest):
            from_record([{"prompt": "a cat", "control": wrong}])
    edges(4).save(tmp_path / "lines.png")
    with pytest.raises(sf.errors.StyleError, match="different pixels"):
        from_record(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -0.1}, "weight is -0.1"),
        ({"weight": 11}, "weight is 11"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"window": (0.5, 0.5)}, "window is"),
        ({"window": (0, 1.2)}, "window is"),
        ({"window": 3}, "window is 3"),
        ({"guess_mode": "no"}, "guess_mode is 'no'"),
        ({"network": ""}, "network"),
        ({"network": 5}, "network is 5"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(InvalidRequest, match=message):
        sf.Control(LINES, **change)


def test_what_is_no_control_is_refused(steered, tmp_path):
    for wrong in (None, 5, {"a": 1}):
        with pytest.raises(ImageError):
            sf.Control(wrong)
    for wrong in ("edges.png", LINES, [LINES], 5):
        with pytest.raises(InvalidRequest, match="must be a stylefast.Control"):
            sf.Request("a cat", control=wrong)
    with pytest.raises(InvalidRequest, match="none of the 3 steps lies whole"):
        sf.Request("a cat", steps=3, control=sf.Control(LINES, window=(0.4, 0.6)))
    with pytest.raises(InvalidRequest, match="9 control pictures; at most 8"):
        sf.Request("a cat", control=[sf.Control(LINES)] * 9)
    with pytest.raises(InvalidRequest, match=r"several ControlNets \(lines, depth\)"):
        under(steered, sf.Control(LINES))
    with pytest.raises(InvalidRequest, match="did you mean 'lines'"):
        under(steered, sf.Control(LINES, "line"))
    with pytest.raises(ImageError, match="nowhere.png"):
        under(steered, sf.Control(tmp_path / "nowhere.png", "lines"))
    with pytest.raises(InvalidRequest, match="already registered"):
        steered.controls.add(torch.nn.Linear(1, 1), "lines")


@pytest.mark.parametrize("kind", ["no style", "of the call", "bank", "another method"])
def test_a_control_of_a_reference_that_does_not_run_is_refused(steered, kind):
    style = {
        "no style": lambda: None,
        "of the call": sf.StyleAligned,
        "bank": lambda: sf.StyleAligned(steered.bake(sf.StyleAligned(prompt="a star"), steps=2, size=SIZE)),
        "another method": lambda: sf.DreamStyler(learned()),
    }[kind]()
    for reference in ("same", edges(3)):
        with pytest.raises(InvalidRequest, match="a control says what steers the reference, but"):
            sf.Request("a cat", steps=2, size=SIZE, style=style, control=sf.Control(LINES, reference=reference))


def test_networks_that_do_not_fit_are_refused_by_name(pipe, steered, tmp_path):
    from diffusers import ControlNetModel

    with pytest.raises(ModelNotFound, match="no ControlNet at"):
        steered.controls.add(tmp_path / "nothing", "n")
    with pytest.raises(ModelNotFound, match=r"no config.json"):
        steered.controls.add(tmp_path, "n")
    own = {k: v for k, v in small_control(pipe).config.items() if k[0] != "_"}
    with pytest.raises(AdapterError, match=r"cross_attention_dim=768 \(768 is SD 1.5's\)"):
        steered.controls.add(ControlNetModel(**own | {"cross_attention_dim": 768}), "n")
    with pytest.raises(AdapterError, match="block_out_channels"):
        steered.controls.add(ControlNetModel(**own | {"block_out_channels": [32, 64, 96]}), "n")
    with pytest.raises(AdapterError, match="conditioning_channels=1"):
        steered.controls.add(ControlNetModel(**own | {"conditioning_channels": 1}), "n")
    with pytest.raises(AdapterError, match="divides a picture's sides by 8, but this model's VAE needs one .* by 4"):
        steered.controls.add(ControlNetModel(**own | {"conditioning_embedding_out_channels": [4, 4, 4, 4]}), "n")


def test_a_folders_name_is_whole_and_what_is_no_source_is_refused(nets, steered, tmp_path):
    nets["lines"].save_pretrained(tmp_path / "controlnet-canny-sdxl-1.0")
    assert steered.controls.add(tmp_path / "controlnet-canny-sdxl-1.0") == "controlnet-canny-sdxl-1.0"
    steered.controls.remove("controlnet-canny-sdxl-1.0")
    for wrong in (5, None, [], b"x", "a\0b"):
        with pytest.raises(InvalidRequest):
            steered.controls.add(wrong)


def test_a_single_file_for_another_family_is_refused_by_its_width(pipe, steered, tmp_path):
    from diffusers import ControlNetModel

    own = {k: v for k, v in small_control(pipe).config.items() if k[0] != "_"}
    ControlNetModel(**own | {"cross_attention_dim": 768}).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"cross_attention_dim=768 \(768 is SD 1.5's\)"):
        steered.controls.add(tmp_path / "diffusion_pytorch_model.safetensors")


def test_loras_of_the_unet_leave_a_controlnet_as_it_is():
    """A LoRA of a row under control gives what the same one, merged into the UNet's weights, gives under control."""
    engine = sf.Engine.from_pretrained("tiny", device="cpu", dtype="float32")
    engine.controls.add(small_control_for(engine), "lines")
    engine.loras.add(engine.lora_files()["gold"], "gold")
    control = sf.Control(edges(2, (64, 64)), "lines")
    given = {"steps": 2, "seed": 1, "output": "latents"}
    plain = engine.generate("a cat", control=control, **given).latents[0]
    requests = [
        sf.Request("a cat", steps=2, seed=1, control=control, loras={"gold": 0.8}),
        sf.Request("a cat", steps=2),
    ]
    row = engine.generate(requests, output="latents").latents[0]
    engine.load_lora(engine.lora_files()["gold"], 0.8)
    merged = engine.generate("a cat", control=control, **given).latents[0]
    assert (row - merged).abs().max() < 1e-5 * merged.abs().max() < (row - plain).abs().max()
    engine.close()


def test_a_controlnet_and_a_picture_prompt_meet_in_a_row(pipe, nets, adapter_files):
    engine = sf.Engine.from_pipeline(pipe)
    engine.load_adapter(adapter_files[0])
    engine.controls.add(nets["lines"], "lines")
    control, style = sf.Control(LINES, "lines", weight=0.7), sf.InstantStyle(small_picture(5), blocks="all")
    given = {"size": SIZE, "steps": STEPS, "seed": 3}
    requests = [
        sf.Request("a cat", style=style, control=control, **given),
        sf.Request("a dog", control=control, **given),
    ]
    together = engine.generate(requests, output="latents").latents
    twins = Twins(engine, adapter_files[0], {"lines": nets["lines"]})
    for request, latents in zip(requests, together, strict=True):
        close(latents[None], twins.drawn([request]))
    apart(together[:1], under(engine, control))
    engine.close()


def test_folders_and_single_files_load(nets, steered, twins, tmp_path):
    nets["lines"].save_pretrained(tmp_path / "folder")
    # not to the bit: its prompts were encoded beside others
    expected = twins.drawn([sf.Request("a cat", size=SIZE, steps=STEPS, seed=3, control=sf.Control(LINES, "lines"))])
    assert steered.controls.add(tmp_path / "folder") == "folder"
    file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "single.safetensors")
    assert steered.controls.add(tmp_path / "single.safetensors") == "single"
    for name in ("folder", "single"):
        close(under(steered, sf.Control(LINES, name)), expected)
        steered.controls.remove(name)


@pytest.mark.parametrize(
    "config",
    [
        {"global_pool_conditions": True},
        {"controlnet_conditioning_channel_order": "bgr"},
        {"addition_embed_type": None, "down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=["pooled", "bgr", "without attention"],
)
def test_networks_of_other_settings_equal_diffusers(pipe, steered, config):
    net = small_control(pipe, 3, **config)
    steered.controls.add(net, "other")
    try:
        picture = edges(1).convert("RGB")
        pixels = np.array(picture)
        pixels[..., 0] = 40
        picture = Image.fromarray(pixels)
        found = under(steered, sf.Control(picture, "other", weight=0.5))
        close(found, measured(theirs, pipe, [net], [picture], [0.5]))
    finally:
        steered.controls.remove("other")
