-- Room for a large batch, for one transaction. Widths below the TOAST limit: with `text` a commit costs five times more.
CREATE TEMP TABLE IF NOT EXISTS tracker_stage_v1 (
    thread_id     varchar(120) COLLATE "C",
    ensured       boolean,
    first_us      bigint,
    last_turn_us  bigint,
    turns         bigint,
    agents        integer,
    tokens        bigint,
    cost_units    bigint,
    resolution    integer,
    resolved_us   bigint
) ON COMMIT DELETE ROWS
