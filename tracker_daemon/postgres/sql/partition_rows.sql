-- A row for each partition of a stream.
INSERT INTO {partitions} (stream, partition, conversations)
SELECT %(stream)s, partition, %(conversations)s FROM generate_series(0, %(partitions)s - 1) AS g (partition)
ON CONFLICT (stream, partition) DO NOTHING
