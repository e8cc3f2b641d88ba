"""Every error that stylefast raises on purpose: one tree, so a caller can catch as wide or as narrow as it likes.

Messages name the value, the limit and the way out.
"""


class StyleFastError(Exception):
    """Root of all errors raised by stylefast."""


class InvalidRequest(StyleFastError, ValueError):
    """An argument of a call is out of range, of the wrong shape, or contradicts another."""


class PromptError(InvalidRequest):
    """A prompt is empty where it may not be, or a style token falls beyond the text encoder's window."""


class ImageError(InvalidRequest):
    """A picture can't be read, is not what its name claims, or is absurdly large or small."""


class StyleError(InvalidRequest):
    """A style is unknown, incomplete, or does not fit the loaded model."""


class ModelError(StyleFastError):
    """A checkpoint can't be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """Nothing is at the given path, and nothing of that name is cached."""


class ModelFormatError(ModelError):
    """A file is damaged, foreign, or holds other keys or shapes than its kind demands."""


class AdapterError(ModelError):
    """An image adapter or LoRA does not fit the model or its image encoder."""


class NumericsError(StyleFastError):
    """NaN or infinity appeared in the latents of a picture; `pictures` are the numbers of those concerned."""

    def __init__(self, *arguments, pictures=()):
        super().__init__(*arguments)
        self.pictures = tuple(pictures)


class OutOfMemory(StyleFastError, MemoryError):
    """The request does not fit into the memory at hand."""


class JobCancelled(StyleFastError):
    """The job was cancelled before its pictures were done."""


class DeadlineExceeded(StyleFastError, TimeoutError):
    """The job's deadline passed before its pictures were done."""


class QueueFull(StyleFastError):
    """More jobs wait than the engine takes; try again later."""


class EngineClosed(StyleFastError):
    """The engine was closed, and takes and finishes no more jobs."""


class ExportError(StyleFastError):
    """A model can't be exported, or an export is incomplete, altered or truncated."""


class EngineMismatch(ExportError):
    """An exported engine was made for another chip, version, model, type or range of sizes."""


class UntrustedEngine(ExportError):
    """An engine file is code, and nobody vouched for this one."""


class MissingDependency(StyleFastError, ImportError):
    """An optional package is needed for this feature; the message names the extra that brings it."""
