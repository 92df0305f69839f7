"""The `ddpm sample` command that draws a stored sample again, byte for byte.

Random numbers are functions of seed, index and step, but a network's rounding also depends on the batch that a sample
is computed in and on its place there. So the command samples the whole network call that the sample was part of and
writes one image of it. The bytes are equal on the kind of device and with the software of the shard's record;
elsewhere a few values may differ by a level.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.generate.plan import locate
from ddpm_pipeline.generate.spec import ClassPlan, Spec

UNKNOWN_MODEL = "FOLDER-OF-THE-MODEL"
"""Stands in a command for the folder of a model that is in no registry: a spec does not hold its path."""


@dataclass(frozen=True)
class NetworkCall:
    """The samples [first, first + size), which went through the network together."""

    first: int
    size: int


def network_call(spec: Spec, index: int, micro_batch: int) -> NetworkCall:
    """The call that computed sample `index`; `micro_batch` is that of its shard's record."""
    _, batch = locate(spec, index)
    size = min(batch.size, micro_batch)
    first = batch.first + (index - batch.first) // size * size
    return NetworkCall(first, min(size, batch.first + batch.size - first))


def common_words(spec: Spec, model: str | None = None) -> str:
    """The part of the command that all samples of a generation share. `model` is the folder of an unregistered one."""
    words = {
        "model": spec.model.reference or model or UNKNOWN_MODEL,
        "seed": str(spec.seed),
        **_cycle_of_classes(spec.classes),
        **_sampler(spec.sampler),
        "dtype": spec.dtype,
        "device": spec.device,
    }
    if spec.device == "cpu":
        words["cpu_threads"] = str(spec.cpu_threads)
    elif spec.matmul != "ieee":
        words["matmul"] = spec.matmul
    if spec.compile:
        words["compile"] = "true"
    if spec.image_format != "png":
        words["image_format"] = spec.image_format
    words |= {"provenance": "false"} if spec.provenance is None else {"spec_digest": spec.digest}
    return _joined("ddpm", "sample", **words)


def own_words(spec: Spec, index: int, micro_batch: int) -> str:
    """The rest of the command, for one sample."""
    call = network_call(spec, index, micro_batch)
    return _joined(
        first_index=str(call.first),
        count=str(call.size),
        batch_size=str(call.size),
        **_drawn_classes(spec, call),
        only=_list([index]),
        output=f"sample-{index}",
    )


def _joined(*words: str, **settings: str) -> str:
    return shlex.join([*words, *(f"{name}={value}" for name, value in settings.items())])


def _cycle_of_classes(plan: ClassPlan | None) -> dict[str, str]:
    """The setting of classes where it is the same for all samples."""
    if plan is None:
        return {"classes": "null"}
    return {"classes": _list(plan.labels)} if plan.weights is None else {}


def _drawn_classes(spec: Spec, call: NetworkCall) -> dict[str, str]:
    """The setting of classes that were drawn with weights: the labels of this call, rotated so that they meet the
    indexes of its samples, as a cycle of labels gives index i the label at i modulo its length.
    """
    if spec.classes is None or spec.classes.weights is None:
        return {}
    from ddpm_pipeline.generate.class_labels import labels_of  # imports torch

    labels = labels_of(spec, range(call.first, call.first + call.size)) or []
    turn = -call.first % call.size  # place of the label that the multiple of `size` takes
    return {"classes": _list(labels[turn:] + labels[:turn])}


def _list(numbers: Sequence[int]) -> str:
    return json.dumps(list(numbers), separators=(",", ":"))


def _sampler(config: SamplerConfig) -> dict[str, str]:
    """The sampler's settings that differ from the defaults. Others would be refused where they have no effect."""
    chosen = config.model_dump(mode="json", exclude_defaults=True)
    return {
        f"sampler.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in chosen.items()
    }
