"""What the student is trained to match: one small class an objective."""

from fastdistil.objectives.base import Objective, ObjectiveLoss
from fastdistil.objectives.cosine import CosineObjective
from fastdistil.objectives.vocabulary import VocabularyObjective

__all__ = ["CosineObjective", "Objective", "ObjectiveLoss", "VocabularyObjective"]
