"""Whole pictures of the embedded model with all but the UNet in exported graphs, and PyTorch's own parts locked."""

import pytest
import torch
from torch.nn.functional import linear

import stylefast as sf
from stylefast.errors import EngineMismatch, InvalidRequest
from stylefast.models.text import Prompt
from stylefast.models.vae_tiles import SMALLEST_TILE, decode_tiles
from tests.support.fp64 import close, measured
from tests.support.scene import psnr
from tests.support.small_adapter import small_picture
from tests.support.small_sdxl import small_tiny_vae
from tests.support.small_text import small_text_parts

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from stylefast.export.manifest import COMPONENTS, read_manifest  # noqa: E402
from stylefast.export.options import load_source  # noqa: E402
from stylefast.export.sessions import OrtSession  # noqa: E402
from stylefast.models.text import TextEncoder  # noqa: E402
from stylefast.models.vae import decode  # noqa: E402
from stylefast.runtime.backends.exported_parts import ExportedDecoder, ExportedPart, ExportedParts, ExportedText  # noqa: E402
from tests.support.shared_exports import shared_export  # noqa: E402
from tests.support.small_graphs import translations  # noqa: E402, F401

SIZE = (56, 40)
RUN = {"steps": 3, "guidance": 4.0, "size": SIZE}


def load():
    return sf.Engine.from_pretrained("tiny", device="cpu")


class Counted:
    """A session that knows how often it ran."""

    def __init__(self, path):
        self.session, self.runs, self.nbytes = OrtSession(path), 0, 7

    def run(self, inputs, outputs):
        self.runs += 1
        self.session.run(inputs, outputs)

    def close(self):
        self.session.close()


@pytest.fixture(scope="module")
def parts():
    """Every component of the embedded model, exported."""
    source = load_source("tiny", "float32")
    folder = shared_export(source, components=tuple(name for name in COMPONENTS if name != "unet"))
    return {entry.component: (folder, entry) for entry in read_manifest(folder).graphs}


def graphs_of(parts) -> tuple[ExportedParts, dict[str, Counted]]:
    """The parts, and the sessions that were opened."""
    opened: dict[str, Counted] = {}

    def open_it(entry):
        opened[entry.component] = Counted(parts[entry.component][0] / entry.file)
        return opened[entry.component]

    return ExportedParts.of([entry for _, entry in parts.values()], open_it), opened


def lock(module):
    """Have a module raise when it is called."""

    def refuse(*_):
        raise AssertionError(f"{type(module).__name__} ran in PyTorch")

    module.register_forward_pre_hook(refuse)


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module")
def through_graphs(parts):
    """An engine that draws through graphs, whose own modules would raise; and the sessions by component."""
    engine = load()
    graphs, opened = graphs_of(parts)
    assert set(graphs.install(engine)) == {"text_encoder", "text_encoder_2", "text_projector", "vae_decoder"}
    for name, pair in engine.adapters.items():
        engine.adapters[name] = graphs.adapter(*pair)
        for part in (pair[0].projector, *pair[0].layer_projections.values(), pair[1].vision_model):
            lock(part)
    for encoder in engine.text_encoder.encoders:
        lock(encoder)
    lock(engine.text_encoder.encoders[1].text_projection)
    lock(engine.vae.decoder)
    for layer in engine.unet.layout.layers:
        attention = engine.unet.get_submodule(layer.name).attn2
        lock(attention.to_k)
        lock(attention.to_v)
    return engine, opened, graphs


def same_pictures(engine, plain, requests):
    found, expected = (e.generate(requests, output="np").images for e in (engine, plain))
    assert len(found) == len(requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (SIZE[1], SIZE[0], 3)
        assert psnr(ours, theirs) >= 60, psnr(ours, theirs)


def test_pictures_of_every_method_are_those_of_pytorch(through_graphs, plain):
    engine, opened, _ = through_graphs
    learned = sf.DreamStyler(engine.styles()["chalk"])
    aligned = sf.StyleAligned()
    requests = [
        sf.Request("a fish in neon style", seed=1, negative_prompt="a cat", **RUN),
        sf.Request("a boat in the style of <chalk>", seed=2, style=learned, **RUN),
        sf.Request("a house", seed=3, style=sf.InstantStyle([small_picture(1), small_picture(2)]), **RUN),
        sf.Request("a house", seed=4, style=sf.InstantStyle(small_picture(1), content="a cat"), **RUN),
        sf.Request("a fish", seed=5, style=aligned, **RUN),
        sf.Request("a cat", seed=6, style=aligned, **RUN),
    ]
    same_pictures(engine, plain, requests)
    assert opened.keys() == {
        "text_encoder",
        "text_encoder_2",
        "text_projector",
        "image_encoder",
        "image_projector",
        "vae_decoder",
    }
    assert all(session.runs for session in opened.values())


def test_a_reference_picture_is_encoded_by_pytorch_and_drawn_by_graphs(through_graphs, plain):
    request = sf.Request("a fish", seed=5, style=sf.StyleAligned(reference=small_picture(3)), **RUN)
    same_pictures(through_graphs[0], plain, [request])


def test_prompts_with_learned_vectors_pool_at_either_place(through_graphs, plain):
    generator = torch.Generator().manual_seed(0)
    vectors = tuple(torch.randn(2, width, generator=generator) for width in plain.text_encoder.widths)
    named = Prompt("a <x> fish", {"x": vectors})
    prompts = [named, Prompt("a cat"), named, Prompt(None)]
    policies = ["eos", "eos", "first_added_token", "eos"]

    def by_pytorch(encoders, prompts, field):
        encoder = TextEncoder(plain.text_encoder.tokenizers, encoders, plain.text_encoder.force_zeros)
        return torch.stack([getattr(states, field) for states in encoder.encode(prompts, policies)])

    found = through_graphs[0].text_encoder.encode(prompts, policies)
    for field in ("hidden", "pooled"):
        expected = measured(by_pytorch, plain.text_encoder.encoders, prompts, field)
        close([getattr(states, field) for states in found], expected)
    assert (found[0].pooled - found[2].pooled).abs().max() > 0.01


@torch.no_grad()
def decoded(vae, latents, tile):
    """Pictures by diffusers' own VAE in tiles, which are blended in fp32; the embedded model's scaling factor is 1."""
    pictures = decode_tiles(lambda part: vae.decode(part).sample, latents, tile, 4)
    return (pictures / 2 + 0.5).clamp(0, 1).to(latents.dtype)


def test_tiles_are_decoded_by_the_graph(parts, plain):
    folder, entry = parts["vae_decoder"]
    session = Counted(folder / entry.file)
    run = ExportedDecoder(ExportedPart(lambda: session, torch.float32, entry.extra), plain.downscale)
    latents = torch.randn(2, 4, SMALLEST_TILE + 5, SMALLEST_TILE + 3, generator=torch.Generator().manual_seed(1))
    tile = SMALLEST_TILE * plain.downscale
    found = decode(plain.vae, latents, tile=tile, decode_dtype=torch.float32, run=run)
    close(found, measured(decoded, plain.vae, latents, SMALLEST_TILE))
    assert session.runs == 8  # two pictures of 2x2 tiles


def test_what_overflows_in_a_half_type_is_decoded_again_by_the_vae(plain, caplog):
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))

    def overflows_at_the_first(part):
        pictures = torch.zeros(len(part), 3, 24, 24, dtype=part.dtype)
        pictures[0] = torch.inf
        return pictures

    with caplog.at_level("INFO"):
        found = decode(plain.vae, latents, decode_dtype=torch.float16, run=overflows_at_the_first)
    close(found[:1], measured(decoded, plain.vae, latents[:1], SMALLEST_TILE))
    assert (found[1] == 0.5).all()
    assert "float32" in caplog.text


def test_gradients_through_exported_text_encoders_are_refused(through_graphs):
    vectors = tuple(torch.randn(1, width, requires_grad=True) for width in through_graphs[0].text_encoder.widths)
    with pytest.raises(InvalidRequest, match="gradients"):
        through_graphs[0].text_encoder.encode([Prompt("a <x>", {"x": vectors})])


def test_skipped_layers_are_refused_where_the_text_encoders_are_graphs(through_graphs):
    with pytest.raises(InvalidRequest, match="clip_skip is 1.*exported graphs.*backend='torch'"):
        through_graphs[0].submit(sf.Request("a fish", clip_skip=1))


def test_graphs_of_another_model_are_refused(parts, plain):
    graphs, _ = graphs_of(parts)
    with pytest.raises(EngineMismatch, match="tokens"):
        ExportedText(
            TextEncoder(*small_text_parts(), True), (graphs.parts["text_encoder"], graphs.parts["text_encoder_2"])
        )
    other = sf.Engine.from_pretrained("tiny", device="cpu", vae=small_tiny_vae())
    with pytest.raises(EngineMismatch, match="VAE"):
        graphs.install(other)


def test_an_adapter_that_was_not_exported_stays_in_pytorch(parts):
    graphs, opened = graphs_of(parts)
    adapter, encoder = next(iter(load().adapters.values()))
    with torch.no_grad():
        adapter.projector.proj.bias.add_(1)
    same, exported = graphs.adapter(adapter, encoder)
    assert same is adapter and exported is not encoder and not opened


def test_sessions_open_when_they_are_used_and_close(parts, plain):
    graphs, opened = graphs_of({"text_projector": parts["text_projector"]})
    engine = load()
    assert graphs.install(engine) == ("text_projector",) and not opened and graphs.nbytes == 0
    states = torch.randn(2, engine.text_encoder.max_tokens, 128, generator=torch.Generator().manual_seed(2))

    def projected(weights, states):
        return torch.cat([linear(states, weight).flatten() for weight in weights])

    attentions = [plain.unet.get_submodule(layer.name).attn2 for layer in plain.unet.layout.layers]
    weights = [part.weight for attention in attentions for part in (attention.to_k, attention.to_v)]
    found = torch.cat([part.flatten() for pair in engine.unet.project_text(states) for part in pair])
    close(found, measured(projected, weights, states))
    assert opened["text_projector"].runs == 1 and graphs.nbytes == 7
    graphs.close()
    assert graphs.nbytes == 0
    engine.unet.project_text(states)
    assert opened["text_projector"].runs == 1  # of the session that was opened again
