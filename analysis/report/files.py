"""Files that are whole or not there."""

from tucka.files import write_atomically

__all__ = ["write_atomically"]
