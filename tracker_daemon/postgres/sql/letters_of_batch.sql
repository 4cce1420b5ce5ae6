-- The dead letters that a batch left behind.
SELECT thread_id, sqlstate, error FROM {dead_letters}
WHERE producer = %(producer)s AND lane = %(lane)s AND sequence = %(sequence)s
