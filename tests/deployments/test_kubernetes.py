"""The files for a cluster, read by those who would read them: Prefect's worker and Kubernetes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployments.composed import parsed_by_prefect, services
from tests.flows.terminal import ROOT

FOLDER = ROOT / "deployments" / "kubernetes"
KUBERNETES = "1.34"
# Prefect's worker for Kubernetes with what it needs besides Prefect, and Kubernetes' own schemas.
PACKAGES = [
    *("prefect-kubernetes", "kubernetes_asyncio", "kopf", "iso8601", "pyOpenSSL"),
    "kubernetes-validate==1.37.0",
    "importlib-resources==6.5.2",
]

# Has the worker's own model fill a template in, as for a run, and prints the job.
FILL_IN = """
import asyncio, json, sys
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Flow, FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
template, values = (json.load(open(name)) for name in sys.argv[1:])
configuration = asyncio.run(
    KubernetesWorkerJobConfiguration.from_template_and_values(
        # Asked for blocks alone, of which the template has none.
        template, values, client=PrefectClient("http://127.0.0.1:9/api")
    )
)
flow = Flow(name="compress")
configuration.prepare_for_flow_run(FlowRun(flow_id=flow.id, name="tiny"), flow=flow)
print(json.dumps(configuration.job_manifest))
"""

VALIDATE = """
import json, sys, kubernetes_validate
for manifest in json.load(sys.stdin):
    kubernetes_validate.validate(manifest, sys.argv[1], strict=True)
"""

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kubernetes")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [*command, str(folder), *constraints, *PACKAGES], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def job(
    request: pytest.FixtureRequest, packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """A job as the worker would start it, with the defaults and what a run brings."""
    kind: str = request.param
    values = tmp_path_factory.mktemp("values") / "values.json"
    given = {"memory": "64Gi", "node_selector": {"zone": "a"}, "env": {"MORE": "said"}}
    values.write_text(json.dumps(given))
    said = _python(packages, FILL_IN, str(FOLDER / f"{kind}-job.json"), str(values))
    return kind, json.loads(said.splitlines()[-1])


def test_kubernetes_takes_the_job(packages: Path, job: tuple[str, dict[str, Any]]) -> None:
    pod = job[1]["spec"]["template"]["spec"]
    # Prefect wants both here, where Kubernetes ignores them.
    del pod["completions"], pod["parallelism"]
    _validate(packages, [job[1]])


def test_a_job_has_its_share_and_its_secrets_by_name(job: tuple[str, dict[str, Any]]) -> None:
    kind, manifest = job
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert limits == {"memory": "64Gi"} | ({"nvidia.com/gpu": 1} if kind == "gpu" else {})
    assert container["resources"]["requests"]["memory"] == "64Gi"
    assert container["envFrom"] == [
        {"configMapRef": {"name": "stillroom"}},
        {"secretRef": {"name": "stillroom"}},
    ]
    assert container["image"] == ("stillroom:cuda" if kind == "gpu" else "stillroom:cpu")
    assert {"name": "MORE", "value": "said"} in container["env"]
    assert pod["nodeSelector"] == {"zone": "a"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert ("tolerations" in pod) == (kind == "gpu")


def test_both_templates_are_one_but_for_the_gpu() -> None:
    cpu, gpu = (json.loads((FOLDER / f"{kind}-job.json").read_text()) for kind in ("cpu", "gpu"))
    (container,) = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["resources"]["limits"].pop("nvidia.com/gpu") == "{{ gpus }}"
    del gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["tolerations"]
    del gpu["variables"]["properties"]["gpus"], gpu["variables"]["description"]
    del cpu["variables"]["description"]
    for name in ("image", "memory", "cpu_request"):
        default = cpu["variables"]["properties"][name]["default"]
        assert gpu["variables"]["properties"][name]["default"] != default
        gpu["variables"]["properties"][name]["default"] = default
    assert gpu == cpu


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_variable_of_a_template_is_described_and_used(kind: str) -> None:
    template = json.loads((FOLDER / f"{kind}-job.json").read_text())
    text = json.dumps(template["job_configuration"])
    for name, facts in template["variables"]["properties"].items():
        assert f"{{{{ {name} }}}}" in text, name
        assert facts["description"], name


def test_kubernetes_takes_the_workers(packages: Path) -> None:
    manifests = list(yaml.safe_load_all((FOLDER / "workers.yaml").read_text()))
    assert [each["kind"] for each in manifests] == [
        *("ConfigMap", "ServiceAccount", "Role", "RoleBinding", "Deployment", "Deployment"),
    ]
    _validate(packages, manifests)


def test_workers_say_the_same_to_their_runs_as_those_of_compose() -> None:
    manifests = list(yaml.safe_load_all((FOLDER / "workers.yaml").read_text()))
    said = manifests[0]["data"]
    composed = services()["worker-cpu"]["environment"]
    assert {name: composed[name] for name in said} == said
    # What is left is secret, of the machine, or off.
    assert set(composed) - set(said) == {
        "PREFECT_API_AUTH_STRING",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "STILLROOM_DATA_ROOTS",
        "STILLROOM_ALLOW_REMOTE_CODE",
    }


def test_workers_take_commands_that_prefect_knows() -> None:
    for manifest in yaml.safe_load_all((FOLDER / "workers.yaml").read_text()):
        if manifest["kind"] == "Deployment":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            options = parsed_by_prefect(container["args"])
            assert manifest["metadata"]["name"] == options["work_pool_name"].replace(
                "stillroom-", "stillroom-worker-"
            )
            assert options["worker_type"] == "kubernetes"
            assert options["with_healthcheck"] is True


def _validate(packages: Path, manifests: list[dict[str, Any]]) -> None:
    done = _run(packages, VALIDATE, KUBERNETES, said=json.dumps(manifests))
    assert done.returncode == 0, done.stderr


def _python(packages: Path, code: str, *arguments: str) -> str:
    done = _run(packages, code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run(
    packages: Path, code: str, *arguments: str, said: str = "", **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ
        | {"PYTHONPATH": str(packages), "PREFECT_HOME": str(packages / "home"), "DO_NOT_TRACK": "1"}
        | variables,
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
