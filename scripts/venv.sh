# Sourced by the other scripts: makes .venv when there is none, installs requirements.txt once, and activates it.
# CONSTRAINTS=constraints.txt installs the versions in that file.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -d .venv ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $("$python" --version 2>&1) found; needed: Python 3.10 or newer (set PYTHON=...)" >&2; exit 2; }
    "$python" -m venv .venv
fi
source .venv/bin/activate

wanted=$(cat requirements.txt ${CONSTRAINTS:+"$CONSTRAINTS"})
if [ "$wanted" != "$(cat .venv/installed-requirements.txt 2> /dev/null)" ]; then
    echo "Installing requirements.txt into .venv (once) ..."
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt ${CONSTRAINTS:+-c "$CONSTRAINTS"}
    echo "$wanted" > .venv/installed-requirements.txt
fi
