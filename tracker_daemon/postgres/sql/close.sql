-- Mark a life as ended cleanly: nothing of it is pending anywhere.
UPDATE {ledger} SET closed_at = now(), updated_at = now()
WHERE producer = %(producer)s AND lane = %(lane)s AND epoch = %(epoch)s
