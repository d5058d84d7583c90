"""The files of `deployments/`, and what its README says to change to try them on a laptop."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.published_models import CONFIGS, save_config

FOLDER = Path(__file__).resolve().parents[1] / "deployments"
# Of each file that serves a published model, the family that the README gives overrides for.
FAMILIES = {
    "mistral-7b.yaml": "mistral",
    "yi-34b.yaml": "yi",
    "llama2-70b.yaml": "llama2",
    "falcon180b.yaml": "falcon",
}


def read_file(name: str) -> dict[str, Any]:
    """Return the content of a file, which has one application."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    assert len(content["applications"]) == 1
    return content


def laptop_args(name: str, folder: Path) -> dict[str, Any]:
    """Return a file's `args` with the README's overrides, and a `config.json` in `folder` as its model."""
    args: dict[str, Any] = read_file(name)["applications"][0]["args"]
    if name not in FAMILIES:
        return args
    assert args["model"] in CONFIGS
    (block,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    overrides = yaml.safe_load(block)
    model = str(save_config(folder, args["model"]))
    return {**args, **overrides["common"], **overrides[FAMILIES[name]], "model": model}
