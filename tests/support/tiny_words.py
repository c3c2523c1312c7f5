"""Words of the tiny labelled file: each example has some of its label, some of its domain, and fillers."""

from __future__ import annotations

LABEL_WORDS = {
    "negative": ["awful", "boring", "broken", "dull", "sad", "terrible", "ugly", "weak"],
    "positive": ["bright", "charming", "clever", "great", "happy", "lovely", "superb", "warm"],
}
DOMAIN_WORDS = {
    "films": ["actor", "camera", "film", "plot", "scene", "story"],
    "phones": ["battery", "button", "case", "phone", "screen", "sound"],
}
FILLERS = ["a", "and", "but", "is", "it", "of", "on", "so", "that", "the", "this", "very", "was", "with"]
