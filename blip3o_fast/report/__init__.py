"""Reports: self-contained pages, pictures and tables, in one style.

``page`` fills the templates, ``style`` has the colours and what all matplotlib pictures share,
``charts`` draws lines as SVG without matplotlib, ``columns`` aligns text for a terminal.
"""
