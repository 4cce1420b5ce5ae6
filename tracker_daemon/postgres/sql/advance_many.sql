-- The compare-and-set of several batches at once, one of each (producer, lane): those that moved.
--
-- The sort is the lock order: two daemons that bring batches of the same clients at once wait for each other in line.
-- UPDATE ... FROM alone gives none, the planner's join decides; here no row is updated before `locked` has yielded it.
WITH locked AS MATERIALIZED (
    SELECT l.producer, l.lane
    FROM {ledger} AS l
    WHERE (l.producer, l.lane) IN (SELECT * FROM unnest(%(producers)s::uuid[], %(lanes)s::smallint[]))
    ORDER BY l.producer, l.lane
    FOR NO KEY UPDATE
)
UPDATE {ledger} AS l SET applied_sequence = w.sequence, updated_at = now()
FROM unnest(
    %(producers)s::uuid[], %(lanes)s::smallint[], %(epochs)s::integer[], %(sequences)s::bigint[]
) AS w (producer, lane, epoch, sequence)
JOIN locked ON locked.producer = w.producer AND locked.lane = w.lane
WHERE l.producer = w.producer AND l.lane = w.lane AND l.epoch = w.epoch
  AND CASE WHEN l.epoch = 0 THEN l.applied_sequence < w.sequence ELSE l.applied_sequence = w.sequence - 1 END
RETURNING l.producer, l.lane
