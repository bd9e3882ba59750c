"""`nixl.logging`: loggers under `nixl`, which write to standard output as NIXL's do."""

from __future__ import annotations

import logging
import os
import sys

LEVELS = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
    "FATAL": logging.CRITICAL,
}
_ROOT = "nixl"


class _Output(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stdout` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def set_log_level_by_env(nixl_logger: logging.Logger) -> None:
    """Take the level from NIXL_LOG_LEVEL: TRACE, DEBUG, INFO, WARN, ERROR or FATAL."""
    wanted = os.environ.get("NIXL_LOG_LEVEL")
    if not wanted:
        return
    level = LEVELS.get(wanted.upper())
    if level is None:
        nixl_logger.warning("NIXL_LOG_LEVEL is %r; it must be one of %s", wanted, ", ".join(LEVELS))
    else:
        nixl_logger.setLevel(level)


def setup_logging() -> None:
    """Give the logger `nixl` its handler and level. Idempotent."""
    logger = logging.getLogger(_ROOT)
    if any(isinstance(handler, _Output) for handler in logger.handlers):
        return
    handler = _Output()
    handler.setFormatter(
        logging.Formatter("%(asctime)s NIXL %(levelname)-7s %(filename)s:%(lineno)d %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    set_log_level_by_env(logger)


def get_logger(name: str) -> logging.Logger:
    """Return the logger `nixl.<name>`."""
    setup_logging()
    return logging.getLogger(f"{_ROOT}.{name.lstrip('_')}")
