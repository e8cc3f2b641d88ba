"""A LoRA in training computes the loss of the papers, and its file means the same in the engine and in diffusers."""

import copy
import json
import logging
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, ModelFormatError, NumericsError
from stylefast.models.text import Prompt, TextEncoder
from stylefast.training.lora import LoraSettings, LoraTraining, learning_rate, loss_weights, train_lora
from stylefast.training.low_rank import attached
from stylefast.training.pictures import CaptionedPicture, read_folder
from tests.support.fp64 import close, measured
from tests.support.small_sdxl import small_pipeline

QUICK = {"rank": 2, "steps": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pictures(folder):
    return read_folder(folder)


def training(engine, pictures, **settings):
    return LoraTraining(engine, pictures, LoraSettings(**QUICK | settings))


def randomise(training, seed=0):
    """Give the changes values that fp16 holds, none of them zero."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in training._parameters:
        parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.1).half().float()


@torch.no_grad()
def predicted(unet, x, given):
    return unet(x, 500, **given).sample


@torch.no_grad()
def encoded(encoder, ids):
    return encoder(ids, output_hidden_states=True).hidden_states[-2]


def text_state(parts, field, prompt):
    return getattr(TextEncoder(*parts).encode([prompt])[0], field)


def text_states(engine, text):
    """The hidden and the pooled states of a text by the engine's encoders."""
    encoder = engine.text_encoder
    parts = (encoder.tokenizers, encoder.encoders, encoder.force_zeros)
    return [measured(text_state, parts, field, Prompt(text)) for field in ("hidden", "pooled")]


KINDS = {
    "attention": {},
    "attention+ff": {"layers": "attention+ff", "alpha": 0.5},
    "all": {"layers": "all", "rank": 3, "alpha": 6},
    "one block": {"layers": "all", "blocks": ("up_blocks.0.attentions.1",)},
    "text encoders": {"text_encoders": True, "blocks": "mid_block"},
}


@pytest.mark.numerics
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_the_file_means_in_diffusers_what_was_trained(engine, pictures, tmp_path, settings):
    made = training(engine, pictures, **settings)
    randomise(made)
    made.save(tmp_path / "made.safetensors")
    pipe = small_pipeline()
    pipe.load_lora_weights(str(tmp_path / "made.safetensors"))
    draw = torch.Generator().manual_seed(1)
    x, states, pooled = (torch.randn(2, *shape, generator=draw) for shape in ((4, 16, 16), (77, 64), (32,)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)}
    given = {"encoder_hidden_states": states, "added_cond_kwargs": added}
    ids = torch.randint(0, 50, (2, 77), generator=draw)
    with torch.no_grad(), attached(made._pairs()):
        ours = [made._unet(x, 500, **given).sample]
        ours += [encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in engine.text_encoder.encoders]
    theirs = [measured(predicted, pipe.unet, x, given)]
    theirs += [measured(encoded, encoder, ids) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)
    plain = predicted(small_pipeline().unet, x, given)
    assert (ours[0] - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.numerics
def test_the_file_gives_the_engine_the_pictures_of_diffusers(engine, pictures, tmp_path):
    made = training(engine, pictures, text_encoders=True)
    randomise(made)
    made.save(tmp_path / "made.safetensors")
    name = engine.loras.add(tmp_path / "made.safetensors")
    try:
        found = engine.generate("a cat", steps=2, seed=3, loras={name: 1.0}, output="latents").latents
    finally:
        engine.loras.remove(name)
    pipe = small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path / "made.safetensors"))

    def theirs(pipe):
        seed = torch.Generator().manual_seed(3)
        given = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64, "output_type": "latent"}
        return pipe(["a cat"], generator=[seed], **given).images

    close(found, measured(theirs, pipe))


def seen(made):
    """One step, with what the UNet was given and what it gave."""
    calls = []

    def spy(module, args, kwargs, output):
        calls.append((args, kwargs, output.sample.detach()))

    handle = made._unet.register_forward_hook(spy, with_kwargs=True)
    loss = made.step()
    handle.remove()
    return loss, *calls[0]


@pytest.mark.numerics
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [None, 0.5])
def test_the_loss_is_that_of_the_papers(pipe, pictures, prediction, min_snr):
    engine = sf.Engine.from_pipeline(pipe, prediction_type=prediction)
    made = training(engine, pictures[:1], batch=4, min_snr=min_snr)
    loss, (noisy, timesteps), kwargs, predicted = seen(made)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = torch.cumprod(1 - betas, 0)[timesteps][:, None, None, None]
    clean = made._latents[[0] * 4].double()
    noise = (noisy.double() - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    assert 0.9 < noise.std() < 1.1 and len({*timesteps.tolist()}) > 1
    target = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    snr = (alpha / (1 - alpha)).flatten()
    weights = torch.ones(4)
    if min_snr is not None:
        weights = snr.clamp(max=0.5) / (snr if prediction == "epsilon" else snr + 1)
    expected = (weights * (predicted.double() - target).square().mean((1, 2, 3))).mean()
    # the noise is recovered from fp32 latents, and levels are rounded to fp32 as in training
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[100, 64, 18, 0, 64, 64]] * 4


@pytest.mark.parametrize("kind", ["all", "text encoders"])
def test_gradient_checkpoints_keep_less_and_train_the_same(engine, pictures, kind):
    kept, made, losses = {}, {}, {}
    for checkpoints in (False, True):
        made[checkpoints] = training(engine, pictures, **KINDS[kind], gradient_checkpointing=checkpoints)
        kept[checkpoints], losses[checkpoints] = 0, []

        def keep(tensor, checkpoints=checkpoints):
            kept[checkpoints] += tensor.nbytes
            return tensor

        for _ in range(3):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                losses[checkpoints].append(made[checkpoints].step())
    assert losses[True] == losses[False]
    for one, other in zip(made[True]._parameters, made[False]._parameters, strict=True):
        assert torch.equal(one, other)
    if kind == "all":
        assert kept[True] < 0.5 * kept[False]


def test_captions_are_dropped_at_the_share_asked_for(engine, pictures):
    for share, wanted in ((0.0, "a cat"), (1.0, None)):
        made = training(engine, pictures[:1], caption_dropout=share)
        given = seen(made)[2]
        (state,) = engine.text_encoder.encode([sf.models.text.Prompt(wanted)])
        assert torch.equal(given["encoder_hidden_states"][0], state.hidden)
        assert torch.equal(given["added_cond_kwargs"]["text_embeds"][0], state.pooled)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_trained_text_encoders_start_where_the_engine_is(engine, pictures, share):
    learned = seen(training(engine, pictures[:1], caption_dropout=share, text_encoders=True))[2]
    hidden, pooled = text_states(engine, "a cat" if share == 0 else None)
    close(learned["encoder_hidden_states"][0], hidden)
    close(learned["added_cond_kwargs"]["text_embeds"][0], pooled)


def test_every_picture_is_seen_once_a_round(engine, pictures):
    made = training(engine, pictures)
    rounds = [[made._next() for _ in range(3)] for _ in range(6)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds) and len({tuple(one) for one in rounds}) > 1


def test_training_fits_the_pictures_and_leaves_the_model_as_it_is(engine, pictures, tmp_path):
    before = {name: value.clone() for name, value in engine.unet.state_dict().items()}
    picture = engine.generate("a cat", steps=1, output="latents").latents[0]
    made = training(engine, pictures, steps=25, batch=4, text_encoders=True)

    def error():
        state = made._generator.get_state()
        made._generator.manual_seed(9)
        made._order.clear()
        rate, made._optimizer.step = made._optimizer.step, lambda: None
        loss = made.step()
        made._optimizer.step, made.done = rate, made.done - 1
        made._generator.set_state(state)
        return loss

    first = error()
    for _ in range(25):
        made.step()
    assert error() < 0.9 * first
    assert all(torch.equal(value, before[name]) for name, value in engine.unet.state_dict().items())
    assert torch.equal(engine.generate("a cat", steps=1, output="latents").latents[0], picture)
    moved = [one.up.abs().max() > 0 for found in made.changes.values() for one in found.values()]
    # the last layer of encoder 1 gives the hidden states that SDXL does not read
    assert sum(moved) >= len(moved) - 6


def test_the_same_seed_gives_the_same_weights(engine, pictures, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = LoraSettings(**QUICK, seed=seed)
        files.append(load_file(train_lora(engine, pictures, tmp_path / f"{name}.safetensors", settings)))
    first, again, other = files
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_an_interrupt_saves_what_there_is_and_goes_on(engine, pictures, tmp_path):
    out = tmp_path / "half.safetensors"

    def report(step, steps, loss):
        assert steps == 3 and math.isfinite(loss)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(engine, pictures, out, LoraSettings(**QUICK), report)
    with safe_open(out, "pt") as file:
        said = file.metadata()
        keys = list(file.keys())
    assert said["ss_steps"] == "2" and said["ss_max_train_steps"] == "3"
    assert said["ss_network_dim"] == "2" and said["ss_network_alpha"] == "2.0"
    assert said["ss_base_model_version"] == f"SDXL-shaped: {engine.name}"
    assert said["ss_resolution"] == "(64, 64)" and json.loads(said["stylefast.blocks"]) == []
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in keys


def test_a_file_that_can_not_be_written_is_refused_before_training_or_said_when_it_is_stopped(
    engine, pictures, tmp_path, caplog
):
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(InvalidRequest, match="is a folder; choose another file"):
        train_lora(engine, pictures, folder, LoraSettings(**QUICK))
    out = tmp_path / "late.safetensors"

    def report(step, steps, loss):
        out.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(engine, pictures, out, LoraSettings(**QUICK), report)
    assert "what was learned is lost: can't write" in caplog.text


def test_captions_of_any_length_are_used_up_to_the_first_window(engine, pictures):
    long = [CaptionedPicture(pictures[0].path, "a fish " * 900)]
    made = LoraTraining(engine, long, LoraSettings(**QUICK))
    (states, pooled), room = made._states[long[0].caption], engine.text_encoder.max_tokens
    assert len(states) == room
    filling = " ".join(("a fish " * room).split()[: room - 2])  # a start and an end come to it
    short = text_states(engine, filling)
    close(states, short[0][:room])
    close(pooled, short[1])


def test_a_loss_that_is_not_finite_ends_it_with_a_way_out(engine, pictures, tmp_path):
    made = training(engine, pictures)
    made.step()
    next(iter(made.changes["unet"].values())).up.data.fill_(math.inf)
    with pytest.raises(NumericsError, match=r"the loss is (nan|inf) in step 2; lower the learning rate \(it is 0.01\)"):
        made.step()
    with pytest.raises(NumericsError, match="values beyond fp16"):
        made.save(tmp_path / "broken.safetensors")
    assert not list(tmp_path.iterdir())


BAD = {
    "rank": (0, "rank is 0; it must be a whole number from 1 to 1024"),
    "alpha": (0, "alpha is 0; it must be a number above 0"),
    "steps": (0, "steps is 0"),
    "learning_rate": (0.0, "learning_rate is 0.0"),
    "batch": (1.5, "batch is 1.5"),
    "resolution": (8, "resolution is 8"),
    "layers": ("atention", "did you mean 'attention'"),
    "blocks": (["up_blocks", " "], "a name in blocks is empty"),
    "text_encoders": ("no", "text_encoders is 'no'; it must be true or false"),
    "caption_dropout": (1.1, "caption_dropout is 1.1"),
    "min_snr": (0, "min_snr is 0"),
    "seed": (-1, "seed is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_setting_out_of_range_is_refused_by_name(name):
    value, message = BAD[name]
    with pytest.raises(InvalidRequest) as error:
        LoraSettings(**{name: value})
    assert message in str(error.value)


def test_what_does_not_fit_the_model_is_refused(engine, pictures, pipe, tmp_path):
    with pytest.raises(InvalidRequest, match="resolution is 40; this model needs a multiple of 16, such as 32"):
        training(engine, pictures, resolution=40)
    with pytest.raises(InvalidRequest, match=r"blocks is \['up_block_9'\], which no layer"):
        training(engine, pictures, blocks="up_block_9")
    with pytest.raises(InvalidRequest, match="no pictures to train on"):
        training(engine, [])
    with pytest.raises(InvalidRequest, match="must end in .safetensors"):
        train_lora(engine, pictures, tmp_path / "x.bin")
    with pytest.raises(InvalidRequest, match="does not exist; make it first"):
        train_lora(engine, pictures, tmp_path / "no" / "x.safetensors")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"a\.png"):
        training(engine, [CaptionedPicture(tmp_path / "a.png", "a cat")])
    half = sf.Engine.from_pipeline(small_pipeline().to(torch.float16))
    with pytest.raises(InvalidRequest, match="float16, in which gradients overflow"):
        training(half, pictures)


def test_models_of_continuous_noise_levels_are_refused(pictures, pipe):
    from diffusers import EDMEulerScheduler

    other = copy.copy(pipe)
    other.scheduler = EDMEulerScheduler()
    with pytest.raises(ModelFormatError, match="is an EDM model"):
        training(sf.Engine.from_pipeline(other), pictures)


def test_long_captions_are_cut_with_a_warning(engine, pictures, caplog):
    long = CaptionedPicture(pictures[0].path, "a cat " * 60)
    with caplog.at_level(logging.WARNING):
        made = training(engine, [long])
        made.step()
    assert "1 captions are longer than 77 tokens, of which the first are used; one is that of '0.png'" in caplog.text


def test_the_learning_rate_rises_and_falls():
    settings = LoraSettings(steps=100, learning_rate=0.5)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[4] <= 0.5
    assert rates[50] == pytest.approx(0.25) and 0 < rates[99] < 1e-3


def test_min_snr_weights_are_finite_at_the_ends_of_a_schedule():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert loss_weights(ends, "epsilon", 5.0).tolist() == [1, 0]
    assert loss_weights(ends[:1], "v_prediction", 5.0).tolist() == [0]
