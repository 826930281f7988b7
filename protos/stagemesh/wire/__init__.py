"""What both ends of the contract share: the protocol version, columns, frames, errors and their statuses.

It stands beside the protos because it is the part of the contract that protobuf cannot say. It needs
grpcio and protobuf alone; the modules that use numpy say so.
"""
