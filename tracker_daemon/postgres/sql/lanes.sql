-- The rows of a tracker's lanes: 0, -1, -2, ... (Those above 0 are a stream's partitions.)
SELECT lane, epoch, applied_sequence FROM {ledger} WHERE producer = %(producer)s AND lane <= 0 ORDER BY lane DESC
