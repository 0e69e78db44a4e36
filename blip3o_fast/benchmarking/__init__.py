"""Measurement: the library beside its limits and its peers, in one run.

    shapes, work            sizes, and the flops and bytes that cannot be avoided
    ceilings                the rates of copies and matrix products on this device
    cases, *_cases          everything that is timed, by contender
    peers, checkout         the contenders of other libraries
    clock, watch            how it is timed
    selection, suite        a whole run, which becomes a record
    environment             where it was measured
    record, compare         the record as JSON, and its comparison with another
    record_text, *_plots    the record as tables and pictures

Every time stands beside its limit, ``max(flops / rate, bytes / bandwidth)``, with the rate and the
bandwidth of the same run. For data from the host the limit is ``bytes / transfer``.
"""
