"""SDXL's UNet as a pure function of explicit tensors.

The module tree and parameter names are diffusers', so its state dict loads unchanged and storage stays shared. Only the
forward differs: every attention call and every group norm reads its part of the row table, so styles need no
processors, hooks or hidden context. The order in a self-attention is

    project -> token statistics -> AdaIN as gain and offset -> shared attention over own and reference tokens -> out

and is implemented only in `SelfAttention.forward`. `LayerInputs` splits the row table by layer.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylefast.errors import ModelFormatError
from stylefast.kernels.adain import affine_operation as adain_affine
from stylefast.kernels.adain import stats_operation as token_stats
from stylefast.kernels.gated_cross_attention import operation as gated_cross_attention
from stylefast.kernels.geglu import operation as geglu
from stylefast.kernels.group_norm_silu import Norm, NormPages
from stylefast.kernels.group_norm_silu import operation as group_norm_silu
from stylefast.kernels.layer_norm import add_operation as add_layer_norm
from stylefast.kernels.layer_norm import operation as layer_norm
from stylefast.kernels.row_lora import operation as row_lora
from stylefast.kernels.shared_attention import Affine
from stylefast.kernels.shared_attention import operation as shared_attention
from stylefast.models.layout import AttentionLayout, BlockShape, UNetShape, check_architecture
from stylefast.models.module_lists import list_of
from stylefast.models.prepacked import Conv2d, Linear
from stylefast.models.residuals import Residuals, with_inside, with_kept
from stylefast.models.row_features import Recorder
from stylefast.models.row_loras import BlockLoras, LoraInputs, LoraLayout, LoraProducts, ResnetLoras, StepLoras
from stylefast.models.row_table import (
    CrossInputs,
    ImageKV,
    KeyValue,
    LayerInputs,
    NormInputs,
    RowTable,
    SelfInputs,
    StylePages,
)

# of two layers, or of layers with one input and one layer
_Loras = tuple[LoraInputs, LoraInputs] | None


class GroupNorm(nn.Module):
    """Group norm (and SiLU) whose statistics can be pooled with those of a reference page."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.index: int = -1  # index among the UNet's group norms, set by UNet

    def forward(self, x: Tensor, inputs: NormInputs, silu: bool = True):  # [rows, channels, h, w]
        if inputs.keep is not None:
            inputs.keep(x, self.groups)
        elements = x[0].numel() // self.groups if inputs.pool_elements is None else inputs.pool_elements
        norm = Norm(self.groups, self.weight, self.bias, self.eps, silu)
        return group_norm_silu.run(x, norm, NormPages(inputs.page, *inputs.pool, elements))


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(channels, channels, bias=False)
        self.to_v = Linear(channels, channels, bias=False)
        self.to_out = list_of([Linear(channels, channels)])

    def key_values(self, hidden: Tensor, loras: LoraProducts | None = None) -> KeyValue:  # [pages, tokens, channels]
        """Project hidden states, such as those stored in a bank, to keys and values."""
        return _key_values(self, hidden, loras)

    def forward(self, x: Tensor, inputs: SelfInputs, loras: _Loras = None):  # [rows, tokens, channels]
        qkv = [self.to_q(x), self.to_k(x), self.to_v(x)]
        if loras is not None:
            row_lora.run(x, *loras[0].pool, *loras[0].rows, 1, 0, qkv)
        q, k, v = (_split(part, self.heads) for part in qkv)
        if inputs.keep is not None:
            inputs.keep(inputs, x, q, k, v)
        affine = adain(q, k, v, inputs) if inputs.references.page.shape[1] else None
        out = shared_attention.run(q, k, v, inputs.references, affine, inputs.pool)
        return self.to_out[0](out.flatten(2), loras and loras[1])


class CrossAttention(nn.Module):
    def __init__(self, channels: int, cross_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(cross_dim, channels, bias=False)
        self.to_v = Linear(cross_dim, channels, bias=False)
        self.to_out = list_of([Linear(channels, channels)])

    def key_values(self, states: Tensor, loras: LoraProducts | None = None) -> KeyValue:  # [pages, tokens, cross_dim]
        return _key_values(self, states, loras)

    def forward(self, x: Tensor, inputs: CrossInputs, loras: _Loras = None):  # [rows, tokens, channels]
        q = _split(self.to_q(x, loras and loras[0]), self.heads)
        if inputs.keep is not None:
            inputs.keep(inputs, q)
        out = gated_cross_attention.run(q, *inputs[:-1])
        return self.to_out[0](out.flatten(2), loras and loras[1])


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = Linear(channels, 2 * inner)

    def forward(self, x: Tensor, lora: LoraInputs | None = None):
        return geglu.run(self.proj(x, lora))


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # index 1 is diffusers' dropout, which has no parameters
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def layers(self) -> tuple[Linear, Linear]:
        """Return the two products."""
        return cast(GEGLU, self.net[0]).proj, cast(Linear, self.net[2])

    def forward(self, x: Tensor, loras: _Loras = None):
        return self.net[2](self.net[0](x, loras and loras[0]), loras and loras[1])


class TransformerBlock(nn.Module):
    def __init__(self, name: str, layout: AttentionLayout, cross_dim: int):
        super().__init__()
        index = layout.layer_index[name]
        layer = layout.layers[index]
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(layer.channels) for _ in range(3))
        self.attn1 = SelfAttention(layer.channels, layer.heads, index)
        self.attn2 = CrossAttention(layer.channels, cross_dim, layer.heads)
        self.ff = FeedForward(layer.channels)
        self.place = (index, layer.module_index, layer.level)

    def inputs(self, condition: LayerInputs) -> tuple[SelfInputs, CrossInputs, BlockLoras | None]:
        """Return the inputs of `forward` besides the feature map."""
        found, loras = condition.loras, None
        if found is not None:
            first, second = self.ff.layers()
            loras = BlockLoras(
                (found.of(self.attn1.to_q, 3), found.of(self.attn1.to_out[0])),
                (found.of(self.attn2.to_q), found.of(self.attn2.to_out[0])),
                (found.of(first), found.of(second)),
            )
        return condition.self_attention(self.place[0]), condition.cross_attention(*self.place), loras

    def forward(self, x: Tensor, own: SelfInputs, cross: CrossInputs, loras: BlockLoras | None = None):
        # x [rows, tokens, channels]
        of_self, of_cross, of_ff = loras or (None, None, None)
        hidden = layer_norm.run(x, *_affine(self.norm1))
        x, hidden = add_layer_norm.run(x, self.attn1(hidden, own, of_self), *_affine(self.norm2))
        x, hidden = add_layer_norm.run(x, self.attn2(hidden, cross, of_cross), *_affine(self.norm3))
        return x + self.ff(hidden, of_ff)


class Transformer(nn.Module):
    """A spatial transformer: group norm, projection, transformer blocks, projection, residual."""

    def __init__(self, name: str, layout: AttentionLayout, channels: int, groups: int, cross_dim: int):
        super().__init__()
        blocks = [layer.name for layer in layout.layers if layer.module == name]
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = list_of(TransformerBlock(block, layout, cross_dim) for block in blocks)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, condition: LayerInputs):  # [rows, channels, h, w]
        height, width = x.shape[2:]
        hidden = self.norm(x, condition.norm(self.norm.index), silu=False).flatten(2).transpose(1, 2)
        hidden = self.proj_in(hidden, condition.lora(self.proj_in))
        for block in self.transformer_blocks:
            hidden = block(hidden, *block.inputs(condition))
        hidden = self.proj_out(hidden, condition.lora(self.proj_out))
        return x + hidden.transpose(1, 2).unflatten(2, (height, width))


class Resnet(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, time_channels: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = Linear(time_channels, channels_out)
        self.norm2 = GroupNorm(groups, channels_out, eps)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def inputs(self, condition: LayerInputs) -> tuple[Tensor, NormInputs, NormInputs, ResnetLoras | None]:
        """Return the inputs of `forward` besides the feature map."""
        found, loras = condition.loras, None
        if found is not None:
            shortcut = None if self.conv_shortcut is None else found.of(self.conv_shortcut)
            loras = ResnetLoras(found.of(self.conv1), found.of(self.time_emb_proj), found.of(self.conv2), shortcut)
        return condition.time, condition.norm(self.norm1.index), condition.norm(self.norm2.index), loras

    def forward(self, x: Tensor, time: Tensor, first: NormInputs, second: NormInputs, loras: ResnetLoras | None = None):
        # x [rows, channels, h, w]
        in_first, in_time, in_second, in_shortcut = loras or (None, None, None, None)
        hidden = self.conv1(self.norm1(x, first), in_first) + self.time_emb_proj(time, in_time)[:, :, None, None]
        hidden = self.conv2(self.norm2(hidden, second), in_second)
        return hidden + (self.conv_shortcut(x, in_shortcut) if self.conv_shortcut is not None else x)


class Resampler(nn.Module):
    """Strided convolution that halves the feature map, or upsampling to `size` and a convolution."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, lora: LoraInputs | None = None):
        return self.conv(x if size is None else F.interpolate(x, size=size, mode="nearest"), lora)


class Block(nn.Module):
    """Resnets, each followed by a transformer if the block attends, then an optional resampler."""

    def __init__(self, resnets: list[Resnet], attentions: list[Transformer], sampler: Resampler | None, kind: str):
        super().__init__()
        self.resnets = list_of(resnets)
        if attentions:
            self.attentions = list_of(attentions)
        if sampler is not None:
            setattr(self, kind, nn.ModuleList([sampler]))
        self.kind, self.attends, self.resamples = kind, bool(attentions), sampler is not None

    def layers(self) -> list[tuple[Resnet, Transformer | None]]:
        """Return each resnet with the transformer that follows it, if any."""
        transformers = list(self.attentions) if self.attends else []
        return [(resnet, transformers[i] if i < len(transformers) else None) for i, resnet in enumerate(self.resnets)]

    def resample(self, x: Tensor, condition: LayerInputs, size: Sequence[int] | None = None):
        resampler = getattr(self, self.kind)[0]
        return resampler(x, size, condition.lora(resampler.conv))


class TimestepEmbedding(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels_in, channels), Linear(channels, channels)

    def forward(self, x: Tensor, loras: StepLoras | None = None):
        first, second = (None, None) if loras is None else (loras.of(self.linear_1), loras.of(self.linear_2))
        return self.linear_2(F.silu(self.linear_1(x, first)), second)


class Encoder(nn.Module):
    """The first half of a UNet: its embeddings, down blocks and middle block. ControlNets are copies of it.

    config: a UNet's, in diffusers' format. layout: of its attention.
    """

    def __init__(self, config: dict, layout: AttentionLayout):
        super().__init__()
        self.config, self.layout = dict(config), layout
        shape, channels = UNetShape.from_config(config), tuple(config["block_out_channels"])
        time = 4 * channels[0]
        self.time_embedding = TimestepEmbedding(channels[0], time)
        self.add_embedding = None
        if config.get("addition_embed_type") is not None:
            self.add_embedding = TimestepEmbedding(config["projection_class_embeddings_input_dim"], time)
        self.conv_in = Conv2d(config["in_channels"], channels[0], 3, padding=1)
        down = []
        self.skip_channels, width = [channels[0]], channels[0]
        for i, block in enumerate(shape.down):
            out, last = block.channels, i == len(shape.down) - 1
            resnets = [self._resnet(width if j == 0 else out, out) for j in range(block.resnets)]
            sampler = None if last else Resampler(out, 2)
            down.append(Block(resnets, self._transformers(f"down_blocks.{i}", block), sampler, "downsamplers"))
            self.skip_channels += [out] * (block.resnets + (not last))
            width = out
        self.down_blocks = list_of(down)

        self.mid_block = None
        if shape.mid is not None:
            resnets = [self._resnet(width, width) for _ in range(shape.mid.resnets)]
            self.mid_block = Block(resnets, self._transformers("mid_block", shape.mid), None, "")

    def _resnet(self, channels_in: int, channels_out: int) -> Resnet:
        config = self.config
        time, eps = 4 * config["block_out_channels"][0], config.get("norm_eps", 1e-5)
        return Resnet(channels_in, channels_out, time, config["norm_num_groups"], eps)

    def _transformers(self, name: str, block: BlockShape) -> list[Transformer]:
        groups, cross_dim = self.config["norm_num_groups"], self.config["cross_attention_dim"]
        names = [f"{name}.attentions.{i}" for i in range(len(block.depths))]
        return [Transformer(module, self.layout, block.channels, groups, cross_dim) for module in names]

    def _number_norms(self) -> None:
        for i, norm in enumerate(m for m in self.modules() if isinstance(m, GroupNorm)):
            norm.index = i

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def embed(self, timesteps: Tensor, pooled: Tensor, time_ids: Tensor, loras: StepLoras | None = None) -> Tensor:
        """Embed timesteps [rows], pooled text [rows, d] and time ids [rows, 6] as [rows, time channels]."""
        flip, shift = self.config.get("flip_sin_to_cos", True), self.config.get("freq_shift", 0)
        time = sinusoids(timesteps, self.config["block_out_channels"][0], flip, shift)
        embedded = self.time_embedding(time.to(self.dtype), loras)
        if self.add_embedding is None:
            return embedded
        ids = sinusoids(time_ids.flatten(), self.config["addition_time_embed_dim"], flip, shift)
        added = torch.cat([pooled.to(self.dtype), ids.view(pooled.shape[0], -1).to(self.dtype)], dim=-1)
        return embedded + self.add_embedding(added, loras)

    def project_text(self, states: Tensor, loras: LoraProducts | None = None) -> tuple[KeyValue, ...]:
        """Project text states [pages, tokens, cross_dim] to keys and values per layer, the same for all steps."""
        return tuple(self.block(layer.name).attn2.key_values(states, loras) for layer in self.layout.layers)

    def block(self, name: str) -> TransformerBlock:
        """Return the transformer block of a layer's name in the layout."""
        block = self.get_submodule(name)
        assert isinstance(block, TransformerBlock)
        return block


class UNet(Encoder):
    """SDXL's UNet for any config of that architecture; see the module's docstring.

    Usually created by `UNet.from_state`. Raises `ModelFormatError` for configs of other architectures.
    """

    def __init__(self, config: dict):
        check_architecture(config)
        super().__init__(config, AttentionLayout.from_config(config))
        shape, channels = UNetShape.from_config(config), tuple(config["block_out_channels"])
        skips, width, up = list(self.skip_channels), channels[-1], []
        for i, block in enumerate(shape.up):
            out, last = block.channels, i == len(shape.up) - 1
            resnets = [self._resnet((width if j == 0 else out) + skips.pop(), out) for j in range(block.resnets)]
            sampler = None if last else Resampler(out, 1)
            up.append(Block(resnets, self._transformers(f"up_blocks.{i}", block), sampler, "upsamplers"))
            width = out
        self.up_blocks = list_of(up)

        self.conv_norm_out = GroupNorm(config["norm_num_groups"], channels[0], config.get("norm_eps", 1e-5))
        self.conv_out = Conv2d(channels[0], config["out_channels"], 3, padding=1)
        self._number_norms()
        self.loras = LoraLayout(self)

    @classmethod
    def from_state(cls, config: dict, state: dict[str, Tensor]) -> "UNet":
        """Build from diffusers' config and state dict; the parameters are the state's own tensors, not copies.

        Raises `ModelFormatError` if keys or shapes don't fit the config.
        """
        with torch.device("meta"):
            unet = cls(config)
        try:
            unet.load_state_dict(state, assign=True)
        except RuntimeError as error:
            detail = str(error).splitlines()
            raise ModelFormatError(f"the UNet's weights don't fit its config: {' '.join(detail[:3])[:600]}") from error
        return unet.requires_grad_(False).eval()

    def attention_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return feature-map sizes (h, w) of the levels with attention, for latents of `height` x `width`."""
        sizes = [(height, width)]
        for _ in range(len(self.down_blocks) - 1):
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        return [sizes[halvings] for halvings in self.layout.feature_maps]

    def forward(
        self,
        latents: Tensor,  # [rows, 4, h, w]; 9 channels for an inpainting model
        time_embedding: Tensor,  # [rows, time channels], from `embed`
        text_kv: tuple[KeyValue, ...],  # from `project_text`
        image_kv: ImageKV | None,
        rows: RowTable,
        pages: StylePages | None = None,
        masks: tuple[Tensor, ...] = (),  # per attention level [masks, tokens]
        residuals: Sequence[Residuals] = (),  # of control networks
        recorder: Recorder | None = None,  # of the step
        loras: StepLoras | None = None,  # of the rows; those that `embed` was given
        text_lengths: Tensor | None = None,  # [text pages] int64: tokens in use; None: all
    ) -> Tensor:
        """Evaluate the model once. Returns its output [rows, 4, h, w]."""
        time = F.silu(time_embedding)
        condition = LayerInputs.of(time, rows, text_kv, image_kv, pages, masks, recorder, loras, text_lengths)
        x = self.conv_in(latents, condition.lora(self.conv_in))
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            layers = block.layers()
            for place, (resnet, transformer) in enumerate(layers, 1):
                x = resnet(x, *resnet.inputs(condition))
                if transformer is not None:
                    x = transformer(x, condition)
                if residuals and block.attends and place == len(layers):
                    x = with_inside(x, residuals, i)
                skips.append(x)
            if block.resamples:
                x = block.resample(x, condition)
                skips.append(x)
            if residuals and not block.attends:
                x = skips[-1] = with_inside(x, residuals, i)

        for resnet, transformer in [] if self.mid_block is None else self.mid_block.layers():
            x = resnet(x, *resnet.inputs(condition))
            x = x if transformer is None else transformer(x, condition)
        if residuals:
            x, skips = with_kept(x, skips, residuals)

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = resnet(torch.cat([x, skips.pop()], dim=1), *resnet.inputs(condition))
                if transformer is not None:
                    x = transformer(x, condition)
            if block.resamples:
                x = block.resample(x, condition, skips[-1].shape[2:])
        x = self.conv_norm_out(x, condition.norm(self.conv_norm_out.index))
        return self.conv_out(x, condition.lora(self.conv_out))


def adain(q: Tensor, k: Tensor, v: Tensor, inputs: SelfInputs) -> Affine:
    """Return gains and offsets that move every row's q, k, v to the statistics of its AdaIN page."""
    table = (inputs.adain_page, inputs.adain_strength, *inputs.pool_stats)
    # no check for finite statistics: the runner reports pictures that overflow, and they must not stop the others
    return Affine(*adain_affine.run(*token_stats.run([q, k, v]), *table, False))


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _key_values(attention: "SelfAttention | CrossAttention", states: Tensor, loras: LoraProducts | None) -> KeyValue:
    k, v = attention.to_k(states), attention.to_v(states)
    if loras is not None:
        k, v = loras.added(k, states, attention.to_k), loras.added(v, states, attention.to_v)
    return _split(k, attention.heads), _split(v, attention.heads)


def _split(x: Tensor, heads: int) -> Tensor:
    """Split [rows, tokens, channels] into [rows, tokens, heads, d]."""
    return x.unflatten(-1, (heads, -1))


def sinusoids(values: Tensor, channels: int, flip_sin_to_cos: bool, shift: float) -> Tensor:
    """Return the sinusoidal embedding of values [n]: [n, channels], fp32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=values.device).float() / (half - shift))
    angles = values.float()[:, None] * frequencies
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)
