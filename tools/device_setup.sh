#!/usr/bin/env bash
# Prepare a lent machine without network: what the tests and tools/bench.py need beside the packages already there.
#
#     setup=$(bash tools/device_setup.sh) && eval "$setup" || exit
#     python3 tools/bench.py --preset llama8b --profile --out "$OUT/llama8b.json"
#
# Run from the repository's root; `.whl/` (name it in the call's `carry`) holds wheels, `.whl/unsloth/` Unsloth's set.
#   .whl/*.whl          -> $SITE     (/tmp/site), on everyone's PYTHONPATH
#   fastft, as it is    -> $SITE     built from a copy of this checkout, so nothing stale is left behind here
#   .whl/unsloth/*.whl  -> $UNSLOTH  (/tmp/unsloth), on the PYTHONPATH of Unsloth's own process only (bench.py sees to it);
#                                        --op linear_cross_entropy puts it last on its path, for unsloth_zoo and cut_cross_entropy
# Standard output holds only the exports; everything else goes to standard error. Run again after a change: it replaces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}
UNSLOTH=${UNSLOTH:-/tmp/unsloth}
shopt -s nullglob

install() { # folder, wheels or a source tree...
    local target=$1
    shift
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --no-build-isolation --disable-pip-version-check \
        --root-user-action ignore --upgrade --target "$target" "$@" >&2
}

wheels=(.whl/*.whl)
[ ${#wheels[@]} -eq 0 ] || install "$SITE" "${wheels[@]}"

source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -r pyproject.toml README.md LICENSE fastft passes kernels "$source" || true
if ! install "$SITE" "$source"; then
    # An old setuptools, say: the same layout by hand, with the entry point that torch.compile looks for.
    echo "device_setup: fastft did not build; copying it" >&2
    rm -rf "$SITE/fastft" "$SITE"/fastft-*.dist-info
    mkdir -p "$SITE/fastft" "$SITE/fastft-0+copied.dist-info"
    cp -r fastft/. "$SITE/fastft"
    cp -r passes kernels "$SITE/fastft"
    printf 'Metadata-Version: 2.1\nName: fastft\nVersion: 0+copied\n' >"$SITE/fastft-0+copied.dist-info/METADATA"
    printf '[torch_dynamo_backends]\nfastft = fastft.backend:fastft\n' >"$SITE/fastft-0+copied.dist-info/entry_points.txt"
fi

wheels=(.whl/unsloth/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    if install "$UNSLOTH" "${wheels[@]}"; then
        echo "export FASTFT_UNSLOTH_PATH=$UNSLOTH"
    else
        echo "device_setup: Unsloth could not be installed; the benchmark goes on without it" >&2
    fi
fi
echo "export PYTHONPATH=$SITE\${PYTHONPATH:+:\$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1"
