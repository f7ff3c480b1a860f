"""Stands where vLLM's server module stands: the same command line, GET /health, SIGTERM. It says what it was given,
and attaches to the daemon whose run directory it is given."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kv-transfer-config", type=json.loads)
    parser.add_argument("--prefix-caching-hash-algo")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    options = vars(parser.parse_args())
    given = ("VLLM_HOST_IP", "VLLM_CPU_OMP_THREADS_BIND", "PDX_KEY_FILE")
    options["env"] = {name: os.environ[name] for name in given if name in os.environ}
    options["cores"] = sorted(os.sched_getaffinity(0))
    options["pid"] = os.getpid()
    print(json.dumps(options), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    transfer = options["kv_transfer_config"]
    if "run_dir" in transfer["kv_connector_extra_config"]:
        from attached import attach

        attach(transfer, options["model"])
    with http.server.ThreadingHTTPServer((options["host"], options["port"]), Health) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
