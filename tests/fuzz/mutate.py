"""Deterministic damage to files: to their bytes, and to what the bytes mean."""

import copy
import io
import json
import random
import tarfile
import zipfile

TOKENS = (
    *(b"\xff" * 8, bytes(8), b"\x80\0\0\0", b"{", b"[" * 300, b'"', b"\n", b"NaN", b"1e999", b"-1"),
    *(
        b"../../x",
        b"\x1b[2J",
        b"\xed\xa0\x80",
        b"=cmd",
        b"'" * 3,
        b"(" * 100,
        b"cos\nsystem\n(S'true'\ntR.",
    ),
)
VALUES = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**70, 10**30, 0.5, -0.0, 1e308, "", "x"),
    *(
        "../../etc/passwd",
        "/tmp",
        "\ud800",
        "\0",
        "=cmd|x",
        "a" * 5000,
        [],
        {},
        [1],
        [[]],
        {"a": 1},
    ),
    *([[[[]]]], [1, 2, 3], ["1", None], {"": {}}, float("nan"), float("inf")),
)


def damage(data: bytes, chosen: random.Random) -> bytes:
    """One to four edits of the bytes."""
    out = bytearray(data)
    for _ in range(chosen.choice((1, 1, 2, 4))):
        at, length = chosen.randrange(len(out) + 1), chosen.choice((1, 1, 4, 16, 200))
        kind = chosen.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chosen.randrange(8)
        elif kind == 1:
            out[at : at + length] = chosen.randbytes(min(length, len(out) - at))
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = chosen.choice(TOKENS)
        elif kind == 5:
            out[at : at + length] = chosen.choice(TOKENS)
        else:
            start = chosen.randrange(len(out) + 1)
            out[at:at] = out[start : start + length]
    return bytes(out)


def change(value, chosen: random.Random):
    """A JSON value with one part replaced, removed, added or repeated."""
    if isinstance(value, dict | list) and value and chosen.random() < 0.85:
        names = list(value) if isinstance(value, dict) else range(len(value))
        name = chosen.choice(names)
        kind = chosen.random()
        if kind < 0.75:
            value[name] = change(value[name], chosen)
        elif kind < 0.85:
            del value[name]
        elif isinstance(value, dict):
            value[chosen.choice(("x", "", "\ud800", f"{name}_"))] = chosen.choice(VALUES[:14])
        else:
            value.append(value[name])
        return value
    return copy.deepcopy(chosen.choice(VALUES))


def damage_json(data: bytes, chosen: random.Random) -> bytes:
    """Damage to a JSON text, half of the time to what it says."""
    if chosen.random() < 0.4:
        return damage(data, chosen)
    value = json.loads(data)
    for _ in range(chosen.choice((1, 1, 2))):
        value = change(value, chosen)
    if chosen.random() < 0.03:
        value = {"a": value}
        text = json.dumps(value)
        return ("[" * 2000 + text + "]" * 2000).encode()
    return json.dumps(value).encode()


def damage_lines(data: bytes, chosen: random.Random) -> bytes:
    """Damage to one line of JSON."""
    lines = data.splitlines()
    at = chosen.randrange(len(lines))
    lines[at] = damage_json(lines[at], chosen)
    return b"\n".join(lines) + b"\n"


def damage_safetensors(data: bytes, chosen: random.Random) -> bytes:
    """Damage to a safetensors file, mostly to its header, whose length is then right."""
    if chosen.random() < 0.3:
        return damage(data, chosen)
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], chosen)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_tar(data: bytes, chosen: random.Random) -> bytes:
    """Damage to a tar, mostly to a header, whose checksum is then right."""
    if chosen.random() < 0.3:
        return damage(data, chosen)
    out = bytearray(data)
    starts = [at for at in range(0, len(out), 512) if out[at + 257 : at + 262] == b"ustar"]
    for at in chosen.sample(starts, k=min(len(starts), chosen.choice((1, 1, 3)))):
        kind = chosen.randrange(4)
        if kind == 0:  # the size: octal, or binary and perhaps negative
            sizes = (
                b"77777777777\0",
                b"\xff" * 12,
                b"\x80" + bytes(3) + b"\xff" * 8,
                b"-1".ljust(12),
            )
            out[at + 124 : at + 136] = chosen.choice(sizes)
        elif kind == 1:
            out[at + 156] = chosen.choice(b"LKxgS1257\0")
        elif kind == 2:
            names = (b"../../x.png", b"a" * 100, b"\xff\xfe.png", b"._a.eva.npy", b".png", b"")
            out[at : at + 100] = chosen.choice(names).ljust(100, b"\0")
        else:
            place = at + chosen.randrange(512)
            out[place] = chosen.randrange(256)
        out[at + 148 : at + 156] = b" " * 8
        total = sum(out[at : at + 512])
        out[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    return bytes(out)


def damage_zip(data: bytes, chosen: random.Random) -> bytes:
    """Damage to a member of a stored zip archive, whose checksums are then right."""
    if chosen.random() < 0.3:
        return damage(data, chosen)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        bad = next(name for name in names if name.endswith("data.pkl"))
        bad = bad if chosen.random() < 0.7 else chosen.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, damage(content, chosen) if name == bad else content)
    return out.getvalue()


def damage_npy(data: bytes, chosen: random.Random) -> bytes:
    """Damage to the header of a .npy file, whose length is then right."""
    if chosen.random() < 0.3:
        return damage(data, chosen)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length]
    if chosen.random() < 0.5:
        words = (b"(2, 4, 6)", b"<f4", b"False", b"descr", b"shape", b"fortran_order", b",", b"}")
        others = (
            b"(-1, 4)",
            b"(9999999999, 4, 6)",
            b"|O",
            b"<U9",
            b"True",
            b"1" * 5000,
            b"",
            b"__",
        )
        header = header.replace(chosen.choice(words), chosen.choice(others))
    else:
        header = damage(header, chosen)
    return data[:8] + len(header).to_bytes(2, "little") + header + data[10 + length :]


def rewrap_tar(data: bytes, chosen: random.Random) -> bytes:
    """A tar whose members are damaged, and whose headers fit them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            content = old.extractfile(member).read()
            if chosen.random() < 0.5:
                content = (damage_npy if member.name.endswith(".npy") else damage)(content, chosen)
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return out.getvalue()
