-- Into which other table than this one a stream is read.
SELECT conversations FROM {partitions} WHERE stream = %(stream)s AND conversations <> %(conversations)s LIMIT 1
