"""How long a pipeline waits for its stages, whose actors are made up here: no cluster is started."""

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace

import pytest
import ray
from ray.util.placement_group import PlacementGroup

from rayserve_sarathi.actors.stage_group import StageGroup
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError


def make_group(monkeypatch: pytest.MonkeyPatch, config: EngineConfig, **delays_s: float) -> StageGroup:
    """Return a group of actors that answer each call after the delay of its name."""

    def answers(name: str, value: object) -> SimpleNamespace:
        def remote(*_: object) -> Awaitable[object]:
            return asyncio.ensure_future(asyncio.sleep(delays_s.get(name, 0.0), value))

        return SimpleNamespace(remote=remote)

    def make_actor(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(
            open_meeting=answers("open_meeting", ("127.0.0.1", 1)),
            load=answers("load", 7),
            start=answers("start", None),
        )

    actor_class = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make_actor))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: actor_class)
    return StageGroup(config, placement_group=PlacementGroup.empty(), first_bundle=1)


async def test_weights_may_take_longer_to_come_than_a_place(monkeypatch: pytest.MonkeyPatch):
    config = EngineConfig(model="m", device="cpu", pipeline_parallel_size=2, placement_timeout_s=0.1)
    group = make_group(monkeypatch, config, load=0.3, start=0.3)

    assert await group.start() == 7


@pytest.mark.parametrize(
    ("call", "setting"),
    [("open_meeting", "placement_timeout_s"), ("load", "load_timeout_s"), ("start", "load_timeout_s")],
)
async def test_what_takes_too_long_names_its_setting(monkeypatch: pytest.MonkeyPatch, call: str, setting: str):
    config = EngineConfig(model="m", device="cpu", placement_timeout_s=0.1, load_timeout_s=0.1)
    group = make_group(monkeypatch, config, **{call: 60.0})

    with pytest.raises(EngineDeadError, match=f"within {setting}=0.1$"):
        await group.start()
