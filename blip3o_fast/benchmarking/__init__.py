"""Measurement: the library against its limits and its peers, in one run.

    shapes, work      what is run, and the flops and bytes that it cannot avoid
    ceilings          what this device reaches on copies and matrix products
    cases, *_cases    everything that is timed, by contender
    peers, checkout   contenders that are other people's
    clock, watch      how it is timed
    selection, suite  a whole run, into a record
    environment       where it was measured
    record, compare   the record as JSON, and one against another
    table, plots      the record for people

A time never stands without its limit: ``limit = max(flops / rate, bytes / bandwidth)`` with the
rate and the bandwidth that the same run measured, and ``bytes / transfer`` for what comes from the
host.
"""
