"""Stored documents that say impossible things are refused in one line, before anything is reckoned with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.generate.heartbeat import make_heartbeat, new_job_id, read_heartbeats, write_heartbeat
from ddpm_pipeline.generate.prefix_spec import find_generation
from ddpm_pipeline.generate.spec import Spec, read_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.nets.model_files import load_card
from ddpm_pipeline.store import Store, open_store
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill(settings(model, f"file://{folder}", count=23))
    return folder


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Store:
    """A complete generation of 23 samples."""
    shutil.copytree(filled, tmp_path / "out")
    return open_store(f"file://{tmp_path}/out")


def change(store: Store, key: str, where: str, value: object) -> None:
    """Set one field, `a.b`, of a stored document, laid out as it was; a string `!…` stands for raw JSON."""
    document: dict[str, Any] = json.loads(store.read(key))
    inner = document
    *path, last = where.split(".")
    for name in path:
        inner = inner[name]
    inner[last] = value
    raw = value[1:] if isinstance(value, str) and value.startswith("!") else None
    text = json.dumps(document, indent=2 if key == "manifest.json" else None)
    if raw is not None:
        text = text.replace(json.dumps(value), raw)
    store.write(key, text.encode())


HOSTILE_SPECS: list[tuple[str, object]] = [
    ("count", 0),
    ("count", -1),
    ("count", 10**12),  # in shards of ten
    ("count", 10**30),
    ("count", "!" + "9" * 5000),
    ("count", "!NaN"),
    ("count", 2.5),
    ("first_index", 10**12),
    ("first_index", -1),
    ("shard_size", 0),
    ("shard_size", 10**9),
    ("batch_size", 0),
    ("batch_size", 10**6),
    ("channels", 0),
    ("channels", 2**40),
    ("size", 2**40),
    ("seed", 2**70),
    ("cpu_threads", 0),
    ("sampler.guidance_scale", "!Infinity"),
    ("sampler.guidance_scale", "!1e999"),
    ("sampler.num_steps", 10**9),
    ("classes.labels", []),
    ("classes.labels", [2**70]),
    ("classes.labels", [-1]),
    ("classes.weights", [0.0, 0.0, 0.0]),
    ("classes.weights", [1.0]),
    ("model.name", "x" * 200_000),
    ("model.name", "a\nb"),
    ("model.sha256", "\x1b[31m"),
    ("model.version", 2**70),
    ("model.name", "!" + DEEP),
    ("model.name", '!"\\ud800"'),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE_SPECS, ids=lambda v: str(v)[:24])
def test_a_hostile_spec_is_refused_in_one_line_by_whoever_reads_it(
    field: str, value: object, store: Store
) -> None:
    change(store, "spec.json", field, value)
    readers: list[Callable[[], object]] = [
        lambda: find_generation(store),
        lambda: generation_status(store.uri),
        lambda: verify(store.uri),
    ]
    for read in readers:
        with pytest.raises(DamageError, match=r"spec\.json: not a spec") as refused:
            read()
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000


HOSTILE_RECORDS: list[tuple[str, object]] = [
    ("bytes", 2**80),
    ("bytes", -1),
    ("count", 2**80),
    ("sha256", "0"),
    ("tally.images", 2**80),
    ("tally.images", 9),
    ("tally.values", 0),
    ("tally.sums", []),
    ("tally.squares", [2**900]),
    ("tally.constant", -3),
    ("classes", {"0": 2**80}),
    ("classes", {"0": 1}),
    ("classes", None),
    ("classes", {"-5": 10}),
    ("times.finished_at", 1e300),
    ("times.finished_at", "!NaN"),
    ("times.seconds", "!Infinity"),
    ("times.attempt", 2**70),
    ("times.worker", "a\nb"),
    ("times.worker", "!" + DEEP),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE_RECORDS, ids=lambda v: str(v)[:24])
def test_a_hostile_record_is_named_by_status_and_verification(
    field: str, value: object, store: Store
) -> None:
    change(store, "done/000001.json", field, value)
    status = generation_status(store.uri)
    assert status.state == "damaged"
    assert len(status.faults) == 1
    assert status.faults[0].startswith("done/000001.json: ")
    report = verify(store.uri)
    assert any("done/000001.json" in problem.what for problem in report.problems)
    assert all("\n" not in problem.what for problem in report.problems)


HOSTILE_MANIFESTS: list[tuple[str, object]] = [
    ("count", 2**80),
    ("num_shards", 10**12),
    ("num_shards", 0),
    ("num_shards", 9),
    ("times.finished_at", 1e300),
    ("times.device_seconds", "!-1e400"),
    ("statistics.channel_mean", [1e300]),
    ("statistics.classes", {"0": 2**90}),
    ("class_names", ["a\nb"]),
    ("class_names", ["x" * 200_000]),
    ("spec.count", 10**12),
    ("class_names", "!" + DEEP),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE_MANIFESTS, ids=lambda v: str(v)[:24])
def test_a_hostile_manifest_is_a_fault(field: str, value: object, store: Store) -> None:
    spec = read_spec(store)
    assert spec is not None
    lines = store.read("manifest.json").splitlines(keepends=True)
    first = lines.index(b'  "shards": [\n')
    head = open_store(f"{store.uri}-head")
    head.write("manifest.json", b"".join(lines[:first]).rstrip(b",\n") + b"\n}\n")
    change(head, "manifest.json", field, value)
    told = head.read("manifest.json").rstrip(b"}\n")
    store.write("manifest.json", told + b",\n" + b"".join(lines[first:]))
    found = check_complete(Generation(store, spec))
    assert not found.complete
    assert found.faults[0].startswith("manifest.json: ")
    assert all("\n" not in fault and len(fault) < 1000 for fault in found.faults)
    assert not verify(store.uri).ok


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("began_at", 1e300),
        ("updated_at", "!Infinity"),
        ("images_made", 2**80),
        ("host", "a\nb\x1b[31m"),
        ("job", "../../spec"),
        ("state", "!" + DEEP),
        ("failed", {"0": 5}),
    ],
)
def test_a_hostile_heartbeat_hides_no_other_and_holds_nobody_up(
    field: str, value: object, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    spec = read_spec(store)
    assert spec is not None
    for job in (new_job_id(), "zz"):
        beat = make_heartbeat(job, spec, "running", began_at=1e9, images_made=3, in_progress=[], failed={})
        write_heartbeat(store, beat)
    change(store, "jobs/zz.json", field, value)
    known = [beat.job for beat in read_heartbeats(store)]
    assert len(known) == (2 if field == "job" else 1)
    assert ("skipped: " in caplog.text) == (field != "job")
    assert generation_status(store.uri).state == "complete"


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e9, -1.0])
def test_guidance_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        SamplerConfig(guidance_scale=scale)


@pytest.mark.parametrize(
    "name", ["cat\ndog", "x" * 200_000, "\x1b]0;title\x07", "a\u2028b", "a\x9bb", "\x7f", ""]
)
def test_class_names_that_cannot_be_shown_are_refused_before_the_work(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    card = json.loads((folder / "model.json").read_bytes())
    (folder / "model.json").write_text(json.dumps({**card, "class_names": [name, "b", "c"]}))
    with pytest.raises(UserError, match="class_names") as refused:
        load_card(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    with pytest.raises(ValueError, match="surrogate"):
        type(tiny_card()).model_validate({**tiny_card().model_dump(), "class_names": ["\ud800", "b", "c"]})


def test_long_class_names_are_cut_in_pictures_and_whole_in_the_manifest(tmp_path: Path) -> None:
    names = ("w" * 256, "b", "<script>alert(1)</script>")
    model = tiny_model(tmp_path / "model", tiny_card().model_copy(update={"class_names": names}))
    config = settings(model, f"file://{tmp_path}/out", count=12)
    spec: Spec = fill(config)
    found = check_complete(Generation(open_store(config.output), spec))
    assert found.manifest is not None
    assert found.manifest.class_names == names
    assert b"<script" not in open_store(config.output).read("report.html")
