-- Delete dead letters of one thread or of all.
DELETE FROM {dead_letters} WHERE %(thread_id)s::text IS NULL OR thread_id = %(thread_id)s
