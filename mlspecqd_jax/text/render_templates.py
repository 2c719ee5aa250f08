"""A process of its own that renders a chat template: `python -I -S render_templates.py`, a request on stdin, the texts on stdout.

A template is a stranger's program. jinja2's sandbox keeps it from the interpreter, as in transformers, whose names and tags it
finds here; that it ends, and does not fill the memory, only the operating system can promise. Hence a process, which the caller
stops after a while and which limits its own processor time and memory (where there are such limits: not on Windows). It imports
nothing of this package, so that it starts in a tenth of a second.
"""

import contextlib
import datetime
import json
import sys
from typing import Any, cast

CPU_SECONDS, MEMORY = 2, 2**30
# Of the request: {"path": sys.path, "template": text, "conversations": [[message]], "variables": {name: value}, "most": characters}


def main() -> None:
    """Answer the request on stdin with {"texts": [text]}, {"error": sentence} or {"refused": the template's own, "at": place}."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    import jinja2

    _limit()
    texts: list[str] = []
    answer: dict[str, Any] = {"texts": texts}
    try:
        template = _environment().from_string(request["template"])  # which computes what is constant already
        variables = {"tools": None, "documents": None} | request["variables"]
        for messages in request["conversations"]:
            texts.append(_rendered(template, request["most"], variables | {"messages": messages}))
    except _Refused as error:
        answer = {"refused": " ".join(str(error).split())[:200], "at": len(texts)}
    except jinja2.exceptions.SecurityError as error:
        answer = {"error": f"it tried what the sandbox forbids: {_line(error)}"}
    except (MemoryError, RecursionError, OverflowError) as error:
        answer = {"error": f"it takes too much: {_line(error)}"}
    except Exception as error:  # a template can raise anything
        answer = {"error": _line(error)}
    json.dump(answer, sys.stdout)


class _Refused(Exception):
    """What a template raises by itself."""


def _rendered(template, most: int, variables: dict) -> str:
    pieces = []
    for piece in template.generate(**variables):
        most -= len(piece)
        if most < 0:
            raise MemoryError("its text is much longer than the messages")
        pieces.append(piece)
    return "".join(pieces)


def _environment():
    """Return jinja2's sandbox with the tags, filters and functions that transformers gives to chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks for training what an assistant wrote; here it is its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's is no ClassVar)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message):
        raise _Refused(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    functions = cast(dict[str, Any], environment.globals)
    functions["raise_exception"] = raise_exception
    functions["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)):
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    main()
