"""Trackio: a run in its local database, which `trackio show` displays. Metrics only, no images.

Points go straight into the database, which keeps one row for each id: `trackio.log` sends them through a thread and a
server of its own, and names rows at random.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

from ddpm_pipeline.config.mirrors import TrackioSettings
from ddpm_pipeline.tracking.mirror import MirroredRun


class TrackioMirror:
    """A run as rows of the project's database."""

    def __init__(self, storage: Any, project: str, run: MirroredRun) -> None:
        self._storage, self._project, self._run = storage, project, run
        self._rows: list[tuple[int, int, dict[str, float]]] = []
        self._known: list[dict[str, Any]] | None = None

    def steps(self, name: str) -> set[int]:
        """By the database."""
        if self._known is None:
            self._known = list(self._storage.get_logs(self._project, self._run.name, run_id=self._run.run_id))
        return {row["step"] for row in self._known if name in row}

    def point(self, name: str, step: int, value: float, time_ms: int) -> None:
        """With the others of its step and time in one row."""
        if not self._rows or self._rows[-1][:2] != (step, time_ms):
            self._rows.append((step, time_ms, {}))
        self._rows[-1][2][name] = value

    def image(self, name: str, step: int, png: bytes, time_ms: int) -> None:
        """Not mirrored."""

    def flush(self) -> None:
        """One transaction."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._storage.bulk_log(
            self._project,
            self._run.name,
            [values for _, _, values in rows],
            steps=[step for step, _, _ in rows],
            timestamps=[datetime.fromtimestamp(time / 1000, UTC).isoformat() for _, time, _ in rows],
            log_ids=[self._row_id(*row) for row in rows],
            run_id=self._run.run_id,
        )

    def close(self) -> None:
        """Nothing is open."""

    def _row_id(self, step: int, time_ms: int, values: dict[str, float]) -> str:
        name = f"{self._run.run_id}/{step}/{time_ms}/{','.join(sorted(values))}"
        return uuid.uuid5(uuid.NAMESPACE_URL, name).hex


def open_trackio(run: MirroredRun, settings: TrackioSettings) -> TrackioMirror:
    """The mirror in this user's database."""
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    return TrackioMirror(SQLiteStorage, settings.project, run)
