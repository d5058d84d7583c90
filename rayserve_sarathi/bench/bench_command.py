"""`sarathi bench`: put a load on a server with OpenAI's API, and tell how long its tokens took.

What the command runs is loaded when it does: its libraries would slow down every other command.
"""

import argparse
from pathlib import Path

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.options import add_workload_arguments as add_requests

KEY_VARIABLE = "SARATHI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_server_arguments(parser)
    timing = parser.add_argument_group("when requests are sent (one of these, or --arrivals recorded)")
    loop = timing.add_mutually_exclusive_group()
    loop.add_argument(
        "--request-rate", type=float, metavar="R", help="open loop: R requests a second, however slow the server is"
    )
    loop.add_argument("--concurrency", type=int, metavar="N", help="closed loop: N clients, each one request at a time")
    add_workload_arguments(parser, num_requests=100)
    report = parser.add_argument_group("what is told")
    report.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="targets in milliseconds that a good request meets: ttft, tbt (each gap), tpot (mean gap), e2el",
    )
    report.add_argument(
        "--metric-percentiles",
        default="50,90,99",
        metavar="P,P",
        help="percentiles of each time (default: %(default)s)",
    )
    report.add_argument("--json", type=Path, metavar="PATH", help="write the figures, named as `vllm bench serve` does")
    report.add_argument("--detailed", action="store_true", help="write those of every request too")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which server, and how to talk to it."""
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="without a path (default: %(default)s)")
    server.add_argument("--model", help="what the server calls it (default: the only one that it serves)")
    server.add_argument(
        "--key", help=f"an API key (default: {KEY_VARIABLE} of the environment, which `ps` does not show)"
    )
    server.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="of a request (default: %(default)g)"
    )
    server.add_argument(
        "--extra-body", default="{}", metavar="JSON", help='more fields of each request, such as {"min_tokens": 8}'
    )
    server.add_argument(
        "--end-at-eos",
        action="store_true",
        help="let the model end before the asked number of tokens; needed for servers that do not know ignore_eos",
    )
    server.add_argument(
        "--no-continuous-usage",
        action="store_true",
        help="do not ask for the number of tokens in each chunk, for servers that do not know continuous_usage_stats",
    )
    server.add_argument(
        "--no-keep-alive",
        action="store_true",
        help="open a connection for each request, for servers that close them without saying so, as llama.cpp's does",
    )
    server.add_argument("--num-warmups", type=int, default=1, metavar="N", help="small requests before (default: 1)")


def add_workload_arguments(parser: argparse.ArgumentParser, *, num_requests: int) -> None:
    """Declare the options that say which requests are sent; those of the simulator, and what concerns a server."""
    add_requests(parser)
    parser.set_defaults(num_requests=num_requests)
    group = parser.add_argument_group("requests that are sent")
    group.add_argument("--max-model-len", type=int, metavar="N", help="most tokens (default: the server's)")
    group.add_argument(
        "--prompt-seed", type=int, help="of the prompts' tokens (default: a new one: old prompts may be cached)"
    )
    group.add_argument("--vocab-size", type=int, metavar="N", help="token ids are less (default: ask the server)")


def run(arguments: argparse.Namespace) -> int:
    """Run the load, tell what came of it, and return the exit status."""
    status: int = import_object("rayserve_sarathi.bench.session:run_bench")(arguments)
    return status
