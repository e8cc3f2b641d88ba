"""The UNets that the oracle's tests compare."""

import pytest

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
