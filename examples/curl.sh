#!/bin/sh
# Calls to the daemon with curl.
#
#     tracker-daemon serve --database postgresql:///chat --listen unix:tracker.sock --listen 127.0.0.1:8080 \
#         --token-file token
#     SOCKET=tracker.sock URL=http://127.0.0.1:8080 TOKEN_FILE=token ./curl.sh
set -eu

# The token reaches curl by a pipe: on the command line every user of the machine could read it.
ask() {
    printf 'header = "Authorization: Bearer %s"\n' "$(head -n 1 "$TOKEN_FILE")" |
        curl --config - --silent --show-error --fail-with-body --max-time 60 "$@"
}

echo "== is it ready?"
curl --silent --show-error --unix-socket "$SOCKET" http://localhost/readyz
echo

echo "== over the Unix socket; answered when it is in the database"
# --data-binary: --data would drop the line ends. The host in the URL is only a name here.
ask --unix-socket "$SOCKET" 'http://localhost/v1/calls?wait=committed' --data-binary '
{"call": "ensure_conversation", "thread_id": "t-1"}
{"call": "record_turn", "thread_id": "t-1", "agent_name": "billing", "tokens": 812, "cost": "0.0041"}'
echo

echo "== over TCP; answered when it is taken"
ask "$URL/v1/calls" --data-binary '{"call": "record_turn", "thread_id": "t-1", "agent_name": "refunds", "tokens": 30}'
echo

echo "== tried again until it is answered, and counted once"
# A producer that no other program uses, and a sequence that grows: --retry repeats the request as it is.
PRODUCER=$(cat /proc/sys/kernel/random/uuid)
for sequence in 1 2; do
    ask --retry 20 --retry-all-errors --retry-connrefused --retry-max-time 60 \
        --header "Tracker-Producer: $PRODUCER" --header "Tracker-Sequence: $sequence" \
        "$URL/v1/calls" --data-binary '{"call": "record_turn", "thread_id": "t-1", "tokens": 5, "cost": "0.000025"}'
    echo
done
# The last one once more, as after an answer that was lost.
ask --header "Tracker-Producer: $PRODUCER" --header "Tracker-Sequence: 2" \
    "$URL/v1/calls" --data-binary '{"call": "record_turn", "thread_id": "t-1", "tokens": 5, "cost": "0.000025"}'
echo

echo "== the end of the conversation"
ask --unix-socket "$SOCKET" 'http://localhost/v1/calls?wait=committed' --data-binary \
    '{"call": "resolve", "thread_id": "t-1", "resolution_type": "resolved_by_agent"}'
echo
