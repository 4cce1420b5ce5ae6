-- Register a life of (producer, lane). A new epoch fences off every older one.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence)
VALUES (%(producer)s, %(lane)s, 1, 0)
ON CONFLICT (producer, lane) DO UPDATE
SET epoch = l.epoch + 1, opened_at = now(), updated_at = now(), closed_at = NULL
RETURNING epoch, applied_sequence
