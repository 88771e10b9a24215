"""pytest, with mysql-connector-python's C extension: `.venv-tests/bin/python tests [ARGUMENT...]`.

On Debian 12 the extension's own libssl does not load any more when the system's libcrypto has come
first, and pytest brings that (by hashlib). So the extension is imported before it. pytest-xdist's
workers begin here, too: with `-u -c CODE`, as it would start Python.
"""

import contextlib
import os
import sys

with contextlib.suppress(ImportError):
    import _mysql_connector  # noqa: F401

# Most of what the tests start is Python that would be compiled anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if __name__ == "__main__":
    if sys.argv[1:3] == ["-u", "-c"]:
        exec(sys.argv[3])
    else:
        import pytest

        raise SystemExit(pytest.main())
