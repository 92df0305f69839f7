"""What the driver of a training tells its workers, and the failures that they tell it.

Without torch: processes of Ray read this that compute nothing.
"""

from dataclasses import dataclass

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import JobError


@dataclass(frozen=True)
class TrainTask:
    """The input of every worker: plain data, the same for all."""

    config: TrainConfig
    identity: str
    """Digest that names the training."""
    run_uri: str
    """URI of its checkpoints."""
    data_digest: str
    """Digest of the index that the driver read; a worker that reads another one fails."""
    tracking_uri: str | None = None
    run_id: str | None = None
    """The MLflow run, which the driver owns; None = no tracking."""
    protected: frozenset[str] = frozenset()
    """URIs that registered models need: checkpoints there are never deleted."""
    initial_sha256: str | None = None
    """Of the weights staged beside the checkpoints, which fine-tuning starts from; None = drawn from the seed."""
    started_seconds: float = 0.0
    """Unix time of the run's first start, the origin of system metrics."""
    finished_steps: int = 0
    """Of the newest checkpoint that the driver found; if more than 0, the training must find a checkpoint too."""


class WorkerGroupStartError(JobError):
    """A group of workers was lost before it trained, for example when one of them dies while they join each other.

    Ray Train keeps the resources of such a group (workers, placement group) while its driver is connected, so no later
    group would find any. The job therefore leaves the cluster and starts over.
    """


class UnreachableError(WorkerGroupStartError):
    """The workers of a group could not join: one of them died meanwhile, or the network between nodes is wrong."""
