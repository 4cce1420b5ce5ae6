-- Take one dead letter; nothing if somebody else did.
DELETE FROM {dead_letters}
WHERE producer = %(producer)s AND lane = %(lane)s AND sequence = %(sequence)s AND thread_id = %(thread_id)s
RETURNING delta
