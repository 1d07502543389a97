#!/usr/bin/env python3
"""Set-up: a virtual environment with pinned packages, then the embedded teacher and corpus.

    python3 scripts/setup.py [--device cpu|cuda] [--quiet]

Standard library only, and in the syntax of Python 3.8, so that an old interpreter can say what is wrong with it. Done
once; afterwards a stamp (lock files, Python version, device) ends it in a fraction of a second. A set-up that was
interrupted while installing is begun anew: pip's cache keeps what was downloaded.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 12), (3, 13))
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISK_GB = {"cpu": 6, "cuda": 20}
CUDA_DRIVER = 580
LOCKS = {"cpu": ("cpu.txt",), "cuda": ("cuda.txt", "cuda-constraints.txt")}


class SetupError(Exception):
    """One sentence for the person at the terminal."""


class Paths:
    """Where a set-up writes; `root` is the repository."""

    def __init__(self, root):
        self.root = Path(root)
        self.venv = self.root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.stamp = self.venv / "setup.json"
        self.unfinished = self.venv / "unfinished"
        self.log = self.venv / "setup.log"
        self.data = self.root / "data"

    def lock_files(self, device):
        return [self.root / "requirements" / name for name in LOCKS[device]]


def check_machine(system, machine):
    """Refuse machines that the pinned packages have no wheels for."""
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise SetupError(
            "this machine is %s on %s, but the pinned packages exist for Linux on x86_64 or aarch64 only: use such a "
            "machine, a container or WSL 2" % (system, machine)
        )


def interpreter_version(command):
    """(major, minor, full text) of an interpreter, None if it does not run."""
    code = "import sys, platform; print(sys.version_info[0], sys.version_info[1], platform.python_version())"
    try:
        done = subprocess.run(
            [command, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            timeout=30,
        )
        major, minor, text = done.stdout.split()
        return int(major), int(minor), text
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def pick_python(own=None):
    """(path, version text) of the interpreter for the venv: the running one if supported, else the newest on PATH."""
    own_path, own_version = own or (
        sys.executable,
        (sys.version_info[0], sys.version_info[1], platform.python_version()),
    )
    if own_path and own_version[:2] in SUPPORTED:
        return own_path, own_version[2]
    for major, minor in reversed(SUPPORTED):
        path = shutil.which("python%d.%d" % (major, minor))
        version = interpreter_version(path) if path else None
        if version and version[:2] == (major, minor):
            return path, version[2]
    raise SetupError(
        "Python %s is not supported and no python3.11, python3.12 or python3.13 was found on PATH: install one "
        "of them, for "
        "example with apt install python3 python3-venv on Debian 12 or later" % own_version[2]
    )


def check_venv_modules(python):
    """Debian ships Python without venv and ensurepip unless asked for."""
    done = subprocess.run(
        [python, "-c", "import venv, ensurepip"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if done.returncode != 0:
        version = interpreter_version(python)
        package = "python%d.%d-venv" % version[:2] if version else "python3-venv"
        raise SetupError(
            "%s lacks the modules venv and ensurepip: install the Debian or Ubuntu package python3-venv (or %s)"
            % (python, package)
        )


def check_compiler(device, which=shutil.which):
    """A GPU needs them: Triton builds its launchers in C, and the sLSTM extension is C++; a CPU does without."""
    if device != "cuda":
        return
    found = {"gcc": ("gcc", "cc", "clang"), "g++": ("g++", "c++", "clang++")}
    missing = [name for name, names in found.items() if not any(map(which, names))]
    if missing:
        raise SetupError(
            "no %s was found on PATH, but Triton and the sLSTM kernel are compiled when they first run: install the "
            "Debian or Ubuntu packages g++ and python3-dev, or use DEVICE=cpu" % " or ".join(missing)
        )


def check_disk(root, device, free=None):
    """Refuse before pip fills the disk."""
    free_gb = (shutil.disk_usage(str(root)).free if free is None else free) / 1e9
    if free_gb < DISK_GB[device]:
        raise SetupError(
            "only %.1f GB are free under %s, but the %s environment, teacher and corpus need %d GB: make room "
            "or put the "
            "repository on a larger disk" % (free_gb, root, device.upper(), DISK_GB[device])
        )


def nvidia_driver():
    """Driver version of the NVIDIA GPU here, None without one, "" where it cannot be asked."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True, timeout=60
            )
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.split()[0]
        except (OSError, subprocess.SubprocessError):
            pass
    gpus = Path("/proc/driver/nvidia/gpus")
    return "" if gpus.is_dir() and any(gpus.iterdir()) else None


def pick_device(wanted, machine, driver):
    """ "cpu" or "cuda": what was asked for, else what the machine has."""
    if wanted not in ("", "auto", "cpu", "cuda"):
        raise SetupError(
            "DEVICE is %r, but only cpu and cuda are known: leave it out to take what the machine has" % wanted
        )
    if wanted == "cpu" or (wanted != "cuda" and driver is None):
        return "cpu"
    if machine != "x86_64":
        raise SetupError("the CUDA packages are pinned for x86_64, this machine is %s: use DEVICE=cpu" % machine)
    if driver and driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < CUDA_DRIVER:
        raise SetupError(
            "the NVIDIA driver here is %s, but CUDA 13 needs %d or newer: update it, or use DEVICE=cpu"
            % (driver, CUDA_DRIVER)
        )
    return "cuda"


def fingerprint(paths, device, python_version):
    """What the finished environment must have been made from."""
    digest = hashlib.sha256()
    for path in paths.lock_files(device):
        digest.update(path.read_bytes())
    return {"lock": digest.hexdigest(), "python": python_version, "device": device, "folder": str(paths.root)}


def read_stamp(paths):
    """The finished environment's fingerprint, None if there is none."""
    try:
        stamp = json.loads(paths.stamp.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(stamp, dict) or paths.unfinished.exists() or not os.access(str(paths.python), os.X_OK):
        return None
    return stamp


def is_current(paths, stamp, wanted):
    """Does the finished environment fit the lock files, and the device if one was asked for?"""
    if stamp is None or stamp.get("device") not in LOCKS or wanted not in ("", "auto", stamp["device"]):
        return False
    return stamp == fingerprint(paths, stamp["device"], stamp.get("python"))


class Steps:
    """One line a step, with the seconds it took."""

    def __init__(self, log):
        self.log = log

    def run(self, what, command, remedy, allowed_to_fail=False):
        """Run a command with its output in the log; on failure show the log's last lines and say what may help."""
        begun = time.monotonic()
        sys.stdout.write("  %-58s" % what)
        sys.stdout.flush()
        with open(str(self.log), "ab") as log:
            log.write(("\n$ %s\n" % " ".join(map(str, command))).encode())
            log.flush()
            start = log.tell()
            status = subprocess.call([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        seconds = time.monotonic() - begun
        if status == 0 or allowed_to_fail:
            sys.stdout.write("%5.0f s%s\n" % (seconds, "" if status == 0 else ", not there"))
            return status == 0
        sys.stdout.write("failed after %.0f s\n" % seconds)
        with open(str(self.log), "rb") as log:
            log.seek(start)
            said = log.read().decode("utf-8", "replace").splitlines()
        noise = ("is ignored: it is neither a file nor a directory", "[notice]")
        lines = [line for line in said if line.strip() and not any(n in line for n in noise)]
        errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
        for line in lines[min([*errors, max(0, len(lines) - 8)]) :][-12:]:
            sys.stdout.write("    " + line[:300] + "\n")
        if status < 0:
            remedy = "it was ended by signal %d (too little memory?); run the same command again" % -status
        raise SetupError("%s failed: %s (everything it said is in %s)" % (what, remedy, self.log))


def install(paths, device, python, python_version):
    """Make or renew the virtual environment; the stamp comes last."""
    stamp = read_stamp(paths)
    renew = stamp is not None and stamp.get("python") == python_version and stamp.get("device") == device
    if not renew or stamp.get("folder") != str(paths.root):
        if paths.venv.is_symlink():
            raise SetupError("%s is a link, and set-up replaces the folder: remove the link first" % paths.venv)
        shutil.rmtree(str(paths.venv), ignore_errors=True)
        renew = False
    paths.venv.mkdir(exist_ok=True)
    paths.unfinished.touch()
    if paths.stamp.exists():
        paths.stamp.unlink()
    steps = Steps(paths.log)
    network = "check the network or pip's index settings (pip config list), then run the same command again"
    if not renew:
        make = [python, "-m", "venv", paths.venv]
        steps.run("virtual environment, Python " + python_version, make, "check that %s -m venv works" % python)
    pip = [paths.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off"]
    lock = paths.root / "requirements" / LOCKS[device][0]
    if device == "cpu":
        pins = [line.strip() for line in lock.read_text().splitlines() if line.strip() and not line.startswith("#")]
        torch = next(line for line in pins if line.startswith("torch=="))
        if not steps.run(torch, pip + ["--no-deps", torch], network, allowed_to_fail=True):
            steps.run(
                torch + " from PyTorch's index", pip + ["--no-deps", "--index-url", TORCH_CPU_INDEX, torch], network
            )
        steps.run("%d packages of requirements/%s" % (len(pins), lock.name), pip + ["--no-deps", "-r", lock], network)
    else:
        steps.run("packages of requirements/%s (about 10 GB)" % lock.name, pip + ["-r", lock], network)
    link_project(paths)
    check = [paths.python, "-c", "import torch, lightning, xlstm, pipeline; from vllm import LLM"]
    steps.run("import of what was installed", check, "delete %s and run the same command again" % paths.venv)
    write_synced(paths.stamp, json.dumps(fingerprint(paths, device, python_version), indent=1) + "\n")
    paths.unfinished.unlink()


def link_project(paths):
    """Put the repository on the environment's import path; as sturdy as an editable install, and needs no build."""
    (site,) = (paths.venv / "lib").glob("python3.*/site-packages")
    (site / "distil_xlstm.pth").write_text(str(paths.root) + "\n")


def write_synced(path, text):
    """Write a small file so that it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(str(temporary), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(temporary), str(path))


def prepare_data(paths, quiet):
    """The embedded teacher and corpus; does nothing in a moment when they are there."""
    command = [str(paths.python), "-m", "teacher_dump.embedded", "--data", str(paths.data)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH="", PYTHONUNBUFFERED="1")
    if quiet:
        command.append("--quiet")
    status = subprocess.call(command, stdin=subprocess.DEVNULL, cwd=str(paths.root), env=environment)
    if status != 0:
        raise SetupError(
            "the embedded teacher and corpus could not be prepared (see above): mend it and run the same command"
        )


def set_up(root, wanted, quiet):
    """Everything, in order; raises SetupError."""
    paths = Paths(root)
    stamp = read_stamp(paths)
    fresh = not is_current(paths, stamp, wanted)
    if fresh:
        check_machine(platform.system(), platform.machine())
        import fcntl  # only now: other systems lack it

        paths.data.mkdir(exist_ok=True)
        with open(str(paths.data / ".setup.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another make may be setting up
            stamp = read_stamp(paths)
            if not is_current(paths, stamp, wanted):
                device = pick_device(wanted, platform.machine(), nvidia_driver())
                python, version = pick_python()
                check_venv_modules(python)
                check_compiler(device)
                check_disk(paths.root, device)
                print("set-up for %s in %s" % (device.upper(), paths.venv), flush=True)
                install(paths, device, python, version)
                stamp = read_stamp(paths)
    prepare_data(paths, quiet and not fresh)
    if fresh or not quiet:
        print("set-up is complete: Python %s, %s" % (stamp["python"], stamp["device"].upper()))


def main(arguments=None):
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        default=os.environ.get("DEVICE", ""),
        help="cpu or cuda (default: $DEVICE, else what the machine has)",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing when everything is there")
    options = parser.parse_args(arguments)
    try:
        set_up(REPOSITORY, options.device, options.quiet)
    except SetupError as error:
        print("error: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command to go on", file=sys.stderr)
        return 130
    except OSError as error:
        print("error: %s: mend the cause and run the same command again" % error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
