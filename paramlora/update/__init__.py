"""One update of one tensor: what it is, its arithmetic, its value; no model is known here."""
