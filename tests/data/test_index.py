"""Indexes: of any tars, noticed when stale, the same wherever the data lies."""

import gzip
import io
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import load_index, read_table
from ddpm_pipeline.data.location import Location, expand
from ddpm_pipeline.data.packing import scan_shard
from ddpm_pipeline.data.packing.build_index import build_index, plan_index
from ddpm_pipeline.data.packing.scan_shard import index_shard
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import open_store
from tests.data.making import batches, by_position, encoded, random_image, sample, small_set


def test_an_index_counts_what_is_there(any_uri: str) -> None:
    index = small_set(any_uri)
    assert [shard.num_samples for shard in index.shards] == [13, 7, 20, 11, 9]
    assert (index.num_samples, index.num_classes, index.labelled) == (60, 10, True)
    assert str(index.image) == "8x8x3"
    assert load_index(any_uri) == index
    rows = np.concatenate([read_table(index, i) for i in range(5)])
    assert rows["label"].tolist() == [i % 10 for i in range(60)]


def test_the_digest_does_not_depend_on_the_store(tmp_path: Path, any_uri: str) -> None:
    assert small_set(any_uri).digest == small_set((tmp_path / "elsewhere").as_uri()).digest
    assert small_set((tmp_path / "other").as_uri(), (13, 7, 20, 12, 8)).digest != load_index(any_uri).digest


def test_an_index_copied_with_its_data_is_good_there(tmp_path: Path, uri: str) -> None:
    index = small_set(uri)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    copy = (tmp_path / "copy").as_uri()
    assert load_index(copy).digest == index.digest
    assert by_position(batches(load_index(copy), 0, 9)) == by_position(batches(index, 0, 9))


def test_an_index_made_shard_by_shard_is_the_one_made_at_once(uri: str) -> None:
    from ddpm_pipeline.data.index import assemble_index
    from ddpm_pipeline.data.packing.build_index import find_shards

    whole = small_set(uri)
    location, found = find_shards(uri)
    scans = [index_shard(open_store(uri), info.key) for info in found]
    assert assemble_index(location, scans) == whole


def test_only_shards_that_changed_are_read_again(any_uri: str) -> None:
    before = small_set(any_uri)
    store = open_store(any_uri)
    store.write("002.tar", write_shard(sample(i) for i in range(500, 504)))
    store.write("009.tar", write_shard(sample(i) for i in range(600, 603)))
    plan = plan_index(any_uri)
    assert plan.to_scan == ["002.tar", "009.tar"]
    assert sorted(plan.reused) == ["000.tar", "001.tar", "003.tar", "004.tar"]
    made = plan.build()
    assert made.num_samples == before.num_samples - 20 + 4 + 3
    assert made == plan_index(any_uri, reuse=False).build() == load_index(any_uri)


def test_what_an_earlier_index_did_not_look_at_is_read(uri: str) -> None:
    index = small_set(uri)
    everything = [shard.name for shard in index.shards]
    assert plan_index(uri).to_scan == []
    assert plan_index(uri, pixels=True).to_scan == everything
    assert plan_index(uri, label_field="kind").to_scan == everything
    assert plan_index(uri, reuse=False).to_scan == everything
    tables = Path(uri.removeprefix("file://")) / index.tables
    data = bytearray(tables.read_bytes())
    data[index.tables_offset + 3] ^= 1
    tables.write_bytes(data)
    assert plan_index(uri).to_scan == everything[:1]
    assert plan_index(uri).build() == index


def test_statistics_are_exact(uri: str) -> None:
    small_set(uri)
    index = build_index(uri, pixels=True)
    values = np.stack([random_image(i) for i in range(60)]).reshape(-1, 3).astype(np.float64)
    assert index.channel_mean == pytest.approx(values.mean(0), rel=1e-12)
    assert index.channel_std == pytest.approx(values.std(0), rel=1e-12)
    assert index.digest == load_index(uri).digest == small_set(uri).digest


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {}), ("npy", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 100})]
)
@pytest.mark.parametrize("packed", [False, True])
def test_third_party_tars_work_as_they_are(
    uri: str, kind: str, options: dict[str, object], packed: bool
) -> None:
    extension = "jpg" if kind == "jpeg" else kind
    shard = write_shard(
        (
            f"deep/er/{i}",
            {
                "json": json.dumps({"label": i % 3}).encode(),
                extension: encoded(random_image(i), kind, **options),
            },
        )
        for i in range(10)
    )
    name = "train-007.tar.gz" if packed else "train-007.tar"
    open_store(uri).write(name, gzip.compress(shard, mtime=0) if packed else shard)
    open_store(uri).write("notes.txt", b"not a shard")
    index = build_index(f"{uri}/train-{{007..007}}.tar{'.gz' if packed else ''}")
    assert index.num_classes == 3
    assert index.shards[0].compressed == packed
    found = by_position(batches(index, 0, 5, batch=2))
    labels = sorted(label for _, label in found.values())
    assert labels == sorted(i % 3 for i in range(10))
    if kind != "jpeg":
        assert {pixels for pixels, _ in found.values()} == {
            random_image(i).transpose(2, 0, 1).tobytes() for i in range(10)
        }


def test_train_and_validation_patterns_share_a_directory(uri: str) -> None:
    store = open_store(uri)
    store.write("train-0.tar", write_shard([sample(0)]))
    store.write("train-1.tar", write_shard([sample(1)]))
    store.write("val-0.tar", write_shard([sample(2), sample(3)]))
    assert build_index(f"{uri}/train-{{0..1}}.tar").num_samples == 2
    assert build_index(f"{uri}/val-*.tar").num_samples == 2
    assert build_index(f"{uri}/{{train,val}}-0.tar").num_samples == 3
    assert build_index(uri).num_samples == 4
    assert load_index(f"{uri}/train-{{0..1}}.tar").num_samples == 2


def test_braces_are_written_out_with_their_zeros() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert sorted(expand("{a,b}{0..1}")) == ["a0", "a1", "b0", "b1"]
    with pytest.raises(UserError, match="more than"):
        expand("{0..9999999}")
    assert expand("{x,y{1..2}}{a..c..2}") == ["xa", "xc", "y1a", "y1c", "y2a", "y2c"]
    assert expand("{098..100}{3..1}")[-1] == "1001"
    assert expand("a{b") == ["a{b"]
    with pytest.raises(UserError, match="must come after a bucket"):
        Location.of("s3://{a,b}/x.tar")


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999}{0..99999}",
        "{0..999}{0..999}{0..999}{0..999}{0..999}",
        "{a,{b}}" * 40,
        "{a..z}" * 9,
        "{x,{0..-9999999}}",
        "{0..9999999..2}",
        "{0..9999999\n}",
        "{0..1" + "0" * 5000 + "}",
    ],
    ids=lambda pattern: ascii(pattern[:24]),
)
def test_a_pattern_of_patterns_is_refused_before_it_is_written_out(pattern: str) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match="more than"):
        expand(pattern)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most_bytes < 200_000_000


def test_a_pattern_of_very_many_braces_is_refused() -> None:
    with pytest.raises(UserError, match="more than 50 pairs of braces"):
        expand("{" * 3000 + "}" * 3000)


def test_a_wildcard_that_matches_nothing_is_missing_like_a_name(uri: str) -> None:
    open_store(uri).write("train-0.tar", write_shard([sample(0)]))
    with pytest.raises(UserError, match=r"1 of the files it names are missing: val-\*\.tar"):
        build_index(f"{uri}/{{train,val}}-*.tar")


def test_a_grey_shard_among_colored_ones_counts_in_every_channel(uri: str) -> None:
    store = open_store(uri)
    for number, channels in enumerate((1, 3)):
        files = {"png": encoded(random_image(number, channels=channels))}
        store.write(f"{number}.tar", write_shard([("a", files)]))
    index = build_index(uri, pixels=True)
    both = np.concatenate([np.repeat(random_image(0, channels=1), 3, axis=2), random_image(1)])
    assert index.channel_mean == pytest.approx(both.mean(axis=(0, 1)))
    assert index.channel_std == pytest.approx(both.std(axis=(0, 1)))


def test_grey_and_color_of_one_size_are_a_color_set(uri: str) -> None:
    shard = write_shard(
        [("a", {"png": encoded(random_image(0))}), ("b", {"png": encoded(random_image(1, channels=1))})]
    )
    open_store(uri).write("0.tar", shard)
    index = build_index(uri)
    assert str(index.image) == "8x8x3"
    assert index.num_classes is None
    images = batches(index, 0, 1, batch=2)[0][0].images
    assert any((image[0] == image[1]).all() for image in images)


def test_images_of_different_sizes_are_refused_by_the_loader_with_the_remedy(uri: str) -> None:
    shard = write_shard(
        [("a", {"png": encoded(random_image(0))}), ("b", {"png": encoded(random_image(1, (9, 8)))})]
    )
    open_store(uri).write("0.tar", shard)
    index = build_index(uri)
    assert index.image is None
    with pytest.raises(UserError, match=r"images differ in size \(8x8x3 to 9x8x3\).*ddpm pack"):
        batches(index, 0, 1, batch=1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda store: store.write("001.tar", write_shard([sample(0)])),
            "shard 001.tar has .* when indexed: it was replaced",
        ),
        (lambda store: store.delete("002.tar"), "shard 002.tar is in the index but missing"),
        (lambda store: store.write("009.tar", write_shard([sample(0)])), "shard 009.tar is not in the index"),
        (
            lambda store: store.write("003.tar", store.read("003.tar")[:-2048] + bytes(2048)),
            "shard 003.tar was replaced",
        ),
    ],
)
def test_a_stale_index_is_noticed_and_the_shard_named(any_uri: str, change, complaint: str) -> None:
    small_set(any_uri)
    change(open_store(any_uri))
    with pytest.raises(UserError, match=complaint + r".*ddpm index"):
        load_index(any_uri)


def test_a_missing_index_says_how_to_make_one(any_uri: str) -> None:
    with pytest.raises(UserError, match=r"no index \(.*ddpm index"):
        load_index(any_uri)
    with pytest.raises(UserError, match=r"no \.tar or \.tar\.gz found"):
        build_index(any_uri)


def test_an_edited_or_torn_index_is_refused(uri: str) -> None:
    small_set(uri)
    store = open_store(uri)
    text = store.read("index.json")
    store.write("index.json", text.replace(b'"num_samples": 13', b'"num_samples": 12'))
    with pytest.raises(DamageError, match="it was edited"):
        load_index(uri)
    store.write("index.json", text[: len(text) // 2])
    with pytest.raises(DamageError, match="not an index"):
        load_index(uri)
    store.write("index.json", text.replace(b'"format": 1', b'"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        load_index(uri)


def test_damaged_tables_are_noticed(uri: str) -> None:
    index = small_set(uri)
    store = open_store(uri)
    data = bytearray(store.read(index.tables))
    data[-3] ^= 1
    store.write(index.tables, bytes(data))
    with pytest.raises(DamageError, match=r"rows of 004\.tar are damaged"):
        read_table(index, 4)


def npy_of_shape(shape: tuple[int, ...]) -> bytes:
    """The header of an npy file that claims to hold uint8 of this shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"cls": b"1"}, "no image among"),
        ({"png": encoded(random_image(0)), "jpg": b""}, "2 images"),
        ({"png": b"\x89PNG no"}, "not a PNG"),
        ({"png": encoded(random_image(0)), "cls": b"cat"}, r"\.cls holds 'cat'"),
        ({"png": encoded(random_image(0)), "json": b"{"}, r"\.json is damaged"),
        ({"png": encoded(random_image(0)), "json": b'{"label": -2}'}, "holds '-2'"),
        (
            {"npy": encoded(random_image(0).astype(np.float32), "npy")},
            "npy holds float32 in C order; uint8 in C order expected",
        ),
        ({"npy": encoded(random_image(0), "npy")[:-1]}, "bytes of pixels"),
        ({"npy": npy_of_shape((-1, -1, 1)) + b"x"}, "damaged npy header: .*-1, -1, 1"),
    ],
)
def test_what_is_wrong_with_a_sample_is_named(uri: str, files: dict[str, bytes], complaint: str) -> None:
    open_store(uri).write("a/0.tar", write_shard([sample(0), ("the-key", files)]))
    with pytest.raises(DamageError, match=rf"a/0\.tar: .*the-key.*{complaint}"):
        build_index(uri)


def test_labels_on_some_samples_only_are_refused(uri: str) -> None:
    open_store(uri).write("0.tar", write_shard([sample(0), ("x", {"png": encoded(random_image(1))})]))
    with pytest.raises(UserError, match=r"0\.tar: 1 of 2 samples have no label"):
        build_index(uri)


def test_an_image_that_claims_to_be_huge_is_refused(uri: str) -> None:
    bomb = bytearray(encoded(random_image(0)))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    open_store(uri).write("0.tar", write_shard([("bomb", {"png": bytes(bomb)})]))
    with pytest.raises(DamageError, match=r"bomb.*claims 100000x100000 pixels"):
        build_index(uri)


def test_a_gzip_bomb_is_stopped(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scan_shard, "MAX_EXPANSION", 4
    )  # of at least 1 MiB: what is below it may expand as it likes
    open_store(uri).write("0.tar.gz", gzip.compress(write_shard([("zeros", {"png": bytes(5 << 20)})])))
    with pytest.raises(DamageError, match="decompression bomb"):
        build_index(uri)
