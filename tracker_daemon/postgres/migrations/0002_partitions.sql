-- Who reads which partition of a stream, and who is there to do it. Where a partition stands is not here but in
-- {ledger}, whose row moves with the data.
-- {ledger}, {partitions}, {consumers}: qualified names in the schema of the table.

-- Of a partition's row: when its log took the message at `applied_sequence`, in the log's own words. A log that went back
-- and grew again has another message there.
ALTER TABLE {ledger} ADD COLUMN IF NOT EXISTS applied_stamp text;

CREATE TABLE IF NOT EXISTS {partitions} (
    stream     text NOT NULL,
    partition  smallint NOT NULL,
    created    text,
    owner      uuid,
    expires_at timestamptz NOT NULL DEFAULT 'epoch',
    PRIMARY KEY (stream, partition)
) WITH (fillfactor = 50);

CREATE TABLE IF NOT EXISTS {consumers} (
    stream     text NOT NULL,
    consumer   uuid NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (stream, consumer)
) WITH (fillfactor = 50);
