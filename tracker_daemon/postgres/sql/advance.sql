-- The compare-and-set. It waits for a cut connection whose commit is still running, and then sees the truth.
UPDATE {ledger} SET applied_sequence = %(sequence)s, updated_at = now()
WHERE producer = %(producer)s AND lane = %(lane)s AND epoch = %(epoch)s AND applied_sequence = %(sequence)s - 1
RETURNING 1
