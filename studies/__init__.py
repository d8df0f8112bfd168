"""Commands that use the rest, and that nothing imports: python -m studies.NAME."""
