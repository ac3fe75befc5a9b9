"""What the student is trained to match: one small class an objective."""

from fastdistil.objectives.attention_transfer import AttentionTransferObjective
from fastdistil.objectives.base import Objective, ObjectiveLoss, projections
from fastdistil.objectives.cosine import CosineObjective
from fastdistil.objectives.embeddings import EmbeddingsObjective
from fastdistil.objectives.feature_maps import FeatureMapsObjective
from fastdistil.objectives.hidden import HiddenObjective
from fastdistil.objectives.next_sentence import NextSentenceObjective
from fastdistil.objectives.prediction import PredictionObjective
from fastdistil.objectives.relations import RelationsObjective
from fastdistil.objectives.vocabulary import VocabularyObjective

__all__ = [
    "AttentionTransferObjective",
    "CosineObjective",
    "EmbeddingsObjective",
    "FeatureMapsObjective",
    "HiddenObjective",
    "NextSentenceObjective",
    "Objective",
    "ObjectiveLoss",
    "PredictionObjective",
    "RelationsObjective",
    "VocabularyObjective",
    "projections",
]
