"""Task texts made into more task texts, unlabelled, for a teacher to answer."""
