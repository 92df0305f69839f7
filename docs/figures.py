"""Draw the images of docs/diffusion.md and docs/distillation.md: forward and reverse process, noise schedules, errors
of the samplers, trajectories.

    python -m docs.figures [FOLDER] [--image PHOTO]

Everything is computed by the functions that train and sample, with named randomness: the same command draws the same
images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.data.formats.contact_sheet import image_grid, in_rows
from ddpm_pipeline.diffusion import NoiseSchedule, SamplerStep, Stream, from_uint8, sample, to_uint8
from ddpm_pipeline.diffusion.ideal import Mixture, three_blobs
from ddpm_pipeline.diffusion.multistep import dpm_solver_pp_2m
from ddpm_pipeline.diffusion.noise import normal
from ddpm_pipeline.diffusion.objective import Net
from ddpm_pipeline.diffusion.sampler_protocol import Denoise
from ddpm_pipeline.diffusion.samplers import ddim, heun
from ddpm_pipeline.diffusion.timesteps import SamplingGrid, grid_at, karras_grid, trailing_timesteps
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.telemetry.terminal import echo

IMAGES = Path(__file__).parent / "images" / "diffusion"
Pixels = NDArray[np.uint8]

_FORWARD_TIMES = (0, 50, 100, 200, 400, 700, 999)
_REVERSE_STEPS = 60
_REVERSE_STRIP = 8
_GAP = 4
_BLUE, _ORANGE, _GREEN, _RED = "#3b6fb6", "#d9822b", "#4d9a5b", "#b5484b"


def figures(
    image: Pixels | None,
    out_dir: Path,
    *,
    net: Net | None = None,
    schedule: NoiseSchedule | None = None,
    objective: ObjectiveConfig | None = None,
    shape: tuple[int, int, int] = (1, 8, 8),
    class_labels: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw all pictures into `out_dir` (made if need be) and return their paths.

    image: uint8 (H, W, 3) for the forward process; None takes scikit-learn's photograph of a Chinese palace.
    net: a network for the reverse process, with the `schedule` and `objective` it was trained for, its images'
    `shape` and, where it has classes, the labels to draw, int64 (8,). None takes the perfect denoiser of the 1,797
    digits of scikit-learn, which needs no training.
    Raises: UserError naming image if it is not uint8 RGB.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    schedule = schedule or NoiseSchedule.linear()
    net = net or digits_net(schedule)
    steps: list[Callable[[], list[Path]]] = [
        lambda: [_save(forward_strip(photograph(image), schedule, seed), out_dir / "forward.png")],
        lambda: draw_reverse(
            net, schedule, objective or ObjectiveConfig(), shape, seed, out_dir, class_labels
        ),
        lambda: [draw_schedules(out_dir / "schedules.png")],
        lambda: [draw_orders(out_dir / "orders.png", seed)],
        lambda: [draw_trajectories(out_dir / "trajectories.png")],
    ]
    paths: list[Path] = []
    for done, step in enumerate(steps, start=1):
        paths += step()
        if progress is not None:
            progress(done, len(steps))
    return paths


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = IMAGES,
    image: Annotated[Path | None, typer.Option(help="RGB image for the forward process.")] = None,
) -> None:
    """Draw every image."""
    with progress_of("figures", "images") as progress:
        paths = figures(None if image is None else _read(image), folder, progress=progress)
    for path in paths:
        echo(f"drew     {path}")


def _read(image: Path) -> Pixels:
    try:
        with Image.open(image) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {image}: cannot be read as an image ({error})") from None


def photograph(image: Pixels | None, size: int = 128) -> Pixels:
    """The middle square of an RGB image, (size, size, 3)."""
    pixels = np.asarray(load_sample_image("china.jpg")) if image is None else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"image: {pixels.dtype} {pixels.shape} is not uint8 (height, width, 3); give an RGB image"
        )
    edge = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - edge) // 2, (pixels.shape[1] - edge) // 2
    square = Image.fromarray(pixels[top : top + edge, left : left + edge])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def forward_strip(image: Pixels, schedule: NoiseSchedule, seed: int) -> Pixels:
    """x_t of one image and one noise at seven timesteps, left to right, the clean image first."""
    x0 = from_uint8(torch.from_numpy(image.copy())).permute(2, 0, 1)[None]
    noise = normal(seed, Stream.GRID, torch.zeros(1, dtype=torch.int64), tuple(x0.shape[1:]))
    times = [round(t / 999 * (schedule.T - 1)) for t in _FORWARD_TIMES[1:]]
    noisy = [schedule.add_noise(x0, noise, t) for t in times]
    return panel(torch.cat([x0, *noisy]), columns=len(noisy) + 1)


def digits_net(schedule: NoiseSchedule, std: float = 0.12) -> Net:
    """The perfect denoiser of scikit-learn's digits, each blurred by a Gaussian of `std` so that they blend."""
    pixels = torch.from_numpy(np.asarray(load_digits().data)).double() / 8 - 1  # pyright: ignore[reportAttributeAccessIssue]
    count = len(pixels)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    return Mixture(weights, pixels, torch.full((count,), std, dtype=torch.float64)).net(schedule)


def panel(images: Tensor, columns: int, scale: int = 1) -> Pixels:
    """Float images (B, C, H, W) in [-1, 1] side by side on white, `columns` a row; uint8 (H', W', 3)."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return image_grid(in_rows(list(pixels), columns), cell=scale * pixels.shape[1], gap=_GAP, margin=0)


def draw_reverse(
    net: Net,
    schedule: NoiseSchedule,
    objective: ObjectiveConfig,
    shape: tuple[int, int, int],
    seed: int,
    out_dir: Path,
    class_labels: Tensor | None = None,
) -> list[Path]:
    """The ancestral chain as a strip (x_t above, the network's image below) and as an animation."""
    seen: list[SamplerStep] = []
    sampler = SamplerConfig(num_steps=min(_REVERSE_STEPS, schedule.T))
    index = torch.arange(8)
    image = sample(net, schedule, sampler, index, shape, seed, class_labels, objective, on_step=seen.append)
    scale = max(1, 64 // shape[1])
    states = [*[step.x for step in seen], image]
    guesses = [*[step.x0 for step in seen], image]
    chosen = np.linspace(0, len(states) - 1, _REVERSE_STRIP).round().astype(int).tolist()
    strip = torch.cat([states[k][:1] for k in chosen] + [guesses[k][:1] for k in chosen])
    strip_path = _save(panel(strip, _REVERSE_STRIP, scale), out_dir / "reverse.png")
    frames = [
        panel(torch.cat([x, g]), len(index), scale // 2 or 1) for x, g in zip(states, guesses, strict=True)
    ]
    return [strip_path, _animate(frames, out_dir / "reverse.gif")]


def _animate(frames: Sequence[Pixels], path: Path) -> Path:
    """A GIF of grey-level frames, the last one held for two seconds."""
    grey = [
        Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for frame in frames
    ]
    durations = [70] * (len(grey) - 1) + [2000]
    grey[0].save(path, save_all=True, append_images=grey[1:], duration=durations, loop=0, optimize=True)
    return path


def draw_schedules(path: Path) -> Path:
    """abar and log SNR of the schedules, T = 1000."""
    schedules = {
        "linear": (NoiseSchedule.linear(), _BLUE),
        "scaled linear": (NoiseSchedule.scaled_linear(), _ORANGE),
        "cosine": (NoiseSchedule.cosine(), _GREEN),
        "sigmoid": (NoiseSchedule.sigmoid(), _RED),
    }
    figure, (left, right) = _panels(2)
    for name, (schedule, colour) in schedules.items():
        left.plot(schedule.alpha_bars.numpy(), label=name, color=colour)
        right.plot(10 * schedule.snr().log10().numpy(), label=name, color=colour)
    left.set(xlabel="t", ylabel=r"$\bar\alpha_t$, power of the image", xlim=(0, 999), ylim=(0, 1))
    right.set(xlabel="t", ylabel="signal-to-noise ratio, dB", xlim=(0, 999), ylim=(-60, 45))
    left.legend(frameon=False)
    return _write(figure, path)


def draw_orders(path: Path, seed: int = 0, exact_steps: int = 1000) -> Path:
    """Mean error of a sample against the number of network evaluations, for a perfect denoiser.

    256 samples of three Gaussian blobs; the error is the distance from where `exact_steps` of Heun's method lead.
    """
    schedule, blobs = NoiseSchedule.linear(), three_blobs()
    x = normal(seed, Stream.SAMPLE_NOISE, torch.arange(256), (2,)).double()

    def run(method: Callable[[Denoise, Tensor, SamplingGrid], Tensor], num_steps: int) -> Tensor:
        grid = karras_grid(schedule, num_steps)
        return method(blobs.denoise(grid), x, grid)

    exact = run(heun, exact_steps)
    figure, (axes,) = _panels(1)
    methods = {
        "DDIM": (ddim, 1, _BLUE),
        "DPM-Solver++(2M)": (dpm_solver_pp_2m, 1, _ORANGE),
        "Heun": (heun, 2, _GREEN),
    }
    steps = [10, 20, 40, 80, 160]
    for name, (method, evaluations, colour) in methods.items():
        errors = [float((run(method, n) - exact).norm(dim=1).mean()) for n in steps]
        slope = np.polyfit(np.log(steps[2:]), np.log(errors[2:]), 1)[0]
        label = f"{name}: order {-slope:.2f}"
        axes.loglog([evaluations * n for n in steps], errors, "o-", label=label, color=colour, markersize=4)
    axes.set(xlabel="network evaluations", ylabel="mean error of a sample")
    axes.legend(frameon=False)
    return _write(figure, path)


def draw_trajectories(path: Path, num_steps: int = 400) -> Path:
    """Where noise goes: the trajectories of a perfect network for images of one pixel, -0.6 or 0.6, and what one
    evaluation makes of each noise: the teacher's mean of all images, and the end of the trajectory."""
    schedule = NoiseSchedule.cosine()
    halves = torch.full((2,), 0.5, dtype=torch.float64)
    pixel = Mixture(halves, torch.tensor([[-0.6], [0.6]]).double(), torch.full((2,), 0.08).double())
    grid = grid_at(schedule, trailing_timesteps(schedule.T, num_steps))
    noise = torch.linspace(-2.4, 2.4, 241, dtype=torch.float64)[:, None]
    seen: list[SamplerStep] = []
    ends = ddim(pixel.denoise(grid), noise, grid, on_step=seen.append)
    figure, (left, right) = _panels(2)
    states = torch.stack([*[step.x for step in seen], ends])[..., 0].numpy()
    times = [*grid.timesteps, 0]
    for column in range(1, 241, 14):
        color = _BLUE if ends[column] < 0 else _ORANGE
        left.plot(times, states[:, column], color=color, linewidth=1)
    left.set(xlabel="t", ylabel="the pixel", xlim=(999, 0))
    right.plot(noise[:, 0], ends[:, 0], color=_GREEN, label="student: the end of the trajectory")
    right.plot(noise[:, 0], seen[0].x0[:, 0], color=_RED, label="teacher: the mean of all images")
    right.set(xlabel="noise, the pixel at t = 999", ylabel="the image after one evaluation", ylim=(-1, 1))
    right.legend(frameon=False)
    return _write(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * count, 3.4), layout="constrained", dpi=110)
    panels = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def _write(figure: Figure, path: Path) -> Path:
    # No date or version inside: the same figures are the same bytes.
    with mpl.rc_context({"font.size": 10}):
        figure.savefig(path, metadata={"Software": None})
    return path


def _save(pixels: Pixels, path: Path) -> Path:
    Image.fromarray(pixels).save(path, optimize=True)
    return path


if __name__ == "__main__":
    typer.run(main)
