"""What callers of NIXL rely on when agents find each other through a TCPStore; NIXL_TCPSTORE_ENDPOINT names one that is running.

Run like `behaviours.py`, with the drop-in or with NIXL.
"""

import os
import sys
import time

import behaviours as shared
from behaviours import make, raises, until
from peer import another
from through_store import NBYTES, OTHERS, Near, names


@shared.behaviour
def who_is_invalidated_is_found_no_more():
    near, late, name = Near(), Near(), next(names)
    with another(name, NBYTES, 7, OTHERS) as far:
        far.call("send_local_metadata")
        far.call("send_partial_agent_metadata", {"list": 0}, True, ["UCX"], label="part")
        near.agent.fetch_remote_metadata(name)
        until(lambda: near.agent.check_remote_metadata(name))
        far.call("invalidate_local_metadata")
        # Written after the deletion, by the same agent: who sees this would see what was not deleted.
        far.call("send_partial_agent_metadata", {"list": 0}, True, ["UCX"], label="last")
        near.agent.remove_remote_agent(name)
        near.agent.fetch_remote_metadata(name, label="last")
        until(lambda: near.agent.check_remote_metadata(name))
        for label in ("", "part"):
            late.agent.fetch_remote_metadata(name, label=label)
        time.sleep(0.5)
        assert not late.agent.check_remote_metadata(name)
        # Nobody tells those who have it already.
        assert near.agent.check_remote_metadata(name)
        far.call("send_local_metadata")
        until(lambda: late.agent.check_remote_metadata(name))


@shared.behaviour
def one_store_at_a_time():
    os.environ["NIXL_ETCD_ENDPOINTS"] = "http://127.0.0.1:2379"
    try:
        with raises(Exception, "NIXL_TCPSTORE_ENDPOINT"):
            make(next(names))
    finally:
        del os.environ["NIXL_ETCD_ENDPOINTS"]


@shared.behaviour
def what_is_no_address_is_refused():
    right = os.environ["NIXL_TCPSTORE_ENDPOINT"]
    try:
        for wrong in ("host", "host:", ":1", "host:port", "host:0", "host:65536"):
            os.environ["NIXL_TCPSTORE_ENDPOINT"] = wrong
            with raises(Exception, "NIXL_TCPSTORE_ENDPOINT"):
                make(next(names))
    finally:
        os.environ["NIXL_TCPSTORE_ENDPOINT"] = right


if __name__ == "__main__":
    shared.main(sys.argv[1:])
