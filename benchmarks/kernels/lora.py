"""row_lora: layers whose rows have LoRAs of their own, against the layers alone and against a product for each row.

The ratio to the layers alone is 1 / (1 + what the LoRAs add). On a CPU the layers are packed, as the engine packs them.
"""

import torch

from benchmarks.kernels.cases import Case, Entrants, Versus, cache_bytes, input_sets, normal
from stylefast.kernels import LoraPool, LoraRows, row_lora
from stylefast.models.prepacked import Conv2d, Linear, pack

OURS, ALONE, EACH = "layers and row_lora", "the layers alone", "layers, and two products a row and unit"
RANK = 16
# (width, tokens of a row or side of a feature map, parts, units of a row, convolution)
SHAPES = (
    (640, 4096, 1, 1, False),
    (640, 4096, 3, 1, False),
    (1280, 1024, 1, 1, False),
    (1280, 1024, 3, 1, False),
    (1280, 1024, 1, 8, False),
    (320, 64, 1, 1, True),
    (640, 32, 1, 1, True),
)
FEW = (1280, 1, 1, 1, False)
QUICK = ((64, 32, 3, 2, False), (32, 8, 1, 1, True))
QUICK_FEW = (64, 1, 1, 1, False)


def cpu_cases(quick: bool) -> list[Case]:
    """Return cases without goals: two rows with different units, and eight rows of one token, also with the same."""
    few, types = QUICK_FEW if quick else FEW, (torch.float32, torch.bfloat16)
    cases = [_case(*shape, 2, dtype, "cpu") for dtype in types for shape in (QUICK if quick else SHAPES)]
    return cases + [_case(*few, 8, dtype, "cpu", same) for dtype in types for same in (False, True)]


def cuda_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Return bf16 cases of eight rows with different units, without goals."""
    return [_case(*shape, 8, torch.bfloat16, device) for shape in (QUICK if quick else SHAPES)]


def _case(width, size, parts, count, convolution, rows, dtype, device, same=False) -> Case:
    shape = (rows, width, size, size) if convolution else (rows, size, width)
    taps, positions = (9, size * size) if convolution else (1, size)
    values = 1.0 * rows * positions * width * torch.empty(0, dtype=dtype).element_size()

    def build() -> Entrants:
        layers = [_layer(width, convolution, dtype, device) for _ in range(parts)]
        sets = [
            _inputs(shape, taps, parts, count, dtype, device, seed, same)
            for seed in range(input_sets((1 + parts) * values, cache_bytes(device)))
        ]

        def alone(i):
            return [layer(sets[i][0]) for layer in layers]

        def ours(i):
            x, down, up, unit, scale = sets[i]
            ys = [layer(x) for layer in layers]
            row_lora(x, ys, LoraPool(down, up), LoraRows(unit, scale), 1, 1 if convolution else 0)
            return ys

        def each(i):
            return _one_by_one(alone(i), *sets[i])

        return Entrants(
            {OURS: ours, ALONE: alone, EACH: each},
            sets=len(sets),
            exact=lambda: _first(_exact(layers, *map(_double, sets[0]))),
            pick=_first,
        )

    shown = f"{list(shape)}{' 3x3' if convolution else ''}, {parts} {'part' if parts == 1 else 'parts'}, {count} x 16"
    shown += ", the same for all rows" if same else ""
    comparisons = [Versus(OURS, ALONE, errors=False), Versus(OURS, EACH, error_goal=None)]
    flop = 2.0 * rows * positions * parts * width * (taps * width + count * RANK * (taps + 1))
    return Case("row_lora", shown, dtype, comparisons, build, flop=flop)


def _layer(width: int, convolution: bool, dtype, device):
    layer = Conv2d(width, width, 3, padding=1) if convolution else Linear(width, width)
    layer = layer.to(device, dtype).requires_grad_(False)
    if device == "cpu":
        pack(layer)
    return layer


def _inputs(shape, taps, parts, count, dtype, device, seed, same):
    """Return x and its units: different ones for every row, or the same, and the same for all parts."""
    convolution, rows = len(shape) == 4, shape[0]
    width = shape[1 if convolution else 2]
    x = normal(*shape, dtype=dtype, device=device, seed=seed)
    if convolution:
        x = x.contiguous(memory_format=torch.channels_last)
    units = rows * count
    down = normal(units, taps, width, RANK, dtype=dtype, device=device, seed=90) / (taps * width) ** 0.5
    up = normal(units, RANK, width, dtype=dtype, device=device, seed=91) / RANK**0.5
    unit = torch.arange(units, device=device).reshape(1, rows, count).repeat(parts, 1, 1)
    unit = unit[:, :1].repeat(1, rows, 1) if same else unit
    return x, down, up, unit, torch.full((rows, count), 0.7, device=device)


def _one_by_one(ys, x, down, up, unit, scale):
    """Add each row's units one after another, as a loop over adapters would."""
    count = scale.shape[1]
    for y in ys:
        for number, u in enumerate(unit[0].flatten().tolist()):
            row, a, b = number // count, down[u], up[u]
            if x.ndim == 3:
                y[row] += 0.7 * ((x[row] @ a[0]) @ b)
                continue
            weight = a.unflatten(0, (3, 3)).permute(3, 2, 0, 1)
            inner = _convolution(x[row, None], weight)
            y[row] += 0.7 * torch.nn.functional.conv2d(inner, b.t()[..., None, None])[0]
    return ys


def _exact(layers, x, *loras):
    product = torch.nn.functional.linear if x.ndim == 3 else _convolution
    ys = [product(x, layer.weight.double(), layer.bias.double()) for layer in layers]
    return _one_by_one(ys, x, *loras)


def _convolution(x, weight, bias=None):
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


def _first(ys) -> torch.Tensor:
    return torch.cat([y.flatten()[: 2**20].double() for y in ys])


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x
