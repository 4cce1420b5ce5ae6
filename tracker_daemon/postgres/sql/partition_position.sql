-- Where a partition stands, and which message is there.
SELECT epoch, applied_sequence, applied_stamp FROM {ledger} WHERE producer = %(producer)s AND lane = %(lane)s
