-- Who is there, in one order for all.
SELECT consumer FROM {consumers} WHERE stream = %(stream)s AND expires_at > clock_timestamp() ORDER BY consumer
