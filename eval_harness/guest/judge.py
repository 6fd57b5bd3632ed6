"""Runs the tests against a program that lives in another sandbox, and tells the verdict.

    python -I -S -B judge.py READ_FD WRITE_FD VERDICT_FD MEMORY_BYTES CPU_SECONDS   < job

The job is `(token, setup, tests, names)`. The program's functions are called over a pipe and give plain data back:
what it does to builtins, to `assert`, or to comparison happens in its own process. Only here is the token known.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
import resource

import wire


class Program(wire.Remote):
    """A function, class or object of the program under judgement."""

    pipe = (0, 0)

    def __call__(self, *positional, **named):
        return ask("call", self, positional, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask("attribute", self, name)

    def __setattr__(self, name, value):
        ask("set", self, name, value)

    def __iter__(self):
        return iter(list(ask("items", self)))

    def __len__(self):
        return ask("length", self)

    def __bool__(self):
        return True

    def __getitem__(self, key):
        return ask("item", self, key)


def ask(*request):
    """One call into the program.

    Raises:
        Exception: of the builtin type that the program raised; RuntimeError for any other, or when it has died.
    """
    inbound, outbound = Program.pipe
    payload = wire.encode(request)
    try:
        wire.send(outbound, payload)
        message = wire.receive(inbound)
    except BrokenPipeError:
        message = None
    if message is None:
        raise RuntimeError("the program ended before the tests did: it exited, crashed or used up its processor time")
    reply = wire.decode(message, Program)
    if type(reply) is not tuple or len(reply) not in (2, 3) or reply[0] not in ("value", "error"):
        raise RuntimeError("the program broke the protocol")
    if reply[0] == "value":
        return reply[1]
    name, text = str(reply[1]), str(reply[-1])
    known = vars(sys.modules["builtins"]).get(name)
    if isinstance(known, type) and issubclass(known, Exception) and known is not StopIteration:
        try:
            error = known(text)
        except TypeError:
            error = RuntimeError(f"{name}: {text}")
        raise error
    raise RuntimeError(f"{name}: {text}")


def judge(setup, tests, names):
    """Run the tests; returns None when all hold, else what failed."""
    namespace = {"__name__": "tests"}
    try:
        exec(compile(setup, "<setup>", "exec"), namespace)
        for name in names:
            namespace[name] = ask("get", name)
        exec(compile(tests, "<tests>", "exec"), namespace)
    except BaseException as error:
        line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else 0
        return f"{type(error).__name__}: {str(error)[:500]} (line {line})"
    return None


def main():
    """Judge one program and write the verdict: the token when it passed, else the reason."""
    inbound, outbound, verdict, memory_bytes, cpu_seconds = (int(word) for word in sys.argv[1:6])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    Program.pipe = (inbound, outbound)
    token, setup, tests, names = wire.decode(wire.read_all(0))
    reason = judge(setup, tests, names)
    wire.send(verdict, wire.encode((token, reason)))


main()
