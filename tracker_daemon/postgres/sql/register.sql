-- A client without lives, when it is first seen.
INSERT INTO {ledger} (producer, lane, epoch, applied_sequence)
SELECT producer, lane, 0, 0 FROM unnest(%(producers)s::uuid[], %(lanes)s::smallint[]) AS w (producer, lane)
ON CONFLICT (producer, lane) DO NOTHING
