-- Let a partition's position begin where its log does, unless it is known, and fence off whoever reads it.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence, closed_at)
VALUES (%(producer)s, %(lane)s, 1, %(position)s, timestamptz '9999-01-01')
ON CONFLICT (producer, lane) DO UPDATE
SET epoch = l.epoch + 1, applied_sequence = greatest(l.applied_sequence, excluded.applied_sequence), updated_at = now()
