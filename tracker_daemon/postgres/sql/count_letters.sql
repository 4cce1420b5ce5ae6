-- How many dead letters there are, of one thread or of all.
SELECT count(*) FROM {dead_letters} WHERE %(thread_id)s::text IS NULL OR thread_id = %(thread_id)s
