"""Whether a text says that a patient died: words of death, and what beside them makes them say something else.

A text is read clause by clause (commas, brackets, colons and lone dashes end one), in the words of `plain_words`. The
first word of death of a clause decides it, by what stands around it:

- `Died, expected`, `Deceased - no autopsy`: dead.
- `not deceased`, `no evidence of death`, `nicht verstorben`: alive, by a denying word of its language that belongs to
  it; `Deceased: no` by the answer.
- `risk of death`, `mother died`, `insurance expired`, `Dead Sea`: unclear, by a doubt, another person, what expires
  without a death, a name; so is a text whose denying word belongs to something else (`no autopsy deceased`).

A clause that says dead beside one that says alive, a word of life beside one of death, and a question are unclear. What
is unclear is no death; who reads the text counts and tells it.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from ehrseq.data.fhir.concepts import plain_words

DEAD, ALIVE, UNCLEAR = "dead", "alive", "unclear"
"""What a text with a word of death says."""

DEATH_WORDS: dict[str, tuple[str, ...]] = {
    "English": ("expired", "deceased", "decessed", "died", "dead", "death", "passed away"),
    "German": ("verstorben", "verstorbene", "verstorbener", "verstarb", "starb", "gestorben", "Ableben", "Tod",
               "Todesfall", "Exitus"),
    "French": ("décédé", "décédée", "décès", "mort", "morte"),
    "Spanish": ("fallecido", "fallecida", "fallecimiento", "falleció", "defunción", "muerto", "muerta", "muerte",
                "murió", "deceso", "éxitus", "óbito"),
    "Catalan": ("èxitus", "defunció", "mort", "morta"),
    "Portuguese": ("óbito", "falecido", "falecida", "falecimento", "faleceu", "morto", "morta", "morte", "morreu"),
    "Italian": ("deceduto", "deceduta", "decesso", "morto", "morta", "morte", "exitus"),
    "Romanian": ("decedat", "decedată", "deces"),
    "Dutch": ("overleden", "overlijden", "gestorven", "dood"),
    "Swedish": ("avliden", "avlidit", "avled", "död", "dödsfall"),
    "Danish, Norwegian": ("død", "døde", "dødsfall", "dødsfald", "afdød", "avdød"),
    "Finnish": ("kuollut", "kuolema", "menehtynyt"),
    "Polish": ("zmarł", "zmarła", "umarł", "umarła", "zgon"),
    "Czech, Slovak": ("zemřel", "zemřela", "úmrtí", "zomrel", "zomrela", "úmrtie", "smrt"),
    "Croatian, Serbian, Slovenian": ("umro", "umrla", "umrl", "preminuo", "preminula", "smrt"),
    "Hungarian": ("meghalt", "elhunyt", "exitált"),
    "Greek": ("απεβίωσε", "θάνατος", "αποβίωσε"),
    "Russian, Ukrainian": ("умер", "умерла", "смерть", "скончался", "скончалась", "помер", "померла"),
    "Bulgarian": ("починал", "починала", "почина", "смърт"),
    "Estonian": ("surnud",),
    "Latvian": ("miris", "mirusi", "nāve"),
    "Lithuanian": ("mirė", "mirtis"),
    "Icelandic": ("látinn", "andlát"),
    "Turkish": ("öldü", "ölüm", "vefat", "exitus"),
    "Vietnamese": ("tử vong",),
    "Indonesian, Malay": ("meninggal", "meninggal dunia"),
    "Arabic": ("وفاة", "الوفاة", "متوفى", "المتوفى", "متوفاة", "توفي", "توفيت"),
    "Persian": ("فوت", "درگذشت", "متوفی"),
    "Hebrew": ("נפטר", "נפטרה", "פטירה", "מוות"),
    "Hindi": ("मृत्यु", "मृत", "निधन"),
    "Thai": ("เสียชีวิต",),
    "Chinese, Japanese": ("死亡",),
    "Korean": ("사망",),
}  # fmt: skip
"""Language -> words that say that somebody died, compared without case and accents (but `död` is not `DOD`)."""

DENYING_WORDS: dict[str, tuple[str, ...]] = {
    "English": ("not", "no", "non", "never", "without", "isnt", "wasnt", "hasnt"),
    "German": ("nicht", "kein", "keine", "ohne"),
    "French": ("pas", "non", "sans", "aucun"),
    "Spanish": ("no", "sin"),
    "Catalan": ("no", "sense"),
    "Portuguese": ("não", "sem"),
    "Italian": ("non", "senza"),
    "Romanian": ("nu", "fără"),
    "Dutch": ("niet", "geen", "zonder"),
    "Swedish": ("inte", "ej", "icke", "ingen", "inget"),
    "Danish, Norwegian": ("ikke", "ej", "ingen"),
    "Finnish": ("ei",),
    "Polish": ("nie", "bez"),
    "Czech, Slovak": ("ne", "není", "nie", "bez"),
    "Croatian, Serbian, Slovenian": ("nije", "ni", "bez", "brez"),
    "Hungarian": ("nem",),
    "Greek": ("δεν", "όχι"),
    "Russian, Ukrainian": ("не", "нет", "без"),
    "Bulgarian": ("не", "няма", "без"),
    "Estonian": ("ei",),
    "Latvian": ("nav", "nē", "bez"),
    "Lithuanian": ("ne", "nėra", "be"),
    "Icelandic": ("ekki", "ekkert", "án"),
    "Turkish": ("hayır",),
    "Vietnamese": ("không", "chưa"),
    "Indonesian, Malay": ("tidak", "belum", "bukan"),
    "Arabic": ("لا", "لم", "غير", "بدون", "ليس"),
    "Persian": ("عدم", "بدون"),
    "Hebrew": ("לא", "ללא", "טרם"),
    "Hindi": (),
    "Thai": ("ไม่",),
    "Chinese, Japanese": ("非", "未", "无", "無"),
    "Korean": (),
}
"""Language -> words that deny what follows them; those of English count in every language."""

UNCLEAR_BEFORE: tuple[str, ...] = (
    # Doubt, and what has not happened
    "if", "whether", "or", "unless", "until", "unknown", "unclear", "query", "possible", "possibly", "probable",
    "likely", "presumed", "suspected", "near", "imminent", "impending", "risk", "fear", "threat", "danger", "prevent",
    "ob", "oder", "bis", "unbekannt", "möglich", "möglicher", "drohender", "verdacht", "risiko", "gefahr", "risque",
    "riesgo", "risco", "rischio", "ou",
    # Somebody or something else
    "mother", "father", "wife", "husband", "spouse", "partner", "sister", "brother", "son", "daughter", "child",
    "baby", "infant", "twin", "parent", "parents", "family", "relative", "friend", "donor", "fetal", "foetal", "fetus",
    "intrauterine", "cell", "tissue", "mutter", "vater", "vaters", "ehemann", "ehemannes", "ehefrau", "bruder",
    "bruders", "schwester", "sohn", "sohnes", "tochter", "kind", "kindes", "mère", "père", "madre", "padre", "mãe",
    "pai",
)  # fmt: skip
"""Words that make a word of death after them in the same clause unclear."""

EXPIRING: tuple[str, ...] = (
    "insurance", "coverage", "benefit", "benefits", "authorization", "authorisation", "certificate", "order", "orders",
    "hold", "commitment", "sentence", "licence", "license", "visa", "permit", "contract", "policy", "pass", "card",
    "consent", "prescription", "medication", "term", "time", "limit", "referral", "warrant", "stay", "days",
)  # fmt: skip
"""What expires without anybody's death."""

UNCLEAR_AFTER: tuple[str, ...] = (
    "not", "risk", "certificate", "benefit", "benefits", "expected", "imminent", "likely", "possible", "anticipated",
    "pending", "unlikely", "excluded", "donor", "ausgeschlossen", "erwartet", "möglich", "sea", "valley", "row", "wish",
    "rattle", "anxiety", "experience", "index", "rate", "sentence", "penalty", "değil", "yok", "riski",
    "نشده", "نکرده", "नहीं",
)  # fmt: skip
"""Words that make a word of death directly before them unclear."""

# `dead` is also part of names and of things: what may follow it where it says that somebody died.
_AFTER_DEAD = frozenset((
    "on", "in", "at", "upon", "after", "by", "within", "during", "prior", "before", "from", "of", "without",
    "due", "with", "body", "patient", "as", "when", "and", "or", "following", "to", "not",
))  # fmt: skip
_OF = frozenset((
    "of", "des", "der", "de", "du", "di", "da", "del", "della", "van",
))  # fmt: skip

_TITLES = frozenset(("dr", "doctor", "prof", "mr", "mrs", "ms", "st", "saint", "sankt", "rue"))
_ALIVE = frozenset((
    "alive", "living", "lives", "lebend", "lebt", "lebendig", "vivant", "vivante", "vivo", "viva", "vivos",
    "levend", "leeft", "levande", "lever", "zyje", "zywy", "zivy", "elossa",
))  # fmt: skip
_ANSWERS_NO = frozenset(("no", "n", "non", "nein", "nee", "nej", "nei", "nao", "false", "0", "nie", "ei", "nu", "ne"))
_ANSWERS_UNKNOWN = frozenset(("unknown", "unk", "unbekannt", "inconnu", "desconocido", "n a", "na", "not known"))
# Words that may stand between a denial and what it denies.
_BETWEEN = frozenset((
    "yet", "been", "be", "known", "found", "evidence", "of", "has", "is", "was", "were", "the", "a", "an", "any",
    "patient", "pt", "deemed", "considered", "recorded", "reported", "als", "war", "ist", "der", "die", "das",
    "zum", "der", "hinweis", "auf", "est", "ete", "un", "une", "le", "la", "ha", "he", "sido", "foi", "e",
    "stato", "a", "er", "blitt", "to", "have", "had", "signs", "sign", "report", "reports", "documented",
    "zeichen",
))  # fmt: skip

_CLAUSES = re.compile(
    r"(?<!\bdr)(?<!\bst)(?<!\bmr)(?<!\bprof)(?<!\bmrs)\.|[,;:()\[\]{}!|\n\r]|\s[-\u2013\u2014]+\s|[\u2013\u2014]|--+"
    r"|\b(?:but|aber|mais|pero)\b",
    re.IGNORECASE,
)


# Of languages that write without blanks: a word of death, and what denies it directly before it.
_UNSPACED = re.compile("([非未无無]|ไม่)?(死亡|사망|เสียชีวิต)")
_AFTER_UNSPACED = frozenset(
    ("退院", "出院", "離院", "离院", "転帰", "した", "しました", "例", "患者", "환자", "퇴원", "함")
)
"""What may follow such a word directly where it says that somebody died."""


def _words(text: str) -> str:
    """Plain words, those of several joined, `\u00f6` kept apart from `o`: DOD is no Swedish death."""
    text = _UNSPACED.sub(lambda found: f" {found[1] or ''} {found[2]} ", text)
    words = plain_words(unicodedata.normalize("NFC", text.casefold()).replace("\u00f6", "\u00f8"))
    for phrase in _PHRASES:
        words = words.replace(phrase, phrase.replace(" ", "_"))
    return words


_PHRASES = tuple(plain_words(word) for words in DEATH_WORDS.values() for word in words if " " in word)


def _read_table() -> dict[str, frozenset[str]]:
    denials: dict[str, set[str]] = {}
    for language, words in DEATH_WORDS.items():
        for word in words:
            of_word = denials.setdefault(_words(word), set())
            of_word.update(map(_words, (*DENYING_WORDS["English"], *DENYING_WORDS[language])))
    return {word: frozenset(of_word) for word, of_word in denials.items()}


_DENIALS = _read_table()
_OF_UNSPACED = frozenset(map(_words, ("死亡", "사망", "เสียชีวิต")))
"""Word of death -> what denies it."""

_UNCLEAR_BEFORE, _UNCLEAR_AFTER = frozenset(map(_words, UNCLEAR_BEFORE)), frozenset(map(_words, UNCLEAR_AFTER))
_EXPIRING = frozenset(EXPIRING)


@lru_cache(maxsize=4096)
def says_death(text: str) -> str | None:
    """`DEAD`, `ALIVE` or `UNCLEAR`; None of a text without a word of death.

    Example:
        >>> says_death("Died (no autopsy)"), says_death("not deceased"), says_death("Dead Sea"), says_death("home")
        ('dead', 'alive', 'unclear', None)
    """
    plain = text.replace("'", "").replace("\u2019", "").replace("/", " or ")
    clauses = [words.split() for clause in _CLAUSES.split(plain) if (words := _words(clause))]
    said = [_clause_says(words) for words in clauses]
    for place in range(1, len(clauses)):
        answer = " ".join(clauses[place])
        if said[place - 1] == DEAD and answer in _ANSWERS_NO:
            said[place - 1] = ALIVE
        elif said[place - 1] == DEAD and answer in _ANSWERS_UNKNOWN:
            said[place - 1] = UNCLEAR
    told = {verdict for verdict in said if verdict is not None}
    if not told:
        return None
    alive = ALIVE in told or any(_ALIVE.intersection(words) for words in clauses)
    if "?" in text or "\uff1f" in text or (DEAD in told and alive):
        return UNCLEAR
    return next(verdict for verdict in (DEAD, UNCLEAR, ALIVE) if verdict in told)


def _clause_says(words: list[str]) -> str | None:
    """What a clause says by its first word of death."""
    place = next((place for place, word in enumerate(words) if word in _DENIALS), None)
    if place is None:
        return None
    word, before, after = words[place], words[:place], words[place + 1 :]
    denials = [at for at, other in enumerate(before) if other in _DENIALS[word]]
    if denials:
        return ALIVE if _BETWEEN.issuperset(before[denials[-1] + 1 :]) else UNCLEAR
    unclear = (
        not _UNCLEAR_BEFORE.isdisjoint(before)
        or bool(before and before[-1] in _TITLES)
        or (word == "expired" and not _EXPIRING.isdisjoint(before))
        or (word == "dead" and after and after[0] not in _AFTER_DEAD)
        or (after and after[0] in _UNCLEAR_AFTER)
        or (after and word in _OF_UNSPACED and after[0] not in _AFTER_UNSPACED)
        or (after and after[0] in _OF and not _UNCLEAR_BEFORE.isdisjoint(after))
    )
    return UNCLEAR if unclear else DEAD
