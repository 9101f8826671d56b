"""TF Serving's own files in export/tf_serving, read as it and Kubernetes do."""

from pathlib import Path

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

FOLDER = Path(__file__).parents[3] / "export" / "tf_serving"
WRAPPERS = wrappers_pb2.DESCRIPTOR


def message(name, fields):
    """A message that tensorflow-serving-api lacks: {field: type or message}.

    The fields are those of TF Serving's session_bundle_config.proto and
    monitoring_config.proto that we use; an unknown one is a parse error. (On PyPI,
    tensorflow-serving-config 0.0.2 has the second alone, in files that would overwrite
    tensorflow-serving-api's; tensorflow-protobuf 2.11 has neither.)
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


def documents(file):
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def compose():
    (document,) = documents("docker-compose.yml")
    return document["services"]["tf-serving"]


def container():
    deployment = documents("kubernetes.yaml")[0]
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def test_models_config_names_the_model_its_versions_and_labels():
    config = parsed("models.config", model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.name == NAME
    assert model.base_path == f"/models/{NAME}"
    assert model.model_platform == "tensorflow"
    assert model.model_version_policy.latest.num_versions == 2
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}


def test_batching_config_is_of_batching_parameters():
    number = ".google.protobuf.Int64Value"
    names = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches")
    fields = dict.fromkeys((*names, "num_batch_threads"), number)
    proto = message("BatchingParameters", {"BatchingParameters": fields})
    config = parsed("batching.config", proto)
    values = {field.name: value.value for field, value in config.ListFields()}
    assert values.keys() == fields.keys()
    assert all(value > 0 for value in values.values())


def test_monitoring_config_is_of_prometheus():
    fields = {
        "MonitoringConfig": {"prometheus_config": ".kcs_test.PrometheusConfig"},
        "PrometheusConfig": {"enable": 8, "path": 9},
    }
    config = parsed("monitoring.config", message("MonitoringConfig", fields))
    assert config.prometheus_config.enable
    annotations = documents("kubernetes.yaml")[0]["spec"]["template"]["metadata"]
    scraped = annotations["annotations"]["prometheus.io/path"]
    assert scraped == config.prometheus_config.path


@pytest.mark.parametrize("flags", [compose()["command"], container()["args"]])
def test_every_file_that_a_flag_names_is_there(flags):
    files = {flag.partition("=/config/")[2] for flag in flags if "/config/" in flag}
    assert files == {"models.config", "batching.config", "monitoring.config"}
    assert all((FOLDER / file).is_file() for file in files)
    # Without it, TF Serving does not start while a label's version is missing.
    assert "--allow_version_labels_for_unavailable_models=true" in flags


def test_compose_mounts_the_model_and_the_files_and_opens_the_ports_here_alone():
    service = compose()
    mounts = dict(mount.rsplit(":", 2)[:2] for mount in service["volumes"])
    model = mounts.pop("${MODEL:?set MODEL to the folder with the versions}")
    assert model == f"/models/{NAME}"
    for source, target in mounts.items():
        assert (FOLDER / source).is_file()
        assert target == f"/config/{source.removeprefix('./')}"
    assert service["ports"] == ["127.0.0.1:8500:8500", "127.0.0.1:8501:8501"]


def test_both_run_the_same_tf_serving():
    default = compose()["image"].replace("${TF_SERVING_VERSION:-", "").rstrip("}")
    assert container()["image"] == default


def test_kubernetes_probes_scales_and_finds_the_pods():
    deployment, service, scaler = documents("kubernetes.yaml")
    kinds = [d["kind"] for d in (deployment, service, scaler)]
    assert kinds == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    pods = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pods["metadata"]["labels"]
    assert service["spec"]["selector"] == pods["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {p["targetPort"] for p in service["spec"]["ports"]} == ports.keys()
    probe = container()["readinessProbe"]["httpGet"]
    assert probe == {"path": f"/v1/models/{NAME}", "port": "rest"}
    target = scaler["spec"]["scaleTargetRef"]
    assert target["name"] == deployment["metadata"]["name"]
    assert "cpu" in container()["resources"]["requests"]  # what utilization is of


def test_kustomization_makes_the_map_that_is_mounted():
    (document,) = documents("kustomization.yaml")
    (generated,) = document["configMapGenerator"]
    assert all((FOLDER / file).is_file() for file in generated["files"])
    assert all((FOLDER / file).is_file() for file in document["resources"])
    pod = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["config"]["configMap"]["name"] == generated["name"]
    assert {m["name"] for m in container()["volumeMounts"]} == volumes.keys()
