"""`searchrl report`: a run as one page, curves, tables and every trajectory, that opens without a network.

``rundir`` reads a run, ``transcripts`` its trajectories, ``tokens`` finds out what token ids say, ``panels``
says which curves there are; ``page`` writes all that into a file, ``live`` serves it while the run goes on.
The page itself is plain HTML, CSS and JavaScript, in files beside these.
"""
