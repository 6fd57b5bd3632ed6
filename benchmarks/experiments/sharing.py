"""Several processes on one GPU at the same time, through NVIDIA's Multi-Process Service (MPS) where a machine has it.

Without it a GPU serves one process after another, in slices of time, and the kernels of small models leave most of it
idle. MPS is a process that takes all of them in; it changes no setting of the GPU and ends with the call.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

CONTROL = "nvidia-cuda-mps-control"
MPS, SLICES = "mps", "time slices"
FOLDERS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
SECONDS = 20.0  # assumption: what starts at all has started by then
# A first client: it makes a context and memory on every GPU.
CLIENT = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count, device, context, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
def check(status):
    if status:
        raise SystemExit(f"CUDA error {status}")
check(cuda.cuInit(0))
check(cuda.cuDeviceGetCount(ctypes.byref(count)))
for number in range(count.value):
    check(cuda.cuDeviceGet(ctypes.byref(device), number))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    check(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 20)))
print(count.value)
"""


class NoServiceError(RuntimeError):
    """MPS does not run here; the message says why."""


@contextlib.contextmanager
def shared_gpus(devices: list[str], say: Callable[[str], None]) -> Iterator[tuple[list[str], str]]:
    """Let the processes started inside the block use GPUs at the same time, or say why they take turns.

    Args:
        devices: what CUDA_VISIBLE_DEVICES is for each GPU.
        say: prints a line.

    Yields:
        tuple: what CUDA_VISIBLE_DEVICES is for the processes of each GPU, as the service numbers them anew; and how
            the GPUs are shared, "mps" or "time slices".
    """
    with tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True) as folder:
        before = {name: os.environ.get(name) for name in FOLDERS}
        os.environ.update(dict.fromkeys(FOLDERS, folder))
        try:
            start(devices)
            how = [str(number) for number in range(len(devices))], MPS
        except NoServiceError as error:
            say(f"processes take turns on a GPU, MPS does not run: {error}")
            _quit()
            _restore(before)
            how = devices, SLICES
        try:
            yield how
        finally:
            if how[1] == MPS:
                _quit()
            _restore(before)


def start(devices: list[str]) -> None:
    """Start the service in the folder that the environment names, and see a client through it.

    Raises:
        NoServiceError: it is not installed, does not start, or takes no client.
    """
    if shutil.which(CONTROL) is None:
        raise NoServiceError(f"{CONTROL} is not installed")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    seen = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(devices))))}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:  # the daemon keeps what it is given open, so it gets no pipe
        subprocess.run([CONTROL, "-d"], env=environment, timeout=SECONDS, check=True, **quiet)
        command = [sys.executable, "-c", CLIENT]
        client = subprocess.run(command, env=seen, timeout=SECONDS, capture_output=True, text=True)
        if client.returncode or client.stdout.strip() != str(len(devices)):
            raise NoServiceError(f"a client found {client.stdout.strip() or client.stderr.strip()!r}")
        if not _ask("get_server_list").split():
            raise NoServiceError("the client ran without it")
    except (OSError, subprocess.SubprocessError) as error:
        raise NoServiceError(str(error)) from error


def _ask(command: str) -> str:
    done = subprocess.run([CONTROL], input=command + "\n", timeout=SECONDS, capture_output=True, text=True)
    return done.stdout


def _quit() -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _ask("quit")


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
