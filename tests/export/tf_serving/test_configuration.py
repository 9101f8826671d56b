"""TF Serving's own files in export/tf_serving, read as it and Kubernetes do."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from tensorflow_serving.config import model_server_config_pb2

from export import NAME
from export.preview.loaded_version import PART, Limits

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "export" / "tf_serving"
WRAPPERS = wrappers_pb2.DESCRIPTOR
FLAGS = {
    "--port=8500",
    "--rest_api_port=8501",
    "--model_config_file=/config/models.config",
    "--model_config_file_poll_wait_seconds=30",
    # Without it, TF Serving does not start while a label's version is missing.
    "--allow_version_labels_for_unavailable_models=true",
    "--enable_batching=true",
    "--batching_parameters_file=/config/batching.config",
    "--monitoring_config_file=/config/monitoring.config",
}


def message(name, fields):
    """A message that tensorflow-serving-api lacks: {field: type or message}.

    The fields are those of TF Serving's session_bundle_config.proto and
    monitoring_config.proto that we use; an unknown one is a parse error. By hand: of
    the packages on PyPI, tensorflow-serving-config has the second alone, and writes
    over files of tensorflow-serving-api; what has the first is older than our fields.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="kcs_test")
    file.dependency.append(WRAPPERS.name)
    for each, kinds in fields.items():
        proto = file.message_type.add(name=each)
        for number, (field, kind) in enumerate(kinds.items(), start=1):
            added = proto.field.add(name=field, number=number, label=1)
            if isinstance(kind, int):
                added.type = kind
            else:
                added.type, added.type_name = 11, kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(WRAPPERS.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"kcs_test.{name}")
    )()


def parsed(file, proto):
    return text_format.Parse((FOLDER / file).read_text(), proto)


def served(text):
    """The versions and labels of a models.config."""
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.name == NAME
    assert model.base_path == f"/models/{NAME}"
    assert model.model_platform == "tensorflow"
    return set(model.model_version_policy.specific.versions), dict(model.version_labels)


def documents(file):
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def compose():
    (document,) = documents("docker-compose.yml")
    return document["services"]["tf-serving"]


def kinds():
    return {document["kind"]: document for document in documents("kubernetes.yaml")}


def pod():
    return kinds()["Deployment"]["spec"]["template"]["spec"]


def container():
    (only,) = pod()["containers"]
    return only


def test_models_config_serves_versions_by_number_and_labels_one_of_them():
    versions, labels = served((FOLDER / "models.config").read_text())
    assert versions == {1}
    assert labels == {"stable": 1}


def test_a_label_is_moved_to_what_is_loaded_and_nothing_labelled_is_dropped(tmp_path):
    """The commands of docs/serving.md, in turn; TF Serving refuses other moves."""
    page = (ROOT / "docs" / "serving.md").read_text()
    commands = re.findall(r"^sed -i .* export/tf_serving/models.config$", page, re.M)
    assert len(commands) == 3
    file = tmp_path / "export/tf_serving/models.config"
    file.parent.mkdir(parents=True)
    shutil.copy(FOLDER / "models.config", file)

    loaded, labels = served(file.read_text())
    states = []
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        versions, now = served(file.read_text())
        assert set(now.values()) <= versions & loaded, command
        loaded, labels = versions, now
        states.append((versions, labels["stable"]))

    assert states == [({1, 2}, 1), ({1, 2}, 2), ({2}, 2)]


def test_a_request_larger_than_a_batch_is_run_in_parts():
    number = ".google.protobuf.Int64Value"
    numbers = (
        *("max_batch_size", "max_execution_batch_size", "batch_timeout_micros"),
        *("max_enqueued_batches", "num_batch_threads"),
    )
    fields = dict.fromkeys(numbers, number)
    fields["enable_large_batch_splitting"] = ".google.protobuf.BoolValue"
    proto = message("BatchingParameters", {"BatchingParameters": fields})
    config = parsed("batching.config", proto)
    values = {field.name: value.value for field, value in config.ListFields()}
    assert values.keys() == fields.keys()
    assert all(value > 0 for value in values.values())
    # TF Serving refuses what is over the first, and runs what is over the second in
    # parts, all of which must fit into the queue.
    assert values["max_batch_size"] > values["max_execution_batch_size"]
    assert values["max_batch_size"] == Limits().examples  # of the preview server
    assert values["max_execution_batch_size"] == PART
    queue = values["max_enqueued_batches"] * values["max_execution_batch_size"]
    assert values["max_batch_size"] <= queue


def test_the_docs_turn_batching_off_in_both(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text()
    (command,) = re.findall(r"^sed -i '/batching/d' .*$", page, re.M)
    shutil.copytree(FOLDER, tmp_path / "export/tf_serving")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    rest = {flag for flag in FLAGS if "batching" not in flag}
    for name in ("docker-compose.yml", "kubernetes.yaml"):
        text = (tmp_path / "export/tf_serving" / name).read_text()
        assert "batching" not in text
        assert all(flag in text for flag in rest)
        for document in yaml.safe_load_all(text):
            if name == "kubernetes.yaml":
                kubernetes_validate.validate(document, "1.37", strict=True)


def test_monitoring_config_is_of_prometheus():
    fields = {
        "MonitoringConfig": {"prometheus_config": ".kcs_test.PrometheusConfig"},
        "PrometheusConfig": {"enable": 8, "path": 9},
    }
    config = parsed("monitoring.config", message("MonitoringConfig", fields))
    assert config.prometheus_config.enable
    metadata = kinds()["Deployment"]["spec"]["template"]["metadata"]
    scraped = metadata["annotations"]["prometheus.io/path"]
    assert scraped == config.prometheus_config.path


@pytest.mark.parametrize("flags", [compose()["command"], container()["args"]])
def test_both_give_the_same_flags_and_every_file_that_one_names_is_there(flags):
    threads = "--tensorflow_session_parallelism=2"
    assert {*flags} - {threads} == FLAGS
    files = {flag.partition("=/config/")[2] for flag in flags if "/config/" in flag}
    assert all((FOLDER / file).is_file() for file in files)


def test_threads_fit_the_cpus_that_are_asked_for():
    cpus = container()["resources"]["requests"]["cpu"]
    assert f"--tensorflow_session_parallelism={cpus}" in container()["args"]
    batching = (FOLDER / "batching.config").read_text()
    assert f"num_batch_threads {{ value: {cpus} }}" in batching


def test_compose_mounts_folders_and_opens_the_ports_here_alone():
    service = compose()
    mounts = dict(mount.rsplit(":", 2)[:2] for mount in service["volumes"])
    # A file that is mounted by itself keeps its old text when it is replaced.
    assert mounts == {
        "${MODEL:?set MODEL to the folder with the versions}": f"/models/{NAME}",
        ".": "/config",
    }
    assert service["ports"] == ["127.0.0.1:8500:8500", "127.0.0.1:8501:8501"]


def test_sigterm_reaches_a_process_that_is_not_the_first():
    """Linux lets process 1 alone where it has no handler, as TF Serving has none."""
    assert compose()["entrypoint"] == container()["command"]
    assert container()["command"] == ["tensorflow_model_server"]
    assert compose()["init"] is True
    assert pod()["shareProcessNamespace"] is True
    (_, wait) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert int(wait) < pod()["terminationGracePeriodSeconds"]


def test_both_run_the_same_tf_serving():
    default = compose()["image"].replace("${TF_SERVING_VERSION:-", "").rstrip("}")
    (document,) = documents("kustomization.yaml")
    (image,) = document["images"]
    assert f"{image['name']}:{image['newTag']}" == default
    assert container()["image"] == image["name"]


def test_kubernetes_probes_scales_and_finds_the_pods():
    of = kinds()
    pods = of["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert of["Deployment"]["spec"]["selector"]["matchLabels"] == pods
    assert of["Service"]["spec"]["selector"] == pods
    assert of["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == pods
    assert of["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == pods
    (spread,) = pod()["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == pods
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {p["targetPort"] for p in of["Service"]["spec"]["ports"]} == ports.keys()
    (allowed,) = of["NetworkPolicy"]["spec"]["ingress"]
    assert {p["port"] for p in allowed["ports"]} == ports.keys()
    _, labels = served((FOLDER / "models.config").read_text())
    for probe in ("readinessProbe", "startupProbe"):
        asked = container()[probe]["httpGet"]
        path = rf"/v1/models/{NAME}/labels/(\w+)/metadata"
        assert re.fullmatch(path, asked["path"])[1] in labels
        assert asked["port"] == "rest"
    target = of["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == of["Deployment"]["metadata"]["name"]
    assert "cpu" in container()["resources"]["requests"]  # what utilization is of


def test_the_container_may_do_nothing_that_it_need_not():
    of_pod, of_container = pod()["securityContext"], container()["securityContext"]
    assert of_pod["runAsNonRoot"]
    assert of_pod["runAsUser"] > 0
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    assert kinds()["NetworkPolicy"]["spec"]["egress"] == []


def test_kustomization_makes_the_maps_that_are_mounted():
    (document,) = documents("kustomization.yaml")
    generated = {x["name"]: x["files"] for x in document["configMapGenerator"]}
    files = [file for of_map in generated.values() for file in of_map]
    assert sorted(files) == sorted(path.name for path in FOLDER.glob("*.config"))
    assert all((FOLDER / file).is_file() for file in document["resources"])
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    sources = volumes["config"]["projected"]["sources"]
    assert {source["configMap"]["name"] for source in sources} == generated.keys()
    assert {m["name"] for m in container()["volumeMounts"]} == volumes.keys()


def test_kubernetes_takes_the_documents():
    for document in documents("kubernetes.yaml"):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_kubernetes_takes_what_kustomize_makes_of_them():
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    made = subprocess.run(
        ["kubectl", "kustomize", FOLDER], check=True, capture_output=True, text=True
    ).stdout
    of = {}
    for document in yaml.safe_load_all(made):
        kubernetes_validate.validate(document, "1.37", strict=True)
        of.setdefault(document["kind"], []).append(document)
    maps = {x["metadata"]["name"] for x in of["ConfigMap"]}
    spec = of["Deployment"][0]["spec"]["template"]["spec"]
    (config,) = (x for x in spec["volumes"] if x["name"] == "config")
    sources = config["projected"]["sources"]
    assert {source["configMap"]["name"] for source in sources} == maps
    # Its name stays, so that the pods read its changes as they run.
    assert "tf-serving-models" in maps


def test_compose_takes_its_file():
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = FOLDER / "docker-compose.yml"
    run = subprocess.run(
        [sys.executable, "-m", *command, file], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
