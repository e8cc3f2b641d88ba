"""The control networks of an engine, by name: ControlNets and T2I-Adapters."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stylefast import values
from stylefast.errors import AdapterError, InvalidRequest
from stylefast.models.control_net import ControlNet
from stylefast.models.t2i_adapter import T2IAdapter, is_t2i_adapter
from stylefast.models.unet import UNet
from stylefast.runtime.memory import MemoryBudget


class ControlNets(Mapping[str, "ControlNet | T2IAdapter"]):
    """The ControlNets and T2I-Adapters that requests may name: `Control(picture, "canny")`.

    Registering is allowed while pictures are in progress. A network that is removed stays until the requests that use
    it are done.

    Examples:
        >>> list(engine.controls)
        []
        >>> engine.generate(sf.Request("a fish", steps=2, control=sf.Control(engine.references()["neon"])))
        Traceback (most recent call last):
        stylefast.errors.InvalidRequest: the request has a control picture, but no ControlNet is registered; add one \
with engine.controls.add(folder)
    """

    def __init__(
        self,
        unet: UNet,
        downscale: int,
        budget: MemoryBudget,
        check_open: Callable[[], None],
        paused: Callable[[], Any],
    ):
        self._unet, self._downscale, self._budget = unet, downscale, budget
        self._check_open, self._paused = check_open, paused
        # called with each network before it is used
        self.prepare: Callable[[ControlNet | T2IAdapter], None] = lambda network: None
        self._lock = threading.RLock()
        self._named: dict[str, ControlNet | T2IAdapter] = {}

    def add(self, source: "str | Path | torch.nn.Module", name: str | None = None) -> str:
        """Load a ControlNet or T2I-Adapter for SDXL; return its name, by default the file's or the folder's.

        source: a diffusers folder, a `.safetensors` file, or a diffusers `ControlNetModel`, `ControlNetUnionModel` or
            `T2IAdapter`.

        Raises ModelNotFound and ModelFormatError for what can't be read, AdapterError for networks that don't fit the
        model, OutOfMemory beyond `memory_limit`, InvalidRequest for a name that is taken, EngineClosed once the engine
        is closed.
        """
        self._check_open()
        path = None if isinstance(source, torch.nn.Module) else values.path("a control network", source)
        if name is None and path is not None:
            name = path.name if path.is_dir() else path.stem  # folders' names have dots
        name = type(source).__name__ if name is None else name
        name = values.text("the name of a control network", name, longest=values.QUOTED, empty=False)
        self._check_free(name)
        network = (T2IAdapter if is_t2i_adapter(source) else ControlNet).load(source, self._unet, name)
        # a T2I-Adapter's first maps are added one level below the latents
        wanted = 2 * self._downscale if isinstance(network, T2IAdapter) else self._downscale
        if network.downscale != wanted:
            raise AdapterError(
                f"the control network {values.quoted(name)} divides a picture's sides by {network.downscale}, but this "
                f"model's VAE needs one that divides them by {wanted}; give one for this model"
            )
        self._budget.check_network(self._unet.device, name, _bytes(network))
        self.prepare(network)
        network.path = None if path is None else path.resolve()
        with self._paused(), self._lock:  # the pause orders the loaded weights before their use on a GPU
            self._check_free(name)
            self._named[name] = network
        return name

    def remove(self, name: str) -> None:
        """Unregister a ControlNet. Raises InvalidRequest if there is none of that name."""
        self._check_open()
        with self._lock:
            del self._named[self[name].name]

    def find(self, name: str | None) -> ControlNet | T2IAdapter:
        """Return the network of a name, for None the only one. Raises InvalidRequest, listing the names there are."""
        with self._lock:
            if not self._named:
                raise InvalidRequest(
                    "the request has a control picture, but no ControlNet is registered; add one with "
                    "engine.controls.add(folder)"
                )
            if name is None and len(self._named) == 1:
                return next(iter(self._named.values()))
            if name is None:
                raise InvalidRequest(
                    f"there are several ControlNets ({values.listed(self._named)}); name one: "
                    "Control(picture, network=...)"
                )
            return self[name]

    def __getitem__(self, name: str) -> ControlNet | T2IAdapter:
        if not isinstance(name, str) or name not in self._named:
            raise InvalidRequest(
                f"no ControlNet named {values.quoted(name)} is registered; registered are: "
                f"{values.listed(self._named)}{values.did_you_mean(name, self._named)}. Add it with "
                f"engine.controls.add(folder, {values.quoted(name)})"
            )
        return self._named[name]

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._named))

    def __len__(self) -> int:
        return len(self._named)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all networks."""
        return sum(map(_bytes, list(self._named.values())))

    def _check_free(self, name: str) -> None:
        if name in self._named:
            raise InvalidRequest(
                f"a ControlNet named {values.quoted(name)} is already registered; remove it first, or give another "
                "name: engine.controls.add(folder, 'name')"
            )


def _bytes(network: torch.nn.Module) -> int:
    return sum(x.nbytes for x in network.parameters())
