import copy

import pytest
import torch

from benchmarks.tiny_model.adapter import STYLE_BLOCK, TinyAdapter
from benchmarks.tiny_model.muon import Muon
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES
from benchmarks.tiny_model.unet import (
    UNET_CONFIG,
    BatchSource,
    cumulative_alphas,
    predict_noise,
    snr_weights,
    stratified_timesteps,
)
from benchmarks.tiny_model.vae import VAE_CONFIG, standardise
from tests.support.fp64 import close, measured

SMALL = dict(UNET_CONFIG, block_out_channels=(32, 32, 32), attention_head_dim=(1, 1, 1))


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL).requires_grad_(False).eval()


@pytest.fixture
def inputs():
    states, pooled = torch.randn(2, 24, 128), torch.randn(2, 64)
    return torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), states, pooled


def source(pictures=2000):
    labels = torch.stack([torch.randint(0, n, (pictures,)) for n in (len(CONTENTS), len(STYLES), len(PALETTES))], 1)
    # each picture's latents say its style and palette, so that panels can be checked
    latents = (labels[:, 1] * 10 + labels[:, 2]).float()[:, None, None, None].expand(-1, 4, 16, 16)
    return BatchSource(latents, labels, seed=0)


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_panels_of_a_picture_share_style_and_palette_and_differ_in_content(panels):
    batch = source().draw(panels, 10)
    assert batch.latents.shape == (10, 4, 16, 16 * panels)
    assert (batch.latents == batch.latents[:, :, :, :1]).all()
    for caption in batch.captions:
        named = [content for content in CONTENTS if content in (caption or "")]
        assert len(named) in ((0, 1) if panels == 1 else (0, panels))


def test_stratified_timesteps_draw_once_in_each_part():
    timesteps = stratified_timesteps(50)
    assert torch.equal(timesteps // 20, torch.arange(50))


def test_signal_power_is_that_of_the_scheduler():
    from diffusers import DDPMScheduler

    from benchmarks.tiny_model.unet import SCHEDULER_CONFIG

    expected = DDPMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
    assert torch.allclose(cumulative_alphas(), expected, atol=1e-5)


def test_snr_weights_are_one_up_to_the_limit():
    alphas = torch.tensor([0.5, 5 / 6, 0.99])
    assert torch.allclose(snr_weights(alphas), torch.tensor([1.0, 1.0, 5 / 99]), atol=1e-5)


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_step():
    weight = torch.nn.Parameter(torch.zeros(24, 12))
    weight.grad = torch.randn(24, 12)
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    singular = torch.linalg.svdvals(weight.detach()) / 2**0.5
    assert singular.min() > 0.5 and singular.max() < 1.4


def test_standardised_latents_have_unit_deviation_and_the_same_pictures():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE_CONFIG).eval()
    pictures = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8).numpy()
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def there_and_back(vae, x):
        return vae.decode(vae.encode(x).latent_dist.mean).sample

    before = measured(there_and_back, copy.deepcopy(vae), x)
    with torch.no_grad():
        standardise(vae, pictures)
        latents = vae.encode(x).latent_dist.mean
    close(there_and_back(vae, x), before)
    # the statistics were taken in bfloat16
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.05)


def test_without_a_picture_the_adapter_changes_nothing(unet, inputs):
    with torch.no_grad():
        plain = measured(predict_noise, unet, *inputs)
        adapted = copy.deepcopy(unet)
        adapter = TinyAdapter(adapted)
        adapter.condition(None)
        close(predict_noise(adapted, *inputs), plain)
        adapter.condition(torch.randn(2, 64))
        assert not torch.allclose(predict_noise(adapted, *inputs), plain.value, atol=1e-3)


def test_gating_reaches_only_the_style_block(unet):
    adapter = TinyAdapter(copy.deepcopy(unet))
    adapter.condition(torch.randn(2, 64), STYLE_BLOCK)
    active = [key.replace("/", ".") for key, branch in adapter.branches.items() if branch.strength]
    assert active and all(key.startswith(STYLE_BLOCK) for key in active)


def test_the_saved_adapter_gives_the_same_noise_in_stock_diffusers(unet, inputs, tmp_path):
    from safetensors.torch import load_file

    adapted, stock = copy.deepcopy(unet), copy.deepcopy(unet)
    adapter = TinyAdapter(adapted).half().float()
    adapter.save(tmp_path / "adapter.safetensors")
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(tmp_path / "adapter.safetensors").items():
        group, name = key.split(".", 1)
        parts[group][name] = value.float()
    stock._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    embeddings = torch.randn(2, 64)

    def theirs(unet, embeddings, noisy, timesteps, states, pooled):
        added = dict(text_embeds=pooled, image_embeds=[embeddings[:, None]])
        added["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
        return unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample

    with torch.no_grad():
        adapter.condition(embeddings)
        close(predict_noise(adapted, *inputs), measured(theirs, stock, embeddings, *inputs))
