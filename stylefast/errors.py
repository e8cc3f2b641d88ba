"""All errors that stylefast raises deliberately, in one hierarchy, so that callers can catch broadly or narrowly.

Messages name the value, the limit and the remedy.
"""


class StyleFastError(Exception):
    """Root of all errors raised by stylefast."""


class InvalidRequest(StyleFastError, ValueError):
    """An argument of a call is out of range, of the wrong shape, or contradicts another."""


class PromptError(InvalidRequest):
    """A prompt is empty where it may not be, too long, or has weights or instructions that are refused."""


class ImageError(InvalidRequest):
    """A picture can't be read, is not what its name claims, or is absurdly large or small."""


class StyleError(InvalidRequest):
    """A style is unknown, incomplete, or does not fit the loaded model."""


class ModelError(StyleFastError):
    """A checkpoint can't be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """Nothing is at the given path, and nothing of that name is cached."""


class ModelFormatError(ModelError):
    """A file is damaged, of another kind, or lacks the keys or shapes of its kind."""


class AdapterError(ModelError):
    """An image adapter or LoRA does not fit the model or its image encoder."""


class NumericsError(StyleFastError):
    """NaN or infinity appeared in the latents of a picture.

    `pictures` holds the numbers of the affected pictures, `loras` names and strengths of the LoRAs that they use.
    """

    def __init__(
        self, *arguments: object, pictures: list[int] | tuple[int, ...] = (), loras: list[str] | tuple[str, ...] = ()
    ):
        super().__init__(*arguments)
        self.pictures, self.loras = tuple(pictures), tuple(loras)


class OutOfMemory(StyleFastError, MemoryError):
    """The request does not fit into the available memory."""


class JobCancelled(StyleFastError):
    """The job was cancelled before its pictures were done."""


class DeadlineExceeded(StyleFastError, TimeoutError):
    """The job's deadline passed before its pictures were done."""


class QueueFull(StyleFastError):
    """More jobs are waiting than the engine accepts; try again later."""


class EngineClosed(StyleFastError):
    """The engine was closed; it accepts and finishes no more jobs."""


class ExportError(StyleFastError):
    """A model can't be exported, or an export is incomplete, altered or truncated."""


class EngineMismatch(ExportError):
    """An exported graph was made for another chip, version, model, type or range of sizes."""


class UntrustedEngine(ExportError):
    """The files of an export are code, and neither their owner nor a digest makes them trusted."""


class MissingDependency(StyleFastError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""
