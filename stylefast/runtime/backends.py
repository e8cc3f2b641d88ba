"""What runs a step: the backends by name."""

from stylefast.errors import InvalidRequest
from stylefast.models.unet import UNet
from stylefast.runtime.step import TorchBackend

BACKENDS = ("auto", "torch", "compile")


def check_backend(name: str) -> None:
    """Raise InvalidRequest for a backend that does not exist."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise InvalidRequest(f"backend is {name!r}; there are {', '.join(BACKENDS)}")


def make_backend(name: str, unet: UNet):
    """The backend of a name for a model; "auto" is "torch". Raises InvalidRequest, MissingDependency for "compile"."""
    check_backend(name)
    if name != "compile":
        return TorchBackend(unet)
    # brings the compiler, which takes its time
    from stylefast.runtime.compiled import CompileBackend

    return CompileBackend(unet)
