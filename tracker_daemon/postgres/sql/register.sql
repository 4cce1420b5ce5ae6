-- Clients without lives, when they are first seen; in one order, as two who insert the same keys wait for each other.
INSERT INTO {ledger} (producer, lane, epoch, applied_sequence)
SELECT producer, lane, 0, 0
FROM unnest(%(producers)s::uuid[], %(lanes)s::smallint[]) AS w (producer, lane)
ORDER BY producer, lane
ON CONFLICT (producer, lane) DO NOTHING
