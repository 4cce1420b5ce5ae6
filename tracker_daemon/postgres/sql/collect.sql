-- Forget producers that are gone, by the database's clock: a day after a clean close, a month after the last sign. What
-- somebody else holds is left to the next one: this takes rows in no order, and must wait for none. Where a partition of
-- a stream stands is never forgotten: its row is closed in the year 9999. Of a tracker's lanes lane 0 goes first: as long
-- as it is there, all are, and tell how many there were.
DELETE FROM {ledger}
WHERE (producer, lane) IN (
    SELECT producer, lane FROM {ledger} AS l
    WHERE (closed_at < now() - interval '1 day' OR (closed_at IS NULL AND updated_at < now() - interval '30 days'))
      AND (lane >= 0 OR NOT EXISTS (SELECT FROM {ledger} AS z WHERE z.producer = l.producer AND z.lane = 0))
    FOR UPDATE SKIP LOCKED
)
