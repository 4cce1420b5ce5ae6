-- The producers of a partition, whose sequences only grow.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence)
SELECT producer, %(lane)s, 0, sequence
FROM unnest(%(producers)s::uuid[], %(sequences)s::bigint[]) AS w (producer, sequence)
ORDER BY producer
ON CONFLICT (producer, lane) DO UPDATE SET applied_sequence = excluded.applied_sequence, updated_at = now()
WHERE l.applied_sequence < excluded.applied_sequence
