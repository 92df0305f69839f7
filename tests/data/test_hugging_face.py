"""Data sets of a Hugging Face hub are packed with the images and class names that they are published with."""

import builtins
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.dataset_card import (
    class_features,
    configurations,
    default_configuration,
    parse_card,
)
from ddpm_pipeline.data.packing.open_source import open_source, require_source
from ddpm_pipeline.data.packing.remote_source import fetch_source
from ddpm_pipeline.data.packing.sources import Source
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import StoreUnreachable
from tests.data.hub_server import COMMIT, Hub, serving
from tests.data.making import encoded, random_image

pytest.importorskip("huggingface_hub", reason="needs the extra `hf`: pip install huggingface_hub")

NAME = "someone/pets"
IMAGES = [encoded(random_image(number)) for number in range(6)]
CLASSES = ["cat", "dog"]


def table(numbers: range, column: str = "label", with_names: bool = True) -> bytes:
    """Parquet as `Dataset.push_to_hub` writes it: {bytes, path} and ClassLabel numbers."""
    rows = pa.table(
        {
            "image": [{"bytes": IMAGES[n], "path": f"{n}.png"} for n in numbers],
            column: pa.array([n % 2 for n in numbers], pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, column: {"names": CLASSES, "_type": "ClassLabel"}}
    if with_names:
        rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()
    pq.write_table(rows, out)
    return out.getvalue()


CARD = """---
license: cc0-1.0
dataset_info:
  features:
  - name: image
    dtype: image
  - name: species_no
    dtype:
      class_label:
        names:
          '0': cat
          '1': dog
configs:
- config_name: small
  data_files:
  - split: train
    path: small/part-*
  - split: test
    path: [small/rest.parquet]
- config_name: large
  data_files: large/*.parquet
---
# Pets
"""


@pytest.fixture
def hub() -> Hub:
    files = {
        "README.md": b"# Pets",
        ".gitattributes": b"*.parquet filter=lfs",
        "data/train-00000-of-00002.parquet": table(range(2)),
        "data/train-00001-of-00002.parquet": table(range(2, 4)),
        "data/test-00000-of-00001.parquet": table(range(4, 6)),
    }
    return Hub(NAME, files)


@pytest.fixture
def hub_with_card() -> Hub:
    files = {
        "README.md": CARD.encode(),
        "small/part-0.parquet": table(range(3), "species_no", with_names=False),
        "small/rest.parquet": table(range(3, 4), "species_no", with_names=False),
        "large/everything.parquet": table(range(6), "species_no", with_names=False),
    }
    return Hub(NAME, files)


@pytest.fixture
def environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serving(hub) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield


@pytest.fixture
def card_environment(hub_with_card: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serving(hub_with_card) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield


def config(source: str, tmp_path: Path, **settings: object) -> PackConfig:
    places = {"dest": (tmp_path / "dest").as_uri(), "fetch_dir": str(tmp_path / "cache")}
    return PackConfig.model_validate({"source": f"hf://datasets/{source}", **places, **settings})


def opened(source: str, tmp_path: Path, **settings: object) -> Source:
    return open_source(fetch_source(config(source, tmp_path, **settings)).config)


def content(source: Source) -> list[tuple[bytes, int]]:
    return [(source.read(number), item.label) for number, item in enumerate(source.items)]


@pytest.mark.usefixtures("environment")
def test_the_chosen_split_is_fetched_with_its_class_names(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds the splits test \(1\), train \(2\); set split=NAME"):
        opened(NAME, tmp_path)
    found = opened(NAME, tmp_path, split="train")
    assert content(found) == [(IMAGES[n], n % 2) for n in range(4)]
    assert found.class_names == ("cat", "dog")
    assert not any("test-" in path for path in hub.fetched)
    hub.fetched.clear()
    report = pack(config(NAME, tmp_path, split="train"))
    assert (report.num_samples, load_index((tmp_path / "dest").as_uri()).class_names) == (4, ("cat", "dog"))
    assert f"{NAME} at commit {COMMIT}: 2 of 5 files" in report.notes
    assert not any("parquet" in path for path in hub.fetched)
    assert pack(config(NAME, tmp_path, split="train")).already_complete


@pytest.mark.usefixtures("card_environment")
def test_a_card_names_configurations_splits_and_classes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has several configurations; add one of these after a slash: large, small"
    ):
        opened(NAME, tmp_path)
    with pytest.raises(UserError, match="has no configuration 'tiny'"):
        opened(f"{NAME}/tiny", tmp_path)
    small = opened(f"{NAME}/small", tmp_path, split="train")
    assert content(small) == [(IMAGES[n], n % 2) for n in range(3)]
    assert small.class_names == ("cat", "dog")
    assert content(opened(f"{NAME}/small", tmp_path, split="test")) == [(IMAGES[3], 1)]
    assert len(opened(f"{NAME}@{COMMIT}/large", tmp_path).items) == 6


@pytest.mark.usefixtures("environment")
def test_files_that_are_no_parquet_are_fetched_as_a_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"images/cat/1.png": IMAGES[0], "images/dog/2.png": IMAGES[1], "README.md": b"x"}
    found = opened(NAME, tmp_path)
    assert (content(found), found.class_names) == ([(IMAGES[0], 0), (IMAGES[1], 1)], ("cat", "dog"))


@pytest.mark.usefixtures("environment")
def test_an_interrupted_fetch_goes_on_at_its_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_pipeline.data.packing.fetch.CHUNK_BYTES", 100)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_source(config(NAME, tmp_path, split="test"), interrupt)
    hub.fetched.clear()
    assert content(opened(NAME, tmp_path, split="test")) == [(IMAGES[n], n % 2) for n in (4, 5)]
    assert hub.fetched[-1].startswith("README.md")
    assert any(path.startswith("data/test") and not path.endswith("@0") for path in hub.fetched)


@pytest.mark.usefixtures("environment")
def test_a_file_with_another_hash_than_the_hub_says_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = config(NAME, tmp_path, split="test")
    monkeypatch.setattr(hub, "lies_about_hashes", True)
    with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}, 0{64} expected"):
        fetch_source(sound)


@pytest.mark.usefixtures("environment")
def test_a_data_set_that_may_not_be_seen_says_what_opens_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated, hub.token = True, "hf_secret"
    with pytest.raises(UserError, match="accept the data set's terms on its page and set HF_TOKEN"):
        opened(NAME, tmp_path, split="test")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(opened(NAME, tmp_path, split="test").items) == 2


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("someone/else", "has no such data set or revision"),
        (f"{NAME}@gone", "has no such data set or revision"),
        ("mnist", "write hf://datasets/OWNER/NAME, and /CONFIG if it has several"),
        ("a b/c d", "not a data set's name"),
        (f"{NAME}/gone", "has no folder 'gone'; it has: data"),
    ],
)
def test_what_is_not_on_the_hub_is_named(source: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        fetch_source(config(source, tmp_path, split="train"))


@pytest.mark.usefixtures("environment")
def test_a_dry_run_fetches_no_data(hub: Hub, tmp_path: Path) -> None:
    size = len(hub.files["data/test-00000-of-00001.parquet"]) + len(b"# Pets")
    assert require_source(config(NAME, tmp_path, split="test")) == f"2 files, {size:,} bytes, to be fetched"
    assert hub.fetched == ["README.md@0"]


def test_a_hub_that_is_away_is_named_with_a_way_round_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match=rf"hf download --repo-type dataset {NAME} --local-dir FOLDER"):
        fetch_source(config(NAME, tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'ddpm-pipeline\[hf\]'"):
        fetch_source(config(NAME, tmp_path))


def test_a_downloaded_copy_is_read_with_the_names_of_its_card(tmp_path: Path, hub_with_card: Hub) -> None:
    for name, data in hub_with_card.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    (tmp_path / "copy" / "large" / "everything.parquet").unlink()
    found = open_source(PackConfig(source=str(tmp_path / "copy"), dest="unused", label_column="species_no"))
    assert (len(found.items), found.class_names) == (4, ("cat", "dog"))


@pytest.mark.parametrize(
    "text",
    ["", "# no head", "---\n", "---\n: [\n---\n", "---\n- a\n---\n", "---\na: !!python/object:x {}\n---\n",
     "---\nconfigs: 3\ndataset_info: [x, {features: {names: 3}}]\n---\n"],
)  # fmt: skip
def test_a_card_of_another_kind_says_nothing(text: str) -> None:
    card = parse_card(text)
    assert (configurations(card), default_configuration(card), class_features(card, ["a"])) == ({}, None, {})
