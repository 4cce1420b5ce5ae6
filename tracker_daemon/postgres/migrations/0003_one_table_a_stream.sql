-- conversations: into which table the stream is read. It is one: all of a schema share the positions.
ALTER TABLE {partitions} ADD COLUMN IF NOT EXISTS conversations text;
