-- The epoch of a partition's new owner: from here on no earlier one moves the position. `known`: the row must be there.
INSERT INTO {ledger} AS l (producer, lane, epoch, applied_sequence, closed_at)
SELECT %(producer)s, %(lane)s, 1, 0, timestamptz '9999-01-01'
WHERE NOT %(known)s OR EXISTS (SELECT FROM {ledger} WHERE producer = %(producer)s AND lane = %(lane)s)
ON CONFLICT (producer, lane) DO UPDATE
SET epoch = l.epoch + 1, opened_at = now(), updated_at = now(), closed_at = timestamptz '9999-01-01'
RETURNING epoch, applied_sequence, applied_stamp
