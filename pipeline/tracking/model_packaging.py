"""An exported model as an MLflow "models from code" package: safetensors, JSON, and a .py file; no pickle."""

import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

CODE_FILE = Path(__file__).with_name("pyfunc_model.py")
MODEL_FOLDER = "model"
_REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pydantic")


def package(directory: Path, destination: Path, model_id: str, run_id: str) -> Path:
    """Lay `directory` out below `destination` as MLflow's pyfunc flavour expects it; returns `destination`.

    Written by hand, because MLflow's own `save_model` runs the code, takes paths of this machine into the
    package, and lists packages for an environment that has to contain this one anyway.
    """
    from mlflow.models import Model

    destination.mkdir(parents=True)
    shutil.copytree(directory, destination / "artifacts" / MODEL_FOLDER)
    shutil.copyfile(CODE_FILE, destination / CODE_FILE.name)
    (destination / "requirements.txt").write_text("".join(f"{line}\n" for line in _pinned()))
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
        model = Model(model_id=model_id, run_id=run_id)
        model.add_flavor("python_function", **flavor)
        model.save(str(destination / "MLmodel"))
    return destination


def _pinned() -> list[str]:
    """The packages that loading needs, at the versions in use here (without a local build label such as
    +cpu).
    """
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in _REQUIREMENTS]
