-- Which creation of the stream the position is of; NULL: whichever comes first.
UPDATE {partitions} SET created = %(created)s WHERE stream = %(stream)s AND partition = %(partition)s
