"""The model registry: versions that carry the sha256 of weights and card, and aliases such as champion.

A registered model is the directory that training exports (`model.safetensors`, `model.json`) inside MLflow's
"models from code" package, so that no pickle is written or read. `download` fetches the two files only, never
the code.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.alias_log import LoggedAlias
from ddpm_pipeline.tracking.connect import (
    is_denied,
    long_transfers,
    require_server,
    retry_request,
    retry_requests,
    tracking_client,
    tracking_uri,
)
from ddpm_pipeline.tracking.direct_artifacts import direct_artifacts
from ddpm_pipeline.tracking.model_packaging import MODEL_FOLDER, package

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CARD = "model.json"
SHA256_TAG = "sha256"
CARD_TAG = "card_sha256"
CHECKPOINT_TAG = "ddpm.checkpoint_uri"
IDENTITY_TAG = "identity"
"""Digest of the training that a version came from, if the caller passes it."""
LAST_TRAINING_TAG = "ddpm.last_training"
"""Of a registered model: identity of the training that was started last."""
_REFERENCE = re.compile(r"^(?:models:/)?(?P<name>[^@/:]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+))$")
_UPLOAD_RETRY_SECONDS = 300.0
_LOGGED_MODEL = "models:/"


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version of a registered model."""

    name: str
    version: int
    sha256: str
    """Hex digest of `model.safetensors`; empty for a version that another program registered."""
    source: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    aliases: tuple[str, ...] = ()
    description: str = ""
    model_id: str | None = None
    """MLflow's id of the logged model behind the version."""

    @property
    def reference(self) -> str:
        """`name/version`, which `resolve` accepts and which never changes its meaning."""
        return f"{self.name}/{self.version}"


def require_registrable(name: str, identity: str, uri: str | None = None) -> None:
    """Make sure, before work starts, that this user may register versions of `name`: make the model if it is missing,
    and note on it which training was started last. UserError where MLflow refuses either.
    """
    client = tracking_client(uri)

    def attempt() -> None:
        _make_registered_model(client, name)
        client.set_registered_model_tag(name, LAST_TRAINING_TAG, identity)

    retry_request(f"registering versions of model {name!r}", attempt)


def register(
    name: str,
    directory: Path,
    run_id: str,
    tags: Mapping[str, str],
    description: str = "",
    *,
    logged_name: str | None = None,
    step: int = 0,
    checkpoint_uri: str | None = None,
    uri: str | None = None,
) -> ModelVersion:
    """Register the exported model in `directory` as the next version of `name`.

    `logged_name` (such as unet-ema-0012000; default: `name`) and `step` are for the run page; `checkpoint_uri` is the
    checkpoint that it came from, which retention then keeps. The same weights of the same training (its tag `identity`,
    else its run) are registered once: a repeated call returns the existing version, and two concurrent calls both
    return the lower version. UserError when the directory is not an exported model.
    """
    sha256 = _weights_sha256(directory)
    client = tracking_client(uri)
    training = (run_id, tags.get(IDENTITY_TAG))
    all_tags = {**{k: str(v) for k, v in redact(tags).items()}, SHA256_TAG: sha256}
    all_tags[CARD_TAG] = file_sha256(directory / CARD)
    if checkpoint_uri is not None:
        all_tags[CHECKPOINT_TAG] = checkpoint_uri

    def attempt() -> ModelVersion:
        # Registered by an earlier call, or by an attempt whose response was lost.
        found = _registered(client, name, training, sha256)
        if found is not None:
            return _view(client, found)
        model_id = log_model(directory, run_id, tags, logged_name=logged_name or name, step=step, uri=uri)
        _make_registered_model(client, name)
        source = f"{_LOGGED_MODEL}{model_id}"
        created = client.create_model_version(
            name, source, run_id, all_tags, None, redact(description), await_creation_for=0, model_id=model_id
        )
        # MLflow has no conditional create: a caller that finds a lower version deletes its own.
        first = _registered(client, name, training, sha256) or created
        if int(first.version) < int(created.version):
            _delete_twin(client, created, first)
        return _view(client, first)

    return retry_request(f"registering {name}", attempt, _UPLOAD_RETRY_SECONDS)


def log_model(
    directory: Path,
    run_id: str,
    tags: Mapping[str, str],
    *,
    logged_name: str,
    step: int = 0,
    uri: str | None = None,
) -> str:
    """Show an exported model on its run's page without registering it; returns MLflow's id of the logged model.

    The same weights of the same run under the same name are uploaded once.
    """
    sha256 = _weights_sha256(directory)
    client = tracking_client(uri)

    def attempt() -> str:
        experiment_id = client.get_run(run_id).info.experiment_id
        where = f"source_run_id = '{run_id}' AND tags.`{SHA256_TAG}` = '{sha256}'"
        for model in client.search_logged_models([experiment_id], filter_string=where):
            if str(model.status) == "READY" and model.name == logged_name:
                _show_on_run(client, run_id, str(model.model_id), step)
                return str(model.model_id)
        all_tags = {**{k: str(v) for k, v in redact(tags).items()}, SHA256_TAG: sha256}
        created = client.create_logged_model(
            experiment_id, logged_name, run_id, all_tags, model_type="diffusion"
        )
        with tempfile.TemporaryDirectory() as folder, long_transfers():
            package(directory, Path(folder) / "package", str(created.model_id), run_id)
            with direct_artifacts(lambda: str(created.artifact_location)):
                client.log_model_artifacts(created.model_id, str(Path(folder) / "package"))
        client.finalize_logged_model(created.model_id, "READY")
        _show_on_run(client, run_id, str(created.model_id), step)
        return str(created.model_id)

    return retry_request(f"uploading model {logged_name}", attempt, _UPLOAD_RETRY_SECONDS)


def resolve(reference: str, uri: str | None = None) -> ModelVersion:
    """The version that `name@alias`, `name/3` or the same after `models:/` stands for now.

    If a killed or suspended job left an alias behind the log of its moves, the log decides; readers write nothing.
    UserError names what is missing and lists what exists.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise UserError(f"model {reference!r}: not a reference; write name@alias or name/version")
    client = tracking_client(require_server(uri))
    name = match["name"]
    known = versions(name, uri)
    if not known:
        raise UserError(f"model {name!r}: not in the registry; it has {_listing(_model_names(client))}")
    if match["version"] is not None:
        chosen = [v for v in known if v.version == int(match["version"])]
        missing = f"version {match['version']}: not registered; {name} has versions {_span(known)}"
    else:
        current = LoggedAlias(name, match["alias"], uri).read().current_version
        chosen = [v for v in known if v.version == current]
        aliases = sorted(f"{a} -> {v.version}" for v in known for a in v.aliases)
        missing = (
            f"alias {match['alias']!r}: not set; {name} has {_listing(aliases)}, versions {_span(known)}"
        )
    if not chosen:
        raise UserError(f"model {reference!r}: {missing}")
    return chosen[0]


def download(version: ModelVersion, dest: Path, uri: str | None = None) -> Path:
    """Fetch weights and card into `dest`, checked; returns `dest`. Files that already match are kept.

    UserError when the version carries no sha256; DamageError, and nothing left in place, when weights or card are
    not those that were registered.
    """
    if not version.sha256:
        raise UserError(
            f"model {version.reference}: has no sha256 tag; it was not registered by this pipeline"
        )
    registered = {WEIGHTS: version.sha256, CARD: version.tags.get(CARD_TAG)}
    if registered[CARD] is None:
        log.warning(
            "model %s: its %s cannot be verified, because it was registered without a hash",
            version.reference,
            CARD,
        )
    if all(_has_sha256(dest / name, sha256) for name, sha256 in registered.items()):
        return dest
    configured = tracking_client(uri)
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".download-") as folder:
        for name, sha256 in registered.items():
            _fetch(configured, version, name, Path(folder), tracking_uri(uri))
            if not _has_sha256(Path(folder) / name, sha256):
                raise DamageError(
                    f"model {version.reference}: {name} has sha256 {file_sha256(Path(folder) / name)}, registered was "
                    f"{sha256}; its object was changed or truncated; restore it, or use another version"
                )
        for name in registered:
            (Path(folder) / name).replace(dest / name)
    return dest


def _has_sha256(path: Path, sha256: str | None) -> bool:
    """Whether the file exists and has this hash; any hash if `sha256` is None."""
    return path.is_file() and sha256 in (None, file_sha256(path))


@retry_requests("the model registry")
def set_alias(name: str, alias: str, version: int, uri: str | None = None) -> None:
    """Point `name@alias` to this version. UserError for a version that does not exist."""
    if not any(v.version == version for v in versions(name, uri)):
        raise UserError(
            f"model {name}/{version}: not registered; it has versions {_span(versions(name, uri))}"
        )
    tracking_client(uri).set_registered_model_alias(name, alias, str(version))


@retry_requests("the model registry")
def set_version_tags(version: ModelVersion, tags: Mapping[str, str], uri: str | None = None) -> None:
    """Set tags on a registered version, in addition to its others."""
    client = tracking_client(uri)
    for name, value in redact(tags).items():
        client.set_model_version_tag(version.name, str(version.version), name, str(value))


@retry_requests("the model registry")
def versions(name: str, uri: str | None = None) -> list[ModelVersion]:
    """All versions of a registered model, oldest first; empty when there is no such model."""
    client = tracking_client(uri)
    aliases = _aliases(client, name)
    found = [_view(client, v, aliases) for v in _search_versions(client, f"name='{_quotable(name)}'")]
    return sorted(found, key=lambda v: v.version)


@retry_requests("the model registry")
def protected_model_sources(uri: str | None = None) -> frozenset[str]:
    """Every URI that some registered version needs: retention and cleanup must not touch anything below these.

    These are MLflow's sources, the artifact locations behind them, and the checkpoints that versions came from.
    """
    client = tracking_client(uri)
    uris: set[str] = set()
    for version in _search_versions(client, None):
        uris.add(str(version.source))
        if version.tags.get(CHECKPOINT_TAG):
            uris.add(version.tags[CHECKPOINT_TAG])
        model_id = _model_id(version)
        if model_id is not None:
            uris.add(str(client.get_logged_model(model_id).artifact_location))
    return frozenset(uris)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weights_sha256(directory: Path) -> str:
    for name in (WEIGHTS, CARD):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: no {name} here; export the model before registering it")
    return file_sha256(directory / WEIGHTS)


def _show_on_run(client: "MlflowClient", run_id: str, model_id: str, step: int) -> None:
    """List the model on the run's page, once: MLflow lists a run's outputs there, and a registered model is not
    automatically an output of its source run.
    """
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    known = {output.model_id for output in outputs.model_outputs} if outputs is not None else set[str]()
    if model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _make_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _delete_twin(client: "MlflowClient", twin: "MlflowVersion", first: "MlflowVersion") -> None:
    """Delete a version of which there is a lower one; a user who may not delete leaves it, and says so."""
    done = "deleted"
    try:
        client.delete_model_version(twin.name, str(twin.version))
    except Exception as error:
        if not is_denied(error):
            raise
        done = "stays, since this user may not delete it"
    log.warning("%s/%s: registered at the same time as %s; %s", twin.name, twin.version, first.version, done)


def _registered(
    client: "MlflowClient", name: str, training: tuple[str, str | None], sha256: str
) -> "MlflowVersion | None":
    """The lowest version with these weights of this training: (run id, identity)."""
    run_id, identity = training
    found = [
        version
        for version in _search_versions(client, f"name='{_quotable(name)}'")
        if version.tags.get(SHA256_TAG) == sha256
        and (version.run_id == run_id or (identity and version.tags.get(IDENTITY_TAG) == identity))
    ]
    return min(found, key=lambda version: int(version.version), default=None)


def _fetch(client: "MlflowClient", version: ModelVersion, name: str, folder: Path, address: str) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    def fetch() -> str:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        place = f"{source}/artifacts/{MODEL_FOLDER}/{name}"
        with direct_artifacts(lambda: place):
            return download_artifacts(
                artifact_uri=place, dst_path=str(folder / "raw"), tracking_uri=address, registry_uri=address
            )

    try:
        downloaded = retry_request(f"downloading {version.reference}", fetch, _UPLOAD_RETRY_SECONDS)
    except (MlflowException, OSError) as error:
        raise DamageError(
            f"model {version.reference}: {name} cannot be read ({redact(str(error))[:200]})"
        ) from None
    shutil.move(downloaded, folder / name)


def _search_versions(client: "MlflowClient", where: str | None) -> "Iterator[MlflowVersion]":
    token: str | None = None
    while True:
        page = client.search_model_versions(where, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _aliases(client: "MlflowClient", name: str) -> dict[str, list[str]]:
    """Aliases by version; a search for versions leaves them out."""
    from mlflow.exceptions import MlflowException

    try:
        pairs: dict[str, Any] = dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    by_version: dict[str, list[str]] = {}
    for alias, version in sorted(pairs.items()):
        by_version.setdefault(str(version), []).append(alias)
    return by_version


def _view(
    client: "MlflowClient", version: "MlflowVersion", aliases: Mapping[str, list[str]] | None = None
) -> ModelVersion:
    known = _aliases(client, version.name) if aliases is None else aliases
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        sha256=version.tags.get(SHA256_TAG, ""),
        source=str(version.source),
        run_id=str(version.run_id or ""),
        tags=dict(version.tags),
        aliases=tuple(known.get(str(version.version), ())),
        description=version.description or "",
        model_id=_model_id(version),
    )


def _model_id(version: "MlflowVersion") -> str | None:
    """A search for versions leaves the id out, but the source names it."""
    source = str(version.source).removeprefix(_LOGGED_MODEL)
    return version.model_id or (source if source.startswith("m-") and "/" not in source else None)


def _model_names(client: "MlflowClient") -> list[str]:
    return [str(model.name) for model in client.search_registered_models(max_results=100)]


def _quotable(name: str) -> str:
    if "'" in name:
        raise UserError(f"model name {name!r}: holds a quote, which no registry name may")
    return name


def _listing(items: list[str]) -> str:
    return ", ".join(items[:20]) + (" ..." if len(items) > 20 else "") if items else "none"


def _span(known: list[ModelVersion]) -> str:
    return _listing([str(v.version) for v in known[-20:]])
