-- Forget producers that are gone, by the database's clock: a day after a clean close, a month after the last sign.
-- Where a partition of a stream stands is never forgotten: its row is closed at infinity.
DELETE FROM {ledger}
WHERE closed_at < now() - interval '1 day' OR (closed_at IS NULL AND updated_at < now() - interval '30 days')
