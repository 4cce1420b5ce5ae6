-- The conversations, the ledger and the dead letters.
-- {table}, {ledger}, {dead_letters}: qualified names in the schema of the table.

-- C: comparing thread ids costs a third less than under ICU, and their order never changes with a library.
-- fillfactor: room in the page for the next version of a row, which keeps updates HOT.
CREATE TABLE IF NOT EXISTS {table} (
    thread_id       text COLLATE "C" PRIMARY KEY,
    started_at      timestamptz NOT NULL DEFAULT now(),
    last_activity   timestamptz NOT NULL DEFAULT now(),
    turn_count      integer NOT NULL DEFAULT 0,
    agents_used     text[] NOT NULL DEFAULT '{{}}',
    total_tokens    bigint NOT NULL DEFAULT 0,
    total_cost_usd  numeric NOT NULL DEFAULT 0,
    resolution_type text,
    ended_at        timestamptz
) WITH (fillfactor = 80);

-- What each producer has applied. A row is updated with every flush: half-empty pages keep that HOT.
-- applied_stamp: see 0002, which adds it to ledgers made without it.
CREATE TABLE IF NOT EXISTS {ledger} (
    producer         uuid NOT NULL,
    lane             smallint NOT NULL,
    epoch            integer NOT NULL,
    applied_sequence bigint NOT NULL,
    opened_at        timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    closed_at        timestamptz,
    applied_stamp    text,
    PRIMARY KEY (producer, lane)
) WITH (fillfactor = 50);

CREATE TABLE IF NOT EXISTS {dead_letters} (
    producer  uuid NOT NULL,
    lane      smallint NOT NULL,
    sequence  bigint NOT NULL,
    thread_id text NOT NULL,
    delta     jsonb NOT NULL,
    sqlstate  text NOT NULL,
    error     text NOT NULL,
    at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (producer, lane, sequence, thread_id)
);
