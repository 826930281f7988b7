#!/usr/bin/env bash
# Two stages and a router as services of their own, started one by one as an operator would; then the
# client. One stage is stopped and started again, and the same question is asked before and after: the
# exit code says whether the tokens are the same. Everything that was started here is stopped again.
#
#     examples/two_stages.sh [MODEL]
#
# Ports are free ones unless ROUTER, ADMIN, STAGE0 and STAGE1 (HOST:PORT) say which.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || make --no-print-directory model
model=${1:-.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf}
stagemesh=.venv/bin/stagemesh
python=.venv/bin/python
question='What is the capital of France, and what is it known for?'
logs=$(mktemp -d "${TMPDIR:-/tmp}/stagemesh-two-stages.XXXXXX")
declare -A pids=()

stop() { # NAME: ask it to end, wait, and take it off the list
    kill -TERM "${pids[$1]}" 2>/dev/null || true
    wait "${pids[$1]}" 2>/dev/null || true
    unset "pids[$1]"
}

clean_up() {
    local code=$? name
    for name in "${!pids[@]}"; do stop "$name"; done
    if [ "$code" -eq 0 ]; then rm -rf "$logs"; else tail -n 5 "$logs"/*.log >&2 || true; echo "logs: $logs" >&2; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # NAME COMMAND...: in the background, its lines in a log of its own
    local name=$1
    shift
    echo "\$ stagemesh $*"
    "$stagemesh" "$@" >>"$logs/$name.log" 2>&1 &
    pids[$name]=$!
}

start_stage() { # INDEX ADDRESS
    start "stage$1" stage --model "$model" --stage "$1/2" --listen "$2" --shared-cores
}

wait_ready() { # until the router takes requests, while everything that was started lives
    local name
    for _ in $(seq 1 600); do
        for name in "${!pids[@]}"; do
            kill -0 "${pids[$name]}" 2>/dev/null || { echo "error: $name ended" >&2; exit 1; }
        done
        if "$python" -c "
import sys
from stagemesh.client import Client
with Client('$router') as client:
    sys.exit(not client.ready(timeout=2))"; then return; fi
        sleep 0.2
    done
    echo 'error: the mesh was not ready in time' >&2
    exit 1
}

ask() { # FILE: the same question, greedily; the text goes to the screen, the token ids to the file
    echo "> $question"
    "$python" - "$router" "$question" "$1" <<'PYTHON'
import sys
from pathlib import Path
from stagemesh.client import Client

address, question, file = sys.argv[1:]
ids = []
with Client(address) as client:
    for chunk in client.chat([{"role": "user", "content": question}], max_tokens=48, temperature=0):
        print(chunk.text, end="", flush=True)
        ids += chunk.token_ids
print()
Path(file).write_text(" ".join(map(str, ids)) + "\n")
PYTHON
}

free=$("$python" -c "
import socket
sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(4)]
print(*('127.0.0.1:%d' % s.getsockname()[1] for s in sockets))")
read -r free_router free_admin free_stage0 free_stage1 <<<"$free"
router=${ROUTER:-$free_router} admin=${ADMIN:-$free_admin}
stage0=${STAGE0:-$free_stage0} stage1=${STAGE1:-$free_stage1}

start_stage 0 "$stage0"
start_stage 1 "$stage1"
start router router --model "$model" --stages "$stage0,$stage1" --listen "$router" --admin "$admin"
wait_ready
"$stagemesh" status --admin "$admin"

ask "$logs/before.txt"

echo 'stopping stage 1; stage 0 and the router go on'
stop stage1
for _ in $(seq 1 100); do # until the router has seen it
    "$stagemesh" status --admin "$admin" >"$logs/lost.txt"
    grep -q 'lane lane-0: forming' "$logs/lost.txt" && break
    sleep 0.1
done
head -n 1 "$logs/lost.txt"
start_stage 1 "$stage1"
wait_ready
"$stagemesh" status --admin "$admin" | head -n 1

ask "$logs/after.txt"

count=$(wc -w <"$logs/before.txt")
if [ "$count" -eq 0 ]; then
    echo 'error: no token came' >&2
    exit 1
fi
if ! cmp -s "$logs/before.txt" "$logs/after.txt"; then
    echo 'error: the tokens before and after differ:' >&2
    cat "$logs/before.txt" "$logs/after.txt" >&2
    exit 1
fi
echo "the same $count tokens before and after stage 1 was restarted"
