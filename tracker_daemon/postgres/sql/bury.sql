-- Keep a delta that the database will never take.
INSERT INTO {dead_letters} (producer, lane, sequence, thread_id, delta, sqlstate, error)
VALUES (%(producer)s, %(lane)s, %(sequence)s, %(thread_id)s, %(delta)s, %(sqlstate)s, %(error)s)
