#!/usr/bin/env bash
# Emoji in color, from a font to a gallery:  examples/emoji/run.sh [key=value…]
# key=value are settings of the training, such as steps=500. LIMIT=4 COUNT=18 make it a trial of minutes: so many
# pictures of each group, and so many samples. Interrupt it anywhere and run it again: every step resumes, or finds that
# it is done.
set -euo pipefail
render=$(dirname "$0")/render.py

python "$render" emoji ${LIMIT:+--limit "$LIMIT"}
ddpm up
ddpm pack emoji-32 source=emoji
ddpm train emoji-32 "$@"
ddpm generate emoji-32 ${COUNT:+count="$COUNT"}
ddpm verify s3://ddpm/samples/emoji-32 --regenerate 4
ddpm gallery s3://ddpm/samples/emoji-32 --out emoji-gallery
