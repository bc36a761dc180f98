"""A served teacher, by a server of our own on loopback that also fails in every way it can."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits
from tests.tiny_run import make_trainer, read_metrics, write_model, write_recipe
from tests.trainer_steps import completions, gradient_of
from trainer.__main__ import main
from trainer.config import DistillationConfig, load_config
from trainer.models import load_model
from trainer.rollout import Completion
from trainer.server import ServedTeacher
from trainer.teacher import TeacherError

KEY = "sk-very-secret-0123456789"
K = 8


class FakeServer:
    """Speaks the completions endpoint of vLLM for a model; `faults` are used up one a request."""

    def __init__(self, model, max_log_probs=20):
        self.model, self.lock, self.max_log_probs = model, threading.Lock(), max_log_probs
        self.faults, self.requests, self.active, self.most_active, self.delay = [], 0, 0, 0, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _send(self, status, body, length=None):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _refused(self):
                if self.headers.get("Authorization") == f"Bearer {KEY}":
                    return False
                self._send(401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
                return True

            def do_GET(self):
                if not self._refused():
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
                if request["prompt_logprobs"] > outer.max_log_probs:
                    text = f"greater than max allowed: {outer.max_log_probs}"
                    return self._send(400, {"error": {"message": text}})
                if fault in (500, 503, 429):
                    return self._send(fault, {"error": {"message": "busy"}})
                if fault == "reset":
                    self.connection.close()
                    self.close_connection = True
                    return None
                if fault == "slow":
                    time.sleep(1.5)
                rows = outer.rows(request["prompt"], request["prompt_logprobs"])
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

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def rows(self, ids, k):
        with self.lock, torch.no_grad():
            log_p = lazy_logits(self.model, torch.tensor([ids])).materialize()[0].log_softmax(-1)
        rows = [None]
        for row, token in zip(log_p, ids[1:], strict=False):
            best = row.topk(k).indices.tolist()
            rows.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in [token, *best]})
        return rows


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_API_KEY", KEY)
    torch.set_num_threads(1)
    fake = FakeServer(load_model(str(write_model(tmp_path / "teacher", seed=1)), "float32"))
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def _config(folder, server, **changes):
    options = {"teacher": server.url, "tail": None, "k": K, "support": "teacher"} | changes
    return load_config(DistillationConfig, write_recipe(folder, **options), [])


def _many(count):
    return [Completion(c.prompt, [*c.ids[:-1], 3 + i], False)
            for i in range(count // 6 + 1) for c in completions()][:count]  # fmt: skip


def test_its_log_probs_are_those_of_the_model(tmp_path, server):
    teacher = ServedTeacher(server.url, _config(tmp_path, server), vocab_size=97)
    assert teacher.context == 256
    batch = completions()
    teacher.prepare(batch)
    sparse = teacher.logits(batch, 1.0)
    expected = []
    for c in batch:
        ids = torch.tensor([c.prompt.teacher_ids + c.ids])
        rows = lazy_logits(server.model, ids).materialize()[0].log_softmax(-1)
        expected.append(rows[len(c.prompt.teacher_ids) - 1 : -1])
    expected = torch.cat(expected).detach()
    assert sparse.ids.shape == (len(expected), K + 1)
    live = sparse.values > -torch.inf
    assert_close(sparse.values[live], expected.gather(-1, sparse.ids.clamp_min(0))[live])
    tokens = torch.tensor([t for c in batch for t in c.ids])
    assert_close(sparse.at(tokens[:, None]).log_probs, expected.gather(-1, tokens[:, None]))
    outside = 1 - torch.where(live, sparse.values.exp(), 0.0).sum(-1)
    assert_close(sparse.log_tail.exp(), outside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"support": "teacher"}, {"objective": "policy_gradient"}])
def test_a_step_with_it_is_the_step_with_the_model(tmp_path, server, options):
    changes = {"tail": None, "k": K} | options
    served = make_trainer(tmp_path / "a", teacher=server.url, **changes)
    local = make_trainer(tmp_path / "b", teacher=str(tmp_path / "teacher"), **changes)
    batch = completions()
    actual, expected = gradient_of(served, batch), gradient_of(local, batch)
    assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert_close(actual[1][name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_under_load_and_faults_no_sample_is_lost_or_wrong(tmp_path, server):
    """64 requests at a time; each kind of fault several times among them."""
    changes = {"teacher_concurrency": 64, "teacher_timeout": 1.0, "teacher_patience": 60}
    teacher = ServedTeacher(server.url, _config(tmp_path, server, **changes), vocab_size=97)
    batch = _many(160)
    server.delay = 0.05
    teacher.prepare(batch)
    expected = teacher.logits(batch, 1.0)
    assert server.most_active >= 32
    before = server.requests
    kinds = [500, 503, 429, "reset", "malformed", "cut", "no token", "nan", "mass", "empty",
             "html", "slow"]  # fmt: skip
    server.faults = kinds * 5
    teacher.prepare(batch)
    actual = teacher.logits(batch, 1.0)
    assert not server.faults
    assert server.requests >= before + len(batch) + 5 * len(kinds)
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.values, expected.values)
    assert torch.equal(actual.tail, expected.tail)


def test_a_server_that_stays_away_stops_the_run(tmp_path, server):
    config = _config(tmp_path, server, teacher_patience=1.0)
    teacher = ServedTeacher(server.url, config, vocab_size=97)
    server.faults = [500] * 10_000
    teacher.prepare(completions())
    with pytest.raises(TeacherError, match=r"no good answer from http.* for 1.0 s \(teacher_pat"):
        teacher.logits(completions(), 1.0)


def test_a_wrong_key_stops_the_run_and_is_nowhere(tmp_path, server, monkeypatch, capfd):
    options = {"teacher": server.url, "tail": "bucket", "k": K, "support": "teacher"}
    recipe = write_recipe(tmp_path, **options, max_steps=2, save_strategy="steps", save_steps=1)
    main(["distill", str(recipe)])
    monkeypatch.setenv("OPD_TEACHER_API_KEY", "sk-wrong")
    message = "refused the API key; expected a valid key in .* OPD_TEACHER_API_KEY"
    with pytest.raises(SystemExit, match=message) as error:
        main(["distill", str(recipe), "--output_dir", str(tmp_path / "other")])
    assert "sk-" not in str(error.value)
    output = capfd.readouterr()
    main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")])
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for key in (KEY, "sk-wrong"):
        assert key.encode() not in written
        assert key not in output.out + output.err
    steps, lines = read_metrics(tmp_path / "run")
    assert len(steps) == 2
    assert all(line["teacher_mass"] > 0 for line in steps)
    assert lines[0]["eval_reverse_kl_on_own_samples"] > 0


def test_what_a_server_cannot_give_is_refused_at_the_start(tmp_path, server):
    server.max_log_probs = 4
    message = "greater than max allowed: 4; if it limits log-probs below k: 8, .*--max-logprobs"
    with pytest.raises(TeacherError, match=message):
        ServedTeacher(server.url, _config(tmp_path, server), vocab_size=97)
    config = _config(tmp_path, server, teacher_model="big")
    with pytest.raises(TeacherError, match="teacher_model: expected one of tiny, got 'big'"):
        ServedTeacher(server.url, config, vocab_size=97)
    for changes, reason in (
        ({"support": "full"}, "support: full needs the teacher's whole distribution"),
        ({"temperature": 0.7}, "temperature: expected 1 with a server"),
        ({"forward_kl_coef": 0.1}, "it needs the teacher's entropy"),
        ({"teacher": "http://user:pass@host/v1"}, "expected a URL without credentials"),
    ):
        with pytest.raises(ValueError, match=reason):
            _config(tmp_path, server, **changes)
