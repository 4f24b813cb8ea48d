"""Everything that is said about pictures: captions, questions, statements, web captions and probes.

This is the front door. The parts live next door: `claims` (facts to words), `questions`, `statements`, `web`, `probes`.
"""

from __future__ import annotations

from minivlp.data.picturebook.claims import claim_of, say, stream
from minivlp.data.picturebook.probes import PROBES, Probe, probe
from minivlp.data.picturebook.questions import ANSWERS, QUESTION_TYPES, Question, questions
from minivlp.data.picturebook.sample import relations
from minivlp.data.picturebook.statements import Statement, statements
from minivlp.data.picturebook.web import WEB_NOISE, web_caption
from minivlp.data.picturebook.world import Scene

__all__ = [
    "ANSWERS",
    "LEVELS",
    "PROBES",
    "QUESTION_TYPES",
    "WEB_NOISE",
    "Probe",
    "Question",
    "Statement",
    "captions",
    "probe",
    "questions",
    "statements",
    "web_caption",
]

LEVELS = 5  # captions per scene


def captions(scene: Scene) -> list[str]:
    """Five captions, each with more detail: kinds; + colours; + sizes; + a relation, or the place where there is
    none; everything (relations, place, time of day, weather, and the style where it is not the plain one).

    Every noun phrase counts all that it fits: "two cats" is never said of three, nor "a red cat" of two red cats.
    """
    rng = stream(scene, "captions")
    facts = relations(scene) if len(scene.things) > 1 else []
    return [say(claim_of(scene, level, rng, facts), rng) for level in range(LEVELS)]
