"""Plug-ins: networks, samplers, schedules, feature networks, metrics, image sources and run loggers of other packages.

A package registers a `Plugin` under an entry point of one of the groups below, and settings name it by that entry point
(`net.kind=tiny-dit`) or by the object itself (`net.kind=tiny_dit.doors:NETWORK`). This package's own kinds are
registered in the same way; they are also listed here, so that the code that runs finds them where it is not installed.

A plug-in has its own class of settings, which need no torch to be imported, and code that is imported when it is
used. What it computes is promised per version of its package: documents hold its `PluginIdentity`.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, cast

from pydantic import BaseModel, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Key, Name
from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.errors import UserError

NETWORKS = "ddpm_pipeline.networks"
SAMPLERS = "ddpm_pipeline.samplers"
SCHEDULES = "ddpm_pipeline.schedules"
FEATURES = "ddpm_pipeline.features"
METRICS = "ddpm_pipeline.metrics"
SOURCES = "ddpm_pipeline.sources"
LOGGERS = "ddpm_pipeline.loggers"

_HERE = "ddpm_pipeline.config.own_plugins"
OWN: Mapping[str, Mapping[str, str]] = {
    NETWORKS: {"unet": f"{_HERE}:UNET"},
    SAMPLERS: {
        "ancestral": f"{_HERE}:ANCESTRAL",
        "ddim": f"{_HERE}:DDIM",
        "dpm++2m": f"{_HERE}:DPM_SOLVER_PP_2M",
        "dpm++3m": f"{_HERE}:DPM_SOLVER_PP_3M",
        "unipc": f"{_HERE}:UNIPC",
        "heun": f"{_HERE}:HEUN",
        "consistency": f"{_HERE}:CONSISTENCY",
    },
    SCHEDULES: {
        "linear": f"{_HERE}:LINEAR",
        "scaled-linear": f"{_HERE}:SCALED_LINEAR",
        "cosine": f"{_HERE}:COSINE",
        "sigmoid": f"{_HERE}:SIGMOID",
        "given": f"{_HERE}:GIVEN",
    },
    FEATURES: {"file": f"{_HERE}:FEATURE_FILE"},
    METRICS: {},
    SOURCES: {"digits": f"{_HERE}:DIGITS"},
    LOGGERS: {"tensorboard": f"{_HERE}:TENSORBOARD", "trackio": f"{_HERE}:TRACKIO"},
}
"""Kinds of this package, as its pyproject.toml registers them. Their names belong to no other package."""

NOUNS = {
    NETWORKS: "network",
    SAMPLERS: "sampler",
    SCHEDULES: "schedule",
    FEATURES: "feature network",
    METRICS: "metric",
    SOURCES: "image source",
    LOGGERS: "run logger",
}
_OBJECT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class NoSettings(Settings):
    """The settings of a plug-in that has none."""


@dataclass(frozen=True)
class Plugin:
    """What an entry point names."""

    code: str
    """Function that does the work, as `module:function`; imported when it is used. docs/extending.md has its signature
    for each group."""
    settings: type[Settings] = NoSettings
    """Class of its settings, which a document holds as `settings`. Its module needs no torch."""
    needs: tuple[str, str] | None = None
    """A module that the code imports and that may be missing, and what pip installs to have it."""

    def load(self) -> Any:
        """The function. UserError in one line if it cannot be imported."""
        return _imported(self.code, self.code)


def at_each_level(num_steps: int, settings: Any) -> Sequence[int]:
    """The network is called once at each level."""
    return range(num_steps)


def at_two_levels(num_steps: int, settings: Any) -> Sequence[int]:
    """At each level, and once more at each but the first: Heun's method looks at the next one too."""
    return [*range(num_steps), *range(1, num_steps)]


@dataclass(frozen=True)
class SamplerPlugin(Plugin):
    """What an entry point of `ddpm_pipeline.samplers` names: a sampler, and what must be known of it before it runs."""

    levels: Callable[[int, Any], Sequence[int]] = at_each_level
    """From `num_steps` and the settings to the level of each call of the network: what an image costs. A sampling that
    makes other calls fails."""
    draws_noise: bool = True
    """Whether it calls `noise`. Without, one initial noise has one image, which distillation needs of a teacher."""
    capturable: bool = False
    """Whether it may run inside a CUDA graph: it waits for nothing, reads no value of a tensor on the host, and does
    the same for every batch. False costs speed on small networks, and is always right."""


class PluginIdentity(Settings):
    """Which code a plug-in is. Another version is other code, however little it changed."""

    distribution: Name
    """Name of the installed package."""
    version: Name
    """Its version."""
    object: Key
    """The registered object, as `module:name`."""

    @property
    def requirement(self) -> str:
        """As pip names it."""
        return f"{self.distribution}=={self.version}"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Registered:
    """A plug-in that is installed here."""

    plugin: Plugin
    identity: PluginIdentity | None
    """None for this package's own kinds, which its version names."""


class Choice(NamedTuple):
    """A kind that settings name."""

    kind: str
    plugin: PluginIdentity | None
    settings: dict[str, Any] | None


class UnknownPluginError(UserError):
    """Nothing that is installed here has this name."""


class WithPlugin(Settings):
    """Base of settings with a `kind`, and of a plug-in's identity and settings where that is not one of ours."""

    PLUGIN_GROUP: ClassVar[str]

    @property
    def choice(self) -> "Choice":
        """What is chosen here. Each class has the fields `kind`, `plugin` and `settings`, with defaults of its own."""
        fields = cast(Any, self)
        return Choice(fields.kind, fields.plugin, fields.settings)

    @property
    def options(self) -> Settings:
        """The settings that the plug-in's code gets: of its own class; of our own kinds, these settings themselves.

        UserError unless the plug-in is installed in the version recorded here.
        """
        found = require_plugin(self)
        if found.identity is None and found.plugin.settings is NoSettings:
            return self
        return found.plugin.settings.model_validate(self.choice.settings or {})


def is_own(group: str, kind: str) -> bool:
    """Whether `kind` is one of this package's."""
    return kind in OWN[group]


def known_names(group: str) -> list[str]:
    """Every kind of a group that is installed here, ours first."""
    others = {entry.name for entry in importlib.metadata.entry_points(group=group)}
    return [*OWN[group], *sorted(others - OWN[group].keys())]


def find_plugin(group: str, kind: str) -> Registered:
    """The plug-in of this name. UnknownPluginError in one line if there is none, UserError if it is unusable."""
    return _find(group, kind, tuple(sys.path))


@lru_cache(maxsize=256)
def _find(group: str, kind: str, path: tuple[str, ...]) -> Registered:
    """`path`: where packages are looked for, so that another one is another question."""
    if is_own(group, kind):
        return Registered(_plugin(OWN[group][kind], kind), None)
    entries = list(importlib.metadata.entry_points(group=group, name=kind))
    owners = {entry.dist.name: entry for entry in entries if entry.dist is not None}
    if len(owners) > 1:
        raise UserError(
            f"{NOUNS[group]} {kind!r}: both {' and '.join(sorted(owners))} register it; name one as "
            f"module:object, such as {entries[0].value}"
        )
    for entry in owners.values():
        assert entry.dist is not None
        identity = PluginIdentity(
            distribution=entry.dist.name, version=entry.dist.version, object=entry.value
        )
        return Registered(_plugin(entry.value, kind), identity)
    if _OBJECT.fullmatch(kind):
        identity = _identity_of_object(kind)  # first: no module is imported that no package brings
        return Registered(_plugin(kind, kind), identity)
    raise UnknownPluginError(_unknown(group, kind))


def _identity_of_object(name: str) -> PluginIdentity:
    module = name.partition(":")[0].partition(".")[0]
    owners = importlib.metadata.packages_distributions().get(module, [])
    if not owners:
        raise UnknownPluginError(
            f"{name!r}: no installed package has the module {module}, so no version tells which code it is; install it "
            "as a package, also on every node"
        )
    owner = importlib.metadata.distribution(owners[0])
    return PluginIdentity(distribution=owner.name, version=owner.version, object=name)


def _unknown(group: str, kind: str) -> str:
    known = known_names(group)
    near = difflib.get_close_matches(kind, known, n=1, cutoff=0.6)
    meant = f"did you mean {near[0]!r}?" if near else f"known here are {', '.join(known) or 'none'}"
    return (
        f"{kind!r} is no {NOUNS[group]} that is installed here; {meant} A package's own is named by its entry point in "
        f"{group} or as module:object, once it is installed"
    )


def _plugin(name: str, kind: str) -> Plugin:
    found = _imported(name, kind)
    if not isinstance(found, Plugin):
        raise UserError(
            f"{kind!r}: {name} is a {type(found).__name__}, not a ddpm_pipeline.config.plugins.Plugin; register one"
        )
    return found


def _imported(name: str, kind: str) -> Any:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{kind!r}: {name} cannot be imported ({reason}); install what it needs") from error
    return found


def with_identity(group: str, data: Any, default: str) -> Any:
    """For a validator before all others: the fields `data` of a `WithPlugin`, completed with the identity of the
    plug-in that `kind` names, and with its settings in full.

    What a document says of a plug-in that is not installed here, or in another version, stays as it is: documents can
    be read without it. `require_plugin` refuses its use. Raises ValueError for a plug-in that is neither installed nor
    identified, and for settings that it refuses.
    """
    if not isinstance(data, Mapping):
        return data
    fields = dict(cast(Mapping[str, Any], data))
    kind = fields.get("kind", default)
    if not isinstance(kind, str):
        return fields
    if is_own(group, kind):
        return _own(group, kind, fields)
    recorded = fields.get("plugin")
    if recorded is not None:
        recorded = PluginIdentity.model_validate(recorded)
    try:
        found = find_plugin(group, kind)
    except UserError as error:
        if recorded is None:
            raise ValueError(f"kind: {error}") from None
        return fields
    if recorded in (None, found.identity):
        fields["plugin"] = found.identity
        fields["settings"] = checked_settings(found.plugin, kind, fields.get("settings"))
    return fields


def _own(group: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The same for one of our kinds. Most have their settings in the group that chooses them."""
    given = fields.get("settings")
    plugin = None if given is None else find_plugin(group, kind).plugin
    idle = "plugin" if fields.get("plugin") is not None else None
    if plugin is not None and plugin.settings is NoSettings:
        idle = "settings"
    if idle is not None:
        raise ValueError(f"{idle} has no effect for kind {kind!r}; leave it out")
    return fields if plugin is None else fields | {"settings": checked_settings(plugin, kind, given)}


def checked_settings(plugin: Plugin, kind: str, given: Any) -> dict[str, Any]:
    """A plug-in's settings in full, as plain data. ValueError in one line for those that it refuses."""
    try:
        return plugin.settings.model_validate(given or {}).model_dump(mode="json")
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["type"] == "extra_forbidden":
            known = ", ".join(plugin.settings.model_fields) or "none"
            raise ValueError(
                f"settings.{fault['loc'][-1]}: unknown setting of {kind}; known are {known}"
            ) from None
        raise ValueError(f"settings.{first_fault(error)}") from None


def require_plugin(config: WithPlugin, where: str = "") -> Registered:
    """The plug-in that `config` names. UserError unless it is installed in the version recorded there."""
    kind, recorded, _ = config.choice
    return require_installed(config.PLUGIN_GROUP, kind, recorded, where)


def require_installed(group: str, kind: str, recorded: PluginIdentity | None, where: str = "") -> Registered:
    """The plug-in of this name and identity. UserError, in one line beginning with `where`, for a missing or another
    one.
    """
    place = where or NOUNS[group]
    try:
        found = find_plugin(group, kind)
    except UnknownPluginError as error:
        if recorded is None:
            raise
        raise UserError(
            f"{place}: {kind!r} is of {recorded}, which is not installed here; install it: "
            f"pip install {recorded.requirement}"
        ) from error
    if recorded != found.identity:
        raise UserError(
            f"{place}: {kind!r} is of {recorded}, but {found.identity} is installed here, which may compute something "
            f"else; install {recorded.requirement if recorded else 'the version before'}"
            + ("" if recorded is None or found.identity is None else _moved(recorded, found.identity))
        )
    needs = found.plugin.needs
    if needs is not None and importlib.util.find_spec(needs[0]) is None:
        raise UserError(f"{place}: {kind!r} needs {needs[0]}, which is missing; pip install '{needs[1]}'")
    return found


def _moved(recorded: PluginIdentity, found: PluginIdentity) -> str:
    """Said where the version is the same, and the object is not."""
    return f" ({recorded.object}, not {found.object})" if recorded.object != found.object else ""


def choices_in(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, WithPlugin]]:
    """Every choice of a kind within settings or a document, with its dotted place."""
    if isinstance(settings, WithPlugin):
        yield f"{prefix}kind", settings
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for number, part in enumerate(cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)):
            if isinstance(part, BaseModel):
                place = f"{prefix}{name}." + (f"{number}." if isinstance(value, tuple) else "")
                yield from choices_in(part, place)


def require_plugins(*documents: BaseModel) -> None:
    """UserError, in one line, unless every plug-in that the documents name is installed in the version they name."""
    for document in documents:
        for place, choice in choices_in(document):
            if (
                choice.choice.plugin is not None or choice.PLUGIN_GROUP == LOGGERS
            ):  # of ours, these may need others
                require_plugin(choice, place)


def identities(*documents: BaseModel) -> tuple[PluginIdentity, ...]:
    """The identities in documents, each once, in order of their names."""
    found = {
        str(i): i
        for document in documents
        for _, choice in choices_in(document)
        if (i := choice.choice.plugin)
    }
    return tuple(found[name] for name in sorted(found))


def without_versions(document: Any) -> Any:
    """Plain data with the versions of plug-ins taken out: what two versions of a plug-in have in common."""
    if isinstance(document, Mapping):
        fields = cast(Mapping[str, Any], document)
        plain = {name: without_versions(value) for name, value in fields.items()}
        if isinstance(plain.get("plugin"), dict):
            plain["plugin"] = {name: value for name, value in plain["plugin"].items() if name != "version"}
        return plain
    if isinstance(document, list):
        return [without_versions(part) for part in cast(list[Any], document)]
    return document
