"""The benchmark: `python -m benchmarks [SUITE ...] [--quick] [--only EXPERIMENT] [--write FOLDER]`.

The pieces know nothing of what is measured with them:

    texts, shapes       what is served: mixed-length texts, models of known shapes with random weights
    server, echo        a real `mlserver start`; MLServer's own ceiling
    http, load, v2      a lean HTTP client, closed and open loops over it, V2 requests for it
    grpc                the same over gRPC
    inprocess           the same model without a server
    rounds              systems take turns; medians and spread
    machine, report     where it ran; JSON lines, tables, Markdown
    plots               PNG files, with the extra `bench`

`suites` lists the suites, packages of experiments, one file each; `session` is what they share.
"""
