"""Runs scripts in forks of itself: most of a short script's time is the import of torch, which a fork has behind it.

A line of standard input is JSON: a script's path, its arguments, a folder to be in and the files that are its standard
input, output and errors. The answer is its exit status, negative if a signal ended it.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401  the optimizers import it

import ablate  # noqa: F401  it imports train, which imports the model, the layers and torch; a script is run anew
import plot  # noqa: F401
import sample  # noqa: F401

while request := sys.stdin.readline():
    if (child := os.fork()) == 0:
        break  # and become that script
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(300)
path, arguments, folder, *files = json.loads(request)
for descriptor, file in enumerate(files):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
os.chdir(folder)
sys.argv, sys.path[0] = [path, *arguments], os.path.dirname(path)
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    if not isinstance(end.code, int | None):
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code or 0)  # to take torch apart would be most of the time
