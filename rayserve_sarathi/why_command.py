"""`sarathi why`: ask a server that runs why tokens of a request came later than `slo.tbt_s`."""

import argparse
import http.client
import json
import sys
import urllib.error
from collections.abc import Iterator
from urllib.parse import quote

from rayserve_sarathi import admin_client

_CAUSES = {
    "prefill": "prompts were computed meanwhile",
    "kv_wait": "it waited for KV blocks that others held",
    "recompute": "its KV had been given to others and was computed again",
    "rebuild": "the pipeline had failed and was rebuilt",
    "slow_stage": "the step took longer than its content explains",
    "bubble": "it waited for its turn, though prompts were not in its way",
    "decodes": "the decodes of the step alone take longer",
    "slow_reader": "it was there in time, but the client did not read",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("request_id", metavar="REQUEST_ID", help="`id` of the answer, such as chatcmpl-...")
    admin_client.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what the server knows; return the exit status."""
    try:
        body = admin_client.fetch(arguments, f"/debug/why/{quote(arguments.request_id, safe='')}")
        lines = list(_lines(json.loads(body)["requests"], arguments.request_id))
    except urllib.error.HTTPError as error:
        with error:
            problem = admin_client.explain(error)
    except (http.client.HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        problem = f"no answer from {arguments.url}: {error}"
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return 0
    sys.stderr.write(f"error: {problem}\n")
    return 1


def _lines(requests: "list[dict[str, object]]", request_id: str) -> Iterator[str]:
    if not requests:
        yield f"no token of {request_id} was late, as far as the server remembers: it keeps the last 512 late requests"
    for request in requests:
        num_late, gaps = request["num_late"], request["gaps"]
        assert isinstance(num_late, dict), num_late
        assert isinstance(gaps, list), gaps
        yield f"{request['request_id']}: {sum(num_late.values())} tokens came later than {request['tbt_s']:g} s"
        for cause, count in sorted(num_late.items(), key=lambda entry: -entry[1]):
            yield f"  {count:6d}  {cause}: {_CAUSES.get(cause, 'unknown to this version of the command')}"
        yield "  the last ones:"
        for gap in gaps:
            culprit = f" of {gap['culprit']}" if gap["culprit"] else ""
            yield f"  token {gap['position']}: {gap['gap_s']:.3f} s, {gap['cause']}{culprit}"
