"""Damaged documents of evaluation: each gives one line, and takes no more memory than it has bytes."""

import base64
import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.document import read_evaluation
from ddpm_pipeline.features.exact_sums import Sums, sums_of
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.networks import CARD_KEY, WEIGHTS_KEY, load_classifier, open_network
from ddpm_pipeline.features.reference_set import load_reference, reference_key
from ddpm_pipeline.features.shard_sums import FeatureRecord, add_records, parse_record
from ddpm_pipeline.store import Store, open_store
from tests.evaluate.made import measured
from tests.evaluate.test_history import evaluation

WEIGHTS = save({"a": np.zeros(1, np.float32)})
CARD = {
    "image_channels": 1,
    "image_size": 8,
    "num_classes": 2,
    "channels": 8,
    "num_features": 4,
    "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    "data_digest": "d",
    "num_train": 1,
    "num_held_out": 1,
    "held_out_accuracy": 1.0,
    "seed": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path))
    store.write(WEIGHTS_KEY, WEIGHTS)
    return store


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 7},
        {"channels": 0},
        {"channels": 8 * 2**70},
        {"image_channels": -1},
        {"image_size": 0},
        {"image_size": 10**9},
        {"num_classes": -1},
        {"num_features": 10**9},
        {"num_train": 2**80},
        {"seed": -1},
        {"sha256": "x" * 64},
        {"data_digest": "d" * 10**5},
    ],
)
def test_a_card_out_of_range_names_its_field(folder: Store, change: dict[str, Any]) -> None:
    folder.write(CARD_KEY, json.dumps(CARD | change).encode())
    (field,) = change
    with pytest.raises(DamageError, match=f"not a classifier's card \\({field}: |more than 65536"):
        load_classifier(folder, "uri")


def test_a_card_of_a_huge_network_takes_no_memory_and_is_refused(folder: Store) -> None:
    huge = {"channels": 2**12, "num_features": 2**16, "image_size": 2**14, "num_classes": 2**20}
    folder.write(CARD_KEY, json.dumps(CARD | huge).encode())
    with pytest.raises(DamageError, match="the weights do not fit the card"):
        load_classifier(folder, "uri")


def npz(compression: int = zipfile.ZIP_STORED, **changes: Any) -> bytes:
    """A set of three images, with some arrays replaced, or left out where None."""
    rows = 3
    arrays: dict[str, Any] = {
        "network": np.array("n"),
        "data": np.array("d"),
        "vectors": np.zeros((rows, 2), np.float32),
        "logits": np.zeros((rows, 5), np.float32),
        "labels": np.zeros(rows, np.int64),
        "thumbs": np.zeros((rows, 64), np.uint8),
        "prints": np.zeros(rows, np.uint64),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, array in (arrays | changes).items():
            if isinstance(array, bytes):
                file.writestr(f"{name}.npy", array)
            elif array is not None:
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
    return out.getvalue()


def claims(shape: tuple[int, ...]) -> bytes:
    """The header of an array whose values are missing."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


def test_a_feature_set_round_trips() -> None:
    whole = measured(7)
    again = FeatureSet.from_bytes(whole.to_bytes(), "w")
    assert (again.network, again.data) == (whole.network, "")
    assert again.vectors.tobytes() == whole.vectors.tobytes()
    plain = FeatureSet.from_bytes(npz(logits=None, labels=None, data=None), "w")
    assert (len(plain), plain.logits, plain.labels, plain.data) == (3, None, None, "")


def test_the_file_and_the_digest_of_a_feature_set_are_those_of_version_0_1() -> None:
    whole = FeatureSet.from_bytes(npz(), "w")
    with zipfile.ZipFile(io.BytesIO(whole.to_bytes())) as file:
        names = [name.removesuffix(".npy") for name in file.namelist()]
    assert names == ["network", "data", "vectors", "logits", "labels", "thumbs", "prints"]
    assert whole.digest == "0aa4f7a81181db8dc51d3ef5ec93252d29e7a1380c52dc6ffca657a4fe482ac4"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        npz()[:-30],
        npz(vectors=None),
        npz(network=None),
        npz(vectors=np.zeros((2, 2), np.float32)),
        npz(vectors=np.zeros((3, 2))),
        npz(vectors=np.full((3, 2), np.nan, np.float32)),
        npz(vectors=np.array(1, np.float32)),
        npz(labels=np.zeros((3, 1), np.int64)),
        npz(prints=np.array([{}] * 3, object)),
        npz(network=np.array("n" * 1000)),
        npz(network=np.zeros(3)),
        npz(more=np.zeros(3)),
        npz(vectors=claims((2**40, 2**10))),
        npz(vectors=claims((-1, 4))),
        npz(vectors=b"\x93NUMPY\x01\x00"),
        npz(vectors=b"\x93NUMPY\x09\x00" + bytes(99)),
        npz(zipfile.ZIP_DEFLATED, vectors=np.zeros((2**20, 2), np.float32)),
    ],
)
def test_bytes_that_are_no_feature_set_give_one_line(data: bytes) -> None:
    with pytest.raises(DamageError, match=r"^w: not a set of features "):
        FeatureSet.from_bytes(data, "w")


def test_a_flipped_bit_in_a_feature_set_is_detected() -> None:
    data = bytearray(npz(vectors=np.ones((3, 2), np.float32)))
    data[data.index(np.ones(2, np.float32).tobytes())] ^= 1
    with pytest.raises(DamageError, match="CRC"):
        FeatureSet.from_bytes(bytes(data), "w")


def other_data(data: bytes) -> bytes:
    """The same features with the digest of another data set."""
    found = FeatureSet.from_bytes(data, "w")
    return FeatureSet(**(vars(found) | {"data": "0" * 64})).to_bytes()


def fewer(data: bytes) -> bytes:
    """Some of the features."""
    found = FeatureSet.from_bytes(data, "w")
    return FeatureSet(**(vars(found.part(slice(0, 9))) | {"data": found.data})).to_bytes()


@pytest.mark.parametrize("change", [lambda data: data[:-9], other_data, fewer])
def test_a_stored_reference_of_other_data_is_extracted_again(
    digits: str, change: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    index = load_index(digits)
    whole = load_reference(index, FeatureNetworkConfig(), 300)
    assert whole.data == index.digest
    store, key = (
        open_store(f"{digits}/features"),
        reference_key(index, open_network(FeatureNetworkConfig(), digits)),
    )
    store.write(key, change(store.read(key)))
    with caplog.at_level(logging.WARNING):
        assert load_reference(index, FeatureNetworkConfig(), 300).vectors.tobytes() == whole.vectors.tobytes()
    assert "extracting the features of the reference again" in caplog.text
    assert FeatureSet.from_bytes(store.read(key), key).data == index.digest


def packed(*values: int) -> str:
    return base64.b64encode(zlib.compress(np.array(values, "<i8").tobytes())).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zzzz",
        "[" * 1000,
        packed(1),
        packed(2, -5, *range(27)),
        packed(2, 0),
        packed(-1, 1, 0, 0, 0, 0),
        packed(2**60, 1, 0, 0, 0, 0),
        packed(2, 1, 0, 0, 0),
        base64.b64encode(zlib.compress(bytes(2**26))).decode(),
    ],
)
def test_text_that_is_no_sum_gives_one_line(text: str) -> None:
    with pytest.raises(DamageError, match="feature sums: cannot be read"):
        Sums.from_text(text)


def test_sums_of_unequal_lengths_cannot_be_added_up() -> None:
    records = [
        FeatureRecord(network="n", sums=sums_of(np.ones((2, size), np.float32)).to_text(), right=None)
        for size in (3, 4)
    ]
    with pytest.raises(DamageError, match="cannot be added up"):
        add_records(records)
    with pytest.raises(DamageError, match="not feature sums"):
        parse_record({"network": "n" * 999, "sums": "", "right": -1}, "w")


@pytest.mark.parametrize(
    "change",
    [
        {"made_at": 1e300},
        {"metrics": {"frechet": {"value": 1, "n": -1, "n_reference": 0}}},
        {"metrics": {"f" * 999: {"value": 1, "n": 1, "n_reference": 0}}},
        {"subject": "s" * 9999},
        {"terms": {"count": 2**80}},
    ],
)
def test_an_evaluation_out_of_range_gives_one_line(change: dict[str, Any]) -> None:
    document = evaluation().model_dump(mode="json")
    assert read_evaluation(json.dumps(document).encode(), "w") == evaluation()
    with pytest.raises(DamageError, match=r"^w: not an evaluation "):
        read_evaluation(json.dumps(document | change).encode(), "w")


def test_weights_above_the_size_limit_are_not_read(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(CARD_KEY, json.dumps(CARD).encode())
    monkeypatch.setattr("ddpm_pipeline.features.networks._MAX_NETWORK_BYTES", 10)
    with pytest.raises(
        (DamageError, UserError), match=r"classifier\.safetensors: has \d+ bytes, more than 10"
    ):
        load_classifier(folder, "uri")
