-- The deltas for one_by_one.sql, in settings of the transaction.
SELECT
    set_config('tracker_daemon.thread_ids', %(thread_ids)s, true),
    set_config('tracker_daemon.ensured', %(ensured)s, true),
    set_config('tracker_daemon.first_us', %(first_us)s, true),
    set_config('tracker_daemon.last_turn_us', %(last_turn_us)s, true),
    set_config('tracker_daemon.turns', %(turns)s, true),
    set_config('tracker_daemon.agents', %(agents)s, true),
    set_config('tracker_daemon.tokens', %(tokens)s, true),
    set_config('tracker_daemon.costs', %(costs)s, true),
    set_config('tracker_daemon.resolution', %(resolution)s, true),
    set_config('tracker_daemon.resolved_us', %(resolved_us)s, true),
    set_config('tracker_daemon.agent_lists', %(agent_lists)s, true),
    set_config('tracker_daemon.resolutions', %(resolutions)s, true)
