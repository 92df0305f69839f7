"""Verification finds each kind of damage and names the object; a sound generation passes."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from typer.testing import CliRunner

from ddpm_pipeline.data.formats.shards import read_shard, write_shard
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.regenerate import regenerate
from ddpm_pipeline.generate.spec import pretty, read_spec
from ddpm_pipeline.generate.verification import VerifyReport, verify
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import Store, open_store
from tests.commands import ddpm
from tests.effort import is_long
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

T = TypeVar("T")
R = TypeVar("R")
SHARD = "shards/000001.tar"
RECORD = "done/000001.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def uri(model: Path, tmp_path: Path) -> str:
    found = f"file://{tmp_path}/out"
    fill(settings(model, found, count=23))
    return found


def found_in(report: VerifyReport, key: str) -> str:
    return " | ".join(problem.what for problem in report.problems if problem.object.startswith(key))


def test_a_sound_generation_passes_and_everything_is_counted(uri: str) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(uri, lambda done, total, note="": seen.append((done, total)))
    assert report.ok, report.problems
    assert (report.shards_checked, report.samples_checked, report.duplicates) == (3, 23, 0)
    assert seen[-1] == (3, 3)


def in_other_processes(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """A parallel map all of whose arguments and results are pickled, as between processes."""
    for item in items:
        yield pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(work))(pickle.loads(pickle.dumps(item)))))


def test_shards_checked_in_other_processes_give_the_same_report(uri: str) -> None:
    store = open_store(uri)
    store.write(SHARD, store.read(SHARD)[:700])
    here, there = verify(uri), verify(uri, shard_map=in_other_processes)
    assert not here.ok
    here.seconds = there.seconds = 0.0
    assert there == here


def test_thousands_of_samples_are_exactly_as_many(tmp_path: Path) -> None:
    count = 10_000 if is_long() else 2_500
    model = tiny_model(tmp_path / "model", tiny_card(size=8))
    sampler = {"kind": "ddim", "num_steps": 1}
    output = f"file://{tmp_path}/out"
    fill(settings(model, output, count=count, shard_size=999, batch_size=333, sampler=sampler))
    keys = [
        key
        for info in open_store(output).list("shards/")
        for key, _ in read_shard(open_store(output).read(info.key))
    ]
    assert keys == [f"{index:012d}" for index in range(count)]
    report = verify(output)
    assert (report.ok, report.samples_checked) == (True, count), report.problems[:5]


def flip_a_byte(store: Store) -> None:
    data = bytearray(store.read(SHARD))
    data[len(data) // 2] ^= 1
    store.write(SHARD, bytes(data))


def drop_a_sample(store: Store) -> None:
    samples = list(read_shard(store.read(SHARD)))
    store.write(SHARD, write_shard(samples[:3] + samples[4:]))


def swap_two_samples(store: Store) -> None:
    samples = list(read_shard(store.read(SHARD)))
    (a, first), (b, second), *rest = samples
    store.write(SHARD, write_shard([(a, second), (b, first), *rest]))


def copy_a_sample(store: Store) -> None:
    samples = list(read_shard(store.read(SHARD)))
    samples[2] = (samples[2][0], {"png": samples[3][1]["png"], "json": samples[2][1]["json"]})
    store.write(SHARD, write_shard(samples))


def flatten_an_image(store: Store) -> None:
    import numpy as np

    from ddpm_pipeline.data.formats.images import encode_image

    samples = list(read_shard(store.read(SHARD)))
    samples[2][1]["png"] = encode_image(np.zeros((4, 4, 1), np.uint8), "png")
    store.write(SHARD, write_shard(samples))


def tear_an_image(store: Store) -> None:
    samples = list(read_shard(store.read(SHARD)))
    samples[2][1]["png"] = samples[2][1]["png"][:30]
    store.write(SHARD, write_shard(samples))


def nest_without_end(store: Store) -> None:
    samples = list(read_shard(store.read(SHARD)))
    samples[2][1]["json"] = b"[" * 100_000
    store.write(SHARD, write_shard(samples))


def change_the_record(store: Store) -> None:
    document = json.loads(store.read(RECORD))
    document["tally"]["sums"][0] += 1
    store.write(RECORD, json.dumps(document).encode())


def foreign_record(store: Store) -> None:
    document = json.loads(store.read(RECORD))
    store.write(RECORD, json.dumps(document | {"spec_digest": "0" * 64}).encode())


def change_the_manifest(store: Store) -> None:
    manifest = store.read("manifest.json")
    changed = json.loads(manifest)["shards"][1]["sha256"].encode()
    store.write("manifest.json", manifest.replace(changed, b"0" * 64))


def cut_the_manifest(store: Store) -> None:
    manifest = store.read("manifest.json")
    last = json.loads(manifest)["shards"][2]["key"].encode()
    store.write("manifest.json", manifest[: manifest.index(last)])


def write(key: str) -> Callable[[Store], None]:
    return lambda store: store.write(key, b"x") and None


DAMAGE: dict[str, tuple[Callable[[Store], None], str, str]] = {
    "flipped byte": (flip_a_byte, SHARD, "sha256 is"),
    "lost object": (lambda store: store.delete(SHARD), SHARD, "missing, though"),
    "lost record": (lambda store: store.delete(RECORD), RECORD, "missing, though"),
    "torn shard": (lambda store: store.write(SHARD, store.read(SHARD)[:700]) and None, SHARD, "bytes"),
    "lost sample": (drop_a_sample, SHARD, "9 samples where the plan has 10; missing 000000000013"),
    "swapped samples": (swap_two_samples, f"{SHARD} sample 000000000010", "its json says"),
    "copied sample": (copy_a_sample, "shards/", "1 images have the same pixels as another one"),
    "flat image": (flatten_an_image, f"{SHARD} sample 000000000012", "has one value per channel"),
    "torn image": (tear_an_image, f"{SHARD} sample 000000000012", "image header does not decode"),
    "endless json": (nest_without_end, f"{SHARD} sample 000000000012", "its json says no JSON"),
    "changed sums": (change_the_record, SHARD, "the statistics of its images"),
    "foreign record": (foreign_record, SHARD, "spec_digest is 0000"),
    "changed manifest": (change_the_manifest, "manifest.json", "its entry of shards/000001.tar"),
    "torn manifest": (
        lambda store: store.write("manifest.json", b"{") and None,
        "manifest.json",
        "not a manifest",
    ),
    "cut manifest": (cut_the_manifest, "manifest.json", "not a manifest: shards.2"),
    "foreign shard": (write("shards/000009.tar"), "shards/000009.tar", "belongs to no shard"),
    "foreign object": (write("notes.txt"), "notes.txt", "is not part of a generation"),
    "foreign object at the end": (write("zzz/notes.txt"), "zzz/notes.txt", "is not part of a generation"),
    "left-over tail": (
        write("done/000001-0004.json"),
        "done/000001-0004.json",
        "left over from a smaller count",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_object_named(kind: str, uri: str) -> None:
    harm, key, what = DAMAGE[kind]
    harm(open_store(uri))
    report = verify(uri)
    assert not report.ok
    assert what in found_in(report, key), report.problems


def test_samples_made_again_have_the_same_bytes(uri: str, model: Path) -> None:
    report = verify(uri)
    regenerate(report, 23, str(model))
    assert report.regenerated == 23
    assert report.ok, report.problems


def test_an_altered_sample_is_found_when_made_again(uri: str, model: Path) -> None:
    copy_a_sample(open_store(uri))
    report = verify(uri)
    before = report.num_problems
    regenerate(report, 23, str(model))
    assert report.num_problems == before + 1
    assert "differs when sampled again" in found_in(report, f"{SHARD} sample 000000000012")


@pytest.mark.parametrize("kind", ["torn shard", "torn image", "lost record", "lost object", "flipped byte"])
def test_making_samples_again_goes_on_past_damage(kind: str, uri: str, model: Path) -> None:
    DAMAGE[kind][0](open_store(uri))
    report = verify(uri)
    regenerate(report, 23, str(model))
    assert report.regenerated == 23
    assert not report.ok
    assert ddpm("verify", uri, "--regenerate", "23", "--model", str(model)) == 1


def test_samples_are_not_made_again_with_another_network(uri: str, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the network of this generation"):
        regenerate(verify(uri), 1, str(other))
    with pytest.raises(UserError, match="name it with --model"):
        regenerate(verify(uri), 1)


def test_an_unfinished_generation_is_not_sound_but_not_damaged_either(uri: str) -> None:
    store = open_store(uri)
    for key in ("manifest.json", RECORD):
        store.delete(key)
    report = verify(uri)
    assert (report.ok, report.complete, report.num_problems) == (False, False, 0)
    assert any("1 of 3 shards are not done yet" in note for note in report.notes)


def test_a_raised_count_leaves_the_old_manifest_valid_and_says_so(uri: str) -> None:
    store = open_store(uri)
    spec = read_spec(store)
    assert spec is not None
    raised = spec.model_copy(update={"count": 40})
    store.write("spec.json", pretty(raised.model_dump(mode="json")))
    report = verify(uri)
    assert not report.complete
    assert any("the manifest is that of 23 samples" in note for note in report.notes)


def test_a_prefix_without_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no spec\.json found"):
        verify(f"file://{tmp_path}/none")


def test_the_command_answers_with_its_exit_code(
    uri: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [uri, "--regenerate", "4", "--model", str(model)]
    assert ddpm("verify", *words) == 0
    assert "sound and complete" in capsys.readouterr().out
    answer = CliRunner().invoke(app, ["verify", *words])
    assert (answer.exit_code, "remade   4 samples" in answer.output) == (0, True)
    drop_a_sample(open_store(uri))
    assert ddpm("verify", uri, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert any(problem["object"] == SHARD for problem in document["problems"])
    assert ddpm("verify", f"file://{tmp_path}/none") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_it_says_what_to_do_and_damage_can_be_given_up_to_be_made_again(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(uri)
    flip_a_byte(store)
    store.write("notes.txt", b"x")
    assert ddpm("verify", uri) == 1
    said = capsys.readouterr().out
    assert "next     move away objects that do not belong to the generation, such as notes.txt" in said
    assert f"next     ddpm verify {uri} --discard-damaged" in said
    assert ddpm("verify", uri, "--discard-damaged") == 1
    said = capsys.readouterr().out
    assert "note     the records of 1 damaged shards are deleted" in said
    assert "next     the same `ddpm generate` command (count=23) makes what is missing" in said
    assert store.stat(RECORD) is None
    assert store.stat("done/000000.json") is not None
