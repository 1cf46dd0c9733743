"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. One line: what is wrong, where (file:line or config key), how to mend it."""


def first_line(error: BaseException) -> str:
    """What a library's error says, short: many go on for a page."""
    text = str(error).strip() or type(error).__name__
    if "custom code" in text or "trust_remote_code" in text:
        return "it brings Python code of its own, which is never run: give a model that transformers itself has"
    return text.splitlines()[0]
