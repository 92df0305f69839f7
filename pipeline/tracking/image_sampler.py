"""Registered models as MLflow loads them: `mlflow.pyfunc.load_model` returns a sampler of images.

`mlflow.pyfunc.load_model(uri).predict({"seed": 0, "count": 4, "class": 3})` returns uint8 images of shape
(count, H, W, C). Optional: `class` (a label), `steps` (sampler steps, default 50, of a distilled model 2) and
`first_index` (default 0). An image depends on the seed and its index alone, as in a generation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.image_scaling import to_uint8
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.nets.model_files import load_model

_KNOWN = ("seed", "count", "class", "steps", "first_index")


class ImageSampler(PythonModel):
    """Weights and card from the model's own files; safetensors only."""

    # MLflow's validation knows lists of records only and warns of all else; a request here is one record.
    _skip_type_hint_validation = True

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network (hash checked against its card)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._net, self._card = load_model(Path(str(context.artifacts["model"])), device)
        self._schedule = NoiseSchedule.from_config(self._card.schedule)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] - the base is abstract and returns nothing
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Images for one request: a mapping of numbers, or a data frame with one row. ValueError names a bad
        field.
        """
        request = _request(model_input)
        count = request.get("count", 1)
        first = request.get("first_index", 0)
        device = next(self._net.parameters()).device
        index = torch.arange(first, first + count, device=device)
        labels = None if "class" not in request else torch.full((count,), request["class"], device=device)
        distilled = self._card.distillation is not None
        steps = min(request.get("steps", 2 if distilled else 50), self._card.schedule.num_steps)
        shape = (self._card.image.channels, self._card.image.size, self._card.image.size)
        with torch.inference_mode():
            images = sample(
                self._net,
                self._schedule,
                SamplerConfig(kind="consistency" if distilled else "ddim", num_steps=steps),
                index=index,
                shape=shape,
                seed=request.get("seed", 0),
                class_labels=labels,
                objective=self._card.objective,
            )
        return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def _request(model_input: Any) -> dict[str, int]:
    """Plain whole numbers, whatever container a caller or the model server put them in."""
    fields: Mapping[str, Any] = (
        model_input if isinstance(model_input, Mapping) else model_input.to_dict("list")
    )
    request: dict[str, int] = {}
    for name, value in fields.items():
        if name not in _KNOWN:
            raise ValueError(f"{name}: unknown; known are {', '.join(_KNOWN)}")
        number = np.asarray(value).reshape(-1)
        if number.size != 1 or int(number[0]) != number[0]:
            raise ValueError(f"{name}: expected one whole number, got {value!r}")
        if name in ("count", "steps") and number[0] < 1:
            raise ValueError(f"{name}: at least 1, got {value!r}")
        request[name] = int(number[0])
    return request
