"""Logs as lines of JSON, and a line for each transfer that has ended: `logs.write_json()`, `logs.log_transfers(agent)`."""

from __future__ import annotations

import json
import logging
import time
from typing import IO, TYPE_CHECKING, Any

from nixl_async.transfer import TransferRecord, TransferState

if TYPE_CHECKING:
    from nixl_async.agent import Agent

logger = logging.getLogger("nixl_async.transfers")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, what `extra` holds, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        told: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def write_json(stream: IO[str] | None = None, level: int | str = logging.INFO) -> logging.Handler:
    """Write what this library logs, from `level` on, to `stream` (standard error) as JSON; return the handler, to be removed."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    root = logging.getLogger("nixl_async")
    root.addHandler(handler)
    root.setLevel(level)
    return handler


class TransferLog:
    """An observer that logs transfers as they end; `close` ends it. Small ones that are copied at once are not logged."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def close(self) -> None:
        """Log no more. Idempotent."""
        self._agent._observers.remove(self)

    def __enter__(self) -> TransferLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def finished(self, record: TransferRecord) -> None:
        """Log a transfer: failed ones as warnings, the others for information."""
        level = logging.WARNING if record.state is TransferState.FAILED else logging.INFO
        if not logger.isEnabledFor(level):
            return
        result = record.result()
        fields = {
            "agent": self._agent.name,
            "transfer": record.id,
            "state": record.state.value,
            "peer": record.peer or "",
            "backend": result.route,
            "class": record.traffic_class.value,
            "bytes": record.nbytes_done,
            "seconds": round(result.seconds, 6),
            "queued_seconds": round(result.queued_seconds, 6),
            "attempts": record.attempts,
            "resent": record.resent,
        }
        if record.error is not None:
            fields["error"] = f"{type(record.error).__name__}: {record.error}"
        logger.log(level, "transfer %d %s", record.id, record.state.value, extra=fields)


def log_transfers(agent: Agent) -> TransferLog:
    """Log each transfer of an agent that ends from here on, with fields, by the logger `nixl_async.transfers`."""
    log = TransferLog(agent)
    agent._observers.add(log)
    return log
