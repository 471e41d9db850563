"""What travels: messages, frames and tensors as bytes.

Everything a peer can send us passes through here and comes out typed and bounded, or not at all
(ProtocolError). No sockets, no clocks, no decisions.
"""
