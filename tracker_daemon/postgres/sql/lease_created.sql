-- Which creation of the stream the position is of; NULL: whichever comes first. And into which table it is read.
UPDATE {partitions} SET created = %(created)s, conversations = %(conversations)s
WHERE stream = %(stream)s AND partition = %(partition)s
