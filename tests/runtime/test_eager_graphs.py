"""Steps of the backend "torch" as CUDA graphs, on stand-ins: what a step may do to be captured, and what is kept."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stylefast as sf
from stylefast.kernels import registry
from stylefast.models.row_table import ImageKV
from stylefast.models.unet import UNet
from stylefast.runtime.backends import base
from stylefast.runtime.backends.base import LatentSlots, ModelInputs, TorchBackend, graphs_for, run_step
from stylefast.runtime.backends.choice import make_backend
from stylefast.runtime.backends.cuda_graphs import Captured, StepGraphs
from stylefast.runtime.banks.bank_pages import BankPages
from stylefast.runtime.steps.conditions import KeyValuePages
from stylefast.runtime.steps.step_buffers import BatchShape, StepBuffers
from tests.support.scene import sharp_pipeline
from tests.support.small_sdxl import small_unet_config

LATENTS = (4, 8, 12)
CPU = torch.device("cpu")


def buffers_of(unet, banks=True, pictures=True, masks=True) -> ModelInputs:
    """Everything that a step can read, empty."""
    pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    text = KeyValuePages(unet.layout, 77, pooled, unet.device, unet.dtype)
    image = KeyValuePages(unet.layout, 4, 0, unet.device, unet.dtype)
    sizes = unet.attention_sizes(*LATENTS[1:])
    return ModelInputs(
        text.layers,
        text.extra,
        ImageKV(image.layers, image.lengths) if pictures else None,
        BankPages(unet, LATENTS[1:], 2).pages if banks else None,
        tuple(torch.zeros(2, h * w, device=unet.device) for h, w in sizes) if masks else (),
        text_lengths=text.lengths,
    )


def table_of(unet, rows=4) -> StepBuffers:
    layout = unet.layout
    return StepBuffers(BatchShape(rows, 2, 1, 1, 0, True, len(layout.layers), len(layout.modules), LATENTS), CPU)


class HostWatch(TorchDispatchMode):
    """Refuses copies between host and device, which a capture can't record."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        # single numbers of the host are arguments of a launch
        places = {x.device.type for x in given if isinstance(x, torch.Tensor) and x.ndim}
        places |= {x.device.type for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
        if len(places) > 1:
            raise AssertionError(f"{function} takes or gives tensors on {', '.join(sorted(places))}")
        return result


class ListWatch(TorchFunctionMode):
    """Refuses to make tensors of Python's numbers, which are copied from the host where they are wanted elsewhere."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        index = args[1] if function is torch.Tensor.__getitem__ else ()
        parts = index if isinstance(index, tuple) else (index,)
        if function in self.MAKERS or any(isinstance(part, list | np.ndarray) for part in parts):
            raise AssertionError(f"{function} takes values from the host")
        return function(*args, **kwargs or {})


def on_gpu(value):
    """Tensors of the host as those of another device, which have shapes and types, and no values to ask for."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        parts = [on_gpu(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def test_a_step_on_a_gpu_asks_the_host_for_nothing_so_that_it_can_be_captured():
    with torch.device("meta"):
        gpu = UNet(small_unet_config()).requires_grad_(False)
    host = UNet(small_unet_config()).requires_grad_(False)
    columns, buffers, state = table_of(host).columns, buffers_of(host), LatentSlots(LATENTS, CPU)
    for name in ("latents", "anchor", "history", "finite"):
        setattr(state, name, on_gpu(getattr(state, name)))
    with torch.inference_mode(), ListWatch(), HostWatch(), registry.using("torch"):
        run_step(gpu, state, on_gpu(columns), on_gpu(buffers))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x + torch.tensor([1.0, 2, 3], device=x.device),
        lambda x: x[[0, 2]],
        lambda x: x[x > 0],
    ],
    ids=["a value", "a copy", "a list of numbers", "a list of places", "a count"],
)
def test_what_waits_for_the_device_is_noticed(ask):
    with ListWatch(), HostWatch(), pytest.raises((AssertionError, RuntimeError)):
        ask(torch.empty(3, device="meta"))


class Recorder:
    """A capture that runs the step itself at every replay."""

    def __init__(self):
        self.log, self.failure = [], None

    def warm(self, call):
        self.log.append("warm")
        call()

    def capture(self, call):
        if self.failure is not None:
            raise self.failure

        def replay():
            self.log.append("replay")
            call()

        return Captured(replay, lambda: self.log.append("reset"), 70)

    def wait(self):
        pass


@pytest.fixture(scope="module")
def captured():
    """(engine whose steps are captured, what happened, an engine that captures nothing)."""
    recorder, pipe = Recorder(), sharp_pipeline()
    engine = sf.Engine.from_pipeline(pipe, backend=lambda unet: TorchBackend(unet, StepGraphs(recorder)))
    return engine, recorder, sf.Engine.from_pipeline(pipe, backend="torch")


CALL = {"steps": 4, "size": (48, 32), "output": "latents"}


def test_the_third_step_of_a_shape_is_captured_and_further_ones_are_replayed(captured):
    engine, recorder, plain = captured
    recorder.log.clear()
    latents = engine.generate("a cat", **CALL).latents
    assert recorder.log == ["warm", "warm", "replay", "replay"] and engine.runner.backend.captures == 1
    assert torch.equal(latents[0], plain.generate("a cat", **CALL).latents[0])
    assert engine.memory()["graphs"] == 70
    # another seed, prompt, sampler and guidance are other contents of the same buffers
    engine.generate("a dog", seed=7, scheduler="dpmpp_2m", guidance=3.0, **CALL)
    assert recorder.log == ["warm", "warm", *["replay"] * 6]
    engine.runner.backend.reset()
    assert recorder.log[-1] == "reset" and engine.memory()["graphs"] == 0


def test_a_pool_that_comes_or_grows_between_two_steps_is_never_read_by_an_old_graph(captured):
    engine, recorder, plain = captured
    banks = [plain.bake(sf.StyleAligned(prompt=text), steps=4, size=(48, 32)) for text in ("neon", "oil")]
    for styles in ([None], [sf.StyleAligned(banks[0])], [sf.StyleAligned(banks[1])], [sf.StyleAligned(banks[0])]):
        found, expected = (one.generate("a cat", styles[0], **CALL).latents[0] for one in (engine, plain))
        assert torch.equal(found, expected)


def test_a_step_that_can_not_be_captured_runs_as_it_is_written(captured, caplog, monkeypatch):
    engine, recorder, plain = captured
    engine.runner.backend.reset()
    monkeypatch.setattr(recorder, "failure", RuntimeError("operation not permitted when stream is capturing"))
    (latents,) = engine.generate("a cat", **CALL).latents
    assert torch.equal(latents, plain.generate("a cat", **CALL).latents[0])
    assert caplog.text.count("could not be captured") == 1 and "not permitted" in caplog.text


def test_auto_captures_on_a_gpu_and_nowhere_else(captured, monkeypatch):
    made = []
    monkeypatch.setattr(base, "CudaCapture", made.append)
    assert graphs_for(torch.device("cpu")) is None and made == []
    assert isinstance(graphs_for(torch.device("cuda", 1)), StepGraphs) and made == [torch.device("cuda", 1)]
    _, _, plain = captured
    assert make_backend("auto", plain.unet).captures == 0 and plain.runner.backend._graphs is None
