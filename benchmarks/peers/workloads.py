"""The workloads: what clients send, and what is measured."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one kind from clients that each send one after the other.

    Args:
        name: As in the table.
        num_clients: How many requests are open at a time.
        num_prompt_tokens: Of each request.
        num_output_tokens: Of each request.
        num_requests: In all, by model.
        is_total: Whether prompt tokens count too.
    """

    name: str
    num_clients: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: dict[str, int]
    is_total: bool

    @property
    def num_counted_each(self) -> int:
        """Tokens of a request that count."""
        return self.num_output_tokens + (self.num_prompt_tokens if self.is_total else 0)

    def num_counted(self, model: str) -> int:
        """Return the tokens that count, of all requests."""
        return self.num_counted_each * self.num_requests[model]

    def shortened(self) -> "Workload":
        """Return one request of each client: enough to see that an engine works."""
        return replace(self, num_requests=dict.fromkeys(self.num_requests, self.num_clients))


WORKLOADS = (
    Workload(
        name="W1",
        num_clients=16,
        num_prompt_tokens=64,
        num_output_tokens=128,
        num_requests={"15m": 96, "125m": 32},
        is_total=False,
    ),
    Workload(
        name="W2",
        num_clients=8,
        num_prompt_tokens=1024,
        num_output_tokens=16,
        num_requests={"15m": 40, "125m": 16},
        is_total=True,
    ),
    Workload(
        name="W4",
        num_clients=1,
        num_prompt_tokens=32,
        num_output_tokens=128,
        num_requests={"15m": 6, "125m": 2},
        is_total=False,
    ),
    Workload(
        name="W5",
        num_clients=64,
        num_prompt_tokens=256,
        num_output_tokens=64,
        num_requests={"15m": 64, "125m": 64},
        is_total=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """Running decodes, and long prompts that come meanwhile (W3).

    Args:
        num_decoding: Clients with long outputs.
        num_prompt_tokens: Of a decoding client's request.
        num_output_tokens: Of a decoding client's request; then it sends the next.
        long_prompt_tokens: Of a request that comes meanwhile.
        long_output_tokens: Which that one asks for.
        period_s: Between two of those.
        duration_s: Of the whole.
    """

    num_decoding: int = 8
    num_prompt_tokens: int = 32
    num_output_tokens: int = 1000
    long_prompt_tokens: int = 2000
    long_output_tokens: int = 4
    period_s: float = 2.0
    duration_s: float = 20.0

    def shortened(self) -> "Interference":
        """Return two long prompts' worth, and decodes that end soon after."""
        return replace(self, num_output_tokens=200, duration_s=3 * self.period_s)
