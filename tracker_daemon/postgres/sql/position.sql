-- Where the ledger stands, when an advance moved nothing.
SELECT epoch, applied_sequence FROM {ledger} WHERE producer = %(producer)s AND lane = %(lane)s
