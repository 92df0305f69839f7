"""When a job shall start itself over."""

from pipeline.errors import JobError


class WorkerGroupStartError(JobError):
    """A group of workers was lost before it trained, as when one of them dies while they join each other.

    Ray Train keeps what such a group had reserved, workers and placement group, for as long as its driver is
    connected: no group after it would find room. So the job leaves the cluster and begins again.
    """


class UnreachableError(WorkerGroupStartError):
    """The workers of a group lived and could not join: one of them died meanwhile, or their nodes' network is wrong."""
