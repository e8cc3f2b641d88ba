"""The UNets that the oracle's tests compare."""

import pytest

from stylefast.kernels import registry
from stylefast.models.unet import UNet
from tests.support.small_unet import random_unet


@pytest.fixture(scope="module")
def theirs():
    """diffusers' small UNet."""
    return random_unet()


@pytest.fixture(scope="module")
def ours(theirs):
    """Ours on the same weights."""
    return UNet.from_state(dict(theirs.config), theirs.state_dict()).eval()


@pytest.fixture
def pytorchs_attention():
    """Every operation in PyTorch's form, which takes fp64 too."""
    with registry.using("torch"):
        yield
