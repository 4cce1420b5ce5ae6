-- The compare-and-set. It waits for a cut connection whose commit is still running, and then sees the truth.
-- Epoch 0 is a client without lives, whose sequences only grow.
UPDATE {ledger} SET applied_sequence = %(sequence)s, updated_at = now()
WHERE producer = %(producer)s AND lane = %(lane)s AND epoch = %(epoch)s
  AND CASE WHEN epoch = 0 THEN applied_sequence < %(sequence)s ELSE applied_sequence = %(sequence)s - 1 END
RETURNING 1
