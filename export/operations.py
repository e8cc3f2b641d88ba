"""stylefast's operations in terms that ONNX has: what the custom ops of a traced graph are replaced by.

The same formulas as in `stylefast.kernels`, without a look at any value: every row carries every segment, hidden by its
mask where it has none. Attention stays one `scaled_dot_product_attention`, which exporters and compilers know how to
fuse; statistics, AdaIN's gains and pooled norms are worked out in float32 whatever the model's type.
"""

import torch
import torch.nn.functional as F

from stylefast.kernels.adain_affine import ADAIN_EPS
from stylefast.kernels.group_norm_silu import pooled_stats
from stylefast.kernels.registry import operation
from stylefast.kernels.shared_attention import PLAIN, SWAP, attend


def shared_attention(
    q, k, v, page, mode, scale, shift, gain=None, offset=None, pool_k=None, pool_v=None, pool_k_scale=None,
    pool_v_scale=None, bias=None,
):  # fmt: skip
    """As `kernels.shared_attention`, for pages with as many tokens as the rows, without bias and float8."""
    rows, tokens = q.shape[:2]
    if page.shape[1] == 0:
        return attend(q, k, v).contiguous()
    used = (mode != PLAIN)[:, None] & (page >= 0)  # [rows, R]
    styled = used.any(1)
    if gain is not None:
        parts = [q, k, v]
        for i in range(gain.shape[0]):
            moved = (parts[i].float() * gain[i][:, None] + offset[i][:, None]).to(q.dtype)
            parts[i] = torch.where(styled[:, None, None, None], moved, parts[i])
    else:
        parts = [q, k, v]
    query, own_k, own_v = parts

    # finite, as some fused kernels make NaN of the difference of two infinities
    hidden = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    nothing = hidden.new_zeros(())
    own_seen = ~(styled & (mode == SWAP))  # [rows]
    keys, values, masks = [own_k], [own_v], [torch.where(own_seen[:, None], nothing, hidden).expand(-1, tokens)]
    blind = ~own_seen
    own_row = torch.arange(rows, device=q.device)
    for r in range(page.shape[1]):
        p = page[:, r]
        seen = used[:, r] & (shift[:, r] != -torch.inf)
        # a hidden segment reads its own row: another's NaN would pass even through the weight 0
        live = torch.where(seen & (p < rows), p, own_row)
        page_k, page_v = k[live], v[live]
        if pool_k is not None:
            banked = (seen & (p >= rows))[:, None, None, None]
            entry = torch.where(p >= rows, p - rows, 0)
            page_k, page_v = torch.where(banked, pool_k[entry], page_k), torch.where(banked, pool_v[entry], page_v)
        keys.append((page_k.float() * scale[:, r][:, None, None, None]).to(q.dtype))
        values.append(page_v)
        shown = torch.where(shift[:, r] != -torch.inf, shift[:, r], 0).to(q.dtype)
        masks.append(torch.where(seen, shown, hidden)[:, None].expand(-1, tokens))
        blind = blind & ~seen
    mask = torch.cat(masks, 1)[:, None, None]  # [rows, 1, 1, keys]
    out = attend(query, torch.cat(keys, 1), torch.cat(values, 1), mask)
    return torch.where(blind[:, None, None, None], 0, out).contiguous()


def gated_cross_attention(
    q, text_k, text_v, text_page, image_k=None, image_v=None, image_lengths=None, image_page=None, strength=None,
    group=None, masks=None, mask_index=None,
):  # fmt: skip
    """As `kernels.gated_cross_attention`: text, and one attention over all picture tokens for each segment."""
    out = attend(q, text_k[text_page], text_v[text_page])
    if image_page is None or image_page.shape[1] == 0:
        return out.contiguous()
    segments, tokens = image_page.shape[1], image_k.shape[1]
    active = (image_page >= 0) & (strength != 0)  # [rows, S]
    page = torch.where(image_page >= 0, image_page, 0)
    token = torch.arange(tokens, device=q.device)
    there = active[:, :, None] & (token < image_lengths[page][:, :, None])  # [rows, S, tokens]
    keys = image_k[page].flatten(1, 2)  # [rows, S * tokens, heads, d]
    values = image_v[page]  # [rows, S, tokens, heads, d]
    hidden = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    total, number = out.float(), torch.arange(segments, device=q.device)
    for s in range(segments):
        members = there & (group == group[:, s, None])[:, :, None]  # those that share a softmax with s
        mask = torch.where(members.flatten(1), hidden.new_zeros(()), hidden)[:, None, None]
        own_values = torch.where((number == s)[:, None, None, None], values, 0).flatten(1, 2)
        part = attend(q, keys, own_values, mask)
        gate = strength[:, s][:, None, None, None]
        if mask_index is not None and masks is not None:
            index = mask_index[:, s]
            place = masks[torch.where(index >= 0, index, 0)]  # [rows, query tokens]
            gate = gate * torch.where((index >= 0)[:, None], place, 1)[:, :, None, None]
        total = total + torch.where(active[:, s][:, None, None, None], gate * part.float(), 0)
    return total.to(q.dtype).contiguous()


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x, residual, weight, bias, eps):
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def token_stats(tensors):
    pairs = [torch.var_mean(x.float(), dim=1, correction=1) for x in tensors]
    return torch.stack([mean for _, mean in pairs]), torch.stack([variance for variance, _ in pairs])


def adain_affine(mean, variance, page, strength, pool_mean=None, pool_variance=None, check_finite=False):
    everything = (mean, variance)
    if pool_mean is not None:
        everything = torch.cat([mean, pool_mean], 1), torch.cat([variance, pool_variance], 1)
    source = torch.where(page >= 0, page, 0)
    other_mean, other_variance = everything[0][:, source], everything[1][:, source]
    part = strength.T[:, :, None, None]  # [parts, rows, 1, 1]
    ratio = torch.sqrt((other_variance + ADAIN_EPS) / (variance + ADAIN_EPS))
    applies = (part != 0) & (page >= 0)[:, None, None]
    gain = torch.where(applies, 1 + part * (ratio - 1), 1.0)
    return gain, torch.where(applies, part * (other_mean - ratio * mean), 0.0)


def group_norm_silu(
    x, groups, weight, bias, eps, silu, page=None, pool_mean=None, pool_variance=None, pool_elements=0
):
    if page is None:
        out = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(out) if silu else out
    rows, channels, height, width = x.shape
    flat = x.float().reshape(rows, groups, -1)
    variance, mean = torch.var_mean(flat, -1, correction=0)  # [rows, groups]
    all_mean, all_variance = mean, variance
    own = channels // groups * height * width
    other = own * torch.ones_like(page, dtype=torch.float32)[:, None]
    if pool_mean is not None:
        all_mean, all_variance = torch.cat([mean, pool_mean]), torch.cat([variance, pool_variance])
        other = torch.where((page >= rows)[:, None], pool_elements, other)
    source = torch.where(page >= 0, page, 0)
    pooled = pooled_stats(mean, variance, own, all_mean[source], all_variance[source], other)
    shares = (page >= 0)[:, None]
    mean, variance = (torch.where(shares, shared, alone) for shared, alone in zip(pooled, (mean, variance)))
    out = ((flat - mean[..., None]) * torch.rsqrt(variance[..., None] + eps)).reshape(x.shape)
    out = out * weight.float()[:, None, None] + bias.float()[:, None, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def geglu(x):
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


_FORMS = (
    shared_attention, gated_cross_attention, layer_norm, add_layer_norm, token_stats, adain_affine, group_norm_silu,
    geglu,
)  # fmt: skip


def replacements() -> dict:
    """Custom op -> its form in standard operators, for `ExportedProgram.run_decompositions`."""
    return {operation(form.__name__).op: form for form in _FORMS}
