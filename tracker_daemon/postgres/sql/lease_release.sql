-- Give a partition up: whoever looks next may have it.
UPDATE {partitions} SET owner = NULL, expires_at = 'epoch'
WHERE stream = %(stream)s AND partition = %(partition)s AND owner = %(consumer)s
