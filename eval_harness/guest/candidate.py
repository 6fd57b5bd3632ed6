"""Runs a generated program inside the sandbox and answers the judge's calls with plain data.

    python -I -S -B candidate.py READ_FD WRITE_FD MEMORY_BYTES CPU_SECONDS   < program

Nothing in this process is trusted: the program may change all of it. It holds no test, no expected value and no token.
"""

import posix
import resource
import sys

sys.path.insert(0, __file__.rpartition("/")[0])
import wire


def limit(memory_bytes, cpu_seconds):
    """Cap what this process may use; no privilege is left with which to raise it again."""
    caps = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for cap, value in caps.items():
        resource.setrlimit(cap, (value, value))


def main():
    """Load the program, then serve calls until the judge hangs up."""
    inbound, outbound, memory_bytes, cpu_seconds = (int(word) for word in sys.argv[1:5])
    limit(memory_bytes, cpu_seconds)
    source = wire.read_all(0).decode()
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    sys.path.pop(0)
    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    objects = []

    def keep(value):
        objects.append(value)
        return len(objects) - 1

    def answer(*reply):
        try:
            wire.send(outbound, wire.encode(reply, keep))
        except (ValueError, RecursionError) as error:
            wire.send(outbound, wire.encode(("error", type(error).__name__, str(error)[:2000])))

    failure = None
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except Exception as error:
        failure = error
    actions = {
        "get": lambda name: module.__dict__[name],
        "call": lambda target, positional, named: target(*positional, **named),
        "attribute": getattr,
        "set": setattr,
        "items": list,
        "length": len,
        "item": lambda target, key: target[key],
    }
    while (message := wire.receive(inbound)) is not None:
        try:
            if failure is not None:
                raise failure
            action, *rest = wire.decode(message, lambda number, kind: objects[number])
            result = actions[action](*rest)
        except Exception as error:
            answer("error", type(error).__name__, str(error)[:2000])
        else:
            answer("value", result)


main()
