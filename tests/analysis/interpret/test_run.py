"""`e2e-sae interpret` as a user runs it: the real client against an endpoint on loopback, killed, and started again."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from e2e_sae.analysis.interpret import report
from e2e_sae.scripts.cli import main
from e2e_sae.train import train
from tests.analysis.interpret.loopback import KEY, LoopbackEndpoint, key_of, plain_answer, refusal
from tests.tiny_runs import E2E, N_CTX, run_config, write_rows

OPTIONS = ["--latents", "3,9", "--n-context", "4", "--n-held-out", "4", "--n-samples", "60", "--device", "cpu"]
MODELS = ["--explainer-model", "big", "--scorer-model", "small", "--concurrency", "2"]
# Two SAEs of two latents: an explanation, one question of detection, one of fuzzing, and one for each of 8 contexts.
N_REQUESTS = 4 * (1 + 1 + 1 + 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> list[str]:
    """Folders of a local and an e2e run."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.parquet", 8)
    data = {"dataset_name": str(write_rows(folder / "eval.parquet", 60, seed=1)), "n_ctx": N_CTX}
    made: list[str] = []
    for name, loss in (("local", None), ("e2e", E2E)):
        changes: dict[str, Any] = {"wandb_run_name": name, "eval_data": data, "eval_n_samples": 4}
        changes |= {"loss": loss} if loss else {}
        made.append(str(train(run_config(tiny_folder("gpt2"), rows, folder, **changes))))
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples are that an earlier test has collected."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, in_tmp_dir: Path, cache: Path) -> Iterator[LoopbackEndpoint]:
    """An endpoint that the environment names, in a folder where nothing is but a cache of examples."""
    Path("out").mkdir()
    Path("out/cache").symlink_to(cache)
    with LoopbackEndpoint() as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        yield endpoint


@pytest.fixture(autouse=True)
def few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the figure, which takes a second, in one test alone."""
    if "each_sae" not in request.node.name:
        monkeypatch.setattr(report, "save_figure", lambda *_: [])


def interpret(runs: list[str], out: str, *more: str) -> int:
    return main(["interpret", *runs, "--out", out, *OPTIONS, *more])


def results(out: str) -> dict[str, bytes]:
    names = ("explanations.jsonl", "scores.csv", "differences.csv", "differences.md", "differences.tex", "summary.md")
    return {name: (Path(out) / name).read_bytes() for name in names}


def test_killed_half_way_it_goes_on_and_asks_nothing_twice(
    runs: list[str], endpoint: LoopbackEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    n_answered = 15
    endpoint.n_before_hold = n_answered
    arguments = ["interpret", *runs, "--out", "out", *OPTIONS, *MODELS, "--yes"]
    command = [sys.executable, "-m", "e2e_sae.scripts.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    kept = Path("out/answers")
    try:
        # Two are under way, and every answer that was given is on the disk.
        endpoint.wait_until(lambda: len(endpoint.received) == n_answered + 2)
        endpoint.wait_until(lambda: len(list(kept.rglob("[!.]*.json"))) == n_answered)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    endpoint.release()
    answered_before = set(endpoint.answered)
    n_received = len(endpoint.received)

    assert interpret(runs, "out", *MODELS, "--yes") == 0
    later = [key_of(body) for body in endpoint.received[n_received:]]
    assert len(answered_before) == n_answered
    assert not answered_before & set(later)
    assert len(later) == N_REQUESTS - n_answered
    assert set(Counter(endpoint.answered).values()) == {1}
    assert f"{N_REQUESTS - n_answered} requests to send, {n_answered} answered already" in capsys.readouterr().out

    n_received = len(endpoint.received)
    assert interpret(runs, "out", *MODELS) == 0  # nothing is left to be confirmed
    assert len(endpoint.received) == n_received
    assert interpret(runs, "whole", *MODELS, "--yes") == 0
    assert len(endpoint.received) == n_received + N_REQUESTS
    assert results("out") == results("whole")


def test_sigterm_waits_for_what_is_under_way_and_loses_nothing(
    runs: list[str], endpoint: LoopbackEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(body: Any) -> str:
        if len(endpoint.answered) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_answer(body)

    endpoint.answer = stop
    assert interpret(runs, "out", *MODELS, "--yes") == 128 + signal.SIGTERM
    n_first = len(endpoint.received)
    assert 10 <= n_first < N_REQUESTS
    assert "the same command goes on from there" in capsys.readouterr().out
    endpoint.answer = plain_answer
    assert interpret(runs, "out", *MODELS, "--yes") == 0
    assert len(endpoint.received) == len(set(map(key_of, endpoint.received))) == N_REQUESTS


def test_scores_and_texts_are_written_for_each_sae(runs: list[str], endpoint: LoopbackEndpoint) -> None:
    assert interpret(runs, "out", *MODELS, "--yes", "--param", "temperature=0", "--max-per-minute", "60000") == 0
    assert {body["temperature"] for body in endpoint.received} == {0}
    scores = pd.read_csv("out/scores.csv")
    assert list(scores.columns) == [
        "label", "model_name", "sae_pos", "id", "run_type", "latent", "explainer", "scored_by", "scorer", "measure",
        "score", "n_examples", "n_failed",
    ]  # fmt: skip
    assert len(scores) == 2 * 2 * 3
    assert set(scores["label"]) == {"local", "e2e"}
    assert set(scores["scored_by"]) == {"small"}
    lines = [json.loads(line) for line in Path("out/explanations.jsonl").read_text().splitlines()]
    assert [(line["label"], line["latent"], line["status"]) for line in lines] == [
        (label, latent, "explained") for label in ("local", "e2e") for latent in (3, 9)
    ]
    for line in lines:  # the endpoint names the first marked piece
        piece = json.loads(line["explanation"].removeprefix("the text "))
        assert f"⟦{piece}⟧" in line["contexts"][0]
    assert "e2e - local" in Path("out/differences.md").read_text()
    assert Path("out/scores.png").stat().st_size > 10_000


def test_a_malformed_answer_is_asked_again_and_then_counted(runs: list[str], endpoint: LoopbackEndpoint) -> None:
    refused: list[Any] = []

    def answer(body: Any) -> str:
        if len(refused) < 3:
            refused.append(body)
            return "I am sorry, but I cannot do that."
        if "Tokens:" in body["messages"][1]["content"] and len(body["messages"]) == 2:
            return "{} or so"
        return plain_answer(body)

    endpoint.answer = answer
    assert interpret(runs[:1], "out", *MODELS, "--yes", "--concurrency", "1") == 0
    # The first latent's explanation failed three times; each simulation of the other one took two attempts.
    assert [len(body["messages"]) for body in refused] == [2, 4, 6]
    lines = [json.loads(line) for line in Path("out/explanations.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["no answer", "explained"]
    scores = pd.read_csv("out/scores.csv")
    assert scores["n_failed"].tolist() == [0, 0, 0]
    assert len(endpoint.received) == 3 + 1 + 1 + 1 + 2 * 8
    assert "| local | 1 | 1 | 0 |" in Path("out/summary.md").read_text()


def test_an_error_of_the_endpoint_is_one_line_and_what_was_answered_is_kept(
    runs: list[str], endpoint: LoopbackEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: Any) -> str:
        if len(endpoint.answered) == 5:
            endpoint.first_replies = [refusal(404, code="model_not_found")] * 100
        return plain_answer(body)

    endpoint.answer = answer
    assert interpret(runs, "out", *MODELS, "--yes") == 2
    assert "refuses requests for the model" in capsys.readouterr().err
    n_kept = len(list(Path("out/answers").rglob("*.json")))
    assert n_kept == len(endpoint.answered)
    endpoint.answer, endpoint.first_replies = plain_answer, []
    assert interpret(runs, "out", *MODELS, "--yes") == 0
    assert len(endpoint.answered) == N_REQUESTS


def test_nothing_is_sent_without_a_yes(
    runs: list[str], endpoint: LoopbackEndpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = ["--price-in", "1000", "10", "--price-out", "2000", "20"]
    assert interpret(runs, "out", *MODELS, *prices) == 2
    captured = capsys.readouterr()
    assert "there is no terminal to confirm these requests at: add --yes" in captured.err
    assert f"{N_REQUESTS} requests to send, 0 answered already" in captured.out
    assert "big: 4 requests, about " in captured.out
    assert f"small: {N_REQUESTS - 4} requests, about " in captured.out
    assert "together about $" in captured.out
    monkeypatch.setattr(sys, "stdin", _Terminal("\n"))
    assert interpret(runs, "out", *MODELS) == 0
    assert "nothing was asked" in capsys.readouterr().out
    assert endpoint.received == []
    monkeypatch.setattr(sys, "stdin", _Terminal("y\n"))
    assert interpret(runs, "out", *MODELS) == 0
    assert len(endpoint.received) == N_REQUESTS


class _Terminal:
    """A user at a terminal, who types this."""

    def __init__(self, typed: str):
        self._typed = typed

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._typed


def test_offline_needs_no_key_no_package_and_no_network(
    runs: list[str], in_tmp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert interpret(runs, "out", "--offline") == 0
    scores = pd.read_csv("out/scores.csv")
    assert set(scores["explainer"]) == {"token statistics"}
    assert set(scores["scored_by"]) == {"token lookup"}
    assert set(scores["measure"]) == {"AUC", "correlation"}
    assert not Path("out/answers").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a language model with --explainer-model, or use --offline"),
        (["--offline", "--scorers", "detection"], "--offline asks no language model: drop --scorers"),
        (["--offline", "--latents", "few"], "--latents 'few' is neither a number of latents"),
        (["--offline", "--latents", "0"], "--latents is 0, expected at least 1"),
        (["--offline", "--latents", "32,"], r"has latents 0 to 31, not \[32\]"),
        (["--offline", "--n-top", "0"], "--n-top is 0, expected at least 1"),
        ([*MODELS, "--param", "temperature"], "--param 'temperature' is malformed"),
        ([*MODELS, "--param", "n=2"], "--param cannot set 'n'"),
        ([*MODELS, "--price-in", "1"], "give both --price-in and --price-out"),
        ([*MODELS, "--max-per-minute", "0"], "--max-per-minute is 0, expected more than 0"),
    ],
)
def test_mistakes_are_one_line(
    runs: list[str], endpoint: LoopbackEndpoint, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert interpret(runs, "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert endpoint.received == []


def test_a_key_comes_from_the_env_file(
    runs: list[str], endpoint: LoopbackEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another one")
    assert interpret(runs[:1], "out", *MODELS, "--yes") == 2
    assert "refuses the key in OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert interpret(runs[:1], "out", *MODELS, "--yes") == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    Path(".env").write_text(f"OPENAI_API_KEY={KEY}\n")
    assert interpret(runs[:1], "out", *MODELS, "--yes", "--scorers", "detection") == 0
    monkeypatch.delenv("OPENAI_API_KEY")
