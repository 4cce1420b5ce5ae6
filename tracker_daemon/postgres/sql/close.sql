-- Mark a life as ended cleanly: nothing of it is pending anywhere, and the ledger stands where its last batch left it.
UPDATE {ledger} SET closed_at = now(), updated_at = now()
WHERE producer = %(producer)s AND lane = %(lane)s AND epoch = %(epoch)s AND applied_sequence = %(sequence)s
RETURNING 1
