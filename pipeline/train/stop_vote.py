"""Agreeing to stop: every worker learns at the same step that any of them was asked to."""

import torch
import torch.distributed as dist


class StopVote:
    """A one-number exchange a step, on its way while the next step computes, so that nobody waits for it.

    All ranks construct it and call `decide` once a step. It has a group of its own, on gloo, because the device's
    group would make every step wait for the device.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._ballot = torch.zeros(1)
        self._sent: dist.Work | None = None

    def decide(self, asked: bool) -> bool:
        """Cast this rank's vote for the next step; returns whether any rank asked by the step before."""
        if self._group is None:
            return asked
        agreed = False
        if self._sent is not None:
            self._sent.wait()
            agreed = bool(self._ballot > 0)
        self._ballot = torch.full((1,), float(asked))
        self._sent = dist.all_reduce(self._ballot, group=self._group, async_op=True)
        return agreed
