"""Keeps the texts of chosen languages. The detector is py3langid, whose model is in its package (extra `data`).

Source: Lui and Baldwin, "langid.py: An Off-the-shelf Language Identification Tool" (ACL 2012): naive Bayes over byte
n-grams.
"""

from collections.abc import Sequence

from gptdist.data.clean import Dropped
from gptdist.errors import MissingError, UserError

_SEEN_CHARS = 2000  # the language of a text shows in its beginning, and detection costs about 0.5 us a character


class LanguageFilter:
    """Drops texts that are in none of `languages`, or that are so with a probability below `least`."""

    names = ("language",)

    def __init__(self, languages: Sequence[str], least: float):
        """languages: ISO 639-1 codes. Raises UserError for one that the detector does not know."""
        try:
            from py3langid import langid
        except ImportError as error:
            raise MissingError("--languages needs the package py3langid: pip install 'gptdist[data]'") from error
        self._detector = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        self._languages, self._least = set(languages), least
        known = set(self._detector.labels)
        if unknown := sorted(self._languages - known):
            raise UserError(f"--languages has {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")

    def __call__(self, texts: list[str]) -> list[str | Dropped]:
        return [self._judge(text) for text in texts]

    def _judge(self, text: str) -> str | Dropped:
        language, probability = self._detector.classify(text[:_SEEN_CHARS])
        if language in self._languages and probability >= self._least:
            return text
        return Dropped("language", f"{language}, probability {probability:.2f}")
