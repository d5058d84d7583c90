"""How the doctor joins a cluster; no cluster is started."""

from pathlib import Path

import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError

from rayserve_sarathi.cli import main
from rayserve_sarathi.deployment_file import IMPORT_PATH


@pytest.fixture
def file(tmp_path: Path) -> str:
    others = {"name": "others", "import_path": "other:app", "runtime_env": {"env_vars": {"PYTHONPATH": "/opt/others"}}}
    ours = {"name": "ours", "import_path": IMPORT_PATH, "runtime_env": {"env_vars": {"PYTHONPATH": "/opt/ours"}}}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump({"applications": [others, ours]}))
    return str(tmp_path / "app.yaml")


def test_a_cluster_that_wants_a_token_says_where_it_is(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AuthenticationError("the token is missing")

    monkeypatch.setattr(ray, "init", refuse)

    assert main(["doctor", file]) == 1
    message = capsys.readouterr().err
    assert message.startswith("sarathi: the cluster does not let this process in (the token is missing); ")
    assert "copy ~/.ray/auth_token from the cluster's head" in message


def test_the_actors_that_probe_links_have_the_environment_of_the_application(
    file: str, monkeypatch: pytest.MonkeyPatch
):
    given: list[object] = []

    def record(*_: object, runtime_env: object, **__: object) -> None:
        given.append(runtime_env)
        raise ConnectionError("far enough")

    monkeypatch.setattr(ray, "init", record)

    assert main(["doctor", file]) == 1
    assert given == [{"env_vars": {"PYTHONPATH": "/opt/ours"}}]
