"""What MLflow is told is told to TensorBoard and Trackio too: each step once, whatever dies in between."""

import importlib.util
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.config.plugins import require_plugins
from ddpm_pipeline.config.tracking import MirrorConfig, TrackConfig
from ddpm_pipeline.data.formats.npy import encode_npy
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking.journal import Journal
from ddpm_pipeline.tracking.mirror import MirroredRun, MirrorFeed
from ddpm_pipeline.tracking.spool import Spool
from ddpm_pipeline.tracking.tensorboard_mirror import TensorBoardMirror, read_events
from tests.effort import examples

RUN = MirroredRun("0123456789abcdef", "digits")


def tensorboard(folder: Path) -> MirrorConfig:
    return MirrorConfig(kind="tensorboard", settings={"folder": str(folder)})


def logged(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar of the run's event files."""
    (run,) = folder.iterdir()
    return [(v.tag, e.step, v.simple_value) for e in read_events(run) for v in e.summary.value]


operation = st.one_of(
    st.tuples(st.just("log"), st.integers(0, 12)),
    st.tuples(st.just("deliver"), st.sampled_from(["whole", "fails", "dies"])),
    st.tuples(st.just("die"), st.booleans()),
)


@examples(60)
@given(st.lists(operation, max_size=30))
def test_every_step_stands_once_in_the_event_files_with_its_first_value(story: list[tuple[str, Any]]) -> None:
    first: dict[int, float] = {}
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        spool, events = Path(place, "spool"), Path(place, "events")

        def born() -> tuple[Journal, MirrorFeed]:
            journal = Journal(spool)
            return journal, MirrorFeed(journal, tensorboard(events), RUN)

        journal, feed = born()
        for clock, (what, detail) in enumerate(story):
            if what == "log":
                first.setdefault(detail, float(clock))
                journal.append({"t": clock, "s": detail, "m": {"loss": float(clock)}})
            elif what == "deliver":
                with patch.context() as fault:
                    if detail == "fails":
                        fault.setattr(TensorBoardMirror, "flush", _fail)
                    if detail == "dies":  # all is on the disk but the note how far it came
                        fault.setattr(Journal, "save_offset", _fail)
                    feed.deliver()
            else:
                journal, feed = born()
                if detail:
                    (spool / "offset-tensorboard.json").unlink()
                    journal, feed = born()
        assert feed.deliver()
        feed.close()
        found = logged(events) if events.exists() else []
    assert sorted(found) == sorted(("loss", step, value) for step, value in first.items())


def _fail(*_: object) -> None:
    raise OSError("no space left")


def test_a_killed_training_that_goes_on_leaves_no_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = tmp_path / "life.py"
    life.write_text(
        "import os, sys; from pathlib import Path; from ddpm_pipeline.config.tracking import MirrorConfig\n"
        "from ddpm_pipeline.tracking.journal import Journal\n"
        "from ddpm_pipeline.tracking.mirror import MirroredRun, MirrorFeed\n"
        "place, start, kill = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "journal = Journal(place / 'spool')\n"
        "config = MirrorConfig(kind='tensorboard', settings={'folder': str(place / 'events')})\n"
        "feed = MirrorFeed(journal, config, MirroredRun('0123456789abcdef', 'digits'))\n"
        "for step in range(start, 10):\n"
        "    journal.append({'t': step, 's': step, 'm': {'train/loss': 1.0 / (step + 1)}})\n"
        "    if step == kill:\n"
        "        journal.save_offset = lambda *_: os.kill(os.getpid(), 9)\n"
        "    feed.deliver()\n"
    )
    first = subprocess.run([sys.executable, life, str(tmp_path), "0", "5"], check=False)
    assert first.returncode == -signal.SIGKILL
    # goes on from its last checkpoint, some steps back
    monkeypatch.setattr(sys, "argv", [str(life), str(tmp_path), "3", "99"])
    runpy.run_path(str(life))
    steps = [step for _, step, _ in logged(tmp_path / "events")]
    assert sorted(steps) == list(range(10))  # in two files, which may be of one second


def test_a_torn_record_ends_its_file_and_hides_no_other(tmp_path: Path) -> None:
    for step in (1, 2):
        mirror = TensorBoardMirror(tmp_path)
        mirror.point("loss", step, 0.5, 1000)
        mirror.close()
        (newest,) = [f for f in tmp_path.iterdir() if step == 1 or "torn" not in f.name][-1:]
        if step == 1:
            newest.write_bytes(newest.read_bytes()[:-3])
            newest.rename(newest.with_name(newest.name + ".torn"))
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [2]


def test_images_are_mirrored_as_png(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "spool")
    feed = MirrorFeed(journal, tensorboard(tmp_path / "events"), RUN)
    name = journal.put_file(encode_npy(np.zeros((4, 6), np.uint8)), ".npy")
    journal.append({"t": 1, "s": 7, "i": "samples", "f": name})
    assert feed.deliver()
    feed.close()
    (run,) = (tmp_path / "events").iterdir()
    (value,) = [v for e in read_events(run) for v in e.summary.value]
    assert (value.tag, value.image.width, value.image.height) == ("images/samples", 6, 4)
    assert value.image.encoded_image_string.startswith(b"\x89PNG")


def test_a_spool_is_delivered_once_its_mirror_has_everything_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "spool")
    feed = MirrorFeed(journal, tensorboard(tmp_path / "events"), RUN)
    journal.append({"t": 1, "s": 1, "m": {"loss": 1.0}})
    journal.save_offset(len(b'{"t":1,"s":1,"m":{"loss":1.0}}\n'))
    assert (journal.undelivered(), journal.undelivered_lines()) == (1, b'{"t":1,"s":1,"m":{"loss":1.0}}\n')
    assert feed.deliver()
    assert (journal.undelivered(), journal.undelivered_lines()) == (0, b"")


def test_a_mirror_that_is_missing_is_refused_by_its_settings_and_named_once() -> None:
    assert [m.kind for m in TrackConfig.model_validate({"mirrors": ["tensorboard"]}).mirrors] == [
        "tensorboard"
    ]
    for mirrors, told in (
        (["tensorbord"], "did you mean 'tensorboard'"),
        (["tensorboard", "tensorboard"], "names one twice"),
        (
            [{"kind": "tensorboard", "settings": {"dir": "x"}}],
            "unknown setting of tensorboard; known are folder",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            TrackConfig.model_validate({"mirrors": mirrors})


def test_a_run_logger_whose_library_is_missing_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrackConfig.model_validate({"mirrors": ["trackio"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mirrors\.0\.kind: 'trackio' needs trackio.*pip install 'ddpm-pip"):
        require_plugins(config)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="the extra trackio is not installed")
def test_trackio_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    project = f"test-{tmp_path.name}".replace("_", "-")[:60]
    for start in (0, 2):
        journal = Journal(tmp_path / f"spool-{start}")
        feed = MirrorFeed(journal, MirrorConfig(kind="trackio", settings={"project": project}), RUN)
        for step in range(start, start + 4):
            journal.append({"t": 1000 + step, "s": step, "m": {"loss": float(step), "lr": 0.1}})
        assert feed.deliver()
    rows = SQLiteStorage.get_logs(project, RUN.name, run_id=RUN.run_id)
    assert Counter(row["step"] for row in rows) == Counter(range(6))
    SQLiteStorage.delete_run(project, RUN.name)


def test_the_event_files_are_written_while_mlflow_is_away(tmp_path: Path) -> None:
    spool = Spool(
        tmp_path / "spool",
        "http://127.0.0.1:9",
        RUN.run_id,
        send_interval_seconds=0.05,
        name=RUN.name,
        mirrors=[tensorboard(tmp_path / "events")],
    )
    spool.metrics(1, {"train/loss": 0.5})
    assert spool.close(0.2) == 1  # for MLflow
    assert logged(tmp_path / "events") == [("train/loss", 1, 0.5)]
