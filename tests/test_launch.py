"""What a fork of launch.py does is what a new interpreter does."""

import os

import pytest
from launch import run

TEXT = """
import os, signal, sys
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ["WORD"], flush=True)
print("told", file=sys.stderr, flush=True)
"""
ENDINGS = {
    "end": "",
    "exit": "sys.exit(7)",
    "text": "sys.exit('a text')",
    "error": "1 / 0",
    "hook": "sys.excepthook = lambda *error: print(error[1], 'was met')\n1 / 0",
    "signal": "os.kill(os.getpid(), signal.SIGTERM)",
}


@pytest.mark.parametrize("name", ["script.py", "package.script"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fork_is_as_a_new_interpreter(tmp_path, ending, name):
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "script.py", tmp_path / "package/script.py"):
        path.write_text(TEXT + ENDINGS[ending])
    how = dict(cwd=tmp_path, env=os.environ | {"WORD": "kiwi"})
    script = name if name.startswith("package") else tmp_path / name
    new, fork = (run(script, {"a": 1, "b": ["c", "d"]}, new=new, **how) for new in (True, False))
    assert (fork.returncode, fork.stdout) == (new.returncode, new.stdout)
    assert "kiwi" in fork.stdout and fork.stderr.startswith("told\n")
    assert fork.stderr.splitlines()[-1] == new.stderr.splitlines()[-1]  # a traceback has our frames
