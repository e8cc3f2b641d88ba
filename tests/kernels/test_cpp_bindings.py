"""What the C++ extension says of this CPU, and the tensors that its kernels refuse."""

import pytest
import torch

from stylefast._extension import extension
from stylefast.kernels import geglu as geglu_public
from stylefast.kernels.adain import affine_operation as adain_affine
from stylefast.kernels.geglu import operation as geglu
from stylefast.kernels.group_norm_silu import Norm, NormPages
from stylefast.kernels.group_norm_silu import operation as group_norm
from stylefast.kernels.guided_step import operation as guided_step
from stylefast.kernels.layer_norm import add_operation
from stylefast.kernels.layer_norm import operation as layer_norm
from stylefast.kernels.shared_attention import FP8, Affine, Pool, References
from stylefast.kernels.shared_attention import operation as shared_attention
from tests.kernels.conformance import NEEDS_EXTENSION
from tests.kernels.test_guided_step import case

pytestmark = NEEDS_EXTENSION
Q = torch.zeros(2, 3, 1, 32)
TABLE = References(torch.full((2, 1), -1), torch.zeros(2).long(), torch.ones(2, 1), torch.zeros(2, 1))


def refused(match):
    return pytest.raises(ValueError, match=match)


def test_the_features_found_contain_what_the_kernels_use():
    features = extension().cpu_features()
    assert set(features) <= {"avx2", "fma", "f16c", "avx512", "avx512_bf16"}
    assert extension().instruction_set() in ("", *features)


@pytest.mark.parametrize("name", ["sse", "avx512_bf17", "AVX2"])
def test_an_unknown_instruction_set_is_refused_with_those_there_are(monkeypatch, name):
    usable = extension().instruction_set()
    monkeypatch.setenv("STYLEFAST_CPU", name)
    with refused(f"STYLEFAST_CPU is '{name}'.*{usable or 'none'}"):
        extension().instruction_set()
    with refused("STYLEFAST_CPU"):
        shared_attention.run(Q, Q, Q, TABLE, None, None, form="cpp")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 3, 1, 48), k=torch.zeros(2, 3, 1, 48), v=torch.zeros(2, 3, 1, 48)), "head size is 48"),
        (dict(k=torch.zeros(2, 4, 1, 32)), "k does not have the shape"),
        (dict(v=Q.half()), "v does not have the type"),
        (dict(q=torch.zeros(2, 3, 1, 64)[..., ::2]), "stride 2 between channels"),
        (dict(q=Q.double()), "Double"),
        (dict(pool=Pool(*[torch.zeros(1, 3, 1, 32).to(FP8)] * 2)), "pool_k_scale is missing"),
        (dict(table=TABLE._replace(bias=torch.zeros(2, 2))), "bias must be"),
        (dict(affine=Affine(torch.ones(3, 2, 1, 32), None)), "offset is missing"),
        (dict(table=TABLE._replace(mode=torch.tensor([0, 3]))), "mode is 3, but it must be from 0 to 2"),
        (dict(table=TABLE._replace(mode=torch.tensor([0, -1]))), "mode is -1"),
    ],
)
def test_attention_refuses_tensors_that_no_kernel_takes(change, message):
    given = dict(q=Q, k=Q, v=Q, table=TABLE, affine=None, pool=None) | change
    with refused(message):
        shared_attention.run(*given.values(), form="cpp")


def test_the_other_kernels_refuse_arguments_that_do_not_fit():
    x, six = torch.ones(2, 6, 3, 3), torch.ones(6)

    def norm(groups=2, weight=six, bias=six, pool=(None, None), count=0):
        return group_norm.run(x, Norm(groups, weight, bias, 1e-5, True), NormPages(None, *pool, count), form="cpp")

    with refused("6 channels can't be split into 4 groups"):
        norm(groups=4)
    with refused("weight does not have the shape .*5.* instead of .*6"):
        norm(weight=torch.ones(5))
    with refused("bias must be Float"):
        norm(bias=torch.ones(6).half())
    with refused("neither contiguous nor channels last"):
        turned = torch.ones(2, 6, 3, 4).transpose(1, 2)
        extension().group_norm_silu(turned, 1, six[:3], six[:3], 1e-5, True, None, None, None, 0, turned.clone())
    with refused("memory format"):
        last = x.contiguous(memory_format=torch.channels_last)
        extension().group_norm_silu(x, 2, six, six, 1e-5, True, None, None, None, 0, last)
    with refused("pool_variance is missing"):
        norm(pool=(torch.zeros(1, 2), None), count=1)
    with refused("pool_elements is 0"):
        norm(pool=(torch.zeros(1, 2), torch.ones(1, 2)))
    with refused("even last dimension"):
        geglu.run(torch.ones(2, 5), form="cpp")
    with refused("x is Double, which no kernel takes"):
        geglu.run(torch.ones(2, 6).double(), form="cpp")
    with refused("out is Half, unlike the input"):
        extension().geglu(torch.ones(2, 6), torch.ones(2, 3).half())
    with refused("out has no evenly spaced rows"):
        extension().geglu(torch.ones(2, 6), torch.ones(2, 6)[:, ::2])
    with refused("residual does not have x's type"):
        add_operation.run(torch.ones(2, 4), torch.ones(2, 4).half(), torch.ones(4), torch.ones(4), 1e-5, form="cpp")
    with refused("at least one channel"):
        extension().layer_norm(torch.ones(3, 0), torch.ones(0), torch.ones(0), 1e-5, torch.ones(3, 0))
    with refused("noise does not have the shape"):
        given = tuple((case() | {"noise": torch.zeros(5, 4, 7, 4)}).values())
        guided_step.run(*guided_step.grouped(given), form="cpp")
    with refused("next_latents does not have the type of what it replaces"):
        latents, anchor, history, *others = case().values()
        extension().guided_step(latents, anchor, history, *others, latents.half(), anchor.clone(), history.clone())


def test_public_functions_take_the_cpp_form_and_empty_tensors_are_left_alone():
    x = torch.randn(2, 9, 48)
    assert torch.equal(geglu_public(x), geglu.run(x, form="cpp"))
    assert layer_norm.run(torch.empty(2, 0, 8), torch.ones(8), torch.ones(8), 1e-5, form="cpp").numel() == 0
    extension().geglu(torch.empty(0, 6), torch.empty(0, 3))
    none = torch.empty(2, 0, 3, 8)
    extension().adain_affine(none, none, torch.empty(0).long(), torch.empty(0, 2), None, None, none, none)
    assert adain_affine.run(none, none, torch.empty(0).long(), torch.empty(0, 2), None, None, True)[0].numel() == 0
