-- Forget producers that are gone, by the database's clock: a day after a clean close, a month after the last sign. What
-- somebody else holds is left to the next one: this takes rows in no order, and must wait for none.
DELETE FROM {ledger}
WHERE (producer, lane) IN (
    SELECT producer, lane FROM {ledger}
    WHERE closed_at < now() - interval '1 day' OR updated_at < now() - interval '30 days'
    FOR UPDATE SKIP LOCKED
)
