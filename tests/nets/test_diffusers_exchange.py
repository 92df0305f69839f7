"""Our U-Net against diffusers' UNet2DModel: the same weights give the same function, and move both ways."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, LCMScheduler, UNet2DModel
from torch import Tensor, nn

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.model_card import DistillationInfo
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.diffusion import NoiseSchedule, Stream, sample
from ddpm_pipeline.diffusion.noise import normal
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.diffusers_config import (
    net_from_diffusers,
    net_to_diffusers,
    objective_from_diffusers,
    schedule_from_diffusers,
    scheduler_to_diffusers,
)
from ddpm_pipeline.nets.diffusers_weights import (
    export_diffusers,
    import_diffusers,
    weights_from_diffusers,
    weights_to_diffusers,
)
from ddpm_pipeline.nets.unet import UNet

SMALL = UNetConfig(
    image_size=16,
    base_channels=32,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    norm_groups=8,
)
NETS = {
    "ddpm": SMALL.model_copy(
        update={"downsample_padding": 0, "norm_eps": 1e-6, "time_cos_first": False, "time_freq_shift": 1}
    ),
    "guided": SMALL.model_copy(
        update={
            "head_dim": 16,
            "scale_shift_norm": True,
            "resblock_updown": True,
            "num_classes": 5,
            "multipliers": (1, 1.5, 2),
            "attention_resolutions": (8, 4),
            "num_res_blocks": 2,
            "out_channels": 6,
        }
    ),
    "plain": SMALL.model_copy(update={"attention_resolutions": (), "mid_attention": False}),
    "conv resampling beside attention at the top": SMALL.model_copy(update={"attention_resolutions": (16,)}),
}


def with_random_weights(net: nn.Module) -> nn.Module:
    """Every parameter away from its initial value: zeroed layers would hide what stands before them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        spread = 1 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.3
        parameter.data = parameter.data + spread * torch.randn(parameter.shape, generator=generator)
    return net


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, config.image_size, config.image_size, generator=generator)
    labels = None if config.num_classes is None else torch.tensor([0, 4, 2])
    return x, torch.tensor([0, 17, 999]), labels


def pair(config: UNetConfig) -> tuple[UNet, UNet2DModel]:
    net = UNet(config)
    with_random_weights(net)
    theirs = UNet2DModel(**net_to_diffusers(config))
    theirs.load_state_dict(weights_to_diffusers(net.state_dict()))
    return net, theirs


@pytest.mark.parametrize("name", NETS)
def test_forward_and_gradients_agree_with_diffusers(name: str) -> None:
    config = NETS[name]
    net, theirs = pair(config)
    x, t, labels = inputs(config)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, reference = net(mine, t, labels), theirs(other, t, class_labels=labels).sample
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max().clamp(min=1)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / ours[0].numel() ** 0.5
    (ours * direction).sum().backward()
    (reference * direction).sum().backward()
    gradients = weights_to_diffusers({n: p.grad for n, p in net.named_parameters()})
    for n, p in theirs.named_parameters():
        assert (gradients[n] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max().clamp(min=1), n
    assert (mine.grad - other.grad).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NETS)
def test_a_config_survives_the_way_through_diffusers(name: str) -> None:
    assert net_from_diffusers(net_to_diffusers(NETS[name]), "config.json") == NETS[name]


def test_the_published_ddpm_cifar10_config_is_our_preset() -> None:
    published = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    preset = UNetConfig.ddpm_cifar10()
    assert net_from_diffusers(published, "config.json") == preset.model_copy(update={"dropout": 0.0})


def test_an_exported_directory_loads_in_diffusers_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    config = NETS["guided"].model_copy(update={"null_class": True, "out_channels": 3, "dropout": 0.25})
    net = UNet(config)
    with_random_weights(net).eval()
    schedule = ScheduleConfig(kind="cosine", num_steps=100)
    objective = ObjectiveConfig(target="v", weighting="min-snr", min_snr_gamma=4.0)
    export_diffusers(tmp_path, net, schedule, objective)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    x, t, labels = inputs(config)
    with torch.no_grad():
        theirs = pipeline.unet.eval()(x, t, class_labels=labels).sample
        assert (theirs - net(x, t, labels)).abs().max() < 1e-4
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    back = import_diffusers(tmp_path)
    assert (back.net.config, back.schedule, back.objective) == (config, schedule, objective)
    for name, value in net.state_dict().items():
        assert torch.equal(value, back.net.state_dict()[name]), name


def test_a_distilled_network_draws_the_same_images_with_diffusers_scheduler(tmp_path: Path) -> None:
    config = NETS["guided"].model_copy(update={"null_class": True, "out_channels": 3, "dropout": 0.0})
    net = UNet(config)
    with_random_weights(net).eval()
    schedule, objective = ScheduleConfig(kind="cosine", num_steps=100), ObjectiveConfig(target="v")
    info = DistillationInfo(
        teacher="digits/3",
        teacher_sha256="0" * 64,
        method="consistency distillation",
        sampler=SamplerConfig(kind="dpm++2m", num_steps=20, guidance_scale=1.5),
        steps=600,
    )
    export_diffusers(tmp_path, net, schedule, objective, info)
    assert import_diffusers(tmp_path).distillation == info
    unet, scheduler = (
        UNet2DModel.from_pretrained(tmp_path / "unet"),
        LCMScheduler.from_pretrained(tmp_path / "scheduler"),
    )
    index, shape, labels = torch.arange(3), (3, config.image_size, config.image_size), torch.tensor([0, 2, 1])
    for steps in (1, 2, 4):
        sampler = SamplerConfig(kind="consistency", num_steps=steps)
        table = NoiseSchedule.from_config(schedule)
        ours = sample(net, table, sampler, index, shape, 0, class_labels=labels, objective=objective)
        scheduler.set_timesteps(steps)
        x = normal(0, Stream.SAMPLE_NOISE, index, shape, step=0)
        for k, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                output = unet.eval()(x, t, class_labels=labels).sample
            result = scheduler.step(output, t, x)
            if k + 1 < steps:  # diffusers draws from a generator, so its noise is replaced by ours
                a, s = table.coefficients(int(scheduler.timesteps[k + 1]), x)
                x = a * result.denoised + s * normal(0, Stream.SAMPLE_NOISE, index, shape, step=k + 1)
        assert (result.denoised - ours).abs().max() < 1e-3


def test_a_distilled_network_with_a_learned_variance_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LCMScheduler takes no network that predicts a variance"):
        scheduler_to_diffusers(
            ScheduleConfig(), ObjectiveConfig(target="v", variance="learned"), distilled=True
        )


def test_a_directory_of_diffusers_alone_is_imported(tmp_path: Path) -> None:
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "scaled_linear"}))
    back = import_diffusers(tmp_path)
    assert back.schedule == ScheduleConfig(kind="scaled-linear")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert (back.net(x, 5) - model(x, 5).sample).abs().max() < 1e-5


def test_attention_names_of_old_weights_are_understood() -> None:
    net = UNet(SMALL)
    with_random_weights(net)
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = weights_to_diffusers(net.state_dict())
    for new, before in renames.items():
        old = {name.replace(f".{new}.", f".{before}."): value for name, value in old.items()}
    assert any(".query." in name for name in old)
    back = weights_from_diffusers(old, net.state_dict(), "file")
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"multipliers": (2, 4)}, "multipliers"),
        ({"num_heads": 4, "attention_resolutions": (16, 8)}, "num_heads"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(changed: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        net_to_diffusers(SMALL.model_copy(update=changed))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("act_fn", "gelu"),
        ("time_embedding_type", "fourier"),
        ("class_embed_type", "timestep"),
        ("center_input_sample", True),
        ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("up_block_types", ["AttnUpBlock2D"]),
        ("sample_size", None),
        ("a_later_invention", 3),
        ("_class_name", "UNet2DConditionModel"),
        ("block_out_channels", 64),
        ("block_out_channels", []),
        ("block_out_channels", [0, 64]),
        ("block_out_channels", [64, "128"]),
        ("down_block_types", "DownBlock2D"),
        ("layers_per_block", [2, 2]),
        ("norm_num_groups", None),
        ("dropout", "much"),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"config.json: {name}"):
        net_from_diffusers({**net_to_diffusers(SMALL), name: value}, "config.json")


def test_a_scale_shift_net_without_a_middle_norm_is_refused() -> None:
    theirs = net_to_diffusers(SMALL.model_copy(update={"scale_shift_norm": True}))
    with pytest.raises(UserError, match="attn_norm_num_groups"):
        net_from_diffusers({**theirs, "attn_norm_num_groups": None}, "config.json")


SCHEDULES = [
    ScheduleConfig(num_steps=300, beta_end=0.03),
    ScheduleConfig(kind="scaled-linear", zero_terminal_snr=True),
    ScheduleConfig(kind="cosine", num_steps=50),
    ScheduleConfig(kind="cosine", num_steps=50, cosine_offset=0.02),
    ScheduleConfig(kind="sigmoid", zero_terminal_snr=True),
    ScheduleConfig(kind="given", num_steps=3, betas=(0.1, 0.2, 0.4)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.num_steps}-{s.zero_terminal_snr}")
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
def test_the_process_is_the_same_on_both_sides(schedule: ScheduleConfig, variance: str) -> None:
    objective = ObjectiveConfig(target="v", variance=variance)
    theirs = scheduler_to_diffusers(schedule, objective)
    exact = NoiseSchedule.from_config(schedule).alpha_bars
    # Theirs is made in float32, and where betas near 1 are cut that is all the agreement there can be.
    assert torch.allclose(
        DDPMScheduler.from_config(theirs).alphas_cumprod.double(), exact, rtol=1e-3, atol=1e-6
    )
    back = NoiseSchedule.from_config(schedule_from_diffusers(theirs, "file")).alpha_bars
    assert torch.allclose(back, exact, rtol=1e-9, atol=1e-15)
    net = SMALL.model_copy(update={"out_channels": 6 if variance == "learned" else 3})
    assert objective_from_diffusers(theirs, "file", net) == objective


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow"),
        ("thresholding", True),
        ("variance_type", "learned_range"),
        ("num_train_timesteps", "1000"),
        ("trained_betas", 0.1),
        ("beta_schedule", None),
        ("variance_type", 1),
    ],
)
def test_schedulers_we_cannot_express_are_refused_by_name(name: str, value: object) -> None:
    theirs = {**scheduler_to_diffusers(ScheduleConfig(), ObjectiveConfig()), name: value}

    def read() -> None:
        schedule_from_diffusers(theirs, "file")
        objective_from_diffusers(theirs, "file", SMALL)

    with pytest.raises(UserError, match=f"file: {name}"):
        read()


def export_small(directory: Path) -> None:
    export_diffusers(directory, UNet(SMALL), ScheduleConfig(), ObjectiveConfig())


def test_notes_that_disagree_with_the_diffusers_files_are_refused(tmp_path: Path) -> None:
    export_small(tmp_path)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(UserError, match=r"ddpm\.json"):
        import_diffusers(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":', "[1]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    export_small(tmp_path)
    (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not (a )?JSON"):
        import_diffusers(tmp_path)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    export_small(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="safe_serialization"):
        import_diffusers(tmp_path)


def test_torn_weights_are_damage(tmp_path: Path) -> None:
    export_small(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamageError, match="diffusion_pytorch_model"):
        import_diffusers(tmp_path)


def test_a_missing_or_extra_tensor_is_named() -> None:
    net = UNet(SMALL)
    theirs = weights_to_diffusers(net.state_dict())
    stem = theirs.pop("conv_in.weight")
    with pytest.raises(DamageError, match=r"conv_in\.weight is missing"):
        weights_from_diffusers(theirs, net.state_dict(), "file")
    theirs |= {"conv_in.weight": stem, "skip.weight": stem}
    with pytest.raises(DamageError, match=r"skip\.weight"):
        weights_from_diffusers(theirs, net.state_dict(), "file")
