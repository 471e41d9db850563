"""The worker's side: hold a span of blocks and run it for whoever asks, many sessions in one batch.

``server`` starts and stops everything; ``handler`` is the door to the network; ``session`` knows
where each sequence stands; ``scheduler`` decides what runs next and ``executor`` runs it on the one
thread that owns the device. Must not know tokens, sampling or the client's side.
"""
