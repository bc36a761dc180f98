"""A teacher's server on loopback that fails on demand."""

import gzip
import json
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from opd_kernels.integrations.transformers import lazy_logits
from tests.tiny_run import tiny_tokenizer

KEY = "sk-very-secret-0123456789"


class FakeServer:
    """Serves a model by vLLM's completions endpoint; each request uses up one of `faults`."""

    def __init__(self, model, max_log_probs=20):
        self.model, self.lock, self.max_log_probs = model, threading.Lock(), max_log_probs
        self.tokenizer, self.has_no_log_probs = tiny_tokenizer(), False
        self.faults, self.requests, self.active, self.most_active, self.delay = [], 0, 0, 0, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def setup(self):
                super().setup()
                outer.connections.append(self.connection)

            def _send(self, status, body, length=None, encoding="identity"):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Encoding", encoding)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _send_endlessly(self, size):
                """Send white space, which JSON may contain, for as long as the client reads it."""
                self._send(200, b"", length=1 << 40)
                with suppress(OSError):
                    while True:
                        self.wfile.write(b" " * size)
                        outer.sent += size
                        time.sleep(0.01)

            def _refused(self):
                if self.headers.get("Authorization") == f"Bearer {KEY}":
                    return False
                self._send(401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
                return True

            def do_GET(self):
                if self.path != "/v1/models":
                    self._send(404, {"error": {"message": "Not Found"}})
                elif not self._refused():
                    models = [{"id": "tiny", "object": "model", "max_model_len": 256}]
                    self._send(200, {"object": "list", "data": models})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self._refused():
                    return
                with outer.lock:
                    outer.requests += 1
                    outer.active += 1
                    outer.most_active = max(outer.most_active, outer.active)
                    fault = outer.faults.pop() if outer.faults else None
                try:
                    time.sleep(outer.delay)
                    self._answer(request, fault)
                finally:
                    with outer.lock:
                        outer.active -= 1

            def _answer(self, request, fault):
                if isinstance(request["prompt"], str):
                    assert not request["add_special_tokens"]
                    request["prompt"] = outer.tokenizer(request["prompt"])["input_ids"]
                if len(request["prompt"]) + request["max_tokens"] > 256:
                    text = f"maximum context length is 256, requested {len(request['prompt'])} + 1"
                    return self._send(400, {"error": {"message": text}})
                if request["prompt_logprobs"] > outer.max_log_probs:
                    text = f"greater than max allowed: {outer.max_log_probs}"
                    return self._send(400, {"error": {"message": text}})
                if fault in (500, 503, 429, 408, 409):
                    return self._send(fault, {"error": {"message": "busy"}})
                if fault == "reset":
                    self.connection.close()
                    self.close_connection = True
                    return None
                if fault == "gzip":
                    body = gzip.compress(b" " * (1 << 20))
                    return self._send(200, body, encoding="gzip")
                if fault == "slow":
                    time.sleep(1.5)
                rows = outer.rows(request["prompt"], request["prompt_logprobs"])
                if fault in ("flood", "drip"):
                    return self._send_endlessly(1 << 20 if fault == "flood" else 1)
                if outer.has_no_log_probs:
                    return self._send(200, {"choices": [{"index": 0, "text": ""}]})
                if fault == "malformed":
                    return self._send(200, b'{"choices": [{"prompt_logp')
                if fault == "cut":
                    rows = rows[:-1]
                if fault == "no token":
                    rows[-1].pop(str(request["prompt"][-1]))
                if fault == "nan":
                    rows[-1][next(iter(rows[-1]))]["logprob"] = float("nan")
                if fault == "mass":
                    rows[-1][next(iter(rows[-1]))]["logprob"] = 0.0
                    rows[-1][list(rows[-1])[1]]["logprob"] = 0.0
                if fault == "empty":
                    return self._send(200, {"choices": []})
                if fault == "html":
                    return self._send(200, b"<html>gateway</html>")
                choice = {"index": 0, "text": "", "prompt_logprobs": rows}
                return self._send(200, {"id": "1", "model": "tiny", "choices": [choice]})

        self.handler, self.connections, self.port, self.sent = Handler, [], 0, 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Listen; after `stop`, at the same port again."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.server.daemon_threads, self.port = True, self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        """Die: close all connections and accept no new ones."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):  # the client has closed it already
                connection.shutdown(socket.SHUT_RDWR)

    def rows(self, ids, k):
        with self.lock, torch.no_grad():
            log_p = lazy_logits(self.model, torch.tensor([ids])).materialize()[0].log_softmax(-1)
        rows = [None]
        for row, token in zip(log_p, ids[1:], strict=False):
            best = row.topk(k).indices.tolist()
            rows.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in [token, *best]})
        return rows
