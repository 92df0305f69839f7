"""A model in this process, which samples what a generation would contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import ClassChoice, SpecSettings
from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.class_labels import index_tensor
from ddpm_pipeline.generate.device_check import usable_kind
from ddpm_pipeline.generate.engine import Engine, set_up_torch
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.generate.plan import SampleBatch, batches, shards
from ddpm_pipeline.generate.spec import Spec, make_spec
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.progress import Progress, no_progress


class LoadedModel:
    """A network on a device. Not thread-safe."""

    def __init__(self, reference: str, model: ResolvedModel, device: Literal["cpu", "cuda"]) -> None:
        """`reference` is the name by which the model was found, for messages."""
        self.card: ModelCard = model.card
        """Architecture, diffusion process, image shape and origin."""
        self.net: nn.Module = build_model(model.card, model.weights, device, where=reference)
        """The network, in eval mode."""
        self.reference = reference if model.version is None else f"{model.name}/{model.version}"
        """`name/version`, or the folder."""
        self._model = model
        self._device: Literal["cpu", "cuda"] = device

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label; None for a model without classes or with unnamed ones."""
        return self.card.class_names

    def sample(
        self,
        count: int = 1,
        *,
        classes: ClassChoice = "auto",
        seed: int = 0,
        sampler: SamplerConfig | Mapping[str, Any] | None = None,
        first_index: int = 0,
        batch_size: int = 64,
        shard_size: int = 1000,
        cpu_threads: int = 1,
        progress: Progress = no_progress,
    ) -> Pixels:
        """Images uint8 (count, height, width, channels) of the indexes from `first_index`.

        They are, bit for bit, those of a generation with these settings on this kind of device, whatever its count; the
        defaults are a generation's. So whole batches are sampled, as rounding depends on the batch: for a quick look
        at a few images lower `batch_size`. `classes`, `sampler` and the others are as `ddpm generate` has them; None is
        the default sampler. `progress` counts images. Raises UserError where settings and model do not fit.
        """
        spec = self._spec(
            count=count,
            classes=classes,
            seed=seed,
            sampler=SamplerConfig() if sampler is None else sampler,
            first_index=first_index,
            batch_size=batch_size,
            shard_size=shard_size,
            cpu_threads=cpu_threads,
        )
        threads = torch.get_num_threads()
        try:
            set_up_torch(spec)
            return self._images(Engine(spec, self.net, self.card), progress)
        finally:
            torch.set_num_threads(threads)

    def _images(self, engine: Engine, progress: Progress) -> Pixels:
        spec, parts = engine.spec, list[Pixels]()
        done = 0
        for batch in _batches(spec):
            parts.append(engine.images(index_tensor(batch.samples))[: batch.keep])
            done += batch.keep
            progress(done, spec.count)
        return np.concatenate(parts)

    def _spec(self, **settings: object) -> Spec:
        try:
            chosen = SpecSettings.model_validate({"model": self.reference, **settings})
        except ValidationError as error:
            raise UserError(first_fault(error)) from None
        model = self._model
        return make_spec(
            chosen,
            self.card,
            name=model.name,
            version=model.version,
            device=self._device,
            device_kind=usable_kind(torch.device(self._device)),
        )


def load_model(reference: str, device: Literal["cpu", "cuda"] | None = None) -> LoadedModel:
    """The model `name@alias`, `name/version`, or in a folder; on a GPU where there is one, unless `device` says else.

    UserError where there is no such model; DamageError where its files do not match their record.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(reference, find_model(reference), place)


def _batches(spec: Spec) -> list[SampleBatch]:
    return [batch for unit in shards(spec) for batch in batches(spec, unit)]
