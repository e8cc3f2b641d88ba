"""A module that behaves like `tensorrt_rtx` at run time, for the CPU, and a queue in place of a CUDA stream.

Its engines compute `out = x + page_kv_0[rows]`, through the addresses they are given: what a session got wrong about
addresses, shapes or order shows in the numbers.
"""

import ctypes
import json
import math
from contextlib import contextmanager
from enum import Enum, IntEnum
from types import ModuleType, SimpleNamespace

import torch

VERSION = (1, 7, 1, 116)


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity, message):
        raise NotImplementedError


class DataType(Enum):
    FLOAT, HALF, BF16, INT64, FP4 = range(5)


class TensorIOMode(Enum):
    INPUT, OUTPUT = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, USER_MANAGED = range(2)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER = range(2)


class EngineValidity(Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE, INSUFFICIENT_GPU_MEMORY = 1, 2, 32, 16


class SerializationFlag(Enum):
    INCLUDE_REFIT = 0


class LayerInformationFormat(Enum):
    ONELINE = 0


# least, usual and most shape of every input, profile by profile
PROFILES = [
    {"x": [(1, 4), (2, 4), (4, 4)], "page_kv_0": [(1, 4), (2, 4), (8, 4)]},
    {"x": [(1, 4), (8, 4), (64, 4)], "page_kv_0": [(1, 4), (2, 4), (8, 4)]},
]


def plan(profiles=PROFILES, **facts) -> bytes:
    """An engine file. facts: `weights`, `refittable`, `validity`, `causes`, `broken`."""
    body = json.dumps({"profiles": profiles, "weights": {"w": [0.0]}} | facts).encode()
    size = 32 + len(body)
    return b"vtrt" + bytes(12) + size.to_bytes(8, "little") + bytes(VERSION) + b"vtrt" + body


def at(address: int, shape) -> torch.Tensor:
    """The float32 tensor that lies at an address."""
    raw = (ctypes.c_float * math.prod(shape)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.float32).view(shape)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.calls = engine, {}, {}, 0
        self.scratch = self.profile = None

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.facts["profiles"][self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(low <= side <= high for low, side, high in zip(least, shape, most))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        return self.shapes["x"]

    def is_stream_capturable(self, stream):
        return self.engine.facts.get("capturable", True)

    def execute_async_v3(self, stream):
        if self.engine.facts.get("broken"):
            self.engine.logger.log(Severity.ERROR, self.engine.facts["broken"])
            return False
        assert self.scratch[1] >= self.engine.device_memory_size_v2
        self.calls += 1
        # a CUDA graph keeps the addresses that it was recorded with
        addresses, shapes = dict(self.addresses), dict(self.shapes)

        def work():
            rows = shapes["x"][0]
            pages = at(addresses["page_kv_0"], shapes["page_kv_0"])
            x = at(addresses["x"], shapes["x"])
            at(addresses["out"], shapes["x"]).copy_(x + pages[torch.arange(rows) % len(pages)])

        stream_of(stream).put(work)
        return True


class Engine:
    device_memory_size_v2, num_io_tensors = 640, 3

    def __init__(self, facts, logger):
        self.facts, self.logger = facts, logger
        self.num_optimization_profiles = len(facts["profiles"])
        self.refittable = facts.get("refittable", False)
        self.contexts = []

    def get_tensor_name(self, i):
        return ("x", "page_kv_0", "out")[i]

    def get_tensor_dtype(self, name):
        return DataType.FLOAT

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name == "out" else TensorIOMode.INPUT

    def get_tensor_shape(self, name):
        return (-1, 4)

    def get_tensor_profile_shape(self, name, profile):
        return self.facts["profiles"][profile][name]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, how):
        assert how.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def create_engine_inspector(self):
        listing = "Layers:\nName: _gemm_mha_v2_myl1_8, LayerType: kgen, Inputs: []\n"
        return SimpleNamespace(get_engine_information=lambda form: listing)

    def create_serialization_config(self):
        return SimpleNamespace(flags=[], set_flag=lambda flag: None)

    def serialize_with_config(self, config):
        return plan(**self.facts)


class IRuntimeCache:
    def __init__(self):
        self.held = b"compiled"

    def deserialize(self, blob):
        return bytes(blob) == self.held

    def serialize(self):
        return self.held


class RuntimeConfig:
    strategy = cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class Runtime:
    engine_header_size = 32

    def __init__(self, logger):
        self.logger = logger

    def get_engine_validity(self, header):
        return trt.validity

    def deserialize_cuda_engine(self, data):
        try:
            facts = json.loads(data[32:])
        except ValueError:
            self.logger.log(Severity.ERROR, "the plan's checksum is wrong")
            return None
        if facts.get("refused"):
            self.logger.log(Severity.ERROR, facts["refused"])
            return None
        trt.opened = Engine(facts, self.logger)
        return trt.opened


class Refitter:
    def __init__(self, engine, logger):
        self.engine, self.given = engine, {}

    def get_all_weights(self):
        return list(self.engine.facts["weights"])

    def get_weights_prototype(self, name):
        return SimpleNamespace(size=len(self.engine.facts["weights"][name]), dtype=DataType.FLOAT)

    def set_named_weights(self, name, weights):
        self.given[name] = weights
        return True

    def get_missing_weights(self):
        tied = self.engine.facts.get("tied", [])
        return [name for name in tied if name not in self.given] if set(tied) & self.given.keys() else []

    def refit_cuda_engine(self):
        for name, (_, address, count) in self.given.items():
            self.engine.facts["weights"][name] = at(address, (count,)).tolist()
        return True


class CpuQueue:
    """A queue that does its work at once, or keeps it where it is being recorded."""

    def __init__(self):
        self.device, self.handle = torch.device("cpu"), id(self)
        self.recorded, self.recording = 0, None
        _QUEUES[self.handle] = self

    def put(self, work):
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    @contextmanager
    def here(self):
        yield

    @contextmanager
    def ordered(self):
        yield

    def record(self, call):
        self.recording, self.recorded = [], self.recorded + 1
        call()
        work, self.recording = self.recording, None
        return SimpleNamespace(replay=lambda: [step() for step in work])

    def wait(self):
        pass


_QUEUES: dict[int, CpuQueue] = {}


def stream_of(handle: int) -> CpuQueue:
    return _QUEUES[handle]


def fake_tensorrt() -> ModuleType:
    """The module, as `tensorrt_rtx`."""
    for name in (
        "ILogger",
        "DataType",
        "TensorIOMode",
        "ExecutionContextAllocationStrategy",
        "EngineValidity",
        "Runtime",
        "DynamicShapesKernelSpecializationStrategy",
        "EngineInvalidityDiagnostics",
        "IRuntimeCache",
        "Refitter",
        "SerializationFlag",
        "LayerInformationFormat",
    ):
        setattr(trt, name, globals()[name])
    trt.Weights = lambda dtype, address, count: (dtype, address, count)
    trt.validity = (EngineValidity.VALID, 0)
    trt.opened = None
    return trt


trt = ModuleType("tensorrt_rtx")
trt.__version__ = "1.7.1.116"
