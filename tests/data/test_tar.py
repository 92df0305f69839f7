"""Tars are written reproducibly, and read without forgiving anything."""

import gc
import gzip
import io
import random
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.data.formats.shards import ShardStream, read_shard, split_name, write_shard
from ddpm_pipeline.errors import DamageError
from tests.data.making import sample
from tests.effort import examples

V0_1_0 = Path(__file__).parents[1] / "compatibility/v0.1.0"
WHOLE = write_shard(sample(i) for i in range(6))


def foreign(members: list[tarfile.TarInfo], format: int = tarfile.PAX_FORMAT, payload: bytes = b"x") -> bytes:
    """A tar as other programs write it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for member in members:
            if member.isreg():
                member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return out.getvalue()


def test_a_shard_reads_back_as_it_was_written() -> None:
    assert list(read_shard(WHOLE)) == [sample(i) for i in range(6)]
    assert list(read_shard(gzip.compress(WHOLE))) == [sample(i) for i in range(6)]
    assert list(read_shard(write_shard([]))) == []


def test_the_same_samples_give_the_same_bytes() -> None:
    assert write_shard(sample(i) for i in range(6)) == WHOLE
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_plain_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(WHOLE)
    found = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in found] == [
        sample(i) for i in range(6)
    ]


def test_shards_of_the_first_version_are_written_again_byte_for_byte() -> None:
    shards = sorted(V0_1_0.glob("*/shards/*.tar"))
    assert len(shards) == 5
    for shard in shards:
        assert write_shard(read_shard(shard)) == shard.read_bytes(), shard


def test_a_shard_is_what_webdataset_writes_but_for_the_zeros_that_fill_its_last_record() -> None:
    out = io.BytesIO()
    options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with webdataset.TarWriter(out, **options) as writer:
        for number in range(6):
            key, files = sample(number)
            for extension, data in files.items():
                writer.write({"__key__": key, extension: data})
    theirs = out.getvalue()
    assert theirs == WHOLE + bytes(-len(WHOLE) % tarfile.RECORDSIZE)
    assert len(theirs) > len(WHOLE)


def test_a_shard_that_is_given_up_writes_nothing_more_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    path = tmp_path / "x.tar"

    def give_up() -> None:
        with path.open("wb") as file, ShardStream(file) as stream:
            stream.add(*sample(0))
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    written = path.read_bytes()
    gc.collect()
    assert unraisable == []
    assert path.read_bytes() == written
    assert len(written) < len(write_shard([sample(0)]))


def test_names_are_written_alike_in_every_locale_and_never_longer_than_a_header_holds() -> None:
    shard = write_shard([("höhe", {"png": b"x"})])
    assert dict(read_shard(shard)) == {"höhe": {"png": b"x"}}
    assert shard.startswith("höhe.png\0".encode())
    with pytest.raises(ValueError, match="at most 100 bytes"):
        write_shard([("ö" * 49, {"png": b""})])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read_with_long_names(format: int) -> None:
    folder = tarfile.TarInfo("./some")
    folder.type = tarfile.DIRTYPE
    long = "d" * 80 + "/" + "n" * 90 + ".png"
    found = dict(
        read_shard(foreign([folder, tarfile.TarInfo("./some/a.png"), tarfile.TarInfo(long)], format))
    )
    assert found == {"./some/a": {"png": b"x"}, long.removesuffix(".png"): {"png": b"x"}}


def test_a_tar_cut_at_any_block_is_noticed() -> None:
    for end in range(0, len(WHOLE), 512):
        with pytest.raises(DamageError, match=r"cut\.tar: ends at byte \d+"):
            list(read_shard(WHOLE[:end], "cut.tar"))


@examples(60)
@given(st.integers(0, len(WHOLE) - 1))
def test_a_tar_cut_anywhere_is_noticed(end: int) -> None:
    with pytest.raises(DamageError):
        list(read_shard(WHOLE[:end]))


def test_a_flipped_bit_in_any_header_is_noticed_with_its_offset() -> None:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        headers = [member.offset for member in tar]
    source = random.Random(0)
    for header in headers:
        for _ in range(40):
            damaged = bytearray(WHOLE)
            damaged[header + source.randrange(345)] ^= 1 << source.randrange(8)
            with pytest.raises(DamageError, match=rf"at byte {header}"):
                list(read_shard(bytes(damaged)))


def test_a_wiped_header_does_not_end_the_shard_early() -> None:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        header = tar.getmembers()[4].offset
    damaged = WHOLE[:header] + bytes(512) + WHOLE[header + 512 :]
    with pytest.raises(DamageError, match="data after a zero block"):
        list(read_shard(damaged))
    damaged = WHOLE[:header] + bytes(1024) + WHOLE[header + 1024 :]
    with pytest.raises(DamageError, match="data after the end"):
        list(read_shard(damaged))


def test_padding_of_zeros_after_the_end_is_allowed() -> None:
    assert list(read_shard(WHOLE + bytes(10240))) == list(read_shard(WHOLE))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/passwd.png", tarfile.REGTYPE),
        ("a/../../b.png", tarfile.REGTYPE),
        ("..", tarfile.DIRTYPE),
        ("link.png", tarfile.SYMTYPE),
        ("hard.png", tarfile.LNKTYPE),
        ("dev.png", tarfile.CHRTYPE),
        ("dev.png", tarfile.BLKTYPE),
        ("pipe.png", tarfile.FIFOTYPE),
        ("c:\\x.png", tarfile.REGTYPE),
    ],
)
def test_hostile_members_are_refused(name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type = kind
    with pytest.raises(DamageError, match="accepted"):
        list(read_shard(foreign([member])))


def test_absurd_sizes_are_refused_before_anything_is_read() -> None:
    for size in (1 << 31, 1 << 60):
        header = bytearray(foreign([tarfile.TarInfo("a.png")], tarfile.GNU_FORMAT)[:512])
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(DamageError, match="is larger than"):
            list(read_shard(bytes(header) + bytes(2048)))


def stated(size: bytes, kind: bytes) -> bytes:
    """A sound header but for what it says of its payload's size."""
    header = bytearray(foreign([tarfile.TarInfo("a.png")], tarfile.GNU_FORMAT)[:512])
    header[124:136], header[156:157] = size.ljust(12, b"\0"), kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [b"-0000000001", b"-0000000005", b"+0000000001", b"0_0", b"0o7"])
def test_a_size_of_other_signs_than_digits_is_no_header(size: bytes) -> None:
    for kind in (b"0", b"L", b"x"):
        with pytest.raises(DamageError, match="not a tar header"):
            list(read_shard(stated(size, kind) + WHOLE))


@pytest.mark.parametrize("key", ["length", "size"])
def test_a_number_too_long_to_be_read_is_a_damaged_extended_header(key: str) -> None:
    digits = b"1" * 5000  # Python refuses to read so many
    record = digits + b" path=x\n" if key == "length" else b"%d size=%s\n" % (5011, digits)
    assert key == "length" or len(record) == 5011
    body = record + bytes(-len(record) % 512)
    with pytest.raises(DamageError, match=r"a damaged extended header|a size of"):
        list(read_shard(stated(b"%o" % len(record), b"x") + body + WHOLE))


def test_damaged_gzip_is_named() -> None:
    packed = gzip.compress(WHOLE)
    for damaged in (
        packed[:-9],
        packed[: len(packed) // 2],
        packed[:-8] + struct.pack("<I", 1) + packed[-4:],
    ):
        with pytest.raises(DamageError, match=r"x\.tar\.gz"):
            list(read_shard(damaged, "x.tar.gz"))


def test_two_files_of_one_extension_in_a_sample_are_refused() -> None:
    with pytest.raises(DamageError, match=r"'a' has two files \.png"):
        list(read_shard(foreign([tarfile.TarInfo("a.png"), tarfile.TarInfo("a.PNG")])))


@pytest.mark.parametrize("key", ["a.b", "", ".hidden", "dir/.x"])
def test_keys_a_reader_would_split_otherwise_are_refused_when_writing(key: str) -> None:
    with pytest.raises(ValueError, match="a reader would not split"):
        write_shard([(key, {"png": b""})])


def test_a_repeated_key_is_refused_when_writing() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        write_shard([("a", {"png": b""}), ("b", {"png": b""}), ("a", {"png": b""})])


@examples(300)
@given(st.from_regex(r"[a-zA-Z0-9_./-]{1,30}", fullmatch=True))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    theirs = webdataset.tariterators.base_plus_ext(name)
    ours = split_name(name)
    if ours is None:
        # What we leave out, webdataset leaves out too, or cannot read as a sample's file of any use.
        assert theirs[0] is None or theirs[1] == "" or "/." in name or name.startswith("__")
    else:
        assert ours == (theirs[0], theirs[1].lower())
