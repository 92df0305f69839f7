"""Shards that others made, or that `ddpm pack` made, indexed as they are: nothing is lost or renamed in silence."""

import io
import tarfile
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.build_index import build_index, plan_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.jobs import dataset
from ddpm_pipeline.store import FileStore, ObjectInfo, open_store
from tests.data.making import encoded, folder, random_image, sample

PNG = encoded(random_image(1))


def labels(uri: str) -> list[int]:
    return [found.label for found in read_sequential(load_index(uri))]


@pytest.fixture
def packed(uri: str, tmp_path: Path) -> PackConfig:
    """A pack of two classes in three shards."""
    config = PackConfig(source=str(folder(tmp_path / "in", {"cat": 6, "dog": 6})), dest=uri, shard_size=4)
    pack(config)
    return config


@pytest.mark.parametrize("fresh", [False, True])
def test_indexing_a_pack_keeps_its_class_names_and_its_digest(packed: PackConfig, fresh: bool) -> None:
    before = load_index(packed.dest)
    plan_index(packed.dest, reuse=not fresh).build()
    after = load_index(packed.dest)
    assert after.class_names == ("cat", "dog")
    assert (after.digest, after.channel_mean) == (before.digest, before.channel_mean)
    assert pack(packed).already_complete


def test_a_pack_that_lost_its_class_names_is_mended_by_packing_again(packed: PackConfig) -> None:
    before, store = load_index(packed.dest), open_store(packed.dest)
    plan = store.read("pack-plan.json")
    store.delete("pack-plan.json")  # so that the shards look like those of another program
    store.delete("index.json")
    build_index(packed.dest)
    assert load_index(packed.dest).class_names is None
    store.write("pack-plan.json", plan)
    pack(packed)
    assert load_index(packed.dest) == before


def test_an_interrupted_pack_is_not_indexed_but_packed_again(
    packed: PackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = packed.model_copy(update={"dest": f"{packed.dest}-half"})
    upload = FileStore.upload

    def stopped(self: FileStore, key: str, path: Path) -> ObjectInfo:
        if key.endswith("2.tar"):
            raise KeyboardInterrupt
        return upload(self, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "upload", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(other)
    for command in (plan_index, load_index):
        with pytest.raises(UserError, match="an unfinished pack: run the same ddpm pack again"):
            command(other.dest)
    pack(other)
    assert load_index(other.dest).digest == load_index(packed.dest).digest


def test_a_pack_with_a_shard_gone_or_exchanged_is_not_indexed_as_a_smaller_or_other_one(
    packed: PackConfig,
) -> None:
    store = open_store(packed.dest)
    whole = store.read("shards/000001.tar")
    store.delete("shards/000001.tar")
    with pytest.raises(UserError, match=r"000001\.tar is missing.*run the same ddpm pack again"):
        plan_index(packed.dest)
    store.write("shards/000001.tar", store.read("shards/000000.tar"))
    with pytest.raises(UserError, match=r"000001\.tar differs from the shard that was packed"):
        plan_index(packed.dest).build()
    store.write("shards/000001.tar", whole)
    assert plan_index(packed.dest).build().class_names == ("cat", "dog")


def test_some_shards_of_a_pack_keep_its_class_names(packed: PackConfig) -> None:
    some = f"{packed.dest}/shards/{{000000..000001}}.tar"
    assert build_index(some).class_names == ("cat", "dog")


def test_shards_that_a_pattern_names_and_that_are_not_there_are_named(uri: str) -> None:
    store = open_store(uri)
    for number in (0, 1, 3):
        store.write(f"t-{number}.tar", write_shard([sample(number)]))
    with pytest.raises(UserError, match=r"2 of the files it names are missing: t-2\.tar, t-4\.tar; get them"):
        plan_index(f"{uri}/t-{{0..4}}.tar")
    assert plan_index(f"{uri}/t-*.tar").build().num_samples == 3


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("cls", "0", 0),
        ("cls", " 3\n", 3),
        ("cls", "-1", -1),
        ("cls", "dog", 1),
        ("cls", "1.0", 1),
        ("json", '{"label": "0"}', 0),
        ("json", '{"label": 1.0}', 1),
        ("json", '{"label": "cat"}', 0),
        ("json", '{"class": [0, 0, 1]}', 2),
        ("json", '{"label": null}', -1),
        ("json", '{"label": -1}', -1),
    ],
)
def test_a_label_is_a_number_a_name_or_one_hot(uri: str, file: str, text: str, wanted: int) -> None:
    store = open_store(uri)
    store.write("classes.txt", b"cat\ndog\n\nnewt\nowl\n")
    store.write("0.tar", write_shard([("a", {"png": PNG, file: text.encode()})]))
    build_index(uri)
    assert labels(uri) == [wanted]
    assert load_index(uri).class_names == ("cat", "dog", "newt", "owl")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cls", "zebra"),
        ("cls", "1000000000"),
        ("cls", "-2"),
        ("cls", "9" * 5000),
        ("json", '{"label": "a photo of a cat"}'),
        ("json", '{"label": 0.5}'),
        ("json", '{"label": true}'),
        ("json", '{"label": [1, 1, 0]}'),
        ("json", '{"label": {"id": 1}}'),
    ],
)
def test_what_is_no_class_is_refused_with_the_ways_out(uri: str, file: str, text: str) -> None:
    open_store(uri).write("0.tar", write_shard([("a", {"png": PNG, file: text.encode()})]))
    with pytest.raises(DamageError, match=r"sample 'a'.*classes\.txt.*--label-field none"):
        build_index(uri)
    plan_index(uri, label_field="none").build()
    assert labels(uri) == [-1]


def test_class_names_are_read_from_info_json(uri: str) -> None:
    store = open_store(uri)
    store.write("_info.json", b'{"classes": ["cat", "dog"]}')
    store.write("0.tar", write_shard([("a", {"png": PNG, "cls": b"dog"})]))
    assert build_index(uri).class_names == ("cat", "dog")


def test_an_unreadable_image_is_named_and_can_be_left_out(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("a", {"png": PNG, "cls": b"0"}), ("b", {"png": b"GIF89a", "cls": b"1"})]
    open_store(uri).write("0.tar", write_shard([*files, ("c", {"png": PNG, "cls": b"2"})]))
    with pytest.raises(DamageError, match=r"'b\.png' at byte .*--skip-unreadable"):
        build_index(uri)
    assert dataset.index(uri, None, pixels=False, skip_unreadable=True) == 0
    said = capsys.readouterr().out
    assert "skipped  1 samples" in said
    assert "'b.png'" in said
    assert labels(uri) == [0, 2]


def test_of_two_images_of_a_sample_one_is_chosen_by_its_extension(uri: str) -> None:
    other = encoded(random_image(2))
    open_store(uri).write("0.tar", write_shard([("a", {"jpg": PNG, "seg.png": other, "cls": b"4"})]))
    with pytest.raises(DamageError, match=r"2 images.*--image jpg"):
        build_index(uri)
    made = plan_index(uri, image="seg.png").build()
    assert made.image_extension == "seg.png"
    (found,) = read_sequential(load_index(uri))
    assert (found.pixels == random_image(2)).all()
    assert plan_index(uri, image="seg.png").to_scan == []
    assert plan_index(uri, image="jpg").to_scan == ["0.tar"]


def test_files_beside_the_samples_are_counted_and_harmless(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = [("LICENSE", {"txt": b"free"}), ("__meta__", {"json": b"{}"}), ("a", {"png": PNG})]
    open_store(uri).write("0.tar", write_shard(shard))
    assert dataset.index(uri, None, pixels=False) == 0
    assert "ignored  2 files" in capsys.readouterr().out
    assert load_index(uri).num_samples == len(labels(uri)) == 1


def test_files_of_a_sample_that_are_no_neighbours_are_refused(uri: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.png", "b.png", "a.cls", "b.cls"):
            data = PNG if name.endswith("png") else b"1"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    open_store(uri).write("0.tar", out.getvalue())
    with pytest.raises(DamageError, match=r"'a': occurs twice .* must be adjacent"):
        build_index(uri)


def test_archives_of_other_kinds_are_named(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(uri)
    store.write("a.tar.zst", b"")
    with pytest.raises(UserError, match=r"a\.tar\.zst: only \.tar, \.tar\.gz and \.tgz are supported"):
        plan_index(uri)
    store.write("train/0.tar", write_shard([sample(0)]))
    store.write("val/0.tar", write_shard([sample(1)]))
    assert dataset.index(uri, None, pixels=False) == 0
    said = capsys.readouterr().out
    assert "skipped 1 archives" in said
    assert "train, val are indexed together" in said
