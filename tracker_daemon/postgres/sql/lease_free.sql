-- Partitions that nobody reads.
SELECT partition FROM {partitions}
WHERE stream = %(stream)s AND partition < %(partitions)s AND (owner IS NULL OR expires_at < clock_timestamp())
ORDER BY partition
