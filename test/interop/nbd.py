"""The least of NBD's client side, by hand: for guests that outlive their server, or overtake it."""
import socket
import struct

OPTION = 0x49484156454F5054
REQUEST = 0x25609513
EXPORT_NAME, STRUCTURED_REPLY, SET_META_CONTEXT = 1, 8, 10
ACK, ERROR = 1, 1 << 31


def receive(connection, length):
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError("the server hung up")
        data += piece
    return bytes(data)


def _option(connection, option, data=b""):
    """Until it is acknowledged; returns the other replies' data."""
    connection.sendall(struct.pack(">QII", OPTION, option, len(data)) + data)
    out = []
    while True:
        _magic, _option, kind, length = struct.unpack(">QIII", receive(connection, 20))
        data = receive(connection, length)
        if kind == ACK:
            return out
        if kind & ERROR:
            raise ConnectionError(f"option {option} is refused: {data.decode(errors='replace')}")
        out.append(data)


def _negotiate(connection, contexts):
    receive(connection, 18)
    connection.sendall(struct.pack(">I", 3))
    if contexts:
        _option(connection, STRUCTURED_REPLY)
        queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
        _option(connection, SET_META_CONTEXT,
                struct.pack(">II", 0, len(contexts)) + queries)
    connection.sendall(struct.pack(">QII", OPTION, EXPORT_NAME, 0))
    size, _flags = struct.unpack(">QH", receive(connection, 10))
    return size


def dial(address, seconds, contexts=()):
    """To a unix path or a (host, port): (socket, size of the disk), ready for requests. With meta contexts:
    replies are structured."""
    connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    connection.settimeout(seconds)
    try:
        connection.connect(address)
        return connection, _negotiate(connection, contexts)
    except OSError:
        connection.close()
        raise


def request(command, cookie, offset, length, data=b"", flags=0):
    return struct.pack(">IHHQQI", REQUEST, flags, command, cookie, offset, length) + data
