-- Of which creation of the stream the positions are; not of partitions that were never read.
SELECT partition, created FROM {partitions} WHERE stream = %(stream)s AND created IS NOT NULL
