"""Operations that are counted without running the network."""

from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets.flops import forward_flops, sample_flops


def test_a_forward_pass_is_about_a_third_of_both() -> None:
    net = UNetConfig(image_size=16, base_channels=32, multipliers=(1, 2), num_classes=4, dropout=0.1)
    assert 0.3 < forward_flops(net) / sample_flops(net) < 0.36


def test_ddpms_cifar10_network_has_the_published_count() -> None:
    """6.1 GMACs (Diff-Pruning, Fang et al. 2023, table 1), of two operations each."""
    net = UNetConfig(image_size=32, base_channels=128, multipliers=(1, 2, 2, 2), attention_resolutions=(16,))
    assert 11.5e9 < forward_flops(net) < 12.8e9
