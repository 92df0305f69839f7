"""The manifests for KubeRay: valid to the letter, hardened everywhere, and fitting the program they run."""

import copy
import importlib.util
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import ddpm_pipeline
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.infra.kuberay import night
from ddpm_pipeline.jobs.runner import PROGRAM, JobArguments, settings_of
from tests.manifests.kustomize import Object
from tests.manifests.objects import (
    KUBERAY,
    VARIANTS,
    label,
    named,
    pods,
    rendered,
    rules_of,
    validate,
    validate_pod,
)

REPOSITORY = KUBERAY.parents[1]
everywhere = pytest.mark.parametrize("variant", VARIANTS)
GPUS_A_POD = {"gpu": 1, "gpu-node": 8}


def clusters(variant: str) -> list[tuple[str, Object]]:
    """The spec of every Ray cluster that a variant describes."""
    found = [o for o in rendered(variant) if o["kind"] in ("RayJob", "RayCluster")]
    return [
        (label(o), o["spec"] if o["kind"] == "RayCluster" else o["spec"]["rayClusterSpec"]) for o in found
    ]


def containers(template: Object) -> list[Object]:
    return [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]


@everywhere
def test_every_object_is_what_its_schema_describes_and_nothing_else(variant: str) -> None:
    for found in rendered(variant):
        try:
            validate(found)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            pytest.fail(f"{variant} {label(found)}: {error.message}")
    for where, template in pods(variant):
        try:
            validate_pod(template)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{variant} {where}: {error.message}")


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_a_mistyped_field_of_a_ray_object_is_refused(kind: str) -> None:
    found = copy.deepcopy(next(o for o in rendered("base") if o["kind"] == kind))
    cluster = found["spec"] if kind == "RayCluster" else found["spec"]["rayClusterSpec"]
    cluster["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        validate(found)


def test_a_mistyped_field_of_a_kubernetes_object_is_refused() -> None:
    found = copy.deepcopy(named("base", "CronJob", "ddpm-nightly"))
    found["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(found)


@everywhere
@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, whose kustomize is the judge, is not installed"
)
def test_kustomize_renders_the_same_objects(variant: str) -> None:
    folder = str(KUBERAY / VARIANTS[variant])
    told = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    theirs = {label(o): o for o in yaml.safe_load_all(told.stdout)}
    assert theirs == {label(o): o for o in rendered(variant)}


@everywhere
def test_every_pod_is_hardened(variant: str) -> None:
    for where, template in pods(variant):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] >= 900, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        assert not [v for v in spec.get("volumes", []) if "hostPath" in v], where
        assert spec["serviceAccountName"] != "default", where
        assert isinstance(spec["automountServiceAccountToken"], bool), where


def test_only_what_speaks_to_the_api_server_has_a_token_for_it() -> None:
    with_token = {
        where for where, template in pods("base") if template["spec"]["automountServiceAccountToken"]
    }
    heads = {f"{where} head" for where, _ in clusters("base")}
    assert with_token == heads | {"CronJob/ddpm-nightly"}


@everywhere
def test_every_container_is_hardened_and_bounded(variant: str) -> None:
    found = [(where, c) for where, template in pods(variant) for c in containers(template)]
    found += [(f"{where} autoscaler", cluster["autoscalerOptions"]) for where, cluster in clusters(variant)]
    for where, container in found:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, where
        assert context["readOnlyRootFilesystem"] is True, where
        assert context["capabilities"] == {"drop": ["ALL"]}, where
        assert context["runAsNonRoot"] is True, where
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not context.get("privileged"), where
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"]), where
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["requests"]), where


@everywhere
def test_with_a_read_only_root_every_place_that_is_written_is_a_volume(variant: str) -> None:
    for where, template in pods(variant):
        mounts = {m["mountPath"] for c in containers(template) for m in c.get("volumeMounts", [])}
        if "CronJob" not in where:
            assert "/tmp" in mounts, where
        if "head" in where or "workers" in where:
            assert "/dev/shm" in mounts, where
        for volume in template["spec"].get("volumes", []):
            assert volume.get("emptyDir", {"sizeLimit": 1}).get("sizeLimit"), f"{where} {volume['name']}"
    for where, cluster in clusters(variant):
        assert {"name": "tmp", "mountPath": "/tmp"} in cluster["autoscalerOptions"]["volumeMounts"], where


@everywhere
def test_images_are_of_this_version_and_never_of_none(variant: str) -> None:
    version = ddpm_pipeline.__version__
    kind = "cuda" if variant in GPUS_A_POD else "cpu"
    for where, template in pods(variant):
        for container in containers(template):
            if container["name"].startswith("redis-"):
                assert re.fullmatch(r"redis:\d+\.\d+\.\d+-alpine", container["image"])
            else:
                assert container["image"] == f"ddpm:{version}-{kind}", where


@everywhere
def test_no_secret_is_written_out(variant: str) -> None:
    assert not [o for o in rendered(variant) if o["kind"] == "Secret"]
    for where, template in pods(variant):
        for variable in [v for c in containers(template) for v in c.get("env", [])]:
            if re.search("PASSWORD|SECRET|TOKEN|KEY|USERNAME", variable["name"]):
                assert "secretKeyRef" in variable.get("valueFrom", {}), f"{where} {variable['name']}"
    for where, cluster in clusters(variant):
        assert "secretKeyRef" in cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"], where


@everywhere
def test_every_cluster_asks_for_a_token_scales_by_version_2_and_keeps_its_state_outside(variant: str) -> None:
    ray = next(
        line.partition("==")[2].rstrip(" \\")
        for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert len(clusters(variant)) == 4
    for where, cluster in clusters(variant):
        assert cluster["authOptions"] == {"mode": "token"}, where
        assert cluster["enableInTreeAutoscaling"] is not (variant == "kueue" and "RayJob" in where), where
        assert cluster["autoscalerOptions"]["version"] == "v2", where
        assert cluster["rayVersion"] == ray, where
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all(g["template"]["spec"]["restartPolicy"] == "Never" for g in groups), where
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], where


@everywhere
def test_a_cluster_that_must_go_has_time_for_the_save_and_asks_for_it(variant: str) -> None:
    drain_seconds = GenerateConfig.model_fields["drain_seconds"].default
    for where, cluster in clusters(variant):
        seconds: dict[str, float] = {}
        for role, group in (("head", cluster["headGroupSpec"]), ("worker", cluster["workerGroupSpecs"][0])):
            spec = group["template"]["spec"]
            (container,) = spec["containers"]
            *command, limit = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["python", "-m", "ddpm_pipeline.infra.kuberay.drain", role], where
            assert importlib.util.find_spec(command[2])
            seconds[role] = float(limit)
            assert seconds[role] < spec["terminationGracePeriodSeconds"], where
        environment = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        wait = next(int(v["value"]) for v in environment if v["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert drain_seconds + 5 < wait < seconds["head"] < seconds["worker"], where


@everywhere
def test_the_settings_are_such_as_the_jobs_accept_and_their_workers_fit_their_pods(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://b")
    models: dict[str, Any] = {"train": TrainConfig, "generate": GenerateConfig, "nightly": NightlyConfig}
    for name, text in named(variant, "ConfigMap", "ddpm-settings")["data"].items():
        (tmp_path / name).write_text(text)
    for name, model in models.items():
        job = named(variant, "RayJob", f"ddpm-{name}")["spec"]
        words = job["entrypoint"].split()
        assert words[:4] == ["python", *PROGRAM, name]
        file = tmp_path / Path(words[words.index("--config") + 1]).name
        config = settings_of(model, name, JobArguments(files=(file,)))
        group = job["rayClusterSpec"]["workerGroupSpecs"][0]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        wanted = {"train": "workers", "nightly": "generate"}.get(name)
        wanted = config if wanted is None else getattr(config, wanted)
        assert wanted.cpus_per_worker <= float(limits["cpu"]), name
        assert wanted.gpus_per_worker <= int(limits.get("nvidia.com/gpu", 0)), name
        room = group["maxReplicas"] * float(limits["cpu"])
        most = getattr(wanted, "most", wanted.num_workers)  # of a training, whose number may be two numbers
        assert most * wanted.cpus_per_worker <= room, name


@pytest.mark.parametrize(("variant", "gpus"), GPUS_A_POD.items())
def test_gpus_are_asked_for_by_workers_only_and_tolerated_there(variant: str, gpus: int) -> None:
    for where, template in pods(variant):
        spec = template["spec"]
        limits = spec["containers"][0].get("resources", {}).get("limits", {})
        is_worker = where.endswith("workers")
        assert limits.get("nvidia.com/gpu") == (gpus if is_worker else None), where
        assert spec.get("runtimeClassName") == ("nvidia" if is_worker else None), where
        tolerated = [t["key"] for t in spec.get("tolerations", [])]
        assert tolerated == (["nvidia.com/gpu"] if is_worker else []), where


@pytest.mark.parametrize("variant", GPUS_A_POD)
def test_pods_with_gpus_have_shared_memory_for_nccl_and_the_loaders(variant: str) -> None:
    base = {where: shared_memory(template) for where, template in pods("base") if where.endswith("workers")}
    for where, template in pods(variant):
        if where.endswith("workers"):
            assert shared_memory(template) >= 4 * base[where], where


@pytest.mark.parametrize(("variant", "gpus"), GPUS_A_POD.items())
def test_a_pods_workers_use_all_of_its_gpus_and_decode_beside_the_training(
    variant: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://b")
    file = tmp_path / "train.yaml"
    file.write_text(named(variant, "ConfigMap", "ddpm-settings")["data"]["train.yaml"])
    config = settings_of(TrainConfig, "train", JobArguments(files=(file,)))
    group = named(variant, "RayJob", "ddpm-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.workers.most == group["maxReplicas"] * gpus
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert 0 < gpus * (config.data.num_workers or 0) < cpus
    assert gpus * config.workers.cpus_per_worker <= cpus


def shared_memory(template: Object) -> int:
    """GiB of /dev/shm."""
    volume = next(v for v in template["spec"]["volumes"] if v["name"] == "shm")
    assert volume["emptyDir"]["medium"] == "Memory"
    return int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))


def test_on_spot_machines_workers_may_be_lost_and_heads_may_not() -> None:
    for where, cluster in clusters("spot"):
        head = cluster["headGroupSpec"]["template"]
        worker = cluster["workerGroupSpecs"][0]["template"]
        assert head["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}, where
        assert worker["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}, where
        assert head["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true", where


def test_a_budget_guards_the_head_of_each_kind_of_job_and_no_other_pod() -> None:
    for component in ("train", "generate", "nightly"):
        selector = named("base", "PodDisruptionBudget", f"ddpm-{component}-head")["spec"]["selector"]
        chosen: list[str] = []
        for where, template in pods("base"):
            node_type = {"ray.io/node-type": "head" if where.endswith("head") else "worker"}  # the operator's
            labels = {**template["metadata"]["labels"], **node_type}
            if selector["matchLabels"].items() <= labels.items():
                chosen.append(where)
        assert chosen == [f"RayJob/ddpm-{component} head"]


@everywhere
def test_jobs_end_give_their_machines_back_and_start_again_by_themselves(variant: str) -> None:
    for name in ("train", "generate", "nightly"):
        job = named(variant, "RayJob", f"ddpm-{name}")
        spec = job["spec"]
        assert spec["backoffLimit"] >= 1
        assert spec["activeDeadlineSeconds"] > 0
        # KubeRay's own rules, which no schema states
        assert ("deletionStrategy" in spec) != spec.get("shutdownAfterJobFinishes", False)
        assert not spec.get("suspend") or spec["shutdownAfterJobFinishes"] is True
        assert ("ttlSecondsAfterFinished" in spec) == spec.get("shutdownAfterJobFinishes", False)
        if "deletionStrategy" in spec:
            rules = rules_of(job)
            assert rules["DeleteCluster", "SUCCEEDED"] == 0
            assert 0 < rules["DeleteCluster", "Failed"] <= 3600
            assert rules["DeleteSelf", "SUCCEEDED"] >= rules["DeleteCluster", "SUCCEEDED"]
            assert "DeleteWorkers" not in {policy for policy, _ in rules}  # not with an autoscaler


def test_in_a_queue_jobs_are_suspended_do_not_scale_and_the_nights_pattern_is_in_none() -> None:
    for name in ("train", "generate"):
        job = named("kueue", "RayJob", f"ddpm-{name}")
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ddpm"
        assert job["spec"]["suspend"] is True
    pattern = named("kueue", "RayJob", "ddpm-nightly")
    assert "kueue.x-k8s.io/queue-name" not in pattern["metadata"]["labels"]
    copy_of_it = night.dated(pattern, "ddpm-nightly", datetime(2026, 1, 31, tzinfo=UTC))
    assert copy_of_it["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ddpm"
    assert (copy_of_it["spec"]["suspend"], copy_of_it["spec"]["shutdownAfterJobFinishes"]) == (True, True)
    assert "deletionStrategy" not in copy_of_it["spec"]
    validate(copy_of_it)
    for where, cluster in clusters("kueue"):
        if where.startswith("RayJob"):
            assert cluster["enableInTreeAutoscaling"] is False, where
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                variables = group["template"]["spec"]["containers"][0]["env"]
                assert {"name": "DDPM_CLUSTER_GROWS", "value": ""} in variables, where
            (workers,) = cluster["workerGroupSpecs"]
            assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"], where


VALUES = {
    "registry.example/ddpm:0.2.0-cuda": "r.example:5000/ours:9",
    "s3://your-bucket": "s3://ours",
    "region: eu-central-1": "region: us-west-2",
    "111122223333": "999988887777",
    "min-workers: 2": "min-workers: 3",
    "max-workers: 8 ": "max-workers: 5 ",
    'worker-cpu: "7"': 'worker-cpu: "15"',
    "48Gi": "96Gi",
    "count: 100000,": "count: 77,",
}


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which copies the values, is not installed"
)
def test_one_file_of_values_reaches_every_place(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    ours = tmp_path / "kuberay/overlays/ours"
    shutil.copytree(KUBERAY / "overlays/site", ours)
    text = (ours / "site.yaml").read_text()
    for before, after in VALUES.items():
        assert before in text
        text = text.replace(before, after)
    (ours / "site.yaml").write_text(text)
    told = subprocess.run(["kubectl", "kustomize", str(ours)], capture_output=True, text=True, check=True)
    found = {label(o): o for o in yaml.safe_load_all(told.stdout)}
    assert "ConfigMap/ddpm-site" not in found
    assert found.keys() == {label(o) for o in rendered("gpu")}
    for one in found.values():
        validate(one)
    images = set(re.findall(r"image: (.*)", told.stdout))
    assert {image for image in images if not image.startswith("redis:")} == {"r.example:5000/ours:9"}
    services = found["ConfigMap/ddpm-services"]["data"]
    assert (services["DDPM_ROOT"], services["AWS_REGION"]) == ("s3://ours", "us-west-2")
    assert "count: 77," in found["ConfigMap/ddpm-settings"]["data"]["generate.yaml"]
    for role in ("trainer", "generator", "nightly"):
        arn = found[f"ServiceAccount/ddpm-{role}"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        assert arn == f"arn:aws:iam::999988887777:role/ddpm-{role}"
    for name in ("train", "generate", "nightly"):
        (group,) = found[f"RayJob/ddpm-{name}"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 5)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (limits["cpu"], limits["memory"]) == ("15", "96Gi")


def test_the_night_starts_once_in_time_and_by_an_account_that_can_do_nothing_else() -> None:
    cron = named("base", "CronJob", "ddpm-nightly")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["startingDeadlineSeconds"] > 0
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    (launcher,) = pod["containers"]
    zone = next(v["value"] for v in launcher["env"] if v["name"] == "NIGHT_TIME_ZONE")
    assert cron["timeZone"] == zone
    assert launcher["command"][:3] == ["python", "-m", "ddpm_pipeline.infra.kuberay.night"]
    pattern = named("base", "RayJob", launcher["command"][3])
    assert pattern["spec"]["suspend"] is True
    role = named("base", "Role", "ddpm-night-launcher")
    rules = {
        (tuple(r["resources"]), tuple(r["verbs"]), tuple(r.get("resourceNames", ()))) for r in role["rules"]
    }
    assert rules == {(("rayjobs",), ("create",), ()), (("rayjobs",), ("get",), (launcher["command"][3],))}
    bound = [o for o in rendered("base") if o["kind"] in ("RoleBinding", "ClusterRoleBinding", "ClusterRole")]
    assert [label(o) for o in bound] == ["RoleBinding/ddpm-night-launcher"]
    assert [s["name"] for s in bound[0]["subjects"]] == [pod["serviceAccountName"]]


def test_every_account_that_reaches_a_bucket_is_a_role_with_a_policy() -> None:
    annotated = [
        o["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("-")[2]
        for o in rendered("base")
        if o["kind"] == "ServiceAccount" and o["metadata"].get("annotations")
    ]
    assert sorted(annotated) == ["generator", "nightly", "trainer"]
    for role in annotated:
        assert (REPOSITORY / "infra" / "policies" / f"{role}.json").is_file()


def secrets_of(containers_of: Any) -> set[str]:
    """Names of the Secrets that containers take variables from."""
    variables = [variable for container in containers_of for variable in container.get("env", [])]
    return {
        v["valueFrom"]["secretKeyRef"]["name"] for v in variables if "secretKeyRef" in v.get("valueFrom", {})
    }


@everywhere
def test_each_kind_of_cluster_has_a_redis_and_an_mlflow_user_of_its_own(variant: str) -> None:
    service = named(variant, "Service", "redis")["spec"]["ports"]
    (redis,) = [template for where, template in pods(variant) if "StatefulSet" in where]
    servers = {c["name"]: c for c in redis["spec"]["containers"]}
    addresses: set[str] = set()
    for where, cluster in clusters(variant):
        role = where.rpartition("ddpm-")[2]
        told = cluster["gcsFaultToleranceOptions"]
        secret = told["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]
        assert secret == f"ddpm-redis-{role}", where
        server = servers[f"redis-{role}"]
        (port,) = [p["port"] for p in service if p["name"] == role]
        assert told["redisAddress"] == f"redis:{port}", where
        assert {"name": "PORT", "value": str(port)} in server["env"], where
        assert secrets_of([server]) == {secret}, where
        assert {m["subPath"] for m in server["volumeMounts"]} == {role}, where
        addresses.add(told["redisAddress"])
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            spec = group["template"]["spec"]
            account = spec["serviceAccountName"].removeprefix("ddpm-")
            assert secrets_of(spec["containers"]) == {f"ddpm-mlflow-{account}"}, where
    assert len(addresses) == len(servers) == 4
