"""A function that says what it was given."""


def keywords(**given):
    given["log_extra"]("given", [sorted(given)] * len(given["completions"]))
    given["log_extra"]("ids", given["completion_ids"])
    return [0.0] * len(given["completions"])
