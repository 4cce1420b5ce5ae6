-- A consumer is there; by the database's clock, which is one for all. Those long gone are forgotten.
WITH gone AS (
    DELETE FROM {consumers} WHERE expires_at < clock_timestamp() - interval '1 hour'
)
INSERT INTO {consumers} (stream, consumer, expires_at)
VALUES (%(stream)s, %(consumer)s, clock_timestamp() + %(lease)s * interval '1 second')
ON CONFLICT (stream, consumer) DO UPDATE SET expires_at = excluded.expires_at
