"""The networks that tests/speed.py compares are the same."""

import importlib.util

import pytest


def test_pytorchs_network_has_as_many_weights_as_ours():
    if not importlib.util.find_spec("torch"):
        pytest.skip("needs torch, which is not installed")
    import torch

    from tests import speed, speed_pytorch

    with torch.device("meta"):
        peer = speed_pytorch.Network()

    weights = sum(weight.numel() for weight in peer.parameters())
    assert weights == speed.count(speed.two_alexnets(stitched=True))
