"""The ControlNets of an engine, by name, and the pages of text that they read."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.models.control_net import ControlNet
from stylefast.models.unet import UNet


class ControlNets(Mapping[str, ControlNet]):
    """The ControlNets that requests may name: `Control(picture, "canny")`.

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

    def __init__(self, unet: UNet, downscale: int, check_open: Callable[[], None], paused: Callable[[], Any]):
        self._unet, self._downscale, self._check_open, self._paused = unet, downscale, check_open, paused
        self._lock = threading.RLock()
        self._named: dict[str, ControlNet] = {}

    def add(self, source: "str | Path | torch.nn.Module", name: str | None = None) -> str:
        """Load a ControlNet for SDXL and return its name, by default the file's or the folder's.

        source: a diffusers folder, a `.safetensors` file, or a diffusers `ControlNetModel`.

        Raises ModelNotFound and ModelFormatError for what can't be read, AdapterError for networks that don't fit the
        model, InvalidRequest for a name that is taken, EngineClosed once the engine is closed.
        """
        self._check_open()
        if name is None:
            name = type(source).__name__ if isinstance(source, torch.nn.Module) else Path(source).stem
        name = values.text("the name of a ControlNet", name, longest=values.QUOTED, empty=False)
        self._check_free(name)
        network = ControlNet.load(source, self._unet, name)
        if network.downscale != self._downscale:
            raise InvalidRequest(
                f"the ControlNet {values.quoted(name)} makes one latent of {network.downscale}x{network.downscale} "
                f"pixels, but this model's VAE of {self._downscale}x{self._downscale}; give one for this model"
            )
        with self._paused(), self._lock:  # the pause orders the loaded weights before their use on a GPU
            self._check_free(name)
            self._named[name] = network
        return name

    def remove(self, name: str) -> None:
        """Unregister a ControlNet. Raises InvalidRequest if there is none of that name."""
        self._check_open()
        with self._lock:
            del self._named[self[name].name]

    def find(self, name: str | None) -> ControlNet:
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

    def __getitem__(self, name: str) -> ControlNet:
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
        return sum(x.nbytes for network in list(self._named.values()) for x in network.parameters())

    def _check_free(self, name: str) -> None:
        if name in self._named:
            raise InvalidRequest(
                f"a ControlNet named {values.quoted(name)} is already registered; remove it first, or give another "
                "name: engine.controls.add(folder, 'name')"
            )
