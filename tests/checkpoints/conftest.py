"""A small network that the tests of loading write to files."""

import pytest
import torch

from refine.networks.edm import EDMPrecond


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    kwargs = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8}
    return EDMPrecond(**kwargs, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])
