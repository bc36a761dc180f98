"""A served teacher, against a fake server that can fail in many ways."""

import threading
import time

import pytest
import torch
from torch.testing import assert_close

from opd_kernels.integrations.transformers import lazy_logits
from opd_trainer.__main__ import main, train
from opd_trainer.build import prepare
from opd_trainer.config import DistillationConfig, load_config
from opd_trainer.data import Prompt
from opd_trainer.errors import TeacherError
from opd_trainer.models.load import load_model
from opd_trainer.models.rollout import Completion
from opd_trainer.models.server import ServedTeacher
from tests.fake_server import KEY, FakeServer
from tests.tiny_run import make_trainer, read_metrics, tiny_tokenizer, write_model, write_recipe
from tests.trainer_steps import completions, gradient_of

K = 8


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_API_KEY", KEY)
    torch.set_num_threads(1)
    fake = FakeServer(load_model(str(write_model(tmp_path / "teacher", seed=1)), "float32"))
    yield fake
    fake.stop()


def _config(folder, server, **changes):
    options = {"teacher": server.url, "tail": None, "k": K, "support": "teacher"} | changes
    return load_config(DistillationConfig, write_recipe(folder, **options), [])


def _many(count):
    return [Completion(c.prompt, [*c.ids[:-1], 3 + i], False)
            for i in range(count // 6 + 1) for c in completions()][:count]  # fmt: skip


def test_its_log_probs_are_those_of_the_model(tmp_path, server):
    teacher = ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    assert teacher.limits.context == 255  # a request generates one token
    batch = completions()
    teacher.prepare(batch)
    sparse = teacher.logits(batch, 1.0)
    scored = []
    for c in batch:
        ids = torch.tensor([c.prompt.teacher_ids + c.ids])
        rows = lazy_logits(server.model, ids).materialize()[0].log_softmax(-1)
        scored.append(rows[len(c.prompt.teacher_ids) - 1 : -1])
    expected = torch.cat(scored).detach()
    assert sparse.ids.shape == (len(expected), K + 1)
    live = sparse.values > -torch.inf
    assert_close(sparse.values[live], expected.gather(-1, sparse.ids.clamp_min(0))[live])
    tokens = torch.tensor([t for c in batch for t in c.ids])
    assert_close(sparse.at(tokens[:, None]).log_probs, expected.gather(-1, tokens[:, None]))
    outside = 1 - torch.where(live, sparse.values.exp(), 0.0).sum(-1)
    assert_close(sparse.log_tail.exp(), outside, rtol=1e-4, atol=1e-5)


def test_a_server_with_more_tokens_than_the_student_is_refused(tmp_path, server):
    """Its ids from 60 on would be left out of the loss in silence."""
    teacher = ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    teacher.vocab_size = 60
    batch = completions()
    teacher.prepare(batch)
    expected = r"teacher: expected ids below 60, the rows of .*, but http:.* gives id \d\d a prob"
    with pytest.raises(TeacherError, match=expected):
        teacher.logits(batch, 1.0)


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
    """64 concurrent requests, with several faults of each kind."""
    changes = {"teacher_concurrency": 64, "teacher_timeout": 1.0, "teacher_patience": 60}
    teacher = ServedTeacher(server.url, _config(tmp_path, server, **changes), tiny_tokenizer(), 97)
    batch = _many(160)
    server.delay = 0.05
    teacher.prepare(batch)
    expected = teacher.logits(batch, 1.0)
    assert server.most_active >= 32
    kinds = [500, 503, 429, 408, 409, "reset", "malformed", "cut", "no token", "nan", "mass",
             "empty", "html", "slow"]  # fmt: skip
    before = server.requests
    teacher.prepare(batch)  # the next step has the same completions: the answers are kept
    assert server.requests == before
    teacher.answers.clear()
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
    teacher = ServedTeacher(server.url, config, tiny_tokenizer(), 97)
    server.faults = [500] * 10_000
    teacher.prepare(completions())
    with pytest.raises(TeacherError, match=r"no good answer from http.* for 1.0 s \(teacher_pat"):
        teacher.logits(completions(), 1.0)


def test_a_run_whose_server_stays_away_keeps_its_last_step(tmp_path, server):
    options = {"teacher": server.url, "k": K, "support": "teacher", "teacher_patience": 0.5}
    recipe = write_recipe(tmp_path, **options, max_steps=4, eval_data=None)
    main(["distill", str(recipe)])
    expected = [line["loss"] for line in read_metrics(tmp_path / "run")[0]]
    arguments = ["distill", str(recipe), "--output_dir", str(tmp_path / "cut")]
    trainer, _ = prepare(load_config(DistillationConfig, recipe, arguments[2:]))
    learn = trainer.learn

    def learn_without(*given):
        if trainer.state.global_step == 2:
            server.faults = [500] * 10_000
        return learn(*given)

    trainer.learn = learn_without
    with pytest.raises(SystemExit, match="no good answer"):
        train(trainer, None)
    server.faults = []
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert [line["loss"] for line in read_metrics(tmp_path / "cut")[0]] == expected


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_goes_on_when_its_server_comes_back(tmp_path, server, seconds):
    options = {"teacher": server.url, "k": K, "support": "teacher", "teacher_patience": 180}
    recipe = write_recipe(tmp_path, **options, max_steps=4, eval_data=None)
    main(["distill", str(recipe)])
    expected = [line["loss"] for line in read_metrics(tmp_path / "run")[0]]
    arguments = ["--output_dir", str(tmp_path / "again")]
    trainer, _ = prepare(load_config(DistillationConfig, recipe, arguments))
    learn = trainer.learn

    def learn_without(*given):
        if trainer.state.global_step == 2:
            server.stop()
            threading.Timer(seconds, server.start).start()
        return learn(*given)

    trainer.learn = learn_without
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"is asked again: APIConnectionError.*refused"):
        train(trainer, None)
    assert time.monotonic() - start > seconds
    assert [line["loss"] for line in read_metrics(tmp_path / "again")[0]] == expected


def test_requests_end_with_the_program(tmp_path, server, monkeypatch):
    """A thread that retries would keep the interpreter alive for all of its patience."""
    teacher = ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    server.faults = [500] * 10_000
    monkeypatch.setattr("threading.main_thread", lambda: threading.Thread())  # not alive
    start = time.monotonic()
    teacher.prepare(completions())
    with pytest.raises(TeacherError, match="no good answer"):
        teacher.logits(completions(), 1.0)
    assert time.monotonic() - start < 30 < teacher.patience


def test_the_end_of_a_prompt_counts(tmp_path, server):
    teacher = ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    splits = (([5, 6], [7, 8]), ([5, 6, 7], [8]))
    batch = [Completion(Prompt("", ids, ids), rest, False) for ids, rest in splits]
    teacher.prepare(batch)
    assert teacher.logits(batch, 1.0).ids.shape[0] == 3


def test_a_prompt_up_to_the_servers_context(tmp_path, server):
    teacher = ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    ids = [5 + i % 80 for i in range(teacher.limits.context)]
    batch = [Completion(Prompt("", ids[:-6], ids[:-6]), ids[-6:], False)]
    teacher.prepare(batch)
    assert teacher.logits(batch, 1.0).ids.shape[0] == 6


def test_a_server_of_another_family_is_refused(tmp_path, server):
    server.tokenizer = tiny_tokenizer(characters="ba" + "cdefghijklmnopqrstuvwxyz")
    with pytest.raises(
        TeacherError, match=r"expected the student's tokenizer, but http.* has othe"
    ):
        ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)


def test_several_servers_have_a_key_each(tmp_path, server, monkeypatch):
    monkeypatch.delenv("OPD_TEACHER_API_KEY")
    monkeypatch.setenv("OPD_TEACHER_API_KEY_MATH", KEY + "\r\n")
    ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97, "math")
    with pytest.raises(TeacherError, match="environment variable OPD_TEACHER_API_KEY_CODE"):
        ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97, "code")


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
        ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    config = _config(tmp_path, server, teacher_model="big")
    with pytest.raises(TeacherError, match="teacher_model: expected one of tiny, got 'big'"):
        ServedTeacher(server.url, config, tiny_tokenizer(), 97)
    config = _config(tmp_path, server, teacher=server.url.replace("v1", "v2"))
    with pytest.raises(TeacherError, match=r"has no such page; expected http\(s\)://HOST/v1"):
        ServedTeacher(config.teacher, config, tiny_tokenizer(), 97)
    server.has_no_log_probs, server.max_log_probs = True, 20
    with pytest.raises(TeacherError, match="does not answer prompt_logprobs as vLLM does"):
        ServedTeacher(server.url, _config(tmp_path, server), tiny_tokenizer(), 97)
    for changes, reason in (
        ({"teacher": "http://host/v1?api_key=x"}, "expected a URL without credentials"),
        ({"support": "student"}, "expected teacher or intersection, or missing: drop"),
        ({"support": "full"}, "support: full needs the teacher's whole distribution"),
        ({"temperature": 0.7}, "temperature: expected 1 with a server"),
        ({"forward_kl_coef": 0.1}, "it needs the teacher's entropy"),
        ({"teacher": "http://user:pass@host/v1"}, "expected a URL without credentials"),
    ):
        with pytest.raises(ValueError, match=reason):
            _config(tmp_path, server, **changes)
