-- Let a partition's position begin where its log does, unless it is known, and fence off whoever reads it. `again`: what
-- is known is of another log.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence, closed_at)
VALUES (%(producer)s, %(lane)s, 1, %(position)s, timestamptz '9999-01-01')
ON CONFLICT (producer, lane) DO UPDATE
SET epoch = l.epoch + 1,
    applied_sequence = CASE
        WHEN %(again)s THEN excluded.applied_sequence ELSE greatest(l.applied_sequence, excluded.applied_sequence)
    END,
    applied_stamp = CASE
        WHEN %(again)s OR l.applied_sequence < excluded.applied_sequence THEN NULL ELSE l.applied_stamp
    END,
    updated_at = now()
