"""Two fp32 programs are compared through the same computation in fp64: ours may err at most twice as much as its peer.

How far two sound fp32 programs lie apart is decided by the order in which a CPU's kernels sum, so a tolerance that was
found on one machine fails on the next. Here the error against fp64 is measured where the test runs:

    close(draw(prompts), measured(literal, pipe, prompts))

`measured` can call the function again with every model, tensor and dataclass among its arguments in fp64, so the
function must take what it computes with as arguments, and not from the lines around it.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from unittest import mock

import torch

from stylefast.kernels import registry

EPS = torch.finfo(torch.float32).eps
# what sums of the same few numbers may differ by, in units in the last place of the largest value
ULPS = 4
# a run in fp64 that is further than this from the peer is another computation, and measures nothing
SAME_COMPUTATION = 1e-4
SEEDS_OF_ROUNDINGS = (1, 2, 3)


class Measured:
    """A peer's fp32 result, and how to have it in fp64 and in other roundings. Indexing takes the same part of all."""

    def __init__(self, value, exact: Callable, roundings: Sequence[Callable] = ()):
        self.value, self._exact, self._roundings = value, cache(exact), [cache(rounding) for rounding in roundings]

    @property
    def exact(self):
        """The result in fp64."""
        return self._exact()

    def values(self):
        """The fp32 result, then those of the same computation rounded in other ways."""
        yield self.value
        yield from (rounding() for rounding in self._roundings)

    def __getitem__(self, index) -> "Measured":
        def part(whole):
            return whole()[index]

        return Measured(self.value[index], partial(part, self._exact), [partial(part, r) for r in self._roundings])


def measured(function: Callable, *arguments, **named) -> Measured:
    """Call `function`, and keep how to call it in fp64. It draws the same noise both times."""

    def exact():
        with noise_of_fp32():
            result = function(*wide(arguments), **wide(named))
        assert result.dtype == torch.float64, f"not computed in fp64, but in {result.dtype}"
        return result

    def rounded(seed):
        return function(*nudged(arguments, seed), **nudged(named, seed))

    return Measured(function(*arguments, **named), exact, [partial(rounded, seed) for seed in SEEDS_OF_ROUNDINGS])


def close(found, peer: Measured, ulps: float = ULPS) -> None:
    """Assert that `found` errs at most twice as much as `peer`, give or take `ulps` of the largest value.

    Both the largest error and the root of the mean square count. Two roundings of one sum differ by chance, so a peer
    that was lucky runs again with its numbers moved by a unit in the last place; the largest of its errors counts.
    """
    found, value = _stacked(found), _stacked(peer.value)
    assert found.shape == value.shape, f"{tuple(found.shape)} against {tuple(value.shape)}"
    assert torch.isfinite(found).all() and torch.isfinite(value).all()
    size = float(value.abs().max())
    floors = torch.tensor([ulps, ulps / 4], dtype=torch.float64) * EPS * size
    if (_errors(found, value) <= floors).all():
        return  # by the triangle inequality what follows would hold, whatever is exact
    exact = _stacked(peer.exact)
    error, allowed = _errors(found, exact), torch.zeros(2, dtype=torch.float64)
    for other in peer.values():
        its_own = _errors(_stacked(other), exact)
        assert its_own[0] <= SAME_COMPUTATION * size, f"the peer is {its_own[0] / size:.1e} from its own run in fp64"
        allowed = torch.maximum(allowed, its_own)
        if (error <= 2 * allowed + floors).all():
            return
    raise AssertionError(
        "largest error {:.2e} and rms {:.2e} of the largest value; the peer's own are {:.2e} and {:.2e}".format(
            *(error / size).tolist(), *(allowed / size).tolist()
        )
    )


def _errors(found, exact) -> torch.Tensor:
    # largest and root mean square
    apart = found.double() - exact.double()
    return torch.stack([apart.abs().max(), apart.square().mean().sqrt()])


def _stacked(value) -> torch.Tensor:
    return torch.stack(list(value)) if isinstance(value, (list, tuple)) else value


_wide_modules: dict = {}  # id of a module -> (the module, its weights' addresses and versions, its copy in fp64)


def wide(value):
    """`value` with the tensors, modules and pipelines in it in fp64; they are not changed themselves."""

    def module_in_fp64(module):
        # one whose weights have been written or exchanged since is copied again
        state = [(weight.data_ptr(), weight._version) for weight in module.state_dict(keep_vars=True).values()]
        if id(module) not in _wide_modules or _wide_modules[id(module)][1] != state:
            _wide_modules[id(module)] = (module, state, copy.deepcopy(module).double())
        return _wide_modules[id(module)][2]

    return _mapped(value, torch.Tensor.double, module_in_fp64)


def nudged(value, seed: int):
    """`value` with every number of its tensors, modules and pipelines moved by up to a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(tensor):
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
        return (tensor.double() * (1 + 2 * EPS * noise)).to(tensor.dtype)

    def nudged_module(module):
        module = copy.deepcopy(module)
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(nudge(tensor))
        return module

    return _mapped(value, nudge, nudged_module)


def _mapped(value, of_tensor: Callable, of_module: Callable):
    again = partial(_mapped, of_tensor=of_tensor, of_module=of_module)
    if isinstance(value, torch.Tensor):
        return of_tensor(value) if value.is_floating_point() else value
    if isinstance(value, torch.nn.Module):
        return of_module(value)
    if hasattr(value, "components") and hasattr(value, "unet"):  # a pipeline of diffusers
        twin = copy.copy(value)
        for name, part in value.components.items():
            if isinstance(part, torch.nn.Module):
                setattr(twin, name, of_module(part))
        return twin
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: again(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, tuple):
        return type(value)(*map(again, value)) if hasattr(value, "_fields") else tuple(map(again, value))
    if isinstance(value, list):
        return [again(part) for part in value]
    if isinstance(value, Mapping):
        return {name: again(part) for name, part in value.items()}
    return value


def engine_of(pipe):
    """An engine on a pipeline, also on one in fp64, which users are refused."""
    import stylefast as sf
    from stylefast.models import pipeline_check

    with mock.patch.object(pipeline_check, "_FLOATS", (*pipeline_check._FLOATS, torch.float64)):
        return sf.Engine.from_pipeline(pipe)


class Twins:
    """An engine, and the same in fp64 and in other roundings: `drawn` is a call of `generate` to compare with.

    adapter: the file of an adapter that was given to the engine by `load_adapter`. controls: ControlNets of diffusers
    that were registered with it, by name.
    """

    def __init__(self, engine, adapter=None, controls: Mapping | None = None):
        self._engine, self._twins, self._adapter, self._controls = engine, {}, adapter, controls or {}

    def drawn(self, requests: Sequence, in_fp64: Sequence | None = None) -> Measured:
        """The latents of requests in a call of their own; in_fp64: what takes their place there, as for banks."""
        loras = loras_of(self._engine, requests)

        def run(*change):
            return _latents(self._twin(*change), in_fp64 or requests, loras)

        def exact():
            with registry.using("torch"):  # the one form that takes fp64
                return run(wide)

        roundings = [partial(run, nudged, seed) for seed in SEEDS_OF_ROUNDINGS]
        return Measured(_latents(self._engine, requests, {}), exact, roundings)

    def _twin(self, change: Callable, *further):
        if (change, *further) not in self._twins:
            components = self._engine._components
            twin = self._twins[change, *further] = type(self._engine)(change(components, *further))
            twin.text_encoder.max_chunks = self._engine.text_encoder.max_chunks
            if components.adapter_path is not None:
                twin.load_adapter(components.adapter_path)
            if self._adapter is not None:
                twin.load_adapter(self._adapter)
            for name, network in self._controls.items():
                twin.controls.add(change(network, *further), name)
        return self._twins[change, *further]


def _latents(engine, requests, loras) -> torch.Tensor:
    with registered(engine, loras):
        return torch.stack(list(engine.generate(list(requests), output="latents").latents))


def loras_of(engine, requests: Sequence) -> dict[str, tuple]:
    """The files and parts of the LoRAs that requests name, as the engine has them now."""
    names = {name for request in requests for name in getattr(request, "loras", None) or {}}
    return {name: (engine.loras[name].path, engine.loras[name].part) for name in names}


@contextmanager
def registered(engine, loras: Mapping[str, tuple]):
    """Within, LoRAs of another engine are registered with this one."""
    for name, (path, part) in loras.items():
        engine.loras.add(path, name, part)
    try:
        yield
    finally:
        for name in loras:
            engine.loras.remove(name)


@contextmanager
def noise_of_fp32():
    # a generator gives other numbers in fp64
    randn = torch.randn

    def draw(*shape, dtype=None, **options):
        narrow = randn(*shape, dtype=torch.float32 if dtype == torch.float64 else dtype, **options)
        return narrow.double() if dtype == torch.float64 else narrow

    with mock.patch.object(torch, "randn", draw):
        yield
