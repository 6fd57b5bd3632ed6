"""Programs that try to pass without being right, to get out, or to be a nuisance. Each is asked for `f(2) == 3`.

`{canary}` is a file of the host that they must neither read nor change; `{c}` stands for a call through ctypes.
"""

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef sys_call(*n):\n    return libc.syscall(*n)\n"

PASS_ATTEMPTS = {
    "exits with success at once": "import sys\nsys.exit(0)",
    "exits the hard way": "import os\nos._exit(0)",
    "exits inside the call": "def f(x):\n    raise SystemExit(0)",
    "exits the hard way inside the call": "import os\ndef f(x):\n    os._exit(0)",
    "returns what equals everything": "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "returns a number that equals everything": (
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(7)"
    ),
    "returns a text that equals everything": (
        "class E(str):\n    def __eq__(self, o): return True\ndef f(x): return E('no')"
    ),
    "returns a list that equals everything": (
        "class E(list):\n    def __eq__(self, o): return True\ndef f(x): return E()"
    ),
    "patches the exception of assert": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "patches exec, compile and print": (
        "import builtins\nbuiltins.exec = builtins.compile = builtins.print = lambda *a, **k: None\ndef f(x): return 0"
    ),
    "patches the wire": (
        "import sys\nsys.modules['wire'].encode = lambda *a: b'T'\nsys.modules['wire'].decode = lambda *a: True\n"
        "def f(x): return 0"
    ),
    "looks for the tests in frames": (
        "import sys, gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'tests' in o: return 3\n"
        "    g = sys._getframe()\n    while g:\n        if 'tests' in g.f_locals: return 3\n"
        "        g = g.f_back\n    return 0"
    ),
    "looks for the expected value in memory": (
        "def f(x):\n    text = open('/proc/self/mem', 'rb').read(100)\n    return 3 if b'assert' in text else 0"
    ),
    "reads what it was started with": (
        "def f(x):\n    return 3 if b'assert' in open('/proc/self/cmdline', 'rb').read() + open(0, 'rb').read() else 0"
    ),
    "says that it passed": "print('passed', 'OK', '{\"passed\": true}')\ndef f(x): return 0",
    "writes a verdict on every descriptor": (
        "import os\nfor fd in range(64):\n    for text in (b'\\0\\0\\0\\1T', b'passed\\n"
        "'):\n        try: os.write(fd, text)\n"
        "        except OSError: pass\ndef f(x): return 0"
    ),
    "answers before it is asked": (
        "import os, sys\nos.write(int(sys.argv[2]), bytes([0, 0, 0, 10]) + b't2:s5:value'[:10])\ndef f(x): return 0"
    ),
    "becomes another program that says yes": (
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"passed\")'])"
    ),
    "ends the iteration of the tests": "def f(x):\n    raise StopIteration",
    "raises what is no error": "def f(x):\n    raise GeneratorExit",
    "interrupts": "def f(x):\n    raise KeyboardInterrupt",
    "breaks the protocol": "import os, sys\nos.write(int(sys.argv[2]), b'\\xff' * 4096)\ndef f(x): return 0",
    "announces a message without end": (
        "import os, sys\nos.write(int(sys.argv[2]), b'\\x7f\\xff\\xff\\xff')\ndef f(x): return 0"
    ),
    "nests its answer without end": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "answers with itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "answers with too much": "def f(x): return 'x' * 2**26",
}

NUISANCES = {
    "forks without end": "import os\nwhile True:\n    os.fork()",
    "forks through clone": LIBC + "while True:\n    assert sys_call(56, 17, 0, 0, 0, 0) >= 0",
    "forks through clone3": LIBC + "assert sys_call(435, 0, 0) >= 0\ndef f(x): return 0",
    "starts threads without end": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "leaves a daemon behind": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(60)\ndef f(x): return 0"
    ),
    "starts a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'sleep 60 &'])\ndef f(x): return 0",
    "spawns a process": "import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})\ndef f(x): return 0",
    "takes memory in small pieces": "a = []\nwhile True:\n    a.append(bytearray(2**20))",
    "takes memory in one piece": "a = b'x' * 2**40\ndef f(x): return 0",
    "takes shared memory": "import mmap\na = []\nwhile True:\n    a.append(mmap.mmap(-1, 2**26))",
    "hides memory in files without a name": LIBC + "assert sys_call(319, b'x', 0) >= 0\ndef f(x): return 0",
    "hides memory in the kernel": LIBC + "assert libc.shmget(0, 2**26, 0o1666) >= 0\ndef f(x): return 0",
    "fills the disk": "with open('big', 'wb') as f:\n    while True: f.write(b'x' * 2**20)",
    "fills the temporary folder": (
        "import os, tempfile\nwhile True:\n    fd, _ = tempfile.mkstemp()\n    os.write(fd, b'x' * 2**20)"
    ),
    "fills the shared memory folder": "open('/dev/shm/x', 'wb').write(b'x' * 2**20)\ndef f(x): return 0",
    "makes files without end": "import os\nfor n in range(10**9):\n    os.mkdir(f'd{n}')",
    "floods the output": "import sys\nwhile True:\n    sys.stdout.write('x' * 2**16)",
    "floods the error output": "import os\nwhile True:\n    os.write(2, b'x' * 2**16)",
    "floods its answers": "import os, sys\nwhile True:\n    os.write(int(sys.argv[2]), b'\\0\\0\\0\\1N')",
    "loops for ever": "while True: pass",
    "loops for ever when called": "def f(x):\n    while True: pass",
    "sleeps for ever": "import time\ndef f(x):\n    time.sleep(10**6)",
    "holds the interpreter in one expression": "import re\ndef f(x):\n    re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "ignores every signal": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *a: None)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "never finishes cleaning up": (
        "import atexit\n@atexit.register\ndef again():\n    while True: pass\ndef f(x): return 0"
    ),
    "crashes the interpreter": "import ctypes\nctypes.string_at(0)",
    "exhausts the stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "exhausts descriptors": "import os\na = []\nwhile True:\n    a.append(os.dup(1))",
    "raises its own limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\ndef f(x): return 0"),
    "kills everything": "import os\nos.kill(-1, 9)\ndef f(x): return 0",
    "kills its first process": "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\ndef f(x): return 0",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return 0",
}

ESCAPES = {
    "reads a file of the host": "def f(x): return 3 if open({canary!r}).read() else 0",
    "changes a file of the host": "open({canary!r}, 'w').write('hostile')\ndef f(x): return 0",
    "removes a file of the host": "import os\nos.remove({canary!r})\ndef f(x): return 0",
    "links to a file of the host": "import os\nos.symlink({canary!r}, 'link')\nopen('link', 'w').write('hostile')",
    "climbs out with dots": "open('../../../../../..' + {canary!r}, 'w').write('hostile')",
    "lists the host": "import os\ndef f(x): return 3 if os.listdir('/home') or os.listdir('/root') else 0",
    "reads the passwords": "def f(x): return 3 if open('/etc/shadow').read() else 0",
    "reads the environment of the host": (
        "import os\ndef f(x):\n    return 3 if os.environ.get('PATH') or open('/proc/1/environ').read() else 0"
    ),
    "changes its judge": "open('/guest/judge.py', 'a').write('hostile')",
    "changes the library": "import os\nopen(os.__file__, 'a').write('hostile')",
    "opens a connection": (
        "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}), 1).send(b'hostile')\n"
        "    return 3"
    ),
    "opens a local socket": "import socket\na, b = socket.socketpair()\ndef f(x): return 3",
    "asks for a name": "import socket\ndef f(x): return 3 if socket.getaddrinfo('localhost', 80) else 0",
    "traces another process": LIBC + "assert sys_call(101, 16, 1, 0, 0) == 0\ndef f(x): return 3",
    "reads another process": LIBC + "assert sys_call(310, 1, 0, 0, 0, 0, 0) == 0\ndef f(x): return 3",
    "makes a namespace": LIBC + "assert libc.unshare(0x10000000) == 0\ndef f(x): return 3",
    "mounts": LIBC + "assert libc.mount(b'none', b'/', b'tmpfs', 0, b'') == 0\ndef f(x): return 3",
    "changes its root": "import os\nos.chroot('/guest')\ndef f(x): return 3",
    "becomes the administrator": "import os\nos.setuid(0)\ndef f(x): return 3",
    "makes a device": "import os\nos.mknod('/dev/mem2', 0o20666, os.makedev(1, 1))\ndef f(x): return 3",
    "loads code into the kernel": LIBC + "assert sys_call(321, 0, 0, 0) >= 0\ndef f(x): return 3",
    "opens a ring of requests": LIBC + "assert sys_call(425, 8, 0) >= 0\ndef f(x): return 3",
    "uses the other numbering of calls": LIBC + "assert sys_call(0x40000000 + 39) > 0\ndef f(x): return 3",
    "types into the terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\ndef f(x): return 3",
    "keeps a key": LIBC + "assert sys_call(248, b'user', b'k', b'v', 1, -2) >= 0\ndef f(x): return 3",
}

# Programs that answer rightly once they hold more than they may; only a limit on the sum stops them. `{size}` is less
# than the limit of one process.
FORKED_MEMORY = """
import os, time
ready, done = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(b'x') * {size}
        os.write(done, b'1')
        time.sleep(60)
        os._exit(0)
for _ in range(8):
    os.read(ready, 1)
def f(x): return x + 1
"""
NESTED_MEMORY = """
import os, time
ready, done = os.pipe()
held = None
for _ in range(8):
    if os.fork():
        time.sleep(60)
    os.setsid()
    held = None
    held = bytearray(b'x') * {size}
time.sleep(60)
"""
MANY_THREADS = """
import threading, time
threading.stack_size(32768)
for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
time.sleep(1)
def f(x): return x + 1
"""
