"""The `pdx` command: one line per verb. A verb's module is imported when the verb is used, not before."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "serve": ("pdx.launch.serve", "start vLLM servers of one role on this host"),
    "up": ("pdx.launch.up", "start router, daemons and engines on this machine"),
    "router": ("pdx.router.main", "start the router (also pdx-router)"),
    "kv": ("pdx.commands.kv", "ask and steer what daemons keep: lookup, pin, clear, stats …"),
    "drain": ("pdx.commands.drain", "take an engine or a router out of service"),
    "top": ("pdx.commands.top", "watch a router: engines, daemons and requests as they are"),
    "bench": ("pdx.commands.bench", "list the benchmarks and run one"),
    "check": ("pdx.commands.check", "say what this machine can run, and what is missing"),
    "version": ("", "print the version, and that of the wire"),
}
EXAMPLES = """examples:
  pdx up ./model --prefill 1 --decode 1          everything on this machine, one command
  pdx serve ./model --kv-role prefill            one engine, for a router elsewhere
  pdx kv stats                                   what the store of this host holds
  pdx VERB --help                                more on one verb"""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit status; 2 for a verb that does not exist."""
    arguments = sys.argv[1:] if argv is None else argv
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb in ("version", "--version"):
        from pdx.wire import version

        print(version())
        return 0
    if verb not in VERBS:
        print(f"pdx: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(VERBS[verb][0]).main(rest))
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    verbs = "\n".join(f"  {name:<8} {line}" for name, (_, line) in VERBS.items())
    title = "LLM engines as one system, with the KV cache as its medium."
    return f"usage: pdx VERB ...\n\n{title}\n\n{verbs}\n\n{EXAMPLES}"


if __name__ == "__main__":
    sys.exit(main())
