"""Refitting of TensorRT engines: new weights, such as a merged LoRA, without another build."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest
from stylefast.export.tensorrt_api import forwarder, load_package, open_engine, package_of_plan, present_target
from stylefast.export.tensorrt_build import write_whole


def refit(
    engine_path: str | Path,
    weights: str | Path | Mapping[str, torch.Tensor],
    out: str | Path | None = None,
    *,
    trt: ModuleType | None = None,
) -> tuple[str, ...]:
    """Put new weights into an engine; return the names of all its refittable weights, which are ONNX's initialisers.

    weights: an ONNX file of the same graph, all of whose weights are used, or the changed tensors by name, with the
    shape and type of the initialiser, which the exporter may have transposed. out: path of the new engine; None
    overwrites `engine_path`, whose hash then differs from the manifest's. The engine can be refitted again. trt: the
    package, if not the file's.

    Runs on torch's current CUDA device. Raises EngineMismatch without one, for an engine built for another chip, and
    for one not built to be refitted; InvalidRequest for names, sizes and types that the engine does not have;
    ExportError for missing weights, and a full disk.
    """
    engine_path = Path(engine_path)
    package = package_of_plan(engine_path)
    if trt is None:
        trt = load_package(package)
        if present_target() is None:
            raise EngineMismatch("an engine is refitted on a GPU like the one that it is for, and none is present")
    logger = forwarder(trt)
    runtime, engine = open_engine(trt, logger, engine_path)
    if not engine.refittable:
        raise EngineMismatch(f"{engine_path.name} was not built to be refitted; build it with refittable=True")
    refitter = trt.Refitter(engine, logger)
    names = tuple(refitter.get_all_weights())
    if isinstance(weights, Mapping):
        held = _set(trt, logger, refitter, names, weights)
    else:
        held = _set_from_onnx(trt, logger, refitter, Path(weights))
    missing = refitter.get_missing_weights()
    if missing:
        raise ExportError(f"with these weights others must change too: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():
        raise ExportError(f"TensorRT could not refit {engine_path.name}: {logger.last_errors()}")
    del held
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    write_whole(Path(out) if out is not None else engine_path, engine.serialize_with_config(config))
    del refitter, engine, runtime
    return names


def _set(trt: ModuleType, logger, refitter, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> list:
    """Set the weights; return the tensors that must stay alive until the engine is refitted."""
    types = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
    held = []
    for name, tensor in weights.items():
        if name not in names:
            raise InvalidRequest(f"the engine has no weights {name!r}; it has {len(names)}, such as {names[0]!r}")
        prototype = refitter.get_weights_prototype(name)
        dtype = types.get(tensor.dtype)
        if prototype.size != tensor.numel() or dtype is None or prototype.dtype != getattr(trt.DataType, dtype):
            raise InvalidRequest(
                f"{name} takes {prototype.size} elements of {prototype.dtype}, not {tensor.numel()} of {tensor.dtype}"
            )
        tensor = tensor.detach().cpu().contiguous()
        held.append(tensor)
        if not refitter.set_named_weights(name, trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())):
            raise ExportError(f"TensorRT refuses the weights {name!r}: {logger.last_errors()}")
    return held


def _set_from_onnx(trt: ModuleType, logger, refitter, path: Path) -> list:
    if not path.is_file():
        raise ExportError(f"there is no graph at {path}; run `stylefast export onnx`, or check the path")
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(path)):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ExportError(f"{path.name} does not fit the engine: {'; '.join(found) or logger.last_errors()}")
    return [parser]


__all__ = ["refit"]
