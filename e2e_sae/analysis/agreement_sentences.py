"""Beginnings of sentences whose next word must agree with a noun in number, made for any tokenizer.

    simple      The boys                        are / is
    nounpp      The boys near the car           are / is            across a prepositional phrase
    rc          The boys that the man likes     are / is            across a relative clause
    within_rc   The boys that the man           likes / like        within a relative clause

The templates are those of Finlayson et al. 2021 (arXiv 2106.06087) in the form of Marks et al. 2024 (arXiv 2403.19647),
whose sentences the paper uses (arXiv 2405.12241, table 7, 1,000 of each template); these here are our own. The numbers
of both nouns are drawn independently. Only words that are one token after "The" are used, so that a place in the
template is one position for all sentences.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from e2e_sae.analysis.item import NotApplicable

N_SENTENCES = 400
"""Of a template at most."""
MIN_SENTENCES = 16
"""A template with fewer is left out."""
FIRST = "The"
"""First word; it may be several tokens."""


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((pair.split("/")[0], pair.split("/")[1]) for pair in text.split())


NOUNS = _pairs(
    "boy/boys girl/girls man/men woman/women child/children parent/parents friend/friends author/authors "
    "teacher/teachers student/students doctor/doctors lawyer/lawyers officer/officers writer/writers artist/artists "
    "actor/actors player/players driver/drivers manager/managers customer/customers worker/workers guard/guards "
    "king/kings dog/dogs cat/cats car/cars door/doors book/books table/tables house/houses tree/trees key/keys "
    "file/files line/lines name/names value/values type/types object/objects method/methods argument/arguments "
    "function/functions string/strings item/items attribute/attributes header/headers option/options error/errors"
)
"""Singular and plural: people first, then things, some of which a model of program texts knows."""
VERBS = _pairs("is/are was/were has/have does/do")
"""Of the main clause."""
TRANSITIVE = _pairs(
    "likes/like knows/know sees/see loves/love hates/hate needs/need wants/want finds/find follows/follow uses/use "
    "makes/make takes/take calls/call returns/return contains/contain"
)
"""Of the relative clause."""
PREPOSITIONS = ("near", "behind", "beside", "with", "by", "in", "on", "from", "for")
TEMPLATES = ("simple", "nounpp", "rc", "within_rc")
_DRAWS = 20
"""Draws for each sentence that is wanted, before those found are taken for all that there are."""


class Words(NamedTuple):
    """The words that a tokenizer has as single tokens: ids by word, and those that come in both numbers."""

    ids: dict[str, int]
    """Token id of each word after another one."""
    nouns: list[tuple[str, str]]
    verbs: list[tuple[str, str]]
    transitive: list[tuple[str, str]]
    prepositions: list[str]


class Sentence(NamedTuple):
    """The beginning of a sentence and its next word in both numbers."""

    words: tuple[str, ...]
    """After `FIRST`."""
    correct: str
    wrong: str


class Sentences(NamedTuple):
    """Sentences of one template as tokens."""

    tokens: Int[Tensor, "n pos"]
    """All of equal length: BOS if there is one, `FIRST`, the words."""
    correct: Int[Tensor, " n"]
    """The next token that agrees."""
    wrong: Int[Tensor, " n"]
    """The one of the other number."""
    example: str
    """One of them."""

    def to(self, device: torch.device) -> "Sentences":
        """Returns them on a device."""
        return Sentences(self.tokens.to(device), self.correct.to(device), self.wrong.to(device), self.example)

    def split(self, n: int) -> list["Sentences"]:
        """Returns them in parts of at most `n`."""
        parts = zip(self.tokens.split(n), self.correct.split(n), self.wrong.split(n), strict=True)
        return [Sentences(tokens, correct, wrong, self.example) for tokens, correct, wrong in parts]


def words_of(tokenizer: Any) -> Words:
    """Returns the words that are one token after `FIRST`, with the tokenizer's own way of joining words."""
    before = _encoded(tokenizer, FIRST)
    unknown = tokenizer.unk_token_id
    ids: dict[str, int] = {}
    pairs = [*NOUNS, *VERBS, *TRANSITIVE]
    for word in dict.fromkeys(["the", "that", *PREPOSITIONS, *(word for pair in pairs for word in pair)]):
        encoded = _encoded(tokenizer, f"{FIRST} {word}")
        if len(encoded) == len(before) + 1 and encoded[:-1] == before and unknown not in encoded:
            ids[word] = encoded[-1]

    def usable(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [pair for pair in pairs if all(word in ids for word in pair)]

    prepositions = [word for word in PREPOSITIONS if word in ids]
    return Words(ids, usable(NOUNS), usable(VERBS), usable(TRANSITIVE), prepositions)


def made(template: str, words: Words, n: int = N_SENTENCES, seed: int = 0) -> list[Sentence]:
    """Returns `n` different sentences of a template, drawn at random; as good as all that there are, if they are fewer;
    none if words are missing."""
    fixed, choices = {
        "simple": ((), (words.verbs,)),
        "nounpp": (("the",), (words.verbs, words.prepositions)),
        "rc": (("that", "the"), (words.verbs, words.transitive)),
        "within_rc": (("that", "the"), (words.transitive,)),
    }[template]
    if len(words.nouns) < 2 or not all(choices) or any(word not in words.ids for word in fixed):
        return []
    rng = random.Random(seed)
    sentences: dict[Sentence, None] = {}
    for _ in range(_DRAWS * n):
        sentences[_drawn(template, words, rng)] = None
        if len(sentences) == n:
            break
    return list(sentences)


def _drawn(template: str, words: Words, rng: random.Random) -> Sentence:
    noun, other = rng.sample(words.nouns, 2)
    k, m = rng.randrange(2), rng.randrange(2)  # 0: singular
    if template == "within_rc":
        verb = rng.choice(words.transitive)
        return Sentence((noun[k], "that", "the", other[m]), verb[m], verb[1 - m])
    verb = rng.choice(words.verbs)
    if template == "simple":
        return Sentence((noun[k],), verb[k], verb[1 - k])
    if template == "nounpp":
        between = (rng.choice(words.prepositions), "the", other[m])
    else:
        between = ("that", "the", other[m], rng.choice(words.transitive)[m])
    return Sentence((noun[k], *between), verb[k], verb[1 - k])


def agreement_sentences(tokenizer: Any, n: int = N_SENTENCES, seed: int = 0) -> dict[str, Sentences]:
    """Returns the sentences of each template that the tokenizer has enough words for.

    Raises:
        NotApplicable: it has them for none.
    """
    words = words_of(tokenizer)
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    head = [*([] if start is None else [start]), *_encoded(tokenizer, FIRST)]
    found: dict[str, Sentences] = {}
    for template in TEMPLATES:
        sentences = made(template, words, n, seed)
        if len(sentences) < MIN_SENTENCES:
            continue
        tokens = [[*head, *(words.ids[word] for word in sentence.words)] for sentence in sentences]
        correct, wrong = ([words.ids[getattr(s, name)] for s in sentences] for name in ("correct", "wrong"))
        one = sentences[len(sentences) // 2]
        example = f"{FIRST} {' '.join(one.words)} {one.correct}/{one.wrong}"
        found[template] = Sentences(torch.tensor(tokens), torch.tensor(correct), torch.tensor(wrong), example)
    if not found:
        raise NotApplicable(
            "it wants a tokenizer with common words as single tokens: this one has "
            f"{len(words.nouns)} of {len(NOUNS)} nouns, {len(words.verbs)} of {len(VERBS)} main verbs and "
            f"{len(words.transitive)} of {len(TRANSITIVE)} other verbs in both numbers, too few for "
            f"{MIN_SENTENCES} sentences of any template"
        )
    return found


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
