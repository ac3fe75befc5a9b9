"""Teacher and student models: loading, heads, student initialisation, taps."""
