-- A consumer goes.
DELETE FROM {consumers} WHERE stream = %(stream)s AND consumer = %(consumer)s
