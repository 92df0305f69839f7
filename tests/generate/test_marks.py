"""Each image of a new generation says that it is synthetic; generations of before stay as they are."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ddpm_pipeline.data.formats.images import decode_image, encode_image
from ddpm_pipeline.data.formats.provenance import TRAINED, Mark, read_mark
from ddpm_pipeline.data.formats.shards import read_shard, write_shard
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.layout import CONTACT_KEY
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.generate.stored_images import stored_images
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import open_store
from tests.generate.inprocess import without_cluster
from tests.generate.tiny import contents, fill, plan_of, settings, tiny_model

STORED = Path(__file__).parents[1] / "compatibility/v0.1.0"
DIGEST_OF_BEFORE = "0b071868706f381c88bcaa5bea512fe0c710753e22dad670f79ffe0797b8ad85"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_each_image_names_its_generation_and_its_sample(
    image_format: str, model: Path, tmp_path: Path
) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=13, first_index=5, image_format=image_format)
    spec, store = fill(config), open_store(config.output)
    for unit in shards(spec):
        for image in stored_images(store.read(unit.key), spec, unit):
            assert read_mark(image.data) == Mark(TRAINED, spec.digest, image.index)
    assert read_mark(store.read(CONTACT_KEY)) == Mark(TRAINED, spec.digest, None)
    assert verify(config.output).ok


def test_arrays_have_no_mark_but_their_contact_sheet_has_one(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=10, image_format="npy")
    spec = fill(config)
    assert verify(config.output).ok
    assert read_mark(open_store(config.output).read(CONTACT_KEY)) == Mark(TRAINED, spec.digest, None)


def test_without_marks_the_digest_and_the_images_are_those_of_before_there_were_any(
    model: Path, tmp_path: Path
) -> None:
    plain = settings(model, f"file://{tmp_path}/plain", count=10, provenance=False)
    spec = fill(plain)
    assert "provenance" not in json.loads(open_store(plain.output).read("spec.json"))
    (unit,) = shards(spec)
    for image in stored_images(open_store(plain.output).read(unit.key), spec, unit):
        with Image.open(io.BytesIO(image.data)) as opened:
            assert "xmp" not in opened.info
    assert plan_of(settings(model, plain.output, count=10))[0].digest != spec.digest


def older(tmp_path: Path) -> str:
    """A copy of a generation that version 0.1.0 stored."""
    shutil.copytree(STORED / "samples", tmp_path / "older")
    return f"file://{tmp_path}/older"


def test_an_older_generation_is_extended_in_its_form(tmp_path: Path) -> None:
    output = older(tmp_path)
    before = contents(open_store(output))
    config = settings(tiny_model(tmp_path / "model"), output, count=37, provenance=None)
    with without_cluster():
        assert generate(config).status == "complete"
    spec = read_spec(open_store(output))
    assert spec is not None
    assert (spec.digest, spec.provenance, spec.count) == (DIGEST_OF_BEFORE, None, 37)
    after = contents(open_store(output))
    for key in ("shards/000000.tar", "shards/000001.tar"):
        assert after[key] == before[key]
    assert verify(output).ok


def test_marks_cannot_be_added_to_a_generation_without_them(model: Path, tmp_path: Path) -> None:
    output = older(tmp_path)
    with without_cluster(), pytest.raises(UserError, match='provenance: null stored, "xmp" requested'):
        generate(settings(model, output, count=37, provenance=True))


def test_a_mark_that_was_removed_is_found_though_record_and_pixels_are_sound(
    model: Path, tmp_path: Path
) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=10)
    spec, store = fill(config), open_store(config.output)
    (unit,) = shards(spec)
    samples = list(read_shard(store.read(unit.key)))
    pixels = decode_image(samples[4][1]["png"], spec.image_shape)
    samples[4][1]["png"] = encode_image(pixels, "png")
    data = write_shard(samples)
    store.write(unit.key, data)
    record = DoneRecord.model_validate_json(store.read(unit.done_key))
    forged = record.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    store.write(unit.done_key, forged.model_dump_json().encode())
    problems = [problem for problem in verify(config.output).problems if problem.object.startswith(unit.key)]
    assert [(problem.object, problem.what) for problem in problems] == [
        (f"{unit.key} sample 000000000004", "has not the mark of a synthetic image of this generation")
    ]


def test_the_command_line_says_what_a_mark_says(model: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    words = [f"model={model}", "count=2", "sampler.kind=ddim", "sampler.num_steps=2", "device=cpu"]
    assert run(app, ["sample", *words, f"output={tmp_path}/look"]).exit_code == 0
    said = run(app, ["inspect", f"{tmp_path}/look/000000000001.png"])
    assert said.exit_code == 0
    assert f"origin   synthetic: {TRAINED}" in said.stdout
    assert "index    1" in said.stdout
    assert "index    several samples" in run(app, ["inspect", f"{tmp_path}/look/grid.png"]).stdout
    assert run(app, ["sample", *words, f"output={tmp_path}/plain", "provenance=false"]).exit_code == 0
    plain = run(app, ["inspect", f"{tmp_path}/plain/grid.png", "--json"])
    assert (plain.exit_code, json.loads(plain.stdout)) == (1, {"synthetic": False})
    missing = run(app, ["inspect", f"{tmp_path}/none.png"])
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
