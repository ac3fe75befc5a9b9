"""Run the methods on one teacher and one task; the table, the pictures and the page."""
