"""Serve config files are read as Serve reads them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_sarathi.deployment_file import IMPORT_PATH, Application, read_deployment
from rayserve_sarathi.errors import ConfigError


def read_entry(folder: Path, entry: dict[str, Any]) -> Application:
    file = folder / "app.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"name": "app", "import_path": IMPORT_PATH, **entry}]}))
    (application,) = read_deployment(file)
    return application


@pytest.mark.parametrize(
    ("options", "num_pipelines", "max_pipelines"),
    [
        ({}, 1, 1),
        ({"num_replicas": None, "autoscaling_config": None}, 1, 1),
        ({"num_replicas": "auto"}, 1, 100),
        ({"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}, 2, 100),
        ({"autoscaling_config": {"min_replicas": 0, "initial_replicas": 2, "max_replicas": 5}}, 2, 5),
        ({"autoscaling_config": {"min_replicas": 0, "initial_replicas": None, "max_replicas": 5}}, 1, 5),
        ({"autoscaling_config": {"min_replicas": None}}, 1, 1),
    ],
)
def test_replicas_are_read_with_the_defaults_of_serve(
    tmp_path: Path, options: dict[str, Any], num_pipelines: int, max_pipelines: int
):
    application = read_entry(tmp_path, {"deployments": [{"name": "SchedulerActor", **options}]})

    assert (application.num_pipelines, application.max_pipelines) == (num_pipelines, max_pipelines)


def test_what_is_null_is_left_out(tmp_path: Path):
    entry = {"name": None, "args": None, "deployments": None, "runtime_env": None}

    assert read_entry(tmp_path, entry) == Application(name="default", args={}, num_pipelines=1, max_pipelines=1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"args": [1]}, r"args of application app must be a mapping of names to values, got \[1\]"),
        ({"runtime_env": "here"}, "runtime_env of application app must be a mapping of names to values, got 'here'"),
        ({"deployments": {"name": "SchedulerActor"}}, "deployments of application app must be a list of mappings, got"),
        ({"deployments": ["SchedulerActor"]}, "deployments of application app must be a list of mappings, got"),
    ],
)
def test_an_application_of_the_wrong_shape_is_refused(tmp_path: Path, entry: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read_entry(tmp_path, entry)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_replicas": "two"},
            "num_replicas of SchedulerActor of application app must be a whole number, at least 1",
        ),
        ({"num_replicas": True}, "num_replicas of .* must be a whole number, at least 1, got True"),
        ({"num_replicas": 0}, "num_replicas of .* must be a whole number, at least 1, got 0"),
        ({"num_replicas": 2, "autoscaling_config": {"max_replicas": 2}}, "must be auto beside an autoscaling_config"),
        ({"autoscaling_config": 3}, "autoscaling_config of .* must be a mapping of names to values, got 3"),
        (
            {"autoscaling_config": {"min_replicas": "1"}},
            "min_replicas of .* must be a whole number, at least 0, got '1'",
        ),
        ({"autoscaling_config": {"min_replicas": 2}}, "max_replicas of .* must be a whole number, at least 2, got 1"),
        (
            {"autoscaling_config": {"min_replicas": 2, "initial_replicas": 1, "max_replicas": 3}},
            "initial_replicas of .* must be a whole number, at least 2, got 1",
        ),
    ],
)
def test_replicas_that_serve_would_refuse_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read_entry(tmp_path, {"deployments": [{"name": "SchedulerActor", **options}]})


@pytest.mark.parametrize("content", ["[", "a: 1", "applications: 3", "applications: [3]", ""])
def test_what_is_no_deployment_file_is_refused(tmp_path: Path, content: str):
    (tmp_path / "file.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"file\.yaml"):
        read_deployment(tmp_path / "file.yaml")
