"""What `Engine.explain` says of a point, against a literal softmax over the features of the same rows."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import InvalidRequest, StyleError
from stylefast.explanation import overlay
from stylefast.models.row_features import Recorder
from stylefast.runtime.jobs import Call
from stylefast.sampling.guidance import BRANCHES, FULL
from tests.support.scene import half_mask, small_picture

SIZE, STEPS, POINT = (48, 32), 3, (29, 10)
OWN = {"size": SIZE, "steps": STEPS, "seed": 3}


class Everything(Recorder):
    """Keeps what the layers of one step see."""

    def __init__(self):
        self.self_layers, self.cross_layers = {}, {}

    def keep_rows(self, branch_rows):
        self.rows = branch_rows.clone()

    def keep_attention(self, layer, inputs, x, q, k, v):
        self.self_layers[layer] = (q.clone(), k.clone(), v.clone(), inputs)

    def keep_cross(self, layer, inputs, q):
        self.cross_layers[layer] = (q.clone(), inputs)


class Spy(Call):
    """A call whose steps are kept whole."""

    collects = True

    def before_step(self, runner, group):
        self.group = group
        self.seen = [*getattr(self, "seen", []), Everything()]
        return self.seen[-1]


def spied(engine, request):
    job = engine._job(Spy, [request], output="latents")
    engine.scheduler.run(job)
    return job


def moved(x, target):
    """AdaIN of StyleAligned's equation 3 in fp64: x [tokens, heads, d] takes the mean and deviation of `target`."""
    deviation = [(y.var(0, unbiased=True) + 1e-5).sqrt() for y in (x, target)]
    return (x - x.mean(0)) / deviation[0] * deviation[1] + target.mean(0)


def literal_shared(kept, layer, token, mode, scale, shift):
    """Return the mean over heads of softmax over own and references' tokens, for the first picture in `kept`."""
    q, k = (x.double() for x in kept.self_layers[layer][:2])
    row, *references = kept.rows[:, BRANCHES.index(FULL)].tolist()
    query = moved(q[row], q[references[0]])[token]
    own = [torch.einsum("hd,khd->hk", query, moved(k[row], k[references[0]]))] if mode == "concat" else []
    read = [torch.einsum("hd,khd->hk", query, k[reference]) * scale for reference in references]
    width = math.sqrt(q.shape[-1])
    logits = torch.cat([part / width for part in own] + [part / width + shift for part in read], -1)
    return torch.softmax(logits, -1).mean(0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["concat", "swap"])
def test_shared_maps_are_the_softmax_of_the_points_query(engine, mode, count):
    reference = [small_picture(i) for i in range(count)] if count > 1 else None
    prompt = None if reference else "a star in oil"
    style = sf.StyleAligned(reference, prompt=prompt, seed=9, mode=mode, scale=0.7, shift=0.5)
    request = sf.Request("a cat", style=style, **OWN)
    found, job = engine.explain(request, POINT), spied(engine, request)
    layers = engine.unet.layout.layers
    sizes = engine.unet.attention_sizes(*job.group.latent_shape[1:])
    assert len(found.shared) == STEPS * len(layers) and not found.image_prompts
    assert [one.step for one in found.shared] == sorted(one.step for one in found.shared)
    for one in found.shared:
        index = engine.unet.layout.layer_index[one.layer]
        height, width = sizes[layers[index].level]
        token = POINT[1] * height // SIZE[1] * width + POINT[0] * width // SIZE[0]
        wanted = literal_shared(job.seen[one.step - 1], index, token, mode, 0.7, 0.5)
        got = [*([] if one.own is None else [one.own]), *one.references]
        assert (one.own is None) == (mode == "swap") and len(one.references) == count
        np.testing.assert_allclose(np.stack(got), wanted.reshape(-1, height, width).numpy(), atol=2e-5)
        assert sum(part.sum() for part in got) == pytest.approx(1, abs=1e-5)


def test_image_prompts_add_what_the_maps_say(engine):
    request = sf.Request("a cat", style=sf.InstantStyle(small_picture(1), scale=0.8), **OWN)
    found, job = engine.explain(request, POINT), spied(engine, request)
    assert not found.shared and found.references == () and found.image_prompts
    modules = {one.layer.rpartition(".transformer_blocks.")[0] for one in found.image_prompts}
    assert modules == set(engine.unet.layout.style_modules)
    for one in found.image_prompts:
        q, inputs = job.seen[one.step - 1].cross_layers[engine.unet.layout.layer_index[one.layer]]
        row = int(job.seen[one.step - 1].rows[0, BRANCHES.index(FULL)])
        images, module = inputs.images, float(inputs.images.strength[row, 0])
        query, page = q[row].double(), int(images.page[row, 0])

        def attend(k, v, query=query):
            logits = torch.einsum("qhd,khd->hqk", query, k.double()) / math.sqrt(k.shape[-1])
            return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.double()).flatten(1).norm(dim=-1)

        text = attend(inputs.text_k[int(inputs.text_page[row])], inputs.text_v[int(inputs.text_page[row])])
        length = int(images.lengths[page])
        added = module * attend(images.k[page, :length], images.v[page, :length])
        np.testing.assert_allclose(one.share.flatten(), (added / (added + text)).numpy(), atol=1e-4)


def test_a_mask_confines_where_an_image_prompt_acts(engine):
    request = sf.Request("a cat", style=sf.InstantStyle(small_picture(1), mask=half_mask()), **OWN)
    share = engine.explain(request, POINT).image_prompt_map()
    assert share[:, 0].min() > 0.05 and share[:, -1].max() == 0


def test_the_picture_and_its_reference_are_those_of_generate(engine):
    request = sf.Request("a cat", style=sf.StyleAligned(prompt="a star in oil", seed=9), **OWN)
    found = engine.explain(request, POINT)
    assert found.image.tobytes() == engine.generate(request, alone=True).images[0].tobytes()
    (reference,) = found.references
    alone = engine.generate("a star in oil", **OWN | {"seed": 9}).images[0]
    assert abs(np.asarray(reference).astype(int) - np.asarray(alone).astype(int)).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"image": small_picture(2), "strength": 0.7},
        {"upscale": 1.5},
        {"guidance_interval": (0.5, 1.0)},
        {"style": [sf.StyleAligned(small_picture(1), window=(0.5, 1.0)), sf.InstantStyle(small_picture(2))]},
    ],
    ids=["from a picture", "second pass", "guidance interval", "window of the style"],
)
def test_other_requests_are_explained_as_well(engine, options):
    request = sf.Request("a cat", **{"style": sf.StyleAligned(small_picture(1)), **OWN, **options})
    found = engine.explain(request, (5, 5))
    assert found.shared and found.image.size == engine.generate(request).images[0].size
    ran = max(one.step for one in found.shared)
    assert ran == (2 if "upscale" not in options and "image" in options else ran) and ran <= STEPS


def test_a_bank_is_explained_without_a_picture_of_it(engine):
    style = sf.StyleAligned(prompt="a star in oil", seed=9)
    live = engine.explain(sf.Request("a cat", style=style, **OWN), POINT)
    bank = engine.bake(style, steps=STEPS, size=SIZE)
    found = engine.explain(sf.Request("a cat", style=sf.StyleAligned(bank), **OWN), POINT)
    assert found.references == (None,)
    np.testing.assert_allclose(found.reference_map(), live.reference_map(), atol=1e-4)


def test_chosen_steps_and_layers_are_those_that_are_recorded(engine):
    request = sf.Request("a cat", style=sf.StyleAligned(small_picture(4)), **OWN)
    found = engine.explain(request, POINT, layers=["mid_block", "up_blocks.1"], steps=[3, 1])
    assert {one.step for one in found.shared} == {1, 3}
    assert {one.layer.split(".")[0] for one in found.shared} == {"mid_block", "up_blocks"}
    whole, mid = found.reference_map(), found.reference_map(layer="mid_block")
    assert whole.shape == mid.shape or mid.size < whole.size
    assert found.reference_map(step=1).sum() + found.own_map(step=1).sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(InvalidRequest, match="nothing was recorded for step=2, layer=None; there are steps 1, 3"):
        found.reference_map(step=2)


@pytest.mark.parametrize(
    ("request_of", "options", "kind", "message"),
    [
        (lambda: sf.Request("a", **OWN), {}, StyleError, "nothing to explain"),
        (lambda: sf.Request("a", style=sf.StyleAligned(), **OWN), {}, StyleError, "nothing to explain"),
        (lambda: "a", {}, InvalidRequest, "explain takes a Request"),
        (None, {"point": (48, 0)}, InvalidRequest, "point's x is 48; it must be a whole number from 0 to 47"),
        (None, {"point": 3}, InvalidRequest, "point is 3; it must be"),
        (None, {"point": (1.5, 2)}, InvalidRequest, "point's x is 1.5"),
        (None, {"steps": [4]}, InvalidRequest, "steps has 4; the picture is made in 3 steps"),
        (None, {"steps": [0]}, InvalidRequest, r"steps\[0\] is 0"),
        (None, {"steps": []}, InvalidRequest, "steps"),
        (None, {"layers": "nowhere"}, StyleError, "layers='nowhere' matches no self-attention layer"),
        (None, {"layers": []}, StyleError, "layers is "),
        (
            lambda: sf.Request("a", style=sf.StyleAligned(small_picture(1), window=(0.5, 1)), **OWN),
            {"steps": [1]},
            StyleError,
            "nothing was recorded: no style of the request acts in the chosen steps",
        ),
        (
            lambda: sf.Request("a", style=sf.StyleAligned(small_picture(1)), **OWN | {"size": (96, 32)}, window=SIZE),
            {},
            InvalidRequest,
            "a picture made of windows can't be explained",
        ),
    ],
)
def test_what_can_not_be_explained_is_refused(engine, request_of, options, kind, message):
    request = sf.Request("a", style=sf.StyleAligned(small_picture(1)), **OWN) if request_of is None else request_of()
    with pytest.raises(kind, match=message):
        engine.explain(request, **{"point": POINT, **options})


def test_others_run_on_while_a_picture_is_explained(engine):
    style = sf.StyleAligned(small_picture(4))
    alone = engine.generate("a fish", style, output="latents", **OWN).latents[0]
    job = engine.submit(sf.Request("a fish", style=style, **OWN), output="latents")
    engine.explain(sf.Request("a cat", style=style, **OWN), POINT)
    torch.testing.assert_close(job.result(60).latents[0], alone, atol=1e-4, rtol=1e-4)


def test_the_page_shows_pictures_that_exist(engine, tmp_path):
    style = [sf.StyleAligned([small_picture(4), small_picture(5)]), sf.InstantStyle(small_picture(6))]
    found = engine.explain(sf.Request("a cat", style=style, **OWN), POINT)
    page = found.save(tmp_path / "page")
    text = page.read_text()
    shown = [part.split('"')[0] for part in text.split('src="')[1:]]
    assert len(set(shown)) == len(shown) and {file.name for file in page.parent.iterdir()} == {*shown, "index.html"}
    assert {"picture.png", "own.png", "reference-1.png", "reference-2.png", "image-prompt.png"} <= set(shown)
    for name in shown:
        with Image.open(page.parent / name) as picture:
            assert min(picture.size) >= 128 and picture.getextrema() != ((0, 0),) * 3
    with pytest.raises(InvalidRequest, match="exists already"):
        found.save(tmp_path / "page")
    assert found.save(tmp_path / "page", overwrite=True) == page


def test_bright_is_where_the_map_is_high():
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    shown = np.asarray(overlay(Image.new("RGB", (64, 64)), heat)).astype(int).sum(-1)
    assert shown[:32, -32:].max() > 2 * shown[-64:, :64].max()
