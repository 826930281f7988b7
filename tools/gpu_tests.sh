#!/bin/sh
# The GPU tests on a machine with nothing but an image's Python: installs the device kit, runs tests/gpu, keeps every log.
#   sh tools/gpu_tests.sh KIT [pytest arguments]      writes to $OUT (default build/gpu-tests)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
kit=$1
shift
out=${OUT:-$root/build/gpu-tests}
mkdir -p "$out"
PYTHON=${PYTHON:-python3} sh "$kit/install.sh" /tmp/stagemesh-site
export PYTHONPATH=/tmp/stagemesh-site PATH="/tmp/stagemesh-site/bin:$PATH" PYTHONUNBUFFERED=1
cd "$root"
code=0
"${PYTHON:-python3}" -m pytest -m gpu tests/gpu -q -s --tb=short -p no:cacheprovider --basetemp=/tmp/gpu-tests \
    -o asyncio_mode= -W ignore "$@" >"$out/gpu-tests.log" 2>&1 || code=$?
# Logs of stages and routers, without the step logs, whose logits are large.
(cd /tmp/gpu-tests 2>/dev/null && find . -name '*.log' -size -2000k | tar czf "$out/gpu-tests-logs.tar.gz" -T -) || true
grep -hE 'attention|steps so far|lane ready|link' /tmp/gpu-tests/*/*.log 2>/dev/null | sort | uniq -c | sort -rn | head -40 || true
grep -vE '^(Writing|Loading)' "$out/gpu-tests.log" | tail -c 9000
exit $code
