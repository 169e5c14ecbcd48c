"""Studies: many short runs on one base, compared: which text teaches what, what it costs."""
