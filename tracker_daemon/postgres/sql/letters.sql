-- Dead letters, oldest first, of one thread or of all.
SELECT
    producer, lane, sequence, thread_id, delta, sqlstate, error,
    to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS at
FROM {dead_letters}
WHERE %(thread_id)s::text IS NULL OR thread_id = %(thread_id)s
ORDER BY at, producer, lane, sequence, thread_id
LIMIT %(limit)s
