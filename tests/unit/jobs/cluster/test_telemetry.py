"""The actor between driver and workers, called without Ray: which job is given to whom, and what a stop reaches."""

from __future__ import annotations

import asyncio

from jobs.cluster.telemetry import Job, Telemetry


def job(name: str) -> bytes:
    return Job(print, {"name": name}).packed()


def test_a_job_is_given_to_every_rank_and_again_after_a_restart_until_it_is_finished():
    async def scenario() -> None:
        actor, first, second = Telemetry(), job("first"), job("second")
        early = asyncio.create_task(actor.next_job())
        await asyncio.sleep(0)
        await actor.give(first)
        assert [await early, await actor.next_job(), await actor.next_job()] == [first] * 3
        await actor.finish()
        late = asyncio.create_task(actor.next_job())
        await asyncio.sleep(0)
        assert not late.done()
        await actor.give(second)
        assert await late is second
        await actor.close()
        # What is under way is given out again; only then do workers end.
        assert await actor.next_job() is second
        await actor.finish()
        assert await actor.next_job() is None

    asyncio.run(scenario())


def test_drain_ends_with_the_job_or_its_time_and_returns_every_row_once():
    async def scenario() -> None:
        actor = Telemetry()
        await actor.give(job("one"))
        await actor.push([{"kind": "step", "step": 1}])
        assert await actor.drain(0.01) == ([{"kind": "step", "step": 1}], False)
        waiting = asyncio.create_task(actor.drain(60))
        await asyncio.sleep(0)
        await actor.push([{"kind": "step", "step": 2}])
        await actor.finish()
        assert await asyncio.wait_for(waiting, 5) == ([{"kind": "step", "step": 2}], True)

    asyncio.run(scenario())


def test_a_stop_is_of_one_job_and_says_whether_that_job_has_begun():
    async def scenario() -> None:
        actor = Telemetry()
        await actor.give(job("one"))
        assert await actor.stop() is False
        assert await actor.push([{"kind": "start"}]) is True
        assert await actor.stop() is True
        await actor.finish()
        await actor.give(job("two"))
        assert await actor.push([{"kind": "waiting"}]) is False
        assert await actor.stop() is False

    asyncio.run(scenario())
