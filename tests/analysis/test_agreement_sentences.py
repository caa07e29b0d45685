"""Sentences for subject-verb agreement: grammar by hand, and any tokenizer that has the words."""

import pytest

from e2e_sae.analysis.agreement_sentences import (
    NOUNS,
    TEMPLATES,
    TRANSITIVE,
    VERBS,
    Words,
    agreement_sentences,
    made,
    words_of,
)
from e2e_sae.analysis.item import NotApplicable
from tests.tiny_models import BOS, make_tokenizer, make_word_tokenizer

FEW_WORDS = [
    "The", "the", "that", "near", "with", "boy", "boys", "girl", "girls", "car", "cars", "man",
    "is", "are", "has", "have", "likes", "like", "sees", "see",
]  # fmt: skip
SINGULAR = {pair[0] for pair in (*NOUNS, *VERBS, *TRANSITIVE)}
EVERYTHING = Words({"the": 1, "that": 2}, list(NOUNS), list(VERBS), list(TRANSITIVE), ["near"])


def test_only_words_in_both_numbers_are_used() -> None:
    words = words_of(make_word_tokenizer(FEW_WORDS))
    assert words.nouns == [("boy", "boys"), ("girl", "girls"), ("car", "cars")], "'man' has no plural here"
    assert words.verbs == [("is", "are"), ("has", "have")]
    assert words.transitive == [("likes", "like"), ("sees", "see")]
    assert words.prepositions == ["near", "with"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_verb_agrees_with_its_noun(template: str) -> None:
    sentences = made(template, EVERYTHING, n=300, seed=1)
    assert len(set(sentences)) == 300
    shape = {"simple": 1, "nounpp": 4, "rc": 5, "within_rc": 4}[template]
    subjects = {"simple": 0, "nounpp": 0, "rc": 0, "within_rc": -1}
    for sentence in sentences:
        assert len(sentence.words) == shape
        subject = sentence.words[subjects[template]]
        assert (subject in SINGULAR) == (sentence.correct in SINGULAR) != (sentence.wrong in SINGULAR)
        pair = tuple(sorted((sentence.correct, sentence.wrong), key=lambda word: word not in SINGULAR))
        assert pair in (TRANSITIVE if template == "within_rc" else VERBS)
        if template == "rc":
            assert (sentence.words[3] in SINGULAR) == (sentence.words[4] in SINGULAR), "the inner verb agrees too"
    n_singular = sum(sentence.correct in SINGULAR for sentence in sentences)
    assert 100 < n_singular < 200
    if template != "simple":  # the other noun says nothing about the verb
        other = 3 if template in ("nounpp", "rc") else 0
        n_alike = sum((s.words[other] in SINGULAR) == (s.correct in SINGULAR) for s in sentences)
        assert 100 < n_alike < 200


def test_all_sentences_are_found_where_they_are_fewer_than_wanted() -> None:
    """3 nouns and 2 verbs: 3 x 2 x 2 = 12 simple sentences, and within_rc 3 x 2 nouns in 4 numbers, 2 verbs: 48."""
    words = words_of(make_word_tokenizer(FEW_WORDS))
    assert len(made("simple", words)) == 12
    assert len(made("within_rc", words)) == 48


def test_tokens_read_as_the_sentence() -> None:
    tokenizer = make_word_tokenizer(FEW_WORDS)
    found = agreement_sentences(tokenizer)
    assert list(found) == ["nounpp", "rc", "within_rc"], "12 simple sentences are too few"
    for template, sentences in found.items():
        texts = [str(tokenizer.decode(row)) for row in sentences.tokens]
        assert all(text.startswith(f"{BOS} The ") for text in texts)
        assert sentences.tokens.shape[1] == {"nounpp": 6, "rc": 7, "within_rc": 6}[template]
        assert len(sentences.correct) == len(sentences.wrong) == len(texts)
        assert BOS not in " ".join(text.removeprefix(BOS) for text in texts)
        assert sentences.example.startswith("The ")
    rc = found["rc"]
    assert any(
        f"{text} {tokenizer.decode(correct)}/{tokenizer.decode(wrong)}" == f"{BOS} {rc.example}"
        for text, correct, wrong in zip([tokenizer.decode(row) for row in rc.tokens], rc.correct, rc.wrong, strict=True)
    )


def test_the_same_seed_gives_the_same_sentences_and_another_one_does_not() -> None:
    assert made("rc", EVERYTHING, 50, seed=1) == made("rc", EVERYTHING, 50, seed=1)
    assert made("rc", EVERYTHING, 50, seed=1) != made("rc", EVERYTHING, 50, seed=2)


def test_a_tokenizer_without_the_words_is_not_applicable() -> None:
    message = rf"0 of {len(NOUNS)} nouns, 0 of {len(VERBS)} main verbs and 0 of {len(TRANSITIVE)} other verbs"
    with pytest.raises(NotApplicable, match=message):
        agreement_sentences(make_tokenizer())
