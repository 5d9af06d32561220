"""Prints a requirements file with the version and the hash of all that the tests install, for this machine's wheels.

make lock        (writes tests/requirements.lock)
"""

import json
import platform
import subprocess
import sys


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, ".[test,mooncake]"], stdout=subprocess.PIPE, check=True, text=True)
    python = ".".join(platform.python_version_tuple()[:2])
    print(f"# {platform.system()} {platform.machine()}, Python {python}. Written by make lock, installed by LOCKED=1.")
    for package in sorted(json.loads(done.stdout)["install"], key=lambda each: each["metadata"]["name"].lower()):
        hashes = package["download_info"].get("archive_info", {}).get("hashes")
        if hashes:  # all but the project itself
            name, version = package["metadata"]["name"], package["metadata"]["version"]
            print(f"{name}=={version} --hash=sha256:{hashes['sha256']}")


if __name__ == "__main__":
    main()
