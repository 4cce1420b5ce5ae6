-- create_missing=False: deltas without an `ensure` find their row or change nothing. The key-share lock keeps a row
-- that was found from being deleted before it is updated; flushes do not wait for each other on it.
(s.ensured OR EXISTS (SELECT FROM {table} AS c WHERE c.thread_id = s.thread_id FOR KEY SHARE))
