#!/bin/sh
# ./start.sh opens the notebooks; ./start.sh demo trains a LoRA and draws demo.png.
cd "$(dirname "$0")" || exit 1
for python in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$python" start.py --fits > /dev/null 2>&1; then
        exec "$python" start.py "$@"
    fi
done
echo "error: no Python was found that this folder has wheels for; install one of these (system, Python): $(paste -sd , platforms.txt)" >&2
exit 1
