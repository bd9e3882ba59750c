"""What callers of NIXL rely on when agents find each other through etcd; NIXL_ETCD_ENDPOINTS names one that is running.

Run like `behaviours.py`, with the drop-in or with NIXL.
"""

import sys

import behaviours as shared
from behaviours import until
from peer import another
from through_store import NBYTES, OTHERS, Near, names


@shared.behaviour
def who_is_invalidated_is_forgotten_by_all():
    near, name = Near(), next(names)
    with another(name, NBYTES, 7, OTHERS) as far:
        far.call("send_local_metadata")
        near.agent.send_local_metadata()
        near.agent.fetch_remote_metadata(name)
        far.call("fetch_remote_metadata", near.agent.name)
        until(lambda: near.agent.check_remote_metadata(name))
        assert far.until("check_remote_metadata", near.agent.name)
        far.call("invalidate_local_metadata")
        until(lambda: not near.agent.check_remote_metadata(name))
        near.agent.invalidate_local_metadata()
        assert far.until("check_remote_metadata", near.agent.name, expected=False) is False
        far.call("send_local_metadata")
        near.agent.fetch_remote_metadata(name)
        until(lambda: near.agent.check_remote_metadata(name))


if __name__ == "__main__":
    shared.main(sys.argv[1:])
