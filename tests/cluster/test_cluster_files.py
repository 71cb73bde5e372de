"""The files of cluster/: what their schemas say, what no schema says, and that both catch a broken file."""

import copy
import gzip
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.rules import (
    CONSTRAINTS,
    IMAGE,
    RAY,
    arithmetic_problems,
    dockerfile_problems,
    launcher_problems,
    launcher_resources,
    rayjob_problems,
    sweep_of,
)
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
LAUNCHERS = ["aws", "gcp"]
MANIFESTS = ["kuberay", "kuberay-spot", "kuberay-kueue"]
SCHEMA = Path(__file__).with_name("rayjob-v1.schema.json.gz")  # README.md beside it says where it is from
KUBERAY = ROOT.parent / "shared" / "kuberay" / "ray.io_rayjobs.yaml"
README = (CLUSTER / "README.md").read_text(encoding="utf-8")


# --- Ray's cluster launcher -------------------------------------------------------------------------------


def launcher(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return config


def check_launcher(config: dict[str, Any]) -> list[str]:
    """Ray's own validation, as ``ray up`` does it before it asks a cloud for anything, and then the rules."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return list(launcher_problems(prepared))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_is_valid(name: str) -> None:
    assert check_launcher(launcher(name)) == []


DELETED = object()


def broken(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with another value at ``a/b/0/c``."""
    whole = copy.deepcopy(document)
    *parents, last = path.split("/")
    part: Any = whole
    for key in parents:
        part = part[int(key)] if isinstance(part, list) else part[key]
    key = int(last) if isinstance(part, list) else last
    if value is DELETED:
        del part[key]
    else:
        part[key] = value
    return whole


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_workers", "eight"),
        ("idle_minutes", 5),
        ("provider", DELETED),
        ("head_node_type", "heads"),
        ("available_node_types/gpu/max_wrokers", 8),
        ("available_node_types/gpu/resources/GPU", "one"),
        ("available_node_types/gpu/min_workers", 9),
        ("docker/container_name", ""),
    ],
)
def test_ray_refuses_a_broken_launcher_file(name: str, path: str, value: object) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, AssertionError)):
        check_launcher(broken(launcher(name), path, value))


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        *(
            (name, *case)
            for name in LAUNCHERS
            for case in (
                ("available_node_types/head/resources/CPU", 4, "the head has CPUs"),
                ("available_node_types/head/resources/trial_driver", DELETED, "no trial_driver"),
                ("available_node_types/gpu/min_workers", 1, "cost while idle"),
                ("available_node_types/gpu/max_workers", 9, "below those of its types"),
                ("available_node_types/gpu/max_workers", 0, "at most 0 workers"),
                ("available_node_types/gpu/resources/GPU", 0, "gpu has no GPU"),
                ("idle_timeout_minutes", 600, "idle workers stay"),
                ("provider/cache_stopped_nodes", True, "stopped machines are kept"),
                ("docker/image", "rayproject/ray:latest", "rayproject/ray:latest, not"),
                ("docker/image", IMAGE.replace(RAY, "2.59.0"), "2.59.0, not"),
                ("docker/worker_image", IMAGE.replace(RAY, "2.59.0"), "2.59.0, not"),
                ("docker/run_options", [], "no token authentication"),
                ("docker/run_options/1", "--env AWS_SECRET_ACCESS_KEY=x", "a key instead of a role"),
                ("file_mounts", {}, "the nodes get no token"),
                ("head_start_ray_commands", ["ray start --head"], "the dashboard does not listen"),
                ("head_start_ray_commands", ["ray start --head"], "the head does not scale"),
                ("setup_commands", ["pip install ray"], "installed at start"),
            )
        ),
        ("aws", "available_node_types/gpu/node_config/InstanceMarketOptions", DELETED, "not on spot"),
        (
            "aws",
            "available_node_types/head/node_config/InstanceMarketOptions",
            {"MarketType": "spot"},
            "the head is on spot",
        ),
        (
            "aws",
            "available_node_types/gpu/node_config/IamInstanceProfile",
            DELETED,
            "gpu has no role",
        ),
        (
            "aws",
            "available_node_types/head/node_config/IamInstanceProfile",
            DELETED,
            "head has no role",
        ),
        (
            "aws",
            "provider/security_group/IpPermissions",
            [{"IpProtocol": "tcp", "FromPort": 8000, "ToPort": 9000}],
            "opens the dashboard",
        ),
        ("gcp", "available_node_types/gpu/node_config/scheduling", DELETED, "not on spot"),
        ("gcp", "available_node_types/gpu/node_config/serviceAccounts", DELETED, "no role or service"),
    ],
)
def test_the_rules_catch_a_broken_launcher_file(name: str, path: str, value: object, complaint: str) -> None:
    problems = check_launcher(broken(launcher(name), path, value))
    assert any(complaint in p for p in problems), problems


# --- KubeRay ----------------------------------------------------------------------------------------------


def carried_schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    return schema


def strict(schema: Any) -> Any:
    """The schema without room for unknown fields: Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


VALIDATOR = jsonschema.Draft202012Validator(strict(carried_schema()))


@pytest.fixture(scope="module")
def manifests() -> dict[str, list[dict[str, Any]]]:
    """The documents that ``kubectl apply -k`` would send, by the real kustomize."""
    rendered = {}
    for name in MANIFESTS:
        command = [BIN / "kubectl", "kustomize", CLUSTER / name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rendered[name] = list(yaml.safe_load_all(done.stdout))
    return rendered


def rayjob(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return next(d for d in documents if d["kind"] == "RayJob")


def test_the_carried_schema_is_kuberays() -> None:
    if not KUBERAY.exists():
        pytest.skip("no copy of KubeRay's definitions here")
    definition = yaml.load(KUBERAY.read_text(), Loader=yaml.CSafeLoader)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    assert carried_schema() == version["schema"]["openAPIV3Schema"]


def test_the_file_itself_can_be_applied_too(manifests: dict[str, list[dict[str, Any]]]) -> None:
    assert list(yaml.safe_load_all((CLUSTER / "kuberay/rayjob.yaml").read_text())) == manifests["kuberay"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid(name: str, manifests: dict[str, list[dict[str, Any]]]) -> None:
    assert {d["apiVersion"] + "/" + d["kind"] for d in manifests[name]} == {
        "v1/ServiceAccount",
        "ray.io/v1/RayJob",
    }
    VALIDATOR.validate(rayjob(manifests[name]))
    assert list(rayjob_problems(manifests[name])) == []


SPEC = "spec/rayClusterSpec"
GPU = f"{SPEC}/workerGroupSpecs/0"
HEAD_POD, GPU_POD = f"{SPEC}/headGroupSpec/template/spec", f"{GPU}/template/spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/backoffLimits", 3),
        (f"{SPEC}/authOptions/mode", "none"),
        (f"{SPEC}/autoscalerOptions/version", "v3"),
        (f"{SPEC}/headGroupSpec", DELETED),
        (f"{GPU}/maxReplicas", "8"),
        (f"{GPU}/max_replicas", 8),
        (f"{GPU_POD}/tolerations/0/effects", "NoSchedule"),
        (f"{GPU_POD}/containers/0/resources/limits/memory", "28 GB"),
        (f"{GPU_POD}/containers/0/volumeMounts/0/mountPath", DELETED),
        (f"{HEAD_POD}/restartPolicy", True),
    ],
)
def test_kuberays_schema_refuses_a_broken_manifest(
    path: str, value: object, manifests: dict[str, list[dict[str, Any]]]
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(broken(rayjob(manifests["kuberay"]), path, value))


def entry_point(flags: str) -> str:
    return f"python sweeps/typo_sweep.py --results s3://b/p --name n --gpus-per-worker 1 {flags}"


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        ("kuberay", f"{SPEC}/rayVersion", "2.59.0", "rayVersion is 2.59.0"),
        ("kuberay", f"{HEAD_POD}/containers/0/image", "rayproject/ray:2.59.0-py312", "2.59.0-py312, not"),
        ("kuberay", f"{GPU_POD}/containers/0/image", "REGISTRY/clippo:latest", "clippo:latest, not"),
        ("kuberay", f"{SPEC}/authOptions", DELETED, "no token authentication"),
        ("kuberay", f"{SPEC}/headGroupSpec/serviceType", "LoadBalancer", "reached from outside"),
        ("kuberay", f"{SPEC}/headGroupSpec/enableIngress", True, "reached from outside"),
        ("kuberay", f"{SPEC}/headGroupSpec/resources", {"CPU": "0"}, "beside rayStartParams"),
        ("kuberay", f"{SPEC}/headGroupSpec/rayStartParams/num-cpus", "4", "the head has CPUs"),
        ("kuberay", f"{SPEC}/headGroupSpec/rayStartParams/num-cpus", DELETED, "the head has CPUs"),
        ("kuberay", f"{SPEC}/headGroupSpec/rayStartParams/resources", DELETED, "no trial_driver"),
        ("kuberay", f"{SPEC}/enableInTreeAutoscaling", DELETED, "either a queue or the autoscaler"),
        ("kuberay", f"{SPEC}/autoscalerOptions/version", "v1", "not the autoscaler v2"),
        ("kuberay", f"{HEAD_POD}/restartPolicy", "Always", "head: restartPolicy"),
        ("kuberay", f"{GPU_POD}/restartPolicy", DELETED, "gpu: restartPolicy"),
        ("kuberay", f"{GPU_POD}/serviceAccountName", "default", "no service account default"),
        ("kuberay", f"{GPU_POD}/securityContext", DELETED, "may run as root"),
        ("kuberay", f"{GPU_POD}/volumes/1/emptyDir", {}, "no shared memory"),
        ("kuberay", f"{GPU_POD}/volumes/0", {"name": "aws", "emptyDir": {}}, "no workload identity"),
        (
            "kuberay",
            f"{GPU_POD}/containers/0/env/0",
            {"name": "AWS_ACCESS_KEY_ID", "value": "k"},
            "a key instead of a role",
        ),
        ("kuberay", f"{GPU_POD}/tolerations", DELETED, "does not tolerate"),
        ("kuberay", f"{GPU_POD}/containers/0/resources/requests/memory", "1Gi", "evicted first"),
        ("kuberay", f"{GPU_POD}/containers/0/resources/limits", {"cpu": "7"}, "gpu has no GPU"),
        ("kuberay", f"{GPU}/minReplicas", 9, "9 to 8 workers"),
        ("kuberay", f"{GPU}/minReplicas", 1, "minReplicas 1"),
        ("kuberay", f"{GPU}/maxReplicas", 2147483647, "at most 2147483647"),
        ("kuberay", "spec/backoffLimit", DELETED, "backoffLimit is 0"),
        ("kuberay", "spec/shutdownAfterJobFinishes", DELETED, "not deleted"),
        ("kuberay", "spec/ttlSecondsAfterFinished", 86400, "stays too long"),
        (
            "kuberay",
            "spec/entrypoint",
            entry_point("--concurrency 5 --workers 2 --autoscaling"),
            "5 trials want 10 GPU, there are 8",
        ),
        (
            "kuberay",
            "spec/entrypoint",
            entry_point("--concurrency 8 --workers 8 --gpus-per-worker 0.125 --autoscaling"),
            "8 trials want 64 CPU, there are 56",
        ),
        (
            "kuberay",
            "spec/entrypoint",
            entry_point("--concurrency 9 --workers 1 --gpus-per-worker 0.5 --autoscaling"),
            "9 trials want 9 trial_driver, there are 8",
        ),
        (
            "kuberay",
            "spec/entrypoint",
            entry_point("--gpus-per-worker 0 --autoscaling"),
            "the trials use no GPU",
        ),
        ("kuberay", "spec/entrypoint", entry_point("--workers 1"), "without --autoscaling"),
        ("kuberay", "spec/entrypoint", entry_point("--name ''"), "a second try begins anew"),
        ("kuberay", "spec/entrypoint", entry_point("--results out"), "lost with the head"),
        ("kuberay-kueue", f"{SPEC}/enableInTreeAutoscaling", True, "either a queue or the autoscaler"),
        ("kuberay-kueue", "spec/suspend", DELETED, "Kueue wants a suspended job"),
        ("kuberay-kueue", f"{GPU}/minReplicas", 0, "minReplicas 0"),
        ("kuberay-kueue", "metadata/labels", DELETED, "either a queue or the autoscaler"),
    ],
)
def test_the_rules_catch_a_broken_manifest(
    name: str, path: str, value: object, complaint: str, manifests: dict[str, list[dict[str, Any]]]
) -> None:
    job = rayjob(manifests[name])
    others = [d for d in manifests[name] if d is not job]
    problems = list(rayjob_problems([*others, broken(job, path, value)]))
    assert any(complaint in p for p in problems), problems


def test_spot_is_for_workers_and_not_for_the_head(manifests: dict[str, list[dict[str, Any]]]) -> None:
    def wanted(pod: dict[str, Any]) -> set[tuple[str, str]]:
        affinity = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        rules = [e for term in affinity["nodeSelectorTerms"] for e in term["matchExpressions"]]
        return {(rule["key"], rule["operator"]) for rule in rules}

    cluster = rayjob(manifests["kuberay-spot"])["spec"]["rayClusterSpec"]
    head = wanted(cluster["headGroupSpec"]["template"]["spec"])
    workers = wanted(cluster["workerGroupSpecs"][0]["template"]["spec"])
    assert {operator for _, operator in head} == {"NotIn"}
    assert {operator for _, operator in workers} == {"In"}
    assert {key for key, _ in head} == {key for key, _ in workers}


# --- the roles --------------------------------------------------------------------------------------------


class CloudFormation(yaml.SafeLoader):
    """Reads a template; ``!Ref X`` is ``X``, and other functions are what they are called with."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_mapping(node, deep=True)


CloudFormation.add_multi_constructor("!", _plain)


def made(kind: str) -> dict[str, dict[str, Any]]:
    """Properties of what aws-access.yaml makes of a kind, by the name inside the template."""
    template = yaml.load((CLUSTER / "aws-access.yaml").read_text(), Loader=CloudFormation)
    resources: dict[str, dict[str, Any]] = template["Resources"]
    return {name: r["Properties"] for name, r in resources.items() if r["Type"] == f"AWS::IAM::{kind}"}


def test_the_files_use_the_roles_that_are_made(manifests: dict[str, list[dict[str, Any]]]) -> None:
    roles, profiles = made("Role"), made("InstanceProfile").values()
    nodes = launcher("aws")["available_node_types"].values()
    used = sorted(node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes)
    assert used == sorted(profile["InstanceProfileName"] for profile in profiles)
    of_machines = {role for profile in profiles for role in profile["Roles"]}
    assert of_machines <= roles.keys()
    assumed = {
        name: set(re.findall(r":role/([\w-]+)", json.dumps(documents)))
        for name, documents in {"gcp": launcher("gcp"), **manifests}.items()
    }
    assert all(len(names) == 1 for names in assumed.values()), assumed
    assert set.union(*assumed.values()) == {roles[role]["RoleName"] for role in roles.keys() - of_machines}


# --- the image --------------------------------------------------------------------------------------------


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "hadolint", "--no-color", "-"]
    return subprocess.run(command, input=dockerfile, capture_output=True, text=True, check=False)


def test_the_dockerfile_is_lint_free() -> None:
    done = lint((CLUSTER / "Dockerfile").read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("cuda:13.0.2-base-ubuntu24.04", "cuda:latest", "DL3007"),
        ("cuda:13.0.2-base-ubuntu24.04", "cuda", "DL3006"),
        ("USER 1000", "USER root", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
        ("apt-get install --yes", "apt-get install", "DL3014"),
    ],
)
def test_the_linter_catches_a_broken_dockerfile(good: str, bad: str, rule: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert good in text
    assert rule in lint(text.replace(good, bad)).stdout


def test_the_image_does_not_run_as_root() -> None:
    assert list(dockerfile_problems((CLUSTER / "Dockerfile").read_text())) == []


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("USER 1000\n", "", "as the user of its base, root"),
        ("USER 1000\n", "# USER 1000\n", "as the user of its base, root"),
        ("USER 1000\n", "USER 1000\nUSER root\n", "as root"),
        ("USER 1000\n", "USER 0:1000\n", "as 0"),
        ("USER 1000\n", "USER 1000\nFROM base\n", "as the user of its base, root"),
    ],
)
def test_the_rule_catches_an_image_that_runs_as_root(good: str, bad: str, complaint: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert text.count(good) == 1
    assert list(dockerfile_problems(text.replace(good, bad))) == [f"the image runs {complaint}"]


def test_the_image_has_what_pyproject_asks_for() -> None:
    wanted = [Requirement(r) for r in metadata.requires("clippo") or [] if "extra ==" not in r]
    assert len(wanted) > 10
    for requirement in wanted:
        pinned = CONSTRAINTS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} is not {pinned}"
    assert {"boto3", "google-api-python-client"} <= CONSTRAINTS.keys()


def test_every_file_names_the_same_image() -> None:
    files = [p for p in CLUSTER.rglob("*") if p.is_file()]
    named = {m for p in files for m in re.findall(r"clippo:[\w.-]*\d", p.read_text(encoding="utf-8"))}
    assert named == {IMAGE.removeprefix("REGISTRY/")}


@pytest.mark.skipif(shutil.which("wget") is None, reason="needs wget, as the image has it")
def test_a_google_machine_keeps_its_token(tmp_path: Path) -> None:
    asked = []

    class MetadataServer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"header.payload.signature")

        def log_message(self, *args: object) -> None:
            pass

    token = tmp_path / "token"
    with http.server.HTTPServer(("127.0.0.1", 0), MetadataServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        environment |= {"AWS_WEB_IDENTITY_TOKEN_FILE": str(token), "PATH": os.environ["PATH"]}
        with subprocess.Popen([CLUSTER / "google-identity"], env=environment) as process:
            try:
                deadline = time.monotonic() + 20
                while not token.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                process.kill()
        server.shutdown()
    assert token.read_text() == "header.payload.signature"
    path, flavor = asked[0]
    assert flavor == "Google"
    assert path.endswith("/service-accounts/default/identity?audience=clippo&format=full")


# --- the README -------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", README, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


WAYS = ["On a laptop", "On AWS", "On GCP", "On Kubernetes"]


def commands(section: str) -> list[str]:
    """The commands of the first block."""
    block = sections()[section].split("```bash\n")[1].split("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("section", WAYS)
def test_it_takes_at_most_six_commands(section: str) -> None:
    assert 1 <= len(commands(section)) <= 6


def test_a_command_of_the_readme_is_one_command() -> None:
    """None is joined to another, runs in the background, or runs one for its words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= len(WAYS)
    assert [
        found for block in blocks for found in re.findall(r"[;&|`]|\$\(|\b(?:for|while|if)\b", block)
    ] == []


@pytest.mark.parametrize("section", WAYS)
def test_what_it_costs_while_idle_adds_up(section: str) -> None:
    _, told, idle = sections()[section].partition("While idle")
    assert told
    assert "USD" in idle
    products = [tuple(map(float, p)) for p in re.findall(r"([\d.]+) x ([\d.]+) = ([\d.]+)", idle)]
    assert [round(a * b, 2) for a, b, _ in products] == [product for *_, product in products]
    for together in re.findall(r"\| together.*\| ([\d.]+) \|", idle):
        assert float(together) == round(sum(product for *_, product in products), 2)


@pytest.mark.parametrize(("name", "section"), [("aws", "On AWS"), ("gcp", "On GCP")])
def test_what_it_costs_while_idle_is_that_of_the_file(name: str, section: str) -> None:
    config = launcher(name)
    node = config["available_node_types"]["head"]["node_config"]
    if name == "aws":
        machine, disk = node["InstanceType"], node["BlockDeviceMappings"][0]["Ebs"]
        told = f"disk, {disk['VolumeSize']} GB {disk['VolumeType']} "
    else:
        machine, disk = node["machineType"], node["disks"][0]["initializeParams"]
        told = f"disk, {disk['diskSizeGb']} GB {disk.get('diskType', 'pd-standard')} "
    for words in (f"head, {machine} on demand", told, f"idle, in {config['provider']['region']}:"):
        assert words in sections()[section]


@pytest.mark.parametrize(
    ("section", "resources"),
    [
        ("On AWS", lambda: launcher_resources(launcher("aws"))),
        ("On GCP", lambda: launcher_resources(launcher("gcp"))),
    ],
)
def test_the_sweep_of_the_readme_fits(section: str, resources: Callable[[], dict[str, float]]) -> None:
    entry_points = re.findall(r"python [^'`]*typo_sweep\.py[^'`]*", "\n".join(commands(section)))
    assert entry_points
    for text in entry_points:
        sweep = sweep_of(text)
        assert sweep.results.startswith("s3://")
        assert sweep.name
        assert sweep.autoscaling
        assert list(arithmetic_problems(sweep, resources())) == []


CLOUD = """#!/bin/sh
# Stands in for the command lines of the clouds: notes what it was asked, and answers as they would.
echo "$(basename "$0") $*" >> calls
case "$*" in
    *get-caller-identity*) echo 123456789012 ;;
    *get-parameter*) echo ami-0123456789 ;;
    *accounts\\ create\\ *) touch "account-$4" ;;
    *accounts\\ describe\\ *) test -e "account-${4%%@*}" && echo "id-of-${4%%@*}" ;;
    *openid-configuration*) echo '{"issuer":"https://oidc.example.com/id/1","jwks_uri":"https://else"}' ;;
esac
"""


def setup(folder: Path, *words: str, cloud: str = CLOUD) -> subprocess.CompletedProcess[str]:
    """``cluster/setup WORDS`` in a copy of cluster/, with stand-ins of the clouds."""
    shutil.copytree(CLUSTER, folder / "cluster", dirs_exist_ok=True)
    for name in ("aws", "gcloud", "kubectl"):
        (folder / name).write_text(cloud)
        (folder / name).chmod(0o755)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(sys.prefix)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    return subprocess.run(
        [folder / "cluster/setup", *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("section", "files"),
    [
        ("On AWS", ["aws.yaml"]),
        ("On GCP", ["gcp.yaml"]),
        ("On Kubernetes", ["kuberay", "kuberay-spot", "kuberay-kueue"]),
    ],
)
def test_setup_as_in_the_readme(section: str, files: list[str], tmp_path: Path) -> None:
    (line,) = (c for c in commands(section) if c.startswith("cluster/setup "))
    for _ in range(2):  # the second time it finds all that there is
        done = setup(tmp_path, *line.split()[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    build, calls = tmp_path / "build", (tmp_path / "calls").read_text().splitlines()
    for name in files:
        command = [BIN / "kubectl", "kustomize", build / name]
        path = build / name
        text = subprocess.check_output(command, text=True) if path.is_dir() else path.read_text()
        code = "\n".join(line.partition("#")[0] for line in text.splitlines())
        assert "ghcr.io/me/clippo:" in code
        assert re.findall(r"\b(?:REGISTRY|BUCKET|PROJECT|AMI|HOST_IMAGE|AWS_ACCOUNT)\b", code) == []
        documents = list(yaml.safe_load_all(text.replace("ghcr.io/me", "REGISTRY")))
        problems = list(rayjob_problems(documents)) if path.is_dir() else check_launcher(documents[0])
        assert problems == []
    told = " ".join(calls)
    assert "Bucket=my-bucket" in told
    if section == "On GCP":
        assert told.count("service-accounts create") == 2
        assert "GoogleAccounts=id-of-ray-autoscaler-sa-v1,id-of-clippo-worker" in told
    if section == "On Kubernetes":
        assert "KubernetesIssuer=oidc.example.com/id/1" in told
        assert setup(tmp_path, *line.split()[1:], "NewIssuer=no").returncode == 0
        assert "NewIssuer=no" in (tmp_path / "calls").read_text()
    else:
        assert (tmp_path / ".ray/auth_token").read_text().strip()


def test_setup_says_which_words_it_wants(tmp_path: Path) -> None:
    for words in ((), ("aws", "ghcr.io/me"), ("azure", "ghcr.io/me", "my-bucket")):
        done = setup(tmp_path, *words)
        assert done.returncode == 2
        assert done.stderr.splitlines()[0] == "cluster/setup aws REGISTRY BUCKET"


def test_setup_stops_where_a_cloud_refuses(tmp_path: Path) -> None:
    done = setup(tmp_path, "aws", "ghcr.io/me", "my-bucket", cloud="#!/bin/sh\nexit 254\n")
    assert done.returncode == 254
    assert not (tmp_path / "build/aws.yaml").exists()
