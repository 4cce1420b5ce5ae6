-- Merge staged deltas into the table: one row a thread, of which none stands twice.
--
-- The sort is the lock order: nothing here joins the target, so every process locks rows in this order and no two
-- wait for each other in a ring. (A sorted source of UPDATE ... FROM does not give that: the planner's join decides.)
--
-- A row that a later call of the thread created bears that call's instant until an earlier one arrives: no turn yet
-- and last_activity = started_at. Only then may last_activity go back, so that the order of arrival does not matter.
--
-- Agents: `@>` and `= ANY` compare each name with each, which is quickest for a few; of many new ones a hash table of
-- the row's is made (IN over a subquery), and thousands into thousands take milliseconds. An array to which nothing is
-- added stays the same datum, so that one stored out of line is not written again.
WITH {moved}lists AS MATERIALIZED (
    SELECT i, agents::text[] AS agents
    FROM unnest(%(agent_lists)s::text[]) WITH ORDINALITY AS l (agents, i)
), names AS MATERIALIZED (
    SELECT i, name FROM unnest(%(resolutions)s::text[]) WITH ORDINALITY AS n (name, i)
), source AS MATERIALIZED (
    SELECT
        s.thread_id,
        timestamptz 'epoch' + s.first_us * interval '1 microsecond' AS first_at,
        timestamptz 'epoch' + s.last_turn_us * interval '1 microsecond' AS last_turn_at,
        s.turns,
        lists.agents,
        s.tokens,
        trim_scale(s.cost) AS cost,
        names.name AS resolution,
        timestamptz 'epoch' + s.resolved_us * interval '1 microsecond' AS resolved_at
    FROM ({rows}) AS s
    LEFT JOIN lists ON lists.i = s.agents
    LEFT JOIN names ON names.i = s.resolution
    {where}
), merged AS (
    INSERT INTO {table} AS c (
        thread_id, started_at, last_activity, turn_count, agents_used, total_tokens, total_cost_usd,
        resolution_type, ended_at
    )
    SELECT
        thread_id, first_at, coalesce(last_turn_at, first_at), turns, coalesce(agents, '{{}}'), tokens, cost,
        resolution, resolved_at
    FROM source
    ORDER BY thread_id COLLATE "C"
    ON CONFLICT (thread_id) DO UPDATE SET
        started_at = least(c.started_at, excluded.started_at),
        last_activity = CASE
            WHEN coalesce(c.turn_count, 0) = 0 AND c.last_activity = c.started_at AND excluded.started_at < c.started_at
                THEN excluded.last_activity
            WHEN excluded.turn_count > 0 THEN greatest(c.last_activity, excluded.last_activity)
            ELSE c.last_activity
        END,
        turn_count = coalesce(c.turn_count, 0) + excluded.turn_count,
        agents_used = CASE
            WHEN cardinality(excluded.agents_used) > 8 THEN (
                SELECT CASE
                    WHEN count(*) = 0 THEN c.agents_used
                    ELSE c.agents_used || array_agg(u.agent ORDER BY u.i)
                END
                FROM unnest(excluded.agents_used) WITH ORDINALITY AS u (agent, i)
                WHERE (u.agent IN (SELECT unnest(c.agents_used))) IS NOT TRUE
            )
            WHEN c.agents_used @> excluded.agents_used THEN c.agents_used
            ELSE coalesce(c.agents_used, '{{}}') || ARRAY(
                SELECT u.agent
                FROM unnest(excluded.agents_used) WITH ORDINALITY AS u (agent, i)
                WHERE (u.agent = ANY (c.agents_used)) IS NOT TRUE
                ORDER BY u.i
            )
        END,
        total_tokens = coalesce(c.total_tokens, 0) + excluded.total_tokens,
        total_cost_usd = coalesce(c.total_cost_usd, 0) + excluded.total_cost_usd,
        resolution_type = CASE
            WHEN excluded.ended_at >= coalesce(c.ended_at, '-infinity') THEN excluded.resolution_type
            ELSE c.resolution_type
        END,
        ended_at = greatest(c.ended_at, excluded.ended_at)
    RETURNING 1
)
SELECT
    {moved_count},
    (SELECT count(*) FROM source),
    -- A trigger or a rule that drops a row in silence would advance the ledger without the data. The cast fails, and
    -- with it the transaction, when fewer rows were written than sent.
    CASE
        WHEN (SELECT count(*) FROM merged) = (SELECT count(*) FROM source) THEN (SELECT count(*) FROM merged)
        ELSE format(
            'tracker_daemon: %%s of %%s rows were skipped in silence',
            (SELECT count(*) FROM source) - (SELECT count(*) FROM merged),
            (SELECT count(*) FROM source)
        )::bigint
    END
