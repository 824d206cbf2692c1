#!/usr/bin/env bash
# From a fresh checkout to a quantized model: install, build, fetch a small BERT and a task, train, report.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/quickstart.sh [--help]

1. installs missing Debian packages, creates .venv and builds bitfall into it
2. fetches MiniLM-L6 (a 6-layer BERT) and 10,604 rated movie-review snippets into .cache/
3. fine-tunes on "positive or negative?" once without quantization and once with MoQ (12 to 8 bits)
4. prints accuracy, bits per layer, size on disk, and where the HTML report lies

Takes under 10 minutes on two cores; a second run reuses the build, the downloads and the
unquantized run. Results are in output/quickstart/.
TEXT
}

case ${1-} in
  '') ;;
  --help | -h)
    usage
    exit 0
    ;;
  *)
    echo "quickstart.sh: unknown option '$1' (see --help)" >&2
    exit 2
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/install.sh
exec .venv/bin/python -m bitfall.quickstart
