-- The compare-and-set of several batches at once, one of each (producer, lane): those that moved.
UPDATE {ledger} AS l SET applied_sequence = w.sequence, updated_at = now()
FROM unnest(
    %(producers)s::uuid[], %(lanes)s::smallint[], %(epochs)s::integer[], %(sequences)s::bigint[]
) AS w (producer, lane, epoch, sequence)
WHERE l.producer = w.producer AND l.lane = w.lane AND l.epoch = w.epoch
  AND CASE WHEN l.epoch = 0 THEN l.applied_sequence < w.sequence ELSE l.applied_sequence = w.sequence - 1 END
RETURNING l.producer, l.lane
