"""Which routes are down: what is new of what is reported, and which route comes first."""

from __future__ import annotations

from nixl_async.outages import Outages


def test_none_at_first() -> None:
    outages = Outages()
    assert not outages
    assert outages.first_up(("a", "b"), "p") == "a"
    assert outages.first_up((), "p") is None
    assert outages.of("p") == {}
    assert not outages.end("a", "p")


def test_an_outage_is_reported_once_and_ends() -> None:
    outages = Outages()
    outage = outages.begin("a", "p", "reset", 3.0)
    assert outage is not None
    assert (outage.backend, outage.peer, outage.reason, outage.since, outage.again_at) == ("a", "p", "reset", 3.0, None)
    assert outages.begin("a", "p", "reset again", 4.0) is None
    assert outages
    assert outages.of("p") == {"a": outage}
    assert outages.first_up(("a", "b"), "p") == "b"
    assert outages.first_up(("a",), "p") is None
    # Another peer's, and what stays in this process, has nothing to do with it.
    assert outages.first_up(("a", "b"), "q") == "a"
    assert outages.first_up(("a", "b"), None) == "a"
    assert outages.end("a", "p")
    assert outages.first_up(("a", "b"), "p") == "a"
    assert outages.era == 1


def test_what_began_before_an_outage_tells_nothing_after_it() -> None:
    outages = Outages()
    before = outages.era
    outages.begin("a", "p", "reset", 0.0)
    outages.end("a", "p")
    assert outages.begin("a", "p", "late", 1.0, before) is None
    assert outages.begin("b", "p", "another route's", 1.0, before) is not None
    assert outages.begin("a", "p", "new", 1.0, outages.era) is not None


def test_a_peer_that_is_gone_is_forgotten() -> None:
    outages = Outages()
    for peer in ("p", "q"):
        outages.begin("a", peer, "reset", 0.0)
    outages.forget("p")
    assert outages.of("p") == {}
    assert set(outages.of("q")) == {"a"}
    assert outages.begin("a", "p", "of another under that name", 0.0, 0) is not None
