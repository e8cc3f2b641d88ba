"""Choosing a backend: order, reasons, and what STYLEFAST_KERNELS forces."""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from stylefast import kernels
from stylefast._extension import extension
from stylefast.errors import InvalidRequest
from stylefast.kernels import registry
from stylefast.kernels.shared_attention import Affine, Pool, References


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    # a run as on a lesser CPU leaves out the C++ forms, which is remembered
    monkeypatch.delenv("STYLEFAST_CPU", raising=False)
    forget = registry._without_extension.cache_clear
    forget()
    yield
    forget()


def _x(dtype=torch.float32, width=32):
    return torch.randn(2, 5, 2, width).to(dtype)


def _chosen(name, *arguments):
    return registry.choose(registry.operation(name), arguments)[0]


def test_on_a_cpu_the_cpp_form_goes_first_and_says_why_triton_did_not(monkeypatch):
    monkeypatch.setattr(registry, "_without_triton", lambda kind, index: "no GPU here")
    backend, reason = registry.choose(registry.operation("shared_attention"), (_x(),) * 3)
    assert (backend, reason) == ("cpp", "not triton: no GPU here")


@pytest.mark.parametrize("dtype, width", [(torch.float64, 32), (torch.float32, 48)], ids=["float64", "head size 48"])
def test_what_the_kernels_do_not_know_runs_in_torch_and_the_reason_names_it(dtype, width):
    backend, reason = registry.choose(registry.operation("shared_attention"), (_x(dtype, width),) * 3)
    assert backend == "torch"
    assert ("float64" if dtype == torch.float64 else "48") in reason


def test_a_missing_extension_leaves_everything_working_and_is_named(monkeypatch):
    monkeypatch.setattr(registry, "_without_extension", lambda: "the C++ extension could not be imported")
    backend, reason = registry.choose(registry.operation("shared_attention"), (_x(),) * 3)
    assert backend == "torch" and "could not be imported" in reason
    assert kernels.shared_attention(_x(), _x(), _x()).isfinite().all()


@pytest.mark.parametrize("setting", ["torch", "shared_attention=torch", "cpp,shared_attention=torch", " torch , "])
def test_the_variable_forces_torch(monkeypatch, setting):
    monkeypatch.setenv(registry.VARIABLE, setting)
    assert _chosen("shared_attention", _x()) == "torch"


def test_every_operation_has_every_form_so_a_backend_alone_forces_them_all(monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "cpp,geglu=torch")
    assert all(set(operation.forms) == set(registry.FORMS) for operation in registry._operations.values())
    assert _chosen("token_stats", [_x()]) == _chosen("layer_norm", _x()) == "cpp"
    assert _chosen("geglu", _x()) == "torch"


def test_an_exception_alone_leaves_the_others_to_choose(monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "geglu=torch")
    assert (_chosen("geglu", _x()), _chosen("layer_norm", _x())) == ("torch", "cpp")


def spied(monkeypatch, name="geglu"):
    """Return the operation, and the forms that run and the checks of values that are made from now on."""
    operation, calls = registry.operation(name), []
    monkeypatch.setattr(operation, "_choices", {})
    for form in ("torch", "cpp"):
        whole = operation.forms[form]
        note = lambda *given, form=form, whole=whole: calls.append(form) or whole(*given)  # noqa: E731
        monkeypatch.setitem(operation.forms, form, note)
    monkeypatch.setattr(operation, "values", lambda *arguments: calls.append("values"))
    monkeypatch.setattr(operation, "traceable", operation.forms["torch"])
    return operation, calls


def test_run_takes_the_chosen_form_without_dispatcher_and_checks(monkeypatch):
    operation, calls = spied(monkeypatch)
    monkeypatch.setattr(operation, "op", None)
    for dtype in (torch.float32, torch.float64, torch.float32):  # the choice is kept by type
        operation.run(_x(dtype))
    assert calls == ["cpp", "torch", "cpp"]
    assert operation.run(_x()[:0]).shape == (0, 5, 2, 16) and calls[3:] == []


def test_run_is_call_where_a_form_or_checks_are_asked_for_or_a_gradient_is_needed(monkeypatch):
    operation, calls = spied(monkeypatch)
    with registry.using("torch"):
        operation.run(_x())
    monkeypatch.setenv("STYLEFAST_CHECKS", "1")
    operation.run(_x())
    monkeypatch.delenv("STYLEFAST_CHECKS")
    operation.run(_x().requires_grad_()).sum().backward()
    monkeypatch.setenv(registry.VARIABLE, "geglu=torch")
    operation.run(_x())
    assert calls == ["values", "torch", "values", "cpp", "values", "torch", "values", "torch"]


def test_run_is_the_custom_op_while_something_traces():
    operation = registry.operation("geglu")
    traced = make_fx(operation.run, tracing_mode="fake")(_x())
    assert "stylefast.geglu.default" in traced.code
    torch._dynamo.reset()
    compiled = torch.compile(operation.run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x := _x()), operation.run(x))


def test_from_run_to_the_launch_of_the_kernel_are_two_calls(monkeypatch):
    pytest.importorskip("triton", reason="needs the triton package")
    from stylefast.kernels.gpu import shared_attention_pointers as pointers

    operation, names = registry.operation("shared_attention"), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: names.extend(frame.name for frame in traceback.extract_stack())

    monkeypatch.setattr(pointers, "pointers_kernel", Kernel())
    references = References(*torch.zeros(2, 2, 1).long(), *torch.zeros(2, 2, 1))._replace(mode=torch.zeros(2).long())
    operation.run(_x(), _x(), _x(), references, None, None, form="triton")
    start = len(names) - 1 - names[::-1].index("run")
    assert names[start : start + 3] == ["run", "shared_attention", "launch"] and len(names) == start + 4


def test_groups_are_flattened_for_the_custom_op_and_put_together_again():
    operation, x = registry.operation("shared_attention"), _x()
    references, affine = References(*[x] * 4), Affine(x, x)
    for given in ((x, x, x, references, affine, None), (x, x, x, references, None, Pool(x, x, x, x))):
        flat = operation.flat(given)
        assert len(flat) == len(operation.op._schema.arguments) == 14 and flat[7] is None
        assert operation.grouped(flat) == given


def test_the_variable_changes_what_runs(monkeypatch):
    calls = []
    operation = registry.operation("shared_attention")
    monkeypatch.setitem(operation.forms, "torch", lambda q, *rest: calls.append("torch") or q.clone())
    monkeypatch.setitem(operation.forms, "cpp", lambda *rest: calls.append("cpp"))
    for setting in ("torch", "cpp"):
        monkeypatch.setenv(registry.VARIABLE, setting)
        kernels.shared_attention(_x(), _x(), _x())
    assert calls == ["torch", "cpp"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("cuda", "names the form 'cuda'; there are triton, cpp, torch"),
        ("attention=cpp", "names the operation 'attention'; there are adain_affine"),
        ("torch,cpp", "forces everything to torch and to cpp; name one"),
        ("=cpp", "names the operation ''"),
    ],
)
def test_a_setting_that_makes_no_sense_is_an_error(monkeypatch, setting, message):
    monkeypatch.setenv(registry.VARIABLE, setting)
    with pytest.raises(InvalidRequest, match=message):
        kernels.shared_attention(_x(), _x(), _x())


def test_forcing_what_cannot_run_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "shared_attention=cpp")
    with pytest.raises(InvalidRequest, match="forces shared_attention to cpp, which can't run here: head size 48"):
        kernels.shared_attention(*[_x(width=48)] * 3)


def test_forcing_triton_without_a_gpu_is_an_error_that_says_why(checkout):
    program = "import torch, stylefast.kernels as K; K.geglu(torch.randn(2, 4))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {registry.VARIABLE: "triton", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=checkout)
    assert run.returncode == 1
    assert "forces geglu to triton, which can't run here: the tensors are on cpu" in run.stderr


def test_the_innermost_use_wins_and_ends_with_its_block(monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "torch")
    with registry.using("cpp"):
        assert _chosen("shared_attention", _x()) == "cpp"
        with registry.using("torch", "shared_attention"):
            assert _chosen("shared_attention", _x()) == "torch"
    assert _chosen("shared_attention", _x()) == "torch"


def test_the_report_names_a_backend_and_a_reason_for_every_refusal(monkeypatch):
    monkeypatch.setattr(registry, "_without_triton", lambda kind, index: "no GPU here")
    rows = {row["operation"]: row for row in registry.report("cpu")}
    assert set(rows) == set(registry._operations)
    assert rows["shared_attention"]["form"] == "cpp"
    assert rows["geglu"]["refused"] == {"triton": "no GPU here"}


def test_the_report_shows_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(registry, "_without_triton", lambda kind, index: "no GPU here")
    monkeypatch.setenv(registry.VARIABLE, "triton")
    row = next(row for row in registry.report("cpu") if row["operation"] == "geglu")
    assert row["form"] is None and "can't run here: no GPU here" in row["reason"]


def test_info_prints_the_table(monkeypatch, capsys):
    from stylefast.cli import main

    monkeypatch.setenv(registry.VARIABLE, "guided_step=torch")
    assert main(["info", "--json"]) == 0
    rows = {row["operation"]: row for row in json.loads(capsys.readouterr().out)["operations"]}
    assert rows["shared_attention"]["form"] == "cpp"
    assert rows["guided_step"]["reason"] == f"forced by {registry.VARIABLE}=guided_step=torch"


def test_the_extension_of_this_checkout_is_built():
    # every C++ form would otherwise be left out of the tests without a word
    assert extension() is not None
