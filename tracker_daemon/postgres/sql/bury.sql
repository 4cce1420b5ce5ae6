-- Keep a delta that the database will never take; once, however often it comes: a ledger that was truncated has it
-- applied again.
INSERT INTO {dead_letters} (producer, lane, sequence, thread_id, delta, sqlstate, error)
VALUES (%(producer)s, %(lane)s, %(sequence)s, %(thread_id)s, %(delta)s, %(sqlstate)s, %(error)s)
ON CONFLICT (producer, lane, sequence, thread_id) DO NOTHING
