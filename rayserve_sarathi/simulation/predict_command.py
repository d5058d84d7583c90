"""`sarathi predict`: how long the steps of a prompt take, or those of decodes, without running anything.

`--prefill P --chunk C` computes a prompt of P tokens in chunks of C, one in each step and the last as short as it is,
and `--decodes N --context K` adds to each of these steps, or to a single one where there is no prompt, N decodes that
have K tokens each before them. C counts tokens of the prompt alone. Each step is given as if it had the pipeline for
itself: CPU time, all stages, and the transfers between them; the total is their sum, as a chunk waits for the one
before it. Only the last chunk samples a token.
"""

import argparse
import sys

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.options import add_machine_arguments, parse_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_machine_arguments(parser)
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="of a prompt (default: %(default)s)")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="of the prompt in each step; all if left out")
    parser.add_argument("--decodes", type=int, default=0, help="requests that decode in each step (default: 0)")
    parser.add_argument("--context", type=int, default=0, metavar="TOKENS", help="before each of these (default: 0)")
    parser.add_argument("--json", action="store_true", help="write the prediction as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the prediction; return the exit status.

    Raises:
        ConfigError: An option is out of range or does not fit the others.
    """
    # Reading model configs takes a second to load.
    predict = import_object("rayserve_sarathi.simulation.prediction:predict")
    sys.stdout.write(
        predict(
            **parse_machine(arguments),
            prefill=arguments.prefill,
            chunk=arguments.chunk,
            num_decodes=arguments.decodes,
            context_len=arguments.context,
            is_json=arguments.json,
        )
    )
    return 0
