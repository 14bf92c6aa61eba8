#!/usr/bin/env bash
# Two SGLang servers, and a training run between them; the servers stop with it.
# usage: examples/quickstart/serve.sh [CONFIG.yaml] [key=value ...]     (BPDG_SGLANG_PYTHON: the servers' interpreter)
set -euo pipefail
cd "$(dirname "$0")/../.."
quickstart=runs/quickstart
config=${1:-examples/quickstart/opd_sglang.yaml}

bpdg serve student $quickstart/student/checkpoints --dtype float32 --port 30010 --log $quickstart/student-server.log &
bpdg serve teacher $quickstart/teacher/checkpoints --dtype float32 --port 30011 --log $quickstart/teacher-server.log &
# The run waits for the servers to come up.
bpdg train "$config" "${@:2}" &
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
# Whichever ends first ends all: the run when it is done, or a server that could not start.
wait -n
