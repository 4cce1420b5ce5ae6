-- Become the owner of a partition that nobody reads; return which creation of the stream its position is of.
UPDATE {partitions} SET owner = %(consumer)s, expires_at = clock_timestamp() + %(lease)s * interval '1 second'
WHERE stream = %(stream)s AND partition = %(partition)s
  AND (owner IS NULL OR owner = %(consumer)s OR expires_at < clock_timestamp())
RETURNING created
