-- The deltas as arrays, a column each.
SELECT * FROM unnest(
    %(thread_ids)s::text[], %(ensured)s::boolean[], %(first_us)s::bigint[], %(last_turn_us)s::bigint[],
    %(turns)s::bigint[], %(agents)s::integer[], %(tokens)s::bigint[], %(costs)s::numeric[],
    %(resolution)s::integer[], %(resolved_us)s::bigint[]
) AS a (thread_id, ensured, first_us, last_turn_us, turns, agents, tokens, cost, resolution, resolved_us)
