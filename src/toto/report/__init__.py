"""Results -> pictures and pages that a person looks at."""
