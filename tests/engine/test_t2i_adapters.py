"""T2I-Adapters: as in diffusers' pipeline, in a batch with all other kinds of rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import AdapterError, InvalidRequest
from tests.support.fp64 import Twins, close, measured
from tests.support.pipelines import of_kind
from tests.support.scene import SIZE, apart, small_picture
from tests.support.small_control import STEPS, edges, small_control, under

LINES = edges(1)


def small_adapter(pipe, seed: int = 1, **config):
    """A random `T2IAdapter` of diffusers for a pipeline's UNet."""
    from diffusers import T2IAdapter

    torch.manual_seed(seed)
    wide = list(pipe.unet.config.block_out_channels)
    given = {"in_channels": 3, "channels": [*wide, wide[-1]], "num_res_blocks": 2, "adapter_type": "full_adapter_xl"}
    adapter = T2IAdapter(**given | {"downscale_factor": 2 * pipe.vae_scale_factor} | config)
    return adapter.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def nets(pipe):
    return {"sketch": small_adapter(pipe), "grey": small_adapter(pipe, 2, in_channels=1), "lines": small_control(pipe)}


@pytest.fixture(scope="module")
def steered(pipe, nets):
    engine = sf.Engine.from_pipeline(pipe)
    for name, net in nets.items():
        engine.controls.add(net, name)
    yield engine
    engine.close()


def theirs(pipe, nets, pictures, scales, factor=1.0, scheduler="euler"):
    """Latents of diffusers' T2I-Adapter pipeline."""
    from diffusers import MultiAdapter

    several = len(nets) > 1
    made = of_kind(pipe, "Adapter", scheduler, adapter=MultiAdapter(list(nets)) if several else nets[0])
    return made(
        "a cat",
        image=list(pictures) if several else pictures[0],
        height=SIZE[1],
        width=SIZE[0],
        adapter_conditioning_scale=list(scales) if several else scales[0],
        adapter_conditioning_factor=factor,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_one_adapter_equals_diffusers(pipe, nets, steered, scheduler):
    found = under(steered, sf.Control(LINES, "sketch", weight=0.7), scheduler=scheduler)
    close(found, measured(theirs, pipe, [nets["sketch"]], [LINES], [0.7], 1.0, scheduler))
    apart(found, under(steered, scheduler=scheduler))


def test_an_adapter_of_one_channel_reads_grey_pictures(pipe, nets, steered):
    grey = LINES.convert("L")
    found = under(steered, sf.Control(grey, "grey"))
    close(found, measured(theirs, pipe, [nets["grey"]], [grey], [1.0]))
    colour = Image.merge("RGB", [edges(i).convert("L") for i in (1, 2, 3)])
    near_grey = under(steered, sf.Control(colour.convert("L"), "grey"))[0]
    assert (under(steered, sf.Control(colour, "grey"))[0] - near_grey).abs().max() < 0.05 * near_grey.abs().max()


def test_several_adapters_add_up_as_in_diffusers(pipe, nets, steered):
    second = small_adapter(pipe, 5)
    steered.controls.add(second, "second")
    found = under(steered, sf.Control(LINES, "sketch", weight=0.7), sf.Control(edges(2), "second", weight=0.4))
    close(found, measured(theirs, pipe, [nets["sketch"], second], [LINES, edges(2)], [0.7, 0.4]))
    steered.controls.remove("second")


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.75])
def test_a_window_covers_the_steps_that_diffusers_factor_covers(pipe, nets, steered, factor):
    found = under(steered, sf.Control(LINES, "sketch", window=(0, factor)))
    close(found, measured(theirs, pipe, [nets["sketch"]], [LINES], [1.0], factor))


def test_rows_with_and_without_adapters_and_controlnets_share_a_batch(steered, nets):
    given = {"size": SIZE, "steps": STEPS}
    sketch = sf.Control(LINES, "sketch", weight=0.7)
    both = replace(sketch, reference="same")
    requests = [
        sf.Request("a cat", **given),
        sf.Request("a boat", seed=1, control=sketch, **given),
        sf.Request("a tree", seed=2, control=[sf.Control(edges(4), "grey"), sf.Control(edges(5), "lines")], **given),
        sf.Request("a dog", seed=4, style=sf.StyleAligned(small_picture(1)), control=both, **given),
        sf.Request("a car", seed=5, image=small_picture(3), strength=0.5, control=sketch, **given),
        sf.Request("a sun", seed=6, control=sf.Control(edges(6), "lines"), **given),
    ]
    before = steered.runner.calls
    together = steered.generate(requests, output="latents").latents
    assert steered.runner.calls - before == STEPS
    twins = Twins(steered, controls=nets)
    for request, latents in zip(requests, together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_a_picture_is_encoded_once_for_all_steps(steered, monkeypatch):
    net, calls = steered.controls["sketch"], []
    encode = net.embed_picture
    monkeypatch.setattr(net, "embed_picture", lambda picture: (calls.append(1), encode(picture))[1])
    control = sf.Control(LINES, "sketch")
    under(steered, control)
    under(steered, control, steps=2)
    assert calls == [1]


def test_folders_and_files_load_and_others_are_refused_by_name(pipe, nets, steered, tmp_path):
    from diffusers import MultiAdapter, T2IAdapter

    nets["sketch"].save_pretrained(tmp_path / "folder")
    expected = under(steered, sf.Control(LINES, "sketch"))[0]
    steered.controls.add(tmp_path / "folder")
    (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "single.safetensors")
    steered.controls.add(tmp_path / "single.safetensors")
    for name in ("folder", "single"):
        assert torch.equal(under(steered, sf.Control(LINES, name))[0], expected)
        steered.controls.remove(name)
    with pytest.raises(AdapterError, match="of type 'full_adapter', as those for SD 1.5 are"):
        steered.controls.add(T2IAdapter(), "n")
    with pytest.raises(AdapterError, match=r"channels=\[320, 640, 1280, 1280\]"):
        steered.controls.add(T2IAdapter(adapter_type="full_adapter_xl"), "n")
    with pytest.raises(AdapterError, match="of several adapters in one"):
        steered.controls.add(MultiAdapter([nets["sketch"], nets["sketch"]]), "n")
    with pytest.raises(AdapterError, match="divides a picture's sides by 16, but this model's VAE needs one .* by 8"):
        steered.controls.add(small_adapter(pipe, downscale_factor=16), "n")
    with pytest.raises(InvalidRequest, match="guess_mode is for ControlNets"):
        under(steered, sf.Control(LINES, "sketch", guess_mode=True))


def test_sizes_that_an_adapter_can_not_divide_are_refused(pipe):
    engine = sf.Engine.from_pipeline(pipe)
    engine.controls.add(small_adapter(pipe), "sketch")
    assert np.isfinite(under(engine, sf.Control(LINES, "sketch"), size=(40, 24))[0].numpy()).all()
    engine.controls["sketch"].downscale = 16  # as SDXL's adapters have, where a size is divisible by 8
    request = sf.Request("a cat", size=(48, 32), steps=5, control=sf.Control(LINES, "sketch"))
    for wrong, size in ((replace(request, size=(40, 32)), "40x32"), (replace(request, upscale=1.2), "56x40")):
        with pytest.raises(InvalidRequest, match=f"size is {size}; with the T2I-Adapter 'sketch' both sides"):
            engine.submit(wrong)
    engine.close()
