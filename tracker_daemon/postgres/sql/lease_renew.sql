-- Renew a consumer's leases; of those that are not returned it is the owner no more.
UPDATE {partitions} SET expires_at = clock_timestamp() + %(lease)s * interval '1 second'
WHERE stream = %(stream)s AND owner = %(consumer)s
RETURNING partition
