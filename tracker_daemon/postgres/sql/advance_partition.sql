-- The compare-and-set of a partition's position: fence, lease and cursor in one. It waits for a cut connection whose
-- commit is still running, and then sees the truth. Who moves it holds its row until the end of the transaction, and
-- the producers' rows of this lane are written by nobody else: what is returned of them holds until then.
WITH moved AS (
    UPDATE {ledger} SET applied_sequence = %(position)s, applied_stamp = %(stamp)s, updated_at = now()
    WHERE producer = %(producer)s AND lane = %(lane)s AND epoch = %(epoch)s AND applied_sequence = %(previous)s
    RETURNING 1
)
SELECT
    (SELECT count(*) FROM moved),
    coalesce(array_agg(l.producer), '{{}}'),
    coalesce(array_agg(l.applied_sequence), '{{}}')
FROM {ledger} AS l
WHERE l.lane = %(lane)s AND l.producer = ANY (%(producers)s::uuid[])
