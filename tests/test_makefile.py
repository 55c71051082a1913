"""`make` says what to install on a machine with no Python, or with one that is too old."""

import os
import subprocess

import harness


def old_python(folder) -> str:
    """Write a program that answers like an old Python, and return its path."""
    path = folder / "python3"
    path.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_make_with_a_python_that_is_too_old(tmp_path):
    command = ["make", "test", f"VENV={tmp_path / 'venv'}", f"PYTHON={old_python(tmp_path)}"]
    done = subprocess.run(command, cwd=harness.ROOT, text=True, capture_output=True)
    assert done.returncode != 0
    assert "is not a Python >= 3.12" in done.stderr and "Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all_says_what_to_install(tmp_path):
    old_python(tmp_path)
    script = str(harness.ROOT / "scripts" / "find_python.sh")
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(["/bin/sh", script], env=env, text=True, capture_output=True)
    assert done.returncode != 0 and "python3.12" in done.stderr and "make PYTHON=" in done.stderr


def test_the_python_of_these_tests_is_found(tmp_path):
    script = str(harness.ROOT / "scripts" / "find_python.sh")
    done = subprocess.run(["/bin/sh", script], env=dict(os.environ), text=True, capture_output=True)
    assert done.returncode == 0 and "python" in done.stdout
