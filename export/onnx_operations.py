"""stylefast's operations in ONNX: how the custom ops of a traced graph are written.

The formulas are those of `stylefast.kernels`, without data-dependent control flow: every row carries every segment,
masked out where unused. Attention keeps the pattern that runtimes fuse (product, mask, softmax, product); token
statistics, AdaIN's gains and pooled norms are computed in float32 for every model type.

To write attention differently, override `OnnxOperations.attend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stylefast.kernels.adain import ADAIN_EPS
from stylefast.kernels.row_lora import RANK
from stylefast.kernels.shared_attention import PLAIN, SWAP

if TYPE_CHECKING:
    from stylefast.export.onnx_writer import NodeMaker

# element types by ONNX's numbers
FLOAT, INT64, FLOAT16, BFLOAT16 = 1, 7, 10, 16
# largest finite numbers: some fused kernels return NaN for the difference of two infinities
_LOWEST = {FLOAT: -3.4028234663852886e38, FLOAT16: -65504.0, BFLOAT16: -3.3895313892515355e38}


class Value(Protocol):
    """A tensor of the graph, an `onnx_ir.Value`: its element type, and its dimensions, None where they vary."""

    dtype: Any
    shape: Any


class OnnxOperations:
    """ONNX forms of the operations, one method per custom op, with the op's arguments and ONNX values as results.

    op: creates nodes, an `onnx_writer.NodeMaker`; opset: version of ONNX's operators. `domains` are additional ones
    that a graph with these operations imports, name -> version.
    """

    domains: dict[str, int] = {}

    def __init__(self, op: NodeMaker, opset: int):
        self.op, self.opset = op, opset

    # building blocks

    def ints(self, *values: int) -> Value:
        return self.op.Constant(value_ints=list(values))

    def number(self, value: float, kind: int) -> Value:
        scalar = self.op.Constant(value_float=float(value))
        return scalar if kind == FLOAT else self.op.Cast(scalar, to=kind)

    def to(self, x: Value, kind: int, known: int | None = None) -> Value:
        """Cast x to another element type; `known` is x's own type, if certain."""
        return x if known == kind else self.op.Cast(x, to=kind)

    def size(self, x: Value, dim: int) -> Value:
        """Return the length of one dimension, [1] int64."""
        return self.op.Shape(x, start=dim, end=dim + 1)

    def column(self, table: Value, index: int) -> Value:
        """Return one column [rows] of a table [rows, columns]."""
        return self.op.Gather(table, self.op.Constant(value_int=index), axis=1)

    def along_rows(self, x: Value, dims: int) -> Value:
        """Reshape [rows] to [rows, 1, 1, ..] of `dims` dimensions."""
        return self.op.Unsqueeze(x, self.ints(*range(1, dims)))

    def attend(self, q: Value, k: Value, v: Value, mask: Value | None = None) -> Value:
        """Return softmax(q k^T / sqrt(d) + mask) v, [rows, tokens, heads, d] in and out; mask [rows, 1, 1, keys]."""
        op, kind, width = self.op, _kind(q), q.shape[3]
        q = op.Mul(op.Transpose(q, perm=[0, 2, 1, 3]), self.number(1 / math.sqrt(width), kind))
        logits = op.MatMul(q, op.Transpose(k, perm=[0, 2, 3, 1]))
        if mask is not None:
            logits = op.Add(logits, mask)
        out = op.MatMul(op.Softmax(logits, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
        return op.Transpose(out, perm=[0, 2, 1, 3])

    def silu(self, x: Value) -> Value:
        return self.op.Mul(x, self.op.Sigmoid(x))

    # operations

    def shared_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        page: Value,
        modes: Value,
        scale: Value,
        shift: Value,
        bias: Value | None = None,
        gain: Value | None = None,
        offset: Value | None = None,
        pool_k: Value | None = None,
        pool_v: Value | None = None,
        pool_k_scale: Value | None = None,
        pool_v_scale: Value | None = None,
    ) -> Value:
        """Write shared attention; pages have as many tokens as rows, `bias` and float8 pages are not supported."""
        op, kind = self.op, _kind(q)
        references = page.shape[1]
        if references == 0:
            return self.attend(q, k, v)
        # row count from the table, which all layers share, so that equal nodes are deduplicated
        rows, tokens = self.size(page, 0), self.size(q, 1)
        zero, lowest, nobody = self.number(0, kind), self.number(_LOWEST[kind], kind), self.ints(0)
        is_styled = op.Not(op.Equal(modes, self.ints(PLAIN)))  # [rows]
        pages = [self.column(page, r) for r in range(references)]
        used = [op.And(is_styled, op.GreaterOrEqual(p, nobody)) for p in pages]
        styled = used[0]
        for other in used[1:]:
            styled = op.Or(styled, other)

        own_k, own_v = k, v
        if gain is not None:
            moves = self.along_rows(styled, 4)
            parts = [q, k, v]
            for i in range(gain.shape[0]):
                part = op.Constant(value_int=i)
                gains, offsets = (op.Unsqueeze(op.Gather(x, part, axis=0), self.ints(1)) for x in (gain, offset))
                moved = op.Add(op.Mul(self.to(parts[i], FLOAT, kind), gains), offsets)
                parts[i] = op.Where(moves, self.to(moved, kind, FLOAT), parts[i])
            query, own_k, own_v = parts
        else:
            query = q

        own_seen = op.Not(op.And(styled, op.Equal(modes, self.ints(SWAP))))
        keys, values, masks, seen_any = [own_k], [own_v], [op.Where(own_seen, zero, lowest)], own_seen
        own_row = op.Range(op.Constant(value_int=0), op.Squeeze(rows), op.Constant(value_int=1))
        for r, p in enumerate(pages):
            shifts, scales = self.column(shift, r), self.column(scale, r)
            visible = op.Not(op.IsInf(shifts, detect_positive=0))
            seen = op.And(used[r], visible)
            of_batch = op.Less(p, rows)
            # a hidden segment reads its own row, because NaN in another would survive the weight 0
            live = op.Where(op.And(seen, of_batch), p, own_row)
            page_k, page_v = op.Gather(k, live, axis=0), op.Gather(v, live, axis=0)
            if pool_k is not None:
                banked = op.And(seen, op.Not(of_batch))
                entry = op.Where(banked, op.Sub(p, rows), nobody)
                banked = self.along_rows(banked, 4)
                page_k = op.Where(banked, op.Gather(pool_k, entry, axis=0), page_k)
                page_v = op.Where(banked, op.Gather(pool_v, entry, axis=0), page_v)
            scaled = op.Mul(self.to(page_k, FLOAT, kind), self.along_rows(scales, 4))
            keys.append(self.to(scaled, kind, FLOAT))
            values.append(page_v)
            shown = self.to(op.Where(visible, shifts, self.number(0, FLOAT)), kind, FLOAT)
            masks.append(op.Where(seen, shown, lowest))
            seen_any = op.Or(seen_any, seen)

        length = op.Concat(rows, tokens, axis=0)
        spread = [op.Expand(op.Unsqueeze(mask, self.ints(1)), length) for mask in masks]
        mask = op.Unsqueeze(op.Concat(*spread, axis=1), self.ints(1, 2))  # [rows, 1, 1, keys]
        out = self.attend(_like(query, q), op.Concat(*keys, axis=1), op.Concat(*values, axis=1), mask)
        return op.Where(self.along_rows(seen_any, 4), out, zero)

    def gated_cross_attention(
        self,
        q: Value,
        text_k: Value,
        text_v: Value,
        text_page: Value,
        text_lengths: Value | None = None,
        image_k: Value | None = None,
        image_v: Value | None = None,
        image_lengths: Value | None = None,
        image_page: Value | None = None,
        strength: Value | None = None,
        group: Value | None = None,
        masks: Value | None = None,
        mask_index: Value | None = None,
    ) -> Value:
        """Write text attention plus, per segment, attention over all image tokens with the segment's values only."""
        op, kind = self.op, _kind(q)
        keys, values, mask = op.Gather(text_k, text_page, axis=0), op.Gather(text_v, text_page, axis=0), None
        if text_lengths is not None:
            token = op.Range(op.Constant(value_int=0), op.Squeeze(self.size(text_k, 1)), op.Constant(value_int=1))
            there = op.Less(token, op.Unsqueeze(op.Gather(text_lengths, text_page, axis=0), self.ints(1)))
            # zeros where masked: 0 * NaN would be NaN
            shown = op.Unsqueeze(there, self.ints(2, 3))
            keys, values = (op.Where(shown, x, self.number(0, kind)) for x in (keys, values))
            mask = op.Unsqueeze(
                op.Where(there, self.number(0, kind), self.number(_LOWEST[kind], kind)), self.ints(1, 2)
            )
        out = self.attend(q, keys, values, mask)
        if image_page is None or image_page.shape[1] == 0:
            return out
        assert image_k is not None and strength is not None and group is not None
        segments, heads, width = image_page.shape[1], q.shape[2], q.shape[3]
        zero, lowest, nobody = self.number(0, kind), self.number(_LOWEST[kind], kind), self.ints(0)
        present = op.GreaterOrEqual(image_page, nobody)
        active = op.And(present, op.Not(op.Equal(strength, self.number(0, FLOAT))))  # [rows, S]
        page = op.Where(present, image_page, nobody)
        token = op.Range(op.Constant(value_int=0), op.Squeeze(self.size(image_k, 1)), op.Constant(value_int=1))
        lengths = op.Unsqueeze(op.Gather(image_lengths, page, axis=0), self.ints(2))
        there = op.And(op.Unsqueeze(active, self.ints(2)), op.Less(token, lengths))  # [rows, S, tokens]
        flat = self.ints(0, -1, heads, width)
        keys = op.Reshape(op.Gather(image_k, page, axis=0), flat)  # [rows, S * tokens, heads, d]
        values = op.Gather(image_v, page, axis=0)  # [rows, S, tokens, heads, d]
        total = self.to(out, FLOAT, kind)
        for s in range(segments):
            number, place = self.column(group, s), op.Constant(value_int=s)
            members = op.Unsqueeze(op.Equal(group, op.Unsqueeze(number, self.ints(1))), self.ints(2))
            members = op.Reshape(op.And(there, members), self.ints(0, -1))  # [rows, S * tokens]
            mask = op.Unsqueeze(op.Where(members, zero, lowest), self.ints(1, 2))
            own = op.Reshape(op.Equal(self.ints(*range(segments)), place), self.ints(segments, 1, 1, 1))
            own_values = op.Reshape(op.Where(own, values, zero), flat)
            part = self.to(self.attend(q, keys, own_values, mask), FLOAT, kind)
            gate = self.along_rows(self.column(strength, s), 4)
            if mask_index is not None and masks is not None:
                index = self.column(mask_index, s)
                confined = op.GreaterOrEqual(index, nobody)
                chosen = op.Gather(masks, op.Where(confined, index, nobody), axis=0)  # [rows, query tokens]
                chosen = op.Where(op.Unsqueeze(confined, self.ints(1)), chosen, self.number(1, FLOAT))
                gate = op.Mul(gate, op.Unsqueeze(chosen, self.ints(2, 3)))
            shown = self.along_rows(self.column(active, s), 4)
            total = op.Add(total, op.Where(shown, op.Mul(gate, part), self.number(0, FLOAT)))
        return self.to(total, kind, FLOAT)

    def token_stats(self, tensors: Sequence[Value]) -> tuple[Value, Value]:
        op, means, variances = self.op, [], []
        for x in tensors:
            exact = self.to(x, FLOAT, _kind(x))
            mean = op.ReduceMean(exact, self.ints(1), keepdims=1)  # [rows, 1, heads, d]
            deviation = op.Sub(exact, mean)
            others = op.Max(op.Sub(self.size(x, 1), self.ints(1)), self.ints(1))
            spread = op.ReduceSum(op.Mul(deviation, deviation), self.ints(1), keepdims=0)
            means.append(op.Transpose(mean, perm=[1, 0, 2, 3]))
            variances.append(op.Unsqueeze(op.Div(spread, self.to(others, FLOAT)), self.ints(0)))
        return op.Concat(*means, axis=0), op.Concat(*variances, axis=0)

    def adain_affine(
        self,
        mean: Value,
        variance: Value,
        page: Value,
        strength: Value,
        pool_mean: Value | None = None,
        pool_variance: Value | None = None,
        check_finite: bool = False,
    ) -> tuple[Value, Value]:
        op = self.op
        all_means, all_variances = mean, variance  # [parts, rows and pages, heads, d]
        if pool_mean is not None:
            all_means, all_variances = op.Concat(mean, pool_mean, axis=1), op.Concat(variance, pool_variance, axis=1)
        takes = op.GreaterOrEqual(page, self.ints(0))
        source = op.Where(takes, page, self.ints(0))
        other_mean, other_variance = op.Gather(all_means, source, axis=1), op.Gather(all_variances, source, axis=1)
        part = op.Unsqueeze(op.Transpose(strength, perm=[1, 0]), self.ints(2, 3))  # [parts, rows, 1, 1]
        eps, one, zero = self.number(ADAIN_EPS, FLOAT), self.number(1, FLOAT), self.number(0, FLOAT)
        ratio = op.Sqrt(op.Div(op.Add(other_variance, eps), op.Add(variance, eps)))
        applies = op.And(op.Not(op.Equal(part, zero)), op.Unsqueeze(takes, self.ints(1, 2)))
        gain = op.Where(applies, op.Add(one, op.Mul(part, op.Sub(ratio, one))), one)
        offset = op.Where(applies, op.Mul(part, op.Sub(other_mean, op.Mul(ratio, mean))), zero)
        return gain, offset

    def group_norm_silu(
        self,
        x: Value,
        groups: int,
        weight: Value,
        bias: Value,
        eps: float,
        silu: bool,
        page: Value | None = None,
        pool_mean: Value | None = None,
        pool_variance: Value | None = None,
        pool_elements: int | None = 0,
    ) -> Value:
        """Write group norm; pages have the size of the rows that read them, so `pool_elements` is a row's own count."""
        op, kind = self.op, _kind(x)
        by_group, shape = self.ints(0, groups, -1), op.Shape(x)
        if page is None:
            out = self._group_norm(x, groups, weight, bias, eps, by_group, shape)
            return self.silu(out) if silu else out
        flat = op.Reshape(self.to(x, FLOAT, kind), by_group)  # [rows, groups, elements]
        mean = op.ReduceMean(flat, self.ints(2), keepdims=1)
        centred = op.Sub(flat, mean)
        variance = op.ReduceMean(op.Mul(centred, centred), self.ints(2), keepdims=1)  # [rows, groups, 1]
        all_means, all_variances = mean, variance
        if pool_mean is not None:
            last = self.ints(2)
            all_means = op.Concat(mean, op.Unsqueeze(pool_mean, last), axis=0)
            all_variances = op.Concat(variance, op.Unsqueeze(pool_variance, last), axis=0)
        takes = op.GreaterOrEqual(page, self.ints(0))
        source = op.Where(takes, page, self.ints(0))
        # element counts are equal: mean of the means, mean of the variances plus squared half distance of the means
        other_mean, other_variance = op.Gather(all_means, source, axis=0), op.Gather(all_variances, source, axis=0)
        half = self.number(0.5, FLOAT)
        apart = op.Mul(op.Sub(other_mean, mean), half)
        both = op.Add(op.Mul(op.Add(variance, other_variance), half), op.Mul(apart, apart))
        shares = self.along_rows(takes, 3)
        mean = op.Where(shares, op.Add(mean, apart), mean)
        variance = op.Where(shares, both, variance)
        out = op.Div(op.Sub(flat, mean), op.Sqrt(op.Add(variance, self.number(eps, FLOAT))))
        weight, bias = (op.Reshape(self.to(p, FLOAT), self.ints(-1, 1, 1)) for p in (weight, bias))
        out = op.Add(op.Mul(op.Reshape(out, shape), weight), bias)
        return self.to(self.silu(out) if silu else out, kind, FLOAT)

    def _group_norm(
        self, x: Value, groups: int, weight: Value, bias: Value, eps: float, by_group: Value, shape: Value
    ) -> Value:
        op, kind = self.op, _kind(x)
        if self.opset >= 21:
            return op.GroupNormalization(x, weight, bias, num_groups=groups, epsilon=eps)
        ones, zeros = (op.Expand(self.number(v, kind), self.ints(groups)) for v in (1, 0))
        normed = op.InstanceNormalization(op.Reshape(x, by_group), ones, zeros, epsilon=eps)
        weight, bias = (op.Reshape(p, self.ints(-1, 1, 1)) for p in (weight, bias))
        return op.Add(op.Mul(op.Reshape(normed, shape), weight), bias)

    def layer_norm(self, x: Value, weight: Value, bias: Value, eps: float) -> Value:
        return self.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)

    def add_layer_norm(self, x: Value, residual: Value, weight: Value, bias: Value, eps: float) -> tuple[Value, Value]:
        total = self.op.Add(x, residual)
        return total, self.layer_norm(total, weight, bias, eps)

    def geglu(self, x: Value) -> Value:
        hidden, gate = self.op.Split(x, num_outputs=2, axis=-1)
        return self.op.Mul(hidden, self.op.Gelu(gate))

    def row_lora(
        self,
        x: Value,
        down: Value,
        up: Value,
        unit: Value,
        scale: Value,
        stride: int,
        padding: int,
        ys: Sequence[Value],
    ) -> list[Value]:
        """Write LoRAs per row; returns the new values of ys, which the graph reads from then on.

        Every row carries every unit, zeros where it has none. As in Triton's form, x A is rounded to x's type.
        """
        op, kind = self.op, _kind(x)
        if unit.shape[2] == 0:
            return list(ys)
        nobody, zero, none = self.ints(0), self.number(0, kind), self.number(0, FLOAT)
        # the same in all layers; where a row has no unit, it multiplies a zero
        factor = op.Expand(op.Unsqueeze(scale, self.ints(2)), self.ints(1, 1, RANK))
        factor = op.Reshape(factor, self.ints(0, -1))  # [rows, N * 16]
        results = []
        linear = len(x.shape) == 3
        down = op.Squeeze(down, self.ints(1)) if linear else down
        for part, y in enumerate(ys):
            index = op.Gather(unit, op.Constant(value_int=part), axis=0)  # [rows, N]
            live = op.And(op.GreaterOrEqual(index, nobody), op.Not(op.Equal(scale, none)))
            place = op.Where(live, index, nobody)
            shown = op.Unsqueeze(live, self.ints(2, 3))
            b = op.Reshape(op.Where(shown, op.Gather(up, place, axis=0), zero), self.ints(0, -1, up.shape[2]))
            a, factors = op.Gather(down, place, axis=0), op.Unsqueeze(factor, self.ints(1 if linear else 2))
            if linear:
                a = op.Reshape(op.Transpose(op.Where(shown, a, zero), perm=[0, 2, 1, 3]), self.ints(0, 0, -1))
                inner = op.MatMul(x, a)
            else:
                a = op.Transpose(op.Where(op.Unsqueeze(live, self.ints(2, 3, 4)), a, zero), perm=[0, 2, 1, 4, 3])
                a = op.Reshape(a, self.ints(0, -1, x.shape[1]))  # [rows, taps * N * 16, in]
                inner = self._taps(x, a, down.shape[1], stride, padding)  # [rows, N * 16, h' * w']
            inner = self.to(op.Mul(self.to(inner, FLOAT, kind), factors), kind, FLOAT)
            if linear:
                added = op.MatMul(inner, b)
            else:
                added = op.Reshape(op.MatMul(op.Transpose(b, perm=[0, 2, 1]), inner), op.Shape(y))
            results.append(_like(op.Add(y, added), y))
        return results

    def _taps(self, x: Value, a: Value, taps: int, stride: int, padding: int) -> Value:
        """Return the convolution of x [rows, in, h, w] with each row's own a [rows, taps * ranks, in], pixels flat.

        All taps are one product, whose results are then moved, since they are smaller than x.
        """
        op, side = self.op, 3 if taps == 9 else 1
        inner = op.MatMul(a, op.Reshape(x, self.ints(0, 0, -1)))
        if (side, stride, padding) == (1, 1, 0):
            return inner
        inner = op.Reshape(inner, op.Concat(self.ints(0, taps, -1), op.Shape(x, start=2, end=4), axis=0))
        if padding:
            inner = op.Pad(inner, self.ints(0, 0, 0, padding, padding, 0, 0, 0, padding, padding))
        total = None
        for tap in range(taps):
            i, j = divmod(tap, side)
            # up to the last pixel that this tap sees, counted from the end
            ends = [at - (side - 1) or 2**31 - 1 for at in (i, j)]
            bounds = (self.ints(tap, i, j), self.ints(tap + 1, *ends))
            seen = op.Slice(inner, *bounds, self.ints(1, 3, 4), self.ints(1, stride, stride))
            total = seen if total is None else op.Add(total, seen)
        return op.Reshape(op.Squeeze(total, self.ints(1)), self.ints(0, 0, -1))


def _kind(x: Value) -> int:
    return int(x.dtype)


def _like(value: Value, typed: Value) -> Value:
    """Give a new value the element type and dimensions of one that the exporter knows."""
    if value is not typed:
        value.dtype, value.shape = typed.dtype, typed.shape
    return value
