"""Three calls on one conversation, and the row they leave.

Run:
    python quickstart.py                       # with a PostgreSQL of its own (extra `embedded`), in ./chat-database
    python quickstart.py postgresql:///chat    # on yours, once `tracker-daemon migrate` has made the tables
"""

import asyncio
import logging
import sys

from tracker_daemon import Tracker

logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")


async def main(database: str) -> None:
    """Record a conversation."""
    async with Tracker(database) as tracker:  # or: with Tracker(...) as tracker:
        tracker.ensure_conversation("t-1")
        tracker.record_turn("t-1", agent_name="billing", tokens=812, cost=0.0041)
        tracker.resolve("t-1", "resolved_by_agent")
        await tracker.aflush(timeout=30)  # all that was called before is committed
        print(tracker.stats())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["embedded:chat-database"]))
