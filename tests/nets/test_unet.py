"""The U-Net: published sizes, initial state, conditioning, named dropout, and the ways it is run."""

import pytest
import torch
from torch import Tensor, nn

from ddpm_pipeline.nets import DropoutKeys, UNet, UNetConfig, parameter_count, seeded_init
from ddpm_pipeline.nets.dropout import keyed_dropout
from ddpm_pipeline.nets.layers import GroupNorm32, timestep_embedding

TINY = UNetConfig(
    image_size=8,
    base_channels=16,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=8,
)
RICH = TINY.model_copy(
    update={
        "dropout": 0.2,
        "num_classes": 3,
        "null_class": True,
        "scale_shift_norm": True,
        "resblock_updown": True,
        "head_dim": 8,
    }
)


def awake(config: UNetConfig) -> UNet:
    """A net none of whose layers is zero."""
    net = UNet(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def keys(seed: int = 0, *positions: int) -> DropoutKeys:
    return DropoutKeys(seed, torch.tensor(positions or (0, 1, 2, 3)))


def test_ddpms_networks_have_their_published_sizes() -> None:
    with torch.device("meta"):
        assert parameter_count(UNet(UNetConfig.ddpm_cifar10())) == 35_746_307
        assert parameter_count(UNet(UNetConfig.ddpm_256())) == 113_673_219


@pytest.mark.parametrize("config", [TINY, RICH], ids=["tiny", "rich"])
def test_a_fresh_network_predicts_zero_and_learns_from_its_first_step(config: UNetConfig) -> None:
    net = UNet(config).eval()
    x = torch.randn(2, 3, config.image_size, config.image_size)
    out = net(x, torch.tensor([3, 900]))
    assert out.shape == x.shape
    assert bool((out == 0).all())
    (out - x).square().mean().backward()
    assert float(net.head.weight.grad.abs().max()) > 0


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = seeded_init(TINY, 0), seeded_init(TINY, 0), seeded_init(TINY, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.stem.weight, other.stem.weight)
    with pytest.raises(ValueError, match="seed"):
        seeded_init(TINY, -1)


def test_one_timestep_serves_the_whole_batch_and_fractions_are_heard() -> None:
    net, x = awake(TINY).eval(), images()
    assert torch.equal(net(x, 7), net(x, torch.full((4,), 7)))
    assert torch.equal(net(x, 7), net(x, torch.tensor(7.0)))
    assert not torch.allclose(net(x, 7), net(x, torch.tensor(7.5)))


def test_the_timestep_embedding_knows_both_conventions() -> None:
    t = torch.tensor([0.0, 3.0])
    guided = timestep_embedding(t, 8)
    ddpm = timestep_embedding(t, 8, cos_first=False, freq_shift=1)
    assert guided[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert ddpm[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    slowest = torch.tensor([3 * 10000 ** (-3 / 4), 3 * 10000**-1.0])
    assert torch.allclose(torch.stack([guided[1, 7], ddpm[1, 3]]), slowest.sin(), atol=1e-7)


def test_no_labels_mean_no_class_where_the_network_has_that_label() -> None:
    net, x = awake(RICH).eval(), images()
    assert net.null_label == 3
    assert torch.equal(net(x, 1), net(x, 1, torch.full((4,), 3)))
    assert not torch.allclose(net(x, 1), net(x, 1, torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("changed", "arguments", "named"),
    [
        ({}, {"class_labels": torch.zeros(4, dtype=torch.int64)}, "class_labels"),
        ({"num_classes": 3}, {}, "class_labels"),
        ({"num_classes": 3}, {"class_labels": torch.zeros(3, dtype=torch.int64)}, "class_labels"),
        ({}, {"t": torch.zeros(3)}, "t must"),
        ({}, {"x": torch.zeros(4, 1, 8, 8)}, "x must"),
        ({}, {"x": torch.zeros(4, 3, 8, 7)}, "x must"),
        ({"dropout": 0.1}, {}, "dropout keys"),
    ],
)
def test_bad_arguments_are_named(
    changed: dict[str, object], arguments: dict[str, Tensor], named: str
) -> None:
    net = UNet(TINY.model_copy(update=changed))
    with pytest.raises(ValueError, match=named):
        net(**{"x": images(), "t": torch.zeros(4), **arguments})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"image_size": 6, "multipliers": (1, 1, 1)}, "image_size"),
        ({"base_channels": 24}, "multipliers"),
        ({"attention_resolutions": (5,)}, "attention_resolutions"),
        ({"head_dim": 48}, "head_dim"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 2, "head_dim": 8}, "num_heads"),
        ({"null_class": True}, "null_class"),
        ({"resblock_updown": True, "downsample_padding": 0}, "downsample_padding"),
        ({"out_channels": 4}, "out_channels"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_make_no_network_are_refused_by_name(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        UNetConfig(**settings)


def test_a_config_survives_json_and_its_digest_names_it() -> None:
    assert UNetConfig.model_validate_json(RICH.model_dump_json()) == RICH
    assert UNetConfig(multipliers=(1, 2, 2, 2)).digest() == UNetConfig().digest()
    assert (
        UNetConfig(attention_resolutions=(8, 16)).digest()
        == UNetConfig(attention_resolutions=(16, 8)).digest()
    )
    assert UNetConfig().digest() != UNetConfig(norm_eps=1e-6).digest()


def test_a_sample_keeps_its_masks_in_any_batch_and_another_position_has_others() -> None:
    net, x = awake(RICH).train(), images()
    whole = net(x, 5, dropout=keys())
    alone = net(x[2:3], 5, dropout=keys(0, 2))
    assert torch.allclose(alone, whole[2:3], atol=1e-5)
    assert not torch.allclose(net(x[2:3], 5, dropout=keys(0, 9)), alone, atol=1e-3)
    assert not torch.allclose(net(x[2:3], 5, dropout=keys(1, 2)), alone, atol=1e-3)
    before = torch.get_rng_state()
    net(x, 5, dropout=keys())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_keys_change_nothing_in_eval_mode() -> None:
    net, x = awake(RICH).eval(), images()
    assert torch.equal(net(x, 5, dropout=keys()), net(x, 5))


def test_masks_drop_the_right_share_keep_the_mean_and_are_independent() -> None:
    ones = torch.ones(64, 8, 16, 16)
    positions = torch.arange(64)
    dropped = keyed_dropout(ones, 0.1, DropoutKeys(0, positions), layer=0)
    count = ones.numel()
    assert float((dropped == 0).double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / count) ** 0.5)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.9], rel=1e-4)
    kept = (dropped > 0).double() - 0.9
    others = {
        "layer": keyed_dropout(ones, 0.1, DropoutKeys(0, positions), layer=1),
        "position": keyed_dropout(ones, 0.1, DropoutKeys(0, positions + 1), layer=0),
        "seed": keyed_dropout(ones, 0.1, DropoutKeys(1, positions), layer=0),
        "channel": dropped.roll(1, dims=1),
        "column": dropped.roll(1, dims=3),
        "half of the element's word": dropped.flatten(1).roll(count // 128, dims=1).view_as(dropped),
    }
    for name, other in others.items():
        agreement = float((kept * ((other > 0).double() - 0.9)).mean()) / 0.09
        assert abs(agreement) < 4.5 / count**0.5, name


def test_masks_do_not_depend_on_the_memory_format() -> None:
    x = torch.randn(4, 6, 5, 3)
    plain = keyed_dropout(x, 0.3, keys(), layer=2)
    last = keyed_dropout(x.to(memory_format=torch.channels_last), 0.3, keys(), layer=2)
    assert torch.equal(plain, last)


@pytest.mark.parametrize("config", [TINY, RICH], ids=["tiny", "rich"])
def test_channels_last_and_recomputation_change_nothing_but_memory(config: UNetConfig) -> None:
    def gradients(net: UNet, x: Tensor) -> list[Tensor]:
        net.zero_grad()
        net(x, torch.arange(4), dropout=keys()).square().mean().backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    net, x = awake(config).train(), images()
    plain = gradients(net, x)
    net.checkpoint = True
    recomputed = gradients(net, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    net.to(memory_format=torch.channels_last)
    last = gradients(net, x.to(memory_format=torch.channels_last))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, last, strict=True))


def test_norms_of_a_half_precision_map_are_those_of_float32_rounded_once() -> None:
    norm = GroupNorm32(8, 16)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    half = (images().repeat(1, 6, 1, 1)[:, :16] * 30 + 200).bfloat16()
    wanted = nn.functional.group_norm(half.float(), 8, norm.weight, norm.bias, norm.eps).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(half), wanted)
        with torch.no_grad():
            assert torch.equal(norm(half), wanted)


def test_under_autocast_the_output_is_in_half_precision_and_near() -> None:
    net, x = awake(RICH).eval(), images()
    with torch.no_grad():
        exact = net(x, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x, 5)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_the_network_compiles_without_a_graph_break_and_only_once() -> None:
    """fullgraph=True raises at a break. The graph is run as traced: making machine code of it takes a minute."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    net, x, labels = awake(RICH).train(), images(), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(net, fullgraph=True, backend=keep)
    for seed in (0, 1):
        mine = compiled(x, torch.arange(4), labels, dropout=keys(seed))
        assert torch.allclose(mine, net(x, torch.arange(4), labels, dropout=keys(seed)), atol=1e-5)
    mine.square().mean().backward()
    assert len(graphs) == 1


def test_images_larger_than_configured_pass_through() -> None:
    assert awake(TINY)(torch.randn(1, 3, 16, 24), 3).shape == (1, 3, 16, 24)
