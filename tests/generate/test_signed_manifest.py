"""Who can write to the bucket, but has no key, cannot change a signed generation unnoticed."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.download_generation import download_generation
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.layout import MANIFEST_KEY, SIGNATURE_KEY, SUMS_KEY
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.signed_manifest import check_signature, is_signed, sign_stored
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.store import open_store
from tests.generate.inprocess import Driver, MemoryStore, run_alone, without_cluster
from tests.generate.tiny import plan_of, settings, tiny_model

SMALL, LARGE = 15, 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signed")


@pytest.fixture(scope="module")
def key(folder: Path) -> SigningKey:
    return SigningKey.create(folder / "signing.pem")


@pytest.fixture(scope="module", autouse=True)
def signing(folder: Path, key: SigningKey) -> Iterator[None]:
    """Jobs sign, and make their shards in this process."""
    with pytest.MonkeyPatch.context() as patch, without_cluster():
        patch.setenv("DDPM_SIGNING_KEY_FILE", str(folder / "signing.pem"))
        yield


@pytest.fixture(scope="module")
def configs(folder: Path) -> dict[str, GenerateConfig]:
    """A generation, the same with a larger count, and another one."""
    model = tiny_model(folder / "model")
    return {
        "small": settings(model, f"file://{folder}/one", count=SMALL),
        "large": settings(model, f"file://{folder}/one", count=LARGE),
        "other": settings(model, f"file://{folder}/other", count=LARGE, seed=9),
    }


@pytest.fixture(scope="module")
def made(configs: dict[str, GenerateConfig], folder: Path) -> Path:
    """The generation of the larger count in `one`, with `earlier`, its state before, and `other` beside it."""
    for name in ("small", "large", "other"):
        result = generate(configs[name])
        assert result.status == "complete"
        assert (result.signature or "").startswith("by key ")
        if name == "small":
            shutil.copytree(folder / "one", folder / "earlier")
    return folder


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def shard(root: Path, made: Path) -> None:
    change_byte(root / "shards/000001.tar")


def shard_with_its_record_and_entry(root: Path, made: Path) -> None:
    """A forger who keeps the generation consistent: bytes, record and manifest agree."""
    data = bytearray((root / "shards/000001.tar").read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[600] ^= 1
    (root / "shards/000001.tar").write_bytes(bytes(data))
    for name in ("done/000001.json", MANIFEST_KEY, SUMS_KEY):
        text = (root / name).read_text()
        (root / name).write_text(text.replace(before, hashlib.sha256(data).hexdigest()))


def record(root: Path, made: Path) -> None:
    def change(document: dict[str, object]) -> None:
        document["times"] = {**document["times"], "seconds": 1.0}  # type: ignore[dict-item]

    edit(root / "done/000000.json", change)


def manifest(root: Path, made: Path) -> None:
    change = (root / MANIFEST_KEY).read_text().replace('"device_seconds": ', '"device_seconds": 1')
    (root / MANIFEST_KEY).write_text(change)


def manifest_of_another_prefix(root: Path, made: Path) -> None:
    for name in (MANIFEST_KEY, SIGNATURE_KEY, SUMS_KEY):
        shutil.copy(made / "other" / name, root / name)


def everything_of_another_prefix(root: Path, made: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(made / "other", root)


def older_manifest(root: Path, made: Path) -> None:
    for name in (MANIFEST_KEY, SIGNATURE_KEY, SUMS_KEY):
        shutil.copy(made / "earlier" / name, root / name)


def older_manifest_alone(root: Path, made: Path) -> None:
    shutil.copy(made / "earlier" / MANIFEST_KEY, root / MANIFEST_KEY)


def other_key(root: Path, made: Path) -> None:
    thief = made / "thief.pem"
    signer = SigningKey.from_file(thief) if thief.exists() else SigningKey.create(thief)
    shard_with_its_record_and_entry(root, made)
    sign_stored(open_generation(f"file://{root}"), signer)


def stripped(root: Path, made: Path) -> None:
    (root / SIGNATURE_KEY).unlink()


def stripped_with_hashes(root: Path, made: Path) -> None:
    (root / SIGNATURE_KEY).unlink()
    (root / SUMS_KEY).unlink()


def contact_sheet(root: Path, made: Path) -> None:
    change_byte(root / "contact-sheet.png")


def report_page(root: Path, made: Path) -> None:
    page = (root / "report.html").read_text()
    (root / "report.html").write_text(page.replace("</body>", "<p>send money</p></body>"))


def card_in_the_spec(root: Path, made: Path) -> None:
    edit(root / "spec.json", lambda document: document["model"].update(card="0" * 64))  # type: ignore[attr-defined]


def hashes(root: Path, made: Path) -> None:
    change_byte(root / SUMS_KEY)


FORGERIES: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    shard: ("shards/000001.tar", "is not the one that was signed"),
    shard_with_its_record_and_entry: (MANIFEST_KEY, "is not the one that was signed"),
    record: ("done/000000.json", "is not the one that was signed"),
    manifest: (MANIFEST_KEY, "is not the one that was signed"),
    manifest_of_another_prefix: (SIGNATURE_KEY, "was signed for file://"),
    everything_of_another_prefix: (SIGNATURE_KEY, "was signed for file://"),
    older_manifest: (MANIFEST_KEY, "15 samples were signed, but there is proof of 25"),
    older_manifest_alone: (MANIFEST_KEY, "is not the one that was signed"),
    other_key: (SIGNATURE_KEY, "is signed by "),
    stripped: (SIGNATURE_KEY, "is missing: the generation is not signed"),
    stripped_with_hashes: (SIGNATURE_KEY, "is missing: the generation is not signed"),
    contact_sheet: ("contact-sheet.png", "is not the one that was signed"),
    report_page: ("report.html", "is not the one that was signed"),
    card_in_the_spec: ("spec.json", "is not the spec of manifest.json, which is signed"),
    hashes: (SUMS_KEY, "is not the one that was signed"),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.__name__)
def test_a_forgery_is_found_and_its_object_named(
    forgery: Callable[[Path, Path], None], made: Path, key: SigningKey, tmp_path: Path
) -> None:
    root, signed_for = tmp_path / "one", f"file://{made}/one"
    shutil.copytree(made / "one", root)
    assert verify(f"file://{root}", key=key.public, signed_for=signed_for).ok
    forgery(root, made)
    report = verify(f"file://{root}", key=key.public, signed_for=signed_for)
    assert not report.ok
    where, what = FORGERIES[forgery]
    found = [problem.what for problem in report.problems if problem.object == where]
    assert any(text.startswith(what) for text in found), report.problems
    assert all("\n" not in text for text in found)


def test_a_signed_generation_is_sound_where_it_was_signed_and_a_copy_names_its_original(
    made: Path, key: SigningKey, tmp_path: Path
) -> None:
    one = f"file://{made}/one"
    assert verify(one, key=key.public).ok
    assert verify(one).ok
    download_generation(open_generation(one), str(tmp_path / "copy"), False, no_progress)
    (problem,) = verify(f"file://{tmp_path}/copy", key=key.public).problems
    assert problem.what.endswith("of a copy, name the original by --signed-for")
    run = CliRunner().invoke
    words = ["verify", f"file://{tmp_path}/copy", "--key", key.public.text, "--signed-for", one]
    said = run(app, words)
    assert (said.exit_code, f"signed   by key {key.public.key_id}" in said.stdout) == (0, True)
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS_KEY], cwd=tmp_path / "copy", check=True)


def test_a_driver_killed_anywhere_is_continued_to_a_signed_generation(
    configs: dict[str, GenerateConfig], key: SigningKey
) -> None:
    config = configs["small"].model_copy(update={"output": "file:///nowhere"})
    spec: Spec = plan_of(config)[0]
    steps = run_alone(config, {}).steps
    assert [step for step in steps if step.endswith((SIGNATURE_KEY, MANIFEST_KEY))] == [
        f"write {SIGNATURE_KEY}",
        f"write {MANIFEST_KEY}",
    ]
    for place in range(1, len(steps) + 1):
        objects: dict[str, bytes] = {}
        driver = Driver(config, objects, stop_at=place)
        assert driver.start()
        driver.kill()
        store = MemoryStore(objects)
        # nothing half-written looks whole: where there is a manifest, it is signed
        assert MANIFEST_KEY not in objects or is_signed(store, key.public), steps[place - 1]
        result = run_alone(config, objects).result
        assert result is not None
        assert result.status in ("complete", "already complete")
        assert check_signature(Generation(store, spec), key.public).problems == (), steps[place - 1]
        assert set(objects) == {
            *("spec.json", "report.html", "contact-sheet.png", MANIFEST_KEY, SIGNATURE_KEY, SUMS_KEY),
            *("shards/000000.tar", "shards/000001-0005.tar", "done/000000.json", "done/000001-0005.json"),
        }


def test_a_shard_that_was_exchanged_since_it_was_signed_is_not_signed_again(
    made: Path, configs: dict[str, GenerateConfig], tmp_path: Path
) -> None:
    root = tmp_path / "one"
    shutil.copytree(made / "one", root)
    shard_with_its_record_and_entry(root, made)
    shutil.copy(made / "one" / SUMS_KEY, root / SUMS_KEY)
    (root / MANIFEST_KEY).unlink()  # so that the job publishes it again
    with pytest.raises(UserError, match=r"shards/000001\.tar: is not the one that this key signed before"):
        generate(configs["large"].model_copy(update={"output": f"file://{root}"}))
    assert not (root / MANIFEST_KEY).exists()


def test_a_generation_that_was_complete_before_is_signed_only_after_a_look_at_every_byte(
    configs: dict[str, GenerateConfig],
    key: SigningKey,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = f"file://{tmp_path}/unsigned"
    config = configs["small"].model_copy(update={"output": output})
    monkeypatch.delenv("DDPM_SIGNING_KEY_FILE")
    assert generate(config).signature is None
    assert open_store(output).stat(SIGNATURE_KEY) is None
    run = CliRunner().invoke
    assert run(app, ["sign", output]).exit_code == 2
    monkeypatch.setenv("DDPM_SIGNING_KEY_FILE", str(folder / "signing.pem"))
    again = generate(config)
    assert (again.status, (again.signature or "")[:32]) == (
        "already complete",
        "none: it was complete before; `d",
    )
    assert run(app, ["sign", output]).exit_code == 0
    assert verify(output, key=key.public).ok
    assert generate(config).signature == f"by key {key.public.key_id}"
    (tmp_path / "unsigned" / SIGNATURE_KEY).unlink()
    change_byte(tmp_path / "unsigned/shards/000000.tar")
    assert run(app, ["sign", output]).exit_code == 1
    assert open_store(output).stat(SIGNATURE_KEY) is None


def test_a_signature_that_does_not_hold_ends_the_job_in_a_line(
    made: Path, configs: dict[str, GenerateConfig], tmp_path: Path
) -> None:
    root = tmp_path / "one"
    shutil.copytree(made / "one", root)
    with pytest.raises(UserError, match=r"was signed for file://.*; see ddpm verify"):
        generate(configs["large"].model_copy(update={"output": f"file://{root}"}))


def test_the_key_is_in_no_object(made: Path) -> None:
    secret = (made / "signing.pem").read_text().splitlines()[1].encode()
    files = [path for path in (made / "one").rglob("*") if path.is_file()]
    assert len(files) == 12
    assert not any(secret in path.read_bytes() for path in files)
