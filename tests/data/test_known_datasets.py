"""Well-known data sets are packed by their names: fetched once and checked by hash, or from a copy put in place."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data import pack
from ddpm_pipeline.data.packing.known_datasets import KNOWN_DATASETS, KnownDataset
from ddpm_pipeline.data.packing.open_source import open_source, require_source
from ddpm_pipeline.data.packing.remote_source import fetch_source
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.pack import run_call
from ddpm_pipeline.jobs.runner import DONE, JobArguments, presets, settings_of
from ddpm_pipeline.store import StoreUnreachable
from tests.data.test_array_sources import IMAGES, LABELS, TEN, cifar_10, idx, pixels, written
from tests.data.test_layouts import celeba_as_downloaded
from tests.data.web_server import Site, serving

GRAY = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Small files in the places of the real ones."""
    faces = celeba_as_downloaded(tmp_path / "celeba")
    found = {path.name: path.read_bytes() for path in faces.iterdir()}
    found["cifar-10-python.tar.gz"] = written(tmp_path, cifar_10("python"), "tar.gz").read_bytes()
    for split in ("train", "t10k"):
        found[f"{split}-images-idx3-ubyte.gz"] = idx(GRAY)
        found[f"{split}-labels-idx1-ubyte.gz"] = idx(np.array([3, 7], np.uint8))
    return found


@pytest.fixture
def site(files: dict[str, bytes]) -> Site:
    return Site({f"/{name}": data for name, data in files.items()})


@pytest.fixture
def elsewhere(site: Site, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The known addresses lead to the small files, after one where nobody answers."""
    with serving(site) as url:
        for name, dataset in KNOWN_DATASETS.items():
            moved = tuple(
                replace(
                    file,
                    urls=("http://127.0.0.1:9/gone", f"{url}/{file.name}"),
                    sha256=hashlib.sha256(files[file.name]).hexdigest(),
                )
                for file in dataset.files
                if file.name in files
            )
            monkeypatch.setitem(KNOWN_DATASETS, name, replace(dataset, files=moved))
        yield


def config(source: str, cache: Path, **settings: object) -> PackConfig:
    dest = (cache.parent / "dest").as_uri()
    return PackConfig.model_validate({"source": source, "dest": dest, "fetch_dir": str(cache), **settings})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.usefixtures("elsewhere")
def test_cifar10_is_its_training_split_unless_another_is_chosen(cache: Path, site: Site) -> None:
    source = open_source(fetch_source(config("cifar10", cache)).config)
    assert (pixels(source) == IMAGES[:5]).all()
    assert ([item.label for item in source.items], source.class_names) == (LABELS[:5], tuple(TEN))
    site.files.clear()  # what is there is not asked for again
    assert len(open_source(fetch_source(config("cifar10", cache, split="test")).config).items) == 2
    assert len(open_source(fetch_source(config("cifar10", cache, split="all")).config).items) == 7
    with pytest.raises(UserError, match="split: CIFAR-10 has the splits train, test, not 'validation'"):
        fetch_source(config("cifar10", cache, split="val"))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_of_mnist_only_the_files_of_the_split_are_fetched(cache: Path, name: str) -> None:
    source = open_source(fetch_source(config(name, cache)).config)
    assert (pixels(source)[..., 0] == GRAY).all()
    assert [item.label for item in source.items] == [3, 7]
    assert {path.name[:5] for path in (cache / name).iterdir()} == {"train"}
    assert len(open_source(fetch_source(config(name, cache, split="test")).config).items) == 2


@pytest.mark.usefixtures("elsewhere")
def test_celeba_has_its_own_splits_and_attributes(cache: Path) -> None:
    assert pack(config("celeba", cache)).num_samples == 3
    local = fetch_source(config("celeba", cache, split="val", label_column="Smiling"))
    assert [item.label for item in open_source(local.config).items] == [1]


@pytest.mark.usefixtures("elsewhere")
def test_a_copy_put_in_place_is_used_without_asking_anybody(
    cache: Path, site: Site, files: dict[str, bytes]
) -> None:
    (cache / "cifar10").mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    (cache / "cifar10" / "cifar-10-python.tar.gz").write_bytes(files["cifar-10-python.tar.gz"])
    (cache / "cifar10" / "readme").write_text("mine")
    assert require_source(config("cifar10", cache)) == f"in {cache / 'cifar10'}"
    assert pack(config("cifar10", cache)).num_samples == 5
    assert site.requests == []
    assert (cache / "cifar10" / "readme").exists()


@pytest.mark.usefixtures("elsewhere")
def test_another_file_than_the_published_one_is_refused(
    cache: Path, site: Site, files: dict[str, bytes]
) -> None:
    site.files["/cifar-10-python.tar.gz"] = b"another"
    with pytest.raises(
        UserError, match=r"its SHA-256 is [0-9a-f]{64}, [0-9a-f]{64} expected: the address leads to"
    ):
        fetch_source(config("cifar10", cache))
    (cache / "cifar10" / "cifar-10-python.tar.gz").write_bytes(b"another")
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: its SHA-256 is .*; remove it"):
        fetch_source(config("cifar10", cache))


def test_without_a_network_the_file_and_its_place_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar = KNOWN_DATASETS["cifar10"]
    dead = replace(
        cifar, files=(replace(cifar.files[0], urls=("http://127.0.0.1:9/cifar-10-python.tar.gz",)),)
    )
    monkeypatch.setitem(KNOWN_DATASETS, "cifar10", dead)
    with pytest.raises(StoreUnreachable) as outage:
        pack(config("cifar10", cache))
    place = re.escape(str(cache / "cifar10"))
    wanted = (
        rf"source: cifar10: .*; or put a copy of cifar-10-python\.tar\.gz \(SHA-256 6d958be0.*\) into {place}"
    )
    assert re.fullmatch(wanted, str(outage.value))


def test_a_path_of_that_name_is_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cifar10 holds no images"):
        open_source(fetch_source(PackConfig(source="cifar10", dest="unused")).config)


@pytest.mark.parametrize("dataset", KNOWN_DATASETS.values(), ids=KNOWN_DATASETS)
def test_every_file_has_a_hash_an_address_and_a_name_of_its_own(dataset: KnownDataset) -> None:
    assert len({file.name for file in dataset.files}) == len({file.sha256 for file in dataset.files})
    for file in dataset.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.urls
        assert all(url.startswith(("https://", "http://fashion-mnist.s3-website.")) for url in file.urls)
    assert dataset.license
    assert dataset.citation


@pytest.mark.parametrize(("preset", "name"), [("ddpm-cifar10", "cifar10"), ("mnist-28", "mnist")])
def test_presets_of_papers_name_their_data(preset: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://bucket")
    assert settings_of(PackConfig, "pack", JobArguments(preset=preset)).source == name
    assert not KNOWN_DATASETS.keys() & presets().keys()


@pytest.mark.usefixtures("elsewhere")
def test_a_name_on_the_command_line_brings_the_settings_that_suit_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(cache.parent)
    monkeypatch.setenv("DDPM_ROOT", "root")
    assert run_call(JobArguments.of(["mnist", f"fetch_dir={cache}"], dry_run=True)) == DONE
    shown = capsys.readouterr().out
    for line in ("source: mnist", "dest: root/data/mnist", "channels: 1", "# source   2 files, "):
        assert line in shown
    assert run_call(JobArguments.of(["mnist", f"fetch_dir={cache}", "image_size=32"])) == DONE
    assert "packed: 2 images in 1 shards at root/data/mnist" in capsys.readouterr().out
