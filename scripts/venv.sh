# Sourced by the other scripts: makes .venv when there is none, installs requirements.txt once, and activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -d .venv ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $("$python" --version 2>&1) found; needed: Python 3.10 or newer (set PYTHON=...)" >&2; exit 2; }
    "$python" -m venv .venv
fi
source .venv/bin/activate

installed=.venv/installed-requirements.txt
if ! cmp -s requirements.txt "$installed"; then
    echo "Installing requirements.txt into .venv (once) ..."
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$installed"
fi
