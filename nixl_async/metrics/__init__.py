"""Metrics of agents for Prometheus, under the names of NIXL's own where NIXL has them (extra `metrics`).

`async with metrics.serve(agent, port=9400):` opens an endpoint. A server that has one registers `metrics.AgentCollector(agent)` in
its registry. In many processes behind one endpoint, each does `async with metrics.publish(agent):`. `metrics.dashboard()` is a
dashboard for Grafana.
"""

from importlib.resources import files

from nixl_async.errors import MissingDependency
from nixl_async.metrics.families import FAMILIES

try:
    from nixl_async.metrics.collector import AgentCollector
    from nixl_async.metrics.endpoint import Endpoint, serve
    from nixl_async.metrics.multiprocess import publish
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "prometheus_client":
        raise
    raise MissingDependency("metrics need prometheus_client: pip install 'nixl-async[metrics]'") from error

__all__ = ["FAMILIES", "AgentCollector", "Endpoint", "dashboard", "publish", "serve"]


def dashboard() -> str:
    """Return a dashboard for Grafana 10 and later, as JSON to be imported; it asks which Prometheus to query."""
    return (files(__name__) / "dashboard.json").read_text()
