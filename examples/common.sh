# Shared by the examples; sourced, not run. MODEL and DATASET default to the demo, which is made when missing.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
OUTPUT=${OUTPUT:-quickstart_output}
DEMO=$OUTPUT/demo

if [ -z "${MODEL:-}" ] || [ -z "${DATASET:-}" ]; then
    if [ ! -f "$DEMO/val.jsonl" ]; then
        "$PYTHON" "$EXAMPLES/arithmetic_demo.py" "$DEMO"
    fi
fi
MODEL=${MODEL:-$DEMO/model}
DATASET=${DATASET:-$DEMO/train.jsonl}

# the installed commands, or the module when run from a checkout that is not installed
if ! command -v megatron >/dev/null; then
    export PYTHONPATH="$EXAMPLES/..${PYTHONPATH:+:$PYTHONPATH}"
    megatron() { "$PYTHON" -m mcore_swift.cli.main megatron "$@"; }
    swift() { "$PYTHON" -m mcore_swift.cli.main swift "$@"; }
fi
