"""What the student is trained to match: one small class an objective."""

from fastdistil.objectives.attention_transfer import AttentionTransferObjective
from fastdistil.objectives.base import Objective, ObjectiveLoss, projections
from fastdistil.objectives.cosine import CosineObjective
from fastdistil.objectives.embeddings import EmbeddingsObjective
from fastdistil.objectives.hidden import HiddenObjective
from fastdistil.objectives.relations import RelationsObjective
from fastdistil.objectives.vocabulary import VocabularyObjective

__all__ = [
    "AttentionTransferObjective",
    "CosineObjective",
    "EmbeddingsObjective",
    "HiddenObjective",
    "Objective",
    "ObjectiveLoss",
    "RelationsObjective",
    "VocabularyObjective",
    "projections",
]
