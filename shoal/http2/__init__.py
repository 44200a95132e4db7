"""HTTP/2 (RFC 9113) and gRPC framing without I/O, for the fast transport of both ends."""
