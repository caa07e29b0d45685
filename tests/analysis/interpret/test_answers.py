"""Nothing is asked twice, and what is estimated is what is asked."""

import threading
from pathlib import Path

import pytest

from e2e_sae.analysis.interpret.answers import Answer, Asked, Estimate, Request, StoredAnswers
from e2e_sae.errors import CheckpointError


def request(text: str = "hello", model: str = "m", **parameters: object) -> Request:
    return Request(model, ({"role": "user", "content": text},), parameters)


def test_what_was_asked_is_recalled_by_its_content(tmp_path: Path) -> None:
    stored = StoredAnswers(tmp_path)
    stored.put(request(), Answer("hi", 3, 1))
    again = StoredAnswers(tmp_path)
    assert again.get(request()) == Answer("hi", 3, 1)
    for other in (request("Hello"), request(model="n"), request(temperature=0)):
        assert again.get(other) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_a_damaged_answer_is_named(tmp_path: Path) -> None:
    stored = StoredAnswers(tmp_path)
    stored.put(request(), Answer("hi", 3, 1))
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    with pytest.raises(CheckpointError, match=file.name):
        stored.get(request())


def test_each_question_is_asked_once_from_any_number_of_threads(tmp_path: Path) -> None:
    asked: list[str] = []
    told: list[int] = []
    both = threading.Barrier(4)

    def ask(one: Request) -> Answer:
        asked.append(one.messages[0]["content"])
        return Answer("yes", 7, 2)

    source = Asked(StoredAnswers(tmp_path), ask, lambda: told.append(1))

    def worker() -> None:
        both.wait()
        for text in "abc":
            assert source(request(text), "typical").text == "yes"

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == ["a", "b", "c"]
    assert (source.n_asked, source.n_recalled, source.n_in, source.n_out, len(told)) == (3, 9, 21, 6, 12)


def test_an_answer_is_kept_before_the_next_question(tmp_path: Path) -> None:
    def ask(one: Request) -> Answer:
        if one.messages[0]["content"] == "b":
            raise RuntimeError("killed")
        return Answer("yes", 0, 0)

    source = Asked(StoredAnswers(tmp_path), ask, lambda: None)
    source(request("a"), "")
    with pytest.raises(RuntimeError, match="killed"):
        source(request("b"), "")
    assert StoredAnswers(tmp_path).get(request("a")) is not None
    assert StoredAnswers(tmp_path).get(request("b")) is None


def test_an_estimate_counts_what_is_not_stored_by_model(tmp_path: Path) -> None:
    stored = StoredAnswers(tmp_path)
    stored.put(request("known"), Answer("kept", 3, 1))
    estimate = Estimate(stored)
    assert estimate(request("known"), "typical").text == "kept"
    # Four characters a token, rounded up for each message and answer.
    assert estimate(request("12345"), "12345678").text == "12345678"
    estimate(request("1", model="n"), "1")
    assert (dict(estimate.n_asked), estimate.n_recalled) == ({"m": 1, "n": 1}, 1)
    assert (dict(estimate.n_in), dict(estimate.n_out)) == ({"m": 2, "n": 1}, {"m": 2, "n": 1})
    assert len(list(tmp_path.rglob("*.json"))) == 1
