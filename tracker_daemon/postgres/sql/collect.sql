-- Forget producers that are gone, by the database's clock: a day after a clean close, a month after the last sign.
DELETE FROM {ledger}
WHERE closed_at < now() - interval '1 day' OR updated_at < now() - interval '30 days'
