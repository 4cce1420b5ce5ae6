-- Register a life of (producer, lane), by compare-and-set like every move of the ledger: a try of ours that arrives late
-- carries an epoch that has passed, and changes nothing. A new epoch fences off every older one. What the ledger lacks up
-- to `after` is given up.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence)
VALUES (%(producer)s, %(lane)s, 1, %(after)s)
ON CONFLICT (producer, lane) DO UPDATE
SET epoch = greatest(l.epoch, %(known)s) + 1, applied_sequence = greatest(l.applied_sequence, %(after)s), opened_at = now(), updated_at = now(), closed_at = NULL
WHERE l.epoch = %(seen)s
RETURNING epoch, applied_sequence
