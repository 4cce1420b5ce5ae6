-- Note why a letter was refused again.
UPDATE {dead_letters} SET sqlstate = %(sqlstate)s, error = %(error)s
WHERE producer = %(producer)s AND lane = %(lane)s AND sequence = %(sequence)s AND thread_id = %(thread_id)s
