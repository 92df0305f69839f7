"""An exported model as an MLflow "models from code" package: safetensors, JSON, and a .py file; no pickle."""

import platform
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_pipeline import __version__
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.config.plugins import identities

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

CODE_FILE = Path(__file__).with_name("pyfunc_model.py")
MODEL_FOLDER = "model"
_REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pydantic")
EXAMPLE = {"seed": 0, "count": 4}
"""A request, which MLflow shows and serves with the model."""


def package(directory: Path, destination: Path, model_id: str, run_id: str) -> Path:
    """Lay `directory` out below `destination` as MLflow's pyfunc flavour expects it; returns `destination`.

    Written by hand, because MLflow's own `save_model` runs the code, takes paths of this machine into the
    package, and lists packages for an environment that has to contain this one anyway.
    """
    from mlflow.models import Model
    from mlflow.models.utils import _Example  # pyright: ignore[reportPrivateUsage] - what `save_model` uses

    from ddpm_pipeline.nets.model_files import load_card  # imports torch

    destination.mkdir(parents=True)
    shutil.copytree(directory, destination / "artifacts" / MODEL_FOLDER)
    shutil.copyfile(CODE_FILE, destination / CODE_FILE.name)
    card = load_card(directory)
    plugins = [plugin.requirement for plugin in identities(card)]
    (destination / "requirements.txt").write_text("".join(f"{line}\n" for line in [*_pinned(), *plugins]))
    flavor: dict[str, Any] = {
        "artifacts": {"model": {"path": f"artifacts/{MODEL_FOLDER}", "uri": f"artifacts/{MODEL_FOLDER}"}},
        "code": None,
        "env": {"virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.pyfunc.loaders.code_model",
        "model_code_path": CODE_FILE.name,
        "python_version": platform.python_version(),
        "streamable": False,
    }
    (destination / "python_env.yaml").write_text(
        f"python: {platform.python_version()}\nbuild_dependencies: []\ndependencies:\n- -r requirements.txt\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = Model(model_id=model_id, run_id=run_id, signature=signature_of(card))
        example = _Example(EXAMPLE)
        example.save(str(destination))
        model.saved_input_example_info = example.info
        model.add_flavor("python_function", **flavor)
        model.save(str(destination / "MLmodel"))
    return destination


def signature_of(card: ModelCard) -> "ModelSignature":
    """What a request holds, whole numbers, and the images that come of it, uint8 (count, H, W, C)."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    optional = ["count", *(["class"] if card.net.num_classes is not None else []), "steps", "first_index"]
    fields: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.long, "seed"),
        *(ColSpec(DataType.long, name, required=False) for name in optional),
    ]
    shape = (-1, card.image.size, card.image.size, card.image.channels)
    return ModelSignature(inputs=Schema(fields), outputs=Schema([TensorSpec(np.dtype("uint8"), shape)]))


def _pinned() -> list[str]:
    """The packages that loading needs, at the versions in use here (without a local build label such as
    +cpu).
    """
    from importlib.metadata import version

    ours = f"ddpm-pipeline=={__version__}"  # of the code that runs, which may not be installed
    return [ours, *(f"{name}=={version(name).split('+')[0]}" for name in _REQUIREMENTS)]
