"""torch.compile takes our UNet whole."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stylefast.models.unet import UNet
from tests.support.fp64 import close, measured
from tests.support.oracle.style_aligned import Sharing
from tests.support.rows import plain_rows, run, share
from tests.support.small_unet import CONFIG, random_inputs, random_unet

pytestmark = pytest.mark.usefixtures("pytorchs_attention")


def test_the_whole_unet_compiles_into_one_graph_that_serves_other_styles_too():
    # every kind of block and two transformer blocks in one: more of each would only be traced again
    config = CONFIG | {
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    ours = UNet.from_state(config, random_unet(config=config).state_dict()).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    inputs = random_inputs(3)
    for sharing in (Sharing((0, 0, 0)), Sharing((0, 0, 2), scale=0.5, shift=0.3, mode="swap")):
        table = share(plain_rows(ours.layout, 3), ours.layout, sharing)
        close(run(compiled, inputs, table), measured(partial(run, table=table), ours, inputs))
    assert counter.frame_count == 1
