"""emma.py RDB OUT: writes Jane Austen's "Emma" (883 kB) from the novels that the Debian package r-cran-janeaustenr carries.

RDB is R's lazy-load database: for each object, four bytes of length, then its zlib-compressed serialisation. Of that
only what a character vector needs is read: a header, then for each string its flags, length and bytes.
"""
import struct
import sys
import zlib

rdb, out = sys.argv[1:]
with open(rdb, "rb") as file:
    size = struct.unpack(">I", file.read(4))[0]
    novel = zlib.decompress(file.read(size))  # the first object: they are sorted by name

encoding = struct.unpack_from(">I", novel, 14)[0]  # after the format's two bytes and three version words
at = 18 + encoding
count = struct.unpack_from(">I", novel, at + 4)[0]
at += 8
lines = []
for _ in range(count):
    length = max(0, struct.unpack_from(">i", novel, at + 4)[0])
    at += 8
    lines.append(novel[at : at + length])
    at += length
with open(out, "wb") as file:
    file.write(b"\n".join(lines))
