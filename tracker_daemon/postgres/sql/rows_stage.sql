-- The deltas that COPY has staged. Costs are integers of 10**-12, as in `delta`.
SELECT
    thread_id, ensured, first_us, last_turn_us, turns, agents, tokens,
    cost_units * 0.000000000001 AS cost, resolution, resolved_us
FROM tracker_stage_v1
