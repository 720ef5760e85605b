"""The parts of documentation pages that a program writes, between two comments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        page: the file, for messages.
        begin, end: the comments around it; each is there once.
    """

    page: str
    begin: str
    end: str

    def replaced(self, page: str, text: str) -> str:
        """Return the text of the page with another section.

        Raises:
            ValueError: a comment is missing.
        """
        for marker in (self.begin, self.end):
            if page.count(marker) != 1:
                raise ValueError(f"{self.page}: the marker {marker!r} must be there once")
        before, rest = page.split(self.begin)
        _, after = rest.split(self.end)
        return f"{before}{self.begin}\n\n{text}\n\n{self.end}{after}"
