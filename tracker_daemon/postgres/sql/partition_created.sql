-- Of which creation of the stream each position is (NULL: it was never read), and whether a consumer reads it now.
SELECT partition, created, owner IS NOT NULL AND expires_at > clock_timestamp() FROM {partitions} WHERE stream = %(stream)s
