"""The actor that stands on a node while `sarathi doctor` probes the links between nodes."""

from collections.abc import Sequence
from contextlib import ExitStack

import ray

from rayserve_sarathi.links import LinkSpeed, listen, probe


class LinkEnd:
    """Listens on its node, and probes others.

    Args:
        timeout_s: Of each probe.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's annotation is missing
        # Open until the actor's process ends.
        self._stack = ExitStack()
        self._port = self._stack.enter_context(listen(self._host, timeout_s=2 * timeout_s))

    def address(self) -> tuple[str, int]:
        """Return where it listens."""
        return self._host, self._port

    def probe(self, targets: Sequence[tuple[str, int]]) -> list[LinkSpeed | str]:
        """Return the speed of the link to each target, or what is wrong with it."""
        return [self._probe(host, port) for host, port in targets]

    def _probe(self, host: str, port: int) -> LinkSpeed | str:
        try:
            return probe(host, port, timeout_s=self._timeout_s)
        except TimeoutError:
            return f"no connection, or a stalled one, within {self._timeout_s:g} s"
        except OSError as error:
            return f"no connection ({error.strerror or error})"
