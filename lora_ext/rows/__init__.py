"""Which adapter each row of a batch has."""
