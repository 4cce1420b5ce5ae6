-- Merge deltas one by one in the server, each under a savepoint of its own: a refused one costs no round trip and leaves
-- no line in the server's log. A DO has no parameters: the deltas come in settings of the transaction, and what became
-- of them goes out in another. Caught is what is about a row for certain (`faults`); anything else fails the whole.
#variable_conflict use_column
DECLARE
    tracker_thread_ids text[] := current_setting('tracker_daemon.thread_ids');
    tracker_ensured boolean[] := current_setting('tracker_daemon.ensured');
    tracker_first_us bigint[] := current_setting('tracker_daemon.first_us');
    tracker_last_turn_us bigint[] := current_setting('tracker_daemon.last_turn_us');
    tracker_turns bigint[] := current_setting('tracker_daemon.turns');
    tracker_agents integer[] := current_setting('tracker_daemon.agents');
    tracker_tokens bigint[] := current_setting('tracker_daemon.tokens');
    tracker_costs numeric[] := current_setting('tracker_daemon.costs');
    tracker_resolution integer[] := current_setting('tracker_daemon.resolution');
    tracker_resolved_us bigint[] := current_setting('tracker_daemon.resolved_us');
    tracker_agent_lists text[] := current_setting('tracker_daemon.agent_lists');
    tracker_resolutions text[] := current_setting('tracker_daemon.resolutions');
    tracker_moved integer;
    tracker_sent bigint;
    tracker_merged bigint;
    tracker_all_sent bigint := 0;
    tracker_all_merged bigint := 0;
    tracker_state text;
    tracker_message text;
    tracker_detail text;
    tracker_refused jsonb[] := '{{}}';
BEGIN
    FOR tracker_row IN 1 .. cardinality(tracker_thread_ids) LOOP
        BEGIN
            {merge}
            INTO tracker_moved, tracker_sent, tracker_merged;
            tracker_all_sent := tracker_all_sent + tracker_sent;
            tracker_all_merged := tracker_all_merged + tracker_merged;
        EXCEPTION
            WHEN cardinality_violation OR data_exception OR integrity_constraint_violation
                OR with_check_option_violation OR plpgsql_error OR program_limit_exceeded THEN
            GET STACKED DIAGNOSTICS tracker_state = RETURNED_SQLSTATE, tracker_message = MESSAGE_TEXT,
                tracker_detail = PG_EXCEPTION_DETAIL;
            tracker_refused := tracker_refused || jsonb_build_array(
                tracker_row - 1, tracker_state, concat_ws(' DETAIL: ', tracker_message, nullif(tracker_detail, ''))
            );
        END;
    END LOOP;
    PERFORM set_config(
        'tracker_daemon.outcome',
        jsonb_build_array(tracker_all_sent, tracker_all_merged, to_jsonb(tracker_refused))::text,
        true
    );
END
