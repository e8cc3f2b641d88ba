"""The UNet's less travelled inputs: pages of a style bank in place of live references, and ControlNet residuals."""

from functools import partial

import pytest
import torch

from stylefast.models.residuals import Residuals
from stylefast.models.row_table import StylePages
from stylefast.models.unet import GroupNorm, SelfAttention, UNet
from tests.support.fp64 import close, measured
from tests.support.oracle.style_aligned import Sharing
from tests.support.rows import plain_rows, run, share
from tests.support.small_unet import random_inputs, random_unet

REFERENCE, TARGETS = 0, [1, 2]


@pytest.fixture(scope="module")
def models():
    oracle = random_unet()
    return oracle, UNet.from_state(dict(oracle.config), oracle.state_dict())


def bake(unet: UNet, inputs) -> StylePages:
    """Run rows alone and keep what references offer, read off with hooks."""
    heads = {layer.name: layer.heads for layer in unet.layout.layers}
    projected, norms, handles = {}, {}, []
    for name, module in unet.named_modules():
        if isinstance(module, SelfAttention):
            for part in ("to_q", "to_k", "to_v"):
                key = (module.layer, part)
                split = heads[name.removesuffix(".attn1")]

                def keep(_, __, out, key=key, split=split):
                    projected[key] = out.unflatten(-1, (split, -1))

                handles.append(getattr(module, part).register_forward_hook(keep))
        elif isinstance(module, GroupNorm):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args: norms.update(
                        {module.index: args[0].flatten(2).unflatten(1, (module.groups, -1))}
                    )
                )
            )
    run(unet, inputs, plain_rows(unet.layout, len(inputs.latents)))
    for handle in handles:
        handle.remove()
    layers = range(len(unet.layout.layers))
    stats = [torch.stack([projected[i, part] for part in ("to_q", "to_k", "to_v")]) for i in layers]
    flat = [norms[i].flatten(2) for i in range(len(norms))]
    return StylePages(
        layers=tuple((projected[i, "to_k"], projected[i, "to_v"]) for i in layers),
        means=tuple(x.mean(2) for x in stats),
        variances=tuple(x.var(2, unbiased=True) for x in stats),
        norm_means=tuple(x.mean(-1) for x in flat),
        norm_variances=tuple(x.var(-1, unbiased=False) for x in flat),
        norm_elements=tuple(x.shape[-1] for x in flat),
    )


def run_with_pages(unet: UNet, inputs, table, pages: StylePages) -> torch.Tensor:
    with torch.no_grad():
        time = unet.embed(inputs.timesteps, inputs.pooled, inputs.time_ids)
        return unet(inputs.latents, time, unet.project_text(inputs.text), None, table, pages)


@pytest.mark.parametrize("mode", ["concat", "swap"])
@pytest.mark.parametrize("shared_norms", [False, True], ids=["own norms", "shared norms"])
def test_a_page_of_the_bank_equals_the_live_reference(models, mode, shared_norms):
    _, unet = models
    inputs = random_inputs(3)
    sharing = Sharing(
        references=[0, 0, 0],
        mode=mode,
        scale=0.8,
        shift=0.7,
        share_group_norm=shared_norms,
        adain={"q": 1.0, "k": 0.5, "v": 1.0},
    )
    live = measured(partial(run, table=share(plain_rows(unet.layout, 3), unet.layout, sharing)), unet, inputs)

    pages = bake(unet, inputs.rows([REFERENCE]))
    targets = inputs.rows(TARGETS)
    table = share(plain_rows(unet.layout, 3), unet.layout, sharing)
    table = type(table)(*(column[TARGETS] for column in table))
    # page 0 of the pool stands behind the two rows of the batch
    table = table._replace(
        self_page=torch.full((2, 1), 2),
        adain_page=torch.full((2,), 2),
        norm_page=torch.full((2,), 2 if shared_norms else -1),
        text_page=torch.arange(2),
    )
    banked = run_with_pages(unet, targets, table, pages)
    assert not torch.allclose(live.value[TARGETS], run(unet, targets, plain_rows(unet.layout, 2)), atol=1e-2)
    close(banked, live[TARGETS])


def test_controlnet_residuals_enter_as_in_diffusers(models):
    oracle, unet = models
    inputs = random_inputs(2)
    shapes, handles = [], []
    for block in [oracle.conv_in, *oracle.down_blocks]:
        handles.append(
            block.register_forward_hook(
                lambda _, __, out: shapes.extend(
                    [out.shape] if isinstance(out, torch.Tensor) else [skip.shape for skip in out[1]]
                )
            )
        )
    conditions = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
    with torch.no_grad():
        oracle(inputs.latents, inputs.timesteps, inputs.text, added_cond_kwargs=conditions)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(3)
    skips = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
    middle = torch.randn(skips[-1].shape, generator=generator)

    def theirs(oracle, inputs, conditions, skips, middle):
        with torch.no_grad():
            return oracle(
                inputs.latents,
                inputs.timesteps,
                inputs.text,
                added_cond_kwargs=conditions,
                down_block_additional_residuals=list(skips),
                mid_block_additional_residual=middle,
            ).sample

    with torch.no_grad():
        time = unet.embed(inputs.timesteps, inputs.pooled, inputs.time_ids)
        rows = plain_rows(unet.layout, 2)
        added = Residuals(torch.arange(2), [*skips, middle])
        out = unet(inputs.latents, time, unet.project_text(inputs.text), None, rows, residuals=[added])
    close(out, measured(theirs, oracle, inputs, conditions, skips, middle))
