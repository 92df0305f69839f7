"""The command that draws a stored sample again gives its bytes."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.generate import redraw
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import open_store
from tests.generate.tiny import fill, settings, tiny_card, tiny_model, writer_of


def stored(generation: Generation) -> dict[int, bytes]:
    """Every stored image by index."""
    spec = generation.spec
    return {
        int(key): files[spec.image_format]
        for unit in shards(spec)
        for key, files in read_shard(generation.store.read(unit.key))
    }


def run(command: str) -> str:
    """Run a copied command; what it printed."""
    program, *words = shlex.split(command)
    assert program == "ddpm"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.stdout


CASES = {
    "classes in turn": {"first_index": 7, "seed": 5},
    "two of the classes": {"classes": [2, 0, 0], "image_format": "webp"},
    "drawn classes": {"classes": {"two": 3.0, "nought": 1e-7}, "seed": 2**62, "first_index": 3},
    "no class": {"classes": None, "image_format": "npy", "dtype": "bfloat16"},
    "named timesteps": {"sampler": SamplerConfig(kind="ddim", num_steps=3, timesteps=(40, 20, 3), eta=0.5)},
    "another sampler": {
        "sampler": SamplerConfig(
            kind="dpm++2m",
            num_steps=3,
            spacing="karras",
            karras_rho=6.1,
            guidance_scale=1.7,
            guidance_interval=(1e-05, 3.25),
        ),
        "cpu_threads": 2,
    },
}


@pytest.mark.parametrize("chosen", CASES.values(), ids=CASES)
def test_the_command_of_a_sample_gives_its_bytes(
    chosen: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "the model")
    spec = fill(settings(model, f"file://{tmp_path}/out", **{"count": 13, **chosen}))
    images = stored(Generation(open_store(f"{tmp_path}/out"), spec))
    monkeypatch.chdir(tmp_path)
    # the first of a shard, the middle of a batch, a batch cut by the end of a shard, and one by the end of all
    for offset in (0, 6, 9, 12):
        index = spec.first_index + offset
        common, own = redraw.common_words(spec, str(model)), redraw.own_words(spec, index, spec.batch_size)
        run(f"{common} {own}")
        files = {path.name: path.read_bytes() for path in (tmp_path / f"sample-{index}").iterdir()}
        assert files.pop("grid.png")
        assert files == {f"{index:012d}.{spec.image_format}": images[index]}


def test_a_sample_made_in_a_smaller_micro_batch_is_drawn_in_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model")
    config = settings(model, f"file://{tmp_path}/out", count=10, batch_size=10)
    writer = writer_of(config)
    writer.engine.micro_batch = 3
    unit = writer.generation.shard(0)
    record = writer.write(unit).record
    assert record.times.micro_batch == 3
    calls = [redraw.network_call(writer.engine.spec, index, 3) for index in (0, 5, 9)]
    assert calls == [redraw.NetworkCall(0, 3), redraw.NetworkCall(3, 3), redraw.NetworkCall(9, 1)]
    images = stored(writer.generation)
    monkeypatch.chdir(tmp_path)
    for index in (5, 9):
        spec = writer.engine.spec
        run(f"{redraw.common_words(spec, str(model))} {redraw.own_words(spec, index, 3)}")
        assert (tmp_path / f"sample-{index}/{index:012d}.png").read_bytes() == images[index]


def test_a_registered_model_is_named_by_its_version_and_another_by_its_folder(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", tiny_card(classes=False))
    spec = writer_of(settings(model, f"file://{tmp_path}/out")).engine.spec
    assert f"model={redraw.UNKNOWN_MODEL} " in redraw.common_words(spec)
    assert "model=/a/b " in redraw.common_words(spec, "/a/b")
    registered = spec.model_copy(update={"model": spec.model.model_copy(update={"name": "d", "version": 4})})
    words = redraw.common_words(registered, "/a/b")
    assert words.startswith(
        "ddpm sample model=d/4 seed=0 classes=null sampler.kind=ddim sampler.num_steps=3 "
    )


def test_indexes_outside_the_drawn_ones_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sample", "model=x@y", "count=4", "first_index=8", "only=[7]"])
    assert done.exit_code == 2
    assert "sample: only holds 7, but the images are 8 to 11; change first_index or count" in done.stderr
