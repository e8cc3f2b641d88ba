"""Triton's `config.pbtxt` of a model: written from frozen dataclasses, and read back.

Covers only what our repository uses. `max_batch_size` is 0 throughout: rows, pages and masks of a UNet call have
separate counts, so no first dimension is "the batch"; the denoising loop does the batching, because it knows the steps.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stylefast.errors import InvalidRequest, ModelFormatError
from stylefast.export.triton_repo.pbtxt import Enum, as_list, read_text, write_text

# torch's type name -> Triton's
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
KINDS = ("KIND_AUTO", "KIND_CPU", "KIND_GPU")
TIMEOUT_ACTIONS = ("REJECT", "DELAY")
# platforms of servers that include the backend; our own Python models use the backend "python"
PLATFORMS = ("onnxruntime_onnx", "tensorrt_plan")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidRequest(f"{what} is {value!r}; there are {', '.join(known)}")


def _whole(what: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(f"{what} is {value!r}; it must be a whole number of at least {least}")


@dataclass(frozen=True)
class TensorConfig:
    """Input or output: `dims` as numbers, -1 for varying ones. Raises InvalidRequest."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def __post_init__(self):
        _one_of(f"data_type of {self.name}", self.data_type, tuple(DATA_TYPES.values()))
        if any(isinstance(d, bool) or not isinstance(d, int) or d < -1 for d in self.dims) or not self.dims:
            raise InvalidRequest(f"dims of {self.name} are {self.dims!r}; each is a whole number, or -1 if it varies")

    def message(self) -> dict[str, Any]:
        optional = {"optional": True} if self.optional else {}
        return {"name": self.name, "data_type": Enum(self.data_type), "dims": list(self.dims)} | optional

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "TensorConfig":
        _known("a tensor", message, ("name", "data_type", "dims", "optional"))
        dims = tuple(as_list(message["dims"]))
        return cls(message["name"], str(message["data_type"]), dims, bool(message.get("optional", False)))


@dataclass(frozen=True)
class InstanceGroup:
    """Number and place of a model's copies: `gpus` are those of KIND_GPU, empty for all."""

    kind: str = "KIND_CPU"
    count: int = 1
    gpus: tuple[int, ...] = ()

    def __post_init__(self):
        _one_of("kind of an instance group", self.kind, KINDS)
        _whole("count of an instance group", self.count, 1)
        if self.gpus and self.kind != "KIND_GPU":
            raise InvalidRequest(f"gpus are {self.gpus!r} for {self.kind}; only KIND_GPU has them")

    def message(self) -> dict[str, Any]:
        gpus = {"gpus": list(self.gpus)} if self.gpus else {}
        return {"kind": Enum(self.kind), "count": self.count} | gpus

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "InstanceGroup":
        _known("an instance group", message, ("kind", "count", "gpus"))
        return cls(str(message["kind"]), message.get("count", 1), tuple(as_list(message.get("gpus"))))


@dataclass(frozen=True)
class QueuePolicy:
    """Limits of a queue: its length, and the waiting time before `action`; requests may override the time."""

    max_queue_size: int = 64
    timeout_microseconds: int = 60_000_000
    action: str = "REJECT"

    def __post_init__(self):
        _whole("max_queue_size", self.max_queue_size, 1)
        _whole("timeout_microseconds", self.timeout_microseconds, 1)
        _one_of("action of a queue policy", self.action, TIMEOUT_ACTIONS)

    def message(self) -> dict[str, Any]:
        return {
            "timeout_action": Enum(self.action),
            "default_timeout_microseconds": self.timeout_microseconds,
            "allow_timeout_override": True,
            "max_queue_size": self.max_queue_size,
        }

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "QueuePolicy":
        _known("a queue policy", message, tuple(cls().message()))
        if message.get("allow_timeout_override") is not True:
            raise ModelFormatError("config.pbtxt: allow_timeout_override must be true")
        return cls(message["max_queue_size"], message["default_timeout_microseconds"], str(message["timeout_action"]))


@dataclass(frozen=True)
class Warmup:
    """Request of zeros that a model answers before it counts as ready; `inputs` have no varying dims."""

    name: str
    inputs: tuple[TensorConfig, ...]

    def __post_init__(self):
        for tensor in self.inputs:
            if min(tensor.dims) < 1:
                raise InvalidRequest(f"warm-up {self.name}: {tensor.name} has dims {tensor.dims}; each must be above 0")

    def message(self) -> dict[str, Any]:
        inputs = [
            {"key": t.name, "value": {"data_type": Enum(t.data_type), "dims": list(t.dims), "zero_data": True}}
            for t in self.inputs
        ]
        return {"name": self.name, "batch_size": 1, "inputs": inputs}

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "Warmup":
        _known("a warm-up", message, ("name", "batch_size", "inputs"))
        inputs = []
        for entry in as_list(message.get("inputs")):
            _known("an input of a warm-up", entry["value"], ("data_type", "dims", "zero_data"))
            value = entry["value"]
            inputs.append(TensorConfig(entry["key"], str(value["data_type"]), tuple(as_list(value["dims"]))))
        return cls(message["name"], tuple(inputs))


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of one model of the repository.

    platform: one of PLATFORMS, or "python" for a model.py. file: what a platform loads. parameters: strings for a
    model.py.
    """

    name: str
    platform: str
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    instances: tuple[InstanceGroup, ...] = (InstanceGroup(),)
    queue: QueuePolicy = QueuePolicy()
    warmups: tuple[Warmup, ...] = ()
    decoupled: bool = False
    file: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRequest(f"a model's name is {self.name!r}; letters, digits, '_', '-' and '.' make one")
        _one_of(f"platform of {self.name}", self.platform, (*PLATFORMS, "python"))
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names) or not self.inputs or not self.outputs:
            raise InvalidRequest(f"{self.name} needs inputs and outputs with different names, not {', '.join(names)}")

    def to_pbtxt(self) -> str:
        """Return the text of config.pbtxt."""
        runs = {"backend": "python"} if self.platform == "python" else {"platform": self.platform}
        message: dict[str, Any] = {"name": self.name} | runs | {"max_batch_size": 0}
        if self.file:
            message["default_model_filename"] = self.file
        message["input"] = [tensor.message() for tensor in self.inputs]
        message["output"] = [tensor.message() for tensor in self.outputs]
        message["instance_group"] = [group.message() for group in self.instances]
        message["version_policy"] = {"latest": {"num_versions": 1}}
        # a dynamic batcher with batches of one request, because only its scheduler has a queue policy
        message["dynamic_batching"] = {"default_queue_policy": self.queue.message()}
        if self.decoupled:
            message["model_transaction_policy"] = {"decoupled": True}
        message["model_warmup"] = [warmup.message() for warmup in self.warmups]
        message["parameters"] = [
            {"key": key, "value": {"string_value": value}} for key, value in self.parameters.items()
        ]
        return write_text(message)

    @classmethod
    def from_pbtxt(cls, text: str) -> "ModelConfig":
        """Parse the text of `to_pbtxt`. Raises ModelFormatError for other text, InvalidRequest for invalid values."""
        message = read_text(text)
        try:
            return cls._of(message)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(f"config.pbtxt is none of stylefast's: {type(error).__name__} {error}") from error

    @classmethod
    def _of(cls, message: Mapping[str, Any]) -> "ModelConfig":
        _known(
            "a model",
            message,
            (
                "name",
                "backend",
                "platform",
                "max_batch_size",
                "default_model_filename",
                "input",
                "output",
                "instance_group",
                "version_policy",
                "dynamic_batching",
                "model_transaction_policy",
                "model_warmup",
                "parameters",
            ),
        )
        if message["max_batch_size"] != 0 or message["version_policy"] != {"latest": {"num_versions": 1}}:
            raise ModelFormatError("config.pbtxt has another max_batch_size or version_policy than stylefast writes")
        return cls(
            name=message["name"],
            platform=message.get("backend") or message["platform"],
            inputs=tuple(map(TensorConfig.of, as_list(message["input"]))),
            outputs=tuple(map(TensorConfig.of, as_list(message["output"]))),
            instances=tuple(map(InstanceGroup.of, as_list(message["instance_group"]))),
            queue=QueuePolicy.of(message["dynamic_batching"]["default_queue_policy"]),
            warmups=tuple(map(Warmup.of, as_list(message.get("model_warmup")))),
            decoupled=message.get("model_transaction_policy", {}).get("decoupled", False),
            file=message.get("default_model_filename", ""),
            parameters={entry["key"]: entry["value"]["string_value"] for entry in as_list(message.get("parameters"))},
        )


def _known(what: str, message: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    unknown = sorted(set(message) - set(fields))
    if unknown:
        raise ModelFormatError(f"config.pbtxt: {what} has a field {unknown[0]!r} that stylefast does not write")


__all__ = ["DATA_TYPES", "InstanceGroup", "ModelConfig", "QueuePolicy", "TensorConfig", "Warmup"]
