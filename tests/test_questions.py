"""Questions to peers: answered, refused, or ended with the connection they were asked on."""

from __future__ import annotations

import asyncio

from nixl_async.questions import Questions
from nixl_async.wire import FrameType
from tests.agents import two_agents


async def test_a_peer_answers_each_question_by_its_number() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, peer):
        questions = a._membership._questions
        assert peer.link is not None
        async with asyncio.timeout(10):
            first = questions.ask(peer.link, FrameType.FENCE, backend="none", mark="")
            second = questions.ask(peer.link, FrameType.FENCE, backend="tcp", mark=b"12".hex())
            assert "no backend 'none'" in str(await first)
            assert await second == ""


async def test_answers_go_to_the_link_and_the_number_that_they_belong_to() -> None:
    async with two_agents() as (a, b, _):
        questions, here, there = Questions(), a.peers["b"].link, b.peers["a"].link
        assert here is not None
        assert there is not None
        number, other = questions.number(), questions.number()
        assert number != other
        one, two, three = questions.expect(here, number), questions.expect(there, number), questions.expect(here, other)
        questions.answer(there, number, "it cannot")
        assert (one.done(), two.result(), three.done()) == (False, "it cannot", False)
        # Answered twice, answered by one who was not asked, and given up before it was answered.
        questions.answer(there, number)
        questions.answer(there, other)
        three.cancel()
        questions.answer(here, other)
        assert not one.done()
        questions.answer(here, number)
        assert one.result() == ""


async def test_who_asks_hears_that_the_link_has_ended() -> None:
    async with two_agents() as (a, b, peer):
        questions, link, other = Questions(), peer.link, b.peers["a"].link
        assert link is not None
        assert other is not None
        asked, elsewhere = questions.expect(link, questions.number()), questions.expect(other, questions.number())
        questions.end(link)
        assert asked.result() is None
        assert not elsewhere.done()
        await a.disconnect("b")
        assert link.closed
        assert questions.ask(link, FrameType.LEAVE).result() is None
