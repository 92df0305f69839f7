"""The bytes of a pack are the same on every machine and in every version; a pack goes on as it was begun."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import open_store
from tests.data.making import digits, encoded, random_image

V0_1_0 = Path(__file__).parents[1] / "compatibility/v0.1.0"

same_zlib = pytest.mark.skipif(
    "ng" in zlib.ZLIB_RUNTIME_VERSION, reason="this Python has zlib-ng, which compresses to other bytes"
)
PINNED = {
    "npy": [
        "fdfb20830c21f5ae9d5a8341f20246d3153019c3a235d86e5acdefa65eb2bf63",
        "128f43d1427a08f8c0ff742134c461ad2c6311d391242ee343a56a3d34c15b87",
    ],
    "png": [
        "542a53a9e98437d12643056cc256f867384924443088d1b1868f77fb61d62cff",
        "fcda2e59849b3d0ae1ece95b95c7632a7b8ffc7a6aa12355042f0032f5011da8",
    ],
    "as npy": [
        "f06ed47e9e726eeaffff9c974063d32696c03ccb11d97255d8268f23aefe42c3",
        "972f6e30439ec6ca06f53890b5ece25762c1dadb9014433478416ac7821b891d",
    ],
}


def waves(number: int, edge: int) -> np.ndarray:
    """A smooth image with some noise, uint8 (edge, edge, 3), by whole numbers alone."""
    y, x, c = np.mgrid[0:edge, 0:edge, 0:3]
    return ((x * x // 8 + y * number + 40 * c + random_image(number, (edge, edge)) % 8) % 256).astype(
        np.uint8
    )


def images(root: Path, kind: str, edge: int = 40, count: int = 6) -> str:
    for number in range(count):
        place = root / ("even", "odd")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random_image(number, (edge, edge)) if number < 2 else waves(number, edge)
        (place / f"{number}.{kind}").write_bytes(encoded(pixels, kind))
    return str(root)


def hashes(uri: str) -> list[str]:
    """SHA-256 of each shard."""
    store = open_store(uri)
    keys = sorted(info.key for info in store.list("shards/"))
    return [hashlib.sha256(store.read(key)).hexdigest() for key in keys]


def as_version_0_1_0_left_it(uri: str, *, finished: bool) -> None:
    """What that version wrote: a plan of one digest, and no record of the source."""
    store = open_store(uri)
    plan = json.loads(store.read("pack-plan.json"))
    store.write("pack-plan.json", json.dumps({"digest": plan["digest"]}).encode())
    store.delete("pack-source.json")
    if not finished:
        for info in list(store.list()):
            if info.key != "pack-plan.json":
                store.delete(info.key)


@same_zlib
@pytest.mark.parametrize("kind", ["npy", "png"])
def test_shards_of_png_have_the_bytes_they_always_had(uri: str, tmp_path: Path, kind: str) -> None:
    pack(PackConfig(source=images(tmp_path / "in", kind), dest=uri, shard_size=3))
    assert hashes(uri) == PINNED[kind]


def test_shards_of_npy_have_the_bytes_they_always_had(uri: str, tmp_path: Path) -> None:
    pack(PackConfig(source=images(tmp_path / "in", "png"), dest=uri, shard_size=3, payload="npy"))
    assert hashes(uri) == PINNED["as npy"]


def test_the_images_held_out_and_their_place_are_those_they_always_were(uri: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(20):
        np.save(source / f"{number:02}.npy", np.full((4, 4, 1), 10 * number, np.uint8))
    config = PackConfig(
        source=str(source), dest=f"{uri}/all", channels=1, held_out=0.3, seed=5, payload="npy"
    )
    pack(config)
    held_out = read_sequential(load_index(f"{uri}/all-held-out"))
    assert sorted(int(sample.pixels[0, 0, 0]) // 10 for sample in held_out) == [3, 6, 7, 9, 10, 11, 15, 17]


@same_zlib
def test_the_digits_have_the_digest_they_always_had(uri: str) -> None:
    digits(uri)
    assert load_index(uri).digest == "61cb4a64cc1bffa28a19472234f1038df562fd9046b42d870e11b19a88f0d56b"


@same_zlib
def test_images_are_still_compressed_as_version_0_1_0_did_where_it_began() -> None:
    samples = [s for shard in sorted(V0_1_0.glob("data/shards/*.tar")) for s in read_shard(shard)]
    assert len(samples) == 60
    for key, files in samples:
        assert encode_png(decode_image(files["png"], (8, 8, 1)), 1) == files["png"], key


def test_a_pack_that_version_0_1_0_began_goes_on_in_its_way(uri: str, tmp_path: Path) -> None:
    config = PackConfig(source=images(tmp_path / "in", "png"), dest=uri, shard_size=3)
    pack(config)
    new = hashes(uri)
    as_version_0_1_0_left_it(uri, finished=False)
    assert not pack(config).already_complete
    assert hashes(uri) != new
    samples = [s for n in range(2) for s in read_shard(open_store(uri).read(f"shards/{n:06d}.tar"))]
    assert len(samples) == 6
    for _, files in samples:
        assert files["png"] == encode_png(decode_image(files["png"], (40, 40, 3)), 1)


def test_shard_bytes_cuts_by_pixels_and_evenly(uri: str, tmp_path: Path) -> None:
    source = images(tmp_path / "in", "png", edge=10, count=7)  # of 300 bytes of pixels each
    for limit, counts in ((2100, [7]), (2099, [3, 4]), (900, [2, 2, 3]), (299, [1] * 7)):
        pack(PackConfig(source=source, dest=f"{uri}/{limit}", shard_bytes=limit))
        assert [shard.num_samples for shard in load_index(f"{uri}/{limit}").shards] == counts


def test_a_set_that_was_packed_before_shard_bytes_is_left_as_it_is(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "in", "png")
    pack(PackConfig(source=source, dest=uri, shard_size=4))
    as_version_0_1_0_left_it(uri, finished=True)
    before = hashes(uri)
    # Images so large that the default of shard_bytes would cut them into more shards.
    monkeypatch.setattr(PackConfig.model_fields["shard_bytes"], "default", 4800)
    config = PackConfig(source=source, dest=uri, shard_size=4, shard_bytes=4800)
    assert pack(config).already_complete
    assert hashes(uri) == before
    assert pack(config).already_complete  # the source is on record now
    elsewhere = pack(config.model_copy(update={"dest": f"{uri}-new"}))
    assert (elsewhere.num_shards, len(before)) == (6, 2)


def test_a_shard_lost_from_such_a_set_is_made_again_with_its_own_samples(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "in", "png")
    pack(PackConfig(source=source, dest=uri, shard_size=4))
    samples = {sample.pixels.tobytes() for sample in read_sequential(load_index(uri))}
    as_version_0_1_0_left_it(uri, finished=True)
    open_store(uri).delete("shards/000001.tar")
    monkeypatch.setattr(PackConfig.model_fields["shard_bytes"], "default", 4800)
    report = pack(PackConfig(source=source, dest=uri, shard_size=4, shard_bytes=4800))
    assert (report.num_shards, report.num_samples) == (2, 6)
    assert {sample.pixels.tobytes() for sample in read_sequential(load_index(uri))} == samples


def test_a_plan_of_a_later_encoder_is_refused_in_one_line(uri: str, tmp_path: Path) -> None:
    config = PackConfig(source=images(tmp_path / "in", "png"), dest=uri)
    pack(config)
    store = open_store(uri)
    plan = json.loads(store.read("pack-plan.json"))
    store.write("pack-plan.json", json.dumps({**plan, "encoder": 99}).encode())
    with pytest.raises(UserError, match=r"pack-plan\.json.*encoder"):
        pack(config)


@pytest.mark.parametrize("options", [{}, {"quality": 60, "progressive": True}, {"subsampling": 0}])
def test_a_jpeg_cut_short_or_turned_is_noticed_when_it_is_looked_at(
    uri: str, tmp_path: Path, options: dict[str, object]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(waves(3, 64)[:, :40], "jpeg", exif=exif, **options)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "whole.jpg").write_bytes(whole)
    report = pack(PackConfig(source=str(tmp_path / "in"), dest=uri))
    assert str(report.image) == "64x40x3"
    (tmp_path / "in" / "torn.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read: torn\.jpg: .*truncated"):
        pack(PackConfig(source=str(tmp_path / "in"), dest=f"{uri}-torn"))
