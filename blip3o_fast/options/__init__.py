"""What commands take: ``options.NAME`` belongs to ``cli.NAME``.

Each module has ``add_arguments(parser)``, the record of the options, and perhaps ``ANSWERS``: what
to say to flags that the command does not take. None of them imports torch, which takes longer than
reading the help.
"""
