"""From text to masked batches: corpus -> token store -> batches -> masking."""
