import logging
import subprocess
import sys

import pytest
import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency
from stylefast.export.tensorrt import (
    check_buildable,
    forwarder,
    load_package,
    package_of,
    plan_header,
    present_target,
    torch_dtype,
)


@pytest.mark.parametrize(
    ("targets", "package"),
    [
        (["sm89"], "tensorrt_rtx"),
        (["sm89", "sm120", "sm75"], "tensorrt_rtx"),
        (["sm80"], "tensorrt_rtx"),
        (["sm90"], "tensorrt"),
        (["sm100"], "tensorrt"),
    ],
)
def test_a_target_takes_the_package_that_needs_no_gpu_if_there_is_one(targets, package):
    assert package_of(targets) == package


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["sm70"], "sm70"),
        ([], "name one chip"),
        ("sm89", "name one chip"),
        (["sm89", "sm89"], "twice"),
        (["sm89", "sm90"], "one GPU that is present"),
    ],
)
def test_targets_that_nothing_builds_for_are_refused(targets, named):
    with pytest.raises(InvalidRequest, match=named):
        package_of(targets)


def test_the_data_centre_package_builds_only_for_the_gpu_at_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineMismatch, match="sm90 was asked for, and no GPU is present"):
        check_buildable("tensorrt", ["sm90"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert present_target() == "sm90"
    check_buildable("tensorrt", ["sm90"])
    with pytest.raises(EngineMismatch, match="sm100 was asked for, and sm90 is present"):
        check_buildable("tensorrt", ["sm100"])


def test_a_refittable_engine_says_that_it_takes_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_buildable("tensorrt_rtx", ["sm89"])
    with pytest.raises(EngineMismatch, match="refittable engine takes a GPU"):
        check_buildable("tensorrt_rtx", ["sm89"], refittable=True)


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_a_package_that_is_missing_is_named_with_what_brings_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=r"pip install 'stylefast\[export\]'"):
        load_package(package)


def test_the_header_of_an_engine_tells_package_version_and_size():
    head = b"vtrt" + bytes(12) + (1000).to_bytes(8, "little") + bytes([1, 7, 1, 116]) + b"vtrt"
    assert plan_header(head) == ("tensorrt_rtx", "1.7.1.116", 1000)
    assert plan_header(b"ftrt" + head[4:])[0] == "tensorrt"
    with pytest.raises(ExportError, match="truncated"):
        plan_header(head[:31])
    with pytest.raises(ExportError, match="no TensorRT engine"):
        plan_header(b"PK\x03\x04" + head[4:])


def test_the_logger_forwards_and_keeps_errors_and_the_listing_of_layers(caplog):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = forwarder(trt)
    severity = trt.ILogger.Severity
    with caplog.at_level(logging.DEBUG, "stylefast.export.tensorrt"):
        logger.log(severity.VERBOSE, "a detail")
        logger.log(severity.VERBOSE, "Layers:\nName: a, LayerType: gemm, ")
        logger.log(severity.WARNING, "a remark")
        for i in range(20):
            logger.log(severity.ERROR, f"fault {i}\n")
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] + 20 * [logging.ERROR]
    assert logger.layers == ["Layers:\nName: a, LayerType: gemm, "]
    assert logger.last_errors().startswith("fault 12 | ") and logger.last_errors().endswith("fault 19")
    assert forwarder(trt).last_errors() == "TensorRT gave no reason"


def test_types_of_tensors_are_told_and_others_refused():
    trt = pytest.importorskip("tensorrt_rtx")
    assert torch_dtype(trt, trt.DataType.BF16) is torch.bfloat16
    assert torch_dtype(trt, trt.DataType.INT64) is torch.int64
    with pytest.raises(ExportError, match="FP4"):
        torch_dtype(trt, trt.DataType.FP4)


def test_nothing_of_tensorrt_is_imported_with_the_modules_themselves():
    names = ", ".join(f"stylefast.export.tensorrt{part}" for part in ("", "_build", "_session", "_plugin"))
    check = f"import sys, {names}; sys.exit(any(name.startswith('tensorrt') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", check], check=True)
