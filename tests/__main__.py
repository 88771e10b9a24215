"""pytest, with mysql-connector-python's C extension: `.venv-tests/bin/python tests [ARGUMENT...]`.

On Debian 12 the extension's own libssl does not load any more when the system's libcrypto has come
first, and pytest brings that (by hashlib). So the extension is imported before it.
"""

import contextlib

with contextlib.suppress(ImportError):
    import _mysql_connector  # noqa: F401

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main())
