"""Energy that GPUs use while a piece of work runs."""

import time
from collections.abc import Callable, Sequence

from ddpm_pipeline.devices.nvml import Gpu


class EnergyMeter:
    """Joules that GPUs have used since the meter was made, all processes on them included."""

    def __init__(self, gpus: Sequence[Gpu], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds."""
        self._meters = [_Counter(gpu, clock) for gpu in gpus]

    def joules(self) -> float | None:
        """The energy so far; None if a GPU does not report it, or there is none.

        A GPU without a counter of energy reports its power, which is summed from call to call: call it several times
        a minute.
        """
        parts = [meter.joules() for meter in self._meters]
        known = [part for part in parts if part is not None]
        return sum(known) if known and len(known) == len(parts) else None


class _Counter:
    """Energy of one GPU: of its counter or, without one, power times time."""

    def __init__(self, gpu: Gpu, clock: Callable[[], float]) -> None:
        self._gpu, self._clock = gpu, clock
        self._start = gpu.energy_joules()
        self._summed: float | None = 0.0
        self._at, self._watts = clock(), gpu.power_watts()

    def joules(self) -> float | None:
        if self._start is not None:
            now = self._gpu.energy_joules()
            return None if now is None else now - self._start
        at, watts = self._clock(), self._gpu.power_watts()
        if self._summed is None or watts is None or self._watts is None:
            self._summed = None
        else:
            self._summed += (at - self._at) * (watts + self._watts) / 2  # trapezoid
        self._at, self._watts = at, watts
        return self._summed
