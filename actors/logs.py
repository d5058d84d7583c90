"""Logs of actor processes: Ray forwards what a worker writes to stderr to whoever started the application."""

import logging
import sys


def log_to_stderr() -> None:
    """Let this package's log lines of level INFO and above reach stderr, once per process."""
    logger = logging.getLogger("rayserve_sarathi")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
