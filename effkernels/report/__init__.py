"""Pictures and pages: what a person looks at, of measured rows or of a launch plan, never of both.

`svg.py` draws, `charts.py` has the kinds of charts; `measured.py` makes charts and tables of result rows, `planned.py`
of launch plans; `parts.py` are the pictures and tables themselves, with their origin, and `page.py` puts those of one
origin on a page. Everything is text: SVG and HTML without scripts, light or dark as the reader's system is.
"""
