"""A model's card says nothing that costs more than its weights, and is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets import model_files
from ddpm_pipeline.nets.model_files import CARD_FILE, load_card, load_model
from tests.generate.tiny import tiny_model

Card = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


def changed(model: Path, tmp_path: Path, change: Callable[[Card], object]) -> Path:
    """A copy of the model whose card was changed."""
    card = json.loads((model / CARD_FILE).read_bytes())
    change(card)
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["net"].update(multipliers=[1.0] * 100_000), "net.multipliers"),
        (lambda card: card["net"].update(attention_resolutions=[8] * 100_000), "net.attention_resolutions"),
        (lambda card: card["net"].update(base_channels=10**30), "net.base_channels"),
        (lambda card: card["schedule"].update(num_steps=10**9), "schedule.num_steps"),
        (lambda card: card.update(class_names=["x" * 10_000]), "class_names.0"),
        (lambda card: card.update(class_names=["x"] * 1_000_000), "class_names"),
        (lambda card: card["data"].update(channel_mean=[0.5] * 10_000), "data.channel_mean"),
        (lambda card: card["weights"].update(sha256="../../etc/passwd"), "weights.sha256"),
        (lambda card: card["training"].update(step=2**80), "training.step"),
        (lambda card: card["training"].update(run_id="x" * 10_000), "training.run_id"),
    ],
)
def test_a_card_of_odd_values_is_refused_by_its_field(
    model: Path, tmp_path: Path, change: Callable[[Card], object], said: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.json: not a model card \({said}: ") as refusal:
        load_card(changed(model, tmp_path, change))
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card["net"].update(
            base_channels=8192, multipliers=[64.0] * len(card["net"]["multipliers"])
        ),
        lambda card: card["net"].update(num_classes=1_000_000, null_class=True),
        lambda card: card["net"].update(num_res_blocks=64),
    ],
)
def test_a_network_that_its_weights_cannot_fill_takes_no_memory(
    model: Path, tmp_path: Path, change: Callable[[Card], object]
) -> None:
    with pytest.raises(
        DamageError, match=r"bytes of weights do not fit the network in model\.json, which has \d+"
    ):
        load_model(changed(model, tmp_path, change))


def test_a_card_of_a_gigabyte_is_not_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "MAX_CARD_BYTES", 100)
    with pytest.raises(UserError, match=r"model\.json: longer than 100 bytes"):
        load_card(model)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"null", b"\xff\xfe", b'{"format": ' + b"9" * 5000 + b"}"])
def test_what_is_no_card_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / CARD_FILE).write_bytes(data)
    with pytest.raises(UserError, match="not a model card"):
        load_card(tmp_path)
