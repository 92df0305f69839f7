#!/usr/bin/env bash
# Your own images, from a folder to verified samples on your disk:  examples/own_images.sh FOLDER [key=value…]
# FOLDER holds images, one subfolder per class or none; key=value are settings of the training, such as steps=500.
# Interrupt it anywhere and run it again: every step resumes, or finds that it is done.
set -euo pipefail
images=$1
settings=$(dirname "$0")/photos.yaml
shift

ddpm up
ddpm pack source="$images" dest='{root}/data/photos' image_size=32
ddpm train --config "$settings" "$@"
ddpm generate --config "$settings"
ddpm verify s3://ddpm/samples/photos --regenerate 16
ddpm download s3://ddpm/samples/photos ./photos-samples --unpack
