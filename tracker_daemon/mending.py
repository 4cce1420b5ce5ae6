"""Windows whose files are not to be trusted, have grown long, or could not be had: they are written anew.

Rules:
1. What is written anew is whole and on the disk before it takes the place of anything.
2. A window in memory is written to a file as soon as one can be had: from then on `kill -9` loses nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracker_daemon.journal.directory import operation_of
from tracker_daemon.journal.windows import Damage

if TYPE_CHECKING:
    from tracker_daemon.backlog import Backlog
    from tracker_daemon.journal.journal import Journal


class Mender:
    """Mends the backlog's windows in the journal. Without state: whoever needs one makes one."""

    def __init__(self, backlog: Backlog, journal: Journal) -> None:
        self._backlog, self._journal = backlog, journal

    def mend(self) -> None:
        """See to the windows whose files are not to be trusted, have grown long, or could not be had."""
        journal, backlog = self._journal, self._backlog
        if journal.untrusted or any(sealed.stored is None for sealed in backlog.sealed):
            self.rewrite_sealed()
        if not (journal.stores_window or journal.queue.is_cut) and journal.may_try:
            self.leave_memory()
        if journal.wants_rewriting:
            backlog.rewrite()

    def leave_memory(self) -> None:
        """End an open window that is in memory, if a file can be had for the calls to come."""
        journal = self._journal
        following = journal.queue.prepare_cut()
        if following.path is None:
            journal.drop([following])
        else:
            journal.queue.cut(following)

    def rewrite_sealed(self) -> None:
        """Write sealed windows anew that are in no file, or in one that is not to be trusted: what is not settled."""
        journal, backlog = self._journal, self._backlog
        for sealed in list(backlog.sealed):
            window, header = sealed.stored, sealed.header
            bad = window is not None and not journal.trusts(window)
            if header is None or (window is not None and not bad) or not journal.may_write_anew:
                continue
            generation = sealed.generation
            if generation is None:
                assert window is not None
                try:
                    generation = window.load()
                except (Damage, OSError) as error:  # held, not guessed: it is read again when its turn comes
                    journal.fail(operation_of(error), error)
                    continue
            first = sealed.first + sealed.settled
            anew = journal.write_anew(generation, header, journal.next_number(), first, sealed=True)
            if anew is not None:
                batches, calls = sum(1 for _ in generation.batches(backlog.max_batch_size)), generation.calls
                if window is None:
                    backlog.store(sealed, journal.stored(anew, batches, calls, len(generation.deltas)))
                else:
                    journal.replace(window, anew, batches, calls)

    def unstore_head(self) -> None:
        """Let the oldest sealed window, which is in memory, go on there alone: its files are not to be trusted."""
        sealed, journal = self._backlog.sealed[0], self._journal
        assert sealed.stored is not None
        journal.forget(sealed.stored)
        sealed.stored = None
